"""The scripts that users start from run, and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from placer import Trace

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")

ROOT = Path(__file__).parent.parent


def said(script: str, *arguments: str) -> str:
    """What a script prints, in a process of its own, on one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_recorded_solved_and_permuted_model_touches_fewer_servers_and_computes_the_same() -> None:
    text = said("docs/examples/record_solve_permute.py")
    difference = re.search(r"difference of logits: (\S+)", text)
    before, after = re.findall(r"checkpoint (?:as it was|permuted ) +([0-9.]+)", text)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert float(after) < 0.95 * float(before)


def test_planning_again_in_training_cuts_the_traffic_of_the_plan_in_force() -> None:
    rows = re.findall(
        r"^ *(\d+) +([0-9.]+) +(\S+) / \S+ +(\S+) / \S+ +(\S+) / ",
        said("docs/examples/replan_in_training.py"),
        re.M,
    )
    assert [int(row[0]) for row in rows] == [30, 60, 90, 120]
    assert float(rows[-1][1]) < float(rows[0][1])  # it does train
    for _, _, contiguous, in_force, new in rows:
        assert float(new) <= float(in_force)
        assert float(new) < 0.95 * float(contiguous)


def test_the_script_behind_traces_trains_and_records(tmp_path: Path) -> None:
    said("traces/train_tinymoe.py", "--smoke", "--out", str(tmp_path / "smoke.npz"))
    trace = Trace.load(tmp_path / "smoke.npz")
    shipped = Trace.load(ROOT / "traces" / "tinymoe.npz")
    assert trace.topk_idx.shape == (1000, *shipped.topk_idx.shape[1:])
    assert (trace.num_experts, trace.model, trace.layer_ids) == (64, "tinymoe", shipped.layer_ids)
    assert trace.sequence is not None
    assert trace.sequence.tolist() == [token // 256 for token in range(1000)]
    assert trace.domain is not None
    assert len(set(trace.domain.tolist())) > 1
    for window in range(4):
        assert len(set(trace.domain[trace.sequence == window].tolist())) == 1
