"""All-to-all schemes: which vectors cross which links, and in which format.

One function a scheme: it takes the `Census` of a layer and returns the `Flows` of its dispatch and of its combine.
`SCHEMES` adds what the scheme's kernels are known for: formats of their own, metadata, latency, efficiency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from placer.census import Census
from placer.errors import InvalidInput
from placer.files import nearest
from placer.flows import Flows, gathered
from placer.model import ELEMENT_BYTES, Model
from placer.topology import Topology

Exchange = tuple[Flows, Flows]


def naive(layer: Census, topology: Topology) -> Exchange:
    """One vector for each token and expert, straight to the GPU that serves it.

    Under uniform homes and without copies its sum over servers is the same for every placement.
    """
    return layer.by_choice, layer.by_choice.reversed()


def gpu_dedup(layer: Census, topology: Topology) -> Exchange:
    """One vector for each GPU that a token touches, straight to it."""
    return layer.by_rank, layer.by_rank.reversed()


def hierarchical(layer: Census, topology: Topology) -> Exchange:
    """One vector for each remote unit at every level, then the scale-up link to every touched GPU.

    A vector crosses the uplink once for each remote rack and a NIC once for each remote server, at the home's own
    rail (DeepEP normal mode between servers; HierMoE, arXiv 2508.09591, at several levels). Inside the server one
    copy goes to every touched GPU, from whichever GPU received or holds the vector. The combine reduces inside the
    server first, so it moves the same vectors back.
    """
    return layer.by_unit, layer.by_unit.reversed()


def allgather(layer: Census, topology: Topology) -> Exchange:
    """Every token to every GPU, once to each server; the combine is a reduce-scatter.

    What vLLM's and Megatron's ``allgather`` dispatchers do; no placement changes its bytes.
    """
    there = gathered(layer.tokens, topology)
    return there, there.reversed()


def low_latency(layer: Census, topology: Topology) -> Exchange:
    """The vectors of `naive`: DeepEP's decode kernels send one message for each token and expert."""
    return naive(layer, topology)


def follow(layer: Census, topology: Topology) -> Exchange:
    """The token stays where its heaviest expert is and starts from there in the next layer.

    ExFlow's context-coherent mode (arXiv 2401.08383), here for any number of experts: dispatch to those that are
    elsewhere, combine at the heaviest. Every GPU must hold the context, and affinity between layers counts.
    """
    if layer.followed is None:
        raise InvalidInput(
            "all-to-all follow: found a census without the ways of tokens, expected them counted"
        )
    return layer.followed


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A scheme and its kernels.

    Parameters
    ----------
    name : str
    exchange : callable
        `Census`, `Topology` -> flows of dispatch and combine.
    dispatch_dtype, combine_dtype : str, optional
        Formats that the kernels impose; the model's own otherwise.
    metadata : float
        Bytes beside each dispatched vector.
    latency : float
        Seconds that each kernel takes beyond wire latency and bytes.
    scale_up, nic : float
        Share of the topology's effective bandwidth that these kernels reach inside a server and over NICs.
    """

    name: str
    exchange: Callable[[Census, Topology], Exchange]
    dispatch_dtype: str | None = None
    combine_dtype: str | None = None
    metadata: float = 0.0
    latency: float = 0.0
    scale_up: float = 1.0
    nic: float = 1.0

    @property
    def description(self) -> str:
        """First line of the function's docstring."""
        return (self.exchange.__doc__ or "").strip().splitlines()[0]

    def dispatch_bytes(self, model: Model) -> float:
        """Bytes of one dispatched vector with its metadata."""
        size = model.hidden_size * ELEMENT_BYTES[self.dispatch_dtype or model.dispatch_dtype]
        return size + self.metadata

    def combine_bytes(self, model: Model) -> float:
        """Bytes of one combined vector."""
        return model.hidden_size * ELEMENT_BYTES[self.combine_dtype or model.combine_dtype]


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="hierarchical", exchange=hierarchical),
        Scheme(name="naive", exchange=naive),
        Scheme(name="gpu_dedup", exchange=gpu_dedup),
        Scheme(name="allgather", exchange=allgather),
        # FP8 with a scale for 128 channels and 16 bytes of header there, BF16 back: DeepEP docs/legacy.md, whose
        # twelve latencies follow within 8 % from 24 us a kernel, 42 of the 44 GB/s that bulk transfers reach on a
        # NIC, and 135 of 150 GB/s on H800's NVLink.
        Scheme(
            name="low_latency",
            exchange=low_latency,
            dispatch_dtype="fp8",
            combine_dtype="bf16",
            metadata=16.0,
            latency=24e-6,
            scale_up=135.0 / 150.0,
            nic=42.0 / 44.0,
        ),
        Scheme(name="follow", exchange=follow),
    )
}


def scheme(name: str) -> Scheme:
    """The scheme of a name.

    Raises
    ------
    InvalidInput
        When there is none.

    Examples
    --------
    >>> scheme("naive").description
    'One vector for each token and expert, straight to the GPU that serves it.'
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise InvalidInput(f"unknown all-to-all {name!r}; {nearest(name, SCHEMES)}") from None
