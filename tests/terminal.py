"""The command line as a test sees it: what came out, where, and with which exit code."""

from __future__ import annotations

import inspect
import json
import os
import sys
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


def on_terminal(*arguments: object, **environment: str) -> str:
    """All that a command shows on a terminal of 120 columns, stdout and stderr as they come, escape codes included."""
    import pty
    import struct
    import subprocess
    import termios
    from fcntl import ioctl

    reading, shown = pty.openpty()
    ioctl(shown, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "placer", *map(str, arguments)],
        stdin=shown,
        stdout=shown,
        stderr=shown,
        env={**kept, "TERM": "xterm-256color", **environment},
    )
    os.close(shown)
    said = b""
    while True:
        try:
            part = os.read(reading, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        said += part
    os.close(reading)
    assert process.wait(timeout=60) == 0
    return said.decode().replace("\r\n", "\n")
