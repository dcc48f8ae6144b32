"""``placer convert``: files and folders in, one trace out, or one line that says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import Outcome, placer

from placer import Trace
from placer.counts import Counts
from placer.errors import InvalidInput
from placer.merging import merge

IDS = np.array([[[0, 2], [3, 1]], [[0, 1], [2, 0]], [[3, 1], [0, 2]]], np.uint8)


def trace(ids: Any = IDS, experts: int = 4, **more: Any) -> Trace:
    return Trace(topk_idx=ids, num_experts=experts, **more)


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert lines[-1].startswith("Error: ")
    assert all(line.endswith("...") for line in lines[:-1]), lines
    for word in words:
        assert word in lines[-1]


# -- the command -------------------------------------------------------------------------------------------


def test_an_array_becomes_a_trace_that_solve_takes(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    out = tmp_path / "trace.npz"
    outcome = placer("convert", tmp_path / "ids.npy", "--num-experts", 4, "--model", "toy", "-o", out)
    assert outcome.code == 0, outcome.err
    assert "tokens       3" in outcome.out
    assert "layers       2: 0..1" in outcome.out
    made = Trace.load(out)
    assert np.array_equal(made.topk_idx, IDS)
    assert (made.model, made.num_experts) == ("toy", 4)
    assert placer("inspect", out).code == 0


def test_json_is_one_document_and_the_log_is_elsewhere(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    out = tmp_path / "trace.npz"
    outcome = placer(
        "convert", tmp_path / "ids.npy", "--num-experts", 4, "--layer-ids", "1,3", "-o", out, "--json"
    )
    assert outcome.document == {
        "schema": "placer/convert/1",
        "output": str(out),
        "kind": "trace",
        "format": "npy",
        "tokens": 3,
        "layers": 2,
        "layer_ids": [1, 3],
        "experts": 4,
        "top_k": 2,
        "sequences": 1,
        "steps": None,
        "model": None,
    }


def test_loads_become_counts_and_the_log_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", np.array([[5, 1, 2, 0], [3, 4, 1, 0]]))
    outcome = placer("convert", tmp_path / "loads.npy", "-o", tmp_path / "counts.npz", "--json")
    assert outcome.document["kind"] == "counts"
    assert outcome.document["top_k"] is None
    assert "loads only" in outcome.err
    assert Counts.open(tmp_path / "counts.npz").load.tolist() == [[5, 1, 2, 0], [3, 4, 1, 0]]


def test_a_folder_is_read_in_the_order_in_which_people_count(tmp_path: Path) -> None:
    folder = tmp_path / "rec"
    folder.mkdir()
    for number in (10, 9, 1):
        np.save(
            folder / f"request{number}.npy", np.array([[[number, 20], [20, 21]], [[0, 1], [1, number + 1]]])
        )
    (folder / ".hidden").write_text("x")
    (folder / "README.md").write_text("notes")
    outcome = placer("convert", folder, "--num-experts", 22, "-o", tmp_path / "t.npz", "--json")
    assert outcome.document["sequences"] == 3
    assert outcome.err.splitlines()[-1].startswith("note: ")
    assert "README.md: looks like no known format, so left out" in outcome.err
    assert Trace.load(tmp_path / "t.npz").topk_idx[::2, 0, 0].tolist() == [1, 9, 10]


def test_traces_merge_and_keep_their_sequences(tmp_path: Path) -> None:
    trace(sequence=np.array([4, 4, 7])).save(tmp_path / "a.npz")
    trace(sequence=np.array([5, 5, 6])).save(tmp_path / "b.npz")
    trace(sequence=np.array([7, 8, 8])).save(tmp_path / "c.npz")
    files = [tmp_path / f"{name}.npz" for name in "abc"]
    outcome = placer("convert", *files, "-o", tmp_path / "all.npz", "--json")
    assert outcome.document["format"] == "placer_trace"
    assert outcome.document["sequences"] == 6
    assert f"note: sequence: {files[2]} uses ids of {files[0]}; its own now begin at 9" in outcome.err
    made = Trace.load(tmp_path / "all.npz")
    assert made.sequence is not None
    assert made.sequence.tolist() == [4, 4, 7, 5, 5, 6, 9, 10, 10]
    quiet = placer("convert", *files[:2], "-o", tmp_path / "two.npz")
    assert "note" not in quiet.err


def test_traces_that_differ_do_not_merge(tmp_path: Path) -> None:
    trace().save(tmp_path / "a.npz")
    for other, words in (
        (trace(experts=8), "num_experts is 8, expected 4"),
        (trace(IDS[:, :1]), "num_layers is 1, expected 2"),
        (trace(layer_ids=(1, 2)), "layer_ids is (1, 2), expected (0, 1)"),
        (trace(IDS[..., :1]), "top_k is 1, expected 2"),
    ):
        other.save(tmp_path / "b.npz")
        outcome = placer("convert", tmp_path / "a.npz", tmp_path / "b.npz", "-o", tmp_path / "all.npz")
        refused(outcome, str(tmp_path / "b.npz"), words)
        assert not (tmp_path / "all.npz").exists()


def test_warm_up_steps_are_dropped_by_their_order(tmp_path: Path) -> None:
    trace(step=np.array([30, 10, 20])).save(tmp_path / "a.npz")
    arguments = ("convert", tmp_path / "a.npz", "-o", tmp_path / "b.npz", "--drop-steps")
    assert placer(*arguments, 1, "--json").document["steps"] == 2
    made = Trace.load(tmp_path / "b.npz")
    assert made.step is not None
    assert made.step.tolist() == [30, 20]
    assert np.array_equal(made.topk_idx, IDS[[0, 2]])
    assert placer(*arguments, 0, "--json").document["tokens"] == 3
    refused(placer(*arguments, 3), "found 3, expected less than the 3 steps")


def test_steps_can_only_be_dropped_where_there_are_some(tmp_path: Path) -> None:
    trace().save(tmp_path / "a.npz")
    np.save(tmp_path / "loads.npy", np.array([[5, 1], [3, 4]]))
    for name, words in (("a.npz", "says no engine steps"), ("loads.npy", "loads only")):
        refused(placer("convert", tmp_path / name, "-o", tmp_path / "b.npz", "--drop-steps", 1), words)
    assert not (tmp_path / "b.npz").exists()


def test_hints_must_agree_with_a_trace_and_may_name_its_model(tmp_path: Path) -> None:
    trace().save(tmp_path / "a.npz")
    arguments = ("convert", tmp_path / "a.npz", "-o", tmp_path / "b.npz")
    refused(placer(*arguments, "--num-experts", 8), "a.npz: num_experts is 4, expected 8")
    refused(placer(*arguments, "--layer-ids", "3-4"), "layer_ids is (0, 1), expected (3, 4)")
    assert placer(*arguments, "--model", "toy", "--json").document["model"] == "toy"


def test_counts_that_agree_convert_into_one_and_others_are_refused(tmp_path: Path) -> None:
    one, other, out = (tmp_path / f"{name}.npz" for name in ("one", "other", "out"))
    for path in (one, other):
        Counts(load=np.array([[3, 1], [2, 2]]), layer_ids=(7, 9), num_tokens=4, num_groups=2).save(path)
    assert placer("convert", one, other, "--model", "toy", "-o", out, "--json").document["model"] == "toy"
    made = Counts.open(out)
    assert made.load.tolist() == [[6, 2], [4, 4]]
    assert (made.layer_ids, made.model, made.num_groups, made.num_tokens) == ((7, 9), "toy", 2, 8)
    refused(placer("convert", one, "--num-experts", 8, "-o", out), "one.npz: num_experts is 2, expected 8")
    Counts(load=np.array([[3, 1]]), layer_ids=(7,)).save(other)
    refused(placer("convert", one, other, "-o", out), "other.npz: layer_ids is (7,), expected (7, 9)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.npy"], "missing.npy: no such file or folder"),
        (["text.txt"], "text.txt: looks like no known format; --from names one of"),
        (["ids.npy", "trace.npz"], "trace.npz: looks like placer_trace, expected npy as"),
        (["empty"], "empty: no recording of a known format"),
        (["ids.npy"], "--num-experts"),
        (["ids.npy", "--num-experts", "3"], "found expert 3"),
        (["ids.npy", "--from", "nyp"], "did you mean npy?"),
        (["ids.npy", "--from", "placer_trace"], "not an .npz trace"),
        (["ids.npy", "--layer-ids", "3-1"], "expected layers such as 3-60 or 1,2,5"),
        (["ids.npy", "--layer-ids", "1,1"], "expected each layer once"),
        (["ids.npy", "--layer-ids", ""], "expected layers such as"),
        (["ids.npy", "--layer-ids", "0-999999"], "expected layers such as"),
        (["ids.npy", "--layer-ids", "1,2,3"], "no such layer"),
        (["ids.npy", "--num-experts", "4", "--top-k", "3"], "expected --top-k 3"),
        (["ids.npy", "--num-experts", "4", "--num-hidden-layers", "3"], "expected the 3 hidden ones"),
    ],
)
def test_what_cannot_be_converted_is_told_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", IDS)
    trace().save("trace.npz")
    Path("text.txt").write_text("words")
    Path("empty").mkdir()
    before = set(tmp_path.iterdir())
    refused(placer("convert", *arguments, "-o", "out.npz"), words)
    assert set(tmp_path.iterdir()) == before


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(placer("convert", tmp_path / "pipe", "-o", tmp_path / "t.npz"), "pipe: not a regular file")


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    trace().save(path)
    before = path.read_bytes()
    refused(placer("convert", path, "-o", path), "is one of the inputs")
    assert path.read_bytes() == before


def test_an_input_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rec").mkdir()
    trace().save("rec/a.npz")
    Path("link.npz").symlink_to("rec/a.npz")
    for inputs in (
        ["rec/a.npz", "rec/a.npz"],
        ["rec/a.npz", "rec/../rec/a.npz"],
        ["rec/a.npz", tmp_path / "rec" / "a.npz"],
        ["rec/a.npz", "link.npz"],
        ["rec", "rec/a.npz"],
        ["rec", "rec"],
    ):
        refused(placer("convert", *inputs, "-o", "t.npz"), "is among the inputs twice, expected once")
    assert not Path("t.npz").exists()


def test_a_damaged_file_of_a_folder_is_named_and_nothing_written(tmp_path: Path) -> None:
    folder = tmp_path / "rec"
    folder.mkdir()
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", IDS)
    (folder / "b.npy").write_bytes((folder / "b.npy").read_bytes()[:-1])
    outcome = placer("convert", folder, "--from", "npy", "--num-experts", 4, "-o", tmp_path / "t.npz")
    refused(outcome, "b.npy", "header says 12 bytes")
    assert not (tmp_path / "t.npz").exists()


def test_help_lists_every_format_that_can_be_read() -> None:
    from placer.formats import readers, title

    text = " ".join(placer("convert", "--help").out.split())
    for name in readers():
        assert f"{name} {title(name)}" in text


def test_responses_convert_from_the_command_line(tmp_path: Path) -> None:
    line = json.dumps({"model": "toy", "choices": [{"routed_experts": [[[0, 0], [3, 1]], [[0, 0], [2, 1]]]}]})
    (tmp_path / "r.jsonl").write_text(f"{line}\n{line}\n")
    outcome = placer("convert", tmp_path / "r.jsonl", "--num-experts", 4, "-o", tmp_path / "t.npz", "--json")
    assert outcome.document["format"] == "vllm_routed_experts"
    assert outcome.document["layer_ids"] == [1]
    assert outcome.document["model"] == "toy"


# -- merging -----------------------------------------------------------------------------------------------


def test_steps_of_different_ranks_are_the_same_steps() -> None:
    steps = np.array([0, 0, 1])
    ranks = [trace(step=steps, source_rank=np.full(3, rank)) for rank in (0, 1)]
    merged = merge(ranks)
    assert merged.step is not None
    assert merged.step.tolist() == [0, 0, 1, 0, 0, 1]
    with pytest.warns(UserWarning, match="step: trace uses ids of trace; its own now begin at 2"):
        again = merge([ranks[0], ranks[0]])
    assert again.step is not None
    assert again.step.tolist() == [0, 0, 1, 2, 2, 3]


def test_what_only_some_traces_know_is_left_out_and_said() -> None:
    one = trace(domain=np.array([1, 2, 3]), phase="decode", license="MIT", source="here", model="toy")
    other = trace(phase="prefill", license="MIT", source="there", model="toy")
    with pytest.warns(UserWarning, match="left out") as said:
        merged = merge([one, other], ["a", "b"])
    assert [str(one.message) for one in said] == [
        "domain: not in b, so left out",
        "phase: decode and prefill, so left out",
    ]
    assert (merged.domain, merged.phase, merged.license) == (None, None, "MIT")
    assert (merged.source, merged.model) == ("here; there", "toy")


def test_ids_too_large_to_renumber_are_refused() -> None:
    one = trace(sequence=np.array([2**63 - 2, 0, 0]))
    with pytest.raises(InvalidInput, match="too large to renumber"):
        merge([one, one])


def test_weights_and_dropped_choices_survive() -> None:
    weights = np.linspace(0, 1, IDS.size, dtype=np.float32).reshape(IDS.shape)
    one = trace(topk_weights=weights)
    other = trace(np.where(IDS == 3, -1, IDS.astype(np.int64)), topk_weights=weights.astype(np.float16))
    merged = merge([one, other])
    assert merged.topk_idx.dtype == np.int8
    assert np.array_equal(merged.topk_idx, np.concatenate([IDS, np.where(IDS == 3, -1, IDS.astype(int))]))
    assert merged.topk_weights is not None
    assert np.array_equal(merged.topk_weights[:3], weights)


@given(
    st.lists(st.lists(st.integers(-3, 6), min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from(["sequence", "step"]),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:(sequence|step).*:UserWarning")
def test_tokens_share_a_merged_id_exactly_when_they_shared_one_in_one_trace(
    parts: list[list[int]], key: str
) -> None:
    traces = [trace(np.zeros((len(part), 1, 1), np.uint8), **{key: np.array(part)}) for part in parts]
    merged = getattr(merge(traces), key)
    owner = [(at, label) for at, part in enumerate(parts) for label in part]
    for i, one in enumerate(owner):
        for j, other in enumerate(owner):
            assert (merged[i] == merged[j]) == (one == other)
    if len(set(owner)) == len({label for _, label in owner}):
        assert merged.tolist() == [label for _, label in owner]
