"""Help that teaches: commands by task, examples that the parser takes, notes in words, completion."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from terminal import placer

from placer import Placement
from placer.cli import COMMANDS, SECTIONS, main

ROOT = Path(__file__).parent.parent


def examples(text: str) -> list[list[str]]:
    """The command lines that a help text shows, as words without the first."""
    shown = re.findall(r"^ +placer (.+)$", text.partition("Example:")[2] or text, re.MULTILINE)
    return [shlex.split(line.partition(" > ")[0]) for line in shown]


ALL = [example for name in COMMANDS for example in examples(placer(name, "--help").out)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that examples name."""
    (tmp_path / "traces").symlink_to(ROOT / "traces")
    (tmp_path / "pins.toml").write_text("[[pin]]\nexperts = [3]\nserver = 0\n")
    slots = np.arange(64)[None].repeat(6, axis=0)
    Placement(physical_to_logical=slots, num_experts=64, shape=(1, 8, 1)).save(tmp_path / "placement.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_groups_every_command_under_one_task() -> None:
    shown = placer("--help").out
    parts = re.split(r"^(.+):\n", shown, flags=re.MULTILINE)
    lists = dict(zip(parts[1::2], parts[2::2], strict=False))
    for title, names in SECTIONS.items():
        assert re.findall(r"^  (\w+) ", lists[title], re.MULTILINE)[: len(names)] == list(names)
    assert len(set(COMMANDS)) == len(COMMANDS)


def test_every_file_of_a_command_is_in_the_help() -> None:
    files = {path.stem for path in (ROOT / "placer" / "cli").glob("*.py")}
    commands = {name for name in files if re.search(r"^def command\(", _source(name), re.MULTILINE)}
    assert commands == set(COMMANDS)


def _source(name: str) -> str:
    return (ROOT / "placer" / "cli" / f"{name}.py").read_text(encoding="utf-8")


def test_every_command_says_what_it_does_in_one_uncut_line() -> None:
    shown = placer("--help").out
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert f"  {name.ljust(max(map(len, COMMANDS)))}  {command.short_help}\n" in shown


@pytest.mark.parametrize("example", ALL, ids=" ".join)
def test_an_example_of_the_help_is_taken_by_the_parser(example: list[str], workplace: Path) -> None:
    command = main.get_command(click.Context(main), example[0])
    assert command is not None
    context = command.make_context(example[0], example[1:])
    assert not context.args


def test_the_first_run_of_the_help_runs(workplace: Path) -> None:
    first = examples(placer("--help").out.partition("A first run:")[2])[:3]
    assert [example[0] for example in first] == ["synth", "solve", "evaluate"]
    for example in first:
        quick = {"synth": ["--tokens", 300], "solve": ["--method", "lpt", "--quiet"]}.get(example[0], [])
        assert placer(*example, *quick).code == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_and_ranges_are_said_in_words(name: str) -> None:
    shown = " ".join(placer(name, "--help").out.split())
    assert "default: (" not in shown
    assert not re.search(r"x>=|<=x", shown)


def test_defaults_in_words_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = " ".join(placer("solve", "--help").out.split())
    for note in (
        "Layers at once. [default: one for each core; 1 or more]",
        "the least modelled step time. [default: 0]",
        "Seed of all random choices. [default: 0; 0 or more]",
        "Memory of a GPU, for example 80GB. [default: the topology's]",
    ):
        assert note in shown
    assert "1 to 9999]" in " ".join(placer("export", "--help").out.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_that_is_documented_prints_a_script(shell: str) -> None:
    code = "from placer.cli import main; main(prog_name='placer')"
    environment: dict[str, Any] = {**os.environ, "_PLACER_COMPLETE": f"{shell}_source"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if shell == "bash" and "Bash version" in done.stderr:
        pytest.skip("click wants bash 4.4 or later")
    assert (done.returncode, "_PLACER_COMPLETE" in done.stdout) == (0, True)
    assert f"{shell}_source placer" in placer("--help").out or shell != "bash"
