"""Sweep: traffic and time as expert parallelism gets wider.

Each width splits the machine into groups of that many consecutive GPUs; each group holds all experts once and
exchanges vectors among its own GPUs only. Up to the GPUs of a server nothing leaves it. Beyond, traffic meets the
slower links, and at some width the all-to-all takes longer than the experts themselves: the network cliff.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placer.alltoall import Scheme, scheme
from placer.census import expected
from placer.cliff import BASELINE, UNIFORM, Row, Sweep
from placer.errors import InvalidInput, NoPlacement
from placer.evaluation import TOKENS_PER_GPU, evaluate
from placer.model import Model
from placer.placement import Placement, format_shape
from placer.problem import DEFAULT_RESERVE, Problem
from placer.result import Budget
from placer.solution import solve
from placer.step import Step
from placer.timing import GEMM_EFFICIENCY, compute_seconds
from placer.topology import Topology
from placer.trace import Trace
from placer.uniform import held_experts, uniform_counts


def sweep(
    topology: Topology,
    widths: Iterable[int] | None = None,
    *,
    model: Model | None = None,
    trace: Trace | None = None,
    method: str = "auto",
    alltoall: str = "hierarchical",
    tokens_per_gpu: int = TOKENS_PER_GPU,
    holdout: float = 0.5,
    gpu_memory: float | None = None,
    reserve: float = DEFAULT_RESERVE,
    expert_dtype: str | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    jobs: int = 1,
    on_row: Callable[[Row], None] | None = None,
    stop: threading.Event | None = None,
    **problem_options: Any,
) -> Sweep:
    """Price expert parallelism of every width on one machine.

    Parameters
    ----------
    topology : Topology
        The whole machine.
    widths : iterable of int, optional
        GPUs that hold the experts once; by default every number of them that the machine divides into.
    model : Model, optional
        Sizes and router; by default the one that the trace names.
    trace : Trace, optional
        Adds two rows a width, ``linear`` and `method`, fitted on one part of the sequences and judged on the
        other; all rows are then of the trace's layers and router. Without it, routing is uniform only.
    method : str
        A name from `placer.solvers.names`.
    alltoall : str
        A name from `placer.alltoall.SCHEMES`.
    tokens_per_gpu : int
        Tokens of one step on each GPU.
    holdout : float
        Share of the sequences that placements are judged on, in (0, 1).
    gpu_memory, reserve, expert_dtype
        As for `placer.evaluate`, but experts that exceed a GPU's memory are marked, not refused.
    budget, seed, jobs
        As for `placer.solve`, at each width.
    on_row : callable, optional
        Called with each `Row` as it is done.
    stop : threading.Event, optional
        Set it from elsewhere to end early with the rows done so far.
    **problem_options
        As for `Problem.from_trace`: max_load, load_margin.

    Raises
    ------
    InvalidInput
        When no width fits, or too little is known of the model.

    Examples
    --------
    >>> found = sweep(Topology.load("dgx-h100").with_shape("1x4x2"), model=Model.named("mixtral-8x7b"))
    >>> [(row.ep, round(row.inter_server_gb, 1)) for row in found.rows]
    [(1, 0.0), (2, 0.0), (4, 13.5), (8, 23.9)]
    """
    if tokens_per_gpu < 1:
        raise InvalidInput(f"tokens per GPU: found {tokens_per_gpu}, expected at least 1")
    if alltoall == "follow":
        raise InvalidInput(
            "all-to-all follow: cannot be swept, for uniform routing has no ways between layers"
        )
    stop = stop or threading.Event()
    sized, layers = _sized(model, trace)
    pricing = _Pricing(
        model=sized,
        scheme=scheme(alltoall),
        gpus=topology.num_ranks,
        tokens=tokens_per_gpu,
        layers=layers,
        room=(topology.gpu_memory if gpu_memory is None else gpu_memory) - reserve,
        expert_dtype=expert_dtype,
    )
    groups, notes = _groups(topology, widths, sized.num_experts)
    notes = [*_notes(sized), *notes]
    fitted: tuple[Problem, Trace] | None = None
    if trace is not None:
        fit, unseen = trace.split(1.0 - holdout)
        notes.append(
            f"placements fitted on {fit.num_tokens:,} tokens, judged on {unseen.num_tokens:,} others"
        )
        slots = -(-fit.num_experts // groups[0].num_ranks)
        options = {"model": sized, "slots_per_gpu": slots, "gpu_memory": math.inf, **problem_options}
        fitted = Problem.from_trace(fit, groups[0], **options), unseen

    def rows_of(group: Topology) -> Iterator[Row]:
        yield pricing.uniform(group)
        if fitted is None:
            return
        (problem, unseen), ep = fitted, group.num_ranks
        if problem.num_experts % ep:
            said = f"{problem.num_experts} experts do not divide by {ep} GPUs"
            notes.append(f"EP {ep}: uniform routing only: {said}")
            return
        problem = replace(problem, topology=group, slots_per_rank=problem.num_experts // ep)
        for name in dict.fromkeys((BASELINE, method)):
            search = name if ep > 1 else BASELINE  # one GPU leaves nothing to decide
            result = solve(problem, search, budget=budget, seed=seed, jobs=jobs, stop=stop)
            yield pricing.judged(name, result.placement, unseen, group)

    rows = []
    with suppress(NoPlacement):  # of a run that was stopped
        for row in (row for group in groups for row in rows_of(group)):
            if stop.is_set():
                break
            rows.append(row)
            if on_row is not None:
                on_row(row)
    if stop.is_set():
        notes.append("interrupted: rows are missing")
    title = (
        f"{sized.name}, {layers} MoE layers, on {format_shape(topology.shape)} {topology.name}: "
        f"{topology.num_ranks} GPUs x {tokens_per_gpu:,} tokens, {alltoall} all-to-all, "
        f"{sized.dispatch_dtype} dispatch, {sized.combine_dtype} combine"
    )
    return Sweep(title=title, rows=tuple(rows), notes=tuple(notes))


def group_of(topology: Topology, ep: int) -> Topology:
    """The part of a machine that a group of `ep` consecutive GPUs is.

    Raises
    ------
    InvalidInput
        When groups of this size would cut a server or a rack unevenly, or do not divide the machine.

    Examples
    --------
    >>> machine = Topology.load("dgx-h100").with_shape("2x4x8")
    >>> group_of(machine, 4).shape, group_of(machine, 16).shape, group_of(machine, 64).shape
    ((1, 1, 4), (1, 2, 8), (2, 4, 8))
    """
    racks, servers, gpus = topology.shape
    inside = max(1, min(ep, gpus))
    within = max(1, min(ep // gpus, servers))
    across = max(1, ep // (gpus * servers))
    tiles = inside * within * across == ep and not (gpus % inside or servers % within or racks % across)
    if not tiles:
        raise InvalidInput(
            f"EP {ep}: groups of {ep} consecutive GPUs do not tile {format_shape(topology.shape)} {topology.name}"
        )
    return topology.with_shape((across, within, inside))


def _groups(
    topology: Topology, widths: Iterable[int] | None, num_experts: int | None
) -> tuple[list[Topology], list[str]]:
    """The groups that fit, by ascending width, and why the others that were asked for do not."""
    most = min(topology.num_ranks, num_experts or topology.num_ranks)
    groups, notes = [], []
    for ep in range(1, most + 1) if widths is None else sorted(set(widths)):
        try:
            if num_experts is not None and ep > num_experts:
                raise InvalidInput(
                    f"EP {ep}: found {num_experts} experts, expected one for each GPU at least"
                )
            groups.append(group_of(topology, ep))
        except InvalidInput as error:
            notes.append(f"{error}: left out")
    if not groups:
        raise InvalidInput(
            notes[0].removesuffix(": left out") if notes else "widths: found none, expected at least one"
        )
    return groups, [] if widths is None else notes


def _sized(model: Model | None, trace: Trace | None) -> tuple[Model, int]:
    """Sizes and router, and the number of layers to price."""
    if trace is not None:
        known = model or Model.for_trace_name(trace.model, trace.num_experts)
        router = {key: getattr(trace, key) for key in ("num_experts", "top_k", "num_groups", "topk_groups")}
        return replace(known, **router), trace.num_layers
    if model is None:
        raise InvalidInput("sweep: found neither a model nor a trace, expected one of them")
    return model, model.num_moe_layers or 1


def _notes(model: Model) -> list[str]:
    said = [
        "a step is a forward pass of the MoE layers: dispatch, experts, combine; training moves twice the bytes",
        f"links at their effective bandwidth, no overlap; expert GEMMs at {GEMM_EFFICIENCY:.0%} of the BF16 peak",
        "compute is that of an evenly loaded GPU, so that a straggler does not flatter a2a/compute",
    ]
    if model.expert_width is None:
        said.append(f"expert size of model {model.name} unknown: no compute and no ratio")
    return said


@dataclass(frozen=True, kw_only=True)
class _Pricing:
    """What all rows share; `tokens` are those of a GPU, `room` the bytes of a GPU for experts."""

    model: Model
    scheme: Scheme
    gpus: int
    tokens: int
    layers: int
    room: float
    expert_dtype: str | None

    def uniform(self, group: Topology) -> Row:
        """Uniform routing to contiguous experts; one layer stands for all."""
        tokens = float(self.tokens * group.num_ranks)
        counts = uniform_counts(self.model, group, tokens)
        held = held_experts(self.model.num_experts or 0, group.num_ranks)
        shares = np.repeat(np.eye(group.num_ranks), held, axis=1)
        experts = np.full(held.sum(), counts.load.sum() / held.sum())
        step = Step(
            topology=group, model=self.model, scheme=self.scheme, scale=1.0, expert_dtype=self.expert_dtype
        )
        priced = step.price([expected(counts, experts, group)], [shares], tokens, (0,))
        return self._row(group, UNIFORM, BASELINE, priced, times=self.layers)

    def judged(self, method: str, placement: Placement, unseen: Trace, group: Topology) -> Row:
        """A placement on tokens that it has not seen."""
        report = evaluate(
            placement,
            unseen,
            group,
            model=self.model,
            alltoall=self.scheme.name,
            gpu_memory=math.inf,
            expert_dtype=self.expert_dtype,
            tokens_per_gpu=self.tokens,
        )
        return self._row(group, unseen.name, method, report.to_dict())

    def _row(
        self, group: Topology, routing: str, method: str, report: dict[str, Any], *, times: int = 1
    ) -> Row:
        """A row from a report, or from that of one of `times` equal layers."""
        ep = group.num_ranks
        moved = 0 if ep == 1 else times  # a GPU that holds every expert exchanges nothing
        gigabytes = {
            level: count * moved * self.tokens * self.gpus / 1e9
            for level, count in report["bytes_per_token"].items()
        }
        seconds = {key: report["seconds"][key] * moved for key in ("dispatch", "combine")}
        seconds["compute"] = report["seconds"]["compute"] * times
        seconds["step"] = sum(seconds.values())
        seconds["even_compute"] = self._even_compute(group)
        size = self.model.expert_bytes(self.expert_dtype)
        layers = self.model.num_moe_layers or self.layers
        held = int(held_experts(self.model.num_experts or 0, ep).max()) * layers
        return Row(
            ep=ep,
            routing=routing,
            method=method,
            inter_server_gb=gigabytes["server"],
            intra_server_gb=gigabytes["gpu"],
            seconds=seconds,
            load=report["load"]["gpu"]["max_over_mean"],
            fits=None if size is None else held * size <= self.room,
        )

    def _even_compute(self, group: Topology) -> float:
        """Seconds of the experts of a GPU that serves the mean number of choices, over all layers."""
        experts = self.model.num_experts or 0
        choices = float(self.tokens * (self.model.top_k or 0))
        held = experts / group.num_ranks
        activated = held * -math.expm1(-choices / held)
        share = compute_seconds(
            np.array([choices]), np.array([activated]), group, self.model, self.expert_dtype
        )
        return share * self.layers
