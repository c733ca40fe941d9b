"""Sentences about a concept, for edit directions: a paired, seeded template grammar and the bundled sentence banks.

Paper: pix2pix-zero, section 3.2, takes about a thousand sentences per concept from a language model. Filling the same
frames with the source and the target makes everything but the concept cancel, so fewer sentences do. A direction is a
mean per token position, so the frames are mostly shaped like captions ("a photo of a {cat} in summer"): the words then
stand where they stand in the caption that will be edited. The banks' sentences serve as frames too, where they name the
concept once.
"""

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .inputs import check_text, interruptible

DATA = Path(__file__).parent.parent / "directions_data"

# Enough for the paired grammar: 1000 pairs give nearly the same direction.
PAIRS = 256

LONGEST_CONCEPT = 300
LONGEST_SENTENCE = 20_000
MOST_SENTENCES = 20_000

# Frames drawn again per sentence before one may repeat: some concepts leave few frames.
REDRAWS = 20


@dataclass(frozen=True)
class Frame:
    """One scene as the slots of a sentence. A concept replaces the slot of its kind."""

    medium: str
    adjective: str
    subject: str
    setting: str
    season: str
    time: str
    opening: str
    extra: str = ""


@dataclass(frozen=True)
class Concept:
    """The slots that a concept fills: "dog wearing a hat" is a subject and an extra."""

    text: str
    slots: tuple[tuple[str, str], ...]
    class_: str = "thing"
    """What the subject can do: pet, animal, person, thing, view (scenery) or object (that is made of a material)."""

    def fill(self, frame: Frame) -> str:
        return render(replace(frame, **dict(self.slots)))

    @property
    def kinds(self) -> set[str]:
        return {slot for slot, _ in self.slots}


def paired_sentences(source: str, target: str, count: int, seed: int) -> tuple[list[str], list[str]]:
    """`count` sentences about the source and the same sentences about the target, word for word the same elsewhere.

    Concepts are free text: nouns, "dog wearing a hat", "wooden", "winter", "night", "oil painting", other languages.
    Raises ValueError when a concept is empty or both are the same.
    """
    a, b = parse_concept(source, "source"), parse_concept(target, "target")
    if a.text.casefold() == b.text.casefold() or a.slots == b.slots:
        raise ValueError(
            f'target: "{b.text}" says the same as the source, so there is nothing to edit. Name another concept.'
        )
    frames = _frames((a, b), count, seed)
    return [a.fill(f) for f in frames], [b.fill(f) for f in frames]


def natural_pairs(source: str, target: str, count: int, seed: int) -> tuple[list[str], list[str]]:
    """`count` sentences about the source and the same about the target: those of both banks, with the concept exchanged.

    That is for subjects, such as a cat. Times, seasons, styles and materials want other words around them, "at night" but
    "during the day": there, and where the banks have too few sentences, they are `paired_sentences`. Its errors are raised.
    """
    grammar = paired_sentences(source, target, count, seed)
    if not all("subject" in parse_concept(concept, "").kinds for concept in (source, target)):
        return grammar
    before, after = _normalize(source), _normalize(target)
    pairs = [(s, _exchanged(s, before, after)) for s in sentence_bank(source) or []]
    pairs += [(_exchanged(s, after, before), s) for s in sentence_bank(target) or []]
    # In a seeded order, each once: an exchange may give a sentence of the other bank.
    natural = list(dict.fromkeys(pair for pair in pairs if None not in pair))
    random.Random(seed).shuffle(natural)
    chosen = list(dict.fromkeys([*natural, *zip(*grammar)]))[:count]
    return [a for a, _ in chosen], [b for _, b in chosen]


