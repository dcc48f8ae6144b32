"""solve: run a method on every layer, check what it returns, and keep the record."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from placer import caps
from placer.clock import Clock
from placer.errors import InvalidInput, NoPlacement, PlacerError
from placer.layer import Layer
from placer.placement import Placement, format_shape
from placer.problem import Problem
from placer.solvers import Method, Placed, method

SCHEMA = "placer/result/1"
OBJECTIVE_UNIT = "seconds per token"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a run may take.

    Parameters
    ----------
    seconds : float or None
        Wall seconds for all layers together, compilation excluded; None for no limit.
    rounds : int or None
        Rounds of search per layer; None for as many as pay.
    """

    seconds: float | None = 60.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds >= 0:
            raise InvalidInput(f"time limit: found {self.seconds}, expected 0 seconds or more")
        if self.rounds is not None and self.rounds < 0:
            raise InvalidInput(f"rounds: found {self.rounds}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One layer is done; `objective` is the sum over all layers with the layers not yet done as they began."""

    seconds: float
    done: int
    layers: int
    method: str
    objective: float
    bound: float | None
    load: float
    improved: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `solve` found.

    Parameters
    ----------
    placement : Placement
    method, seed, rounds, seconds
        The method, its seed, the search rounds run in all layers together, wall seconds.
    status : str
        ``optimal`` (proven), ``feasible``, or ``interrupted``.
    objective : float
        Modelled link seconds of one token over all layers, level by level (see `Problem.seconds_per_vector`).
    bound : float or None
        Proven lower bound on the objective; None where none was computed.
    bound_method : str or None
        What proved it.
    caps_raised : list of dict
        Caps above ``max_load`` because load-only packing needs them: layer, level, asked, cap.
    notes : tuple of str
        What the run decided by itself, in words.
    """

    placement: Placement
    method: str
    seed: int
    rounds: int
    seconds: float
    status: str
    objective: float
    bound: float | None = None
    bound_method: str | None = None
    caps_raised: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float | None:
        """(incumbent - bound) / incumbent as a fraction; None without a bound."""
        if self.bound is None:
            return None
        return (self.objective - self.bound) / self.objective if self.objective > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The search part of the JSON document ``placer/result/1``."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "seed": self.seed,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "status": self.status,
            "objective": self.objective,
            "objective_unit": OBJECTIVE_UNIT,
            "bound": self.bound,
            "gap": self.gap,
            "bound_method": self.bound_method,
            "caps_raised": self.caps_raised,
            "notes": list(self.notes),
        }


def solve(
    problem: Problem,
    method: str = "auto",
    *,
    budget: Budget | None = None,
    seed: int = 0,
    initial: Placement | None = None,
    jobs: int = 1,
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
        When the method is unknown or needs statistics that the problem lacks.
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

    begun = time.monotonic()
    budget = budget or Budget()
    chosen = _usable(problem, method)
    starts = _initial(problem, initial)
    _compile()
    clock = Clock.start(seconds=budget.seconds, rounds=budget.rounds, stop=stop)
    workers = max(1, min(jobs, problem.num_layers))
    tasks = (
        joblib.delayed(_place)(problem.layer(i), method, seed, share, starts[i])
        for i, share in enumerate(_shares(clock, problem.num_layers, workers))
    )
    run = joblib.Parallel(
        n_jobs=workers, prefer="threads", return_as="generator_unordered", pre_dispatch=workers, batch_size=1
    )
    done: dict[int, _Done] = {}
    for part in run(tasks):
        done[part.layer] = part
        if on_event is not None:
            on_event(_event(done, part, begun, problem, method))
    if len(done) < problem.num_layers:
        raise NoPlacement("stopped before every layer had a placement")
    return _result(problem, method, seed, [done[i] for i in range(problem.num_layers)], clock, begun, chosen)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Done:
    """One layer's outcome: slots, and cost and excess as the layer itself counts them."""

    layer: int
    placed: Placed
    start_cost: float
    cost: float
    load: float
    raised: list[dict[str, Any]]


def _place(
    layer: Layer, name: str, seed: int, clock: Clock, initial: npt.NDArray[np.int32] | None
) -> _Done:
    rng = np.random.default_rng([seed, layer.index])
    placed = method(name).place(layer, rng=rng, clock=clock, initial=initial)
    if initial is not None and score(layer, initial) < score(layer, placed.slots):
        placed = Placed(slots=initial, bound=placed.bound, rounds=placed.rounds)
    linear = layer.slots(layer.linear())
    return _Done(
        layer=layer.index,
        placed=placed,
        start_cost=score(layer, linear)[1],
        cost=score(layer, placed.slots)[1],
        load=busiest(layer, placed.slots),
        raised=caps.raised(layer, tuple(map(str, range(len(layer.unit_slots))))),
    )
