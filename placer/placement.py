"""Placement: which physical slot holds which logical expert, layer by layer."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.files import write_atomically

SCHEMA = "placer/placement/1"

ReplicaChoice = Literal["nearest", "spread", "table", "cover"]
REPLICA_CHOICES: tuple[str, ...] = get_args(ReplicaChoice)


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """The experts that every slot of every rank holds.

    Rank ``r`` owns the slots ``r * slots_per_rank`` up to ``(r + 1) * slots_per_rank`` and is GPU ``r``
    in topology order (rack by rack, server by server).

    Parameters
    ----------
    physical_to_logical : (num_layers, num_slots) int32
        Logical expert in each slot; -1 marks an empty slot, trailing within its rank.
    num_experts : int
        Logical experts per layer; each is held by at least one slot.
    shape : (racks, servers, gpus)
        Racks, servers per rack and GPUs per server; their product is the number of ranks.
    layer_ids : (num_layers,) tuple of int
        The model's own numbers of the layers; 0, 1, ... by default.
    rule : {"nearest", "spread", "table", "cover"}
        The dispatch rule the placement was made for: which copy a token takes.
    table : (num_layers, num_servers, num_experts) int array, optional
        Slot that a token from a server takes, for the rule ``table``; -1 where none is fixed.
    provenance : dict
        Where the placement comes from; written to the file, never read by the program.

    Raises
    ------
    InvalidInput
        When shapes, ids or the order of empty slots are wrong, or an expert has no slot.

    Examples
    --------
    One layer of four experts on two GPUs of one server, expert 0 held twice:

    >>> placement = Placement(
    ...     physical_to_logical=np.array([[0, 1, 2, 0, 3, -1]]), num_experts=4, shape=(1, 1, 2))
    >>> placement.slots_per_rank, placement.num_ranks
    (3, 2)
    >>> placement.replica_count.tolist()
    [[2, 1, 1, 1]]
    """

    physical_to_logical: npt.NDArray[np.int32]
    num_experts: int
    shape: tuple[int, int, int]
    layer_ids: tuple[int, ...] = ()
    rule: str = "nearest"
    table: npt.NDArray[np.int32] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = whole_numbers(self.physical_to_logical, "physical_to_logical")
        if slots.ndim != 2 or slots.size == 0:
            raise InvalidInput(
                f"physical_to_logical: found shape {slots.shape}, expected (num_layers, num_slots)"
            )
        shape = whole_numbers(self.shape, "shape")
        if shape.shape != (3,) or shape.min() < 1:
            raise InvalidInput(
                f"shape: found {short(self.shape)}, expected three counts: racks, servers, gpus"
            )
        experts = whole_numbers(self.num_experts, "num_experts")
        ranks = int(np.prod(shape.astype(object)))
        if slots.shape[1] % ranks:
            raise InvalidInput(
                f"physical_to_logical: found {slots.shape[1]} slots per layer, "
                f"expected a multiple of the {ranks} ranks of shape {'x'.join(map(str, shape))}"
            )
        if experts.ndim or not 1 <= experts <= slots.shape[1]:
            raise InvalidInput(
                f"num_experts: found {short(self.num_experts)}, expected 1 to {slots.shape[1]}, the slots of a layer"
            )
        object.__setattr__(self, "num_experts", int(experts))
        object.__setattr__(self, "shape", tuple(shape.tolist()))
        layer_ids = whole_numbers(self.layer_ids if len(self.layer_ids) else range(len(slots)), "layer_ids")
        if layer_ids.shape != (len(slots),):
            raise InvalidInput(
                f"layer_ids: found {layer_ids.size} entries, expected {len(slots)}, one per layer"
            )
        if layer_ids.min() < 0 or len(np.unique(layer_ids)) < len(layer_ids):
            raise InvalidInput(
                f"layer_ids: found {short(self.layer_ids)}, expected distinct ids, none negative"
            )
        object.__setattr__(self, "layer_ids", tuple(layer_ids.tolist()))
        if self.rule not in REPLICA_CHOICES:
            raise InvalidInput(
                f"dispatch rule: found {short(self.rule)}, expected one of {', '.join(REPLICA_CHOICES)}"
            )
        if not isinstance(self.provenance, dict):
            raise InvalidInput(f"provenance: found {short(self.provenance)}, expected an object")
        self._check_slots(slots, ranks)
        frozen = slots.astype(np.int32)
        frozen.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", frozen)
        if (self.replica_count == 0).any():
            layer, expert = np.argwhere(self.replica_count == 0)[0]
            raise InvalidInput(f"layer {layer}: expert {expert} has no slot; every expert needs at least one")
        if self.table is not None:
            self._check_table()

    def _check_slots(self, slots: npt.NDArray[np.int64], ranks: int) -> None:
        wrong = (slots < -1) | (slots >= self.num_experts)
        if wrong.any():
            layer, slot = np.argwhere(wrong)[0]
            raise InvalidInput(
                f"physical_to_logical[{layer}][{slot}]: found {slots[layer, slot]}, "
                f"expected an expert 0..{self.num_experts - 1} or -1"
            )
        empty = (slots < 0).reshape(len(slots), ranks, -1)
        early = (empty[..., :-1] & ~empty[..., 1:]).any(axis=2)
        if early.any():
            layer, rank = np.argwhere(early)[0]
            raise InvalidInput(
                f"layer {layer}, rank {rank}: an empty slot (-1) stands before a held one; expected it last"
            )

    def _check_table(self) -> None:
        table = whole_numbers(self.table, "dispatch table").astype(np.int32)
        expected = (self.num_layers, self.shape[0] * self.shape[1], self.num_experts)
        if table.shape != expected:
            raise InvalidInput(
                f"dispatch table: found shape {table.shape}, expected {expected} (layer, server, expert)"
            )
        if table.min() < -1 or table.max() >= self.num_slots:
            raise InvalidInput(f"dispatch table: found a slot outside 0..{self.num_slots - 1}")
        for layer, rows in enumerate(table):
            held = np.where(rows < 0, np.arange(self.num_experts), self.physical_to_logical[layer][rows])
            if (held != np.arange(self.num_experts)).any():
                server, expert = np.argwhere(held != np.arange(self.num_experts))[0]
                raise InvalidInput(
                    f"dispatch table[{layer}][{server}][{expert}]: slot {rows[server, expert]} "
                    f"holds expert {held[server, expert]}, expected {expert}"
                )
        table.setflags(write=False)
        object.__setattr__(self, "table", table)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return int(self.physical_to_logical.shape[0])

    @property
    def num_slots(self) -> int:
        """Slots per layer, over all ranks."""
        return int(self.physical_to_logical.shape[1])

    @property
    def num_ranks(self) -> int:
        """Ranks, one per GPU."""
        return int(np.prod(self.shape))

    @property
    def slots_per_rank(self) -> int:
        """Slots of one rank in one layer."""
        return self.num_slots // self.num_ranks

    @cached_property
    def replica_count(self) -> npt.NDArray[np.int32]:
        """Slots that hold each expert, (num_layers, num_experts) int32."""
        count = np.zeros((self.num_layers, self.num_experts), np.int32)
        for layer, slots in enumerate(self.physical_to_logical):
            count[layer] = np.bincount(slots[slots >= 0], minlength=self.num_experts)
        count.setflags(write=False)
        return count

    @property
    def has_copies(self) -> bool:
        """Whether any expert is held by more than one slot."""
        return bool((self.replica_count > 1).any())

    @cached_property
    def logical_to_physical(self) -> npt.NDArray[np.int32]:
        """Slots of each expert in ascending order, (num_layers, num_experts, max_copies) int32, -1 filled."""
        width = int(self.replica_count.max())
        slots_of = np.full((self.num_layers, self.num_experts, width), -1, np.int32)
        for layer, slots in enumerate(self.physical_to_logical):
            order = np.argsort(slots, kind="stable")
            order = order[slots[order] >= 0]
            experts = slots[order]
            first = np.searchsorted(experts, np.arange(self.num_experts))
            slots_of[layer, experts, np.arange(len(order)) - first[experts]] = order
        slots_of.setflags(write=False)
        return slots_of

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the map and its shape, for provenance."""
        head = json.dumps([self.num_experts, self.shape, self.physical_to_logical.shape])
        return hashlib.sha256(head.encode() + self.physical_to_logical.tobytes()).hexdigest()

    def duplicates(self) -> list[tuple[int, int, int]]:
        """(layer, rank, expert) wherever one rank holds the same expert twice: a wasted slot."""
        found = []
        per_rank = self.physical_to_logical.reshape(self.num_layers, self.num_ranks, -1)
        ordered = np.sort(per_rank, axis=2)
        same = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        for layer, rank, at in np.argwhere(same):
            found.append((int(layer), int(rank), int(ordered[layer, rank, at])))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The document of a placement file."""
        table = None
        if self.table is not None:
            table = [[[None if s < 0 else int(s) for s in row] for row in layer] for layer in self.table]
        return {
            "schema": SCHEMA,
            "num_experts": self.num_experts,
            "layer_ids": list(self.layer_ids),
            "num_ranks": self.num_ranks,
            "slots_per_rank": self.slots_per_rank,
            "shape": list(self.shape),
            "physical_to_logical": self.physical_to_logical.tolist(),
            "dispatch": {"rule": self.rule, "table": table},
            "provenance": self.provenance,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the placement file, whole or not at all."""
        try:
            text = json.dumps(self.to_dict(), allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{path}: provenance cannot be written as JSON: {error}") from None
        write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Read a placement file; keys it does not know are ignored.

        Raises
        ------
        InvalidInput
            One line that names the file and the key that is wrong.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{path}: not a placement file: {error}") from None
        try:
            return cls.from_dict(document)
        except RecursionError:
            raise InvalidInput(f"{path}: not a placement file: nested too deeply") from None
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, document: Any) -> Placement:
        """Build a placement from the document of a placement file.

        Raises
        ------
        InvalidInput
            When a key is missing or its value does not fit.
        """
        if not isinstance(document, dict):
            raise InvalidInput(f"found a JSON {type(document).__name__}, expected an object")
        if document.get("schema") != SCHEMA:
            raise InvalidInput(f"schema: found {short(document.get('schema'))}, expected {SCHEMA!r}")
        dispatch = document.get("dispatch")
        dispatch = {} if dispatch is None else dispatch
        if not isinstance(dispatch, dict):
            raise InvalidInput(f"dispatch: found {short(dispatch)}, expected an object")
        for key in ("physical_to_logical", "num_experts", "shape"):
            if key not in document:
                raise InvalidInput(f"key {key!r} is missing")
        layer_ids = document.get("layer_ids", ())
        if not isinstance(layer_ids, list | tuple) or ("layer_ids" in document and not layer_ids):
            raise InvalidInput(f"layer_ids: found {short(layer_ids)}, expected a list of integers")
        placement = cls(
            physical_to_logical=document["physical_to_logical"],
            num_experts=document["num_experts"],
            shape=document["shape"],
            layer_ids=tuple(layer_ids),
            rule=dispatch.get("rule", "nearest"),
            table=None if dispatch.get("table") is None else _table(dispatch["table"]),
            provenance=document.get("provenance") or {},
        )
        for key, value in (("num_ranks", placement.num_ranks), ("slots_per_rank", placement.slots_per_rank)):
            if key in document and (isinstance(document[key], bool) or document[key] != value):
                raise InvalidInput(
                    f"{key}: found {short(document[key])}, expected {value} from shape and slots"
                )
        return placement


