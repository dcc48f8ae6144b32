"""Exact re-split of two units: the best of all ways to share their experts out anew."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import numpy.typing as npt

from placer.layer import Layer, Occupant

LARGEST = 18  # slots of two units that are split exactly: 2^18 subset sums take milliseconds


def splittable(layer: Layer) -> bool:
    """Whether one level alone is searched, and two of its units are small enough."""
    return len(layer.levels) == 1 and 2 * int(layer.sizes[0]) <= LARGEST


def resplit(layer: Layer, occupant: Occupant) -> Occupant:
    """Split the experts of two units anew, the best way there is, pair by pair until no pair gains.

    A token's experts on the two units are a bit mask. With w[M] the tokens of mask M, the zeta transform gives
    z[S] = sum of w[M] over the subsets M of S, so z[all] - z[all - S] tokens touch S, and the unit S and the rest
    are touched z[S] + z[all - S] times less than twice by every token. That is least over all halves S in
    O(m 4^m) for m slots a unit, after one pass over the tokens.

    Parameters
    ----------
    layer : Layer
        Of one level, with at most `LARGEST` slots in two units.
    occupant : (num_slots,) int32

    Returns
    -------
    (num_slots,) int32; of the splits with the least load above the cap, one that touches fewest units, for every pair.

    References
    ----------
    Zeta transform over subsets: Yates 1937; Bjorklund et al. 2007, doi:10.1145/1250790.1250801.

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> cluster = Topology.load("dgx-h100").with_shape("1x2x2")
    >>> layer = Problem.from_trace(trace, cluster, max_load=None).layer(0)
    >>> resplit(layer, layer.linear()).tolist()
    [0, 2, 1, 3]
    """
    units = occupant.reshape(-1, int(layer.sizes[0])).copy()
    cap = float(layer.caps[layer.levels[0]])
    gained = True
    while gained:
        gained = False
        for pair in itertools.combinations(range(len(units)), 2):
            members = units[list(pair)].ravel()
            half = _best_half(layer, members, cap)
            if half is not None:
                units[list(pair)] = members[half], members[~half]
                gained = True
    return units.ravel()


def _best_half(layer: Layer, members: Occupant, cap: float) -> npt.NDArray[np.bool_] | None:
    """Which of the experts of two units make up the first of them; None to leave them as they are."""
    sets, count = layer.distinct
    bits = len(members)
    bit_of = np.zeros(layer.num_slots + 1, np.int64)  # the last for -1
    bit_of[members] = 1 << np.arange(bits)
    mask = np.bitwise_or.reduce(bit_of[sets], axis=1)
    inside = np.bincount(mask, weights=count, minlength=1 << bits)
    for bit in range(bits):
        halves = inside.reshape(-1, 2, 1 << bit)
        halves[:, 1] += halves[:, 0]
    chosen = _halves(bits)  # the first is that of `members` as they stand
    first = chosen @ (1 << np.arange(bits))
    touched = 2 * inside[-1] - inside[first] - inside[(1 << bits) - 1 - first]
    load = layer.expert_load[members]
    heat = chosen @ load
    over = np.maximum(heat - cap, 0.0) + np.maximum(load.sum() - heat - cap, 0.0)
    over = np.round(over, 6)  # caps are fractions: sums that are equal must be found equal
    best = int(np.lexsort((touched, over))[0])
    return chosen[best] if (over[best], touched[best]) < (over[0], touched[0]) else None


@cache
def _halves(bits: int) -> npt.NDArray[np.bool_]:
    """All halves of so many things that hold the first of them, (halves, bits); the first things come first."""
    rest = np.array(list(itertools.combinations(range(1, bits), bits // 2 - 1)), np.int64)
    chosen = np.zeros((len(rest), bits), bool)
    chosen[:, 0] = True
    chosen[np.arange(len(rest))[:, None], rest] = True
    chosen.setflags(write=False)
    return chosen
