"""Mt-KaHyPar, a hypergraph partitioner: minimises the exact number of touched units, weighted over the levels.

Idea: experts are vertices, the expert set of a token is a net. The connectivity metric "km1" of a partition is
the number of units that tokens touch beyond their first. Top-down over racks, servers, GPUs; with few units it
also maps onto the whole hierarchy at once (Steiner trees), and the cheaper of the two stays. Distances between
units add up what their levels cost, so a tree through a token's units costs what touching them does.
Vertices weigh one and no imbalance is allowed, one thread; the cheapest moves mend groups that are off all the
same. Other threads of Python wait while it runs.
Complexity: seconds a level for ten thousand nets, several times that for the mapping. Wins where pairs
mislead; loses to exact swap search in cost and time, for single moves are all infeasible at equal sizes, and it
takes one weight a vertex, so load caps cannot be stated beside slots.

References: Gottesbueren et al., doi:10.1145/3626527. Mapping: Heuer, doi:10.1137/1.9781611977929.2. Package
mtkahypar, extra ``partition``.
"""

from __future__ import annotations

import threading
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.hierarchy import MOST_WEIGHT, evened, narrowed, obvious, partitioner, top_down
from placer.layer import Ints, Layer
from placer.solvers import Placed

needs = frozenset({"routes"})
handles = frozenset({"levels"})

PRESET = "DEFAULT"
MAPPED_UNITS = 8  # innermost units mapped onto at most: 16 take ten times as long
_STEPS = 1000  # in which distances are stated, being integers
_LOCK = threading.Lock()  # the seed and the thread pool belong to the process


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """The cheaper of top-down partitioning and mapping; contiguous experts when time is over.

    Raises
    ------
    InvalidInput
        When mtkahypar is not installed, or only counts are known.
    """
    partitioner("mtkahypar", "mtkahypar")
    if clock.expired:
        return Placed(slots=layer.slots(layer.linear()))
    seed = int(rng.integers(2**31))
    found = [top_down(layer, partial(divide, layer, seed=seed))]
    if _maps(layer) and not clock.expired:
        found.append(mapped(layer, seed))
    return Placed(slots=min(found, key=lambda slots: layer.score(slots)[1]))


def divide(layer: Layer, members: Ints, sizes: Ints, seed: int) -> Ints:
    """Some experts in groups of the given sizes, with few groups touched by a token.

    Parameters
    ----------
    layer : Layer
    members : (m,) int64
        Experts, ascending.
    sizes : (n,) int64
        Experts of each group, m in all, larger ones first.
    seed : int

    Returns
    -------
    (m,) int64
        Group of each member.

    Examples
    --------
    >>> import pytest
    >>> _ = pytest.importorskip("mtkahypar")
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), max_load=None)
    >>> group = divide(problem.layer(0), np.arange(4), np.array([2, 2]), seed=0)
    >>> bool(group[0] == group[2]), bool(group[1] == group[3])
    (True, True)
    """
    group = obvious(sizes)
    if group is not None:
        return group
    vertex = np.full(layer.num_experts + 1, -1)  # the last entry answers for -1, no expert
    vertex[members] = np.arange(len(members))
    sets, count = layer.distinct
    nets = vertex[sets]
    shared = (nets >= 0).sum(axis=1) > 1
    group = _partition(nets[shared], count[shared], len(members), len(sizes), seed)
    return evened(group, sizes, layer.pairs[np.ix_(members, members)])


def mapped(layer: Layer, seed: int) -> npt.NDArray[np.int32]:
    """Slots from mapping all experts onto the innermost units at once, with the distances between those.

    Parameters
    ----------
    layer : Layer
        Its experts divide evenly by its innermost units.
    seed : int

    Returns
    -------
    (num_slots,) int32
        In the order of `Layer.slots`; empty slots are spread evenly.
    """
    sets, count = layer.distinct
    units, size = _units(layer), int(layer.sizes[0])
    weight = np.maximum(1, np.rint(layer.weights_of_levels * _steps(layer))).astype(np.int64)
    position = np.arange(units) * size
    outer = position // layer.sizes[:, None]  # (levels, units)
    distance = np.tensordot(weight, outer[:, :, None] != outer[:, None], axes=1)
    shared = (sets >= 0).sum(axis=1) > 1
    group = _partition(sets[shared], count[shared], layer.num_experts, units, seed, distance)
    held = layer.num_experts // units
    group = evened(group, np.full(units, held), layer.pairs[: layer.num_experts, : layer.num_experts])
    rows = np.full((units, size), -1, np.int32)
    rows[:, :held] = np.argsort(group, kind="stable").reshape(units, held)
    return layer.slots(layer.occupant(rows.ravel()))


def _units(layer: Layer) -> int:
    return layer.num_slots // int(layer.sizes[0])


def _maps(layer: Layer) -> bool:
    if len(layer.levels) < 2 or _units(layer) > MAPPED_UNITS:
        return False
    return layer.num_experts % _units(layer) == 0


def _steps(layer: Layer) -> int:
    """Integer steps of the dearest level, so that no cost leaves int32."""
    sets, count = layer.distinct
    dearest = int(count.sum()) * sets.shape[1] * len(layer.levels)
    steps: int = max(1, min(_STEPS, MOST_WEIGHT // max(1, dearest)))
    return steps


def _partition(
    nets: npt.NDArray[np.signedinteger],
    count: Ints,
    vertices: int,
    groups: int,
    seed: int,
    distance: Ints | None = None,
) -> Ints:
    """Group of each vertex; `distance` (groups, groups) asks for a mapping."""
    if len(nets) == 0:
        return np.arange(vertices) * groups // vertices
    package = partitioner("mtkahypar", "mtkahypar")
    pins = [[vertex for vertex in net if vertex >= 0] for net in nets.tolist()]
    weight = narrowed(count, MOST_WEIGHT // nets.shape[1]).tolist()
    with _LOCK:
        start = _initializer()
        context = start.context_from_preset(getattr(package.PresetType, PRESET))
        context.logging = False
        package.set_seed(seed)
        if distance is None:
            context.set_partitioning_parameters(groups, 0.0, package.Objective.KM1)
        else:
            context.set_mapping_parameters(groups, 0.0)
        graph = start.create_hypergraph(context, vertices, len(pins), pins, [1] * vertices, weight)
        if distance is None:
            found = graph.partition(context)
        else:
            one, other = np.triu_indices(groups, 1)
            edges = list(zip(one.tolist(), other.tolist(), strict=True))
            target = start.create_target_graph(
                context, groups, len(edges), edges, distance[one, other].tolist()
            )
            found = graph.map_onto_graph(target, context)
        return np.array(found.get_partition(), np.int64)


@cache
def _initializer() -> Any:
    """Mt-KaHyPar on one thread, initialised once in a process; called under the lock."""
    return partitioner("mtkahypar", "mtkahypar").initialize(1, print_warnings=False)
