import numpy as np
import pytest
import torch
from pix2pix_zero.benchmarks import judge_training as training
from pix2pix_zero.benchmarks.judge import QUESTIONS, WEIGHTS, Judge, JudgeNetwork, load_judge
from pix2pix_zero.demo_model.captioner_training import gaussian_blur, render_scenes
from pix2pix_zero.demo_model.scene import Scene, sample_scene


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(training.HELD_OUT_SEED + 10_000 + index) for index in range(150)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return render_scenes(scenes).float() / 255


def test_answers_every_question_on_renders_it_never_saw(judge, scenes, pictures):
    shares = training.accuracy(judge, pictures, scenes)
    assert min(shares.values()) >= 0.98, shares


def test_answers_every_question_on_blurred_and_noisy_renders(judge, scenes, pictures):
    soft = gaussian_blur(pictures.movedim(-1, 1), 1.2).movedim(1, -1)
    noisy = (soft + 0.03 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    shares = training.accuracy(judge, noisy, scenes)
    assert min(shares.values()) >= 0.96, shares


def test_is_unsure_about_animals_smeared_away(judge, scenes):
    blends, _ = training.half_formed(scenes[:60:1], seed=9)
    smeared = blends[::3].float() / 255
    assert judge(smeared)["subject"].amax(dim=1).median() < 0.7


def test_probabilities_sum_to_one_and_any_size_will_do(judge, pictures):
    probabilities = judge(pictures[:3])
    assert list(probabilities) == list(QUESTIONS)
    for question, answers in QUESTIONS.items():
        assert probabilities[question].shape == (3, len(answers))
        torch.testing.assert_close(probabilities[question].sum(dim=1), torch.ones(3))
    larger = torch.nn.functional.interpolate(pictures[:30].movedim(-1, 1), (256, 256), mode="bilinear").movedim(1, -1)
    assert judge.answers(larger)["subject"] == judge.answers(pictures[:30])["subject"]


def test_answers_are_in_the_scenes_own_words(judge):
    scene = Scene(subject="dog", fur="orange", glasses=True, night=False, winter=True)
    answers = judge.answers(render_scenes([scene]).float() / 255)
    assert answers == {
        "subject": ["dog"], "fur": ["orange"], "glasses": [True], "night": [False], "winter": [True], "style": ["flat"]
    }  # fmt: skip


def test_half_formed_animals_carry_soft_labels(scenes):
    blends, soft = training.half_formed(scenes[:6], seed=0)
    assert blends.dtype == torch.uint8
    torch.testing.assert_close(soft["subject"].sum(dim=1), torch.ones(6))
    assert soft["subject"].amax(dim=1).max() <= 0.75
    assert soft["fur"].sum() == 0


def test_loss_falls_in_a_short_run():
    scenes = [sample_scene(index) for index in range(96)]
    _, losses = training.train_judge(render_scenes(scenes), training.labels(scenes), steps=14, batch=16)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_missing_weights_are_an_error():
    state_dict = JudgeNetwork().state_dict()
    state_dict.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        JudgeNetwork().load_state_dict(state_dict)


def test_ships_small():
    assert WEIGHTS.stat().st_size <= 1.5e6
    assert isinstance(load_judge(), Judge)


def test_training_pictures_are_half_autoencoded(scenes):
    from pix2pix_zero.demo_model.autoencoder import LightAutoencoder

    weights = LightAutoencoder().state_dict()
    renders = render_scenes(scenes[:16])
    pictures, answers = training.training_set(scenes[:16], weights, seed=0, renders=renders)
    assert pictures.shape == (18, 128, 128, 3)
    assert torch.equal(pictures[:8], renders[:8])
    torch.testing.assert_close(pictures[8:16], training.autoencoded(renders[8:], weights, 0.2, seed=0))
    assert {len(rows) for rows in answers.values()} == {18}
