"""The pages in `docs/`: what they show runs. Their ``>>>`` examples run as doctests."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from terminal import placer

from placer import Placement, Trace, formats, solvers
from tests import test_contract as contract

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    """The code of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def commands(page: str) -> list[list[str]]:
    """The command lines on a page, as words without the first."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line.removeprefix("placer ")) for line in lines if line.startswith("placer ")]


@pytest.fixture
def dropped_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[ModuleType, str, str], ModuleType]:
    """Puts a file into a package, as a page tells its reader to."""

    def drop(package: ModuleType, name: str, source: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        full = f"{package.__name__}.{name}"
        monkeypatch.setitem(sys.modules, full, None)  # so that it is taken out again in the end
        del sys.modules[full]
        importlib.invalidate_caches()
        return importlib.import_module(full)

    return drop


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_method_of_the_page_keeps_what_every_method_promises(
    dropped_in: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    (source,) = [block for block in blocks("add-a-method.md", "python") if ">>>" not in block]
    dropped_in(solvers, "serpentine", source)
    assert "serpentine" in solvers.names()
    assert "serpentine" in placer("methods").out
    contract.test_every_method_says_what_it_needs_and_handles("serpentine")
    for shape, options in (("1x4x1", {}), ("2x2x2", {"max_load": 1.1}), ("1x3x1", {"redundant": 2})):
        contract.test_every_method_places_every_expert("serpentine", shape, options)
    contract.test_methods_make_copies_or_leave_spare_slots_empty("serpentine", "1x4x2", 3, "nearest")
    contract.test_the_same_seed_gives_the_same_placement_for_any_number_of_jobs("serpentine")
    contract.test_the_problem_is_left_as_it_was("serpentine")


def test_the_method_of_the_page_does_what_the_page_says(
    dropped_in: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    (source,) = [block for block in blocks("add-a-method.md", "python") if ">>>" not in block]
    dropped_in(solvers, "serpentine", source)
    posed = contract.problem(contract.noisy_trace(), "1x4x1")
    placed = solvers.method("serpentine").place(posed.layer(0), rng=None, clock=None)  # type: ignore[arg-type]
    hottest = posed.layer(0).load.argsort(kind="stable")[::-1]
    rank = {expert: slot // 4 for slot, expert in enumerate(placed.slots.tolist())}
    load = posed.layer(0).load
    assert [load[e] for e in hottest[:8]] == sorted(load, reverse=True)[:8]
    assert sorted(rank[int(e)] for e in hottest[:4]) == [0, 1, 2, 3]
    assert rank[int(hottest[0])] == 0


def test_the_format_of_the_page_is_read_and_written_as_the_page_says(
    dropped_in: Callable[[ModuleType, str, str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = blocks("add-a-format.md", "python")
    dropped_in(formats, "csv_choices", source)
    monkeypatch.chdir(tmp_path)
    lines = [f"{token},0,{expert}" for token in range(20) for expert in ((0, 2), (3, 1))[token % 2]]
    Path("choices.csv").write_text("\n".join(["token,layer,expert", *lines]) + "\n")
    for command in commands("add-a-format.md"):
        outcome = placer(*command)
        assert outcome.code == 0, outcome.err
    assert Trace.load("trace.npz").topk_idx[:2].tolist() == [[[0, 2]], [[1, 3]]]
    said = {tuple(map(int, line.split(","))) for line in Path("placement.csv").read_text().splitlines()[1:]}
    slots = Placement.load("placement.json").physical_to_logical[0].tolist()
    assert said == {(0, slot // 2, expert) for slot, expert in enumerate(slots)}
    assert {slots[0], slots[1]} in ({0, 2}, {1, 3})


@pytest.mark.parametrize(
    "text", ["", "token,layer,expert\n0,0,x\n", "token,layer,expert\n0,0,1\n0,0,2\n1,0,1\n"]
)
def test_a_damaged_file_of_that_format_is_told_in_one_line(
    text: str, dropped_in: Callable[[ModuleType, str, str], ModuleType], tmp_path: Path
) -> None:
    dropped_in(formats, "csv_choices", blocks("add-a-format.md", "python")[0])
    (tmp_path / "bad.csv").write_text(text)
    outcome = placer("convert", tmp_path / "bad.csv", "--num-experts", 4, "-o", tmp_path / "t.npz")
    assert outcome.code == 2
    (error,) = [line for line in outcome.err.splitlines() if not line.startswith("reading ")]
    assert error.startswith(f"Error: {tmp_path / 'bad.csv'}: ")


@pytest.mark.skipif(
    not (find_spec("plotly") and find_spec("jinja2")), reason="plotly or jinja2 is not installed"
)
def test_the_commands_that_make_a_report_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for command in commands("read-the-report.md"):
        outcome = placer(*command)
        assert outcome.code == 0, outcome.err
        names.append(command[0])
    assert names == ["synth", "solve", "evaluate", "report"]
    assert Path("report.html").stat().st_size > 1000


def test_the_glossary_has_every_word_of_the_interface() -> None:
    page = (DOCS / "glossary.md").read_text(encoding="utf-8")
    defined = " ".join(re.findall(r"\*\*(.+?)\*\*", page)).lower()
    words = (
        "logical expert|physical expert|slot|replica|copy|rank|home|dispatch|combine|touched|remote|co-activation|"
        "balancedness|incumbent|bound|gap"
    )
    for word in re.split(r"\|", words):
        assert word in defined
