"""Pages of benchmarks: rows of cases in their order, and what a page keeps when single cases are run again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import instances, pages
from placer import Trace
from tests.instances import noisy_trace

PAGE = """\
# Title

On {jobs} threads.

| case | cell | tokens |
| --- | --- | --- |
"""
NOISY = instances.Source(file="noisy.npz", tokens=600)


@dataclass(frozen=True)
class Case:
    name: str
    cells: tuple[str, ...]
    source: instances.Source = NOISY


def rows(case: Case, trace: Trace, jobs: int) -> Iterator[tuple[str, ...]]:
    for cell in case.cells:
        yield cell, str(trace.num_tokens)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    noisy_trace().save(tmp_path / "noisy.npz")
    return tmp_path / "PAGE.md"


def write(output: Path, *cases: Case, wanted: tuple[str, ...] = (), page: str = PAGE) -> list[str]:
    """Lines below the head of the table."""
    pages.write(
        page, cases, rows, traces=output.parent, cache=output.parent, wanted=wanted, jobs=3, output=output
    )
    above, below = output.read_text().split("| --- | --- | --- |\n")
    assert above.startswith("# Title\n\nOn 3 threads.\n")
    return below.splitlines()


def test_a_page_has_the_rows_of_every_case_in_order(output: Path) -> None:
    found = write(output, Case("b", ("1", "2")), Case("a", ("3",)))
    assert found == ["| b | 1 | 600 |", "| b | 2 | 600 |", "| a | 3 | 600 |"]


def test_a_case_that_is_run_again_replaces_its_own_rows_only(output: Path) -> None:
    write(output, Case("a", ("1", "2")), Case("a, too", ("3",)), Case("b", ("4",)))
    again = Case("a", ("5",)), Case("a, too", ("6",)), Case("b", ("7",))
    assert write(output, *again, wanted=("too",)) == [
        "| a | 1 | 600 |",
        "| a | 2 | 600 |",
        "| a, too | 6 | 600 |",
        "| b | 4 | 600 |",
    ]


def test_a_new_case_comes_where_it_stands_and_one_that_is_gone_goes(output: Path) -> None:
    write(output, Case("a", ("1",)), Case("gone", ("2",)), Case("c", ("3",)))
    cases = Case("c", ("4",)), Case("b", ("5",)), Case("a", ("6",))
    assert write(output, *cases, wanted=("b",)) == ["| c | 3 | 600 |", "| b | 5 | 600 |", "| a | 1 | 600 |"]


def test_a_case_without_its_trace_is_skipped_and_keeps_its_rows(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(output, Case("a", ("1",)), Case("b", ("2",)))
    other = instances.Source(file="noisy.npz", tokens=601)
    found = write(output, Case("a", ("3",), other), Case("b", ("4",)))
    assert found == ["| a | 1 | 600 |", "| b | 4 | 600 |"]
    assert "a: skipped: noisy.npz: found 600 tokens, expected 601" in capsys.readouterr().err


def test_text_below_the_table_stays(output: Path) -> None:
    write(output, Case("a", ("1",)))
    with output.open("a") as file:
        file.write("\nA note | with a bar.\n")
    assert write(output, Case("a", ("2",))) == ["| a | 2 | 600 |", "", "A note | with a bar."]


def test_rows_of_another_table_are_not_kept(output: Path) -> None:
    write(output, Case("a", ("1",)), Case("b", ("2",)))
    cases = Case("a", ("3",)), Case("b", ("4",))
    assert write(output, *cases, wanted=("a",), page=PAGE.replace("cell", "other")) == ["| a | 3 | 600 |"]
