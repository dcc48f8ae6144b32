"""Compiled counting: experts used, pairs used together, units touched."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel


@kernel
def count_pairs(tokens, weights, k, pairs):
    """Add the pair counts of `tokens` to `pairs`.

    `k` is a tuple of length top_k: its length is known when the kernel is compiled, which lets the two
    inner loops unroll. The table is flat because one index is cheaper than two.

    Parameters: tokens (n, top_k) int16, -1 dropped; weights (n,) int64; pairs (E * E,) int64, in and out,
    upper triangle (e < f) only.
    """
    width = len(k)
    size = int(np.sqrt(pairs.size))
    for t in range(tokens.shape[0]):
        w = weights[t]
        for i in range(width - 1):
            e = tokens[t, i]
            if e < 0:
                continue
            for j in range(i + 1, width):
                f = tokens[t, j]
                if f < 0:
                    continue
                if e < f:
                    pairs[e * size + f] += w
                else:
                    pairs[f * size + e] += w


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
def count_touched(tokens, unit_of_expert, touched):
    """Add to `touched` (levels, units) how many tokens touch each unit; one copy of each expert.

    Parameters: tokens (n, top_k) integer, negative or >= E dropped; unit_of_expert (levels, E) int32.
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
                    touched[level, u] += 1


@kernel
def expect_touched(
    tokens, candidates, num_candidates, size, server, touched, remote, load, remote_load, foreign
):
    """Expected touched units and loads when experts have copies and homes are uniform over ranks.

    For each home rank h and expert e, `candidates[h, e, :num_candidates[h, e]]` are the ranks whose copies the
    dispatch rule may pick, each with equal chance and independently of the token's other experts. A unit is
    then touched with chance ``1 - prod(1 - chance of each expert)``.

    Adds, per level and unit, mean over homes: `touched` units, `remote` ones (home elsewhere), picks `load`,
    picks from elsewhere `remote_load`, and per rank the picks `foreign` from other servers of
    `server` ranks each.
    """
    ranks, levels = candidates.shape[0], size.shape[0]
    miss = np.ones(ranks, np.float64)
    now = np.zeros(ranks, np.float64)
    seen = np.empty(ranks, np.int64)
    share = 1.0 / ranks
    for t in range(tokens.shape[0]):
        for home in range(ranks):
            for level in range(levels):
                n = 0
                own = home // size[level]
                for j in range(tokens.shape[1]):
                    e = tokens[t, j]
                    if e < 0:
                        continue
                    count = num_candidates[home, e]
                    chance = 1.0 / count
                    for c in range(count):
                        rank = candidates[home, e, c]
                        u = rank // size[level]
                        now[u] += chance
                        load[level, u] += chance * share
                        if u != own:
                            remote_load[level, u] += chance * share
                        if level == 0 and rank // server != home // server:
                            foreign[rank] += chance * share
                    for c in range(count):
                        u = candidates[home, e, c] // size[level]
                        if now[u] > 0.0:
                            if miss[u] == 1.0:
                                seen[n] = u
                                n += 1
                            miss[u] *= max(0.0, 1.0 - now[u])
                            now[u] = 0.0
                for x in range(n):
                    u = seen[x]
                    touched[level, u] += (1.0 - miss[u]) * share
                    if u != own:
                        remote[level, u] += (1.0 - miss[u]) * share
                    miss[u] = 1.0


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
