"""Tables: the rule ``table``, a fixed copy of every expert for the tokens of each server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.layer import Layer

Slots = npt.NDArray[np.int32]

SAMPLE = 25_000  # distinct expert sets that a table is fitted to
SWEEPS = 20
PENALTIES = (1.0, 4.0, 16.0)  # touched units for a token above the cap, until the cap is kept


def fitted_table(layer: Layer, slots: Slots) -> npt.NDArray[np.int32] | None:
    """A table under which the tokens of each server touch few others, within the load caps where that is possible.

    Copies in the own server are always taken. Of several copies in one server, its GPUs take turns.

    Parameters
    ----------
    layer : Layer
    slots : (num_slots,) int32
        Expert of each slot, -1 = empty.

    Returns
    -------
    (num_servers, num_experts) int32 or None
        The slot that a token of a server takes; None without copies.

    Raises
    ------
    InvalidInput
        When there are more than 64 servers, or GPUs of the only one.

    Examples
    --------
    Expert 0 stands on servers 0 and 1; server 2 takes the copy beside expert 2, with which it is used:

    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> machine = Topology.load("dgx-h100").with_shape("1x3x1")
    >>> layer = Problem.from_trace(trace, machine, slots_per_gpu=2).layer(0)
    >>> fitted_table(layer, np.array([0, 1, 0, 2, 3, -1], np.int32)).tolist()
    [[0, 1, 3, 4], [2, 1, 3, 4], [2, 1, 3, 4]]
    """
    from placer.search.dispatch import UNITS
    from placer.search.tables import fit_table

    held = np.flatnonzero(slots >= 0)
    if np.bincount(slots[held], minlength=layer.num_experts).max() == 1:
        return None
    servers = layer.num_ranks // layer.server_ranks
    width = layer.num_slots // servers if servers > 1 else layer.slots_per_rank
    units = layer.num_slots // width
    if units > UNITS:
        raise InvalidInput(f"replica choice 'table': found {units} units, expected at most {UNITS}")
    where = np.zeros(layer.num_experts, np.uint64)
    np.bitwise_or.at(where, slots[held], np.uint64(1) << (held // width).astype(np.uint64))
    seen = layer.sample(SAMPLE)
    share = float(seen.load.sum()) / max(1.0, float(layer.load.sum()))
    cap = float(layer.caps[layer.unit_slots.index(width)]) * share if layer.load.any() else np.inf
    best, least = np.zeros((servers, layer.num_experts), np.int64), (np.inf, np.inf)
    for order in (held[::-1], held):  # which copy comes first: where the descent ends depends on it
        table = np.zeros_like(best)
        table[:, slots[order]] = order // width
        if servers > 1:
            table[held // width, slots[held]] = held // width  # the own one
        for penalty in PENALTIES:
            cost, over = fit_table(
                *seen.distinct,
                *seen.uses,
                where,
                layer.load * share,
                cap,
                penalty,
                servers > 1,
                table,
                SWEEPS,
            )
            if over == 0:
                break
        if (over, cost) < least:
            best, least = table, (over, cost)
    return _slots(best, slots, width)


def judged(
    layer: Layer, slots: Slots, table: npt.NDArray[np.int32] | None = None
) -> tuple[tuple[float, float, float], npt.NDArray[np.int32] | None]:
    """`Layer.judge` of slots, and the table that the layer's rule needs for it: the one given, or a fitted one."""
    if layer.rule == "table" and table is None and layer.topk is not None:
        table = fitted_table(layer, slots)
    return layer.judge(slots, table), table


def stacked(tables: Sequence[Slots | None]) -> Slots | None:
    """Dispatch tables of layers as one, (num_layers, num_servers, num_experts), -1 where a layer has none; or None."""
    some = next((table for table in tables if table is not None), None)
    if some is None:
        return None
    return np.stack([np.full_like(some, -1) if table is None else table for table in tables])


def _slots(table: npt.NDArray[np.int64], slots: Slots, width: int) -> npt.NDArray[np.int32]:
    """The slot for each unit of a table."""
    taken = np.empty(table.shape, np.int32)
    for server, row in enumerate(table):
        for expert, unit in enumerate(row.tolist()):
            copies = unit * width + np.flatnonzero(slots[unit * width : (unit + 1) * width] == expert)
            taken[server, expert] = copies[server % len(copies)]
    return taken
