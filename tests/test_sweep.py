"""Sweeps over expert-parallel widths: the presets' figures, uniform routing against traces, and the command."""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import blocks_trace, noisy_trace
from terminal import placer

from placer.alltoall import SCHEMES
from placer.cliff import Cliff, Row, Sweep
from placer.errors import InvalidInput
from placer.model import Model
from placer.plot import plot
from placer.presets import PRESETS, preset
from placer.result import Budget
from placer.sweep import group_of, sweep
from placer.topology import Topology
from placer.trace import Trace
from placer.uniform import node_limited_vectors

H100 = Topology.load("dgx-h100")
MIXTRAL = Model.named("mixtral-8x7b")
V3 = Model.named("deepseek-v3")
QUICK: dict[str, Any] = {"budget": Budget(seconds=None), "max_load": None, "load_margin": 0.0}


def by_width(found: Sweep, routing: str = "uniform", method: str = "linear") -> dict[int, Row]:
    return {row.ep: row for row in found.series()[routing, method]}


def ratio(row: Row) -> float:
    assert row.a2a_over_compute is not None
    return row.a2a_over_compute


# -- presets -------------------------------------------------------------------------------------------------


def test_the_article_preset_gives_the_printed_figures() -> None:
    rows = by_width(preset("article"))
    assert list(rows) == [1, 2, 4, 8, 16, 32]
    assert [f"{row.inter_server_gb:.1f}" for row in rows.values()] == [
        "0.0",
        "0.0",
        "56.4",
        "169.1",
        "394.6",
        "845.6",
    ]
    assert [f"{row.intra_server_gb:.1f}" for row in rows.values()] == [
        "0.0",
        "28.2",
        "28.2",
        "28.2",
        "28.2",
        "28.2",
    ]
    assert [f"{ratio(row):.3f}" for row in rows.values()] == [
        "0.000",
        "0.011",
        "0.201",
        "0.611",
        "1.470",
        "3.360",
    ]


def test_the_article_preset_tells_where_the_cliff_is() -> None:
    (cliff,) = preset("article").cliffs()
    assert (cliff.leaves_server, cliff.passes_one) == (4, 16)
    assert cliff.near is not None
    assert 8 < cliff.near < 16


def test_hot_experts_side_by_side_double_the_bytes_and_spreading_them_takes_the_excess_away() -> None:
    found = preset("article-imbalance")
    hot, spread, copies = (by_width(found, "zipf-0.8", method) for method in ("linear", "lpt", "eplb"))
    even = by_width(found)
    assert f"{hot[16].inter_server_gb:.0f} {hot[32].inter_server_gb:.0f}" == "395 804"
    assert f"{ratio(hot[16]):.2f} {ratio(hot[32]):.2f}" == "1.47 2.99"
    assert hot[32].inter_server_gb / hot[16].inter_server_gb == pytest.approx(2.04, abs=0.005)
    assert even[32].inter_server_gb / even[16].inter_server_gb == pytest.approx(1.5)
    for ep in (16, 32):
        excess = hot[ep].inter_server_gb - even[ep].inter_server_gb
        # Spreading halves it about, for the hottest expert alone is too hot; one copy a GPU removes it.
        assert 0.3 * excess < spread[ep].inter_server_gb - even[ep].inter_server_gb < 0.65 * excess
        assert 0 < copies[ep].inter_server_gb - even[ep].inter_server_gb < 0.01 * excess
        assert ratio(copies[ep]) < 1 < ratio(hot[ep])


def test_deepseek_sends_less_than_its_node_limit_allows() -> None:
    rows = by_width(preset("deepseek-v3-h800"))
    size = 7168 * (1 + 4 / 128) + 7168 * 2
    for ep, servers in ((64, 8), (128, 16), (256, 32)):
        most = node_limited_vectors(4096, 4, servers) * 256 * 58 * size / 1e9
        # With a group on each server 3.63 of 4 servers are touched, with a group on several more than 4.
        assert (rows[ep].inter_server_gb < most) == (ep == 64)
    assert rows[64].inter_server_gb == pytest.approx(3.629 * 7 / 8 * 4096 * 256 * 58 * size / 1e9, rel=1e-4)
    assert [row.fits for row in rows.values()] == [False] * 4 + [True] * 5  # 654 GB of experts in FP8


