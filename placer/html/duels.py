"""Duels: methods against each other, layer by layer and seed by seed, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.comparison import BASELINE, Comparison, Row

EQUAL = 1e-3  # relative difference up to which a layer is a tie
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method under one cap with so many spare slots, over its seeds.

    Parameters
    ----------
    rows : tuple of Row
        One for each seed.
    level : str
        The level that decides.
    """

    rows: tuple[Row, ...]
    level: str

    @property
    def name(self) -> str:
        """Method, cap and spare slots in words."""
        row = self.rows[0]
        words = [row.method]
        if row.keeps_caps:
            words.append("no cap" if row.max_load is None else f"cap {row.max_load:g}")
        if row.redundant:
            words.append(f"redundant {row.redundant}")
        return ", ".join(words)

    def traffic(self, seed: int) -> npt.NDArray[np.float64]:
        """Held-out remote units of every layer, of a seed or of the first where it was not run."""
        row = next((row for row in self.rows if row.seed == seed), self.rows[0])
        return np.array(row.held_out.per_layer["remote"][self.level], np.float64)


@dataclass(frozen=True, kw_only=True)
class Duel:
    """What one entry did against another.

    Parameters
    ----------
    wins, ties, losses : int
        Layers, over all seeds, with fewer, as many (up to 0.1 %), and more held-out remote units.
    change : float or None
        Relative change of their sum; None where the other has none.
    low, high : float or None
        95 % interval of `change`: bootstrap over pairs of layer and seed (Efron 1979, doi:10.1214/aos/1176344552);
        None with a single pair.
    """

    wins: int
    ties: int
    losses: int
    change: float | None
    low: float | None
    high: float | None


def entries(comparison: Comparison) -> list[Entry]:
    """Rows put together by method, spare slots and cap, in the order they were run."""
    groups: dict[tuple[str, int, float | None], list[Row]] = {}
    for row in comparison.rows:
        groups.setdefault((row.method, row.redundant, row.max_load), []).append(row)
    return [Entry(rows=tuple(rows), level=comparison.level) for rows in groups.values()]


def baseline(every: Sequence[Entry], entry: Entry) -> Entry:
    """The entry of `linear` with as many spare slots."""
    usual = [each for each in every if each.rows[0].method == BASELINE]
    same = [each for each in usual if each.rows[0].redundant == entry.rows[0].redundant]
    return (same or usual)[0]


def duel(entry: Entry, other: Entry) -> Duel:
    """Compare two entries on the same tokens.

    Where one method was run with fewer seeds, its first run stands for the others.
    """
    seeds = sorted({row.seed for row in (*entry.rows, *other.rows)})
    ours, theirs = (np.concatenate([each.traffic(seed) for seed in seeds]) for each in (entry, other))
    least = EQUAL * np.maximum(ours, theirs)
    wins, losses = int((ours < theirs - least).sum()), int((ours > theirs + least).sum())
    total = float(theirs.sum())
    low, high = _interval(ours, theirs)
    return Duel(
        wins=wins,
        ties=len(ours) - wins - losses,
        losses=losses,
        change=float(ours.sum()) / total - 1.0 if total else None,
        low=low,
        high=high,
    )


def _interval(
    ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]
) -> tuple[float, float] | tuple[None, None]:
    if len(ours) < 2 or not theirs.all():
        return None, None
    picks = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
    changes = ours[picks].sum(axis=1) / theirs[picks].sum(axis=1) - 1.0
    low, high = np.quantile(changes, (0.025, 0.975))
    return float(low), float(high)


def all_duels(every: Sequence[Entry]) -> Iterator[list[Duel | None]]:
    """A row for each entry of what it did against each; None against itself."""
    for entry in every:
        yield [None if entry is other else duel(entry, other) for other in every]
