"""Steepest descent over swaps: minimises the exact number of touched units, levels weighted by their cost.

Idea: from token-by-unit incidences, sparse products give the objective's change for *every* pair of positions
at once. Take the best swap among those that do not add load above the caps, rebuild, repeat until none helps.
While a cap is broken, swaps that lower the excess come first.
Complexity O(T k^2 + P^2) per level and swap, for T distinct expert sets of k and P positions. Wins where no
compiler is at hand, and as the judge of the compiled tables that say the same incrementally; loses to tabu,
which leaves local optima, and by two orders of magnitude in speed.

References: connectivity metric: Catalyurek and Aykanat, doi:10.1109/71.780863. Swap gains: Kernighan and Lin,
doi:10.1002/j.1538-7305.1970.tb01770.x. All swaps at once under deduplication: HierMoE, arXiv:2508.09591.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.errors import InvalidInput
from placer.layer import Floats, Layer, Occupant
from placer.solvers import Placed

needs = frozenset({"routes"})
handles = frozenset({"caps", "levels"})


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Descend from `initial`, else from the load reference where there is a cap, else from linear.

    Raises
    ------
    InvalidInput
        When `initial` holds copies, or only counts are known.
    """
    occupant = _start(layer, initial)
    rounds = 0
    while clock.allows(rounds):
        swap = best_swap(layer, occupant)
        if swap is None:
            break
        occupant[[*swap]] = occupant[[*swap[::-1]]]
        rounds += 1
    claim = layer.cost_of(weighted_touched(layer, occupant))
    return Placed(slots=layer.slots(occupant), claim=claim, rounds=rounds)


def _start(layer: Layer, initial: npt.NDArray[np.int32] | None) -> Occupant:
    if initial is None:
        return layer.linear() if layer.max_load is None else layer.reference.copy()
    copies = np.bincount(initial[initial >= 0], minlength=layer.num_experts)
    if (copies != 1).any():
        expert = int(np.argmax(copies != 1))
        raise InvalidInput(
            f"initial: expert {expert} of layer {layer.index} has {copies[expert]} slots, expected 1, "
            "for refine makes no copies"
        )
    return layer.occupant(initial)


def best_swap(layer: Layer, occupant: Occupant) -> tuple[int, int] | None:
    """The two positions to swap next, lower one first, or None in a local optimum.

    Parameters
    ----------
    layer : Layer
    occupant : (num_slots,) int32

    Returns
    -------
    The swap that lowers the excess over the caps the most, where one does; else the one that lowers the
    objective the most without adding excess. Ties go to the lower cost, then the lower positions.
    """
    cost = swap_changes(layer, occupant)
    excess = excess_changes(layer, occupant)
    # Both are sums of counts and differences of them; anything below this is rounding.
    slack = 1e-9 * (1.0 + float(layer.load.sum()))
    least = excess.min()
    if least < -slack:
        cost = np.where(excess <= least + slack, cost, np.inf)
    else:
        cost = np.where(excess <= slack, cost, np.inf)
        if cost.min() >= -slack:
            return None
    low, high = divmod(int(cost.argmin()), len(cost))
    return low, high


