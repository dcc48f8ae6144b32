"""``placer inspect``"""

from __future__ import annotations

import click

from placer.cli import options


@click.command(
    short_help="Say what a trace holds and what can be gained.",
    epilog="\b\nExample:\n  placer inspect traces/tinymoe.npz",
)
@options.trace
@options.as_json
def command(*, trace: str, as_json: bool) -> None:
    """Say what TRACE holds, and how much structure there is for a placement to use."""
    from placer.inspection import inspect
    from placer.trace import Trace

    found = inspect(Trace.load(trace))
    options.show(found.to_dict(), str(found), as_json)
