"""``placer solve`` for counts: loads are balanced, and traffic stays unknown."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import placer
from placer.cli import options
from placer.cli.interrupt import EXIT_CODE, interruptible

if TYPE_CHECKING:
    from placer.counts import Counts
    from placer.placement import Placement
    from placer.problem import Problem
    from placer.result import Budget, Result
    from placer.topology import Topology

    Levels = dict[str, dict[str, float]]

UNKNOWN = "counts only: traffic unknown; a trace with topk_idx tells it"


def refuse(given: dict[str, object]) -> None:
    """Refuse options, by name, that have no meaning without the tokens."""
    for name, value in given.items():
        if value:
            raise click.UsageError(f"{name}: found loads only (counts), expected a trace with topk_idx")


def solve(
    ctx: click.Context,
    counts: Counts,
    machine: Topology,
    method: str,
    *,
    initial: Placement | None,
    budget: Budget,
    seed: int,
    jobs: int,
    log_file: Path | None,
    output: Path | None,
    as_json: bool,
    quiet: bool,
    **limits: Any,
) -> None:
    """Balance the load of experts, print how busy units are, and write the placement."""
    from placer.balancedness import busiest
    from placer.baseline import baseline_placement
    from placer.cli.log import SearchLog, compilation_told
    from placer.problem import Problem
    from placer.solution import solve as search

    log = SearchLog(quiet=quiet, file=log_file)
    problem = Problem.from_counts(counts, machine, **limits)
    ctx.with_resource(compilation_told(log.say))
    log.say(
        f"placer {placer.__version__}  {counts.name}, {problem.num_layers} layers x {problem.num_experts} experts, "
        f"{problem.num_ranks} ranks x {problem.slots_per_rank} slots, method {method}, seed {seed}; {UNKNOWN}"
    )

    def balance(stop: threading.Event) -> Result:
        with log.running(problem.num_layers):
            return search(
                problem,
                method,
                budget=budget,
                seed=seed,
                jobs=jobs,
                initial=initial,
                on_event=log.add,
                stop=stop,
            )

    result, interrupted = interruptible(balance)
    if output is not None:
        result.placement.save(output)
    load, baseline = busiest(problem, result.placement), busiest(problem, baseline_placement(problem))
    document = {
        **result.to_dict(),
        "objective": None,
        "report": None,
        "load": load,
        "baseline": None,
        "baseline_load": baseline,
        "placement": None if output is None else str(output),
    }
    summary = _summary(problem, result, load, baseline)
    log.say(f"{result.status} in {result.seconds:.1f} s")
    if as_json:
        log.say("\n".join(summary))
    written = "not written (-o FILE writes it)" if output is None else f"written to {output}"
    options.show(document, "\n".join([_table(load), f"placement {written}", *summary]), as_json)
    if interrupted:
        ctx.exit(EXIT_CODE)


def _table(load: Levels) -> str:
    rows = [f"{'':10}{'load max/mean':>15}{'worst layer':>13}"]
    rows += [
        f"{level:10}{row['max_over_mean']:15.3f}{row['worst_layer']:13.3f}" for level, row in load.items()
    ]
    return "\n".join(rows)


def _summary(problem: Problem, result: Result, load: Levels, baseline: Levels) -> list[str]:
    """Notes, and what changed from the usual placement."""
    from placer.cli.solve import on_caps
    from placer.solvers import method as load_method

    keeps_caps = "caps" in load_method(result.method).handles
    notes = (*result.notes, *on_caps(result, problem.max_load, keeps_caps), UNKNOWN)
    change = [
        f"load.{level} {baseline[level]['max_over_mean']:.2f} -> {row['max_over_mean']:.2f}"
        for level, row in load.items()
    ]
    return [*(f"note: {note}" for note in notes), f"against linear: {', '.join(change)}"]
