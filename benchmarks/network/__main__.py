"""Measure what is predicted: ``python -m benchmarks.network run --traces DIR``."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from benchmarks.instances import ROOT
from benchmarks.network.emulation import machine, network, unavailable
from benchmarks.network.exchange import LEAD, Run, exchange
from benchmarks.network.matrices import Bytes, patterns, scaled, vectors
from benchmarks.network.measurement import Measurement, Saving, savings, table, verdicts
from benchmarks.runs import code
from placer import Budget, Problem, Topology, Trace, solve
from placer.errors import PlacerError
from placer.files import write_atomically
from placer.flows import from_matrix
from placer.homes import homes
from placer.timing import phase_seconds

SHAPE = (2, 2, 4)
MEGABIT = 1e6 / 8
RECORDED = "olmoe-1b7b-decode-even.npz"
METHODS = ("linear", "auto")

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare predicted seconds with those of sockets in Linux network namespaces."""


@main.command()
@click.option("--traces", type=_FOLDER, envvar="PLACER_TRACES", help=f"Folder with {RECORDED}.")
@click.option("--megabytes", type=click.FloatRange(1), default=320, show_default=True, help="Of a matrix.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--scale-up", type=float, default=540, show_default=True, help="Mbit/s of a GPU in its server.")
@click.option("--nic", type=float, default=60, show_default=True, help="Mbit/s of a GPU's NIC.")
@click.option("--oversubscription", type=float, default=2, show_default=True, help="Of rack uplinks.")
@click.option(
    "--lead",
    type=click.FloatRange(0, 1),
    default=LEAD,
    show_default=True,
    help="Of a stream over the slowest.",
)
@click.option("--time-limit", type=float, default=10, show_default=True, help="Seconds of each search.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of matrices, homes and search.")
@click.option("-o", "--output", type=_FILE, metavar="FILE.md", help="Write the tables to a file too.")
def run(
    traces: Path | None,
    megabytes: float,
    repeats: int,
    scale_up: float,
    nic: float,
    oversubscription: float,
    lead: float,
    time_limit: float,
    seed: int,
    output: Path | None,
) -> None:
    """Build the network, move every matrix, print the tables."""
    if reason := unavailable():
        click.echo(f"skipped: {reason}", err=True)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the network goes too
    try:
        topology = machine(
            SHAPE, scale_up=scale_up * MEGABIT, nic=nic * MEGABIT, oversubscription=oversubscription
        )
        drawn = patterns(topology, np.random.default_rng(seed))
        matrices = {name: scaled(weights, megabytes * 1e6) for name, weights in drawn.items()}
        names = []
        for trace in _traces(traces):
            names.append(trace.name)
            matrices |= placed(trace, topology, megabytes * 1e6, Budget(seconds=time_limit), seed)
        measurements, lost = measured(matrices, topology, repeats, lead)
    except PlacerError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    found = [
        Saving(
            trace=name,
            linear=measurements[f"{name}, {METHODS[0]}"],
            optimised=measurements[f"{name}, {METHODS[1]}"],
        )
        for name in names
    ]
    rows = list(measurements.values())
    described = (
        f"{'x'.join(map(str, SHAPE))} (racks, servers, GPUs): scale-up {scale_up:g} Mbit/s, NIC {nic:g} Mbit/s, "
        f"uplinks {oversubscription:g}:1; lead {lead:g}, {repeats} repeats, search {time_limit:g} s, seed {seed}"
    )
    text = "\n\n".join([table(rows), savings(found), "\n".join(verdicts(rows, found, lost))])
    click.echo(f"{described}\n\n{text}")
    if output is not None:
        page = _page(text, described).encode()
        write_atomically(output, lambda file: file.write(page))


def measured(
    matrices: dict[str, Bytes], topology: Topology, repeats: int, lead: float
) -> tuple[dict[str, Measurement], int]:
    """Predict each matrix, move it `repeats` times in rounds over all matrices, and count dropped packets."""
    runs: dict[str, list[Run]] = {name: [] for name in matrices}
    with network(topology) as dropped:
        for turn in range(repeats):
            for name, matrix in matrices.items():
                runs[name].append(exchange(matrix, lead=lead))
                click.echo(f"run {turn + 1}/{repeats}, {name}: {runs[name][-1].seconds:.3f} s", err=True)
        lost = dropped()
    found = {
        name: Measurement(
            name=name,
            bytes=float(matrix.sum()),
            predicted=phase_seconds(from_matrix(matrix.astype(np.float64), topology), 1.0, topology),
            runs=tuple(runs[name]),
        )
        for name, matrix in matrices.items()
    }
    return found, lost


def placed(trace: Trace, topology: Topology, total: float, budget: Budget, seed: int) -> dict[str, Bytes]:
    """The matrices of ``linear`` and of ``auto``, with vectors of the same size.

    All layers are one phase. A sequence lives on one rank. The placement that moves less moves `total` bytes.
    """
    problem = Problem.from_trace(trace, topology)
    home = np.asarray(homes(trace, topology.num_ranks, "sticky", seed), np.int32)
    moved = {
        method: vectors(solve(problem, method, budget=budget, seed=seed).placement, trace, home)
        for method in METHODS
    }
    size = total / min(float(matrix.sum()) for matrix in moved.values())
    return {f"{trace.name}, {method}": scaled(m, size * float(m.sum())) for method, m in moved.items()}


def _traces(folder: Path | None) -> Iterator[Trace]:
    """The shipped trace, and the recorded one where it is."""
    yield Trace.load(ROOT / "traces" / "tinymoe.npz")
    if folder is not None and (folder / RECORDED).exists():
        yield Trace.load(folder / RECORDED)
    else:
        click.echo(f"{RECORDED} skipped: not in --traces", err=True)


def _page(text: str, described: str) -> str:
    """The tables as a file, and what made them."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return (
        "# A real network in the loop\n\n"
        "Written by `python -m benchmarks.network run`; do not edit.\n\n"
        f"{described}.\n{date}, library {code()}, Linux {platform.release()}, {os.cpu_count()} cores.\n\n"
        f"```text\n{text}\n```\n"
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.network")
