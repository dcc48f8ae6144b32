"""Methods: one file, one method; the file's name is the method's name.

A method is a module with

``needs``
    frozenset out of ``load``, ``pairs``, ``routes``: the statistics it reads.
``handles``
    frozenset out of ``caps``, ``copies``, ``levels``, ``pins``: limits it keeps, copies it makes, levels beyond
    one that it weighs, and whether it keeps the layer's rules. A method without ``copies`` leaves spare slots empty.
``place(layer, *, rng, clock, initial=None) -> Placed``
    arranges one `placer.layer.Layer`. `initial` is a slot array or None. All randomness comes from
    `rng`; a method that iterates asks `clock.allows(rounds)` before each round.

Packages outside join through the entry point group ``placer.solvers`` (name -> module).
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.errors import InvalidInput
from placer.files import nearest
from placer.layer import Layer

ENTRY_POINTS = "placer.solvers"


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """What a method returns for one layer.

    Parameters
    ----------
    slots : (num_slots,) int32
        Logical expert of each slot, -1 = empty and last within its rank.
    bound : float or None
        Proven lower bound on the layer's cost (seconds of all tokens), where the method has one.
    bound_method : str or None
        What proves the bound.
    claim : float or None
        The layer's cost (seconds of all tokens) as the method itself counts it; `placer.solve` scores the slots
        anew and raises when the two differ.
    rounds : int
        Rounds of search that were run.
    notes : tuple of str
        What the method decided by itself, in words.
    table : (num_servers, num_experts) int32 or None
        Slots for the dispatch rule "table"; without it, `placer.solve` fits one to the slots.
    """

    slots: npt.NDArray[np.int32]
    bound: float | None = None
    bound_method: str | None = None
    claim: float | None = None
    rounds: int = 0
    notes: tuple[str, ...] = ()
    table: npt.NDArray[np.int32] | None = None


class Method(Protocol):
    """The interface of a method module."""

    needs: frozenset[str]
    handles: frozenset[str]

    def place(
        self,
        layer: Layer,
        *,
        rng: np.random.Generator,
        clock: Clock,
        initial: npt.NDArray[np.int32] | None = None,
    ) -> Placed:
        """Arrange one layer."""
        ...


def names() -> list[str]:
    """All methods, without importing any: the files here and the entry points of other packages."""
    return sorted({*_shipped(), *_outside()})


def handling(limit: str) -> list[str]:
    """The methods that handle a limit, of those whose packages are installed."""
    found = []
    for name in names():
        with contextlib.suppress(ImportError):
            if limit in method(name).handles:
                found.append(name)
    return found


def needing(statistics: Collection[str]) -> list[str]:
    """The methods that need no other statistics than these, of those whose packages are installed.

    Examples
    --------
    >>> needing({"load"})
    ['auto', 'eplb', 'linear', 'lpt', 'random', 'round_robin']
    """
    found = []
    for name in names():
        with contextlib.suppress(ImportError):
            if method(name).needs <= set(statistics):
                found.append(name)
    return found


def method(name: str) -> Method:
    """The method of a name.

    Raises
    ------
    InvalidInput
        When no method has this name; the message lists near ones.
    """
    if name in _shipped():
        return cast(Method, importlib.import_module(f"{__name__}.{name}"))
    outside = _outside()
    if name in outside:
        loaded: Method = outside[name].load()
        return loaded
    raise InvalidInput(f"unknown method {name!r}; {nearest(name, {*_shipped(), *outside})}")


def _shipped() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}


def _outside() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
