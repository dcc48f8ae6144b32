"""solve: run a method on every layer, check what it returns, and keep the record."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

import placer
from placer import caps
from placer.clock import Clock
from placer.errors import InvalidInput, NoPlacement, PlacerError
from placer.layer import Layer
from placer.memory import worst_gpu_bytes
from placer.placement import Placement
from placer.problem import NO_STEPS, Problem
from placer.result import Budget, Event, Result
from placer.solvers import Method, Placed, handling, linear, method, needing
from placer.steadiness import Steadiness, steadied, steadiness
from placer.tables import judged, stacked
from placer.warmup import compile_bounds, compile_search

Slots = npt.NDArray[np.int32]

SECONDS_TO_BOUND = 1e-7  # a token and expert, until there is a bound worth having
LEAST_PROOF = 5.0  # seconds that a proof may take even where the search took less
MARGIN_LAYERS = 16  # layers that the automatic load margin is estimated from


def solve(
    problem: Problem,
    method: str = "auto",
    *,
    budget: Budget | None = None,
    seed: int = 0,
    initial: Placement | None = None,
    jobs: int = 1,
    prove: bool = False,
    steady: bool = False,
    on_event: Callable[[Event], None] | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """Place the experts of every layer.

    Parameters
    ----------
    problem : Problem
    method : str
        A name from `placer.solvers.names`.
    budget : Budget, optional
        Time and rounds; 60 seconds by default.
    seed : int
        The same seed and rounds give the same placement for any number of jobs.
    initial : Placement, optional
        A placement to start from; the result is never worse.
    jobs : int
        Layers at once, on threads; a cluster by ``joblib.parallel_config``.
    prove : bool
        Also bound the objective from below, in what time is left, for as long as the search took. The
        placement stays as it is; `placer.certify` takes longer for a better bound.
    steady : bool
        After the search, swap experts between GPUs of one server so that the busiest GPU of every single step has less
        to do (see `placer.steadiness`); the result says what that changed. For traces with steps.
    on_event : callable, optional
        Called with an `Event` whenever a layer is done.
    stop : threading.Event, optional
        Set it from elsewhere to end early with the incumbent.

    Returns
    -------
    Result

    Raises
    ------
    InvalidInput
        When the method is unknown, needs statistics that the problem lacks, cannot keep its constraints, or makes
        copies that are not defined for what is asked.
    Infeasible
        When the copies that the method made do not fit into memory.
    NoPlacement
        When the run was stopped before anything was placed.

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), max_load=None)
    >>> solve(problem, "refine").placement.physical_to_logical.tolist()
    [[0, 2, 1, 3]]
    """
    import joblib

    budget = budget or Budget()
    if jobs < 1:
        raise InvalidInput(f"jobs: found {jobs}, expected at least 1")
    chosen = usable(problem, method, initial)
    if steady and (problem.routes is None or problem.routes.step is None):
        raise InvalidInput(f"steady: {NO_STEPS}")
    starts = _initial(problem, initial)
    compile_search(chosen, problem, stop, steady=steady)
    begun = time.monotonic()
    clock = Clock.start(seconds=budget.seconds, rounds=budget.rounds, gap=budget.gap, stop=stop)
    workers = min(jobs, problem.num_layers)
    settled = with_margin(problem, clock=clock, jobs=workers) if "caps" in chosen.handles else problem
    run = joblib.Parallel(
        n_jobs=workers, prefer="threads", return_as="generator_unordered", pre_dispatch=workers, batch_size=1
    )
    tasks = (
        joblib.delayed(_place)(settled.layer(index), method, seed, share, starts[index], steady)
        for index, share in enumerate(clock.shares(problem.num_layers, workers))
    )
    log = _Log(problem, method, begun)
    done: dict[int, _Done] = {}
    for part in run(tasks):
        done[part.index] = part
        if on_event is not None:
            on_event(log.event(part))
    if len(done) < problem.num_layers:
        raise NoPlacement("stopped before every layer had a placement")
    parts = [done[index] for index in range(problem.num_layers)]
    if prove:
        proved = _bounded(settled, parts, clock, begun, workers)
        if on_event is not None and proved is not parts:
            on_event(log.summary(proved))
        parts = proved
    result = _result(settled, method, seed, parts, clock, begun)
    if settled.load_margin == problem.load_margin or problem.max_load is None or problem.routes is None:
        return result
    note = f"load margin auto: caps tightened by {settled.load_margin:.3f} for the sake of unseen tokens"
    return replace(result, notes=(*result.notes, note))


def with_margin(problem: Problem, *, clock: Clock | None = None, jobs: int = 1) -> Problem:
    """The problem with its automatic load margin as a number, the same for all layers (see `placer.caps.margin`).

    It is estimated from up to `MARGIN_LAYERS` layers; without a cap, without tokens or out of time it is 0.

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.arange(8).reshape(8, 1, 1), num_experts=8)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), max_load=None)
    >>> with_margin(problem).load_margin
    0.0
    """
    import joblib

    if problem.load_margin != "auto":
        return problem
    if problem.max_load is None or problem.routes is None:
        return replace(problem, load_margin=0.0)
    clock = clock or Clock.start()
    number = min(problem.num_layers, MARGIN_LAYERS)
    spread = np.linspace(0, problem.num_layers - 1, number).round().astype(int).tolist()
    layers = [problem.layer(index) for index in spread]

    def estimate(layer: Layer, factor: float) -> float | None:
        return None if clock.expired else caps.overshoot(layer, factor)

    def mean_overshoot(factor: float) -> float:
        run = joblib.Parallel(n_jobs=min(jobs, number), prefer="threads")
        known = [o for o in run(joblib.delayed(estimate)(layer, factor) for layer in layers) if o is not None]
        return float(np.mean(known)) if known else 0.0

    return replace(problem, load_margin=caps.margin(problem.max_load, mean_overshoot))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Done:
    """One layer's outcome; costs in seconds of all tokens."""

    index: int
    placed: Placed
    linear_cost: float
    cost: float
    heat: float
    raised: list[dict[str, Any]]
    steadiness: tuple[Steadiness, Steadiness] | None  # before and after


