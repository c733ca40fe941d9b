"""Nodes with the model on another device than pictures, latents and texts, as on a GPU, against a run on the CPU alone.

The other device is simulated (`other_device`): what CUDA would refuse raises there, and the numbers have to be the same.
"""

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from other_device import OTHER
from pix2pix_zero.editing.trajectory import KeptMaps, decode
from pix2pix_zero.host.distilled import run as distilled_run
from pix2pix_zero.host.distilled.pair_sets import pair_up, save_pairs
from pix2pix_zero.host.networks import model_kinds
from pix2pix_zero.host.sampling import edit as edit_room
from pix2pix_zero.host.sampling.invert import METHODS
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.nodes.attention_heatmap import Pix2PixZeroAttentionHeatmap
from pix2pix_zero.nodes.caption import Pix2PixZeroCaption, Pix2PixZeroLoadCaptioner
from pix2pix_zero.nodes.demo import Pix2PixZeroDemoModel, Pix2PixZeroDemoScene
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirectionFromSentences
from pix2pix_zero.nodes.distillation import Pix2PixZeroDistill
from pix2pix_zero.nodes.feature_pca import Pix2PixZeroFeaturePCA
from pix2pix_zero.nodes.metrics import Pix2PixZeroEditMetrics
from pix2pix_zero.nodes.noise_report import Pix2PixZeroNoiseReport
from pix2pix_zero.nodes.plug_and_play import Pix2PixZeroPlugAndPlay
from pix2pix_zero.nodes.prompt_to_prompt import Pix2PixZeroPromptToPrompt
from pix2pix_zero.nodes.reference import Pix2PixZeroReference
from small_unet import conditioning
from tiny_judges import make_clip_folder, make_dino_folder, make_lpips_file
from workplaces import (
    CPU,
    STEPS,
    TEXT,
    ShortOfMemory,
    assert_same,
    both_workplaces,
    edit,
    host_on,
    invert,
    kept_levels,
    left_half,
    parts,
    sample,
)

pytestmark = pytest.mark.usefixtures("narrow_unet")


@pytest.fixture(scope="module")
def workplaces():
    with both_workplaces() as made:
        yield made


@pytest.fixture
def same_on_both(workplaces):
    """`same_on_both(run)`: what `run(workplace)` gives on the other device, checked to be the same on the CPU.

    `between`: where that has its tensors between nodes.
    """

    def check(run, tolerance=1e-5, between=CPU):
        results = []
        for workplace in workplaces:
            with host_on(workplace.device, between), torch.inference_mode():
                result = list(parts(run(workplace)))
                if between == OTHER:
                    result = [part.cpu() if isinstance(part, torch.Tensor) else part for part in result]
                results.append(result)
        for expected, ours in zip(*results, strict=True):
            assert_same(ours, expected, tolerance)
        return results[1]

    return check


@pytest.mark.parametrize("method", METHODS)
def test_inversion(same_on_both, method):
    steps = 3 if method == "official" else STEPS  # the least it takes
    same_on_both(lambda here: invert(here, method=method, steps=steps, measure_reconstruction=method == "direct"))


EDITS = {
    "default": {},
    "fast": {"preset": "fast", "local_blend": 0.0},
    "low memory": {"preset": "low memory", "mask": left_half(), "end_percent": 0.7},
    "official": {"preset": "official", "end_percent": 0.7},
    "unguided": {"guidance_strength": 0.0},
    "features": {"feature_until": 0.7, "start_percent": 0.3, "end_percent": 0.9},
}


@pytest.mark.parametrize("name", EDITS)
def test_guided_sampling(same_on_both, name):
    same_on_both(lambda here: edit(here, **EDITS[name]))


def test_maps_that_did_not_all_fit(same_on_both):
    def run(here):
        inversion = invert(here, map_memory=0.008)[0]
        assert kept_levels(inversion) == [STEPS]
        return edit(here, inversion)

    same_on_both(run)


def test_a_batch_with_a_text_for_each_picture(same_on_both):
    def run(here):
        texts, edits = ([conditioning(seed=seed) for seed in seeds] for seeds in ((0, 2), (1, 3)))
        inversion = invert(here, texts, batch=2, noise_mask=left_half())[0]
        return inversion, edit(here, inversion, texts, edits, feature_until=0.7)

    same_on_both(run)


