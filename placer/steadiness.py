"""Steadiness: how evenly every single step loads the GPUs, and swaps inside servers that even it out.

A cap on the load of all steps together says little about one step, and a step takes as long as its busiest GPU. Experts
that are hot in the same steps are often used by the same tokens: they belong in one server, but not on one GPU. So once
a search has settled what each server holds, experts change places between GPUs of one server: traffic between servers
stays as it is, and only what crosses the fast links inside them grows.

Minimised is the mean over steps of the busiest GPU's load over the mean, exactly, by descent over swaps. Engines look
at the variance of a GPU's load instead, the sum of the covariances of its experts; that is a surrogate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.batches import uses_by_step
from placer.errors import InvalidInput
from placer.layer import Floats, Layer
from placer.rules import Rules
from placer.speeds import in_time

Slots = npt.NDArray[np.int32]

SWEEPS = 100  # over all pairs of GPUs; descent ends long before


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """What one layer's placement does to single steps, and what it pays for that.

    Parameters
    ----------
    peaks : float
        Busiest GPU's load over mean, summed over steps; in time, where GPUs differ in speed.
    steps : int
        Steps with any load.
    touched : float
        GPUs that tokens touch, summed over tokens.
    """

    peaks: float
    steps: int
    touched: float


def steadiness(layer: Layer, slots: Slots, table: Slots | None = None) -> Steadiness:
    """The steadiness of a slot array; copies of an expert are taken to share its load evenly in every step.

    `table` is that of the dispatch rule "table".

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> ids, step = np.array([[[0, 1]], [[0, 1]], [[2, 3]]]), np.array([0, 0, 1])
    >>> trace = Trace(topk_idx=ids, num_experts=4, step=step)
    >>> layer = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x1x2")).layer(0)
    >>> steadiness(layer, np.array([0, 1, 2, 3]))
    Steadiness(peaks=4.0, steps=2, touched=3.0)
    >>> even = steadied(layer, np.array([0, 1, 2, 3]))
    >>> even.tolist(), steadiness(layer, even)
    ([0, 3, 1, 2], Steadiness(peaks=2.0, steps=2, touched=6.0))
    """
    held = _shares(layer, slots).reshape(layer.num_ranks, layer.slots_per_rank, -1)
    gpus = in_time(held.sum(axis=1).T, layer.speeds, 1).T
    touched = layer.counts(slots, table).touched[0].sum()
    return Steadiness(peaks=float(gpus.max(axis=0).sum()), steps=gpus.shape[1], touched=float(touched))


def steadied(layer: Layer, slots: Slots) -> Slots:
    """Slots after swaps between GPUs of one server that lower the mean over steps of the busiest GPU's load.

    What servers hold and rules are kept, and load caps as far as copies share load evenly.

    Parameters
    ----------
    layer : Layer
        With the step of every token.
    slots : (num_slots,) int32

    Raises
    ------
    InvalidInput
        When the layer's tokens have no steps.
    """
    from placer.search.steadiness import settled

    inside = [i for i, ranks in enumerate(layer.unit_ranks) if ranks < layer.server_ranks]
    if not inside:
        return slots
    tenants = _tenants(layer, slots)
    order = np.argsort(tenants.start)  # slots by tenant
    occupant = settled(
        tenants.start.copy(),
        _shares(layer, slots)[order],
        _evenly(layer.heat.astype(np.float64), slots)[order],
        np.array([layer.unit_slots[i] for i in inside], np.int64),
        layer.caps[inside],
        np.stack([np.resize(layer.idle(i), layer.num_slots) for i in inside]),
        1.0 / layer.unit_speeds(0),
        layer.server_ranks,
        SWEEPS,
        tenants.compiled if tenants.apart or layer.rules is not None else None,
    )
    return _ordered(layer, slots[order][occupant])


def _tenants(layer: Layer, slots: Slots) -> Rules:
    """Rules for what fills each slot, one occupant a copy: the layer's, and no two copies of an expert on one GPU.

    Their start is how slots stand. Swaps inside a server change nothing for experts that larger units keep apart.
    """
    filled = np.flatnonzero(slots >= 0)
    start = np.empty(len(slots), np.int32)
    start[filled] = np.arange(len(filled))
    start[slots < 0] = np.arange(len(filled), len(slots))
    held, each = slots[filled], layer.slots_per_rank
    copied = np.flatnonzero(np.bincount(held, minlength=layer.num_experts) > 1)
    apart = [(tuple(np.flatnonzero(held == expert).tolist()), each) for expert in copied]
    low, high = (np.full(len(slots), end, np.int32) for end in (0, len(slots)))
    shut = np.zeros(len(slots), bool)
    if layer.rules is not None:
        shut = layer.rules.shut
        low[: len(filled)], high[: len(filled)] = layer.rules.low[held], layer.rules.high[held]
        named = (
            np.flatnonzero(np.isin(held, experts)) for experts, span in layer.rules.apart if span == each
        )
        apart += [(tuple(group.tolist()), each) for group in named]
    return Rules(num_experts=len(filled), low=low, high=high, shut=shut, apart=apart, start=start)


def _ordered(layer: Layer, slots: Slots) -> Slots:
    """Slots in their canonical order; with copies, experts ascend within a GPU."""
    held = slots[slots >= 0]
    single = len(np.unique(held)) == len(held)
    return layer.slots(layer.occupant(slots)) if single else layer.in_order(slots)


def _evenly(amount: Floats, slots: Slots) -> Floats:
    """What each slot, (num_slots, ...), has of its expert's amount, (num_experts, ...), when copies share it evenly."""
    number = np.bincount(slots[slots >= 0], minlength=len(amount))
    shares = amount / np.maximum(number, 1).reshape(-1, *[1] * (amount.ndim - 1))
    return np.ascontiguousarray(np.concatenate([shares, np.zeros((1, *amount.shape[1:]))])[slots])


def _shares(layer: Layer, slots: Slots) -> Floats:
    """Load that each slot brings in each step with load, (num_slots, steps), over the mean of all GPUs.

    As caps count it: tokens, or whether the step uses the expert.
    """
    if layer.step is None:
        raise InvalidInput(f"layer {layer.index}: found no steps, expected the step of every token")
    uses = uses_by_step(layer.tokens, layer.step, layer.num_experts)
    used = (uses if layer.activations is None else uses > 0).astype(np.float64)
    used = used[used.any(axis=1)]
    return _evenly(used.T * layer.num_ranks / used.sum(axis=1), slots)
