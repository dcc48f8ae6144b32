"""Compiled pricing: all contents of a unit that cost less than their experts' prices, by branch and bound."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel

#: Bounds are floating-point sums of a few dozen terms; a subtree is left only beyond this margin, as a fraction of all
#: that is summed up.
SLACK = 1e-12

#: Every six-bit number stands once in this cyclic word, so that shifting it by b shows b in its top six bits.
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
BIT = np.zeros(64, np.int64)
for _b in range(64):
    BIT[(int(DE_BRUIJN) << _b & 2**64 - 1) >> 58] = _b


@kernel
def keep_least(least, value):
    """Insert a value into the ascending array `least`, whose greatest is dropped."""
    q = least.shape[0] - 1
    if q < 0 or value >= least[q]:
        return
    while q > 0 and least[q - 1] > value:
        least[q] = least[q - 1]
        q -= 1
    least[q] = value


@kernel
def bound_children(pairs, candidates, room, need, price, value, limit, bounds, alone, line, slope, last):
    """For each candidate a lower bound on what a content that also holds it can cost, prices taken off.

    A content R of up to `room` candidates, at least `need` of them, touches as many more tokens as the sum over e in
    R of the sum over tokens of e of 1/c, where c counts the token's experts in R. Seen from e, the sum of c - 1 is
    the sum of the pair counts with the others in R, at most that of e's ``room - 1`` most frequent companions. For
    whole c and b, ``1/c >= (2 b + 1 - c) / (b (b + 1))``; with b from the mean of c this is all that the sum tells. So
    e's share is at least `line` less `slope` for each token of its pair counts, `alone` with its best companions. With
    e in R, e must be among the others' companions, and e's own line and theirs are least for the same R.

    Parameters: pairs (E, E) int32, tokens not touched yet with both, on the diagonal with one; candidates (n,) int64;
    value float, of what is chosen already; bounds out, the others working space, all (n,) float64. A candidate
    that a simpler bound rules out gets that one.
    """
    n = candidates.shape[0]
    others = room - 1
    top = np.empty(others)
    for i in range(n):
        e = candidates[i]
        top[:] = 0.0
        for j in range(n):
            both = -float(pairs[e, candidates[j]])
            if both < top[others - 1] and j != i:
                keep_least(top, both)
        own, mates = float(pairs[e, e]), -top.sum()
        b = min(1 + int(mates / own), others) if own > 0.0 else 1
        slope[i] = 1.0 / (b * (b + 1.0))
        line[i] = 2.0 * b * own * slope[i] - price[e]
        beyond = max(0.0, mates - own * others)  # c is at most `room`
        alone[i] = line[i] - slope[i] * (mates - beyond)
        last[i] = -top[others - 1] - beyond
    top[:] = np.inf
    for i in range(n):
        keep_least(top, alone[i])
    simple = value
    for q in range(others):
        if q < need - 1 or top[q] < 0.0:
            simple += top[q]
    for i in range(n):
        bounds[i] = simple + alone[i]  # the others may include the candidate itself: on the safe side
        if bounds[i] >= limit:
            continue
        e = candidates[i]
        top[:] = np.inf
        for j in range(n):
            both = float(pairs[e, candidates[j]])
            cost = alone[j] + slope[j] * max(0.0, last[j] - both) - slope[i] * both
            if cost < top[others - 1] and j != i:
                keep_least(top, cost)
        total = value + line[i]
        for q in range(others):
            if q < need - 1 or top[q] < 0.0:
                total += top[q]
        bounds[i] = max(bounds[i], total)


@kernel
def keep_feasible(candidates, load, held, room, need, low, high, bounds):
    """Set `bounds` to infinity for candidates with which no content's load can be in [low, high]."""
    n = candidates.shape[0]
    lightest = np.full(room, np.inf)
    heaviest = np.full(room, np.inf)
    for i in range(n):
        keep_least(lightest, load[candidates[i]])
        keep_least(heaviest, -load[candidates[i]])
    for i in range(n):
        own = load[candidates[i]]
        # The candidate itself may be among the extremes: leaving out the r-th is then still on the safe side.
        least = held + own
        for q in range(need - 1):
            least += lightest[q]
        most = held + own
        for q in range(room - 1):
            if heaviest[q] < np.inf:
                most -= heaviest[q]
        if least > high or most < low:
            bounds[i] = np.inf


