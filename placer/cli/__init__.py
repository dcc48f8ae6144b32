"""The command line. One file, one command; the file's name is the command's name.

Commands parse, call the library and print; every other import happens inside them, so that ``placer --help``
answers at once. A result goes to stdout, everything else to stderr. Exit codes: 0 done, 2 usage or invalid input,
3 proven infeasible, 4 stopped with no placement, 5 a gate failed, 130 interrupted, 1 a bug.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

import click

import placer
from placer.errors import PlacerError
from placer.files import nearest

#: What people want, and the commands for it, in the order in which a newcomer meets them.
SECTIONS = {
    "Search": ("solve", "compare", "sweep"),
    "Judge": ("evaluate", "bound", "check", "report", "inspect"),
    "In and out": ("convert", "synth", "export", "permute"),
    "Look up": ("topology", "models", "methods", "versions", "doctor"),
}
COMMANDS = tuple(itertools.chain.from_iterable(SECTIONS.values()))

#: How help says what click adds to an option: a default in words, a range of numbers.
_READABLE = (
    (re.compile(r"default: \((.+)\)"), r"default: \1"),
    (re.compile(r"(-?\d+)<=x<=(-?\d+)"), r"\1 to \2"),
    (re.compile(r"x>=(-?\d+)"), r"\1 or more"),
)


class _Formatter(click.HelpFormatter):
    """Help whose notes in brackets read like words."""

    def write_dl(self, rows: Iterable[tuple[str, str]], *args: Any, **options: Any) -> None:
        super().write_dl([(term, _readable(text)) for term, text in rows], *args, **options)


class _Context(click.Context):
    formatter_class = _Formatter


def _readable(text: str) -> str:
    """A help text in which the bracket at its end is said in words.

    Examples
    --------
    >>> _readable("Layers at once.  [default: (one for each core); x>=1]")
    'Layers at once.  [default: one for each core; 1 or more]'
    """
    body, bracket, note = text.rpartition("  [")
    for found, words in _READABLE:
        note = found.sub(words, note)
    return body + bracket + note


class _Commands(click.Group):
    """Commands found by file name, and errors told in one line."""

    context_class = _Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        command.context_class = _Context
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            width = max(map(len, COMMANDS))
            with formatter.section(title):
                formatter.write_dl(
                    [(name.ljust(width), found.get_short_help_str(80)) for name, found in commands if found]
                )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise click.UsageError(f"unknown command {args[0]!r}: {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **extra)
        except click.Abort:
            from placer.cli.interrupt import EXIT_CODE

            _fail("interrupted", EXIT_CODE)
        except click.ClickException as error:
            _fail(error.format_message() + _where_to_look(error), error.exit_code)
        except PlacerError as error:
            _fail(str(error), error.exit_code)
        except MemoryError:
            _fail("not enough memory for an input of this size", 2)
        except OSError as error:
            _fail(f"cannot write the output: {error.strerror or error}", 2)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of stdout (head, less) has seen enough; stop without a word.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _fail(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # stderr may be full or gone; the exit code still tells
        click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _where_to_look(error: click.ClickException) -> str:
    if isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter):
        return ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f" (see {error.ctx.command_path} --help)"
    return ""


_EPILOG = """\b
A first run:
  placer synth olmoe-like --layers 4 -o trace.npz
  placer solve trace.npz -t dgx-h100 --shape 1x8x1 -o placement.json
  placer evaluate placement.json trace.npz -t dgx-h100

\b
'placer COMMAND --help' has examples. Names complete with the Tab key after:
  eval "$(_PLACER_COMPLETE=bash_source placer)"
and with zsh_source or fish_source in those shells.
"""


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(placer.__version__, prog_name="placer", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Decide which GPU holds which experts of a Mixture-of-Experts model, so that tokens cross few slow links."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
