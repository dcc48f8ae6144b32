from __future__ import annotations

import pickle
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import placer.traffic
from placer.errors import InvalidInput
from placer.trace import Trace
from placer.traffic import Routes, Traffic


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    num_experts = draw(st.integers(1, 7))
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 3)), num_experts)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    ids = np.argsort(rng.random(shape), axis=2)[:, :, : draw(st.integers(1, num_experts))]
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.4]))] = -1
    return Trace(
        topk_idx=ids.astype(draw(st.sampled_from([np.int8, np.int16, np.int64]))),
        num_experts=num_experts,
        sequence=rng.integers(0, 4, shape[0]) if draw(st.booleans()) else None,
        source="somewhere",
    )


def equal(one: Traffic, two: Traffic) -> bool:
    return one.num_tokens == two.num_tokens and all(
        np.array_equal(getattr(one, key), getattr(two, key)) for key in ("load", "pairs", "transitions")
    )


def rows(routes: Routes) -> list[Any]:
    """Tokens with their keys, in an order that says nothing about merging."""
    return sorted(zip(routes.key.tolist(), routes.topk_idx.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(trace=traces())
def test_counts_equal_plain_loops(trace: Trace) -> None:
    layers, experts = trace.num_layers, trace.num_experts
    load = np.zeros((layers, experts), int)
    pairs = np.zeros((layers, experts, experts), int)
    moves = np.zeros((layers - 1, experts, experts), int)
    for token in trace.topk_idx.tolist():
        for layer, chosen in enumerate(token):
            here = [e for e in chosen if e >= 0]
            for e in here:
                load[layer, e] += 1
                for f in here:
                    if e != f:
                        pairs[layer, e, f] += 1
                for f in token[layer + 1] if layer + 1 < layers else []:
                    if f >= 0:
                        moves[layer, e, f] += 1
    found = Traffic.from_trace(trace, transitions=True)
    assert found.num_tokens == trace.num_tokens
    assert np.array_equal(found.load, load)
    assert found.pairs is not None
    assert np.array_equal(found.pairs, pairs)
    assert found.transitions is not None
    assert np.array_equal(found.transitions, moves)
    assert Traffic.from_trace(trace).transitions is None


@settings(max_examples=40, deadline=None)
@given(trace=traces(), data=st.data())
def test_merged_shards_equal_the_whole(trace: Trace, data: st.DataObject) -> None:
    first = np.array(data.draw(st.lists(st.booleans(), min_size=trace.num_tokens, max_size=trace.num_tokens)))
    if first.all() or not first.any():
        return
    whole = Traffic.from_trace(trace, transitions=True)
    one, two = (Traffic.from_trace(trace.select(part), transitions=True) for part in (first, ~first))
    assert equal(one + two, whole)
    assert equal(two + one, whole)


def test_long_traces_are_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    trace = Trace(topk_idx=np.argsort(rng.random((50, 2, 6)), axis=2)[:, :, :3], num_experts=6)
    whole = Traffic.from_trace(trace, transitions=True)
    monkeypatch.setattr(placer.traffic, "_CHUNK_TOKENS", 7)
    assert equal(Traffic.from_trace(trace, transitions=True), whole)


def test_what_one_shard_lacks_the_sum_lacks() -> None:
    trace = Trace(topk_idx=np.array([[[0, 1], [1, 0]]]), num_experts=2)
    full = Traffic.from_trace(trace, transitions=True)
    loads = Traffic(num_tokens=3, load=np.array([[3, 3], [2, 4]]))
    total = full + loads
    assert total.num_tokens == 4
    assert total.load.tolist() == [[4, 4], [3, 5]]
    assert total.pairs is None
    assert total.transitions is None
    assert (full + Traffic.from_trace(trace)).transitions is None


def test_shards_of_another_shape_are_refused() -> None:
    one = Traffic(num_tokens=1, load=np.array([[1, 1]]))
    for load in (np.array([[1, 1, 1]]), np.array([[1, 1], [1, 1]])):
        with pytest.raises(InvalidInput, match=r"traffic: found loads of shape .*expected \(1, 2\)"):
            one + Traffic(num_tokens=1, load=load)
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]


@pytest.mark.parametrize(
    "wrong",
    [
        {"pairs": np.zeros((1, 2, 2), int)},
        {"pairs": np.zeros((2, 2, 3), int)},
        {"transitions": np.zeros((2, 2, 2), int)},
        {"transitions": np.zeros((0, 2, 2), int)},
    ],
)
def test_tables_of_a_wrong_shape_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="expected"):
        Traffic(num_tokens=1, load=np.array([[1, 1], [1, 1]]), **wrong)


