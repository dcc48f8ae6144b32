"""The live log of a search on stderr: append-only lines, a progress bar on a terminal, events as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from placer.report import format_seconds

if TYPE_CHECKING:
    from placer.solution import Event

_EVERY = 0.5  # seconds between two lines at least; the last layer always gets one

_HEADER = (
    f"{'time':>7} {'layers':>7} {'it':>9}   {'method':10} {'objective':>10} {'vs linear':>10} "
    f"{'bound':>10} {'gap':>7} {'load':>6}"
)


class SearchLog:
    """Shows events as they come.

    Parameters
    ----------
    quiet : bool
        Nothing on stderr; the file is written all the same.
    file : Path, optional
        Every event as one JSON object a line.
    """

    def __init__(self, *, quiet: bool, file: Path | None = None) -> None:
        self._quiet = quiet
        self._path = file
        self._file: IO[str] | None = None
        self._shown = -_EVERY
        self._bar: Any = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """One line."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=True)

    @contextmanager
    def running(self, layers: int) -> Iterator[None]:
        """The header of the table, and the bar while layers are being done."""
        self.say(_HEADER)
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(
                *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
            )
            self._task = self._bar.add_task("layers", total=layers)
            self._bar.start()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
            if self._file is not None:
                self._file.close()

    def add(self, event: Event) -> None:
        """Show one more finished layer."""
        if self._path is not None:
            # Opened with the first event, so that a run that is refused leaves no file.
            self._file = self._file or self._path.open("w", encoding="utf-8", buffering=1)
            self._file.write(json.dumps(asdict(event), allow_nan=False) + "\n")
        if self._bar is not None:
            self._bar.update(self._task, completed=event.done)
        if event.done == event.layers or event.seconds - self._shown >= _EVERY:
            self._shown = event.seconds
            self.say(_line(event))


def _line(event: Event) -> str:
    gap = bound = change = "-"
    if event.bound is not None:
        bound = format_seconds(event.bound)
        gap = f"{(event.objective - event.bound) / event.objective:.1%}" if event.objective > 0 else "0.0%"
    if event.linear > 0:
        change = f"{100 * (event.objective / event.linear - 1):+.1f} %"
    return (
        f"{event.seconds:6.1f}s {f'{event.done}/{event.layers}':>7} {event.rounds:9d} {'H' if event.improved else ' '} "
        f"{event.method:10} {format_seconds(event.objective):>10} {change:>10} {bound:>10} {gap:>7} {event.load:6.3f}"
    )
