"""What copies buy: ``python -m benchmarks.copies --traces DIR``.

Every case is solved by `eplb` and by `auto` on a part of its sequences and scored on the others, at the same number of
spare slots. Writes a page, case by case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import joblib

from benchmarks import instances
from benchmarks.quality import CACHE
from placer import Budget, Placement, Problem, Topology, Trace, evaluate, solve
from placer.errors import PlacerError
from placer.files import write_atomically
from placer.report import Report

PAGE = """\
# Copies

`python -m benchmarks.copies --traces DIR`: {jobs} threads, seed 0, load margin 0. Cells: fitted / held out
by sequence; `remote.server` is other servers a token, load is that of the busiest unit over the mean
(mean over layers), copies as the rule shares them out.

| case | fitted + held out tokens x layers | rule | method | cap | seconds | remote.server | server load | GPU load |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trace on a machine with spare slots."""

    name: str
    source: instances.Source
    shape: str
    redundant: int
    rules: tuple[str, ...] = ("nearest",)
    share: float = 0.5  # of the sequences that are fitted
    max_load: float | None = 1.05
    seconds: float = 60


OLMOE = instances.Source(file="olmoe-1b7b-decode-even.npz", tokens=25_600)
GPT_OSS = instances.Source(file="gptoss-20b-decode-even.npz", tokens=55_314)
TINY = instances.Source(file="traces/tinymoe.npz", tokens=107_520)
DSV3 = instances.Source(synth="dsv3-like", layers=4, tokens=100_000)

CASES = (
    Case(
        name="OLMoE 1x8x1 + 8",
        source=OLMOE,
        shape="1x8x1",
        redundant=8,
        rules=("nearest", "table", "cover"),
        share=0.8,
        seconds=120,
    ),
    Case(name="OLMoE 1x8x2 + 16", source=OLMOE, shape="1x8x2", redundant=16, max_load=1.0, seconds=60),
    Case(name="gpt-oss 1x4x2 + 8", source=GPT_OSS, shape="1x4x2", redundant=8, max_load=1.0, seconds=60),
    Case(name="tiny MoE 1x8x2 + 16", source=TINY, shape="1x8x2", redundant=16, max_load=1.0, seconds=60),
    Case(name="dsv3-like 1x32x2 + 64", source=DSV3, shape="1x32x2", redundant=64, max_load=1.0, seconds=60),
)

_FOLDER = click.Path(file_okay=False, path_type=Path)


def rows(case: Case, trace: Trace, jobs: int) -> list[str]:
    """The rows of a case: no copies, `eplb`, and `auto` for every rule."""
    fit, unseen = trace.split(case.share)
    machine = Topology.load("dgx-h100").with_shape(case.shape)
    found = []
    for rule, method, redundant in (
        (case.rules[0], "auto", 0),
        *((rule, method, case.redundant) for rule in case.rules for method in ("eplb", "auto")),
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
        cells = (
            case.name,
            f"{fit.num_tokens:,} + {unseen.num_tokens:,} x {trace.num_layers}",
            rule if redundant else "-",
            method if redundant else f"{method}, no copies",
            "-" if method == "eplb" or case.max_load is None else f"{case.max_load:.2f}",
            f"{result.seconds:.0f}",
            *_measured(result.placement, fit, unseen, machine),
        )
        found.append("| " + " | ".join(cells) + " |")
        click.echo(found[-1])
    return found


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
@click.option("--traces", type=_FOLDER, envvar="PLACER_TRACES", help="Folder of the recorded traces.")
@click.option("--cache", type=_FOLDER, default=CACHE, show_default=True, help="Folder of synthetic ones.")
@click.option("--case", "wanted", multiple=True, help="Only cases whose name contains this; may repeat.")
@click.option("--jobs", type=int, default=joblib.cpu_count(), help="Threads.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "COPIES.md")
def main(traces: Path | None, cache: Path, wanted: tuple[str, ...], jobs: int, output: Path) -> None:
    """Solve every case and write the page."""
    lines = [*PAGE.format(jobs=jobs).splitlines()]
    for case in CASES:
        if wanted and not any(part in case.name for part in wanted):
            continue
        try:
            trace = instances.trace(case.source, traces, cache)
        except PlacerError as error:
            click.echo(f"{case.name}: skipped: {error}", err=True)
            continue
        lines += rows(case, trace, jobs)
        text = "\n".join(lines) + "\n"
        write_atomically(output, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


if __name__ == "__main__":
    main()
