"""The command line as a test sees it: what came out, where, and with which exit code."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

from click.testing import CliRunner

from placer.cli import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def placer(*arguments: object) -> Outcome:
    """Run a command in this process; an exception that the command line should not leak is raised here."""
    separate = "mix_stderr" in inspect.signature(CliRunner).parameters  # click < 8.2
    runner = CliRunner(mix_stderr=False) if separate else CliRunner()  # type: ignore[call-arg]
    result = runner.invoke(main, [str(argument) for argument in arguments], prog_name="placer")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)
