"""compare: what is fitted, what is judged, and what is left out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from instances import blocks_trace, noisy_trace
from terminal import placer

from placer import Model, Topology, Trace, compare
from placer.comparison import Row, against
from placer.errors import Infeasible, InvalidInput
from placer.solvers import method as load_method

SERVERS = Topology.load("dgx-h100").with_shape("1x4x1")


def test_planted_blocks_are_found_on_unseen_tokens_too() -> None:
    found = compare(blocks_trace(), SERVERS, ["greedy"], max_loads=[None])
    row = found.rows[-1]
    assert row.method == "greedy"
    assert row.train.touched["server"] == row.held_out.touched["server"] == 1.0
    assert found.against_linear(row) == pytest.approx(
        row.held_out.touched["server"] / _linear(found.rows) - 1
    )


def _linear(rows: tuple[Row, ...]) -> float:
    return rows[0].held_out.touched["server"]


def test_the_parts_share_no_token_and_depend_on_the_split_seed() -> None:
    trace = noisy_trace()
    first, again, other = (compare(trace, SERVERS, ["linear"], split_seed=seed).rows[0] for seed in (0, 0, 1))
    assert first.train.tokens + first.held_out.tokens == trace.num_tokens
    assert first.held_out == again.held_out
    assert first.held_out != other.held_out


def test_a_method_whose_package_is_missing_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        if name == "greedy":
            raise ModuleNotFoundError("no such module", name="kahip")
        return load_method(name)

    monkeypatch.setattr("placer.comparison.load_method", missing)
    found = compare(noisy_trace(), SERVERS, ["greedy", "random"])
    assert [row.method for row in found.rows] == ["linear", "random"]
    assert found.notes == ("greedy left out: kahip is not installed",)


def test_a_trace_without_sequences_is_split_by_blocks_and_says_so() -> None:
    whole = noisy_trace(tokens=100)
    found = compare(Trace(topk_idx=whole.topk_idx, num_experts=16), SERVERS, ["linear"])
    assert "blocks of tokens" in found.notes[0]


def test_a_stop_keeps_the_rows_that_are_done() -> None:
    stop = threading.Event()
    found = compare(noisy_trace(), SERVERS, ["random", "greedy"], on_row=lambda row: stop.set(), stop=stop)
    assert [row.method for row in found.rows] == ["linear"]
    assert found.notes[-1] == "interrupted"


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": 0},
        {"holdout": 1.0},
        {"max_loads": []},
        {"methods": ["nope"]},
        {"redundants": []},
        {"redundants": [0, 3]},
        {"redundants": [0, -4]},
        {"redundants": [0, 4], "redundant": 4},
        {"redundants": [0, 4], "slots_per_gpu": 5},
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        compare(noisy_trace(), SERVERS, **options)  # type: ignore[arg-type]


def test_worse_is_called_worse() -> None:
    found = compare(blocks_trace(), SERVERS, ["greedy"], max_loads=[None])
    linear, greedy = (row.train for row in found.rows)
    assert "worse" not in against(greedy, linear, "server").partition(", load")[0]
    assert "worse)" in against(linear, greedy, "server").partition(", load")[0]
    assert "(no change)" in against(linear, linear, "server")


# -- the front --------------------------------------------------------------------------------------------------

TOY = Model(name="toy", hidden_size=1000, expert_width=1000)  # 6 MB an expert, 12 MB over two layers


def test_every_number_of_spare_slots_runs_with_every_cap_and_a_baseline_of_its_own() -> None:
    started: list[tuple[str, float | None, int, int]] = []
    found = compare(
        noisy_trace(),
        SERVERS,
        ["greedy", "lpt"],
        max_loads=[1.1, None],
        redundants=[0, 8],
        seeds=2,
        on_start=lambda *run: started.append(run),
    )
    ran = [(row.method, row.max_load, row.seed, row.redundant) for row in found.rows]
    assert ran == [
        (method, cap, seed, redundant)
        for method, caps in (("linear", [None]), ("greedy", [None]), ("lpt", [1.1, None]))
        for redundant in (0, 8)
        for cap in caps
        for seed in (0, 1)
    ]
    assert started == ran


def test_copies_are_held_against_linear_with_as_many_spare_slots() -> None:
    found = compare(noisy_trace(), SERVERS, ["eplb"], max_loads=[None], redundants=[0, 8])
    rows = {(row.method, row.redundant): row for row in found.rows}
    assert rows["linear", 8].held_out.remote["server"] < rows["linear", 0].held_out.remote["server"]
    hottest = {key: row.held_out.load["gpu"]["max_over_mean"] for key, row in rows.items()}
    assert hottest["eplb", 8] < hottest["linear", 8]
    for spare in (0, 8):
        assert found.against_linear(rows["linear", spare]) == 0.0
        base, held = (rows[name, spare].held_out.remote["server"] for name in ("linear", "eplb"))
        assert found.against_linear(rows["eplb", spare]) == pytest.approx(held / base - 1)


def test_a_row_says_its_spare_slots_however_they_were_asked_for() -> None:
    for options in ({"redundant": 4}, {"slots_per_gpu": 5}, {"redundants": [4]}):
        (row,) = compare(noisy_trace(), SERVERS, ["linear"], **options).rows  # type: ignore[arg-type]
        assert (row.redundant, row.to_dict()["redundant"]) == (4, 4)


def test_spare_slots_without_room_are_left_out_with_a_note_unless_there_are_no_others() -> None:
    small: dict[str, Any] = {"model": TOY, "gpu_memory": 5 * 12e6, "reserve": 0.0, "max_loads": [None]}
    found = compare(noisy_trace(), SERVERS, ["eplb"], redundants=[0, 4, 8], **small)
    assert [(row.method, row.redundant) for row in found.rows] == [
        ("linear", 0),
        ("linear", 4),
        ("eplb", 0),
        ("eplb", 4),
    ]
    (note,) = found.notes
    assert note.startswith("redundant 8 left out: memory: GPU 0 needs 0.07 GB")
    with pytest.raises(Infeasible, match="memory: GPU 0 needs"):
        compare(noisy_trace(), SERVERS, ["eplb"], redundants=[8], **small)


def test_the_table_shows_what_spare_slots_buy_and_what_they_cost() -> None:
    found = compare(
        noisy_trace(), SERVERS, ["lpt"], max_loads=[1.1, None], redundants=[0, 8], model=TOY, load_margin=0.0
    )
    _, legend, _, header, *rows = str(found).splitlines()
    assert header.split("  ")[0] == "method"
    columns = ["method", "max load", "redundant", "remote.server", "load.gpu", "load.server", "GB a GPU"]
    places = [header.index(name) for name in columns]
    assert places == sorted(places)
    assert "touched" not in header
    assert "vs linear with as many spare slots" in legend
    assert [(row.split()[0], row.split()[1], row.split()[2]) for row in rows] == [
        ("linear", "-", "0"),
        ("linear", "-", "8"),
        ("lpt", "1.1", "0"),
        ("lpt", "none", "0"),
        ("lpt", "1.1", "8"),
        ("lpt", "none", "8"),
    ]
    gigabytes = [row.split()[12] for row in rows]
    assert gigabytes[:2] == ["0.048", "0.072"]  # four and six experts a GPU, two layers
    held = found.rows[1].held_out.remote["server"]
    assert f"/ {held:.3f}" in rows[1]


def test_without_spare_slots_the_table_keeps_to_touched_units() -> None:
    table = str(compare(noisy_trace(), SERVERS, ["linear"]))
    assert "touched.server" in table
    assert "redundant" not in table
    assert "GB a GPU" not in table  # the size of an expert is unknown


def test_the_command_takes_several_numbers_of_spare_slots(tmp_path: Path) -> None:
    path = tmp_path / "noisy.npz"
    noisy_trace().save(path)
    command = ("compare", path, "-t", "dgx-h100", "--shape", "1x4x1", "--method", "linear")
    outcome = placer(*command, "--redundant", "0,8", "--json")
    assert [row["redundant"] for row in outcome.document["rows"]] == [0, 8]
    assert [line for line in outcome.err.splitlines() if "running" in line] == [
        "linear, seed 0: running",
        "linear, redundant 8, seed 0: running",
    ]
    for wrong, words in (("0,x", "found 'x', expected numbers of spare slots"), ("0,6", "--redundant 8")):
        refused = placer(*command, "--redundant", wrong, "--quiet")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert words in refused.err
