"""Seating: what constraints say in layers, units and numbers, as the rules of every layer's positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placer.constraints import Apart, Constraints, Entry, Pin, unit_ranks
from placer.errors import Infeasible, InvalidInput
from placer.rules import Rules, feasible


def seated(
    constraints: Constraints,
    *,
    layer_ids: Sequence[int],
    num_experts: int,
    shape: tuple[int, int, int],
    slots_per_rank: int,
) -> tuple[Rules, ...]:
    """The rules of every layer, each with an arrangement that keeps them; layers with the same ones share them.

    Parameters
    ----------
    constraints : Constraints
    layer_ids : sequence of int
        The model's layer numbers.
    num_experts : int
    shape : (racks, servers, gpus)
    slots_per_rank : int

    Raises
    ------
    InvalidInput
        When a layer, expert, unit or number of slots is not there, or pins contradict.
    Infeasible
        When the rules of a layer cannot all be kept, naming those that cannot.

    Examples
    --------
    >>> pins = Constraints(pin=(Pin(experts=(0, 1), level="gpu", unit=1),))
    >>> (rules,) = seated(pins, layer_ids=(0,), num_experts=4, shape=(1, 1, 2), slots_per_rank=2)
    >>> rules.start.tolist()
    [2, 3, 0, 1]
    >>> seated(pins, layer_ids=(0,), num_experts=4, shape=(1, 1, 4), slots_per_rank=1)
    Traceback (most recent call last):
    placer.errors.Infeasible: constraints: pin 1: 2 experts are pinned to gpu 1, which has 1 slot for them (layer 0)
    """
    constraints.check_ranges(layer_ids, num_experts, shape, slots_per_rank)
    known: dict[tuple[str, ...], Rules] = {}
    for layer in layer_ids:
        entries = constraints.of_layer(layer)
        if tuple(entries) not in known:
            say = f"{constraints.source}: {{}} (layer {layer})".format
            seats = _Seats(num_experts=num_experts, shape=shape, slots_per_rank=slots_per_rank)
            known[tuple(entries)] = seats.rules(entries, say)
    return tuple(known[tuple(constraints.of_layer(layer))] for layer in layer_ids)


@dataclass(frozen=True, kw_only=True)
class _Seats:
    """The slots of one layer."""

    num_experts: int
    shape: tuple[int, int, int]
    slots_per_rank: int

    @property
    def num_slots(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2] * self.slots_per_rank

    def unit_slots(self, level: str) -> int:
        return unit_ranks(self.shape)[level] * self.slots_per_rank

    def rules(self, entries: dict[str, Entry], say: Callable[[str], str]) -> Rules:
        """The rules that entries make; errors are told as `say` puts them."""
        made = self.positions(entries, say)
        self.count(entries, made, say)
        start = feasible(**made, slots_per_rank=self.slots_per_rank)
        if start is None:
            raise Infeasible(say(f"{' and '.join(self.conflict(entries))} cannot hold together"))
        for name in ("low", "high", "shut"):
            made[name].setflags(write=False)
        return Rules(**made, start=start)

    def positions(self, entries: dict[str, Entry], say: Callable[[str], str]) -> dict[str, Any]:
        """The arguments of `feasible`."""
        low = np.zeros(self.num_slots, np.int32)
        high = np.full(self.num_slots, self.num_slots, np.int32)
        shut = np.zeros((self.num_slots // self.slots_per_rank, self.slots_per_rank), bool)
        apart = []
        pinned: dict[int, str] = {}
        for name, entry in entries.items():
            if isinstance(entry, Pin):
                size = self.unit_slots(entry.level)
                for e in entry.experts:
                    first, end = max(low[e], entry.unit * size), min(high[e], (entry.unit + 1) * size)
                    if first >= end:
                        unit = f"{entry.level} {entry.unit}"
                        raise InvalidInput(
                            say(f"{name}: found expert {e} pinned to {unit}, and to {pinned[e]}")
                        )
                    low[e], high[e] = first, end
                    pinned[e] = f"{entry.level} {entry.unit} by {name}"
            elif isinstance(entry, Apart):
                apart.append((entry.experts, self.unit_slots(entry.level)))
            else:
                kept = self.slots_per_rank if entry.slots is None else entry.slots
                shut[list(entry.gpus), self.slots_per_rank - kept :] = True
        return {
            "num_experts": self.num_experts,
            "low": low,
            "high": high,
            "shut": shut.ravel(),
            "apart": tuple(apart),
        }

    def count(self, entries: dict[str, Entry], made: dict[str, Any], say: Callable[[str], str]) -> None:
        """Refuse what counting alone shows to be impossible; of pins and free slots, that is all there is."""
        low, high = made["low"][: self.num_experts], made["high"][: self.num_experts]
        room = ~made["shut"]
        if room.sum() < self.num_experts:
            kept = f"{(~room).sum()} of {self.num_slots} slots"
            raise Infeasible(
                say(f"free: {kept} are kept empty, which leaves {room.sum()} for {self.num_experts} experts")
            )
        for name, entry in entries.items():
            if isinstance(entry, Pin):
                size = self.unit_slots(entry.level)
                first, end = entry.unit * size, (entry.unit + 1) * size
                held, seats = int(((low >= first) & (high <= end)).sum()), int(room[first:end].sum())
                if held > seats:
                    unit = f"{entry.level} {entry.unit}"
                    has = f"{seats} slot{'' if seats == 1 else 's'} for them"
                    raise Infeasible(say(f"{name}: {held} experts are pinned to {unit}, which has {has}"))
            elif isinstance(entry, Apart):
                units = int(room.reshape(-1, self.unit_slots(entry.level)).any(axis=1).sum())
                if len(entry.experts) > units:
                    has = f"{units} {entry.level}{'' if units == 1 else 's'}"
                    raise Infeasible(
                        say(
                            f"{name}: {len(entry.experts)} experts are kept apart, but only {has} may hold any"
                        )
                    )

    def conflict(self, entries: dict[str, Entry]) -> list[str]:
        """Rules that cannot hold together, while any of them less can."""
        kept = dict(entries)
        for name in entries:
            fewer = {other: entry for other, entry in kept.items() if other != name}
            if feasible(**self.positions(fewer, str), slots_per_rank=self.slots_per_rank) is None:
                kept = fewer
        return list(kept)
