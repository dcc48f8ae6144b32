"""SGLang: the JSON file of --init-expert-location.

``{"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3]]}``: for every hidden layer of the model, dense
ones included, the expert of each slot. As read in SGLang 0.5.23, ``srt/eplb/expert_location.py``.

Loaded with ``--init-expert-location FILE.json --ep-size RANKS --ep-num-redundant-experts SLOTS-EXPERTS``. Traps:

- The key must stand alone: the object is passed on as keyword arguments, and another key is an error at the start.
- The name must end in ``.json``; anything else is taken for JSON itself.
- Rows of dense layers must exist; they get the map that SGLang starts with, slot i holds expert i mod E, and so does
  every other layer that the placement lacks.
- Slots must be the experts plus ``--ep-num-redundant-experts``, a multiple of ``--ep-size``, and none is empty.
- Shared experts that SGLang fuses with the routed ones are appended by itself and never in the map.
- Among copies ``--ep-dispatch-algorithm static`` takes the source GPU's own, else the first on its node, else a fair
  draw made once, much as the rule ``nearest``; ``dynamic`` draws for each token, as ``spread``.
- ``--enable-eplb`` would soon replace the map.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence

import numpy as np

from placer.errors import InvalidInput
from placer.formats import Target
from placer.formats._maps import dispatch_notes, full_map, layers, on_several_ranks, placed, read_json
from placer.placement import Placement

KEY = "physical_to_logical_map"


def write(placement: Placement, target: Target) -> bytes:
    """The file's bytes.

    Raises
    ------
    InvalidInput
        When a slot is empty, there is a dispatch table, or the number of hidden layers is unknown or too small.

    Examples
    --------
    >>> placement = Placement(
    ...     physical_to_logical=np.array([[3, 2, 1, 0, 3, 2]]), num_experts=4, shape=(1, 1, 3), layer_ids=(1,))
    >>> write(placement, Target(num_hidden_layers=2))
    b'{"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]}\\n'
    """
    held = full_map(placement, "SGLang")
    start = np.arange(placement.num_slots) % placement.num_experts
    rows = np.tile(start, (_hidden_layers(placement, target), 1))
    rows[list(placement.layer_ids)] = held
    return (json.dumps({KEY: rows.tolist()}) + "\n").encode()


def load_with(placement: Placement, path: str) -> str:
    """The options that load it.

    Raises
    ------
    InvalidInput
        When the file's name is one that SGLang would not take for a file.
    """
    if not path.endswith(".json"):
        raise InvalidInput(
            f"{path}: SGLang tells a file by its name, expected one that ends in .json, such as "
            f"{os.path.splitext(path)[0]}.json"
        )
    options = (
        f"--init-expert-location {shlex.quote(path)} --ep-size {placement.num_ranks} "
        f"--ep-num-redundant-experts {placement.num_slots - placement.num_experts}"
    )
    if on_several_ranks(placement):
        options += f" --ep-dispatch-algorithm {'dynamic' if placement.rule == 'spread' else 'static'}"
    return options


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file leaves out or adds."""
    rest = tuple(sorted(set(range(_hidden_layers(placement, target))) - set(placement.layer_ids)))
    does = "the GPU's own copy, else the node's first, else one drawn once (--ep-dispatch-algorithm static)"
    rule = "spread" if placement.rule == "spread" else "nearest"
    said = dispatch_notes(placement, "SGLang", does, rule)
    if rest:
        said.insert(0, f"not in the placement, so given the map that SGLang starts with: {layers(rest)}")
    return said


def read_placement(
    path: str | os.PathLike[str], *, shape: tuple[int, int, int], layer_ids: Sequence[int] | None = None
) -> Placement:
    """The placement of a file, so that it can be priced.

    Parameters
    ----------
    path
        The JSON file.
    shape : (racks, servers, gpus)
        The machine; SGLang's ranks in order.
    layer_ids : sequence of int, optional
        The MoE layers to read; all hidden layers by default.

    Raises
    ------
    InvalidInput
        When it is no such file.
    """
    document = read_json(path)
    if not isinstance(document, dict) or list(document) != [KEY] or not isinstance(document[KEY], list):
        raise InvalidInput(f"{path}: expected a JSON object with the key {KEY} alone, a list for each layer")
    rows = document[KEY]
    ids = range(len(rows)) if layer_ids is None else layer_ids
    if any(not 0 <= layer < len(rows) for layer in ids):
        raise InvalidInput(f"{path}: found {len(rows)} layers, expected {layers(ids)}")
    return placed(path, KEY, [rows[layer] for layer in ids], shape=shape, layer_ids=ids)


def _hidden_layers(placement: Placement, target: Target) -> int:
    number, last = target.num_hidden_layers, max(placement.layer_ids)
    if number is None:
        raise InvalidInput(
            "SGLang wants a row for every hidden layer of the model, dense ones included; expected "
            "--num-hidden-layers N, or --model with a known one"
        )
    if number <= last:
        raise InvalidInput(
            f"--num-hidden-layers: found {number}, expected at least {last + 1}: the placement has layer {last}"
        )
    return number
