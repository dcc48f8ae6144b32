"""Report: what a placement costs on a trace, as numbers, JSON and text."""

from __future__ import annotations

import json
import operator
import re
from dataclasses import dataclass
from typing import Any

from placer.errors import GateFailed, InvalidInput
from placer.topology import REPORTED

SCHEMA = "placer/report/1"
SHOWN_LINKS = 3  # of those a report names, in its text

_GATE = re.compile(r"\s*([a-z_]+(?:\.[a-z_]+)*)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Gate:
    """A condition on one number of a report, as in ``remote.server<=3.2``.

    Parameters
    ----------
    path : str
        Dotted path of the number.
    sign : {"<=", ">=", "<", ">"}
    limit : float

    Examples
    --------
    >>> Gate.parse("remote.server <= 3.2")
    Gate(path='remote.server', sign='<=', limit=3.2)
    """

    path: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a condition.

        Raises
        ------
        InvalidInput
            When the text is not a path, a comparison and a number.
        """
        match = _GATE.fullmatch(text)
        try:
            path, sign, limit = match.groups()  # type: ignore[union-attr]
            return cls(path, sign, float(limit))
        except (AttributeError, ValueError):
            raise InvalidInput(
                f"--require {text!r}: expected PATH<=NUMBER (or one of >=, <, >), for example remote.server<=4.5"
            ) from None

    def holds(self, value: float) -> bool:
        """Whether a value keeps the limit."""
        return bool(_COMPARE[self.sign](value, self.limit))

    def shown(self, value: float) -> str:
        """A value in six digits, or in all of them where rounding would turn the answer or hide it."""
        rounded = f"{value:.6g}"
        kept = self.holds(float(rounded)) == self.holds(value)
        return rounded if kept and (float(rounded) != self.limit or value == self.limit) else repr(value)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Traffic, load, seconds and memory of a placement on a trace.

    Parameters
    ----------
    tokens, layers : int
        What was measured.
    alltoall, replica_choice : str
        The all-to-all scheme and the dispatch rule that were priced.
    touched, remote : dict of float
        Per level "gpu", "server", "rack": mean over tokens and layers of the units that hold the token's
        experts, and of those other than the home's.
    bytes_per_token : dict of float
        Bytes that leave units over the links of each level, dispatch and combine, all layers, per token.
    bytes_by_scheme : dict of dict
        The same for every all-to-all scheme that moves anything; ``follow`` only when it was asked for.
    load : dict of dict
        Per level ``max_over_mean`` (busiest unit over mean, mean over layers) and ``worst_layer``.
    seconds : dict of float
        ``dispatch``, ``combine``, ``compute`` and ``step`` of one step, summed over layers.
    overlap : dict of dict
        For the schedules ``none``, ``two_batch`` and ``dualpipe``: ``total`` seconds of a step, and those in which
        only links work (``exposed``).
    latency : float
        Seconds of `seconds` that do not shrink with the batch.
    bottleneck : str
        The kind of link or device that takes most of the step.
    links : list of dict
        The links that are busy longest: ``link``, ``level``, ``phase``, ``bytes`` and ``seconds`` of one step.
    dropped : float
        Share of choices that a capacity factor drops.
    steps : dict, optional
        ``number`` of steps of the trace and ``tokens`` of one on average; None when it has none.
    load_per_step : dict of dict, optional
        Per level ``mean``, ``p99`` and ``max`` over steps and layers of the busiest unit over mean; None when the
        trace has no steps.
    load_activated : dict of dict, optional
        `load` with an expert's load counted as the steps in which it is used at all, the load of memory-bound decode;
        None when the trace has no steps (then it is not in the JSON document either), or the placement has copies.
    best_split : dict of dict, optional
        `load` if each expert's tokens were split over its copies at best, see `placer.split.best_split`; None unless
        asked for, and then not in the JSON document either.
    memory : dict
        ``worst_gpu_bytes`` of experts on the fullest GPU (None when the expert size is unknown), with
        ``capacity_bytes`` and ``reserve_bytes``.
    assumptions : tuple of str
        What the numbers rest on, in words.
    per_layer : dict
        ``layer_ids``, and lists with one entry a layer of ``touched``, ``remote`` and ``load`` per level, and of
        ``seconds`` per phase.
    """

    tokens: int
    layers: int
    alltoall: str
    replica_choice: str
    touched: dict[str, float]
    remote: dict[str, float]
    bytes_per_token: dict[str, float]
    bytes_by_scheme: dict[str, dict[str, float]]
    load: dict[str, dict[str, float]]
    seconds: dict[str, float]
    overlap: dict[str, dict[str, float]]
    latency: float
    bottleneck: str
    links: list[dict[str, Any]]
    dropped: float
    steps: dict[str, float] | None
    load_per_step: dict[str, dict[str, float]] | None
    load_activated: dict[str, dict[str, float]] | None = None
    best_split: dict[str, dict[str, float]] | None = None
    memory: dict[str, float | None]
    assumptions: tuple[str, ...]
    per_layer: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document ``placer/report/1``."""
        split = {} if self.best_split is None else {"best_split": self.best_split}
        activated = {} if self.steps is None else {"load_activated": self.load_activated}
        return {
            "schema": SCHEMA,
            "tokens": self.tokens,
            "layers": self.layers,
            "alltoall": self.alltoall,
            "replica_choice": self.replica_choice,
            "touched": self.touched,
            "remote": self.remote,
            "bytes_per_token": self.bytes_per_token,
            "bytes_by_scheme": self.bytes_by_scheme,
            "load": self.load,
            **split,
            "seconds": self.seconds,
            "overlap": self.overlap,
            "latency": self.latency,
            "bottleneck": self.bottleneck,
            "links": self.links,
            "dropped": self.dropped,
            "steps": self.steps,
            "load_per_step": self.load_per_step,
            **activated,
            "memory": self.memory,
            "assumptions": list(self.assumptions),
            "per_layer": self.per_layer,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict())

    def value(self, path: str) -> float:
        """A number by its dotted path, for example ``remote.server``.

        Raises
        ------
        InvalidInput
            When there is no such number.
        """
        found: Any = self.to_dict()
        for key in path.split("."):
            if not isinstance(found, dict) or key not in found:
                known = ", ".join(found) if isinstance(found, dict) else "no further keys"
                raise InvalidInput(f"{path}: no {key!r} in the report; known: {known}")
            found = found[key]
        if found is None:
            raise InvalidInput(f"{path}: not known here, expected a number; the report's assumptions say why")
        if isinstance(found, bool) or not isinstance(found, int | float):
            if isinstance(found, dict):
                within = ", ".join(f"{path}.{key}" for key in found)
                raise InvalidInput(f"{path}: found an object, expected a number; in it: {within}")
            kind = "a list" if isinstance(found, list) else "text"
            raise InvalidInput(f"{path}: found {kind}, expected a number")
        return float(found)

    def require(self, gate: str | Gate) -> str:
        """Hold the report to a condition such as ``remote.server<=3.2``.

        Returns
        -------
        str
            What holds, in words: ``remote.server 3.1 <= 3.2``.

        Raises
        ------
        InvalidInput
            When the condition cannot be read.
        GateFailed
            When it does not hold.
        """
        if isinstance(gate, str):
            gate = Gate.parse(gate)
        value = self.value(gate.path)
        shown = gate.shown(value)
        if not gate.holds(value):
            raise GateFailed(f"{gate.path} is {shown}, required {gate.sign} {gate.limit!r}")
        return f"{gate.path} {shown} {gate.sign} {gate.limit!r}"

    def explain(self) -> str:
        """Where the time goes, in five lines of words."""
        seconds, step = self.seconds, self.seconds["step"] or 1.0
        wire = seconds["dispatch"] + seconds["combine"]
        split = f"{wire / step:.0%} dispatch and combine, {seconds['compute'] / step:.0%} experts"
        lines = [f"A step takes {format_seconds(seconds['step'])}: {split}."]
        if self.links:
            first = self.links[0]
            share = first["seconds"] / (seconds[first["phase"]] or 1.0)
            lines.append(
                f"The busiest link is {first['link']}: {format_bytes(first['bytes'])} of {first['phase']} keep it busy "
                f"{format_seconds(first['seconds'])}, {share:.0%} of that phase."
            )
        else:
            lines.append("No link carries anything: every token finds its experts at home.")
        lines.append(
            f"A token touches {self.touched['server']:.2f} servers and {self.touched['gpu']:.2f} GPUs a layer; "
            f"latency, which no placement changes, is {self.latency / (wire or 1.0):.0%} of the communication."
        )
        worst = max(REPORTED, key=lambda level: self.load[level]["max_over_mean"])
        lines.append(
            f"The busiest {worst} has {self.load[worst]['max_over_mean']:.2f} times the mean load"
            + (
                f"; {self.dropped:.1%} of the choices are dropped."
                if self.dropped
                else ": the rest wait for it."
            )
        )
        exposed = [
            f"{format_seconds(self.overlap[key]['exposed'])} {words}"
            for key, words in (
                ("none", "without overlap"),
                ("two_batch", "with two batches in turn"),
                ("dualpipe", "with DualPipe"),
            )
        ]
        lines.append(f"Exposed communication: {', '.join(exposed)}.")
        return "\n".join(lines)

    def figure(self, name: str) -> Any:
        """A plotly figure: ``load``, ``touched`` or ``remote`` of every layer, ``links`` or ``seconds``.

        Raises
        ------
        InvalidInput
            When there is no such figure, or plotly is not installed.
        """
        from placer import notebook

        return notebook.draw(name, notebook.report_figures(self))

    def _repr_html_(self) -> str:
        from placer import notebook

        header = ["", "touched", "remote", "bytes/token", "load max/mean", "worst layer"]
        rows = [
            [
                level,
                f"{self.touched[level]:.3f}",
                f"{self.remote[level]:.3f}",
                format_bytes(self.bytes_per_token[level]),
                f"{self.load[level]['max_over_mean']:.3f}",
                f"{self.load[level]['worst_layer']:.3f}",
            ]
            for level in REPORTED
        ]
        title = (
            f"{self.tokens:,} tokens, {self.layers} layers, {self.alltoall}: a step takes "
            f"{format_seconds(self.seconds['step'])}, most of it {self.bottleneck}"
        )
        return notebook.table(header, rows, title=title, notes=self.assumptions)

    def __str__(self) -> str:
        lines = [
            f"{'':10}{'touched':>9}{'remote':>9}{'bytes/token':>13}{'load max/mean':>15}{'worst layer':>13}"
        ]
        for level in REPORTED:
            lines.append(
                f"{level:10}{self.touched[level]:9.3f}{self.remote[level]:9.3f}"
                f"{format_bytes(self.bytes_per_token[level]):>13}"
                f"{self.load[level]['max_over_mean']:15.3f}{self.load[level]['worst_layer']:13.3f}"
            )
        if self.best_split is not None:
            each = ", ".join(
                f"{level} {row['max_over_mean']:.3f} / {row['worst_layer']:.3f}"
                for level, row in self.best_split.items()
            )
            lines.append(f"load under the best split over copies, max/mean / worst layer: {each}")
        seconds = self.seconds
        lines.append(
            f"step {format_seconds(seconds['step'])}: dispatch {format_seconds(seconds['dispatch'])}, "
            f"combine {format_seconds(seconds['combine'])}, compute {format_seconds(seconds['compute'])}; "
            f"bottleneck {self.bottleneck}"
        )
        for row in self.links[:SHOWN_LINKS]:
            volume, time = format_bytes(row["bytes"]), format_seconds(row["seconds"])
            lines.append(f"  {row['link']:34} {row['phase']:9}{volume:>9}{time:>10}")
        hidden = self.overlap
        if self.seconds["step"] > 0:
            lines.append(
                f"step with overlap: two batches {format_seconds(hidden['two_batch']['total'])}, "
                f"DualPipe {format_seconds(hidden['dualpipe']['total'])}"
            )
        if self.dropped:
            lines.append(f"dropped by the capacity factor: {self.dropped:.2%} of the choices")
        if self.load_per_step is not None and self.steps is not None:
            each = "; ".join(
                f"{level} {row['mean']:.3f} / {row['p99']:.3f} / {row['max']:.3f}"
                for level, row in self.load_per_step.items()
            )
            size = f"{self.steps['number']:,} steps of {self.steps['tokens']:,.0f} tokens on average"
            lines.append(f"load max/mean of {size}, mean / p99 / max: {each}")
        if self.load_activated is not None:
            each = "; ".join(
                f"{level} {row['max_over_mean']:.3f} / {row['worst_layer']:.3f}"
                for level, row in self.load_activated.items()
            )
            lines.append(f"steps in which experts are used, max/mean / worst layer: {each}")
        return "\n".join(lines)


def format_bytes(count: float) -> str:
    """Bytes in decimal units.

    Examples
    --------
    >>> format_bytes(1234567), format_bytes(12)
    ('1.23 MB', '12 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * size:  # what three digits would round up
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} B"


def format_seconds(seconds: float) -> str:
    """Seconds in a unit that reads well.

    Examples
    --------
    >>> format_seconds(0.00123), format_seconds(12.0)
    ('1.23 ms', '12 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
