"""compare: methods side by side, each fitted on one part of a trace and judged on both."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placer.errors import Infeasible, InvalidInput, PlacerError
from placer.evaluation import evaluate
from placer.placement import Placement, format_shape
from placer.problem import Problem, slots_per_rank
from placer.report import Report, format_seconds
from placer.result import Budget
from placer.solution import solve
from placer.solvers import method as load_method
from placer.solvers import names
from placer.table import aligned
from placer.topology import Topology
from placer.trace import Trace

SCHEMA = "placer/comparison/1"
BASELINE = "linear"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: a method under one load cap, with so many spare slots and one seed.

    Parameters
    ----------
    method : str
    seed : int
    keeps_caps : bool
        Whether the method keeps load caps at all.
    max_load : float or None
        The cap; None where there is none or the method keeps none.
    redundant : int
        Spare slots of a layer, over all GPUs.
    seconds : float
        Wall seconds of the fit.
    train, held_out : Report
        The placement on the tokens it was fitted to, and on the others.
    """

    method: str
    seed: int
    keeps_caps: bool
    max_load: float | None
    redundant: int
    seconds: float
    train: Report
    held_out: Report

    def to_dict(self) -> dict[str, Any]:
        """A row of the JSON document."""
        return {
            "method": self.method,
            "seed": self.seed,
            "keeps_caps": self.keeps_caps,
            "max_load": self.max_load,
            "redundant": self.redundant,
            "seconds": self.seconds,
            "train": self.train.to_dict(),
            "held_out": self.held_out.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    Parameters
    ----------
    rows : tuple of Row
        In the order they were run; `linear` is always among them.
    title : str
        Trace, parts and shape, in words.
    level : str
        The level that decides: ``server``, or ``gpu`` where there is one server.
    notes : tuple of str
        Methods left out and why; how the trace was split.
    """

    rows: tuple[Row, ...]
    title: str
    level: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON document ``placer/comparison/1``."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "level": self.level,
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def against_linear(self, row: Row) -> float | None:
        """Change of the held-out remote units against `linear` of the same seed and spare slots, a fraction; None
        without traffic."""
        base = [other for other in self.rows if (other.method, other.redundant) == (BASELINE, row.redundant)]
        base = [other for other in base if other.seed == row.seed] or base
        before = base[0].held_out.remote[self.level] if base else 0.0
        return row.held_out.remote[self.level] / before - 1.0 if before else None

    def to_frame(self) -> Any:
        """The runs as a `pandas.DataFrame`, one row each.

        Columns are those of `Row`, ``against_linear`` (a fraction), and the numbers of both reports under the dotted
        paths that ``placer evaluate --require`` takes, after ``train.`` or ``held_out.``: ``held_out.remote.server``.

        Raises
        ------
        InvalidInput
            When pandas is not installed; OR-Tools brings it.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise InvalidInput("to_frame needs pandas, which is not installed: pip install pandas") from None
        rows = []
        for row in self.rows:
            known = row.to_dict()
            parts = {part: known.pop(part) for part in ("train", "held_out")}
            rows.append(
                {
                    **known,
                    "against_linear": self.against_linear(row),
                    **{
                        f"{part}.{path}": number
                        for part, report in parts.items()
                        for path, number in _numbers(report, but=("per_layer",))
                    },
                }
            )
        return DataFrame(rows)

    def figure(self, name: str) -> Any:
        """A plotly figure: ``front``, held-out traffic over load, or ``seconds`` of each run.

        Raises
        ------
        InvalidInput
            When there is no such figure, or plotly is not installed.
        """
        from placer import notebook

        return notebook.draw(name, notebook.comparison_figures(self))

    def _repr_html_(self) -> str:
        from placer import notebook

        legend, header, rows = self._table()
        return notebook.table(header, rows, title=self.title, notes=(legend, *self.notes))

    def __str__(self) -> str:
        legend, header, rows = self._table()
        return "\n".join([self.title, legend, "", aligned(header, rows), *(f"note: {n}" for n in self.notes)])

    def _table(self) -> tuple[str, list[str], list[list[str | None]]]:
        """Legend, header and rows of the comparison as text; a row is a method under a cap, over its seeds."""
        groups: dict[tuple[str, int, float | None], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.method, row.redundant, row.max_load), []).append(row)
        spare = any(row.redundant for row in self.rows)
        columns: dict[str, Callable[[list[Row]], str | None]] = {
            "method": lambda rows: rows[0].method,
            "max load": lambda rows: _cap(rows[0].keeps_caps, rows[0].max_load),
            "redundant": lambda rows: str(rows[0].redundant),
            f"touched.{self.level}": lambda rows: _both(rows, lambda report: report.touched[self.level]),
            f"remote.{self.level}": lambda rows: _both(rows, lambda report: report.remote[self.level]),
            "load.gpu": lambda rows: _both(rows, lambda report: report.load["gpu"]["max_over_mean"]),
            "load.server": lambda rows: _both(rows, lambda report: report.load["server"]["max_over_mean"]),
            "GB a GPU": _gigabytes,
            "seconds": lambda rows: f"{np.mean([row.seconds for row in rows]):.1f}",
            "vs linear": lambda rows: _percent([self.against_linear(row) for row in rows]),
        }
        # With copies only remote units count; without them, touched units say the same in a more familiar way.
        del columns[f"touched.{self.level}" if spare else "redundant"]
        if all(_gigabytes([row]) is None for row in self.rows):
            del columns["GB a GPU"]
        lines = [[cell(rows) for cell in columns.values()] for rows in groups.values()]
        seeds = len({row.seed for row in self.rows})
        same = " with as many spare slots" if spare else ""
        legend = (
            f"Cells: fitted / held out; vs linear{same}: held-out remote.{self.level}, negative is better"
        )
        if "GB a GPU" in columns:
            legend += "; GB a GPU: experts of all layers on the fullest"
        if seeds > 1:
            legend += f"; means over {seeds} seeds, +- their standard deviation"
        return legend, list(columns), lines


