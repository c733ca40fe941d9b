"""Pictures of any size, batches of any number, and as much memory as there is."""

import inspect

import comfy.ldm.modules.attention as attention
import comfy.model_management
import pytest
import torch
from composed_run import directional_derivative, edit, guided_step, invert, same, soft_model
from guided_pass import latents
from patch_catalogue import combined, control_net, gligen, random, regional, unequal
from pix2pix_zero.editing.directions import EditDirection
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.methods.plug_and_play import with_source_features
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.unet.jobs import UNetCall
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from small_unet import CONTEXT_DIM, SHALLOW, TOKENS, changed, conditioning, latent

pytestmark = pytest.mark.usefixtures("narrow_unet")

STRENGTH = 0.005
MILD = NoiseRegularization(kl_weight=1.0, steps=1, rolls=2)


@pytest.fixture(scope="module")
def model():
    return soft_model()


@pytest.fixture(scope="module")
def shallow():
    """For what depends neither on the number of layers nor on the sizes of their maps."""
    with changed(SHALLOW):
        return soft_model()


@pytest.fixture(scope="module")
def double():
    return soft_model(torch.float64)


# Odd ones are halved and doubled again by the UNet.
@pytest.mark.parametrize("shape", [(9, 13), (1, 8), (3, 1), (2, 31), (17, 25)])
def test_a_picture_of_any_size_comes_back_and_can_be_edited(model, shape):
    picture = latent(1, *shape)
    with torch.inference_mode():
        inversion = invert_latent(model, conditioning(), picture, InversionSettings(2, 0, MILD))
    again = edit(model, inversion, conditioning(), conditioning())
    assert same(again, picture["samples"])
    edited, lean = (edit(model, inversion, strength=STRENGTH, preset=name) for name in ("default", "low memory"))
    assert edited.shape == (1, 4, *shape)
    assert same(lean, edited)
    assert not same(edited, edit(model, inversion), 1e-3), "guidance must matter"


@pytest.mark.parametrize("shape", [(9, 13), (1, 8)])
def test_the_gradient_is_right_at_odd_sizes(model, double, shape):
    x_source, x = latents(model, height=shape[0], width=shape[1])
    texts = conditioning(), conditioning(seed=1), conditioning(seed=9)
    _, _, gradient, _ = guided_step(model, texts, x_source, x)
    direction = random(*x.shape, seed=3).double()
    slope, _ = directional_derivative(double, texts[:2], x_source.double(), x.double(), direction, 1e-4)
    assert float((gradient.double() * direction).sum()) == pytest.approx(float(slope), rel=1e-3)


@pytest.mark.parametrize("shape", [(9, 13), (1, 8)])
def test_plug_and_play_takes_odd_sizes(model, shape):
    inversion = invert(model, picture=latent(1, *shape), method="direct")
    with torch.inference_mode():
        plugged = with_source_features(model, inversion, 1.0, 1.0)
    assert same(edit(plugged, inversion, conditioning(), conditioning()), latent(1, *shape)["samples"])


def direction(seed):
    tensors = {"cond": 0.5 * random(1, TOKENS, CONTEXT_DIM, seed=seed)}
    return EditDirection(tensors, "", "cat", "dog", 1)


@pytest.mark.parametrize("seeds", [(5,), (5, 6)], ids=["one direction for all", "one each"])
def test_pictures_of_a_batch_have_a_caption_and_a_direction_each(shallow, run_node, seeds):
    """As ComfyUI runs a list of captions and directions: Apply Direction once for each, the samplers once for all."""
    captions, pictures = [conditioning(seed=seed) for seed in (0, 1)], latent(2, 8, 8)
    directions = [direction(seeds[min(i, len(seeds) - 1)]) for i in range(2)]
    edits = [run_node(Pix2PixZeroApplyDirection, conditioning=c, direction=d)[0] for c, d in zip(captions, directions)]

    def run(captions, edits, picture):
        inversions = run_node(
            Pix2PixZeroInversion,
            **{"model": [shallow], "positive": captions, "latent_image": [picture], "steps": [2], "seed": [0]},
            **{"autocorrelation_weight": [0.0], "kl_weight": [0.0], "regularization_steps": [0]},
            **{"autocorrelation_rolls": [1], "method": ["ddim"]},
        )[0]
        (latents,) = run_node(
            Pix2PixZeroKSampler,
            **{"model": [shallow], "inversion": inversions, "positive": edits, "negative": captions, "cfg": [2.0]},
            **{"guidance_strength": [STRENGTH], "start_percent": [0.0], "end_percent": [1.0], "preset": ["default"]},
        )[0]
        return latents["samples"]

    together = run(captions, edits, pictures)
    for i in range(2):
        alone = run([captions[i]], [edits[i]], {"samples": pictures["samples"][i : i + 1]})
        assert same(together[i : i + 1], alone)


@pytest.fixture
def no_memory(monkeypatch):
    """(rows and texts of every guided UNet call, a function after which no memory is free, or so many bytes)."""
    rows = []
    run = UNetCall.__call__

    def watched(self, x, *args, **kwargs):
        if torch.is_grad_enabled():
            rows.append((len(x), len(self.uuids)))
        return run(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetCall, "__call__", watched)

    def shrink(free=0):
        def get(device=None, torch_free_too=False):
            return (free, free) if torch_free_too else free

        monkeypatch.setattr(comfy.model_management, "get_free_memory", get)
        rows.clear()

    return rows, shrink


