"""placer: a dispatch table for engines, as .npz.

Which slot a token takes for each of its experts, by the server it comes from: the rule ``table`` that ``placer solve
--replica-choice table`` fits. No stack loads one today; an engine that loads the map itself (in the format of its
stack, ``placer export --map-only``) applies this in its dispatch by one look-up. Arrays, all stored as they are:

- ``table`` (layers, servers, experts) int32: the slot; every entry is filled.
- ``physical_to_logical`` (layers, slots) int32: the expert of each slot, -1 = empty.
- ``shape`` (3,) int64: racks, servers in a rack, GPUs in a server; rank r is in server ``r // shape[2]``.
- ``slots_per_rank`` () int64: slot s is on rank ``s // slots_per_rank``.
- ``layer_ids`` (layers,) int64: the model's own numbers of the layers.

A rank needs one row of a layer. In numpy as in torch, ids being -1 nowhere::

    row = table[layer, rank // gpus_per_server]  # (experts,), on the device
    slots = row[topk_idx]  # (tokens, top_k)

`placer.dispatch.take_table` does the same for tokens of many ranks at once, with -1 for no expert.
"""

from __future__ import annotations

import io
import os

import numpy as np

from placer.dispatch import complete_table
from placer.errors import InvalidInput
from placer.formats import Target
from placer.formats._maps import LARGEST, Array
from placer.npz import read_members, write_members
from placer.placement import Placement

ARRAYS = ("table", "physical_to_logical", "shape", "slots_per_rank", "layer_ids")


def write(placement: Placement, target: Target) -> bytes:
    """The file's bytes.

    Raises
    ------
    InvalidInput
        When the placement has no table, or one that leaves an expert with copies open.

    Examples
    --------
    >>> placement = Placement(
    ...     physical_to_logical=np.array([[0, 1, 0, 2]]), num_experts=3, shape=(1, 2, 1),
    ...     rule="table", table=np.array([[[0, -1, -1], [2, -1, -1]]]))
    >>> np.load(io.BytesIO(write(placement, Target())))["table"].tolist()
    [[[0, 1, 3], [2, 1, 3]]]
    """
    file = io.BytesIO()
    members: dict[str, Array] = {
        "table": complete_table(placement),
        "physical_to_logical": placement.physical_to_logical,
        "shape": np.array(placement.shape, np.int64),
        "slots_per_rank": np.array(placement.slots_per_rank, np.int64),
        "layer_ids": np.array(placement.layer_ids, np.int64),
    }
    write_members(file, members, compressed=False)
    return file.getvalue()


def load_with(placement: Placement, path: str) -> str:
    """The code that applies it."""
    return f'slots = np.load({path!r})["table"][layer, rank // {placement.shape[2]}][topk_idx]'


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file is for."""
    return ["no stack loads a dispatch table: placer.dispatch.take_table applies it, in numpy or torch"]


def read_placement(path: str | os.PathLike[str]) -> Placement:
    """The placement of a file, with its table, for `placer.dispatch` and `placer.evaluate`.

    Raises
    ------
    InvalidInput
        When it is no such file, or its arrays do not fit each other.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from placer.dispatch import take_table
    >>> placement = Placement(
    ...     physical_to_logical=np.array([[0, 1, 0, 2]]), num_experts=3, shape=(1, 2, 1),
    ...     rule="table", table=np.array([[[0, 1, 3], [2, 1, 3]]]))
    >>> path = Path(tempfile.mkdtemp()) / "table.npz"
    >>> _ = path.write_bytes(write(placement, Target()))
    >>> read = read_placement(path)
    >>> topk_idx, homes = np.array([[0, 1], [0, 2]]), np.array([0, 1])
    >>> take_table(topk_idx, homes, complete_table(read)[0], server_ranks=read.shape[2]).tolist()
    [[0, 1], [2, 3]]
    """
    found = read_members(path, ARRAYS, largest=LARGEST)
    table, per_rank = found["table"], found["slots_per_rank"]
    if table.ndim != 3 or table.dtype.kind not in "iu":
        raise InvalidInput(f"{path}: table: found {table.dtype} {table.shape}, expected integers (l, s, e)")
    try:
        placement = Placement(
            physical_to_logical=found["physical_to_logical"],
            num_experts=table.shape[2],
            shape=found["shape"],  # type: ignore[arg-type]
            layer_ids=tuple(found["layer_ids"].ravel().tolist()),
            rule="table",
            table=table,
        )
        if per_rank.shape or per_rank != placement.slots_per_rank:
            raise InvalidInput(f"slots_per_rank: found {per_rank}, expected {placement.slots_per_rank}")
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
    return placement
