"""Compiled counting: experts used, pairs used together, units touched."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel


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
def expect_flows(
    tokens, homes, candidates, num_candidates, size, server, cover, touched, remote, load, pairs, out, into
):
    """Expected touched units, loads and vectors over link directions, for homes and copies of any kind.

    For home h and expert e, `candidates[h, e, :num_candidates[h, e]]` are the ranks whose copies the dispatch rule
    may pick, each with equal chance and independently of the token's other experts; one row serves all homes. A
    unit is touched with chance ``1 - prod(1 - chance of each expert)``. With `cover`, experts that have no copy in
    the home's server go where `plan_cover` sends them instead. Without `homes` every rank is the home of every
    token with equal chance.

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
    share = 1.0 / ranks if everywhere else 1.0
    for t in range(tokens.shape[0]):
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
def expect_counts(tokens, candidates, num_candidates, kind_of, num_kinds, size, touched, remote):
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
        for k in range(kinds):
            home, share = first[k], homes[k] / ranks
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
                    remote[level, u] += (1.0 - miss[u]) * (homes[k] - own) / ranks
                    miss[u] = 1.0
        if kinds > 1:
            for home in range(ranks):
                for level in range(levels):
                    inside[kind[home], level, unit_of[level, home]] = 0


@kernel
def plan_cover(
    token, afar, copies, num_copies, size, width, now, miss, hit, seen, chosen, length, where, chances
):
    """Where the experts of a token go that have no copy in its home's server.

    The smallest set of servers that together hold all of them is taken, every such set with equal chance, and
    each expert picks uniformly among its copies in the set. Experts that share servers, directly or through
    others, form a component; components choose independently, for a smallest set of all is one of each.

    Parameters: token (top_k,); afar, bit mask of its positions; copies (E, most) and num_copies (E,), ranks; from
    now to chosen scratch of as many ranks (servers for `chosen`): zeros but for `miss`, ones, left as found.
    Results: `where[level, :length[level]]` units and `chances` that a component touches them, one entry for each
    component; in the row after the last level ranks and their expected picks.
    """
    levels, bit = size.shape[0], np.uint64(1)
    servers = np.empty(token.shape[0] * copies.shape[1], np.int64)
    holds = np.zeros(servers.shape[0], np.uint64)
    count = 0
    for j in range(token.shape[0]):
        if (afar >> np.uint64(j)) & bit == 0:
            continue
        for c in range(num_copies[token[j]]):
            at = copies[token[j], c] // width
            s = 0
            while s < count and servers[s] != at:
                s += 1
            servers[s] = at
            count = max(count, s + 1)
            holds[s] |= bit << np.uint64(j)
    length[:] = 0
    sole, forced = held_once(holds[:count]), np.uint64(0)
    for s in range(count):
        if holds[s] & sole != 0:
            forced |= holds[s]
    left = afar
    while left != 0:
        component, before = left & (~left + bit), np.uint64(0)
        if forced == afar:
            component = afar  # there is one smallest set, and nothing to tell apart
        while component != before:
            before = component
            for s in range(count):
                if holds[s] & component != 0:
                    component |= holds[s]
        left &= ~component
        covers = smallest_covers(holds[:count], component)
        weight = 1.0 / covers.shape[0]
        for level in range(levels + 1):
            each = size[level] if level < levels else 1
            start = length[level]
            for way in range(covers.shape[0]):
                for x in range(covers.shape[1]):
                    chosen[servers[covers[way, x]]] = True
                n = 0
                for j in range(token.shape[0]):
                    if (component >> np.uint64(j)) & bit == 0:
                        continue
                    e, number = token[j], 0
                    for c in range(num_copies[e]):
                        number += chosen[copies[e, c] // width]
                    for c in range(num_copies[e]):
                        if chosen[copies[e, c] // width]:
                            now[copies[e, c] // each] += 1.0 / number
                    for c in range(num_copies[e]):
                        u = copies[e, c] // each
                        if now[u] > 0.0:
                            if hit[u] == 0.0 and miss[u] == 1.0:
                                where[level, length[level]] = u
                                length[level] += 1
                            if level == levels:
                                hit[u] += weight * now[u]
                            else:
                                if miss[u] == 1.0:
                                    seen[n] = u
                                    n += 1
                                miss[u] *= max(0.0, 1.0 - now[u])
                            now[u] = 0.0
                for x in range(n):
                    hit[seen[x]] += weight * (1.0 - miss[seen[x]])
                    miss[seen[x]] = 1.0
                for x in range(covers.shape[1]):
                    chosen[servers[covers[way, x]]] = False
            for x in range(start, length[level]):
                chances[level, x] = hit[where[level, x]]
                hit[where[level, x]] = 0.0


@kernel
def held_once(holds):
    """The experts that one server alone holds, as a bit mask; `holds` (servers,) uint64 are such masks."""
    once, twice = np.uint64(0), np.uint64(0)
    for s in range(holds.shape[0]):
        twice |= once & holds[s]
        once |= holds[s]
    return once & ~twice


@kernel
def smallest_covers(holds, wanted):
    """All smallest sets of servers that together hold every wanted expert, each once: (sets, servers) indices.

    Servers that alone hold an expert are in every set. For the rest, ever larger sets are searched depth-first for
    the first expert not held yet; servers tried before at a node are shut below it.

    Parameters: holds (servers,) uint64, bit masks of experts; wanted uint64, of which each is held somewhere.
    """
    sole = held_once(holds) & wanted
    path = np.empty(holds.shape[0], np.int64)
    forced, rest = 0, wanted
    for s in range(holds.shape[0]):
        if holds[s] & sole != 0:
            path[forced] = s
            forced += 1
            rest &= ~holds[s]
    covers = np.empty((1, forced), np.int64)
    covers[0] = path[:forced]
    if rest == 0:
        return covers
    found, most = 0, forced
    left = np.empty(holds.shape[0] + 1, np.uint64)
    cursor = np.empty(holds.shape[0] + 1, np.int64)
    shut = np.full(holds.shape[0], -1, np.int64)
    while found == 0:
        most += 1
        covers = np.empty((4, most), np.int64)
        depth = forced
        left[depth], cursor[depth] = rest, 0
        while depth >= forced:
            first = left[depth] & (~left[depth] + np.uint64(1))
            s = cursor[depth]
            while s < holds.shape[0] and (holds[s] & first == 0 or shut[s] >= 0):
                s += 1
            if s == holds.shape[0]:
                for x in range(s):
                    if shut[x] == depth:
                        shut[x] = -1
                depth -= 1
                continue
            path[depth], shut[s], cursor[depth] = s, depth, s + 1
            open_ = left[depth] & ~holds[s]
            if open_ == 0:
                if found == covers.shape[0]:
                    covers = np.concatenate((covers, np.empty_like(covers)))
                covers[found] = path[:most]
                found += 1
            elif depth + 1 < most:
                depth += 1
                left[depth], cursor[depth] = open_, 0
    return covers[:found]


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
