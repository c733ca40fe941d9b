"""Prompt-to-Prompt on diffusion transformers: the source's queries and keys, words weighted before the softmax, the blend."""

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.samplers import KSAMPLER, CFGGuider
from flow_families import FAMILIES, TOKENS, picture, small_family
from joint_runs import FIRST_ROW, PATCH, Seen, noted
from joint_texts import family_clip
from pix2pix_zero.attention_patches.joint import Attention, holding_sites
from pix2pix_zero.attention_patches.joint_maps import reweighted, text_maps
from pix2pix_zero.host.methods import joint_blocks, joint_prompts
from pix2pix_zero.host.methods.prompt_to_prompt import PromptEditSettings, edit_by_prompt
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from plug_and_play_runs import sample

NAMES = [name for name, family in FAMILIES.items() if family.known]
SOURCE, TARGET = "a photo of a cat on a sofa", "a photo of a dog on a sofa"


class Edit:
    """A family with an inverted picture and its text."""

    def __init__(self, name, steps=2):
        self.model, self.clip = small_family(name), family_clip(name)
        self.text = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(SOURCE))
        self.clean = picture(self.model)["samples"]
        self.first_row = FIRST_ROW[name] + (self.text[0][0].shape[1] - TOKENS if FIRST_ROW[name] not in (0, 512) else 0)
        if name == "Z-Image":
            self.first_row = -(-self.text[0][0].shape[1] // 32) * 32
        self.inversion = invert_latent(self.model, self.text, {"samples": self.clean}, InversionSettings(steps))

    def draw(self, target=TARGET, cross=0.5, to_itself=1.0, model=None, **settings):
        with torch.inference_mode():
            patched, positive = edit_by_prompt(
                model or self.model,
                self.inversion,
                self.clip,
                SOURCE,
                target,
                PromptEditSettings(cross, to_itself, **settings),
            )
        return sample(patched, self.inversion, positive, self.text, 2.0)

    def off(self, drawn):
        return (drawn - self.clean).abs().amax((0, 1)).reshape(8, 12)


@pytest.fixture(scope="module")
@torch.inference_mode()
def sd3():
    return Edit("SD 3")


@pytest.mark.works("Prompt-to-Prompt", family=FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_caption_itself_draws_the_picture_and_another_asks_as_the_source_does(name):
    with torch.inference_mode():
        edit = Edit(name)
    scale = edit.clean.std()
    assert edit.off(edit.draw(SOURCE)).max() <= 1e-3 * scale
    seen = Seen()
    edited = edit.draw(model=seen.patch(edit.model))
    assert edited.isfinite().all() and edit.off(edited).max() > 1e-4 * scale
    rows = slice(edit.first_row, edit.first_row + 96 // PATCH[name] ** 2)
    # The source's call ends where its last queries are read, ahead of that attention.
    shared = [same for same, _ in pairs(seen, rows)]
    assert len(shared) >= edit.inversion.steps * (len(holding_sites(edit.model.model.diffusion_model)) - 1)


def pairs(seen, rows):
    """Of each call of the source and one of the edit that asks alike in one row of two: whether q and k are the same there."""
    whole = [call for call in seen.calls if rows.stop <= call[0].shape[1] == call[1].shape[1]]
    source, edit = ([call for call in whole if len(call[0]) == count] for count in (1, 2))
    for theirs in source:
        for ours in edit:
            if theirs[0].shape[1:] == ours[0].shape[1:]:
                same = [[torch.equal(part[rows], theirs[i][0, rows]) for part in ours[i]] for i in (0, 1)]
                if any(same[0]):
                    yield same


@pytest.mark.parametrize(("to_itself", "keys"), [(1.0, True), (0.0, False)])
def test_only_the_edited_text_asks_as_the_source_and_it_answers_so_as_long_as_it_holds_itself(sd3, to_itself, keys):
    seen = Seen()
    sd3.draw(model=seen.patch(sd3.model), cross=1.0, to_itself=to_itself)
    later = list(pairs(seen, slice(154, 154 + 24)))[1:]  # at the first level, all latents are one
    assert len(later) == sd3.inversion.steps - 1
    for queries, answers in later:
        assert sum(queries) == 1
        assert any(answers) == keys and (not keys or answers == queries)


def random_attention(mask=None, heads=4, keys=2):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, 40, 8, generator=generator)
    k, v = (torch.randn(2, keys, 40, 8, generator=generator) for _ in range(2))
    options = {"skip_reshape": True, "enable_gqa": True, "mask": mask}
    return Attention(None, slice(7, 40), attention_pytorch, (heads,), options), q, k, v


def logits_of(q, k, mask):
    bias = 0.0 if mask is None else torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
    bias = bias.double().unsqueeze(1) if torch.is_tensor(bias) else bias
    return q.double() @ k.double().repeat_interleave(2, 1).mT * 8**-0.5 + bias


MASKS = {
    "none": None,
    "keys": torch.linspace(-2, 0, 80).reshape(2, 1, 40),
    "rows": torch.linspace(-2, 0, 3200).reshape(2, 40, 40),
    "bool": torch.arange(40).expand(2, 1, 40) != 3,
}


@pytest.mark.parametrize("mask", list(MASKS))
def test_weighted_words_are_a_softmax_with_the_logarithm_of_their_factors_added(mask):
    mask = MASKS[mask]
    attention, q, k, v = random_attention(mask)
    factors = torch.tensor([1.0, 3.0, 1.0, 0.0])
    logits = logits_of(q, k, mask)
    plain = logits.softmax(-1)[:, :, 7:]
    maps = text_maps(attention, q, k, slice(2, 6))
    assert (maps - plain[..., 2:6].mean(1)).abs().max() <= 1e-6
    values = v.double().repeat_interleave(2, 1)
    out = (plain @ values).transpose(1, 2).flatten(2).float()
    logits[..., 2:6] += factors.double().log()
    expected = (logits.softmax(-1) @ values)[:, :, 7:].transpose(1, 2).flatten(2)
    assert (reweighted(attention, q, k, v, out, (slice(2, 6), factors)) - expected).abs().max() <= 1e-5


def test_a_word_that_is_read_more_changes_the_picture_and_one_that_is_read_as_before_does_not(sd3):
    plain = sd3.draw()
    assert torch.equal(sd3.draw(reweight="sofa: 1"), plain)
    assert (sd3.draw(reweight="sofa: 4") - plain).abs().max() > 1e-5
    with pytest.raises(ValueError, match="^reweight: 'sofa' has -1"):
        sd3.draw(reweight="sofa: -1")
    with pytest.raises(ValueError, match="^reweight: 'hat' does not occur in target"):
        sd3.draw(reweight="hat: 2")


@pytest.mark.parametrize("name", ["SD 3", "Qwen-Image", "Wan 2.1"])
def test_the_local_blend_keeps_the_picture_where_the_changed_words_are_not_read(name):
    with torch.inference_mode():
        edit = Edit(name, steps=5)
    off = edit.off(edit.draw(cross=0.2, to_itself=0.0, local_blend=0.95))
    assert (off <= 1e-3 * edit.clean.std()).any() and off.max() > 1e-4 * edit.clean.std()
    with pytest.raises(ValueError, match="^blend_words: 'hat' does not occur"):
        edit.draw(local_blend=0.5, blend_words="hat")


def test_another_caption_and_another_encoder_are_told(sd3):
    with torch.inference_mode(), pytest.raises(ValueError, match="^source: it is 13 tokens long"):
        edit_by_prompt(sd3.model, sd3.inversion, family_clip("Qwen-Image"), SOURCE, TARGET, PromptEditSettings())


@torch.inference_mode()
def test_blocks_are_chosen_by_where_the_predictions_differ(sd3, monkeypatch):
    """With one block to choose it is the one that agrees least."""
    monkeypatch.setattr(joint_blocks, "CHOSEN", 1)
    chosen, scores = noted(monkeypatch, joint_prompts, "scored_sites"), noted(monkeypatch, joint_blocks, "agreement")
    sd3.draw()
    assert len(scores) == 2
    assert [[site.number for site in sites] for sites in chosen[0]] == [[scores.index(min(scores))]]
    sd3.draw(SOURCE)
    assert chosen[1] == [holding_sites(sd3.model.model.diffusion_model)]  # no difference, nothing to choose by


@torch.inference_mode()
def test_pictures_of_a_batch_take_the_sources_rows_in_the_blocks_that_they_have_alone(sd3, monkeypatch):
    monkeypatch.setattr(joint_blocks, "CHOSEN", 1)
    chosen = noted(monkeypatch, joint_prompts, "scored_sites")
    samples = torch.cat([picture(sd3.model, seed=seed)["samples"] for seed in (4, 7)])

    def draw(samples):
        inversion = invert_latent(sd3.model, sd3.text, {"samples": samples}, InversionSettings(2))
        settings = PromptEditSettings(0.5, 1.0)
        patched, positive = edit_by_prompt(sd3.model, inversion, sd3.clip, SOURCE, TARGET, settings)
        return sample(patched, inversion, positive, sd3.text, 2.0)

    together, alone = draw(samples), torch.cat([draw(one) for one in samples.split(1)])
    assert chosen[0] == [choice for (choice,) in chosen[1:]] and chosen[0][0] != chosen[0][1]
    assert (together - alone).abs().max() <= 1e-4


@torch.inference_mode()
def test_a_sampler_that_changes_the_size_is_refused(sd3):
    patched, positive = edit_by_prompt(sd3.model, sd3.inversion, sd3.clip, SOURCE, TARGET, PromptEditSettings())

    def enlarge(model, x, sigmas, extra_args=None, **options):
        larger = torch.cat([x, x], -1)
        return model(larger, sigmas[:1].expand(len(x)), **extra_args)[..., : x.shape[-1]]

    guider = CFGGuider(patched)
    guider.set_conds(positive, sd3.text)
    noise = torch.zeros_like(sd3.clean)
    with pytest.raises(ValueError, match="^sampler: it draws at another size"):
        guider.sample(noise, sd3.clean, KSAMPLER(enlarge), sd3.inversion.sigmas.flip(0), disable_pbar=True)


def test_a_node_that_answers_in_place_of_the_model_is_named(sd3):
    lazy = sd3.model.clone()
    lazy.set_model_unet_function_wrapper(lambda apply, args: torch.zeros_like(args["input"]))
    with pytest.raises(ValueError, match="model: another node .* leaves out UNet calls"):
        sd3.draw(model=lazy)
