"""vLLM, proposed (pull request 41141): the JSONL file of eplb_config.initial_mapping_path.

``{"record_type": "eplb_initial_mapping", "version": 1, "num_redundant_experts": 1, "num_slots": 4,
"initial_global_assignments": {"0": [0, 1, 2, 0], "1": [1, 2, 0, 1]}}`` on one line: under the number of each MoE layer,
counted from 0, as text, the expert of each slot. As read in github.com/vllm-project/vllm/pull/41141, open in September
2026; **no release of vLLM loads a map from a file**.

Loaded, with that change, by ``--enable-eplb --eplb-config '{"initial_mapping_path": FILE, "num_redundant_experts": N,
"disable_online_rebalancing": true}'``. Traps:

- Without ``disable_online_rebalancing`` EPLB soon replaces the map.
- Slots are the experts plus ``num_redundant_experts``, and none is empty.
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
    """
    held = full_map(in_model_order(placement), "vLLM").tolist()
    record = {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": placement.num_slots - placement.num_experts,
        "num_slots": placement.num_slots,
        "initial_global_assignments": {str(ordinal): row for ordinal, row in enumerate(held)},
    }
    return (json.dumps(record) + "\n").encode()


def load_with(placement: Placement, path: str) -> str:
    """The option that loads it."""
    setting = {
        "initial_mapping_path": path,
        "num_redundant_experts": placement.num_slots - placement.num_experts,
        "disable_online_rebalancing": True,
    }
    return f"--enable-expert-parallel --enable-eplb --eplb-config {shlex.quote(json.dumps(setting))}"


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file leaves out."""
    return [
        "no release of vLLM loads this file: it is the schema of vLLM's pull request 41141",
        ordinal_note(placement),
        *dispatch_notes(placement, "vLLM", "the copy that the token's index says", "spread"),
    ]