def _exchanged(sentence: str, concept: str, other: str) -> str | None:
    """The sentence with another concept in the place of one, or None where it does not name the one alone, and once."""
    places = list(re.finditer(rf"\b(an?\s+)?{re.escape(concept)}\b", sentence, re.IGNORECASE))
    if len(places) != 1 or re.search(rf"\b{re.escape(other)}\b", sentence, re.IGNORECASE):
        return None
    (place,) = places
    head, tail = split_tail(other)
    text = f"{indefinite(head)} {tail}".strip() if place[1] and head else other
    if place[0][0].isupper():
        text = text[0].upper() + text[1:]
    return sentence[: place.start()] + text + sentence[place.end() :]


def sentences(concept: str, count: int, seed: int) -> list[str]:
    """`count` sentences about one concept from the grammar. Raises ValueError when the concept is empty."""
    parsed = parse_concept(concept, "concept")
    return [parsed.fill(f) for f in _frames((parsed,), count, seed)]


def read_sentence_lists(source_sentences: str, target_sentences: str) -> tuple[list[str], list[str]]:
    """Two texts with one sentence per line as lists, without blank lines, bullets, numbering and outer quotes.

    Raises ValueError naming the socket when a list is empty, has too many or too long sentences, or both lists hold the
    same sentences.
    """
    lists = []
    for socket, text in (("source_sentences", source_sentences), ("target_sentences", target_sentences)):
        check_text(text, socket, MOST_SENTENCES * 100)
        lines = [
            re.sub(r"^\s*([-*\u2022]|\d+[.)])\s+", "", line).strip().strip('"\u201c\u201d')
            for line in text.splitlines()
        ]
        lists.append([line for line in lines if line])
        if not lists[-1]:
            raise ValueError(f"{socket}: there is no sentence. Write at least one, each on its own line.")
        if len(lists[-1]) > MOST_SENTENCES:
            raise ValueError(
                f"{socket}: there are {len(lists[-1])} sentences; more than {MOST_SENTENCES} make nothing better. Take fewer."
            )
        for number, line in enumerate(lists[-1], 1):
            check_text(line, f"{socket}: sentence {number}", LONGEST_SENTENCE)
    source, target = lists
    if sorted(map(str.casefold, source)) == sorted(map(str.casefold, target)):
        raise ValueError("target_sentences: they are the same as source_sentences, so there is nothing to edit.")
    return source, target


def concept_sentences(concept: str, count: int, seed: int) -> list[str]:
    """`count` sentences from the concept's bank in a seeded order, topped up by the grammar; distinct if possible."""
    parse_concept(concept, "concept")
    bank = sentence_bank(concept) or []
    picked = random.Random(seed).sample(bank, min(count, len(bank)))
    seen = set(picked)
    extra = [s for s in sentences(concept, 2 * (count - len(picked)), seed) if s not in seen]
    return picked + extra[: count - len(picked)]


def sentence_bank(concept: str) -> list[str] | None:
    """The bundled sentences about a concept, or None if it has no bank. See directions_data/README.md."""
    name = _normalize(concept).casefold()
    name = {"photo": "photograph", "watercolour": "watercolor", "fall": "autumn", "wood": "wooden"}.get(name, name)
    path = bank_names().get(name)
    return path.read_text(encoding="utf-8").splitlines() if path else None


@cache
def bank_names() -> dict[str, Path]:
    """Concepts that have a bundled sentence bank, and the bank's file."""
    return {path.stem.replace("_", " "): path for path in sorted(DATA.glob("*.txt"))}


