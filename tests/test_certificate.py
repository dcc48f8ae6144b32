"""Certificates of placements: what they say, what they write, and `placer bound`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import placer

from placer import Certificate, Placement, Topology, Trace, bounds, certify, evaluate
from placer.certificate import LayerBound, Progress, bounded_cost
from placer.clock import Clock
from placer.errors import InvalidInput
from tests.checker import Tokens, complaints
from tests.checker import optimum as cheapest
from tests.instances import blocks_trace, noisy_trace, problem
from tests.oracle import optimum

KEYS = {
    "schema",
    "level",
    "tokens",
    "max_load",
    "touched",
    "bound",
    "gap",
    "method",
    "best",
    "proved_layers",
    "per_layer",
    "notes",
}
LAYER_KEYS = {"layer", "touched", "bound", "gap", "best", "proved", "cap", "method", "seconds"}
MACHINE = Topology.load("dgx-h100")


@pytest.fixture
def by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers too are bounded by column generation."""
    monkeypatch.setattr(bounds, "BOUNDS", ("columns",))


def placed(slots: Any, shape: tuple[int, int, int], layers: int = 2, experts: int = 16) -> Placement:
    rows = np.tile(np.asarray(slots, np.int32), (layers, 1))
    return Placement(physical_to_logical=rows, num_experts=experts, shape=shape)


def linear(shape: tuple[int, int, int], layers: int = 2) -> Placement:
    return placed(np.arange(16), shape, layers)


def best_met(certificate: Certificate) -> Placement:
    """The placement behind ``best``, for machines of one GPU a server."""
    slots = [np.argsort(layer.proof.unit_of_item, kind="stable") for layer in certificate.layers]
    units = certificate.layers[0].partition.units
    return Placement(
        physical_to_logical=np.array(slots, np.int32), num_experts=len(slots[0]), shape=(1, units, 1)
    )


def least(trace: Trace, layer: int, units: int, cap: float = np.inf) -> float:
    """The fewest touched units per token."""
    return optimum(trace.topk_idx[:, layer], trace.num_experts, units, cap) / trace.num_tokens


# -- what a certificate says -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_columns")
def test_planted_blocks_are_proved_optimal() -> None:
    trace = blocks_trace(tokens=200)
    blocks = placed(np.arange(16).reshape(4, 4).T.ravel(), (1, 4, 1))
    certificate = certify(blocks, problem(trace, "1x4x1"))
    assert (certificate.touched, certificate.bound, certificate.gap) == (1.0, 1.0, 0.0)
    assert certificate.proved_layers == [0, 1]
    assert certificate.method == "set partition by column generation"
    assert certificate.verdict() == "touched.server 1.0000, proved optimal in all 2 layers"


@pytest.mark.parametrize("methods", [("subsets",), ("columns",)])
def test_every_layer_is_bounded_by_its_optimum(
    methods: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "BOUNDS", methods)
    trace = noisy_trace(tokens=200)
    routed = problem(trace, "1x4x1")
    certificate = certify(linear((1, 4, 1)), routed, jobs=2)
    for layer in certificate.layers:
        assert layer.bound == layer.best == least(trace, layer.layer, 4)
        assert layer.bound < layer.touched
        assert layer.gap == pytest.approx(1 - layer.bound / layer.touched)
    assert certificate.proved_layers == []
    assert certificate.bound == np.mean([layer.bound for layer in certificate.layers])
    assert "placements that touch fewer were met in 2 of 2 layers" in str(certificate)

    better = certify(best_met(certificate), routed)
    assert better.touched == certificate.bound == better.bound
    assert (better.gap, better.proved_layers) == (0.0, [0, 1])
    assert not any("touches fewer" in note for note in better.notes)


