"""``placer export``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from placer.cli import options, types

if TYPE_CHECKING:
    from placer.model import Model

_EPILOG = """\b
Example:
  placer export placement.json --to sglang --model deepseek-v3 -o map.json
  placer export placement.json --to tensorrt_llm -o map.yaml
"""


def _stacks() -> list[str]:
    from placer.formats import writers

    return writers()


class _WithStacks(click.Command):
    """A command whose help ends with the stacks, which are only looked up for that."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from placer.formats import title

        super().format_options(ctx, formatter)
        with formatter.section("Stacks"):
            formatter.write_dl([(name, title(name)) for name in _stacks()])


@click.command(cls=_WithStacks, short_help="Write the file that a serving stack loads.", epilog=_EPILOG)
@click.argument("placement", type=types.PlacementFile())
@click.option(
    "--to",
    type=types.Name("stack", _stacks),
    metavar="STACK",
    required=True,
    help="Whose format; the list is below.",
)
@click.option("-o", "--output", type=types.Output(), required=True, metavar="FILE", help="The file to write.")
@click.option(
    "--num-hidden-layers",
    type=click.IntRange(1, 9999),
    metavar="N",
    show_default="the model's",
    help="Layers of the model, dense ones included, for stacks that want a row for each.",
)
@click.option(
    "--model",
    type=types.MODEL,
    metavar="NAME",
    help="A model from 'placer models', for its number of layers.",
)
@click.option(
    "--fill",
    is_flag=True,
    help="Give empty slots an expert that their GPU holds already; it moves no traffic and no load.",
)
@click.option(
    "--map-only",
    is_flag=True,
    help="Leave out a dispatch table, which no stack loads; --to dispatch_table writes it.",
)
@options.as_json
def command(
    *,
    placement: str,
    to: str,
    output: Path,
    num_hidden_layers: int | None,
    model: Model | None,
    fill: bool,
    map_only: bool,
    as_json: bool,
) -> None:
    """Write PLACEMENT as the file that a stack loads, and say how to make it load that.

    What the format cannot say is refused, or told where the stack has its own way; nothing is dropped without a word.
    """
    from dataclasses import replace

    from placer import export
    from placer.files import write_atomically
    from placer.placement import Placement

    if options.same_file(output, placement):
        raise click.UsageError(f"-o {output}: would overwrite the placement")
    placed = Placement.load(placement)
    placed = export.fill(placed) if fill else placed
    placed = replace(placed, table=None) if map_only else placed
    made = export.export(placed, to, str(output), model=model, num_hidden_layers=num_hidden_layers)
    write_atomically(output, lambda file: file.write(made.content))
    document = {
        "schema": "placer/export/1",
        "to": to,
        "path": str(output),
        "bytes": len(made.content),
        "load_with": made.load_with,
        "notes": list(made.notes),
    }
    options.show(document, f"{output}: load with {made.load_with}", as_json)
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