def test_generated_reference(same_on_both):
    def run(here):
        empty = {"samples": torch.zeros(1, 4, 8, 12)}
        inversion, generated = Pix2PixZeroReference.execute(
            here.model, conditioning(), conditioning(seed=9), empty, STEPS, 3.0, 7
        ).result
        return inversion, generated

    same_on_both(run)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_plug_and_play(same_on_both, alpha):
    def run(here):
        inversion = here.inversion if alpha == 1 else invert(here, noise_mask=left_half())[0]
        (model,) = Pix2PixZeroPlugAndPlay.execute(here.model, inversion, 0.8, 0.5, alpha).result
        return sample(here, model, inversion, conditioning(seed=1), conditioning(seed=2))

    same_on_both(run)


@pytest.mark.parametrize("options", [{}, {"reweight": "dog: 2", "local_blend": 0.3}], ids=["plain", "blend"])
def test_prompt_to_prompt(same_on_both, options):
    def run(here):
        inversion = here.inversion_of_text
        model, positive = Pix2PixZeroPromptToPrompt.execute(
            here.model, inversion, here.clip, TEXT, "a dog on a sofa", 0.7, 0.4, **options
        ).result
        return positive[0][0], sample(here, model, inversion, positive, here.encode("ugly"))

    same_on_both(run)


def test_edit_direction(same_on_both):
    def run(here):
        lines = "a cat\na black cat", "a dog\na black dog"
        (direction,) = Pix2PixZeroEditDirectionFromSentences.execute(here.clip, *lines).result
        (moved,) = Pix2PixZeroApplyDirection.execute(here.encode(TEXT), direction, 0.7).result
        return direction, moved

    same_on_both(run)


@pytest.mark.parametrize("kept", [True, False])
def test_heatmaps(same_on_both, kept):
    def run(here):
        inversion = here.inversion_of_text if kept else invert(here, [here.encode(TEXT)], map_memory=0)[0]
        inputs = dict(caption=TEXT, words="cat", start_percent=0.0, end_percent=1.0, resolution="all")
        lists = {name: [value] for name, value in inputs.items()}
        return Pix2PixZeroAttentionHeatmap.execute(
            model=[here.model], inversion=[inversion], clip=[here.clip], **lists
        ).result

    same_on_both(run, tolerance=1 / 255)


@pytest.mark.parametrize("features", ["residual features", "keys"])
def test_feature_pictures(same_on_both, features):
    same_on_both(lambda here: Pix2PixZeroFeaturePCA.execute(here.model, here.inversion, features, 0.3).result, 1e-4)


def test_the_demo_models_text_encoder_and_autoencoder(same_on_both):
    picture, _, caption = scene()

    def run(here):
        model, clip, vae = Pix2PixZeroDemoModel.execute().result
        assert {model.load_device, clip.patcher.load_device, vae.device} == {here.device}
        latents = vae.encode(picture)
        return clip.encode_from_tokens(clip.tokenize(caption)), latents, vae.decode(latents)

    same_on_both(run)


def scene():
    return Pix2PixZeroDemoScene.execute("cat", 3, "orange", "no", "day", "summer", "flat", "sitting").result


def test_captions(same_on_both):
    def run(here):
        (captioner,) = Pix2PixZeroLoadCaptioner.execute("demo", False).result
        return Pix2PixZeroCaption.execute(scene()[0], captioner, "a drawing of", 4).result

    assert "cat" in same_on_both(run)[0]


def test_metrics(same_on_both, tmp_path, monkeypatch):
    make_clip_folder(tmp_path / "clip")
    make_dino_folder(tmp_path / "dino")
    make_lpips_file(tmp_path / "lpips.safetensors")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, model_kinds.METRICS_FOLDER, ([str(tmp_path)], {".safetensors"})
    )
    source, edited = (F.interpolate(torch.rand(1, 3, 5, 5), (40, 48)).movedim(1, -1) for _ in range(2))
    mask = torch.zeros(1, 40, 48)
    mask[:, 8:24, 10:30] = 1

    def run(here):
        return Pix2PixZeroEditMetrics.execute(
            [source],
            [edited],
            [mask],
            ["a photo of a cat"],
            ["a photo of a dog"],
            clip_model=["clip"],
            dino_model=["dino"],
            lpips_model=["lpips.safetensors"],
        ).result

    same_on_both(run)


def test_previews(same_on_both, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)

    def run(here):
        shown = []
        with monkeypatch.context() as patch:
            patch.setattr(comfy.utils, "PROGRESS_BAR_ENABLED", True)
            patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: shown.append(preview))
            edit(here, invert(here)[0], preset="fast")
        return [torch.from_numpy(np.asarray(preview[1], dtype=np.float32)) for preview in shown if preview is not None]

    pictures = same_on_both(run, tolerance=1.5 / 255)
    assert len(pictures) == STEPS + 1 + STEPS, "the inversion's correction takes a pass of its own"


