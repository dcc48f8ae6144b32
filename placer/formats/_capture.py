"""What captures of routed experts share: several requests become a trace.

Which of their layers are MoE layers is told by `placer.formats._hidden_layers`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.formats import Hints, _hidden_layers
from placer.merging import smallest
from placer.model import ASSUMED, Model
from placer.trace import MAX_EXPERTS, Trace

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The experts that some tokens of one request chose.

    Parameters
    ----------
    ids : ndarray
        ``(tokens, layers, k)`` integers; -1 for no expert.
    where : str
        The file, and the place in it, for errors.
    weights : ndarray, optional
        Router weights, of the shape of `ids`.
    recording, label : str, int or str, optional
        The request's own id, and the file within which it means the same request; without one every request is another.
    step : int, optional
        The engine step.
    model : str, optional
        The model, as the recording names it.
    """

    ids: Array = field(repr=False)
    where: str
    weights: Array | None = field(default=None, repr=False)
    recording: str = ""
    label: int | str | None = None
    step: int | None = None
    model: str | None = None


def trace(
    requests: Iterable[Request],
    hints: Hints,
    *,
    source: str,
    name: str,
    layers: Sequence[int] | None = None,
    sequences: bool = True,
) -> Trace:
    """The trace of several requests.

    Parameters
    ----------
    requests
        In order; taken one at a time and kept in the smallest dtype.
    hints
        ``layer_ids`` says which layers are MoE layers, and switches the search for dense ones off.
    source, name
        Of the trace.
    layers
        The model's numbers of the layers in `ids`; 0, 1, ... by default.
    sequences
        Whether a request is a sequence.

    Raises
    ------
    InvalidInput
        When there is no token, requests disagree, a layer is neither dense nor routed, an id is out of range, or
        the number of experts is not known.

    Warns
    -----
    UserWarning
        When tokens have no expert, or were not recorded (0 in every layer), and are left out.

    Examples
    --------
    >>> ids = np.array([[[0, 0], [3, 1]], [[0, 0], [2, 1]]])
    >>> made = trace([Request(ids=ids, where="a.npy")], Hints(num_experts=4), source="", name="a")
    >>> made.layer_ids, made.topk_idx.tolist()
    ((1,), [[[3, 1]], [[2, 1]]])
    """
    kept = list(_compacted(requests, hints.top_k))
    if not kept:
        raise InvalidInput(f"{name}: no recorded token; expected ids (tokens, layers, k)")
    model = named(kept, hints)
    columns, layer_ids = _hidden_layers.moe_layers(kept, hints, model, layers)
    for at, request in enumerate(kept):
        weights = None if request.weights is None else request.weights[:, columns]
        kept[at] = replace(request, ids=request.ids[:, columns], weights=weights)
    recorded = [_hidden_layers.recorded(request.ids) for request in kept]
    lengths = [int(rows.sum()) for rows in recorded]
    missing = sum(map(len, recorded)) - sum(lengths)
    if missing == sum(map(len, recorded)):
        raise InvalidInput(f"{kept[0].where}: no token has an expert in any layer")
    left = [request.ids[~rows] for request, rows in zip(kept, recorded, strict=True)] if missing else []
    if empty := sum(int((ids < 0).all(axis=(1, 2)).sum()) for ids in left):
        warnings.warn(f"{empty} tokens without an expert in any layer: left out", stacklevel=2)
    if missing > empty:
        warnings.warn(
            f"{missing - empty} tokens with no expert but 0 in any layer were not recorded: left out",
            stacklevel=2,
        )
    highest, at = max((int(request.ids.max()), -at) for at, request in enumerate(kept))
    experts, known = experts_of(model, hints, highest, kept[-at].where)
    signed = any(request.ids.dtype.kind == "i" for request in kept)
    steps = [request.step for request in kept]
    tokens: dict[str, Any] = {}
    if sequences:
        tokens["sequence"] = np.repeat(_sequences(kept), lengths)
    if None not in steps:
        tokens["step"] = np.repeat(np.array(steps, np.int64), lengths)
    weighed = [request.weights for request in kept if request.weights is not None]
    if len(weighed) == len(kept):
        tokens["topk_weights"] = _joined(weighed, recorded, np.result_type(*weighed))
    ids = [request.ids for request in kept]
    kept.clear()  # so that each part is freed once it is copied
    return Trace(
        topk_idx=_joined(ids, recorded, smallest(experts - 1, signed=signed)),
        num_experts=experts,
        **tokens,
        layer_ids=layer_ids,
        model=model,
        num_groups=known.num_groups,
        topk_groups=known.topk_groups,
        source=source,
        name=name,
    )


