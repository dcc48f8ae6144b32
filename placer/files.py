"""Writing files whole or not at all, and naming things when they are not found."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from placer.errors import InvalidInput


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write(file)`` on a temporary file beside `path`, then rename it to `path`.

    A reader sees the old file or the new one, never a part of it. A symbolic link keeps pointing where it did.

    Raises
    ------
    InvalidInput
        When the folder does not exist or cannot be written, or something other than a file is in the way.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "answer.txt"
    >>> write_atomically(target, lambda file: file.write(b"42"))
    >>> target.read_text()
    '42'
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise InvalidInput(f"{path}: cannot be written: not a regular file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from None
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the close ones, or all of them when none is close.

    Examples
    --------
    >>> nearest("tabuu", ["tabu", "cpsat"])
    'did you mean tabu?'
    >>> nearest("x", ["tabu", "cpsat"])
    'known: cpsat, tabu'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}"
