"""Readers of routed experts: literal recordings as the stacks write them, and what is wrong with others."""

from __future__ import annotations

import base64
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer import Trace, formats
from placer.errors import InvalidInput
from placer.formats import Hints

# Two tokens, layer 0 dense, layer 1 MoE top-2: [[[0,0],[3,1]],[[0,0],[2,1]]], as uint8 .npy and as raw int32.
NPY = (
    "k05VTVBZAQB2AHsnZGVzY3InOiAnfHUxJywgJ2ZvcnRyYW5fb3JkZXInOiBGYWxzZSwgJ3NoYXBlJzogKDIsIDIsIDIp"
    "LCB9ICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIAoAAAMBAAACAQ=="
)
INT32 = "AAAAAAAAAAADAAAAAQAAAAAAAAAAAAAAAgAAAAEAAAA="

VLLM = """{"id": "chatcmpl-1", "object": "chat.completion", "created": 1758000000, "model": "my-moe",
 "choices": [{"index": 0, "message": {"role": "assistant", "content": "say \\"routed_experts\\": null"},
              "finish_reason": "stop", "routed_experts": "%s"}],
 "prompt_routed_experts": null, "usage": {"prompt_tokens": 2, "completion_tokens": 1}}"""

SGLANG_OPENAI = """{"id": "1", "model": "my-moe", "choices": [
 {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "sgl_ext": {"routed_experts": "%s"}}]}"""
SGLANG_NATIVE = """{"text": "Hi", "meta_info": {"id": "1", "prompt_tokens": 2, "routed_experts": "%s"}}"""

BALANCE = """\
{"layer": 0, "batch_id": 12, "origin_rows": [0, 1], "topk_experts": [[0, 0], [0, 0]]}
{"layer": 3, "batch_id": 12, "origin_rows": [0, 1], "topk_experts": [[3, 1], [2, 1]]}
{"layer": 0, "batch_id": 13, "origin_rows": [0], "topk_experts": [[0, 0]]}
{"layer": 3, "batch_id": 13, "origin_rows": [0], "topk_experts": [[0, 2]]}
"""

FOUR = Hints(num_experts=4)
RAW = Hints(num_experts=4, num_hidden_layers=2, top_k=2)


