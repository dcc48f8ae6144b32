"""How close bounds come, and how fast: ``python -m benchmarks.certificates --traces DIR``.

Every layer of a case is solved by tabu search, then certified within a time limit on all cores; certificates by column
generation over equal units are checked again by `benchmarks.recheck`. Writes a page, case by case.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import instances, pages
from benchmarks.recheck import confirmed
from placer import Budget, Problem, Topology, Trace, certify, solve
from placer.certificate import LayerBound
from placer.clock import Clock

PAGE = """\
# Certificates

`python -m benchmarks.certificates --traces DIR`. Each layer: tabu search, then `placer.certify` with a time limit of
its own, on {jobs} threads; all tokens of the trace. Gap: (best placement met - bound) / best, mean and worst layer.
Seconds: of the bound, median and worst layer. Better: layers in which the proof came upon a better placement than the
search. Checked: certificates confirmed by `benchmarks/recheck.py`, which shares no code with what found them,
of those that it gets through with (the tests check all kinds on small cases).

| case | tokens x layers | target | proved optimal | gap | seconds | better | checked |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the page: `layers` of a trace (all of them: None), and what is asked for."""

    name: str
    source: instances.Source
    shape: str
    target: str
    seconds: float  # of one layer
    layers: tuple[int, ...] | None = None
    max_load: float | None = None
    gap: float = 0.0
    whole_groups: bool = False
    checked: bool = True  # False where the plain branch and bound would take hours


OLMOE = instances.Source(file="olmoe-1b7b-decode-even.npz", tokens=25_600)
GPT_OSS = instances.Source(file="gptoss-20b-decode-even.npz", tokens=55_314)
E128 = instances.Source(synth="qwen3-like", layers=1, tokens=100_000)
E256 = instances.Source(synth="dsv3-like", layers=4, tokens=100_000)
ONE = (0,)
ROUNDS = 10  # of tabu search, before

CASES = (
    Case(
        name="2 a server, E=64 (OLMoE)",
        source=OLMOE,
        shape="1x32x1",
        target="optimal, seconds",
        seconds=60,
        layers=(0, 5, 10, 15),
    ),
    Case(
        name="2 a server, E=256 (synthetic)",
        source=E256,
        shape="1x128x1",
        target="optimal, seconds",
        seconds=60,
        layers=ONE,
    ),
    Case(
        name="2 gate groups a server, E=256 (synthetic)",
        source=E256,
        shape="1x4x8",
        target="optimal, seconds",
        seconds=60,
        whole_groups=True,
    ),
    Case(name="4 a server, E=64 (OLMoE)", source=OLMOE, shape="1x16x1", target="proved", seconds=60),
    Case(
        name="4 a server, E=128 (synthetic)", source=E128, shape="1x32x1", target="0.05 % in 60 s", seconds=60
    ),
    Case(name="8 a server, E=32 (gpt-oss)", source=GPT_OSS, shape="1x4x1", target="proved, 15 s", seconds=15),
    Case(
        name="8 a server, E=32 (gpt-oss), cap 1.05",
        source=GPT_OSS,
        shape="1x4x1",
        target="proved, 2 min",
        seconds=120,
        max_load=1.05,
        checked=False,
    ),
    Case(
        name="8 a server, E=64 (OLMoE)",
        source=OLMOE,
        shape="1x8x1",
        target="0.1 % or proved, 2 min",
        seconds=120,
        checked=False,
    ),
    Case(
        name="16 a server, E=64 (OLMoE)",
        source=OLMOE,
        shape="1x4x1",
        target="8 % in 2 min",
        seconds=60,
        layers=(0, 10),
    ),
    Case(
        name="8 a server, E=128 (synthetic)",
        source=E128,
        shape="1x16x1",
        target="2 % in 5 min",
        seconds=300,
        gap=0.02,
        checked=False,
    ),
    Case(
        name="8 a server, E=256 (synthetic)",
        source=E256,
        shape="1x32x1",
        target="10 % in 5 min",
        seconds=300,
        layers=ONE,
        gap=0.1,
        checked=False,
    ),
)


def certified(case: Case, trace: Trace, layer: int, jobs: int) -> tuple[LayerBound, float, bool | None]:
    """The bound of one layer, its wall seconds, and whether it was confirmed (None: not checked)."""
    one = Trace(
        topk_idx=np.asarray(trace.topk_idx[:, [layer]]),
        num_experts=trace.num_experts,
        num_groups=trace.num_groups,
    )
    machine = Topology.load("dgx-h100").with_shape(case.shape)
    problem = Problem.from_trace(one, machine, max_load=case.max_load, load_margin=0.0, gpu_memory=1e15)
    found = solve(problem, "tabu", budget=Budget(seconds=20.0, rounds=ROUNDS), jobs=jobs)
    begun = time.monotonic()
    certificate = certify(
        found.placement,
        problem,
        whole_groups=case.whole_groups,
        clock=Clock.start(seconds=case.seconds, gap=case.gap),
        jobs=jobs,
    )
    seconds = time.monotonic() - begun
    bound = certificate.layers[0]
    partition, proof = bound.partition, bound.proof
    known = "unit_price" in proof.certificate and partition.units * partition.size == partition.num_items
    if not (known and case.checked):
        return bound, seconds, None
    return (
        bound,
        seconds,
        confirmed(
            partition.sets.astype(np.int64),
            partition.count,
            partition.load,
            units=partition.units,
            size=partition.size,
            cap=partition.cap,
            bound=proof.bound,
            certificate=proof.certificate,
        ),
    )


def rows(case: Case, trace: Trace, jobs: int) -> Iterator[tuple[str, ...]]:
    """Cells of the one row of a case, after its name."""
    layers = range(trace.num_layers) if case.layers is None else case.layers
    done = []
    for layer in layers:
        bound, spent, good = certified(case, trace, layer, jobs)
        done.append((bound, spent, good))
        gap = max(0.0, 1 - bound.bound / bound.best)
        click.echo(f"{case.name}, layer {layer}: gap {gap:.3%} in {spent:.1f} s, checked: {good}", err=True)
    gaps = [max(0.0, 1 - bound.bound / bound.best) for bound, _, _ in done]
    seconds = [spent for _, spent, _ in done]
    checked = [good for _, _, good in done if good is not None]
    proved = sum(bound.bound >= bound.best for bound, _, _ in done)
    better = sum(bound.best < bound.touched for bound, _, _ in done)
    yield (
        f"{trace.num_tokens:,} x {len(done)}",
        case.target,
        f"{proved} of {len(done)}",
        f"{np.mean(gaps):.3%}, {max(gaps):.3%}",
        f"{np.median(seconds):.1f}, {max(seconds):.1f}",
        str(better),
        f"{sum(checked)} of {len(checked)}" if checked else "-",
    )


@click.command()
@pages.options(Path(__file__).with_name("CERTIFICATES.md"))
def main(**given: Any) -> None:
    """Certify every case and write the page."""
    pages.write(PAGE, CASES, rows, **given)


if __name__ == "__main__":
    main()
