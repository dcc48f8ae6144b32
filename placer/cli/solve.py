"""``placer solve``"""

from __future__ import annotations

import itertools
import shlex
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import placer
from placer.cli import counted, options, types
from placer.cli.interrupt import EXIT_CODE, interruptible

if TYPE_CHECKING:
    from placer.model import Model
    from placer.result import Event, Result
    from placer.topology import Topology

_EPILOG = """\b
Example:
  placer solve traces/tinymoe.npz -t dgx-h100 --shape 1x8x1 --max-load 1.05 -o placement.json
  placer solve traces/tinymoe.npz -t dgx-h100 --shape 1x8x1 --redundant auto --gpu-memory 40GB -o placement.json
  placer solve traces/tinymoe.npz -t dgx-h100 --shape 1x8x1 --copies 48 --replica-choice cover -o placement.json
  placer solve traces/tinymoe.npz -t dgx-h100 --shape 1x8x1 --redundant 8 --constraints pins.toml -o placement.json
  placer solve traces/tinymoe.npz -t dgx-h100 --shape 1x4x4 --tokens-per-step 256 --steady -o placement.json

\b
where pins.toml holds any number of these (layers = [0, 1] narrows each to some layers; ids count from 0):
  [[pin]]             # experts that stand on one unit
  experts = [3, 17]
  server = 0          # or gpu = 5, or rack = 1
  [[apart]]           # experts no two of which share a unit
  experts = [1, 2, 3]
  level = "gpu"       # or "server", or "rack"
  [[free]]            # GPUs kept empty: the experts need --redundant or --slots-per-gpu for room elsewhere
  gpus = [7]
  slots = 1           # so many of each only
"""


