"""Rules: where the occupants of one layer may stand, and which of them may not share a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import NoPlacement

Positions = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Apart = tuple[tuple[int, ...], int]  # experts, and the slots of a unit that no two of them may share

EFFORT = 30.0  # deterministic seconds of CP-SAT for one arrangement
REPAIRS = 20  # swaps of a repair, for each position


@dataclass(frozen=True, kw_only=True, eq=False)
class Rules:
    """What an arrangement of one layer has to keep, in positions and occupants (see `placer.layer.Layer`).

    Parameters
    ----------
    num_experts : int
    low, high : (num_slots,) int32
        Occupant e may stand on the positions ``low[e] <= p < high[e]``.
    shut : (num_slots,) bool
        Positions on which no expert may stand, the last ones of their rank.
    apart : sequence of (experts, slots)
        Experts no two of which may stand in the same unit of so many slots.
    start : (num_slots,) int32
        An occupant array that keeps all of this.

    Examples
    --------
    Four experts on two GPUs of two slots: 0 stands on the second, and 1 on the other one than 2.

    >>> low, high = np.array([2, 0, 0, 0], np.int32), np.array([4, 4, 4, 4], np.int32)
    >>> where = {"num_experts": 4, "low": low, "high": high, "shut": np.zeros(4, bool), "apart": [((1, 2), 2)]}
    >>> rules = Rules(**where, start=feasible(**where, slots_per_rank=2))
    >>> rules.keeps(rules.start), rules.keeps(np.array([1, 2, 0, 3]))
    (True, False)
    """

    num_experts: int
    low: Positions
    high: Positions
    shut: Mask
    apart: Sequence[Apart]
    start: Positions

    @cached_property
    def compiled(self) -> tuple[Any, ...]:
        """The same for kernels: experts, low, high, shut, and the partners of each occupant as CSR with their spans."""
        span: dict[tuple[int, int], int] = {}
        for experts, slots in self.apart:
            for one in experts:
                for other in experts:
                    if one != other:
                        span[one, other] = max(slots, span.get((one, other), 0))
        pairs = np.array(sorted(span), np.int32).reshape(-1, 2)
        first = np.searchsorted(pairs[:, 0], np.arange(len(self.low) + 1)).astype(np.int64)
        spans = np.array([span[key] for key in sorted(span)], np.int32)
        return self.num_experts, self.low, self.high, self.shut, first, pairs[:, 1].copy(), spans

    def keeps(self, slots: Positions) -> bool:
        """Whether a slot array keeps the rules, all copies of an expert included; or an occupant array."""
        at = np.flatnonzero((slots >= 0) & (slots < self.num_experts))
        held = slots[at]
        if ((at < self.low[held]) | (at >= self.high[held]) | self.shut[at]).any():
            return False
        for experts, size in self.apart:
            chosen = np.isin(held, experts)
            stands = np.unique(np.stack([at[chosen] // size, held[chosen]]), axis=1)
            if len(np.unique(stands[0])) < stands.shape[1]:
                return False
        return True

    def repaired(self, occupant: Positions, rng: np.random.Generator) -> Positions:
        """An occupant array that keeps the rules, few swaps away from the one given; `start` where none is found."""
        from placer.search.rules import repaired

        draws = rng.random((REPAIRS * len(occupant), 2))
        found, kept = repaired(occupant.astype(np.int32), self.compiled, draws)
        return found if kept else self.start

    def share_open(self, size: int) -> float:
        """Share of the units of so many slots in which experts may stand."""
        return float((~self.shut.reshape(-1, size).all(axis=1)).mean())


def feasible(
    *,
    num_experts: int,
    low: Positions,
    high: Positions,
    shut: Mask,
    apart: Sequence[Apart],
    slots_per_rank: int,
) -> Positions | None:
    """An occupant array that keeps the rules; None where there is none.

    Ranges are nested or disjoint, so experts are best seated by range, the smallest first. With experts to keep
    apart, CP-SAT first gives a rank to all that a rule names.

    Raises
    ------
    NoPlacement
        When neither an arrangement nor a proof that there is none was found.
    """
    low, high = low.copy(), high.copy()
    if apart:
        ranks = _ranks_of_named(num_experts, low, high, shut, apart, slots_per_rank)
        if ranks is None:
            return None
        for expert, rank in ranks.items():
            low[expert], high[expert] = rank * slots_per_rank, (rank + 1) * slots_per_rank
    occupant = np.full(len(low), -1, np.int32)
    for expert in np.argsort((high - low)[:num_experts], kind="stable").tolist():
        seats = np.flatnonzero((occupant < 0) & ~shut)
        seats = seats[(seats >= low[expert]) & (seats < high[expert])]
        if len(seats) == 0:
            return None
        occupant[seats[0]] = expert
    occupant[occupant < 0] = np.arange(num_experts, len(occupant))
    return occupant


def _ranks_of_named(
    num_experts: int, low: Positions, high: Positions, shut: Mask, apart: Sequence[Apart], slots_per_rank: int
) -> dict[int, int] | None:
    """A rank for every expert that a rule names, so that all rules are kept; None where that cannot be."""
    from ortools.sat.python import cp_model

    pinned = np.flatnonzero((high - low)[:num_experts] < len(low)).tolist()
    named = sorted({*pinned, *(expert for experts, _ in apart for expert in experts)})
    room = (~shut).reshape(-1, slots_per_rank).sum(axis=1).tolist()
    model = cp_model.CpModel()
    on = {}
    for expert in named:
        for rank in range(low[expert] // slots_per_rank, high[expert] // slots_per_rank):
            on[expert, rank] = model.new_bool_var("")
        model.add_exactly_one(on[expert, rank] for rank in range(len(room)) if (expert, rank) in on)
    for rank, most in enumerate(room):
        model.add(sum(on[expert, rank] for expert in named if (expert, rank) in on) <= most)
    for experts, slots in apart:
        width = slots // slots_per_rank
        for first in range(0, len(room), width):
            inside = range(first, first + width)
            model.add_at_most_one(on[e, rank] for e in experts for rank in inside if (e, rank) in on)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = EFFORT
    solver.parameters.catch_sigint_signal = False
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise NoPlacement(
            "constraints: found neither an arrangement that keeps them nor a proof that none does"
        )
    return {expert: rank for (expert, rank), var in on.items() if solver.boolean_value(var)}
