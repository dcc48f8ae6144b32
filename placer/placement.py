"""Placement: which physical slot holds which logical expert, layer by layer."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
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
        slots = np.asarray(self.physical_to_logical)
        if slots.ndim != 2 or slots.size == 0 or slots.dtype.kind not in "iu":
            raise InvalidInput(
                f"physical_to_logical: found {slots.dtype} of shape {slots.shape}, "
                "expected integers of shape (num_layers, num_slots)"
            )
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InvalidInput(f"shape: found {self.shape}, expected three counts (racks, servers, gpus)")
        if self.num_experts < 1:
            raise InvalidInput(f"num_experts: found {self.num_experts}, expected at least 1")
        ranks = int(np.prod(self.shape))
        if slots.shape[1] % ranks:
            raise InvalidInput(
                f"physical_to_logical: found {slots.shape[1]} slots per layer, "
                f"expected a multiple of the {ranks} ranks of shape {format_shape(self.shape)}"
            )
        if slots.min() < -1 or slots.max() >= self.num_experts:
            layer, slot = np.argwhere((slots < -1) | (slots >= self.num_experts))[0]
            raise InvalidInput(
                f"physical_to_logical[{layer}][{slot}]: found {slots[layer, slot]}, "
                f"expected an expert 0..{self.num_experts - 1} or -1"
            )
        frozen = np.ascontiguousarray(slots, dtype=np.int32).copy()
        frozen.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", frozen)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        layer_ids = tuple(int(i) for i in self.layer_ids) or tuple(range(len(slots)))
        if len(layer_ids) != len(slots):
            raise InvalidInput(
                f"layer_ids: found {len(layer_ids)} entries, expected {len(slots)}, one per layer"
            )
        object.__setattr__(self, "layer_ids", layer_ids)
        empty = (frozen < 0).reshape(len(frozen), ranks, -1)
        if (empty[..., :-1] & ~empty[..., 1:]).any():
            layer, rank = np.argwhere((empty[..., :-1] & ~empty[..., 1:]).any(axis=2))[0]
            raise InvalidInput(
                f"layer {layer}, rank {rank}: an empty slot (-1) stands before a held one; expected last"
            )
        if (self.replica_count == 0).any():
            layer, expert = np.argwhere(self.replica_count == 0)[0]
            raise InvalidInput(f"layer {layer}: expert {expert} has no slot; every expert needs at least one")
        if self.rule not in REPLICA_CHOICES:
            raise InvalidInput(
                f"dispatch rule: found {self.rule!r}, expected one of {', '.join(REPLICA_CHOICES)}"
            )
        if self.table is not None:
            self._check_table()

    def _check_table(self) -> None:
        table = np.array(self.table, dtype=np.int32)
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
        text = json.dumps(self.to_dict()) + "\n"
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
            raise InvalidInput(f"schema: found {document.get('schema')!r}, expected {SCHEMA!r}")
        dispatch = document.get("dispatch") or {}
        if not isinstance(dispatch, dict):
            raise InvalidInput(f"dispatch: found {type(dispatch).__name__}, expected an object")
        provenance = document.get("provenance")
        shape = _integers(document, "shape")
        if shape.shape != (3,):
            raise InvalidInput(f"shape: found {shape.tolist()}, expected [racks, servers, gpus]")
        placement = cls(
            physical_to_logical=_integers(document, "physical_to_logical").astype(np.int32),
            num_experts=int(_integers(document, "num_experts")),
            shape=(int(shape[0]), int(shape[1]), int(shape[2])),
            layer_ids=tuple(_integers(document, "layer_ids").ravel().tolist())
            if "layer_ids" in document
            else (),
            rule=str(dispatch.get("rule", "nearest")),
            table=_table(dispatch.get("table")),
            provenance=provenance if isinstance(provenance, dict) else {},
        )
        for key, value in (("num_ranks", placement.num_ranks), ("slots_per_rank", placement.slots_per_rank)):
            if key in document and document[key] != value:
                raise InvalidInput(f"{key}: found {document[key]!r}, expected {value} from shape and slots")
        return placement


def format_shape(shape: tuple[int, int, int]) -> str:
    """A shape as the command line writes it: ``1x8x8``."""
    return "x".join(map(str, shape))


def _integers(document: dict[str, Any], key: str) -> npt.NDArray[np.int64]:
    if key not in document:
        raise InvalidInput(f"key {key!r} is missing")
    try:
        array = np.array(document[key])
    except ValueError:
        raise InvalidInput(f"{key}: rows differ in length, expected a rectangle of integers") from None
    if array.dtype.kind not in "iu" or array.size == 0 or np.abs(array.astype(np.int64)).max() >= 2**31:
        raise InvalidInput(f"{key}: found {str(document[key])[:40]!r}, expected integers below 2**31")
    return array.astype(np.int64)


def _table(rows: Any) -> npt.NDArray[np.int32] | None:
    if rows is None:
        return None
    try:
        return np.array(
            [[[-1 if s is None else int(s) for s in row] for row in layer] for layer in rows], np.int32
        )
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput("dispatch table: expected [layer][server][expert] of slots or null") from None
