"""An independent judge of bounds: re-verifies certificates and finds optima, and shares nothing with the project.

Everything is exact. Prices are multiples of 2**-16, so that costs less prices are whole numbers of that grain; what is
at least `floor` or `reach` is then at least the next whole number of grains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

GRAINS = 2**16

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Tokens that use items, and the units that the items are to be split over.

    `sets` (n, width) holds the items of each kind of token, -1 = none, `weight` (n,) how many there are of it.
    """

    num_items: int
    units: int
    size: int
    sets: npt.NDArray[Any]
    weight: npt.NDArray[Any]
    cap: float = math.inf

    @cached_property
    def uses(self) -> npt.NDArray[np.bool_]:
        """Which token uses which item, (n, num_items + 1); none uses the last."""
        table = np.zeros((len(self.sets), self.num_items + 1), bool)
        for row, items in zip(table, np.asarray(self.sets).tolist(), strict=True):
            row[[item for item in items if item >= 0]] = True
        return table

    @cached_property
    def load(self) -> Ints:
        """Tokens that use each item, and 0 for the one after the last."""
        load: Ints = np.asarray(self.weight, np.int64) @ self.uses
        return load

    def cost(self, rows: npt.NDArray[Any]) -> Ints:
        """Tokens that use an item of each row; those that use none are counted by halves of rows."""
        middle = rows.shape[1] // 2
        lefts, left = np.unique(rows[:, :middle], axis=0, return_inverse=True)
        rights, right = np.unique(rows[:, middle:], axis=0, return_inverse=True)
        avoid = [~self.uses[:, half].any(axis=2).T for half in (lefts, rights)]  # (halves, n)
        missed = (avoid[0] * np.asarray(self.weight, np.float64)) @ avoid[1].T.astype(
            np.float64
        )  # below 2**53
        touched: Ints = int(sum(self.weight)) - missed.astype(np.int64)[left.ravel(), right.ravel()]
        return touched

    @cached_property
    def contents(self) -> Ints:
        """Everything that one unit may hold while the others hold the rest, ``num_items`` for no item."""
        least = max(0, self.num_items - (self.units - 1) * self.size)
        rows = [
            combination + (self.num_items,) * (self.size - held)
            for held in range(least, self.size + 1)
            for combination in itertools.combinations(range(self.num_items), held)
        ]
        found = np.array(rows, np.int64).reshape(len(rows), self.size)
        load = self.load[found].sum(axis=1)
        most = int(self.load.sum()) if math.isinf(self.cap) else math.floor(self.cap)
        fits: Ints = found[(load <= most) & (load >= int(self.load.sum()) - (self.units - 1) * most)]
        return fits


def optimum(tokens: Tokens) -> int | None:
    """The fewest (token, unit) pairs in which the token uses an item of the unit; None when the cap is too low."""
    held = itertools.chain.from_iterable(
        itertools.combinations(range(tokens.num_items), held) for held in range(tokens.size + 1)
    )
    rows = np.array([row + (tokens.num_items,) * (tokens.size - len(row)) for row in held])
    rows = rows[tokens.load[rows].sum(axis=1) <= tokens.cap]
    costs = dict(zip(masks(rows, tokens.num_items), tokens.cost(rows).tolist(), strict=True))
    return cover(costs, (1 << tokens.num_items) - 1, tokens.units)


def masks(rows: npt.NDArray[Any], num_items: int) -> list[int]:
    """Contents as bit masks."""
    return [sum(1 << item for item in row if 0 <= item < num_items) for row in rows.tolist()]


def cover(costs: Mapping[int, int], everything: int, units: int, below: float = math.inf) -> int | None:
    """The least sum of costs of `units` contents that hold every item once; None when none is under `below`.

    The next content holds the lowest item that is left; empty ones, if listed, come last.
    """
    by_lowest: dict[int, list[tuple[int, int]]] = {}
    for content, cost in costs.items():
        by_lowest.setdefault(content & -content, []).append((content, cost))
    least = min(costs.values(), default=0)
    best: float = math.inf
    states = {0: 0}
    for left in range(units, -1, -1):
        if everything in states and (left == 0 or 0 in costs):
            best = min(best, states[everything] + left * costs.get(0, 0))
        after: dict[int, int] = {}
        for held, value in states.items():
            free = everything & ~held
            for content, cost in by_lowest.get(free & -free, ()) if free and left else ():
                total = value + cost
                if content & held or total + (left - 1) * least >= below:
                    continue
                if total < after.get(content | held, math.inf):
                    after[content | held] = total
        states = after
    return int(best) if best < below else None


def complaints(tokens: Tokens, certificate: Mapping[str, Any], bound: int) -> list[str]:
    """What is wrong with a certificate of a bound; nothing when it proves it."""
    price, unit_price = _grains(certificate["prices"]), int(_grains(certificate["unit_price"]))
    if price.shape != (tokens.num_items,):
        return [f"prices: found shape {price.shape}, expected {tokens.num_items}"]
    if certificate["floor"] == -math.inf:
        return [] if bound <= 0 else ["the floor is minus infinity"]
    rows = tokens.contents
    above = tokens.cost(rows) * GRAINS - np.append(price, 0)[rows].sum(axis=1) - unit_price
    total = int(price.sum()) + tokens.units * unit_price
    floor = _at_least(certificate["floor"])
    found = []
    if (above < floor).any():
        found.append(f"{(above < floor).sum()} contents cost less than their prices and the floor")
    proved = max(0, total + tokens.units * floor)  # no cost is negative
    if "contents" in certificate:
        reach = _at_least(certificate["reach"])
        listed = np.asarray(certificate["contents"], np.int64)
        listed = np.where(listed < 0, tokens.num_items, listed)
        inside = masks(listed, tokens.num_items)
        missing = {*masks(rows[above < reach], tokens.num_items)} - {*inside}
        if missing:
            found.append(f"{len(missing)} contents within reach of their prices are not listed")
        excess = tokens.cost(listed) * GRAINS - np.append(price, 0)[listed].sum(axis=1) - unit_price
        costs = dict(zip(inside, excess.tolist(), strict=True))
        everything = (1 << tokens.num_items) - 1
        cheapest = cover(costs, everything, tokens.units, below=bound * GRAINS - total)
        if cheapest is not None:
            cost = (total + cheapest) // GRAINS
            found.append(f"listed contents make a partition that costs {cost}, the bound is {bound}")
        # What holds one content that is not listed costs as much at least.
        proved = max(proved, total + (tokens.units - 1) * min(0, floor) + reach)
    if -(-proved // GRAINS) < bound:
        found.append(f"what is certified proves {-(-proved // GRAINS)}, the bound is {bound}")
    return found


def _grains(value: Any) -> Ints:
    """Multiples of the grain, as whole numbers."""
    scaled = np.asarray(value, np.float64) * GRAINS
    whole = scaled.astype(np.int64)
    if (whole != scaled).any():
        raise ValueError("prices: expected multiples of 2**-16")
    return whole


def _at_least(value: Any) -> int:
    """The least whole number of grains that is not below."""
    return math.ceil(Fraction(float(value)) * GRAINS)
