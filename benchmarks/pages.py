"""Pages of benchmarks: what is said above a table, and the rows of each case, written after every case.

A page that exists keeps the rows of cases that are not run this time, and the text below its table, so single cases
can be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
import joblib

from benchmarks import instances
from benchmarks.quality import CACHE
from placer import Trace
from placer.errors import PlacerError
from placer.files import write_atomically

F = TypeVar("F", bound=Callable[..., Any])

_FOLDER = click.Path(file_okay=False, path_type=Path)


class Case(Protocol):
    """What has rows on a page."""

    @property
    def name(self) -> str:
        """First cell of its rows; no other case has it."""

    @property
    def source(self) -> instances.Source:
        """Its trace."""


C = TypeVar("C", bound=Case)


def options(output: Path) -> Callable[[F], F]:
    """Options of a command that writes a page, by default to `output`; `write` takes them."""

    def apply(command: F) -> F:
        for option in (
            click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=output),
            click.option("--jobs", type=int, default=joblib.cpu_count(), help="Threads."),
            click.option(
                "--case", "wanted", multiple=True, help="Only cases whose name contains this; may repeat."
            ),
            click.option(
                "--cache", type=_FOLDER, default=CACHE, show_default=True, help="Folder of synthetic ones."
            ),
            click.option(
                "--traces", type=_FOLDER, envvar="PLACER_TRACES", help="Folder of the recorded traces."
            ),
        ):
            command = option(command)
        return command

    return apply


def write(
    page: str,
    cases: Sequence[C],
    rows: Callable[[C, Trace, int], Iterable[Sequence[str]]],
    *,
    traces: Path | None,
    cache: Path,
    wanted: Sequence[str],
    jobs: int,
    output: Path,
) -> None:
    """Run the cases whose name has a part that is `wanted` (all: none), but those whose trace is missing.

    Parameters
    ----------
    page : str
        Text up to the first row; its last two lines are the head of the table. ``{jobs}`` stands for the threads.
    cases : sequence of Case
        In the order of the page.
    rows : callable
        Given a case, its trace and the threads: cells of its rows, without the name of the case.
    traces, cache : Path
        Folders of recorded and of synthetic traces.
    wanted : sequence of str
    jobs : int
    output : Path
    """
    above = page.format(jobs=jobs)
    for case in cases:
        if wanted and not any(part in case.name for part in wanted):
            continue
        try:
            trace = instances.trace(case.source, traces, cache)
        except PlacerError as error:
            click.echo(f"{case.name}: skipped: {error}", err=True)
            continue
        found = []
        for cells in rows(case, trace, jobs):
            found.append(f"| {' | '.join((case.name, *cells))} |\n")
            click.echo(found[-1], nl=False)
        table, below = _parsed(output.read_text("utf-8") if output.exists() else "", above)
        table[case.name] = found
        _save(above + "".join(row for known in cases for row in table.get(known.name, ())) + below, output)


def _parsed(text: str, above: str) -> tuple[dict[str, list[str]], str]:
    """The rows of each case and the text below the table, of a page; none where the table has another head."""
    head = "".join(above.splitlines(keepends=True)[-2:])
    lines = text.partition(head)[2].splitlines(keepends=True)
    rows = list(takewhile(lambda line: line.startswith("|"), lines))
    table: dict[str, list[str]] = {}
    for row in rows:
        table.setdefault(row.split("|")[1].strip(), []).append(row)
    return table, "".join(lines[len(rows) :])


def _save(text: str, output: Path) -> None:
    write_atomically(output, lambda file: file.write(text.encode()))
