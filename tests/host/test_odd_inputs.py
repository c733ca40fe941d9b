"""500 odd inputs over all nodes, from a seed: each is refused in words that name its socket, or gives finite results."""

import copy
import math
import random
import re

import pytest
import torch
from node_inputs import run, usual_inputs, usual_values
from pix2pix_zero.host.running import check_entrance
from pix2pix_zero.nodes import NODES
from pix2pix_zero.nodes.sockets import KINDS

COUNT, SEED = 500, 20261128
# They write files or look for some; what comes in at their sockets is refused before.
ENTRANCE_ONLY = (
    "SavePair",
    "SaveDirection",
    "Distill",
    "LoadCaptioner",
    "LoadDirection",
    "FolderPicture",
    "EditMetrics",
)
NAN, INF = math.nan, math.inf


class Foreign:
    """What another pack may send through a socket of any type."""


def texts(rows=1, tokens=7, width=64, value=0.5):
    return [[torch.full((rows, tokens, width), value), {}]]


ODD = {
    "FLOAT": [NAN, INF, -INF, 1e30, -1e30, "a", None, Foreign(), [1.0]],
    "INT": [NAN, INF, -(2**70), 2**70, "a", None, Foreign()],
    "STRING": ["", "\n\n", "\ud83d", "x" * 3_000_000, 3, None, "👩‍👩‍👧 猫", "a\x00b", ",,,;"],
    "BOOLEAN": ["yes", None, Foreign()],
    "COMBO": ["none of these", 3, None, Foreign()],
    "MODEL": [None, Foreign(), 3],
    "CLIP": [None, Foreign()],
    "VAE": [Foreign(), 3],
    "CONDITIONING": [
        [],
        [[]],
        None,
        3,
        Foreign(),
        texts(width=7),
        texts(tokens=0),
        texts(rows=3),
        texts(value=NAN),
        texts(value=INF),
        [[torch.zeros(3, 64), {}]],
        [[None, {}]],
        [["text", {}]],
    ],
    "LATENT": [
        {},
        None,
        Foreign(),
        {"samples": None},
        {"samples": torch.zeros(0, 4, 8, 8)},
        {"samples": torch.full((1, 4, 8, 8), NAN)},
        {"samples": torch.ones(1, 3, 8, 8)},
        {"samples": torch.ones(4, 8)},
        {"samples": torch.ones(1, 4, 8, 8, dtype=torch.int64)},
        {"samples": torch.ones(1, 4, 8, 8), "noise_mask": torch.full((1, 8, 8), NAN)},
    ],
    "IMAGE": [
        None,
        3,
        Foreign(),
        torch.zeros(0, 8, 8, 3),
        torch.zeros(1, 0, 8, 3),
        torch.zeros(8, 8, 3),
        torch.full((1, 8, 8, 3), NAN),
        torch.zeros(1, 8, 8, 7),
    ],
    "MASK": [
        3,
        Foreign(),
        torch.zeros(1, 0, 8),
        torch.full((1, 8, 8), NAN),
        torch.full((1, 8, 8), INF),
        torch.ones(1, 5, 9, dtype=torch.bool),
        torch.zeros(8),
    ],
    "SIGMAS": [
        3,
        Foreign(),
        torch.zeros(0),
        torch.ones(1),
        torch.ones(2, 2),
        torch.tensor([NAN, 0.0]),
        torch.tensor([1.0, INF, 0.0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([2, 0]),
    ],
    "BOUNDING_BOX": [
        3,
        "a",
        Foreign(),
        [],
        {},
        {"x": NAN, "y": 0, "width": 8, "height": 8},
        {"x": 0, "y": 0, "width": INF, "height": 8},
        {"x": 0, "y": 0, "width": 0, "height": 8},
        {"x": -5, "y": 2**70, "width": 8, "height": -8},
        {"x": "a", "y": None, "width": 8, "height": 8},
    ],
    "P2PZ_INVERSION": [None, 3, Foreign(), []],
    "P2PZ_DIRECTION": [None, 3, Foreign(), {}],
    "P2PZ_CAPTIONER": [None, 3, Foreign()],
}


@pytest.fixture(scope="module")
def usual():
    return usual_values()


def cases(count, seed):
    """(node, {socket: odd value}), one or two at a time."""
    draw = random.Random(seed)
    nodes = [node for node in NODES if any(item.get_io_type() in ODD for item in node.GET_SCHEMA().inputs)]
    for _ in range(count):
        node = draw.choice(nodes)
        sockets = [item for item in node.GET_SCHEMA().inputs if item.get_io_type() in ODD]
        chosen = draw.sample(sockets, min(len(sockets), draw.choice((1, 1, 2))))
        yield node, {item.id: draw.choice(ODD[item.get_io_type()]) for item in chosen}


def finite(value) -> bool:
    if torch.is_tensor(value):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return True


@torch.inference_mode()
def test_odd_inputs_are_refused_by_their_socket_or_give_finite_results(usual):
    wrong = []
    for number, (node, odd) in enumerate(cases(COUNT, SEED)):
        name = node.__name__.removeprefix("Pix2PixZero")
        schema = node.GET_SCHEMA()
        inputs = {**usual_inputs(node, usual), **copy.copy(odd)}
        try:
            if name in ENTRANCE_ONLY:
                lists = {key: [value] for key, value in inputs.items()} if schema.is_input_list else inputs
                check_entrance(schema, lists, KINDS)
                continue
            result = run(node, inputs).result
        except ValueError as error:
            named = re.match(r"(\w+)\b", str(error))
            if not named or named[1] not in {item.id for item in schema.inputs}:
                wrong.append(f"{number} {name} {short(odd)}: no socket is named: {error!s:.120}")
        except Exception as error:
            wrong.append(f"{number} {name} {short(odd)}: {type(error).__name__}: {error!s:.120}")
        else:
            if not finite(list(result or ())):
                wrong.append(f"{number} {name} {short(odd)}: NaN or infinite values come out")
    assert not wrong, "\n".join([f"{len(wrong)} of {COUNT}", *wrong])


def test_every_socket_of_every_node_may_get_an_odd_input():
    assert {item.get_io_type() for node in NODES for item in node.GET_SCHEMA().inputs} == set(ODD)
    assert {node for node, _ in cases(COUNT, SEED)} == set(NODES)


def short(odd: dict) -> str:
    return ", ".join(f"{key}={value!r:.40}" for key, value in odd.items())
