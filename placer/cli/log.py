"""The live log of a search on stderr: append-only lines, a progress bar on a terminal, events as JSON lines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from placer.bounds import gap
from placer.report import format_seconds

if TYPE_CHECKING:
    from placer.certificate import Progress
    from placer.result import Event

_EVERY = 0.5  # seconds between two lines at least; the last layer always gets one

_HEADER = (
    f"{'time':>7} {'layers':>7} {'it':>9} H {'method':10} {'objective':>10} {'vs linear':>10} {'load':>6}"
)


_compiling: list[bool] = []  # not empty once this process has said so


@contextmanager
def compilation_told(say: Callable[[str], None]) -> Iterator[None]:
    """Say, once in a process, that kernels are being compiled; they are only when the cache on disk lacks one."""
    from numba.core import event

    class Told(event.Listener):  # type: ignore[misc]
        def on_start(self, compiled: object) -> None:
            if not _compiling:
                _compiling.append(True)
                say("compiling kernels (once, about half a minute)...")

        def on_end(self, compiled: object) -> None:
            pass

    with event.install_listener("numba:compile", Told()):
        yield


@contextmanager
def elapsing(what: str) -> Iterator[None]:
    """Say on stderr what is being done, and on a terminal for how long it has been."""
    if not sys.stderr.isatty():
        click.echo(f"{what}...", err=True)
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        bar.add_task(what, total=None)
        yield


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
        self._header = (
            ""  # to be shown above the first line, so that what is said before stands above the table
        )
        self._label = ""
        self._before = (0, 0.0)  # layers and seconds of searches that have ended
        self._now = (0, 0.0)  # layers of the search that runs, and its seconds so far

    def say(self, text: str) -> None:
        """One line."""
        if self._quiet:
            return
        with suppress(OSError):  # a full or closed stderr must not end the search
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                click.echo(text, err=True)

    @contextmanager
    def running(self, layers: int, seconds: float = math.inf) -> Iterator[None]:
        """A table of the layers that all searches will do together in so many seconds, and a bar on a terminal."""
        self._header = _HEADER
        if not self._quiet and sys.stderr.isatty():
            self._bar = _bar(seconds)
            # Half a layer more, so that the clock runs on while bounds are computed.
            self._task = self._bar.add_task("layers", total=layers + 0.5, spent=0.0)
            self._bar.start()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()

    def add(self, event: Event) -> None:
        """Show one more finished layer."""
        if self._path is not None:
            try:
                # Opened with the first event, so that a run that is refused leaves no file.
                self._file = self._file or self._path.open("w", encoding="utf-8", buffering=1)
                self._file.write(json.dumps(asdict(event), allow_nan=False) + "\n")
            except OSError as error:
                self.say(f"note: {self._path}: the log ends here: {error.strerror}")
                self._path = None
        if event.label != self._label:
            self._before = (self._before[0] + self._now[0], self._before[1] + self._now[1])
            self._shown = -_EVERY
        self._now = (event.layers, event.seconds)
        if self._bar is not None:
            layers, seconds = self._before
            self._bar.update(self._task, completed=layers + event.done, spent=seconds + event.seconds)
        if self._header:
            self.say(self._header)
            self._header = ""
        if event.label != self._label:
            self._label = event.label
            self.say(f"-- {event.label}")
        if event.done == event.layers or event.seconds - self._shown >= _EVERY:
            self._shown = event.seconds
            self.say(_line(event))


def remaining(elapsed: float, done: int, layers: int, limit: float) -> float:
    """Seconds that a search will take at the pace of the layers done, or is allowed to, whichever is less.

    Examples
    --------
    >>> remaining(10.0, 2, 6, math.inf), remaining(10.0, 2, 6, 15.0), remaining(10.0, 0, 6, 60.0)
    (20.0, 5.0, 50.0)
    """
    pace = elapsed / done * (layers - done) if done else math.inf
    return max(0.0, min(pace, limit - elapsed))


def _bar(limit: float) -> Any:
    """A progress bar with the seconds left, on stderr; it vanishes when it ends."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Left(ProgressColumn):
        """Counts down from what was known when the last layer was done; compilation is on no clock."""

        def __init__(self) -> None:
            super().__init__()
            self._known = (0, 0.0, 0.0)  # layers done, when, and seconds left then

        def render(self, task: Task) -> Text:
            done, layers, elapsed = int(task.completed), int(task.total or 0), task.elapsed or 0.0
            if done >= layers:
                return Text("finishing")
            if not done:
                return Text("" if math.isinf(limit) else f"at most {limit:.0f} s", no_wrap=True)
            if done != self._known[0]:
                self._known = (done, elapsed, remaining(task.fields["spent"], done, layers, limit))
            left = self._known[2] - (elapsed - self._known[1])
            return Text(f"about {max(0.0, left):.0f} s left", no_wrap=True)

    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        Left(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)


def _line(event: Event) -> str:
    change, proof = "-", ""
    if event.bound is not None:
        proof = f"  bound {format_seconds(event.bound)}, gap {gap(event.objective, event.bound):.1%}"
    if event.linear > 0:
        change = f"{100 * (event.objective / event.linear - 1):+.1f} %"
    return (
        f"{event.seconds:6.1f}s {f'{event.done}/{event.layers}':>7} {event.rounds:9d} {'H' if event.improved else ' '} "
        f"{event.method:10} {format_seconds(event.objective):>10} {change:>10} {event.load:6.3f}{proof}"
    )


class BoundLog:
    """Shows how gaps close, at most two lines a second and one for every finished layer."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._shown, self._headed = quiet, -_EVERY, False

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            with suppress(OSError):
                click.echo(text, err=True)

    def add(self, progress: Progress) -> None:
        """Show a better bound."""
        if not progress.finished and progress.seconds - self._shown < _EVERY:
            return
        self._shown = progress.seconds
        if not self._headed:
            self._headed = True
            self.say(
                f"{'time':>7} {'layers':>7} {'layer':>6} {'touched':>9} {'best met':>9} {'bound':>9} {'gap':>8}"
            )
        self.say(
            f"{progress.seconds:6.1f}s {f'{progress.done}/{progress.layers}':>7} {progress.layer:6d} "
            f"{progress.touched:9.4f} {progress.best:9.4f} {progress.bound:9.4f} {progress.gap:8.2%}"
            + (" done" if progress.finished else "")
        )