def parse_concept(concept: str, socket: str) -> Concept:
    """The slots a concept fills, by the word lists in directions_data/vocabulary.json and by its form.

    Raises ValueError naming the socket when the concept is empty or no text of at most `LONGEST_CONCEPT` letters.
    """
    text = _normalize(check_text(concept, socket, LONGEST_CONCEPT))
    if not text:
        raise ValueError(f"{socket}: the concept is empty. Name something, for example: dog.")
    words, low = _vocabulary(), text.casefold()
    for kind, phrases in words["concepts"].items():
        if low in phrases:
            slot = "adjective" if kind == "material" else "medium" if kind == "style" else kind
            return Concept(text, ((slot, phrases[low]),), "object" if kind == "material" else "thing")
    if low in words["accessories"]:
        return Concept(text, (("extra", f"wearing {indefinite(text)}"),), "animal")
    if low in words["colours"] or low in words["qualities"]:
        return Concept(text, (("adjective", text),), "animal")

    head, tail = split_tail(text)
    if not head:
        slots = {phrase: slot for slot in ("season", "time") for phrase in words["concepts"][slot].values()}
        return Concept(text, ((slots.get(low, "extra"), tail),), "animal")
    extra = (("extra", tail),) if tail else ()
    last_word = head.casefold().split()[-1]
    if last_word == "style":
        return Concept(text, (("extra", f"in {text}"),), "animal")
    if " " in head and last_word in ("day", "night", "morning", "evening", "afternoon"):
        return Concept(text, (("time", f"on {indefinite(head)}"), *extra), "animal")
    if last_word in words["media"]:
        return Concept(text, (("medium", head), *extra))
    return Concept(text, (("subject", head), *extra), _class_of(head))


def render(frame: Frame) -> str:
    """The sentence of a frame."""
    thing = " ".join(w for w in (frame.adjective, frame.subject) if w)
    text = indefinite(thing)
    if frame.medium:
        text = f"{indefinite(frame.medium)} of {text}"
    if frame.opening:
        text = frame.opening.format(text)
    return " ".join(w for w in (text, frame.setting, frame.season, frame.time, frame.extra) if w)


def indefinite(phrase: str) -> str:
    """The phrase with the article it needs: "an orange cat", "a unicorn", "glasses", "water"."""
    words = phrase.split()
    head = next((words[i - 1] for i, w in enumerate(words) if i and w in ("of", "with", "in")), words[-1]).casefold()
    first = words[0].casefold()
    if (
        first in _vocabulary()["determiners"]
        or head in _vocabulary()["uncountable_nouns"]
        or _is_plural(head)
        or not re.match(r"[a-z0-9\u00c0-\u024f]", first)  # other scripts have no English article
    ):
        return phrase
    return f"{'an' if _starts_with_vowel_sound(words[0]) else 'a'} {phrase}"


def _is_plural(noun: str) -> bool:
    vocabulary = _vocabulary()
    if noun in vocabulary["singular_nouns_in_s"]:
        return False
    return noun in vocabulary["plural_nouns"] or noun.endswith("s") and not noun.endswith(("ss", "us", "is"))


def _starts_with_vowel_sound(word: str) -> bool:
    if word.isupper() and 1 < len(word) < 5:
        return word[0] in "AEFHILMNORSX"
    low = word.casefold()
    if re.match(r"(hour|honest|honou?r|heir|8|11|18|x-)", low):
        return True
    if low[0] == "u":
        return not re.match(r"u(ni(?![nm])|s[aeiu]|ku|ro|to|fo|k\b)", low)
    return unicodedata.normalize("NFD", low)[0] in "aeio" and not re.match(r"(one|once|eu|ewe)", low)


def _normalize(concept: str) -> str:
    """One line without outer punctuation or a leading article."""
    text = " ".join(concept.split()).strip(" .,:!?\"'")
    return re.sub(r"^(a|an|the)\s+(?=\S)", "", text, flags=re.IGNORECASE)


def split_tail(text: str) -> tuple[str, str]:
    """ "dog wearing a hat" -> ("dog", "wearing a hat"); a "glass of water" stays whole."""
    words = text.split()
    for i, word in enumerate(words):
        if word.casefold() in _vocabulary()["tail_words"]:
            return " ".join(words[:i]), " ".join(words[i:])
    return text, ""


def _class_of(head: str) -> str:
    words = _vocabulary()
    last = head.casefold().split()[-1]
    for class_, nouns in (("pet", words["pets"]), ("animal", words["animals"]), ("person", words["people"])):
        if last in nouns or head.casefold() in nouns or last.removesuffix("s") in nouns:
            return class_
    return "thing"


