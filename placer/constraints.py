"""Constraints: experts pinned to units, experts kept apart, and GPUs or slots of theirs kept empty."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.files import nearest
from placer.placement import Placement

LEVELS = ("gpu", "server", "rack")
KINDS = ("pin", "apart", "free")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Experts all copies of which stand on one unit: the `unit`-th of its `level` in topology order.

    `layers` are the model's layer numbers, here and below; None for all.
    """

    experts: tuple[int, ...]
    level: str
    unit: int
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Experts no two of which share a unit of a level."""

    experts: tuple[int, ...]
    level: str = "gpu"
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Free:
    """GPUs so many slots of which stay empty; all of them where `slots` is None."""

    gpus: tuple[int, ...]
    slots: int | None = None
    layers: tuple[int, ...] | None = None


Entry = Pin | Apart | Free


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A unit that breaks a rule (as in ``pin 2``, counted from 1) in a layer, and the experts there that do."""

    rule: str
    layer: int
    level: str
    unit: int
    experts: tuple[int, ...]

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.rule} is broken on {self.level} {self.unit} by {_experts(self.experts)}"


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """Where experts may stand.

    Parameters
    ----------
    pin : tuple of Pin
    apart : tuple of Apart
    free : tuple of Free
    source : str
        What errors call it: the file.

    Examples
    --------
    >>> rules = Constraints(pin=(Pin(experts=(0,), level="gpu", unit=1),), apart=(Apart(experts=(1, 2)),))
    >>> placement = Placement(physical_to_logical=np.array([[0, 3, 1, 2]]), num_experts=4, shape=(1, 1, 2))
    >>> for violation in rules.check(placement):
    ...     print(violation)
    layer 0: pin 1 is broken on gpu 0 by expert 0
    layer 0: apart 1 is broken on gpu 1 by experts 1, 2
    """

    pin: tuple[Pin, ...] = ()
    apart: tuple[Apart, ...] = ()
    free: tuple[Free, ...] = ()
    source: str = "constraints"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Constraints:
        """Read a TOML file of ``[[pin]]``, ``[[apart]]`` and ``[[free]]`` tables.

        Raises
        ------
        InvalidInput
            One line that names the file, the table and the key that is wrong.
        """
        try:
            document = tomllib.loads(Path(path).read_bytes().decode())
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{path}: expected a TOML file: {error}") from None
        try:
            for key in document:
                if key not in KINDS:
                    raise InvalidInput(f"unknown key {short(key)}, {nearest(key, KINDS)}")
            if not any(document.values()):
                raise InvalidInput("found no rule, expected tables [[pin]], [[apart]] or [[free]]")
            read: dict[str, Any] = {kind: tuple(_tables(kind, document.get(kind, []))) for kind in KINDS}
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from None
        return cls(**read, source=str(path))

    @property
    def entries(self) -> dict[str, Entry]:
        """All rules by name: ``pin 1``, ``pin 2``, ..., ``apart 1``, ..., ``free 1``, ..."""
        return {
            f"{kind} {number}": entry
            for kind in KINDS
            for number, entry in enumerate(getattr(self, kind), start=1)
        }

    def of_layer(self, layer: int) -> dict[str, Entry]:
        """The rules of a layer, by name; `layer` is the model's number."""
        return {
            name: entry
            for name, entry in self.entries.items()
            if entry.layers is None or layer in entry.layers
        }

    def check(self, placement: Placement) -> list[Violation]:
        """What a placement breaks, layer by layer.

        Raises
        ------
        InvalidInput
            When a layer, expert, unit or number of slots is none of the placement's.
        """
        self.check_ranges(
            placement.layer_ids, placement.num_experts, placement.shape, placement.slots_per_rank
        )
        found = []
        for layer, slots in zip(placement.layer_ids, placement.physical_to_logical, strict=True):
            for name, entry in self.of_layer(layer).items():
                for level, unit, experts in _breaks(entry, slots, placement.shape):
                    found.append(Violation(rule=name, layer=layer, level=level, unit=unit, experts=experts))
        return found

    def check_ranges(
        self, layer_ids: Sequence[int], num_experts: int, shape: tuple[int, int, int], slots_per_rank: int
    ) -> None:
        """Refuse rules about a layer, expert, unit or number of slots that is not there.

        Raises
        ------
        InvalidInput
            Naming the rule and its key.
        """

        from placer.evaluation import format_ids

        def check(where: str, values: Iterable[int], known: Iterable[int], what: str) -> None:
            for value in values:
                if value not in known:
                    raise InvalidInput(f"{self.source}: {where}: found {value}, expected {what}")

        ranks = shape[0] * shape[1] * shape[2]
        for name, entry in self.entries.items():
            check(f"{name}: layers", entry.layers or (), layer_ids, f"layers {format_ids(tuple(layer_ids))}")
            if isinstance(entry, Free):
                check(f"{name}: gpus", entry.gpus, range(ranks), f"GPUs 0 to {ranks - 1}")
                slots = () if entry.slots is None else (entry.slots,)
                expected = f"1 to {slots_per_rank}, the slots of a GPU"
                check(f"{name}: slots", slots, range(1, slots_per_rank + 1), expected)
                continue
            check(f"{name}: experts", entry.experts, range(num_experts), f"experts 0 to {num_experts - 1}")
            if isinstance(entry, Pin):
                units = ranks // unit_ranks(shape)[entry.level]
                check(f"{name}: {entry.level}", (entry.unit,), range(units), f"0 to {units - 1}")


