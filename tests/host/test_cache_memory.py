"""What ComfyUI's cache counts when it looks for memory to free, by its own function."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfy_execution import caching
from pix2pix_zero.editing.trajectory import Inversion, MapStore


class Model:
    pass


MODEL = Model()


@pytest.fixture
def inversion():
    maps = MapStore(1 << 30)
    for level in (1, 2):
        for site in range(3):
            maps.add(level, site, torch.rand(1, 8, 1024, 77))
    trajectory, mask = torch.zeros(11, 1, 4, 64, 64), torch.ones(1, 64, 64)
    return Inversion(trajectory, torch.arange(11.0), [], weakref.ref(MODEL), mask, trajectory[1:] * 1, maps)


@pytest.fixture
def counted(monkeypatch):
    """`counted(output)`: the weight by which the cache chooses what to drop, for a node with this output."""

    def of(output) -> float:
        weights = []
        cache = caching.RAMPressureCache(None)
        # a named pair, because one version unpacks the entry and another names its outputs
        cache.cache = {"node": Entry([[output]])}
        cache.used_generation, cache.timestamps, cache.generation = {"node": 0}, {"node": 0.0}, 1
        monkeypatch.setattr(caching.bisect, "insort", lambda entries, entry: weights.append(entry[0]))
        monkeypatch.setattr(caching.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
        cache.ram_release(1) if hasattr(cache, "ram_release") else cache.poll(1)
        return weights[0]

    return of


class Entry(tuple):
    def __new__(cls, outputs):
        return super().__new__(cls, (outputs, None))

    outputs = property(lambda self: self[0])


def test_an_inversion_counts_as_all_that_it_holds(inversion, counted):
    bytes_held = 2 * 3 * 8 * 1024 * 77 * 2 + 4 * (21 * 4 * 64 * 64 + 11 + 64 * 64)
    assert counted(inversion) == pytest.approx(counted(torch.zeros(bytes_held, dtype=torch.uint8)), rel=1e-6)
    assert counted(inversion) > 1e6 * counted(None)


def test_maps_that_are_dropped_count_no_more(inversion, counted):
    before = counted(inversion)
    inversion.maps.drop(1)
    assert counted(inversion) < 0.8 * before
    assert counted(replace(inversion, maps=None)) < counted(inversion)


def test_inversions_are_told_apart_by_what_they_are(inversion):
    other = replace(inversion)
    assert inversion == inversion and inversion != other and len({inversion, other}) == 2
    assert inversion and len(inversion) == len(list(inversion)) == 10
