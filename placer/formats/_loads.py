"""What recordings of loads share: adding them up, and telling MoE layers from dense ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.counts import Counts, whole_loads
from placer.errors import InvalidInput
from placer.formats import Hints
from placer.model import Model
from placer.trace import MAX_EXPERTS

Ints = NDArray[np.int64]

MAX_LAYERS = 1 << 12  # far above any model; keeps a wrong number in a file from sizing a table


def told(value: Any) -> str:
    """What was found, in a few words on one line.

    Examples
    --------
    >>> told(np.zeros((2, 3))), told({"a": [1, 2]})
    ('float64 of shape (2, 3)', "{'a': [1, 2]}")
    """
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return " ".join(short(value).split())


def added(parts: Iterable[tuple[str, Any]]) -> Ints:
    """The sum of loads, each ``(layers, experts)`` with a word on where it was found.

    Raises
    ------
    InvalidInput
        When one holds anything but whole numbers from 0, or has another shape than those before it.

    Examples
    --------
    >>> added([("a", np.array([[1, 2]])), ("b", np.array([[0, 5.0]]))]).tolist()
    [[1, 7]]
    """
    total: Ints | None = None
    for where, part in parts:
        loads = whole_loads(part, where)
        if loads.ndim != 2 or loads.shape[0] > MAX_LAYERS or loads.shape[1] > MAX_EXPERTS:
            raise InvalidInput(
                f"{where}: found shape {loads.shape}, expected up to {MAX_LAYERS} layers x {MAX_EXPERTS} experts"
            )
        if total is not None and total.shape != loads.shape:
            raise InvalidInput(f"{where}: found shape {loads.shape}, expected {total.shape} as before it")
        total = loads if total is None else whole_loads(total + loads, where)
    if total is None:
        raise InvalidInput("found no loads")
    return total


def unmapped(physical: Any, experts: Any, num_experts: int, where: str) -> Ints:
    """Loads of slots as loads of experts.

    Parameters
    ----------
    physical : (layers, slots)
        Load of each slot.
    experts : (layers, slots) integer
        Expert of each slot, -1 = empty.
    num_experts : int
    where : str
        For errors.

    Examples
    --------
    >>> unmapped(np.array([[5, 2, 1]]), np.array([[0, 1, 0]]), 2, "here").tolist()
    [[6, 2]]
    """
    loads, held = whole_loads(physical, where), np.asarray(experts)
    if loads.ndim != 2 or loads.shape != held.shape:
        raise InvalidInput(f"{where}: found loads of shape {loads.shape}, the map has {held.shape}")
    if loads[held < 0].any():
        raise InvalidInput(f"{where}: found load in a slot that holds no expert")
    logical = np.zeros((len(loads), num_experts), np.int64)
    layer = np.broadcast_to(np.arange(len(loads))[:, None], held.shape)
    np.add.at(logical, (layer[held >= 0], held[held >= 0]), loads[held >= 0])
    return logical


def experts_of(held: Any, where: str) -> tuple[Ints, int]:
    """A map of slots to experts, ``(layers, slots)``, checked, and the number of experts that it holds.

    Raises
    ------
    InvalidInput
        When it is no such map, or an expert stands nowhere in some layer.
    """
    found = np.asarray(held)
    if found.dtype.kind not in "iu" or found.ndim != 2 or found.size == 0:
        raise InvalidInput(f"{where}: found {told(held)}, expected (layers, slots) integers")
    if len(found) > MAX_LAYERS or found.min() < -1 or found.max() >= MAX_EXPERTS:
        raise InvalidInput(
            f"{where}: found {len(found)} layers with experts from {found.min()} to {found.max()}, "
            f"expected up to {MAX_LAYERS} layers with experts from 0, below {MAX_EXPERTS}"
        )
    number = int(found.max()) + 1
    for layer, row in enumerate(found):
        missing = np.setdiff1d(np.arange(number), row)
        if missing.size:
            raise InvalidInput(f"{where}: layer {layer} holds no expert {missing[0]} of {number}")
    return found.astype(np.int64), number


def agreed(num_experts: int, hints: Hints, where: str) -> int:
    """`num_experts`, unless the reader of the recording knows better.

    Raises
    ------
    InvalidInput
        When the hint is another number.
    """
    if hints.num_experts is not None and hints.num_experts != num_experts:
        raise InvalidInput(
            f"{where}: found {num_experts} experts, expected {hints.num_experts} (--num-experts)"
        )
    return num_experts


def moe_rows(
    used: Any, hints: Hints, where: str, *, moe_only: bool = False
) -> tuple[list[int], tuple[int, ...]]:
    """Which rows are MoE layers, and the model's numbers of these.

    Parameters
    ----------
    used : (layers,) bool
        Rows with anything in them. Unless `hints` say otherwise, rows are the model's layers in order and those with
        nothing in them are dense.
    hints : Hints
        ``layer_ids`` names the rows, where there are as many, or says which rows to take.
    where : str
        For errors.
    moe_only : bool
        Rows are MoE layers all of them, whatever is in them.

    Raises
    ------
    InvalidInput
        When no row is left, or the hint names other layers than there are rows.

    Examples
    --------
    >>> moe_rows([False, True, True], Hints(), "here")
    ([1, 2], (1, 2))
    >>> moe_rows([True, True], Hints(layer_ids=(3, 4)), "here")
    ([0, 1], (3, 4))
    """
    number, ids = len(used), hints.layer_ids
    if ids is None:
        rows = [row for row in range(number) if used[row] or moe_only]
        if not any(used):
            raise InvalidInput(f"{where}: found nothing in any of {number} layers")
        return rows, tuple(rows)
    if len(ids) == number:
        return list(range(number)), ids
    if ids and not moe_only and max(ids) < number and min(ids) >= 0:
        return list(ids), ids
    raise InvalidInput(f"{where}: found {number} layers, --layer-ids names {len(ids)}")


def counts(load: Ints, hints: Hints, paths: Iterable[Path], source: str, *, moe_only: bool = False) -> Counts:
    """The counts of a recording with a row for each layer, in the model's order.

    Parameters
    ----------
    load : (layers, experts) int64
    hints : Hints
    paths : iterable of Path
        The recording; the first names it in logs.
    source : str
        What made it.
    moe_only : bool
        Rows are MoE layers all of them; else those without load are dense.
    """
    first = next(iter(paths))
    experts = agreed(load.shape[1], hints, str(first))
    rows, ids = moe_rows(load.any(axis=1), hints, str(first), moe_only=moe_only)
    return Counts(
        load=load[rows],
        layer_ids=ids,
        model=hints.model,
        num_groups=Model.for_trace_name(hints.model, experts).num_groups,
        source=source,
        name=first.stem,
    )
