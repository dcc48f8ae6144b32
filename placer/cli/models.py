"""``placer models``"""

from __future__ import annotations

from dataclasses import asdict

import click

from placer.cli import options
from placer.table import aligned


@click.command(short_help="List models whose sizes are known.", epilog="\b\nExample:\n  placer models --json")
@options.as_json
def command(*, as_json: bool) -> None:
    """List the models whose sizes are known."""
    from placer.model import Model, known
    from placer.report import format_bytes

    found = [Model.named(name) for name in known()]
    rows = []
    for model in found:
        size = model.expert_bytes()
        groups = f"{model.topk_groups} of {model.num_groups}" if model.num_groups > 1 else None
        counts = [model.num_moe_layers, model.num_experts, model.top_k, model.hidden_size]
        shown = [None if count is None else str(count) for count in counts]
        rows.append(
            [model.name, *shown, groups, None if size is None else format_bytes(size), model.expert_dtype]
        )
    header = ["name", "MoE layers", "experts", "top-k", "hidden", "groups", "one expert", "stored as"]
    document = {"schema": "placer/models/1", "models": [asdict(model) for model in found]}
    options.show(document, aligned(header, rows), as_json)