def weighted_touched(layer: Layer, occupant: Occupant) -> float:
    """The objective: touched units summed over tokens, levels weighted by `Layer.weights_of_levels`.

    Parameters
    ----------
    layer : Layer
    occupant : (num_slots,) int32

    Examples
    --------
    >>> from placer.problem import Problem
    >>> from placer.topology import Topology
    >>> from placer.trace import Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[0, 2]], [[1, -1]]]), num_experts=4)
    >>> machine = Topology.load("dgx-h100").with_shape("1x1x2")
    >>> layer = Problem.from_trace(trace, machine, max_load=None).layer(0)
    >>> weighted_touched(layer, layer.linear())
    5.0
    """
    sets, count = layer.distinct
    position = layer.positions(occupant)[sets]
    total = 0.0
    for size, weight in zip(layer.sizes.tolist(), layer.weights_of_levels, strict=True):
        unit = np.sort(np.where(sets >= 0, position // size, -1), axis=1)
        first = unit >= 0
        first[:, 1:] &= unit[:, 1:] != unit[:, :-1]
        total += float(weight * (count @ first.sum(axis=1)))
    return total


def swap_changes(layer: Layer, occupant: Occupant) -> Floats:
    """Exact change of the objective for swapping the occupants of any two positions.

    With e on p in unit a and f on q in unit b, a level changes by ``move(e, b) + move(f, a) + alone(e, f) +
    alone(f, e)``. Here ``move(e, b)`` counts tokens with e that do not touch b yet, less those in which e is
    alone in its unit; ``alone(e, f)`` are those of the latter that use f too, for a token with both experts
    keeps its count.

    Parameters
    ----------
    layer : Layer
    occupant : (num_slots,) int32
        Expert on each position; `num_experts` and up are empty slots.

    Returns
    -------
    (num_slots, num_slots) float64
        Change in touched units summed over tokens, levels weighted by `Layer.weights_of_levels`; symmetric,
        negative is better, 0 for two positions of one innermost unit.

    Examples
    --------
    >>> from placer.problem import Problem
    >>> from placer.topology import Topology
    >>> from placer.trace import Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[0, 2]], [[1, -1]]]), num_experts=4)
    >>> machine = Topology.load("dgx-h100").with_shape("1x1x2")
    >>> layer = Problem.from_trace(trace, machine, max_load=None, load_margin=0.0).layer(0)
    >>> swap_changes(layer, layer.linear())
    array([[ 0., 0., 0., -2.],
           [ 0., 0., -2., 0.],
           [ 0., -2., 0., 0.],
           [-2., 0., 0., 0.]])
    """
    sets, count = layer.distinct
    held = sets >= 0
    position = layer.positions(occupant)[sets]  # means nothing where no expert is held
    uses = _incidence(held, position, layer.num_slots, np.ones(len(sets)))
    load = uses.T @ count
    total = np.zeros((layer.num_slots, layer.num_slots))
    for size, weight in zip(layer.sizes.tolist(), layer.weights_of_levels, strict=True):
        unit = np.where(held, position // size, -1)
        same = unit[:, :, None] == unit[:, None, :]
        first = held & ~np.tril(same, -1).any(axis=2)  # one expert for every unit touched
        lone = held & (same.sum(axis=2) == 1)
        touching = (uses.T @ _incidence(first, unit, layer.num_slots // size, count)).toarray()
        alone = (_incidence(lone, position, layer.num_slots, count).T @ uses).toarray()
        move = (load - alone.diagonal())[:, None] - touching
        here = np.arange(layer.num_slots) // size
        change = move[:, here] + alone
        total += weight * np.where(here[:, None] == here, 0.0, change + change.T)
    return total


def excess_changes(layer: Layer, occupant: Occupant) -> Floats:
    """Change of `Layer.excess` for swapping the occupants of any two positions.

    Parameters
    ----------
    layer : Layer
    occupant : (num_slots,) int32

    Returns
    -------
    (num_slots, num_slots) float64
        Tokens above the caps, summed over units and levels; symmetric, all 0 without caps.

    Examples
    --------
    >>> from placer.problem import Problem
    >>> from placer.topology import Topology
    >>> from placer.trace import Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[0, 2]], [[1, -1]]]), num_experts=4)
    >>> machine = Topology.load("dgx-h100").with_shape("1x1x2")
    >>> layer = Problem.from_trace(trace, machine, max_load=1.0, load_margin=0.0).layer(0)
    >>> excess_changes(layer, np.array([0, 2, 1, 3], np.int32))  # 4 tokens on one GPU, 1 on the other
    array([[ 0., 0., -1., -1.],
           [ 0., 0., -1., -1.],
           [-1., -1., 0., 0.],
           [-1., -1., 0., 0.]])
    """
    load = layer.expert_load[occupant]
    total = np.zeros((layer.num_slots, layer.num_slots))
    for level, (size, cap) in enumerate(zip(layer.unit_slots, layer.caps, strict=True)):
        if np.isfinite(cap):
            here = np.arange(layer.num_slots) // size
            heat = (layer.unit_load(occupant, size) + layer.idle(level))[here]
            after = (heat - load)[:, None] + load  # load of p's unit once p has taken over from q
            change = np.maximum(after - cap, 0.0) - np.maximum(heat - cap, 0.0)[:, None]
            total += np.where(here[:, None] == here, 0.0, change + change.T)
    return total


def _incidence(
    mask: npt.NDArray[np.bool_], column: npt.NDArray[np.int32], width: int, weight: npt.NDArray[Any]
) -> Any:
    """Rows with their weight at `column` where `mask`, as a scipy CSR array (rows, width)."""
    from scipy.sparse import csr_array

    entries = mask.sum(axis=1)
    start = np.concatenate([[0], np.cumsum(entries)])
    return csr_array(
        (np.repeat(weight.astype(np.float64), entries), column[mask], start), shape=(len(mask), width)
    )
