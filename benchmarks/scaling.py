"""How cost grows with experts, servers, tokens and layers: ``python -m benchmarks.scaling``.

From a base point, one quantity at a time is doubled; the exponent is the slope of a least-squares line through
log seconds against log quantity. Rounds are fixed, so that the work is a function of the size alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import click
import numpy as np

from placer import Budget, Problem, Topology, Trace, evaluate, solve
from placer.table import aligned

T = TypeVar("T")

TOP_K, SEQUENCE = 8, 100
OPERATIONS = ("prepare", "solve", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a synthetic problem; a server is one GPU, so that there is one level to search."""

    experts: int = 64
    servers: int = 8
    tokens: int = 8_000
    layers: int = 2


BASE = Size()
AXES: dict[str, tuple[int, ...]] = {
    "experts": (32, 64, 128, 256),
    "servers": (2, 4, 8, 16, 32),
    "tokens": (4_000, 8_000, 16_000, 32_000),
    "layers": (1, 2, 4, 8),
}


def planted(size: Size, seed: int = 0) -> Trace:
    """A trace whose tokens prefer the experts of the topic of their sequence.

    Examples
    --------
    >>> planted(Size(tokens=200)).topk_idx.shape
    (200, 2, 8)
    """
    rng = np.random.default_rng(seed)
    sequence = np.arange(size.tokens) // SEQUENCE
    topic = rng.integers(8, size=sequence[-1] + 1)[sequence]
    ids = np.empty((size.tokens, size.layers, TOP_K), np.int16)
    for layer in range(size.layers):
        taste = rng.normal(size=(8, size.experts)).astype(np.float32)
        logits = taste[topic] + rng.gumbel(size=(size.tokens, size.experts))
        ids[:, layer] = np.argpartition(-logits, TOP_K, axis=1)[:, :TOP_K]
    return Trace(topk_idx=ids, num_experts=size.experts, sequence=sequence, name="planted")


def seconds_of(size: Size, method: str, rounds: int, max_load: float | None) -> tuple[float, float, float]:
    """Seconds to count, to solve (compiled before) and to evaluate, on one core."""
    trace = planted(size)
    topology = Topology.load("dgx-h100").with_shape(f"1x{size.servers}x1")

    def prepare() -> Problem:
        return Problem.from_trace(trace, topology, max_load=max_load, load_margin=0.0, reserve=0.0)

    problem, prepared = _timed(prepare)
    result = solve(problem, method, budget=Budget(seconds=None, rounds=rounds))
    _, evaluated = _timed(lambda: evaluate(result.placement, trace, topology, reserve=0.0))
    return prepared, result.seconds, evaluated


def exponent(quantities: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log seconds against log quantity.

    Examples
    --------
    >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    return float(np.polyfit(np.log(quantities), np.log(seconds), 1)[0])


def table(method: str, rounds: int, max_load: float | None, repeats: int, base: Size = BASE) -> str:
    """Seconds along every axis, least of `repeats`, and the exponents."""
    seconds_of(replace(base, tokens=min(base.tokens, 500), layers=1), method, 1, max_load)  # compiles
    lines = []
    for axis, quantities in AXES.items():
        sizes = [replace(base, **{axis: quantity}) for quantity in quantities]
        runs = np.array([[seconds_of(s, method, rounds, max_load) for s in sizes] for _ in range(repeats)])
        for operation, seconds in zip(OPERATIONS, runs.min(axis=0).T.tolist(), strict=True):
            cells = ", ".join(f"{q}: {s:.3g}" for q, s in zip(quantities, seconds, strict=True))
            lines.append([axis, operation, cells, f"{exponent(quantities, seconds):.2f}"])
    cap = "no cap" if max_load is None else f"cap {max_load:g}"
    said = f"{method}, {rounds} rounds, {cap}, one core; {base}; cells: quantity: seconds"
    return f"{said}\n{aligned(['axis', 'operation', 'seconds', 'exponent'], lines, left=(0, 1, 2))}"


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    done = work()
    return done, time.perf_counter() - begun


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--method", default="tabu", show_default=True)
@click.option("--rounds", type=click.IntRange(0), default=1, show_default=True)
@click.option("--max-load", type=float, help="Cap; none by default.")
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
def main(method: str, rounds: int, max_load: float | None, repeats: int) -> None:
    """Print seconds and fitted exponents."""
    click.echo(table(method, rounds, max_load, repeats))


if __name__ == "__main__":
    main()
