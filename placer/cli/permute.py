"""``placer permute``"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from placer.cli import options, types

if TYPE_CHECKING:
    from placer.permuted import Permuted

_EPILOG = """\b
Example:
  placer permute ./OLMoE-1B-7B-0924 placement.json -o ./OLMoE-1B-7B-0924-placed
  placer permute ./OLMoE-1B-7B-0924-placed --inverse -o ./OLMoE-1B-7B-0924-again
"""

_EVERY = 2.0  # seconds between two lines of the log at least


@click.command(short_help="Write a checkpoint whose experts stand as a placement wants them.", epilog=_EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("placement", type=types.PlacementFile(), required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The folder to write, new or empty.",
)
@click.option(
    "--inverse",
    is_flag=True,
    help="Undo PLACEMENT; without PLACEMENT, everything that the folder's own record tells of.",
)
@options.as_json
def command(*, checkpoint: Path, placement: str | None, output: Path, inverse: bool, as_json: bool) -> None:
    """Write CHECKPOINT, a folder of safetensors shards, with its experts in the order of PLACEMENT.

    Any stack that gives each GPU a run of consecutive experts then has the placement, and the model computes what it
    did: router rows and correction biases move along. PLACEMENT must have no copies, and keep gate groups whole where
    the model's router has them. Traces of the old checkpoint number experts the old way.
    """
    from placer.permuted import permute
    from placer.placement import Placement

    if placement is None and not inverse:
        raise click.UsageError("missing PLACEMENT, which only --inverse goes without")
    said = time.monotonic()

    def say(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            click.echo(text, err=True)

    placed = None if placement is None else Placement.load(placement)
    with _ended_by_signals():
        done = permute(checkpoint, placed, output, inverse=inverse, say=say)
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    document = {
        "schema": "placer/permute/1",
        "checkpoint": str(checkpoint),
        "placement": placement,
        "output": str(output),
        "inverse": inverse,
        "model_type": done.model_type,
        "num_experts": done.permutation.num_experts,
        "layer_ids": list(done.permutation.layer_ids),
        "layers_left": list(done.left),
        "experts_moved": done.moved,
        "bytes": done.size,
        "restored": done.restored,
        "notes": list(done.notes),
    }
    options.show(document, _text(done), as_json)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, so that what is half written is removed first.

    The exit code is what a shell gives for the signal, 128 and its number. Signals that are ignored, as below nohup,
    or handled already stay so; outside the main thread there are none.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(signum: int, frame: FrameType | None) -> None:
        for number in ours:
            signal.signal(number, signal.SIG_IGN)  # a second one would cut the removal short
        raise SystemExit(128 + signum)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _text(done: Permuted) -> str:
    from placer.checkpoint import layers_in_words
    from placer.report import format_bytes

    experts = done.permutation.num_experts * len(done.permutation.layer_ids)
    text = (
        f"{done.output}: {done.model_type}, {format_bytes(done.size)}, {done.moved:,} of {experts:,} experts moved "
        f"in {layers_in_words(done.permutation.layer_ids)}"
    )
    return text + ("; the first weights again, byte for byte" if done.restored else "")