@kernel
def gather(masks, count, size, chosen, keep, words, slots, stamp, generation, out_masks, out_count):
    """The first `size` tokens without expert `chosen`, reduced to the experts `keep`, equal ones added up.

    Tokens with fewer than two of them are left out: they no longer tell candidates apart. Returns how many tokens are
    left. `slots` and `stamp` are a hash table of a power of two; entries of other generations count as empty.
    """
    word, bit = chosen >> 6, np.uint64(1) << np.uint64(chosen & 63)
    wrap, one = np.uint64(slots.shape[0] - 1), np.uint64(1)
    n = 0
    for t in range(size):
        if masks[t, word] & bit:
            continue
        more = False
        any_held = False
        for x in range(words):
            kept = masks[t, x] & keep[x]
            out_masks[n, x] = kept
            more |= kept & (kept - one) != 0 or (any_held and kept != 0)
            any_held |= kept != 0
        if not more:
            continue
        code = np.uint64(0)
        for x in range(words):
            code = (code ^ out_masks[n, x]) * np.uint64(0x9E3779B97F4A7C15)
            code ^= code >> np.uint64(29)
        at = code & wrap
        same = False
        while stamp[at] == generation:
            same = True
            for x in range(words):
                same &= out_masks[slots[at], x] == out_masks[n, x]
            if same:
                break
            at = (at + np.uint64(1)) & wrap
        if same:
            out_count[slots[at]] += count[t]
        else:
            stamp[at], slots[at] = generation, n
            out_count[n] = count[t]
            n += 1
    return n


@kernel
def take(masks, count, size, chosen, words, table):
    """Take the tokens that use expert `chosen` off the counts of the pairs e <= f of experts that they use.

    `table` is (E * E,) int32: flat, and indexed by unsigned numbers, which cannot count from the end.
    """
    word, bit = chosen >> 6, np.uint64(1) << np.uint64(chosen & 63)
    one = np.uint64(1)
    side = np.uintp(np.sqrt(table.shape[0]))
    members = np.empty(64 * words, np.uintp)
    for t in range(size):
        if not masks[t, word] & bit:
            continue
        n = 0
        for x in range(words):
            kept = masks[t, x]
            while kept:
                lowest = kept & (~kept + one)
                members[n] = np.uintp(64 * x + BIT[lowest * DE_BRUIJN >> np.uint64(58)])
                n += 1
                kept ^= lowest
        tokens = count[t]
        for i in range(n):
            row = members[i] * side
            for j in range(i, n):
                table[row + members[j]] -= tokens


@kernel
def count_exchanges(masks, count, content, inside, costs):
    """Tokens that touch a content with member ``content[i]`` replaced by expert e, into ``costs[i, e]`` (n, E) int64.

    Parameters: masks (t, words) uint64, count (t,) int32, content (n,) int64, inside (words,) uint64 its mask.
    Entries of experts of the content itself mean nothing.
    """
    words = masks.shape[1]
    one = np.uint64(1)
    covered = 0
    costs[:] = 0
    place = np.zeros(costs.shape[1], np.int64)
    for i in range(content.shape[0]):
        place[content[i]] = i
    fresh, alone = np.zeros(costs.shape[1], np.int64), np.zeros(content.shape[0], np.int64)
    for t in range(masks.shape[0]):
        members, only = 0, 0
        for x in range(words):
            kept = masks[t, x] & inside[x]
            while kept:
                lowest = kept & (~kept + one)
                only = 64 * x + BIT[lowest * DE_BRUIJN >> np.uint64(58)]
                members += 1
                kept ^= lowest
        if members > 0:
            covered += count[t]
        if members > 1:
            continue
        i = place[only]
        if members == 1:
            alone[i] += count[t]
        for x in range(words):
            kept = masks[t, x]
            while kept:
                lowest = kept & (~kept + one)
                e = 64 * x + BIT[lowest * DE_BRUIJN >> np.uint64(58)]
                if members == 1:
                    costs[i, e] += count[t]
                else:
                    fresh[e] += count[t]
                kept ^= lowest
    for i in range(content.shape[0]):
        for e in range(costs.shape[1]):
            costs[i, e] += covered - alone[i] + fresh[e]


