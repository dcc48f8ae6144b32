"""Set partition by column generation: proofs for units of up to some ten items.

Idea: prices on items bound every partition. If each content costs at least its items' prices less some d, a partition
into N contents costs at least all prices less N d. The linear relaxation over known contents proposes prices,
`placer.search.pricing` finds every content that is cheaper than they say, or proves that there is none, and does
so for a coarse d first: it is fast, and holds when the clock stops. Once the prices are right, all contents that cost
less than the gap above their prices are listed; only those can be part of a better partition, and
`placer.master.cheapest` finds it, or proves that there is none. A load cap drops contents.

Complexity: exponential in the size of a unit at worst; seconds for 4 items of 128 or 8 of 32, a minute for 8 of 64.

Certificate: ``prices`` (items,), ``unit_price`` and ``floor``: no content costs less than its prices plus floor;
``bound = ceil(sum(prices) + units * (unit_price + floor))``. A better bound comes from ``contents`` and
``reach``: no other content costs less than its prices plus reach, and no partition into these contents alone costs less
than the bound.

References: see `placer.master`; the bound for any prices is Farley's, 1990, doi:10.1287/opre.38.5.922.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placer import master
from placer.bounds import Floats, Ints, Partition, Proof, Rows, Tell
from placer.clock import Clock
from placer.master import Prices
from placer.search import bit_masks

ALL = 50_000  # possible contents up to which all are in the relaxation from the start
POOL = 8_000  # contents of the first relaxation
NEAR = 4  # contents that a step of a descent adds at most
PER_ROOT = 400  # contents with the same first item that are returned while prices are still wrong
LISTED = 2_000_000  # contents listed at most
LEAST_FURTHER = 1.2  # times as far above their prices contents are listed, at least
SHORTEST = 64  # halvings of the radius in which prices may move, at most
RADIUS = 0.1  # of the mean price, by which prices may change in the first step
# Of what a step promises, contents may be so much cheaper than their prices all together: in late and early steps.
ACCEPTED, COARSE = 0.2, 0.5
FAR = 0.05  # of the cost: a step that promises more is early
ENOUGH = 0.25  # of the gap: when a step promises less, the gap has other reasons


def suits(partition: Partition) -> bool:
    """Whether units are small enough for the search, and the tokens countable in its tables."""
    return partition.size <= 10 and int(partition.count.sum()) < 2**31


@dataclass(frozen=True, kw_only=True, eq=False)
class Priced:
    """Contents that cost less than a limit above their prices.

    Parameters
    ----------
    rows, above : (n, size) int16 and (n,) float64
        Contents, and cost minus prices of each.
    floor : float
        No content costs less than its prices plus this.
    complete : bool
        Whether these are all below the limit.
    """

    rows: Rows
    above: Floats
    floor: float
    complete: bool


def prove(
    partition: Partition,
    incumbent: npt.NDArray[Any],
    *,
    clock: Clock,
    workers: int = 1,
    tell: Tell | None = None,
) -> Proof:
    """A bound by prices, and the optimum where the contents within the gap can be listed."""
    search = _Search(partition, incumbent, clock, workers, tell)
    search.close_in()
    search.finish()
    return search.proof()


class _Search:
    """The state of one proof: the best partition, the best bound, the contents known."""

    def __init__(
        self,
        partition: Partition,
        incumbent: npt.NDArray[Any],
        clock: Clock,
        workers: int,
        tell: Tell | None,
    ) -> None:
        self.partition, self.clock, self.workers, self.tell = partition, clock, workers, tell
        self.tables = Tables.of(partition)
        self.best = np.asarray(incumbent, np.int64)
        cost = partition.cost(self.best)
        self.known = float(cost) if partition.allows(self.best) else math.inf
        self.scale = float(cost)  # what tolerances are fractions of
        # Prices are rounded, and meet the relaxation's constraints up to a tolerance.
        self.blur = max(1e-6 * self.scale / partition.units, 8 * partition.size * master.GRAIN)
        self.bound = 0.0
        self.steady: Prices | None = None  # those of the best bound
        self.certificate: dict[str, Any] = {}
        every = math.comb(partition.num_items, partition.size)
        self.all_known = partition.least == partition.size and every <= ALL
        self.rows, self.cost = self._all_contents() if self.all_known else self._first_contents()

    @property
    def closed(self) -> bool:
        """Whether the bound is as good as asked for."""
        return math.ceil(self.bound) >= self.known * (1 - self.clock.gap)

    def proof(self) -> Proof:
        bound = math.ceil(min(self.bound, self.known))
        return Proof(
            bound=bound,
            method="set partition by column generation",
            unit_of_item=self.best,
            certificate=self.certificate,
        )

    def close_in(self) -> None:
        """Move the prices in steps, as far as the contents found on the way confirm what the step promises."""
        units = self.partition.units
        around = self.tables.shares(self.best)
        radius = math.inf if self.all_known else RADIUS * float(around.mean())
        shorter = 0  # steps that did not hold what they promised, as rounded prices of many tokens may
        while not self.closed and not self.clock.expired and shorter < SHORTEST:
            prices = self._relax(around, radius)
            promised = prices.total(units) - self.bound
            if promised < max(0.5, ENOUGH * (min(self.known, self.scale) - self.bound)):
                if not prices.at_border or radius > self.scale:
                    return  # what is left of the gap is not the prices' fault
                radius *= 4
                continue
            priced = self.tables.price(
                prices,
                min(-self._accepted(promised), -self.blur),
                PER_ROOT,
                self.workers,
                self.clock,
            )
            self._add(priced.rows, priced.above + prices.of(priced.rows), prices)
            before = self.bound
            self._raise_bound(prices, priced.floor)
            if self.bound - before >= promised / 4:
                around = prices.item
            else:
                radius, shorter = radius / 2, shorter + 1

    def _accepted(self, promised: float) -> float:
        """How much cheaper than its prices a content may be: a share of what is promised, or what is not asked for."""
        share = COARSE if promised > FAR * self.scale else ACCEPTED
        enough = self.known * (1 - self.clock.gap)
        if math.isfinite(enough):
            enough = math.ceil(enough)  # costs are whole, and a bound just below closes nothing
        return max(share * promised, self.bound + promised - enough) / self.partition.units

    def _relax(self, around: Floats, radius: float) -> Prices:
        """The relaxation's prices, once descents from the contents it uses find none that is cheaper by far."""
        partition = self.partition
        while True:
            prices = master.relax(
                self.rows, self.cost, partition.num_items, partition.units, around, radius, self.clock
            )
            promised = prices.total(partition.units) - self.bound
            if self.all_known:
                return prices
            limit = min(-self._accepted(promised), -self.blur)
            found = []
            for at in self._starts(prices):
                if self.clock.expired:
                    return prices
                found.append(self.tables.descend(self.rows[at], prices, limit))
            if not found:
                return prices
            rows = np.concatenate([rows for rows, _ in found])
            cost = np.concatenate([cost for _, cost in found])
            _, first = np.unique(rows, axis=0, return_index=True)
            if not self._add(rows[first], cost[first], prices):
                return prices

    def _starts(self, prices: Prices) -> Ints:
        """Contents to descend from: those that the relaxation uses, and each item's cheapest above its prices."""
        above = self.cost - prices.of(self.rows)
        order = np.argsort(-above, kind="stable")
        cheapest = np.empty(self.partition.num_items + 1, np.int64)
        cheapest[self.rows[order].ravel()] = np.repeat(order, self.rows.shape[1])  # the last one stays
        return np.unique(np.append(prices.used, cheapest[:-1]))

    def finish(self) -> None:
        """List contents further and further above their prices until the best partition must be among them."""
        units = self.partition.units
        if self.steady is None:
            return
        prices = self.steady
        floor = min(0.0, float(self.certificate["floor"]))
        reach = (min(self.known, 1.01 * self.scale) - self.bound) / 8
        reach = max(reach, 1.0)
        done, further = 0.0, 8.0
        while not self.closed and not self.clock.expired and reach < 64 * self.scale:
            reach = min(reach, self.known - prices.total(units) - (units - 1) * floor)
            priced = self.tables.price(prices, reach, LISTED // 8, self.workers, self.clock, whole=True)
            if not priced.complete:
                further = math.sqrt(further)
                if done == 0.0 or further < LEAST_FURTHER:
                    return
                reach = done * further
                continue
            choice = master.cheapest(
                priced.rows,
                priced.above + prices.of(priced.rows),
                self.partition.num_items,
                units,
                known=self.known,
                clock=self.clock,
            )
            if choice.chosen is not None:
                self.best = self.partition.units_of(priced.rows[choice.chosen])
                self.known = float(self.partition.cost(self.best))
            # A partition holds listed contents only, or one that costs at least `reach` above its prices.
            other = prices.total(units) + (units - 1) * floor + reach
            if min(choice.bound, other) > self.bound:
                self.bound = min(choice.bound, other)
                self.certificate |= {"contents": priced.rows, "reach": reach}
            self._tell()
            if choice.bound < choice.cost:
                return
            done = reach
            reach *= further

    def _raise_bound(self, prices: Prices, floor: float) -> None:
        bound = prices.total(self.partition.units) + self.partition.units * floor
        if self.steady is None or bound > self.bound:
            self.bound, self.steady = max(bound, 0.0), prices
            self.certificate = {"prices": prices.item, "unit_price": prices.unit, "floor": floor}
            self._tell()

    def _tell(self) -> None:
        if self.tell is not None and math.isfinite(self.bound):
            self.tell(math.ceil(self.bound), int(min(self.known, self.scale)))

    def _add(self, rows: Rows, cost: Floats, prices: Prices) -> bool:
        """Add the contents that are cheaper than their prices; whether there were any."""
        above = cost - prices.of(rows)
        wrong = np.argsort(above, kind="stable")[:POOL]  # more would only slow the relaxation down
        wrong = wrong[above[wrong] <= -self.blur]
        self.rows = np.concatenate([self.rows, rows[wrong]])
        self.cost = np.concatenate([self.cost, cost[wrong]])
        return len(wrong) > 0

    def _all_contents(self) -> tuple[Rows, Floats]:
        """The incumbent's contents and every other one within the cap, and what they cost."""
        partition = self.partition
        contents = partition.contents(self.best)
        free = Prices(item=np.zeros(partition.num_items), unit=0.0, used=np.arange(0), at_border=False)
        priced = self.tables.price(free, math.inf, ALL, self.workers, replace(self.clock, deadline=math.inf))
        return np.concatenate([contents, priced.rows]), np.append(self.tables.cost(contents), priced.above)

    def _first_contents(self) -> tuple[Rows, Floats]:
        """The incumbent's contents, and those one exchange away that cost least above what its items now cost."""
        contents = self.partition.contents(self.best)
        near = [self.tables.near(content) for content in contents]
        rows = _ascending(np.concatenate([rows for rows, _ in near]))
        cost = np.concatenate([cost for _, cost in near])
        above = cost - np.append(self.tables.shares(self.best), 0.0)[rows].sum(axis=1)
        least = np.argsort(above, kind="stable")[:POOL]
        return np.concatenate([contents, rows[least]]), np.append(self.tables.cost(contents), cost[least])


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """A partition as the compiled search wants it."""

    partition: Partition
    masks: npt.NDArray[np.uint64]
    count: npt.NDArray[np.int32]
    pairs: npt.NDArray[np.int32]
    uses: Any  # (items, n) scipy sparse: which item is in which set

    @classmethod
    def of(cls, partition: Partition) -> Tables:
        """Masks of the sets and pair counts."""
        from scipy.sparse import csr_array

        sets = partition.sets
        at, place = np.nonzero(sets >= 0)
        item = sets[at, place].astype(np.int64)
        uses = csr_array((np.ones(len(at)), (item, at)), shape=(partition.num_items, len(sets)))
        pairs = (uses * partition.count.astype(np.float64)) @ uses.T
        return cls(
            partition=partition,
            masks=bit_masks(sets, partition.num_items),
            count=partition.count.astype(np.int32),
            pairs=np.ascontiguousarray(pairs.toarray().astype(np.int32)),
            uses=uses,
        )

    def cost(self, contents: Rows) -> Floats:
        """Tokens that touch each content."""
        return np.array([self._covered(row[row >= 0]) @ self.partition.count for row in contents], np.float64)

    def near(self, content: npt.NDArray[Any]) -> tuple[Rows, Floats]:
        """The contents within the cap that hold one other item instead of one of theirs, and their costs."""
        from placer.search.pricing import count_exchanges

        partition = self.partition
        held = content[content >= 0].astype(np.int64)
        costs = np.empty((len(held), partition.num_items), np.int64)
        count_exchanges(self.masks, self.count, held, bit_masks(held[None], partition.num_items)[0], costs)
        heat = partition.load[held].sum() - partition.load[held][:, None] + partition.load
        fits = (heat <= partition.cap) & (heat >= partition.least_load)
        fits[:, held] = False
        out, into = np.nonzero(fits)
        rows = np.repeat(content[None], len(out), axis=0)
        rows[np.arange(len(out)), out] = into
        return rows, costs[out, into].astype(np.float64)

    def descend(self, content: npt.NDArray[Any], prices: Prices, limit: float) -> tuple[Rows, Floats]:
        """Contents that cost less than `limit` above their prices, met on the way down from a content."""
        found, costs = [np.zeros((0, len(content)), np.int16)], [np.zeros(0)]
        before = math.inf
        while True:
            rows, cost = self.near(content)
            above = cost - prices.of(rows)
            best = np.argsort(above, kind="stable")[:NEAR]
            if len(best) == 0 or above[best[0]] >= min(before, limit):
                return _ascending(np.concatenate(found)), np.concatenate(costs)
            cheap = best[above[best] < limit]
            found.append(rows[cheap])
            costs.append(cost[cheap])
            content, before = rows[best[0]], above[best[0]]

    def shares(self, unit_of_item: Ints) -> Floats:
        """What each item costs in a partition, when a touched unit's cost is shared by the token's items there."""
        partition = self.partition
        share = np.zeros(partition.num_items)
        for content in partition.contents(unit_of_item):
            held = content[content >= 0]
            together = self.uses[held].sum(axis=0)
            weight = np.divide(partition.count, together, out=np.zeros(len(together)), where=together > 0)
            share[held] = self.uses[held] @ weight
        return share

    def _covered(self, content: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        if len(content) == 0:
            return np.zeros(len(self.masks), bool)
        return np.asarray(self.uses[content].sum(axis=0) > 0)

    def price(
        self,
        prices: Prices,
        limit: float,
        room: int,
        workers: int,
        clock: Clock,
        *,
        whole: bool = False,
    ) -> Priced:
        """Contents that cost less than `limit` above their prices, up to `room` for each first item.

        A `whole` list is given up as soon as one item has more.
        """
        from placer.search.pricing import price_contents

        partition = self.partition
        items, size, least = partition.num_items, partition.size, partition.least
        order = np.argsort(-prices.item, kind="stable").astype(np.int64)
        stop = np.zeros(1, np.uint8)

        def part(first: int) -> tuple[Rows, Floats, float, bool]:
            if stop[0]:
                return np.zeros((0, size), np.int16), np.zeros(0), -math.inf, False
            rows = np.empty((max(PER_ROOT, room), size), np.int16)
            above, found = np.empty(len(rows)), np.zeros(1, np.int64)
            floor = price_contents(
                order[first:],
                size,
                least,
                self.masks,
                self.count,
                self.pairs,
                prices.item,
                partition.load.astype(np.float64),
                partition.least_load,
                float(partition.cap),
                limit + prices.unit,
                rows,
                above,
                found,
                stop,
            )
            kept = min(len(rows), int(found[0]))
            complete = not stop[0] and found[0] <= len(rows)
            if whole and not complete:
                stop[0] = 1
            return rows[:kept].copy(), above[:kept] - prices.unit, floor - prices.unit, complete

        firsts = range(items - max(least, 1) + 1)
        with ThreadPoolExecutor(workers) as pool:
            waiting = set(futures := [pool.submit(part, first) for first in firsts])
            while waiting:
                _, waiting = wait(waiting, timeout=0.1)
                if clock.expired:
                    stop[0] = 1
        parts = [future.result() for future in futures]
        rows = np.concatenate([p[0] for p in parts])
        above = np.concatenate([p[1] for p in parts])
        floor = min(p[2] for p in parts)
        if least == 0:  # units may stay empty, several of them
            floor = min(floor, -prices.unit)
            if -prices.unit < limit:
                rows = np.concatenate([rows, np.full((partition.units, size), -1, np.int16)])
                above = np.append(above, np.full(partition.units, -prices.unit))
        return Priced(rows=_ascending(rows), above=above, floor=floor, complete=all(p[3] for p in parts))


def _ascending(rows: Rows) -> Rows:
    """Items of contents in ascending order, -1 last."""
    last = np.iinfo(np.int16).max
    ordered = np.sort(np.where(rows < 0, last, rows), axis=1)
    return np.where(ordered == last, -1, ordered).astype(np.int16)