@click.command(short_help="Search for a placement and say what it gains.", epilog=_EPILOG)
@options.trace
@options.topology
@options.shape
@options.model
@click.option(
    "--method",
    type=options.METHOD,
    default="auto",
    show_default=True,
    metavar="NAME",
    help="How to search: a name from 'placer methods'.",
)
@click.option(
    "--max-load",
    type=options.MAX_LOAD_OR_AUTO,
    default="1.05",
    show_default=True,
    metavar="X|none|auto",
    help="Busiest GPU, server or rack over the mean, at most; auto tries none, 1.25, 1.10, 1.05 and 1.02 and "
    "takes the least modelled step time.",
)
@options.load_margin
@options.load_model
@options.steady
@options.batches
@click.option(
    "--redundant",
    type=options.Count("a number of 0 or more, or auto", words=("auto",)),
    metavar="N|auto",
    show_default="0",
    help="Spare slots a layer, over all GPUs, for copies; auto tries 0, 1, 2 and 4 more a GPU within memory, which "
    "share the time, and takes the fewest within 1 % of the least modelled step time.",
)
@options.slots_per_gpu
@click.option(
    "--copies",
    type=options.Count("a number of 0 or more"),
    metavar="N",
    help="Copies over all layers, at most, shared out where they pay most; instead of --redundant. Several numbers of "
    "slots a GPU are tried, which share the time.",
)
@options.constraints("A TOML file that says where experts may stand, copies included; an example is below.")
@click.option(
    "--whole-groups",
    is_flag=True,
    help="Keep gate groups whole, as 'placer permute' needs it for group-limited models. No copies are made then.",
)
@options.replica_choice("nearest")
@options.memory
@options.search
@click.option(
    "--initial",
    type=options.PlacementFile(),
    help="A placement file to start from; the result is never worse.",
)
@click.option(
    "--bound/--no-bound",
    "prove",
    default=True,
    help="Also prove how far from the best possible the result is, in what time is left; 'placer bound' goes further.",
)
@click.option("--log", "log_file", type=options.Output(), help="Also write the log, one JSON object a line.")
@click.option("-o", "--output", type=options.Output(), help="Write the placement file.")
@click.option(
    "--report",
    "page_file",
    type=types.Output(),
    metavar="FILE",
    help="Also write a page to look at, as 'placer report' does.",
)
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    trace: str,
    topology: Topology,
    shape: tuple[int, int, int] | None,
    model: Model | None,
    method: str,
    time_limit: float,
    rounds: int | None,
    gap: float,
    seed: int,
    jobs: int | None,
    copies: int | None,
    steady: bool,
    tokens_per_step: int | None,
    phase: str | None,
    initial: str | None,
    prove: bool,
    log_file: Path | None,
    output: Path | None,
    page_file: Path | None,
    as_json: bool,
    quiet: bool,
    **limits: Any,
) -> None:
    """Search for a placement of the experts of TRACE on a machine, and say what it gains over the usual one.

    The usual one, linear, is experts in order: the first E/N on the first GPU, and so on.

    Columns of the log: it = rounds of search so far; H = the layer costs less than linear; objective = seconds per
    token on the links, layers done so far; load = busiest unit over mean.
    """
    from placer import allotment
    from placer.baseline import baseline_placement
    from placer.cli.log import SearchLog, compilation_told
    from placer.cli.summary import Row, peers
    from placer.cli.summary import summary as table
    from placer.comparison import against, deciding_level
    from placer.counts import Counts
    from placer.evaluation import evaluate
    from placer.placement import Placement
    from placer.problem import Problem
    from placer.redundancy import candidates, fewest, redundancy
    from placer.solution import solve
    from placer.solvers import method as load_method
    from placer.spectrum import CAPS, chosen, spectrum
    from placer.trace import Trace

    files = {
        name: path for name, path in (("-o", output), ("--log", log_file), ("--report", page_file)) if path
    }
    for name, path in files.items():
        if options.same_file(path, trace):
            raise click.UsageError(f"{name} {path}: would overwrite the trace")
    for (one, path), (other, same) in itertools.combinations(files.items(), 2):
        if path == same:
            raise click.UsageError(f"{one} and {other}: found {path} for both, expected two files")
    if page_file is not None:
        from placer import html

        html.require()
    if Counts.holds(trace):
        counted.refuse(
            {
                "--copies": copies is not None,
                "--redundant auto": limits["redundant"] == "auto",
                "--max-load auto": limits["max_load"] == "auto",
                "--load-model activated": limits["load_model"] != "tokens",
                "--steady": steady,
                "--report": page_file is not None,
                "--tokens-per-step": tokens_per_step is not None,
                "--phase": phase is not None,
            }
        )
        counted.solve(
            ctx,
            Counts.open(trace),
            topology if shape is None else topology.with_shape(shape),
            method,
            model=model,
            initial=None if initial is None else Placement.load(initial),
            budget=options.budget(time_limit, rounds, gap),
            seed=seed,
            jobs=options.workers(jobs),
            log_file=log_file,
            output=output,
            as_json=as_json,
            quiet=quiet,
            **limits,
        )
        return
    routed = options.batched(Trace.load(trace), tokens_per_step, phase, seed)
    start = None if initial is None else Placement.load(initial)
    machine = topology if shape is None else topology.with_shape(shape)
    spread, sparing = limits["max_load"] == "auto", limits["redundant"] == "auto"
    prove = prove and not (spread or sparing or copies is not None)
    if spread:
        limits["max_load"] = None
    if sparing or copies is not None:
        fixed = {"--max-load auto": spread, "--initial": initial, "--slots-per-gpu": limits["slots_per_gpu"]}
        fixed["--constraints"] = limits["constraints"]
        fixed["--whole-groups"] = limits["whole_groups"]
        fixed |= {"--load-model activated": limits["load_model"] != "tokens", "--steady": steady}
        if copies is not None:
            fixed["--redundant"] = limits["redundant"] is not None
        for name in (name for name, given in fixed.items() if given):
            one = "--redundant auto" if copies is None else "--copies"
            raise click.UsageError(f"{one} and {name} exclude each other")
        limits |= {"redundant": None, "slots_per_gpu": -(-routed.num_experts // machine.num_ranks)}
    log = SearchLog(quiet=quiet, file=log_file)
    problem = Problem.from_trace(routed, machine, model=model, **limits)
    ctx.with_resource(compilation_told(log.say))  # the problem is sound: from here on it may take a while
    pricing: dict[str, Any] = {
        "model": problem.model,
        "gpu_memory": problem.gpu_memory,
        "reserve": problem.reserve,
        "expert_dtype": problem.expert_dtype,
    }
    sizes = [problem.slots_per_rank]
    if sparing:
        sizes = candidates(problem, method)
    elif copies is not None:
        sizes = allotment.candidates(problem, copies, method)
    log.say(
        f"placer {placer.__version__}  {routed.name}, {problem.num_layers} layers x {problem.num_experts} experts, "
        f"{problem.num_ranks} ranks x {', '.join(map(str, sizes))} slots, method {method}, seed {seed}"
    )

    events: list[dict[str, Any]] = []

    def heard(event: Event) -> None:
        events.append(asdict(event))
        log.add(event)

    def search(stop: threading.Event) -> Result:
        budget = options.budget(time_limit, rounds, gap)
        how: dict[str, Any] = {
            "seed": seed,
            "jobs": options.workers(jobs),
            "prove": prove,
            "on_event": heard,
            "stop": stop,
        }
        with log.running(problem.num_layers * (len(CAPS) if spread else len(sizes)), time_limit):
            if sparing:
                return fewest(
                    redundancy(problem, routed, method, budget=budget, evaluation=pricing, **how), problem
                )
            if copies is not None:
                return allotment.shared_out(problem, method, copies=copies, slots=sizes, budget=budget, **how)
            how |= {"initial": start, "steady": steady}
            if not spread:
                return solve(problem, method, budget=budget, **how)
            points = spectrum(problem, routed, method, budget=budget, evaluation=pricing, **how)
            limits["max_load"] = points[0].max_load
            return chosen(points)

    result, interrupted = interruptible(search)
    made_of = {**result.placement.provenance, "trace_digest": routed.digest}
    result = replace(result, placement=replace(result.placement, provenance=made_of))
    if output is not None:
        result.placement.save(output)
    usual = result.placement.slots_per_rank if copies is None else allotment.even_slots(problem, copies)
    log.say(f"{result.status} in {result.seconds:.1f} s; pricing it beside linear and eplb...")
    linear = baseline_placement(replace(problem, slots_per_rank=usual))
    report = evaluate(result.placement, routed, machine, **pricing)
    baseline = evaluate(linear, routed, machine, **pricing)
    keeps_caps = "caps" in load_method(method).handles
    level = deciding_level(machine)
    gain = against(report, baseline, level, copies=result.placement.has_copies)
    notes = (*result.notes, *on_caps(result, limits["max_load"], keeps_caps))
    compared = "linear with copies" if linear.has_copies else "linear"
    rows = [Row(name=compared, placement=linear, report=baseline)]
    if not interrupted:
        rows = peers(replace(problem, slots_per_rank=usual), routed, rows[0], **pricing)
    rows = [row for row in rows if row.name != method]
    rows.append(Row(name=method, placement=result.placement, report=report, seconds=result.seconds))
    summary = [
        table(rows, level),
        *(f"note: {note}" for note in notes),
        *_on_steps(result),
        *_on_proof(result, prove and not interrupted),
        f"against {compared}: {gain}",
    ]
    if as_json:
        log.say("\n".join(summary))
    document = {
        **result.to_dict(),
        "report": report.to_dict(),
        "baseline": baseline.to_dict(),
        "placement": None if output is None else str(output),
    }
    if page_file is not None:
        log.say(f"writing {page_file}...")
        html.page(
            result.placement,
            routed,
            machine,
            linear=linear,
            fitted=routed,
            result=document,
            events=events,
            name="placement.json" if output is None else str(output),
            command=shlex.join(["placer", *sys.argv[1:]]),
            **pricing,
        ).save(page_file)
    written = "not written (-o FILE writes it)" if output is None else f"written to {output}"
    options.show(document, "\n".join([str(report), f"placement {written}", *summary]), as_json)
    if interrupted:
        ctx.exit(EXIT_CODE)


def _on_proof(result: Result, asked: bool) -> list[str]:
    """How far from the best possible the objective is, where that was bounded, or why not."""
    if result.gap is None:
        unspared = result.placement.num_slots == result.placement.num_experts
        return ["no bound: the search left no time for one; 'placer bound' makes one"] * (asked and unspared)
    layers, proved = result.placement.num_layers, len(result.proved_layers)
    if proved == layers:
        return [f"proof: optimal within its load caps in all {layers} layers ({result.bound_method})"]
    said = f"proof: within {result.gap:.2%} of the best possible objective"
    return [
        f"{said}, {proved} of {layers} layers optimal ({result.bound_method}); 'placer bound' goes further"
    ]


def _on_steps(result: Result) -> list[str]:
    """What evening out single steps gained, and what it cost."""
    if result.steady is None:
        return []
    changes = [f"{name} {row['before']:.3f} -> {row['after']:.3f}" for name, row in result.steady.items()]
    return [f"steady: {', '.join(changes)}"]


def on_caps(result: Result, max_load: float | None, keeps_caps: bool) -> list[str]:
    """What became of the load caps: raised ones, one line a level."""
    if max_load is not None and not keeps_caps:
        return [f"{result.method} keeps no load caps; --max-load {max_load:g} had no effect"]
    lines = []
    for level in dict.fromkeys(row["level"] for row in result.caps_raised):
        rows = [row for row in result.caps_raised if row["level"] == level]
        lines.append(
            f"load cap of a {level} raised in {len(rows)} of {result.placement.num_layers} layers, "
            f"from {rows[0]['asked']:g} to at most {max(row['cap'] for row in rows):.3f}: "
            "even packing by load alone needs it"
        )
    return lines
