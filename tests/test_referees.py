"""The evaluator against what others measured or derived: DeepEP's tables, balance points, and what must not change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace

from placer.alltoall import SCHEMES, scheme
from placer.background import Background
from placer.census import Census, census, expected
from placer.errors import InvalidInput
from placer.evaluation import evaluate
from placer.flows import from_matrix
from placer.homes import homes as homes_of
from placer.links import links
from placer.model import Model
from placer.placement import Placement
from placer.report import Report
from placer.step import Step
from placer.timing import GEMM_EFFICIENCY, compute_seconds, phase
from placer.topology import Topology
from placer.trace import Trace
from placer.uniform import uniform_counts

H100 = Topology.load("dgx-h100")
H800 = Topology.load("h800")
V3 = Model.named("deepseek-v3")
V3_FP8 = replace(V3, dispatch_dtype="fp8")
LEVELS = ("gpu", "server", "rack")
RETURNING = sorted(set(SCHEMES) - {"follow"})


def contiguous(num_experts: int, shape: tuple[int, int, int], layers: int = 1) -> Placement:
    return Placement(
        physical_to_logical=np.tile(np.arange(num_experts), (layers, 1)), num_experts=num_experts, shape=shape
    )


def shuffled(num_experts: int, shape: tuple[int, int, int], layers: int, seed: int) -> Placement:
    rng = np.random.default_rng(seed)
    rows = np.array([rng.permutation(num_experts) for _ in range(layers)])
    return Placement(physical_to_logical=rows, num_experts=num_experts, shape=shape)


# -- DeepEP, docs/legacy.md: H800, 4096 tokens a GPU, top-8 of 256 experts in the best 4 groups, FP8 there ------


def deepep_trace(servers: int, tokens: int = 16384) -> Trace:
    """The routing of DeepEP's tests: random scores, the servers with the largest maxima, the best experts there."""
    scores = np.random.default_rng(0).random((tokens, servers, 256 // servers), dtype=np.float32)
    best = scores.max(axis=2)
    kept = min(servers, 4)
    lowest = np.sort(best, axis=1)[:, -kept, None]
    scores[best < lowest] = -1.0
    return Trace(
        topk_idx=np.argpartition(-scores.reshape(tokens, 256), 8, axis=1)[:, None, :8].astype(np.int16),
        num_experts=256,
    )


@cache
def deepep_report(servers: int) -> Report:
    shape = (1, servers, 8)
    return evaluate(
        contiguous(256, shape),
        deepep_trace(servers),
        H800.with_shape(shape),
        model=V3_FP8,
        tokens_per_gpu=4096,
    )


@pytest.mark.parametrize(("servers", "nodes", "gpus"), [(2, 1.993, 6.52), (4, 3.614, 7.27), (8, 3.982, 7.47)])
def test_a_token_of_deepeps_routing_meets_as_many_servers_and_gpus(
    servers: int, nodes: float, gpus: float
) -> None:
    touched = deepep_report(servers).touched
    assert touched["server"] == pytest.approx(nodes, abs=0.02)
    assert touched["gpu"] == pytest.approx(gpus, abs=0.03)


@pytest.mark.parametrize(
    ("ranks", "counted", "dispatch", "combine"),
    [(8, "gpu", 153, 158), (16, "server", 43, 43), (32, "server", 58, 57), (64, "server", 51, 50)],
)
def test_normal_kernels_take_as_long_as_deepep_measured(
    ranks: int, counted: str, dispatch: float, combine: float
) -> None:
    """DeepEP divides all vectors, those for the sender's own server or GPU included, by the seconds they took."""
    report = deepep_report(ranks // 8)
    vectors = 4096 * report.touched[counted]
    assert vectors * V3_FP8.dispatch_bytes / report.seconds["dispatch"] / 1e9 == pytest.approx(
        dispatch, rel=0.1
    )
    assert vectors * V3_FP8.combine_bytes / report.seconds["combine"] / 1e9 == pytest.approx(combine, rel=0.1)


def low_latency_seconds(ranks: int) -> dict[str, float]:
    topology, tokens = H800.with_shape((1, ranks // 8, 8)), 128.0 * ranks
    experts = np.full(256, tokens * 8 / 256)
    step = Step(topology=topology, model=V3_FP8, scheme=scheme("low_latency"), scale=1.0)
    counted = expected(uniform_counts(V3, topology, tokens), experts, topology)
    held = np.zeros((ranks, 256))
    held[np.arange(256) * ranks // 256, np.arange(256)] = 1.0
    seconds: dict[str, float] = step.price([counted], [held], tokens, (0,))["seconds"]
    return seconds


@pytest.mark.parametrize(
    ("ranks", "dispatch", "combine"),
    [(8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)],
)
def test_low_latency_kernels_take_as_long_as_deepep_measured(
    ranks: int, dispatch: float, combine: float
) -> None:
    """128 tokens a GPU; microseconds."""
    seconds = low_latency_seconds(ranks)
    assert seconds["dispatch"] * 1e6 == pytest.approx(dispatch, rel=0.1)
    assert seconds["combine"] * 1e6 == pytest.approx(combine, rel=0.1)


def test_low_latency_kernels_move_the_bytes_that_deepep_counts() -> None:
    kernels = scheme("low_latency")
    assert 128 * 8 * kernels.dispatch_bytes(V3) == 128 * 8 * (7168 + 7168 / 128 * 4 + 16)
    assert f"{128 * 8 * kernels.dispatch_bytes(V3) / 1e6:.2f}" == "7.59"
    assert f"{128 * 8 * kernels.combine_bytes(V3) / 1e6:.3f}" == "14.680"


# -- points of balance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tokens"), [("bf16", 295), ("fp8", 148)])
def test_an_expert_of_so_many_tokens_takes_an_h100_as_long_to_read_as_to_compute(
    dtype: str, tokens: int
) -> None:
    none, one = np.zeros(1), np.ones(1)
    reading = compute_seconds(none, one, H100, V3, dtype)
    arithmetic = compute_seconds(one, none, H100, V3, dtype)
    assert round(reading / arithmetic) == tokens


@pytest.mark.parametrize("servers", [2, 16])
@pytest.mark.parametrize(
    ("width", "hidden", "top_k", "tokens"), [(2048, 7168, 8, 4096), (14336, 4096, 2, 500)]
)
def test_the_share_of_communication_depends_on_expert_width_alone(
    servers: int, width: int, hidden: int, top_k: int, tokens: int
) -> None:
    """a2a / compute = 4 phi F / (6 f B) in BF16 both ways, phi the share of vectors that leave a server of one GPU."""
    levels = tuple(
        replace(level, bandwidth=45e9, efficiency=1.0, latency=0.0, routing="ideal")
        for level in H100.with_shape((1, servers, 1)).levels
    )
    machine = replace(H100, levels=levels, flops_bf16=400e12 / GEMM_EFFICIENCY, hbm_bandwidth=1e30)
    model = Model(name="any", hidden_size=hidden, expert_width=width, num_experts=64, top_k=top_k)
    total = float(tokens * servers)
    counted = expected(uniform_counts(model, machine, total), np.full(64, total * top_k / 64), machine)
    held = np.repeat(np.eye(servers), 64 // servers, axis=1)
    step = Step(topology=machine, model=model, scheme=scheme("naive"), scale=1.0)
    seconds = step.price([counted], [held], total, (0,))["seconds"]
    ratio = (seconds["dispatch"] + seconds["combine"]) / seconds["compute"]
    assert ratio == pytest.approx(5926 * (1 - 1 / servers) / width, rel=1e-4)


@pytest.mark.parametrize("servers", [2, 4, 8])
def test_an_even_all_to_all_reaches_the_bus_bandwidth_that_nccl_expects(servers: int) -> None:
    """N / (N - 1) times the NIC's rate, twice as much on two servers: nccl-tests, issue 130."""
    topology = H100.with_shape((1, servers, 8))
    ranks, each = topology.num_ranks, 1e9
    found = phase(from_matrix(np.ones((ranks, ranks)), topology), each, topology)
    bus = each * (ranks - 1) / (found.seconds - found.latency)
    nic = topology.levels[topology.index("server")].effective_bandwidth
    assert bus == pytest.approx(nic * servers / (servers - 1) * (ranks - 1) / ranks)


def test_one_pair_of_a_mesh_gets_a_seventh_of_what_a_switch_gives_it() -> None:
    mesh = Topology.load("mi300x").with_shape("1x1x8")
    switch = replace(mesh, levels=(replace(mesh.levels[0], link="switch"), *mesh.levels[1:]))
    pair = from_matrix(np.eye(8, k=3) * (np.arange(8) == 0)[:, None], mesh)
    slow, fast = (phase(pair, 1e9, each) for each in (mesh, switch))
    assert (slow.seconds - slow.latency) / (fast.seconds - fast.latency) == pytest.approx(7.0)


# -- what must not change, and what must ------------------------------------------------------------------------

TOY = Model(name="toy", hidden_size=256, expert_width=128)
SHAPES = [(1, 2, 4), (2, 2, 2), (1, 1, 4), (1, 4, 1), (2, 4, 1), (1, 1, 1)]


class Situation(NamedTuple):
    """What `evaluate` is asked in one example of a property."""

    placement: Placement
    trace: Trace
    topology: Topology
    options: dict[str, Any]

    def report(self, **more: Any) -> Report:
        options = {"model": TOY, **self.options, **more}
        return evaluate(self.placement, self.trace, self.topology, **options)

    def census(self) -> list[Census]:
        return census(
            self.placement,
            self.trace,
            self.topology,
            rule=self.placement.rule,
            homes=homes_of(self.trace, self.placement.num_ranks, self.options["homes"]),
            follow=self.options["alltoall"] == "follow",
        )


@st.composite
def situations(
    draw: st.DrawFn,
    alltoall: Sequence[str] = tuple(sorted(SCHEMES)),
    homes: Sequence[str] = ("uniform", "sticky", "trace"),
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
) -> Situation:
    shape, seed = draw(st.sampled_from(shapes)), draw(st.integers(0, 999))
    trace = noisy_trace(tokens=draw(st.sampled_from([3, 60])), seed=seed)
    ranks = np.random.default_rng(seed).integers(0, math.prod(shape), trace.num_tokens)
    return Situation(
        shuffled(16, shape, 2, seed),
        replace(trace, source_rank=ranks),
        Topology.load(draw(st.sampled_from(["dgx-h100", "mi300x", "h800"]))).with_shape(shape),
        {
            "alltoall": draw(st.sampled_from(alltoall)),
            "homes": draw(st.sampled_from(homes)),
            "tokens_per_gpu": draw(st.sampled_from([1, 64, 4096])),
        },
    )


@settings(max_examples=15, deadline=None)
@given(
    case=situations(alltoall=["naive", "allgather", "low_latency"], homes=["uniform"]),
    seed=st.integers(0, 99),
)
def test_no_placement_changes_the_bytes_between_servers_when_copies_do_not_merge(
    case: Situation, seed: int
) -> None:
    other = case._replace(placement=shuffled(16, case.topology.shape, 2, seed))
    found = case.report().bytes_per_token
    for level in ("server", "rack"):
        assert other.report().bytes_per_token[level] == pytest.approx(found[level])
    choices = (case.trace.topk_idx >= 0).sum() / case.trace.num_tokens
    servers = math.prod(case.topology.shape[:2])
    vectors = 2 * (servers - 1) if case.options["alltoall"] == "allgather" else choices * (1 - 1 / servers)
    kernels = scheme(case.options["alltoall"])
    sent = vectors * (kernels.dispatch_bytes(TOY) + kernels.combine_bytes(TOY))
    assert found["server"] == pytest.approx(sent)


def permuted(trace: Trace, seed: int) -> Trace:
    """The tokens of the second layer dealt anew: every layer as before, nothing between them."""
    ids = np.array(trace.topk_idx)
    ids[:, 1] = np.random.default_rng(seed).permutation(ids[:, 1])
    return replace(trace, topk_idx=ids)


@settings(max_examples=15, deadline=None)
@given(case=situations(alltoall=RETURNING, homes=["uniform"]), seed=st.integers(0, 99))
def test_tokens_that_return_home_do_not_feel_what_layers_have_in_common(case: Situation, seed: int) -> None:
    other = case._replace(trace=permuted(case.trace, seed))
    assert other.report().to_dict() == case.report().to_dict()


def test_tokens_that_stay_feel_what_layers_have_in_common() -> None:
    """Every token uses one expert in both layers; shuffled, it finds the second one elsewhere."""
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, 8, (400, 1, 1)), 2, axis=1)
    case = Situation(
        contiguous(8, (1, 8, 1), layers=2),
        Trace(topk_idx=ids, num_experts=8),
        H100.with_shape("1x8x1"),
        {"alltoall": "follow"},
    )
    vector = TOY.dispatch_bytes
    assert case.report().bytes_per_token["server"] == pytest.approx(7 / 8 * vector)  # the first way alone
    shuffled_bytes = case._replace(trace=permuted(case.trace, 0)).report().bytes_per_token["server"]
    assert shuffled_bytes == pytest.approx(2 * 7 / 8 * vector, rel=0.05)


@settings(max_examples=15, deadline=None)
@given(case=situations(homes=["uniform"]))
def test_a_home_anywhere_is_remote_to_all_units_but_one(case: Situation) -> None:
    report = case.report()
    for level, units in zip(LEVELS, (math.prod(case.topology.shape[:n]) for n in (3, 2, 1)), strict=True):
        assert report.remote[level] == pytest.approx(report.touched[level] * (1 - 1 / units))


@settings(max_examples=15, deadline=None)
@given(case=situations())
def test_twice_the_tokens_move_twice_the_bytes(case: Situation) -> None:
    once, twice = (case.report(tokens_per_gpu=tokens) for tokens in (512, 1024))
    assert twice.bytes_per_token == once.bytes_per_token
    for less, more in zip(once.links, twice.links, strict=True):
        assert more["bytes"] == pytest.approx(2 * less["bytes"])
        assert more["seconds"] == pytest.approx(2 * less["seconds"])
    assert twice.latency == pytest.approx(once.latency)
    spent = [sum(r.seconds[way] for way in ("dispatch", "combine")) - r.latency for r in (once, twice)]
    assert spent[1] == pytest.approx(2 * spent[0])


@settings(max_examples=15, deadline=None)
@given(case=situations(alltoall=RETURNING))
def test_the_way_home_is_the_way_there_backwards(case: Situation) -> None:
    width = case.topology.shape[2]
    for layer in case.census():
        there, back = scheme(case.options["alltoall"]).exchange(layer, case.topology)
        assert np.array_equal(back.out, there.into)
        assert np.array_equal(back.into, there.out)
        for rank, place in np.ndindex(*there.pairs.shape):
            other = rank - rank % width + place
            assert back.pairs[rank, place] == there.pairs[other, rank % width]


@settings(max_examples=20, deadline=None)
@given(case=situations())
def test_what_leaves_some_unit_enters_another(case: Situation) -> None:
    for layer in case.census():
        for way in scheme(case.options["alltoall"]).exchange(layer, case.topology):
            assert way.into.sum(axis=1) == pytest.approx(way.out.sum(axis=1))
            assert way.pairs.sum() == pytest.approx(way.out[0].sum())


@settings(max_examples=20, deadline=None)
@given(case=situations())
def test_padding_only_adds(case: Situation) -> None:
    plain, padded = case.report(), case.report(padded=True)
    for way in ("dispatch", "combine", "step"):
        assert padded.seconds[way] >= plain.seconds[way] * (1 - 1e-12)
    assert padded.latency == pytest.approx(plain.latency)


@pytest.mark.parametrize(
    "machine",
    [
        "dgx-h100",
        "dgx-h100-superpod",
    ],
)
@settings(max_examples=20, deadline=None)
@given(case=situations(shapes=[(2, 2, 2), (2, 1, 4)]))
def test_padding_makes_every_link_as_busy_as_the_busiest_of_its_kind(machine: str, case: Situation) -> None:
    """The superpod's racks have an uplink for each rail."""
    topology = Topology.load(machine).with_shape(case.topology.shape)
    for layer in case._replace(topology=topology).census():
        for way in scheme(case.options["alltoall"]).exchange(layer, topology):
            kinds = zip(links(way, topology), links(way.padded(topology), topology), strict=True)
            for (one, padded_one), (other, padded_other) in zip(kinds, kinds, strict=True):  # out and in
                busiest = max(one.vectors.max(), other.vectors.max())
                assert padded_one.vectors == pytest.approx(np.full(one.vectors.shape, busiest))
                assert padded_other.vectors == pytest.approx(np.full(other.vectors.shape, busiest))


@pytest.mark.parametrize("alltoall", RETURNING)
@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 16, 1), (1, 1, 16), (2, 2, 4)])
def test_padding_adds_nothing_where_all_are_equally_busy(alltoall: str, shape: tuple[int, int, int]) -> None:
    """Every pair of experts once."""
    rows, topology = np.array(list(permutations(range(16), 2)))[:, None], H100.with_shape(shape)
    trace = Trace(topk_idx=rows, num_experts=16)
    (layer,) = census(contiguous(16, shape), trace, topology, rule="nearest")
    for way in scheme(alltoall).exchange(layer, topology):
        for plain, padded in zip(links(way, topology), links(way.padded(topology), topology), strict=True):
            assert padded.vectors == pytest.approx(plain.vectors)


@settings(max_examples=15, deadline=None)
@given(case=situations())
def test_training_moves_everything_twice_and_computes_three_times(case: Situation) -> None:
    once, twice = (case.report(passes=passes) for passes in ("forward", "training"))
    for level in LEVELS:
        assert twice.bytes_per_token[level] == pytest.approx(2 * once.bytes_per_token[level])
    for what, times in (("dispatch", 2), ("combine", 2), ("compute", 3)):
        assert twice.seconds[what] == pytest.approx(times * once.seconds[what])
    assert (twice.touched, twice.remote, twice.load) == (once.touched, once.remote, once.load)


@settings(max_examples=15, deadline=None)
@given(case=situations(), factor=st.floats(0.1, 3.0))
def test_a_large_capacity_drops_nothing_and_a_small_one_no_more_than_it_must(
    case: Situation, factor: float
) -> None:
    free, ample, tight = (case.report(capacity_factor=c) for c in (None, 16.0, factor))
    assert free.dropped == ample.dropped == 0.0
    assert ample.seconds == free.seconds
    assert max(0.0, 1 - factor) - 1e-9 <= tight.dropped <= 1.0
    assert tight.seconds["compute"] <= free.seconds["compute"] * (1 + 1e-12)
    assert tight.bytes_per_token == free.bytes_per_token


@settings(max_examples=15, deadline=None)
@given(
    case=situations(),
    sizes=st.tuples(*[st.sampled_from([0.0, 1e3, 1e8])] * 3),
    queueing=st.booleans(),
)
def test_other_traffic_only_adds(case: Situation, sizes: tuple[float, float, float], queueing: bool) -> None:
    background = Background(**dict(zip(LEVELS, sizes, strict=True)), queueing=queueing)
    alone, shared = case.report(), case.report(background=background)
    for what in ("dispatch", "combine", "compute"):
        assert shared.seconds[what] >= alone.seconds[what]
    assert shared.bytes_per_token == alone.bytes_per_token
    if not any(sizes):
        assert shared.seconds == alone.seconds


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 1, 4), (4, 1, 1)])
def test_other_traffic_takes_the_time_of_its_bytes_and_queueing_the_growth(
    shape: tuple[int, int, int],
) -> None:
    """On the one level that is used; the phase and its company fill the link half each, so half the time is its own."""
    level = LEVELS[::-1][[size > 1 for size in shape].index(True)]
    topology = H100.with_shape(shape)
    even = from_matrix(np.ones((4, 4)), topology)
    alone = phase(even, 1e6, topology)
    sent, rate = 3e6, topology.levels[topology.index(level)].effective_bandwidth
    used = dict.fromkeys([level, "server"], sent) if level == "rack" else {level: sent}
    plain, queueing = (
        phase(even, 1e6, topology, background=Background(**used, queueing=each)) for each in (False, True)
    )
    assert plain.seconds == pytest.approx(alone.seconds + sent / rate)
    assert queueing.seconds == pytest.approx(alone.latency + sent / rate * 1.5 + sent / rate)


