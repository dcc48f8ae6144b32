"""The commands: what they print and where, what they write, and the code they exit with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numba
import numpy as np
import pytest
from click.shell_completion import ShellComplete
from instances import noisy_trace
from terminal import placer

from placer import Placement, Result, Trace, solve
from placer.cli import COMMANDS, main
from placer.cli.log import SearchLog, compilation_told
from placer.result import Event

MACHINE = ("-t", "dgx-h100", "--shape", "1x4x2")
QUICK = ("--method", "greedy", "--jobs", "1")

RESULT_KEYS = {
    "schema",
    "method",
    "seed",
    "rounds",
    "seconds",
    "status",
    "objective",
    "objective_unit",
    "bound",
    "gap",
    "bound_method",
    "caps_raised",
    "report",
    "baseline",
    "placement",
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "noisy.npz"
    noisy_trace().save(path)
    return path


@pytest.fixture(scope="module")
def placement(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placements") / "placement.json"
    assert placer("solve", trace, *MACHINE, *QUICK, "-o", path).code == 0
    return path


# -- every command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_of_it(command: str) -> None:
    outcome = placer(command, "--help")
    assert outcome.code == 0
    assert f"  placer {command}" in outcome.out.partition("Example:")[2]


def test_no_arguments_show_the_help() -> None:
    outcome = placer()
    assert outcome.code == 0
    assert all(f"  {command} " in outcome.out for command in COMMANDS)


def test_help_loads_no_solver_and_no_table_library() -> None:
    code = (
        "import sys; from placer.cli import main\n"
        "try: main(['solve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numba', 'scipy', 'ortools', 'networkx', 'rich', 'joblib'}\n"
        "assert not heavy & {name.partition('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "command", sorted({*COMMANDS} - {"permute"})
)  # which needs a checkpoint: its own tests
def test_json_is_one_document_on_stdout(command: str, trace: Path, placement: Path, tmp_path: Path) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "solve": (trace, *MACHINE, *QUICK),
        "evaluate": (placement, trace, "-t", "dgx-h100"),
        "compare": (trace, *MACHINE, "--method", "greedy"),
        "sweep": ("--preset", "article"),
        "inspect": (trace,),
        "check": (placement, trace),
        "bound": (placement, trace, "-t", "dgx-h100"),
        "convert": (trace, "-o", tmp_path / "c.npz"),
        "export": (placement, "--to", "tensorrt_llm", "-o", tmp_path / "map.yaml"),
        "report": (placement, trace, "-t", "dgx-h100", "-o", tmp_path / "report.html"),
        "synth": ("olmoe-like", "--layers", 1, "--tokens", 50, "-o", tmp_path / "t.npz"),
    }
    outcome = placer(command, *arguments.get(command, ()), "--json")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    assert outcome.document["schema"].startswith("placer/")


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "placer", "versions"], capture_output=True, text=True, check=True
    )
    assert done.stdout == placer("versions").out
    assert done.stderr == ""


def test_an_error_is_one_line_and_a_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch, trace: Path) -> None:
    def broken(trace: Trace) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("placer.inspection.inspect", broken)
    with pytest.raises(ZeroDivisionError):
        placer("inspect", trace)


def test_a_reader_that_stops_reading_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "placer", "models"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("typed", "incomplete", "expected"),
    [
        (["solve", "--method"], "gre", "greedy"),
        (["solve", "-t"], "dgx-h1", "dgx-h100"),
        (["solve", "--model"], "mixtral-8x7", "mixtral-8x7b"),
        (["synth"], "olm", "olmoe-like"),
        ([], "insp", "inspect"),
    ],
)
def test_the_shell_completes_names(typed: list[str], incomplete: str, expected: str) -> None:
    shell = ShellComplete(main, {}, "placer", "_PLACER_COMPLETE")
    assert expected in [item.value for item in shell.get_completions(typed, incomplete)]


# -- solve ---------------------------------------------------------------------------------------------------


def test_solve_prints_the_fixed_keys_and_writes_nothing_unasked(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = placer("solve", trace, *MACHINE, *QUICK, "--json").document
    assert document.keys() >= RESULT_KEYS
    assert document["placement"] is None
    assert list(tmp_path.iterdir()) == []


def test_solve_writes_the_placement_that_it_reports(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    solved = placer("solve", trace, *MACHINE, *QUICK, "-o", path, "--json").document
    assert solved["placement"] == str(path)
    assert placer("evaluate", path, trace, "-t", "dgx-h100", "--json").document == solved["report"]


def test_solve_compares_with_contiguous_experts(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "linear.json"
    solved = placer("solve", trace, *MACHINE, "--method", "linear", "-o", path, "--json").document
    assert Placement.load(path).physical_to_logical[0].tolist() == list(range(16))
    assert solved["report"] == solved["baseline"]


def test_the_log_ends_with_the_gain_and_quiet_silences_it(trace: Path) -> None:
    free = ("--max-load", "none")
    loud, quiet = (placer("solve", trace, *MACHINE, *QUICK, *free, *more) for more in ((), ("--quiet",)))
    *_, last_layer, status = loud.err.splitlines()
    assert "noisy, 2 layers x 16 experts, 8 ranks x 2 slots, method greedy, seed 0" in loud.err
    assert " 2/2 " in last_layer
    assert status.startswith("feasible in ")
    assert quiet.err == ""
    without_seconds = [re.sub(r" +[0-9.]+ s$", "", outcome.out, flags=re.M) for outcome in (quiet, loud)]
    assert without_seconds[0] == without_seconds[1] != quiet.out
    assert quiet.out.splitlines()[-1].startswith("against linear: touched.server ")


def test_with_json_the_gain_and_the_notes_are_in_the_log(trace: Path) -> None:
    log = placer("solve", trace, *MACHINE, *QUICK, "--json").err.splitlines()
    assert log[-1].startswith("against linear: touched.server ")
    assert any(line.startswith("note: greedy keeps no load caps") for line in log)


def test_what_the_library_notes_is_in_the_summary_even_when_quiet(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(*arguments: Any, **options: Any) -> Result:
        return replace(solve(*arguments, **options), notes=("2 layers: time ran out before the search",))

    monkeypatch.setattr("placer.solution.solve", noted)
    outcome = placer("solve", trace, *MACHINE, *QUICK, "--quiet")
    assert "note: 2 layers: time ran out before the search" in outcome.out.splitlines()


def test_compilation_is_told_once_and_only_when_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placer.cli.log._compiling", [])  # as in a new process
    said: list[str] = []
    twice = numba.njit(lambda number: number * 2)
    with compilation_told(said.append):
        assert said == []
        assert (twice(1), twice(1.5)) == (2, 3.0)
    assert len(said) == 1
    assert "compiling" in said[0]
    with compilation_told(said.append):
        twice(2)
    assert len(said) == 1


def test_a_proof_is_shown_in_the_log_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    event = Event(
        seconds=1.0,
        done=1,
        layers=1,
        rounds=3,
        method="cpsat",
        objective=2e-6,
        linear=4e-6,
        bound=1e-6,
        load=1.0,
        improved=True,
    )
    log = SearchLog(quiet=False)
    log.add(event)
    log.add(replace(event, bound=None))
    proven, open_ended = capsys.readouterr().err.splitlines()
    assert proven.startswith(open_ended)
    assert proven.endswith("bound 1 us, gap 50.0%")
    assert " 3 H cpsat " in open_ended
    assert "-50.0 %" in open_ended


def test_the_log_has_no_escape_codes_away_from_a_terminal(trace: Path) -> None:
    outcome = placer("solve", trace, *MACHINE, *QUICK)
    assert "\x1b" not in outcome.err + outcome.out


def test_caps_that_were_raised_are_told(trace: Path) -> None:
    outcome = placer(
        "solve", trace, "-t", "dgx-h100", "--shape", "1x1x16", "--method", "lpt", "--max-load", "1.0"
    )
    assert [line for line in outcome.out.splitlines() if "load cap of a gpu raised in 2 of 2 layers" in line]


def test_a_method_without_caps_says_that_it_keeps_none(trace: Path) -> None:
    assert "note: greedy keeps no load caps" in placer("solve", trace, *MACHINE, *QUICK).out


def test_the_log_file_holds_an_event_for_each_layer(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert placer("solve", trace, *MACHINE, *QUICK, "--quiet", "--log", path).code == 0
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["done"] for event in events] == [1, 2, 2]
    assert [event["bound"] is None for event in events] == [True, True, False]  # the last time with bounds


def test_an_initial_placement_is_never_made_worse(trace: Path, placement: Path) -> None:
    free = (*MACHINE, "--max-load", "none", "--json")
    greedy = placer("solve", trace, *free, "--method", "greedy").document["objective"]
    shuffled = placer("solve", trace, *free, "--method", "random").document["objective"]
    started = placer("solve", trace, *free, "--method", "random", "--initial", placement).document[
        "objective"
    ]
    assert greedy < shuffled
    assert started <= greedy * (1 + 1e-12)


def test_copies_are_judged_by_remote_units(trace: Path) -> None:
    outcome = placer("solve", trace, *MACHINE, "--method", "eplb", "--redundant", 8)
    assert "remote.server" in outcome.out.splitlines()[-1]


# -- Ctrl-C --------------------------------------------------------------------------------------------------

_WAITING = """
import sys, threading
import placer.solvers.random as method
from placer.cli import main
place = method.place
def waiting(layer, *, rng, clock, initial=None):
    if clock.rounds != 1:  # not the trial run before the clock starts
        print("searching", file=sys.stderr, flush=True)
        {wait}
    return place(layer, rng=rng, clock=clock)
