"""What a search shows while it runs and when it ends: on a terminal, in a file, and in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace
from terminal import on_terminal, placer

from placer import Budget, Problem, Topology, allotment, evaluate, solve
from placer.cli.log import SearchLog, remaining
from placer.cli.summary import Row, peers, summary
from placer.result import Event
from placer.spectrum import CAPS, spectrum

MACHINE = ("-t", "dgx-h100", "--shape", "1x4x2")
QUICK = ("--method", "greedy", "--jobs", "1")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-9]|4[0-9]|9[0-7])(?:;[0-9]+)*m")

EVENT = Event(
    seconds=1.0,
    done=1,
    layers=2,
    rounds=3,
    method="tabu",
    objective=2e-6,
    linear=4e-6,
    bound=None,
    load=1.0,
    improved=True,
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "noisy.npz"
    noisy_trace().save(path)
    return path


# -- on a terminal -------------------------------------------------------------------------------------------


def test_a_terminal_shows_a_bar_with_the_layers_and_the_time_left(trace: Path) -> None:
    shown = on_terminal("solve", trace, *MACHINE, *QUICK, "--time-limit", 40)
    plain = ESCAPE.sub("", shown)
    assert "0/2 layers" in plain
    assert "at most 40 s" in plain
    assert COLOUR.search(shown)
    assert plain.count("   time  layers") == 1
    assert "against linear: touched.server " in plain.splitlines()[-1]


def test_no_color_leaves_the_bar_without_colours(trace: Path) -> None:
    shown = on_terminal("solve", trace, *MACHINE, *QUICK, NO_COLOR="1")
    assert "0/2 layers" in ESCAPE.sub("", shown)
    assert not COLOUR.search(shown)


def test_quiet_shows_the_result_alone_on_a_terminal(trace: Path) -> None:
    shown = on_terminal("solve", trace, *MACHINE, *QUICK, "--quiet")
    assert "\x1b" not in shown
    assert shown.split()[:2] == ["touched", "remote"]


@given(
    st.floats(0, 1e6),
    st.integers(0, 100),
    st.integers(0, 100),
    st.one_of(st.just(float("inf")), st.floats(0, 1e6)),
)
@settings(max_examples=60, deadline=None)
def test_the_time_left_is_never_negative_and_never_beyond_the_limit(
    elapsed: float, done: int, more: int, limit: float
) -> None:
    left = remaining(elapsed, done, done + more, limit)
    assert 0 <= left <= max(0.0, limit - elapsed)
    if done and not more:
        assert left == 0


# -- several searches in one command -------------------------------------------------------------------------


def test_every_cap_of_a_spectrum_has_a_label_line_in_the_log(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    outcome = placer("solve", trace, *MACHINE, "--method", "lpt", "--max-load", "auto", "--log", path)
    labels = [f"max load {'none' if cap is None else format(cap, 'g')}" for cap in CAPS]
    assert [line[3:] for line in outcome.err.splitlines() if line.startswith("-- ")] == labels
    assert outcome.err.count("   time  layers") == 1
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(dict.fromkeys(event["label"] for event in events)) == labels
    assert len(events) == 2 * len(CAPS)


def test_numbers_of_slots_have_label_lines(trace: Path) -> None:
    spare = placer("solve", trace, *MACHINE, "--method", "eplb", "--redundant", "auto")
    tried = [line for line in spare.err.splitlines() if line.startswith("-- ")]
    assert tried == [f"-- {number} slots a GPU" for number in (2, 3, 4, 6)]
    dealt = placer("solve", trace, *MACHINE, "--method", "eplb", "--copies", 8)
    assert "-- 2 slots a GPU" in dealt.err.splitlines()


def test_one_search_has_no_label_line(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    outcome = placer("solve", trace, *MACHINE, *QUICK, "--log", path)
    assert not [line for line in outcome.err.splitlines() if line.startswith("--")]
    assert {json.loads(line)["label"] for line in path.read_text().splitlines()} == {""}


def test_the_library_labels_events_of_variants() -> None:
    posed = Problem.from_trace(noisy_trace(), Topology.load("dgx-h100").with_shape("1x4x2"), load_margin=0.0)
    seen: list[Event] = []
    spectrum(posed, noisy_trace(), "lpt", caps=(None, 1.1), on_event=seen.append)
    assert [event.label for event in seen] == ["max load none"] * 2 + ["max load 1.1"] * 2
    seen.clear()
    allotment.shared_out(posed, "linear", copies=8, slots=[2, 3], on_event=seen.append)
    assert [event.label for event in seen] == ["2 slots a GPU"] * 2 + ["3 slots a GPU"] * 2


def test_the_header_stands_above_the_first_line_and_below_what_was_said_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = SearchLog(quiet=False)
    with log.running(2):
        log.say("compiling kernels")
        log.add(EVENT)
        log.add(replace(EVENT, done=2, label="again"))
    said, header, first, label, second = capsys.readouterr().err.splitlines()
    assert said == "compiling kernels"
    assert header.split()[:2] == ["time", "layers"]
    assert (first.split()[1], label, second.split()[1]) == ("1/2", "-- again", "2/2")


def test_compilation_is_told_once_in_a_process() -> None:
    code = (
        "import numba; from placer.cli.log import compilation_told\n"
        "for number in (1, 1.5):\n"
        "    with compilation_told(print): numba.njit(lambda x: x + 1)(number)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("compiling") == 1


# -- the table at the end ------------------------------------------------------------------------------------


def lines_of(table: str) -> dict[str, list[str]]:
    """The cells of each line by its name."""
    split = (re.split(r" {2,}", line.strip()) for line in table.splitlines())
    return {cells[0]: cells[1:] for cells in split}


def test_the_end_of_solve_compares_with_linear_and_eplb(trace: Path) -> None:
    outcome = placer("solve", trace, *MACHINE, *QUICK, "--max-load", "none")
    lines = lines_of(outcome.out)
    document = placer("solve", trace, *MACHINE, *QUICK, "--max-load", "none", "--json").document
    ours, usual = document["report"], document["baseline"]
    assert lines["greedy"][0] == f"{ours['touched']['server']:.3f}"
    assert lines["linear"][0] == f"{usual['touched']['server']:.3f}"
    assert lines["greedy"][2] == f"{ours['load']['server']['max_over_mean']:.3f}"
    change = ours["touched"]["server"] / usual["touched"]["server"] - 1
    assert lines["against linear"][0] == f"{100 * change:+.1f} %"
    assert {"eplb", "against eplb"} <= lines.keys()


def test_with_json_the_table_is_in_the_log(trace: Path) -> None:
    outcome = placer("solve", trace, *MACHINE, *QUICK, "--json")
    assert lines_of(outcome.err)["against linear"][0].endswith(" %")


def test_a_worse_placement_is_shown_to_be_worse() -> None:
    trace, machine = noisy_trace(), Topology.load("dgx-h100").with_shape("1x4x1")
    posed = Problem.from_trace(trace, machine, max_load=None)
    rows = []
    for name in ("tabu", "linear"):
        found = solve(posed, name, budget=Budget(seconds=20, rounds=1)).placement
        rows.append(Row(name=name, placement=found, report=evaluate(found, trace, machine), seconds=1.0))
    assert lines_of(summary(rows, "server"))["against tabu"][0].startswith("+")


def test_eplb_that_leaves_experts_in_order_shares_the_line_of_linear(trace: Path) -> None:
    outcome = placer("solve", trace, "-t", "dgx-h100", "--shape", "1x2x8", *QUICK)
    lines = lines_of(outcome.out)
    assert "against linear, eplb" in lines
    assert "eplb" not in lines


def test_the_method_itself_is_no_peer_of_it(trace: Path) -> None:
    outcome = placer("solve", trace, *MACHINE, "--method", "eplb")
    assert list(lines_of(outcome.out)).count("eplb") == 1
    assert "against eplb" not in outcome.out


def test_where_eplb_cannot_run_linear_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from placer.errors import Infeasible

    def refused(*arguments: object, **options: object) -> None:
        raise Infeasible("no memory")

    trace, machine = noisy_trace(), Topology.load("dgx-h100").with_shape("1x4x1")
    posed = Problem.from_trace(trace, machine)
    placed = solve(posed, "linear").placement
    linear = Row(name="linear", placement=placed, report=evaluate(placed, trace, machine))
    monkeypatch.setattr("placer.baseline.arranged", refused)
    assert peers(posed, trace, linear) == [linear]


def test_with_copies_remote_units_count(trace: Path) -> None:
    outcome = placer("solve", trace, *MACHINE, "--method", "greedy", "--redundant", 8)
    assert "  remote.server  " in outcome.out
    assert "against linear with copies" in lines_of(outcome.out)
