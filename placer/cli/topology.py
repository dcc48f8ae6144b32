"""``placer topology``"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from placer.cli import options, types
from placer.table import aligned

if TYPE_CHECKING:
    from placer.topology import Level, Topology

_EPILOG = """\b
Example:
  placer topology dgx-h100 --shape 1x8x8
"""


@click.command(short_help="List machines, or show one.", epilog=_EPILOG)
@click.argument("topology", type=types.TOPOLOGY, metavar="[NAME|FILE]", required=False)
@options.shape
@options.as_json
def command(*, topology: Topology | None, shape: tuple[int, int, int] | None, as_json: bool) -> None:
    """List the known machines, or show one: its levels, links and memory."""
    from placer.topology import Topology, shipped

    if topology is None:
        machines = [Topology.load(name) for name in shipped()]
        machines = [machine if shape is None else machine.with_shape(shape) for machine in machines]
        document = {
            "schema": "placer/topologies/1",
            "topologies": [_document(machine) for machine in machines],
        }
        options.show(document, _list(machines), as_json)
    else:
        machine = topology if shape is None else topology.with_shape(shape)
        options.show({"schema": "placer/topology/1", **_document(machine)}, _detail(machine), as_json)


def _document(machine: Topology) -> dict[str, Any]:
    levels = [
        {**asdict(level), "units": units, "effective_bandwidth": level.effective_bandwidth}
        for level, units in zip(machine.levels, machine.num_units, strict=True)
    ]
    return {**asdict(machine), "shape": list(machine.shape), "num_ranks": machine.num_ranks, "levels": levels}


def _list(machines: list[Topology]) -> str:
    from placer.placement import format_shape
    from placer.report import format_bytes

    rows = []
    for machine in machines:
        links = [format_bytes(level.effective_bandwidth) for level in machine.levels]
        row = [machine.name, format_shape(machine.shape), format_bytes(machine.gpu_memory), " / ".join(links)]
        rows.append([*row, machine.description])
    header = ["name", "shape", "GPU memory", "bandwidth", "what it is"]
    return (
        aligned(header, rows, left=(0, 1, 3, 4))
        + "\n\nshape: racks x servers in a rack x GPUs in a server; --shape changes it\n"
        "bandwidth: effective, a second, per GPU and direction, level by level (GPUs of a server / servers / racks)\n"
        "'placer topology NAME' shows one; a TOML file of your own works as well"
    )


def _link(level: Level) -> str:
    kind = f"torus {'x'.join(map(str, level.sides))}" if level.link == "torus" else level.link
    return ", ".join([kind, *["rails"] * level.rails, *[level.routing] * (level.routing != "ideal")])


def _detail(machine: Topology) -> str:
    from placer.placement import format_shape
    from placer.report import format_bytes, format_seconds

    rows = [
        [
            level.name,
            str(units),
            str(level.fanout),
            _link(level),
            f"{format_bytes(level.bandwidth)}/s",
            f"{format_bytes(level.effective_bandwidth)}/s",
            format_seconds(level.latency),
        ]
        for level, units in zip(machine.levels, machine.num_units, strict=True)
    ]
    header = ["level", "units", "fan-out", "link", "nominal", "effective", "latency"]
    size = (
        f"shape {format_shape(machine.shape)} (racks x servers x GPUs), {machine.num_ranks} GPUs of "
        f"{format_bytes(machine.gpu_memory)}{' at least' if machine.gpu_memories else ''}, "
        f"{machine.flops_bf16 / 1e12:.4g} TFLOP/s BF16"
    )
    if machine.gpu_speeds:
        size += f" times {min(machine.gpu_speeds):g} to {max(machine.gpu_speeds):g}"
    return "\n".join(
        [
            f"{machine.name} - {machine.description}",
            size,
            "",
            aligned(header, rows, left=(0, 3)),
            "",
            "Bandwidth is per GPU and direction; fan-out: units in one of the next level.",
        ]
    )
