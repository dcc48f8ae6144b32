"""EPLB: the tensors of eplb.rebalance_experts, as .npz.

What ``rebalance_experts`` of github.com/deepseek-ai/EPLB (at d52c72d, 2025-03-24) returns, all int64:

- ``phy2log`` (layers, slots): the expert of each slot; rank = slot // (slots / ranks).
- ``log2phy`` (layers, experts, most copies): slots of each expert, ascending, padded with -1.
- ``logcnt`` (layers, experts): how many.

EPLB has no file of its own; code that calls it loads these instead. ``layer_ids`` (layers,), the model's own numbers
of the layers, is added: the other arrays go by position. No slot is empty. Which copy a token takes is up to the code.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np

from placer.errors import InvalidInput
from placer.formats import Target
from placer.formats._maps import LARGEST, full_map, on_several_ranks
from placer.npz import read_members, write_members
from placer.placement import Placement


def write(placement: Placement, target: Target) -> bytes:
    """The file's bytes.

    Raises
    ------
    InvalidInput
        When a slot is empty, or there is a dispatch table.

    Examples
    --------
    >>> placement = Placement(physical_to_logical=np.array([[1, 0, 1, 2]]), num_experts=3, shape=(1, 1, 2))
    >>> np.load(io.BytesIO(write(placement, Target())))["log2phy"].tolist()
    [[[1, -1], [0, 2], [3, -1]]]
    """
    members = {
        "phy2log": full_map(placement, "EPLB").astype(np.int64),
        "log2phy": placement.logical_to_physical.astype(np.int64),
        "logcnt": placement.replica_count.astype(np.int64),
        "layer_ids": np.array(placement.layer_ids, np.int64),
    }
    file = io.BytesIO()
    write_members(file, members, compressed=False)
    return file.getvalue()


def load_with(placement: Placement, path: str) -> str:
    """The code that loads it."""
    return f'phy2log, log2phy, logcnt = map(np.load({path!r}).get, ("phy2log", "log2phy", "logcnt"))'


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file leaves out."""
    rule = f"made for the dispatch rule {placement.rule!r}: the file does not say which copy a token takes"
    return [rule] * on_several_ranks(placement)


def read_placement(
    path: str | os.PathLike[str], *, shape: tuple[int, int, int], layer_ids: Sequence[int] | None = None
) -> Placement:
    """The placement of ``phy2log`` in an .npz, so that it can be priced.

    Parameters
    ----------
    path
        The .npz file; of its arrays only ``phy2log`` and ``layer_ids`` are read.
    shape : (racks, servers, gpus)
        The machine; ranks in order.
    layer_ids : sequence of int, optional
        The model's own numbers of the layers; the file's, or 0, 1, ... by default.

    Raises
    ------
    InvalidInput
        When it is no such file.
    """
    found = read_members(path, (), ("phy2log", "layer_ids"), largest=LARGEST)
    held = found.get("phy2log", np.zeros(0))
    if held.ndim != 2 or held.dtype.kind not in "iu" or not held.size:
        raise InvalidInput(f"{path}: expected an array phy2log of integers, (num_layers, num_slots)")
    ids = found.get("layer_ids", np.zeros(0, int)).ravel().tolist() if layer_ids is None else layer_ids
    try:
        return Placement(
            physical_to_logical=held, num_experts=int(held.max()) + 1, shape=shape, layer_ids=tuple(ids)
        )
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
