"""The adversary of a student."""

from __future__ import annotations

import pytest
import torch
from pix2pix_zero.distillation.adversary import Adversary
from pix2pix_zero.distillation.learning import Settings, Training
from pix2pix_zero.distillation.pairs import Pairs
from pix2pix_zero.editing import inputs
from torch import nn


def pairs(count: int = 40, size: int = 16) -> Pairs:
    """Pictures whose red becomes their blue."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    edited = sources.clone()
    edited[:, 0] = sources[:, 2]
    return Pairs(
        [str(index) for index in range(count)],
        sources,
        edited,
        torch.full((count, 1, size, size), 255, dtype=torch.uint8),
    )


def student() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1))


def noisy(strength: float, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat sources, edits with a texture of that strength, and the flat picture in between: what L1 alone would draw."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, 32, 32).contiguous()
    target = source + strength * torch.randn(source.shape, generator=generator)
    return source, target, source.clone()


def test_the_discriminator_learns_to_tell_the_teachers_edits_from_the_students():
    adversary = Adversary(1.0, 2e-3, 0, torch.device("cpu"))
    for step in range(40):
        source, target, output = noisy(0.1, 8, step)
        adversary.learn(source, output, target, 1.0)
    source, target, output = noisy(0.1, 16, 1000)
    with torch.no_grad():
        real, made = (adversary.discriminator(source, picture).mean((1, 2, 3)) for picture in (target, output))
    assert (real > made).all()


def test_its_gradient_is_that_part_of_the_other_losses_gradient():
    adversary = Adversary(0.3, 2e-3, 0, torch.device("cpu"))
    source, target, output = noisy(0.1, 4)
    output.requires_grad_()
    loss = (output - target).abs().mean()
    own = adversary.toward_teacher(source, output, target, loss)
    (others,) = torch.autograd.grad(loss, output, retain_graph=True)
    (gradient,) = torch.autograd.grad(own, output)
    torch.testing.assert_close(gradient.norm(), 0.3 * others.norm(), rtol=1e-4, atol=0)


def test_the_student_goes_toward_what_the_discriminator_takes_for_the_teachers():
    """The texture that L1 averages away comes back: its strength is nearer to the teacher's."""
    adversary = Adversary(1.0, 2e-3, 0, torch.device("cpu"))
    for step in range(60):
        source, target, output = noisy(0.1, 8, step)
        adversary.learn(source, output, target, 1.0)
    source, target, output = noisy(0.1, 8, 1000)
    output.requires_grad_()
    loss = (output - source).square().mean() + 1e-3 * output.mean()
    (gradient,) = torch.autograd.grad(adversary.toward_teacher(source, output, target, loss), output)
    moved = output.detach() - 0.5 * gradient / gradient.abs().max()
    with torch.no_grad():
        before, after = (adversary.discriminator(source, picture).mean() for picture in (output, moved))
    assert after > before


def test_without_sharpness_there_is_no_adversary_and_with_it_it_begins_after_three_tenths():
    settings = Settings(steps=20, batch=4, crop=16, learning_rate=1e-2)
    assert Training(student(), pairs(), settings).adversary is None
    run = Training(student(), pairs(), Settings(**{**vars(settings), "sharpness": 0.5}))
    first = [value.clone() for value in run.adversary.discriminator.parameters()]
    changed = []

    def note(report) -> None:
        same = all(map(torch.equal, first, run.adversary.discriminator.parameters()))
        changed.append(not same)

    run.run(note)
    assert changed == [False] * 6 + [True] * 14


def test_an_opposed_run_that_was_cut_off_ends_where_a_whole_one_does(tmp_path):
    settings = Settings(steps=40, batch=4, learning_rate=1e-2, sharpness=0.5)
    whole = Training(student(), pairs(), settings).run().state_dict()
    file = tmp_path / "run.training"

    class Cancelled(Exception):
        pass

    def cancel(report) -> None:
        if report.step == 25:
            raise Cancelled

    try:
        Training(student(), pairs(), settings, checkpoint=file).run(cancel)
    except Cancelled:
        pass
    found = Training(student(), pairs(), settings, checkpoint=file).run().state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_run_that_is_cancelled_within_a_step_loses_nothing_of_it(tmp_path, monkeypatch):
    settings = Settings(steps=20, batch=4, learning_rate=1e-2, sharpness=0.5)

    class Cancelled(Exception):
        pass

    def trained(checkpoint=None, cancelled: int | None = None) -> tuple[dict, list]:
        """(the student, the looks in the eleventh step). `cancelled`: at which of them."""
        run, looks = Training(student(), pairs(), settings, checkpoint=checkpoint), []

        def look():
            if run.step == 10:
                looks.append(None)
                if len(looks) == cancelled:
                    raise Cancelled

        monkeypatch.setattr(inputs, "_looks", [look])
        return run.run().state_dict(), looks

    whole, looks = trained()
    count = len(looks)
    assert count > 20, "each layer of both networks, forward and backward"
    for number in (1, count // 2, count):
        file = tmp_path / f"{number}.training"
        with pytest.raises(Cancelled):
            trained(file, number)
        found, _ = trained(file)
        assert all(torch.equal(found[name], value) for name, value in whole.items()), number
