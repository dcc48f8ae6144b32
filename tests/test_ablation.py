"""The ablation's stages are those of the search, and its re-split of two units is exact."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ablation import ablated, main, table
from benchmarks.resplit import LARGEST, resplit, splittable
from placer import Trace, evaluate
from placer.clock import Clock
from placer.errors import InvalidInput
from placer.layer import Layer, Occupant
from placer.solution import solve
from placer.solvers import tabu
from tests.instances import blocks_trace, noisy_trace, problem

BOOK = """
[traces]
tiny = { file = "traces/tinymoe.npz", tokens = 107_520 }
absent = { file = "absent.npz", tokens = 1 }

[[instances]]
name = "tiny"
trace = "tiny"
shape = "1x8x8"
fit = { modulo = 100, residue = 0 }
caps = [{}, { max_load = 1.05 }]

[[instances]]
name = "absent"
trace = "absent"
shape = "1x8x8"
caps = [{}]
"""
STAGES = [
    "contiguous",
    "tabu on pairs",
    "short exact search",
    "exact tabu",
    "crossing, shuffling",
    "set partition",
    "exact re-split",
]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Two or three servers of two or three slots; choices are dropped, experts unused, slots empty."""
    servers, slots = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    experts = draw(st.integers(max(2, servers * slots - 2), servers * slots))
    used = draw(st.integers(1, experts))
    top_k = draw(st.integers(1, min(4, used)))
    choice = st.lists(st.integers(0, used - 1), min_size=top_k, max_size=top_k, unique=True)
    tokens = np.array(draw(st.lists(choice, min_size=1, max_size=20)), np.int16)
    dropped = draw(st.lists(st.booleans(), min_size=tokens.size, max_size=tokens.size))
    tokens[np.array(dropped).reshape(tokens.shape)] = -1
    trace = Trace(topk_idx=tokens[:, None], num_experts=experts)
    max_load = draw(st.sampled_from([None, 1.0, 1.1, 1.3]))
    return problem(trace, f"1x{servers}x{slots}", slots_per_gpu=1, max_load=max_load).layer(0)


def quality(layer: Layer, occupant: Occupant) -> tuple[float, float]:
    """(excess, cost), rounded so that equal sums of fractions are equal."""
    return round(layer.excess(occupant), 6), round(layer.cost(occupant) * 1e9, 6)


