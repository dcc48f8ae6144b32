"""Input that cannot be used: one line on stderr, the documented exit code, and no file left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from terminal import Outcome, placer

from placer import Placement, Trace

MACHINE = ("-t", "dgx-h100", "--shape", "1x2x2")


def refused(outcome: Outcome, folder: Path, before: set[Path], code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert set(folder.iterdir()) == before


def write_trace(path: Path, topk_idx: Any = None, meta: Any = None, **arrays: Any) -> None:
    ids = np.arange(40, dtype=np.int16).reshape(10, 2, 2) % 16 if topk_idx is None else topk_idx
    text = meta if isinstance(meta, str) else json.dumps({"num_experts": 16} if meta is None else meta)
    np.savez(path, topk_idx=ids, meta=np.array(text), **arrays)


def truncated(path: Path) -> None:
    write_trace(path)
    path.write_bytes(path.read_bytes()[:-200])


def damaged(path: Path) -> None:
    write_trace(path)
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(bytes(data))


def without_ids(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.npy", b"")


def rows(*ids: list[int], dtype: Any = np.int16) -> Any:
    return np.array([[row] for row in ids], dtype)


BAD_TRACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be read"),
    "a folder": (lambda path: path.mkdir(), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "not an .npz"),
    "not a zip": (lambda path: path.write_text("tokens"), "not an .npz"),
    "truncated": (truncated, "trace.npz"),
    "damaged": (damaged, "topk_idx"),
    "without ids": (without_ids, "topk_idx"),
    "objects": (lambda path: write_trace(path, np.array([[[{}]]], object)), "objects"),
    "floats": (lambda path: write_trace(path, rows([0, 1], dtype=float)), "expected integers"),
    "two axes": (
        lambda path: write_trace(path, np.zeros((3, 2), np.int8)),
        "(num_tokens, num_layers, top_k)",
    ),
    "id too large": (lambda path: write_trace(path, rows([0, 1], [2, 16])), "found expert 16"),
    "id too small": (lambda path: write_trace(path, rows([0, -2])), "found expert -2"),
    "id repeated": (lambda path: write_trace(path, rows([0, 1], [3, 3])), "twice"),
    "no tokens": (lambda path: write_trace(path, np.zeros((0, 2, 2), np.int8)), "empty trace"),
    "no layers": (lambda path: write_trace(path, np.zeros((3, 0, 2), np.int8)), "empty trace"),
    "k above E": (lambda path: write_trace(path, rows([0, 1]), {"num_experts": 1}), "num_experts"),
    "meta no JSON": (lambda path: write_trace(path, meta="{"), "meta"),
    "no num_experts": (lambda path: write_trace(path, meta={}), "num_experts"),
    "sequence of another length": (lambda path: write_trace(path, sequence=np.zeros(3, int)), "sequence"),
}


@pytest.mark.parametrize("command", ["solve", "compare", "inspect"])
@pytest.mark.parametrize("case", BAD_TRACES)
def test_a_bad_trace_is_refused(case: str, command: str, tmp_path: Path) -> None:
    make, word = BAD_TRACES[case]
    path = tmp_path / "trace.npz"
    make(path)
    before = set(tmp_path.iterdir())
    more: tuple[object, ...] = {"solve": (*MACHINE, "-o", tmp_path / "p.json"), "compare": MACHINE}.get(
        command, ()
    )
    refused(placer(command, path, *more), tmp_path, before, 2, "trace.npz", word)


BAD_OPTIONS: list[tuple[list[str], str]] = [
    (["--method", "gredy"], "did you mean greedy?"),
    (["--model", "mixtral"], "mixtral-8x7b"),
    (["-t", "dgx-h10"], "dgx-h100"),
    (["--shape", "1x2"], "RACKSxSERVERSxGPUS"),
    (["--shape", "0x2x2"], "RACKSxSERVERSxGPUS"),
    (["--shape", "1x3x8"], "--redundant 8"),
    (["--redundant", "3"], "--redundant 4"),
    (["--redundant", "-1"], "--redundant"),
    (["--redundant", "4", "--slots-per-gpu", "5"], "exclude"),
    (["--max-load", "much"], "none or auto"),
    (["--max-load", "0.9"], "1 or more"),
    (["--max-load", "nan"], "1 or more"),
    (["--load-margin", "1"], "below 1"),
    (["--load-margin", "much"], "auto"),
    (["--time-limit", "-1"], "0 or more"),
    (["--time-limit", "nan"], "0 or more"),
    (["--time-limit", "soon"], "0 or more"),
    (["--rounds", "-1"], "--rounds"),
    (["--jobs", "0"], "--jobs"),
    (["--seed", "-1"], "--seed"),
    (["--gap", "200%"], "--gap"),
    (["--replica-choice", "far"], "nearest"),
    (["--gpu-memory", "80 parsecs"], "80 GB"),
    (["--reserve", "-1GB"], "--reserve"),
    (["--expert-dtype", "int7"], "fp8"),
    (["--initial", "nowhere.json"], "nowhere.json"),
    (["--metod", "greedy"], "--method"),
    (["extra"], "extra"),
]


@pytest.mark.parametrize(("options", "word"), BAD_OPTIONS, ids=lambda value: " ".join(value))
def test_a_bad_option_is_refused(options: list[str], word: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    write_trace(path, np.arange(160, dtype=np.int16).reshape(40, 2, 2) % 64, {"num_experts": 64})
    outcome = placer("solve", path, *MACHINE, "-o", tmp_path / "p.json", "--log", tmp_path / "log", *options)
    lines = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
    refused(Outcome(outcome.code, outcome.out, lines[0] + "\n"), tmp_path, {path}, 2, word)
    assert len(outcome.err.splitlines()) == 1


def test_too_few_slots_are_infeasible(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    write_trace(path)
    outcome = placer("solve", path, *MACHINE, "--slots-per-gpu", 3, "-o", tmp_path / "p.json")
    refused(outcome, tmp_path, {path}, 3, "slots: 12 a layer (4 GPUs x 3) cannot hold 16 experts")


def test_too_little_memory_is_infeasible(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    write_trace(path, np.zeros((5, 32, 1), np.int8), {"num_experts": 8, "model": "Mixtral-8x7B"})
    outcome = placer("solve", path, *MACHINE, "--gpu-memory", "30GB", "-o", tmp_path / "p.json")
    refused(outcome, tmp_path, {path}, 3, "memory: a GPU needs 42.55 GB", "it has 30.00 GB")


@pytest.mark.parametrize("output", ["missing/p.json", ".", "trace.npz/p.json", "trace.npz", "-"])
@pytest.mark.parametrize("option", ["-o", "--log"])
def test_an_output_that_cannot_be_written_is_found_before_the_search(
    output: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("placer.solution.solve", lambda *_, **__: pytest.fail("searched"))
    write_trace(tmp_path / "trace.npz")
    refused(
        placer("solve", "trace.npz", *MACHINE, option, output), tmp_path, {tmp_path / "trace.npz"}, 2, output
    )


GOOD_TOPOLOGY = """
description = "two GPUs"
gpu_memory = "80 GB"
hbm_bandwidth = "3 TB/s"
flops_bf16 = "1 TFLOP/s"
flops_fp8 = "2 TFLOP/s"
""" + "".join(
    f"""
