"""inspect: what a trace holds, and how much structure a placement can use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.model import ASSUMED, Model
from placer.table import aligned
from placer.trace import Trace
from placer.traffic import Traffic

SCHEMA = "placer/inspection/1"

PERCENTILES = (1, 10, 50, 90, 99)
UNITS = (2, 4, 8, 16)

#: Standard deviations of the lift, beyond chance, that say whether there is structure: skewed but otherwise
#: independent routers stay below 0.07, recorded and synthetic ones with clusters are above 0.35.
_NONE, _CLEAR = 0.1, 0.25
_MIN_EXPECTED = 5  # tokens in which a pair must be expected before its lift counts
_CHUNK = 1 << 16  # tokens of one layer looked at together


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a trace holds.

    Parameters
    ----------
    name : str
    tokens, layers, experts, top_k : int
    num_groups, topk_groups : int
        Group-limited gating; 1 and 1 without.
    sequences, domains : int or None
        Distinct values; None where the trace does not say.
    phase, model : str or None
        As the trace says.
    matched_model : str or None
        The known model that gives sizes; None where hidden size 4096 and BF16 will be assumed.
    dropped : float
        Share of the choices that are -1, no expert.
    load : dict of float
        ``max_over_mean`` of experts, mean over layers, and ``worst_layer``.
    lift : dict of float or None
        Percentiles ``p1`` .. ``p99`` over the pairs of a layer, mean over layers; None where no pair is
        expected five times.
    structure : float or None
        Standard deviation of the lift over the pairs of a layer beyond what chance alone gives, mean over
        layers; None like `lift`.
    touched : dict of dict
        By number of equal units: units that a token touches with contiguous experts (``linear``) and if it
        chose its experts uniformly at random (``uniform``).
    hints : tuple of str
        What to know before using the trace.
    """

    name: str
    tokens: int
    layers: int
    experts: int
    top_k: int
    num_groups: int
    topk_groups: int
    sequences: int | None
    domains: int | None
    phase: str | None
    model: str | None
    matched_model: str | None
    dropped: float
    load: dict[str, float]
    lift: dict[str, float] | None
    structure: float | None
    touched: dict[int, dict[str, float]]
    hints: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Whether there is structure for a placement to exploit, in one line."""
        if self.top_k == 1:
            return "nothing to win in traffic: a token uses one expert, so only load can be balanced"
        if self.structure is None:
            return "cannot tell: too few tokens to see which experts meet"
        if self.structure < _NONE:
            return "nothing to win in traffic: experts meet as often as their loads alone would have it"
        if self.structure < _CLEAR:
            return "little to win: some experts meet a little more often than their loads alone would have it"
        return (
            "yes, there is structure to exploit: some experts meet far more often than others of equal load"
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON document ``placer/inspection/1``."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "tokens": self.tokens,
            "layers": self.layers,
            "experts": self.experts,
            "top_k": self.top_k,
            "num_groups": self.num_groups,
            "topk_groups": self.topk_groups,
            "sequences": self.sequences,
            "domains": self.domains,
            "phase": self.phase,
            "model": self.model,
            "matched_model": self.matched_model,
            "dropped": self.dropped,
            "load": self.load,
            "lift": self.lift,
            "structure": self.structure,
            "verdict": self.verdict,
            "touched": {str(units): row for units, row in self.touched.items()},
            "hints": list(self.hints),
        }

    def __str__(self) -> str:
        groups = f", {self.topk_groups} of {self.num_groups} groups" if self.num_groups > 1 else ""
        sizes = "unknown sizes" if self.matched_model is None else f"sizes of {self.matched_model}"
        heat = f"{self.load['max_over_mean']:.2f} times the mean load (worst layer {self.load['worst_layer']:.2f})"
        facts: list[tuple[str, str | None]] = [
            ("trace", self.name),
            ("tokens", f"{self.tokens:,}"),
            ("sequences", None if self.sequences is None else f"{self.sequences:,}"),
            ("domains", None if self.domains is None else f"{self.domains:,}"),
            ("phase", self.phase),
            ("router", f"{self.layers} layers, top {self.top_k} of {self.experts} experts{groups}"),
            ("model", f"{self.model or 'not named'} ({sizes})"),
            ("dropped", f"{self.dropped:.2%} of choices are -1" if self.dropped else "none"),
            ("hottest expert", heat),
        ]
        if self.lift is not None:
            values = " / ".join(f"{value:.2f}" for value in self.lift.values())
            ranks = " / ".join(map(str, PERCENTILES))
            facts.append(("pair lift", f"{values}  (percentiles {ranks}; 1 = no structure)"))
        lines = [f"{key:15} {value or '-'}" for key, value in facts]
        if self.touched:
            rows = [
                [str(units), f"{row['linear']:.3f}", f"{row['uniform']:.3f}"]
                for units, row in self.touched.items()
            ]
            title = (
                "Units a token touches in a layer before any search: with experts in order over N equal units, and\n"
                "for a router without structure; equal means that the order uses none, not that there is none"
            )
            lines += ["", title, aligned(["N", "in order", "no structure"], rows, left=())]
        lines += ["", f"verdict: {self.verdict}"]
        return "\n".join([*lines, *(f"hint: {hint}" for hint in self.hints)])


def inspect(trace: Trace) -> Inspection:
    """Look at a trace.

    The *lift* of two experts is P(i, j) / (c P(i) P(j)), with c such that the expected number of pairs a
    token is right in each layer: 1 means that the two meet as often as their loads alone would have it.

    Examples
    --------
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]]]), num_experts=4)
    >>> found = inspect(trace)
    >>> found.touched[2]["linear"], round(found.touched[2]["uniform"], 3)
    (1.0, 1.667)
    """
    traffic = Traffic.from_trace(trace)
    known = Model.for_trace_name(trace.model, trace.num_experts)
    heat = [float(row.max() / row.mean()) if row.any() else 1.0 for row in traffic.load]
    dropped = 1.0 - int(traffic.load.sum()) / trace.topk_idx.size
    lift, structure = _lift(traffic)
    return Inspection(
        name=trace.name,
        tokens=trace.num_tokens,
        layers=trace.num_layers,
        experts=trace.num_experts,
        top_k=trace.top_k,
        num_groups=trace.num_groups,
        topk_groups=trace.topk_groups,
        sequences=_distinct(trace.sequence),
        domains=_distinct(trace.domain),
        phase=trace.phase,
        model=trace.model,
        matched_model=None if known is ASSUMED else known.name,
        dropped=dropped,
        load={"max_over_mean": float(np.mean(heat)), "worst_layer": max(heat)},
        lift=lift,
        structure=structure,
        touched=_touched(trace),
        hints=_hints(trace, known, dropped, lift),
    )


def _lift(traffic: Traffic) -> tuple[dict[str, float] | None, float | None]:
    """Percentiles of the lift, and its standard deviation less that of Poisson counts."""
    if traffic.pairs is None:
        return None, None
    upper = np.triu_indices(traffic.load.shape[1], 1)
    layers: list[npt.NDArray[np.float64]] = []
    beyond: list[float] = []
    for load, pairs in zip(traffic.load.astype(np.float64), traffic.pairs, strict=True):
        seen, product = pairs[upper], np.outer(load, load)[upper]
        if seen.any():
            expected = product * (seen.sum() / product.sum())
            often = expected >= _MIN_EXPECTED
            if often.any():
                lift = seen[often] / expected[often]
                layers.append(np.percentile(lift, PERCENTILES))
                beyond.append(math.sqrt(max(0.0, float(((lift - 1.0) ** 2 - 1.0 / expected[often]).mean()))))
    if not layers:
        return None, None
    percentiles = zip(PERCENTILES, np.mean(layers, axis=0), strict=True)
    return {f"p{p}": float(value) for p, value in percentiles}, float(np.mean(beyond))


def _touched(trace: Trace) -> dict[int, dict[str, float]]:
    experts = trace.num_experts
    kept = [units for units in UNITS if units <= experts and experts % units == 0]
    touched = dict.fromkeys(kept, 0)
    choices = np.zeros(trace.top_k + 1, np.int64)  # tokens by the number of experts they really use
    for layer in range(trace.num_layers):
        for start in range(0, trace.num_tokens, _CHUNK):
            ids = trace.topk_idx[start : start + _CHUNK, layer].astype(np.int32)
            used = ids >= 0
            choices += np.bincount(used.sum(axis=1), minlength=len(choices))
            for units in kept:
                # One bit a unit; a dropped choice sets none.
                bits = np.where(used, np.left_shift(1, np.maximum(ids, 0) * units // experts), 0)
                touched[units] += int(_ONES[np.bitwise_or.reduce(bits, axis=1)].sum())
    rows = trace.num_tokens * trace.num_layers
    return {
        units: {
            "linear": touched[units] / rows,
            "uniform": sum(
                int(count) * uniform_touched(experts, k, units) for k, count in enumerate(choices) if count
            )
            / rows,
        }
        for units in kept
    }


_ONES = np.array([bin(bits).count("1") for bits in range(1 << max(UNITS))], np.uint8)


def uniform_touched(num_experts: int, top_k: int, units: int) -> float:
    """Expected units touched by `top_k` experts drawn uniformly, with ``num_experts / units`` in each unit.

    N (1 - C(E - E/N, k) / C(E, k)): a unit is missed when all k experts are among the others'.

    Examples
    --------
    >>> round(uniform_touched(64, 8, 8), 3)
    5.433
    """
    missed = comb(num_experts - num_experts // units, top_k) / comb(num_experts, top_k)
    return units * (1.0 - missed)


def _hints(trace: Trace, known: Model, dropped: float, lift: dict[str, float] | None) -> tuple[str, ...]:
    hints = []
    if dropped > 0:
        hints.append(
            "dropped choices (-1) move nothing and count as no load; means are still over all tokens"
        )
    if trace.split_kind == "blocks":
        hints.append("no sequences: held-out parts will be blocks of tokens, which are less independent")
    if lift is None and trace.top_k > 1:
        hints.append(f"too few tokens to see which experts meet: no pair is expected {_MIN_EXPECTED} times")
    if known is ASSUMED:
        hints.append(
            f"no known sizes: vectors of {ASSUMED.hidden_size} in BF16 will be assumed, expert size unknown; "
            "--model NAME sets them (see: placer models)"
        )
    return tuple(hints)


def _distinct(values: npt.NDArray[Any] | None) -> int | None:
    return None if values is None else len(np.unique(values))
