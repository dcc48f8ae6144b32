"""Tabu search over swaps, on the exact number of touched units or on its pair surrogate.

Experts stand on *positions* 0..P-1 (slots, padded with weightless experts where a slot stays empty); position p
belongs to unit ``p // size[l]`` of level l. All tables are indexed by position, so that a scan over all swaps
reads memory in order.

Idea
----
For every position i, level l and unit u: ``H[l, i, u]`` = weight of tokens that use the expert on i and touch u,
``Q[l, i]`` = weight of tokens that use it minus those in which it is alone in its own unit, and
``S[i, j]`` (i < j) = level-weighted count of tokens in which one of the two experts is alone in its unit and the
other is used too. Moving i to u at level l then costs ``Q - H``, and swapping i with j costs the two moves plus
``S[i, j]``: O(1) for each of the P^2/2 swaps. Applying a swap visits only the tokens that use either expert.
The pair surrogate (edges cut of the co-activation graph) has the same form with
``H[l, i, u]`` = pair weight of i into u, ``Q[l, i]`` = into its own unit, ``S`` = twice the pair weight.

Load above a cap costs `penalty` a token; the penalty follows the search (higher while over a cap, lower while
under it), and only placements within all caps are kept as best.

References
----------
Glover, "Tabu Search - Part I", ORSA Journal on Computing 1989, doi:10.1287/ijoc.1.3.190.
Connectivity metric: Catalyurek and Aykanat, doi:10.1109/71.780863.
"""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.rules import bar_swaps

FAR = 1e300


@kernel
def build_exact(tokens, weights, occupant, size, level_weight, units):
    """Tables H (levels, P, units), Q (levels, P), S (P, P) and the weighted touched units, from scratch."""
    levels, positions = size.shape[0], occupant.shape[0]
    position_of = np.empty(positions, np.int32)
    for p in range(positions):
        position_of[occupant[p]] = p
    H = np.zeros((levels, positions, units), np.int64)
    Q = np.zeros((levels, positions), np.int64)
    S = np.zeros((positions, positions), np.float64)
    cost = 0.0
    width = tokens.shape[1]
    at = np.empty(width, np.int32)
    for t in range(tokens.shape[0]):
        n = 0
        for j in range(width):
            if tokens[t, j] >= 0:
                at[n] = position_of[tokens[t, j]]
                n += 1
        w = weights[t]
        for level in range(levels):
            for x in range(n):
                u = at[x] // size[level]
                first, alone = True, True
                for y in range(n):
                    if y != x and at[y] // size[level] == u:
                        alone = False
                        if y < x:
                            first = False
                if first:
                    cost += level_weight[level] * w
                    for y in range(n):
                        H[level, at[y], u] += w
                if alone:
                    Q[level, at[x]] -= w
                    for y in range(n):
                        if y != x:
                            S[min(at[x], at[y]), max(at[x], at[y])] += level_weight[level] * w
                Q[level, at[x]] += w
    return H, Q, S, cost


