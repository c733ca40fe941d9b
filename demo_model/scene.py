"""Procedural, captioned animal scenes whose edits have an exact ground truth.

A `Scene` holds every degree of freedom of a picture. Replacing one field with `dataclasses.replace` changes that
one thing and nothing else, so `render(replace(scene, subject="dog"))` is the true result of editing the cat into a dog.
Shapes are chunky and softened, and the drawing styles are locked to the 8-pixel grid of the autoencoder, so that a
latent model of a few megabytes can learn them.
"""

import random
from dataclasses import dataclass, replace

SIZE = 128
SUBJECTS = ("cat", "dog", "horse", "zebra")
STYLES = ("flat", "pencil sketch", "oil pastel")
POSES = ("sitting", "standing")
THINGS = ("none", "tree", "house")
FURS = {
    "orange": (236, 140, 52),
    "gray": (142, 148, 160),
    "white": (244, 241, 234),
    "black": (58, 55, 66),
    "brown": (138, 90, 56),
}
# What a caption tells of a scene, each field with the values it can take.
ATTRIBUTES: dict[str, tuple] = {
    "subject": SUBJECTS,
    "fur": tuple(FURS),
    "glasses": (False, True),
    "night": (False, True),
    "winter": (False, True),
    "style": STYLES,
}


@dataclass(frozen=True)
class Scene:
    """One picture. Lengths and positions are fractions of the picture's side, angles radians."""

    subject: str = "cat"
    fur: str = "orange"
    glasses: bool = False
    night: bool = False
    winter: bool = False
    style: str = "flat"
    pose: str = "sitting"
    size: float = 0.245
    x: float = 0.5
    y: float = 0.44
    tilt: float = 0.0
    flip: bool = False
    horizon: float = 0.62
    sky: float = 0.0
    thing: str = "tree"
    thing_x: float = 0.15
    orb_x: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        choices = (("subject", SUBJECTS), ("fur", FURS), ("style", STYLES), ("pose", POSES), ("thing", THINGS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")


def sample_scene(seed: int | random.Random, **fixed: object) -> Scene:
    """Draw a scene. The same seed with different `fixed` fields gives scenes that differ in those fields only."""
    if isinstance(seed, random.Random):
        seed = seed.randrange(1 << 31)
    rng = random.Random(seed)
    left = rng.random() < 0.5
    side, other = rng.uniform(0.08, 0.17), rng.uniform(0.80, 0.90)
    scene = Scene(
        subject=rng.choices(SUBJECTS, (0.31, 0.31, 0.19, 0.19))[0],
        fur=rng.choice(list(FURS)),
        glasses=rng.random() < 0.35,
        night=rng.random() < 0.4,
        winter=rng.random() < 0.45,
        style=rng.choices(STYLES, (0.6, 0.2, 0.2))[0],
        pose=rng.choice(POSES),
        size=rng.uniform(0.22, 0.27),
        x=rng.uniform(0.41, 0.59),
        y=rng.uniform(0.40, 0.47),
        tilt=rng.uniform(-0.2, 0.2),
        flip=rng.random() < 0.5,
        horizon=rng.uniform(0.56, 0.68),
        sky=rng.uniform(-1, 1),
        thing=rng.choice(THINGS),
        thing_x=side if left else 1 - side,
        orb_x=other if left else 1 - other,
        seed=seed,
    )
    return replace(scene, **fixed)


def further_away(scene: Scene, distance: float) -> Scene:
    """The scene with its animal `distance` times as far away: smaller, and as much closer to the horizon."""
    return replace(scene, size=scene.size / distance, y=scene.horizon - (scene.horizon - scene.y) / distance)
