"""compare: what is fitted, what is judged, and what is left out."""

from __future__ import annotations

import threading

import pytest
from instances import blocks_trace, noisy_trace

from placer import Topology, Trace, compare
from placer.comparison import Row, against
from placer.errors import InvalidInput
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
    "options", [{"seeds": 0}, {"holdout": 1.0}, {"max_loads": []}, {"methods": ["nope"]}]
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
