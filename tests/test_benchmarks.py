"""The benchmarks run from end to end on a tiny instance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import instances, runs, scaling, tables
from benchmarks.quality import main
from placer.errors import InvalidInput
from placer.solution import solve
from tests.instances import noisy_trace

BOOK = """
[traces]
noisy = { file = "noisy.npz", tokens = 600 }
other = { file = "noisy.npz", tokens = 601 }

[[instances]]
name = "small"
trace = "noisy"
shape = "1x4x2"
fit = { modulo = 2, residue = 0 }
unseen = { modulo = 2, residue = 1 }
caps = [{}, { max_load = 1.1, load_margin = "auto" }]

[[instances]]
name = "elsewhere"
trace = "other"
shape = "1x4x2"
caps = [{}]

[[targets]]
instance = "small/none"
measure = "unseen.touched.server"
of_linear = 0.99

[[targets]]
instance = "small/none"
measure = "seconds"
at_most = 0.0
"""


def quality(folder: Path, *words: str) -> str:
    """Output of a command on the tiny book."""
    (folder / "book.toml").write_text(BOOK)
    noisy_trace().save(folder / "noisy.npz")
    given = [
        words[0],
        "--rows",
        str(folder / "rows.jsonl"),
        "--instances",
        str(folder / "book.toml"),
        *words[1:],
    ]
    done = CliRunner().invoke(main, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def run(folder: Path, *words: str) -> str:
    methods = [word for name in ("linear", "lpt+descent", "auto") for word in ("--method", name)]
    limits = ["--rounds", "1", "--jobs", "1", "--seeds", "2", "--traces", str(folder)]
    return quality(folder, "run", *methods, *limits, *words)


def test_runs_are_recorded_resumed_and_tabled(tmp_path: Path) -> None:
    said = run(tmp_path)
    assert "elsewhere/none skipped: noisy.npz: found 600 tokens, expected 601" in said
    rows = runs.read(tmp_path / "rows.jsonl")
    assert len(rows) == 2 * 3 * 2
    assert len({row["key"] for row in rows}) == len(rows)
    assert rows[0]["fitted"]["tokens"] + rows[0]["unseen"]["tokens"] == 600
    assert "--traces DIR --method linear" in rows[0]["command"]
    assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()

    assert run(tmp_path).count("there already") == len(rows)
    assert len(runs.read(tmp_path / "rows.jsonl")) == len(rows)
    run(tmp_path, "--again", "--instance", "small/none")
    assert len(runs.read(tmp_path / "rows.jsonl")) == len(rows) + 6

    table = quality(tmp_path, "table")
    assert "small/none\nmethod" in table
    assert "small/1.1-auto\nmethod" in table
    assert "linear*" in table.split("small/1.1-auto")[1]
    assert "auto against the others" in table
    lines = quality(tmp_path, "table", "--targets").splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["yes", "no"]
    quality(tmp_path, "report", "-o", str(tmp_path / "RESULTS.md"))
    text = (tmp_path / "RESULTS.md").read_text()
    assert "python -m benchmarks.quality run" in text
    assert "commit" in text


def test_the_cost_of_a_row_is_the_objective_of_solve(tmp_path: Path) -> None:
    run(tmp_path, "--instance", "small/none")
    row = next(r for r in runs.read(tmp_path / "rows.jsonl") if r["method"] == "linear")
    instance = instances.read(tmp_path / "book.toml")[0][0]
    fit, _ = instances.parts(instance, tmp_path, tmp_path)
    assert row["fitted"]["cost"] == pytest.approx(solve(instance.problem(fit), "linear").objective)


def test_descent_lowers_the_cost(tmp_path: Path) -> None:
    run(tmp_path, "--instance", "small/none", "--method", "lpt")
    costs = {row["method"]: row["fitted"]["cost"] for row in runs.read(tmp_path / "rows.jsonl")}
    assert costs["lpt+descent"] < costs["lpt"]


def test_a_race_has_the_seconds_of_the_other_method(tmp_path: Path) -> None:
    words = ["--instance", "small/none", "--method", "auto@lpt+descent/2", "--method", "auto@metis"]
    assert "auto@metis skipped: found no run of metis with seed 0" in run(tmp_path, *words)
    rows = {row["method"]: row for row in runs.read(tmp_path / "rows.jsonl") if row["seed"] == 1}
    raced = rows["auto@lpt+descent/2"]
    assert raced["budget"]["seconds"] == rows["lpt+descent"]["seconds"] / 2
    table = tables.races(tables.latest(runs.read(tmp_path / "rows.jsonl"))).splitlines()
    assert table[1].split()[:2] == ["small/none", "auto@lpt+descent/2"]
    assert sum(map(int, table[-1].split()[-5::2])) == 2


def test_a_target_may_be_the_best_of_the_peers() -> None:
    def row(method: str, cost: float) -> runs.Row:
        return {"method": method, "seed": 0, "seconds": 1.0, "fitted": {"cost": cost}, "unseen": None}

    target = instances.Target(instance="a", measure="fitted.cost", below=("x", "y"))
    found = {"a": {"auto": [row("auto", 2.0)], "x": [row("x", 3.0)], "y": [row("y", 1.5)]}}
    assert tables.targets_table(found, [target]).split()[-1] == "no"
    found["a"]["y"] = [row("y", 2.0)]
    assert tables.targets_table(found, [target]).split()[-1] == "yes"


def test_a_row_of_another_code_is_not_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(tmp_path, "--instance", "small/none")
    monkeypatch.setattr(runs, "code", lambda: "another")
    assert "there already" not in run(tmp_path, "--instance", "small/none")


def test_wins_ties_and_losses_leave_out_methods_without_a_cap() -> None:
    def row(method: str, seed: int, cost: float, keeps: bool = True) -> runs.Row:
        fitted = {"cost": cost}
        return {
            "instance": "a",
            "method": method,
            "seed": seed,
            "max_load": 1.05,
            "keeps_caps": keeps,
            "fitted": fitted,
        }

    found = tables.latest(
        [row("auto", seed, 1.0) for seed in range(3)]
        + [row("tabu", 0, 1.01), row("tabu", 1, 1.0004), row("tabu", 2, 0.99), row("greedy", 0, 0.5, False)]
    )
    assert tables.duel(found, "tabu", "fitted") == (1, 1, 1)
    assert tables.duel(found, "greedy", "fitted") == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[traces", "book.toml: "),
        ("[traces]", "found no 'instances'"),
        ('[traces]\na = { tokens = 1, fiel = "x" }', "fiel"),
        (BOOK.replace('instance = "small/none"', 'instance = "smal/none"'), "targets that name one"),
    ],
)
def test_a_wrong_book_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "book.toml").write_text(text)
    with pytest.raises(InvalidInput, match=message) as error:
        instances.read(tmp_path / "book.toml")
    assert "\n" not in str(error.value)


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"key": "a"}) + "\n{\n")
    with pytest.raises(InvalidInput, match="line 2"):
        runs.read(tmp_path / "rows.jsonl")


def test_scaling_fits_an_exponent_for_every_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "AXES", {"tokens": (200, 400), "servers": (2, 4)})
    text = scaling.table("lpt", 1, None, 1, scaling.Size(experts=16, tokens=200, layers=1))
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["tokens"] * 3 + ["servers"] * 3
