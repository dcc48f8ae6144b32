"""What several commands share: the types of their arguments, and the options themselves."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from placer.files import nearest

if TYPE_CHECKING:
    from placer.placement import Placement

    ParamType = click.ParamType[Any]  # generic in the annotations of newer versions of click only
else:
    ParamType = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


# -- types -----------------------------------------------------------------------------------------------


class Name(ParamType):
    """A name out of a list that is only made when it is needed; unknown ones are answered with near ones."""

    def __init__(self, name: str, known: Callable[[], Iterable[str]]) -> None:
        self.name, self.known = name, known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.known():
            self.fail(f"unknown {self.name} {value!r}: {nearest(value, self.known())}", param, ctx)
        return value

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"Known: {', '.join(self.known())}"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.known() if name.startswith(incomplete)]


class TopologyName(Name):
    """A topology by its name or its TOML file, loaded."""

    def __init__(self) -> None:
        super().__init__("topology", _topologies)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from placer.topology import Topology

        return Topology.load(value) if isinstance(value, str) else value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return super().shell_complete(ctx, param, incomplete) or [CompletionItem(incomplete, type="file")]


class ModelName(Name):
    """A known model by its name, loaded."""

    def __init__(self) -> None:
        super().__init__("model", _models)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from placer.model import Model

        return Model.named(value) if isinstance(value, str) else value


class Number(ParamType):
    """A finite number of at least `low` and less than `high`, or one of some words."""

    name = "number"

    def __init__(
        self,
        expected: str,
        *,
        low: float = 0.0,
        high: float = math.inf,
        words: Mapping[str, Any] = MappingProxyType({}),
        percent: bool = False,
    ) -> None:
        self.expected, self.low, self.high, self.words, self.percent = expected, low, high, words, percent

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        text = value.strip().lower()
        if text in self.words:
            return self.words[text]
        scale = 0.01 if self.percent and text.endswith("%") else 1.0
        try:
            number = float(text.removesuffix("%") if scale != 1.0 else text) * scale
        except ValueError:
            number = math.nan
        if not self.low <= number < self.high:
            self.fail(f"found {value!r}, expected {self.expected}", param, ctx)
        return number


class Count(ParamType):
    """A whole number of at least 0, or one of some words."""

    name = "count"

    def __init__(self, expected: str, *, words: Iterable[str] = ()) -> None:
        self.expected, self.words = expected, frozenset(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        text = value.strip().lower()
        if text in self.words:
            return text
        if not re.fullmatch(r"[0-9]{1,9}", text):
            self.fail(f"found {value!r}, expected {self.expected}", param, ctx)
        return int(text)


class Numbers(ParamType):
    """Several numbers with commas between them, as a tuple."""

    name = "numbers"

    def __init__(self, number: Number | Count) -> None:
        self.number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(dict.fromkeys(self.number.convert(part, param, ctx) for part in value.split(",")))


class Traffic(ParamType):
    """Bytes on the links of some levels, as `placer.background.Background` reads them."""

    name = "traffic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from placer.background import Background

        return Background.parse(value) if isinstance(value, str) else value


class Quantity(ParamType):
    """A size in bytes, with its unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from placer.quantity import parse_quantity

        return parse_quantity(
            value, "bytes", f"--{param.name.replace('_', '-')}" if param and param.name else ""
        )


class Shape(ParamType):
    """Racks x servers in a rack x GPUs in a server, as three counts."""

    name = "RxSxG"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if not re.fullmatch(r"[1-9]\d{0,8}[xX][1-9]\d{0,8}[xX][1-9]\d{0,8}", value.strip()):
            self.fail(f"found {value!r}, expected RACKSxSERVERSxGPUS, for example 1x8x8", param, ctx)
        return tuple(int(count) for count in value.lower().split("x"))


class Output(ParamType):
    """A file to write: whether that will be possible is found out before any work is done."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        try:
            taken = path.exists() and not path.is_file()
            if taken or value in ("", "-"):
                self.fail(f"{value or 'nothing'}: cannot be written: expected the name of a file", param, ctx)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            self.fail(f"{value}: cannot be written: {path.parent}: {error.strerror}", param, ctx)
        return path

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class Input(ParamType):
    """A file to read; the reader says what is wrong with it."""

    name = "file"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


def _methods() -> list[str]:
    from placer.solvers import names

    return names()


def _schemes() -> Iterable[str]:
    from placer.alltoall import SCHEMES

    return SCHEMES


def _topologies() -> list[str]:
    from placer.topology import shipped

    return shipped()


def _models() -> list[str]:
    from placer.model import known

    return known()


def presets() -> list[str]:
    """Names that ``placer synth`` knows."""
    from placer.synthetic import PRESETS

    return sorted(PRESETS)


class PlacementFile(Input):
    """A placement file to read; a binary one, such as a trace in its place, is told at once."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            with open(value, "rb") as file:
                binary = b"\0" in file.read(1024)  # never in JSON text
        except OSError:
            return value  # the reader says why
        if binary:
            self.fail(f"{value}: not a placement file: expected JSON", param, ctx)
        return value


METHOD, TOPOLOGY, MODEL = Name("method", _methods), TopologyName(), ModelName()
MAX_LOAD = Number("a number of 1 or more, or none", low=1.0, words={"none": None})
MAX_LOAD_OR_AUTO = Number(
    "a number of 1 or more, none or auto", low=1.0, words={"none": None, "auto": "auto"}
)


# -- options ---------------------------------------------------------------------------------------------


def _together(*decorators: Decorator[Any]) -> Decorator[Any]:
    def apply(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


trace = click.argument("trace", type=Input())
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of text."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="No log on stderr.")
model = click.option(
    "--model", type=MODEL, show_default="as the trace says", help="Sizes of vectors and experts."
)
topology = click.option(
    "-t",
    "--topology",
    type=TOPOLOGY,
    metavar="NAME|FILE",
    required=True,
    help="The machine: a name from 'placer topology' or a TOML file.",
)
shape = click.option(
    "--shape",
    type=Shape(),
    metavar="RxSxG",
    show_default="the topology's",
    help="Racks x servers in a rack x GPUs in a server, for example 1x8x8.",
)

placed = _together(
    click.argument("placement", type=PlacementFile()),
    trace,
    topology,
    click.option(
        "--shape",
        type=Shape(),
        metavar="RxSxG",
        show_default="the placement's",
        help="Must be the placement's own.",
    ),
)


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
        type=Quantity(),
        show_default="the topology's",
        help="Memory of a GPU, for example 80GB.",
    ),
    click.option(
        "--reserve",
        type=Quantity(),
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
    type=Name("all-to-all", lambda: _schemes()),
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
        type=Number("a number above 0", low=1e-9),
        metavar="F",
        show_default="none",
        help="Drop what exceeds F times an expert's even share of a step.",
    ),
    click.option(
        "--padded", is_flag=True, help="Buffers padded to the hottest rank: it sets everyone's bytes."
    ),
    click.option(
        "--background",
        type=Traffic(),
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
slots_per_gpu = click.option(
    "--slots-per-gpu",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="just enough",
    help="Slots a layer, on each GPU; instead of --redundant.",
)
load_margin = click.option(
    "--load-margin",
    type=Number("auto or a number from 0 to below 1", high=1.0, words={"auto": "auto"}),
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
        type=Number("a number of seconds, 0 or more"),
        default="60",
        show_default=True,
        metavar="S",
        help=meaning,
    )


def gap(meaning: str) -> Decorator[Any]:
    """A gap that is good enough."""
    return click.option(
        "--gap",
        type=Number("a fraction or a percentage below 100%", high=1.0, percent=True),
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