def compare(
    trace: Trace,
    topology: Topology,
    methods: Sequence[str] | None = None,
    *,
    test: Trace | None = None,
    holdout: float = 0.5,
    seed: int = 0,
    seeds: int = 1,
    max_loads: Sequence[float | None] = (1.05,),
    redundants: Sequence[int] | None = None,
    split_seed: int = 0,
    jobs: int = 1,
    budget: Budget | None = None,
    alltoall: str = "hierarchical",
    on_start: Callable[[str, float | None, int, int], None] | None = None,
    on_row: Callable[[Row], None] | None = None,
    stop: threading.Event | None = None,
    **problem_options: Any,
) -> Comparison:
    """Fit every method on one part of a trace and judge it on both parts.

    Parameters
    ----------
    trace : Trace
        Split by whole sequences, unless `test` is given: then all of it is fitted.
    topology : Topology
    methods : sequence of str, optional
        By default every method that can be used here; `linear` always runs.
    test : Trace, optional
        Another trace to judge on.
    holdout : float
        Share of the sequences held out, in (0, 1).
    seed, seeds : int
        The first seed, and how many.
    max_loads : sequence of float or None
        Load caps to run; methods that keep none run once.
    redundants : sequence of int, optional
        Spare slots of a layer over all GPUs, each with every cap and with a baseline of its own; by default as
        `problem_options` say. Of several, those that do not fit into memory are left out.
    split_seed : int
        Another one gives another split.
    jobs, budget
        As for `placer.solve`, for each run.
    alltoall : str
        As for `placer.evaluate`.
    on_start : callable, optional
        Called with method, load cap (None without one), seed and spare slots before each run.
    on_row : callable, optional
        Called with each `Row` as it is done.
    stop : threading.Event, optional
        Set it from elsewhere to end early with the rows done so far.
    **problem_options
        As for `Problem.from_trace`: model, redundant, load_margin, replica_choice, ...

    Returns
    -------
    Comparison

    Raises
    ------
    InvalidInput
        When an argument is out of range, or a method asked for by name cannot run.

    Examples
    --------
    >>> from placer import Topology, Trace
    >>> ids = np.array([[[0, 2]], [[1, 3]]] * 20)
    >>> trace = Trace(topk_idx=ids, num_experts=4, sequence=np.arange(40))
    >>> found = compare(trace, Topology.load("dgx-h100").with_shape("1x2x1"), ["refine"], max_loads=[None])
    >>> [(row.method, row.held_out.touched["server"]) for row in found.rows]
    [('linear', 2.0), ('refine', 1.0)]
    """
    if seeds < 1:
        raise InvalidInput(f"seeds: found {seeds}, expected at least 1")
    if not 0 < holdout < 1:
        raise InvalidInput(f"holdout: found {holdout}, expected more than 0 and less than 1")
    if not max_loads:
        raise InvalidInput("max loads: found none, expected at least one cap")
    slots = _slots(trace, topology, redundants, problem_options)
    fit, unseen = (trace, test) if test is not None else trace.split(1.0 - holdout, seed=split_seed)
    if (unseen.num_experts, unseen.layer_ids) != (fit.num_experts, fit.layer_ids):
        raise InvalidInput(
            f"test trace {unseen.name}: found {unseen.num_layers} layers x {unseen.num_experts} experts "
            f"(layers {unseen.layer_ids[0]}..{unseen.layer_ids[-1]}), expected {fit.num_layers} x {fit.num_experts} "
            f"({fit.layer_ids[0]}..{fit.layer_ids[-1]}) as in {fit.name}"
        )
    stop = stop or threading.Event()
    notes = []
    if test is None and trace.split_kind == "blocks":
        notes.append(
            "split by blocks of tokens: the trace names no sequences, so the parts are less independent"
        )
    posed = Problem.from_trace(
        fit, topology, max_load=max_loads[0], slots_per_gpu=slots[0], **problem_options
    )

    def run(method: str, problem: Problem, keeps_caps: bool, seed: int) -> Row:
        result = solve(problem, method, budget=budget, seed=seed, jobs=jobs, stop=stop)
        return Row(
            method=method,
            seed=seed,
            keeps_caps=keeps_caps,
            max_load=problem.max_load if keeps_caps else None,
            redundant=problem.num_slots - problem.num_experts,
            seconds=result.seconds,
            train=_judge(result.placement, fit, problem, alltoall),
            held_out=_judge(result.placement, unseen, problem, alltoall),
        )

    rows: list[Row] = []
    for method, handles in _runnable(methods, notes):
        keeps = "caps" in handles
        try:
            for number, cap, at in itertools.product(
                tuple(slots), max_loads if keeps else max_loads[:1], range(seed, seed + seeds)
            ):
                if number not in slots:
                    continue
                problem = replace(posed, slots_per_rank=number, max_load=cap)
                spare = problem.num_slots - problem.num_experts
                if on_start is not None:
                    on_start(method, cap if keeps else None, at, spare)
                try:
                    row = run(method, problem, keeps, at)
                except Infeasible as error:
                    if method != BASELINE or len(slots) == 1:
                        raise
                    notes.append(f"redundant {spare} left out: {error}")
                    slots.remove(number)
                    continue
                if stop.is_set():
                    return _comparison(rows, fit, unseen, test, topology, [*notes, "interrupted"])
                rows.append(row)
                if on_row is not None:
                    on_row(row)
        except ImportError as error:
            notes.append(f"{method} left out: {error.name or error} is not installed")
        except PlacerError as error:
            if methods is not None or method == BASELINE:
                raise
            notes.append(f"{method} left out: {error}")
    return _comparison(rows, fit, unseen, test, topology, notes)


