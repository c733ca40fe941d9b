"""Edits of a part of the picture: masks of any size, softness and number keep the rest exactly the source's."""

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from composed_run import edit, invert, sampled, soft_model
from pix2pix_zero.host.sampling.edit import PRESETS
from pix2pix_zero.host.sampling.flow_edit import FlowEditing, flow_edit_latent
from pix2pix_zero.host.sampling.source import edited_area, masked
from pix2pix_zero.nodes.flow_edit import Pix2PixZeroFlowEdit
from pix2pix_zero.nodes.sockets import with_defaults
from small_unet import conditioning, latent

import nodes as core

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")

STRENGTH = 0.005
HEIGHT, WIDTH = 8, 12


@pytest.fixture(scope="module")
def model():
    return soft_model()


def left(height, width, count=1):
    mask = torch.zeros(count, height, width)
    mask[..., : width // 2] = 1.0
    return mask


def picture_with(mask, batch=1):
    """As the node Set Latent Noise Mask gives it."""
    return core.SetLatentNoiseMask().set_mask(latent(batch, HEIGHT, WIDTH), mask)[0]


def changes(model, picture, **options):
    edited = edit(model, invert(model, picture=picture), strength=STRENGTH, cfg=4.0, **options)
    return (edited - picture["samples"]).abs() / picture["samples"].std()


def assert_only_the_left_half_changes(changed):
    assert changed[..., WIDTH // 2 + 1 :].max() <= 1e-5
    assert changed[..., : WIDTH // 2 - 1].mean() > 0.1


@pytest.mark.parametrize(
    "mask",
    [left(64, 96), left(8, 12), left(33, 50), left(700, 70)],
    ids=["of the picture", "of the latent", "of an odd size", "of another shape"],
)
def test_outside_a_mask_of_any_size_the_source_stays_exactly(model, mask):
    assert_only_the_left_half_changes(changes(model, picture_with(mask)))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_keeps_the_source_outside_a_mask(model, preset):
    assert_only_the_left_half_changes(changes(model, picture_with(left(64, 96)), preset=preset))


def test_each_picture_of_a_batch_has_its_own_mask(model):
    masks = torch.cat([left(64, 96), 1 - left(64, 96)])
    changed = changes(model, picture_with(masks, batch=2))
    assert changed[0, ..., 7:].max() <= 1e-5
    assert changed[1, ..., :5].max() <= 1e-5
    assert changed[0, ..., :5].mean() > 0.1
    assert changed[1, ..., 7:].mean() > 0.1


def test_each_picture_of_a_batch_has_its_own_mask_at_the_sampler(model):
    """Beside a mask of the latent, whose part they share, and in FlowEdit."""
    masks = torch.cat([left(64, 96), 1 - left(64, 96)])
    top = torch.ones(1, 64, 96)
    top[:, 40:] = 0.0
    picture = picture_with(top, batch=2)
    flow = FlowEditing(steps=4, local_blend=0.0, mask=masks)
    with torch.inference_mode():
        flowed, area = flow_edit_latent(model, conditioning(), conditioning(seed=1), None, picture, flow)
    for changed in (changes(model, picture, mask=masks), (flowed - picture["samples"]).abs()):
        assert changed[0, ..., 7:].max() <= 1e-5
        assert changed[1, ..., :5].max() <= 1e-5
        assert changed[:, :, 6:].max() <= 1e-5
        assert changed[0, :, :4, :5].min() > 0
        assert changed[1, :, :4, 7:].min() > 0
    assert area[0, :32, :40].min() > 0.99
    assert area[1, :32, 56:].min() > 0.99


def test_a_mask_of_bytes_is_one_of_all_or_nothing(model):
    """Values beyond 0 to 1 would not mix the picture with the source but go far beyond both."""
    inversion = invert(model, picture=latent(1, HEIGHT, WIDTH))
    ours, expected = (edit(model, inversion, mask=mask) for mask in (255 * left(64, 96).byte(), left(64, 96)))
    assert torch.equal(ours, expected)
    ours, expected = (changes(model, picture_with(mask)) for mask in (3 * left(64, 96) - 1, left(64, 96)))
    assert torch.equal(ours, expected)


def test_one_mask_is_for_all_pictures_and_more_masks_are_cut_off(model):
    both = changes(model, picture_with(left(64, 96), batch=2))
    assert both[..., 7:].max() <= 1e-5
    more = changes(model, picture_with(torch.cat([left(64, 96, 2), torch.ones(3, 64, 96)]), batch=2))
    assert torch.equal(more, both)


def test_fewer_masks_than_pictures_are_refused(model):
    """The host would go through them again and give the third picture the first one's."""
    two = left(64, 96, 2)
    with pytest.raises(ValueError, match="latent_image: it brings 2 masks for 3 pictures"):
        invert(model, picture={**latent(3, HEIGHT, WIDTH), "noise_mask": two})
    with pytest.raises(ValueError, match="mask: it brings 2 masks for 3 pictures"):
        edit(model, invert(model, picture=latent(3, HEIGHT, WIDTH)), mask=two)


def test_masks_of_texts_are_one_for_each_picture_or_one_for_all(model):
    two = [[conditioning()[0][0], {"mask": left(64, 96, 2), "mask_strength": 1.0}]]
    with pytest.raises(ValueError, match="positive: it brings 2 masks for 3 pictures"):
        invert(model, two, latent(3, HEIGHT, WIDTH))


def test_a_text_may_have_a_mask_of_true_and_false(model, run_node):
    """The host cannot resize one."""
    texts = [[conditioning(), conditioning(seed=1)] for _ in range(2)]
    drawn = []
    for kind in (torch.bool, torch.float32):
        source, target = (
            [[here[0][0], {"mask": left(64, 96).to(kind), "mask_strength": 1.0}], *beside]
            for here, beside in (texts[0], texts[1][::-1])
        )
        inputs = {"model": model, "source": source, "target": target, "latent_image": latent(1, HEIGHT, WIDTH)}
        inputs = with_defaults(Pix2PixZeroFlowEdit, {**inputs, "steps": 2})
        drawn.append(
            run_node(Pix2PixZeroFlowEdit, **{name: [value] for name, value in inputs.items()})[0][0]["samples"]
        )
    assert torch.equal(*drawn)


def test_masks_of_latent_and_sampler_limit_together(model):
    inversion = masked(invert(model, picture=picture_with(left(64, 96))), left(96, 64).mT.contiguous())
    area = edited_area(model, inversion.trajectory[0], inversion.noise_mask, None)
    assert area.shape == (1, HEIGHT * 8, WIDTH * 8)
    assert area[:, :24, :40].min() > 0.99
    assert area[:, 40:].max() == area[:, :, 56:].max() == 0


def stock_with_mask(model, inversion, mask_at):
    """The unguided edit, blended with the trajectory by a mask at each level, by the stock evaluation."""

    def walk(model_k, x, sigmas, extra_args, callback, disable):
        x = inversion.trajectory[-1].to(x)
        levels = inversion.sigmas.tolist()
        for i in range(len(levels) - 1, 0, -1):
            denoised = model_k(x, x.new_full((len(x),), levels[i]), **extra_args)
            x = x + (x - denoised) / levels[i] * (levels[i - 1] - levels[i])
            mask = mask_at(i - 1)
            x = mask * x + (1 - mask) * inversion.trajectory[i - 1]
        return x

    conds = {"positive": conditioning(seed=1), "negative": conditioning(seed=9)}
    noise = model.model.process_latent_out(inversion.trajectory[-1])
    sampler = comfy.samplers.KSAMPLER(walk)
    return sampled(comfy.samplers.CFGGuider, model, conds, sampler, noise, inversion.sigmas.flip(0), 2.0)


def ramp():
    return torch.linspace(0, 1, WIDTH).expand(1, HEIGHT, WIDTH)


def test_a_soft_mask_blends_at_every_level(model):
    inversion = invert(model, picture=picture_with(ramp()))
    expected = stock_with_mask(model, inversion, lambda level: ramp()[:, None])
    assert (edit(model, inversion) - expected).abs().max() <= 1e-5 * expected.std()


def test_differential_diffusion_edits_softly_masked_places_in_fewer_steps(model):
    """A place is free from the share of the sampling on that its mask leaves (Levin and Fried 2023, section 3)."""
    inversion = invert(model, picture=picture_with(ramp()), steps=4)
    (patched,) = DifferentialDiffusion.execute(model).result
    table = model.model.model_sampling
    steps = [float(table.timestep(sigma)) for sigma in inversion.sigmas[1:]]
    lowest = float(table.timestep(table.sigma_min))

    def mask_at(level):
        share = (steps[max(level, 1) - 1] - lowest) / (steps[-1] - lowest)
        return (ramp() >= share).float()[:, None]

    expected = stock_with_mask(model, inversion, mask_at)
    ours = edit(patched, inversion)
    assert (ours - expected).abs().max() <= 1e-5 * expected.std()
    assert (ours - edit(model, inversion)).abs().max() > 1e-2 * ours.std(), "the patch must matter"
