"""Load caps that can be met, and the margin that makes them hold on unseen tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placer.layer import Layer

#: Load over mean by which unseen tokens may exceed a cap with an automatic margin. Even load-only packing is
#: exceeded by 0.04 on OLMoE, and the last two hundredths would cost 5 % more touched servers there.
TOLERANCE = 0.02


def caps(layer: Layer, factor: float | None) -> npt.NDArray[np.float64]:
    """Cap of every level: ``max(factor * mean, load of the reference arrangement)``.

    Where GPUs differ in speed it is the fastest unit's: all loads are over speeds, and the cap is times its speed.
    The reference meets all levels together, so the caps are jointly feasible (see `least_load`). Units that rules keep
    empty do not count in the mean.

    Parameters
    ----------
    layer : Layer
    factor : float or None
        Load over mean that is allowed; None for no cap.

    Returns
    -------
    (num_levels,) float64, in units of `Layer.heat`; inf where there is no cap.
    """
    limits = np.full(len(layer.unit_slots), math.inf)
    if factor is None:
        return limits
    total = float(layer.heat.sum())
    for level, slots in enumerate(layer.unit_slots):
        if slots < layer.num_slots:
            mean = total * slots / layer.num_slots
            if layer.rules is not None:
                mean /= layer.rules.share_open(slots)
            fastest = float(layer.unit_speeds(level).max())
            limits[level] = max(factor * mean, float(layer.least_load[level])) * fastest
    return limits


def least_load(layer: Layer) -> npt.NDArray[np.float64]:
    """Load of the busiest unit of each level over its speed, (num_levels,), in one arrangement by load alone.

    It is `Layer.reference`, or EPLB's where the layer has copies, which no rules restrict, and these leave its busiest
    GPU less to do.
    """
    alone = np.array(
        [
            (layer.unit_load(layer.reference, slots) / layer.unit_speeds(level)).max()
            for level, slots in enumerate(layer.unit_slots)
        ]
    )
    if not layer.copies or layer.num_slots == layer.num_experts or layer.rules is not None:
        return alone
    from placer.clock import Clock
    from placer.solvers import eplb

    slots = eplb.place(layer, rng=np.random.default_rng(0), clock=Clock.start()).slots
    load, units = layer.expected_load(slots), [layer.num_slots // width for width in layer.unit_slots]
    reached = np.array([(load[i, :n] / layer.unit_speeds(i)).max() for i, n in enumerate(units)])
    return reached if reached[0] < alone[0] else alone


def raised(layer: Layer) -> list[dict[str, float | int | str]]:
    """The caps that had to be raised above ``max_load`` because even load-only packing exceeds it.

    Returns
    -------
    One ``{"layer", "level", "asked", "cap"}`` per raised cap: the level's position, loads over mean.
    """
    if layer.max_load is None or layer.heat.sum() == 0:
        return []
    rows: list[dict[str, float | int | str]] = []
    for level, (slots, cap) in enumerate(zip(layer.unit_slots, caps(layer, layer.max_load), strict=True)):
        mean = float(layer.heat.sum()) * slots / layer.num_slots * float(layer.unit_speeds(level).max())
        if math.isfinite(cap) and cap > layer.max_load * mean * (1 + 1e-12):
            rows.append(
                {"layer": layer.index, "level": level, "asked": layer.max_load, "cap": float(cap / mean)}
            )
    return rows


def overshoot(layer: Layer, factor: float) -> float:
    """How far above caps of `factor` times the mean unseen tokens will drive the busiest unit, over the mean.

    A placement is fitted to one half of the sequences under the caps by tabu search on pairs, and its busiest
    unit is measured on the other half, and the other way round. Sampling noise enters twice, once from
    fitting and once from scoring, each with variance 1/tokens; fitting on all tokens halves both, hence the
    factor sqrt(1/2). Mean over the levels that swaps change.
    """
    from placer.search import descend

    if layer.topk is None or layer.key is None or len(layer.levels) == 0 or len(layer.key) < 2:
        return 0.0
    halves = [replace(half, max_load=factor) for half in layer.split()]
    over = []
    for fit, unseen in (halves, halves[::-1]):
        occupant, _ = descend(fit, fit.reference, exact=False, rng=np.random.default_rng(0))
        for level in fit.levels:
            slots = fit.unit_slots[level]
            mean = float(fit.heat.sum()) * slots / fit.num_slots
            speed = fit.unit_speeds(level)
            seen = max(float(fit.caps[level]) / (mean * speed.max()), 1.0) if mean else 1.0
            heat = unseen.unit_load(occupant, slots)
            if heat.sum() > 0:
                over.append(float((heat / speed).max() / heat.mean()) - seen)
    return float(np.mean(over)) * math.sqrt(0.5) if over else 0.0


def margin(max_load: float, mean_overshoot: Callable[[float], float]) -> float:
    """How much to tighten caps so that unseen tokens exceed `max_load` by `TOLERANCE` at most, on average.

    It is at most half of the headroom ``max_load - 1``: nearer to a perfect balance traffic rises steeply (on OLMoE
    by 10 % between 1.02 and 1.00) and unseen load hardly falls.

    Parameters
    ----------
    max_load : float
        Largest load over mean that is asked for.
    mean_overshoot : callable
        Caps over the mean -> `overshoot`, averaged over layers: one layer's estimate is mostly noise. It grows as
        caps tighten and more units come close to them, so the second estimate is made at the first margin.

    Examples
    --------
    >>> round(margin(1.05, lambda cap: 0.03 + 0.2 * (1.05 - cap)), 4)
    0.012
    >>> round(margin(1.05, lambda cap: 0.2), 4)
    0.025
    """
    found = 0.0
    for _ in range(2):
        found = min(max(0.0, mean_overshoot(max_load - found) - TOLERANCE), max(0.0, (max_load - 1.0) / 2))
    return found
