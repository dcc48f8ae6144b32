"""``placer sweep``"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from placer.cli import options, types
from placer.cli.interrupt import EXIT_CODE, interruptible

if TYPE_CHECKING:
    from placer.cliff import Row, Sweep
    from placer.model import Model
    from placer.topology import Topology

_EPILOG = """\b
Example:
  placer sweep --model deepseek-v3 -t h800 --shape 1x32x8 --ep 8,16,32,64
  placer sweep --trace traces/tinymoe.npz -t dgx-h100 --shape 1x8x1 --time-limit 10
  placer sweep --preset article
"""


def _presets() -> list[str]:
    from placer.presets import PRESETS

    return list(PRESETS)


class _Widths(types.ParamType):
    """Whole numbers of at least 1 with commas between them, as a tuple."""

    name = "widths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() and 0 < len(part) < 10 and int(part) for part in parts):
            self.fail(f"found {value!r}, expected numbers of GPUs such as 1,2,4,8", param, ctx)
        return tuple(int(part) for part in parts)


@click.command(short_help="Widen expert parallelism until the network takes over.", epilog=_EPILOG)
@click.option(
    "--preset",
    type=types.Name("preset", _presets),
    metavar="NAME",
    help="article, article-imbalance or deepseek-v3-h800, instead of a machine and a model.",
)
@options.model
@click.option(
    "-t",
    "--topology",
    type=types.TOPOLOGY,
    metavar="NAME|FILE",
    help="The machine: a name from 'placer topology' or a TOML file.",
)
@options.shape
@click.option(
    "--ep",
    "widths",
    type=_Widths(),
    metavar="N,N,..",
    show_default="all that fit",
    help="Expert-parallel widths: GPUs that hold the experts once.",
)
@click.option(
    "--trace",
    type=types.Input(),
    help="Also price this trace's routing, contiguous and as --method places it.",
)
@click.option(
    "--method",
    type=types.METHOD,
    default="auto",
    show_default=True,
    metavar="NAME",
    help="A name from 'placer methods'.",
)
@options.alltoall
@click.option(
    "--tokens-per-gpu",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Tokens of one step on each GPU.",
)
@click.option(
    "--holdout",
    type=types.Number("a number above 0 and below 1", low=1e-9, high=1.0),
    default="0.5",
    show_default=True,
    metavar="F",
    help="Share of the trace's sequences to judge on; the rest is fitted.",
)
@click.option(
    "--max-load",
    type=types.MAX_LOAD,
    default="1.05",
    show_default=True,
    metavar="X|none",
    help="Load cap of the search: busiest unit over mean.",
)
@options.load_margin
@options.memory
@options.search
@click.option(
    "--plot", "picture", type=types.Output(), help="Draw it: a .png, .svg or .pdf; needs matplotlib."
)
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    preset: str | None,
    model: Model | None,
    topology: Topology | None,
    shape: tuple[int, int, int] | None,
    widths: tuple[int, ...] | None,
    trace: str | None,
    time_limit: float,
    rounds: int | None,
    gap: float,
    jobs: int | None,
    picture: Path | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Price expert parallelism of every width: bytes inside and between servers, and all-to-all over compute.

    Each width splits the machine into groups of that many consecutive GPUs, and each group holds all experts once.
    The wider, the fewer experts a GPU holds, until traffic leaves the server and the all-to-all takes longer than the
    experts: the network cliff. Routing is uniform; --trace adds that of a trace under contiguous experts and under
    --method, fitted on some sequences and judged on the others.

    \b
    --preset article            every token to every peer of its group
    --preset article-imbalance  top-2 of 64 experts, buffers padded to the hottest GPU
    --preset deepseek-v3-h800   DeepSeek-V3 on 32 servers of 8 H800, FP8 there and BF16 back

    The two article presets come near the figures of a published cliff, about 400 GB between servers at width 16 and
    over 800 GB at 32. Their parameters are fitted, not published, and twice the bytes from 16 to 32 is not what a
    dropless top-2 model does: it sends half as much again at most.
    """
    from placer.plot import plot, plottable

    if picture is not None:
        plottable(picture)  # before the work

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    def ends(row: Row) -> None:
        ratio = "" if row.a2a_over_compute is None else f", a2a/compute {row.a2a_over_compute:.3f}"
        say(f"EP {row.ep}, {row.routing}, {row.method}: {row.inter_server_gb:.1f} GB between servers{ratio}")

    interrupted = False
    if preset is not None:
        found = _preset(ctx, preset, widths)
    elif topology is None or (model is None and trace is None):
        raise click.UsageError("expected --preset, or -t with --model or --trace", ctx)
    else:
        from placer.cli.log import compilation_told
        from placer.sweep import sweep
        from placer.trace import Trace

        run = partial(
            sweep,
            topology if shape is None else topology.with_shape(shape),
            widths,
            model=model,
            trace=None if trace is None else Trace.load(trace),
            jobs=options.workers(jobs),
            budget=options.budget(time_limit, rounds, gap),
            on_row=None if trace is None else ends,
            **choices,
        )
        if trace is not None:
            ctx.with_resource(compilation_told(say))
            say(f"at most {time_limit:g} s of search for each width")
        found, interrupted = interruptible(lambda stop: run(stop=stop))
    if picture is not None:
        plot(found, picture)
    options.show(found.to_dict(), str(found), as_json)
    if interrupted:
        ctx.exit(EXIT_CODE)


def _preset(ctx: click.Context, name: str, widths: tuple[int, ...] | None) -> Sweep:
    """The preset, unless an option that it has no use for is given as well."""
    from placer.presets import preset

    for option in ctx.command.params:
        used = option.name in ("preset", "widths", "picture", "as_json", "quiet")
        if not used and ctx.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--preset sets everything but --ep; found {option.opts[-1]}", ctx)
    return preset(name, widths)
