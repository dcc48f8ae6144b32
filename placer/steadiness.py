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


def steadiness(layer: Layer, slots: Slots) -> Steadiness:
    """The steadiness of a slot array without copies.

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
    held = _shares(layer)[layer.occupant(slots)].reshape(layer.num_ranks, layer.slots_per_rank, -1)
    gpus = held.sum(axis=1) / layer.unit_speeds(0)[:, None]
    touched = layer.counts(slots).touched[0].sum()
    return Steadiness(peaks=float(gpus.max(axis=0).sum()), steps=gpus.shape[1], touched=float(touched))


def steadied(layer: Layer, slots: Slots) -> Slots:
    """Slots after swaps between GPUs of one server that lower the mean over steps of the busiest GPU's load.

    What servers hold, load caps and rules are kept.

    Parameters
    ----------
    layer : Layer
        With the step of every token.
    slots : (num_slots,) int32
        Without copies.

    Raises
    ------
    InvalidInput
        When the layer's tokens have no steps.
    """
    from placer.search.steadiness import settled

    inside = [i for i, ranks in enumerate(layer.unit_ranks) if ranks < layer.server_ranks]
    if not inside:
        return slots
    occupant = settled(
        layer.occupant(slots),
        np.ascontiguousarray(_shares(layer)),
        layer.expert_load,
        np.array([layer.unit_slots[i] for i in inside], np.int64),
        layer.caps[inside],
        np.stack([np.resize(layer.idle(i), layer.num_slots) for i in inside]),
        1.0 / layer.unit_speeds(0),
        layer.server_ranks,
        SWEEPS,
        None if layer.rules is None else layer.rules.compiled,
    )
    return layer.slots(occupant)


def _shares(layer: Layer) -> Floats:
    """Load that each occupant brings in each step with load, (num_slots, steps), over the mean of all GPUs.

    As caps count it: tokens, or whether the step uses the expert.
    """
    if layer.step is None:
        raise InvalidInput(f"layer {layer.index}: found no steps, expected the step of every token")
    uses = uses_by_step(layer.tokens, layer.step, layer.num_experts)
    used = (uses if layer.activations is None else uses > 0).astype(np.float64)
    used = used[used.any(axis=1)]
    shares = used.T * layer.num_ranks / used.sum(axis=1)
    return np.pad(shares, ((0, layer.num_slots - layer.num_experts), (0, 0)))
