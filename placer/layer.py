"""Layer: everything a method needs to place the experts of one layer.

Layers are independent when tokens return home after each of them and slots are given per layer, so a whole
model is solved layer by layer, in parallel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.batches import activations, uses_by_step
from placer.errors import InvalidInput
from placer.incidence import Incidence, Targets, incidence, shared_load, targets
from placer.rules import Rules
from placer.speeds import unit_speeds

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Occupant = npt.NDArray[np.int32]
Experts = npt.NDArray[np.signedinteger]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer of a problem.

    Methods arrange experts on *positions*: position p is slot p, experts ``num_experts`` and up are
    placeholders for empty slots, and an *occupant* array says which expert stands on each position.

    Parameters
    ----------
    index : int
        Layer number within the problem.
    num_experts, num_ranks, slots_per_rank : int
        Logical experts, GPUs, slots of one GPU.
    unit_ranks : (num_levels,) tuple of int
        GPUs in one unit of each level (gpu, server, rack, ...), inside out.
    seconds : (num_levels,) tuple of float
        Link seconds of every remote unit that a token touches, per level: what the search minimises.
    server_ranks : int
        GPUs of one server.
    rule : str
        Dispatch rule that scores copies.
    max_load : float or None
        Largest load of a unit over the mean, before the margin; None for no cap.
    margin : float
        How much the cap is tightened inside the search.
    load : (num_experts,) int64
        Tokens that use each expert: what costs count.
    activations : (num_experts,) int64, optional
        Steps in which each expert is used, where caps are to count these (see `heat`).
    pair_counts : (num_experts, num_experts) int64, optional
        Tokens that use both experts, where they are already counted.
    topk : (num_tokens, top_k) int16 or int32, optional
        Experts of each token, -1 = none; None when only counts are known.
    key : (num_tokens,) uint64, optional
        Sequence key of each token (see `placer.traffic.Routes`), for splits.
    step : (num_tokens,) integer, optional
        Engine step of each token.
    num_groups : int
        Gate groups of consecutive experts.
    speeds : tuple of float
        Speed of each GPU; empty where all are alike. Units are alike no longer then.
    copies : bool
        Whether spare slots are to hold copies: these can share a hot expert's load, so that caps need be raised less.
    rules : Rules or None
        Where experts may stand; None for anywhere. Units are then no longer alike.
    """

    index: int
    num_experts: int
    num_ranks: int
    slots_per_rank: int
    unit_ranks: tuple[int, ...]
    seconds: tuple[float, ...]
    server_ranks: int
    rule: str
    max_load: float | None
    margin: float
    load: Ints
    activations: Ints | None = None
    pair_counts: Ints | None = None
    topk: Experts | None = None
    key: npt.NDArray[np.uint64] | None = None
    step: npt.NDArray[np.integer] | None = None
    num_groups: int = 1
    speeds: tuple[float, ...] = ()
    copies: bool = False
    rules: Rules | None = None

    @property
    def num_slots(self) -> int:
        """Slots over all ranks."""
        return self.num_ranks * self.slots_per_rank

    @cached_property
    def unit_slots(self) -> tuple[int, ...]:
        """Slots in one unit of each level."""
        return tuple(ranks * self.slots_per_rank for ranks in self.unit_ranks)

    @cached_property
    def unit_cost(self) -> Floats:
        """Seconds for every unit that a token touches, per level: it is remote with chance 1 - 1/N."""
        return np.array(self.seconds) * (1.0 - np.array(self.unit_ranks) / self.num_ranks)

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Levels at which swaps matter: several units of more than one slot; one of those of equal size."""
        sizes = self.unit_slots
        return tuple(i for i, size in enumerate(sizes) if 1 < size < self.num_slots and size not in sizes[:i])

    @cached_property
    def sizes(self) -> Ints:
        """Slots per unit of the `levels`, inside out."""
        return np.array([self.unit_slots[i] for i in self.levels], np.int64)

    @cached_property
    def _cost_of_size(self) -> Floats:
        """`unit_cost` of the `levels`, those of levels of equal size added up."""
        return np.array([self.unit_cost[np.array(self.unit_slots) == size].sum() for size in self.sizes])

    @cached_property
    def weights_of_levels(self) -> Floats:
        """What a touched unit of each of the `levels` costs, the dearest scaled to 1."""
        return self._cost_of_size / self.scale

    @cached_property
    def scale(self) -> float:
        """Seconds of the dearest of the `levels`: one unit of a weighted sum of touched units."""
        return max(self._cost_of_size.tolist(), default=0.0) or 1.0

    def cost_of(self, weighted: float) -> float:
        """Seconds of all tokens for a sum of touched units weighted by `weights_of_levels`.

        Levels of one slot a unit are added: there, every choice is a unit of its own.
        """
        single = [level for level, slots in enumerate(self.unit_slots) if slots == 1]
        return weighted * self.scale + float(self.unit_cost[single].sum()) * float(self.load.sum())

    # -- the tokens ------------------------------------------------------------------------------------

    @cached_property
    def distinct(self) -> tuple[Experts, Ints]:
        """Distinct expert sets, (n, top_k) with -1 first, and the tokens of each, (n,) int64.

        Tokens that dropped all their choices are left out.
        """
        if self.topk is None:
            raise InvalidInput(f"layer {self.index}: found counts only, expected the experts of every token")
        ids = np.sort(self.topk, axis=1)
        width = ids.shape[1]
        bits = int(self.num_experts).bit_length()
        if bits * width <= 64:
            code = np.zeros(len(ids), np.uint64)
            for column in ids.T:
                code = (code << np.uint64(bits)) | (column + 1).astype(np.uint64)
            _, first, count = np.unique(code, return_index=True, return_counts=True)
            ids, count = ids[first], count.astype(np.int64)
        else:
            count = np.ones(len(ids), np.int64)
        used = ids[:, -1] >= 0
        return np.ascontiguousarray(ids[used]), count[used]

    @cached_property
    def uses(self) -> tuple[Ints, npt.NDArray[np.int32]]:
        """The distinct sets that hold each position's expert, as CSR: (num_slots + 1,) starts and rows."""
        sets = self.distinct[0]
        flat = sets.ravel()
        order = np.argsort(flat, kind="stable")
        start = np.searchsorted(flat[order], np.arange(self.num_slots + 1)).astype(np.int64)
        return start, (order // max(1, sets.shape[1])).astype(np.int32)

    @cached_property
    def pairs(self) -> Ints:
        """Tokens that use both experts, (num_slots, num_slots) int64, symmetric, zero for placeholders."""
        if self.pair_counts is not None:
            spare = self.num_slots - self.num_experts
            return np.pad(self.pair_counts, ((0, spare), (0, spare)))
        from placer.search.counting import count_pairs

        tokens = self.tokens
        table = np.zeros((self.num_slots, self.num_slots), np.uint32)
        count_pairs(tokens, (0,) * tokens.shape[1], table.reshape(-1))
        return table.astype(np.int64) + table.T

    @property
    def heat(self) -> Ints:
        """Load of each expert as caps count it, (num_experts,) int64: tokens, or `activations` where given."""
        return self.load if self.activations is None else self.activations

    @cached_property
    def expert_load(self) -> Floats:
        """`heat` followed by zeros for the placeholders, (num_slots,) float64."""
        return np.pad(self.heat.astype(np.float64), (0, self.num_slots - self.num_experts))

    def split(self) -> tuple[Layer, Layer]:
        """Two halves by sequence, each a layer of its own with its own caps and no margin.

        Tokens of a single sequence are split into alternating sixteenths instead.
        """
        if self.topk is None or self.key is None:
            raise InvalidInput(f"layer {self.index}: found counts only, a split needs the tokens")
        keys = np.unique(self.key)
        if len(keys) == 1:
            first = np.arange(len(self.key)) * min(16, len(self.key)) // len(self.key) % 2 == 0
        else:
            first = self.key <= keys[(len(keys) - 1) // 2]
        return self._part(first), self._part(~first)

    def sample(self, sets: int) -> Layer:
        """This layer through every n-th of its tokens, with about `sets` to twice as many distinct expert sets.

        All sequences are represented; a layer of fewer sets is returned as it is. Activations stay those of all
        tokens, since they do not shrink in proportion.
        """
        stride = len(self.distinct[0]) // sets
        if stride <= 1:
            return self
        keep = np.zeros(len(self.tokens), bool)
        keep[::stride] = True
        return replace(self._part(keep), margin=self.margin, activations=self.activations)

    def _part(self, keep: npt.NDArray[np.bool_]) -> Layer:
        key = None if self.key is None else self.key[keep]
        step = None if self.step is None else self.step[keep]
        topk = self.tokens[keep]
        load = np.bincount(topk[topk >= 0], minlength=self.num_experts).astype(np.int64)
        active = None
        if self.activations is not None and step is not None:
            active = activations(uses_by_step(topk, step, self.num_experts))
        return replace(
            self,
            topk=topk,
            key=key,
            step=step,
            load=load,
            activations=active,
            pair_counts=None,
            margin=0.0,
        )

    # -- judging an arrangement --------------------------------------------------------------------------

    def score(self, slots: Occupant, table: Occupant | None = None) -> tuple[float, float]:
        """(load above the caps, seconds of all tokens) of a slot array, copies included: least is best.

        `table` is that of the dispatch rule "table". With counts only, the load is `expected_load` and the
        seconds are 0.
        """
        return self.judge(slots, table)[:2]

    def judge(self, slots: Occupant, table: Occupant | None = None) -> tuple[float, float, float]:
        """`score`, and load over mean of the busiest unit at the worst level that placement can change, or 1."""
        if self.topk is None:
            seconds, load = 0.0, self.expected_load(slots)
        else:
            counts = self.counts(slots, table)
            seconds = float(counts.remote.sum(axis=1) @ np.array(self.seconds))
            load = counts.load if self.activations is None else self.expected_load(slots)
        loads = self._rows(load)
        swappable = [(loads[level], self.unit_speeds(level)) for level in self.levels if loads[level].any()]
        peak = max((float((load / speed).max() / load.mean()) for load, speed in swappable), default=1.0)
        return round(self.above_caps(load), 6), seconds, peak

    def above_caps(self, load: Floats) -> float:
        """Load above the caps, summed over units and levels, of the loads of units, (num_levels, num_ranks)."""
        rows = enumerate(self._rows(load))
        return sum(float(np.maximum(row - (self.caps[i] - self.idle(i)), 0.0).sum()) for i, row in rows)

    def _rows(self, load: Floats) -> list[Floats]:
        """A row of each level, as long as it has units."""
        return [row[: self.num_slots // width] for row, width in zip(load, self.unit_slots, strict=True)]

    def counts(self, slots: Occupant, table: Occupant | None = None) -> Incidence:
        """Tokens against units for a slot array, copies included."""
        aimed, server = self._aimed(slots, self.rule, table), self.unit_ranks.index(self.server_ranks)
        sets, number = self.distinct
        return incidence(
            sets, aimed, num_ranks=self.num_ranks, unit_ranks=self.unit_ranks, server=server, weights=number
        )

    def expected_load(self, slots: Occupant) -> Floats:
        """Load of every unit, (num_levels, num_ranks), for a slot array, from the `heat` of experts alone.

        Exact under the rules "nearest" and "spread"; under others copies are taken to share an expert's load evenly.
        """
        aimed = self._aimed(slots, "nearest" if self.rule == "nearest" else "spread")
        return shared_load(self.heat, aimed, num_ranks=self.num_ranks, unit_ranks=self.unit_ranks)

    def _aimed(self, slots: Occupant, rule: str, table: Occupant | None = None) -> Targets:
        return targets(
            slots,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            unit_ranks=self.unit_ranks,
            server_ranks=self.server_ranks,
            rule=rule,
            table=table,
        )

    def cost(self, occupant: Occupant) -> float:
        """Seconds of all tokens for an occupant array; unlike `score`, without copies."""
        from placer.search.counting import sum_touched

        units = (self.positions(occupant) // self.sizes[:, None]).astype(np.int32)
        return self.cost_of(sum_touched(self.tokens, units, self.weights_of_levels))

    def excess(self, occupant: Occupant) -> float:
        """Load above the caps for an occupant array, summed over units and levels."""
        over = 0.0
        for level, (slots, cap) in enumerate(zip(self.unit_slots, self.caps, strict=True)):
            over += float(np.maximum(self.unit_load(occupant, slots) - (cap - self.idle(level)), 0.0).sum())
        return over

    def unit_load(self, occupant: Occupant, slots: int) -> Floats:
        """Load of every unit of `slots` slots, as caps count it."""
        load: Floats = self.expert_load[occupant].reshape(-1, slots).sum(axis=1)
        return load

    @property
    def tokens(self) -> Experts:
        """`topk`, or an error in one line when only counts are known."""
        if self.topk is None:
            raise InvalidInput(f"layer {self.index}: found counts only, expected the experts of every token")
        return self.topk

    # -- caps --------------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> Occupant:
        """The load-only arrangement that meets all levels together (see `placer.search.balance`), and the rules."""
        from placer.search.balance import balanced, levelled

        sizes = self.sizes if len(self.sizes) else np.array([1], np.int64)
        speed = None
        if self.speeds:
            speed = self._table([self.unit_speeds(i) for i in self.levels or (0,)], 1.0)
        arranged: Occupant = balanced(self.expert_load, sizes, speed)
        if self.rules is not None:
            arranged = levelled(self.repaired(arranged), self.expert_load, sizes, self.rules.compiled, speed)
        return arranged

    @cached_property
    def least_load(self) -> Floats:
        """Load of the busiest unit of each level over its speed, (num_levels,), where load alone counts."""
        from placer.caps import least_load

        return least_load(self)

    @property
    def cap_factor(self) -> float | None:
        """Largest load over mean that the search allows itself: `max_load` less the margin."""
        return None if self.max_load is None else self.max_load - self.margin

    @cached_property
    def caps(self) -> Floats:
        """Cap of each level, in units of `heat`, (num_levels,); inf where there is none.

        Where GPUs differ in speed it is that of the fastest unit; others are to stay `idle` for the rest.
        """
        from placer.caps import caps

        return caps(self, self.cap_factor)

    def unit_speeds(self, level: int) -> Floats:
        """Speed of every unit of a level over the mean, (units,): ones where all GPUs are alike."""
        slots = self.unit_slots[level]
        if not self.speeds:
            return np.ones(self.num_slots // slots)
        ranks = self.unit_ranks[level]
        if self.rules is None:
            return unit_speeds(self.speeds, ranks)
        return unit_speeds(self.speeds, ranks, np.asarray(self.rules.shut.reshape(-1, slots).all(axis=1)))

    def idle(self, level: int) -> Floats:
        """How far below the level's cap each unit's own cap is, (units,): 0 for the fastest, and without a cap."""
        speed, cap = self.unit_speeds(level), float(self.caps[level])
        return cap * (1.0 - speed / speed.max()) if np.isfinite(cap) else np.zeros(len(speed))

    def idle_table(self, levels: Sequence[int]) -> Floats | None:
        """`idle` of some levels for kernels, (levels, num_slots); None where all GPUs are alike."""
        return self._table([self.idle(level) for level in levels], 0.0) if self.speeds else None

    def _table(self, rows: list[Floats], rest: float) -> Floats:
        table = np.full((len(rows), self.num_slots), rest)
        for row, units in zip(table, rows, strict=True):
            row[: len(units)] = units
        return table

    # -- the kernel's view ---------------------------------------------------------------------------------

    def positions(self, occupant: Occupant) -> Occupant:
        """Position of every expert, the inverse of `occupant`."""
        position = np.empty_like(occupant)
        position[occupant] = np.arange(len(occupant), dtype=np.int32)
        return position

    def repaired(self, occupant: Occupant, rng: np.random.Generator | None = None) -> Occupant:
        """The occupant array, after few swaps where it breaks the `rules`."""
        if self.rules is None or self.rules.keeps(occupant):
            return occupant
        return self.rules.repaired(occupant, np.random.default_rng(0) if rng is None else rng)

    def linear(self) -> Occupant:
        """Experts in order, spread evenly over the ranks, placeholders last within each rank."""
        held = np.full(self.num_ranks, self.num_experts // self.num_ranks)
        held[: self.num_experts % self.num_ranks] += 1
        rows = np.full((self.num_ranks, self.slots_per_rank), -1, np.int32)
        rows[np.arange(self.slots_per_rank) < held[:, None]] = np.arange(self.num_experts)
        return self.occupant(rows.ravel())

    def occupant(self, slots: npt.NDArray[Any]) -> Occupant:
        """The occupant array of a slot array in which every expert stands once and -1 is empty."""
        occupant = np.asarray(slots, np.int32).copy()
        occupant[occupant < 0] = np.arange(self.num_experts, self.num_slots)
        return occupant

    def in_order(self, slots: Occupant) -> Occupant:
        """A slot array, copies included, with the experts of every rank ascending and -1 last."""
        rows = np.where(slots < 0, self.num_experts, slots).reshape(self.num_ranks, -1)
        ordered = np.sort(rows, axis=1).ravel()
        return np.where(ordered < self.num_experts, ordered, -1).astype(np.int32)

    def slots(self, occupant: Occupant) -> Occupant:
        """The slot array of an occupant array, in its canonical order.

        Experts ascend within a rank, -1 last; units that could change places (ranks of a server, servers of a
        rack, ...) stand in the order of their first experts. Under rules, or where GPUs differ in speed, no unit can.
        """
        ordered = np.sort(occupant.reshape(self.num_ranks, -1), axis=1)
        alike = (*self.unit_slots, self.num_slots) if self.rules is None and not self.speeds else ()
        for slots, parent in itertools.pairwise(alike):
            siblings = ordered.reshape(-1, parent // slots, slots)
            order = np.argsort(siblings.min(axis=2), axis=1, kind="stable")
            ordered = np.take_along_axis(siblings, order[:, :, None], axis=1)
        flat = ordered.ravel()
        return np.where(flat < self.num_experts, flat, -1).astype(np.int32)