def format_shape(shape: tuple[int, int, int]) -> str:
    """A shape as the command line writes it: ``1x8x8``."""
    return "x".join(map(str, shape))


def whole_numbers(value: Any, what: str) -> npt.NDArray[np.int64]:
    """`value` as int64, where it is a rectangle of integers below 2**31.

    Raises
    ------
    InvalidInput
        Naming `what` and what was found.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise InvalidInput(
            f"{what}: found rows of unequal length, expected a rectangle of integers"
        ) from None
    if array.dtype.kind not in "iu" or (array.size and max(abs(int(array.min())), int(array.max())) >= 2**31):
        raise InvalidInput(f"{what}: found {short(value)}, expected integers below 2**31")
    if _holds_booleans(value):
        raise InvalidInput(f"{what}: found a boolean among {short(value)}, expected integers")
    return array.astype(np.int64)


def _holds_booleans(value: Any) -> bool:
    """Whether a nested list mixes true or false with integers, which numpy takes for 1 and 0."""
    if isinstance(value, list | tuple):
        return any(_holds_booleans(item) for item in value)
    return isinstance(value, bool)


def _table(rows: Any) -> Any:
    """The dispatch table of a file with -1 for null."""
    if isinstance(rows, list):
        return [_table(row) for row in rows] if rows else [-1]
    return -1 if rows is None else rows
