"""Cliff: what a sweep over expert-parallel widths found, and where the network takes over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from placer.report import format_seconds
from placer.table import aligned

SCHEMA = "placer/sweep/1"
UNIFORM, BASELINE = "uniform", "linear"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One width under one routing with one placement.

    Parameters
    ----------
    ep : int
        GPUs that hold the experts once.
    routing : str
        ``uniform``, or what the tokens come from.
    method : str
        What placed the experts.
    inter_server_gb, intra_server_gb : float
        Gigabytes (1e9) of one step that leave servers, and that cross scale-up links, over the whole machine.
    seconds : dict of float
        ``dispatch``, ``combine``, ``compute`` of the slowest GPU and their sum ``step``; ``even_compute`` is that of a
        GPU under an even load.
    load : float
        Busiest GPU over mean.
    fits : bool or None
        Whether a GPU's memory holds its share of the experts of all layers; None where sizes are unknown.
    """

    ep: int
    routing: str
    method: str
    inter_server_gb: float
    intra_server_gb: float
    seconds: dict[str, float]
    load: float = 1.0
    fits: bool | None = None

    @property
    def a2a_over_compute(self) -> float | None:
        """Seconds of dispatch and combine over those of an evenly loaded GPU's compute; None where it is unknown."""
        compute = self.seconds["even_compute"]
        return (self.seconds["dispatch"] + self.seconds["combine"]) / compute if compute > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """A row of the JSON document."""
        return {
            "ep": self.ep,
            "routing": self.routing,
            "method": self.method,
            "inter_server_gb": self.inter_server_gb,
            "intra_server_gb": self.intra_server_gb,
            "a2a_over_compute": self.a2a_over_compute,
            "seconds": self.seconds,
            "load": self.load,
            "fits": self.fits,
        }


@dataclass(frozen=True, kw_only=True)
class Cliff:
    """Where the network takes over, for one routing and placement.

    Parameters
    ----------
    routing, method : str
    leaves_server : int or None
        First width with traffic between servers.
    passes_one : int or None
        First width at which the all-to-all takes longer than compute.
    near : float or None
        Where it does so when the ratio is a straight line over the logarithm of the width between two rows.
    """

    routing: str
    method: str
    leaves_server: int | None
    passes_one: int | None
    near: float | None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Cliff:
        """The cliff in rows of one routing and method, by ascending width.

        Examples
        --------
        >>> def row(ep, gb, ratio):
        ...     seconds = {"dispatch": ratio / 2, "combine": ratio / 2, "even_compute": 1.0}
        ...     return Row(ep=ep, routing="uniform", method="linear", inter_server_gb=gb, intra_server_gb=0.0,
        ...                seconds=seconds)
        >>> cliff = Cliff.of([row(8, 0.0, 0.2), row(16, 9.0, 0.6), row(32, 20.0, 1.4)])
        >>> cliff.leaves_server, cliff.passes_one, round(cliff.near, 1)
        (16, 32, 22.6)
        """
        ratios = [(row.ep, row.a2a_over_compute or 0.0) for row in rows]
        passes = next((ep for ep, ratio in ratios if ratio > 1), None)
        near = None if passes is None else float(passes)
        for (low, below), (high, above) in pairwise(ratios):
            if below <= 1 < above and high == passes:
                near = low * (high / low) ** ((1 - below) / (above - below))
        return cls(
            routing=rows[0].routing,
            method=rows[0].method,
            leaves_server=next((row.ep for row in rows if row.inter_server_gb > 0), None),
            passes_one=passes,
            near=near,
        )

    def to_dict(self) -> dict[str, Any]:
        """An entry of the JSON document."""
        return {
            "routing": self.routing,
            "method": self.method,
            "leaves_server": self.leaves_server,
            "passes_one": self.passes_one,
            "near": self.near,
        }

    def __str__(self) -> str:
        out = (
            "never leaves the server"
            if self.leaves_server is None
            else f"leaves the server at EP {self.leaves_server}"
        )
        if self.passes_one is None or self.near is None:
            slow = "all-to-all stays below compute"
        else:
            slow = f"all-to-all passes compute at EP {self.passes_one}"
            slow += "" if self.near == self.passes_one else f" (near {self.near:.3g})"
        return f"{self.routing}, {self.method}: traffic {out}, {slow}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `sweep` found.

    Parameters
    ----------
    title : str
        Model, machine, tokens and layers, in words.
    rows : tuple of Row
        By ascending width.
    notes : tuple of str
        What the numbers rest on, and widths left out.
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def series(self) -> dict[tuple[str, str], list[Row]]:
        """Rows of each routing and method, by ascending width."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.ep):
            found.setdefault((row.routing, row.method), []).append(row)
        return found

    def cliffs(self) -> tuple[Cliff, ...]:
        """Where the network takes over, for each routing and method."""
        return tuple(Cliff.of(rows) for rows in self.series().values())

    def moved(self, cliff: Cliff) -> float | None:
        """How many times as far out the cliff lies as that of contiguous experts under the same routing."""
        base = next((c for c in self.cliffs() if (c.routing, c.method) == (cliff.routing, BASELINE)), None)
        if base is None or base.near is None or cliff.near is None:
            return None
        return cliff.near / base.near

    def to_dict(self) -> dict[str, Any]:
        """The JSON document ``placer/sweep/1``."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "rows": [row.to_dict() for row in self.rows],
            "cliffs": [{**cliff.to_dict(), "moved": self.moved(cliff)} for cliff in self.cliffs()],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        base = {(row.ep, row.routing): row.inter_server_gb for row in self.rows if row.method == BASELINE}
        header = [
            "EP",
            "routing",
            "method",
            "GB between",
            "GB inside",
            "all-to-all",
            "even compute",
            "a2a/compute",
        ]
        lines = [
            [
                f"{row.ep}{'*' if row.fits is False else ''}",
                row.routing,
                row.method,
                f"{row.inter_server_gb:.1f}",
                f"{row.intra_server_gb:.1f}",
                format_seconds(row.seconds["dispatch"] + row.seconds["combine"]),
                format_seconds(row.seconds["even_compute"]),
                None if row.a2a_over_compute is None else f"{row.a2a_over_compute:.3f}",
                _change(row, base.get((row.ep, row.routing), 0.0)),
            ]
            for row in self.rows
        ]
        shown = len(header) + any(row.method != BASELINE for row in self.rows)
        table = aligned([*header, "GB vs linear"][:shown], [line[:shown] for line in lines], left=(1, 2))
        legend = "GB of one step over the whole machine, between servers and inside them"
        if any(row.fits is False for row in self.rows):
            legend += "; * the experts exceed a GPU's memory"
        cliffs, notes = [], [f"note: {note}" for note in self.notes]
        for cliff in self.cliffs():
            moved = None if cliff.method == BASELINE else self.moved(cliff)
            cliffs.append(
                f"cliff: {cliff}" + ("" if moved is None else f", {moved:.2f} times as far as {BASELINE}")
            )
        return "\n".join([self.title, legend, "", table, "", *cliffs, *notes])


def _change(row: Row, before: float) -> str:
    """Change of the traffic between servers against contiguous experts."""
    return "" if row.method == BASELINE or not before else f"{row.inter_server_gb / before - 1:+.1%}"
