"""moe-balance's batches (JSON lines) and requests (.npz): tokens.

A line is one batch in one layer, ``{"layer": 0, "batch_id": 12, "topk_experts": [[3, 7], [2, 5]]}``, optionally with
``topk_weights`` of the same shape, ``request_id`` and ``origin_rows``. A request is an ``.npz`` with ``routed_experts``
``(tokens, layers, k)`` and optionally ``request_id``. Layers are the model's, dense ones possibly among them (see
`placer.formats._hidden_layers`).

Batches are engine steps, except where every batch is one request, as its own converter writes them; requests are
sequences. ``origin_rows`` names rows of a mesh, dealt out where the true device is unknown: no ranks, so not read.

Read in johanna-rock/moe-balance, ``sim/trace_format.md`` and ``sim/convert_npz_to_trace.py``, commit feb96fe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer import npz
from placer.errors import InvalidInput
from placer.formats import Hints, _capture, _json
from placer.trace import Trace

Array = NDArray[Any]

_LOOKED_AT = 1 << 16  # bytes; a line names its layer before its tokens


@dataclass
class _Batch:
    """What the lines of one batch say, by layer."""

    where: str
    recording: str
    batch: int | str
    request: int | str | None
    ids: dict[int, Array] = field(default_factory=dict)
    weights: dict[int, Array] = field(default_factory=dict)


def sniff(path: Path) -> bool:
    """Whether a file is JSON lines with ``topk_experts``, or an ``.npz`` with ``routed_experts``."""
    if "routed_experts" in npz.names(path):
        return True
    try:
        with path.open("rb") as file:
            start = file.read(_LOOKED_AT).lstrip()
    except OSError:
        return False
    return start[:1] == b"{" and b'"topk_experts"' in start and b'"layer"' in start


def read(paths: Sequence[Path], hints: Hints) -> Trace:
    """The trace of all batches or requests in some files.

    Raises
    ------
    InvalidInput
        When a file is damaged, a batch lacks a layer that others have, or the number of experts is not known.
    """
    binary = [bool(npz.names(path)) for path in paths]
    if any(binary) and not all(binary):
        raise InvalidInput(
            f"{paths[binary.index(True)]}: an .npz among JSON lines; expected files of one kind"
        )
    name, source = paths[0].stem, "moe-balance"
    if binary[0]:
        return _capture.trace(map(_request, paths), hints, source=source, name=name)
    batches = [batch for path in paths for batch in _batches(path)]
    if not batches:
        raise InvalidInput(f"{paths[0]}: no batch; expected lines with layer, batch_id and topk_experts")
    layers = sorted(batches[0].ids)
    steps = any(batch.request is None or batch.request != batch.batch for batch in batches)
    return _capture.trace(
        (_captured(batch, layers, step if steps else None) for step, batch in enumerate(batches)),
        hints,
        source=source,
        name=name,
        layers=layers,
        sequences=all(batch.request is not None for batch in batches),
    )


def _request(path: Path) -> _capture.Request:
    arrays = npz.read_members(path, ["routed_experts", *({"request_id"} & set(npz.names(path)))])
    label = arrays.get("request_id")
    known = label is not None and label.size == 1 and label.dtype.kind in "iuU"
    return _capture.Request(
        ids=arrays["routed_experts"],
        where=f"{path}: routed_experts",
        recording=str(path),
        label=label.item() if known and label is not None else str(path),
    )


def _batches(path: Path) -> Iterator[_Batch]:
    """The batches of a file, in the order of their first lines."""
    batches: dict[tuple[str, int | str], _Batch] = {}
    for where, line in _json.documents(path):
        if not isinstance(line, dict):
            raise InvalidInput(
                f"{where}: found {type(line).__name__}, expected an object of one batch and layer"
            )
        layer, batch_id, request = (line.get(key) for key in ("layer", "batch_id", "request_id"))
        if type(layer) is not int or not 0 <= layer < 2**31:
            raise InvalidInput(f"{where}: layer: found {layer!r:.40}, expected the number of a layer")
        if not isinstance(batch_id, int | str):
            raise InvalidInput(f"{where}: batch_id: found {batch_id!r:.40}, expected an integer or a string")
        if not isinstance(request, int | str | None):
            raise InvalidInput(f"{where}: request_id: found {request!r:.40}, expected an integer or a string")
        recording = f"{path}\0{line.get('source_file', '')}"
        known = batches.setdefault((recording, batch_id), _Batch(where, recording, batch_id, request))
        if layer in known.ids:
            raise InvalidInput(f"{where}: layer {layer} of batch {batch_id!r:.40} for the second time")
        known.ids[layer] = _capture.narrow(_rows(line, "topk_experts", "iu", where)[:, None], where)[:, 0]
        if line.get("topk_weights") is not None:
            weights = _rows(line, "topk_weights", "iuf", where).astype(np.float32)
            if weights.shape != known.ids[layer].shape:
                raise InvalidInput(
                    f"{where}: topk_weights: found shape {weights.shape}, expected {known.ids[layer].shape}"
                )
            if not np.isfinite(weights).all():
                raise InvalidInput(f"{where}: topk_weights: found {weights[~np.isfinite(weights)][0]}")
            known.weights[layer] = weights
    yield from batches.values()


def _rows(line: dict[str, Any], key: str, kinds: str, where: str) -> Array:
    try:
        rows = np.array(line.get(key))
    except ValueError:
        raise InvalidInput(f"{where}: {key}: rows of unequal lengths") from None
    if rows.ndim != 2 or rows.dtype.kind not in kinds or not rows.size:
        raise InvalidInput(f"{where}: {key}: found {rows.dtype} {rows.shape}, expected numbers (tokens, k)")
    return rows


def _captured(batch: _Batch, layers: list[int], step: int | None) -> _capture.Request:
    """A batch as the layers of all; emptied, so that only one is held twice."""
    if sorted(batch.ids) != layers:
        odd = min(set(batch.ids) ^ set(layers))
        raise InvalidInput(f"{batch.where}: layer {odd} is in some batches only, expected the same in all")
    shape = batch.ids[layers[0]].shape
    for layer in layers:
        if batch.ids[layer].shape != shape:
            raise InvalidInput(
                f"{batch.where}: topk_experts of shape {batch.ids[layer].shape} in layer {layer}, "
                f"expected {shape} as in layer {layers[0]}"
            )
    ids = np.stack([batch.ids.pop(layer) for layer in layers], axis=1)
    weighted = sorted(batch.weights) == layers
    return _capture.Request(
        ids=ids,
        where=batch.where,
        weights=np.stack([batch.weights.pop(layer) for layer in layers], axis=1) if weighted else None,
        recording=batch.recording,
        label=batch.request,
        step=step,
    )
