"""Compiled steps of the co-location bound: what each token's experts may do, `LANES` tokens at a time.

A token of k experts meets a unit in a subset s of them, a bit mask. A monomial is a subset of one to three experts, and
the token's prices of the monomials within s sum to ``h(s)``. Tokens of equal k stand side by side in the last axis.
"""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel

LANES = 64  # fewer, and each sum waits for the one before


@kernel(fastmath=True)
def sum_around(weight, bits, table):
    """Of every subset, the sum of the weights of what contains it."""
    for s in range(1 << bits):
        for i in range(LANES):
            table[s, i] = weight[s, i]
    for b in range(bits):
        step = 1 << b
        for s in range(1 << bits):
            if s & step == 0:
                row, above = table[s], table[s + step]
                for i in range(LANES):
                    row[i] += above[i]


@kernel(fastmath=True)
def advance_tokens(
    at, width, share, x, price, weight, stiffness, relaxed, monomial, first, member, allowed, sweeps, pull
):
    """Per token, the weights of subsets that least cost and miss the shared moments, then new prices.

    The weights minimise ``sum(weight) + price (x - moments) + stiffness / 2 |x - moments|^2``, where ``moments`` of a
    monomial sums the weights of the subsets around it: coordinate descent, from where they were.

    Parameters
    ----------
    at : (groups, monomials, LANES) int32
        Where in `x` each monomial of a token is.
    width : (groups,) int64
        Experts of the tokens.
    share : (groups, LANES) float64
        How much a token counts.
    x : float64
        The shared moments.
    price, weight : (groups, monomials, LANES), (groups, subsets, LANES) float32
        Changed in place.
    relaxed : float
        How far to go from the old moments to the shared ones, 1 to 2.
    monomial : (monomials,) int64
        Their subsets, ascending.
    first, member : uint32
        The monomials within subset s are ``member[first[s]:first[s + 1]]``.
    allowed : (subsets,) bool
        Those that a unit can hold.
    pull : float64, like `x`
        The sums over tokens of ``share (stiffness moments - price)``; added to.
    """
    table = np.zeros((weight.shape[1], LANES), np.float32)
    target = np.zeros((len(monomial), LANES), np.float32)
    trial = np.zeros((len(monomial), LANES), np.float32)
    change = np.zeros(LANES, np.float32)
    firm, one, ahead = np.float32(stiffness), np.float32(1.0), np.float32(relaxed)
    for t in range(at.shape[0]):
        used = np.searchsorted(monomial, 1 << width[t])
        sum_around(weight[t], width[t], table)
        for q in range(used):
            for i in range(LANES):
                before = table[monomial[q], i]
                target[q, i] = before + ahead * (np.float32(x[at[t, q, i]]) - before)
                trial[q, i] = price[t, q, i] + firm * (target[q, i] - before)
        for _ in range(sweeps):
            for s in range(1, 1 << width[t]):
                if not allowed[s]:
                    continue
                mine = weight[t, s]
                change[:] = -one
                for q in range(first[s], first[s + 1]):
                    row = trial[member[q]]
                    for i in range(LANES):
                        change[i] += row[i]
                step = one / (firm * np.float32(first[s + 1] - first[s]))
                for i in range(LANES):
                    more = max(change[i] * step, -mine[i])
                    mine[i] += more
                    change[i] = firm * more
                for q in range(first[s], first[s + 1]):
                    row = trial[member[q]]
                    for i in range(LANES):
                        row[i] -= change[i]
        sum_around(weight[t], width[t], table)
        for q in range(used):
            for i in range(LANES):
                moment = table[monomial[q], i]
                price[t, q, i] += firm * (target[q, i] - moment)
                pull[at[t, q, i]] += share[t, i] * (firm * moment - price[t, q, i])


@kernel
def round_prices(price, width, monomial, first, member, allowed, unit, whole):
    """Scale prices until no subset that a unit can hold has more than one token's, and round down to whole units."""
    value = np.zeros(LANES)
    most = np.zeros(LANES)
    for t in range(price.shape[0]):
        most[:] = 1.0
        for s in range(1, 1 << width[t]):
            if allowed[s]:
                value[:] = 0.0
                for q in range(first[s], first[s + 1]):
                    row = price[t, member[q]]
                    for i in range(LANES):
                        value[i] += row[i]
                for i in range(LANES):
                    most[i] = max(most[i], value[i])
        for q in range(np.searchsorted(monomial, 1 << width[t])):
            for i in range(LANES):
                # One unit is more than all rounding of the sums above.
                whole[t, q, i] = np.int64(np.floor(price[t, q, i] / most[i] * (unit - 1)))


@kernel
def add_prices(whole, at, width, count, monomial, total):
    """Add the tokens' whole prices, each as often as the token comes, where their monomials are."""
    for t in range(whole.shape[0]):
        for q in range(np.searchsorted(monomial, 1 << width[t])):
            for i in range(LANES):
                total[at[t, q, i]] += count[t, i] * whole[t, q, i]