def _place(
    layer: Layer, name: str, seed: int, clock: Clock, initial: Slots | None, steady: bool = False
) -> _Done:
    rng = np.random.default_rng([seed, layer.index])
    copies = "copies" in method(name).handles and layer.activations is None
    layer = replace(layer, copies=copies)
    placed = method(name).place(layer, rng=rng, clock=clock, initial=initial)
    (excess, cost, heat), table = judged(layer, placed.slots, placed.table)
    if placed.claim is not None and not math.isclose(placed.claim, cost, rel_tol=1e-9, abs_tol=1e-18):
        raise PlacerError(
            f"layer {layer.index}: method {name} claims a cost of {placed.claim!r}, scored {cost!r}"
        )
    if placed.bound is not None and placed.bound > cost * (1 + 1e-9):
        raise PlacerError(
            f"layer {layer.index}: method {name} proves {placed.bound!r}, above the cost {cost!r}"
        )
    if initial is not None and (layer.rules is None or layer.rules.keeps(initial)):
        (less, cheaper, cooler), its = judged(layer, initial)
        if (less, cheaper) < (excess, cost):
            placed, table, cost, heat = replace(placed, slots=initial, notes=()), its, cheaper, cooler
    change = None
    if steady:
        before = steadiness(layer, placed.slots, table)
        slots = steadied(layer, placed.slots)
        scores, its = judged(layer, slots)
        if scores[0] <= excess:  # copies need not share load evenly, as the swaps take them to
            placed, table, cost, heat = replace(placed, slots=slots), its, *scores[1:]
        change = before, steadiness(layer, placed.slots, table)
    return _Done(
        index=layer.index,
        placed=replace(placed, table=table),
        linear_cost=judged(layer, linear.place(layer, rng=rng, clock=clock).slots)[0][1],
        cost=cost,
        heat=heat,
        raised=caps.raised(layer),
        steadiness=change,
    )


