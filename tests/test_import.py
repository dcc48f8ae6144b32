"""`import placer` stays light and quiet."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("ortools", "numba", "scipy", "networkx", "pandas", "rich", "joblib", "click")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(m.split('.')[0] for m in sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_importing_placer_loads_nothing_heavy() -> None:
    assert loaded_after("import placer").isdisjoint({"numpy", *HEAVY})


def test_reading_a_trace_and_a_placement_loads_numpy_only() -> None:
    modules = loaded_after("import placer; placer.Trace, placer.Placement, placer.Topology, placer.Model")
    assert "numpy" in modules
    assert modules.isdisjoint(HEAVY)


def test_importing_placer_touches_neither_logging_nor_signals() -> None:
    code = (
        "import logging, signal; before = (logging.root.handlers[:], signal.getsignal(signal.SIGINT));"
        "import placer, placer.solution, placer.evaluation;"
        "assert before == (logging.root.handlers[:], signal.getsignal(signal.SIGINT))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve() -> None:
    import placer

    for name in placer._HOME:
        assert getattr(placer, name).__doc__
