"""Maps kept between inversion and edit: how exactly, and how many."""

import torch
from pix2pix_zero.editing.trajectory import MapStore, decode, encode

CPU = torch.device("cpu")


def maps(seed=0, shape=(1, 2, 16, 7)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


def test_sixteen_bits_hold_a_probability_to_half_a_step():
    exact = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    kept = decode(encode(exact)).double()
    assert encode(exact).dtype == torch.int16
    assert (kept - exact).abs().max() <= 0.5 / 65535 + 1e-7
    assert kept[0] == 0
    assert kept[-1] == 1
    assert (exact.half().double() - exact).abs().max() > 10 * (kept - exact).abs().max(), "half precision is coarser"


def test_a_level_comes_back_under_its_keys():
    store = MapStore(10**6)
    store.add(3, "site", maps(1))
    store.add(3, "other", maps(2))
    torch.testing.assert_close(store.get(3, CPU)["site"], maps(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(store.get(3, CPU)["other"], maps(2), atol=1e-5, rtol=0)
    assert store.get(2, CPU) is None


def test_a_full_store_drops_the_levels_it_has_held_longest():
    one_level = 2 * maps().numel()
    store = MapStore(int(2.5 * one_level))
    for level in range(1, 6):
        store.add(level, "site", maps(level))
        store.trim()
        assert store.size <= store.budget
    assert [store.get(level, CPU) is not None for level in range(1, 6)] == [False, False, False, True, True]


def test_a_level_larger_than_the_budget_is_not_kept():
    store = MapStore(10)
    store.add(1, "site", maps())
    store.trim()
    assert store.get(1, CPU) is None
    assert store.size == 0


def test_a_dropped_level_is_forgotten_and_leaves_the_others():
    store = MapStore(10**6)
    store.add(1, "site", maps(1))
    store.add(2, "site", maps(2))
    store.drop(1)
    store.drop(5)
    assert store.get(1, CPU) is None
    torch.testing.assert_close(store.get(2, CPU)["site"], maps(2), atol=1e-5, rtol=0)


def test_a_level_that_would_give_way_later_is_told_beforehand():
    one_level = 2 * maps().numel()
    store = MapStore(int(2.5 * one_level))
    assert store.will_keep(1, 5), "how large a level is, only the first one tells"
    store.add(1, "site", maps(1))
    store.trim()
    assert [store.will_keep(level, 5) for level in range(2, 6)] == [False, False, True, True]
    for level in (4, 5):
        store.add(level, "site", maps(level))
        store.trim()
    assert [store.get(level, CPU) is not None for level in range(1, 6)] == [False, False, False, True, True]