def unit_ranks(shape: tuple[int, int, int]) -> dict[str, int]:
    """Ranks in one GPU, server and rack."""
    return {"gpu": 1, "server": shape[2], "rack": shape[1] * shape[2]}


def _breaks(
    entry: Entry, slots: npt.NDArray[np.int32], shape: tuple[int, int, int]
) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(level, unit, experts there) wherever a slot array breaks a rule."""
    ranks = shape[0] * shape[1] * shape[2]
    level = "gpu" if isinstance(entry, Free) else entry.level
    units = slots.reshape(ranks // unit_ranks(shape)[level], -1)
    for unit, row in enumerate(units):
        held = np.unique(row[row >= 0])
        if isinstance(entry, Free):
            kept = len(row) if entry.slots is None else entry.slots
            broken = unit in entry.gpus and int((row < 0).sum()) < kept
        else:
            held = held[np.isin(held, entry.experts)]
            broken = len(held) > 1 if isinstance(entry, Apart) else unit != entry.unit and len(held) > 0
        if broken:
            yield level, unit, tuple(held.tolist())


# -- the file --------------------------------------------------------------------------------------------


def _tables(kind: str, tables: Any) -> Iterator[Entry]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InvalidInput(f"{kind}: found {short(tables)}, expected [[{kind}]] tables")
    read: dict[str, Callable[[dict[str, Any]], Entry]] = {"pin": _pin, "apart": _apart, "free": _free}
    for number, table in enumerate(tables, start=1):
        try:
            yield read[kind](table)
        except InvalidInput as error:
            raise InvalidInput(f"{kind} {number}: {error}") from None


def _pin(table: dict[str, Any]) -> Pin:
    _check_keys(table, ("experts", "layers", *LEVELS))
    units = [level for level in LEVELS if level in table]
    if len(units) != 1:
        found = " and ".join(units) or "none"
        raise InvalidInput(f"found {found} of gpu, server and rack, expected one of them")
    unit = _number(units[0], table[units[0]])
    return Pin(experts=_numbers(table, "experts"), level=units[0], unit=unit, layers=_layers(table))


def _apart(table: dict[str, Any]) -> Apart:
    _check_keys(table, [field.name for field in fields(Apart)])
    level = table.get("level", "gpu")
    if level not in LEVELS:
        raise InvalidInput(f"level: found {short(level)}, expected gpu, server or rack")
    experts = _numbers(table, "experts")
    if len(experts) < 2:
        raise InvalidInput(f"experts: found {list(experts)}, expected at least two to keep apart")
    return Apart(experts=experts, level=level, layers=_layers(table))


def _free(table: dict[str, Any]) -> Free:
    _check_keys(table, [field.name for field in fields(Free)])
    slots = None if "slots" not in table else _number("slots", table["slots"])
    return Free(gpus=_numbers(table, "gpus"), slots=slots, layers=_layers(table))


def _check_keys(table: dict[str, Any], known: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise InvalidInput(f"unknown key {short(key)}, {nearest(key, known)}")


def _layers(table: dict[str, Any]) -> tuple[int, ...] | None:
    return _numbers(table, "layers") if "layers" in table else None


def _numbers(table: dict[str, Any], key: str) -> tuple[int, ...]:
    values = table.get(key)
    if not isinstance(values, list) or not values:
        found = "nothing" if values is None else short(values)
        raise InvalidInput(f"{key}: found {found}, expected a list of numbers, as in [0, 1]")
    numbers = tuple(_number(key, value) for value in values)
    if len(set(numbers)) < len(numbers):
        raise InvalidInput(f"{key}: found {short(list(numbers))}, expected each number once")
    return numbers


def _number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidInput(f"{key}: found {short(value)}, expected a whole number of 0 or more")
    return value


def _experts(experts: tuple[int, ...]) -> str:
    named = ", ".join(map(str, experts))
    return f"expert{'s' if len(experts) > 1 else ''} {named}" if experts else "nobody"
