"""Flows: how many vectors cross every link direction of the machine in one phase of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.topology import Topology

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Flows:
    """Vectors over every link direction, for ranks in topology order.

    A *rail* is a rank's place within its server; every rank has a port of its own at every level, and the ports of
    one unit together are the unit's uplinks (see `placer.links`).

    Parameters
    ----------
    pairs : (num_ranks, gpus_per_server) float64
        From each rank to the g-th GPU of its own server. What a rank hands to itself (a copy that a hierarchical
        kernel makes) counts for its port and crosses no pair link.
    out, into : (num_levels, num_ranks) float64
        What leaves, and enters, the rank's unit of each level through the rank's port. At level ``gpu`` these are
        the sums of `pairs`.
    """

    pairs: Floats
    out: Floats
    into: Floats

    @classmethod
    def of_ports(cls, pairs: Floats, out: Floats, into: Floats) -> Flows:
        """Flows whose ``gpu`` ports follow from `pairs`."""
        width = pairs.shape[1]
        out[0] = pairs.sum(axis=1)
        into[0] = pairs.reshape(-1, width, width).sum(axis=1).ravel()
        return cls(pairs=pairs, out=out, into=into)

    def reversed(self) -> Flows:
        """The same vectors back: what a combine moves after its dispatch."""
        width = self.pairs.shape[1]
        back = self.pairs.reshape(-1, width, width).transpose(0, 2, 1).reshape(self.pairs.shape)
        return Flows(pairs=back, out=self.into, into=self.out)

    def padded(self, topology: Topology) -> Flows:
        """Every link as busy as the busiest of its kind: buffers padded to the hottest rank, there and back."""
        ports, width = np.empty_like(self.out), gpus(topology)
        for position, (level, size) in enumerate(zip(topology.levels, topology.unit_sizes, strict=True)):
            rails = width if level.rails else 1
            shared = size // rails if position > topology.index("server") else 1
            links = (way[position].reshape(-1, shared, rails).mean(axis=1) for way in (self.out, self.into))
            ports[position] = max(float(link.max()) for link in links)
        return Flows(pairs=np.full_like(self.pairs, self.pairs.max(initial=0.0)), out=ports, into=ports)

    def __add__(self, other: Flows) -> Flows:
        return Flows(pairs=self.pairs + other.pairs, out=self.out + other.out, into=self.into + other.into)

    def __mul__(self, factor: float) -> Flows:
        return Flows(pairs=self.pairs * factor, out=self.out * factor, into=self.into * factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """What uniform homes and single copies leave to know of one layer.

    Parameters
    ----------
    tokens : float
        Tokens in all.
    touched : (num_levels, num_ranks) float64
        Tokens that touch each unit; 0 beyond a level's last unit.
    load : (num_ranks,) float64
        Expert choices served by each rank.
    """

    tokens: float
    touched: Floats
    load: Floats


def none(topology: Topology) -> Flows:
    """No vectors at all."""
    ranks, levels = topology.num_ranks, len(topology.levels)
    ports = np.zeros((levels, ranks))
    return Flows(pairs=np.zeros((ranks, gpus(topology))), out=ports, into=ports)


def gpus(topology: Topology) -> int:
    """GPUs of one server."""
    return topology.unit_sizes[topology.index("server")]


def straight(arriving: Floats, topology: Topology) -> Flows:
    """Vectors sent by every home in equal shares, straight to the ranks that receive ``arriving`` in all.

    Parameters
    ----------
    arriving : (num_ranks,) float64
        Vectors wanted by each rank, from all homes, its own included (which then cross nothing).
    """
    ranks, width = topology.num_ranks, gpus(topology)
    servers = arriving.reshape(-1, width)
    pairs = np.repeat(servers, width, axis=0) / ranks
    pairs[np.arange(ranks), np.arange(ranks) % width] = 0.0
    out, into = (np.zeros((len(topology.levels), ranks)) for _ in range(2))
    for level, size in enumerate(topology.unit_sizes):
        inside = np.repeat(arriving.reshape(-1, size).sum(axis=1), size)
        out[level] = (arriving.sum() - inside) / ranks
        into[level] = arriving * (1.0 - size / ranks)
    return Flows.of_ports(pairs, out, into)


def relayed(touched: Floats, topology: Topology) -> Flows:
    """Once to every remote unit at the home's own rail, from there to the GPUs that are touched.

    Parameters
    ----------
    touched : (num_levels, num_ranks) float64
        Tokens that touch each unit, with uniform homes.
    """
    ranks, width = topology.num_ranks, gpus(topology)
    pairs = np.repeat(touched[0].reshape(-1, width), width, axis=0) / width
    out, into = (np.zeros((len(topology.levels), ranks)) for _ in range(2))
    for level, size in enumerate(topology.unit_sizes):
        held = touched[level, : ranks // size]
        out[level] = (held.sum() - np.repeat(held, size)) / ranks
        ports = min(size, width)
        landing = into[level].reshape(-1, size)
        landing[:, :ports] = (held * (1.0 - size / ranks) / ports)[:, None]
    return Flows.of_ports(pairs, out, into)


def gathered(tokens: Floats, topology: Topology) -> Flows:
    """Every token to every GPU: once to each remote server at the home's rail, from there to all its GPUs.

    Parameters
    ----------
    tokens : (num_ranks,) float64
        Tokens at home on each rank.
    """
    ranks, width = topology.num_ranks, gpus(topology)
    rails = tokens.reshape(-1, width).sum(axis=0)
    pairs = np.tile(rails[:, None], (ranks // width, width))
    out, into = (np.zeros((len(topology.levels), ranks)) for _ in range(2))
    for level, size in enumerate(topology.unit_sizes):
        ports = min(size, width)
        out[level] = tokens * (ranks // size - 1)
        every = tokens.reshape(-1, ports).sum(axis=0)
        units = tokens.reshape(-1, size // ports, ports).sum(axis=1)
        into[level].reshape(-1, size)[:, :ports] = every - units
    return Flows.of_ports(pairs, out, into)


def from_matrix(vectors: Floats, topology: Topology) -> Flows:
    """Vectors straight from rank to rank: over the scale-up link inside a server, else over both ranks' ports.

    Parameters
    ----------
    vectors : (num_ranks, num_ranks) float64
        From row to column; the diagonal crosses nothing.

    Examples
    --------
    >>> topology = Topology.load("dgx-h100").with_shape("1x2x2")
    >>> flows = from_matrix(np.ones((4, 4)), topology)
    >>> flows.out.tolist()
    [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    """
    ranks, width = topology.num_ranks, gpus(topology)
    rank = np.arange(ranks)
    moved = np.where(np.eye(ranks, dtype=bool), 0.0, vectors)
    pairs = moved[rank[:, None], rank[:, None] // width * width + np.arange(width)]
    out, into = (np.zeros((len(topology.levels), ranks)) for _ in range(2))
    for level, size in enumerate(topology.unit_sizes):
        crossing = np.where(rank[:, None] // size != rank[None] // size, moved, 0.0)
        out[level], into[level] = crossing.sum(axis=1), crossing.sum(axis=0)
    return Flows.of_ports(pairs, out, into)