def read(path: Path, hints: Hints = FOUR) -> Trace:
    """What a file says, its format told from it."""
    trace = formats.read([path], hints=hints)
    assert isinstance(trace, Trace)
    return trace


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def npy(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


def encoded(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


# -- vLLM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pretty", [True, False])
def test_a_response_of_vllm_is_read(tmp_path: Path, pretty: bool) -> None:
    content = VLLM % NPY if pretty else json.dumps(json.loads(VLLM % NPY))
    path = text(tmp_path / "response.json", content)
    assert formats.sniffed(path) == "vllm_routed_experts"
    trace = read(path)
    assert trace.topk_idx.tolist() == [[[3, 1]], [[2, 1]]]
    assert trace.topk_idx.dtype == np.uint8
    assert trace.layer_ids == (1,)
    assert trace.sequence is not None
    assert trace.sequence.tolist() == [0, 0]
    assert (trace.model, trace.num_experts, trace.step) == ("my-moe", 4, None)


def test_each_line_choice_and_base64_text_is_a_sequence(tmp_path: Path) -> None:
    one = json.loads(VLLM % NPY)
    two = {"custom_id": "7", "response": {"body": one | {"choices": one["choices"] * 2}}}
    lines = text(tmp_path / "out.jsonl", f"{json.dumps(one)}\n\n{json.dumps(two)}\n")
    bare = text(tmp_path / "out.b64", f"{NPY}\n{NPY}\n")
    assert formats.sniffed(lines) == formats.sniffed(bare) == "vllm_routed_experts"
    trace = formats.read([lines, bare], hints=FOUR)
    assert isinstance(trace, Trace)
    assert trace.sequence is not None
    assert trace.sequence.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_list_of_responses_is_read(tmp_path: Path) -> None:
    path = text(tmp_path / "all.json", f"[{VLLM % NPY},\n{VLLM % NPY}]")
    assert read(path).num_tokens == 4


def test_the_prompt_of_older_vllm_comes_before_its_first_choice(tmp_path: Path) -> None:
    body = {
        "prompt_routed_experts": [[[0, 0], [0, 1]], [[0, 0], [1, 2]]],
        "choices": [{"routed_experts": NPY}, {"routed_experts": NPY}],
    }
    without = {"prompt_routed_experts": [[[0, 0], [2, 0]]], "choices": [{"routed_experts": None}]}
    path = text(tmp_path / "r.jsonl", "\n".join(map(json.dumps, [without, body])))
    trace = read(path)
    assert trace.sequence is not None
    assert trace.sequence.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert trace.topk_idx[:, 0].tolist() == [[2, 0], [0, 1], [1, 2], [3, 1], [2, 1], [3, 1], [2, 1]]


def test_a_request_of_one_token_has_no_routing(tmp_path: Path) -> None:
    none = encoded(np.zeros((0, 2, 2), np.uint8))
    path = text(tmp_path / "r.jsonl", f'{{"routed_experts": "{none}"}}\n{{"routed_experts": "{NPY}"}}\n')
    with pytest.raises(InvalidInput, match="looks like no known format"):
        formats.sniffed(text(tmp_path / "none.json", '{"routed_experts": null, "layers": [0]}'))
    assert read(path).num_tokens == 2


@pytest.mark.parametrize("key", ["routed_experts", "prompt_routed_experts"])
@pytest.mark.parametrize("ids", [[[[2, 3]], [[2, True]]], [[[False, 3]]], [[[True, False]]]])
def test_true_and_false_are_no_experts(tmp_path: Path, key: str, ids: Any) -> None:
    path = text(tmp_path / "r.json", json.dumps({key: ids}))
    with pytest.raises(
        InvalidInput, match=rf"r\.json: line 1: {key}: found true or false, expected integers"
    ):
        read(path)


# -- SGLang ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", [SGLANG_OPENAI, SGLANG_NATIVE])
def test_a_response_of_sglang_is_read(tmp_path: Path, response: str) -> None:
    path = text(tmp_path / "response.json", response % INT32)
    assert formats.sniffed(path) == "sglang_routed_experts"
    trace = read(path, RAW)
    assert trace.topk_idx.tolist() == [[[3, 1]], [[2, 1]]]
    assert trace.layer_ids == (1,)
    assert trace.topk_idx.dtype == np.uint8


def test_layers_k_experts_and_groups_come_from_a_known_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.zeros((5, 61, 8), "<i4")
    ids[:, 3:] = rng.permuted(np.tile(np.arange(256), (5, 58, 1)), axis=2)[..., :8]
    value = base64.b64encode(ids.tobytes()).decode()
    trace = read(
        text(
            tmp_path / "r.json",
            json.dumps(
                {"model": "deepseek-ai/DeepSeek-V3", "choices": [{"sgl_ext": {"routed_experts": value}}]}
            ),
        ),
        Hints(),
    )
    assert trace.layer_ids == tuple(range(3, 61))
    assert (trace.num_experts, trace.num_groups, trace.topk_groups) == (256, 8, 4)
    assert np.array_equal(trace.topk_idx, ids[:, 3:])
    assert Trace.load(_saved(trace, tmp_path)).model == "deepseek-ai/DeepSeek-V3"


def _saved(trace: Trace, folder: Path) -> Path:
    trace.save(folder / "saved.npz")
    return folder / "saved.npz"


def test_raw_ids_of_an_unknown_model_need_their_shape(tmp_path: Path) -> None:
    path = text(tmp_path / "r.json", SGLANG_NATIVE % INT32)
    with pytest.raises(InvalidInput, match=r"r\.json.*--num-hidden-layers and --top-k"):
        read(path)
    with pytest.raises(InvalidInput, match="found 32 bytes, expected a multiple of 24"):
        read(path, Hints(num_experts=4, num_hidden_layers=3, top_k=2))


# -- plain .npy --------------------------------------------------------------------------------------------


def test_an_npy_of_all_hidden_layers_or_of_moe_layers_is_read(tmp_path: Path) -> None:
    (tmp_path / "vllm.npy").write_bytes(base64.b64decode(NPY))
    assert formats.sniffed(tmp_path / "vllm.npy") == "npy"
    assert read(tmp_path / "vllm.npy").layer_ids == (1,)
    moe = npy(tmp_path / "moe.npy", np.array([[[0, 2], [3, 1]], [[0, 1], [2, -1]]]))
    assert read(moe).layer_ids == (0, 1)
    assert read(moe).topk_idx.tolist() == [[[0, 2], [3, 1]], [[0, 1], [2, -1]]]
    assert read(moe, Hints(num_experts=4, layer_ids=(3, 4))).layer_ids == (3, 4)
    assert read(moe, Hints(num_experts=4, layer_ids=(1,))).topk_idx.tolist() == [[[3, 1]], [[2, -1]]]


def test_two_axes_are_one_expert_a_token_when_the_format_is_named(tmp_path: Path) -> None:
    path = npy(tmp_path / "top1.npy", np.array([[3, 1], [0, 2]]))
    trace = formats.read([path], name="npy", hints=FOUR)
    assert isinstance(trace, Trace)
    assert trace.topk_idx.tolist() == [[[3], [1]], [[0], [2]]]


def test_a_single_large_array_is_mapped_and_not_copied(tmp_path: Path) -> None:
    ids = np.stack([np.arange(8, dtype=np.uint8).reshape(4, 2)] * 3)
    trace = read(npy(tmp_path / "ids.npy", ids), Hints(num_experts=8))
    base: Any = trace.topk_idx
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert base is not None


def test_loads_of_steps_are_not_taken_for_ids(tmp_path: Path) -> None:
    loads = np.array([[[5, 1, 2], [3, 4, 1]], [[0, 6, 2], [8, 0, 0]]])
    assert formats.sniffed(npy(tmp_path / "loads.npy", loads)) == "load_matrix"


def test_a_number_of_experts_a_token_that_is_not_the_hint_is_refused(tmp_path: Path) -> None:
    path = npy(tmp_path / "ids.npy", np.array([[[0, 1]], [[2, 1]]]))
    with pytest.raises(InvalidInput, match="found 2 experts a token, expected --top-k 8"):
        read(path, Hints(num_experts=4, top_k=8))


# -- which layers ------------------------------------------------------------------------------------------


def test_tokens_that_were_not_recorded_are_left_out_and_said(tmp_path: Path) -> None:
    ids = np.array([[[0, 0], [3, 1]], [[0, 0], [0, 0]], [[0, 0], [2, 1]]])
    path = npy(tmp_path / "ids.npy", ids)
    with pytest.warns(UserWarning, match="1 tokens .* left out"):
        trace = read(path)
    assert trace.topk_idx.tolist() == [[[3, 1]], [[2, 1]]]
    assert trace.sequence is not None
    assert trace.sequence.tolist() == [0, 0]


def test_tokens_without_any_expert_are_left_out_and_not_said_to_be_expert_0(tmp_path: Path) -> None:
    none, zero, used = [[-1, -1], [-1, -1]], [[0, 0], [0, 0]], [[0, 2], [3, 1]]
    path = npy(tmp_path / "ids.npy", np.array([none, used, none]))
    with pytest.warns(UserWarning, match="left out") as said:
        assert read(path).topk_idx.tolist() == [used]
    assert [str(one.message) for one in said] == ["2 tokens without an expert in any layer: left out"]
    with pytest.warns(UserWarning, match="left out") as said:
        read(npy(path, np.array([none, used, zero, zero, [[-1, -1], [0, 0]]])))
    assert [str(one.message) for one in said] == [
        "1 tokens without an expert in any layer: left out",
        "3 tokens with no expert but 0 in any layer were not recorded: left out",
    ]


def test_a_layer_that_sometimes_repeats_an_expert_is_refused(tmp_path: Path) -> None:
    path = npy(tmp_path / "ids.npy", np.array([[[0, 2], [3, 1]], [[0, 1], [2, 2]]]))
    with pytest.raises(InvalidInput, match=r"ids\.npy: token 1: layer 1 repeats an expert in 1 of 2 tokens"):
        read(path)


@pytest.mark.filterwarnings("ignore:1 tokens")
def test_layers_without_any_expert_are_dense(tmp_path: Path) -> None:
    ids = np.array([[[-1, -1], [-1, -1]], [[-1, -1], [0, 1]]])
    trace = formats.read([npy(tmp_path / "ids.npy", ids)], name="npy", hints=FOUR)
    assert isinstance(trace, Trace)
    assert trace.layer_ids == (1,)
    assert trace.topk_idx.tolist() == [[[0, 1]]]


def test_dense_layers_of_top_1_are_those_that_only_say_0(tmp_path: Path) -> None:
    path = npy(tmp_path / "ids.npy", np.array([[[0], [3]], [[0], [0]]]))
    assert read(path).layer_ids == (1,)
    assert read(path).num_tokens == 2
    assert read(path, Hints(num_experts=4, layer_ids=(0, 1))).num_layers == 2


def test_a_known_model_must_have_as_many_moe_layers(tmp_path: Path) -> None:
    ids = np.argsort(np.random.default_rng(0).random((3, 16, 64)), axis=2)[..., :8]
    ids[:, 4] = 0
    with pytest.raises(
        InvalidInput, match="found 15 MoE layers, expected 16 as olmoe-1b-7b has; --layer-ids"
    ):
        read(npy(tmp_path / "ids.npy", ids), Hints(model="OLMoE-1B-7B"))


def test_experts_come_from_the_hint_or_a_known_model_and_are_never_guessed(tmp_path: Path) -> None:
    path = npy(tmp_path / "ids.npy", np.array([[[0, 60]], [[2, 1]]]))
    assert read(path, Hints(model="olmoe-1b-7b")).num_experts == 64
    assert read(path, Hints(model="olmoe-1b-7b", num_experts=61)).num_experts == 61
    for hints in (Hints(), Hints(model="nobody-knows")):
        with pytest.raises(InvalidInput, match=r"--num-experts says it .the highest id is 60"):
            read(path, hints)
    with pytest.raises(InvalidInput, match=r"ids\.npy: found expert 60, expected 0 to 59"):
        read(path, Hints(num_experts=60))


def test_requests_of_two_models_or_shapes_are_refused(tmp_path: Path) -> None:
    one, other = VLLM % NPY, (VLLM % NPY).replace("my-moe", "another")
    path = text(tmp_path / "r.json", f"[{one},{other}]")
    with pytest.raises(InvalidInput, match="model 'another', expected 'my-moe'"):
        read(path)
    assert read(path, Hints(num_experts=4, model="mine")).model == "mine"
    paths = [npy(tmp_path / f"{k}.npy", np.tile(np.arange(k), (2, 1, 1))) for k in (2, 3)]
    with pytest.raises(
        InvalidInput, match=r"3\.npy: found 1 layers of top-3, expected 1 of top-2 as in .*2\.npy"
    ):
        formats.read(paths, hints=FOUR)


# -- moe-balance -------------------------------------------------------------------------------------------


def test_batches_of_moe_balance_are_steps(tmp_path: Path) -> None:
    path = text(tmp_path / "trace.jsonl", BALANCE)
    assert formats.sniffed(path) == "moe_balance"
    trace = read(path)
    assert trace.layer_ids == (3,)
    assert trace.topk_idx[:, 0].tolist() == [[3, 1], [2, 1], [0, 2]]
    assert trace.step is not None
    assert trace.step.tolist() == [0, 0, 1]
    assert trace.sequence is None
    assert trace.source_rank is None
    assert read(path, Hints(num_experts=4, layer_ids=(3,))).layer_ids == (3,)


def test_requests_of_moe_balance_are_sequences_and_weights_are_kept(tmp_path: Path) -> None:
    lines = [
        {
            "layer": 0,
            "batch_id": 7,
            "request_id": 7,
            "topk_experts": [[3, 1]],
            "topk_weights": [[0.75, 0.25]],
        },
        {"layer": 0, "batch_id": 5, "request_id": 5, "topk_experts": [[0, 1]], "topk_weights": [[0.5, 0.5]]},
    ]
    trace = read(text(tmp_path / "trace.jsonl", "\n".join(map(json.dumps, lines))))
    assert trace.sequence is not None
    assert trace.topk_weights is not None
    assert trace.sequence.tolist() == [7, 5]
    assert trace.topk_weights[:, 0].tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert trace.step is None


def test_a_request_in_two_batches_is_one_sequence(tmp_path: Path) -> None:
    lines = [
        {"layer": 0, "batch_id": batch, "request_id": "a", "topk_experts": [[3, batch]]} for batch in (0, 1)
    ]
    trace = read(text(tmp_path / "trace.jsonl", "\n".join(map(json.dumps, lines))))
    assert trace.sequence is not None
    assert trace.step is not None
    assert (trace.sequence.tolist(), trace.step.tolist()) == ([0, 0], [0, 1])


def test_request_files_of_moe_balance_keep_their_ids_unless_two_are_alike(tmp_path: Path) -> None:
    ids = np.array([[[0, 0], [3, 1]], [[0, 0], [2, 1]]], np.uint8)
    paths = []
    for name, request in (("a", 12), ("b", 4), ("c", 12)):
        paths.append(tmp_path / f"{name}.npz")
        np.savez(paths[-1], request_id=request, prompt_token_ids=[1, 2], routed_experts=ids)
    assert formats.sniffed(paths[0]) == "moe_balance"
    kept = formats.read(paths[:2], hints=FOUR)
    assert isinstance(kept, Trace)
    assert kept.sequence is not None
    assert kept.sequence.tolist() == [12, 12, 4, 4]
    with pytest.warns(UserWarning, match="same id: sequences are renumbered"):
        again = formats.read(paths, hints=FOUR)
    assert isinstance(again, Trace)
    assert again.sequence is not None
    assert again.sequence.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"layer": 3, "batch_id": 12, "topk_experts": [[1, 2], [2, 3]]}, "second time"),
        ({"layer": 9, "batch_id": 12, "topk_experts": [[1, 2], [2, 3]]}, "layer 9 is in some batches only"),
        ({"layer": 3, "batch_id": 14, "topk_experts": [[1, 2]]}, "layer 0 is in some batches only"),
        ({"layer": 3, "batch_id": 14, "topk_experts": [[1, 2], [3]]}, "unequal lengths"),
        ({"layer": 3, "batch_id": 14, "topk_experts": [[1.5, 2]]}, "expected numbers"),
        ({"layer": -3, "batch_id": 14, "topk_experts": [[1, 2]]}, "layer: found -3"),
        ({"layer": 3, "batch_id": [1], "topk_experts": [[1, 2]]}, "batch_id"),
        ({"layer": 3, "batch_id": 14, "topk_experts": [[1, 2]], "topk_weights": [[float("nan"), 1]]}, "nan"),
        ({"layer": 3, "batch_id": 14, "topk_experts": [[1, 2]], "topk_weights": [[1.0]]}, "topk_weights"),
        ({"layer": 3, "batch_id": 14, "topk_experts": [[10**30, 2]]}, "expected numbers"),
        ([], "found list"),
    ],
)
def test_a_bad_line_of_moe_balance_is_named(tmp_path: Path, line: Any, words: str) -> None:
    path = text(tmp_path / "trace.jsonl", BALANCE + json.dumps(line) + "\n")
    with pytest.raises(InvalidInput, match=words) as refused:
        read(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


# -- Megatron-core -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("layer_1", "layer_0")])
def test_router_replay_data_in_an_npz_is_read(tmp_path: Path, names: tuple[str, str]) -> None:
    layers = dict(zip(sorted(names), (np.array([[3, 1], [2, 1]]), np.array([[0, 2], [1, 2]])), strict=True))
    np.savez(tmp_path / "r.npz", **{name: layers[name] for name in names})
    assert formats.sniffed(tmp_path / "r.npz") == "megatron"
    trace = read(tmp_path / "r.npz", Hints(num_experts=4, layer_ids=(3, 4)))
    assert trace.topk_idx.tolist() == [[[3, 1], [0, 2]], [[2, 1], [1, 2]]]
    assert trace.layer_ids == (3, 4)
    assert trace.step is not None
    assert (trace.step.tolist(), trace.sequence) == ([0, 0], None)


def test_layers_are_ordered_by_number_and_files_are_steps(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", **{f"layer_{n}": np.array([[n, 11]]) for n in (10, 9, 1, 0, *range(2, 9))})
    trace = formats.read([tmp_path / "r.npz"] * 2, hints=Hints(num_experts=12))
    assert isinstance(trace, Trace)
    assert trace.topk_idx[0, :, 0].tolist() == list(range(11))
    assert trace.step is not None
    assert trace.step.tolist() == [0, 1]


def test_router_replay_data_saved_by_torch_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save([torch.tensor([[3, 1], [2, 1]]), torch.tensor([[0, 2], [1, 2]])], tmp_path / "r.pt")
    assert formats.sniffed(tmp_path / "r.pt") == "megatron"
    assert read(tmp_path / "r.pt").topk_idx.tolist() == [[[3, 1], [0, 2]], [[2, 1], [1, 2]]]
    torch.save([torch.tensor([[3, 1], [2, 1]]), "text"], tmp_path / "odd.pt")
    with pytest.raises(InvalidInput, match=r"odd\.pt"):
        read(tmp_path / "odd.pt")


def test_router_replay_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    for layers, words in (
        ({"layer_0": [[1, 2]], "layer_2": [[1, 2]]}, "without gaps"),
        (
            {"layer_0": [[1, 2]], "layer_1": [[1, 2], [2, 3]]},
            r"layer_1: found shape \(2, 2\), expected \(1, 2\)",
        ),
        ({"layer_0": [1, 2]}, r"expected integers \(tokens, k\)"),
        ({"layer_0": [[1.0, 2.0]]}, r"expected integers \(tokens, k\)"),
        ({"layer_0": [[1, 1]]}, "twice"),
        ({"layer_0": [[1, 9]]}, "found expert 9"),
        ({"layer_0": [[1, -2]]}, "found expert -2"),
    ):
        np.savez(path, **{name: np.array(rows) for name, rows in layers.items()})  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match=words):
            read(path)
    np.savez(path, layer_0=np.array([[1, 2]]))
    with pytest.raises(InvalidInput, match="found 1 MoE layers, expected 2 as --layer-ids names"):
        read(path, Hints(num_experts=12, layer_ids=(0, 1)))


# -- hostile input -----------------------------------------------------------------------------------------


def header(shape: str, dtype: str = "'|u1'") -> bytes:
    """A .npy header that says anything, and eight bytes of data."""
    said = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    said = said.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(said).to_bytes(2, "little") + said + bytes(8)


BAD_ARRAYS: dict[str, bytes] = {
    "empty": b"",
    "only magic": b"\x93NUMPY",
    "truncated": header("(2, 2, 2)")[:-1],
    "trailing bytes": header("(2, 2, 2)") + b"0",
    "absurd shape": header("(1073741824, 1073741824, 1073741824)"),
    "overflowing shape": header("(4294967296, 4294967296, 0, 1)"),
    "negative shape": header("(-1, 2, 2)"),
    "a shape of nothing": header("(4611686018427387904, 0)")[:-8],
    "items of no bytes": header("(2, 2, 2)", "'|V0'")[:-8],
    "a scalar": header("()", "'<u8'"),
    "objects": header("(1,)", "'|O'"),
    "code for a shape": header("__import__('os').getcwd()"),
    "another version": b"\x93NUMPY\x09\x00" + header("(2, 2, 2)")[8:],
    "floats": header("(1, 1, 1)", "'<f8'"),
    "one axis": header("(8,)"),
    "no layers": header("(8, 0, 1)")[:-8],
}


@pytest.mark.parametrize("content", BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
@pytest.mark.parametrize("how", ["npy", "vllm_routed_experts"])
def test_a_bad_array_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, how: str, content: bytes
) -> None:
    path = tmp_path / "bad.bin"
    if how == "npy":
        path.write_bytes(content)
    else:
        path.write_text(json.dumps({"routed_experts": base64.b64encode(content).decode()}))
    with pytest.raises(InvalidInput) as refused:
        formats.read([path], name=how, hints=FOUR)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


BAD_JSON: dict[str, Callable[[str], str]] = {
    "truncated": lambda good: good[:-30],
    "cut off base64": lambda good: good.replace(INT32, INT32[:-3]),
    "no base64": lambda good: good.replace(INT32, "AAAA!@#$"),
    "a number": lambda good: good.replace(f'"{INT32}"', "7"),
    "ids beyond E": lambda good: good.replace(
        INT32, base64.b64encode(np.arange(8, dtype="<i4").tobytes()).decode()
    ),
    "deep": lambda good: "[" * 200_000,
    "no ids": lambda good: '{"meta_info": {"routed_experts": null}}',
    "a digit bomb": lambda good: '{"meta_info": {"prompt_tokens": %s}}' % ("9" * 10_000),
}


@pytest.mark.parametrize("spoil", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_refused_in_one_line(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    path = text(tmp_path / "bad.json", spoil(SGLANG_NATIVE % INT32))
    with pytest.raises(InvalidInput, match="bad") as refused:
        formats.read([path], name="sglang_routed_experts", hints=RAW)
    assert "\n" not in str(refused.value)


def test_a_damaged_line_is_named_by_its_number(tmp_path: Path) -> None:
    good = json.dumps(json.loads(VLLM % NPY))
    path = text(tmp_path / "r.jsonl", f"{good}\n\n{good[:40]}\n")
    with pytest.raises(InvalidInput, match=r"r\.jsonl: line 3: not JSON"):
        read(path)


@pytest.mark.parametrize("name", ["npy", "megatron", "moe_balance", "placer_trace", "vllm_routed_experts"])
def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InvalidInput, match=tmp_path.name):
            formats.read([path], name=name, hints=FOUR)


def test_an_npz_that_would_unfold_beyond_its_bytes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer_0.npy", header("(1099511627776, 2)"))
    with pytest.raises(InvalidInput, match=r"bomb\.npz: layer_0: header says"):
        read(tmp_path / "bomb.npz")


def test_objects_in_an_npz_are_never_unpickled(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    np.savez(tmp_path / "r.npz", routed_experts=np.array(Code(), object))
    with pytest.raises(InvalidInput, match="never unpickled"):
        read(tmp_path / "r.npz")
    assert not (tmp_path / "made").exists()


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"{", b"[", b"k05VTVBZ"]),
)
@settings(max_examples=60, deadline=None)
def test_telling_a_format_never_fails_whatever_a_file_holds(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(start + content)
    for name in formats.readers():
        assert formats.reader(name).sniff(path) in (True, False)


@st.composite
def captures(draw: st.DrawFn) -> tuple[list[np.ndarray[Any, Any]], list[bool], int]:
    """Requests over all hidden layers, which of these are dense, and the number of experts."""
    top_k = draw(st.integers(2, 4))
    experts = draw(st.integers(top_k, 300))
    dense = draw(st.lists(st.booleans(), min_size=1, max_size=5).filter(lambda one: not all(one)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    requests = []
    for tokens in draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)):
        ids = np.argsort(rng.random((tokens, len(dense), experts)), axis=2)[..., :top_k]
        ids[:, dense] = 0
        requests.append(ids)
    return requests, dense, experts


@given(captures(), st.sampled_from(["npy", "vllm", "sglang"]))
@settings(max_examples=40, deadline=None)
def test_what_a_stack_writes_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    capture: tuple[list[np.ndarray[Any, Any]], list[bool], int],
    stack: str,
) -> None:
    requests, dense, experts = capture
    folder = tmp_path_factory.mktemp("capture")
    hints = Hints(num_experts=experts)
    if stack == "npy":
        paths = [npy(folder / f"{at}.npy", ids.astype(np.int16)) for at, ids in enumerate(requests)]
        trace = formats.read(paths, name="npy", hints=hints)
    elif stack == "vllm":
        small = np.uint8 if experts <= 256 else np.uint16
        lines = [
            json.dumps({"choices": [{"routed_experts": encoded(ids.astype(small))}]}) for ids in requests
        ]
        trace = formats.read([text(folder / "r.jsonl", "\n".join(lines))], hints=hints)
    else:
        hints = Hints(num_experts=experts, num_hidden_layers=len(dense), top_k=requests[0].shape[2])
        values = [base64.b64encode(ids.astype("<i4").tobytes()).decode() for ids in requests]
        lines = [json.dumps({"meta_info": {"routed_experts": value}}) for value in values]
        trace = formats.read([text(folder / "r.jsonl", "\n".join(lines))], hints=hints)
    assert isinstance(trace, Trace)
    assert trace.layer_ids == tuple(np.flatnonzero(~np.array(dense)).tolist())
    assert np.array_equal(trace.topk_idx, np.concatenate(requests)[:, ~np.array(dense)])
    assert trace.sequence is not None
    assert trace.sequence.tolist() == np.repeat(range(len(requests)), [len(ids) for ids in requests]).tolist()
