"""``placer synth``"""

from __future__ import annotations

from pathlib import Path

import click

from placer.cli import options, types

_EPILOG = """\b
Example:
  placer synth dsv3-like --layers 4 --tokens 20000 -o trace.npz
"""


def _presets() -> list[str]:
    from placer.synthetic import PRESETS

    return sorted(PRESETS)


@click.command(short_help="Write a synthetic trace.", epilog=_EPILOG)
@click.argument("name", metavar="PRESET", type=types.Name("preset", _presets))
@click.option("-o", "--output", type=types.Output(), required=True, help="The trace file (.npz) to write.")
@click.option(
    "--layers", type=click.IntRange(min=1), metavar="N", show_default="the model's", help="MoE layers."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=20_000,
    show_default=True,
    metavar="N",
    help="Tokens in all.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of all random choices.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    metavar="N",
    help="Tokens of a document.",
)
@options.as_json
def command(
    *,
    name: str,
    output: Path,
    layers: int | None,
    tokens: int,
    seed: int,
    sequence_length: int,
    as_json: bool,
) -> None:
    """Write a synthetic trace in the shape of a known model; PRESET is olmoe-like, qwen3-like or dsv3-like."""
    from placer.cli.log import elapsing
    from placer.synthetic import PRESETS, synth

    with elapsing(f"making {layers or PRESETS[name].layers} layers x {tokens:,} tokens"):
        made = synth(name, layers=layers, tokens=tokens, seed=seed, sequence_length=sequence_length)
        made.save(output)
    document = {
        "schema": "placer/synth/1",
        "trace": str(output),
        "name": name,
        "tokens": made.num_tokens,
        "layers": made.num_layers,
        "experts": made.num_experts,
        "top_k": made.top_k,
        "seed": seed,
    }
    text = (
        f"{output}: synthetic, {made.num_tokens:,} tokens, {made.num_layers} layers, "
        f"top {made.top_k} of {made.num_experts} experts"
    )
    options.show(document, text, as_json)
