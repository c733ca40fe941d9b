"""Losses and the training loop of students."""

import dataclasses
import math

import pytest
import torch
from pix2pix_zero.distillation.learning import Settings, Training, TrainingError
from pix2pix_zero.distillation.losses import LossWeights, feature_loss, pixel_loss, pixel_weights, slope_loss
from pix2pix_zero.distillation.optimizer import orthogonalize
from pix2pix_zero.distillation.pairs import Pairs
from torch import nn


def pairs(count: int = 40, size: int = 16) -> Pairs:
    """Pictures whose red becomes their blue."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    edited = sources.clone()
    edited[:, 0] = sources[:, 2]
    areas = torch.full((count, 1, size, size), 255, dtype=torch.uint8)
    return Pairs([str(index) for index in range(count)], sources, edited, areas)


def student() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1))


SETTINGS = Settings(steps=150, batch=8, learning_rate=1e-2, seed=3)


def test_a_student_learns_what_the_pairs_show():
    run = Training(student(), pairs(), SETTINGS)
    before = run.held_out_error()
    run.run()
    assert run.held_out_error() < 0.25 * before


def test_held_out_pairs_are_never_drawn():
    run = Training(student(), pairs(), SETTINGS)
    held = {tuple(picture.flatten().tolist()) for picture in run.held_out.sources}
    for _ in range(50):
        source = (run._draw()[0] * 255).round().to(torch.uint8)
        for picture in (source, source.flip(-1)):
            assert held.isdisjoint(tuple(one.flatten().tolist()) for one in picture)


@pytest.mark.parametrize("mirror", [True, False])
def test_half_of_the_pairs_are_mirrored_where_that_is_wished(mirror):
    data = pairs()
    run = Training(student(), data, dataclasses.replace(SETTINGS, mirror=mirror))
    known = {tuple(picture.flatten().tolist()) for picture in data.sources}
    drawn = torch.cat([(run._draw()[0] * 255).round().to(torch.uint8) for _ in range(25)])
    unmirrored = sum(tuple(picture.flatten().tolist()) in known for picture in drawn)
    assert 0.4 * len(drawn) < unmirrored < 0.6 * len(drawn) if mirror else unmirrored == len(drawn)


def test_mixed_precision_on_a_cpu_is_bf16_and_learns_as_well():
    kinds, network = [], student()
    run = Training(network, pairs(), dataclasses.replace(SETTINGS, half=True))
    before = run.held_out_error()
    network[1].register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
    run.run()
    assert set(kinds) == {torch.bfloat16} and {p.dtype for p in network.parameters()} == {torch.float32}
    assert run.held_out_error() < 0.25 * before


def test_a_run_that_was_cut_off_and_resumed_ends_where_a_whole_one_does(tmp_path):
    whole = Training(student(), pairs(), SETTINGS).run().state_dict()

    class Cancelled(Exception):
        pass

    def cancel(report):
        if report.step == 61:
            raise Cancelled

    file = tmp_path / "run.safetensors"
    with pytest.raises(Cancelled):
        Training(student(), pairs(), SETTINGS, checkpoint=file).run(cancel)
    resumed = Training(student(), pairs(), SETTINGS, checkpoint=file)
    assert resumed.step == 61
    found = resumed.run().state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    Training(student(), pairs(), dataclasses.replace(SETTINGS, steps=2), checkpoint=file).run()
    with pytest.raises(ValueError, match="another size"):
        Training(nn.Conv2d(3, 3, 1), pairs(), SETTINGS, checkpoint=file)


def test_a_run_by_the_clock_ends_in_time_and_goes_on_with_what_is_left(tmp_path):
    file = tmp_path / "run.safetensors"
    settings = dataclasses.replace(SETTINGS, minutes=0.02)
    run = Training(student(), pairs(), settings, checkpoint=file)
    run.run()
    assert 1.2 <= run.seconds < 2.5
    again = Training(student(), pairs(), settings, checkpoint=file)
    again.run()
    assert again.step == run.step


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(tmp_path):
    file = tmp_path / "run.safetensors"
    run = Training(student(), pairs(), SETTINGS, checkpoint=file)

    def break_it(report):
        if report.step == 20:
            with torch.no_grad():
                run.student[0].weight.fill_(float("nan"))

    def save_and_break(report):
        run.save()
        break_it(report)

    with pytest.raises(TrainingError, match="step 21: the loss is nan"):
        run.run(save_and_break)
    assert Training(student(), pairs(), SETTINGS, checkpoint=file).step == 20


class OneGray(nn.Module):
    """The same gray everywhere, which it learns."""

    def __init__(self):
        super().__init__()
        self.gray = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, pictures):
        return self.gray * torch.ones_like(pictures)


@pytest.mark.parametrize(("whole", "learnt"), [(True, 0.8), (False, 0.1)])
def test_what_a_teacher_keeps_more_often_than_not_stays_where_whole_pictures_are_edited(whole, learnt):
    """Two of five pairs lose a white thing that the others keep. In a limited area all that disappears counts more."""
    edited = torch.full((40, 3, 8, 8), round(255 * 0.8), dtype=torch.uint8)
    edited[::5] = edited[1::5] = round(255 * 0.1)
    areas = torch.full((40, 1, 8, 8), 255, dtype=torch.uint8)
    areas[0, 0, 0, 0] = 255 if whole else 0
    data = Pairs([str(index) for index in range(40)], torch.full_like(edited, 255), edited, areas)
    run = Training(OneGray(), data, dataclasses.replace(SETTINGS, batch=40))
    assert run.run()(torch.ones(1, 3, 8, 8)).mean().item() == pytest.approx(learnt, abs=0.03)


def test_pixels_that_must_change_count_more():
    source, target, area = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    area[..., :2] = 1
    target[..., 0] = 0.5
    counted = pixel_weights(source, target, area, LossWeights(inside=4, change=16))
    assert counted.mean().item() == pytest.approx(1)
    background = counted[0, 0, 0, 3]
    assert (counted[0, 0, 0, 1] / background).item() == pytest.approx(5)
    assert (counted[0, 0, 0, 0] / background).item() == pytest.approx(13)


def test_the_pixel_loss_of_an_even_error_is_three_times_that_error():
    target = torch.rand(2, 3, 32, 32)
    assert pixel_loss(target + 0.1, target, torch.ones(2, 1, 32, 32)).item() == pytest.approx(0.3, rel=1e-5)


def test_the_slope_loss_is_the_weighted_mean_of_differences_between_neighbours_and_none_of_an_even_error():
    generator = torch.Generator().manual_seed(0)
    target, output, counted = (torch.rand(2, 3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    counted, error = counted[:, :1], output - target
    across = [counted[..., x] * (error[..., x] - error[..., x - 1]).abs() for x in range(1, 7)]
    down = [counted[..., y, :] * (error[..., y, :] - error[..., y - 1, :]).abs() for y in range(1, 5)]
    expected = torch.stack(across).mean() + torch.stack(down).mean()
    torch.testing.assert_close(slope_loss(output, target, counted), expected)
    assert slope_loss(target + 0.1, target, counted).item() == pytest.approx(0, abs=1e-12)


def test_slopes_of_which_the_weight_is_none_are_not_learnt():
    def weights(slopes: float) -> list[torch.Tensor]:
        chosen = LossWeights(slopes=slopes, features=0)
        run = Training(student(), pairs(), dataclasses.replace(SETTINGS, steps=3, weights=chosen))
        return list(run.run().parameters())

    def alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(map(torch.equal, one, other))

    assert alike(weights(0.0), weights(0.0)) and not alike(weights(0.0), weights(1.0))


def test_the_feature_loss_is_relative_and_averaged_over_the_maps():
    def features(pictures):
        return [pictures, 10 * pictures]

    target = torch.full((1, 3, 4, 4), 0.5)
    assert feature_loss(features, 1.2 * target, target).item() == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 6, 40), (2, 40, 6)])
def test_orthogonalized_matrices_have_the_singular_vectors_of_their_own(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalize(matrices) @ v.mT
    values = rotated.diagonal(dim1=1, dim2=2)
    assert (rotated - torch.diag_embed(values)).abs().max() < 1e-6
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-5])
def test_singular_values_are_those_of_five_steps_also_where_they_are_far_apart(smallest):
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 6, generator=generator, dtype=torch.float64))[0] for size in (6, 40))
    values = torch.logspace(0, math.log10(smallest), 6, dtype=torch.float64)
    rotated = u.T @ orthogonalize((u * values @ v.T).float()).double() @ v
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert (rotated - torch.diag(expected)).abs().max() < 1e-3
