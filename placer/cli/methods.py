"""``placer methods``"""

from __future__ import annotations

import inspect
from typing import Any

import click

from placer.cli import options
from placer.table import aligned


@click.command(short_help="List search methods.", epilog="\b\nExample:\n  placer methods")
@options.as_json
def command(*, as_json: bool) -> None:
    """List the search methods: what each minimises, which statistics it needs, and which limits it handles."""
    from placer.solvers import names

    found = [_described(name) for name in names()]
    rows = [[row["name"], _words(row["needs"]), _words(row["handles"]), row["summary"]] for row in found]
    text = aligned(["name", "needs", "handles", "what it does"], rows, left=(0, 1, 2, 3))
    options.show({"schema": "placer/methods/1", "methods": found}, text, as_json)


def _described(name: str) -> dict[str, Any]:
    from placer.solvers import method

    try:
        found = method(name)
    except ImportError as error:
        missing = f"unavailable: {error.name or error} is not installed"
        return {"name": name, "summary": missing, "needs": None, "handles": None}
    summary = (inspect.getdoc(found) or "").partition("\n")[0].rstrip(".")
    return {"name": name, "summary": summary, "needs": sorted(found.needs), "handles": sorted(found.handles)}


def _words(words: list[str] | None) -> str | None:
    return " ".join(words) if words else None