method.place = waiting
main(sys.argv[1:])
"""


def _interrupted(wait: str, trace: Path, output: Path, signals: int) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a solve that waits, and is sent Ctrl-C `signals` times."""
    code = _WAITING.format(wait=wait)
    arguments = ["solve", trace, *MACHINE, "--method", "random", "--jobs", "1", "--json", "-o", output]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = _read_until(process.stderr, "searching")
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        said += _read_until(process.stderr, "interrupted") if "interrupted" not in said else ""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, said + err


def _read_until(stream: IO[str], word: str) -> str:
    said = ""
    for line in stream:
        said += line
        if word in line:
            break
    return said


def test_ctrl_c_keeps_the_best_so_far(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    code, out, err = _interrupted("clock.stop.wait()", trace, path, signals=1)
    assert code == 130
    document: dict[str, Any] = json.loads(out)
    assert (document["status"], document["placement"]) == ("interrupted", str(path))
    assert Placement.load(path).num_layers == 2
    assert "Traceback" not in err


def test_a_second_ctrl_c_gives_up_and_writes_nothing(trace: Path, tmp_path: Path) -> None:
    code, out, err = _interrupted("threading.Event().wait()", trace, tmp_path / "p.json", signals=2)
    assert (code, out) == (130, "")
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in err


# -- evaluate ------------------------------------------------------------------------------------------------


def test_failed_gates_exit_with_5_and_a_line_each(trace: Path, placement: Path) -> None:
    gates = [
        "--require",
        "remote.server<=0.1",
        "--require",
        "touched.gpu<=100",
        "--require",
        "load.gpu.max_over_mean<1",
    ]
    outcome = placer("evaluate", placement, trace, "-t", "dgx-h100", *gates, "--json")
    assert outcome.code == 5
    assert outcome.document["schema"] == "placer/report/1"
    assert [line.split()[:2] for line in outcome.err.splitlines()] == [
        ["ok:", "touched.gpu"],
        ["Error:", "remote.server"],
        ["Error:", "load.gpu.max_over_mean"],
    ]


def test_gates_that_hold_exit_with_0(trace: Path, placement: Path) -> None:
    outcome = placer("evaluate", placement, trace, "-t", "dgx-h100", "--require", "touched.rack<=1")
    assert (outcome.code, outcome.err) == (0, "ok: touched.rack 1 <= 1.0\n")


def test_evaluate_takes_the_shape_of_the_placement(trace: Path, placement: Path) -> None:
    plain, given = (
        placer("evaluate", placement, trace, "-t", "dgx-h100", *shape, "--json").document
        for shape in ((), ("--shape", "1x4x2"))
    )
    assert plain == given


def test_evaluate_refuses_another_shape(trace: Path, placement: Path) -> None:
    outcome = placer("evaluate", placement, trace, "-t", "dgx-h100", "--shape", "1x2x4")
    assert outcome.code == 2
    assert "--shape: found 1x2x4, expected 1x4x2" in outcome.err
    assert placer("check", placement, "--shape", "1x2x4").err == outcome.err


# -- compare -------------------------------------------------------------------------------------------------


def test_compare_shows_linear_and_both_parts(trace: Path) -> None:
    outcome = placer("compare", trace, *MACHINE, "--method", "greedy", "--holdout", "0.25", "--json")
    rows = outcome.document["rows"]
    assert [row["method"] for row in rows] == ["linear", "greedy"]
    assert [row["train"]["tokens"] for row in rows] == [
        440,
        440,
    ]  # 22 of 30 sequences, rounded by their number
    assert [row["held_out"]["tokens"] for row in rows] == [160, 160]


def test_compare_runs_each_cap_once_for_methods_that_keep_caps(trace: Path) -> None:
    arguments = (
        "--method",
        "greedy",
        "--method",
        "lpt",
        "--max-load",
        "1.05,none",
        "--seeds",
        2,
        "--seed",
        7,
        "--json",
    )
    rows = placer("compare", trace, *MACHINE, *arguments).document["rows"]
    assert [(row["method"], row["max_load"], row["seed"]) for row in rows] == [
        ("linear", None, 7),
        ("linear", None, 8),
        ("greedy", None, 7),
        ("greedy", None, 8),
        ("lpt", 1.05, 7),
        ("lpt", 1.05, 8),
        ("lpt", None, 7),
        ("lpt", None, 8),
    ]


def test_the_table_of_a_comparison_has_a_line_for_each_method_and_cap(trace: Path) -> None:
    outcome = placer("compare", trace, *MACHINE, "--method", "greedy", "--seeds", 2, "--quiet")
    table = outcome.out.splitlines()
    assert [line.split()[0] for line in table[-2:]] == ["linear", "greedy"]
    assert "+-" in table[-1]
    assert outcome.err == ""


def test_compare_says_what_runs_before_it_says_what_came_of_it(trace: Path) -> None:
    log = placer("compare", trace, *MACHINE, "--method", "lpt").err.splitlines()
    rows = [line for line in log if "running" in line or "held-out" in line]
    assert [line.partition(" ")[0] for line in rows] == ["linear,", "", "lpt,", ""]
    assert rows[2] == "lpt, max load 1.05, seed 0: running"


def test_compare_judges_on_another_trace(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    noisy_trace(tokens=100, seed=1).save(other)
    row = placer("compare", trace, *MACHINE, "--method", "linear", "--test", other, "--json").document[
        "rows"
    ][0]
    assert (row["train"]["tokens"], row["held_out"]["tokens"]) == (600, 100)


def test_compare_refuses_a_test_trace_of_another_model(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    noisy_trace(num_experts=32, tokens=100).save(other)
    outcome = placer("compare", trace, *MACHINE, "--method", "linear", "--test", other, "--quiet")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


# -- the others ----------------------------------------------------------------------------------------------


def test_inspect_tells_the_shape_of_a_trace(trace: Path) -> None:
    found = placer("inspect", trace, "--json").document
    assert (found["tokens"], found["layers"], found["experts"], found["top_k"]) == (600, 2, 16, 4)
    assert found["sequences"] == 30
    assert found["domains"] is None
    assert 0 < found["dropped"] < 0.05


def test_check_warns_of_an_expert_twice_on_one_gpu(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    Placement(physical_to_logical=np.array([[0, 0, 1, 2]]), num_experts=3, shape=(1, 1, 2)).save(path)
    outcome = placer("check", path, "--json")
    assert outcome.code == 0
    assert outcome.document["duplicates"] == [{"layer": 0, "rank": 0, "expert": 0}]
    assert "layer 0, rank 0, expert 0" in outcome.err


def test_check_says_how_many_copies_the_layers_have(tmp_path: Path) -> None:
    slots = np.array([[0, 1, 2, 3, 0, 1], [0, 1, -1, 2, 3, -1]])
    placed = Placement(physical_to_logical=slots, num_experts=4, shape=(1, 2, 1))
    placed.save(tmp_path / "uneven.json")
    assert "0 to 2 a layer; at most 2 slots" in placer("check", tmp_path / "uneven.json").out
    replace(placed, physical_to_logical=slots[:1], layer_ids=(0,)).save(tmp_path / "even.json")
    assert "2 a layer; at most 2 slots" in placer("check", tmp_path / "even.json").out


def test_check_refuses_a_placement_of_another_trace(placement: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    noisy_trace(layers=3, tokens=20).save(other)
    outcome = placer("check", placement, other)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "layers: found 0..2" in outcome.err


def test_check_holds_the_experts_against_the_memory_of_the_machine(placement: Path, trace: Path) -> None:
    sized = ("--model", "mixtral-8x7b", "--reserve", "0GB")
    held = placer("check", placement, trace, "-t", "dgx-h100", *sized, "--json").document["worst_gpu_bytes"]
    assert held == 2 * 2 * 3 * 4096 * 14336 * 2  # layers, slots, matrices, hidden, expert width, BF16
    short = placer("check", placement, "-t", "dgx-h100", *sized, "--gpu-memory", "1GB")
    assert (short.code, short.out, short.err.count("\n")) == (3, "", 1)
    assert "memory: GPU 0 needs 1.41 GB" in short.err
    unknown = placer("check", placement, trace, "-t", "dgx-h100")
    assert (unknown.code, "memory       not checked: size of an expert" in unknown.out) == (0, True)


def test_synth_repeats_itself(tmp_path: Path) -> None:
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path in paths:
        assert placer("synth", "olmoe-like", "--layers", 1, "--tokens", 60, "--seed", 3, "-o", path).code == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_synth_says_what_it_makes_before_it_is_made(tmp_path: Path) -> None:
    outcome = placer("synth", "olmoe-like", "--layers", 1, "--tokens", 1200, "-o", tmp_path / "t.npz")
    assert outcome.err == "making 1 layers x 1,200 tokens...\n"


def test_topology_takes_another_shape() -> None:
    document = placer("topology", "dgx-h100", "--shape", "2x4x8", "--json").document
    assert (document["shape"], document["num_ranks"]) == ([2, 4, 8], 64)
    assert [level["units"] for level in document["levels"]] == [64, 8, 2]


def test_methods_lists_every_method_with_what_it_needs() -> None:
    from placer.solvers import names

    listed = placer("methods", "--json").document["methods"]
    assert [row["name"] for row in listed] == names()
    assert all(row["summary"] for row in listed)


def test_the_table_of_methods_explains_its_words() -> None:
    table = placer("methods").out
    assert "load (routes where there are any)" in table
    assert all(f"{word} = " in table for word in ("load", "pairs", "routes", "caps", "copies", "levels"))


def test_methods_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("no such module", name="kahip")

    monkeypatch.setattr("placer.solvers.method", missing)
    assert "unavailable: kahip is not installed" in placer("methods").out
