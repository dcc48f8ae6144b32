"""Compiled covers: the fewest servers that hold all of a token's experts, and which of their copies are picked."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel


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