@kernel
def price_contents(
    order, size, least, masks, count, pairs, price, load, low, high, limit, rows, values, found, stop
):
    """All contents of ``order[0]`` and experts of ``order[1:]`` that cost less than `limit` above their prices.

    Depth-first branch and bound. A node holds the experts chosen, the candidates left, the number of tokens not yet
    touched that use each pair of candidates, and those tokens. Candidates whose bound reaches the limit are dropped
    until none is; the one with the least bound is tried first with, then without. The last two experts are read off
    the pair counts.

    Parameters
    ----------
    order : (n,) int64
    size, least : int
        Experts of a content, at most and at least.
    masks, count : (t, words) uint64 and (t,) int32
        Distinct expert sets, and tokens of each.
    pairs : (E, E) int32
        Tokens that use both experts, on the diagonal those that use one.
    price : (E,) float64
        Multiples of a small power of two, so that costs minus prices are exact.
    load, low, high : (E,) float64, float, float
        The load of a content is within low and high.
    limit : float
    rows, values : (room, size) int16 and (room,) float64, out
        The contents, -1 where one holds fewer experts, and their costs minus prices.
    found : (1,) int64, out
        Contents met; above ``room`` when some had no place in `rows`.
    stop : (1,) uint8
        Set to 1 from outside to end early.

    Returns
    -------
    What no such content goes below: the limit, or less where one did, or where the search ended early because of
    `stop` or because `rows` had no place left.
    """
    experts, words = price.shape[0], masks.shape[1]
    table = np.empty((size + 1, experts, experts), np.int32)
    left = np.empty((size + 1, experts), np.int64)
    many = np.zeros(size + 1, np.int64)
    chosen = np.empty(size, np.int64)
    value, heat = np.zeros(size + 1), np.zeros(size + 1)
    hope = np.full(
        size + 1, np.inf
    )  # no content below the node, and none its parent has yet to try, goes below
    sets = np.empty((size, masks.shape[0], words), np.uint64)
    weight = np.empty((size, masks.shape[0]), np.int32)
    tokens = np.full(size, -1, np.int64)  # -1: not gathered yet
    keep = np.empty(words, np.uint64)
    room = 4
    while room < 2 * masks.shape[0]:
        room *= 2
    slots, stamp, generation = np.empty(room, np.int32), np.zeros(room, np.int64), 0
    bounds, alone, line = np.empty(experts), np.empty(experts), np.empty(experts)
    slope, last = np.empty(experts), np.empty(experts)
    floor = limit
    total = np.abs(price).sum()
    for e in range(experts):
        total += pairs[e, e]
    slack = SLACK * total
    beyond = limit + slack

    a, depth = order[0], 0
    many[0] = order.shape[0] - 1
    left[0, : many[0]] = order[1:]
    table[0] = pairs
    hope[1] = -np.inf
    while True:
        # A child of the node at `depth`, which also holds expert a.
        child = depth + 1
        chosen[depth] = a
        value[child] = value[depth] + table[depth, a, a] - price[a]
        heat[child] = heat[depth] + load[a]
        many[child] = many[depth]
        for i in range(many[depth]):
            e = left[depth, i]
            left[child, i] = e
            for j in range(many[depth]):
                table[child, e, left[depth, j]] = table[depth, e, left[depth, j]]
        if depth == 0:
            take(masks, count, masks.shape[0], a, words, table[child].reshape(-1))
        else:
            take(sets[depth], weight[depth], tokens[depth], a, words, table[child].reshape(-1))
        for i in range(many[child]):
            e = left[child, i]
            for j in range(i):
                f = left[child, j]
                table[child, max(e, f), min(e, f)] = table[child, min(e, f), max(e, f)]
        if child < size:
            tokens[child] = -1
        depth = child
        most, need = size - depth, least - depth
        if need <= 0 and value[depth] < limit and low <= heat[depth] <= high:
            floor = min(floor, value[depth])
            if found[0] < rows.shape[0]:
                values[found[0]] = value[depth]
                rows[found[0]] = -1
                rows[found[0], :depth] = chosen[:depth]
            found[0] += 1
        if most <= 2:
            for i in range(many[depth] if most > 0 else 0):
                e = left[depth, i]
                with_e = value[depth] + table[depth, e, e] - price[e]
                hot = heat[depth] + load[e]
                if need <= 1 and with_e < limit and low <= hot <= high:
                    floor = min(floor, with_e)
                    if found[0] < rows.shape[0]:
                        values[found[0]] = with_e
                        rows[found[0]] = -1
                        rows[found[0], :depth] = chosen[:depth]
                        rows[found[0], depth] = e
                    found[0] += 1
                for j in range(i + 1 if most == 2 else many[depth], many[depth]):
                    f = left[depth, j]
                    with_both = with_e + table[depth, f, f] - price[f] - table[depth, e, f]
                    if with_both < limit and low <= hot + load[f] <= high:
                        floor = min(floor, with_both)
                        if found[0] < rows.shape[0]:
                            values[found[0]] = with_both
                            rows[found[0]] = -1
                            rows[found[0], :depth] = chosen[:depth]
                            rows[found[0], depth], rows[found[0], depth + 1] = e, f
                        found[0] += 1
            depth -= 1
        # The next expert to try, here or further up.
        a = -1
        while depth > 0 and a < 0:
            candidates = left[depth]
            most, need = size - depth, max(0, least - depth)
            n, before = many[depth], -1
            while n != before and n > 0:
                before = n
                bound_children(
                    table[depth],
                    candidates[:n],
                    most,
                    need,
                    price,
                    value[depth],
                    beyond,
                    bounds,
                    alone,
                    line,
                    slope,
                    last,
                )
                keep_feasible(candidates[:n], load, heat[depth], most, need, low, high, bounds)
                n = 0
                for i in range(before):
                    if bounds[i] < beyond:
                        candidates[n], bounds[n] = candidates[i], bounds[i]
                        n += 1
            many[depth] = n
            if n == 0:
                depth -= 1
                continue
            best = 0
            for i in range(1, n):
                if bounds[i] < bounds[best]:
                    best = i
            hope[depth + 1] = bounds[best] - slack
            a = candidates[best]
        if a < 0:
            return floor
        if stop[0] or found[0] > rows.shape[0]:
            for d in range(2, depth + 2):
                floor = min(floor, hope[d])
            return floor
        if tokens[depth] < 0:
            keep[:] = 0
            for i in range(many[depth]):
                e = left[depth, i]
                keep[e >> 6] |= np.uint64(1) << np.uint64(e & 63)
            generation += 1
            if depth == 1:
                tokens[1] = gather(
                    masks,
                    count,
                    masks.shape[0],
                    chosen[0],
                    keep,
                    words,
                    slots,
                    stamp,
                    generation,
                    sets[1],
                    weight[1],
                )
            else:
                tokens[depth] = gather(
                    sets[depth - 1],
                    weight[depth - 1],
                    tokens[depth - 1],
                    chosen[depth - 1],
                    keep,
                    words,
                    slots,
                    stamp,
                    generation,
                    sets[depth],
                    weight[depth],
                )
        many[depth] -= 1
        left[depth, best] = left[depth, many[depth]]
