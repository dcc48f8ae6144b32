"""omni-infer: the .npy cube of omni_placement_config.pattern_path.

``[device, MoE layer, expert]`` of int32, 1 where the device holds the expert; layers are counted from 0. As read in
omni-infer's ``omni_placement/expert_mapping.py`` and ``placement_mapping.cpp`` (2025).

Loaded with ``--additional-config '{"enable_omni_placement": true, "omni_placement_config": {"pattern_path": FILE,
"max_moe_layer_num": LAYERS}}'``. Traps:

- The cube has no slots: a device holds its experts in ascending order, whatever their slots; that moves no traffic.
- Layers may have different numbers of copies, so empty slots are no matter; yet a device has room for as many experts
  as the fullest layer has for each on average, and would write beyond it into the next device's.
- A device cannot hold an expert twice.
- Prefill and decode have files of their own.
- Shared experts are not part of the cube.
- Copies on the source's own device, then on its host, come first, much as in the rule ``nearest``.
"""

from __future__ import annotations

import io
import json
import shlex

import numpy as np

from placer.errors import InvalidInput
from placer.formats import Target
from placer.formats._maps import dispatch_notes, in_model_order, no_duplicates, no_table, ordinal_note
from placer.placement import Placement


def write(placement: Placement, target: Target) -> bytes:
    """The file's bytes.

    Raises
    ------
    InvalidInput
        When a rank holds an expert twice, or more experts than omni-infer has room for, or there is a dispatch table.

    Examples
    --------
    >>> placement = Placement(physical_to_logical=np.array([[0, 2, 1, 2]]), num_experts=3, shape=(1, 1, 2))
    >>> np.load(io.BytesIO(write(placement, Target()))).tolist()
    [[[1, 0, 1]], [[0, 1, 1]]]
    """
    placement = in_model_order(placement)
    no_table(placement, "omni-infer")
    no_duplicates(placement, "omni-infer")
    held = placement.physical_to_logical.reshape(placement.num_layers, placement.num_ranks, -1)
    number = (held >= 0).sum(axis=2)
    room = int(number.sum(axis=1).max()) // placement.num_ranks
    if number.max() > room:
        layer, rank = np.argwhere(number > room)[0]
        raise InvalidInput(
            f"layer {placement.layer_ids[layer]}, rank {rank}: found {number[layer, rank]} experts, expected at most "
            f"{room}, the average of the fullest layer: omni-infer has no room for more; a --redundant that fills "
            "all ranks alike avoids it"
        )
    cube = np.zeros((placement.num_ranks, placement.num_layers, placement.num_experts), np.int32)
    layer, rank, slot = np.nonzero(held >= 0)
    cube[rank, layer, held[layer, rank, slot]] = 1
    file = io.BytesIO()
    np.lib.format.write_array(file, cube, (1, 0), allow_pickle=False)
    return file.getvalue()


def load_with(placement: Placement, path: str) -> str:
    """The option that loads it."""
    config = {"pattern_path": path, "max_moe_layer_num": placement.num_layers}
    setting = {"enable_omni_placement": True, "omni_placement_config": config}
    return f"--additional-config {shlex.quote(json.dumps(setting))}"


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file leaves out."""
    does = "the device's own copy, else its host's, else another"
    return [ordinal_note(placement), *dispatch_notes(placement, "omni-infer", does, "nearest")]
