"""Speed of fixed work, for ``pytest benchmarks/test_speed.py``; needs pytest-benchmark.

Seconds say little about another machine: compare within a group of one run, where pytest-benchmark prints each
time beside the ratio to the fastest. Every test checks its answer, so that a fast wrong one fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import click
import numpy as np
import pytest

from placer import Placement, Problem, Topology, Trace, evaluate, synth
from placer.clock import Clock
from placer.layer import Layer
from placer.search import descend
from placer.solvers import refine, tabu

pytest.importorskip("pytest_benchmark")

TOKENS = 20_000
SHAPES = {64: ("olmoe-like", "1x8x8"), 256: ("dsv3-like", "1x32x8")}
SWAPS = 200
Benchmark = Any


@lru_cache
def trace_of(experts: int) -> Trace:
    """Two layers of a synthetic trace."""
    return synth(SHAPES[experts][0], layers=2, tokens=TOKENS)


@lru_cache
def layer_of(experts: int) -> Layer:
    """The first of them, without a cap."""
    topology = Topology.load("dgx-h100").with_shape(SHAPES[experts][1])
    return Problem.from_trace(trace_of(experts), topology, max_load=None, load_margin=0.0).layer(0)


def tables_of(layer: Layer, occupant: Any) -> tuple[Any, Any, Any, float]:
    """The exact swap tables H, Q, S and the cost of an arrangement, from scratch."""
    from placer.search.tabu import build_exact

    sets, count = layer.distinct
    units = layer.num_slots // int(layer.sizes[0])
    return tuple(build_exact(sets, count, occupant, layer.sizes, layer.weights_of_levels, units))


@pytest.mark.benchmark(group="evaluate all swaps")
@pytest.mark.parametrize("experts", SHAPES)
def test_swap_evaluations(benchmark: Benchmark, experts: int) -> None:
    from placer.search.tabu import best_swap, move_costs

    layer = layer_of(experts)
    occupant = layer.linear()
    H, Q, S, _ = tables_of(layer, occupant)
    sizes, weights, inner = layer.sizes, layer.weights_of_levels, int(layer.sizes[0])
    costs = np.empty((experts // inner, experts))
    unit_load, row = np.zeros((len(sizes), experts)), np.empty(experts)
    cap, frozen, load = (
        layer.caps[list(layer.levels)],
        np.zeros(experts, np.bool_),
        layer.expert_load[occupant],
    )

    def scan() -> tuple[int, int, float]:
        move_costs(H, Q, sizes, weights, inner, costs)
        found: tuple[int, int, float] = best_swap(
            costs, S, load, unit_load, sizes, cap, 1.0, inner, frozen, np.inf, row
        )
        return found

    scan()
    first, second, change = benchmark(scan)
    expected = refine.swap_changes(layer, occupant)
    assert change == pytest.approx(expected.min())
    assert expected[first, second] == pytest.approx(change)
    swaps = experts * (experts - inner) // 2
    benchmark.extra_info["swaps_per_second"] = swaps / benchmark.stats.stats.mean


@pytest.mark.benchmark(group=f"apply {SWAPS} swaps and take them back")
@pytest.mark.parametrize("experts", SHAPES)
def test_applying_swaps(benchmark: Benchmark, experts: int) -> None:
    from placer.search.tabu import apply_exact

    layer = layer_of(experts)
    occupant = layer.linear()
    H, Q, S, _ = tables_of(layer, occupant)
    sets, count = layer.distinct
    position, load = layer.positions(occupant), layer.expert_load[occupant]
    rng = np.random.default_rng(0)
    pairs = np.sort([rng.choice(experts, 2, replace=False) for _ in range(SWAPS // 2)], axis=1).tolist()
    rest = (sets, count, *layer.uses, layer.sizes, layer.weights_of_levels)

    def there_and_back() -> None:
        for i, j in (*pairs, *reversed(pairs)):
            apply_exact(i, j, occupant, position, load, H, Q, S, *rest)

    there_and_back()
    benchmark.pedantic(there_and_back, rounds=5, iterations=1)
    for kept, fresh in zip((H, Q, S), tables_of(layer, layer.linear()), strict=False):
        np.testing.assert_allclose(kept, fresh, atol=1e-6 * TOKENS)


@pytest.mark.benchmark(group="count the 28 pairs of a token")
def test_counting_pairs(benchmark: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    from scipy.sparse import csr_array

    from placer.search.counting import count_pairs

    tokens = np.tile(layer_of(256).tokens, (20, 1))  # as many as a trace has: 400k
    num, width = tokens.shape
    k, table = (0,) * width, np.zeros(256 * 256, np.uint32)

    def compiled() -> None:
        table[:] = 0
        count_pairs(tokens, k, table)

    def sparse() -> Any:
        start = np.arange(0, num * width + 1, width)
        uses = csr_array((np.ones(num * width, np.int32), tokens.ravel(), start), shape=(num, 256))
        return (uses.T @ uses).toarray()

    compiled()
    benchmark(compiled)
    counts = table.reshape(256, 256)
    np.testing.assert_array_equal(counts + counts.T, sparse() - np.diag(np.diag(sparse())))
    ratio = best_of(10, sparse) / benchmark.stats.stats.min
    rate = num / benchmark.stats.stats.min
    benchmark.extra_info.update(times_scipy=ratio, tokens_per_second=rate)
    with capsys.disabled():
        click.echo(
            f"\npair counting: {rate / 1e6:.1f} million tokens a second, {ratio:.0f} x scipy (target 50)"
        )


@pytest.mark.benchmark(group="solve a layer of 64 experts without a cap")
@pytest.mark.parametrize("how", ["refine", "descent", "tabu"])
def test_solving_a_layer(benchmark: Benchmark, how: str) -> None:
    """`descent` is compiled and does what `refine` does as one scipy expression; `tabu` searches on."""
    layer = layer_of(64)

    def solve() -> float:
        rng = np.random.default_rng(0)
        if how == "descent":
            return layer.cost(descend(layer, layer.linear(), exact=True, patience=1, rng=rng)[0])
        method = {"refine": refine, "tabu": tabu}[how]
        return layer.score(method.place(layer, rng=rng, clock=Clock.start(rounds=3)).slots)[1]

    # What a layer derives from its tokens is made once, by the first of the three, and is no part of the search.
    descend(layer, layer.linear(), exact=True, steps=1, rng=np.random.default_rng(0))
    tabu.place(layer_of(64), rng=np.random.default_rng(0), clock=Clock.start(rounds=1))
    cost = benchmark.pedantic(solve, rounds=2, iterations=1)
    benchmark.extra_info["cost"] = cost
    assert cost < layer.cost(layer.linear())


@pytest.mark.benchmark(group="evaluate a trace of two layers")
@pytest.mark.parametrize("experts", SHAPES)
def test_evaluating_a_trace(benchmark: Benchmark, experts: int) -> None:
    topology = Topology.load("dgx-h100").with_shape(SHAPES[experts][1])
    trace = trace_of(experts)
    slots = np.tile(np.arange(experts, dtype=np.int32), (trace.num_layers, 1))
    placement = Placement(
        physical_to_logical=slots, num_experts=experts, shape=topology.shape, layer_ids=trace.layer_ids
    )
    options = {"reserve": 0.0}
    evaluate(placement, trace, topology, **options)  # type: ignore[arg-type]
    report = benchmark(lambda: evaluate(placement, trace, topology, **options))  # type: ignore[arg-type]
    servers = np.sort(trace.topk_idx // 8, axis=2)
    assert report.touched["server"] == pytest.approx((np.diff(servers, axis=2) > 0).sum(axis=2).mean() + 1)


def best_of(times: int, work: Callable[[], object]) -> float:
    """Least seconds of several runs, on one core."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
