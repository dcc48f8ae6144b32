"""vLLM, proposed (pull request 34811): the JSON file of --expert-placement-file.

``{"expert_to_ep_rank": [0, 1, 0, 1]}``: the rank of each expert, the same in every layer. As described in
github.com/vllm-project/vllm/pull/34811 and issue 34297, open in September 2026; **no release of vLLM loads it**.

Loaded, with that change, by ``--expert-placement-strategy custom --expert-placement-file FILE``. Traps:

- One map for all layers and no copies: a placement with either is refused here.
- It excludes EPLB.
- A rank holds its experts in ascending order, whatever their slots; that moves no traffic.
- Shared experts are not part of the map.
"""

from __future__ import annotations

import json
import shlex

import numpy as np

from placer.errors import InvalidInput
from placer.formats import Target
from placer.placement import Placement


def write(placement: Placement, target: Target) -> bytes:
    """The file's bytes.

    Raises
    ------
    InvalidInput
        When an expert has copies, or stands on different ranks in different layers.

    Examples
    --------
    >>> placement = Placement(physical_to_logical=np.array([[0, 2, 3, 1]] * 2), num_experts=4, shape=(1, 1, 2))
    >>> write(placement, Target())
    b'{"expert_to_ep_rank": [0, 1, 0, 1]}\\n'
    """
    copied = placement.replica_count > 1
    if copied.any():
        layer, expert = np.argwhere(copied)[0]
        raise InvalidInput(
            f"layer {placement.layer_ids[layer]}: expert {expert} has copies, which --expert-placement-file cannot "
            "say; expected one slot for each expert"
        )
    ranks = placement.logical_to_physical[..., 0] // placement.slots_per_rank
    other = ranks != ranks[0]
    if other.any():
        layer, expert = np.argwhere(other)[0]
        raise InvalidInput(
            f"layer {placement.layer_ids[layer]}: expert {expert} is on rank {ranks[layer, expert]}, but on rank "
            f"{ranks[0, expert]} in layer {placement.layer_ids[0]}; expected every layer alike: "
            "--expert-placement-file holds one map for all"
        )
    return (json.dumps({"expert_to_ep_rank": ranks[0].tolist()}) + "\n").encode()


def load_with(placement: Placement, path: str) -> str:
    """The options that load it."""
    options = "--enable-expert-parallel --expert-placement-strategy custom --expert-placement-file"
    return f"{options} {shlex.quote(path)}"


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file leaves out."""
    first = placement.physical_to_logical[0].reshape(placement.num_ranks, -1)
    held = (first >= 0).sum(axis=1)
    uneven = f"ranks hold {held.min()} to {held.max()} experts: all-to-all kernels may want equally many"
    return [
        "no release of vLLM loads this file: it is the schema of vLLM's pull request 34811",
        *[uneven] * bool(held.min() < held.max()),
    ]
