"""All-to-all schemes: how many vectors each scheme moves over which links.

One function per scheme; each takes the `Incidence` of a layer and returns the vectors that enter every unit
over the links of its level, (num_levels, num_ranks), for dispatch. Combine moves the same vectors back.
With uniform homes every unit sends its equal share, so the busiest receiver is the busiest link.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.files import nearest
from placer.incidence import Incidence
from placer.topology import Topology

Floats = npt.NDArray[np.float64]


def naive(counts: Incidence, topology: Topology) -> Floats:
    """One vector per token and expert, straight to the GPU that serves it (fabric: no deduplication).

    The scale-up link carries what stays inside the server; everything else enters over the GPU's own NIC.
    Under uniform homes and without copies its sum over servers is the same for every placement.
    """
    entering = counts.remote_load.copy()
    gpu = topology.index("gpu")
    entering[gpu] = counts.remote_load[gpu] - counts.foreign_load
    return entering


def hierarchical(counts: Incidence, topology: Topology) -> Floats:
    """One vector per remote unit at every level: once per rack, once per server in it, then the scale-up link.

    A vector crosses the uplink once for each remote rack and a NIC once for each remote server (DeepEP normal
    mode between servers; HierMoE, arXiv 2508.09591, at several levels). Inside the server one copy goes to
    every touched GPU, from whichever GPU received or holds the vector.
    """
    entering = counts.remote.copy()
    gpu = topology.index("gpu")
    entering[gpu] = counts.touched[gpu]
    return entering


SCHEMES: dict[str, Callable[[Incidence, Topology], Floats]] = {"hierarchical": hierarchical, "naive": naive}


def scheme(name: str) -> Callable[[Incidence, Topology], Floats]:
    """The scheme of a name.

    Raises
    ------
    InvalidInput
        When there is none.

    Examples
    --------
    >>> scheme("naive").__name__
    'naive'
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise InvalidInput(f"unknown all-to-all {name!r}; {nearest(name, SCHEMES)}") from None
