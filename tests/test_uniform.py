"""Uniform routing against all routings written out, against random ones, and against published figures."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.alltoall import scheme
from placer.census import expected
from placer.errors import InvalidInput
from placer.model import Model
from placer.topology import Topology
from placer.uniform import node_limited_vectors, uniform_counts, untouched

H800 = Topology.load("h800")
V3 = Model.named("deepseek-v3")
FREE = replace(V3, num_groups=1, topk_groups=1)  # the same sizes without the router's limit
BF16 = V3.dispatch_bytes
FP8 = replace(V3, dispatch_dtype="fp8").dispatch_bytes
TOKENS = 4096  # of each GPU, as in DeepEP's published measurements


def routings(
    num_experts: int, num_groups: int, topk_groups: int, top_k: int
) -> list[tuple[tuple[int, ...], Fraction]]:
    """Every routing that the router allows, with its chance."""
    size = num_experts // num_groups
    found = []
    for groups in combinations(range(num_groups), topk_groups):
        allowed = [expert for expert in range(num_experts) if expert // size in groups]
        found += list(combinations(allowed, top_k))
    return [(experts, Fraction(1, len(found))) for experts in found]


@st.composite
def routers(draw: st.DrawFn) -> dict[str, int]:
    size, num_groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    topk_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, min(3, topk_groups * size)))
    return {
        "num_experts": size * num_groups,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "top_k": top_k,
    }


@settings(max_examples=80, deadline=None)
@given(router=routers(), data=st.data())
def test_the_chance_is_the_share_of_all_routings_that_miss_the_unit(
    router: dict[str, int], data: st.DataObject
) -> None:
    experts, groups = router["num_experts"], router["num_groups"]
    unit = set(data.draw(st.lists(st.integers(0, experts - 1), unique=True)))
    size = experts // groups
    held = [sum(expert // size == group for expert in unit) for group in range(groups)]
    missed = sum(chance for chosen, chance in routings(**router) if not unit & set(chosen))
    found = untouched(
        held,
        experts_per_group=size,
        num_groups=groups,
        topk_groups=router["topk_groups"],
        top_k=router["top_k"],
    )
    assert found == float(missed)


@settings(max_examples=60, deadline=None)
@given(
    router=routers(),
    racks=st.integers(1, 2),
    servers=st.integers(1, 3),
    gpus=st.integers(1, 3),
    tokens=st.sampled_from([0.0, 1.0, 12.5]),
)
def test_counts_are_means_over_all_routings(
    router: dict[str, int], racks: int, servers: int, gpus: int, tokens: float
) -> None:
    topology = H800.with_shape((racks, servers, gpus))
    counts = uniform_counts(Model(name="toy", hidden_size=8, **router), topology, tokens)
    experts, ranks = router["num_experts"], topology.num_ranks
    # Spread as the method linear does: the first ranks hold one more.
    rank_of = np.repeat(np.arange(ranks), [experts // ranks + (r < experts % ranks) for r in range(ranks)])
    touched, load = np.zeros((3, ranks)), np.zeros(ranks)
    for chosen, chance in routings(**router):
        used = rank_of[list(chosen)]
        np.add.at(load, used, float(chance))
        for level, size in enumerate(topology.unit_sizes):
            touched[level, np.unique(used // size)] += float(chance)
    np.testing.assert_allclose(counts.touched, tokens * touched, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(counts.load, tokens * load, rtol=1e-12, atol=1e-12)
    assert counts.tokens == tokens


def random_routes(model: Model, tokens: int, seed: int) -> npt.NDArray[Any]:
    rng = np.random.default_rng(seed)
    assert model.num_experts is not None
    assert model.top_k is not None
    groups = np.argsort(rng.random((tokens, model.num_groups)), axis=1)[:, : model.topk_groups]
    group_of = np.arange(model.num_experts) // (model.num_experts // model.num_groups)
    allowed = (group_of[None, :, None] == groups[:, None, :]).any(axis=2)
    score = np.where(allowed, rng.random((tokens, model.num_experts)), -1.0)
    return np.argsort(-score, axis=1)[:, : model.top_k]


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "kimi-k2"])  # 256, 160 and 384 experts
@pytest.mark.parametrize("shape", ["1x4x8", "2x2x3"])
def test_counts_are_what_random_routing_gives(name: str, shape: str) -> None:
    model, topology, tokens = Model.named(name), H800.with_shape(shape), 4000
    assert model.num_experts is not None
    ranks = topology.num_ranks
    held = [model.num_experts // ranks + (r < model.num_experts % ranks) for r in range(ranks)]
    used = np.repeat(np.arange(ranks), held)[random_routes(model, tokens, seed=1)]
    counts = uniform_counts(model, topology, tokens)
    for level, (size, units) in enumerate(zip(topology.unit_sizes, topology.num_units, strict=True)):
        hit = (used[:, :, None] // size == np.arange(units)).any(axis=1).sum(axis=0)
        chance = counts.touched[level, :units] / tokens
        error = 5 * np.sqrt(tokens * chance * (1 - chance)) + 1e-9
        assert (np.abs(hit - tokens * chance) <= error).all()
        assert not counts.touched[level, units:].any()
    assert counts.load.sum() == pytest.approx(used.size)


def test_more_experts_than_a_routing_can_avoid_are_always_touched() -> None:
    assert untouched([384 - 7], experts_per_group=384, top_k=8) == 0.0
    assert untouched([32] * 7 + [25], experts_per_group=32, num_groups=8, topk_groups=4, top_k=8) == 0.0


def test_more_gpus_than_experts_leave_some_without() -> None:
    counts = uniform_counts(Model.named("mixtral-8x7b"), H800.with_shape("1x2x8"), 100.0)
    assert counts.load.tolist() == [25.0] * 8 + [0.0] * 8
    assert counts.touched[1].tolist() == [100.0] + [0.0] * 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held": [1]}, r"held: found \[1\], expected 2 counts from 0 to 4"),
        ({"held": [5, 0]}, r"held: found \[5, 0\], expected 2 counts from 0 to 4"),
        ({"held": [-1, 0]}, r"held: found \[-1, 0\]"),
        ({"topk_groups": 3}, "topk_groups: found 3 of 2 groups"),
        ({"topk_groups": 0}, "topk_groups: found 0 of 2 groups"),
        ({"top_k": 5}, "top_k: found 5, expected 1 to 4"),
        ({"top_k": 0}, "top_k: found 0, expected 1 to 4"),
    ],
)
def test_an_impossible_router_is_refused(changes: dict[str, Any], message: str) -> None:
    router: dict[str, Any] = {"experts_per_group": 4, "num_groups": 2, "topk_groups": 1, "top_k": 2}
    with pytest.raises(InvalidInput, match=message):
        untouched(**{"held": [1, 1], **router, **changes})


@pytest.mark.parametrize(
    ("model", "tokens", "message"),
    [
        (Model(name="toy", hidden_size=8), 1.0, "model toy: num_experts is unknown"),
        (Model(name="toy", hidden_size=8, num_experts=4), 1.0, "model toy: top_k is unknown"),
        (replace(V3, num_groups=3, topk_groups=3), 1.0, "found 3 groups, expected a divisor of 256"),
        (V3, -1.0, "tokens: found -1.0"),
        (V3, float("nan"), "tokens: found nan"),
    ],
)
def test_a_model_without_a_router_is_refused(model: Model, tokens: float, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        uniform_counts(model, H800, tokens)


# -- DeepSeek-V3, 4096 tokens a GPU; the worked case is EP64 on 8 servers of 8 ---------------------------------


def leaving(shape: str, name: str) -> float:
    """Vectors that one GPU sends to other servers in one dispatch, routing uniform and without a group limit."""
    topology = H800.with_shape(shape)
    counts = uniform_counts(FREE, topology, TOKENS * topology.num_ranks)
    experts = np.full(256, counts.tokens * 8 / 256)
    there, _ = scheme(name).exchange(expected(counts, experts, topology), topology)
    return float(there.out[topology.index("server")].sum()) / topology.num_ranks


@pytest.mark.parametrize(
    ("name", "per_token", "bf16", "fp8"),
    [
        ("naive", "7.000", "411.0", "211.9"),
        ("gpu_dedup", "6.716", "394.4", "203.4"),
        ("hierarchical", "4.633", "272.0", "140.3"),
        ("allgather", "7.000", "411.0", "211.9"),
    ],
)
def test_bytes_that_leave_a_server_under_each_scheme(name: str, per_token: str, bf16: str, fp8: str) -> None:
    vectors = leaving("1x8x8", name)
    assert f"{vectors / TOKENS:.3f}" == per_token
    assert (f"{vectors * BF16 / 1e6:.1f}", f"{vectors * FP8 / 1e6:.1f}") == (bf16, fp8)


def test_the_node_limit_is_below_what_free_routing_touches() -> None:
    vectors = node_limited_vectors(TOKENS, 4, 8)
    assert f"{vectors / TOKENS:.3f}" == "3.500"
    assert (f"{vectors * BF16 / 1e6:.1f}", f"{vectors * FP8 / 1e6:.1f}") == ("205.5", "106.0")
    # With groups on servers, uniform routing sends a little less than the limit allows.
    counts = uniform_counts(V3, H800.with_shape("1x8x8"), 1.0)
    assert 0.9 * 3.5 < counts.touched[1].sum() * 7 / 8 < 3.5


def test_one_expert_a_gpu_moves_54_gigabytes_a_forward_pass() -> None:
    counts = uniform_counts(V3, H800.with_shape("1x32x8"), TOKENS * 256)
    vectors = counts.load.sum() * (1 - 1 / 256) / 256
    assert vectors == 32640
    assert f"{vectors * BF16 / 1e6:.2f}" == "467.93"
    assert f"{vectors * BF16 * 2 * 58 / 1e9:.2f}" == "54.28"
    assert f"{vectors * (FP8 + BF16) * 58 / 1e9:.2f}" == "41.13"


@pytest.mark.parametrize(
    ("vectors", "rounded", "dispatch", "bf16", "fp8"),
    [
        (leaving("1x32x8", "naive"), "31744", "455.1", "52.79", "40.00"),
        (leaving("1x32x8", "hierarchical"), "28835", "413.4", "47.95", "36.34"),
        (node_limited_vectors(TOKENS, 4, 32), "15872", "227.5", "26.39", "20.00"),
        (node_limited_vectors(TOKENS, 4, 8), "14336", "205.5", "23.84", "18.07"),
    ],
)
def test_gigabytes_that_leave_a_server_in_a_forward_pass(
    vectors: float, rounded: str, dispatch: str, bf16: str, fp8: str
) -> None:
    assert f"{vectors:.0f}" == rounded
    assert f"{vectors * BF16 / 1e6:.1f}" == dispatch
    assert f"{vectors * 2 * BF16 * 58 / 1e9:.2f}" == bf16
    assert f"{vectors * (FP8 + BF16) * 58 / 1e9:.2f}" == fp8


@pytest.mark.parametrize(("limit", "servers"), [(5, 4), (-1, 4), (0, 0)])
def test_a_limit_above_the_servers_is_refused(limit: int, servers: int) -> None:
    with pytest.raises(InvalidInput, match="server limit"):
        node_limited_vectors(1.0, limit, servers)
