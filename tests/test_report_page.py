"""Pages: what they say is what was measured, in figures, in sentences, and when the news is bad."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instances import blocks_trace, noisy_trace
from pages import approximates, text_of
from terminal import placer

from placer import Placement, Topology, Trace, evaluate, html, synth
from placer.comparison import compare
from placer.errors import InvalidInput
from placer.html import evidence, figures, origin
from placer.html.duels import duel, entries
from placer.html.measures import measure
from placer.traffic import Traffic

MISSING = [name for name in ("jinja2", "plotly") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"a page needs {' and '.join(MISSING)}")
MACHINE = Topology.load("dgx-h100")
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028{{7*7}}<b>"


def shuffled(
    trace: Trace, shape: tuple[int, int, int], seed: int = 0, spare: int = 0, **more: Any
) -> Placement:
    """Experts anywhere, the first `spare` of them twice."""
    rng = np.random.default_rng(seed)
    held = np.concatenate([np.arange(trace.num_experts), np.arange(spare)])
    rows = np.stack([rng.permutation(held) for _ in range(trace.num_layers)])
    return Placement(
        physical_to_logical=rows,
        num_experts=trace.num_experts,
        shape=shape,
        layer_ids=trace.layer_ids,
        **more,
    )


def linear(trace: Trace, shape: tuple[int, int, int]) -> Placement:
    rows = np.tile(np.arange(trace.num_experts), (trace.num_layers, 1))
    return Placement(
        physical_to_logical=rows, num_experts=trace.num_experts, shape=shape, layer_ids=trace.layer_ids
    )


def together(trace: Trace, shape: tuple[int, int, int]) -> Placement:
    """For `blocks_trace`: a block of experts that are used together on each server."""
    blocks = np.concatenate([np.arange(first, 16, 4) for first in range(4)])
    return replace(linear(trace, shape), physical_to_logical=np.tile(blocks, (trace.num_layers, 1)))


def made(placement: Placement, trace: Trace, **more: Any) -> html.Page:
    return html.page(placement, trace, MACHINE.with_shape(placement.shape), **more)


def crossed() -> Placement:
    """Experts 0 and 2 on one server, 1 and 3 on another."""
    return Placement(physical_to_logical=np.array([[0, 2, 1, 3]]), num_experts=4, shape=(1, 2, 1))


class Elements(HTMLParser):
    """The numbers of a page with their paths, its texts, and the ids of its sections."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.values: list[tuple[dict[str, str], str]] = []
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.texts: list[str] = []
        self._open: dict[str, str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(known["id"])
        if "data-path" in known:
            self._open = known

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open is not None:
            self.values.append((self._open, data))
            self._open = None


def block(page: str) -> Any:
    """The JSON that a browser would find in the page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]


# -- numbers -------------------------------------------------------------------------------------------------


def test_the_page_embeds_the_reports_that_evaluate_makes() -> None:
    trace = noisy_trace()
    placed, machine = shuffled(trace, (1, 4, 2)), MACHINE.with_shape("1x4x2")
    found = block(made(placed, trace, tokens_per_gpu=128).html)
    assert found["report"] == evaluate(placed, trace, machine, tokens_per_gpu=128).to_dict()
    assert (
        found["baseline"] == evaluate(linear(trace, (1, 4, 2)), trace, machine, tokens_per_gpu=128).to_dict()
    )


def test_every_number_is_that_of_the_json_at_its_path() -> None:
    trace = noisy_trace(tokens=900)
    fit, unseen = trace.split(0.5)
    page = made(shuffled(trace, (2, 2, 2), spare=8), unseen.rebatch(64, phase="decode"), fitted=fit)
    document = block(page.html)
    values = Elements(page.html).values
    assert len(values) > 100
    for attributes, text in values:
        assert approximates(text, attributes, document), (attributes, text)


def test_load_of_units_has_the_peaks_of_the_report() -> None:
    trace = noisy_trace(layers=3)
    document = made(shuffled(trace, (1, 4, 2)), trace).document
    packed = document["load"]
    for which in ("baseline", "report"):
        load = np.frombuffer(base64.b64decode(packed[which]), "<u2").reshape(3, 8) / 1000
        peaks = document[which]["per_layer"]["load"]
        assert load.max(axis=1) == pytest.approx(peaks["gpu"], abs=0.0006)
        assert load.reshape(3, 4, 2).mean(axis=2).max(axis=1) == pytest.approx(peaks["server"], abs=0.0006)


def test_coactivation_is_that_of_the_trace_in_the_order_of_slots() -> None:
    trace = noisy_trace(layers=2)
    placed = shuffled(trace, (1, 4, 2))
    found = made(placed, trace).document["coactivation"]
    pairs = Traffic.from_trace(trace).pairs
    assert pairs is not None
    for layer in range(2):
        share = np.frombuffer(base64.b64decode(found["pairs"][layer]), np.uint8) * found["step"]
        exact = pairs[layer][np.triu_indices(16, 1)] / trace.num_tokens
        assert share == pytest.approx(np.minimum(exact, 255 * found["step"]), abs=0.51 * found["step"])
    assert found["order"]["report"] == placed.physical_to_logical.tolist()
    assert found["edges"]["report"] == [[4, 8, 12]] * 2


@pytest.mark.parametrize("spare", [0, 8])
@pytest.mark.parametrize("scheme", ["hierarchical", "naive", "gpu_dedup", "allgather"])
def test_what_leaves_units_adds_up_to_the_bytes_of_the_report(scheme: str, spare: int) -> None:
    trace = noisy_trace()
    placed, machine = shuffled(trace, (2, 2, 2), spare=spare), MACHINE.with_shape("2x2x2")
    found = measure(placed, trace, machine, {"alltoall": scheme, "tokens_per_gpu": 1})
    report = evaluate(placed, trace, machine, alltoall=scheme, tokens_per_gpu=1)
    sent = dict(zip(("gpu", "server", "rack"), (each.sum() / 8 for each in found.sent), strict=True))
    assert sent == pytest.approx(report.bytes_per_token)


@pytest.mark.parametrize("scheme", ["hierarchical", "naive", "gpu_dedup", "allgather"])
def test_what_moves_between_ranks_is_the_same_in_expectation_and_by_source(scheme: str) -> None:
    trace = noisy_trace(num_experts=12, tokens=4000)
    placed, machine = shuffled(trace, (1, 3, 2)), MACHINE.with_shape("1x3x2")
    expected = measure(placed, trace, machine, {"alltoall": scheme}).moved
    homes = np.arange(trace.num_tokens, dtype=np.int32) % 6
    known = replace(trace, source_rank=homes)
    counted = measure(placed, known, machine, {"alltoall": scheme, "homes": "trace"}).moved
    assert expected is not None
    assert counted is not None
    assert counted == pytest.approx(expected, abs=0.1 * expected.max())
    assert counted.sum() == pytest.approx(expected.sum(), rel=0.01)


def test_a_page_of_58_layers_of_256_experts_stays_below_8_megabytes() -> None:
    trace = synth("dsv3-like", layers=58, tokens=300)
    page = made(shuffled(trace, (1, 8, 8)), trace)
    assert len(page.html.encode()) < 8e6
    assert page.document["coactivation"]["layers"] == list(trace.layer_ids)


def test_layers_that_do_not_fit_into_a_page_are_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from placer.html import packed

    monkeypatch.setattr(packed, "LARGEST", 1500)
    trace = noisy_trace(layers=6)
    page = made(shuffled(trace, (1, 4, 2)), trace)
    assert (
        page.document["coactivation"]["layers"] == [0, 5] or len(page.document["coactivation"]["layers"]) < 6
    )
    assert f"{len(page.document['coactivation']['layers'])} of 6 layers are shown" in text_of(page.html)


# -- the verdict ---------------------------------------------------------------------------------------------


def pairs_trace(first: list[int], second: list[int]) -> Trace:
    """Half of the tokens use two experts, half the other two."""
    return Trace(topk_idx=np.array([[first], [second]] * 20), num_experts=4)


def test_the_verdict_says_what_is_gained() -> None:
    page = made(crossed(), pairs_trace([0, 2], [1, 3]))
    assert page.verdict == (
        "Better: 50 % less inter-server traffic than contiguous experts on this trace, busiest server 0 % above mean "
        "on average, 0 % in the worst layer."
    )
    assert 'class="verdict good"' in page.html


def test_the_verdict_says_when_a_placement_is_worse_than_contiguous_experts() -> None:
    page = made(crossed(), pairs_trace([0, 1], [2, 3]))
    assert page.verdict.startswith(
        "Worse: 100 % more inter-server traffic than contiguous experts on this trace"
    )
    assert 'class="verdict bad"' in page.html
    assert re.search(r"A modelled step takes .* instead of .* more; most of it", text_of(page.html))


def test_more_traffic_for_a_more_even_load_is_worse_when_the_step_gets_longer() -> None:
    trace = blocks_trace()
    mixed = replace(trace, topk_idx=(trace.topk_idx % 4) * 4 + trace.topk_idx // 4)
    page = made(together(mixed, (1, 4, 1)), mixed)
    before, after = page.document["baseline"], page.document["report"]
    assert after["load"]["server"]["max_over_mean"] < before["load"]["server"]["max_over_mean"]
    assert after["seconds"]["step"] > before["seconds"]["step"]
    assert page.verdict.startswith("Worse: 200 % more inter-server traffic")


def test_the_verdict_on_contiguous_experts_themselves_is_no_difference() -> None:
    trace = noisy_trace()
    page = made(linear(trace, (1, 4, 2)), trace)
    assert page.verdict.startswith("No difference: the same inter-server traffic as contiguous experts")
    assert 'aria-label="better"' not in page.html
    assert 'aria-label="worse"' not in page.html


def test_less_traffic_for_a_hotter_server_is_called_a_trade_and_shows_both() -> None:
    ids = np.array([[[0, 2]]] * 90 + [[[1, 3]]] * 10)
    trace = Trace(topk_idx=ids, num_experts=4)
    said = made(crossed(), trace).verdict
    assert said.startswith("A trade: 50 % less inter-server traffic")
    assert (
        "busiest server 80 % above mean on average, 80 % in the worst layer (contiguous: 0 % and 0 %)" in said
    )


def test_the_verdict_says_whose_tokens_it_speaks_of() -> None:
    trace = noisy_trace(layers=3)
    fit, unseen = trace.split(0.5)
    placed = shuffled(trace, (1, 4, 2))
    assert "on unseen tokens" in made(placed, unseen, fitted=fit).verdict
    assert "on the tokens it was fitted on" in made(placed, fit, fitted=fit).verdict
    assert "on tokens of which 50 % were fitted on" in made(placed, trace, fitted=fit).verdict
    recorded = replace(placed, provenance={origin.TRACE_DIGEST: fit.digest})
    assert "on the tokens it was fitted on" in made(recorded, fit).verdict
    assert "on another trace than it was fitted on" in made(recorded, unseen).verdict


def test_fitted_tokens_stand_beside_others_and_only_then() -> None:
    trace = noisy_trace(layers=3)
    fit, unseen = trace.split(0.5)
    placed = shuffled(trace, (1, 4, 2))
    beside, alone = made(placed, unseen, fitted=fit), made(placed, fit, fitted=fit)
    machine = MACHINE.with_shape("1x4x2")
    assert beside.document["fitted"]["report"] == evaluate(placed, fit, machine).to_dict()
    assert "fitted" not in alone.document


# -- proof, log, comparison ----------------------------------------------------------------------------------


def certificate(report: Any, **more: Any) -> dict[str, Any]:
    touched = report["touched"]["server"]
    known = {"schema": "placer/bound/1", "level": "server", "tokens": report["tokens"], "touched": touched}
    return {**known, "bound": 0.995 * touched, "gap": 0.0051, "max_load": None, "method": "columns", **more}


def test_a_bound_is_claimed_in_the_verdict_and_never_rounded_down() -> None:
    trace = noisy_trace()
    placed = shuffled(trace, (1, 4, 2))
    report = evaluate(placed, trace, MACHINE.with_shape("1x4x2")).to_dict()
    assert made(placed, trace, certificate=certificate(report)).verdict.endswith(
        "servers touched proven within 0.51 % of the fewest possible."
    )
    assert "within 0.52 % of" in made(placed, trace, certificate=certificate(report, gap=0.00511)).verdict
    optimal = made(placed, trace, certificate=certificate(report, gap=0.0, max_load=1.05)).verdict
    assert optimal.endswith("proven to touch the fewest servers possible under its load cap of 1.05.")


def test_a_bound_on_the_tokens_fitted_says_so() -> None:
    trace = noisy_trace(layers=3)
    fit, unseen = trace.split(0.5)
    placed = shuffled(trace, (1, 4, 2))
    report = evaluate(placed, fit, MACHINE.with_shape("1x4x2")).to_dict()
    said = made(placed, unseen, fitted=fit, certificate=certificate(report)).verdict
    assert said.endswith("of the fewest possible on the tokens fitted.")


def test_a_bound_of_another_placement_is_refused() -> None:
    trace = noisy_trace()
    report = evaluate(shuffled(trace, (1, 4, 2)), trace, MACHINE.with_shape("1x4x2")).to_dict()
    with pytest.raises(InvalidInput, match="bound of another placement"):
        made(shuffled(trace, (1, 4, 2), seed=1), trace, certificate=certificate(report))


def test_a_weak_bound_stays_out_of_the_verdict_but_on_the_page() -> None:
    trace = noisy_trace()
    placed = shuffled(trace, (1, 4, 2))
    report = evaluate(placed, trace, MACHINE.with_shape("1x4x2")).to_dict()
    page = made(placed, trace, certificate=certificate(report, gap=0.79))
    assert "proven" not in page.verdict
    assert "The gap between them is 79 %" in text_of(page.html)


def test_the_result_of_a_search_brings_the_bound_on_its_objective() -> None:
    trace = noisy_trace()
    result = {"gap": 0.123, "objective": 2.0, "bound": 1.754, "bound_method": "columns"}
    said = made(shuffled(trace, (1, 4, 2)), trace, result=result).verdict
    assert said.endswith("modelled link time proven within 13 % of the best possible.")


def test_sections_without_data_are_left_out() -> None:
    trace = noisy_trace()
    placed = shuffled(trace, (1, 4, 2))
    bare = Elements(made(placed, trace).html).sections
    assert "front" not in bare
    assert "search" not in bare
    event = {"seconds": 1.0, "done": 1, "layers": 1, "objective": 2.0, "linear": 4.0, "bound": 1.0}
    runs = compare(trace, MACHINE.with_shape("1x4x2"), ["random"], jobs=1).to_dict()
    full = Elements(made(placed, trace, events=[event], comparison=runs).html)
    assert set(full.sections) - set(bare) == {"front", "search"}
    one = Trace(topk_idx=np.arange(8).reshape(4, 2, 1), num_experts=8)
    assert "together" not in Elements(made(linear(one, (1, 4, 2)), one).html).sections


def test_the_front_and_the_convergence_show_what_was_read() -> None:
    events = [
        {"seconds": 1.0, "done": 1, "layers": 2, "objective": 3.0, "linear": 4.0, "bound": None},
        {"seconds": 2.0, "done": 2, "layers": 2, "objective": 6.0, "linear": 8.0, "bound": 4.0},
        {"seconds": 3.0, "done": 1, "layers": 2, "objective": 1.0, "linear": 4.0, "bound": None},
    ]
    found, proved = figures.convergence(events)["data"]
    assert found["y"] == [-25.0, -25.0, None, -75.0]
    assert proved["y"] == [None, -50.0, None, None]
    trace = noisy_trace()
    rows = compare(trace, MACHINE.with_shape("1x4x2"), ["random", "lpt"], jobs=1).to_dict()
    drawn = made(shuffled(trace, (1, 4, 2)), trace, comparison=rows)
    marks = {each["name"]: each for each in drawn.document["figures"]["front"]["data"] if "name" in each}
    assert set(marks) == {"linear", "random", "lpt", "contiguous", "this placement"}
    assert marks["lpt"]["y"] == [
        row["held_out"]["remote"]["server"] for row in rows["rows"] if row["method"] == "lpt"
    ]
    assert marks["this placement"]["y"] == [drawn.document["report"]["remote"]["server"]]


@pytest.mark.parametrize(
    ("reader", "text", "told"),
    [
        (evidence.read_certificate, "{", "expected what 'placer bound --json' prints"),
        (evidence.read_certificate, '{"schema": "placer/report/1"}', "expected 'placer/bound/1'"),
        (evidence.read_certificate, '{"schema": "placer/bound/1", "touched": "x"}', "touched: found 'x'"),
        (evidence.read_events, "no json", "line 1"),
        (evidence.read_events, '{"seconds": 1}\n', "no event"),
        (
            evidence.read_comparison,
            '{"schema": "placer/comparison/1", "level": "server", "rows": []}',
            "no rows",
        ),
        (
            evidence.read_comparison,
            '{"schema": "placer/comparison/1", "level": "gpu", "rows": [1]}',
            "rows[0]",
        ),
    ],
)
def test_files_of_another_kind_are_told_in_one_line(
    reader: Any, text: str, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(InvalidInput) as error:
        reader(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# -- hostile names, plotly, packaging ------------------------------------------------------------------------


def test_hostile_names_are_shown_as_text() -> None:
    trace = replace(noisy_trace(), model=HOSTILE, source=HOSTILE, license=HOSTILE, name=HOSTILE)
    machine = replace(MACHINE.with_shape("1x4x2"), name=HOSTILE)
    placed = shuffled(trace, (1, 4, 2), provenance={HOSTILE: {"deep": HOSTILE}})
    runs = compare(noisy_trace(), MACHINE.with_shape("1x4x2"), ["random"], jobs=1).to_dict()
    runs |= {"title": HOSTILE, "rows": [row | {"method": HOSTILE} for row in runs["rows"]]}
    page = html.page(placed, trace, machine, name=HOSTILE, command=HOSTILE, comparison=runs)
    harmless = Elements(made(shuffled(noisy_trace(), (1, 4, 2)), noisy_trace()).html)
    found = Elements(page.html)
    assert set(found.tags) <= {*harmless.tags, "section"}
    assert found.tags.count("script") == 3
    assert sum(HOSTILE in text for text in found.texts) >= 7
    assert block(page.html)["front"]["title"] == HOSTILE
    root = block(page.html)["figures"]["icicle_report"]["data"][0]["labels"][0]
    assert "<" not in root


def test_every_figure_is_one_that_plotly_knows() -> None:
    from plotly.graph_objects import Figure

    trace = noisy_trace(layers=2)
    event = {"seconds": 1.0, "done": 1, "layers": 1, "objective": 2.0, "linear": 4.0, "bound": 1.0}
    runs = compare(trace, MACHINE.with_shape("2x2x2"), ["random"], jobs=1)
    page = made(shuffled(trace, (2, 2, 2)), trace, events=[event], comparison=runs.to_dict())
    drawn = {**page.document["figures"], **html.comparison_page(runs).document["figures"]}
    drawn["links"] = figures.links(page.document["report"]["links"])
    assert len(drawn) > 15
    for figure in drawn.values():
        Figure(figure)


def test_without_plotly_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else found(name))
    trace = noisy_trace()
    with pytest.raises(InvalidInput, match=re.escape("pip install 'placer[report]'")):
        made(shuffled(trace, (1, 4, 2)), trace)


def test_deploying_names_the_file_and_the_setting_of_every_stack_that_takes_it() -> None:
    trace = noisy_trace()
    said = text_of(made(shuffled(trace, (1, 4, 2)), trace, name="my placement.json").html)
    assert "placer export 'my placement.json' --to vllm_ascend -o vllm_ascend.json" in said
    assert '"expert_map_path": "vllm_ascend.json"' in said
    assert "placer permute CHECKPOINT 'my placement.json' -o PLACED" in said
    copied = text_of(made(shuffled(trace, (1, 4, 2), spare=8), trace).html)
    assert "placer permute" not in copied


def test_a_page_does_not_depend_on_when_it_is_made() -> None:
    trace = noisy_trace()
    assert made(shuffled(trace, (1, 4, 2)), trace).html == made(shuffled(trace, (1, 4, 2)), trace).html


# -- the commands --------------------------------------------------------------------------------------------


def test_report_writes_a_page_and_says_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = noisy_trace(layers=2)
    fit, unseen = trace.split(0.5)
    placed = shuffled(trace, (1, 4, 2))
    fit.save(tmp_path / "fit.npz")
    unseen.save(tmp_path / "unseen.npz")
    placed.save(tmp_path / "p.json")
    report = evaluate(placed, fit, MACHINE.with_shape("1x4x2")).to_dict()
    (tmp_path / "bound.json").write_text(json.dumps(certificate(report)))
    event = {
        "seconds": 1.0,
        "done": 1,
        "layers": 1,
        "objective": 2.0,
        "linear": 4.0,
        "bound": None,
        "load": 1.0,
    }
    (tmp_path / "run.jsonl").write_text(json.dumps(event) + '\n{"label": "another kind"}\n')
    runs = compare(trace, MACHINE.with_shape("1x4x2"), ["random"], jobs=1).to_dict()
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    monkeypatch.chdir(tmp_path)
    options = ("--bound", "bound.json", "--log", "run.jsonl", "--compare", "runs.json", "--fitted", "fit.npz")
    monkeypatch.setattr(sys, "argv", ["placer", "report", "p.json"])
    done = placer("report", "p.json", "unseen.npz", "-t", "dgx-h100", *options, "-o", "page.html", "--json")
    assert done.code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert done.document["bytes"] == len(page.encode())
    assert done.document["verdict"].rstrip(".") in " ".join(text_of(page).split())
    assert done.document["report"] == block(page)["report"]
    assert {"front", "search"} < set(Elements(page).sections)
    assert "placer report p.json" in text_of(page)


def test_report_does_not_write_over_what_it_reads(tmp_path: Path) -> None:
    trace = noisy_trace()
    trace.save(tmp_path / "t.npz")
    shuffled(trace, (1, 4, 2)).save(tmp_path / "p.json")
    done = placer(
        "report", tmp_path / "p.json", tmp_path / "t.npz", "-t", "dgx-h100", "-o", tmp_path / "p.json"
    )
    assert done.code == 2
    assert "would overwrite an input" in done.err


def test_compare_writes_a_page(tmp_path: Path) -> None:
    noisy_trace().save(tmp_path / "t.npz")
    machine = ("-t", "dgx-h100", "--shape", "1x4x2", "--jobs", "1", "-q")
    done = placer("compare", tmp_path / "t.npz", *machine, "--method", "lpt", "--html", tmp_path / "c.html")
    assert done.code == 0
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    document = block(page)
    assert [row["method"] for row in document["comparison"]["rows"]] == ["linear", "lpt"]
    for attributes, text in Elements(page).values:
        assert approximates(text, attributes, document), (attributes, text)


# -- duels ---------------------------------------------------------------------------------------------------


def test_duels_count_layers_and_intervals_hold_the_change() -> None:
    trace = noisy_trace(layers=4)
    found = compare(
        trace, MACHINE.with_shape("1x4x2"), ["random", "greedy"], seeds=2, jobs=1, max_loads=[None]
    )
    every = {entry.name: entry for entry in entries(found)}
    assert list(every) == ["linear", "random", "greedy"]
    gained = duel(every["greedy"], every["linear"])
    assert gained.wins + gained.ties + gained.losses == 8
    remote = {row.method: row.held_out.remote["server"] for row in found.rows if row.seed == 0}
    assert gained.change == pytest.approx(
        np.mean([row.held_out.remote["server"] for row in found.rows if row.method == "greedy"])
        / remote["linear"]
        - 1
    )
    assert gained.low is not None
    assert gained.high is not None
    assert gained.low <= gained.change <= gained.high  # type: ignore[operator]
    back = duel(every["linear"], every["greedy"])
    assert (back.wins, back.losses) == (gained.losses, gained.wins)
    same = duel(every["linear"], every["linear"])
    assert (same.wins, same.ties, same.losses, same.change) == (0, 8, 0, 0.0)


def test_solve_writes_the_page_of_its_result(tmp_path: Path) -> None:
    trace, page, placement = tmp_path / "t.npz", tmp_path / "r.html", tmp_path / "p.json"
    noisy_trace().save(trace)
    where = ("-t", "dgx-h100", "--shape", "1x4x1", "--method", "lpt")
    outcome = placer("solve", trace, *where, "-o", placement, "--report", page, "--json")
    assert outcome.code == 0, outcome.err
    shown = block(page.read_text())
    assert shown["report"] == outcome.document["report"]
    assert Placement.load(placement).provenance["trace_digest"] == Trace.load(trace).digest
    assert placer("solve", trace, *where, "-o", page, "--report", page).code == 2
