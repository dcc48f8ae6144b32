"""How many spare slots pay."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from terminal import placer

from placer import Budget, Model, Placement, Problem, Trace
from placer.errors import InvalidInput
from placer.redundancy import Trial, candidates, fewest, redundancy
from tests.instances import noisy_trace, problem

TOY = Model(name="toy", hidden_size=1000, expert_width=1000)  # 6 MB an expert, 12 MB over two layers
QUICK = Budget(seconds=20, rounds=1)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return noisy_trace()


@pytest.fixture(scope="module")
def posed(trace: Trace) -> Problem:
    return problem(trace, "1x4x1", model=TOY, reserve=0.0, gpu_memory=6 * 12e6)


@pytest.fixture(scope="module")
def trials(posed: Problem, trace: Trace) -> list[Trial]:
    return redundancy(posed, trace, "linear", budget=QUICK, evaluation={"model": TOY})


def with_steps(trials: list[Trial], *steps: float) -> list[Trial]:
    reports = [replace(trials[0].report, seconds={"step": step}) for step in steps]
    return [replace(trial, report=report) for trial, report in zip(trials, reports, strict=True)]


@pytest.mark.parametrize(
    ("gigabytes", "shape", "expected"),
    [
        (6 * 12e-3, "1x4x1", [4, 5, 6]),
        (6 * 12e-3 - 1e-9, "1x4x1", [4, 5]),
        (4 * 12e-3, "1x4x1", [4]),
        (80, "1x4x1", [4, 5, 6, 8]),
        (80, "1x1x1", [16]),  # nothing to copy to
        (80, "1x3x1", [6, 7, 8, 10]),  # 16 experts do not divide by 3
    ],
)
def test_what_is_tried_fits_into_memory(
    trace: Trace, gigabytes: float, shape: str, expected: list[int]
) -> None:
    slots = -(-16 // int(np.prod([int(count) for count in shape.split("x")])))
    posed = problem(trace, shape, model=TOY, reserve=0.0, gpu_memory=gigabytes * 1e9, slots_per_gpu=slots)
    assert candidates(posed) == expected


def test_methods_without_copies_get_no_spare_slots(posed: Problem, trace: Trace) -> None:
    assert candidates(posed, "lpt") == [4]
    result = fewest(redundancy(posed, trace, "lpt"), posed)
    assert result.placement.slots_per_rank == 4
    assert result.notes[-1].startswith("redundant 0 chosen, 4 slots a GPU: lpt makes no copies; ")


def test_the_smallest_gpu_says_what_fits(posed: Problem) -> None:
    assert candidates(replace(posed, gpu_memory=(80e9, 80e9, 80e9, 60e6))) == [4, 5]


def test_trials_come_by_slots_and_are_priced_on_the_trace(trials: list[Trial]) -> None:
    assert [trial.slots_per_rank for trial in trials] == [4, 5, 6]
    assert [trial.redundant for trial in trials] == [0, 4, 8]
    assert [trial.result.placement.slots_per_rank for trial in trials] == [4, 5, 6]
    remote = [trial.report.remote["server"] for trial in trials]
    assert remote == sorted(remote, reverse=True)
    assert [trial.report.memory["worst_gpu_bytes"] for trial in trials] == [4 * 12e6, 5 * 12e6, 6 * 12e6]


@pytest.mark.parametrize(
    ("steps", "slots"),
    [
        ((1.0, 1.0, 1.0), 4),
        ((1.0, 0.991, 0.9901), 4),
        ((1.0, 0.989, 0.985), 5),
        ((1.0, 0.9, 0.8), 6),
        ((1.0, 0.9, 1.1), 5),
    ],
)
def test_the_fewest_slots_within_a_hundredth_of_the_best_are_chosen(
    trials: list[Trial], posed: Problem, steps: tuple[float, ...], slots: int
) -> None:
    result = fewest(with_steps(trials, *steps), posed)
    assert result.placement.slots_per_rank == slots
    assert result.seconds == pytest.approx(sum(trial.result.seconds for trial in trials))


def test_the_note_says_what_was_chosen_why_and_what_memory_would_allow(
    trials: list[Trial], posed: Problem
) -> None:
    trials = with_steps(trials, 2e-3, 1e-3, 1e-3)
    assert fewest(trials, posed).notes[-1] == (
        "redundant 4 chosen, 5 slots a GPU: the fewest within 1% of the least step time on this trace "
        "(0: 2 ms, 4: 1 ms, 8: 1 ms); memory would allow 8 (6 slots a GPU)"
    )
    roomy = replace(posed, gpu_memory=80e9)
    assert fewest(trials, roomy).notes[-1].endswith("memory would hold every expert on every GPU")
    unknown = replace(posed, model=replace(TOY, expert_width=None))
    assert fewest(trials, unknown).notes[-1].endswith("for the size of an expert is unknown")


def test_a_stop_keeps_what_is_done_and_says_so(posed: Problem, trace: Trace) -> None:
    stop = threading.Event()
    trials = redundancy(posed, trace, "linear", stop=stop, on_event=lambda event: stop.set())
    assert [trial.slots_per_rank for trial in trials] == [4]
    assert fewest(trials, posed).status == "interrupted"


def test_the_trials_share_the_time(posed: Problem, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    from placer.solution import solve

    budgets: list[Budget] = []

    def recorded(*arguments: object, budget: Budget, **options: object) -> object:
        budgets.append(budget)
        return solve(*arguments, budget=budget, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("placer.variants.solve", recorded)
    redundancy(posed, trace, "linear", budget=Budget(seconds=30, rounds=2))
    redundancy(posed, trace, "linear", slots=(4,), budget=Budget(seconds=None, rounds=2))
    assert budgets == [Budget(seconds=10, rounds=2)] * 3 + [Budget(seconds=None, rounds=2)]


def test_no_number_at_all_is_refused(posed: Problem, trace: Trace) -> None:
    with pytest.raises(InvalidInput):
        redundancy(posed, trace, slots=())


# -- the command ------------------------------------------------------------------------------------------------

MACHINE = ("-t", "dgx-h100", "--shape", "1x4x1")


@pytest.fixture(scope="module")
def file(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "noisy.npz"
    trace.save(path)
    return path


def test_solve_chooses_and_says_so_in_a_note(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    sized = ("--model", "mixtral-8x7b", "--reserve", "0GB", "--gpu-memory", "4GB")  # 1.41 GB for two slots
    outcome = placer(
        "solve", file, *MACHINE, "--method", "linear", "--redundant", "auto", *sized, "-o", path, "--json"
    )
    note = outcome.document["notes"][-1]
    slots = Placement.load(path).slots_per_rank
    assert f"redundant {4 * slots - 16} chosen, {slots} slots a GPU" in note
    assert note.endswith("memory would allow 4 (5 slots a GPU)")
    assert f"note: {note}" in outcome.err
    assert "4 ranks x 4, 5 slots" in outcome.err
    assert outcome.document["report"] == outcome.document["baseline"]  # linear with as many copies


def test_experts_that_need_not_divide_get_the_slots_they_need(file: Path) -> None:
    shape = ("-t", "dgx-h100", "--shape", "1x3x1")
    outcome = placer("solve", file, *shape, "--method", "lpt", "--redundant", "auto", "--json")
    assert outcome.document["notes"][-1].startswith("redundant 2 chosen, 6 slots a GPU")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-load", "auto"), "--redundant auto and --max-load auto exclude each other"),
        (("--slots-per-gpu", 5), "--redundant auto and --slots-per-gpu exclude each other"),
        (("--redundant", "many"), "found 'many', expected a number of 0 or more, or auto"),
    ],
)
def test_what_auto_cannot_go_with_is_refused(file: Path, arguments: tuple[object, ...], words: str) -> None:
    outcome = placer("solve", file, *MACHINE, "--redundant", "auto", *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert words in outcome.err


def test_an_initial_placement_fixes_the_slots(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    assert placer("solve", file, *MACHINE, "--method", "lpt", "-o", path).code == 0
    outcome = placer("solve", file, *MACHINE, "--redundant", "auto", "--initial", path)
    assert (outcome.code, "--redundant auto and --initial exclude each other" in outcome.err) == (2, True)
