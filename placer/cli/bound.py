"""``placer bound``"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from placer.cli import options, types
from placer.cli.interrupt import EXIT_CODE, interruptible

if TYPE_CHECKING:
    from placer.certificate import Certificate
    from placer.topology import Topology

_EPILOG = """\b
Example:
  placer bound placement.json traces/tinymoe.npz -t dgx-h100 --time-limit 120
"""


@click.command(short_help="Prove how far a placement is from the best possible one.", epilog=_EPILOG)
@options.placed
@click.option(
    "--level",
    type=click.Choice(("gpu", "server", "rack")),
    show_default="server, or gpu where there is one server",
    help="Whose touched units to bound.",
)
@click.option(
    "--max-load",
    type=types.MAX_LOAD,
    default="none",
    show_default=True,
    metavar="X|none",
    help="Bound only placements whose busiest unit has at most X times the mean load.",
)
@click.option(
    "--whole-groups",
    is_flag=True,
    help="Bound only placements that keep gate groups whole, as a permuted checkpoint must.",
)
@options.time_limit("Wall seconds, for all layers together; a bound that is cut short is still valid.")
@options.gap("Stop a layer at this gap.")
@options.jobs
@click.option("-o", "--output", type=types.Output(), help="Write the certificates (.npz), for a checker.")
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    placement: str,
    trace: str,
    topology: Topology,
    shape: tuple[int, int, int] | None,
    level: str | None,
    max_load: float | None,
    whole_groups: bool,
    time_limit: float,
    gap: float,
    jobs: int | None,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove that no placement touches fewer units than a bound, and say how far PLACEMENT is from it on TRACE.

    The bound covers the tokens of TRACE and placements without copies. With few experts a unit it is usually the
    optimum itself; with 16 and more it is some per cent below.
    """
    from placer.certificate import certify
    from placer.cli.log import BoundLog, compilation_told
    from placer.clock import Clock
    from placer.comparison import deciding_level
    from placer.evaluation import check_match
    from placer.placement import Placement
    from placer.problem import Problem
    from placer.trace import Trace

    for given in (placement, trace):
        if output is not None and options.same_file(output, given):
            raise click.UsageError(f"-o {output}: would overwrite an input")
    placed, routed = Placement.load(placement), Trace.load(trace)
    options.made_for(placed, shape, placement)
    check_match(placed, routed)
    machine = topology.with_shape(placed.shape)
    problem = Problem.from_trace(
        routed,
        machine,
        slots_per_gpu=placed.slots_per_rank,
        max_load=max_load,
        load_margin=0.0,
        gpu_memory=1e18,  # a placement exists; whether it fits is for `placer check`
        replica_choice=placed.rule,
    )
    log = BoundLog(quiet=quiet)
    ctx.with_resource(compilation_told(log.say))

    def work(stop: threading.Event) -> Certificate:
        return certify(
            placed,
            problem,
            level=level or deciding_level(machine),
            whole_groups=whole_groups,
            clock=Clock.start(seconds=time_limit, gap=gap, stop=stop),
            jobs=options.workers(jobs),
            on_progress=log.add,
        )

    certificate, interrupted = interruptible(work)
    if output is not None:
        certificate.save(output)
    heading = f"{placement} on {routed.name}: {certificate.tokens:,} tokens, {problem.num_layers} layers"
    options.show(certificate.to_dict(), f"{heading}\n\n{certificate}", as_json)
    if interrupted:
        ctx.exit(EXIT_CODE)
