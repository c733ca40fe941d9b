"""What the recipe of the demo's students refuses, before it draws anything."""

from dataclasses import replace

import pytest
from pix2pix_zero.demo_model.distill_students import CHECKPOINT, Recipe, check_recipe

NIGHT = Recipe("day2night")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("cat2cow"), "--edit cat2cow: there is none. Give one of cat2dog, "),
        (replace(NIGHT, in_place=0.0), "--in-place 0: give a part"),
        (replace(NIGHT, in_place=70.0), "--in-place 70: give a part"),
        (Recipe("cat2dog", in_place=0.7), "the edges of cat2dog have to change"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, recipe, words):
    with pytest.raises(ValueError, match=words):
        check_recipe(tmp_path / "work", recipe)
    assert not (tmp_path / "work").exists()


def test_a_training_goes_on_with_other_steps_but_not_with_other_pairs(tmp_path):
    check_recipe(tmp_path, NIGHT)
    (tmp_path / CHECKPOINT).touch()
    check_recipe(tmp_path, replace(NIGHT, train_steps=3000, workers=2))
    with pytest.raises(ValueError, match=r"was begun with in_place 1.0. Give the same, or remove it"):
        check_recipe(tmp_path, replace(NIGHT, in_place=0.7))
    check_recipe(tmp_path, NIGHT)
    (tmp_path / CHECKPOINT).unlink()
    check_recipe(tmp_path, replace(NIGHT, in_place=0.7))
