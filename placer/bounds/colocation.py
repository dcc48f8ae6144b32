"""Which experts share a unit: a bound for units of any size, by moments of the partition.

Idea: let X_ef say whether experts e and f share a unit, and Y_efg whether e, f and g do. Three facts about them are
convex. (1) The experts of a token meet every unit in some subset, and the token touches as many units as there are such
subsets. So if prices on single experts, pairs and triples of the token sum to at most one within every subset, then the
prices of all that share a unit sum to at most the units touched. (2) For each e, the matrix (Y_efg)_fg is 1_u 1_u',
where u is e's unit: positive semidefinite, with a trace of at most `size`; where no slot is empty, its rows sum to
`size` times their entry for e. (3) Y >= 0. The least cost under all three is a semidefinite program without names of
units, hence without symmetry. It is solved by alternating directions: tokens and matrices each keep their own copy
of the moments, and the shared ones are weighted means. Above `LIFTED` items only X is kept, and (2) says
that X - 11'/units is positive semidefinite.

Complexity: an iteration takes `num_items` eigenvalue decompositions of that size, and some 50,000 additions for a token
of 8 experts: 0.2 s for 64 items and 13,000 distinct sets. A hundred iterations come within a few percent of the limit.
Of tokens with more than `WIDTH` experts the most loaded count.

Certificate: whole numbers, `UNIT` to a token. A checker sees that

1. within every nonempty subset of at most `size` experts of a set, the set's ``prices`` sum to at most `UNIT`; the
   ``monomials`` are bit masks of the columns of ``sets``;
2. ``slack[e]`` is symmetric, and at least 0 remains of each pair and triple when ``slack[e, f, g]``, for all e, f
   and g, is taken off what the prices of {e, f, g}, times the ``count`` of their sets, sum to;
3. ``slack[e] + tilt v v' + shift[e] I`` is positive semidefinite and ``tilt`` and ``shift`` at least 0, where v is
   1, less `size` at e; ``tilt`` is 0 unless all slots are full.

Then no partition costs less than ``rest``, the tokens of sets not listed, plus a `UNIT`th of this: what remains of the
single experts, less ``size sum(shift)``. Without triples there is one ``slack``, for pairs, v is 1, and ``sum(slack) /
units - (items - items / units) shift`` comes in place of the last term.

References: moments: Lasserre, 2001, doi:10.1137/S1052623400366802; alternating directions for semidefinite programs:
Wen, Goldfarb and Yin, 2010, doi:10.1007/s12532-010-0017-1; Cholesky as a proof: Rump, 2006,
doi:10.1007/s10543-006-0056-1.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.bounds import Floats, Ints, Partition, Proof, Tell
from placer.clock import Clock

LIFTED = 128  # items up to which triples are kept
WIDTH = 8  # experts of a token that count
SETS = 200_000  # distinct sets of tokens that count; of the others, one unit each
UNIT = 1 << 20  # whole units of price to a token
STIFFNESS = 0.5  # of a token's copy: price per difference of a moment
FIRMNESS = 0.005  # of a matrix's copy, for tokens that are 1 in total
RELAXED = 1.6  # how far copies are drawn towards the shared moments, and beyond
SWEEPS = 4  # over the subsets of a token, in one iteration
EVERY = 10  # iterations between bounds
PATIENCE = 20  # bounds in a row that may fail to rise by `RISE` of the cost
RISE = 1e-5


def suits(partition: Partition) -> bool:
    """Always."""
    return True


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """The unknowns: which experts share a unit, and where tokens and matrices find them.

    Parameters
    ----------
    place : (blocks, items, items) int32
        The moment that each entry of each matrix is.
    single : (items,) int64
        The moments that are 1.
    sets, width, count, at : (n, k, lanes), (n,), (n, lanes) int64 and (n, monomials, lanes) int32
        Experts of tokens, how many, tokens, and the moment of each monomial; lanes of one row have equally many.
    monomial, first, member, allowed : arrays
        Subsets of k experts, see `placer.search.colocation.advance_tokens`.
    across : (blocks, items) float64
        What each matrix is orthogonal to, of norm 1; 0 where slots stay empty.
    units, size : int
        Of the partition.
    rest : int
        Tokens that do not count otherwise.
    """

    place: npt.NDArray[np.int32]
    single: Ints
    sets: Ints
    width: Ints
    count: Ints
    at: npt.NDArray[np.int32]
    monomial: Ints
    first: npt.NDArray[np.uint32]
    member: npt.NDArray[np.uint32]
    allowed: npt.NDArray[np.bool_]
    across: Floats
    units: int
    size: int
    rest: int

    @classmethod
    def of(cls, partition: Partition) -> Moments:
        """The moments of a partition's tokens."""
        items, size, units = partition.num_items, partition.size, partition.units
        lifted = items <= LIFTED
        sets, count, rest = _trimmed(partition)
        k = sets.shape[1]
        subsets = [tuple(b for b in range(k) if s >> b & 1) for s in range(1 << k)]
        monomial = [s for s in range(1 << k) if 1 <= len(subsets[s]) <= 2 + lifted]
        member = [[q for q, r in enumerate(monomial) if r & ~s == 0] for s in range(1 << k)]
        expert = np.arange(items)
        if lifted:
            low, mid, high = np.sort(np.stack(np.broadcast_arrays(*np.ix_(expert, expert, expert))), axis=0)
            mid = np.where(low == mid, high, mid)  # {e, e, f} is {e, f, f}
            keys = (low * items + mid) * items + high
        else:
            keys = (np.minimum.outer(expert, expert) * items + np.maximum.outer(expert, expert))[None]
        place = np.unique(keys, return_inverse=True)[1].reshape(keys.shape).astype(np.int32)
        # A pair {a, b} of a token stands at [a, a, b].
        ends = np.array(
            [(x[0], x[-2] if len(x) > 1 else x[0], x[-1]) for x in (subsets[s] for s in monomial)]
        )
        known = np.maximum(sets, 0).swapaxes(1, 2)
        at = place[known[:, :, ends[:, 0]] if lifted else 0, known[:, :, ends[:, 1]], known[:, :, ends[:, 2]]]
        across = np.zeros((len(place), items))
        if items == units * size:
            across += 1.0
            if lifted:
                across[expert, expert] -= size
        across /= np.maximum(1.0, np.linalg.norm(across, axis=1, keepdims=True))
        return cls(
            place=place,
            single=place[expert if lifted else 0, expert, expert].astype(np.int64),
            sets=sets,
            width=(sets[:, :, 0] >= 0).sum(axis=1),
            count=count,
            at=np.ascontiguousarray(at.swapaxes(1, 2)),
            monomial=np.array(monomial),
            first=np.cumsum([0] + [len(row) for row in member]).astype(np.uint32),
            member=np.array([q for row in member for q in row], np.uint32),
            allowed=np.array([len(subset) <= size for subset in subsets]),
            across=across,
            units=units,
            size=size,
            rest=rest,
        )

    @property
    def lifted(self) -> bool:
        """Whether there are triples."""
        return len(self.place) > 1

    def certify(
        self, price: npt.NDArray[np.float32], slack: Floats, moment: Floats
    ) -> tuple[int, dict[str, Any]]:
        """The bound that prices of tokens and slacks of matrices prove, once rounded, and its certificate.

        What the prices say beyond the slacks goes to the slacks, except where a moment of 0 makes it worthless.
        """
        from placer.search.colocation import add_prices, round_prices

        prices = np.zeros(price.shape, np.int64)
        subsets = self.monomial, self.first, self.member, self.allowed
        round_prices(price, self.width, *subsets, UNIT, prices)
        remains = np.zeros(int(self.place.max()) + 1, np.int64)
        add_prices(prices, self.at, self.width, self.count, self.monomial, remains)
        whole = np.rint((slack + slack.transpose(0, 2, 1)) * (UNIT / 2)).astype(np.int64)
        np.subtract.at(remains, self.place.ravel(), whole.ravel())
        copies = np.bincount(self.place.ravel())
        lack = remains // copies
        lack[(lack > 0) & (moment <= 0.0)] = 0
        lack[self.single] = 0
        whole += lack[self.place]
        remains -= lack * copies
        items = len(self.single)
        tilt = 0
        if self.across.any():
            v = np.ones((len(whole), items), np.int64)
            if self.lifted:
                v[np.arange(items), np.arange(items)] -= self.size
            # Much more than the slacks, yet so little that its rounding costs less than a token.
            tilt = max(256 * int(np.abs(whole).max()), (1 << 50) // int((v[0] ** 2).sum()))
            shift = _shift(whole + tilt * v[:, :, None] * v[:, None, :])
        else:
            shift = _shift(whole)
        total = Fraction(int(remains[self.single].sum()))
        if self.lifted:
            total -= self.size * int(shift.sum())
        else:
            total += Fraction(int(whole.sum()), self.units)
            total -= int(shift.sum()) * (items - Fraction(items, self.units))
        real = self.count.ravel() > 0
        certificate = {
            "sets": _flat(self.sets)[real],
            "count": self.count[self.count > 0],
            "monomials": self.monomial,
            "prices": _flat(prices)[real],
            "slack": whole,
            "tilt": tilt,
            "shift": shift,
            "rest": self.rest,
        }
        return self.rest + math.ceil(total / UNIT), certificate


def prove(
    partition: Partition,
    incumbent: npt.NDArray[Any],
    *,
    clock: Clock,
    workers: int = 1,
    tell: Tell | None = None,
) -> Proof:
    """A bound by moments; the incumbent is not improved.

    Examples
    --------
    >>> sets = np.array([[0, 1, 2], [3, 4, 5], [0, 1, 3]], np.int16)
    >>> count = np.array([5, 4, 2])
    >>> load = np.array([7, 7, 5, 6, 4, 4])
    >>> partition = Partition(num_items=6, units=2, size=3, sets=sets, count=count, load=load)
    >>> prove(partition, np.array([0, 0, 0, 1, 1, 1]), clock=Clock.start()).bound
    13
    """
    best = np.asarray(incumbent, np.int64)
    known = partition.cost(best)
    moments = Moments.of(partition)
    solver = _Alternation(moments)
    bound, certificate = moments.certify(solver.price, solver.slack, solver.moment)  # by sizes alone
    patience = PATIENCE
    if tell is not None:
        tell(bound, known)
    with ThreadPoolExecutor(workers) as pool:
        while not clock.expired and known - bound > clock.gap * bound and patience:
            for _ in range(EVERY):
                solver.step(pool, workers)
                if clock.expired:
                    break
            found, proof = moments.certify(solver.price, solver.slack * solver.tokens, solver.moment)
            patience = PATIENCE if found - bound > RISE * known else patience - 1
            if found > bound:
                bound, certificate = found, proof
                if tell is not None:
                    tell(bound, known)
    return Proof(bound=bound, method="co-location moments", unit_of_item=best, certificate=certificate)


class _Alternation:
    """The copies of the moments, the prices of their differences, and what to do next.

    Weights of tokens are normalised to 1 in total, so that one step fits all traces.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        items = len(moments.single)
        n, k, lanes = moments.sets.shape
        self.tokens = float(max(1, moments.count.sum()))
        self.weight_of = moments.count / self.tokens
        full = np.minimum(moments.width, moments.size)
        self.price = np.zeros(moments.at.shape, np.float32)
        alone = np.flatnonzero(np.isin(moments.monomial, 1 << np.arange(k)))
        self.price[:, alone] = (1.0 / np.maximum(1, full))[:, None, None]
        self.weight = np.zeros((n, 1 << k, lanes), np.float32)
        self.slack = np.zeros(moments.place.shape)
        # As if items were spread at random.
        chance = max(0.0, (items / moments.units - 1) / max(1, items - 1))
        self.moment = np.full(int(moments.place.max()) + 1, chance * chance)
        expert = np.arange(items)
        self.moment[moments.place[expert if moments.lifted else 0, expert]] = chance
        self.moment[moments.single] = 1.0
        self.copy = self.moment[moments.place]
        self.copies = np.bincount(moments.place.ravel()).astype(np.float64)
        inside = moments.monomial < (1 << moments.width)[:, None]
        at = moments.at[inside].ravel()
        share = np.repeat(self.weight_of, inside.sum(axis=1), axis=0).ravel()
        self.users = np.bincount(at, share, len(self.copies))
        self.pull = -np.bincount(at, share * self.price[inside].ravel(), len(self.copies))
        self.stiffness = STIFFNESS
        self.firmness = FIRMNESS
        self.offset = 0.0 if moments.lifted else 1.0 / moments.units

    def step(self, pool: ThreadPoolExecutor, workers: int) -> None:
        """Shared moments from all copies, then each copy and its prices from them."""
        moments = self.moments
        push = (self.slack + self.firmness * self.copy).ravel()
        pull = self.pull + np.bincount(moments.place.ravel(), weights=push)
        self.moment = np.maximum(0.0, pull / (self.stiffness * self.users + self.firmness * self.copies))
        self.moment[moments.single] = 1.0
        parts = _parts(len(moments.sets), workers)
        pulls = [np.zeros_like(self.moment) for _ in parts]
        waiting = [pool.submit(self._matrices, part) for part in _parts(len(self.slack), workers)]
        waiting += [
            pool.submit(self._tokens, part, pull, SWEEPS) for part, pull in zip(parts, pulls, strict=True)
        ]
        for future in waiting:
            future.result()
        self.pull = np.sum(pulls, axis=0)

    def _matrices(self, part: slice) -> None:
        target = RELAXED * self.moment[self.moments.place[part]] + (1.0 - RELAXED) * self.copy[part]
        wanted = target - self.slack[part] / self.firmness - self.offset
        wanted = _orthogonal(wanted, self.moments.across[part])
        value, vector = np.linalg.eigh(wanted)
        vector *= np.sqrt(np.maximum(value, 0.0))[:, None, :]
        self.copy[part] = vector @ vector.transpose(0, 2, 1) + self.offset
        self.slack[part] += self.firmness * (self.copy[part] - target)

    def _tokens(self, part: slice, pull: npt.NDArray[Any], sweeps: int) -> None:
        from placer.search.colocation import advance_tokens

        moments = self.moments
        advance_tokens(
            moments.at[part],
            moments.width[part],
            self.weight_of[part],
            self.moment,
            self.price[part],
            self.weight[part],
            self.stiffness,
            RELAXED,
            moments.monomial,
            moments.first,
            moments.member,
            moments.allowed,
            sweeps,
            pull,
        )


def _shift(matrices: Ints) -> Ints:
    """What to add to the diagonal of each matrix so that it is certainly positive semidefinite.

    Where the Cholesky factor of a float64 matrix exists, its least eigenvalue is above ``-c trace`` with c about
    (n + 1) 2^-53, in whatever order sums are taken; rounding the matrix to float64 adds at most as much again.
    """
    exact = matrices.astype(np.float64)
    n = exact.shape[1]
    least = np.linalg.eigvalsh(exact)[:, 0]
    size = np.abs(np.trace(exact, axis1=1, axis2=2)) + n * np.maximum(0.0, -least)
    margin = 1.0 + np.ceil((n + 8) * 2.0**-51 * size)
    shift: Floats = np.maximum(0.0, np.ceil(2 * margin - least))
    while True:
        try:
            np.linalg.cholesky(exact + (shift - margin)[:, None, None] * np.eye(n))
        except np.linalg.LinAlgError:
            shift = 2 * shift + margin
        else:
            return shift.astype(np.int64)


def _orthogonal(matrices: Floats, across: Floats) -> Floats:
    """Symmetric matrices of which the direction `across`, of norm 1 or 0, is taken out on both sides."""
    along = np.einsum("bij,bj->bi", matrices, across)
    inner = np.einsum("bi,bi->b", along, across)
    along -= inner[:, None] / 2 * across
    out = along[:, :, None] * across[:, None, :]
    result: Floats = matrices - out - out.transpose(0, 2, 1)
    return (result + result.transpose(0, 2, 1)) / 2


def _parts(total: int, workers: int) -> list[slice]:
    ends = np.linspace(0, total, workers + 1).astype(int)
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def _trimmed(partition: Partition) -> tuple[Ints, Ints, int]:
    """The sets that count, (n, k, lanes), -1 last, their tokens, (n, lanes), and the tokens of the other sets.

    Rows are filled up with sets of no token.
    """
    from placer.search.colocation import LANES

    sets = np.asarray(partition.sets, np.int64)
    load = np.append(partition.load, -1)
    order = np.argsort(-load[sets], axis=1, kind="stable")[:, :WIDTH]
    sets = np.take_along_axis(sets, order, axis=1)
    width = (sets >= 0).sum(axis=1)
    count = np.where(width > 0, partition.count, 0)
    chosen = np.argsort(-count, kind="stable")[:SETS]
    rows, tokens = [], []
    for k in range(1, sets.shape[1] + 1):
        same = np.sort(chosen[(width[chosen] == k) & (count[chosen] > 0)])
        filled = np.append(same, np.repeat(same[-1:], -len(same) % LANES))
        held = np.where(np.arange(len(filled)) < len(same), count[filled], 0)
        rows.append(sets[filled].reshape(-1, LANES, sets.shape[1]).swapaxes(1, 2))
        tokens.append(held.reshape(-1, LANES).astype(np.int64))
    return np.concatenate(rows), np.concatenate(tokens), int(count.sum() - count[chosen].sum())


def _flat(lanes: Ints) -> Ints:
    """Rows of tokens side by side, (n, k, lanes), as one row for each."""
    rows: Ints = np.ascontiguousarray(lanes.swapaxes(1, 2)).reshape(-1, lanes.shape[1])
    return rows
