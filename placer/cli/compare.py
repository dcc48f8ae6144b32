"""``placer compare``"""

from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from placer.cli import options, types
from placer.cli.interrupt import EXIT_CODE, interruptible

if TYPE_CHECKING:
    from placer.comparison import Comparison, Row
    from placer.topology import Topology

_EPILOG = """\b
Example:
  placer compare traces/tinymoe.npz -t dgx-h100 --shape 1x8x1 --method eplb --method tabu --max-load 1.05,1.2
  placer compare traces/tinymoe.npz -t dgx-h100 --shape 1x8x1 --method auto --max-load 1.05,none --redundant 0,8,16
"""


@click.command(short_help="Fit methods on part of a trace, judge on the rest.", epilog=_EPILOG)
@options.trace
@options.topology
@options.shape
@options.model
@click.option(
    "--method",
    "methods",
    type=types.METHOD,
    multiple=True,
    metavar="NAME",
    show_default="all of them",
    help="A name from 'placer methods'; may repeat.",
)
@click.option(
    "--holdout",
    type=types.Number("a number above 0 and below 1", low=1e-9, high=1.0),
    default="0.5",
    show_default=True,
    metavar="F",
    help="Share of the sequences to hold out.",
)
@click.option("--test", type=types.Input(), help="Judge on this trace instead, and fit on all of TRACE.")
@click.option(
    "--split-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the split.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Runs of each method, --seed and up.",
)
@click.option(
    "--max-load",
    "max_loads",
    type=types.Numbers(types.MAX_LOAD),
    default="1.05",
    show_default=True,
    metavar="X,Y,..",
    help="Load caps to run; none is one too.",
)
@options.load_margin
@click.option(
    "--redundant",
    "redundants",
    type=types.Numbers(types.Count("numbers of spare slots, 0 or more, such as 0,8,16")),
    show_default="0",
    metavar="N,N,..",
    help="Spare slots a layer, over all GPUs; each number runs with every cap.",
)
@options.slots_per_gpu
@options.replica_choice("nearest")
@options.alltoall
@options.memory
@options.search
@click.option(
    "--html",
    "page",
    type=types.Output(),
    metavar="FILE",
    help="Also write a page: the front, wins, ties and losses with intervals, time.",
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
    methods: tuple[str, ...],
    test: str | None,
    time_limit: float,
    rounds: int | None,
    gap: float,
    jobs: int | None,
    page: Path | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Fit methods on one part of TRACE and judge them on it and on the part they have not seen.

    Several values of --max-load and --redundant show the front: what a looser cap or a spare slot buys in traffic, and
    what it costs in load and memory.
    """
    from placer.cli.log import compilation_told
    from placer.comparison import compare, deciding_level
    from placer.trace import Trace

    if page is not None:
        from placer import html

        html.require()  # before anything takes its time
        if options.same_file(page, trace) or (test is not None and options.same_file(page, test)):
            raise click.UsageError(f"--html {page}: would overwrite a trace")
    routed = Trace.load(trace)
    other = None if test is None else Trace.load(test)
    machine = topology if shape is None else topology.with_shape(shape)

    level = deciding_level(machine)

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    def starts(method: str, max_load: float | None, seed: int, redundant: int) -> None:
        cap = "" if max_load is None else f", max load {max_load:g}"
        spare = f", redundant {redundant}" if redundant else ""
        say(f"{method}{cap}{spare}, seed {seed}: running")

    def ends(row: Row) -> None:
        say(f"  held-out remote.{level} {row.held_out.remote[level]:.3f} after {row.seconds:.1f} s")

    def run(stop: threading.Event) -> Comparison:
        return compare(
            routed,
            machine,
            methods or None,
            test=other,
            jobs=options.workers(jobs),
            budget=options.budget(time_limit, rounds, gap),
            on_start=starts,
            on_row=ends,
            stop=stop,
            **choices,
        )

    ctx.with_resource(compilation_told(say))
    say(f"at most {time_limit:g} s of search for each row")

    comparison, interrupted = interruptible(run)
    if page is not None and comparison.rows:
        html.comparison_page(comparison, command=shlex.join(["placer", *sys.argv[1:]])).save(page)
    options.show(comparison.to_dict(), str(comparison), as_json)
    if interrupted:
        ctx.exit(EXIT_CODE)
