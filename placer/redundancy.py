"""redundancy: how many spare slots pay, within the memory of the GPUs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from placer.errors import InvalidInput
from placer.problem import Problem
from placer.report import Report, format_seconds
from placer.result import Budget, Result
from placer.solvers import method as load_method
from placer.trace import Trace
from placer.variants import solved

#: Slots a GPU beyond just enough that are tried. Doubling: the first copies of the hottest experts buy the most.
MORE = (0, 1, 2, 4)
WITHIN = 0.01  # of the least step time: what is not worth another slot's memory


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One number of slots: what was found with it, and what that costs on the trace."""

    slots_per_rank: int
    result: Result
    report: Report

    @property
    def redundant(self) -> int:
        """Spare slots of a layer, over all GPUs."""
        return self.result.placement.num_slots - self.result.placement.num_experts

    @property
    def step(self) -> float:
        """Modelled seconds of a step."""
        return self.report.seconds["step"]


def candidates(problem: Problem, method: str = "auto") -> list[int]:
    """Slots a GPU that are worth a try: just enough, and `MORE` where every GPU's memory has room to fill them.

    Methods that make no copies have no use for more than just enough.

    Examples
    --------
    >>> import numpy as np
    >>> from placer import Model, Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> model = Model(name="toy", hidden_size=1000, expert_width=1000)  # 6 MB an expert
    >>> topology = Topology.load("dgx-h100").with_shape("1x2x1")
    >>> problem = Problem.from_trace(trace, topology, model=model, gpu_memory=20e6, reserve=0.0)
    >>> candidates(problem), candidates(problem, "lpt")
    ([2, 3], [2])
    """
    least = -(-problem.num_experts // problem.num_ranks)
    if "copies" not in load_method(method).handles:
        return [least]
    most = problem.num_experts if problem.memory is None else problem.memory.most_slots
    return [least + more for more in MORE if more == 0 or least + more <= min(most, problem.num_experts)]


def redundancy(
    problem: Problem,
    trace: Trace,
    method: str = "auto",
    *,
    slots: Sequence[int] | None = None,
    budget: Budget | None = None,
    evaluation: dict[str, Any] | None = None,
    stop: threading.Event | None = None,
    **options: Any,
) -> list[Trial]:
    """Solve with several numbers of slots, which share the budget.

    Parameters
    ----------
    problem : Problem
        Its own slots are not used.
    trace : Trace
        The trace of the problem; prices each placement.
    method : str
    slots : sequence of int, optional
        Slots a GPU to try; `candidates` by default.
    budget : Budget, optional
        For all of them together; 60 seconds by default.
    evaluation : dict, optional
        Further arguments of `evaluate`.
    stop : threading.Event, optional
        Set it from elsewhere to end early with what is done.
    **options
        Further arguments of `solve`.

    Returns
    -------
    list of Trial
        Fewest slots first.

    Raises
    ------
    InvalidInput
        When no number is given.

    Examples
    --------
    >>> import numpy as np
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), max_load=None)
    >>> trials = redundancy(problem, trace, "linear")
    >>> [(trial.redundant, trial.report.remote["server"]) for trial in trials]
    [(0, 1.0), (2, 0.5), (4, 0.0)]
    >>> fewest(trials, problem).placement.slots_per_rank
    4
    """
    tried = sorted(set(candidates(problem, method) if slots is None else slots))
    if not tried:
        raise InvalidInput("redundancy: found no number of slots, expected at least one")
    variants = [{"slots_per_rank": number} for number in tried]
    found = solved(
        problem, variants, trace, method, budget=budget, evaluation=evaluation, stop=stop, **options
    )
    trials: list[Trial] = []
    for number, (result, report) in zip(tried, found, strict=True):
        trials.append(Trial(slots_per_rank=number, result=result, report=report))
        if stop is not None and stop.is_set():
            break
    return trials


def fewest(trials: Sequence[Trial], problem: Problem) -> Result:
    """The result with the fewest slots whose step time is `WITHIN` the least; its notes say why, and what fits.

    Step time rather than traffic decides, because copies also cool the busiest GPU.
    """
    best = min(trial.step for trial in trials)
    kept = next(trial for trial in trials if trial.step <= best * (1.0 + WITHIN))
    if "copies" in load_method(kept.result.method).handles:
        tried = ", ".join(f"{trial.redundant}: {format_seconds(trial.step)}" for trial in trials)
        why = f"the fewest within {WITHIN:.0%} of the least step time on this trace ({tried})"
    else:
        why = f"{kept.result.method} makes no copies"
    note = f"redundant {kept.redundant} chosen, {kept.slots_per_rank} slots a GPU: {why}; {_allowed(problem)}"
    stopped = any(trial.result.status == "interrupted" for trial in trials)
    return replace(
        kept.result,
        status="interrupted" if stopped else kept.result.status,
        notes=(*kept.result.notes, note),
        seconds=sum(trial.result.seconds for trial in trials),
    )


def _allowed(problem: Problem) -> str:
    """What memory would allow, in words."""
    if problem.memory is None:
        return "memory is not checked, for the size of an expert is unknown"
    most = problem.memory.most_slots
    if most >= problem.num_experts:
        return "memory would hold every expert on every GPU"
    spare = max(0, most * problem.num_ranks - problem.num_experts)
    return f"memory would allow {spare} ({most} slots a GPU)"
