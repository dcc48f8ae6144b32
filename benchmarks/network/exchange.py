"""The all-to-all-v of a matrix over sockets: one process for each rank, inside its network namespace."""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.network import rank as program
from benchmarks.network.emulation import address, namespace, window
from placer.errors import PlacerError

#: Share of its bytes that a stream may be ahead of the slowest one of its rank.
LEAD = 0.15

_NOTICE = 0.1  # seconds from the last rank's "connected" to the common start


@dataclass(frozen=True, kw_only=True)
class Run:
    """One exchange.

    Parameters
    ----------
    seconds : float
        From the common start to the last byte that any rank receives.
    retransmits : int
        TCP segments sent again.
    busy : float
        Share of the machine's processors in use meanwhile, by anything: near 1 they may have been the limit.
    """

    seconds: float
    retransmits: int
    busy: float


def exchange(matrix: npt.NDArray[np.int64], *, lead: float = LEAD, verify: bool = False) -> Run:
    """Move ``matrix[p, q]`` bytes from rank p to rank q, all at once, inside `emulation.network`.

    Parameters
    ----------
    matrix : (P, P) int64
        Bytes; the diagonal is ignored.
    lead : float
        How far one stream of a rank may get ahead of its slowest one, as a share of its bytes: a dispatch takes its
        tokens in order, so destinations progress together but for buffers. 1 leaves every stream to itself.
    verify : bool
        Compare what arrives with what was sent, byte by byte; costs processor time.

    Raises
    ------
    PlacerError
        When a rank fails, or other bytes arrive.
    """
    if not (off_diagonal := matrix[~np.eye(len(matrix), dtype=bool)]).any():
        return Run(seconds=0.0, retransmits=0, busy=0.0)
    mean = float(off_diagonal[off_diagonal > 0].mean())
    ranks = range(len(matrix))
    with ExitStack() as stack:
        processes = [stack.enter_context(_Rank(rank)) for rank in ranks]
        for process in processes:
            process.say(_plan(matrix, process.rank, mean) | {"lead": lead, "verify": verify})
        for step in ("listening", "connected"):
            for process in processes:
                process.hear()
            if step == "listening":
                for process in processes:
                    process.say("connect")
        start = time.monotonic() + _NOTICE
        for process in processes:
            process.say(start)
        time.sleep(max(0.0, start - time.monotonic()))
        before = _processor_seconds()
        answers = [process.hear() for process in processes]
        after = _processor_seconds()
        for process in processes:
            process.say("close")
    if verify:
        _check(matrix, answers)
    busy, idle = (end - begin for begin, end in zip(before, after, strict=True))
    return Run(
        seconds=max(answer["finished"] for answer in answers) - start,
        retransmits=sum(answer["retransmits"] for answer in answers),
        busy=busy / max(busy + idle, 1e-9),
    )


class _Rank:
    """The process of one rank, and lines to and from it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __enter__(self) -> _Rank:
        command = ["ip", "netns", "exec", namespace(self.rank), sys.executable, "-I", "-S", program.__file__]
        # A session of its own: Ctrl-C reaches this program alone, which then ends the ranks.
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is not None:
            self.process.kill()
        self.process.communicate()

    def say(self, message: object) -> None:
        """Send a line; a rank that is gone tells why when it is heard."""
        pipe = self.process.stdin
        with suppress(BrokenPipeError):
            if pipe is not None:
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()

    def hear(self) -> Any:
        """The next line; PlacerError when the rank ended instead."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            self.process.kill()
            error = self.process.communicate()[1].strip() or f"exit code {self.process.returncode}"
            raise PlacerError(f"rank {self.rank}: {error.splitlines()[-1]}")
        return json.loads(line)


def _plan(matrix: npt.NDArray[np.int64], rank: int, mean: float) -> dict[str, Any]:
    """What a rank sends and receives: bytes and window of each stream, by peer."""

    def streams(sizes: npt.NDArray[np.int64]) -> dict[int, tuple[int, int]]:
        peers = [peer for peer in np.flatnonzero(sizes).tolist() if peer != rank]
        return {peer: (int(sizes[peer]), window(sizes[peer] / mean)) for peer in peers}

    return {
        "rank": rank,
        "addresses": [address(peer) for peer in range(len(matrix))],
        "send": streams(matrix[rank]),
        "receive": streams(matrix[:, rank]),
    }


def _check(matrix: npt.NDArray[np.int64], answers: Sequence[Any]) -> None:
    """Compare the checksum of every stream with that of what should have been sent."""
    for target, answer in enumerate(answers):
        for peer, found in answer["sums"].items():
            size, expected = int(matrix[int(peer), target]), 0
            stream = program.wire(int(peer), target)[: program.CHUNK // program.PERIOD * program.PERIOD]
            while size > 0:
                expected = zlib.crc32(stream[: min(size, len(stream))], expected)
                size -= len(stream)
            if found != expected:
                raise PlacerError(f"rank {target}: found other bytes than rank {peer} sent")


def _processor_seconds() -> tuple[float, float]:
    """Busy and idle time of all processors since boot, proc_stat(5); in ticks, only shares matter."""
    figures = [float(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = figures[3] + figures[4]  # idle, and waiting for a disk
    return sum(figures) - idle, idle
