"""Runs: one method on one instance with one seed, as a row of a JSON-lines file."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt

import placer
from benchmarks.instances import ROOT, Instance
from placer import Budget, Placement, Problem, Report, Trace, evaluate, solve
from placer.errors import InvalidInput
from placer.search import descend
from placer.solution import with_margin
from placer.solvers import method as load_method
from placer.topology import REPORTED

Row = Mapping[str, Any]

DESCENT = "+descent"
RACE = "@"  # in a method's name: in the time of another, as in auto@metis+descent or auto@mtkahypar+descent/5
PATIENCE = {
    False: 1,
    True: 30,
}  # swaps without a new best after which a descent stops, by whether there are caps
_PACKAGES = ("numpy", "scipy", "numba", "ortools")
_WARM_TOKENS = 256


def key_of(
    instance: Instance, fit: Trace, unseen: Trace | None, method: str, seed: int, budget: Budget, jobs: int
) -> str:
    """What makes two runs the same: the tokens, the question, the method and the code, whatever the commit."""
    what = [
        asdict(instance),
        fit.digest,
        unseen and unseen.digest,
        method,
        seed,
        asdict(budget),
        jobs,
        code(),
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def measure(
    instance: Instance, fit: Trace, unseen: Trace | None, method: str, seed: int, budget: Budget, jobs: int
) -> dict[str, Any]:
    """Run a method and score what it returns.

    Parameters
    ----------
    fit, unseen : Trace
        Tokens to solve for, and others (None for no others) to score only.
    method : str
        A method's name, or ``NAME+descent``: the method, then exact swap descent within the caps. What follows
        an ``@`` only says where the budget comes from.

    Returns
    -------
    A row: ``seconds`` of the method (compiled before), ``prepare_seconds`` of counting, ``peak_bytes`` of the process
    during both with the trace in memory, scores as in `placer.Report`, ``cost`` as in `placer.Result.objective`.
    """
    sample = fit.select(slice(None, None, max(1, fit.num_tokens // _WARM_TOKENS))).layers(slice(0, 1))
    plain = method.partition(RACE)[0]
    _place(instance.problem(sample), plain, seed, Budget(seconds=5, rounds=1), 1)
    _reset_peak()
    begun = time.perf_counter()
    problem = instance.problem(fit)
    prepared = time.perf_counter() - begun
    placement, rounds, seconds = _place(problem, plain, seed, budget, jobs)
    peak = _peak_bytes()
    return {
        "key": key_of(instance, fit, unseen, method, seed, budget, jobs),
        "instance": instance.name,
        "method": method,
        "seed": seed,
        "max_load": instance.max_load,
        "keeps_caps": plain.endswith(DESCENT) or "caps" in load_method(plain).handles,
        "fitted": _scores(problem, placement, fit),
        "unseen": None if unseen is None else _scores(problem, placement, unseen),
        "seconds": seconds,
        "prepare_seconds": prepared,
        "peak_bytes": peak,
        "rounds": rounds,
        "budget": asdict(budget),
        "jobs": jobs,
        "digests": {
            "fit": fit.digest,
            "unseen": None if unseen is None else unseen.digest,
            "placement": placement.digest,
        },
        **surroundings(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read(path: Path) -> list[Row]:
    """The rows of a file, oldest first; none where there is no file.

    Raises
    ------
    InvalidInput
        When a line is no JSON object.
    """
    rows: list[Row] = []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise InvalidInput(f"{path}, line {number}: found no JSON object, expected a run") from None
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def race_budget(rows: Sequence[Row], instance: str, method: str, seed: int, budget: Budget) -> Budget:
    """The budget of a method: its own, or for ``NAME@OTHER[/N]`` the seconds of OTHER's newest run, or a part of them.

    Raises
    ------
    InvalidInput
        When OTHER has no run on this instance.

    Examples
    --------
    >>> rows = [{"instance": "a", "method": "metis", "seed": 0, "seconds": 3.0}]
    >>> race_budget(rows, "a", "auto@metis/2", 0, Budget()).seconds
    1.5
    """
    _, race, other = method.partition(RACE)
    if not race:
        return budget
    other, _, part = other.partition("/")
    seconds = [
        r["seconds"] for r in rows if (r["instance"], r["method"], r["seed"]) == (instance, other, seed)
    ]
    if not seconds:
        raise InvalidInput(f"found no run of {other} with seed {seed} on {instance}, expected one to race")
    return replace(budget, seconds=seconds[-1] / float(part or 1))


@cache
def code() -> str:
    """Digest of what the library does: its syntax trees, so that comments, layout and the command line do not count."""
    package = Path(placer.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in ("cli", "html"):
            digest.update(f"{name}\0{ast.dump(ast.parse(path.read_bytes()))}".encode())
    return digest.hexdigest()[:12]


@cache
def surroundings() -> dict[str, Any]:
    """Code, versions and machine."""
    packages = {name: version(name) for name in _PACKAGES}
    return {
        "code": code(),
        "commit": _commit(),
        "versions": {"placer": placer.__version__, "python": platform.python_version(), **packages},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def _place(
    problem: Problem, method: str, seed: int, budget: Budget, jobs: int
) -> tuple[Placement, int, float]:
    """Placement, rounds and seconds of a method, with its descent where it has one."""
    result = solve(problem, method.removesuffix(DESCENT), seed=seed, budget=budget, jobs=jobs)
    if not method.endswith(DESCENT):
        return result.placement, result.rounds, result.seconds
    begun = time.perf_counter()
    problem = with_margin(problem, jobs=jobs)
    rows = joblib.Parallel(n_jobs=jobs, prefer="threads")(
        joblib.delayed(_descended)(problem, index, slots, seed)
        for index, slots in enumerate(result.placement.physical_to_logical)
    )
    placement = replace(result.placement, physical_to_logical=np.stack(rows))
    return placement, result.rounds, result.seconds + time.perf_counter() - begun


def _descended(
    problem: Problem, index: int, slots: npt.NDArray[np.int32], seed: int
) -> npt.NDArray[np.int32]:
    layer = problem.layer(index)
    found, _ = descend(
        layer,
        layer.occupant(slots),
        exact=True,
        patience=PATIENCE[layer.max_load is not None],
        rng=np.random.default_rng([seed, index]),
    )
    return layer.slots(found)


def _scores(problem: Problem, placement: Placement, trace: Trace) -> dict[str, Any]:
    report = evaluate(placement, trace, problem.topology, model=problem.model, reserve=problem.reserve)
    return {
        "tokens": report.tokens,
        "touched": report.touched,
        "remote": report.remote,
        "load": report.load,
        "cost": _cost(problem, report),
    }


def _cost(problem: Problem, report: Report) -> float:
    """Link seconds of a token over all layers; the topologies used here have the three reported levels only."""
    seconds = dict(
        zip((lvl.name for lvl in problem.topology.levels), problem.seconds_per_vector, strict=True)
    )
    return report.layers * sum(seconds[name] * report.remote[name] for name in REPORTED)


def _reset_peak() -> None:
    """Start the process's peak memory anew, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    """Peak memory since `_reset_peak`; of the whole process where it cannot be reset."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = (
            1 if platform.system() == "Darwin" else 1024
        )  # getrusage(2) counts bytes there, kilobytes elsewhere
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _commit() -> str | None:
    """The commit checked out, ``+`` when the library differs from it; None outside a repository."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if _git("status", "--porcelain", "--", "placer") else "")


def _git(*words: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
