"""Packed: tables that are too large for a page as they are, in fewer bits."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.flows import Floats, gpus
from placer.html.measures import Measures, met
from placer.placement import Placement
from placer.topology import Topology
from placer.traffic import Traffic

LARGEST = 2_750_000  # characters of co-activation, orders of experts and load in one page
BRIGHTEST = 0.995  # quantile of the shares that is shown brightest
PER_MILLE = 1000


def text(array: npt.NDArray[Any]) -> str:
    """The array's bytes, little-endian, in base64."""
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def coactivation(
    traffic: Traffic, layer_ids: tuple[int, ...], placements: dict[str, Placement], topology: Topology
) -> tuple[dict[str, Any], float]:
    """Shares of tokens that use two experts, in 255 steps of one scale, and the order in which experts stand.

    Parameters
    ----------
    traffic : Traffic
    layer_ids : tuple of int
        The model's numbers of its layers.
    placements : dict of Placement
        ``baseline`` and ``report``.

    Returns
    -------
    document : dict
        ``layers`` (as many as there is room for, evenly spread), ``experts``, ``step`` (share of the tokens), ``pairs``
        (for each layer the triangle above the diagonal, row by row, one byte each), and for each placement ``order``
        (the expert of each slot that is not empty), ``edges`` (slots where a server begins) and, without copies,
        ``inside`` (share of the pairs of each layer of the trace that share a server).
    top : float
        The share that is shown brightest.
    """
    assert traffic.pairs is not None
    experts = traffic.load.shape[1]
    above = np.triu_indices(experts, 1)
    slots = sum(placement.num_slots for placement in placements.values())
    each = 4 * (len(above[0]) // 3 + 1) + len(str(-experts)) * slots  # of one layer: its pairs, its orders
    loads = 4 * len(layer_ids) * topology.num_ranks * len(placements)  # at most, see `load`
    room = max(1, (LARGEST - loads) // each)
    count = min(room, len(layer_ids))
    shown = np.unique(np.linspace(0, len(layer_ids) - 1, count).round().astype(int))
    shares = np.stack([traffic.pairs[layer][above] for layer in shown]) / max(1, traffic.num_tokens)
    used = shares[shares > 0]
    top = float(np.quantile(used, BRIGHTEST)) if used.size else 1.0
    codes = np.minimum(np.rint(shares * (255 / top)), 255).astype(np.uint8)
    server = gpus(topology)
    document: dict[str, Any] = {
        "layers": [layer_ids[layer] for layer in shown],
        "experts": experts,
        "step": top / 255,
        "pairs": [text(row) for row in codes],
        "order": {},
        "edges": {},
    }
    for name, placement in placements.items():
        rows = placement.physical_to_logical[shown]
        per_server = (rows >= 0).reshape(len(rows), -1, placement.slots_per_rank * server).sum(axis=2)
        document["order"][name] = [row[row >= 0].tolist() for row in rows]
        document["edges"][name] = np.cumsum(per_server, axis=1)[:, :-1].tolist()
    if not any(placement.has_copies for placement in placements.values()):
        inside = {name: met(placement, traffic.pairs, topology) for name, placement in placements.items()}
        weight = traffic.pairs.sum(axis=(1, 2))
        document["inside"] = {
            name: {
                "all_layers": float(np.average(found, weights=weight)) if weight.any() else 1.0,
                "per_layer": found.tolist(),
            }
            for name, found in inside.items()
        }
    return document, top


def load(measures: dict[str, Measures], topology: Topology) -> dict[str, Any]:
    """Load of every GPU in every layer over the mean, per mille, two bytes each."""
    first = next(iter(measures.values()))
    layers, ranks = first.load.shape
    return {
        "layers": layers,
        "ranks": ranks,
        "server": gpus(topology),
        **{name: text(_per_mille(each.load)) for name, each in measures.items()},
    }


def _per_mille(values: Floats) -> npt.NDArray[np.uint16]:
    return np.minimum(np.rint(values * PER_MILLE), 65_535).astype(np.uint16)