@pytest.mark.parametrize("load", [np.array([1, 2]), np.array([[1.5, 2.0]])])
def test_loads_that_are_no_counts_are_refused(load: Any) -> None:
    with pytest.raises(InvalidInput, match="load"):
        Traffic(num_tokens=1, load=load)


def test_counts_cannot_be_changed_and_arrays_given_stay_writable() -> None:
    load = np.array([[1, 2]])
    traffic = Traffic(num_tokens=2, load=load)
    with pytest.raises(ValueError, match="read-only"):
        traffic.load[0, 0] = 5
    load[0, 0] = 7  # a view is frozen, not the array that was given


# -- the graph ------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(trace=traces())
def test_the_graph_has_loads_on_nodes_and_pair_counts_on_edges(trace: Trace) -> None:
    traffic = Traffic.from_trace(trace)
    assert traffic.pairs is not None
    for layer in range(trace.num_layers):
        graph = traffic.coactivation_graph(layer)
        assert type(graph) is nx.Graph
        assert list(graph) == list(range(trace.num_experts))
        assert [graph.nodes[e]["load"] for e in graph] == traffic.load[layer].tolist()
        assert nx.number_of_selfloops(graph) == 0
        assert all(weight > 0 for _, _, weight in graph.edges(data="weight"))
        table = nx.to_numpy_array(graph, nodelist=range(trace.num_experts))
        assert np.array_equal(table, traffic.pairs[layer])


def test_the_graph_can_be_cut_and_written_by_networkx() -> None:
    trace = Trace(topk_idx=np.array([[[0, 1]]] * 5 + [[[2, 3]]] * 5 + [[[1, 2]]]), num_experts=4)
    graph = Traffic.from_trace(trace).coactivation_graph(0)
    assert nx.stoer_wagner(graph)[0] == 1
    assert "\n".join(nx.generate_gml(graph))  # plain Python numbers


def test_loads_alone_give_no_graph() -> None:
    with pytest.raises(InvalidInput, match="loads only"):
        Traffic(num_tokens=1, load=np.array([[1, 1]])).coactivation_graph(0)


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there_has_no_graph(layer: int) -> None:
    traffic = Traffic.from_trace(Trace(topk_idx=np.array([[[0, 1], [0, 1]]]), num_experts=2))
    with pytest.raises((InvalidInput, IndexError)):
        traffic.coactivation_graph(layer)


# -- routes ---------------------------------------------------------------------------------------------------


