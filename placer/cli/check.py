"""``placer check``"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from placer.cli import options, types
from placer.errors import GateFailed

if TYPE_CHECKING:
    from placer.constraints import Constraints
    from placer.model import Model
    from placer.placement import Placement
    from placer.topology import Topology

_EPILOG = """\b
Example:
  placer check placement.json traces/tinymoe.npz
  placer check placement.json --constraints pins.toml
"""


@click.command(short_help="Check a placement file.", epilog=_EPILOG)
@click.argument("placement", type=types.PlacementFile())
@click.argument("trace", type=types.Input(), required=False)
@click.option(
    "-t",
    "--topology",
    type=types.TOPOLOGY,
    metavar="NAME|FILE",
    help="Also check that a machine can have its shape, and its memory hold the experts.",
)
@click.option(
    "--shape", type=types.Shape(), metavar="RxSxG", help="Also check that it is made for this shape."
)
@options.constraints(
    "Also check that it keeps the rules of 'placer solve --constraints'; exit with 5 when not."
)
@options.model
@options.memory
@options.as_json
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    placement: str,
    trace: str | None,
    topology: Topology | None,
    shape: tuple[int, int, int] | None,
    constraints: Constraints | None,
    model: Model | None,
    gpu_memory: float | tuple[float, ...] | None,
    reserve: float,
    expert_dtype: str | None,
    as_json: bool,
) -> None:
    """Check that PLACEMENT is a valid placement file, and that it fits TRACE; exit with 2 when not.

    With -t or --gpu-memory, and a model that TRACE or --model names, its experts must also fit into a GPU's memory;
    exit with 3 when not.
    """
    from placer.evaluation import check_match
    from placer.memory import worst_gpu_bytes
    from placer.model import Model
    from placer.placement import Placement
    from placer.trace import Trace

    placed = Placement.load(placement)
    options.made_for(placed, shape, placement)
    if topology is not None:
        topology.with_shape(placed.shape)
        gpu_memory = (topology.gpu_memories or topology.gpu_memory) if gpu_memory is None else gpu_memory
    routed = None if trace is None else Trace.load(trace)
    if routed is not None:
        check_match(placed, routed)
        model = model or Model.for_trace_name(routed.model, routed.num_experts)
    broken = [] if constraints is None else constraints.check(placed)
    held = None
    if gpu_memory is not None and model is not None:
        held = worst_gpu_bytes(placed, model, capacity=gpu_memory, reserve=reserve, expert_dtype=expert_dtype)
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
        "worst_gpu_bytes": held,
        "duplicates": [{"layer": layer, "rank": rank, "expert": expert} for layer, rank, expert in twice],
        "violations": None if constraints is None else [asdict(one) for one in broken],
        "digest": placed.digest,
    }
    text = _text(placement, placed, trace, _memory(gpu_memory, held))
    if constraints is not None:
        rules = len({violation.rule for violation in broken})
        text += f"\n  {'constraints':12} {rules or 'none'} broken, of {len(constraints.entries)}"
        text += f", in {len(broken)} places" if broken else ""
    options.show(document, text, as_json)
    for violation in broken:
        click.echo(f"Error: {violation}", err=True)
    if twice:
        layer, rank, expert = twice[0]
        click.echo(
            f"Warning: {len(twice)} slots are wasted on a second copy of an expert on the same GPU; "
            f"the first: layer {placed.layer_ids[layer]}, rank {rank}, expert {expert}",
            err=True,
        )
    if broken:
        ctx.exit(GateFailed.exit_code)


def _memory(capacity: float | tuple[float, ...] | None, held: float | None) -> str:
    from placer.report import format_bytes

    if capacity is None:
        return "not checked: no machine (-t) or --gpu-memory given"
    if held is None:
        return "not checked: size of an expert unknown (--model sets it)"
    least = min(capacity) if isinstance(capacity, tuple) else capacity
    return f"{format_bytes(held)} of experts on the fullest GPU, of {format_bytes(least)}"


def _text(name: str, placed: Placement, trace: str | None, memory: str) -> str:
    from placer.evaluation import format_ids
    from placer.placement import format_shape

    empty = int((placed.physical_to_logical < 0).sum())
    copies = "none"
    if placed.has_copies:
        each = (placed.physical_to_logical >= 0).sum(axis=1) - placed.num_experts
        few, many = int(each.min()), int(each.max())
        number = f"{few}" if few == many else f"{few} to {many}"
        copies = f"{number} a layer; at most {placed.replica_count.max()} slots hold the same expert"
    made = placed.provenance
    facts = [
        ("shape", f"{format_shape(placed.shape)} (racks x servers x GPUs), {placed.num_ranks} ranks"),
        ("layers", f"{placed.num_layers}: {format_ids(placed.layer_ids)}"),
        (
            "experts",
            f"{placed.num_experts} a layer in {placed.num_slots} slots, {placed.slots_per_rank} on each GPU",
        ),
        ("copies", copies),
        ("empty slots", f"{empty} in all layers" if empty else "none"),
        ("memory", memory),
        ("dispatch", placed.rule + (", with a table" if placed.table is not None else "")),
    ]
    if made:
        facts.append(("made by", ", ".join(f"{key} {_brief(value)}" for key, value in made.items())))
    heading = f"{name}: a valid file" + ("" if trace is None else f", and fits {trace}")
    return "\n".join([heading, *(f"  {key:12} {value}" for key, value in facts)])


def _brief(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}..." if len(text) == 64 else text  # a digest
