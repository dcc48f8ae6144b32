"""The command line. One file, one command; the file's name is the command's name.

Commands parse, call the library and print; every other import happens inside them, so that ``placer --help``
answers at once. A result goes to stdout, everything else to stderr. Exit codes: 0 done, 2 usage or invalid input,
3 proven infeasible, 4 stopped with no placement, 5 a gate failed, 130 interrupted, 1 a bug.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from typing import Any

import click

import placer
from placer.errors import PlacerError
from placer.files import nearest

#: In the order in which a newcomer meets them.
COMMANDS = (
    "solve",
    "evaluate",
    "bound",
    "compare",
    "sweep",
    "inspect",
    "check",
    "synth",
    "topology",
    "models",
    "methods",
    "versions",
)


class _Commands(click.Group):
    """Commands found by file name, and errors told in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

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
