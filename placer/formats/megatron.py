"""Megatron-core's recorded data of router replay (.npz, .pt): tokens.

``RouterReplay.get_recorded_data()`` returns one tensor of chosen experts ``(tokens, k)`` for each MoE layer, in memory
only; a script saves that list, here called ``recorded``, by

- ``torch.save([tensor.cpu() for tensor in recorded], "recorded.pt")``, or
- ``numpy.savez("recorded.npz", *[tensor.cpu().numpy() for tensor in recorded])``, which names the arrays ``arr_0``,
  ``arr_1``, ...; ``layer_0``, ``layer_1``, ... are read as well.

Layers are the MoE layers in order; ``--layer-ids`` says their numbers in the model. Each file is one engine step (a
micro-batch on one rank), in the order given; tokens of several sequences are mixed in it, so the trace has none.

Read in megatron-core 0.16.1, ``megatron/core/transformer/moe/router_replay.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer import npz
from placer.errors import InvalidInput
from placer.formats import Hints, _capture
from placer.trace import Trace

Array = NDArray[Any]

_LAYER = re.compile(r"(?:layer|arr)_(\d{1,9})")


def sniff(path: Path) -> bool:
    """Whether a file is an ``.npz`` of layers, or a ``torch.save`` of a list that begins with a tensor."""
    from placer import torchfile

    names = npz.names(path)
    if names:
        return all(_LAYER.fullmatch(name) for name in names)
    start = torchfile.head(path, 512)
    return start[:1] == b"\x80" and start[2:3] == b"]" and b"_rebuild_tensor_v" in start


def read(paths: Sequence[Path], hints: Hints) -> Trace:
    """The trace of the steps in some files.

    Raises
    ------
    InvalidInput
        When a file is damaged, layers or files disagree, or the number of experts is not known.
    """
    requests = (_step(path, step) for step, path in enumerate(paths))
    first = next(requests)
    layers = first.ids.shape[1]
    if hints.layer_ids is not None and len(hints.layer_ids) != layers:
        raise InvalidInput(
            f"{first.where}: found {layers} MoE layers, expected {len(hints.layer_ids)} as --layer-ids names"
        )
    named = replace(hints, layer_ids=hints.layer_ids or tuple(range(layers)))
    return _capture.trace(
        (request for several in ([first], requests) for request in several),
        named,
        source="Megatron-core router replay",
        name=paths[0].stem,
        sequences=False,
    )


def _step(path: Path, step: int) -> _capture.Request:
    layers = _layers(path)
    if not layers:
        raise InvalidInput(f"{path}: no layer; expected one array (tokens, k) for each")
    _, first = layers[0]
    for name, array in layers:
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise InvalidInput(
                f"{path}: {name}: found {array.dtype} {array.shape}, expected integers (tokens, k)"
            )
        if array.shape != first.shape:
            raise InvalidInput(
                f"{path}: {name}: found shape {array.shape}, expected {first.shape} as in {layers[0][0]}"
            )
    narrowed = [_capture.narrow(array[:, None], f"{path}: {name}") for name, array in layers]
    return _capture.Request(ids=np.concatenate(narrowed, axis=1), where=str(path), step=step)


def _layers(path: Path) -> list[tuple[str, Array]]:
    """The arrays of a file with their names, in the order of layers."""
    from placer import torchfile

    names = npz.names(path)
    if not names:
        value = torchfile.load(path)
        if not isinstance(value, list | tuple) or not all(isinstance(one, np.ndarray) for one in value):
            raise InvalidInput(
                f"{path}: found {type(value).__name__}, expected a list of tensors (tokens, k)"
            )
        return [(f"layer {number}", array) for number, array in enumerate(value)]
    found = [_LAYER.fullmatch(name) for name in names]
    numbers = [int(match[1]) if match else -1 for match in found]
    if sorted(numbers) != list(range(len(names))):
        raise InvalidInput(
            f"{path}: found arrays {', '.join(names)[:80]}, expected layer_0 or arr_0, and on without gaps"
        )
    arrays = npz.read_members(path, names)
    return [(names[at], arrays[names[at]]) for at in np.argsort(numbers)]
