"""Origin: which tokens a page speaks of, and where placement, trace and numbers come from."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

import placer
from placer.evaluation import format_ids
from placer.html.numbers import percent
from placer.placement import Placement, format_shape
from placer.topology import Topology
from placer.trace import Trace

#: Key of a placement's provenance under which `Trace.digest` of the tokens it was fitted on is looked for.
TRACE_DIGEST = "trace_digest"
DISTINCT = 0.9  # tokens can be told apart by their experts when so many of them are different
STRAY = 0.05  # share of tokens that agree by chance or as first tokens of a text
_SAMPLE, _CHUNK = 20_000, 1 << 15


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Which tokens the numbers are of, as far as is known.

    Parameters
    ----------
    phrase : str
        For a sentence: ``on unseen tokens``.
    word : str
        For the head of a column.
    same : bool
        Whether they are those that the placement was fitted on.
    note : str
        What a reader should know; empty for nothing.
    """

    phrase: str
    word: str
    same: bool = False
    note: str = ""


def tokens(placement: Placement, trace: Trace, fitted: Trace | None) -> Tokens:
    """Say which tokens a trace holds for a placement, from the tokens fitted or the placement's own record.

    Examples
    --------
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]]]), num_experts=4)
    >>> placement = Placement(physical_to_logical=np.array([[0, 1, 2, 3]]), num_experts=4, shape=(1, 2, 1))
    >>> tokens(placement, trace, trace).phrase, tokens(placement, trace, None).phrase
    ('on the tokens it was fitted on', 'on this trace')
    """
    known = placement.provenance.get(TRACE_DIGEST) if fitted is None else fitted.digest
    if known == trace.digest:
        return Tokens(phrase="on the tokens it was fitted on", word="tokens fitted", same=True)
    if fitted is None:
        if isinstance(known, str):
            return Tokens(phrase="on another trace than it was fitted on", word="this trace")
        return Tokens(
            phrase="on this trace",
            word="this trace",
            note="Whether the placement was fitted on these tokens is not known; --fitted TRACE tells, and shows both.",
        )
    shared = overlap(trace, fitted)
    if shared is None:
        return Tokens(
            phrase="on other tokens than those fitted",
            word="other tokens",
            note="Whether the two traces share tokens cannot be told: too many of their tokens look alike.",
        )
    if shared > STRAY:
        return Tokens(
            phrase=f"on tokens of which {percent(shared)} were fitted on",
            word="this trace",
            note="The trace holds tokens that the placement was fitted on: unseen ones gain less.",
        )
    return Tokens(phrase="on unseen tokens", word="unseen tokens")


def overlap(trace: Trace, fitted: Trace) -> float | None:
    """Share of a trace's tokens that another one holds too, told by their experts; None where those cannot tell.

    Examples
    --------
    >>> ids = np.random.default_rng(0).permuted(np.tile(np.arange(64), (200, 1)), axis=1)[:, None, :8]
    >>> trace = Trace(topk_idx=ids, num_experts=64)
    >>> overlap(trace, trace.select(slice(50))), overlap(trace.select(slice(50, 200)), trace.select(slice(50)))
    (0.25, 0.0)
    """
    if trace.topk_idx.shape[1:] != fitted.topk_idx.shape[1:]:
        return None
    step = -(-trace.num_tokens // _SAMPLE)
    ours = _keys(trace.topk_idx[::step])
    if len(np.unique(ours)) < DISTINCT * len(ours):
        return None
    return float(np.isin(ours, _keys(fitted.topk_idx)).mean())


def facts(
    placement: Placement,
    trace: Trace,
    topology: Topology,
    *,
    fitted: Trace | None,
    name: str,
    conditions: Mapping[str, Any],
    command: str | None,
) -> Iterator[tuple[str, str]]:
    """What reproduces a page, name and text."""
    yield "placement", name
    yield "its SHA-256", placement.digest
    if placement.provenance:
        yield "made with", _listed(placement.provenance)
    copies = int((placement.physical_to_logical >= 0).sum()) - placement.num_experts * placement.num_layers
    yield (
        "experts",
        f"{placement.num_experts} a layer in {placement.num_slots} slots, {copies} copies over all layers",
    )
    yield from _trace("trace", trace)
    if fitted is not None and fitted.digest != trace.digest:
        yield from _trace("fitted trace", fitted)
    yield "machine", f"{topology.name}, {format_shape(topology.shape)} (racks x servers x GPUs)"
    priced = {key: getattr(value, "name", value) for key, value in conditions.items()}
    if priced := {key: value for key, value in priced.items() if value is not None and value is not False}:
        yield "priced with", _listed(priced)
    used = {"placer": placer.__version__, "python": platform.python_version(), "numpy": np.__version__}
    used["plotly"] = version("plotly")
    yield "versions", _listed(used)
    if command:
        yield "command", command


def _listed(entries: Mapping[str, Any]) -> str:
    """Entries as a sentence's part: ``method auto, seed 0``."""
    return ", ".join(
        f"{key.replace('_', ' ')} {value if isinstance(value, str) else json.dumps(value, default=str)}"
        for key, value in entries.items()
    )


def _trace(what: str, trace: Trace) -> Iterator[tuple[str, str]]:
    layers = f"{trace.num_layers} layers ({format_ids(trace.layer_ids)})"
    yield (
        what,
        f"{trace.name}: {trace.num_tokens:,} tokens, {layers}, top {trace.top_k} of {trace.num_experts}",
    )
    yield f"{what}, SHA-256", trace.digest
    for key in ("model", "source", "license"):
        if getattr(trace, key):
            yield f"{what}, {key}", getattr(trace, key)


def _keys(ids: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A hash of the experts of each token."""
    factors = np.random.default_rng(0).integers(1 << 63, size=ids[0].size, dtype=np.uint64) * np.uint64(2)
    parts = [
        ((ids[at : at + _CHUNK].reshape(-1, ids[0].size).astype(np.int64) + 2).astype(np.uint64))
        @ (factors + np.uint64(1))
        for at in range(0, len(ids), _CHUNK)
    ]
    return np.concatenate(parts)
