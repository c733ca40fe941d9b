"""Captions of the demo scenes."""

import random

from .scene import Scene

# Canonical caption and free-form wordings. FILLERS are words that say nothing about the picture.
_STYLE_WORDS = {
    "flat": ("a photo of", "a picture of", "an image of", "a view of", "a close up of", ""),
    "pencil sketch": ("a pencil sketch of", "a pencil drawing of", "a sketch of", "a black and white sketch of"),
    "oil pastel": ("an oil pastel drawing of", "an oil pastel of", "an oil pastel painting of", "a pastel drawing of"),
}
_GLASSES_WORDS = ("wearing glasses", "with glasses", "in glasses", "wearing a pair of glasses", "with eyeglasses")
_SEASON_WORDS = {
    True: ("in winter", "in the snow", "on a winter day", "in the winter", "on a snowy day", "covered in snow"),
    False: ("in summer", "on the grass", "on a summer day", "in the summer", "in a green field"),
}
_TIME_WORDS = {
    True: ("at night", "in the night", "under the moon", "on a dark night", "in the moonlight", "by night"),
    False: ("during the day", "in the day", "in daylight", "on a sunny day", "in the sunshine", "by day"),
}
_DETERMINERS = ("a", "the", "one", "my", "this")
_OTHER_NAMES = {"cat": ("cats", "kitten"), "dog": ("dogs", "puppy"), "horse": ("horses", "pony"), "zebra": ("zebras",)}
FILLERS = tuple(
    (
        "old young happy sleepy lovely quiet little small big great cute wild calm proud "
        "sofa table garden street river window kitchen beach forest bridge city park road "
        "mountain lake room chair bed box car boat curious lazy gentle friendly playful "
        "sitting standing sleeping running playing looking walking resting eating waiting jumping "
        "behind beside under over and next front two some his her their who is was"
    ).split()
)


def article(word: str) -> str:
    """`a` or `an` before `word`."""
    return "an" if word[:1].lower() in "aeiou" else "a"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe `scene` in English.

    Without `rng` this is the canonical caption, which names everything that the caption grammar knows. Colour is left out
    where the picture does not show it (zebras, pencil sketches). With `rng`, attributes drop out at random and about
    half of the captions are free-form sentences in varied words and order, with words that say nothing about the picture.
    """
    coloured = scene.subject != "zebra" and scene.style != "pencil sketch"
    if rng is None or rng.random() < 0.55:
        keep = (lambda share: True) if rng is None else (lambda share: rng.random() < share)
        words = [scene.fur] if coloured and keep(0.75) else []
        words.append(scene.subject)
        noun = f"{article(words[0])} {' '.join(words)}"
        parts = [f"{_STYLE_WORDS[scene.style][0]} {noun}"]
        if scene.glasses:
            parts.append("wearing glasses")
        if keep(0.8):
            parts.append("in winter" if scene.winter else "in summer")
        if keep(0.8):
            parts.append("at night" if scene.night else "during the day")
        return " ".join(parts)
    return _free_form_caption(scene, rng, coloured)


def _free_form_caption(scene: Scene, rng: random.Random, coloured: bool) -> str:
    def fillers(most: int) -> list[str]:
        return rng.choices(FILLERS, k=rng.randint(0, most))

    noun = [*fillers(1), scene.fur] if coloured and rng.random() < 0.5 else fillers(2)
    subject = scene.subject if rng.random() < 0.9 else rng.choice(_OTHER_NAMES[scene.subject])
    noun = [rng.choice(_DETERMINERS), *noun, subject] if rng.random() < 0.9 else [*noun, subject]
    phrases = [" ".join(noun)]
    if rng.random() < 0.6:
        phrases.append(
            " ".join([*fillers(2), rng.choice(("on", "in", "by", "near")), rng.choice(("the", "a")), *fillers(2)])
        )
    extras = []
    if scene.glasses:
        extras.append(rng.choice(_GLASSES_WORDS))
    if rng.random() < 0.45:
        extras.append(rng.choice(_SEASON_WORDS[scene.winter]))
    if rng.random() < 0.45:
        extras.append(rng.choice(_TIME_WORDS[scene.night]))
    rng.shuffle(extras)
    style = rng.choice(_STYLE_WORDS[scene.style])
    if style == "" and rng.random() < 0.5 and extras and not scene.glasses:
        return " ".join([*extras, *phrases]).strip()
    return " ".join([style, *phrases, *extras]).strip()
