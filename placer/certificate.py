"""Certificate: how far a placement is from the best possible one, with a proof."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placer import caps
from placer.bounds import Partition, Proof, gap, prove
from placer.clock import Clock
from placer.errors import InvalidInput
from placer.files import write_atomically
from placer.layer import Layer
from placer.placement import Placement
from placer.problem import Problem

Ints = npt.NDArray[np.int64]

SCHEMA = "placer/bound/1"
SEARCH_SHARE, SEARCH_ROUNDS = 0.1, 8  # of a layer's time, for a partition to close in on from above

WITH_COPIES = "no bound: with copies the cost of a server's experts depends on what the other servers hold"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A better bound of one layer, or its last word.

    `touched` and `bound` are units per token, `best` those of the best placement met; `done` counts finished layers.
    """

    seconds: float
    layer: int
    level: str
    touched: float
    best: float
    bound: float
    done: int
    layers: int
    finished: bool

    @property
    def gap(self) -> float:
        """(touched - bound) / touched."""
        return gap(self.touched, self.bound)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBound:
    """The bound of one layer at one level.

    Parameters
    ----------
    layer : int
        The model's layer number.
    touched, best, bound : float
        Touched units per token: of the placement, of the best placement met, and of no placement less.
    method : str
        What proves the bound.
    allowed : bool
        Whether the placement is one of those that are bounded: within the cap, with its gate groups whole if asked for.
    seconds : float
    partition, proof
        What was bounded, and the proof with its certificate.
    """

    layer: int
    touched: float
    best: float
    bound: float
    method: str
    allowed: bool
    seconds: float
    partition: Partition
    proof: Proof

    @property
    def gap(self) -> float:
        """(touched - bound) / touched; less than 0 where a placement that is not allowed touches fewer."""
        return gap(self.touched, self.bound)

    @property
    def proved(self) -> bool:
        """Whether the placement is proved optimal."""
        return self.allowed and self.bound >= self.touched

    @property
    def cap(self) -> float | None:
        """The load over the mean that the bound's placements keep to; None without a cap."""
        total = float(self.partition.load.sum())
        finite = total > 0 and math.isfinite(self.partition.cap)
        return self.partition.cap * self.partition.units / total if finite else None

    def to_dict(self) -> dict[str, Any]:
        """One entry of ``per_layer``."""
        return {
            "layer": self.layer,
            "touched": self.touched,
            "bound": self.bound,
            "gap": self.gap,
            "best": self.best,
            "proved": self.proved,
            "cap": self.cap,
            "method": self.method,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate:
    """A bound on the touched units of one level over all layers.

    Parameters
    ----------
    level : str
    tokens : int
        Tokens that the bound covers. It says nothing about others.
    touched : float
        Of the placement, mean over tokens and layers.
    layers : tuple of LayerBound
        Empty where no bound exists.
    max_load : float or None
        The bound holds for placements within this load cap.
    notes : tuple of str
        What a reader has to know, in words.
    """

    level: str
    tokens: int
    touched: float
    layers: tuple[LayerBound, ...]
    max_load: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def bound(self) -> float | None:
        """No placement without copies touches fewer units per token and layer; None where there is no bound."""
        return float(np.mean([layer.bound for layer in self.layers])) if self.layers else None

    @property
    def gap(self) -> float | None:
        """(touched - bound) / touched."""
        return None if self.bound is None else gap(self.touched, self.bound)

    @property
    def proved_layers(self) -> list[int]:
        """Layers in which the placement is proved optimal."""
        return [layer.layer for layer in self.layers if layer.proved]

    @property
    def method(self) -> str | None:
        """What proves the bound; several methods with commas between them."""
        return ", ".join(dict.fromkeys(layer.method for layer in self.layers)) or None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document ``placer/bound/1``."""
        return {
            "schema": SCHEMA,
            "level": self.level,
            "tokens": self.tokens,
            "max_load": self.max_load,
            "touched": self.touched,
            "bound": self.bound,
            "gap": self.gap,
            "method": self.method,
            "best": float(np.mean([layer.best for layer in self.layers])) if self.layers else None,
            "proved_layers": self.proved_layers,
            "per_layer": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """A table of layers and a verdict."""
        from placer.table import aligned

        lines = []
        if self.layers:
            header = ("layer", "touched", "bound", "gap", "best met", "seconds", "proof")
            rows = [
                (
                    str(one.layer),
                    f"{one.touched:.4f}",
                    f"{one.bound:.4f}",
                    "optimal" if one.proved else f"{one.gap:.2%}" if one.allowed else "not allowed",
                    f"{one.best:.4f}",
                    f"{one.seconds:.1f}",
                    one.method,
                )
                for one in self.layers
            ]
            lines.append(aligned(header, rows, left=(0, 6)))
        lines.append(self.verdict())
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what a checker needs: an ``.npz`` whose arrays are named ``LAYER/WHAT``.

        WHAT is ``bound``, ``units``, ``size``, ``cap``, and what `placer.bounds` says of the method's certificate.
        """
        members: dict[str, npt.NDArray[Any]] = {}
        for one in self.layers:
            partition = one.partition
            known = {
                "bound": one.proof.bound,
                "units": partition.units,
                "size": partition.size,
                "cap": partition.cap,
                "method": one.method,
                **one.proof.certificate,
            }
            members |= {f"{one.layer}/{key}": np.asarray(value) for key, value in known.items()}
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **members))

    def verdict(self) -> str:
        """One sentence."""
        said = f"touched.{self.level} {self.touched:.4f}"
        if self.bound is None or self.gap is None:
            return f"{said}; {WITH_COPIES}"
        proved = len(self.proved_layers)
        if proved == len(self.layers):
            return f"{said}, proved optimal in all {proved} layers"
        also = f"; {proved} of {len(self.layers)} layers proved optimal" if proved else ""
        return f"{said}, proven >= {self.bound:.4f}, gap {self.gap:.2%}{also}"