def named(requests: Sequence[Request], hints: Hints) -> str | None:
    """The model's name: the one given, or the only one that the recordings mention.

    Raises
    ------
    InvalidInput
        When they mention two.
    """
    if hints.model is not None:
        return hints.model
    mentioned = {request.model: request.where for request in reversed(requests) if request.model is not None}
    if len(mentioned) > 1:
        (other, second), (one, first), *_ = mentioned.items()
        raise InvalidInput(f"{second}: model {other!r}, expected {one!r} as in {first}")
    return next(iter(mentioned), None)


def experts_of(model: str | None, hints: Hints, highest: int, where: str) -> tuple[int, Model]:
    """Experts of a layer, and the known model of that name; one without groups where it is not known.

    Parameters
    ----------
    model
        The name.
    hints
        ``num_experts`` comes before the known model's.
    highest, where
        The largest id, and where it is.

    Raises
    ------
    InvalidInput
        When the number is not known, or an id is beyond it.

    Examples
    --------
    >>> experts_of("olmoe-1b-7b", Hints(), 60, "a.npy")[0]
    64
    """
    known = Model.for_trace_name(model)
    number = hints.num_experts or known.num_experts
    if number is None:
        unknown = "the model is not named" if model is None else f"{model!r} is not a known model"
        raise InvalidInput(
            f"{where}: how many experts a layer has is not recorded, and {unknown}; "
            f"--num-experts says it (the highest id is {highest})"
        )
    if highest >= number:
        raise InvalidInput(f"{where}: found expert {highest}, expected 0 to {number - 1} of {number} experts")
    return number, known if known.num_experts == number else ASSUMED


def narrow(ids: Array, where: str) -> Array:
    """`ids` in the smallest integer dtype that holds them; as it is where that is no smaller.

    Raises
    ------
    InvalidInput
        When they are no integers of three axes, or out of any range.
    """
    if ids.dtype.kind not in "iu":
        raise InvalidInput(f"{where}: found dtype {ids.dtype}, expected integers")
    if ids.ndim != 3 or 0 in ids.shape[1:]:
        raise InvalidInput(f"{where}: found shape {ids.shape}, expected (tokens, layers, k)")
    if not len(ids):
        return ids
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= MAX_EXPERTS:
        raise InvalidInput(
            f"{where}: found expert {low if low < -1 else high}, expected -1 (none) to {MAX_EXPERTS - 1}"
        )
    dtype = smallest(max(high, 0), signed=low < 0)
    return ids.astype(dtype) if dtype.itemsize < ids.dtype.itemsize or dtype.kind != ids.dtype.kind else ids


def _compacted(requests: Iterable[Request], top_k: int | None) -> Iterator[Request]:
    """Requests that hold tokens, compact, and alike in layers and k."""
    first: Request | None = None
    for request in requests:
        ids = narrow(request.ids, request.where)
        if not len(ids):
            continue  # a prompt of one token: the last token of a request has no routing
        if top_k not in (None, ids.shape[2]):
            raise InvalidInput(
                f"{request.where}: found {ids.shape[2]} experts a token, expected --top-k {top_k}"
            )
        first = first or request
        if ids.shape[1:] != first.ids.shape[1:]:
            raise InvalidInput(
                f"{request.where}: found {ids.shape[1]} layers of top-{ids.shape[2]}, "
                f"expected {first.ids.shape[1]} of top-{first.ids.shape[2]} as in {first.where}"
            )
        yield replace(request, ids=ids)


def _sequences(requests: Sequence[Request]) -> NDArray[np.int64]:
    """A sequence id for each request: the requests' own where they are integers that no two files share."""
    keys = [(at, None) if r.label is None else (r.recording, r.label) for at, r in enumerate(requests)]
    order = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    labels = [label for _, label in order]
    if all(isinstance(label, int) and abs(label) < 2**62 for label in labels):
        if len(set(labels)) == len(labels):
            return np.array([request.label for request in requests], np.int64)
        warnings.warn("two files have requests of the same id: sequences are renumbered", stacklevel=3)
    return np.array([order[key] for key in keys], np.int64)


def _joined(parts: list[Array], recorded: list[NDArray[np.bool_]], dtype: np.dtype[Any]) -> Array:
    """The arrays of all requests in one; a single capture that stays whole is not copied."""
    total = sum(int(rows.sum()) for rows in recorded)
    if len(parts) == 1 and total == len(parts[0]):
        return parts[0]
    joined = np.empty((total, *parts[0].shape[1:]), dtype)
    end = 0
    for rows in recorded:
        start = 0
        for chunk in _hidden_layers.chunks(parts.pop(0)):
            chosen = chunk[rows[start : start + len(chunk)]]
            joined[end : end + len(chosen)] = chosen
            start, end = start + len(chunk), end + len(chosen)
    return joined
