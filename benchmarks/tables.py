"""Tables of runs: all methods, who wins, and which targets are met."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.instances import Target
from benchmarks.runs import RACE, Row
from placer.table import aligned

Runs = dict[str, dict[str, list[Row]]]  # by instance, then method; a row for each seed

BASELINE, CHAMPION = "linear", "auto"
PARTS = ("fitted", "unseen")
TIE = 0.0005  # relative difference of two costs below which they are taken as equal


def latest(rows: Iterable[Row]) -> Runs:
    """The newest row of every instance, method and seed.

    Examples
    --------
    >>> old, new = ({"instance": "a", "method": "lpt", "seed": 0, "seconds": s} for s in (2.0, 1.0))
    >>> latest([old, new])["a"]["lpt"][0]["seconds"]
    1.0
    """
    newest = {(row["instance"], row["method"], row["seed"]): row for row in rows}
    runs: Runs = {}
    for row in newest.values():
        runs.setdefault(row["instance"], {}).setdefault(row["method"], []).append(row)
    return runs


def value(row: Row, path: str) -> float:
    """A number of a row by its dotted path; NaN where the row has none, as without unseen tokens.

    Examples
    --------
    >>> value({"fitted": {"touched": {"server": 3.5}}, "unseen": None}, "fitted.touched.server")
    3.5
    """
    found: Any = row
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return math.nan if found is None else float(found)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t); NaN for a single value.

    Examples
    --------
    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 2)
    (2.0, 2.48)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def duel(runs: Runs, other: str, part: str) -> tuple[int, int, int]:
    """Wins, ties and losses of `auto` against another method: least weighted cost of a part, seed by seed.

    Where there is a cap, a method that keeps none is no opponent.
    """
    score = Counter[str]()
    for methods in runs.values():
        champions = {row["seed"]: value(row, f"{part}.cost") for row in methods.get(CHAMPION, [])}
        for row in methods.get(other, []):
            ours, theirs = champions.get(row["seed"], math.nan), value(row, f"{part}.cost")
            if math.isnan(ours) or math.isnan(theirs) or (row["max_load"] and not row["keeps_caps"]):
                continue
            score[_outcome(ours, theirs)] += 1
    return score["win"], score["tie"], score["loss"]


def summary(runs: Runs) -> str:
    """A table for every instance: traffic, load and time of the methods; then `auto` against each of them."""
    blocks = [_instance(name, methods) for name, methods in runs.items()]
    names = dict.fromkeys(m for methods in runs.values() for m in methods)
    others = [name for name in names if name != CHAMPION and RACE not in name]
    if any(CHAMPION in methods for methods in runs.values()) and others:
        lines = [
            [other, _score(duel(runs, other, "fitted")), _score(duel(runs, other, "unseen"))]
            for other in others
        ]
        blocks.append(
            f"{CHAMPION} against the others, all instances\n" + aligned(["method", "fitted", "unseen"], lines)
        )
    legend = (
        "Means over seeds, +- half of the 95 % interval; cells: fitted / unseen tokens.\n"
        "Load: busiest unit over mean, mean over layers (worst layer).\n"
        "Cost: all levels weighted by their links' seconds, fitted, against linear.\n"
        f"w / t / l: wins, ties and losses of {CHAMPION} in cost, seed by seed, tie within {TIE:.2%}.\n"
        "* keeps no cap, so it is no opponent where there is one."
    )
    return "\n\n".join([legend, *blocks])


def targets_table(runs: Runs, targets: Sequence[Target]) -> str:
    """What `auto` reached of every target, load beside it."""
    header = ["instance", "measure", "linear", "target", "reached", "load fitted / unseen", "seconds", "met"]
    lines: list[list[str | None]] = []
    for target in targets:
        methods = runs.get(target.instance, {})
        linear = _mean(methods.get(BASELINE, []), target.measure)
        rows = methods.get(CHAMPION, [])
        reached = _mean(rows, target.measure)
        peers = [_mean(methods.get(peer, []), target.measure) for peer in target.below]
        limit = min(peers, default=(target.of_linear or 0.0) * linear)
        limit = limit if target.at_most is None else target.at_most
        load = _both(rows, "load.server.max_over_mean") if rows else None
        seconds = _number(_mean(rows, "seconds"))
        met = "not run" if math.isnan(reached) or math.isnan(limit) else "yes" if reached <= limit else "no"
        cells = [_number(linear), _number(limit), _number(reached), load, seconds, met]
        lines.append([target.instance, target.measure, *cells])
    return aligned(header, lines, left=(0, 1))


def races(runs: Runs) -> str:
    """Every ``NAME@OTHER`` beside OTHER: both times, traffic and weighted cost, and who costs less, seed by seed."""
    header = [
        "instance",
        "method",
        "seconds",
        "against",
        "seconds",
        "touched.server",
        "against",
        "cost",
        "w / t / l",
    ]
    lines: list[list[str | None]] = []
    total = Counter[str]()
    for name, methods in runs.items():
        for method, rows in methods.items():
            other = method.partition(RACE)[2].partition("/")[0]
            theirs = {row["seed"]: row for row in methods.get(other, [])}
            met = [(row, theirs[row["seed"]]) for row in rows if row["seed"] in theirs]
            if not met:
                continue
            score = Counter(_outcome(value(a, "fitted.cost"), value(b, "fitted.cost")) for a, b in met)
            total += score
            ours, others = ([pair[side] for pair in met] for side in (0, 1))
            change = 100.0 * (_mean(ours, "fitted.cost") / _mean(others, "fitted.cost") - 1.0)
            lines.append(
                [
                    name,
                    method,
                    f"{_mean(ours, 'seconds'):.2f}",
                    other,
                    f"{_mean(others, 'seconds'):.2f}",
                    _both(ours, "touched.server"),
                    _both(others, "touched.server"),
                    f"{change:+.2f} %",
                    " / ".join(str(score[what]) for what in ("win", "tie", "loss")),
                ]
            )
    if not lines:
        return "no runs"
    summed = " / ".join(str(total[what]) for what in ("win", "tie", "loss"))
    lines.append(["all", *[None] * (len(header) - 2), summed])
    return aligned(header, lines, left=(0, 1, 3))


def _outcome(ours: float, theirs: float) -> str:
    tied = abs(theirs - ours) <= TIE * max(ours, theirs)
    return "tie" if tied else "win" if theirs > ours else "loss"


def provenance(runs: Runs) -> str:
    """Commits, commands and machines behind the rows, as lines of markdown."""
    rows = [row for methods in runs.values() for group in methods.values() for row in group]
    said = [f"{len(rows)} runs, {min(r['date'] for r in rows)} to {max(r['date'] for r in rows)}."]
    for what, facts in {
        "Code": (f"commit {r['commit'] or 'unknown'} (library {r['code']})" for r in rows),
        "Command": (f"`{r['command']}`" for r in rows),
        "Machine": (f"{r['cpu']}, {r['cores']} cores, {r['jobs']} jobs" for r in rows),
        "Versions": (", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in rows),
    }.items():
        said += [f"- {what}: {fact}, {count} runs" for fact, count in Counter(facts).items()]
    if len({row["code"] for row in rows}) > 1:
        said.append("- **More than one version of the library made these rows.**")
    return "\n".join(said)


def _instance(name: str, methods: dict[str, list[Row]]) -> str:
    header = [
        "method",
        "seeds",
        "touched.server",
        "load.gpu",
        "load.server",
        "load.rack",
        "cost",
        "seconds",
        "w / t / l",
    ]
    base = _mean(methods.get(BASELINE, []), "fitted.cost")
    lines = []
    for method, rows in methods.items():
        cost = 100.0 * (_mean(rows, "fitted.cost") / base - 1.0) if base else math.nan
        lines.append(
            [
                method + ("*" if rows[0]["max_load"] and not rows[0]["keeps_caps"] else ""),
                str(len(rows)),
                _both(rows, "touched.server"),
                *(_load(rows, level) for level in ("gpu", "server", "rack")),
                None if math.isnan(cost) else f"{cost:+.2f} %",
                f"{_mean(rows, 'seconds'):.2f}",
                None
                if method.partition(RACE)[0] == CHAMPION
                else _score(duel({name: methods}, method, "fitted")),
            ]
        )
    return f"{name}\n{aligned(header, lines)}"


def _load(rows: Sequence[Row], level: str) -> str:
    def cell(path: str) -> str:
        return f"{_mean(rows, f'{path}.max_over_mean'):.3f} ({_mean(rows, f'{path}.worst_layer'):.2f})"

    return " / ".join(cell(f"{part}.load.{level}") for part in PARTS if rows[0][part] is not None)


def _both(rows: Sequence[Row], path: str) -> str:
    return " / ".join(_with_interval(rows, f"{part}.{path}") for part in PARTS if rows[0][part] is not None)


def _with_interval(rows: Sequence[Row], path: str) -> str:
    mean, half = interval([value(row, path) for row in rows])
    return f"{mean:.4f}" if math.isnan(half) else f"{mean:.4f} +- {half:.4f}"


def _mean(rows: Sequence[Row], path: str) -> float:
    return float(np.mean([value(row, path) for row in rows])) if rows else math.nan


def _number(number: float) -> str | None:
    if math.isnan(number):
        return None
    return f"{number:.4f}" if number == 0.0 or 1e-3 <= abs(number) < 1e5 else f"{number:.4e}"


def _score(score: tuple[int, int, int]) -> str | None:
    return " / ".join(map(str, score)) if any(score) else None
