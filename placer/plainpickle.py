"""Pickles of plain data, read by an interpreter of our own.

A pickle is a program for a machine with a stack. This machine knows only the instructions that build strings, numbers,
lists, tuples and dicts. A name that a pickle mentions is looked up in a table of the caller's and nowhere else: nothing
is imported, and nothing of the file's choice is called.

Reference: https://docs.python.org/3/library/pickletools.html and the comments in the module itself.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import numpy as np

from placer.errors import InvalidInput

MAX_BYTES = 1 << 28  # a hundred times the pickle of a recording of a million tokens
MAX_INSTRUCTIONS = 1 << 25  # the values of each take 64 bytes of memory at worst: 2 GB
MAX_DEPTH = 32
UNFOLDED = 16  # values of a tree for each byte of its pickle: each value takes a byte where it stands once
KEYS = frozenset({str, int, float, bool, type(None)})
PLAIN = KEYS | {dict, list, tuple, np.ndarray}

_MARK = object()


@dataclass(frozen=True)
class Name:
    """A name that a pickle mentions: never looked up, only compared."""

    dotted: str


def read(
    pickle: bytes,
    *,
    names: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None = None,
    most_bytes: int = 0,
) -> Any:
    """The value that a pickle describes.

    Parameters
    ----------
    pickle
    names
        The names that may be mentioned. One with a function may be called and then gives what that returns for the
        arguments in the pickle; a `Name` stands for one without.
    persistent
        Called with each persistent id, for the object that it stands for.
    most_bytes
        Of all arrays together, counted as often as they stand in the value.

    Returns
    -------
    dict, list, tuple, str, int, float, bool, None or numpy.ndarray
        Containers hold nothing else; keys are no tuples.

    Raises
    ------
    InvalidInput
        When the pickle is damaged, too long, mentions another name, or describes anything but a tree of such values.

    Examples
    --------
    >>> read(b"\\x80\\x02}X\\x04\\x00\\x00\\x00rankK\\x03s.", names={})
    {'rank': 3}
    >>> read(b"cos\\nsystem\\n(X\\x02\\x00\\x00\\x00lstR.", names={})
    Traceback (most recent call last):
    placer.errors.InvalidInput: found os.system, which is neither imported nor called; expected plain data
    """
    if len(pickle) > MAX_BYTES:
        raise InvalidInput(f"found {len(pickle)} bytes, expected at most {MAX_BYTES}")
    return _checked(_Machine(names, persistent).run(pickle), UNFOLDED * len(pickle), most_bytes)


def _checked(root: Any, most_values: int, most_bytes: int) -> Any:
    """`root`, where unfolding it ends: containers may hold one another many times, or themselves."""
    pending, seen, size = [([root], 0)], 0, 0
    while pending:
        items, depth = pending.pop()
        seen += len(items)
        if seen > most_values or depth > MAX_DEPTH:
            raise InvalidInput(
                "a value holds itself, is repeated or nested too often; expected a tree of plain data"
            )
        for item in items:
            if type(item) not in PLAIN:
                what = item.dotted if isinstance(item, Name) else "half a value"
                raise InvalidInput(f"found {what}, expected plain data")
            if isinstance(item, dict):
                pending.append((list(item.values()), depth + 1))
            elif isinstance(item, list | tuple):
                pending.append((list(item), depth + 1))
            elif isinstance(item, np.ndarray):
                size += item.nbytes
    if size > most_bytes:
        raise InvalidInput(
            f"arrays of {size} bytes in all, expected at most {most_bytes}: one stands for many"
        )
    return root


class _Machine:
    """The stack and the memo, and what the instructions do to them."""

    def __init__(
        self, names: Mapping[str, Callable[..., Any] | None], persistent: Callable[[Any], Any] | None
    ) -> None:
        self.names, self.persistent = names, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        number = 0
        try:
            for opcode, argument, _ in pickletools.genops(io.BytesIO(pickle)):
                number += 1
                if opcode.name == "STOP":
                    (value,) = self.stack
                    return value
                if number > MAX_INSTRUCTIONS:
                    raise InvalidInput(f"found more than {MAX_INSTRUCTIONS} instructions")
                if opcode.name not in _STEPS:
                    raise InvalidInput(f"instruction {opcode.name} builds no plain data and is not run")
                _STEPS[opcode.name](self, argument)
        except InvalidInput:
            raise
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            Warning,
        ) as error:  # a warning where these are errors
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise InvalidInput(f"damaged at instruction {number}: {what}") from None
        raise InvalidInput("ends without STOP")  # not reached: the instructions do not end without either

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pushed(self, kind: type) -> Any:
        """The last value, which must be of this type."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"no {kind.__name__}")
        return self.stack[-1]

    def take(self, number: int) -> tuple[Any, ...]:
        """The last values, taken off."""
        if len(self.stack) < number:
            raise ValueError("nothing left")
        at = len(self.stack) - number
        values = tuple(self.stack[at:])
        del self.stack[at:]
        return values

    def marked(self) -> list[Any]:
        """The values above the last mark, taken off with it."""
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise ValueError("no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def integer(self, value: int) -> None:
        if value.bit_length() > 64:
            raise ValueError(f"an integer of {value.bit_length()} bits, expected 64 at most")
        self.push(value)

    def extend(self, items: list[Any]) -> None:
        self.pushed(list).extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.pushed(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in KEYS:
                raise ValueError(f"a key of type {type(key).__name__}")
            target[key] = value

    def remember(self, at: int | None) -> None:
        (value,) = self.stack[-1:]
        if value is _MARK:
            raise ValueError("a mark to remember")
        self.memo[len(self.memo) if at is None else at] = value

    def name(self, module: Any, name: Any) -> None:
        dotted = f"{module}.{name}" if type(module) is type(name) is str else "a name that is none"
        if dotted not in self.names:
            raise InvalidInput(
                f"found {short(dotted)[1:-1]}, which is neither imported nor called; expected plain data"
            )
        self.push(Name(dotted))

    def reduce(self) -> None:
        name, arguments = self.take(2)
        function = self.names[name.dotted] if isinstance(name, Name) else None
        if function is None or type(arguments) is not tuple:
            raise ValueError("a call of what cannot be called")
        self.push(function(*arguments))

    def refer(self) -> None:
        (found,) = self.take(1)
        if self.persistent is None:
            raise ValueError("a persistent id")
        self.push(self.persistent(found))


_Step = Callable[[_Machine, Any], None]

_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    "MARK": lambda machine, _: machine.push(_MARK),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), _Machine.integer),
    **dict.fromkeys(("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _Machine.push),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "TUPLE1": lambda machine, _: machine.push(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.take(3)),
    "APPEND": lambda machine, _: machine.extend(list(machine.take(1))),
    "APPENDS": lambda machine, _: machine.extend(machine.marked()),
    "SETITEM": lambda machine, _: machine.update(list(machine.take(2))),
    "SETITEMS": lambda machine, _: machine.update(machine.marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.push(machine.memo[at])),
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.take(2)),
    "BINPERSID": lambda machine, _: machine.refer(),
    "REDUCE": lambda machine, _: machine.reduce(),
}