def _frames(concepts: tuple[Concept, ...], count: int, seed: int) -> list[Frame]:
    """Frames that are right for all the concepts, distinct once the concepts' own slots are filled."""
    frames, seen, redraws = [], set(), 0
    for frame in interruptible(_draw_frames(concepts, random.Random(seed))):
        if len(frames) >= count:
            break
        texts = {c.fill(frame) for c in concepts}
        if texts & seen and redraws < REDRAWS * count:
            redraws += 1
            continue
        seen |= texts
        frames.append(frame)
    return frames


def _draw_frames(concepts: tuple[Concept, ...], rng: random.Random) -> Iterator[Frame]:
    scenes = _vocabulary()["scenes"]
    kinds = set().union(*(c.kinds for c in concepts))
    # "cat" -> "night" reads as the cat and the same cat at night: a side without a subject borrows the other's.
    subjects = [(c.class_, dict(c.slots)["subject"]) for c in concepts if "subject" in c.kinds]
    words = " ".join(c.text.casefold() for c in concepts)
    while True:
        class_, subject = (_common_class(subjects), subjects[0][1]) if subjects else _draw_subject(rng, concepts, kinds)
        plain = rng.random() < 0.4
        adjective = _draw_adjective(rng, class_, subject, plain)
        settings = scenes["places"][class_]
        if scenes["actions"][class_] and rng.random() < 0.5:
            settings = scenes["actions"][class_]
        share = 0.75 if plain else 0.35
        opening = not plain and rng.random() < 0.12
        medium = "photo" if plain else rng.choice(scenes["media"]) if not opening and rng.random() < 0.45 else ""
        setting = rng.choice(settings) if settings and not plain and rng.random() < 0.7 else ""
        season = rng.choice(scenes["seasons"]) if rng.random() < share and not _mentions(words, "season") else ""
        time = rng.choice(scenes["times"]) if rng.random() < share and not _mentions(words, "time") else ""
        yield Frame(
            medium="" if "medium" in kinds else medium,
            adjective="" if "adjective" in kinds or adjective in words else adjective,
            subject=subject,
            setting=setting,
            season="" if "season" in kinds else season,
            time="" if "time" in kinds else time,
            opening="" if "medium" in kinds or not opening else rng.choice(scenes["openings"]),
        )


def _common_class(subjects: list[tuple[str, str]]) -> str:
    classes = {class_ for class_, _ in subjects}
    if classes == {"pet", "animal"}:
        return "animal"
    return classes.pop() if len(classes) == 1 else "thing"


def _draw_subject(rng: random.Random, concepts: tuple[Concept, ...], kinds: set[str]) -> tuple[str, str]:
    """A subject for concepts that name none: furniture for materials, scenery too for seasons, wearers for hats."""
    if {c.class_ for c in concepts} == {"object"}:
        class_ = "object"
    elif kinds <= {"season", "time", "medium"}:
        class_ = rng.choice(("pet", "pet", "animal", "animal", "person", "view"))
    else:
        class_ = rng.choice(("pet", "pet", "animal", "person"))
    return class_, rng.choice(_vocabulary()["scenes"]["subjects"][class_])


def _draw_adjective(rng: random.Random, class_: str, subject: str, plain: bool) -> str:
    """Colours for what comes in many colours, and nothing that a concept such as "orange cat" says already."""
    scenes = _vocabulary()["scenes"]
    coloured = class_ in ("pet", "animal", "thing") and subject != "zebra" and " " not in subject
    if coloured and rng.random() < 0.55:
        return rng.choice(scenes["colours"])
    if not plain and scenes["adjectives"][class_] and rng.random() < 0.5:
        return rng.choice(scenes["adjectives"][class_])
    return ""


def _mentions(words: str, kind: str) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", words) for name in _vocabulary()["concepts"][kind])


@cache
def _vocabulary() -> dict:
    return json.loads((DATA / "vocabulary.json").read_text(encoding="utf-8"))
