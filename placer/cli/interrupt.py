"""Ctrl-C while a search runs: once to end it with what it has, twice to give up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TypeVar

import click

T = TypeVar("T")

EXIT_CODE = 130


def interruptible(work: Callable[[threading.Event], T]) -> tuple[T, bool]:
    """Run ``work(stop)``; the first Ctrl-C sets `stop`, the second ends the process at once.

    The work runs on a thread of its own, for Python calls signal handlers on the main thread, which would be
    busy inside compiled code. Outside the main thread there are no signals and the work just runs.

    Returns
    -------
    What the work returned, and whether it was interrupted.

    Examples
    --------
    >>> interruptible(lambda stop: stop.is_set())
    (False, False)
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        return work(stop), stop.is_set()

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            click.echo("\x1b[?25h", err=True, nl=False)  # a progress bar hides the cursor
            os._exit(EXIT_CODE)
        stop.set()
        click.echo("interrupted: ending with the best so far; Ctrl-C again to give up", err=True)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work, stop).result(), stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
