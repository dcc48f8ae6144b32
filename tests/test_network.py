"""The network in the loop: its matrices, its description, its verdicts, and bytes over real sockets."""

from __future__ import annotations

import re
import subprocess
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fcntl", reason="network namespaces are Linux's")

from benchmarks.network import emulation, rank
from benchmarks.network.__main__ import main
from benchmarks.network.exchange import Run, exchange
from benchmarks.network.matrices import patterns, scaled, vectors
from benchmarks.network.measurement import Measurement, Saving, ordered, verdicts
from placer import Placement, Topology
from placer.errors import InvalidInput, PlacerError
from placer.flows import from_matrix
from placer.timing import phase_seconds
from tests.instances import noisy_trace

SCALE_UP, NIC, OVERSUBSCRIPTION = 8e6, 1e6, 2.0


def small(shape: tuple[int, int, int] = (2, 2, 2)) -> Topology:
    return emulation.machine(shape, scale_up=SCALE_UP, nic=NIC, oversubscription=OVERSUBSCRIPTION)


def walked_seconds(matrix: np.ndarray, shape: tuple[int, int, int]) -> float:
    """The busiest link, by walking every pair of ranks over every link between them."""
    racks, servers, gpus = shape
    carried: dict[tuple[str, int, str], float] = {}
    rates = {"scaleup": SCALE_UP, "nic": NIC, "uplink": NIC * servers * gpus / OVERSUBSCRIPTION}
    for source, target in permutations(range(racks * servers * gpus), 2):
        same_server = source // gpus == target // gpus
        way = [("scaleup" if same_server else "nic", source, target)]
        rack, other = source // (gpus * servers), target // (gpus * servers)
        if rack != other:
            way.append(("uplink", rack, other))
        for kind, start, end in way:
            for link in ((kind, start, "out"), (kind, end, "in")):
                carried[link] = carried.get(link, 0.0) + matrix[source, target]
    return max(size / (rates[kind] * 1448 / 1514) for (kind, _, _), size in carried.items())


def measurement(name: str, predicted: float, *seconds: float, size: float = 3.2e8) -> Measurement:
    runs = tuple(Run(seconds=s, retransmits=0, busy=0.5) for s in seconds)
    return Measurement(name=name, bytes=size, predicted=predicted, runs=runs)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)).filter(lambda s: np.prod(s) > 1),
    seed=st.integers(0, 1000),
    density=st.sampled_from([0.2, 1.0]),
)
def test_the_prediction_is_the_busiest_link_of_a_walk_over_all_pairs(
    shape: tuple[int, int, int], seed: int, density: float
) -> None:
    rng = np.random.default_rng(seed)
    ranks = int(np.prod(shape))
    matrix = rng.pareto(1.5, size=(ranks, ranks)) * (rng.random((ranks, ranks)) < density) * 1e6
    predicted = phase_seconds(from_matrix(matrix, small(shape)), 1.0, small(shape))
    assert predicted == pytest.approx(walked_seconds(matrix, shape), rel=1e-12)


def test_patterns_are_square_without_diagonal_and_go_where_they_say() -> None:
    drawn = patterns(small((2, 2, 4)), np.random.default_rng(0))
    assert len(drawn) == 6
    for weights in drawn.values():
        assert weights.shape == (16, 16)
        assert not weights.diagonal().any()
        assert weights.min() == 0 < weights.max()
    incast = drawn["incast"]
    assert not incast[:, 4:].any()
    assert not incast[:4].any()
    assert drawn["server_local"][0, 3] == 10 * drawn["server_local"][0, 4]
    assert drawn["rack_local"][0, 7] == 10 * drawn["rack_local"][0, 8]
    assert drawn["hot_rank"][0].max() == 5 * drawn["hot_rank"][0, 1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), total=st.integers(0, 10**9))
def test_scaled_bytes_add_up_and_stay_within_one_of_their_share(seed: int, total: int) -> None:
    weights = np.random.default_rng(seed).random((5, 5)) * ~np.eye(5, dtype=bool)
    sizes = scaled(weights, total)
    assert sizes.sum() == total
    assert not sizes.diagonal().any()
    assert np.abs(sizes - weights * (total / weights.sum())).max() <= 1


def test_a_matrix_without_traffic_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no traffic"):
        scaled(np.zeros((2, 2)), 100)