def certify(
    placement: Placement,
    problem: Problem,
    *,
    level: str = "server",
    whole_groups: bool = False,
    clock: Clock | None = None,
    jobs: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> Certificate:
    """A lower bound on the touched units of every placement without copies, beside those of a given one.

    Layers are independent, so their bounds add up. A short search first looks for a better placement, as a proof closes
    in from both sides.

    Parameters
    ----------
    placement : Placement
        Any placement of the problem's experts on its machine, made here or elsewhere.
    problem : Problem
        Its load cap, without a margin, is the one that the bound is for.
    level : str
        ``gpu``, ``server`` or ``rack``.
    whole_groups : bool
        Bound only placements that keep gate groups whole, as a permuted checkpoint must.
    clock : Clock, optional
        Time for all layers, and the gap that is good enough; a bound that is cut short is still valid.
    jobs : int
        Threads.
    on_progress : callable, optional
        Called with better bounds.

    Raises
    ------
    InvalidInput
        When the placement is not one of this problem, or only counts are known.

    Examples
    --------
    >>> from placer import Placement, Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]], [[0, 2]]]), num_experts=4)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), max_load=None)
    >>> linear = Placement(physical_to_logical=np.array([[0, 1, 2, 3]]), num_experts=4, shape=(1, 2, 1))
    >>> certificate = certify(linear, problem)
    >>> certificate.touched, certificate.bound, certificate.gap
    (2.0, 1.0, 0.5)
    """
    import joblib

    _check(placement, problem)
    clock = clock or Clock.start()
    number, begun = problem.num_layers, time.monotonic()
    at_once = min(jobs, number)
    at = problem.topology.index(level)
    if placement.has_copies:
        touched = [_touched(problem.layer(index), placement, index, at) for index in range(number)]
        return Certificate(
            level=level,
            tokens=problem.num_tokens,
            touched=float(np.mean(touched)),
            layers=(),
            max_load=problem.max_load,
            notes=(WITH_COPIES,),
        )
    lock, done = threading.Lock(), [0]

    def one(index: int, share: Clock) -> LayerBound:
        started = time.monotonic()
        layer = problem.layer(index)
        slots = placement.physical_to_logical[index]
        size = layer.unit_slots[at]
        given = _unit_of_expert(layer, slots, at)
        touched = Partition.of_layer(layer, size).cost(given) / problem.num_tokens

        def tell(bound: int, best: int, finished: bool = False) -> None:
            with lock:
                done[0] += finished
                if on_progress is not None:
                    on_progress(
                        Progress(
                            seconds=time.monotonic() - begun,
                            layer=problem.layer_ids[index],
                            level=level,
                            touched=touched,
                            best=min(touched, best / problem.num_tokens),
                            bound=bound / problem.num_tokens,
                            done=done[0],
                            layers=number,
                            finished=finished,
                        )
                    )

        cap = float(caps.caps(layer, problem.max_load)[at])
        partition = Partition.of_layer(layer, size, cap=cap, whole_groups=whole_groups)
        start = _start(layer, slots, at, whole_groups, share)
        proof = prove(partition, start, clock=share, workers=max(1, jobs // number), tell=tell)
        best = partition.cost(proof.unit_of_item) / problem.num_tokens
        best = best if partition.allows(proof.unit_of_item) else touched
        tell(proof.bound, round(best * problem.num_tokens), finished=True)
        return LayerBound(
            layer=problem.layer_ids[index],
            touched=touched,
            best=best,
            bound=proof.bound / problem.num_tokens,
            method=proof.method,
            allowed=_allowed(partition, given),
            seconds=time.monotonic() - started,
            partition=partition,
            proof=proof,
        )

    run = joblib.Parallel(n_jobs=at_once, prefer="threads", pre_dispatch=at_once, batch_size=1)
    layers = run(
        joblib.delayed(one)(index, share) for index, share in enumerate(clock.shares(number, at_once))
    )
    return Certificate(
        level=level,
        tokens=problem.num_tokens,
        touched=float(np.mean([one.touched for one in layers])),
        layers=tuple(layers),
        max_load=problem.max_load,
        notes=tuple(_notes(problem, tuple(layers), whole_groups)),
    )


def bounded_cost(
    layer: Layer, slots: npt.NDArray[np.int32], clock: Clock, workers: int = 1
) -> tuple[float, str]:
    """A lower bound on a layer's cost at all levels within its caps, seconds of all tokens, and what proves it.

    Every level is bounded by itself and the bounds are added up, which is loose where levels want different things.
    """
    total, methods = 0.0, []
    levels = layer.levels
    for at, share in zip(levels, clock.shares(len(levels), 1), strict=True):
        partition = Partition.of_layer(layer, layer.unit_slots[at], cap=float(layer.caps[at]))
        known = _unit_of_expert(layer, slots, at)
        proof = prove(partition, known, clock=share, workers=workers)
        weight = float(layer.weights_of_levels[levels.index(at)])
        total += weight * min(proof.bound, partition.cost(known))
        methods.append(proof.method)
    return layer.cost_of(total), ", ".join(dict.fromkeys(methods))


def _check(placement: Placement, problem: Problem) -> None:
    found = (placement.num_layers, placement.num_experts, placement.num_slots, placement.shape)
    expected = (problem.num_layers, problem.num_experts, problem.num_slots, problem.topology.shape)
    if found != expected:
        raise InvalidInput(
            f"placement: found (layers, experts, slots, shape) {found}, the problem has {expected}"
        )
    if problem.routes is None:
        raise InvalidInput("bound: found counts only, expected the experts of every token")


def _touched(layer: Layer, placement: Placement, index: int, level: int) -> float:
    table = None if placement.table is None else placement.table[index]
    counts = layer.counts(placement.physical_to_logical[index], table)
    return float(counts.touched[level].sum()) / len(layer.tokens)


def _unit_of_expert(layer: Layer, slots: npt.NDArray[np.int32], level: int) -> Ints:
    position = layer.positions(layer.occupant(slots))[: layer.num_experts]
    return (position // layer.unit_slots[level]).astype(np.int64)


def _allowed(partition: Partition, unit_of_expert: Ints) -> bool:
    """Whether a placement is one of those that are bounded: its items, experts or gate groups, are whole."""
    units = unit_of_expert.reshape(partition.num_items, -1)
    return bool((units == units[:, :1]).all()) and partition.allows(units[:, 0])


def _start(layer: Layer, slots: npt.NDArray[np.int32], level: int, whole_groups: bool, clock: Clock) -> Ints:
    """The best partition of one level that a short search finds, from the placement's own on."""
    from placer.solvers import tabu

    if whole_groups:
        return np.arange(layer.num_groups) // (
            layer.unit_slots[level] * layer.num_groups // layer.num_experts
        )
    size = layer.unit_slots[level]
    if layer.num_slots == size or size == 1 or not layer.load.any():
        return _unit_of_expert(layer, slots, level)
    seconds = [0.0] * len(layer.seconds)
    seconds[level] = 1.0
    alone = replace(layer, seconds=tuple(seconds))
    start = tabu.fallback(alone, slots)
    seconds_left = SEARCH_SHARE * min(clock.remaining, 1e6)
    limited = replace(clock, deadline=time.monotonic() + seconds_left, rounds=SEARCH_ROUNDS)
    if not clock.expired:
        start, _ = tabu.search(alone, start, rng=np.random.default_rng([0, layer.index]), clock=limited)
    return _unit_of_expert(layer, layer.slots(start), level)


def _notes(problem: Problem, layers: tuple[LayerBound, ...], whole_groups: bool) -> list[str]:
    notes = [f"the bound covers the {problem.num_tokens:,} tokens given, and placements without copies"]
    if whole_groups:
        notes.append("only placements that keep gate groups whole are bounded")
    if problem.max_load is not None:
        notes.append(f"only placements within --max-load {problem.max_load:g} are bounded")
        raised = [cap for layer in layers if (cap := layer.cap) is not None and cap > problem.max_load + 1e-9]
        if problem.topology.speeds:
            notes.append(
                "GPUs differ in speed, and the cap of the fastest stands for all: the bound holds, if less tight"
            )
        elif raised:
            notes.append(
                f"the cap is raised in {len(raised)} of {len(layers)} layers, to at most {max(raised):.3f}: "
                "even packing by load alone needs it"
            )
    outside = sum(not layer.allowed for layer in layers)
    if outside:
        notes.append(f"the placement given is not one of these in {outside} layers; there it may touch fewer")
    better = [layer for layer in layers if layer.best < layer.touched]
    if better:
        saved = 1 - sum(layer.best for layer in better) / sum(layer.touched for layer in better)
        notes.append(
            f"placements that touch fewer were met in {len(better)} of {len(layers)} layers: {saved:.2%} less there"
        )
    return notes
