"""``placer check``"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from placer.cli import options
from placer.errors import InvalidInput

if TYPE_CHECKING:
    from placer.placement import Placement
    from placer.topology import Topology
    from placer.trace import Trace

_EPILOG = """\b
Example:
  placer check placement.json traces/tinymoe.npz
"""


@click.command(short_help="Check a placement file.", epilog=_EPILOG)
@click.argument("placement", type=options.Input())
@click.argument("trace", type=options.Input(), required=False)
@click.option(
    "-t", "--topology", type=options.TOPOLOGY, metavar="NAME|FILE", help="Also check that it fits a machine."
)
@click.option(
    "--shape", type=options.Shape(), metavar="RxSxG", help="Also check that it is made for this shape."
)
@options.as_json
def command(
    *,
    placement: str,
    trace: str | None,
    topology: Topology | None,
    shape: tuple[int, int, int] | None,
    as_json: bool,
) -> None:
    """Check that PLACEMENT is a valid placement file, and that it fits TRACE; exit with 2 when not."""
    from placer.placement import Placement, format_shape
    from placer.trace import Trace

    placed = Placement.load(placement)
    if shape is not None and shape != placed.shape:
        raise InvalidInput(
            f"{placement}: shape: found {format_shape(placed.shape)}, expected {format_shape(shape)} from --shape"
        )
    if topology is not None:
        topology.with_shape(placed.shape)
    if trace is not None:
        _fits(placement, placed, Trace.load(trace))
    twice = placed.duplicates()
    document = {
        "schema": "placer/check/1",
        "placement": placement,
        "trace": trace,
        "num_layers": placed.num_layers,
        "num_experts": placed.num_experts,
        "num_ranks": placed.num_ranks,
        "slots_per_rank": placed.slots_per_rank,
        "shape": list(placed.shape),
        "empty_slots": int((placed.physical_to_logical < 0).sum()),
        "max_copies": int(placed.replica_count.max()),
        "dispatch": placed.rule,
        "duplicates": [{"layer": layer, "rank": rank, "expert": expert} for layer, rank, expert in twice],
        "digest": placed.digest,
    }
    options.show(document, _text(placement, placed, trace), as_json)
    if twice:
        layer, rank, expert = twice[0]
        click.echo(
            f"Warning: {len(twice)} slots are wasted on a second copy of an expert on the same GPU; "
            f"the first: layer {placed.layer_ids[layer]}, rank {rank}, expert {expert}",
            err=True,
        )


def _fits(name: str, placed: Placement, routed: Trace) -> None:
    if placed.num_experts != routed.num_experts:
        raise InvalidInput(
            f"{name}: num_experts: found {placed.num_experts}, expected {routed.num_experts} as in {routed.name}"
        )
    if placed.layer_ids != routed.layer_ids:
        raise InvalidInput(
            f"{name}: layer_ids: found {_ids(placed.layer_ids)}, expected {_ids(routed.layer_ids)} as in {routed.name}"
        )


def _ids(ids: tuple[int, ...]) -> str:
    return f"{len(ids)} layers {ids[0]}..{ids[-1]}"


def _text(name: str, placed: Placement, trace: str | None) -> str:
    from placer.placement import format_shape

    empty = int((placed.physical_to_logical < 0).sum())
    spare = placed.num_slots - placed.num_experts
    copies = "none"
    if placed.has_copies:
        count = spare - empty / placed.num_layers
        copies = f"{count:.4g} a layer; at most {placed.replica_count.max()} slots hold the same expert"
    made = placed.provenance
    facts = [
        ("shape", f"{format_shape(placed.shape)} (racks x servers x GPUs), {placed.num_ranks} ranks"),
        ("layers", _ids(placed.layer_ids)),
        (
            "experts",
            f"{placed.num_experts} a layer in {placed.num_slots} slots, {placed.slots_per_rank} on each GPU",
        ),
        ("copies", copies),
        ("empty slots", f"{empty} in all layers" if empty else "none"),
        ("dispatch", placed.rule + (", with a table" if placed.table is not None else "")),
    ]
    if made:
        facts.append(("made by", ", ".join(f"{key} {value}" for key, value in made.items())))
    heading = f"{name}: valid" + ("" if trace is None else f", and fits {trace}")
    return "\n".join([heading, *(f"  {key:12} {value}" for key, value in facts)])
