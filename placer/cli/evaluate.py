"""``placer evaluate``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from placer.cli import options
from placer.errors import GateFailed

if TYPE_CHECKING:
    from placer.model import Model
    from placer.topology import Topology

_EPILOG = """\b
Example:
  placer evaluate placement.json traces/tinymoe.npz -t dgx-h100 --require 'remote.server<=4.5'
"""


@click.command(short_help="Price a placement on a trace: traffic, load, time.", epilog=_EPILOG)
@click.argument("placement", type=options.PlacementFile())
@options.trace
@options.topology
@click.option(
    "--shape",
    type=options.Shape(),
    metavar="RxSxG",
    show_default="the placement's",
    help="Must be the placement's own.",
)
@options.model
@options.alltoall
@options.replica_choice(None)
@options.memory
@click.option(
    "--require",
    "gates",
    multiple=True,
    metavar="'PATH<=X'",
    help="Exit with 5 unless this number of the report keeps its limit; may repeat.",
)
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    placement: str,
    trace: str,
    topology: Topology,
    shape: tuple[int, int, int] | None,
    model: Model | None,
    gates: tuple[str, ...],
    as_json: bool,
    **conditions: Any,
) -> None:
    """Price PLACEMENT on TRACE: units touched, bytes over each kind of link, load, and seconds of a step.

    \b
    touched  units (GPUs, servers, racks) that hold a token's experts, mean over tokens and layers
    remote   touched units other than the home's
    home     the GPU on which a token lives before dispatch; uniform over all GPUs
    load     busiest unit over mean: mean over layers, and the worst layer
    """
    from placer.evaluation import evaluate
    from placer.placement import Placement, format_shape
    from placer.report import Gate
    from placer.trace import Trace

    required = [Gate.parse(gate) for gate in gates]
    placed, routed = Placement.load(placement), Trace.load(trace)
    options.made_for(placed, shape, placement)
    machine = topology.with_shape(placed.shape)
    report = evaluate(placed, routed, machine, model=model, **conditions)
    kept, failed = [], []
    for gate in required:
        try:
            kept.append(report.require(gate))
        except GateFailed as error:
            failed.append(str(error))
    heading = (
        f"{placement} on {routed.name}: {report.tokens:,} tokens, {report.layers} layers, "
        f"{format_shape(machine.shape)} {machine.name}, {report.alltoall} all-to-all"
    )
    assumed = "\n".join(f"assumed: {line}" for line in report.assumptions)
    options.show(report.to_dict(), f"{heading}\n\n{report}\n\n{assumed}", as_json)
    for line in kept:
        click.echo(f"ok: {line}", err=True)
    for line in failed:
        click.echo(f"Error: {line}", err=True)
    if failed:
        ctx.exit(GateFailed.exit_code)
