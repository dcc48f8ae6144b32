"""Seconds of one step: the busiest link of each phase, the straggler's compute, and what hides behind what.

A phase (dispatch or combine of one layer) takes the largest latency of the levels it uses plus the largest
over link directions of bytes / effective bandwidth. Real transports take 0 to 27 % longer than that bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.background import LEVELS, Background, growth
from placer.flows import Floats, Flows
from placer.links import Links, links
from placer.model import Model
from placer.topology import Topology

#: Share of the peak rate that grouped expert GEMMs reach in BF16 with many tokens an expert; 0.6 to 0.7 is typical.
GEMM_EFFICIENCY = 0.65

#: Streaming multiprocessors of an H100 or H800, and those of them that communicate while DualPipe overlaps
#: (DeepSeek-V3, arXiv 2412.19437, section 3.2).
MULTIPROCESSORS, COMMUNICATING = 132, 20


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds of one dispatch or combine, and what takes them.

    Parameters
    ----------
    seconds : float
    latency : float
        The part of them that does not shrink with the bytes.
    """

    seconds: float
    latency: float


def phase(
    flows: Flows,
    vector_bytes: float,
    topology: Topology,
    *,
    latency: float = 0.0,
    scale_up: float = 1.0,
    nic: float = 1.0,
    background: Background | None = None,
) -> Phase:
    """Price one phase.

    Parameters
    ----------
    flows : Flows
        Vectors of one step.
    vector_bytes : float
        Bytes of one vector.
    topology : Topology
    latency : float
        Seconds of the kernel beyond wire latency and bytes; counts when anything moves.
    scale_up, nic : float
        Share of the effective bandwidth that the kernels reach inside a server, and outside.
    background : Background, optional
        Other traffic on the same links during this phase.
    """
    slowest, alpha = 0.0, 0.0
    for kind in links(flows, topology):
        if kind.vectors.any():
            alpha = max(alpha, topology.levels[kind.level].latency + latency)
            slowest = max(
                slowest, float(seconds_of(kind, vector_bytes, topology, scale_up, nic, background).max())
            )
    return Phase(seconds=alpha + slowest, latency=alpha)


def phase_seconds(flows: Flows, vector_bytes: float, topology: Topology, *, latency: float = 0.0) -> float:
    """Seconds of one phase, see `phase`.

    Examples
    --------
    >>> from placer.flows import from_matrix
    >>> topology = Topology.load("dgx-h100").with_shape("1x2x1")
    >>> round(phase_seconds(from_matrix(np.full((2, 2), 44e9), topology), 1.0, topology), 6)
    1.000003
    """
    return phase(flows, vector_bytes, topology, latency=latency).seconds


def seconds_of(
    kind: Links,
    vector_bytes: float,
    topology: Topology,
    scale_up: float = 1.0,
    nic: float = 1.0,
    background: Background | None = None,
) -> Floats:
    """Seconds that each link of a kind is busy, (num_links,)."""
    level = topology.levels[kind.level]
    outside = kind.level >= topology.index("server")
    rate = kind.rate * (nic if outside else scale_up)
    seconds: Floats = kind.vectors * vector_bytes / rate
    if background is None:
        return seconds
    named = getattr(background, level.name) if level.name in LEVELS else 0.0
    other = named * kind.gpus / rate
    if background.queueing and other > 0.0:
        window = seconds + other if background.window is None else background.window
        seconds = seconds * np.vectorize(growth)(other / window)
    return np.where(kind.vectors > 0, seconds + other, 0.0)


def compute_seconds(
    load: npt.NDArray[np.floating],
    activated: npt.NDArray[np.floating],
    topology: Topology,
    model: Model,
    expert_dtype: str | None = None,
) -> float:
    """Seconds of the slowest GPU's experts: a roofline of grouped GEMMs and of reading weights.

    An expert's GEMMs over n tokens reach ``n / (n + n_half)`` of their best rate. n_half tokens take as long as
    reading the expert's weights: ``6 h f n`` operations on ``3 h f`` weights, hence FLOP/s over bytes/s times half
    the bytes of a weight, 295 tokens on an H100 in BF16. So a rank takes as long as for ``n_half`` more tokens for
    each expert it activates; with few tokens an expert, what counts is how many experts are activated.

    Parameters
    ----------
    load : (num_ranks,) float64
        Expert choices served by each GPU in one step; a GPU of half the speed takes twice as long for them, and as
        long as others for reading weights.
    activated : (num_ranks,) float64
        Experts of each GPU that serve at least one of them.
    expert_dtype : str, optional
        Storage of the weights; the model's own by default. Arithmetic is in BF16.
    """
    flops, size = model.flops_per_token_expert, model.expert_bytes(expert_dtype)
    if flops is None or size is None:
        return 0.0
    reading = size / topology.hbm_bandwidth
    if topology.gpu_speeds:
        load = load / np.resize(topology.gpu_speeds, len(load))
    half = reading * topology.flops_bf16 / flops
    busiest = float((load + half * activated).max(initial=0.0))
    return busiest * flops / (topology.flops_bf16 * GEMM_EFFICIENCY)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """One way to hide communication: seconds of the step, and of them those in which only links work."""

    total: float
    exposed: float


def overlaps(communication: Floats, latency: Floats, compute: Floats, halves: Floats) -> dict[str, Overlap]:
    """Three schedules side by side, from seconds of each layer.

    ``none``: everything in turn. ``two_batch``: two halves of the batch, one computes while the other communicates;
    a half keeps the latency, and its GEMMs are less efficient. ``dualpipe``: a forward and a backward chunk side by
    side, communication runs on 20 of 132 multiprocessors and hides behind the rest.

    Parameters
    ----------
    communication, latency : (num_layers,) float64
        Seconds of dispatch and combine, and the part of them that does not shrink with the batch.
    compute, halves : (num_layers,) float64
        Seconds of compute of the whole batch, and of half of it.

    Examples
    --------
    >>> found = overlaps(*(np.array([x]) for x in (4.0, 0.0, 4.0, 2.0)))
    >>> {name: (round(o.total, 2), round(o.exposed, 2)) for name, o in found.items()}
    {'none': (8.0, 4.0), 'two_batch': (6.0, 2.0), 'dualpipe': (4.71, 0.0)}
    """
    half = latency + (communication - latency) / 2
    busy = 2 * np.maximum(half, halves)
    fill = float(np.minimum(half, halves).max(initial=0.0))
    two = float(busy.sum()) + fill
    slowed = compute / (1.0 - COMMUNICATING / MULTIPROCESSORS)
    dual = float(np.maximum(communication, slowed).sum())
    alone, computing = float(communication.sum()), float(compute.sum())
    return {
        "none": Overlap(total=alone + computing, exposed=alone),
        "two_batch": Overlap(total=two, exposed=max(0.0, two - 2 * float(halves.sum()))),
        "dualpipe": Overlap(total=dual, exposed=dual - float(slowed.sum())),
    }
