"""Values in a notebook: tables that escape what they show, figures that hold the numbers they name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace

from placer import Budget, Problem, Report, Result, Topology, evaluate, notebook, solve
from placer.comparison import Comparison, compare
from placer.errors import InvalidInput

HOSTILE = "<script>alert('x')</script>&<img src=x onerror=y>"
MACHINE = Topology.load("dgx-h100").with_shape("1x4x2")
ALLOWED = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}


class Seen(HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def result() -> Result:
    problem = Problem.from_trace(noisy_trace(), MACHINE, max_load=None)
    return solve(problem, "greedy", budget=Budget(seconds=20, rounds=1))


@pytest.fixture(scope="module")
def report(result: Result) -> Report:
    return evaluate(result.placement, noisy_trace(), MACHINE)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(noisy_trace(), MACHINE, ["greedy", "eplb"], redundants=[0, 8])


# -- tables --------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=4), st.text())
@settings(max_examples=60, deadline=None)
def test_a_table_shows_any_text_as_text(rows: list[list[str]], title: str) -> None:
    seen = Seen(notebook.table(["a", title], rows, title=title, notes=[title]))
    assert seen.tags <= ALLOWED
    said = "".join(seen.text.split())
    assert "".join(title.split()) in said
    assert all("".join(cell.split()) in said for row in rows for cell in row)


def test_a_report_shows_its_levels_and_what_it_assumes(report: Report) -> None:
    seen = Seen(report._repr_html_())
    assert seen.tags == ALLOWED
    for level in ("gpu", "server", "rack"):
        assert f"{report.touched[level]:.3f}" in seen.text
        assert f"{report.load[level]['worst_layer']:.3f}" in seen.text
    assert all(said in seen.text for said in report.assumptions)


def test_a_result_shows_its_method_status_and_notes(result: Result) -> None:
    seen = Seen(replace(result, notes=(HOSTILE,), bound=0.5 * result.objective)._repr_html_())
    assert seen.tags == ALLOWED
    assert "greedy: 2 layers x 16 experts on 8 ranks x 2 slots" in seen.text
    assert "50.00%" in seen.text
    assert HOSTILE in seen.text


def test_a_result_prints_as_one_line(result: Result) -> None:
    assert repr(result).startswith("Result(method='greedy', status='feasible', objective=")
    assert "\n" not in repr(replace(result, bound=result.objective))
    assert "gap=0, " in repr(replace(result, bound=result.objective))


def test_a_comparison_shows_the_rows_that_it_prints(comparison: Comparison) -> None:
    page = replace(comparison, title=HOSTILE)._repr_html_()
    seen = Seen(page)
    assert seen.tags == ALLOWED
    assert HOSTILE in seen.text
    assert page.count("<tr>") == 1 + len(comparison.rows)


def test_tables_load_no_plotly_and_no_pandas() -> None:
    code = (
        "import sys, numpy as np; from placer import Placement, Trace, Topology, evaluate\n"
        "trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)\n"
        "placed = Placement(physical_to_logical=np.arange(4)[None], num_experts=4, shape=(1, 2, 1))\n"
        "machine = Topology.load('dgx-h100').with_shape('1x2x1')\n"
        "assert '<table>' in evaluate(placed, trace, machine)._repr_html_()\n"
        "assert not {'plotly', 'pandas', 'jinja2'} & {name.partition('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- figures -------------------------------------------------------------------------------------------------


def test_figures_of_a_report_hold_its_numbers(report: Report) -> None:
    known = notebook.report_figures(report)
    load = known["load"]()["data"]
    assert [line["name"] for line in load] == ["gpu", "server", "rack"]
    assert [line["y"] for line in load] == [report.per_layer["load"][line["name"]] for line in load]
    assert known["touched"]()["data"][1]["y"] == report.per_layer["touched"]["server"]
    assert known["remote"]()["data"][0]["y"] == report.per_layer["remote"]["gpu"]
    assert known["links"]()["data"][0]["x"] == [1e3 * row["seconds"] for row in report.links]
    total = sum(known["seconds"]()["data"][0]["y"])
    assert total == pytest.approx(report.seconds["step"])


def test_figures_of_a_result_say_where_experts_stand(result: Result) -> None:
    heat = notebook.result_figures(result)["servers"]()["data"][0]["z"]
    for row, slots in zip(heat, result.placement.physical_to_logical, strict=True):
        for slot, expert in enumerate(slots):
            assert row[expert] == slot // 4
    assert notebook.result_figures(result)["copies"]()["data"][0]["z"] == [[1] * 16] * 2


def test_figures_of_a_comparison_have_a_point_for_each_run(comparison: Comparison) -> None:
    known = notebook.comparison_figures(comparison)
    drawn = [line for line in known["front"]()["data"] if line["mode"] == "markers"]
    assert sum(len(line["x"]) for line in drawn) == len(comparison.rows)
    assert len({line["marker"]["symbol"] for line in drawn}) == len(drawn)  # colour is not all
    bars = known["seconds"]()["data"][0]
    assert bars["x"] == [row.seconds for row in comparison.rows]
    assert len(set(bars["y"])) == len(comparison.rows)


def test_labels_of_figures_are_escaped(comparison: Comparison, report: Report) -> None:
    rows = tuple(replace(row, method=HOSTILE) for row in comparison.rows)
    for picture in notebook.comparison_figures(replace(comparison, rows=rows)).values():
        assert "<" not in json.dumps(picture()["data"]).replace("<extra></extra>", "").replace("<br>", "")
    links = [{**row, "link": HOSTILE} for row in report.links]
    assert "<" not in notebook.report_figures(replace(report, links=links))["links"]()["data"][0]["y"][0]


def test_every_figure_is_drawn_by_plotly(report: Report, result: Result, comparison: Comparison) -> None:
    objects = pytest.importorskip("plotly.graph_objects")
    assert isinstance(report.figure("load"), objects.Figure)
    for value, known in (
        (report, notebook.report_figures(report)),
        (result, notebook.result_figures(result)),
        (comparison, notebook.comparison_figures(comparison)),
    ):
        for name in known:
            assert len(value.figure(name).data) >= 1


def test_an_unknown_figure_is_answered_with_all_names(report: Report) -> None:
    with pytest.raises(
        InvalidInput, match="unknown figure 'laod'; known: load, touched, remote, links, seconds"
    ):
        report.figure("laod")


def test_without_plotly_the_error_says_what_to_type(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'placer\[report\]'"):
        report.figure("load")


# -- frames --------------------------------------------------------------------------------------------------


def test_a_frame_has_a_row_for_each_run_and_the_numbers_of_both_parts(comparison: Comparison) -> None:
    pytest.importorskip("pandas")
    frame = comparison.to_frame()
    assert len(frame) == len(comparison.rows)
    for index, row in enumerate(comparison.rows):
        assert frame["method"][index] == row.method
        assert frame["held_out.remote.server"][index] == row.held_out.value("remote.server")
        assert frame["train.load.gpu.worst_layer"][index] == row.train.value("load.gpu.worst_layer")
        assert frame["against_linear"][index] == comparison.against_linear(row)
    assert not [name for name in frame.columns if "per_layer" in name]


def test_without_pandas_the_error_says_what_to_type(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InvalidInput, match="pip install pandas"):
        comparison.to_frame()
