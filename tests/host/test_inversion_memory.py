"""What an inversion holds is counted before the work, and it keeps less, or is refused in words, where that does not fit."""

import comfy.model_management
import pytest
import torch
from pix2pix_zero.host.messages import FEW_MAPS, HALF_PRECISION
from pix2pix_zero.host.sampling import invert as room
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from small_edit import OFF, edit, invert
from small_unet import conditioning, latent

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")

STEPS, BATCH = 5, 2
LATENT = BATCH * 4 * 8 * 8  # values, see `small_unet.latent`
KEPT = 4 * LATENT * (STEPS + 1 + STEPS)
# The way up holds the latents and the estimates, and corrections are put together twice.
NEEDED = KEPT + 4 * LATENT * (STEPS + 2 * STEPS + 1)


@pytest.fixture
def free(monkeypatch):
    """`free(bytes)`: so much memory is free, in the words of the host, beside what is kept for others."""

    def set_to(amount, device=None):
        known = comfy.model_management.get_free_memory

        def get(asked=None, torch_free_too=False):
            found = amount / room.FREE_SHARE if device in (None, asked) else known(asked)
            return (found, found) if torch_free_too else found

        monkeypatch.setattr(comfy.model_management, "get_free_memory", get)

    return set_to


def of_two(model, **options):
    return invert(model, conditioning(BATCH), latent(batch=BATCH), STEPS, OFF, **options)


def held(inversion):
    return sum(part.nbytes for part in (inversion.trajectory, inversion.residuals))


def test_what_is_counted_is_what_is_held(model):
    assert held(of_two(model)) == KEPT


def test_it_is_kept_in_half_precision_where_it_does_not_fit(model, free, caplog):
    whole = of_two(model, map_memory=0)
    free(NEEDED)
    assert of_two(model, map_memory=0).trajectory.dtype == torch.float32
    assert HALF_PRECISION not in caplog.text
    free(NEEDED - 1)
    half = of_two(model, map_memory=0)
    assert held(half) == KEPT / 2
    assert HALF_PRECISION in caplog.text
    scale = whole.trajectory.abs().amax((1, 2, 3, 4), keepdim=True)
    assert ((half.trajectory - whole.trajectory).abs() / scale).max() <= 2**-11
    # unedited, the corrections still bring the picture back
    edits = [edit(model, each, conditioning(BATCH), conditioning(BATCH), 0.0) for each in (whole, half)]
    assert torch.allclose(*edits, atol=2e-3 * float(edits[0].abs().max()))


def test_an_edit_works_on_what_is_kept_in_half_precision(model, free):
    whole = of_two(model, map_memory=0)
    free(NEEDED - 1)
    half = of_two(model, map_memory=0)
    free(2**40)
    texts = conditioning(BATCH, seed=1), conditioning(BATCH)
    edits = [edit(model, each, *texts, local_blend=0.2) for each in (whole, half)]
    assert torch.allclose(*edits, atol=1e-2 * float(edits[0].abs().max()))


def test_it_is_refused_before_the_work_where_half_does_not_fit(model, free, monkeypatch):
    free(NEEDED // 2)
    monkeypatch.setattr(room, "sample", lambda *_: pytest.fail("it had begun"))
    with pytest.raises(ValueError, match=f"^latent_image: {BATCH} pictures in {STEPS} steps take .* are free"):
        of_two(model)


def test_maps_take_only_what_is_free(model, free, caplog):
    free(NEEDED + 30_000)
    inversion = of_two(model, map_memory=2**40)
    assert inversion.maps.budget == 30_000 and inversion.maps.size <= 30_000
    assert FEW_MAPS.format(size="0 MB") in caplog.text


def test_nothing_is_said_where_all_maps_fit(model, free, caplog):
    free(2**36)
    inversion = of_two(model, map_memory=2**40)
    assert inversion.maps.levels == STEPS
    assert "Memory is short" not in caplog.text


@torch.inference_mode()
def test_a_generated_picture_is_counted_too(model, free):
    def generate():
        settings = ReferenceSettings(steps=STEPS, cfg=1.0)
        texts = conditioning(BATCH), conditioning(BATCH)
        return generate_reference(
            model, *texts, {"samples": torch.zeros_like(latent(batch=BATCH)["samples"])}, settings
        )[0]

    whole = generate()
    free(4 * LATENT * (3 * STEPS + 2) - 1)
    half = generate()
    assert (whole.trajectory.dtype, half.trajectory.dtype) == (torch.float32, torch.float16)
    free(4 * LATENT * STEPS)
    with pytest.raises(ValueError, match="^latent_image: "):
        generate()


def test_the_way_is_compared_with_the_memory_of_its_device(model, free, monkeypatch):
    device = torch.device("meta", 0)
    monkeypatch.setattr(model, "load_device", device)
    free(4 * LATENT * 2 * STEPS, device)
    with pytest.raises(ValueError, match="^latent_image: .* are free"):
        room.affordable_latents(model, latent(batch=BATCH)["samples"], STEPS, STEPS)
    free(4 * LATENT * (2 * STEPS + 1), device)
    assert room.affordable_latents(model, latent(batch=BATCH)["samples"], STEPS, STEPS)[0] == torch.float32


def test_the_host_makes_room_on_the_device_before_the_way_is_refused(model, free, monkeypatch):
    device, asked = torch.device("meta", 0), []
    monkeypatch.setattr(model, "load_device", device)
    needed = 4 * LATENT * (2 * STEPS + 1)

    def unload(amount, place):
        asked.append((amount, place))
        free(needed, device)

    free(0, device)
    monkeypatch.setattr(comfy.model_management, "free_memory", unload)
    assert room.affordable_latents(model, latent(batch=BATCH)["samples"], STEPS, STEPS)[0] == torch.float32
    assert asked == [(pytest.approx(needed / room.FREE_SHARE), device)]
