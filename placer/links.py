"""Links: the flows of a phase as loads of single links, each with a rate and a name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from placer.flows import Floats, Flows, gpus
from placer.topology import Level, Topology


@dataclass(frozen=True, kw_only=True, eq=False)
class Links:
    """All links of one kind and direction.

    Parameters
    ----------
    level : int
        Position of the level whose units they join.
    vectors : (num_links,) float64
        What each carries.
    gpus : float
        GPUs that share one link, as far as other traffic and the rate are concerned: a NIC is 1, the uplinks of a
        server of eight are 8, a mesh's pair link is 1/7.
    rate : float
        Effective bytes per second of one link.
    name : callable
        Index -> words.
    """

    level: int
    vectors: Floats
    gpus: float
    rate: float
    name: Callable[[int], str]


def links(flows: Flows, topology: Topology) -> Iterator[Links]:
    """Every link of the machine with what it carries.

    Level ``gpu`` has a port in and out of every GPU, and on a mesh or torus its links; level ``server`` a NIC for
    every GPU; levels further out have the uplinks of each unit, or of each rail of it.

    Examples
    --------
    >>> from placer.flows import from_matrix
    >>> topology = Topology.load("mi300x").with_shape("1x1x3")
    >>> busiest = max(links(from_matrix(np.eye(3, k=2), topology), topology), key=lambda each: each.vectors.max())
    >>> [busiest.name(int(i)) for i in np.flatnonzero(busiest.vectors)]
    ['gpu 0 out']
    """
    width = gpus(topology)
    for position, (level, size) in enumerate(zip(topology.levels, topology.unit_sizes, strict=True)):
        rate = level.effective_bandwidth
        if position == 0 and width == 1:  # a server of one GPU has no link inside
            continue
        for way, ports in (("out", flows.out[position]), ("in", flows.into[position])):
            if position == 0:
                yield Links(level=position, vectors=ports, gpus=1, rate=rate, name=_namer("gpu {0}", 1, way))
            elif level.name == "server":
                name = _namer("server {0} NIC {1}", width, way)
                yield Links(level=position, vectors=ports, gpus=1, rate=rate, name=name)
            elif level.rails:
                shared = ports.reshape(-1, size // width, width).sum(axis=1).ravel()
                name = _namer(level.name + " {0} rail {1} uplinks", width, way)
                number = size // width
                yield Links(level=position, vectors=shared, gpus=number, rate=rate * number, name=name)
            else:
                shared = ports.reshape(-1, size).sum(axis=1)
                name = _namer(level.name + " {0} uplinks", 1, way)
                yield Links(level=position, vectors=shared, gpus=size, rate=rate * size, name=name)
        if level.link == "mesh":
            place = np.arange(width)
            pairs = flows.pairs.reshape(-1, width, width).copy()
            pairs[:, place, place] = 0.0
            name = _namer("gpu {0} to gpu {1} of its server", width, "")
            share = 1.0 / max(width - 1, 1)
            yield Links(
                level=position, vectors=pairs.ravel(), gpus=share, rate=level.pair_bandwidth, name=name
            )
        elif level.link == "torus":
            steps, names = _torus(level)
            carried = (flows.pairs.reshape(-1, width * width) @ steps).ravel()
            share = 1.0 / (2 * len(level.sides))
            yield Links(
                level=position,
                vectors=carried,
                gpus=share,
                rate=level.pair_bandwidth,
                name=_torus_namer(names, width),
            )


def _namer(pattern: str, parts: int, way: str) -> Callable[[int], str]:
    def name(index: int) -> str:
        return f"{pattern.format(*divmod(index, parts))} {way}".rstrip()

    return name


def _torus_namer(names: list[str], width: int) -> Callable[[int], str]:
    def name(index: int) -> str:
        server, link = divmod(index, len(names))
        return f"server {server} {names[link]}"

    return name


@lru_cache(maxsize=8)
def _torus(level: Level) -> tuple[Any, list[str]]:
    """Which neighbour links a vector from one GPU to another takes, (GPUs^2, links) sparse, and the links' names.

    Dimension by dimension in order, the shorter way round; at equal length half goes each way.
    """
    from scipy.sparse import csr_array

    sides = level.sides
    count, number = level.fanout, len(sides)
    places = list(itertools.product(*(range(side) for side in sides)))
    index = {place: i for i, place in enumerate(places)}
    rows: list[int] = []
    columns: list[int] = []
    shares: list[float] = []
    for source, target in itertools.product(range(count), repeat=2):
        here = list(places[source])
        for axis, side in enumerate(sides):
            ahead = (places[target][axis] - here[axis]) % side
            ways = [(1, ahead)] if 2 * ahead < side else [(-1, side - ahead)]
            if 2 * ahead == side:
                ways = [(1, ahead), (-1, ahead)]
            for turn, distance in ways if ahead else ():
                place = here.copy()
                for _ in range(distance):
                    rows.append(source * count + target)
                    columns.append((index[tuple(place)] * number + axis) * 2 + (turn < 0))
                    shares.append(1.0 / len(ways))
                    place[axis] = (place[axis] + turn) % side
            here[axis] = places[target][axis]
    names = [
        f"gpu {i} axis {axis} {sign}" for i in range(count) for axis in range(number) for sign in ("+", "-")
    ]
    shape = (count * count, count * number * 2)
    return csr_array((shares, (rows, columns)), shape=shape), names
