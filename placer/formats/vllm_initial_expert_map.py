"""vLLM, proposed (pull request 49572): the JSON file of eplb_config.initial_expert_map_path.

``[[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]``: for each MoE layer, counted from 0, the expert of each slot. As described
in github.com/vllm-project/vllm/pull/49572, open in September 2026; **no release of vLLM loads a map from a file**.

Loaded, with that change, by ``--enable-eplb --eplb-config '{"initial_expert_map_path": FILE, "num_redundant_experts":
N}'``. Traps:

- EPLB goes on rebalancing from live counts every ``step_interval`` steps, which replaces the map.
- Slots are the experts plus ``num_redundant_experts``, and none is empty.
- A single list instead of a list of lists would hold for every layer; it is never written here.
- Shared experts are not part of the map.
- Among copies the token's index modulo their number decides, which the rule ``spread`` prices.
"""

from __future__ import annotations

import json
import shlex

from placer.formats import Target
from placer.formats._maps import dispatch_notes, full_map, in_model_order, ordinal_note
from placer.placement import Placement


def write(placement: Placement, target: Target) -> bytes:
    """The file's bytes.

    Raises
    ------
    InvalidInput
        When a slot is empty, or there is a dispatch table.

    Examples
    --------
    >>> import numpy as np
    >>> placement = Placement(physical_to_logical=np.array([[1, 0, 1, 2]]), num_experts=3, shape=(1, 1, 2))
    >>> write(placement, Target())
    b'[[1, 0, 1, 2]]\\n'
    """
    return (json.dumps(full_map(in_model_order(placement), "vLLM").tolist()) + "\n").encode()


def load_with(placement: Placement, path: str) -> str:
    """The option that loads it."""
    redundant = placement.num_slots - placement.num_experts
    setting = {"initial_expert_map_path": path, "num_redundant_experts": redundant}
    return f"--enable-expert-parallel --enable-eplb --eplb-config {shlex.quote(json.dumps(setting))}"


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file leaves out."""
    return [
        "no release of vLLM loads this file: it is the schema of vLLM's pull request 49572",
        "EPLB goes on from this map and replaces it after step_interval steps; a large step_interval keeps it",
        ordinal_note(placement),
        *dispatch_notes(placement, "vLLM", "the copy that the token's index says", "spread"),
    ]