def usable(problem: Problem, name: str, initial: Placement | None = None) -> Method:
    """The method of a name, for this problem.

    Raises
    ------
    InvalidInput
        When it is unknown, needs what the problem lacks, or cannot keep what the problem asks for.
    """
    chosen = method(name)
    has = {"load"} | ({"pairs"} if problem.traffic.pairs is not None else set())
    has |= {"routes", "pairs"} if problem.routes is not None else set()
    if problem.routes is None and problem.traffic.pairs is None and not chosen.needs <= has:
        raise InvalidInput(
            f"method {name} needs a trace with topk_idx, found loads only (counts); "
            f"methods that balance load: {', '.join(needing(has))}"
        )
    if missing := chosen.needs - has:
        raise InvalidInput(
            f"method {name} needs {', '.join(sorted(missing))}; the input has only {', '.join(sorted(has))}"
        )
    if problem.constraints is not None and "pins" not in chosen.handles:
        raise InvalidInput(f"method {name} keeps no constraints; {', '.join(handling('pins'))} do")
    if problem.whole_groups and "pins" not in chosen.handles:
        raise InvalidInput(f"method {name} keeps no gate groups whole; {', '.join(handling('pins'))} do")
    if problem.load_model != "tokens":
        _without_copies(problem, name, initial)
    return chosen


def _without_copies(problem: Problem, name: str, initial: Placement | None) -> None:
    """Refuse a load model that is not defined for copies where there may be any."""
    what, spare = f"load model {problem.load_model}", problem.num_slots - problem.num_experts
    if spare and problem.constraints is None and "copies" in method(name).handles:
        raise InvalidInput(
            f"{what} is not defined with copies: found {spare} spare slots, in which method {name} makes some; "
            "expected none to spare, or a method without copies such as tabu"
        )
    if initial is not None and initial.has_copies:
        raise InvalidInput(
            f"{what} is not defined with copies: found some in the initial placement, expected none"
        )


def _initial(problem: Problem, initial: Placement | None) -> list[Slots | None]:
    if initial is None:
        return [None] * problem.num_layers
    expected = (problem.num_layers, problem.num_slots, problem.num_experts, problem.topology.shape)
    found = (initial.num_layers, initial.num_slots, initial.num_experts, initial.shape)
    if found != expected:
        raise InvalidInput(
            f"initial placement: found (layers, slots, experts, shape) {found}, expected {expected}"
        )
    return list(initial.physical_to_logical)


def _bounded(problem: Problem, parts: list[_Done], clock: Clock, begun: float, workers: int) -> list[_Done]:
    """The layers, with bounds for those that their method gave none."""
    import joblib

    from placer.certificate import bounded_cost

    without = [part for part in parts if part.placed.bound is None]
    if problem.num_slots > problem.num_experts or problem.routes is None or not without or clock.expired:
        return parts
    spent = time.monotonic() - begun
    limited = replace(clock, deadline=min(clock.deadline, time.monotonic() + max(spent, LEAST_PROOF)))
    if (
        limited.remaining * workers
        < len(without) * problem.num_tokens * problem.num_experts * SECONDS_TO_BOUND
    ):
        return parts  # a layer's first bound would take longer than its share
    began = time.monotonic()
    compile_bounds()
    limited = replace(limited, deadline=limited.deadline + time.monotonic() - began)

    def bounded(part: _Done, share: Clock) -> _Done:
        bound, how = bounded_cost(problem.layer(part.index), part.placed.slots, share)
        bound = min(bound, part.cost)
        return replace(part, placed=replace(part.placed, bound=bound, bound_method=how))

    run = joblib.Parallel(n_jobs=workers, prefer="threads", pre_dispatch=workers, batch_size=1)
    shares = limited.shares(len(without), workers)
    better = {
        part.index: part
        for part in run(
            joblib.delayed(bounded)(part, share) for part, share in zip(without, shares, strict=True)
        )
    }
    return [better.get(part.index, part) for part in parts]


class _Log:
    """Turns finished layers into events."""

    def __init__(self, problem: Problem, method: str, begun: float) -> None:
        self.layers, self.tokens = problem.num_layers, max(1, problem.num_tokens)
        self.method, self.begun = method, begun
        self.done: list[_Done] = []

    def summary(self, parts: list[_Done]) -> Event:
        """The last event again, of layers that have got bounds since."""
        self.done = parts[:-1]
        return self.event(parts[-1])

    def event(self, part: _Done) -> Event:
        self.done.append(part)
        bounds = [p.placed.bound for p in self.done]
        known = [b for b in bounds if b is not None]
        return Event(
            seconds=time.monotonic() - self.begun,
            done=len(self.done),
            layers=self.layers,
            rounds=sum(p.placed.rounds for p in self.done),
            method=self.method,
            objective=sum(p.cost for p in self.done) / self.tokens,
            linear=sum(p.linear_cost for p in self.done) / self.tokens,
            bound=sum(known) / self.tokens if len(known) == len(bounds) else None,
            load=float(np.mean([p.heat for p in self.done])),
            improved=part.cost < part.linear_cost,
        )


