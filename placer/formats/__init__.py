"""Formats of other programs: one file, one format; the file's name is the format's name.

A format is a module whose docstring's first line says what it is, with one or both of

``sniff(path) -> bool`` and ``read(paths, hints) -> Trace | Counts``
    Whether a file or a folder looks like this format, told from its first bytes and without an error whatever it
    holds; and what several of them say together. Nothing in a file is ever executed.
``write(placement, target) -> bytes``
    The file that the other program loads. What the format cannot say is refused, never dropped.

Files whose names begin with an underscore are shared by several formats.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from placer.errors import InvalidInput
from placer.files import nearest

if TYPE_CHECKING:
    from placer.counts import Counts
    from placer.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What the reader of a recording knows and its files may not say; None for unknown.

    Parameters
    ----------
    num_experts : int, optional
        Logical experts of each layer.
    top_k : int, optional
        Experts of each token.
    num_hidden_layers : int, optional
        Layers of the model, dense ones included.
    layer_ids : tuple of int, optional
        The model's numbers of its MoE layers.
    model : str, optional
        The model's name, as its publisher writes it.
    """

    num_experts: int | None = None
    top_k: int | None = None
    num_hidden_layers: int | None = None
    layer_ids: tuple[int, ...] | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a stack needs to know and a placement does not say; None for unknown.

    Parameters
    ----------
    num_hidden_layers : int, optional
        Layers of the model, dense ones included, for formats that want a row for each.
    """

    num_hidden_layers: int | None = None


def readers() -> list[str]:
    """Formats that can be read."""
    return [name for name in _names() if hasattr(_module(name), "read")]


def writers() -> list[str]:
    """Formats that can be written."""
    return [name for name in _names() if hasattr(_module(name), "write")]


def title(name: str) -> str:
    """What a format is, in one line."""
    return (_module(name).__doc__ or name).strip().splitlines()[0].rstrip(".")


def reader(name: str) -> ModuleType:
    """The module that reads a format.

    Raises
    ------
    InvalidInput
        When no format has this name, or it can only be written.
    """
    if name not in readers():
        raise InvalidInput(f"unknown format to read {name!r}; {nearest(name, readers())}")
    return _module(name)


def writer(name: str) -> ModuleType:
    """The module that writes a format.

    Raises
    ------
    InvalidInput
        When no format has this name, or it can only be read.
    """
    if name not in writers():
        raise InvalidInput(f"unknown format to write {name!r}; {nearest(name, writers())}")
    return _module(name)


def sniffed(path: Path) -> str:
    """The format of a file or folder, by its content.

    Raises
    ------
    InvalidInput
        When it looks like none of them, or like several.
    """
    found = [name for name in readers() if _module(name).sniff(path)]
    if len(found) == 1:
        return found[0]
    if not path.exists():
        raise InvalidInput(f"{path}: no such file or folder")
    what = f"looks like {' and '.join(found)}" if found else "looks like no known format"
    raise InvalidInput(f"{path}: {what}; --from names one of {', '.join(found or readers())}")


def read(paths: Sequence[Path], *, name: str | None = None, hints: Hints | None = None) -> Trace | Counts:
    """What recordings of one format say together; the format is told from the first unless it is named.

    Raises
    ------
    InvalidInput
        When a file is damaged, of another format, or leaves open what `hints` must then say.
    """
    result: Trace | Counts = reader(name or sniffed(paths[0])).read(paths, hints or Hints())
    return result


def _names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
