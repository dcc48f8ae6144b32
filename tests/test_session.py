"""The README's session between stacks: convert, solve, export, as it is printed there."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from terminal import placer

from placer import Placement, Trace

README = Path(__file__).parents[1] / "README.md"


def commands() -> list[list[str]]:
    """The words of every line of the session."""
    block = re.search(
        r"a map that the stack loads comes out:\n\n```sh\n(.*?)```", README.read_text(), re.DOTALL
    )
    assert block is not None
    return [shlex.split(line) for line in block[1].splitlines()]


def record(folder: Path, requests: int) -> NDArray[np.uint8]:
    """Responses of vLLM for a model of 16 MoE layers, one a line, in two files: the experts in them."""
    ids = np.random.default_rng(0).random((20 * requests, 16, 64)).argsort(axis=2)[:, :, :8].astype(np.uint8)
    folder.mkdir()
    lines = []
    for request in np.split(ids, requests):
        file = io.BytesIO()
        np.save(file, request)
        routed = base64.b64encode(file.getvalue()).decode()
        lines.append(json.dumps({"id": "x", "choices": [{"index": 0, "routed_experts": routed}]}))
    (folder / "a.jsonl").write_text("\n".join(lines[:2]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(lines[2:]) + "\n")
    return ids


def test_what_a_stack_recorded_becomes_a_map_that_a_stack_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recorded = record(tmp_path / "recordings", 6)
    session = commands()
    assert [words[1] for words in session] == ["convert", "solve", "export"]
    for words in session:
        quick = ("--time-limit", "5") if words[1] == "solve" else ()
        outcome = placer(*words[1:], *quick)
        assert outcome.code == 0, outcome.err
    trace = Trace.load("trace.npz")
    assert (np.sort(trace.topk_idx) == np.sort(recorded)).all()
    assert len(np.unique(np.asarray(trace.sequence))) == 6
    placement = Placement.load("placement.json")
    rows = json.loads(Path("map.json").read_text())["physical_to_logical_map"]
    assert rows == placement.physical_to_logical.tolist()
    assert "--init-expert-location map.json" in outcome.out
