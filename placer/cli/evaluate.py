"""``placer evaluate``"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from placer.cli import options
from placer.errors import GateFailed

if TYPE_CHECKING:
    from placer.background import Background
    from placer.model import Model
    from placer.topology import Topology

_EPILOG = """\b
Example:
  placer evaluate placement.json traces/tinymoe.npz -t dgx-h100 --require 'remote.server<=4.5'
  placer evaluate placement.json traces/tinymoe.npz -t dgx-h100 --alltoall low_latency --tokens-per-gpu 128 --explain
  placer evaluate placement.json traces/tinymoe.npz -t dgx-h100 --tokens-per-step 256 --phase decode
"""


@click.command(short_help="Price a placement on a trace: traffic, load, time.", epilog=_EPILOG)
@options.placed
@options.model
@options.alltoall
@options.replica_choice(None)
@options.memory
@options.step
@options.batches
@click.option("--seed", type=int, default=0, show_default=True, help="Deals sequences to GPUs and steps.")
@click.option(
    "--best-split",
    is_flag=True,
    help="Also show how even the load could be, were each expert's tokens split over its copies at best.",
)
@click.option("--explain", is_flag=True, help="Say in five lines where the time goes.")
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
    queueing: bool,
    background: Background | None,
    tokens_per_step: int | None,
    phase: str | None,
    seed: int,
    explain: bool,
    as_json: bool,
    **conditions: Any,
) -> None:
    """Price PLACEMENT on TRACE: units touched, bytes over each kind of link, load, and seconds of a step.

    \b
    touched  units (GPUs, servers, racks) that hold a token's experts, mean over tokens and layers
    remote   touched units other than the home's
    home     the GPU on which a token lives before dispatch; uniform over all GPUs
    load     busiest unit over mean: mean over layers, and the worst layer
    bytes    leave units over the links of a level for one token: all layers, dispatch and combine
    step     all layers once, for --tokens-per-gpu tokens on each GPU
    """
    from placer.evaluation import evaluate
    from placer.placement import Placement, format_shape
    from placer.report import Gate
    from placer.trace import Trace

    required = [Gate.parse(gate) for gate in gates]
    placed, routed = Placement.load(placement), Trace.load(trace)
    options.made_for(placed, shape, placement)
    machine = topology.with_shape(placed.shape)
    routed = options.batched(routed, tokens_per_step, phase, seed)
    if tokens_per_step and ctx.get_parameter_source("tokens_per_gpu") is ParameterSource.DEFAULT:
        conditions["tokens_per_gpu"] = max(1, round(tokens_per_step / placed.num_ranks))
    if queueing and background is None:
        raise click.UsageError("--queueing: found no --background, expected the traffic that queues")
    other = background and replace(background, queueing=queueing)
    report = evaluate(placed, routed, machine, model=model, background=other, seed=seed, **conditions)
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
    told = f"\n\n{report.explain()}" if explain else ""
    options.show(report.to_dict(), f"{heading}\n\n{report}{told}\n\n{assumed}", as_json)
    for line in kept:
        click.echo(f"ok: {line}", err=True)
    for line in failed:
        click.echo(f"Error: {line}", err=True)
    if failed:
        ctx.exit(GateFailed.exit_code)
