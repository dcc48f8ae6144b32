"""Result: what a run may take, what it says while it runs, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from placer.bounds import gap
from placer.errors import InvalidInput
from placer.placement import Placement
from placer.report import format_seconds

SCHEMA = "placer/result/1"
OBJECTIVE_UNIT = "seconds per token"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a run may take.

    Parameters
    ----------
    seconds : float or None
        Wall seconds for all layers together, compilation excluded; None for no limit.
    rounds : int or None
        Rounds of search per layer; None for as many as pay.
    gap : float
        A proof may stop this close to the best bound, as a fraction of the incumbent.
    """

    seconds: float | None = 60.0
    rounds: int | None = None
    gap: float = 0.0

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds >= 0:
            raise InvalidInput(f"time limit: found {self.seconds}, expected 0 seconds or more")
        if self.rounds is not None and self.rounds < 0:
            raise InvalidInput(f"rounds: found {self.rounds}, expected 0 or more")
        if not 0 <= self.gap < 1:
            raise InvalidInput(f"gap: found {self.gap}, expected a fraction from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One more layer is done.

    `seconds` are those since the search began; `objective`, `linear` (the same for contiguous experts) and `bound` are
    seconds per token summed over the layers done; `load` is the mean over them of the busiest unit's load over mean at
    the worst level that placement can change; `improved` says whether the layer costs less than contiguous experts;
    `label` names the search where one command runs several.
    """

    seconds: float
    done: int
    layers: int
    rounds: int
    method: str
    objective: float
    linear: float
    bound: float | None
    load: float
    improved: bool
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `solve` found.

    Parameters
    ----------
    placement : Placement
    method, seed, rounds, seconds
        The method, its seed, the search rounds run in all layers together, wall seconds.
    status : str
        ``optimal`` (proven), ``feasible``, or ``interrupted``.
    objective : float
        Modelled link seconds of one token over all layers, level by level (see `Problem.seconds_per_vector`); 0 for
        counts only, whose traffic is unknown.
    bound : float or None
        Proven lower bound on the objective; None where none was computed.
    bound_method : str or None
        What proved it.
    proved_layers : tuple of int
        Layers whose placement is proved optimal, by the model's numbers.
    caps_raised : list of dict
        Caps above ``max_load`` because load-only packing needs them: layer, level, asked, cap.
    notes : tuple of str
        What the run decided by itself, in words.
    steady : dict of dict, optional
        ``before`` and ``after`` the swaps that even out single steps: ``load_per_step.gpu.mean`` (of tokens;
        ``activated_per_step`` where caps count activations), the busiest GPU's load over mean, averaged over steps and
        layers, and ``touched.gpu``. None, and not in the JSON document, unless asked for.
    """

    placement: Placement
    method: str
    seed: int
    rounds: int
    seconds: float
    status: str
    objective: float
    bound: float | None = None
    bound_method: str | None = None
    proved_layers: tuple[int, ...] = ()
    caps_raised: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    steady: dict[str, dict[str, float]] | None = None

    @property
    def gap(self) -> float | None:
        """(incumbent - bound) / incumbent as a fraction; None without a bound."""
        return None if self.bound is None else gap(self.objective, self.bound)

    def __repr__(self) -> str:
        proof = "" if self.gap is None else f", gap={self.gap:.4g}"
        return (
            f"Result(method={self.method!r}, status={self.status!r}, objective={self.objective:.4g}{proof}, "
            f"seconds={self.seconds:.4g})"
        )

    def figure(self, name: str) -> Any:
        """A plotly figure: ``servers``, where every expert stands, or ``copies`` of each.

        Raises
        ------
        InvalidInput
            When there is no such figure, or plotly is not installed.
        """
        from placer import notebook

        return notebook.draw(name, notebook.result_figures(self))

    def _repr_html_(self) -> str:
        from placer import notebook

        placement = self.placement
        rows: list[tuple[str, object]] = [
            ("status", self.status),
            ("objective", f"{format_seconds(self.objective)} a token"),
            ("bound", None if self.bound is None else f"{format_seconds(self.bound)} ({self.bound_method})"),
            ("gap", None if self.gap is None else f"{self.gap:.2%}"),
            ("search", f"{self.seconds:.1f} s, {self.rounds:,} rounds, seed {self.seed}"),
            ("caps raised", len(self.caps_raised)),
        ]
        title = (
            f"{self.method}: {placement.num_layers} layers x {placement.num_experts} experts on "
            f"{placement.num_ranks} ranks x {placement.slots_per_rank} slots"
        )
        return notebook.table(["", "found"], rows, title=title, notes=self.notes)

    def to_dict(self) -> dict[str, Any]:
        """The search part of the JSON document ``placer/result/1``."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "seed": self.seed,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "status": self.status,
            "objective": self.objective,
            "objective_unit": OBJECTIVE_UNIT,
            "bound": self.bound,
            "gap": self.gap,
            "bound_method": self.bound_method,
            "proved_layers": list(self.proved_layers),
            "caps_raised": self.caps_raised,
            "notes": list(self.notes),
            **({} if self.steady is None else {"steady": self.steady}),
        }
