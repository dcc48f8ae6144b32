"""Options that several commands share, and what they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from placer.cli import types
from placer.cli.types import MAX_LOAD_OR_AUTO as MAX_LOAD_OR_AUTO  # these are read here by placer.cli.solve
from placer.cli.types import METHOD as METHOD
from placer.cli.types import Count as Count
from placer.cli.types import Output as Output
from placer.cli.types import PlacementFile as PlacementFile

if TYPE_CHECKING:
    from placer.placement import Placement
    from placer.trace import Trace

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


def _together(*decorators: Decorator[Any]) -> Decorator[Any]:
    def apply(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


trace = click.argument("trace", type=types.Input())
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of text."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="No log on stderr.")
model = click.option(
    "--model", type=types.MODEL, show_default="as the trace says", help="Sizes of vectors and experts."
)
topology = click.option(
    "-t",
    "--topology",
    type=types.TOPOLOGY,
    metavar="NAME|FILE",
    required=True,
    help="The machine: a name from 'placer topology' or a TOML file.",
)
shape = click.option(
    "--shape",
    type=types.Shape(),
    metavar="RxSxG",
    show_default="the topology's",
    help="Racks x servers in a rack x GPUs in a server, for example 1x8x8.",
)

placed = _together(
    click.argument("placement", type=types.PlacementFile()),
    trace,
    topology,
    click.option(
        "--shape",
        type=types.Shape(),
        metavar="RxSxG",
        show_default="the placement's",
        help="Must be the placement's own.",
    ),
)


def constraints(meaning: str) -> Decorator[Any]:
    """Rules about where experts may stand."""
    return click.option("--constraints", type=types.ConstraintsFile(), metavar="FILE", help=meaning)


def replica_choice(default: str | None) -> Decorator[Any]:
    """The dispatch rule; without a default it is the placement's."""
    return click.option(
        "--replica-choice",
        type=click.Choice(["nearest", "spread", "table", "cover"]),
        default=default,
        show_default=True if default else "the placement's",
        help="Which copy of an expert a token takes.",
    )


memory = _together(
    click.option(
        "--gpu-memory",
        type=types.Quantity(),
        show_default="the topology's",
        help="Memory of a GPU, for example 80GB.",
    ),
    click.option(
        "--reserve",
        type=types.Quantity(),
        default="20GB",
        show_default=True,
        help="Memory of each GPU that experts may not use.",
    ),
    click.option(
        "--expert-dtype",
        type=click.Choice(["bf16", "fp8", "fp4"]),
        show_default="the model's",
        help="Storage of expert weights.",
    ),
)
alltoall = click.option(
    "--alltoall",
    type=types.ALLTOALL,
    default="hierarchical",
    show_default=True,
    metavar="SCHEME",
    help="How vectors travel: hierarchical (once per server, then inside it), naive (one per expert), gpu_dedup (one "
    "per GPU), allgather, low_latency (DeepEP's decode kernels) or follow (tokens stay with their heaviest expert).",
)
step = _together(
    click.option(
        "--homes",
        type=click.Choice(("uniform", "trace", "sticky")),
        default="uniform",
        show_default=True,
        help="Where tokens live: anywhere, on the trace's source ranks, or one rank for each sequence.",
    ),
    click.option(
        "--tokens-per-gpu",
        type=click.IntRange(min=1),
        default=4096,
        show_default=True,
        metavar="N",
        help="Tokens of one step on each GPU, for the seconds.",
    ),
    click.option(
        "--pass",
        "passes",
        type=click.Choice(("forward", "training")),
        default="forward",
        show_default=True,
        help="Training adds the backward pass, which mirrors dispatch and combine.",
    ),
    click.option(
        "--capacity-factor",
        type=types.Number("a number above 0", low=1e-9),
        metavar="F",
        show_default="none",
        help="Drop what exceeds F times an expert's even share of a step.",
    ),
    click.option(
        "--padded", is_flag=True, help="Buffers padded to the hottest rank: it sets everyone's bytes."
    ),
    click.option(
        "--background",
        type=types.Traffic(),
        metavar="LEVEL=SIZE,..",
        show_default="none",
        help="Other traffic on the same links in each phase of each layer, per GPU and direction: gpu=9MB,server=2MB.",
    ),
    click.option(
        "--queueing",
        is_flag=True,
        help="Let that traffic queue as well (M/D/1, utilisation up to 0.95).",
    ),
)
load_model = click.option(
    "--load-model",
    type=click.Choice(("tokens", "activated")),
    default="tokens",
    show_default=True,
    help="What load caps count: tokens, or the engine steps in which an expert is used at all, which is the load of "
    "memory-bound decode; needs a trace with steps, or --tokens-per-step.",
)
batches = _together(
    click.option(
        "--tokens-per-step",
        type=click.IntRange(min=1),
        metavar="N",
        show_default="the trace's own steps",
        help="Queue the trace's sequences into engine steps of N tokens over all GPUs, for the load of single steps.",
    ),
    click.option(
        "--phase",
        type=click.Choice(("prefill", "decode")),
        show_default="the trace's own",
        help="How they are queued: whole sequences, or one token of each running sequence.",
    ),
)
steady = click.option(
    "--steady",
    is_flag=True,
    help="After the search, keep experts that are hot in the same engine steps apart on the GPUs of their server: the "
    "busiest GPU of a step gets less to do, tokens touch more GPUs. Needs a trace with steps, or --tokens-per-step.",
)
slots_per_gpu = click.option(
    "--slots-per-gpu",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="just enough",
    help="Slots a layer, on each GPU; instead of --redundant.",
)
load_margin = click.option(
    "--load-margin",
    type=types.Number("auto or a number from 0 to below 1", high=1.0, words={"auto": "auto"}),
    default="auto",
    show_default=True,
    metavar="auto|F",
    help="Tighten the cap by F, so that it holds on tokens not seen.",
)
jobs = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="one for each core",
    help="Layers at once.",
)