def splits(layer: Layer, occupant: Occupant) -> list[tuple[float, float]]:
    """The quality of every arrangement that differs in two units at most, all halves enumerated."""
    size = int(layer.sizes[0])
    found = []
    for one, other in itertools.combinations(range(layer.num_slots // size), 2):
        at = np.concatenate([np.arange(unit * size, (unit + 1) * size) for unit in (one, other)])
        for half in itertools.combinations(occupant[at].tolist(), size):
            changed = occupant.copy()
            changed[at] = [*half, *(expert for expert in occupant[at].tolist() if expert not in half)]
            found.append(quality(layer, changed))
    return found


@given(layers(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_no_split_of_two_units_is_better_than_the_one_found(layer: Layer, seed: int) -> None:
    start = np.random.default_rng(seed).permutation(layer.num_slots).astype(np.int32)
    found = resplit(layer, start)
    assert sorted(found.tolist()) == list(range(layer.num_slots))
    assert quality(layer, found) <= quality(layer, start)
    assert quality(layer, found) <= min(splits(layer, found))
    if layer.num_slots == 2 * layer.sizes[0]:  # one pair: it is the optimum
        assert quality(layer, found) == min(splits(layer, start))


def test_a_re_split_keeps_a_cap_that_a_cheaper_split_would_break() -> None:
    tokens = np.array([[0, 1]] * 6 + [[2, 3]] * 2, np.int16)
    free = problem(Trace(topk_idx=tokens[:, None], num_experts=4), "1x2x2").layer(0)
    start = np.array([0, 2, 1, 3], np.int32)
    assert sorted(map(sorted, resplit(free, start).reshape(2, 2).tolist())) == [[0, 1], [2, 3]]
    capped = replace(free, max_load=1.0)
    assert np.array_equal(resplit(capped, start), start)
    over = np.array([0, 1, 2, 3], np.int32)
    assert capped.excess(over) > 0
    assert capped.excess(resplit(capped, over)) == 0


def test_only_one_level_of_small_units_is_re_split() -> None:
    assert splittable(problem(noisy_trace(), "1x4x4").layer(0))
    assert not splittable(problem(noisy_trace(), "2x2x4").layer(0))
    large = noisy_trace(num_experts=LARGEST + 2, tokens=40)
    assert not splittable(problem(large, f"1x2x{LARGEST // 2 + 1}").layer(0))


@pytest.mark.parametrize(("shape", "max_load"), [("1x4x4", None), ("1x4x4", 1.05), ("2x2x4", 1.05)])
def test_no_stage_is_worse_than_the_one_before(shape: str, max_load: float | None) -> None:
    layer = problem(noisy_trace(), shape, max_load=max_load).layer(1)
    reached = ablated(layer, np.random.default_rng(0))
    assert [r.stage for r in reached] == STAGES[: 7 if splittable(layer) else 6]
    for one, other in itertools.pairwise(reached):
        assert (other.excess, other.cost) <= (one.excess, one.cost)
    assert (reached[-1].excess, reached[-1].cost) < (reached[0].excess, reached[0].cost)
    assert all(r.seconds > 0 for r in reached)


@pytest.mark.parametrize("shape", ["1x4x4", "2x2x4"])
def test_the_stages_up_to_the_rounds_are_the_search(shape: str) -> None:
    layer = problem(noisy_trace(), shape).layer(0)
    reached = {r.stage: r for r in ablated(layer, np.random.default_rng(3))}
    for rounds, stage in ((0, "exact tabu"), (None, "crossing, shuffling")):
        clock = Clock.start(rounds=rounds)
        found, _ = tabu.search(layer, layer.linear(), rng=np.random.default_rng(3), clock=clock)
        assert np.array_equal(reached[stage].occupant, found)


def test_a_stage_is_measured_like_a_placement() -> None:
    trace = noisy_trace().layers(slice(0, 1))
    asked = problem(trace, "1x4x4")
    report = evaluate(solve(asked, "linear").placement, trace, asked.topology)
    first = ablated(asked.layer(0), np.random.default_rng(0))[0]
    assert first.touched == pytest.approx(report.touched["server"])
    assert first.load == pytest.approx(report.load["server"]["max_over_mean"])


def test_planted_blocks_are_found_and_tabled() -> None:
    rows = table(problem(blocks_trace(), "1x4x4"), None, 0).splitlines()
    assert rows[0].split() == ["stage", "touched.server", "load", "seconds", "gain"]
    assert rows[1].endswith("-")
    assert rows[-1].removeprefix(STAGES[-1]).split()[0] == "1.0000"
    assert rows[-1].split()[-1] == "0"


def test_nothing_to_search_is_said_in_one_line() -> None:
    with pytest.raises(InvalidInput, match="found nothing to search"):
        ablated(problem(noisy_trace(), "1x1x16").layer(0), np.random.default_rng(0))


def test_the_command_tables_every_instance_and_skips_absent_traces(tmp_path: Path) -> None:
    (tmp_path / "book.toml").write_text(BOOK)
    words = ["--instances", str(tmp_path / "book.toml"), "--instance", "*", "--layers", "1"]
    words += ["--traces", str(tmp_path), "-o", str(tmp_path / "page.md")]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "absent/none skipped: " in done.output
    page = (tmp_path / "page.md").read_text()
    assert str(tmp_path) not in page
    for name in ("tiny/none", "tiny/1.05"):
        lines = done.output.split(f"{name}\n")[1].splitlines()[1:8]
        assert [line.split("  ")[0] for line in lines] == STAGES
        assert f"{name}\nstage" in page
        touched = [
            float(line.removeprefix(stage).split()[0]) for stage, line in zip(STAGES, lines, strict=True)
        ]
        if name == "tiny/none":
            assert touched == sorted(touched, reverse=True)


def test_an_unknown_instance_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "book.toml").write_text(BOOK)
    done = CliRunner().invoke(main, ["--instances", str(tmp_path / "book.toml"), "--instance", "tiny/non"])
    assert done.exit_code == InvalidInput.exit_code
    assert "did you mean tiny/none?" in done.output
