"""Bounds: one file, one lower bound on how few units the tokens of a layer can touch.

A bound is a module with

``suits(partition) -> bool``
    whether it is worth trying on a partition of that size;
``prove(partition, incumbent, *, clock, workers=1, tell=None) -> Proof``
    a bound that holds whenever it stops: early because the clock ran out, or for good. `incumbent` is the unit of every
    item in a known partition, `tell` is called with every better bound and the cost of the best partition so far.

Everything here is exact: costs are whole numbers of tokens, and what solvers in floating point propose (prices,
multipliers, cuts) is rounded to multiples of a power of two before a bound is computed from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.errors import InvalidInput
from placer.groups import group_sets
from placer.layer import Layer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int16]  # (n, size) items of contents, ascending, -1 = none
Tell = Callable[[int, int], None]  # bound, cost of the best partition

#: Tried in this order; the first that suits is used.
BOUNDS = ("subsets", "columns", "colocation")


def gap(value: float, bound: float) -> float:
    """(value - bound) / value as a fraction; less than 0 for a value that is not among those bounded."""
    return (value - bound) / value if value > 0 else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Partition:
    """The experts of one layer, or its gate groups as wholes, to be split over the units of one level.

    Its cost is the number of (token, unit) pairs in which the token touches the unit.

    Parameters
    ----------
    num_items : int
        Experts, or gate groups.
    units, size : int
        Units, and the items that each can hold.
    sets : (n, width) int16 or int32
        Distinct sets of items that tokens use, -1 = none.
    count : (n,) int64
        Tokens of each set.
    load : (num_items,) int64
        Load of each item, as the cap counts it.
    cap : float
        Load that a unit may have; infinite for no cap.

    Examples
    --------
    >>> sets = np.array([[0, 1], [2, 3], [0, 2]], np.int16)
    >>> partition = Partition(
    ...     num_items=4, units=2, size=2, sets=sets, count=np.array([5, 4, 1]), load=np.array([6, 5, 5, 4])
    ... )
    >>> partition.cost(np.array([0, 0, 1, 1])), partition.cost(np.array([0, 1, 0, 1]))
    (11, 19)
    """

    num_items: int
    units: int
    size: int
    sets: npt.NDArray[np.signedinteger[Any]]
    count: Ints
    load: Ints
    cap: float = np.inf

    @classmethod
    def of_layer(
        cls, layer: Layer, slots: int, *, cap: float = np.inf, whole_groups: bool = False
    ) -> Partition:
        """The partition of a layer's experts over units of `slots` slots.

        With `whole_groups`, gate groups are not taken apart, as when a checkpoint is permuted.

        Raises
        ------
        InvalidInput
            When groups are to stay whole and a unit cannot hold a whole number of them.
        """
        sets, count = layer.distinct
        units = layer.num_slots // slots
        if not whole_groups:
            return cls(
                num_items=layer.num_experts,
                units=units,
                size=slots,
                sets=sets,
                count=count,
                load=layer.heat,
                cap=cap,
            )
        width = layer.num_experts // layer.num_groups
        if slots % width:
            raise InvalidInput(
                f"whole groups: found groups of {width} experts and units of {slots} slots, "
                "expected units that hold a whole number of groups"
            )
        members, tokens = group_sets(layer)
        return cls(
            num_items=layer.num_groups,
            units=units,
            size=slots // width,
            sets=members,
            count=tokens,
            load=layer.heat.reshape(-1, width).sum(axis=1),
            cap=cap,
        )

    @property
    def least(self) -> int:
        """Items that a unit holds at least: what the others have no room for."""
        return max(0, self.num_items - (self.units - 1) * self.size)

    @property
    def least_load(self) -> float:
        """Load that a unit has at least: what the others may not have."""
        return max(0.0, float(self.load.sum()) - (self.units - 1) * self.cap)

    @property
    def unavoidable(self) -> int:
        """What every partition costs at least: a token's items do not fit into fewer units."""
        used = (self.sets >= 0).sum(axis=1)
        return int(self.count @ -(-used // self.size))

    def cost(self, unit_of_item: npt.NDArray[Any]) -> int:
        """Touched (token, unit) pairs."""
        units = np.where(self.sets >= 0, np.asarray(unit_of_item)[self.sets], self.units)
        ordered = np.sort(units, axis=1)
        first = np.ones(ordered.shape, bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        return int(self.count @ (first & (ordered < self.units)).sum(axis=1))

    def allows(self, unit_of_item: npt.NDArray[Any]) -> bool:
        """Whether no unit holds more items, or more load, than it may."""
        held = np.bincount(unit_of_item, minlength=self.units)
        heat = np.bincount(unit_of_item, weights=self.load, minlength=self.units)
        return bool(held.max() <= self.size and heat.max() <= self.cap)

    def contents(self, unit_of_item: npt.NDArray[Any]) -> Rows:
        """The items of every unit, (units, size), ascending, -1 last."""
        rows = np.full((self.units, self.size), -1, np.int16)
        for unit in range(self.units):
            held = np.flatnonzero(np.asarray(unit_of_item) == unit)
            rows[unit, : len(held)] = held
        return rows

    def units_of(self, contents: Rows) -> Ints:
        """The unit of every item when unit u holds row u of `contents`."""
        unit_of_item = np.full(self.num_items, -1, np.int64)
        for unit, row in enumerate(contents):
            unit_of_item[row[row >= 0]] = unit
        return unit_of_item


@dataclass(frozen=True, kw_only=True, eq=False)
class Proof:
    """A lower bound on the cost of a partition.

    Parameters
    ----------
    bound : int
        No partition that is allowed costs less.
    method : str
        What proves it, in words.
    unit_of_item : (num_items,) int64
        The best partition known: the incumbent, or a better one that the proof came upon.
    certificate : mapping of str to arrays
        What a checker needs to see that the bound holds; see the module that made it.
    """

    bound: int
    method: str
    unit_of_item: Ints
    certificate: Mapping[str, Any] = field(default_factory=dict)


class Bound(Protocol):
    """The interface of a bound's module."""

    def suits(self, partition: Partition) -> bool:
        """Whether to try."""
        ...

    def prove(
        self,
        partition: Partition,
        incumbent: npt.NDArray[Any],
        *,
        clock: Clock,
        workers: int = 1,
        tell: Tell | None = None,
    ) -> Proof:
        """The best bound that the clock allows."""
        ...


def prove(
    partition: Partition,
    incumbent: npt.NDArray[Any],
    *,
    clock: Clock,
    workers: int = 1,
    tell: Tell | None = None,
) -> Proof:
    """A lower bound on the cost of every partition, by the first of `BOUNDS` that suits.

    Parameters
    ----------
    partition : Partition
    incumbent : (num_items,) int
        Unit of every item in a known partition, the better the faster. One that the cap forbids is not improved on.
    clock : Clock
        When to stop, and the gap that is good enough.
    workers : int
        Threads.
    tell : callable, optional
        Called with the bound and the cost of the best partition whenever one gets better.

    Examples
    --------
    >>> sets = np.array([[0, 1], [2, 3], [0, 2]], np.int16)
    >>> partition = Partition(
    ...     num_items=4, units=2, size=2, sets=sets, count=np.array([5, 4, 1]), load=np.array([6, 5, 5, 4])
    ... )
    >>> proof = prove(partition, np.array([0, 1, 0, 1]), clock=Clock.start())
    >>> proof.bound, proof.unit_of_item.tolist(), proof.method
    (11, [0, 0, 1, 1], 'subset dynamic programming')
    """
    start = np.asarray(incumbent, np.int64)
    if partition.units == 1 or partition.size == 1 or not partition.load.any():
        return Proof(bound=partition.cost(start), method="every partition costs the same", unit_of_item=start)
    least = Proof(
        bound=partition.unavoidable, method="experts of a token over slots of a unit", unit_of_item=start
    )
    if clock.expired:
        return least
    for name in BOUNDS:
        bound = cast(Bound, importlib.import_module(f"{__name__}.{name}"))
        if bound.suits(partition):
            proof = bound.prove(partition, start, clock=clock, workers=workers, tell=tell)
            break
    return proof if proof.bound >= least.bound else replace(least, unit_of_item=proof.unit_of_item)