def time_limit(meaning: str) -> Decorator[Any]:
    """Wall seconds."""
    return click.option(
        "--time-limit",
        type=types.Number("a number of seconds, 0 or more"),
        default="60",
        show_default=True,
        metavar="S",
        help=meaning,
    )


def gap(meaning: str) -> Decorator[Any]:
    """A gap that is good enough."""
    return click.option(
        "--gap",
        type=types.Number("a fraction or a percentage below 100%", high=1.0, percent=True),
        default="0%",
        show_default=True,
        metavar="1%",
        help=meaning,
    )


search = _together(
    time_limit("Wall seconds of search, for all layers together."),
    click.option(
        "--rounds",
        type=click.IntRange(min=0),
        metavar="N",
        show_default="as many as pay",
        help="Rounds of search a layer, at most.",
    ),
    gap("Stop a proof at this gap; of use where a bound is computed."),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Seed of all random choices.",
    ),
    jobs,
)


# -- what the options mean ---------------------------------------------------------------------------------


def budget(time_limit: float, rounds: int | None, gap: float) -> Any:
    """The budget that ``--time-limit``, ``--rounds`` and ``--gap`` stand for."""
    from placer.result import Budget

    return Budget(seconds=time_limit, rounds=rounds, gap=gap)


def batched(trace: Trace, tokens_per_step: int | None, phase: str | None, seed: int) -> Trace:
    """The trace in the steps that ``--tokens-per-step`` and ``--phase`` ask for."""
    if tokens_per_step is not None:
        return trace.rebatch(tokens_per_step, seed=seed, phase=phase)
    if phase is not None:
        raise click.UsageError("--phase: found no --tokens-per-step, expected one to queue sequences into")
    return trace


def workers(jobs: int | None) -> int:
    """``--jobs``, or the cores that this process may use."""
    import joblib

    return jobs or int(joblib.cpu_count())


def made_for(placement: Placement, shape: tuple[int, int, int] | None, path: str) -> None:
    """Refuse a ``--shape`` that is not the placement's own."""
    from placer.errors import InvalidInput
    from placer.placement import format_shape

    if shape is not None and shape != placement.shape:
        raise InvalidInput(
            f"--shape: found {format_shape(shape)}, expected {format_shape(placement.shape)}, the shape of {path}"
        )


def show(document: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print the result of a command on stdout: one JSON document, or text."""
    click.echo(json.dumps(document, allow_nan=False) if as_json else text)


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one existing file."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
