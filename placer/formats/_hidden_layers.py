"""Which layers of a capture have a router: recordings of serving stacks cover all hidden ones.

Layers without a router are never written and stay 0, which looks like expert 0 chosen k times. No router chooses an
expert twice for one token, so a layer that repeats one in every row is dense. A token that is 0 in every layer was not
recorded at all. With k = 1 nothing can repeat: a layer that only says 0 is taken for dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.formats import Hints
from placer.model import Model

if TYPE_CHECKING:
    from placer.formats._capture import Request

Array = NDArray[Any]

_CHUNK = 1 << 22  # ids looked at in one go, so that memory stays bounded for mapped captures


def moe_layers(
    requests: Sequence[Request], hints: Hints, model: str | None, layers: Sequence[int] | None
) -> tuple[slice | list[int], tuple[int, ...]]:
    """Which layers of a capture are MoE layers.

    Parameters
    ----------
    requests
        Of equal layers and k.
    hints
        ``layer_ids`` says it, or names the layers where there are as many.
    model
        Its name; a known one must have as many MoE layers.
    layers
        The model's numbers of the layers in a request; 0, 1, ... by default.

    Returns
    -------
    columns, layer_ids
        Positions among the layers of a request, and the model's numbers of these.

    Raises
    ------
    InvalidInput
        When a layer repeats an expert in some tokens only, all are dense, or hints or model say otherwise.
    """
    where, (_, count, top_k) = requests[0].where, requests[0].ids.shape
    numbers = list(range(count) if layers is None else layers)
    if hints.layer_ids is not None:
        if len(hints.layer_ids) == count:
            return slice(None), hints.layer_ids
        if not set(hints.layer_ids) <= set(numbers):
            unknown = min(set(hints.layer_ids) - set(numbers))
            raise InvalidInput(
                f"{where}: found {count} layers, of which --layer-ids names {unknown}: no such layer"
            )
        return [numbers.index(layer) for layer in hints.layer_ids], hints.layer_ids
    if layers is None and hints.num_hidden_layers not in (None, count):
        raise InvalidInput(
            f"{where}: found {count} layers, expected the {hints.num_hidden_layers} hidden ones"
        )
    repeated, absent, tokens = np.zeros(count, np.int64), np.zeros(count, np.int64), 0
    for request in requests:
        for chunk in chunks(request.ids):
            used = chunk[recorded(chunk)]
            tokens += len(used)
            repeated += _repeats(used).sum(axis=0)
            absent += (used < 0).all(axis=2).sum(axis=0)
    dense = repeated + absent == tokens
    if dense.all():
        what = "repeats an expert in every token" if top_k > 1 else "has only expert 0"
        raise InvalidInput(f"{where}: every layer {what}; expected an MoE layer, or --layer-ids to name them")
    mixed = np.flatnonzero(~dense & (repeated > 0))
    if len(mixed) and top_k > 1:
        layer = int(mixed[0])
        raise InvalidInput(
            f"{_first_repeat(requests, layer)}: layer {numbers[layer]} repeats an expert in {repeated[layer]} of "
            f"{tokens} tokens, expected none (an MoE layer) or all (a dense one)"
        )
    found = [int(layer) for layer in np.flatnonzero(~dense)]
    known = Model.for_trace_name(model, hints.num_experts)
    if layers is None and known.num_layers == count and known.num_moe_layers not in (None, len(found)):
        raise InvalidInput(
            f"{where}: found {len(found)} MoE layers, expected {known.num_moe_layers} as {known.name} has; "
            "--layer-ids names them"
        )
    return (slice(None) if len(found) == count else found), tuple(numbers[layer] for layer in found)


def chunks(ids: Array) -> Iterator[Array]:
    """Parts of an array, along its first axis."""
    step = max(1, _CHUNK // (ids.shape[1] * ids.shape[2]))
    for start in range(0, len(ids), step):
        yield ids[start : start + step]


def recorded(ids: Array) -> NDArray[np.bool_]:
    """Tokens with an expert other than 0 somewhere; with k = 1 expert 0 may be meant, so all of them."""
    if ids.shape[2] == 1:
        return np.ones(len(ids), np.bool_)
    return np.concatenate([(chunk > 0).any(axis=(1, 2)) for chunk in chunks(ids)])


def _repeats(ids: Array) -> NDArray[np.bool_]:
    """``(tokens, layers)``: whether a row names an expert twice; with k = 1 whether it names expert 0."""
    ordered = np.sort(ids, axis=2)
    twice: Any = ordered[..., :1] == 0
    if ids.shape[2] > 1:
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    found: NDArray[np.bool_] = twice.any(axis=2)
    return found


def _first_repeat(requests: Sequence[Request], layer: int) -> str:
    """Where, and at which token, a layer first repeats an expert."""
    for request in requests:
        rows = np.flatnonzero(_repeats(request.ids[:, [layer]])[:, 0] & recorded(request.ids))
        if rows.size:
            return f"{request.where}: token {rows[0]}"
    return requests[0].where