def _result(problem: Problem, name: str, seed: int, done: list[_Done], clock: Clock, begun: float) -> Result:
    rows = [part.placed.slots for part in done]
    placement = placed_rows(
        problem, rows, [part.placed.table for part in done], provenance(problem, name, seed)
    )
    if problem.constraints is not None and (broken := problem.constraints.check(placement)):
        raise PlacerError(f"method {name} breaks a constraint: {broken[0]}")
    bounds = [part.placed.bound for part in done]
    bound = None
    if all(b is not None for b in bounds):
        bound = sum(b for b in bounds if b is not None) / max(1, problem.num_tokens)
    objective = sum(part.cost for part in done) / max(1, problem.num_tokens)
    proved = all(_proved(part) for part in done)
    names = [level.name for level in problem.topology.levels]
    return Result(
        placement=placement,
        method=name,
        seed=seed,
        rounds=sum(part.placed.rounds for part in done),
        seconds=time.monotonic() - begun,
        status="interrupted" if clock.stop.is_set() else "optimal" if proved else "feasible",
        objective=objective,
        bound=bound,
        bound_method=", ".join(dict.fromkeys(str(part.placed.bound_method) for part in done))
        if bound is not None
        else None,
        proved_layers=tuple(problem.layer_ids[part.index] for part in done if _proved(part)),
        caps_raised=[{**row, "level": names[int(row["level"])]} for part in done for row in part.raised],
        notes=tuple(_notes(done)),
        steady=_steady(problem, done),
    )


def _steady(problem: Problem, done: list[_Done]) -> dict[str, dict[str, float]] | None:
    """What single steps gained and what it cost, over all layers; None where it was not asked for."""
    changes = [part.steadiness for part in done if part.steadiness is not None]
    if not changes:
        return None
    gained, paid = {}, {}
    for when, layers in zip(("before", "after"), zip(*changes, strict=True), strict=True):
        steps = sum(layer.steps for layer in layers)
        gained[when] = sum(layer.peaks for layer in layers) / steps if steps else 1.0
        paid[when] = sum(layer.touched for layer in layers) / (len(layers) * problem.num_tokens)
    counted = "load_per_step" if problem.load_model == "tokens" else "activated_per_step"
    return {f"{counted}.gpu.mean": gained, "touched.gpu": paid}


def _proved(part: _Done) -> bool:
    bound = part.placed.bound
    return bound is not None and math.isclose(bound, part.cost, rel_tol=1e-9)


def _notes(done: list[_Done]) -> Iterator[str]:
    """What methods decided, with the layers it concerns."""
    layers: dict[str, int] = {}
    for part in done:
        for note in part.placed.notes:
            layers[note] = layers.get(note, 0) + 1
    for note, count in layers.items():
        yield f"{note} ({count} of {len(done)} layers)"


def placed_rows(
    problem: Problem, rows: list[Slots], tables: Sequence[Slots | None], made_of: dict[str, Any]
) -> Placement:
    """The slots and dispatch tables of all layers as a placement of the problem.

    Raises
    ------
    Infeasible
        When experts and copies do not fit into a GPU's memory.
    """
    placement = Placement(
        physical_to_logical=np.stack(rows),
        num_experts=problem.num_experts,
        shape=problem.topology.shape,
        layer_ids=problem.layer_ids,
        rule=problem.replica_choice,
        table=stacked(tables),
        provenance=made_of,
    )
    worst_gpu_bytes(
        placement,
        problem.model,
        capacity=problem.gpu_memory,
        reserve=problem.reserve,
        expert_dtype=problem.expert_dtype,
    )
    return placement


def provenance(problem: Problem, name: str, seed: int) -> dict[str, Any]:
    """Where a placement of this problem comes from, for its file."""
    limits = {} if problem.constraints is None else {"constraints": problem.constraints.source}
    return {
        "placer": placer.__version__,
        "method": name,
        "seed": seed,
        "topology": problem.topology.name,
        "model": problem.model.name,
        "tokens": problem.num_tokens or None,
        "max_load": problem.max_load,
        "load_margin": problem.load_margin,
        **({} if problem.load_model == "tokens" else {"load_model": problem.load_model}),
        **limits,
    }
