"""Measured against predicted: ratios, the order of the matrices, and what a better placement saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from benchmarks.network.exchange import Run
from placer.table import aligned

#: What measured over predicted seconds may be, from `FULL_BYTES` on.
LOWEST, HIGHEST, FULL_BYTES = 0.95, 1.30, 300e6
#: Predictions closer than this are not ordered.
MARGIN = 0.10
#: How far the measured saving may be from the predicted one, relative to it.
SAVING_ERROR = 0.10


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One matrix: predicted seconds and the runs.

    Examples
    --------
    >>> runs = tuple(Run(seconds=s, retransmits=0, busy=0.5) for s in (2.1, 2.0, 2.2))
    >>> found = Measurement(name="uniform", bytes=3.2e8, predicted=2.0, runs=runs)
    >>> round(found.measured, 2), round(found.ratio, 3), round(found.spread, 3)
    (2.1, 1.05, 0.095)
    """

    name: str
    bytes: float
    predicted: float
    runs: tuple[Run, ...]

    @property
    def measured(self) -> float:
        """Median seconds of the runs."""
        return median(run.seconds for run in self.runs)

    @property
    def ratio(self) -> float:
        """Measured over predicted seconds."""
        return self.measured / self.predicted

    @property
    def spread(self) -> float:
        """Longest minus shortest run, over the median."""
        seconds = [run.seconds for run in self.runs]
        return (max(seconds) - min(seconds)) / self.measured


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Share of the seconds of ``linear`` that an optimised placement saves, predicted and measured."""

    trace: str
    linear: Measurement
    optimised: Measurement

    @property
    def predicted(self) -> float:
        """1 - optimised / linear, of the predictions."""
        return 1.0 - self.optimised.predicted / self.linear.predicted

    @property
    def measured(self) -> float:
        """1 - optimised / linear, of the medians."""
        return 1.0 - self.optimised.measured / self.linear.measured

    @property
    def error(self) -> float:
        """Measured over predicted saving, minus 1."""
        return self.measured / self.predicted - 1.0


def ordered(measurements: Sequence[Measurement], margin: float = MARGIN) -> tuple[int, list[str]]:
    """How many pairs have predictions more than `margin` apart, and those whose measured order is the other one.

    Examples
    --------
    >>> run = lambda seconds: (Run(seconds=seconds, retransmits=0, busy=0.0),)
    >>> a = Measurement(name="a", bytes=1.0, predicted=1.0, runs=run(1.3))
    >>> b = Measurement(name="b", bytes=1.0, predicted=1.2, runs=run(1.25))
    >>> ordered([a, b])
    (1, ['a and b'])
    """
    apart, swapped = 0, []
    for pair in combinations(measurements, 2):
        fast, slow = sorted(pair, key=lambda each: each.predicted)
        if slow.predicted > (1.0 + margin) * fast.predicted:
            apart += 1
            if slow.measured <= fast.measured:
                swapped.append(f"{fast.name} and {slow.name}")
    return apart, swapped


def table(measurements: Sequence[Measurement]) -> str:
    """One line for each matrix."""
    header = ["matrix", "MB", "predicted s", "measured s", "spread", "ratio", "resent", "CPU"]
    rows = [
        [
            each.name,
            f"{each.bytes / 1e6:.0f}",
            f"{each.predicted:.3f}",
            f"{each.measured:.3f}",
            f"{each.spread:.1%}",
            f"{each.ratio:.3f}",
            f"{sum(run.retransmits for run in each.runs)}",
            f"{median(run.busy for run in each.runs):.0%}",
        ]
        for each in measurements
    ]
    return aligned(header, rows)


def savings(found: Sequence[Saving]) -> str:
    """One line for each trace."""
    header = ["trace", "predicted saving", "measured", "error"]
    rows = [[s.trace, f"{s.predicted:.2%}", f"{s.measured:.2%}", f"{s.error:+.1%}"] for s in found]
    return aligned(header, rows)


def verdicts(measurements: Sequence[Measurement], found: Sequence[Saving], dropped: int) -> list[str]:
    """The targets, and whether they are met."""
    full = [each.ratio for each in measurements if each.bytes >= FULL_BYTES]
    lines = []
    if full:
        low, high = min(full), max(full)
        met = low >= LOWEST and high <= HIGHEST
        lines.append(
            f"measured / predicted within {LOWEST:.2f} to {HIGHEST:.2f} from {FULL_BYTES / 1e6:.0f} MB on: "
            f"{_said(met)} ({low:.3f} to {high:.3f})"
        )
    apart, swapped = ordered(measurements)
    lines.append(
        f"order kept where predictions differ by more than {MARGIN:.0%}: {_said(not swapped)} "
        f"({apart} pairs{''.join(', not ' + pair for pair in swapped)})"
    )
    for saving in found:
        lines.append(
            f"saving on {saving.trace} within {SAVING_ERROR:.0%} of the predicted one: "
            f"{_said(abs(saving.error) <= SAVING_ERROR)} ({saving.error:+.1%})"
        )
    lines.append(f"packets dropped: {dropped}")
    return lines


def _said(met: bool) -> str:
    return "yes" if met else "NO"
