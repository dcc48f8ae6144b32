"""``placer export``: what it writes, says and refuses, and filling empty slots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace
from terminal import placer

from placer import formats
from placer.census import census
from placer.errors import InvalidInput
from placer.export import export, fill
from placer.formats import sglang
from placer.model import Model
from placer.placement import Placement
from placer.topology import Topology


def saved(folder: Path, rows: Any, **more: Any) -> Path:
    path = folder / "placement.json"
    held = np.array(rows)
    options = {"num_experts": int(held.max()) + 1, "shape": (1, 2, 1), **more}
    Placement(physical_to_logical=held, **options).save(path)
    return path


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the command ------------------------------------------------------------------------------------------------


def test_the_file_is_written_and_its_options_are_printed(tmp_path: Path) -> None:
    path, out = saved(tmp_path, [[1, 0, 0, 2]], layer_ids=(1,)), tmp_path / "map.json"
    outcome = placer("export", path, "--to", "sglang", "--num-hidden-layers", 2, "-o", out)
    assert outcome.code == 0
    assert outcome.out == (
        f"{out}: load with --init-expert-location {out} --ep-size 2 --ep-num-redundant-experts 1 "
        "--ep-dispatch-algorithm static\n"
    )
    assert outcome.err == "note: not in the placement, so given the map that SGLang starts with: layer 0\n"
    assert json.loads(out.read_text()) == {"physical_to_logical_map": [[0, 1, 2, 0], [1, 0, 0, 2]]}


def test_json_is_one_document_on_stdout(tmp_path: Path) -> None:
    path, out = saved(tmp_path, [[1, 0, 0, 2]], rule="spread"), tmp_path / "map.yaml"
    outcome = placer("export", path, "--to", "tensorrt_llm", "-o", out, "--json")
    assert outcome.code == 0
    document = outcome.document
    assert list(document) == ["schema", "to", "path", "bytes", "load_with", "notes"]
    assert document["schema"] == "placer/export/1"
    assert (document["to"], document["path"]) == ("tensorrt_llm", str(out))
    assert document["bytes"] == out.stat().st_size
    assert document["load_with"].startswith(f"moe_config: {{load_balancer: '{out}'}}")
    assert [note.split()[0] for note in document["notes"]] == ["TensorRT-LLM"]


@pytest.mark.parametrize("to", formats.writers())
def test_every_stack_can_be_written(tmp_path: Path, to: str) -> None:
    path = saved(tmp_path, [[1, 0], [1, 0]], rule="table", table=np.array([[[1, 0]] * 2] * 2))
    out = tmp_path / "map.json"
    outcome = placer("export", path, "--to", to, "--num-hidden-layers", 2, "-o", out, "--json")
    assert outcome.code == 0
    assert outcome.document["bytes"] == out.stat().st_size > 0
    assert str(out) in outcome.document["load_with"]


def test_help_lists_the_stacks_with_their_titles() -> None:
    shown = " ".join(placer("export", "--help").out.split())
    for name in formats.writers():
        assert f"{name} {formats.title(name)}" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "sglan", "-o", "x"), "unknown stack 'sglan': did you mean sglang"),
        (("--to", "sglang_routed_experts", "-o", "x"), "unknown stack 'sglang_routed_experts'"),
        (("-o", "x"), "Missing option '--to'"),
        (("--to", "sglang"), "Missing option '-o'"),
        (("--to", "sglang", "-o", "map.json"), "expected --num-hidden-layers N"),
        (("--to", "sglang", "-o", "map.pt", "--num-hidden-layers", "3"), "one that ends in .json"),
        (("--to", "sglang", "-o", "map.json", "--num-hidden-layers", "1"), "expected at least 3"),
        (("--to", "sglang", "-o", "map.json", "--num-hidden-layers", "0"), "0 is not in the range"),
        (("--to", "eplb", "-o", "map.npz", "--model", "olmoe-1b-7b"), "has 64 experts a layer, expected 3"),
        (("--to", "eplb", "-o", "no/map.npz"), "cannot be written"),
        (("--to", "eplb", "-o", "placement.json"), "would overwrite the placement"),
        (("--to", "dispatch_table", "-o", "map.npz"), "the placement holds none"),
        (("--to", "vllm_expert_to_rank", "-o", "map.json"), "expert 0 has copies"),
    ],
)
def test_what_cannot_be_exported_ends_with_2_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    saved(tmp_path, [[1, 0, 0, 2]], layer_ids=(2,))
    monkeypatch.chdir(tmp_path)
    outcome = placer("export", "placement.json", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert listed(tmp_path) == ["placement.json"]


def test_a_refused_export_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    path, out = saved(tmp_path, [[1, 0, 2, -1]]), tmp_path / "map.yaml"
    out.write_text("old")
    outcome = placer("export", path, "--to", "tensorrt_llm", "-o", out)
    assert outcome.code == 2
    assert "layer 0, rank 1: found 1 of 2 slots empty (-1), which TensorRT-LLM cannot load" in outcome.err
    assert out.read_text() == "old"


def test_fill_makes_a_file_of_a_placement_with_empty_slots(tmp_path: Path) -> None:
    path, out = saved(tmp_path, [[1, 0, 2, -1]]), tmp_path / "map.json"
    assert placer("export", path, "--to", "vllm_initial_expert_map", "-o", out, "--fill").code == 0
    assert json.loads(out.read_text()) == [[1, 0, 2, 2]]


def test_map_only_leaves_the_table_to_a_file_of_its_own(tmp_path: Path) -> None:
    path = saved(tmp_path, [[1, 0, 0, 2]], rule="table", table=np.array([[[1, 0, 3], [2, 0, 3]]]))
    out = tmp_path / "map.yaml"
    refused = placer("export", path, "--to", "tensorrt_llm", "-o", out)
    assert refused.code == 2
    assert "--map-only" in refused.err
    outcome = placer("export", path, "--to", "tensorrt_llm", "-o", out, "--map-only")
    assert outcome.code == 0
    assert "made for the dispatch rule 'table'" in outcome.err
    assert placer("export", path, "--to", "dispatch_table", "-o", tmp_path / "table.npz").code == 0


def test_a_damaged_placement_is_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_text("{}")
    outcome = placer("export", path, "--to", "eplb", "-o", tmp_path / "map.npz")
    assert outcome.code == 2
    assert f"{path}: schema" in outcome.err


def test_a_solved_placement_goes_out_and_comes_back(tmp_path: Path) -> None:
    trace, path, out = (tmp_path / name for name in ("trace.npz", "placement.json", "map.json"))
    noisy_trace().save(trace)
    machine = ("-t", "dgx-h100", "--shape", "1x2x2")
    copies = ("--redundant", 4, "--method", "eplb", "--jobs", 1, "-q")
    assert placer("solve", trace, *machine, *copies, "-o", path).code == 0
    assert placer("export", path, "--to", "sglang", "--num-hidden-layers", 2, "-o", out).code == 0
    assert sglang.read_placement(out, shape=(1, 2, 2)).digest == Placement.load(path).digest


# -- the library ------------------------------------------------------------------------------------------------


def test_a_known_model_says_how_many_layers_there_are() -> None:
    held = np.arange(64)[None]
    made = Placement(physical_to_logical=held, num_experts=64, shape=(1, 1, 8), layer_ids=(15,))
    found = export(made, "sglang", "map.json", model=Model.named("olmoe-1b-7b"))
    assert len(json.loads(found.content)["physical_to_logical_map"]) == 16
    assert found.notes[0] == "olmoe-1b-7b has 16 MoE layers, the placement 1"
    more = export(made, "sglang", "map.json", model=Model.named("olmoe-1b-7b"), num_hidden_layers=17)
    assert len(json.loads(more.content)["physical_to_logical_map"]) == 17


def test_a_format_that_is_only_read_is_not_written() -> None:
    made = Placement(physical_to_logical=np.array([[0]]), num_experts=1, shape=(1, 1, 1))
    with pytest.raises(InvalidInput, match="unknown format to write 'no-such'"):
        export(made, "no-such", "file")


@st.composite
def holed(draw: st.DrawFn) -> Placement:
    """16 experts on 4 GPUs of 2 servers with copies on other ranks and empty slots; on each rank an own expert."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = np.full((2, 4, 8), -1)
    for row in rows:
        home = rng.permutation(16).reshape(4, 4)
        for rank in range(4):
            # The first of each home has no copies.
            others = rng.permutation(np.delete(home, rank, axis=0)[:, 1:].ravel())[: rng.integers(0, 5)]
            held = rng.permutation(np.concatenate([home[rank], others]))
            row[rank, : len(held)] = held
    return Placement(physical_to_logical=rows.reshape(2, 32), num_experts=16, shape=(1, 2, 2))


