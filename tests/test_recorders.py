"""Recorders of serving stacks: SGLang's dumps, TensorRT-LLM's statistics, load matrices and vLLM's load lines."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors_bytes import safetensors
from terminal import placer

from placer import Trace, formats
from placer.counts import Counts
from placer.errors import InvalidInput
from placer.formats import Hints

I32, I64 = np.int32, np.int64


def read(*paths: Path, **hints: Any) -> Trace | Counts:
    return formats.read(paths, hints=Hints(**hints))


def trace_of(*paths: Path, **hints: Any) -> Trace:
    found = read(*paths, **hints)
    assert isinstance(found, Trace)
    return found


def counts_of(*paths: Path, **hints: Any) -> Counts:
    found = read(*paths, **hints)
    assert isinstance(found, Counts)
    return found


def refused(match: str, *paths: Path, name: str | None = None, **hints: Any) -> None:
    with pytest.raises(InvalidInput, match=match) as caught:
        formats.read(paths, name=name, hints=Hints(**hints))
    message = str(caught.value)
    assert "\n" not in message
    assert any(str(path) in message for path in paths)


# -- SGLang ----------------------------------------------------------------------------------------------

# Layer 0 is dense: its map is the trivial one. 4 experts in 6 slots.
MAP = np.array([[0, 1, 2, 3, 0, 1], [3, 0, 1, 2, 0, 2], [0, 1, 2, 3, 3, 2]], I64)


def token_pass(step: int, rank: int, topk: Any, **other: Any) -> dict[str, Any]:
    """A record of the mode per_token; `topk` are slots (layers, tokens, columns), here two of the eight columns."""
    slots = np.full((len(topk), len(topk[0]), 8), -1, I32)
    if slots.shape[1]:
        slots[:, :, : len(topk[0][0])] = topk
    tokens = slots.shape[1]
    return {
        "forward_pass_id": step,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": list(range(tokens)),
        "positions": list(range(tokens)),
        "extend_seq_lens": [tokens],
        "forward_mode": 1,
        "topk_ids_of_layer": slots,
        "misc_objects": [],
        "global_physical_count": np.zeros((len(topk), 6), I32),
        **other,
    }


def load_pass(step: int, rank: int, count: Any) -> dict[str, Any]:
    return {
        "forward_pass_id": step,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": np.array(count, I32),
    }


def dump(path: Path, records: list[dict[str, Any]], held: Any = MAP) -> Path:
    document = {"records": records, "last_physical_to_logical_map": held}
    return torch_bytes.save(path, document, device="cuda:0")


NONE = [[-1, -1], [-1, -1]]
FIRST = token_pass(7, 0, [NONE, [[0, 4], [5, 2]], [[0, 1], [3, 5]]])
SECOND = token_pass(8, 1, [[[-1, -1]], [[3, 1]], [[4, 2]]])


def test_tokens_of_sglang_are_mapped_back_from_slots(tmp_path: Path) -> None:
    dump(tmp_path / "expert_distribution_recorder_1.5_0.pt", [FIRST])
    dump(tmp_path / "expert_distribution_recorder_1.5_1.pt", [SECOND])
    assert formats.sniffed(tmp_path) == "sglang_recorder"
    trace = trace_of(tmp_path)
    assert trace.topk_idx.tolist() == [[[3, 0], [0, 1]], [[2, 1], [3, 2]], [[2, 0], [3, 2]]]
    assert trace.layer_ids == (1, 2)
    assert trace.num_experts == 4
    assert trace.step is not None
    assert trace.step.tolist() == [7, 7, 8]
    assert trace.source_rank is not None
    assert trace.source_rank.tolist() == [0, 0, 1]
    assert trace.sequence is not None
    assert trace.sequence.tolist() == [0, 0, 1]
    assert trace.phase == "prefill"


def test_files_of_sglang_may_be_named_one_by_one_in_any_order(tmp_path: Path) -> None:
    one = dump(tmp_path / "one.pt", [FIRST])
    two = dump(tmp_path / "two.pt", [SECOND])
    assert formats.sniffed(one) == "sglang_recorder"
    assert trace_of(two, one).digest == trace_of(one, two).digest == trace_of(tmp_path).digest


def test_requests_of_a_prefill_are_sequences_and_decode_has_none(tmp_path: Path) -> None:
    topk = [[[-1, -1]] * 3, [[0, 4], [5, 2], [0, 1]], [[0, 1], [3, 5], [0, 2]]]
    two = token_pass(1, 0, topk, extend_seq_lens=[1, 2])
    found = trace_of(dump(tmp_path / "prefill.pt", [two, token_pass(2, 0, topk)])).sequence
    assert found is not None
    assert found.tolist() == [0, 1, 1, 2, 2, 2]
    mixed = trace_of(dump(tmp_path / "mixed.pt", [two, token_pass(2, 0, topk, extend_seq_lens=None)]))
    assert mixed.sequence is None
    assert mixed.phase is None


def test_padding_and_idle_passes_are_left_out(tmp_path: Path) -> None:
    padded = token_pass(1, 0, [NONE, [[0, 4], [-1, -1]], [[0, 1], [-1, -1]]])
    idle = token_pass(2, 0, [[], [], []])
    trace = trace_of(dump(tmp_path / "a.pt", [padded, idle]))
    assert trace.topk_idx.tolist() == [[[3, 0], [0, 1]]]


def test_ranks_that_saw_the_same_tokens_are_taken_once(tmp_path: Path) -> None:
    other_copies = token_pass(7, 1, [NONE, [[0, 1], [3, 2]], [[0, 1], [4, 2]]])  # of the same experts
    paths = [dump(tmp_path / "0.pt", [FIRST]), dump(tmp_path / "1.pt", [other_copies])]
    with pytest.warns(UserWarning, match="ranks 1 recorded the same tokens"):
        trace = trace_of(*paths)
    assert trace.num_tokens == 2
    assert trace.source_rank is not None
    assert set(trace.source_rank.tolist()) == {0}


def test_ranks_that_begin_alike_are_both_taken(tmp_path: Path) -> None:
    prompt = [[0, 4]] * 100
    topk = [[[-1, -1]] * 101, [*prompt, [5, 2]], [*prompt, [0, 1]]]
    other = [*topk[:2], [*prompt, [0, 2]]]
    paths = [
        dump(tmp_path / f"{rank}.pt", [token_pass(7, rank, ids)]) for rank, ids in enumerate((topk, other))
    ]
    assert trace_of(*paths).num_tokens == 202


def test_hints_name_layers_of_sglang(tmp_path: Path) -> None:
    path = dump(tmp_path / "a.pt", [FIRST])
    assert trace_of(path, layer_ids=(2,)).topk_idx.tolist() == [[[0, 1]], [[3, 2]]]
    assert trace_of(path, layer_ids=(2,)).layer_ids == (2,)
    refused("found 3 layers, --layer-ids names 2", path, layer_ids=(2, 3))
    refused("found 4 experts, expected 8", path, num_experts=8)
    refused("found 2 experts a token, expected 4", path, top_k=4)


def test_loads_of_sglang_passes_add_up_over_ranks(tmp_path: Path) -> None:
    rows = [[0] * 6, [1, 2, 3, 4, 5, 6], [1, 0, 0, 0, 0, 0]]
    dump(tmp_path / "0.pt", [load_pass(1, 0, rows), load_pass(2, 0, rows)])
    dump(tmp_path / "1.pt", [load_pass(1, 1, [[0] * 6, [0, 0, 0, 10, 0, 0], [0] * 6])])
    counts = counts_of(tmp_path)
    assert counts.layer_ids == (1, 2)
    assert counts.load.tolist() == [[14, 6, 30, 2], [2, 0, 0, 0]]


def test_statistics_of_sglang_add_up_over_the_ring(tmp_path: Path) -> None:
    steps = np.zeros((4, 3, 4), I32)  # the last two rows of the ring were never written
    steps[0, 1], steps[1, 1], steps[1, 2] = [1, 2, 3, 4], [10, 0, 0, 0], [0, 0, 0, 7]
    document = {"rank": 0, "logical_count": steps, "average_utilization_rate_over_window": None}
    path = torch_bytes.save(tmp_path / "expert_distribution_recorder_1.5.pt", document)
    assert formats.sniffed(path) == "sglang_recorder"
    counts = counts_of(path, model="toy")
    assert (counts.layer_ids, counts.model) == ((1, 2), "toy")
    assert counts.load.tolist() == [[11, 2, 3, 4], [0, 0, 0, 7]]
    assert counts_of(path, layer_ids=(0, 1, 2)).load.tolist() == [[0] * 4, [11, 2, 3, 4], [0, 0, 0, 7]]


def test_what_torch_saves_of_sglang_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    document = {
        "records": [{**FIRST, "topk_ids_of_layer": torch.from_numpy(FIRST["topk_ids_of_layer"])}],
        "last_physical_to_logical_map": torch.from_numpy(MAP),
    }
    document["records"][0]["global_physical_count"] = torch.zeros((3, 6), dtype=torch.int32)
    torch.save(document, tmp_path / "real.pt")
    own = dump(tmp_path / "own.pt", [FIRST])
    assert trace_of(tmp_path / "real.pt").digest == trace_of(own).digest


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 999), ranks=st.integers(1, 3), steps=st.integers(1, 3), top_k=st.integers(1, 4))
def test_any_recording_of_sglang_gives_back_its_experts(
    seed: int, ranks: int, steps: int, top_k: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    held = np.stack([rng.permutation(np.r_[np.arange(5), rng.integers(5, size=3)]) for _ in range(2)]).astype(
        I64
    )
    expected, passes = [], {rank: [] for rank in range(ranks)}  # type: ignore[var-annotated]
    for step in range(steps):
        for rank in range(ranks):
            chosen = np.argsort(rng.random((4, 2, 5)), axis=2)[:, :, :top_k]  # tokens, layers, k
            slots = [
                [[rng.choice(np.flatnonzero(held[layer] == e)) for e in token[layer]] for token in chosen]
                for layer in range(2)
            ]
            passes[rank].append(token_pass(step, rank, slots, global_physical_count=np.zeros((2, 8), I32)))
            expected.append(chosen)
    folder = tmp_path / f"{seed}_{ranks}_{steps}_{top_k}"
    folder.mkdir(exist_ok=True)
    for rank, records in passes.items():
        dump(folder / f"{rank}.pt", records, held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = trace_of(folder, layer_ids=(3, 4))
    assert np.array_equal(trace.topk_idx, np.concatenate(expected))
    assert trace.layer_ids == (3, 4)


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([], "records: found"),
        ("many", "records: found 'many'"),
        ([7], r"records\[0\]: found 7"),
        ([without(FIRST, "rank")], r"records\[0\]: rank: found None"),
        ([{**FIRST, "forward_pass_id": -1}], "forward_pass_id: found -1"),
        ([{**FIRST, "rank": "0"}], "rank: found '0'"),
        ([{**FIRST, "topk_ids_of_layer": [[1]]}], "topk_ids_of_layer: found"),
        ([{**FIRST, "topk_ids_of_layer": np.zeros((2, 1, 8), I32)}], r"found int32 of shape \(2, 1, 8\)"),
        ([{**FIRST, "topk_ids_of_layer": np.zeros((3, 1, 8))}], "found float64 of shape"),
        ([{**FIRST, "topk_ids_of_layer": np.zeros((3, 1, 0), I32)}], r"found int32 of shape \(3, 1, 0\)"),
        (
            [token_pass(1, 0, [NONE, [[0, 6], [5, 2]], NONE])],
            "found slot 6, .*--disable-shared-experts-fusion",
        ),
        ([token_pass(1, 0, [NONE, [[0, -2], [5, 2]], NONE])], "found slot -2, expected -1 to 5"),
        ([token_pass(1, 0, [NONE, [[1, 4], [5, 2]], NONE])], "twice .*did experts move"),
        ([token_pass(1, 0, [NONE, NONE, NONE])], "found nothing in any of 3 layers"),
        ([token_pass(1, 0, [[], [], []])], "found no token in 1 passes"),
        ([FIRST, FIRST], "pass 7 of rank 0 is also in"),
        ([FIRST, load_pass(8, 0, np.zeros((3, 6)))], "holds tokens .per_token., other files only loads"),
        ([load_pass(1, 0, np.zeros((3, 5)))], r"loads of shape \(3, 5\), the map has \(3, 6\)"),
        ([load_pass(1, 0, -np.ones((3, 6)))], "found -1 at"),
        ([load_pass(1, 0, np.zeros((3, 6)))], "found nothing in any of 3 layers"),
        ([{**load_pass(1, 0, [[0]]), "global_physical_count": None}], "found dtype object"),
    ],
)
def test_wrong_records_of_sglang_are_refused(records: Any, match: str, tmp_path: Path) -> None:
    path = torch_bytes.save(tmp_path / "a.pt", {"records": records, "last_physical_to_logical_map": MAP})
    refused(match, path)


@pytest.mark.parametrize(
    ("held", "match"),
    [
        (None, "last_physical_to_logical_map: found"),
        (MAP.astype(np.float32), "last_physical_to_logical_map: found float32"),
        (MAP[0], r"found int64 of shape \(6,\)"),
        (np.where(MAP == 3, 2, MAP) + (np.arange(6) == 5) * 2, "layer 0 holds no expert|holds no expert"),
        (MAP - 2, "experts from -2 to 1"),
        (MAP + 10**6, "experts from 1000000"),
    ],
)
def test_wrong_maps_of_sglang_are_refused(held: Any, match: str, tmp_path: Path) -> None:
    path = torch_bytes.save(tmp_path / "a.pt", {"records": [FIRST], "last_physical_to_logical_map": held})
    refused(match, path)


def test_an_empty_slot_serves_no_token(tmp_path: Path) -> None:
    held = np.c_[MAP, np.full(3, -1)]
    used = token_pass(1, 0, [NONE, [[0, 6], [5, 2]], NONE])
    refused("token of layer 1 in a slot that holds no expert", dump(tmp_path / "a.pt", [used], held))
    assert trace_of(dump(tmp_path / "b.pt", [FIRST], held)).num_tokens == 2
    full = load_pass(1, 0, np.ones((3, 7)))
    refused("found load in a slot that holds no expert", dump(tmp_path / "c.pt", [full], held))


def test_dumps_of_sglang_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    stat = torch_bytes.save(tmp_path / "stat.pt", {"rank": 0, "logical_count": np.ones((1, 3, 4), I32)})
    tokens = dump(tmp_path / "tokens.pt", [FIRST])
    refused("holds loads alone", tokens, stat)
    wider = dump(tmp_path / "wider.pt", [{**SECOND, "topk_ids_of_layer": np.zeros((2, 1, 8), I32)}], MAP[:2])
    refused("its map has another size", tokens, wider)
    odd = torch_bytes.save(tmp_path / "odd.pt", {"forward_pass_id": 1})
    refused("found no records and no logical_count", odd)
    wrong = torch_bytes.save(tmp_path / "wrong.pt", {"rank": 0, "logical_count": [1, 2]})
    refused("logical_count: found", wrong)
    (tmp_path / "empty").mkdir()
    refused("found no .pt file", tmp_path / "empty", name="sglang_recorder")


# -- TensorRT-LLM ----------------------------------------------------------------------------------------


def statistics(folder: Path, files: dict[str, dict[str, Any]], meta: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    meta = {"num_experts": 4, "num_experts_per_token": 2} if meta is None else meta
    (folder / "meta_info.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    for name, tensors in files.items():
        arrays = {key: np.asarray(value, I32) for key, value in tensors.items()}
        (folder / f"{name}.safetensors").write_bytes(safetensors(arrays))
    return folder


LOADS = {
    "rank0": {"100_3": [1, 2, 3, 4], "101_3": [1, 0, 0, 0], "100_4": [0, 0, 5, 5], "101_4": [1, 0, 0, 0]},
    "rank1": {"100_3": [0, 0, 0, 9], "100_4": [2, 2, 2, 2]},
}
TOKENS = {
    "rank0_raw": {"100_3": [[0, 1], [2, 3]], "100_4": [[3, 2], [1, 0]]},
    "rank1_raw": {"100_3": [[1, 3]], "100_4": [[0, 3]], "99_3": [[2, 1]], "99_4": [[2, 3]]},
}


def test_loads_of_tensorrt_llm_add_up_over_ranks_and_iterations(tmp_path: Path) -> None:
    folder = statistics(tmp_path / "stats", LOADS)
    assert formats.sniffed(folder) == "tensorrt_llm_recorder"
    counts = counts_of(folder)
    assert counts.load.tolist() == [[2, 2, 3, 13], [3, 2, 7, 7]]
    assert (counts.layer_ids, counts.name) == ((3, 4), "stats")
    assert counts_of(folder, layer_ids=(4,)).load.tolist() == [[3, 2, 7, 7]]


def test_tokens_of_tensorrt_llm_are_preferred_to_loads(tmp_path: Path) -> None:
    trace = trace_of(statistics(tmp_path / "stats", {**LOADS, **TOKENS}))
    assert trace.topk_idx.tolist() == [[[2, 1], [2, 3]], [[0, 1], [3, 2]], [[2, 3], [1, 0]], [[1, 3], [0, 3]]]
    assert trace.layer_ids == (3, 4)
    assert trace.step is not None
    assert trace.step.tolist() == [99, 100, 100, 100]
    assert trace.source_rank is not None
    assert trace.source_rank.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"rank0": {"100_3": [1, 2, 3]}}, r"100_3: found int32 of shape \(3,\), expected \(4,\) loads"),
        ({"rank0": {"100_3": [1, 2, -3, 0]}}, "100_3: found -3"),
        ({"rank0": {"100": [1, 2, 3, 0]}}, "found tensor '100', expected ITERATION_LAYER"),
        ({"rank0": {"1_3": [1, 2, 3, 0], "01_3": [1, 2, 3, 0]}}, "each once"),
        ({"rank0": {"1_3": [0, 0, 0, 0]}}, "found no load"),
        ({"rank0": {}}, "found 0 layers"),
        ({"rank0": LOADS["rank0"], "rank00": LOADS["rank0"]}, "rank 0 has two files"),
        ({"rank0": LOADS["rank0"], "rank1_raw": TOKENS["rank1_raw"]}, "no rank0_raw.safetensors"),
        ({"rank0_raw": {"1_3": [[0, 4]]}}, "rank0_raw.safetensors: 1_3: found expert 4, expected -1 to 3"),
        ({"rank0_raw": {"1_3": [[0, -2]]}}, "found expert -2"),
        ({"rank0_raw": {"1_3": [[0, 0]]}}, "found expert 0 twice"),
        (
            {"rank0_raw": {"1_3": [[0, 1, 2]]}},
            r"found int32 of shape \(1, 3\), expected integers \(tokens, 2\)",
        ),
        ({"rank0_raw": {"1_3": [[0, 1]], "1_4": [[0, 1], [1, 2]]}}, "found 2 tokens, layer 3 has 1"),
        ({"rank0_raw": {"1_3": [[0, 1]], "2_4": [[0, 1]]}}, "1_4: no such tensor"),
        ({"rank0_raw": {"1_3": np.zeros((0, 2))}}, "found no token"),
    ],
)
def test_wrong_statistics_of_tensorrt_llm_are_refused(
    files: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(match, statistics(tmp_path / "stats", files))


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ("{", "meta_info.json: not JSON"),
        ("[" * 100_000, "meta_info.json: not JSON"),
        ([], "num_experts: found None"),
        ({"num_experts": 10**9, "num_experts_per_token": 2}, "num_experts: found 1000000000"),
        ({"num_experts": 4, "num_experts_per_token": 0}, "num_experts_per_token: found 0"),
        ({"num_experts": True, "num_experts_per_token": 1}, "num_experts: found True"),
    ],
)
def test_wrong_meta_data_of_tensorrt_llm_are_refused(meta: Any, match: str, tmp_path: Path) -> None:
    refused(match, statistics(tmp_path / "stats", LOADS, meta))


def test_hints_and_folders_of_tensorrt_llm_must_fit(tmp_path: Path) -> None:
    folder = statistics(tmp_path / "stats", {**LOADS, **TOKENS})
    refused("found 4 experts, expected 8", folder, num_experts=8)
    refused("found 2 experts a token, expected 1", folder, top_k=1)
    refused("found no layer 7", folder, layer_ids=(3, 7))
    refused("found 2 paths, expected one folder", folder, folder)
    (folder / "rank1.safetensors").write_bytes(b"\xff" * 100)
    refused("rank1.safetensors", folder)


# -- load matrices ---------------------------------------------------------------------------------------

LOAD = [[0, 0, 0], [5, 1, 0], [2, 2, 9]]


def written(path: Path, value: Any) -> Path:
    match path.suffix:
        case ".npy":
            np.save(path, np.asarray(value))
        case ".npz":
            np.savez(path, load=np.asarray(value))
        case ".pt":
            torch_bytes.save(path, np.asarray(value))
        case _:
            path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".json"])
def test_matrices_are_told_from_other_files_and_read(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"load{suffix}", LOAD)
    assert formats.sniffed(path) == "load_matrix"
    counts = counts_of(path)
    assert counts.load.tolist() == LOAD[1:]
    assert (counts.layer_ids, counts.name) == ((1, 2), "load")
    assert counts_of(path, layer_ids=(3, 4, 5)).load.tolist() == LOAD


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".json"])
def test_steps_of_matrices_add_up(suffix: str, tmp_path: Path) -> None:
    steps = [[[3, 0, 1], [1, 2, 1]], [[0, 1, 3], [4, 0, 0]]]
    path = written(tmp_path / f"load{suffix}", steps)
    assert formats.sniffed(path) == "load_matrix"
    assert counts_of(path).load.tolist() == [[3, 1, 4], [5, 2, 1]]


def test_several_matrices_add_up(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, LOAD) for name in ("a.npy", "b.json")]
    assert counts_of(*paths).load.tolist() == [[10, 2, 0], [4, 4, 18]]
    refused("found shape .2, 3., expected .3, 3.", *paths, written(tmp_path / "c.npy", LOAD[1:]))


@pytest.mark.parametrize("key", ["logical_count", "load", "expert_load", "weight"])
def test_matrices_may_stand_under_their_names(key: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", other=np.zeros(3), **{key: LOAD})
    written(tmp_path / "named.json", {key: LOAD})
    for name in ("named.npz", "named.json"):
        assert formats.sniffed(tmp_path / name) == "load_matrix"
        assert counts_of(tmp_path / name).load.tolist() == LOAD[1:]


def test_one_array_under_any_name_is_taken_when_the_format_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", LOAD)
    found = formats.read([tmp_path / "one.npz"], name="load_matrix")
    assert isinstance(found, Counts)
    assert found.load.tolist() == LOAD[1:]
    np.savez(tmp_path / "two.npz", LOAD, LOAD)
    refused("found arrays .*expected one of logical_count", tmp_path / "two.npz", name="load_matrix")


def test_the_history_of_the_adrs_task_is_read(tmp_path: Path) -> None:
    history = {"load_history": [{"logical_expert_load": LOAD}, {"logical_expert_load": LOAD}]}
    path = written(tmp_path / "expert-load.json", history)
    assert formats.sniffed(path) == "load_matrix"
    assert counts_of(path).load.tolist() == [[10, 2, 0], [4, 4, 18]]


def test_files_of_counts_are_taken_as_they_are(tmp_path: Path) -> None:
    counts = Counts(load=np.array(LOAD[1:]), layer_ids=(7, 9), model="toy", num_tokens=5)
    counts.save(tmp_path / "own.npz")
    assert formats.sniffed(tmp_path / "own.npz") == "load_matrix"
    again = counts_of(tmp_path / "own.npz")
    assert (again.layer_ids, again.model, again.num_tokens) == ((7, 9), "toy", 5)


def own(path: Path, load: Any = LOAD[1:], **more: Any) -> Path:
    """A file of counts as placer writes them."""
    meta: dict[str, Any] = {"layer_ids": (7, 9), "model": "toy", "num_tokens": 5, "num_groups": 3, **more}
    Counts(load=np.array(load), **meta).save(path)
    return path


def test_files_of_counts_that_agree_are_added_up_and_keep_what_they_say(tmp_path: Path) -> None:
    paths = [
        own(tmp_path / "a.npz", source="here"),
        own(tmp_path / "b.npz", [[1, 0, 0], [0, 0, 0]], num_tokens=7, source="there"),
        own(tmp_path / "c.npz", [[0, 0, 0], [0, 0, 2]], num_tokens=1, source="here"),
    ]
    counts = counts_of(*paths)
    assert counts.load.tolist() == [[6, 1, 0], [2, 2, 11]]
    assert (counts.layer_ids, counts.model, counts.num_groups) == ((7, 9), "toy", 3)
    assert (counts.num_tokens, counts.source, counts.name) == (13, "here; there", "a")
    assert counts_of(*paths, own(tmp_path / "d.npz", num_tokens=None)).num_tokens is None


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"layer_ids": (7, 8)}, r"b\.npz: layer_ids is \(7, 8\), expected \(7, 9\) as in .*a\.npz"),
        ({"model": "doll"}, r"b\.npz: model is doll, expected toy as in .*a\.npz"),
        ({"model": None}, r"b\.npz: model is None, expected toy as in .*a\.npz"),
        ({"num_groups": 1}, r"b\.npz: num_groups is 1, expected 3 as in .*a\.npz"),
        ({"load": [[1] * 6] * 2}, r"b\.npz: num_experts is 6, expected 3 as in .*a\.npz"),
        ({"load": [[1] * 3], "layer_ids": (7,)}, r"b\.npz: layer_ids is \(7,\), expected \(7, 9\)"),
    ],
)
def test_files_of_counts_that_differ_are_refused(other: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(match, own(tmp_path / "a.npz"), own(tmp_path / "b.npz", **other))


def test_counts_and_matrices_without_layers_are_not_mixed(tmp_path: Path) -> None:
    paths = own(tmp_path / "a.npz"), written(tmp_path / "b.npy", LOAD[1:])
    match = r"b\.npy: found a matrix of loads alone, expected counts as in .*a\.npz"
    refused(match, *paths)
    refused(match, *reversed(paths))


def test_hints_must_agree_with_counts_and_may_name_their_model(tmp_path: Path) -> None:
    named, unnamed = own(tmp_path / "named.npz"), own(tmp_path / "unnamed.npz", model=None)
    refused(r"named\.npz: num_experts is 3, expected 8", named, num_experts=8)
    refused(r"named\.npz: layer_ids is \(7, 9\), expected \(1, 2\)", named, layer_ids=(1, 2))
    assert counts_of(named, num_experts=3, layer_ids=(7, 9)).model == "toy"
    assert counts_of(unnamed, model="x").model == "x"
    assert counts_of(named, unnamed, model="toy").model == "toy"
    refused(r"unnamed\.npz: model is doll, expected toy", named, unnamed, model="doll")


def test_loads_that_together_are_too_large_to_count_are_refused(tmp_path: Path) -> None:
    large = [[2**61, 0], [0, 0]]  # nine of them would wrap round to one
    for suffix in ("npy", "npz"):
        paths = [tmp_path / f"{at}.{suffix}" for at in range(9)]
        for path in paths:
            if suffix == "npz":
                own(path, large, num_groups=1)
            else:
                written(path, large)
        refused(rf"1\.{suffix}: found a sum of 4\.61e\+18, expected less than 2\*\*62", *paths)


def test_arrays_of_ids_are_no_loads(tmp_path: Path) -> None:
    ids = np.argsort(np.random.default_rng(0).random((50, 3, 16)), axis=2)[:, :, :4]
    np.save(tmp_path / "ids.npy", ids)
    assert formats.sniffed(tmp_path / "ids.npy") == "npy"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([[1.5, 2]], r"found 1.5 at \[0, 0\]"),
        ([[float("nan"), 2]], r"found nan at \[0, 0\]"),
        ([[-1, 2]], r"found -1 at \[0, 0\]"),
        ([[0, 0]], "found nothing in any of 1 layers"),
        ([1, 2], r"found int64 of shape \(2,\)"),
        ([[[[1]]]], r"found int64 of shape \(1, 1, 1, 1\)"),
        ([[1, 2], [3]], "rows of unequal length"),
        ([["a"]], "found <U1 of shape"),
        ([[None]], "found object of shape"),
        ({"map": [[1]]}, "expected one of logical_count, load, expert_load, weight"),
        ({"load": None}, "found object"),
        ({"load_history": [{}]}, "found object"),
        ([[10**30]], "found object"),
    ],
)
def test_wrong_matrices_are_refused(value: Any, match: str, tmp_path: Path) -> None:
    refused(match, written(tmp_path / "load.json", value), name="load_matrix")


def test_damaged_matrices_are_refused(tmp_path: Path) -> None:
    for name, content in {
        "cut.json": b"[[1, 2",
        "deep.json": b"[" * 100_000,
        "not.json": b"\xff\xfe",
        "cut.npy": b"\x93NUMPY\x01\x00",
        "cut.npz": b"PK\x03\x04",
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        refused("found|not|damaged", tmp_path / name, name="load_matrix")
    np.save(tmp_path / "objects.npy", np.array([[{}]], object), allow_pickle=True)
    refused("never unpickled", tmp_path / "objects.npy", name="load_matrix")
    refused("cannot be read", tmp_path / "missing.npy", name="load_matrix")
    refused("found 3 experts, expected 4", written(tmp_path / "a.npy", LOAD), num_experts=4)


# -- vLLM ------------------------------------------------------------------------------------------------

LINE = (
    '{"record_type":"eplb_load_stats","version":1,"step":7,"num_ranks":2,'
    '"expert_load":[[10,1,5,2],[2,8,1,3]],"p2l_map":[[0,1,2,0],[1,2,0,1]]}'
)


def test_load_lines_of_vllm_are_mapped_back_each_by_its_map(tmp_path: Path) -> None:
    meta = '{"record_type":"eplb_load_meta","version":1,"num_layers":2}'
    moved = LINE.replace('"p2l_map":[[0,1,2,0]', '"p2l_map":[[2,1,0,0]')
    (tmp_path / "load.jsonl").write_text(f"{meta}\n{LINE}\n\n{moved}\n")
    assert formats.sniffed(tmp_path / "load.jsonl") == "vllm_load_stats"
    counts = counts_of(tmp_path / "load.jsonl")
    assert counts.load.tolist() == [[12 + 7, 1 + 1, 5 + 10], [2, 10, 16]]
    assert counts.layer_ids == (0, 1)
    assert counts_of(tmp_path / "load.jsonl", layer_ids=(3, 4)).layer_ids == (3, 4)


def test_a_layer_without_load_stays_a_layer_of_vllm(tmp_path: Path) -> None:
    (tmp_path / "load.jsonl").write_text(LINE.replace("[2,8,1,3]", "[0,0,0,0]"))
    assert counts_of(tmp_path / "load.jsonl").load.tolist() == [[12, 1, 5], [0, 0, 0]]
    refused("found 2 layers, --layer-ids names 1", tmp_path / "load.jsonl", layer_ids=(1,))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: record_type: found None"),
        ('{"record_type": "other"}', "line 1: record_type: found 'other'"),
        (LINE.replace('"version":1', '"version":2'), "line 1: version: found 2, expected 1"),
        (LINE.replace("[10,1,5,2]", "[10,1,5]"), "expert_load: found rows of unequal length"),
        (
            LINE.replace("[10,1,5,2],", ""),
            r"expert_load: found loads of shape \(1, 4\), the map has \(2, 4\)",
        ),
        (LINE.replace("[10,1,5,2]", "[-10,1,5,2]"), r"expert_load: found -10 at \[0, 0\]"),
        (LINE.replace("[10,1,5,2]", "[NaN,1,5,2]"), "expert_load: found nan"),
        (LINE.replace("[0,1,2,0]", "[0,1,1,0]"), "p2l_map: layer 0 holds no expert 2"),
        (LINE.replace("[0,1,2,0]", "[0,1,2,-5]"), "p2l_map: found 2 layers with experts from -5"),
        (LINE.replace("[0,1,2,0]", "[0,1,2,99999]"), "p2l_map: found 2 layers with experts from 0 to 99999"),
        (LINE.replace("p2l_map", "map"), "p2l_map: found"),
        ("", "found no line of eplb_load_stats"),
        ('{"record_type":"eplb_load_meta","version":1}', "found no line of eplb_load_stats"),
    ],
)
def test_wrong_load_lines_of_vllm_are_refused(line: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "load.jsonl").write_text(line)
    refused(match, tmp_path / "load.jsonl", name="vllm_load_stats")


def test_lines_of_vllm_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "load.jsonl").write_bytes(LINE.encode() + b"\n\xff\xfe")
    refused("not a text file", tmp_path / "load.jsonl")
    refused("cannot be read", tmp_path / "missing.jsonl", name="vllm_load_stats")


# -- all of them -----------------------------------------------------------------------------------------

OURS = ("sglang_recorder", "tensorrt_llm_recorder", "load_matrix", "vllm_load_stats")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200),
    start=st.sampled_from([b"", b"[[", b'{"load"', b"PK\x03\x04", b"\x93NUMPY"]),
)
def test_sniffing_never_fails(content: bytes, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any"
    path.write_bytes(start + content)
    for name in OURS:
        assert formats.reader(name).sniff(path) in (True, False)
        assert formats.reader(name).sniff(tmp_path / "missing") is False


def test_recordings_go_through_the_command_line(tmp_path: Path) -> None:
    dump(tmp_path / "0.pt", [FIRST])
    done = placer("convert", tmp_path / "0.pt", "-o", tmp_path / "trace.npz")
    assert done.code == 0, done.err
    assert Trace.load(tmp_path / "trace.npz").layer_ids == (1, 2)
    folder = statistics(tmp_path / "stats", LOADS)
    done = placer("convert", folder, "-o", tmp_path / "counts.npz")
    assert done.code == 0, done.err
    assert Counts.open(tmp_path / "counts.npz").layer_ids == (3, 4)
    done = placer("convert", dump(tmp_path / "bad.pt", [{**FIRST, "rank": -1}]), "-o", tmp_path / "none.npz")
    assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "none.npz").exists()