def shard(sequences: list[int], seed: int, source: str = "corpus") -> Routes:
    """Tokens of some sequences, three experts out of six each."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((len(sequences), 2, 6)), axis=2)[:, :, :3]
    return Routes.from_trace(Trace(topk_idx=ids, num_experts=6, sequence=np.array(sequences), source=source))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=6, max_size=9),
    budget=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_a_sample_does_not_depend_on_the_order_of_merging(sizes: list[int], budget: int, seed: int) -> None:
    sequences = [[s] * size for s, size in enumerate(sizes)]
    parts = [[s for part in sequences[i::3] for s in part] for i in range(3)]
    a, b, c = (shard(part, seed + i) for i, part in enumerate(parts))
    expected = rows((a + b + c).sample(budget))
    assert rows((c + b + a).sample(budget)) == expected
    assert rows((b + (a + c)).sample(budget)) == expected


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=6, max_size=9),
    budget=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_shards_may_be_sampled_before_they_are_merged(sizes: list[int], budget: int, seed: int) -> None:
    sequences = [[s] * size for s, size in enumerate(sizes)]
    a, b, c = (shard([s for part in sequences[i::3] for s in part], seed + i) for i in range(3))
    expected = rows((a + b + c).sample(budget))
    assert rows((a.sample(budget) + b.sample(budget) + c.sample(budget)).sample(budget)) == expected
    assert rows(((a + b).sample(budget) + c).sample(budget)) == expected


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    budget=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_a_sample_is_the_whole_sequences_with_the_smallest_keys(
    sizes: list[int], budget: int, seed: int
) -> None:
    routes = shard([s for s, size in enumerate(sizes) for _ in range(size)], seed)
    found = routes.sample(budget)
    count: dict[int, int] = {}
    for key in routes.key.tolist():
        count[key] = count.get(key, 0) + 1
    kept: list[int] = []
    used = 0
    for key in sorted(count):
        if kept and used >= budget:
            break
        kept.append(key)
        used += count[key]
    assert rows(found) == [row for row in rows(routes) if row[0] in kept]
    assert found.num_tokens >= min(budget, routes.num_tokens)


def test_a_large_budget_keeps_every_token_in_its_order() -> None:
    routes = shard([3, 1, 3, 2], 0)
    found = routes.sample(4)
    assert np.array_equal(found.topk_idx, routes.topk_idx)
    assert np.array_equal(found.key, routes.key)


@settings(max_examples=40, deadline=None)
@given(sequences=st.lists(st.integers(0, 3), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_the_key_of_a_sequence_does_not_depend_on_its_shard(sequences: list[int], seed: int) -> None:
    if len(set(sequences)) < 2:
        return
    ids = np.argsort(np.random.default_rng(seed).random((len(sequences), 1, 4)), axis=2)[:, :, :2]
    trace = Trace(topk_idx=ids, num_experts=4, sequence=np.array(sequences), source="corpus")
    whole = Routes.from_trace(trace)
    numbers = np.array(sequences)
    for chosen in (numbers % 2 == 0, numbers == sequences[0]):
        if chosen.any():
            part = Routes.from_trace(trace.select(chosen))
            assert part.key.tolist() == whole.key[chosen].tolist()


def test_shards_of_one_sequence_each_stay_two_sequences() -> None:
    one, two = shard([1] * 4, 0), shard([2] * 4, 1)
    assert not set(one.key.tolist()) & set(two.key.tolist())
    assert len(set((one + two).key.tolist())) == 2


def test_equal_sequence_ids_of_two_sources_are_two_sequences() -> None:
    both = shard([1, 1], 0, "one") + shard([1, 1], 1, "two")
    assert len(set(both.key.tolist())) == 2
    assert both.sample(2).num_tokens == 2


def test_routes_that_do_not_fit_together_are_refused() -> None:
    one = Routes.from_trace(Trace(topk_idx=np.zeros((2, 1, 1), int), num_experts=2))
    for ids, experts in (
        (np.zeros((2, 2, 1), int), 2),
        (np.array([[[0, 1]]]), 2),
        (np.zeros((2, 1, 1), int), 3),
    ):
        with pytest.raises(InvalidInput, match="routes: found"):
            one + Routes.from_trace(Trace(topk_idx=ids, num_experts=experts))
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]


def test_merging_keeps_the_experts_of_both_integer_types() -> None:
    small = Routes.from_trace(Trace(topk_idx=np.array([[[200]]], np.uint8), num_experts=300))
    signed = Routes.from_trace(Trace(topk_idx=np.array([[[-1]]], np.int8), num_experts=300))
    large = Routes.from_trace(Trace(topk_idx=np.array([[[299]]], np.uint64), num_experts=300))
    assert (small + signed).topk_idx.ravel().tolist() == [200, -1]
    merged = (signed + large).topk_idx
    assert merged.dtype.kind == "i"
    assert merged.ravel().tolist() == [-1, 299]


def test_counts_and_routes_travel_to_other_processes() -> None:
    trace = Trace(topk_idx=np.array([[[0, 1]], [[1, 2]]]), num_experts=3)
    assert equal(pickle.loads(pickle.dumps(Traffic.from_trace(trace))), Traffic.from_trace(trace))
    assert rows(pickle.loads(pickle.dumps(Routes.from_trace(trace)))) == rows(Routes.from_trace(trace))
