"""vLLM Ascend: the JSON file of eplb_config.expert_map_path.

``{"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list":
[{"device_id": 0, "device_expert": [7, 2, 0, 3, 5]}, {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]}]}]}``:
``layer_id`` counts the MoE layers from 0, ``device_expert`` lists a rank's experts in the order of its slots. As read
in vllm-ascend at 182b75e (2026-08-22), whose ``expert_map_record_path`` writes the same.

Loaded with ``--additional-config '{"eplb_config": {"expert_map_path": FILE, "num_redundant_experts": N}}'``. Traps:

- All devices hold equally many experts, and none an expert twice.
- Loading a fixed map is announced to go in 0.25.1, and the newer model runner refuses it already.
- A draft model (MTP) has the same redundancy or no map.
- Shared experts are not part of the map.
- Among copies the source rank modulo their number decides, which the rule ``spread`` prices.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

from placer.errors import InvalidInput
from placer.formats import Target
from placer.formats._maps import (
    dispatch_notes,
    full_map,
    in_model_order,
    no_duplicates,
    ordinal_note,
    placed,
    read_json,
)
from placer.placement import Placement


def write(placement: Placement, target: Target) -> bytes:
    """The file's bytes.

    Raises
    ------
    InvalidInput
        When a slot is empty, a rank holds an expert twice, or there is a dispatch table.
    """
    held = full_map(in_model_order(placement), "vllm-ascend", doubles=False)
    no_duplicates(placement, "vllm-ascend")
    layers = [
        {
            "layer_id": ordinal,
            "device_count": placement.num_ranks,
            "device_list": [
                {"device_id": device, "device_expert": experts}
                for device, experts in enumerate(row.reshape(placement.num_ranks, -1).tolist())
            ],
        }
        for ordinal, row in enumerate(held)
    ]
    return (json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n").encode()


def load_with(placement: Placement, path: str) -> str:
    """The option that loads it."""
    redundant = placement.num_slots - placement.num_experts
    setting = {"eplb_config": {"expert_map_path": path, "num_redundant_experts": redundant}}
    return f"--enable-expert-parallel --additional-config {shlex.quote(json.dumps(setting))}"


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file leaves out."""
    gone = "vllm-ascend announces the end of fixed maps for 0.25.1, and its newer model runner refuses them"
    does = "the copy that the source rank modulo their number says"
    return [gone, ordinal_note(placement), *dispatch_notes(placement, "vllm-ascend", does, "spread")]


def read_placement(
    path: str | os.PathLike[str], *, shape: tuple[int, int, int], layer_ids: Sequence[int] | None = None
) -> Placement:
    """The placement of a file, so that it can be priced.

    Parameters
    ----------
    path
        The JSON file.
    shape : (racks, servers, gpus)
        The machine; devices in order.
    layer_ids : sequence of int, optional
        The model's own numbers of the layers; 0, 1, ... by default.

    Raises
    ------
    InvalidInput
        When it is no such file.
    """
    document, ranks = read_json(path), shape[0] * shape[1] * shape[2]
    rows = []
    try:
        for layer in _in_order(document["layer_list"], "layer_id"):
            devices = [device["device_expert"] for device in _in_order(layer["device_list"], "device_id")]
            if len(devices) != ranks or any(len(experts) != len(devices[0]) for experts in devices):
                expected = f"expected {ranks}, with equally many experts"
                raise InvalidInput(
                    f"{path}: found {len(devices)} devices in layer {layer['layer_id']}, {expected}"
                )
            rows.append([expert for experts in devices for expert in experts])
        if document.get("moe_layer_count", len(rows)) != len(rows):
            expected = f"expected {short(document['moe_layer_count'])}, as moe_layer_count says"
            raise InvalidInput(f"{path}: found {len(rows)} layers, {expected}")
    except (KeyError, TypeError, AttributeError):
        raise InvalidInput(
            f"{path}: expected layer_list: layers with layer_id and device_list, devices with device_id and "
            "device_expert, numbered from 0"
        ) from None
    return placed(path, "layer_list", rows, shape=shape, layer_ids=layer_ids)


def _in_order(entries: Any, key: str) -> list[Any]:
    """Entries by their number, which must be 0, 1, ..."""
    by_number = {entry[key]: entry for entry in entries}
    return [by_number[number] for number in range(len(entries))]
