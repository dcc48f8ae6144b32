"""Conversion: recordings of other programs, in files and folders, become one trace."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from placer import formats
from placer.errors import InvalidInput
from placer.trace import Trace

if TYPE_CHECKING:
    from placer.counts import Counts


def convert(
    paths: Sequence[Path],
    *,
    name: str | None = None,
    hints: formats.Hints | None = None,
    drop_steps: int = 0,
) -> tuple[str, Trace | Counts]:
    """What recordings in files and folders say together.

    Parameters
    ----------
    paths
        In order. A folder that is a recording of its own is taken whole, of any other its files.
    name
        The format; told from the files by default, which must then be of one.
    hints
        What the files may leave open.
    drop_steps
        Engine steps to leave out at the beginning, while the engine warmed up.

    Returns
    -------
    name, recording
        The format, and a trace, or counts where the recording holds loads only.

    Raises
    ------
    InvalidInput
        When a file is damaged, named twice, of no known format or of another than the first, leaves open what
        `hints` must then say, or there are no steps to drop.

    Warns
    -----
    UserWarning
        When a file of a folder looks like no format and is left out, or a reader leaves something out.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ids.npy"
    >>> np.save(path, np.array([[[0, 1], [2, 3]], [[1, 2], [0, 3]]]))
    >>> convert([path], hints=formats.Hints(num_experts=4))
    ('npy', Trace(num_experts=4, ..., layer_ids=(0, 1), ...))
    """
    found: dict[Path, str] = {}
    seen: set[Path] = set()
    for path in paths:
        more = _recordings(path, name)
        if again := [file for file in more if file.resolve() in seen]:
            raise InvalidInput(f"{again[0]}: is among the inputs twice, expected once")
        seen.update(file.resolve() for file in more)
        found |= more
    (first, kind), *others = found.items()
    for path, other in others:
        if other != kind:
            raise InvalidInput(
                f"{path}: looks like {other}, expected {kind} as {first}; convert them one by one"
            )
    recording = formats.read(list(found), name=kind, hints=hints)
    return kind, _without_first_steps(recording, drop_steps) if drop_steps else recording


def _recordings(path: Path, name: str | None) -> dict[Path, str]:
    """The recordings that a path stands for, each with its format."""
    if not path.is_dir():
        if not path.exists():
            raise InvalidInput(f"{path}: no such file or folder")
        if not path.is_file():
            raise InvalidInput(f"{path}: not a regular file")  # a pipe cannot be looked at and then read
        return {path: name or formats.sniffed(path)}
    whole = [known for known in formats.readers() if formats.reader(known).sniff(path)]
    if whole and name in (None, *whole):
        return {path: name or formats.sniffed(path)}
    try:
        files = sorted(
            (file for file in path.iterdir() if file.is_file() and file.name[0] != "."), key=_in_order
        )
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from None
    found: dict[Path, str] = {}
    for file in files:
        looks = [known for known in formats.readers() if formats.reader(known).sniff(file)]
        if name is not None or len(looks) == 1:
            found[file] = name or looks[0]
        elif looks:
            formats.sniffed(file)  # says between which formats it stands
        else:
            warnings.warn(f"{file}: looks like no known format, so left out", stacklevel=3)
    if not found:
        raise InvalidInput(f"{path}: no recording of a known format in this folder")
    return found


def _in_order(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts names as people count: 9 before 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), 0, part) if part.isdecimal() else (-1, 0, part) for part in parts]


def _without_first_steps(recording: Trace | Counts, number: int) -> Trace:
    if not isinstance(recording, Trace):
        raise InvalidInput("--drop-steps: the recording holds loads only, expected a trace with steps")
    if recording.step is None:
        raise InvalidInput(
            f"--drop-steps: {recording.name} says no engine steps; expected a trace with steps"
        )
    steps = np.unique(recording.step)
    if number >= len(steps):
        raise InvalidInput(
            f"--drop-steps: found {number}, expected less than the {len(steps)} steps there are"
        )
    return recording.select(recording.step >= steps[number])
