"""The dispatch rule ``cover``: the fewest servers besides the home's own, ties shared out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import brute
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import VECTOR_BYTES, close
from test_links import Case, cases, check, machine_of

from placer.alltoall import SCHEMES
from placer.errors import InvalidInput
from placer.evaluation import evaluate
from placer.incidence import incidence, targets
from placer.model import Model
from placer.placement import Placement
from placer.report import Report
from placer.search.covering import smallest_covers
from placer.topology import Topology
from placer.trace import Trace

H100 = Topology.load("dgx-h100")
TOY = Model(name="toy", hidden_size=96, expert_width=32, dispatch_dtype="fp8")


@st.composite
def copied(draw: st.DrawFn) -> Case:
    """One to three copies of every expert on 1 to 9 servers, tokens of up to five experts."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    ranks = math.prod(shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    num_experts, layers = draw(st.integers(2, 8)), 2
    copies = rng.integers(1, draw(st.integers(1, 3)) + 1, (layers, num_experts))
    per_rank = -(-int(copies.sum(axis=1).max()) // ranks) + draw(st.integers(0, 1))
    rows = []
    for number in copies:
        held = np.repeat(np.arange(num_experts), number)
        row = rng.permutation(np.pad(held, (0, ranks * per_rank - len(held)), constant_values=-1))
        grid = row.reshape(ranks, per_rank)
        rows.append(np.take_along_axis(grid, np.argsort(grid < 0, axis=1, kind="stable"), axis=1).ravel())
    tokens, top_k = draw(st.integers(1, 3)), draw(st.integers(1, min(5, num_experts)))
    topk = np.argsort(rng.random((tokens, layers, num_experts)), axis=2)[:, :, :top_k].astype(np.int16)
    topk[rng.random(topk.shape) < draw(st.sampled_from([0, 0.3]))] = -1
    topology = H100.with_shape(shape)
    return Case(
        topology,
        machine_of(topology),
        Placement(physical_to_logical=np.array(rows), num_experts=num_experts, shape=shape),
        Trace(topk_idx=topk, num_experts=num_experts, source_rank=rng.integers(0, ranks, tokens)),
    )


def report_of(case: Case, rule: str = "cover", **options: Any) -> Report:
    return evaluate(case.placement, case.trace, case.topology, model=TOY, replica_choice=rule, **options)


def priced(slots: list[int], tokens: list[list[int]], shape: tuple[int, int, int], **options: Any) -> Report:
    """One layer under ``cover``."""
    experts = max(slots) + 1
    return evaluate(
        Placement(physical_to_logical=np.array([slots]), num_experts=experts, shape=shape, rule="cover"),
        Trace(topk_idx=np.array(tokens)[:, None], num_experts=experts),
        H100.with_shape(shape),
        **options,
    )


# -- against every subset of servers -------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(case=copied(), alltoall=st.sampled_from(["hierarchical", "naive"]))
def test_cover_equals_a_search_of_all_subsets_of_servers(case: Case, alltoall: str) -> None:
    found = report_of(case, alltoall=alltoall).to_dict()
    expected = brute.report(
        case.placement.physical_to_logical,
        case.trace.topk_idx,
        case.placement.shape,
        vector_bytes=VECTOR_BYTES,
        alltoall=alltoall,
        rule="cover",
    )
    for key, numbers in expected.items():
        assert close(found[key], numbers), (key, found[key], numbers)


@settings(max_examples=60, deadline=None)
@given(
    case=st.one_of(copied(), cases(copies=True)),
    scheme=st.sampled_from(sorted(set(SCHEMES) - {"follow"})),
    homes=st.sampled_from(["uniform", "trace"]),
)
def test_every_link_carries_what_cover_sends_over_it(case: Case, scheme: str, homes: str) -> None:
    check(case, scheme, homes, "cover")


@settings(max_examples=100, deadline=None)
@given(masks=st.lists(st.integers(1, 255), min_size=1, max_size=8))
def test_smallest_covers_are_all_of_them_and_each_once(masks: list[int]) -> None:
    wanted = int(np.bitwise_or.reduce(masks))
    for size in range(1, len(masks) + 1):
        expected = {
            chosen
            for chosen in combinations(range(len(masks)), size)
            if np.bitwise_or.reduce([masks[s] for s in chosen]) == wanted
        }
        if expected:
            break
    found = [
        tuple(sorted(row)) for row in smallest_covers(np.array(masks, np.uint64), np.uint64(wanted)).tolist()
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected


@settings(max_examples=20, deadline=None)
@given(case=copied())
def test_a_layer_counts_what_the_evaluator_counts(case: Case) -> None:
    report = report_of(case)
    for layer, slots in enumerate(case.placement.physical_to_logical):
        sizes = case.topology.unit_sizes
        aimed = targets(
            slots,
            num_experts=case.placement.num_experts,
            num_ranks=case.placement.num_ranks,
            unit_ranks=sizes,
            server_ranks=sizes[1],
            rule="cover",
        )
        topk = case.trace.topk_idx[:, layer].astype(np.int32)
        counted = incidence(topk, aimed, num_ranks=case.placement.num_ranks, unit_ranks=sizes, server=1)
        assert counted.load.sum(axis=1) == pytest.approx((topk >= 0).sum())
        remote = counted.remote.sum(axis=1) / len(topk)
        assert remote == pytest.approx([report.per_layer["remote"][name][layer] for name in brute.LEVELS])


# -- facts ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(case=copied(), homes=st.sampled_from(["uniform", "trace"]), seed=st.integers(0, 99))
def test_no_rule_reaches_fewer_other_servers(case: Case, homes: str, seed: int) -> None:
    slots = case.placement.physical_to_logical
    rng, (racks, servers, _) = np.random.default_rng(seed), case.placement.shape
    table = np.array(
        [
            [
                [rng.choice(np.flatnonzero(row == e)) for e in range(case.placement.num_experts)]
                for _ in range(racks * servers)
            ]
            for row in slots
        ]
    )
    case = replace(case, placement=replace(case.placement, table=table))
    least = report_of(case, homes=homes).remote["server"]
    for rule in ("nearest", "spread", "table"):
        assert least <= report_of(case, rule, homes=homes).remote["server"] + 1e-9


@settings(max_examples=20, deadline=None)
@given(case=cases(copies=False))
def test_without_copies_cover_is_nearest(case: Case) -> None:
    assert replace(report_of(case), replica_choice="nearest") == report_of(case, "nearest")


def test_everything_everywhere_leaves_nothing_remote_but_the_gpus_of_a_server() -> None:
    found = priced([0, 1, 1, 0] * 3, [[0, 1]], (1, 3, 2))
    assert found.remote == {"gpu": 0.0, "server": 0.0, "rack": 0.0}
    found = priced([0, 1] * 3, [[0, 1]], (1, 3, 2))
    assert found.remote == pytest.approx({"gpu": 1.0, "server": 0.0, "rack": 0.0})


def test_experts_ride_along_to_a_server_that_is_needed_anyway() -> None:
    """Servers hold 01, 2, 12: expert 1 of {0, 1} goes with 0, but from the third server it is at home."""
    found = priced([0, 1, 2, -1, 1, 2], [[0, 1]], (1, 3, 1))
    assert found.remote["server"] == pytest.approx((0 + 1 + 1) / 3)
    assert found.load["gpu"]["max_over_mean"] == pytest.approx((2 + 2 + 1) / 6 * 3)


def test_ties_between_smallest_sets_are_shared_out() -> None:
    """Servers hold 01, 01, 2, 2: from the last two either of the first serves both experts."""
    found = priced([0, 1, 0, 1, 2, -1, 2, -1], [[0, 1]], (1, 4, 1))
    assert found.remote["server"] == 0.5
    assert found.load["gpu"] == {"max_over_mean": 2.0, "worst_layer": 2.0}  # a half each


def test_the_largest_server_need_not_be_part_of_a_smallest_set() -> None:
    """Two servers hold 012, two 345, one 1234: whoever starts with that one needs three for all six."""
    slots = [0, 1, 2, -1] * 2 + [3, 4, 5, -1] * 2 + [1, 2, 3, 4] + [6, -1, -1, -1]
    found = priced(slots, [[0, 1, 2, 3, 4, 5]], (2, 3, 1))
    assert found.remote["server"] == pytest.approx((4 * 1 + 2 + 2) / 6)


def test_more_servers_than_bits_of_a_mask() -> None:
    """Server s holds s and s - 1: {0, 1} is at home on server 1 and costs one server from anywhere else."""
    servers = 80
    slots = [e % servers for s in range(servers) for e in (s, s - 1)]
    assert priced(slots, [[0, 1]], (2, 40, 1)).remote["server"] == pytest.approx(1 - 1 / servers)
    assert priced(slots, [[0, 2, 4]], (2, 40, 1)).remote["server"] == pytest.approx(3 - 6 / servers)


def test_more_experts_a_token_than_bits_of_a_mask_are_refused() -> None:
    slots = [*range(66), 0, 1]
    with pytest.raises(InvalidInput, match="found 65 experts a token, expected at most 64"):
        priced(slots, [list(range(65))], (1, 2, 1))
    assert priced(slots, [list(range(2, 66))], (1, 2, 1)).touched["server"] == 2.0


def test_the_report_says_that_picks_depend_on_each_other() -> None:
    said = priced([0, 1, 1, 0], [[0, 1]], (1, 2, 1)).assumptions
    assert any("fewest other servers" in line for line in said)
    assert not any("independently of a token's other experts" in line for line in said)
