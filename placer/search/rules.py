"""Compiled rules: who may stand where, which swaps are barred, and repair of arrangements that break a rule.

`rules` is `placer.rules.Rules.compiled`: number of experts, (P,) first and (P,) end of the positions that an occupant
may take, (P,) positions shut to experts, and the partners that an occupant keeps apart from, as CSR: (P + 1,) starts,
partners, and the slots of the unit that the two may not share. An arrangement that keeps the rules keeps them after
any swap that `may_swap` allows.
"""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel


@kernel
def may_stand(e, p, rules):
    """Whether occupant e may stand on position p, as far as only its own place is concerned."""
    return rules[1][e] <= p and p < rules[2][e] and not (rules[3][p] and e < rules[0])


@kernel
def _clashes(e, p, other, position_of, rules):
    """How many of e's partners, but for `other`, stand in a unit of p that they may not share with e."""
    first, partner, span = rules[4], rules[5], rules[6]
    count = 0
    for x in range(first[e], first[e + 1]):
        g = partner[x]
        if g != other and position_of[g] // span[x] == p // span[x]:
            count += 1
    return count


@kernel
def may_swap(i, j, occupant, position_of, rules):
    """Whether an arrangement that keeps the rules keeps them when the occupants of i and j change places."""
    e, f = occupant[i], occupant[j]
    return (
        may_stand(e, j, rules)
        and may_stand(f, i, rules)
        and _clashes(e, j, f, position_of, rules) == 0
        and _clashes(f, i, e, position_of, rules) == 0
    )


@kernel
def bar_swaps(occupant, position_of, rules, barred):
    """Mark in `barred` (P, P), for i < j, every swap that `may_swap` does not allow."""
    experts, low, high, shut, first, partner, span = rules
    positions = occupant.shape[0]
    for i in range(positions):  # barred[i, j]: the occupant of i may not go to j while that of j leaves it
        e = occupant[i]
        for j in range(positions):
            barred[i, j] = shut[j] and e < experts
        barred[i, : low[e]] = True
        barred[i, high[e] :] = True
        for x in range(first[e], first[e + 1]):
            q = position_of[partner[x]]
            begin = q // span[x] * span[x]
            for j in range(begin, begin + span[x]):
                if j != q:
                    barred[i, j] = True
    for i in range(positions):
        for j in range(i + 1, positions):
            barred[i, j] |= barred[j, i]


@kernel
def _broken(e, p, other, position_of, rules):
    """Rules that e would break on p, `other` being gone."""
    return _clashes(e, p, other, position_of, rules) + (0 if may_stand(e, p, rules) else 1)


@kernel
def repaired(occupant, rules, draws):
    """The arrangement after swaps that break fewer and fewer rules, and whether it keeps them all.

    Min-conflicts: an occupant that breaks a rule, drawn at random, makes the swap that breaks the fewest, ties at
    random; occupants that were just moved rest. `draws` (steps, 2) float64 in [0, 1) bounds the swaps.

    Reference: Minton et al., "Minimizing Conflicts", 1992, doi:10.1016/0004-3702(92)90007-K.
    """
    positions = occupant.shape[0]
    occupant = occupant.copy()
    position_of = np.empty(positions, np.int32)
    for p in range(positions):
        position_of[occupant[p]] = p
    wrong = np.empty(positions, np.int64)
    rests_until = np.zeros(positions, np.int64)
    for step in range(draws.shape[0]):
        number = 0
        for e in range(positions):
            if _broken(e, position_of[e], -1, position_of, rules) > 0:
                wrong[number] = e
                number += 1
        if number == 0:
            return occupant, True
        e = wrong[int(draws[step, 0] * number)]
        i = position_of[e]
        mine = _broken(e, i, -1, position_of, rules)
        begin = int(draws[step, 1] * positions)
        best, chosen = positions * positions, -1
        for turn in range(positions):
            j = (begin + turn) % positions
            f = occupant[j]
            if j == i or rests_until[f] > step or not may_stand(e, j, rules):
                continue
            change = _broken(e, j, f, position_of, rules) - mine
            change += _broken(f, i, e, position_of, rules) - _broken(f, j, -1, position_of, rules)
            if change < best:
                best, chosen = change, j
        if chosen < 0:
            continue
        f = occupant[chosen]
        occupant[i], occupant[chosen] = f, e
        position_of[e], position_of[f] = chosen, i
        rests_until[e] = step + 2 + step % 3
    return occupant, False