@settings(max_examples=15, deadline=None)
@given(made=holed())
def test_filling_moves_no_vector_and_no_load(made: Placement) -> None:
    full, trace, topology = fill(made), noisy_trace(), Topology.load("dgx-h100").with_shape("1x2x2")
    assert (full.physical_to_logical >= 0).all()
    kept = made.physical_to_logical >= 0
    assert np.array_equal(full.physical_to_logical[kept], made.physical_to_logical[kept])
    for rule in ("nearest", "spread", "cover"):
        pairs = zip(
            census(made, trace, topology, rule=rule), census(full, trace, topology, rule=rule), strict=True
        )
        for before, after in pairs:
            assert after.touched.sum(axis=1) == pytest.approx(before.touched.sum(axis=1))
            assert after.remote.sum(axis=1) == pytest.approx(before.remote.sum(axis=1))
            for load, expected in zip(after.load, before.load, strict=True):
                assert load == pytest.approx(expected)


def test_filling_prefers_experts_that_stand_once_and_takes_them_in_turn() -> None:
    held = np.array([[0, 1, 2, -1, -1, -1, -1, 0, 3, -1, -1, -1, -1, -1]])
    made = Placement(physical_to_logical=held, num_experts=4, shape=(1, 1, 2))
    assert fill(made).physical_to_logical.tolist() == [[0, 1, 2, 1, 2, 1, 2, 0, 3, 3, 3, 3, 3, 3]]
    assert fill(fill(made)).digest == fill(made).digest


def test_a_rank_with_nothing_of_its_own_is_not_filled() -> None:
    held = np.array([[0, 1, 0, -1]])
    made = Placement(physical_to_logical=held, num_experts=2, shape=(1, 1, 2), layer_ids=(6,))
    with pytest.raises(InvalidInput, match="layer 6, rank 1: cannot be filled without changing loads"):
        fill(made)
    empty = replace(made, physical_to_logical=np.array([[0, 1, -1, -1]]))
    with pytest.raises(InvalidInput, match="layer 6, rank 1"):
        fill(empty)