def own(texts, rows):
    """A text for each picture."""
    return [[text + 0.3 * random(rows, *text.shape[1:], seed=8), options] for text, options in texts]


@pytest.mark.parametrize(
    "patch",
    [None, regional, unequal, control_net],
    ids=["one text", "an area", "texts of unequal length", "ControlNet"],
)
def test_a_batch_that_memory_does_not_hold_is_split_with_the_same_result(shallow, no_memory, patch):
    rows, shrink = no_memory
    texts = [own(conditioning(seed=seed), 3) for seed in (0, 1)]
    source, positive = (patch(text, "positive") if patch else text for text in texts)
    inversion = invert(shallow, source, latent(3, 8, 12))
    whole = edit(shallow, inversion, positive, strength=STRENGTH)
    assert max(rows)[0] == 3 * max(rows)[1] or patch is regional
    shrink()
    split = edit(shallow, inversion, positive, strength=STRENGTH)
    assert set(rows) == {(1, 1)}
    assert same(split, whole)


def with_own_boxes(module):
    """GLIGEN's module as packs that move boxes from picture to picture use it: each row of a batch has its own."""
    set_position = module.set_position

    def set_positions(shape, boxes, device):
        moved = [[(text, height, width, y, x + row) for text, height, width, y, x in boxes] for row in range(shape[0])]
        patches = [set_position((1, *shape[1:]), row, device) for row in moved]
        objs = torch.cat([inspect.getclosurevars(patch).nonlocals["objs"] for patch in patches])

        def patch(x, options):
            return module.module_list[options["transformer_index"]](x, objs.to(x))

        return patch

    module.set_position = set_positions


@pytest.mark.parametrize("own_boxes", [True, False], ids=["boxes of their own", "boxes for all"])
def test_a_batch_with_boxes_stays_whole(shallow, no_memory, monkeypatch, own_boxes):
    rows, shrink = no_memory
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)  # GLIGEN's own
    with changed(SHALLOW):
        source, positive = (gligen(own(conditioning(seed=seed), 2), "positive") for seed in (0, 1))
    if own_boxes:
        for texts in (source, positive):
            with_own_boxes(texts[0][1]["gligen"][1].model)
    inversion = invert(shallow, source, latent(2, 8, 12))
    whole = edit(shallow, inversion, positive, strength=STRENGTH)
    shrink()
    assert same(edit(shallow, inversion, positive, strength=STRENGTH), whole)
    assert set(rows) == {(2, 1)}


def test_a_batch_with_a_patch_that_may_hold_rows_stays_whole(shallow, no_memory):
    class Patch:
        def __call__(self, x, options):
            return 1.1 * x

    rows, shrink = no_memory
    patched = shallow.clone()
    patched.set_model_patch(Patch(), "middle_patch")
    inversion = invert(patched, picture=latent(2, 8, 8), steps=1)
    whole = edit(patched, inversion, strength=STRENGTH)
    shrink()
    assert same(edit(patched, inversion, strength=STRENGTH), whole)
    assert set(rows) == {(2, 1)}


@pytest.fixture(scope="module")
def three(shallow):
    """Three pictures with a text each: their inversion, the texts of the edit, and the edit."""
    source, positive = (own(conditioning(seed=seed), 3) for seed in (0, 1))
    inversion = invert(shallow, source, latent(3, 8, 12))
    return inversion, positive, edit(shallow, inversion, positive, strength=STRENGTH)


@pytest.mark.parametrize("by_node", [True, False], ids=["on the model", "by the sampler"])
def test_features_are_split_with_the_pictures_they_are_of(shallow, three, no_memory, by_node):
    rows, shrink = no_memory
    inversion, positive, plain = three
    with torch.inference_mode():
        plugged = with_source_features(shallow, inversion, 0.5, 0.5) if by_node else shallow
    settings = {"strength": STRENGTH, "feature_until": 0.0 if by_node else 0.5}
    whole = edit(plugged, inversion, positive, **settings)
    assert not same(whole, plain)
    shrink()
    split = edit(plugged, inversion, positive, **settings)
    assert set(rows) == {(1, 1)}
    assert same(split, whole)


def test_a_batch_that_runs_out_of_memory_goes_on_with_fewer_pictures(shallow, caplog):
    """Another pack's patch fails as the allocator would, until two pictures at most are guided at once."""
    inversion = invert(shallow, picture=latent(5, 8, 8))
    expected = edit(shallow, inversion, strength=STRENGTH)

    def allocate(q, k, v, options):
        if torch.is_grad_enabled() and len(q) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (test)")
        return q, k, v

    short = shallow.clone()
    short.set_model_attn1_patch(allocate)
    assert same(edit(short, inversion, strength=STRENGTH), expected)
    assert len([record for record in caplog.records if "Out of memory" in record.message]) == 4, (
        "blocks, 5 rows of both texts, 3, 2"
    )


def test_an_inversion_whose_branches_are_split_is_the_same(shallow, no_memory):
    _, shrink = no_memory
    source = combined(conditioning(), "positive")
    texts, patched = [], shallow.clone()

    def watched(apply_model, args):
        texts.append(len(args["cond_or_uncond"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(watched)
    whole = invert(patched, source)
    assert set(texts) == {2}
    texts.clear()
    shrink(100_000)  # enough for the latents of the way, and for no call of the UNet
    assert same(invert(patched, source).trajectory, whole.trajectory, 1e-5)
    assert set(texts) == {1}
