"""Clock: when a method has to stop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Limits on one run: wall seconds, rounds, and a flag that anyone may raise.

    Methods ask between rounds; a round that has begun is finished.

    Parameters
    ----------
    deadline : float
        `time.monotonic` after which no round begins; infinite for none.
    rounds : int or None
        Rounds at most; None for as many as pay.
    gap : float
        A proof may stop this close to the best bound, as a fraction.
    stop : threading.Event
        Set from outside (Ctrl-C) to end the run early with what it has.

    Examples
    --------
    >>> clock = Clock.start(seconds=60, rounds=2)
    >>> [clock.allows(n) for n in range(4)]
    [True, True, False, False]
    """

    deadline: float = float("inf")
    rounds: int | None = None
    gap: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(
        cls,
        *,
        seconds: float | None = None,
        rounds: int | None = None,
        gap: float = 0.0,
        stop: threading.Event | None = None,
    ) -> Clock:
        """A clock that runs from now."""
        return cls(
            deadline=float("inf") if seconds is None else time.monotonic() + seconds,
            rounds=rounds,
            gap=gap,
            stop=stop or threading.Event(),
        )

    @property
    def remaining(self) -> float:
        """Wall seconds left, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether time is over or a stop was asked for."""
        return self.stop.is_set() or time.monotonic() >= self.deadline

    def allows(self, done: int) -> bool:
        """Whether another round may begin after `done` of them."""
        return not self.expired and (self.rounds is None or done < self.rounds)

    def shares(self, parts: int, at_once: int) -> Iterator[Clock]:
        """A clock for each part, made when the part begins: time left is shared by the parts not yet begun."""
        for index in range(parts):
            waves = math.ceil((parts - index) / at_once)
            endless = self.deadline == math.inf
            yield replace(self, deadline=math.inf if endless else time.monotonic() + self.remaining / waves)

    def __getstate__(self) -> dict[str, Any]:
        # An event belongs to its process; seconds left carry over to another machine, a deadline does not.
        return {
            "seconds": self.remaining,
            "rounds": self.rounds,
            "gap": self.gap,
            "stopped": self.stop.is_set(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        stop = threading.Event()
        if state["stopped"]:
            stop.set()
        object.__setattr__(self, "deadline", time.monotonic() + state["seconds"])
        object.__setattr__(self, "rounds", state["rounds"])
        object.__setattr__(self, "gap", state["gap"])
        object.__setattr__(self, "stop", stop)
