"""The trade of load against traffic."""

from __future__ import annotations

import pytest

from placer import Budget
from placer.errors import InvalidInput
from placer.spectrum import chosen, spectrum
from tests.instances import noisy_trace, problem


def test_the_cap_with_the_least_step_time_comes_first() -> None:
    trace = noisy_trace(layers=1)
    points = spectrum(problem(trace, "1x4x1"), trace, "tabu", budget=Budget(seconds=50, rounds=1))
    steps = [point.report.seconds["step"] for point in points]
    assert steps == sorted(steps)
    assert {point.max_load for point in points} == {None, 1.25, 1.10, 1.05, 1.02}
    free = next(point for point in points if point.max_load is None)
    assert all(free.report.touched["server"] <= point.report.touched["server"] + 1e-9 for point in points)


def test_the_choice_says_what_it_was_chosen_from() -> None:
    trace = noisy_trace(layers=1)
    points = spectrum(problem(trace, "1x4x1"), trace, "lpt", caps=(None, 1.1))
    result = chosen(points)
    assert result.placement is points[0].result.placement
    assert "chosen by step time" in result.notes[-1]
    assert "1.1:" in result.notes[-1]


def test_no_cap_at_all_is_refused() -> None:
    trace = noisy_trace(layers=1)
    with pytest.raises(InvalidInput):
        spectrum(problem(trace, "1x4x1"), trace, caps=())