def test_one_layer_of_two_may_be_proved() -> None:
    trace = replace(noisy_trace(tokens=200), layer_ids=(3, 7))
    routed = problem(trace, "1x4x1")
    start = replace(linear((1, 4, 1)), layer_ids=(3, 7))
    best = best_met(certify(start, routed)).physical_to_logical
    mixed = replace(start, physical_to_logical=np.stack([start.physical_to_logical[0], best[1]]))
    certificate = certify(mixed, routed)
    assert certificate.proved_layers == [7]
    assert certificate.verdict().endswith("; 1 of 2 layers proved optimal")
    assert [layer["layer"] for layer in certificate.to_dict()["per_layer"]] == [3, 7]


def test_the_document_has_the_documented_keys() -> None:
    certificate = certify(linear((1, 4, 1)), problem(noisy_trace(tokens=200), "1x4x1", max_load=1.5))
    document = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
    assert document.keys() == KEYS
    assert all(layer.keys() == LAYER_KEYS for layer in document["per_layer"])
    assert (document["schema"], document["level"], document["tokens"]) == ("placer/bound/1", "server", 200)
    assert document["max_load"] == 1.5
    assert "200 tokens" in document["notes"][0]
    assert any("--max-load 1.5" in note for note in document["notes"])


@pytest.mark.parametrize("level", ["gpu", "server", "rack"])
def test_touched_is_what_evaluate_says_at_every_level(level: str) -> None:
    trace = noisy_trace(tokens=200)
    rng = np.random.default_rng(5)
    placement = placed(rng.permutation(16), (2, 2, 2))
    certificate = certify(placement, problem(trace, "2x2x2"), level=level)
    report = evaluate(placement, trace, MACHINE.with_shape("2x2x2")).to_dict()
    assert certificate.touched == pytest.approx(report["touched"][level], rel=1e-12)
    units = {"gpu": 8, "server": 4, "rack": 2}[level]
    assert [layer.bound for layer in certificate.layers] == [least(trace, at, units) for at in (0, 1)]


def test_a_load_cap_is_part_of_what_is_bounded() -> None:
    trace = noisy_trace(tokens=200)
    routed = problem(trace, "1x4x1", max_load=1.1)
    certificate = certify(linear((1, 4, 1)), routed)
    for layer in certificate.layers:
        cap = float(routed.layer(layer.layer).caps[1])
        assert np.isfinite(cap)
        assert layer.bound == least(trace, layer.layer, 4, cap)
    free = certify(linear((1, 4, 1)), problem(trace, "1x4x1"))
    assert free.bound < certificate.bound  # type: ignore[operator]


def test_a_cap_that_cannot_be_met_is_said_to_be_raised() -> None:
    routed = problem(noisy_trace(tokens=200), "1x4x1", max_load=1.0)
    certificate = certify(linear((1, 4, 1)), routed)
    caps = [layer["cap"] for layer in certificate.to_dict()["per_layer"]]
    assert caps == [
        pytest.approx(routed.layer(at).caps[1] / routed.layer(at).load.sum() * 4) for at in (0, 1)
    ]
    assert max(caps) > 1
    assert any(f"raised in 2 of 2 layers, to at most {max(caps):.3f}" in note for note in certificate.notes)
    loose = certify(linear((1, 4, 1)), problem(noisy_trace(tokens=200), "1x4x1", max_load=1.5))
    assert not any("raised" in note for note in loose.notes)


def test_a_placement_above_the_cap_is_never_proved_optimal() -> None:
    free = problem(noisy_trace(layers=1), "1x4x4")
    best = np.argsort(certify(linear((1, 4, 4), 1), free).layers[0].proof.unit_of_item, kind="stable")
    hot = placed(best, (1, 4, 4), 1)
    assert certify(hot, free).proved_layers == [0]
    capped = certify(hot, problem(noisy_trace(layers=1), "1x4x4", max_load=1.0))
    (layer,) = capped.layers
    assert layer.bound > layer.touched  # fewer than any placement within the cap
    assert capped.proved_layers == []
    assert any("not one of these in 1 layers" in note for note in capped.notes)
    assert "not allowed" in str(capped)


