"""allotment: one number of copies for the whole model, dealt to the layers where they pay most.

Layers differ: in one a few copies take the heat out of the hottest experts, in another they change little. Every layer
is solved with several numbers of slots a GPU, so its cost with so many copies is known exactly, and an exact knapsack
picks one of the numbers for each layer.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placer import caps
from placer.clock import Clock
from placer.errors import InvalidInput
from placer.knapsack import knapsack
from placer.layer import Layer
from placer.problem import Problem
from placer.redundancy import MORE
from placer.result import Budget, Event, Result
from placer.solution import placed_rows, solve
from placer.solvers import method as load_method
from placer.tables import judged
from placer.variants import labelled, named

Slots = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

HALVINGS = 3  # of a layer's copies, which are tried too: a slot on every GPU is many copies at once


def shared_out(
    problem: Problem,
    method: str = "auto",
    *,
    copies: int,
    slots: Sequence[int] | None = None,
    budget: Budget | None = None,
    jobs: int = 1,
    on_event: Callable[[Event], None] | None = None,
    stop: threading.Event | None = None,
    **options: Any,
) -> Result:
    """Place the experts of every layer with at most so many copies in all layers together.

    Layers are compared under the same caps, those that the most slots can meet: load above them first, then the
    seconds on the links. Slots that a layer does not get stay empty. Over all layers, no GPU holds more than its even
    share of experts and copies.

    Parameters
    ----------
    problem : Problem
        Its own slots are not used. Its memory holds for all layers together, so one layer may have more slots than all
        could.
    method : str
    copies : int
        Slots that hold an expert, beyond one for each expert, over all layers.
    slots : sequence of int, optional
        Slots a GPU to try; `candidates` by default.
    budget : Budget, optional
        For all of them together; 60 seconds by default.
    jobs : int
        Layers at once.
    on_event : callable, optional
        As for `solve`; the label of an event says how many slots were tried.
    stop : threading.Event, optional
        Set it from elsewhere to end early with what is done.
    **options
        Further arguments of `solve`.

    Returns
    -------
    Result
        Without a bound: none covers copies.

    Raises
    ------
    InvalidInput
        When the number of copies is negative or no number of slots is given.
    Infeasible
        When the experts do not fit into memory.

    Examples
    --------
    Layer 0 uses its four experts in pairs as they stand, layer 1 crosswise: all copies go to layer 1.

    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 1], [0, 2]], [[2, 3], [1, 3]]]), num_experts=4)
    >>> machine = Topology.load("dgx-h100").with_shape("1x2x1")
    >>> result = shared_out(Problem.from_trace(trace, machine, max_load=None), "linear", copies=4)
    >>> result.placement.physical_to_logical.tolist()
    [[0, 1, -1, -1, 2, 3, -1, -1], [0, 1, 2, 3, 0, 1, 2, 3]]
    >>> result.notes[-1]
    '4 of 4 copies over 2 layers: 0 to 4 a layer'
    """
    import joblib

    if copies < 0:
        raise InvalidInput(f"copies: found {copies}, expected 0 or more")
    tried = sorted(set(candidates(problem, copies, method) if slots is None else slots))
    if not tried:
        raise InvalidInput("slots: found no number of slots, expected at least one")
    begun = time.monotonic()
    free = replace(problem, gpu_memory=math.inf)  # the knapsack looks after memory
    whole = budget or Budget()
    share = replace(whole, seconds=None if whole.seconds is None else whole.seconds / (len(tried) + 1))
    results: list[Result] = []
    for number in tried:
        if results and stop is not None and stop.is_set():
            break
        posed = replace(free, slots_per_rank=number)
        told = labelled(on_event, named({"slots_per_rank": number}))
        results.append(solve(posed, method, budget=share, jobs=jobs, on_event=told, stop=stop, **options))
    widest = replace(free, slots_per_rank=tried[len(results) - 1], load_margin=0.0)
    clock = Clock.start(seconds=share.seconds, stop=stop)
    makes = "copies" in load_method(method).handles
    workers = min(jobs, problem.num_layers)
    run = joblib.Parallel(n_jobs=workers, prefer="threads", pre_dispatch=workers, batch_size=1)
    choices: list[list[_Choice]] = run(
        joblib.delayed(_choices)(widest.layer(index, copies=makes), results, part)
        for index, part in enumerate(clock.shares(problem.num_layers, workers))
    )
    raised = [
        row for index in range(problem.num_layers) for row in caps.raised(widest.layer(index, copies=makes))
    ]
    result = _assembled(problem, _picked(problem, choices, copies), results, copies, raised)
    stopped = stop is not None and stop.is_set()
    return replace(
        result,
        seconds=time.monotonic() - begun,
        status="interrupted" if stopped else "feasible",
    )


def candidates(problem: Problem, copies: int, method: str = "auto") -> list[int]:
    """Slots a GPU that are worth a try: just enough, an even share of the copies, and half, twice and four times that.

    No more than one layer could fill with all the copies, and in the memory that the others leave it.

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.arange(64).reshape(4, 2, 8), num_experts=64)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x8x1"))
    >>> [candidates(problem, copies) for copies in (0, 5, 32, 200)]
    [[8], [8, 9], [8, 9, 10, 12], [8, 14, 20, 32]]
    """
    least = -(-problem.num_experts // problem.num_ranks)
    if "copies" not in load_method(method).handles:
        return [least]
    even = even_slots(problem, copies)
    half = max(1, (even - least) // 2)
    most = -(-(problem.num_experts + copies) // problem.num_ranks)
    others = (problem.num_layers - 1) * (problem.num_experts // problem.num_ranks)
    most = min(most, problem.num_experts, int(_room(problem).min()) - others)
    tried = {even, *(least + more * half for more in MORE)}
    return sorted(number for number in tried if number == least or number <= most)


def even_slots(problem: Problem, copies: int) -> int:
    """Slots a GPU, the same in every layer, that so many copies over all layers are enough for.

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.arange(64).reshape(4, 2, 8), num_experts=64)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x8x1"))
    >>> [even_slots(problem, copies) for copies in (0, 15, 16, 32)]
    [8, 8, 9, 10]
    """
    least = -(-problem.num_experts // problem.num_ranks)
    each = (problem.num_experts + copies // problem.num_layers) // problem.num_ranks
    return min(max(least, each), problem.num_experts)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Choice:
    """One way to place a layer, in as many slots as the widest has."""

    origin: int  # the result that it is from
    slots: Slots
    table: Slots | None
    excess: float
    cost: float


def _choices(layer: Layer, results: list[Result], clock: Clock) -> list[_Choice]:
    """What the results have for a layer, and while there is time the same with fewer copies; all under its caps."""
    found: list[_Choice] = []

    hottest = 1.0  # of the results themselves: taking copies away must not heap load on one unit

    def judge(origin: int, slots: Slots, table: Slots | None = None, *, whole: bool = False) -> float:
        nonlocal hottest
        (excess, cost, heat), table = judged(layer, slots, table)
        hottest = max(hottest, heat) if whole else hottest
        if heat <= hottest or (slots >= 0).sum() == layer.num_experts:  # no copies at all is always a choice
            found.append(_Choice(origin=origin, slots=slots, table=table, excess=excess, cost=cost))
        return excess

    below = -1  # copies that results with fewer slots have
    for origin, result in enumerate(results):
        placement, table = result.placement, None
        slots = resized(placement.physical_to_logical[layer.index], layer.num_ranks, layer.slots_per_rank)
        if placement.table is not None:
            table = relabelled(placement.table[layer.index], placement.slots_per_rank, layer.slots_per_rank)
        judge(origin, slots, table, whole=True)
        copies = int(_held(slots, layer.num_ranks).sum()) - layer.num_experts
        worst = max(choice.excess for choice in found)
        for kept in (copies >> halving for halving in range(1, HALVINGS + 1)):
            if kept <= max(0, below) or clock.expired:
                break
            if judge(origin, thinned(layer, slots, kept)) > worst:
                break  # still fewer would exceed the caps still more
        if below < 0 < copies:
            judge(origin, thinned(layer, slots, 0))
        below = max(below, copies)
    return found


def thinned(layer: Layer, slots: Slots, kept: int) -> Slots:
    """Slots with at most so many copies: those of the experts that have most to do for each of their slots.

    Of one expert, those slots stay in whose servers (GPUs, where there is one server) the most tokens use it
    together with others.

    Parameters
    ----------
    layer : Layer
    slots : (num_slots,) int32
    kept : int

    Returns
    -------
    (num_slots,) int32
        Empty ones last within each rank.

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[0, 2]]]), num_experts=3)
    >>> machine = Topology.load("dgx-h100").with_shape("1x2x1")
    >>> layer = Problem.from_trace(trace, machine, slots_per_gpu=3).layer(0)
    >>> thinned(layer, np.array([0, 1, 2, 0, 1, -1], np.int32), 1).tolist()
    [0, 1, 2, 0, -1, -1]
    """
    rows = slots.reshape(layer.num_ranks, -1).copy()
    flat = rows.ravel()
    number = np.bincount(flat[flat >= 0], minlength=layer.num_experts)
    ties = _ties(layer, slots)
    while number.sum() > layer.num_experts + max(0, kept):
        expert = int(np.where(number > 1, layer.load / np.maximum(number - 1, 1), np.inf).argmin())
        holders = np.flatnonzero(flat == expert)
        flat[holders[::-1][ties[holders[::-1]].argmin()]] = -1
        number[expert] -= 1
    order = np.argsort(rows < 0, axis=1, kind="stable")
    stay: Slots = np.take_along_axis(rows, order, axis=1).ravel()
    return stay


def _ties(layer: Layer, slots: Slots) -> Floats:
    """Tokens that use the expert of a slot and another one of its unit, summed over these; (num_slots,)."""
    ties = np.zeros(len(slots))
    if layer.pair_counts is None:
        return ties
    ranks = layer.server_ranks if layer.server_ranks < layer.num_ranks else 1
    for unit in np.arange(len(slots)).reshape(-1, ranks * layer.slots_per_rank):
        held = unit[slots[unit] >= 0]
        together = layer.pair_counts[np.ix_(slots[held], slots[held])]
        ties[held] = together.sum(axis=1) - together.diagonal()
    return ties


def resized(slots: Slots, num_ranks: int, width: int) -> Slots:
    """Slots of a layer, (num_slots,), with `width` on each rank: empty ones are added, or the last ones dropped.

    Examples
    --------
    >>> resized(np.array([0, 1, 2, -1], np.int32), 2, 3).tolist()
    [0, 1, -1, 2, -1, -1]
    """
    rows = slots.reshape(num_ranks, -1)[:, :width]
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=-1).ravel()


def relabelled(table: Slots, before: int, after: int) -> Slots:
    """A dispatch table, of slot numbers or -1, for another number of slots a rank.

    Examples
    --------
    >>> relabelled(np.array([[0, 3, -1]], np.int32), 2, 5).tolist()
    [[0, 6, -1]]
    """
    return np.where(table < 0, -1, table // before * after + table % before).astype(np.int32)


def _held(slots: Slots, num_ranks: int) -> Ints:
    """Experts on every rank, (num_ranks,)."""
    held: Ints = np.count_nonzero(slots.reshape(num_ranks, -1) >= 0, axis=1)
    return held


def _room(problem: Problem) -> Ints:
    """Experts that every GPU can hold over all layers, (num_ranks,), at most all of them."""
    memory, most = problem.memory, problem.num_layers * problem.num_experts
    if memory is None:
        return np.full(problem.num_ranks, most, np.int64)
    room = np.clip(np.floor((memory.capacity - memory.beside) / memory.expert_bytes), 0, most).astype(
        np.int64
    )
    return room - (memory.needed(room) > memory.capacity)  # where the division was rounded up


def _share(problem: Problem, copies: int) -> int:
    """Experts of a GPU over all layers, where experts and copies are dealt evenly: else spare slots would make room
    for GPUs with many more experts than others, which takes memory and no copies."""
    least = -(-problem.num_experts // problem.num_ranks)
    each = -(-(problem.num_layers * problem.num_experts + copies) // problem.num_ranks)
    return max(problem.num_layers * least, each)


def _picked(problem: Problem, choices: list[list[_Choice]], limit: int) -> list[_Choice]:
    """The choice of every layer."""
    shape = (problem.num_layers, max(map(len, choices)))
    excess, cost = np.full(shape, np.inf), np.full(shape, np.inf)
    held = np.zeros((*shape, problem.num_ranks), np.int64)
    for layer, row in enumerate(choices):
        for at, choice in enumerate(row):
            excess[layer, at], cost[layer, at] = choice.excess, choice.cost
            held[layer, at] = _held(choice.slots, problem.num_ranks)
    copies = np.maximum(held.sum(axis=2) - problem.num_experts, 0)
    best = knapsack(
        excess, cost, copies, limit, held=held, room=np.minimum(_room(problem), _share(problem, limit))
    )
    return [row[at] for row, at in zip(choices, best.tolist(), strict=True)]


def _assembled(
    problem: Problem, picked: list[_Choice], results: list[Result], limit: int, raised: list[dict[str, Any]]
) -> Result:
    """One result out of the choices, which were compared under caps `raised` where these had to be."""
    ranks = problem.num_ranks
    held = np.array([_held(choice.slots, ranks) for choice in picked])
    width, widest = int(held.max()), len(picked[0].slots) // ranks
    tables = [None if choice.table is None else relabelled(choice.table, widest, width) for choice in picked]
    first = results[0]
    rows = [resized(choice.slots, ranks, width) for choice in picked]
    made_of = {**first.placement.provenance, "load_margin": problem.load_margin, "copies": limit}
    placement = placed_rows(problem, rows, tables, made_of)
    used = {
        choice.origin: results[choice.origin] for choice in sorted(picked, key=lambda choice: choice.origin)
    }
    return Result(
        placement=placement,
        method=first.method,
        seed=first.seed,
        rounds=sum(result.rounds for result in results),
        seconds=sum(result.seconds for result in results),
        status="feasible",
        objective=sum(choice.cost for choice in picked) / problem.num_tokens,
        caps_raised=[
            {**row, "level": problem.topology.levels[int(row["level"])].name}
            for row in raised
            if "caps" in load_method(first.method).handles
        ],
        notes=(
            *_notes(used.values()),
            *_above(picked),
            _split(held.sum(axis=1) - problem.num_experts, limit, first.method),
        ),
    )


def _notes(used: Iterable[Result]) -> Iterator[str]:
    """What was decided with each number of slots."""
    said: dict[str, list[str]] = {}
    for result in used:
        for note in result.notes:
            said.setdefault(note, []).append(str(result.placement.slots_per_rank))
    for note, slots in said.items():
        yield f"with {', '.join(slots)} slots a GPU: {note}"


def _above(picked: list[_Choice]) -> Iterator[str]:
    """Which layers have too few copies to keep their caps, in words."""
    if above := sum(choice.excess > 0 for choice in picked):
        yield f"load is above the caps in {above} of {len(picked)} layers: more copies would be needed there"


def _split(copies: Ints, limit: int, method: str) -> str:
    """How many copies the layers have, in words."""
    if "copies" not in load_method(method).handles:
        return f"no copies: {method} makes none"
    return f"{copies.sum()} of {limit} copies over {len(copies)} layers: {copies.min()} to {copies.max()} a layer"