def test_other_traffic_can_be_what_takes_longest() -> None:
    shape = (1, 2, 2)
    case = Situation(
        contiguous(16, shape), noisy_trace(layers=1), H100.with_shape(shape), {"alltoall": "naive"}
    )
    assert case.report().bottleneck == "server links"
    assert case.report(background=Background(gpu=1e12)).bottleneck == "gpu links"


@settings(max_examples=20, deadline=None)
@given(case=situations(), passes=st.sampled_from(["forward", "training"]))
def test_overlap_hides_no_more_than_the_shorter_of_the_two(case: Situation, passes: str) -> None:
    report = case.report(passes=passes)
    compute = report.seconds["compute"]
    communication = report.seconds["dispatch"] + report.seconds["combine"]
    total = {name: found["total"] for name, found in report.overlap.items()}
    assert total["none"] == pytest.approx(communication + compute)
    assert report.seconds["step"] == pytest.approx(total["none"])
    for name in ("two_batch", "dualpipe"):
        assert total[name] >= max(communication, compute) * (1 - 1e-12)
    assert all(0.0 <= found["exposed"] <= found["total"] for found in report.overlap.values())


# -- topologies ---------------------------------------------------------------------------------------------------

MACHINE = """
description = "four GPUs in a server"
gpu_memory = "80 GB"
hbm_bandwidth = "3 TB/s"
flops_bf16 = "1000 TFLOP/s"
flops_fp8 = "2000 TFLOP/s"
levels = [
  {name = "gpu", fanout = 4, bandwidth = "400 GB/s", efficiency = 1, latency = "1 us", link = "torus", dims = [2, 2]},
  {name = "server", fanout = 2, bandwidth = "50 GB/s", efficiency = 1, latency = "2 us", link = "switch"},
  {name = "rack", fanout = 2, bandwidth = "25 GB/s", efficiency = 1, latency = "3 us", link = "switch"},
]
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("50 GB/s", "0 GB/s", ["server", "bandwidth"]),
        ('"2 us"', "-2e-6", ["latency", "-2e-06"]),
        ("[2, 2]", "[2, 3]", ["gpu", "dims is [2, 3]", "fanout 4"]),
        ('"torus", dims = [2, 2]', '"switch", dims = [2, 2]', ["gpu", "dims", "torus"]),
        ('"torus"', '"ring"', ["gpu", "link", "ring", "switch, mesh, torus"]),
        ('"2 us", link = "switch"', '"2 us", link = "mesh"', ["server", "mesh", "expected switch"]),
        (
            '"2 us", link = "switch"',
            '"2 us", link = "switch", routing = "magic"',
            ["routing", "magic", "ecmp"],
        ),
        ('"2 us", link = "switch"', '"2 us", link = "switch", rails = 1', ["rails is 1", "true or false"]),
    ],
)
def test_an_impossible_machine_is_refused_in_one_line(
    tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(MACHINE)
    assert Topology.load(path).num_ranks == 16
    assert MACHINE.count(old) == 1
    path.write_text(MACHINE.replace(old, new))
    with pytest.raises(InvalidInput) as caught:
        Topology.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *words]), message


@pytest.mark.parametrize(("routing", "share"), [("ideal", 1.0), ("ecmp", 0.65), ("spray", 0.9)])
def test_routing_over_many_paths_costs_its_share_of_the_bandwidth(routing: str, share: float) -> None:
    ideal = H100.with_shape("1x4x2")
    server = replace(ideal.levels[1], routing=routing)
    topology = replace(ideal, levels=(ideal.levels[0], server, ideal.levels[2]))
    even = from_matrix(np.ones((8, 8)), topology)
    best, found = (phase(even, 1e9, each) for each in (ideal, topology))
    assert found.seconds - found.latency == pytest.approx((best.seconds - best.latency) / share)
    assert found.latency == best.latency
