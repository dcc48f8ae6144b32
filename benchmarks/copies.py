"""What copies buy: ``python -m benchmarks.copies --traces DIR``.

Every case is solved by `eplb` (load alone), by `greedy` (traffic alone) and by `auto`, on a part of its
sequences and scored on the others, at the same number of spare slots. Writes a page, case by case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks import instances, pages
from placer import Budget, Placement, Problem, Topology, Trace, evaluate, solve
from placer.report import Report

PAGE = """\
# Copies

`python -m benchmarks.copies --traces DIR`: {jobs} threads, seed 0, load margin 0. Cells: fitted / held out
by sequence; `remote.server` is other servers a token, load is that of the busiest unit over the mean
(mean over layers), copies as the rule shares them out.

| case | fitted + held out tokens x layers | rule | method | cap | seconds | remote.server | server load | GPU load |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trace on a machine with spare slots."""

    name: str
    source: instances.Source
    shape: str
    redundant: int
    rules: tuple[str, ...] = ("nearest",)
    share: float = 0.5  # of the sequences that are fitted
    swapped: bool = False  # whether the other part is fitted
    max_load: float | None = 1.05
    seconds: float = 60


OLMOE = instances.Source(file="olmoe-1b7b-decode-even.npz", tokens=25_600)
GPT_OSS = instances.Source(file="gptoss-20b-decode-even.npz", tokens=55_314)
TINY = instances.Source(file="traces/tinymoe.npz", tokens=107_520)
DSV3 = instances.Source(synth="dsv3-like", layers=4, tokens=100_000)

BESIDE_EPLB = (
    Case(name="OLMoE 1x8x2 + 16", source=OLMOE, shape="1x8x2", redundant=16, max_load=1.02),
    Case(name="gpt-oss 1x4x2 + 8", source=GPT_OSS, shape="1x4x2", redundant=8, max_load=1.02),
    Case(name="tiny MoE 1x8x2 + 16", source=TINY, shape="1x8x2", redundant=16, max_load=1.02),
    Case(name="dsv3-like 1x32x2 + 64", source=DSV3, shape="1x32x2", redundant=64, max_load=1.02),
)
RULES = ("nearest", "table", "cover")
CASES = (
    Case(
        name="OLMoE 1x8x1 + 8", source=OLMOE, shape="1x8x1", redundant=8, rules=RULES, share=0.8, seconds=120
    ),
    Case(name="OLMoE 1x8x1 + 8, halves", source=OLMOE, shape="1x8x1", redundant=8, rules=RULES),
    *BESIDE_EPLB,
    *(replace(case, name=f"{case.name}, swapped", swapped=True) for case in BESIDE_EPLB[:3]),
)


def rows(case: Case, trace: Trace, jobs: int) -> Iterator[tuple[str, ...]]:
    """Cells of the rows of a case, after its name: no copies, then `eplb`, `greedy` and `auto` for every rule."""
    fit, unseen = trace.split(case.share)[:: -1 if case.swapped else 1]
    machine = Topology.load("dgx-h100").with_shape(case.shape)
    for rule, method, redundant in (
        (case.rules[0], "auto", 0),
        *((rule, method, case.redundant) for rule in case.rules for method in ("eplb", "greedy", "auto")),
    ):
        problem = Problem.from_trace(
            fit,
            machine,
            redundant=redundant,
            max_load=case.max_load,
            load_margin=0.0,
            replica_choice=rule,
            gpu_memory=1e15,
        )
        result = solve(problem, method, budget=Budget(seconds=case.seconds), jobs=jobs)
        yield (
            f"{fit.num_tokens:,} + {unseen.num_tokens:,} x {trace.num_layers}",
            rule if redundant else "-",
            method if redundant else f"{method}, no copies",
            "-" if method != "auto" or case.max_load is None else f"{case.max_load:.2f}",
            f"{result.seconds:.0f}",
            *_measured(result.placement, fit, unseen, machine),
        )


def _measured(placement: Placement, fit: Trace, unseen: Trace, machine: Topology) -> list[str]:
    reports = [evaluate(placement, part, machine, gpu_memory=1e15) for part in (fit, unseen)]

    def load(report: Report, level: str) -> float:
        return float(report.load[level]["max_over_mean"])

    return [
        " / ".join(f"{report.remote['server']:.3f}" for report in reports),
        " / ".join(f"{load(report, 'server'):.3f}" for report in reports),
        " / ".join(f"{load(report, 'gpu'):.3f}" for report in reports),
    ]


@click.command()
@pages.options(Path(__file__).with_name("COPIES.md"))
def main(**given: Any) -> None:
    """Solve every case and write the page."""
    pages.write(PAGE, CASES, rows, **given)


if __name__ == "__main__":
    main()