def test_spare_slots_are_part_of_what_is_bounded() -> None:
    trace = noisy_trace(num_experts=9, tokens=120, layers=1)
    routed = problem(trace, "1x2x2", slots_per_gpu=3)
    slots = [0, 1, 2, 3, 4, -1, 5, 6, -1, 7, 8, -1]
    certificate = certify(placed(slots, (1, 2, 2), layers=1, experts=9), routed)
    tokens = Tokens(num_items=9, units=2, size=6, sets=trace.topk_idx[:, 0], weight=np.ones(120, int))
    assert certificate.bound == cheapest(tokens) / 120  # type: ignore[operator]
    full = Tokens(num_items=9, units=2, size=5, sets=trace.topk_idx[:, 0], weight=np.ones(120, int))
    assert cheapest(tokens) < cheapest(full)  # type: ignore[operator]


def test_copies_leave_no_bound() -> None:
    slots = np.append(np.arange(16), [0, 1, 2, 3]).reshape(5, 4).T.ravel()
    certificate = certify(placed(slots, (1, 4, 1)), problem(noisy_trace(), "1x4x1", slots_per_gpu=5))
    document = certificate.to_dict()
    assert (document["bound"], document["gap"], document["method"], document["best"]) == (None,) * 4
    assert (document["per_layer"], document["proved_layers"]) == ([], [])
    assert document["touched"] >= 1
    assert "no bound: with copies" in document["notes"][0]
    assert "no bound: with copies" in certificate.verdict()


