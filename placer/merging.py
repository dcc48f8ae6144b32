"""Merging: several traces of one model become one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.trace import Trace

Array = NDArray[Any]


def merge(traces: Sequence[Trace], names: Sequence[str] | None = None) -> Trace:
    """One trace with the tokens of several, in order.

    Sequences keep their ids. Only where two traces use the same id, those of the later one get new ids behind all
    others: they are different documents. So do steps, unless the two traces are of different source ranks, which run
    the same steps side by side. What only some traces know is left out.

    Parameters
    ----------
    traces
        With the same experts, layers, k and groups.
    names
        What messages call them; their own names by default.

    Raises
    ------
    InvalidInput
        When they differ, naming the first that does.

    Warns
    -----
    UserWarning
        When ids are changed or something is left out.

    Examples
    --------
    >>> ids = np.array([[[0, 1]], [[2, 3]]])
    >>> one = Trace(topk_idx=ids, num_experts=4, sequence=np.array([0, 1]))
    >>> other = Trace(topk_idx=ids, num_experts=4, sequence=np.array([5, 6]))
    >>> merge([one, other]).sequence.tolist()
    [0, 1, 5, 6]
    """
    first, names = traces[0], names or [trace.name for trace in traces]
    if len(traces) == 1:
        return first
    for key in ("num_experts", "num_layers", "layer_ids", "top_k", "num_groups", "topk_groups"):
        for other, name in zip(traces, names, strict=True):
            found, expected = getattr(other, key), getattr(first, key)
            if found != expected:
                raise InvalidInput(
                    f"{name}: {key} is {found!s:.60}, expected {expected!s:.60} as in {names[0]}"
                )
    arrays: dict[str, Any] = {"topk_idx": _ids(traces)}
    for key in ("topk_weights", *Trace.TOKEN_ARRAYS):
        if parts := _known_to_all(traces, names, key):
            arrays[key] = np.concatenate(_distinct(key, parts, traces, names))
    sources = dict.fromkeys(trace.source for trace in traces if trace.source is not None)
    return Trace(
        **arrays,
        num_experts=first.num_experts,
        num_groups=first.num_groups,
        topk_groups=first.topk_groups,
        layer_ids=first.layer_ids,
        source="; ".join(sources) or None,
        name=first.name,
        **{key: _agreed(traces, key) for key in ("model", "phase", "license")},
    )


def smallest(highest: int, *, signed: bool) -> np.dtype[Any]:
    """The smallest dtype that holds ids from 0 to `highest`, and -1 where `signed`.

    Examples
    --------
    >>> smallest(255, signed=False), smallest(127, signed=True), smallest(128, signed=True)
    (dtype('uint8'), dtype('int8'), dtype('int16'))
    """
    return np.min_scalar_type(-highest - 1 if signed else highest)


def _ids(traces: Sequence[Trace]) -> Array:
    """All ids, in the smallest dtype, filled in one trace at a time."""
    signed = any(trace.topk_idx.dtype.kind == "i" for trace in traces)
    total = sum(trace.num_tokens for trace in traces)
    dtype = smallest(traces[0].num_experts - 1, signed=signed)
    ids = np.empty((total, *traces[0].topk_idx.shape[1:]), dtype)
    end = 0
    for trace in traces:
        ids[end : end + trace.num_tokens] = trace.topk_idx
        end += trace.num_tokens
    return ids


def _known_to_all(traces: Sequence[Trace], names: Sequence[str], key: str) -> list[Array]:
    parts = [part for part in (getattr(trace, key) for trace in traces) if part is not None]
    if parts and len(parts) < len(traces):
        without = next(name for trace, name in zip(traces, names, strict=True) if getattr(trace, key) is None)
        _say(f"{key}: not in {without}, so left out")
        return []
    return parts if key == "topk_weights" else [part.astype(np.int64) for part in parts]


def _agreed(traces: Sequence[Trace], key: str) -> Any:
    values = dict.fromkeys(getattr(trace, key) for trace in traces)
    if len(values) > 1:
        _say(f"{key}: {' and '.join(str(value) for value in values):.100}, so left out")
        return None
    return next(iter(values))


def _distinct(key: str, parts: list[Array], traces: Sequence[Trace], names: Sequence[str]) -> list[Array]:
    """The ids of one kind, those of a later trace moved behind all others where an earlier one uses them too."""
    if key not in ("sequence", "step"):
        return parts
    held = [np.unique(part) for part in parts]
    if len(np.unique(np.concatenate(held))) == sum(map(len, held)):
        return parts
    ranks = [np.empty(0) if trace.source_rank is None else np.unique(trace.source_rank) for trace in traces]
    free = max(int(ids[-1]) for ids in held) + 1
    for at in range(1, len(parts)):
        clashes = (
            earlier
            for earlier in range(at)
            if np.isin(held[at], held[earlier], assume_unique=True).any()
            and not (key == "step" and _apart(ranks[at], ranks[earlier]))
        )
        if (clash := next(clashes, None)) is None:
            continue
        if free + len(held[at]) >= 2**63:
            raise InvalidInput(f"{names[at]}: {key}: ids as in {names[clash]}, too large to renumber")
        _say(f"{key}: {names[at]} uses ids of {names[clash]}; its own now begin at {free}")
        parts[at] = np.searchsorted(held[at], parts[at]) + free
        held[at] = np.arange(free, free + len(held[at]))
        free += len(held[at])
    return parts


def _apart(one: Array, other: Array) -> bool:
    """Whether both traces know their ranks, and share none."""
    return bool(one.size and other.size) and not np.isin(one, other).any()


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=4)