[[levels]]
name = "{name}"
fanout = 2
bandwidth = "50 GB/s"
efficiency = 0.9
latency = "3 us"
link = "switch"
"""
    for name in ("gpu", "server", "rack")
)

BAD_TOPOLOGIES = {
    "not TOML": ("[[levels]]", "[[levels", "expected a TOML file"),
    "unknown key": ("gpu_memory", "gpu_memry", "'gpu_memry', did you mean gpu_memory?"),
    "missing key": ('gpu_memory = "80 GB"', "", 'key "gpu_memory" is missing'),
    "wrong unit": ('"50 GB/s"', '"50 GB"', "level 1: bandwidth '50 GB': expected a bandwidth"),
    "out of range": ("efficiency = 0.9", "efficiency = 1.9", "efficiency is 1.9"),
    "zero GPUs": ("fanout = 2", "fanout = 0", "fanout is 0, expected an integer >= 1"),
    "unknown link": ('"switch"', '"string"', "link is 'string', expected one of switch, mesh, torus"),
    "level missing": ('"server"', '"pod"', "expected gpu first, then server and rack"),
}


def test_a_topology_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(GOOD_TOPOLOGY)
    assert placer("topology", path, "--json").document["shape"] == [2, 2, 2]


@pytest.mark.parametrize("case", BAD_TOPOLOGIES)
def test_a_bad_topology_file_is_refused(case: str, tmp_path: Path) -> None:
    old, new, words = BAD_TOPOLOGIES[case]
    path = tmp_path / "own.toml"
    path.write_text(GOOD_TOPOLOGY.replace(old, new))
    refused(placer("topology", path), tmp_path, {path}, 2, "own.toml", words)


def good_placement() -> dict[str, Any]:
    slots = np.tile(np.arange(16), (2, 1))
    return Placement(physical_to_logical=slots, num_experts=16, shape=(1, 2, 2)).to_dict()


BAD_PLACEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "another schema": ({"schema": "placer/report/1"}, "schema"),
    "no shape": ({"shape": None}, "shape"),
    "shape of other size": ({"shape": [1, 3, 3]}, "multiple of the 9 ranks"),
    "expert too large": ({"physical_to_logical": [list(range(1, 17))] * 2}, "found 16"),
    "expert without slot": ({"physical_to_logical": [[0, *range(15)]] * 2}, "expert 15 has no slot"),
    "ragged": ({"physical_to_logical": [[0], [0, 1]]}, "physical_to_logical"),
    "text": ({"physical_to_logical": "all"}, "physical_to_logical"),
    "slots that disagree": ({"slots_per_rank": 5}, "slots_per_rank"),
    "unknown rule": ({"dispatch": {"rule": "far"}}, "dispatch rule"),
    "ranks that disagree": ({"num_ranks": 8}, "num_ranks"),
}


@pytest.mark.parametrize("command", ["evaluate", "check", "solve"])
@pytest.mark.parametrize("case", BAD_PLACEMENTS)
def test_a_bad_placement_is_refused(case: str, command: str, tmp_path: Path) -> None:
    changes, word = BAD_PLACEMENTS[case]
    path, trace = tmp_path / "placement.json", tmp_path / "trace.npz"
    path.write_text(json.dumps(good_placement() | changes))
    write_trace(trace)
    if command == "solve":
        outcome = placer("solve", trace, *MACHINE, "--initial", path, "-o", tmp_path / "out.json")
    else:
        outcome = placer(command, path, trace, *(("-t", "dgx-h100") if command == "evaluate" else ()))
    refused(outcome, tmp_path, {path, trace}, 2, word)


@pytest.mark.parametrize("command", ["evaluate", "check"])
def test_a_placement_of_other_layers_is_refused(command: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "placement.json", tmp_path / "trace.npz"
    path.write_text(json.dumps(good_placement() | {"layer_ids": [3, 4]}))
    write_trace(trace)
    outcome = placer(command, path, trace, *(("-t", "dgx-h100") if command == "evaluate" else ()))
    refused(outcome, tmp_path, {path, trace}, 2, "layer", "3..4", "0..1")


@pytest.mark.parametrize("text", [None, "", "{", "[]", '"placement"', "\x00"])
def test_a_file_that_is_no_placement_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    if text is not None:
        path.write_text(text)
    refused(placer("check", path), tmp_path, {path} if text is not None else set(), 2, "placement.json")


@pytest.mark.parametrize(
    ("gate", "word"),
    [
        ("remote.server", "PATH<=NUMBER"),
        ("remote.server=3", ">=, <, >"),
        ("remote.moon<=3", "moon"),
        ("remote<=3", "remote.gpu, remote.server, remote.rack"),
        ("load.server<=1.2", "load.server.max_over_mean, load.server.worst_layer"),
    ],
)
def test_a_gate_that_cannot_be_read_is_bad_input(gate: str, word: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "placement.json", tmp_path / "trace.npz"
    path.write_text(json.dumps(good_placement()))
    write_trace(trace)
    outcome = placer("evaluate", path, trace, "-t", "dgx-h100", "--require", gate)
    refused(outcome, tmp_path, {path, trace}, 2, word)


def test_a_gate_that_cannot_be_read_is_refused_before_anything_is_priced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("placer.evaluation.evaluate", lambda *_, **__: pytest.fail("priced"))
    path, trace = tmp_path / "placement.json", tmp_path / "trace.npz"
    path.write_text(json.dumps(good_placement()))
    write_trace(trace)
    outcome = placer("evaluate", path, trace, "-t", "dgx-h100", "--require", "tokens>0", "--require", "x=1")
    refused(outcome, tmp_path, {path, trace}, 2, "'x=1'")


def test_a_trace_in_the_place_of_a_placement_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    write_trace(path)
    for command in (["check", path], ["evaluate", path, path, "-t", "dgx-h100"]):
        refused(placer(*command), tmp_path, {path}, 2, "trace.npz: not a placement file: expected JSON")


def test_slots_that_do_not_divide_are_refused_before_tokens_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("placer.traffic.Traffic.from_trace", lambda *_: pytest.fail("counted"))
    path = tmp_path / "trace.npz"
    write_trace(path)
    refused(placer("solve", path, "-t", "dgx-h100", "--shape", "1x3x8"), tmp_path, {path}, 2, "--redundant 8")


@pytest.mark.parametrize(
    "command", [["synth", "olmo-like"], ["synth", "olmoe-like", "--layers", "0"], ["solv"], ["-x"]]
)
def test_other_usage_errors_are_one_line(command: list[str], tmp_path: Path) -> None:
    more = ["-o", str(tmp_path / "t.npz")] if command[0] == "synth" else []
    refused(placer(*command, *more), tmp_path, set(), 2)


def test_a_trace_without_any_choice_moves_nothing(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace.npz", tmp_path / "p.json"
    Trace(topk_idx=np.full((40, 2, 2), -1, np.int8), num_experts=16).save(trace)
    solved = placer("solve", trace, *MACHINE, "--method", "refine", "-o", path, "--json")
    assert solved.code == 0
    assert "NaN" not in solved.out
    report = solved.document["report"]
    assert set(report["touched"].values()) == set(report["bytes_per_token"].values()) == {0.0}
    assert {level["max_over_mean"] for level in report["load"].values()} == {1.0}
    assert placer("inspect", trace, "--json").document["dropped"] == 1.0
    assert placer("check", path, trace).code == 0


def test_special_files_as_output_are_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.npz")
    os.mkfifo(tmp_path / "fifo")
    before = set(tmp_path.iterdir())
    found = placer("solve", tmp_path / "t.npz", *MACHINE, "-o", tmp_path / "fifo")
    refused(found, tmp_path, before, 2, "expected the name of a file")
    assert (tmp_path / "fifo").is_fifo()


def test_names_that_no_file_system_takes_are_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.npz")
    found = placer("solve", tmp_path / "t.npz", *MACHINE, "-o", tmp_path / ("x" * 300))
    refused(found, tmp_path, {tmp_path / "t.npz"}, 2, "cannot be written")


def test_one_file_for_placement_and_log_is_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.npz")
    found = placer("solve", tmp_path / "t.npz", *MACHINE, "-o", tmp_path / "a", "--log", tmp_path / "a")
    refused(found, tmp_path, {tmp_path / "t.npz"}, 2, "expected two files")


def test_a_full_output_is_told_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "placer", "methods"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert found.returncode == 2
    assert found.stderr == "Error: cannot write the output: No space left on device\n"


def test_copies_of_the_baseline_that_do_not_fit_do_not_spoil_the_result(tmp_path: Path) -> None:
    """Mixtral's experts are 352 MB: four a layer fit beside the reserve, the eight that linear would hold do not."""
    write_trace(tmp_path / "t.npz", meta={"num_experts": 16})
    limits = ("--model", "mixtral-8x7b", "--slots-per-gpu", "8", "--gpu-memory", "24GB", "--method", "lpt")
    found = placer("solve", tmp_path / "t.npz", *MACHINE, *limits, "-o", tmp_path / "p.json", "--json")
    assert found.code == 0, found.err
    copied = placer("solve", tmp_path / "t.npz", *MACHINE, *limits[:-1], "linear")
    assert copied.code == 3
    assert json.loads(found.out)["baseline"]["touched"]["server"] > 0
