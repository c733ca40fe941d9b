"""FlowEdit's steps against closed forms and against the papers' formulas in float64."""

import pytest
import torch
from pix2pix_zero.editing.flow_edit import FlowEditSettings, flow_edit, skipped
from pix2pix_zero.editing.trajectory import DIFFUSION, FLOW

SHARES = [1.0, 0.7, 0.4, 0.1, 0.0]


class Model:
    """What the tests' models share: noise from a seed."""

    def __init__(self, shape=(2, 3, 4, 5), seed=3):
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self):
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


class Gaussians(Model):
    """Perfect estimates of a flow model where the pictures of each text are a normal distribution of one variance."""

    def __init__(self, source, target, variance=0.5):
        super().__init__()
        self.means = {"source": source, "target": target}
        self.variance = variance

    def estimate(self, text, x, share):
        mean, signal = self.means[text], 1 - share
        gain = self.variance * signal / (self.variance * signal**2 + share**2)
        return mean + gain * (x - signal * mean)

    def source(self, x, share):
        return self.estimate("source", x, share)

    def target(self, x, share):
        return self.estimate("target", x, share)


class Bent(Model):
    """Estimates of a flow model that bend, so that noise and steps matter."""

    def source(self, x, share):
        return torch.tanh(x) * (1 - share)

    def target(self, x, share):
        return torch.sin(1.5 * x + share)


class InSigmaSpace(Bent):
    """The same network, asked as one that diffuses."""

    def source(self, x, sigma):
        return super().source(x / (1 + sigma), sigma / (1 + sigma))

    def target(self, x, sigma):
        return super().target(x / (1 + sigma), sigma / (1 + sigma))


def numbers(seed=0, batch=2):
    return torch.randn(batch, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unchanged(step, edited, contrast):
    return edited


@pytest.mark.parametrize("shares", [[1.0, 0.0], SHARES])
def test_between_two_normal_distributions_a_picture_moves_by_the_difference_of_their_means(shares):
    """The ordinary differential equation has the solution edited - picture = (1 - s) * difference, which is straight."""
    picture, difference = numbers(), numbers(1, batch=1)
    estimates = Gaussians(torch.zeros(1, dtype=torch.float64), difference)
    edited = flow_edit(picture, shares, FLOW, estimates, FlowEditSettings(consistency=0.0), unchanged)
    torch.testing.assert_close(edited, picture + difference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("samples", "consistency"), [(1, 0.0), (3, 0.0), (1, 0.01), (2, 0.3)])
def test_steps_are_those_of_the_papers(samples, consistency):
    """FlowEdit, Algorithm 1, averaged over noises, and FlowAlign's pull of the estimates, written with velocities."""
    picture, model = numbers(), Bent()
    expected = picture
    for s, s_next in zip(SHARES, SHARES[1:]):
        step = torch.zeros_like(picture)
        for _ in range(samples):
            q = (1 - s) * picture + s * model.noise()
            p = expected + q - picture
            v_q, v_p = (q - model.source(q, s)) / s, (p - model.target(p, s)) / s
            step += (s_next - s) * (v_p - v_q) + consistency * ((q - s * v_q) - (p - s * v_p))
        expected = expected + step / samples
    settings = FlowEditSettings(samples, consistency)
    edited = flow_edit(picture, SHARES, FLOW, Bent(), settings, unchanged)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-12)


def test_each_step_goes_on_from_what_was_let_through():
    picture, seen = numbers(), []

    def only_the_left(step, edited, contrast):
        seen.append((step, contrast))
        return torch.cat([edited[..., :2], picture[..., 2:]], -1)

    edited = flow_edit(picture, SHARES, FLOW, Bent(), FlowEditSettings(), only_the_left)
    assert torch.equal(edited[..., 2:], picture[..., 2:]) and not torch.equal(edited[..., :2], picture[..., :2])
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert all(contrast.shape == (2, 1, 4, 5) and contrast.min() >= 0 for _, contrast in seen)


def test_a_model_that_diffuses_is_edited_as_the_same_one_that_flows():
    picture, shares = numbers(), [0.9, 0.6, 0.2, 0.0]
    flowing = flow_edit(picture, shares, FLOW, Bent(), FlowEditSettings(), unchanged)
    sigmas = [share / (1 - share) for share in shares]
    diffusing = flow_edit(picture, sigmas, DIFFUSION, InSigmaSpace(), FlowEditSettings(), unchanged)
    torch.testing.assert_close(diffusing, flowing, rtol=0, atol=1e-12)


def test_frames_share_one_contrast():
    picture, shapes = torch.zeros(1, 3, 2, 4, 5, dtype=torch.float64), []

    def after_step(step, edited, contrast):
        shapes.append(contrast.shape)
        return edited

    flow_edit(picture, [0.5, 0.0], FLOW, Bent(picture.shape), FlowEditSettings(), after_step)
    assert shapes == [(1, 1, 4, 5)]


@pytest.mark.parametrize(("steps", "share", "expected"), [(20, 0.0, 0), (20, 0.33, 7), (20, 1.0, 19), (1, 0.9, 0)])
def test_a_share_of_the_steps_is_left_out_but_one_stays(steps, share, expected):
    assert skipped(steps, share) == expected
