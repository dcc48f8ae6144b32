"""Compiled annealing: random swaps on the exact tables, accepted by their change and the temperature."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.tabu import _excess, apply_exact, build_exact


@kernel
def swap_change(i, j, H, Q, S, load, unit_load, size, level_weight, cap, penalty):
    """Change of the weighted touched units, and of the load above the caps at `penalty` a token; i < j."""
    change = S[i, j]
    for level in range(size.shape[0]):
        a, b = i // size[level], j // size[level]
        if a == b:
            continue
        change += level_weight[level] * (Q[level, i] - H[level, i, b] + Q[level, j] - H[level, j, a])
        if cap[level] != np.inf:
            d = load[j] - load[i]
            x, y = unit_load[level, a], unit_load[level, b]
            above = max(0.0, x + d - cap[level]) + max(0.0, y - d - cap[level])
            change += penalty * (above - max(0.0, x - cap[level]) - max(0.0, y - cap[level]))
    return change


@kernel
def anneal(
    occupant,
    expert_load,
    tokens,
    weights,
    first_use,
    uses,
    size,
    level_weight,
    cap,
    units,
    penalty,
    pairs,
    chances,
    hot,
    cold,
    idle=None,
):
    """Anneal from `occupant`; return the best occupant within the caps (or with the least excess) and its cost.

    Parameters (others as in `placer.search.tabu.tabu`)
    ----------
    penalty : cost of a token of load above a cap
    pairs : (steps, 2) int64, positions proposed in each step
    chances : (steps,) float64, uniform in (0, 1]
    hot, cold : first and last temperature, as shares of the mean absolute change of the first proposals
    idle : as in `placer.search.tabu.tabu`
    """
    positions = occupant.shape[0]
    occupant = occupant.copy()
    position_of = np.empty(positions, np.int32)
    load = np.empty(positions, np.float64)
    for p in range(positions):
        position_of[occupant[p]] = p
        load[p] = expert_load[occupant[p]]
    H, Q, S, cost = build_exact(tokens, weights, occupant, size, level_weight, units)
    unit_load, excess = _excess(load, size, cap, idle)
    best = occupant.copy()
    best_cost, best_excess = cost, excess
    steps = pairs.shape[0]
    total, seen = 0.0, 0
    for step in range(min(steps, 1000)):
        i, j = min(pairs[step, 0], pairs[step, 1]), max(pairs[step, 0], pairs[step, 1])
        if i // size[0] != j // size[0]:
            total += abs(swap_change(i, j, H, Q, S, load, unit_load, size, level_weight, cap, penalty))
            seen += 1
    scale = total / max(1, seen)
    if scale == 0.0:
        return best, best_cost, best_excess
    for step in range(steps):
        i, j = min(pairs[step, 0], pairs[step, 1]), max(pairs[step, 0], pairs[step, 1])
        if i // size[0] == j // size[0]:
            continue
        temperature = scale * hot * (cold / hot) ** (step / steps)
        change = swap_change(i, j, H, Q, S, load, unit_load, size, level_weight, cap, penalty)
        if change > 0.0 and change >= -temperature * np.log(chances[step]):
            continue
        apply_exact(
            i, j, occupant, position_of, load, H, Q, S, tokens, weights, first_use, uses, size, level_weight
        )
        before = excess
        unit_load, excess = _excess(load, size, cap, idle)
        cost += change - penalty * (excess - before)
        if excess < best_excess or (excess == best_excess and cost < best_cost):
            best[:] = occupant
            best_cost, best_excess = cost, excess
    return best, best_cost, best_excess
