"""Compiled counting: experts used, pairs used together, units touched."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.covering import plan_cover


@kernel
def count_pairs(tokens, k, pairs):
    """Add the pairs of each token to `pairs`, in the order in which the token names them.

    Add the transpose for the counts. `k` is a tuple of length top_k: its length is known when the kernel is
    compiled, which lets the two inner loops unroll. The table is flat because one index is cheaper than two,
    unsigned because a negative index would have to be looked out for, and 32 bits wide to stay in the cache.

    Parameters: tokens (n, top_k) int16, -1 dropped; pairs (E * E,) uint32, in and out.
    """
    width = len(k)
    size = np.uintp(np.sqrt(pairs.size))
    ids = np.empty(width, np.uintp)
    for t in range(tokens.shape[0]):
        whole = True
        for i in range(width):
            whole &= tokens[t, i] >= 0
            ids[i] = np.uintp(tokens[t, i])
        if whole:
            for i in range(width - 1):
                row = ids[i] * size
                for j in range(i + 1, width):
                    pairs[row + ids[j]] += np.uint32(1)
            continue
        for i in range(width - 1):
            for j in range(i + 1, width):
                if tokens[t, i] >= 0 and tokens[t, j] >= 0:
                    pairs[ids[i] * size + ids[j]] += np.uint32(1)


@kernel
def count_transitions(here, there, transitions):
    """Add to `transitions` (E, E) how often expert e here goes with expert f in the next layer."""
    for t in range(here.shape[0]):
        for i in range(here.shape[1]):
            e = here[t, i]
            if e < 0:
                continue
            for j in range(there.shape[1]):
                f = there[t, j]
                if f >= 0:
                    transitions[e, f] += 1


@kernel
def count_touched(tokens, weights, unit_of_expert, touched):
    """Add to `touched` (levels, units) how many tokens touch each unit; one copy of each expert.

    Parameters: tokens (n, top_k) integer, negative or >= E dropped; weights (n,), each as often as so many tokens;
    unit_of_expert (levels, E) int32.
    """
    levels, experts = unit_of_expert.shape
    seen = np.full(touched.shape, -1, np.int64)
    for t in range(tokens.shape[0]):
        for j in range(tokens.shape[1]):
            e = tokens[t, j]
            if e < 0 or e >= experts:
                continue
            for level in range(levels):
                u = unit_of_expert[level, e]
                if seen[level, u] != t:
                    seen[level, u] = t
                    touched[level, u] += weights[t]


@kernel
def expect_flows(
    tokens, weights, homes, candidates, num_candidates, size, server, cover,
    touched, remote, load, pairs, out, into,
):  # fmt: skip
    """Expected touched units, loads and vectors over link directions, for homes and copies of any kind.

    For home h and expert e, `candidates[h, e, :num_candidates[h, e]]` are the ranks whose copies the dispatch rule
    may pick, each with equal chance and independently of the token's other experts; one row serves all homes. A
    unit is touched with chance ``1 - prod(1 - chance of each expert)``. With `cover`, experts that have no copy in
    the home's server go where `plan_cover` (of `placer.search.covering`) sends them instead. Without `homes` every
    rank is the home of every token with equal chance. Each of `tokens` (n, top_k) counts as `weights` (n,) of them.

    Adds, per level and unit: `touched` units, `remote` ones (home elsewhere), picks `load`; and for three ways of
    sending, as in `placer.flows.Flows`, to `pairs` (3, ranks, GPUs of a server), `out` and `into` (3, levels,
    ranks): 0 a vector for each choice, 1 for each touched rank, 2 for each touched unit at the home's rail and
    from there for each touched GPU. Ports of level 0 are left to the caller; `server` is the position of that level.
    """
    levels, ranks = touched.shape
    width = size[server]
    miss = np.ones(ranks, np.float64)
    now = np.zeros(ranks, np.float64)
    hit = np.zeros(ranks, np.float64)
    seen = np.empty(ranks, np.int64)
    chosen = np.zeros(ranks // width, np.bool_)
    most = tokens.shape[1] * candidates.shape[2]
    picked, unit, share_of = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.float64)
    end = np.empty(tokens.shape[1], np.int64)  # of the picks of each expert
    # Plans for the experts that are not at home: one for homes with none of them, one for the last other set.
    planned = np.zeros(2, np.uint64)
    plans = (2, levels + 1, ranks if cover else 0)
    length = np.zeros(plans[:2], np.int64)
    where, chances = np.zeros(plans, np.int64), np.zeros(plans, np.float64)
    everywhere = homes.shape[0] == 0
    for t in range(tokens.shape[0]):
        share = weights[t] / ranks if everywhere else float(weights[t])
        first, last = (0, ranks) if everywhere else (homes[t], homes[t] + 1)
        planned[:] = np.uint64(0)
        for home in range(first, last):
            row = home if candidates.shape[0] > 1 else 0
            rail = home % width
            afar, plan, near, n = np.uint64(0), 0, 0, 0
            for j in range(tokens.shape[1]):
                e = tokens[t, j]
                if e < 0:
                    continue
                if cover and candidates[row, e, 0] // width != home // width:
                    afar |= np.uint64(1) << np.uint64(j)
                    continue
                count = num_candidates[row, e]
                for c in range(count):
                    picked[n], share_of[n] = candidates[row, e, c], 1.0 / count
                    n += 1
                end[near] = n
                near += 1
            if afar != 0:
                plan = 0 if near == 0 else 1
                if planned[plan] != afar:
                    planned[plan] = afar
                    plan_cover(
                        tokens[t], afar, candidates[row], num_candidates[row], size, width,
                        now, miss, hit, seen, chosen, length[plan], where[plan], chances[plan],
                    )  # fmt: skip
                for x in range(length[plan, levels]):
                    picked[n], share_of[n] = where[plan, levels, x], chances[plan, levels, x]
                    n += 1
            num_picks = n
            for level in range(levels):
                own = home // size[level]
                for x in range(num_picks):
                    u = picked[x] // size[level]
                    unit[x] = u
                    picks = share_of[x] * share
                    load[level, u] += picks
                    if level == 0:
                        if u // width == home // width and u != home:
                            pairs[0, home, u % width] += picks
                    elif u != own:
                        out[0, level, home] += picks
                        into[0, level, picked[x]] += picks
                n, start = 0, 0
                for j in range(near):
                    for x in range(start, end[j]):
                        now[unit[x]] += share_of[x]
                    for x in range(start, end[j]):
                        u = unit[x]
                        if now[u] > 0.0:
                            if miss[u] == 1.0:
                                seen[n] = u
                                n += 1
                            miss[u] *= max(0.0, 1.0 - now[u])
                            now[u] = 0.0
                    start = end[j]
                if afar != 0:
                    for x in range(length[plan, level]):
                        u = where[plan, level, x]
                        if miss[u] == 1.0:
                            seen[n] = u
                            n += 1
                        miss[u] *= 1.0 - chances[plan, level, x]
                for x in range(n):
                    u = seen[x]
                    p = (1.0 - miss[u]) * share
                    miss[u] = 1.0
                    touched[level, u] += p
                    if u != own:
                        remote[level, u] += p
                    if level > 0:
                        if u != own:
                            out[2, level, home] += p
                            into[2, level, u * size[level] + rail % size[level]] += p
                        continue
                    pairs[2, u // width * width + rail, u % width] += p
                    if u // width == home // width and u != home:
                        pairs[1, home, u % width] += p
                    for outer in range(1, levels):
                        if u // size[outer] != home // size[outer]:
                            out[1, outer, home] += p
                            into[1, outer, u] += p


@kernel
def expect_counts(tokens, weights, candidates, num_candidates, kind_of, num_kinds, size, touched, remote):
    """The `touched` and `remote` of `expect_flows`, homes uniform, without flows and covers.

    Homes for which a token's experts have the same candidates are counted together: `kind_of` (homes, E) is equal
    where an expert has the same candidates, and below `num_kinds` (E,).
    """
    levels, ranks = touched.shape
    width, most = tokens.shape[1], num_kinds.max()
    kind, homes = np.empty(ranks, np.int64), np.empty(ranks, np.int64)  # of each home; of each kind
    first = np.empty(ranks, np.int64)
    label, stamp, marks = np.empty(ranks * most, np.int64), np.zeros(ranks * most, np.int64), 0
    inside = np.zeros((ranks, levels, ranks), np.int64)
    miss, now = np.ones(ranks, np.float64), np.zeros(ranks, np.float64)
    seen = np.empty(ranks, np.int64)
    everywhere = np.zeros((levels, ranks), np.int64)
    unit_of = np.empty((levels, ranks), np.int32)  # a look-up is faster than a division
    for level in range(levels):
        for home in range(ranks):
            unit_of[level, home] = home // size[level]
            everywhere[level, unit_of[level, home]] += 1
    for t in range(tokens.shape[0]):
        kinds = 1
        first[0], homes[0] = 0, ranks
        for j in range(width):
            e = tokens[t, j]
            if e < 0 or num_kinds[e] == 1:
                continue
            if kinds == 1:
                kind[:] = 0
            kinds, marks = 0, marks + 1
            for home in range(ranks):
                code = kind[home] * most + kind_of[home, e]
                if stamp[code] != marks:
                    stamp[code], label[code] = marks, kinds
                    first[kinds], homes[kinds] = home, 0
                    kinds += 1
                kind[home] = label[code]
                homes[kind[home]] += 1
        if kinds > 1:
            for home in range(ranks):
                for level in range(levels):
                    inside[kind[home], level, unit_of[level, home]] += 1
        each = weights[t] / ranks
        for k in range(kinds):
            home, share = first[k], homes[k] * each
            for level in range(levels):
                n = 0
                for j in range(width):
                    e = tokens[t, j]
                    if e < 0:
                        continue
                    count = num_candidates[home, e]
                    if count == 1:
                        u = unit_of[level, candidates[home, e, 0]]
                        if miss[u] == 1.0:
                            seen[n] = u
                            n += 1
                        miss[u] = 0.0
                        continue
                    for c in range(count):
                        now[unit_of[level, candidates[home, e, c]]] += 1.0 / count
                    for c in range(count):
                        u = unit_of[level, candidates[home, e, c]]
                        if now[u] > 0.0:
                            if miss[u] == 1.0:
                                seen[n] = u
                                n += 1
                            miss[u] *= max(0.0, 1.0 - now[u])
                            now[u] = 0.0
                for x in range(n):
                    u = seen[x]
                    own = everywhere[level, u] if kinds == 1 else inside[k, level, u]
                    touched[level, u] += (1.0 - miss[u]) * share
                    remote[level, u] += (1.0 - miss[u]) * (homes[k] - own) * each
                    miss[u] = 1.0
        if kinds > 1:
            for home in range(ranks):
                for level in range(levels):
                    inside[kind[home], level, unit_of[level, home]] = 0


@kernel
def follow_experts(tokens, weights, homes, rank_of_expert, size, server, pairs, out, into):
    """Let every token travel to its experts' ranks and stay with the heaviest; `homes` (n,) is brought up to date.

    Adds the vectors of the way there (0) and back to the new home (1) to `pairs` (2, ranks, GPUs of a server),
    `out` and `into` (2, levels, ranks). Equal or missing `weights` (an empty array) favour the first choice. A
    home of -1 is unknown: then the way there is left to the caller.
    """
    levels, width = size.shape[0], size[server]
    for t in range(tokens.shape[0]):
        best = -1
        for j in range(tokens.shape[1]):
            if tokens[t, j] >= 0 and (
                best < 0 or (weights.shape[0] > 0 and weights[t, j] > weights[t, best])
            ):
                best = j
        if best < 0:
            continue
        after = rank_of_expert[tokens[t, best]]
        for j in range(tokens.shape[1]):
            if tokens[t, j] < 0:
                continue
            rank = rank_of_expert[tokens[t, j]]
            for way in range(2):
                a, b = (homes[t], rank) if way == 0 else (rank, after)
                if a < 0 or a == b:
                    continue
                if a // width == b // width:
                    pairs[way, a, b % width] += 1.0
                for level in range(1, levels):
                    if a // size[level] != b // size[level]:
                        out[way, level, a] += 1.0
                        into[way, level, b] += 1.0
        homes[t] = after


@kernel
def sum_touched(tokens, unit_of_expert, level_weight):
    """Touched units of all tokens, weighted by level; one copy of each expert.

    Parameters: tokens (n, top_k) integer, -1 dropped; unit_of_expert (levels, E) int32; level_weight (levels,)
    float64.
    """
    levels = unit_of_expert.shape[0]
    seen = np.full((levels, unit_of_expert.shape[1]), -1, np.int32)
    touched = np.zeros(levels, np.int64)
    for t in range(tokens.shape[0]):
        for j in range(tokens.shape[1]):
            e = tokens[t, j]
            if e < 0:
                continue
            for level in range(levels):
                u = unit_of_expert[level, e]
                touched[level] += seen[level, u] != t  # no branch: it could not be predicted
                seen[level, u] = t
    total = 0.0
    for level in range(levels):
        total += level_weight[level] * touched[level]
    return total


@kernel
def count_covered(sets, weights, contents):
    """Weight of the sets that meet each content; both are bit masks, (n, words) and (c, words) uint64."""
    covered = np.zeros(contents.shape[0], np.int64)
    for c in range(contents.shape[0]):
        total = 0
        for t in range(sets.shape[0]):
            for x in range(sets.shape[1]):
                if sets[t, x] & contents[c, x]:
                    total += weights[t]
                    break
        covered[c] = total
    return covered
