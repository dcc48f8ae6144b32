"""Loads without tokens: the file, the problem, and what commands do with them."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from instances import noisy_trace
from terminal import placer

from placer import Placement, Problem, Topology, Traffic, evaluate, solve
from placer.balancedness import busiest
from placer.counts import Counts, whole_loads
from placer.errors import InvalidInput
from placer.solvers import needing

MACHINE = ("-t", "dgx-h100", "--shape", "1x2x4")


def skewed(layers: int = 3, experts: int = 32, seed: int = 0) -> Counts:
    loads = np.random.default_rng(seed).pareto(1.5, (layers, experts)) * 1000
    return Counts(load=loads.astype(np.int64) + 1, name="skewed")


def posed(counts: Counts, shape: str = "1x2x4", **limits: Any) -> Problem:
    return Problem.from_counts(counts, Topology.load("dgx-h100").with_shape(shape), **limits)


def peaks(counts: Counts, placement: Placement, units: int) -> list[float]:
    """Busiest over mean of contiguous units in every layer, copies sharing evenly, in the plainest code."""
    found = []
    for slots, load in zip(placement.physical_to_logical.tolist(), counts.load.tolist(), strict=True):
        heat = [0.0] * units
        for slot, expert in enumerate(slots):
            if expert >= 0:
                heat[slot * units // len(slots)] += load[expert] / slots.count(expert)
        found.append(max(heat) / (sum(heat) / units))
    return found


# -- the value and its file ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    load=hnp.arrays(
        st.sampled_from([np.uint8, np.int32, np.int64, np.float32]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.integers(0, 100),
    ),
    model=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    num_tokens=st.none() | st.integers(1, 2**40),
    seed=st.integers(0, 9),
)
def test_what_is_saved_is_read_back(load: Any, model: str | None, num_tokens: int | None, seed: int) -> None:
    ids = tuple(int(n) for n in np.random.default_rng(seed).choice(99, len(load), replace=False))
    counts = Counts(load=load, model=model, num_tokens=num_tokens, layer_ids=ids, num_groups=load.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.npz"
        counts.save(path)
        again, content = Counts.open(path), path.read_bytes()
        assert Counts.holds(path)
        again.save(path)
        assert path.read_bytes() == content
    assert np.array_equal(again.load, load)
    assert again.load.dtype == np.int64
    assert not again.load.flags.writeable
    assert [getattr(again, key) for key in Counts.META_KEYS] == [
        getattr(counts, key) for key in Counts.META_KEYS
    ]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"load": np.array([1, 2])}, r"load: found shape \(2,\)"),
        ({"load": np.zeros((0, 4), int)}, r"load: found shape \(0, 4\)"),
        ({"load": np.array([[1, -2]])}, r"load: found -2 at \[0, 1\]"),
        ({"load": np.array([[1, np.nan]])}, r"load: found nan at \[0, 1\]"),
        ({"load": np.array([[1, np.inf]])}, r"load: found inf at \[0, 1\]"),
        ({"load": np.array([[0.5, 1]])}, r"load: found 0.5 at \[0, 0\]"),
        ({"load": np.array([[2**62, 1]])}, "load: found a sum of 4.61e"),
        ({"load": np.array([["a"]])}, "load: found dtype <U1"),
        ({"load": np.array([[True]])}, "load: found dtype bool"),
        ({"load": np.array([[1j]])}, "load: found dtype complex128"),
        ({"load": np.zeros((1, 5000), int)}, "5000 experts a layer, expected at most 4096"),
        ({"layer_ids": (1,)}, r"layer_ids: found \(1,\), expected 2 distinct ids"),
        ({"layer_ids": (1, 1)}, "layer_ids"),
        ({"layer_ids": (1, -1)}, "layer_ids"),
        ({"layer_ids": (1, "2")}, "layer_ids"),
        ({"num_groups": 3}, "num_groups: found 3, expected a divisor of 4"),
        ({"num_tokens": 0}, "num_tokens: found 0"),
        ({"num_tokens": True}, "num_tokens: found True"),
        ({"model": 7}, "model: found 7"),
    ],
)
def test_wrong_values_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        Counts(**{"load": np.ones((2, 4), int), **fields})


def npz(path: Path, **members: Any) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in members.items():
            content = io.BytesIO()
            if isinstance(value, bytes):
                content.write(value)
            else:
                np.lib.format.write_array(content, np.asarray(value), allow_pickle=True)
            archive.writestr(f"{key}.npy", content.getvalue(), zipfile.ZIP_DEFLATED)
    return path


def header_alone(shape: tuple[int, ...]) -> bytes:
    """An array file that promises an array and ends behind its header."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return content.getvalue()


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"meta": "{}"}, "no array load"),
        ({"load": [[1]]}, "no array meta"),
        ({"load": [[1]], "meta": "{"}, "meta: not JSON"),
        ({"load": [[1]], "meta": "[" * 100_000}, "meta: not JSON"),
        ({"load": [[1]], "meta": "[]"}, "meta: found"),
        ({"load": [[1]], "meta": [1, 2]}, "meta: found int64 of shape"),
        ({"load": [[1]], "meta": '{"layer_ids": 3}'}, "layer_ids: found 3, expected a list"),
        ({"load": [[1]], "meta": '{"num_tokens": "many"}'}, "num_tokens: found 'many'"),
        ({"load": np.array([[{}]], object), "meta": "{}"}, "Python objects, which are never unpickled"),
        ({"load": b"\x93NUMPY\x01\x00", "meta": "{}"}, "load: damaged array"),
        ({"load": header_alone((9999, 999999)), "meta": "{}"}, "load: header says 79991920008 bytes"),
    ],
)
def test_damaged_files_are_told_in_one_line(members: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = npz(tmp_path / "odd.npz", **members)
    with pytest.raises(InvalidInput, match=match) as caught:
        Counts.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_counts_are_told_apart(tmp_path: Path) -> None:
    noisy_trace().save(tmp_path / "trace.npz")
    (tmp_path / "text.npz").write_text("PK")
    for name in ("trace.npz", "text.npz", "missing.npz"):
        assert not Counts.holds(tmp_path / name)
        with pytest.raises(InvalidInput, match=name):
            Counts.open(tmp_path / name)


def test_whole_floats_are_counts() -> None:
    assert whole_loads(np.array([[3.0, 0.0]], np.float32), "load").dtype == np.int64


# -- the problem -----------------------------------------------------------------------------------------


def test_the_problem_of_counts_is_that_of_the_trace_without_its_tokens() -> None:
    trace = noisy_trace()
    counts = Counts(load=Traffic.from_trace(trace).load, num_tokens=trace.num_tokens)
    machine = Topology.load("dgx-h100").with_shape("1x2x4")
    ours, theirs = posed(counts, redundant=8), Problem.from_trace(trace, machine, redundant=8)
    assert ours.routes is None
    assert ours.traffic.pairs is None
    assert (ours.num_tokens, ours.slots_per_rank, ours.max_load) == (600, 3, 1.05)
    for method in ("eplb", "linear", "random"):
        assert solve(ours, method).placement.digest == solve(theirs, method).placement.digest


@pytest.mark.parametrize(("redundant", "speeds"), [(0, ()), (16, ()), (0, (1.0, 1.0, 1.0, 2.5))])
def test_loads_of_units_are_those_of_the_report(redundant: int, speeds: tuple[float, ...]) -> None:
    trace = noisy_trace()
    machine = replace(Topology.load("dgx-h100").with_shape("1x2x4"), gpu_speeds=speeds)
    counts = Counts(load=Traffic.from_trace(trace).load)
    problem = Problem.from_counts(counts, machine, redundant=redundant)
    placement = solve(problem, "eplb").placement
    report = evaluate(placement, trace, problem.topology)
    found = busiest(problem, placement)
    assert found.keys() == report.load.keys()
    for level, row in found.items():
        assert row == pytest.approx(report.load[level], rel=1e-9)


def test_loads_of_units_are_what_copies_share() -> None:
    counts = skewed()
    problem = posed(counts, redundant=8, replica_choice="spread")
    placement = solve(problem, "eplb").placement
    found = busiest(problem, placement)
    for level, units in (("gpu", 8), ("server", 2), ("rack", 1)):
        heats = peaks(counts, placement, units)
        assert found[level]["max_over_mean"] == pytest.approx(np.mean(heats))
        assert found[level]["worst_layer"] == pytest.approx(max(heats))


def test_no_load_is_no_imbalance() -> None:
    counts = Counts(load=np.zeros((1, 8), int))
    problem = posed(counts)
    assert busiest(problem, solve(problem, "lpt").placement)["gpu"] == {
        "max_over_mean": 1.0,
        "worst_layer": 1.0,
    }


@pytest.mark.parametrize("redundant", [0, 8])
def test_auto_takes_the_better_of_eplb_and_lpt_in_every_layer(redundant: int) -> None:
    counts = skewed(layers=6)
    problem = posed(counts, redundant=redundant)
    best = solve(problem, "auto")
    heats = {
        name: peaks(counts, solve(problem, name).placement, problem.num_ranks)
        for name in ("eplb", "lpt", "auto")
    }
    for layer in range(6):
        assert heats["auto"][layer] <= min(heats["eplb"][layer], heats["lpt"][layer]) + 1e-9
    assert sum("counts only" in note for note in best.notes) == len(best.notes) > 0
    assert best.objective == 0


@pytest.mark.parametrize("method", ["tabu", "anneal", "cpsat", "refine", "greedy", "spectral"])
def test_traffic_methods_say_what_is_missing_and_what_works(method: str) -> None:
    said = (
        f"method {method} needs a trace with topk_idx, found loads only .counts.; .*auto, eplb, linear, lpt"
    )
    with pytest.raises(InvalidInput, match=said):
        solve(posed(skewed()), method)


def test_every_load_method_places_counts() -> None:
    for method in needing({"load"}):
        placement = solve(posed(skewed(), redundant=8), method).placement
        assert (placement.replica_count >= 1).all()
        assert placement.provenance["tokens"] is None


# -- the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counts") / "skewed.npz"
    skewed().save(path)
    return path


@pytest.mark.parametrize("method", ["auto", "eplb", "lpt", "linear"])
def test_solve_balances_counts(method: str, counts: Path, tmp_path: Path) -> None:
    output = tmp_path / "placement.json"
    options = ("--method", method, "--redundant", "8", "--jobs", "1")
    done = placer("solve", counts, *MACHINE, *options, "--json", "-o", output)
    assert done.code == 0
    document = done.document
    assert document["schema"] == "placer/result/1"
    assert [document[key] for key in ("report", "baseline", "objective", "bound")] == [None] * 4
    placement = Placement.load(output)
    assert document["placement"] == str(output)
    heats = peaks(skewed(), placement, 8)
    assert document["load"]["gpu"]["worst_layer"] == pytest.approx(max(heats))
    assert document["load"].keys() == document["baseline_load"].keys() == {"gpu", "server", "rack"}
    if method == "linear":
        assert document["load"] == document["baseline_load"]
    else:
        assert document["load"]["gpu"]["max_over_mean"] < document["baseline_load"]["gpu"]["max_over_mean"]
    assert placer("check", output).code == 0


def test_the_summary_says_that_traffic_is_unknown(counts: Path, tmp_path: Path) -> None:
    done = placer("solve", counts, *MACHINE, "--jobs", "1", "--log", tmp_path / "log.jsonl")
    assert done.code == 0
    assert "counts only: traffic unknown" in done.out
    assert "against linear: load.gpu" in done.out
    assert "leaves the busiest units the least load" in done.out
    assert "margin" not in done.out
    assert len([json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]) == 3


def test_counts_take_a_start_and_are_never_made_worse(counts: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert placer("solve", counts, *MACHINE, "--jobs", "1", "-q", "-o", first).code == 0
    again = ("--method", "linear", "--initial", first, "--jobs", "1", "-q", "-o", second)
    assert placer("solve", counts, *MACHINE, *again).code == 0
    before, after = (max(peaks(skewed(), Placement.load(path), 8)) for path in (first, second))
    assert after <= before + 1e-9


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "PLACEMENT", "COUNTS", "-t", "dgx-h100"),
        ("bound", "PLACEMENT", "COUNTS", "-t", "dgx-h100"),
        ("compare", "COUNTS", *MACHINE, "--method", "lpt"),
        ("inspect", "COUNTS"),
    ],
)
def test_other_commands_say_that_they_need_tokens(
    command: tuple[str, ...], counts: Path, tmp_path: Path
) -> None:
    placement = tmp_path / "placement.json"
    assert placer("solve", counts, *MACHINE, "--jobs", "1", "-q", "-o", placement).code == 0
    files = {"PLACEMENT": placement, "COUNTS": counts}
    done = placer(*(files.get(word, word) for word in command))
    assert (done.code, done.out) == (2, "")
    expected = f"Error: {counts}: holds loads only (counts); expected a trace with topk_idx"
    assert done.err.strip().splitlines()[-1] == expected


@pytest.mark.parametrize(
    "options",
    [
        ("--copies", "3"),
        ("--redundant", "auto"),
        ("--max-load", "auto"),
        ("--load-model", "activated"),
        ("--steady",),
        ("--tokens-per-step", "64"),
    ],
)
def test_solve_refuses_options_that_need_tokens(
    options: tuple[str, ...], counts: Path, tmp_path: Path
) -> None:
    done = placer("solve", counts, *MACHINE, *options, "-o", tmp_path / "placement.json")
    assert (done.code, done.out) == (2, "")
    assert options[0] in done.err
    assert "found loads only (counts), expected a trace with topk_idx" in done.err
    assert not (tmp_path / "placement.json").exists()


def test_a_traffic_method_on_counts_is_a_usage_error(counts: Path) -> None:
    done = placer("solve", counts, *MACHINE, "--method", "tabu", "-q")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Error: method tabu needs a trace with topk_idx")
    assert done.err.count("\n") == 1


def test_solve_does_not_overwrite_its_counts(counts: Path) -> None:
    done = placer("solve", counts, *MACHINE, "-o", counts)
    assert done.code == 2
    assert Counts.holds(counts)