@kernel
def build_pairs(pairs, occupant, size, level_weight, units):
    """The same tables for the pair surrogate, and the weighted pairs cut; `pairs` is symmetric (P, P)."""
    levels, positions = size.shape[0], occupant.shape[0]
    H = np.zeros((levels, positions, units), np.int64)
    Q = np.zeros((levels, positions), np.int64)
    S = np.zeros((positions, positions), np.float64)
    cost = 0.0
    for i in range(positions):
        for j in range(positions):
            w = pairs[occupant[i], occupant[j]]
            for level in range(levels):
                H[level, i, j // size[level]] += w
                if i // size[level] != j // size[level]:
                    if i < j:
                        S[i, j] += 2 * level_weight[level] * w
                        cost += level_weight[level] * w
                else:
                    Q[level, i] += w
    return H, Q, S, cost


@kernel
def _swap_tables(i, j, occupant, load, H, Q, S):
    """Let the rows of positions i < j change place with their experts."""
    occupant[i], occupant[j] = occupant[j], occupant[i]
    load[i], load[j] = load[j], load[i]
    for level in range(H.shape[0]):
        Q[level, i], Q[level, j] = Q[level, j], Q[level, i]
        for u in range(H.shape[2]):
            H[level, i, u], H[level, j, u] = H[level, j, u], H[level, i, u]
    positions = occupant.shape[0]
    for p in range(i):
        S[p, i], S[p, j] = S[p, j], S[p, i]
    for p in range(i + 1, j):
        S[i, p], S[p, j] = S[p, j], S[i, p]
    for p in range(j + 1, positions):
        S[i, p], S[j, p] = S[j, p], S[i, p]


@kernel
def apply_exact(
    i, j, occupant, position_of, load, H, Q, S, tokens, weights, first_use, uses, size, level_weight
):
    """Swap positions i < j and bring the exact tables up to date."""
    e, f = occupant[i], occupant[j]
    position_of[e], position_of[f] = j, i
    _swap_tables(i, j, occupant, load, H, Q, S)
    levels, width = size.shape[0], tokens.shape[1]
    at = np.empty(width, np.int32)
    unit = np.empty((levels, occupant.shape[0]), np.int32)  # a table, since division is slow
    for level in range(levels):
        for p in range(occupant.shape[0]):
            unit[level, p] = p // size[level]
    for side in range(2):
        expert = e if side == 0 else f
        for x in range(first_use[expert], first_use[expert + 1]):
            t = uses[x]
            n = 0
            has_e, has_f = False, False
            for y in range(width):
                g = tokens[t, y]
                if g >= 0:
                    at[n] = position_of[g]
                    n += 1
                    if g == e:
                        has_e = True
                    elif g == f:
                        has_f = True
            if side == 1 and has_e:
                continue
            w = weights[t]
            for level in range(levels):
                a, b = unit[level, i], unit[level, j]
                if a == b:
                    continue
                # Now e stands on j in b and f on i in a; before, e was in a and f in b.
                in_a, in_b, other_a, other_b = 0, 0, -1, -1
                for y in range(n):
                    u = unit[level, at[y]]
                    if u == a and at[y] != i:
                        in_a += 1
                        other_a = at[y]
                    elif u == b and at[y] != j:
                        in_b += 1
                        other_b = at[y]
                before_a = in_a + (1 if has_e else 0)
                before_b = in_b + (1 if has_f else 0)
                after_a = in_a + (1 if has_f else 0)
                after_b = in_b + (1 if has_e else 0)
                change_a = (w if after_a > 0 else 0) - (w if before_a > 0 else 0)
                change_b = (w if after_b > 0 else 0) - (w if before_b > 0 else 0)
                if change_a != 0:
                    for y in range(n):
                        H[level, at[y], a] += change_a
                if change_b != 0:
                    for y in range(n):
                        H[level, at[y], b] += change_b
                alone = -1
                if before_a == 1:
                    alone = j if has_e else other_a
                still = -1
                if after_a == 1:
                    still = i if has_f else other_a
                if alone != still:
                    if alone >= 0:
                        _alone(level, alone, -w, at, n, Q, S, level_weight)
                    if still >= 0:
                        _alone(level, still, w, at, n, Q, S, level_weight)
                alone = -1
                if before_b == 1:
                    alone = i if has_f else other_b
                still = -1
                if after_b == 1:
                    still = j if has_e else other_b
                if alone != still:
                    if alone >= 0:
                        _alone(level, alone, -w, at, n, Q, S, level_weight)
                    if still >= 0:
                        _alone(level, still, w, at, n, Q, S, level_weight)


@kernel
def _alone(level, p, w, at, n, Q, S, level_weight):
    """Add weight w to the tokens in which position p is alone in its unit; `at` holds the token's positions."""
    Q[level, p] -= w
    value = level_weight[level] * w
    for y in range(n):
        q = at[y]
        if q < p:
            S[q, p] += value
        elif q > p:
            S[p, q] += value


@kernel
def apply_pairs(i, j, occupant, position_of, load, H, Q, S, pairs, size, level_weight):
    """Swap positions i < j and bring the pair tables up to date."""
    e, f = occupant[i], occupant[j]
    position_of[e], position_of[f] = j, i
    _swap_tables(i, j, occupant, load, H, Q, S)
    positions = occupant.shape[0]
    for level in range(size.shape[0]):
        a, b = i // size[level], j // size[level]
        if a == b:
            continue
        for p in range(positions):
            g = occupant[p]
            change = pairs[g, f] - pairs[g, e]
            H[level, p, a] += change
            H[level, p, b] -= change
        for p in range(positions):
            u = p // size[level]
            if u in (a, b):
                Q[level, p] = H[level, p, u]
    for p in range(positions):
        for x in (i, j):
            low, high = min(p, x), max(p, x)
            if low == high:
                continue
            total = 0.0
            for level in range(size.shape[0]):
                if low // size[level] != high // size[level]:
                    total += level_weight[level]
            S[low, high] = 2 * total * pairs[occupant[low], occupant[high]]


@kernel
def move_costs(H, Q, size, level_weight, inner, costs):
    """Fill `costs` (inner units, P): the change when the expert on p alone moved to that inner unit."""
    positions = Q.shape[1]
    costs[:] = 0.0
    for level in range(size.shape[0]):
        step = size[level] // inner
        for p in range(positions):
            own = p // size[level]
            for u in range(costs.shape[0]):
                v = u // step
                if v != own:
                    costs[u, p] += level_weight[level] * (Q[level, p] - H[level, p, v])


@kernel
def _excess(load, size, cap, idle=None):
    """Load of every unit (levels, P), what it is to stay idle for included, and the total load above the caps."""
    levels, positions = size.shape[0], load.shape[0]
    unit_load = np.zeros((levels, positions), np.float64)
    total = 0.0
    for level in range(levels):
        for p in range(positions):
            unit_load[level, p // size[level]] += load[p]
        for u in range(positions // size[level]):
            if idle is not None:
                unit_load[level, u] += idle[level, u]
            total += max(0.0, unit_load[level, u] - cap[level])
    return unit_load, total


@kernel(fastmath=True)
def _least(row, bar, start, stop):
    """Least of row[start:stop], and of those where `bar` is 0; all values are finite, so it may be vectorised."""
    least, free = FAR, FAR
    for j in range(start, stop):
        least = min(least, row[j])
        free = min(free, row[j] + bar[j])
    return least, free


@kernel
def best_swap(costs, S, load, unit_load, size, cap, penalty, inner, frozen, wanted, row, barred=None):
    """The best swap of positions in different inner units.

    `frozen` (P,) marks tabu positions; a swap with one of them is taken only when its change is below `wanted`.
    `barred` (P, P) marks swaps that are never taken.
    Returns (i, j, change) with i < j, or (-1, -1, FAR) when there is none.
    """
    levels, positions = size.shape[0], load.shape[0]
    best, best_i, best_j = FAR, -1, -1
    bar = np.where(frozen, FAR, 0.0)
    for i in range(positions):
        a = i // inner
        start = (a + 1) * inner
        for u in range(a + 1, costs.shape[0]):
            base = costs[u, i]
            for j in range(u * inner, (u + 1) * inner):
                row[j] = base + costs[a, j] + S[i, j]
        for level in range(levels):
            if cap[level] == np.inf:
                continue
            mine = unit_load[level, i // size[level]]
            was = max(0.0, mine - cap[level])
            rest = mine - load[i] - cap[level]
            first = (i // size[level] + 1) * size[level]
            for u in range(first // size[level], positions // size[level]):
                other = unit_load[level, u]
                old = was + max(0.0, other - cap[level])
                gap = other + load[i] - cap[level]
                for j in range(u * size[level], (u + 1) * size[level]):
                    row[j] += penalty * (max(0.0, rest + load[j]) + max(0.0, gap - load[j]) - old)
        if barred is not None:
            for j in range(start, positions):
                if barred[i, j]:
                    row[j] = FAR
        least, least_free = _least(row, bar, start, positions)
        if frozen[i]:
            least_free = FAR
        if least_free < best or (least < best and least < wanted):
            for j in range(start, positions):
                if row[j] < best and (row[j] < wanted or not (frozen[i] or frozen[j])):
                    best, best_i, best_j = row[j], i, j
    return best_i, best_j, best


@kernel
def tabu(
    occupant,
    expert_load,
    exact,
    tokens,
    weights,
    first_use,
    uses,
    pairs,
    size,
    level_weight,
    cap,
    units,
    patience,
    rests,
    rules=None,
    idle=None,
):
    """Search from `occupant`; return the best occupant within the caps, its cost, and whether it is within.

    Parameters
    ----------
    occupant : (P,) int32, expert on each position; left as it was
    expert_load : (P,) float64, tokens per expert
    exact : bool, touched units when true, pairs cut when false
    tokens, weights, first_use, uses : the routes and, per expert, the tokens that use it (CSR)
    pairs : (P, P) int64, symmetric, zero diagonal; only for the surrogate
    size, level_weight, cap : (levels,) positions per unit, weight, cap in tokens (inf = none), inside out
    units : int, units of the innermost level
    patience : stop after so many swaps without a new best
    rests : (steps, 2) int64, swaps for which the two experts moved in a step rest; its length bounds the swaps
    rules : kept by every swap where `occupant` keeps them (see `placer.search.rules`); None for none
    idle : (levels, P) float64, how far below `cap` the cap of each unit is; None where all have the same
    """
    positions = occupant.shape[0]
    occupant = occupant.copy()
    position_of = np.empty(positions, np.int32)
    load = np.empty(positions, np.float64)
    for p in range(positions):
        position_of[occupant[p]] = p
        load[p] = expert_load[occupant[p]]
    if exact:
        H, Q, S, cost = build_exact(tokens, weights, occupant, size, level_weight, units)
    else:
        H, Q, S, cost = build_pairs(pairs, occupant, size, level_weight, units)
    inner = size[0]
    costs = np.empty((positions // inner, positions), np.float64)
    row = np.empty(positions, np.float64)
    rests_until = np.zeros(positions, np.int64)
    frozen = np.zeros(positions, np.bool_)
    barred = None if rules is None else np.zeros((positions, positions), np.bool_)
    unit_load, excess = _excess(load, size, cap, idle)
    best = occupant.copy()
    best_cost, best_excess = cost, excess
    slack = 1e-9 * (1.0 + abs(cost))
    penalty, inside, outside, stale = 1.0, 0, 0, 0
    for step in range(rests.shape[0]):
        move_costs(H, Q, size, level_weight, inner, costs)
        for p in range(positions):
            frozen[p] = rests_until[occupant[p]] > step
        wanted = best_cost - cost - slack - penalty * excess if best_excess == 0.0 else -FAR
        if rules is not None:
            bar_swaps(occupant, position_of, rules, barred)
        i, j, change = best_swap(
            costs, S, load, unit_load, size, cap, penalty, inner, frozen, wanted, row, barred
        )
        if i < 0:
            if rules is None or not frozen.any():
                break
            continue  # few swaps are allowed, and those rest
        if exact:
            apply_exact(
                i,
                j,
                occupant,
                position_of,
                load,
                H,
                Q,
                S,
                tokens,
                weights,
                first_use,
                uses,
                size,
                level_weight,
            )
        else:
            apply_pairs(i, j, occupant, position_of, load, H, Q, S, pairs, size, level_weight)
        before = excess
        unit_load, excess = _excess(load, size, cap, idle)
        cost += change - penalty * (excess - before)
        rests_until[occupant[i]] = step + rests[step, 0]
        rests_until[occupant[j]] = step + rests[step, 1]
        if excess < best_excess or (excess == best_excess and cost < best_cost - slack):
            best[:] = occupant
            best_cost, best_excess = cost, excess
            stale = 0
        else:
            stale += 1
            if stale >= patience:
                break
        if excess == 0.0:
            inside, outside = inside + 1, 0
            if inside >= 5:
                penalty, inside = max(0.02, penalty * 0.7), 0
        else:
            inside, outside = 0, outside + 1
            if outside >= 5:
                penalty, outside = min(1e6, penalty * 1.5), 0
    return best, best_cost, best_excess