def test_whole_groups_are_bounded_as_wholes() -> None:
    trace = replace(noisy_trace(tokens=200), num_groups=8)
    routed = problem(trace, "1x4x1")
    whole = certify(linear((1, 4, 1)), routed, whole_groups=True)
    free = certify(linear((1, 4, 1)), routed)
    assert free.bound < whole.bound <= whole.touched  # type: ignore[operator]
    assert "only placements that keep gate groups whole are bounded" in whole.notes
    for layer in whole.layers:
        groups = [sorted({int(e) // 2 for e in row if e >= 0}) for row in trace.topk_idx[:, layer.layer]]
        sets = np.array([row + [-1] * (4 - len(row)) for row in groups])
        tokens = Tokens(num_items=8, units=4, size=2, sets=sets, weight=np.ones(len(sets), int))
        assert layer.bound == cheapest(tokens) / 200  # type: ignore[operator]


def test_on_one_server_nothing_can_be_better() -> None:
    certificate = certify(linear((1, 1, 4)), problem(noisy_trace(tokens=200), "1x1x4"))
    assert (certificate.touched, certificate.gap) == (certificate.bound, 0.0)
    assert certificate.method == "every partition costs the same"


def test_tokens_that_use_nothing_have_no_gap() -> None:
    trace = Trace(topk_idx=np.full((5, 1, 2), -1), num_experts=16)
    certificate = certify(linear((1, 4, 1), layers=1), problem(trace, "1x4x1"))
    assert (certificate.touched, certificate.bound, certificate.gap) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("clock", [Clock.start(seconds=0), Clock.start()], ids=["no time", "stopped"])
def test_without_time_the_bound_is_what_no_placement_avoids(clock: Clock) -> None:
    clock.stop.set()
    trace = noisy_trace(tokens=200)
    certificate = certify(linear((1, 4, 1)), problem(trace, "1x4x1"), clock=clock)
    for layer in certificate.layers:
        used = (trace.topk_idx[:, layer.layer] >= 0).sum(axis=1)
        assert layer.bound == (-(-used // 4)).mean()
        assert layer.bound <= least(trace, layer.layer, 4)


def test_progress_closes_in_and_ends_with_every_layer() -> None:
    seen: list[Progress] = []
    trace = noisy_trace(tokens=200)
    certificate = certify(linear((1, 4, 1)), problem(trace, "1x4x1"), on_progress=seen.append)
    for layer in certificate.layers:
        mine = [progress for progress in seen if progress.layer == layer.layer]
        assert [progress.finished for progress in mine] == [False] * (len(mine) - 1) + [True]
        assert (mine[-1].bound, mine[-1].touched) == (layer.bound, layer.touched)
        assert mine[-1].best == pytest.approx(layer.best)
        assert all(progress.bound <= layer.best for progress in mine)
    assert (seen[-1].done, seen[-1].layers) == (2, 2)


@pytest.mark.usefixtures("by_columns")
def test_any_number_of_jobs_certifies_the_same() -> None:
    routed = problem(noisy_trace(tokens=200), "1x4x1")
    one, four = (certify(linear((1, 4, 1)), routed, clock=Clock(rounds=1), jobs=jobs) for jobs in (1, 4))

    def timeless(layer: LayerBound) -> dict[str, Any]:
        return layer.to_dict() | {"seconds": 0}

    assert [*map(timeless, one.layers)] == [*map(timeless, four.layers)]


def test_placements_of_other_problems_are_refused() -> None:
    routed = problem(noisy_trace(), "1x4x1")
    for other in (
        linear((1, 2, 2)),
        linear((1, 4, 1), layers=1),
        placed(np.arange(8), (1, 4, 1), experts=8),
        placed(np.append(np.arange(16), [0] * 4), (1, 4, 1)),
    ):
        with pytest.raises(InvalidInput, match="placement: found"):
            certify(other, routed)


def test_counts_alone_are_refused() -> None:
    routed = replace(problem(noisy_trace(), "1x4x1"), routes=None)
    with pytest.raises(InvalidInput, match="found counts only"):
        certify(linear((1, 4, 1)), routed)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_cost_of_no_arrangement_is_below_the_bound_over_all_levels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = problem(noisy_trace(num_experts=8, tokens=60, layers=1, seed=seed), "2x2x1").layer(0)
    bound, method = bounded_cost(layer, layer.slots(layer.linear()), Clock.start())
    assert method == "subset dynamic programming"
    assert all(layer.cost(rng.permutation(8).astype(np.int32)) >= bound * (1 - 1e-12) for _ in range(20))


def test_with_one_level_the_bound_over_all_levels_is_the_optimum() -> None:
    trace = noisy_trace(tokens=200, layers=1)
    layer = problem(trace, "1x4x1").layer(0)
    routed = problem(trace, "1x4x1")
    best = best_met(certify(linear((1, 4, 1), layers=1), routed)).physical_to_logical[0]
    bound, _ = bounded_cost(layer, layer.slots(layer.linear()), Clock.start())
    assert bound == pytest.approx(layer.cost(layer.occupant(best)), rel=1e-9)


# -- what it writes --------------------------------------------------------------------------------------------


def verified(path: Path, trace: Trace) -> int:
    """How many layers of a file an independent checker has verified."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    layers = sorted({name.split("/")[0] for name in arrays})
    for layer in layers:
        known = {key.split("/")[1]: value for key, value in arrays.items() if key.startswith(f"{layer}/")}
        tokens = Tokens(
            num_items=trace.num_experts,
            units=int(known["units"]),
            size=int(known["size"]),
            sets=trace.topk_idx[:, int(layer)],
            weight=np.ones(trace.num_tokens, int),
            cap=float(known["cap"]),
        )
        assert complaints(tokens, known, int(known["bound"])) == []
        assert complaints(tokens, known, int(known["bound"]) + 1)
    return len(layers)


@pytest.mark.usefixtures("by_columns")
def test_what_is_written_is_enough_for_a_checker(tmp_path: Path) -> None:
    trace = noisy_trace(num_experts=12, tokens=150)
    slots = placed(np.arange(12), (1, 4, 1), experts=12)
    path = tmp_path / "c.npz"
    for max_load in (None, 1.2):
        certify(slots, problem(trace, "1x4x1", max_load=max_load)).save(path)
        assert verified(path, trace) == 2


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "noisy.npz"
    noisy_trace(tokens=200).save(path)
    return path


@pytest.fixture(scope="module")
def placement(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placements") / "linear.json"
    linear((1, 4, 1)).save(path)
    return path


def test_the_command_prints_one_document(trace: Path, placement: Path) -> None:
    outcome = placer("bound", placement, trace, "-t", "dgx-h100", "--json", "--jobs", 1)
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    assert outcome.document.keys() == KEYS
    assert outcome.err.count(" done\n") == 2
    touched = placer("evaluate", placement, trace, "-t", "dgx-h100", "--json").document["touched"]["server"]
    assert outcome.document["touched"] == pytest.approx(touched, rel=1e-12)
    assert outcome.document["bound"] == np.mean([least(noisy_trace(tokens=200), at, 4) for at in (0, 1)])


def test_the_command_prints_a_table_and_a_verdict(trace: Path, placement: Path) -> None:
    outcome = placer("bound", placement, trace, "-t", "dgx-h100", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == f"{placement} on noisy: 200 tokens, 2 layers"
    assert [line.split()[0] for line in lines[2:5]] == ["layer", "0", "1"]
    assert lines[5].startswith("touched.server ")
    assert ", proven >= " in lines[5]
    assert lines[6].startswith("note: the bound covers the 200 tokens given")


@pytest.mark.parametrize(("shape", "level"), [((1, 4, 1), "server"), ((1, 1, 4), "gpu")])
def test_the_level_is_the_one_that_placements_are_judged_by(
    shape: tuple[int, int, int], level: str, trace: Path, tmp_path: Path
) -> None:
    linear(shape).save(tmp_path / "p.json")
    command = ("bound", tmp_path / "p.json", trace, "-t", "dgx-h100", "--json", "--quiet")
    assert placer(*command).document["level"] == level
    assert placer(*command, "--level", "rack").document["level"] == "rack"


def test_options_reach_the_bound(trace: Path, placement: Path, tmp_path: Path) -> None:
    grouped = tmp_path / "grouped.npz"
    replace(noisy_trace(tokens=200), num_groups=8).save(grouped)

    def bound(path: Path, *more: object) -> Any:
        return placer("bound", placement, path, "-t", "dgx-h100", "--json", "--quiet", *more).document

    free = bound(trace)["bound"]
    assert bound(trace, "--max-load", "1.1")["bound"] > free
    assert bound(grouped, "--whole-groups")["bound"] > free
    assert 0 < bound(trace, "--time-limit", "0")["bound"] < free
    loose = bound(trace, "--gap", "50%")
    assert loose["gap"] <= 0.5 + (1 - loose["best"] / loose["touched"])


def test_the_command_writes_what_a_checker_reads(
    trace: Path, placement: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "BOUNDS", ("columns",))
    path = tmp_path / "c.npz"
    assert placer("bound", placement, trace, "-t", "dgx-h100", "-q", "-o", path).code == 0
    assert list(tmp_path.iterdir()) == [path]
    with np.load(path, allow_pickle=False) as archive:
        names = {name for name in archive.files if name.startswith("0/")}
        assert int(archive["1/bound"]) == round(least(noisy_trace(tokens=200), 1, 4) * 200)
        assert str(archive["0/method"]) == "set partition by column generation"
    assert names >= {f"0/{key}" for key in ("bound", "units", "size", "cap", "prices", "unit_price", "floor")}


def test_copies_are_told_by_the_command(trace: Path, tmp_path: Path) -> None:
    slots = np.append(np.arange(16), [0, 1, 2, 3]).reshape(5, 4).T.ravel()
    placed(slots, (1, 4, 1)).save(tmp_path / "p.json")
    outcome = placer("bound", tmp_path / "p.json", trace, "-t", "dgx-h100", "--json", "--quiet")
    assert (outcome.code, outcome.document["bound"]) == (0, None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--shape", "1x2x2"), "--shape: found 1x2x2, expected 1x4x1"),
        (("--level", "pod"), "'pod'"),
        (("--time-limit", "-1"), "--time-limit"),
        (("--gap", "2"), "--gap"),
        (("--max-load", "0.5"), "1 or more"),
        (("-t", "dgx-h10"), "dgx-h100"),
    ],
)
def test_options_that_make_no_sense_exit_with_2(
    more: tuple[str, ...], words: str, trace: Path, placement: Path, tmp_path: Path
) -> None:
    machine = () if "-t" in more else ("-t", "dgx-h100")
    refused(placer("bound", placement, trace, *machine, *more, "-o", tmp_path / "c.npz"), words, tmp_path)


def refused(outcome: Any, words: str, folder: Path, files: int = 0) -> None:
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1
    assert words in outcome.err
    assert len([*folder.iterdir()]) == files


def test_placements_of_other_models_exit_with_2(trace: Path, tmp_path: Path) -> None:
    for other, words in (
        (placed(np.arange(8), (1, 4, 1), experts=8), "experts: found 16"),
        (linear((1, 4, 1), layers=1), "layers: found"),
    ):
        other.save(tmp_path / "p.json")
        refused(placer("bound", tmp_path / "p.json", trace, "-t", "dgx-h100"), words, tmp_path, files=1)


def test_a_trace_is_no_placement_and_inputs_are_not_written_over(
    trace: Path, placement: Path, tmp_path: Path
) -> None:
    command = ("-t", "dgx-h100", "-o")
    refused(placer("bound", trace, trace, *command, tmp_path / "c.npz"), "noisy.npz", tmp_path)
    refused(placer("bound", placement, placement, *command, tmp_path / "c.npz"), "linear.json", tmp_path)
    for given_path in (trace, placement):
        before = given_path.read_bytes()
        refused(placer("bound", placement, trace, *command, given_path), "would overwrite", tmp_path)
        assert given_path.read_bytes() == before


def test_groups_that_units_cannot_hold_whole_exit_with_2(placement: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    replace(noisy_trace(tokens=50), num_groups=2).save(path)
    found = placer("bound", placement, path, "-t", "dgx-h100", "--whole-groups", "--quiet")
    refused(found, "groups of 8 experts and units of 4 slots", tmp_path, files=1)


# -- Ctrl-C ----------------------------------------------------------------------------------------------------

# The proof of the first layer waits for Ctrl-C as soon as it has told a bound.
_WAITING = """
import sys
import placer.bounds, placer.certificate
from placer.cli import main
placer.bounds.BOUNDS = ("columns",)
prove = placer.certificate.prove
def waiting(partition, incumbent, *, clock, workers, tell):
    def told(bound, best):
        if not clock.stop.is_set():
            print("told", bound, file=sys.stderr, flush=True)
            clock.stop.wait()
        tell(bound, best)
    return prove(partition, incumbent, clock=clock, workers=workers, tell=told)
placer.certificate.prove = waiting
main(sys.argv[1:])
"""


def test_ctrl_c_prints_the_best_bound_so_far(trace: Path, placement: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    arguments = ["bound", placement, trace, "-t", "dgx-h100", "--json", "--jobs", "1", "-o", path]
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITING, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = next(int(line.split()[1]) for line in process.stderr if line.startswith("told"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    first, second = json.loads(out)["per_layer"]
    tokens = noisy_trace(tokens=200)
    assert told / 200 <= first["bound"] <= least(tokens, 0, 4)
    used = (tokens.topk_idx[:, 1] >= 0).sum(axis=1)
    assert second["bound"] == (-(-used // 4)).mean()
    with np.load(path, allow_pickle=False) as archive:
        assert int(archive["0/bound"]) == round(first["bound"] * 200)