def test_only_one_all_to_all_a_layer_is_priced_at_the_published_batch() -> None:
    # DeepSeek-V3 reports one to one for training; the model is within a factor of two of it.
    row = by_width(preset("deepseek-v3-h800", [64]))[64]
    assert 1 < ratio(row) < 2
    # DeepEP (docs/legacy.md, EP64): FP8 dispatch of 4 servers a token in 2.36 ms, BF16 combine in 4.7 ms.
    share = 3.629 / 4
    assert row.seconds["dispatch"] / 58 == pytest.approx(2.36e-3 * share, rel=0.05)
    assert row.seconds["combine"] / 58 == pytest.approx(4.70e-3 * share, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_widths_and_refuse_those_that_do_not_fit(name: str) -> None:
    assert {row.ep for row in preset(name, [8, 2]).rows} == {2, 8}
    with pytest.raises(InvalidInput, match="EP 3: "):
        preset(name, [3])


def test_an_unknown_preset_is_told_near_ones() -> None:
    with pytest.raises(InvalidInput, match="unknown preset 'articles': did you mean article"):
        preset("articles")


# -- groups --------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 6)] * 3), ep=st.integers(-1, 220))
def test_a_group_holds_whole_units_or_lies_in_one(shape: tuple[int, int, int], ep: int) -> None:
    machine = H100.with_shape(shape)
    sizes = (*machine.unit_sizes, machine.num_ranks)
    tiles = 0 < ep <= machine.num_ranks and all(ep % size == 0 or size % ep == 0 for size in sizes)
    if not tiles:
        with pytest.raises(InvalidInput, match=f"EP {ep}: groups of {ep} consecutive GPUs do not tile"):
            group_of(machine, ep)
        return
    group = group_of(machine, ep)
    assert group.num_ranks == ep
    for whole, part in zip(sizes, (*group.unit_sizes, ep), strict=True):
        assert part == min(whole, ep)


def test_a_mesh_of_fewer_gpus_keeps_the_rate_of_its_links() -> None:
    mesh = Topology.load("mi300x")
    assert group_of(mesh, 2).levels[0].pair_bandwidth == pytest.approx(mesh.levels[0].pair_bandwidth)


# -- uniform routing -------------------------------------------------------------------------------------------


def all_routings(copies: int = 2) -> Trace:
    """Every choice of 2 of 8 experts, in each of `copies` sequences: routing that is exactly uniform."""
    each = np.array(list(combinations(range(8), 2)), np.int16)
    ids = np.tile(each, (copies, 1))[:, None, :]
    sequence = np.repeat(np.arange(copies), len(each))
    return Trace(topk_idx=ids, num_experts=8, sequence=sequence, name="all")


@pytest.mark.parametrize("alltoall", [name for name in SCHEMES if name != "follow"])
@pytest.mark.parametrize("shape", ["1x4x2", "2x2x2"])
def test_uniform_rows_are_those_of_a_trace_with_every_routing(alltoall: str, shape: str) -> None:
    machine = H100.with_shape(shape)
    found = sweep(machine, model=MIXTRAL, trace=all_routings(), method="linear", alltoall=alltoall, **QUICK)
    uniform, traced = by_width(found), by_width(found, "all")
    assert list(uniform) == list(traced) == [1, 2, 4, 8]
    for ep, row in traced.items():
        assert row.inter_server_gb == pytest.approx(uniform[ep].inter_server_gb, rel=1e-9)
        assert row.intra_server_gb == pytest.approx(uniform[ep].intra_server_gb, rel=1e-9)
        assert row.seconds == pytest.approx(uniform[ep].seconds, rel=1e-9)
        assert row.load == pytest.approx(1.0)


@pytest.mark.parametrize("alltoall", [name for name in SCHEMES if name != "follow"])
def test_one_gpu_exchanges_nothing_and_one_server_keeps_everything_inside(alltoall: str) -> None:
    for ep, row in by_width(sweep(H100, model=V3, alltoall=alltoall)).items():
        assert (row.inter_server_gb > 0) == (ep > 8)
        assert (row.intra_server_gb > 0) == (row.seconds["dispatch"] > 0) == (ep > 1)


@settings(max_examples=30, deadline=None)
@given(ep=st.sampled_from([16, 32, 64]), tokens=st.integers(1, 10_000))
def test_naive_copies_off_the_server_are_a_matter_of_counting(ep: int, tokens: int) -> None:
    row = by_width(sweep(H100, [ep], model=MIXTRAL_64, alltoall="naive", tokens_per_gpu=tokens))[ep]
    copies = 64 * tokens * 2 * (1 - 8 / ep) * 32
    assert row.inter_server_gb == pytest.approx(copies * 4096 * 4 / 1e9)
    assert row.intra_server_gb == pytest.approx(64 * tokens * 2 * (7 / ep) * 32 * 4096 * 4 / 1e9)


MIXTRAL_64 = replace(MIXTRAL, num_experts=64)


def test_uneven_experts_slow_the_step_and_not_the_ratio() -> None:
    machine = Topology.load("gb200-nvl72")
    rows = by_width(sweep(machine, [6, 8], model=MIXTRAL))
    assert rows[8].seconds["compute"] == pytest.approx(rows[8].seconds["even_compute"])
    assert rows[6].seconds["compute"] > 1.3 * rows[6].seconds["even_compute"]
    assert rows[6].load == pytest.approx(2 / (8 / 6))
    for row in rows.values():
        parts = row.seconds
        assert parts["step"] == pytest.approx(parts["dispatch"] + parts["combine"] + parts["compute"])
        assert ratio(row) == pytest.approx((parts["dispatch"] + parts["combine"]) / parts["even_compute"])


def test_widths_that_do_not_fit_are_left_out_with_a_reason() -> None:
    found = sweep(H100, [12, 4, 16, 4, 128], model=MIXTRAL)
    assert [row.ep for row in found.rows] == [4]
    left = [note for note in found.notes if note.endswith("left out")]
    assert [note.partition(":")[0] for note in left] == ["EP 12", "EP 16", "EP 128"]
    assert "found 8 experts" in left[1]
    assert not any("left out" in note for note in sweep(H100, model=MIXTRAL).notes)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ([12], {"model": V3}, "^EP 12: groups of 12 consecutive GPUs do not tile 1x8x8 dgx-h100$"),
        ([512], {"model": V3}, "^EP 512: found 256 experts"),
        ([], {"model": V3}, "widths: found none"),
        (None, {}, "neither a model nor a trace"),
        (None, {"model": Model(name="toy", hidden_size=8)}, "num_experts is unknown"),
        (None, {"model": V3, "tokens_per_gpu": 0}, "tokens per GPU: found 0"),
        (None, {"model": V3, "alltoall": "follow"}, "follow: cannot be swept"),
        (None, {"model": V3, "alltoall": "nave"}, "unknown all-to-all 'nave'"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    widths: list[int] | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        sweep(H100, widths, **options)


# -- a trace ---------------------------------------------------------------------------------------------------

SLOW = H100.with_shape("1x4x1")
TOY = Model(name="toy", hidden_size=1024, expert_width=2048)


def test_a_placement_for_the_trace_moves_the_cliff_away() -> None:
    trace = blocks_trace()  # experts e with equal e % 4 are used together: the worst case for contiguous ones
    found = sweep(SLOW, model=TOY, trace=trace, method="refine", **QUICK)
    linear, placed = by_width(found, "blocks"), by_width(found, "blocks", "refine")
    assert placed[1].seconds == linear[1].seconds
    for ep in (2, 4):
        # A token's experts meet on one GPU; which leaves its home with chance 1 - 1 / ep.
        tokens, layers = 4 * 4096, trace.num_layers
        assert placed[ep].inter_server_gb == pytest.approx((1 - 1 / ep) * tokens * layers * 1024 * 4 / 1e9)
        assert placed[ep].inter_server_gb < 0.6 * linear[ep].inter_server_gb
        assert ratio(placed[ep]) < ratio(linear[ep])
    cliffs = {(cliff.routing, cliff.method): cliff for cliff in found.cliffs()}
    linear_cliff, moved_cliff = cliffs["blocks", "linear"], cliffs["blocks", "refine"]
    assert linear_cliff.near is not None
    assert moved_cliff.near is not None
    moved = found.moved(moved_cliff)
    assert moved == moved_cliff.near / linear_cliff.near > 1.1
    assert f"{moved:.2f} times as far as linear" in str(found)
    assert found.to_dict()["cliffs"][-1]["moved"] == moved


def test_rows_of_a_trace_are_judged_on_sequences_that_were_not_fitted() -> None:
    trace = noisy_trace()
    found = sweep(SLOW, [4], model=TOY, trace=trace, method="refine", holdout=0.25, **QUICK)
    assert "placements fitted on 440 tokens, judged on 160 others" in found.notes
    from placer.evaluation import evaluate
    from placer.problem import Problem
    from placer.solution import solve

    fit, unseen = trace.split(0.75)
    problem = Problem.from_trace(fit, SLOW, model=TOY, max_load=None, load_margin=0.0)
    placement = solve(problem, "refine", budget=QUICK["budget"]).placement
    report = evaluate(placement, unseen, SLOW, model=TOY)
    row = by_width(found, "noisy", "refine")[4]
    assert row.inter_server_gb == pytest.approx(report.bytes_per_token["server"] * 4 * 4096 / 1e9)
    assert row.seconds["step"] == pytest.approx(report.seconds["step"])
    assert row.load == pytest.approx(report.load["gpu"]["max_over_mean"])


def test_a_straggler_does_not_flatter_the_ratio() -> None:
    found = sweep(SLOW, [4], model=TOY, trace=noisy_trace(), method="linear", **QUICK)
    row, even = by_width(found, "noisy")[4], by_width(found)[4]
    assert row.load > 1.1
    assert row.seconds["compute"] > row.seconds["even_compute"]
    assert row.seconds["even_compute"] == even.seconds["even_compute"]


def test_experts_that_do_not_divide_leave_uniform_routing_only() -> None:
    found = sweep(H100.with_shape("1x3x1"), [1, 3], model=TOY, trace=noisy_trace(), method="linear", **QUICK)
    assert [(row.ep, row.routing) for row in found.rows] == [(1, "uniform"), (1, "noisy"), (3, "uniform")]
    assert "EP 3: uniform routing only: 16 experts do not divide by 3 GPUs" in found.notes


def test_an_unknown_expert_size_leaves_the_ratio_open() -> None:
    found = sweep(SLOW, [2], trace=noisy_trace(), method="linear", **QUICK)
    assert {row.a2a_over_compute for row in found.rows} == {row.fits for row in found.rows} == {None}
    assert any("expert size of model assumed unknown" in note for note in found.notes)
    assert found.to_dict()["rows"][0]["a2a_over_compute"] is None
    assert str(found).splitlines()[4].endswith(" -")


def test_a_stopped_sweep_keeps_the_rows_it_has() -> None:
    stop, rows = threading.Event(), list[Row]()

    def on_row(row: Row) -> None:
        rows.append(row)
        if len(rows) == 4:
            stop.set()

    trace = noisy_trace()
    found = sweep(SLOW, model=TOY, trace=trace, method="refine", on_row=on_row, stop=stop, **QUICK)
    assert list(found.rows) == rows
    assert len(rows) == 4
    assert found.notes[-1] == "interrupted: rows are missing"


# -- the cliff -------------------------------------------------------------------------------------------------


def rows_of(ratios: dict[int, float]) -> list[Row]:
    return [
        Row(
            ep=ep,
            routing="uniform",
            method="linear",
            inter_server_gb=float(ep > 8),
            intra_server_gb=0.0,
            seconds={
                "dispatch": value,
                "combine": 0.0,
                "compute": 1.0,
                "step": 1 + value,
                "even_compute": 1.0,
            },
        )
        for ep, value in ratios.items()
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=6))
def test_the_cliff_lies_between_the_last_width_below_and_the_first_above(ratios: list[float]) -> None:
    rows = rows_of({2**power: value for power, value in enumerate(ratios)})
    cliff = Cliff.of(rows)
    above = [row.ep for row in rows if ratio(row) > 1]
    assert cliff.passes_one == (above[0] if above else None)
    if cliff.passes_one is None:
        assert cliff.near is None
    else:
        assert cliff.near is not None
        assert max(1, cliff.passes_one // 2) <= cliff.near <= cliff.passes_one
    assert cliff.leaves_server == (16 if len(ratios) > 4 else None)


def test_the_cliff_is_said_in_words() -> None:
    assert str(Cliff.of(rows_of({8: 0.5, 16: 1.5}))) == (
        "uniform, linear: traffic leaves the server at EP 16, all-to-all passes compute at EP 16 (near 11.3)"
    )
    assert str(Cliff.of(rows_of({8: 0.5}))) == (
        "uniform, linear: traffic never leaves the server, all-to-all stays below compute"
    )


# -- the command -----------------------------------------------------------------------------------------------


def test_the_command_prints_one_document() -> None:
    outcome = placer("sweep", "--preset", "article", "--ep", "16,32", "--json")
    assert (outcome.code, outcome.out.count("\n")) == (0, 1)
    assert outcome.document["schema"] == "placer/sweep/1"
    assert [row["ep"] for row in outcome.document["rows"]] == [16, 32]
    wanted = {"ep", "inter_server_gb", "intra_server_gb", "a2a_over_compute", "seconds", "routing", "method"}
    assert all(wanted <= row.keys() for row in outcome.document["rows"])
    assert outcome.document["cliffs"][0]["passes_one"] == 16
    assert any("not publish" in note for note in outcome.document["notes"])


def test_the_command_sweeps_a_model_over_a_machine() -> None:
    outcome = placer("sweep", "--model", "deepseek-v3", "-t", "h800", "--shape", "1x32x8", "--ep", "8,16")
    assert outcome.code == 0
    assert "8*  uniform  linear         0.0" in outcome.out
    assert "cliff: uniform, linear: traffic leaves the server at EP 16" in outcome.out
    assert outcome.err == ""


def test_the_command_sweeps_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "noisy.npz"
    noisy_trace().save(trace)
    arguments = (
        "--trace",
        trace,
        "--model",
        "olmoe-1b-7b",
        "-t",
        "dgx-h100",
        "--shape",
        "1x4x1",
        "--ep",
        "4",
    )
    outcome = placer("sweep", *arguments, "--method", "greedy", "--jobs", "1", "--json")
    assert outcome.code == 0
    assert [row["method"] for row in outcome.document["rows"]] == ["linear", "linear", "greedy"]
    assert "EP 4, " in outcome.err
    assert placer("sweep", *arguments, "--method", "greedy", "--quiet").err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --preset, or -t with --model or --trace"),
        (("-t", "h800"), "expected --preset, or -t with --model or --trace"),
        (("--model", "deepseek-v3"), "expected --preset, or -t with --model or --trace"),
        (("--preset", "article", "-t", "h800"), "--preset sets everything but --ep; found --topology"),
        (("--preset", "article", "--seed", "0"), "--preset sets everything but --ep; found --seed"),
        (("--preset", "artic"), "unknown preset 'artic': did you mean article"),
        (("--preset", "article", "--ep", "5"), "EP 5: expected a divisor of the preset's 64 experts"),
        (("--preset", "article", "--ep", "1,,2"), "found '1,,2', expected numbers of GPUs"),
        (("--preset", "article", "--ep", "0"), "found '0', expected numbers of GPUs"),
        (("--preset", "article", "--plot", "x.txt"), "x.txt: found a name that ends in 'txt'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    outcome = placer("sweep", *arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert message in outcome.err


def test_help_says_that_presets_are_fitted() -> None:
    text = " ".join(placer("sweep", "--help").out.split())
    assert "Their parameters are fitted, not published" in text
    assert "twice the bytes from 16 to 32 is not what a dropless top-2 model does" in text


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outcome = placer("sweep", "--preset", "article", "--plot", tmp_path / "a.png")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "pip install 'placer[plot]'" in outcome.err


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_plot_is_drawn_the_same_every_time(suffix: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = preset("article-imbalance")
    for name in ("one", "two"):
        plot(found, tmp_path / f"{name}.{suffix}")
    drawn = (tmp_path / f"one.{suffix}").read_bytes()
    assert drawn.startswith(start)
    assert drawn == (tmp_path / f"two.{suffix}").read_bytes()