def _slots(
    trace: Trace, topology: Topology, redundants: Sequence[int] | None, options: dict[str, Any]
) -> list[int]:
    """Slots a GPU to run, each once; takes what says so out of the options of a problem."""
    redundant, slots_per_gpu = options.pop("redundant", None), options.pop("slots_per_gpu", None)
    if redundants is not None and redundant is not None:
        raise InvalidInput("redundants and redundant exclude each other")
    asked = (redundant,) if redundants is None else redundants
    if not asked:
        raise InvalidInput("redundants: found none, expected at least one number of spare slots")
    per_rank = (slots_per_rank(trace.num_experts, topology.num_ranks, n, slots_per_gpu) for n in asked)
    return list(dict.fromkeys(per_rank))


def _judge(placement: Placement, trace: Trace, problem: Problem, alltoall: str) -> Report:
    priced: dict[str, Any] = {
        "model": problem.model,
        "gpu_memory": problem.gpu_memory,
        "reserve": problem.reserve,
        "expert_dtype": problem.expert_dtype,
    }
    return evaluate(placement, trace, problem.topology, alltoall=alltoall, **priced)


def _runnable(methods: Sequence[str] | None, notes: list[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Methods that can be loaded, each once, the baseline first."""
    asked = names() if methods is None else methods
    for name in dict.fromkeys([BASELINE, *asked]):
        try:
            yield name, load_method(name).handles
        except ImportError as error:
            notes.append(f"{name} left out: {error.name or error} is not installed")


def _comparison(
    rows: list[Row], fit: Trace, unseen: Trace, test: Trace | None, topology: Topology, notes: list[str]
) -> Comparison:
    held = (
        f"{unseen.num_tokens:,} held out"
        if test is None
        else f"judged on {unseen.num_tokens:,} of {unseen.name}"
    )
    return Comparison(
        rows=tuple(rows),
        title=f"{fit.name}: fitted on {fit.num_tokens:,} tokens, {held}; {fit.num_layers} layers x {fit.num_experts} "
        f"experts, {format_shape(topology.shape)} {topology.name}",
        level=deciding_level(topology),
        notes=tuple(notes),
    )


def deciding_level(topology: Topology) -> str:
    """The level whose traffic a placement is judged by: servers, or GPUs where there is one server.

    Examples
    --------
    >>> deciding_level(Topology.load("dgx-h100").with_shape("1x1x8"))
    'gpu'
    """
    racks, servers, _ = topology.shape
    return "server" if racks * servers > 1 else "gpu"


def against(report: Report, baseline: Report, level: str, *, copies: bool = False) -> str:
    """One line that says what changed from a baseline; with copies it counts remote units, for they decide.

    Examples
    --------
    >>> from placer import Placement, Topology, Trace, evaluate
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> topology = Topology.load("dgx-h100").with_shape("1x2x1")
    >>> before, after = (
    ...     evaluate(Placement(physical_to_logical=np.array([row]), num_experts=4, shape=(1, 2, 1)), trace, topology)
    ...     for row in ([0, 1, 2, 3], [0, 2, 1, 3]))
    >>> against(after, before, "server")
    'touched.server 2.00 -> 1.00 (-50.0 %), load.server 1.00 -> 1.00, step ... -> ... (-...%)'
    """
    word = "remote" if copies else "touched"
    old, new = getattr(baseline, word)[level], getattr(report, word)[level]
    cold, hot = (r.load[level]["max_over_mean"] for r in (baseline, report))
    slow, fast = baseline.seconds["step"], report.seconds["step"]
    return (
        f"{word}.{level} {old:.2f} -> {new:.2f} ({_change(old, new)}), "
        f"load.{level} {cold:.2f} -> {hot:.2f}{' (worse)' if hot > cold * 1.005 else ''}, "
        f"step {format_seconds(slow)} -> {format_seconds(fast)} ({_change(slow, fast)})"
    )


def _change(old: float, new: float) -> str:
    percent = round(100.0 * (new / old - 1.0), 1) if old else 0.0
    if percent == 0.0:
        return "no change"
    return f"{percent:+.1f} %{', worse' if percent > 0 else ''}"


def _both(rows: list[Row], pick: Callable[[Report], float]) -> str:
    train, held_out = (
        np.mean([pick(r) for r in part]) for part in zip(*((r.train, r.held_out) for r in rows), strict=True)
    )
    return f"{train:.3f} / {held_out:.3f}"


def _cap(kept: bool, cap: float | None) -> str | None:
    if not kept:
        return None
    return "none" if cap is None else f"{cap:g}"


def _numbers(document: dict[str, Any], but: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """The numbers of a report's document, with their dotted paths."""
    for key, value in document.items():
        if isinstance(value, dict) and key not in but:
            yield from ((f"{key}.{path}", number) for path, number in _numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _gigabytes(rows: list[Row]) -> str | None:
    held = rows[0].train.memory["worst_gpu_bytes"]
    return None if held is None else f"{held / 1e9:.3g}"


def _percent(changes: list[float | None]) -> str | None:
    known = [100.0 * change for change in changes if change is not None]
    if not known:
        return None
    spread = f" +- {np.std(known, ddof=1):.1f}" if len(known) > 1 else ""
    return f"{np.mean(known):+.1f}{spread} %"
