"""``placer report``"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from placer.cli import options, types

if TYPE_CHECKING:
    from placer.background import Background
    from placer.model import Model
    from placer.topology import Topology

_EPILOG = """\b
Example:
  placer report placement.json traces/tinymoe.npz -t dgx-h100 -o report.html
  placer report placement.json unseen.npz -t dgx-h100 --fitted seen.npz --log run.jsonl --bound bound.json -o a.html

\b
where the other files come from
  placer solve seen.npz -t dgx-h100 --shape 1x8x8 --log run.jsonl -o placement.json
  placer bound placement.json seen.npz -t dgx-h100 --json > bound.json
  placer compare seen.npz -t dgx-h100 --shape 1x8x8 --max-load 1.05,1.2,none --json > comparison.json
"""


@click.command(short_help="Write a page that shows what a placement gains, and where.", epilog=_EPILOG)
@options.placed
@click.option(
    "-o", "--output", type=types.Output(), required=True, metavar="FILE", help="The page to write (.html)."
)
@click.option(
    "--fitted",
    type=types.Input(),
    metavar="TRACE",
    help="The tokens that the placement was fitted on, to show beside those of TRACE.",
)
@click.option(
    "--log",
    "log_file",
    type=types.Input(),
    metavar="FILE",
    help="What 'placer solve --log' wrote, to show how the search went.",
)
@click.option(
    "--bound",
    "certificate",
    type=types.Input(),
    metavar="FILE",
    help="What 'placer bound --json' printed for this placement, to show what is proved.",
)
@click.option(
    "--compare",
    "comparison",
    type=types.Input(),
    metavar="FILE",
    help="What 'placer compare --json' printed, to show load against traffic of other methods.",
)
@options.model
@options.alltoall
@options.replica_choice(None)
@options.memory
@options.step
@options.batches
@click.option("--seed", type=int, default=0, show_default=True, help="Deals sequences to GPUs and steps.")
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
    output: Path,
    fitted: str | None,
    log_file: str | None,
    certificate: str | None,
    comparison: str | None,
    queueing: bool,
    background: Background | None,
    tokens_per_step: int | None,
    phase: str | None,
    seed: int,
    as_json: bool,
    model: Model | None,
    **conditions: Any,
) -> None:
    """Write a page on PLACEMENT and TRACE: the verdict, before and after, load, traffic, proof, and how to deploy it.

    The page is one file that opens in any browser, without a network. It compares with contiguous experts, and says
    so when these are better. Options mean what they mean to 'placer evaluate'.
    """
    from placer import html
    from placer.cli.log import elapsing
    from placer.html import evidence
    from placer.placement import Placement
    from placer.trace import Trace

    html.require()
    for given in (placement, trace, fitted, log_file, certificate, comparison):
        if given is not None and options.same_file(output, given):
            raise click.UsageError(f"-o {output}: would overwrite an input")
    placed, routed = Placement.load(placement), Trace.load(trace)
    options.made_for(placed, shape, placement)
    routed = options.batched(routed, tokens_per_step, phase, seed)
    seen = None if fitted is None else options.batched(Trace.load(fitted), tokens_per_step, phase, seed)
    if tokens_per_step and ctx.get_parameter_source("tokens_per_gpu") is ParameterSource.DEFAULT:
        conditions["tokens_per_gpu"] = max(1, round(tokens_per_step / placed.num_ranks))
    if queueing and background is None:
        raise click.UsageError("--queueing: found no --background, expected the traffic that queues")
    proved = None if certificate is None else evidence.read_certificate(certificate)
    events = () if log_file is None else evidence.read_events(log_file)
    others = None if comparison is None else evidence.read_comparison(comparison)
    with elapsing("counting and drawing"):
        made = html.page(
            placed,
            routed,
            topology.with_shape(placed.shape),
            fitted=seen,
            certificate=proved,
            events=events,
            comparison=others,
            name=placement,
            command=shlex.join(["placer", *sys.argv[1:]]),
            model=model,
            background=background and replace(background, queueing=queueing),
            seed=seed,
            **conditions,
        )
        made.save(output)
    size = output.stat().st_size
    document = {
        "schema": "placer/written-page/1",
        "path": str(output),
        "bytes": size,
        "verdict": made.verdict,
        "report": made.document["report"],
        "baseline": made.document["baseline"],
        "fitted": made.document.get("fitted"),
        "proof": made.document.get("proof"),
    }
    options.show(document, f"{made.verdict}\n{output}: {size / 1e6:.1f} MB", as_json)
