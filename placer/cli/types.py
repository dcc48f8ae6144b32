"""What the words of a command line may be: the types of its arguments and options."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from placer.files import nearest

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]  # generic in the annotations of newer versions of click only
else:
    ParamType = click.ParamType


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


class ConstraintsFile(Input):
    """A file of constraints, loaded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from placer.constraints import Constraints

        return Constraints.load(value) if isinstance(value, str) else value


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


METHOD, TOPOLOGY, MODEL = Name("method", _methods), TopologyName(), ModelName()
ALLTOALL = Name("all-to-all", _schemes)
MAX_LOAD = Number("a number of 1 or more, or none", low=1.0, words={"none": None})
MAX_LOAD_OR_AUTO = Number(
    "a number of 1 or more, none or auto", low=1.0, words={"none": None, "auto": "auto"}
)