def test_vectors_are_counted_once_for_each_gpu_that_a_token_touches() -> None:
    trace = noisy_trace()
    rng = np.random.default_rng(0)
    experts, ranks = trace.num_experts, 8
    slots = np.stack([rng.permutation(experts) for _ in range(trace.num_layers)]).astype(np.int32)
    placement = Placement(physical_to_logical=slots, num_experts=experts, shape=(2, 2, 2))
    home = rng.integers(ranks, size=trace.num_tokens).astype(np.int32)
    expected = np.zeros((ranks, ranks))
    for layer in range(trace.num_layers):
        rank_of = {int(expert): slot // (experts // ranks) for slot, expert in enumerate(slots[layer])}
        for token in range(trace.num_tokens):
            for target in {rank_of[int(e)] for e in trace.topk_idx[token, layer] if e >= 0}:
                expected[home[token], target] += target != home[token]
    np.testing.assert_array_equal(vectors(placement, trace, home), expected)


def test_copies_have_no_single_rank_and_are_refused() -> None:
    trace = noisy_trace()
    slots = np.tile(np.append(np.arange(trace.num_experts), 0), (trace.num_layers, 1)).astype(np.int32)
    placement = Placement(physical_to_logical=slots, num_experts=trace.num_experts, shape=(1, 1, 1))
    with pytest.raises(InvalidInput, match="copies"):
        vectors(placement, trace, np.zeros(trace.num_tokens, np.int32))


def test_every_link_direction_has_a_bucket_of_its_rate() -> None:
    (_, outer), inner = emulation.commands(small((2, 2, 4)))
    lines = outer + [line for _, queues in inner.values() for line in queues]
    found: dict[str, list[float]] = {}
    for line in lines:
        rate = re.search(r"dev (\S+) .* rate (\d+)bit", line)
        assert rate is not None
        found.setdefault(re.sub(r"\d+$", "", rate[1]), []).append(int(rate[2]) / 8)
    assert found == {
        "scaleup": [SCALE_UP] * 32,
        "nic": [NIC] * 32,
        "out": [NIC * 8 / OVERSUBSCRIPTION] * 2,
        "in": [NIC * 8 / OVERSUBSCRIPTION] * 2,
    }


def test_only_switched_machines_of_three_levels_are_built() -> None:
    with pytest.raises(InvalidInput, match="mesh"):
        emulation.commands(Topology.load("mi300x").with_shape("1x1x8"))
    with pytest.raises(InvalidInput, match="at most 256"):
        emulation.commands(small((1, 33, 8)))


def test_verdicts_name_what_fails() -> None:
    kept = [measurement("a", 1.0, 1.0, 1.1, 1.2), measurement("b", 1.2, 1.3)]
    assert ordered(kept) == (1, [])
    assert kept[0].measured == 1.1
    swapped = [measurement("a", 1.0, 1.35), measurement("b", 1.2, 1.3), measurement("c", 1.25, 1.25)]
    saving = Saving(trace="t", linear=measurement("l", 2.0, 2.0), optimised=measurement("o", 1.0, 1.2))
    assert saving.predicted == 0.5
    assert saving.measured == pytest.approx(0.4)
    said = "\n".join(verdicts(swapped, [saving], dropped=3))
    assert "1.30 from 300 MB on: NO (1.000 to 1.350)" in said
    assert "NO (2 pairs, not a and b, not a and c)" in said
    assert "NO (-20.0%)" in said
    assert "dropped: 3" in said
    assert "300 MB" not in "\n".join(verdicts([measurement("a", 1.0, 9.0, size=1e6)], [], dropped=0))


def test_a_run_where_no_network_can_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.network.__main__.unavailable", lambda: "network namespaces need root")
    done = CliRunner().invoke(main, ["run"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output == "skipped: network namespaces need root\n"


@pytest.fixture
def possible() -> None:
    if reason := emulation.unavailable():
        pytest.skip(reason)


def namespaces() -> list[str]:
    return sorted(
        path.name for path in Path("/run/netns").glob("*") if path.name.startswith(emulation.PREFIX)
    )


@pytest.mark.usefixtures("possible")
def test_the_bytes_sent_arrive_at_the_rates_set_and_the_network_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = small()
    matrix = scaled(patterns(topology, np.random.default_rng(0))["pareto"], 2_000_000)
    matrix[1, 2] = 0
    matrix[3] = 0
    bound = phase_seconds(from_matrix(matrix.astype(float), topology), 1.0, topology)
    with emulation.network(topology) as dropped:
        assert len(namespaces()) == topology.num_ranks + 1
        assert dropped() >= 0
        assert exchange(matrix, verify=True).seconds > 0.75 * bound  # buckets start full: 64 kB for nothing
        monkeypatch.setattr(rank, "wire", lambda source, target, wire=rank.wire: wire(target, source))
        with pytest.raises(PlacerError, match="found other bytes than rank"):
            exchange(np.minimum(matrix, 1000), verify=True)
    assert not namespaces()


@pytest.mark.usefixtures("possible")
def test_no_namespace_stays_after_an_interrupt_or_a_killed_run() -> None:
    left = f"{emulation.PREFIX}gpu999"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with subprocess.Popen(["ip", "netns", "exec", left, "sleep", "60"]) as sleeper:
        with pytest.raises(KeyboardInterrupt), emulation.network(small((1, 1, 2))):  # noqa: PT012
            assert namespaces() == [f"{emulation.PREFIX}{name}" for name in ("gpu0", "gpu1", "switches")]
            raise KeyboardInterrupt
        assert not namespaces()
        sleeper.wait(timeout=30)


@pytest.mark.usefixtures("possible")
def test_a_rank_that_fails_ends_the_exchange_with_its_reason() -> None:
    with emulation.network(small((1, 1, 2))):
        matrix = np.array([[0, 10, 10], [10, 0, 10], [10, 10, 0]])  # there is no third rank
        with pytest.raises(PlacerError, match=r"rank 2: .*namespace"):
            exchange(matrix)