def test_out_of_memory(same_on_both, caplog):
    def run(here):
        model = here.model.clone()
        model.set_model_attn1_patch(ShortOfMemory(times=2))
        texts, edits = ([conditioning(seed=seed) for seed in seeds] for seeds in ((0, 2), (1, 3)))
        return edit(here, invert(here, texts, batch=2, model=model)[0], texts, edits, model=model, end_percent=0.7)

    same_on_both(run)
    assert caplog.text.count("Out of memory in a guided step") == 4


def test_weights_that_stay_on_the_cpu(same_on_both, monkeypatch):
    load = comfy.model_patcher.ModelPatcher.partially_load

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        room = self.model_size() // 3 - self.model.model_loaded_weight_memory
        return load(self, device_to, max(room, 0), force_patch_weights)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", partially_load)

    def run(here):
        model = here.new_model()
        inversion = invert(here, model=model)[0]
        assert model.model.model_lowvram
        return edit(here, inversion, model=model, end_percent=0.7)

    same_on_both(run)


def edit_with(here, weight_dtype):
    model = here.new_model(weight_dtype=weight_dtype)
    inversion = invert(here, model=model)[0]
    return edit(here, inversion, model=model, feature_until=0.5)[0]["samples"]


@pytest.fixture(scope="module")
def exact(workplaces):
    """An edit in full precision."""
    with host_on(CPU), torch.inference_mode():
        return edit_with(workplaces[0], torch.float32)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 0.005), (torch.bfloat16, 0.04)])
def test_half_precision(workplaces, exact, dtype, rounding):
    edits = []
    for here in workplaces:
        with host_on(here.device), torch.inference_mode():
            edits.append(edit_with(here, dtype))
    half, there = edits
    assert there.dtype == torch.float32
    assert (half - exact).norm() <= rounding * exact.norm()
    assert (there - half).norm() <= rounding / 5 * exact.norm()


def test_where_everything_stays_on_the_device_between_nodes(same_on_both):
    """ComfyUI's --gpu-only."""

    def run(here):
        texts, edits = ([conditioning(seed=seed) for seed in seeds] for seeds in ((0, 2), (1, 3)))
        inversion, noise, *_ = invert(here, texts, batch=2, noise_mask=left_half())
        latents, area = edit(here, inversion, texts, edits, mask=left_half(), end_percent=0.7)
        noise = {"samples": noise["samples"][:1]}
        assert {latents["samples"].device, noise["samples"].device, area.device} == {
            comfy.model_management.intermediate_device()
        }
        return inversion, latents, Pix2PixZeroNoiseReport.execute(noise, inversion).result

    same_on_both(run, between=OTHER)


@pytest.mark.parametrize("room", ["on the device", "in RAM"])
def test_distilling_an_edit(room, same_on_both, tmp_path, monkeypatch):
    """Pairs lie on the device where they fit."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    folders = ([str(tmp_path / "upscale")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "upscale_models", folders)
    if room == "in RAM":
        monkeypatch.setattr(distilled_run, "PART_OF_MEMORY", 0.0)
    pictures = torch.rand(50, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    save_pairs("swap", pair_up([pictures], [pictures.flip(-1)]), True)
    node = Pix2PixZeroDistill
    settings = {"dataset": "swap", "name": "swap", "size": "small", "steps": 11, "batch": 2, "crop": 32}

    def run(here):
        made = node.execute(**settings, learning_rate=0.002, seed=0, resume=False).result
        return made[1], made[3]["loss"]

    same_on_both(run, 1e-2)


def contrast_in_ram(self, x, sigma, contrast=UNetPasses.contrast):
    return contrast(self, x, sigma).cpu()


def area_on_the_device(model, latent, noise_mask, blend):
    return torch.ones(1, 64, 96, device=OTHER)


MISTAKES = {
    "kept maps": ((KeptMaps, "__getitem__", lambda self, key: decode(self._codes[key])), "two devices", 6e-4),
    "contrast": ((UNetPasses, "contrast", contrast_in_ram), "two devices", 0.0),
    "edited area": ((edit_room, "edited_area", area_on_the_device), "left on the other device", 0.0),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_tensor_in_the_wrong_place_is_found(same_on_both, monkeypatch, name):
    fault, words, strength = MISTAKES[name]
    monkeypatch.setattr(*fault)
    with pytest.raises((RuntimeError, AssertionError), match=words):
        same_on_both(lambda here: edit(here, guidance_strength=strength))
