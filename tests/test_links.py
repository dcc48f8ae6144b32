"""Every link of a machine against tokens that walk over it one by one (`brute.walk`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import brute
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.alltoall import SCHEMES
from placer.census import census
from placer.errors import InvalidInput
from placer.flows import Flows, from_matrix
from placer.homes import homes as homes_of
from placer.links import links
from placer.placement import Placement
from placer.timing import phase_seconds
from placer.topology import Level, Topology
from placer.trace import Trace

H100 = Topology.load("dgx-h100")
SHARE = {"ideal": 1.0, "ecmp": 0.65, "spray": 0.9}
TORI = [(1,), (2,), (3,), (4,), (5,), (2, 2), (2, 3), (3, 1), (4, 2), (3, 3), (2, 2, 2), (2, 1, 3), (3, 2, 2)]
CUBES = [(1, 2, 2), (1, 2, 3), (2, 2, 3)]  # what a torus without sides becomes


@dataclass(frozen=True)
class Case:
    topology: Topology
    machine: brute.Machine
    placement: Placement
    trace: Trace


def machine_of(topology: Topology) -> brute.Machine:
    """The same machine in the words of the plain evaluator."""
    levels = topology.levels
    return brute.Machine(
        fanouts=[level.fanout for level in levels],
        names=[level.name for level in levels],
        rails=[level.rails for level in levels],
        link=levels[0].link,
        sides=levels[0].dims or next((cube for cube in CUBES if math.prod(cube) == levels[0].fanout), ()),
        rates=[
            each.bandwidth * each.efficiency * SHARE[each.routing] / each.oversubscription for each in levels
        ],
        latencies=[level.latency for level in levels],
    )


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Up to 24 GPUs or so on every kind of link, with one more level inside, between or outside, or none."""
    link = draw(st.sampled_from(["switch", "mesh", "torus"]))
    dims = draw(st.sampled_from([*TORI, *CUBES])) if link == "torus" else ()
    fanouts = {"gpu": math.prod(dims) if dims else draw(st.integers(1, 4))}
    extra = draw(st.sampled_from(["", "leaf", "pod"] + (["island"] if link == "switch" else [])))
    if extra == "island":
        fanouts["island"] = 2
    gpus = math.prod(fanouts.values())
    room = max(1, 24 // gpus)
    fanouts["server"] = draw(st.integers(1, min(4, room)))
    if extra == "leaf":
        fanouts["leaf"] = 2
    fanouts["rack"] = draw(st.integers(1, 3 if room >= 3 * fanouts["server"] else 1))
    if extra == "pod":
        fanouts["pod"] = 2
    levels = [
        Level(
            name=name,
            fanout=fanout,
            bandwidth=float(draw(st.integers(1, 9))) * 1e3,
            efficiency=draw(st.sampled_from([0.5, 1.0])),
            latency=float(draw(st.integers(0, 9))),
            oversubscription=draw(st.sampled_from([1.0, 3.0])),
            routing=draw(st.sampled_from(sorted(SHARE))),
            link=link if name == "gpu" else "switch",
            dims=dims if name == "gpu" and dims not in CUBES else (),
            rails=name in ("leaf", "rack", "pod") and draw(st.booleans()),
        )
        for name, fanout in fanouts.items()
    ]
    return replace(H100, levels=tuple(levels))


@st.composite
def cases(draw: st.DrawFn, copies: bool = False) -> Case:
    topology = draw(topologies())
    ranks = topology.num_ranks
    num_experts = draw(st.integers(1, 8))
    per_rank = -(-num_experts // ranks) + draw(st.integers(0, 1))
    spare = ranks * per_rank - num_experts
    extra = draw(st.integers(0, min(spare, 4))) if copies else 0
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    top_k = draw(st.integers(1, min(3, num_experts)))
    topk = np.argsort(rng.random((tokens, layers, num_experts)), axis=2)[:, :, :top_k].astype(np.int16)
    topk[rng.random(topk.shape) < draw(st.sampled_from([0, 0.3]))] = -1
    weights = rng.integers(1, 3, topk.shape) / 4.0 if draw(st.booleans()) else None
    rows = []
    for _ in range(layers):
        held = [np.arange(num_experts), rng.integers(0, num_experts, extra), np.full(spare - extra, -1)]
        row = rng.permutation(np.concatenate(held)).reshape(ranks, per_rank)
        rows.append(np.take_along_axis(row, np.argsort(row < 0, axis=1, kind="stable"), axis=1).ravel())
    return Case(
        topology,
        machine_of(topology),
        Placement(physical_to_logical=np.array(rows), num_experts=num_experts, shape=topology.shape),
        Trace(
            topk_idx=topk,
            num_experts=num_experts,
            topk_weights=weights,
            sequence=rng.integers(0, 3, tokens),
            source_rank=rng.integers(0, ranks, tokens),
        ),
    )


def by_name(flows: Flows, topology: Topology) -> brute.Loads:
    """Vectors of every link, by level and name; no two links share both."""
    found: brute.Loads = {}
    for kind in links(flows, topology):
        for index in np.flatnonzero(kind.vectors).tolist():
            key = topology.levels[kind.level].name, kind.name(index)
            assert key not in found, key
            found[key] = float(kind.vectors[index])
    return found


def equal(found: brute.Loads, expected: brute.Loads) -> bool:
    """Whether the links that carry anything are the same and carry the same."""
    keys = found.keys() | expected.keys()
    return all(math.isclose(found.get(k, 0.0), expected.get(k, 0.0), abs_tol=1e-9) for k in keys)


def check(case: Case, scheme: str, homes: str, rule: str = "nearest") -> None:
    at = homes_of(case.trace, case.placement.num_ranks, homes)
    counted = census(
        case.placement, case.trace, case.topology, rule=rule, homes=at, follow=scheme == "follow"
    )
    walked = brute.walk(
        case.machine,
        scheme,
        case.placement.physical_to_logical.tolist(),
        case.trace.topk_idx.tolist(),
        homes=None if at is None else at.tolist(),
        weights=None if case.trace.topk_weights is None else case.trace.topk_weights.tolist(),
        rule=rule,
    )
    for layer, expected in zip(counted, walked, strict=True):
        for way, loads in zip(SCHEMES[scheme].exchange(layer, case.topology), expected, strict=True):
            found = by_name(way, case.topology)
            assert equal(found, loads), (found, loads)
            spent = brute.seconds(case.machine, loads, 256.0)
            assert math.isclose(phase_seconds(way, 256.0, case.topology), spent, rel_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    scheme=st.sampled_from(sorted(SCHEMES)),
    homes=st.sampled_from(["uniform", "sticky", "trace"]),
)
def test_every_link_carries_what_tokens_take_over_it(case: Case, scheme: str, homes: str) -> None:
    check(case, scheme, homes)


@settings(max_examples=40, deadline=None)
@given(case=cases(), homes=st.sampled_from(["uniform", "sticky", "trace"]))
def test_tokens_that_stay_start_from_their_heaviest_expert(case: Case, homes: str) -> None:
    check(case, "follow", homes)


@settings(max_examples=30, deadline=None)
@given(
    case=cases(copies=True),
    scheme=st.sampled_from(sorted(set(SCHEMES) - {"follow"})),
    homes=st.sampled_from(["uniform", "sticky", "trace"]),
    rule=st.sampled_from(["nearest", "spread"]),
)
def test_copies_share_what_the_dispatch_rule_gives_them(
    case: Case, scheme: str, homes: str, rule: str
) -> None:
    check(case, scheme, homes, rule)


def test_rails_of_servers_of_one_gpu_have_names() -> None:
    topology = Topology.load("dgx-h100-superpod").with_shape("2x2x1")
    vectors = np.zeros((4, 4))
    vectors[0, 3] = 1.0
    names = {name for _, name in by_name(from_matrix(vectors, topology), topology)}
    assert {"rack 0 rail 0 uplinks out", "rack 1 rail 0 uplinks in"} <= names


@pytest.mark.parametrize("link", ["mesh", "torus"])
def test_a_mesh_that_joins_a_part_of_a_server_is_refused(link: str) -> None:
    gpu, server, rack = H100.with_shape("1x1x2").levels
    with pytest.raises(InvalidInput, match=link):
        replace(
            H100, levels=(replace(gpu, link=link), replace(server, name="island", fanout=2), server, rack)
        )


def test_rails_inside_a_server_are_refused() -> None:
    gpu, server, rack = H100.with_shape("1x1x2").levels
    with pytest.raises(InvalidInput, match="rails"):
        replace(H100, levels=(gpu, replace(server, name="island", fanout=2, rails=True), server, rack))
