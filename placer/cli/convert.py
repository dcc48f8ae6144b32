"""``placer convert``"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from placer.cli import options, types

if TYPE_CHECKING:
    from placer.counts import Counts
    from placer.trace import Trace

_EPILOG = """\b
Example:
  placer convert responses.jsonl --model deepseek-v3 -o trace.npz
  placer convert recordings/ --num-experts 64 --drop-steps 20 -o trace.npz
"""


def _formats() -> list[str]:
    from placer.formats import readers

    return readers()


class _LayerIds(types.ParamType):
    """Numbers of layers and ranges of them, as a tuple."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        layers: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
            low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not low <= high or high - low >= 10_000:
                self.fail(f"found {value!r}, expected layers such as 3-60 or 1,2,5", param, ctx)
            layers.extend(range(low, high + 1))
        if len(set(layers)) < len(layers):
            self.fail(f"found {value!r}, expected each layer once", param, ctx)
        return tuple(layers)


def _count(name: str, meaning: str) -> options.Decorator[Any]:
    return click.option(
        name,
        type=click.IntRange(min=1),
        metavar="N",
        show_default="as recorded, or the model's",
        help=meaning,
    )


class _WithFormats(click.Command):
    """A command whose help ends with the formats, which are only looked up for that."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from placer.formats import title

        super().format_options(ctx, formatter)
        with formatter.section("Formats"):
            formatter.write_dl([(name, title(name)) for name in _formats()])


@click.command(cls=_WithFormats, short_help="Make a trace of what other programs record.", epilog=_EPILOG)
@click.argument("inputs", metavar="IN...", nargs=-1, required=True, type=types.Input())
@click.option("-o", "--output", type=types.Output(), required=True, help="The trace file (.npz) to write.")
@click.option(
    "--from",
    "name",
    type=types.Name("format", _formats),
    metavar="FORMAT",
    show_default="told from the files",
    help="The format; the list is below.",
)
@_count("--num-experts", "Experts of a layer.")
@_count("--top-k", "Experts of a token.")
@_count("--num-hidden-layers", "Layers of the model, dense ones included.")
@click.option(
    "--layer-ids",
    type=_LayerIds(),
    metavar="3-60|1,2,5",
    show_default="layers that never repeat an expert",
    help="The model's numbers of the MoE layers.",
)
@click.option(
    "--model",
    metavar="NAME",
    show_default="as recorded",
    help="The model's name; a known one says the numbers above.",
)
@click.option(
    "--drop-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Leave the first N engine steps out.",
)
@options.as_json
def command(
    *,
    inputs: tuple[str, ...],
    output: Path,
    name: str | None,
    num_experts: int | None,
    top_k: int | None,
    num_hidden_layers: int | None,
    layer_ids: tuple[int, ...] | None,
    model: str | None,
    drop_steps: int,
    as_json: bool,
) -> None:
    """Make a trace of the recordings IN, files or folders of one format; several become one.

    A recording of loads alone becomes a file of counts, with which load methods work.
    """
    from placer.cli.log import elapsing
    from placer.conversion import convert
    from placer.errors import InvalidInput
    from placer.formats import Hints
    from placer.trace import Trace

    for one in inputs:
        if options.same_file(one, output):
            raise InvalidInput(f"{output}: is one of the inputs, which are never written to")
    hints = Hints(
        num_experts=num_experts,
        top_k=top_k,
        num_hidden_layers=num_hidden_layers,
        layer_ids=layer_ids,
        model=model,
    )
    with elapsing(f"reading {inputs[0]}" + (f" and {len(inputs) - 1} more" if len(inputs) > 1 else "")):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found, recording = convert(
                [Path(one) for one in inputs], name=name, hints=hints, drop_steps=drop_steps
            )
        recording.save(output)
    for note in said:
        click.echo(f"note: {note.message}", err=True)
    if not isinstance(recording, Trace):
        click.echo(
            "note: the recording holds loads only (counts); the traffic of a placement needs tokens", err=True
        )
    document, text = _summary(recording, found, output)
    options.show(document, text, as_json)


def _summary(recording: Trace | Counts, name: str, output: Path) -> tuple[dict[str, Any], str]:
    import numpy as np

    from placer.evaluation import format_ids
    from placer.trace import Trace

    trace = recording if isinstance(recording, Trace) else None
    sequences = None if trace is None or trace.sequence is None else len(np.unique(trace.sequence))
    steps = None if trace is None or trace.step is None else len(np.unique(trace.step))
    document = {
        "schema": "placer/convert/1",
        "output": str(output),
        "kind": "counts" if trace is None else "trace",
        "format": name,
        "tokens": recording.num_tokens,
        "layers": recording.num_layers,
        "layer_ids": list(recording.layer_ids),
        "experts": recording.num_experts,
        "top_k": None if trace is None else trace.top_k,
        "sequences": sequences,
        "steps": steps,
        "model": recording.model,
    }
    chosen = "loads only" if trace is None else f"{trace.top_k} for a token"
    facts = [
        ("format", name),
        ("model", recording.model or "not named"),
        ("tokens", "unknown" if recording.num_tokens is None else f"{recording.num_tokens:,}"),
        ("layers", f"{recording.num_layers}: {format_ids(recording.layer_ids)}"),
        ("experts", f"{recording.num_experts} a layer, {chosen}"),
        ("sequences", "unknown" if sequences is None else f"{sequences:,}"),
        ("steps", "unknown" if steps is None else f"{steps:,}"),
    ]
    heading = f"{output}: {document['kind']} written"
    return document, "\n".join([heading, *(f"  {key:12} {value}" for key, value in facts)])
