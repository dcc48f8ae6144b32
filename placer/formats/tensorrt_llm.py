"""TensorRT-LLM: the YAML file of moe_config.load_balancer.

::

    initial_global_assignments:
      3: [0, 1, 2, 3, 0, 1]
      4: [3, 2, 1, 0, 3, 2]
    num_slots: 6
    layer_updates_per_iter: 0

Keys are the model's own layer numbers, as integers, of its MoE layers; position s of a list is slot s, of rank
``s // (num_slots / ep_size)``. ``layer_updates_per_iter: 0`` keeps the map as it is. As read in TensorRT-LLM's
``MoeLoadBalancerConfig`` (``tensorrt_llm/llmapi/llm_args.py``, main of 2026).

Loaded with ``moe_config: {load_balancer: FILE}`` in the YAML file given to ``trtllm-serve --config``. Traps:

- The object is strict: a key that it does not know is refused.
- It is silently ignored unless expert parallelism is above 1, attention runs data-parallel
  (``enable_attention_dp: true``) and the architecture is one of those that support it.
- Every MoE layer of the model must be there, and every slot filled.
- Shared experts are not part of the map.
- Among copies tokens go round-robin, which the rule ``spread`` prices.
"""

from __future__ import annotations

import os
from importlib import import_module
from reprlib import repr as short

from placer.errors import InvalidInput
from placer.formats import Target
from placer.formats._maps import dispatch_notes, full_map, placed, read_text
from placer.placement import Placement

KEY = "initial_global_assignments"


def write(placement: Placement, target: Target) -> bytes:
    """The file's bytes.

    Raises
    ------
    InvalidInput
        When a slot is empty, or there is a dispatch table.

    Examples
    --------
    >>> import numpy as np
    >>> placement = Placement(
    ...     physical_to_logical=np.array([[1, 0, 1, 2]]), num_experts=3, shape=(1, 1, 2), layer_ids=(3,))
    >>> print(write(placement, Target()).decode(), end="")
    initial_global_assignments:
      3: [1, 0, 1, 2]
    num_slots: 4
    layer_updates_per_iter: 0
    """
    held = full_map(placement, "TensorRT-LLM").tolist()
    rows = [f"  {layer}: {row}" for layer, row in sorted(zip(placement.layer_ids, held, strict=True))]
    lines = [f"{KEY}:", *rows, f"num_slots: {placement.num_slots}", "layer_updates_per_iter: 0"]
    return ("\n".join(lines) + "\n").encode()


def load_with(placement: Placement, path: str) -> str:
    """The settings that load it."""
    quoted = "'" + path.replace("'", "''") + "'"
    return (
        f"moe_config: {{load_balancer: {quoted}}}, moe_expert_parallel_size: {placement.num_ranks} and "
        "enable_attention_dp: true in the YAML file of trtllm-serve --config"
    )


def notes(placement: Placement, target: Target) -> list[str]:
    """What the file leaves out."""
    ignored = (
        "TensorRT-LLM ignores it without a word where its conditions are not met: look for it in the log"
    )
    return [ignored, *dispatch_notes(placement, "TensorRT-LLM", "copies round-robin", "spread")]


def read_placement(path: str | os.PathLike[str], *, shape: tuple[int, int, int]) -> Placement:
    """The placement of a file, so that it can be priced; needs PyYAML.

    Parameters
    ----------
    path
        The YAML file.
    shape : (racks, servers, gpus)
        The machine; expert-parallel ranks in order.

    Raises
    ------
    InvalidInput
        When it is no such file, or PyYAML is missing.
    """
    try:
        yaml = import_module("yaml")
    except ImportError:
        raise InvalidInput(
            f"{path}: reading YAML needs the package pyyaml: pip install 'placer[yaml]'"
        ) from None
    text = read_text(path)
    try:
        document = yaml.safe_load(text)
    except (
        Exception
    ) as error:  # besides its own, the constructors of PyYAML's scalars raise errors of all kinds
        raise InvalidInput(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    rows = document.get(KEY) if isinstance(document, dict) else None
    if not isinstance(rows, dict) or not rows or any(type(layer) is not int for layer in rows):
        raise InvalidInput(f"{path}: expected {KEY}: a list of experts under the number of each layer")
    layers = sorted(rows)
    placement = placed(path, KEY, [rows[layer] for layer in layers], shape=shape, layer_ids=layers)
    if document.get("num_slots", placement.num_slots) != placement.num_slots:
        found = f"found {short(document['num_slots'])}"
        raise InvalidInput(
            f"{path}: num_slots: {found}, expected {placement.num_slots}, the length of the lists"
        )
    return placement
