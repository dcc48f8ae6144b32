"""``placer methods``"""

from __future__ import annotations

import inspect
from typing import Any

import click

from placer.cli import options
from placer.table import aligned

#: Statistics that a method uses beyond those it cannot do without.
_MORE = {"auto": " (routes where there are any)"}

_LEGEND = """

needs: load = tokens of each expert; pairs = tokens of each two experts; routes = the tokens themselves
handles: caps = keeps --max-load; copies = fills spare slots; levels = weighs GPUs, servers and racks together;
         pins = keeps --constraints"""


@click.command(short_help="List search methods.", epilog="\b\nExample:\n  placer methods")
@options.as_json
def command(*, as_json: bool) -> None:
    """List the search methods: what each minimises, which statistics it needs, and which limits it handles."""
    from placer.solvers import names

    found = [_described(name) for name in names()]
    rows = [
        [row["name"], _words(row["needs"], row["name"]), _words(row["handles"]), row["summary"]]
        for row in found
    ]
    text = aligned(["name", "needs", "handles", "what it does"], rows, left=(0, 1, 2, 3)) + _LEGEND
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


def _words(words: list[str] | None, name: str = "") -> str | None:
    return " ".join(words) + _MORE.get(name, "") if words else None
