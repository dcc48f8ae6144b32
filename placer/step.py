"""Step: counts of a trace's layers become bytes, seconds and the busiest links of one engine step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.alltoall import SCHEMES, Scheme
from placer.background import Background
from placer.census import Census
from placer.flows import Floats, Flows
from placer.links import Links, links
from placer.model import Model
from placer.speeds import in_time
from placer.timing import Phase, compute_seconds, overlaps, phase, seconds_of
from placer.topology import REPORTED, Topology

TOP_LINKS = 8  # that a report names


@dataclass(frozen=True, kw_only=True)
class Step:
    """The conditions under which the layers of one engine step are priced.

    Parameters
    ----------
    topology, model, scheme
    scale : float
        Tokens of one step over those counted.
    expert_dtype : str, optional
        Storage of expert weights; by default the model's own.
    passes : int
        1 for the forward pass alone, 2 with the backward pass.
    capacity_factor, padded, background
        As for `placer.evaluate`.
    """

    topology: Topology
    model: Model
    scheme: Scheme
    scale: float
    expert_dtype: str | None = None
    passes: int = 1
    capacity_factor: float | None = None
    padded: bool = False
    background: Background | None = None

    def price(
        self, counted: list[Census], held: list[Floats], tokens: float, layer_ids: tuple[int, ...]
    ) -> dict[str, Any]:
        """Everything of a `Report` that follows from counts.

        Parameters
        ----------
        counted : list of Census
            One a layer.
        held : list of (num_ranks, num_experts) float64
            Share of each expert's tokens that each rank serves.
        tokens : float
            Tokens that were counted.
        """
        topology, size = (
            self.topology,
            (self.scheme.dispatch_bytes(self.model), self.scheme.combine_bytes(self.model)),
        )
        levels = [topology.index(name) for name in REPORTED]
        units = [topology.num_units[level] for level in levels]
        count = len(counted)
        per_token = np.zeros((4, count, len(REPORTED)))  # touched, remote, bytes, load max/mean
        times = np.zeros((5, count))  # dispatch, combine, their latency, compute, compute of half a batch
        dropped = np.zeros(count)
        busy: dict[tuple[str, int], _Busy] = {}
        every = {name: np.zeros(len(REPORTED)) for name in SCHEMES}
        for index, (layer, shares) in enumerate(zip(counted, held, strict=True)):
            ways = self._exchange(self.scheme, layer)
            sent = self._volume(self.scheme, layer, levels)
            for column, (level, number) in enumerate(zip(levels, units, strict=True)):
                load = layer.load[level, :number]
                slowest = in_time(load, topology.speeds, topology.unit_sizes[level]).max()
                per_token[:, index, column] = (
                    layer.touched[level].sum() / tokens,
                    layer.remote[level].sum() / tokens,
                    sent[column] / tokens,
                    slowest / load.mean() if load.any() else 1.0,
                )
            for name, other in SCHEMES.items():
                if name != "follow" or layer.followed is not None:
                    every[name] += self._volume(other, layer, levels) / tokens
            moved = [way * self.scale for way in ways]
            for place, (way, each) in enumerate(zip(moved, size, strict=True)):
                priced = self._phase(way, each)
                times[place, index] = priced.seconds * self.passes
                times[2, index] += priced.latency * self.passes
                self._keep_busy(busy, way, each, "dispatch" if place == 0 else "combine")
            times[3, index], dropped[index] = self._compute(layer.experts * self.scale, shares)
            times[4, index], _ = self._compute(layer.experts * (self.scale / 2), shares)
        touched, remote, volume, heat = per_token
        hidden = overlaps(times[0] + times[1], times[2], times[3], times[4])
        compute = float(times[3].sum())
        return {
            "touched": _named(touched.mean(axis=0)),
            "remote": _named(remote.mean(axis=0)),
            "bytes_per_token": _named(volume.sum(axis=0)),
            "bytes_by_scheme": {name: _named(total) for name, total in every.items() if total.any()},
            "load": {
                name: {"max_over_mean": float(heat[:, i].mean()), "worst_layer": float(heat[:, i].max())}
                for i, name in enumerate(REPORTED)
            },
            "seconds": {
                "dispatch": float(times[0].sum()),
                "combine": float(times[1].sum()),
                "compute": compute,
                "step": float(times[[0, 1, 3]].sum()),
            },
            "overlap": {
                name: {"total": each.total, "exposed": each.exposed} for name, each in hidden.items()
            },
            "latency": float(times[2].sum()),
            "bottleneck": self._bottleneck(busy, compute),
            "links": self._top(busy),
            "dropped": float(dropped.mean()),
            "per_layer": {
                "layer_ids": list(layer_ids),
                "touched": {name: touched[:, i].tolist() for i, name in enumerate(REPORTED)},
                "remote": {name: remote[:, i].tolist() for i, name in enumerate(REPORTED)},
                "load": {name: heat[:, i].tolist() for i, name in enumerate(REPORTED)},
                "seconds": {
                    name: times[i].tolist() for name, i in (("dispatch", 0), ("combine", 1), ("compute", 3))
                },
            },
        }

    def _exchange(self, scheme: Scheme, layer: Census) -> tuple[Flows, Flows]:
        there, back = scheme.exchange(layer, self.topology)
        return (there.padded(self.topology), back.padded(self.topology)) if self.padded else (there, back)

    def _volume(self, scheme: Scheme, layer: Census, levels: list[int]) -> Floats:
        """Bytes that leave units of the levels under a scheme, dispatch and combine together."""
        there, back = self._exchange(scheme, layer)
        size = scheme.dispatch_bytes(self.model), scheme.combine_bytes(self.model)
        once: Floats = there.out[levels].sum(axis=1) * size[0] + back.out[levels].sum(axis=1) * size[1]
        return once * self.passes

    def _phase(self, way: Flows, size: float) -> Phase:
        return phase(
            way,
            size,
            self.topology,
            latency=self.scheme.latency,
            scale_up=self.scheme.scale_up,
            nic=self.scheme.nic,
            background=self.background,
        )

    def _compute(self, experts: Floats, shares: Floats) -> tuple[float, float]:
        """Seconds of a layer's experts, and the share of choices that capacity drops."""
        kept = experts
        if self.capacity_factor is not None:
            kept = np.minimum(experts, self.capacity_factor * experts.sum() / len(experts))
        activated = (shares > 0) * -np.expm1(-kept * shares)  # chance that a step brings an expert any token
        seconds = compute_seconds(
            shares @ kept, activated.sum(axis=1), self.topology, self.model, self.expert_dtype
        )
        lost = 1.0 - kept.sum() / experts.sum() if experts.any() else 0.0
        return seconds * (3 if self.passes == 2 else 1), float(lost)

    def _keep_busy(self, busy: dict[tuple[str, int], _Busy], way: Flows, size: float, what: str) -> None:
        """Add a phase's seconds and bytes to those of the links."""
        for order, kind in enumerate(links(way, self.topology)):
            total = busy.setdefault((what, order), _Busy(kind))
            rates = self.scheme.scale_up, self.scheme.nic
            seconds = seconds_of(kind, size, self.topology, *rates, self.background)
            total.seconds += seconds * self.passes
            total.volume += kind.vectors * size * self.passes

    def _bottleneck(self, busy: dict[tuple[str, int], _Busy], compute: float) -> str:
        """The level whose busiest links take longest, dispatch and combine together, or compute."""
        worst: dict[tuple[int, str], float] = {}
        for (what, _), total in busy.items():
            key = total.kind.level, what
            worst[key] = max(worst.get(key, 0.0), float(total.seconds.max(initial=0.0)))
        levels = range(len(self.topology.levels))
        summed = [sum(seconds for (level, _), seconds in worst.items() if level == each) for each in levels]
        if compute >= max(summed):
            return "compute" if compute > 0 else "none"
        return f"{self.topology.levels[summed.index(max(summed))].name} links"

    def _top(self, busy: dict[tuple[str, int], _Busy]) -> list[dict[str, Any]]:
        """The links that are busy longest in one step, the busiest first."""
        rows: list[dict[str, Any]] = [
            {
                "link": total.kind.name(index),
                "level": self.topology.levels[total.kind.level].name,
                "phase": what,
                "bytes": float(total.volume[index]),
                "seconds": float(total.seconds[index]),
            }
            for (what, _), total in busy.items()
            for index in np.argsort(-total.seconds, kind="stable")[:TOP_LINKS].tolist()
            if total.seconds[index] > 0
        ]
        rows.sort(key=lambda row: -float(row["seconds"]))
        return rows[:TOP_LINKS]


class _Busy:
    """Seconds and bytes of the links of one kind, summed over layers."""

    def __init__(self, kind: Links) -> None:
        self.kind = kind
        self.seconds: Floats = np.zeros(len(kind.vectors))
        self.volume: Floats = np.zeros(len(kind.vectors))


def _named(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(REPORTED, values, strict=True)}
