"""Comparison page: methods side by side on tokens they were not fitted on."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

import placer
from placer.comparison import Comparison
from placer.html import figures
from placer.html.duels import Duel, Entry, all_duels, baseline, duel, entries
from placer.html.gallery import runs
from placer.html.numbers import SAME, Numbers
from placer.html.rendering import render, require
from placer.html.report_page import SCHEMA, Page
from placer.html.tables import NAMES

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_DUELS = 24  # entries whose duels with each other are shown


def comparison_page(comparison: Comparison, *, command: str | None = None) -> Page:
    """Make the page of a comparison: front, wins, ties and losses with intervals, time.

    Parameters
    ----------
    comparison : Comparison
    command : str, optional
        What made it.

    Raises
    ------
    InvalidInput
        When jinja2 or plotly is missing.

    Examples
    --------
    >>> from placer import Topology, Trace
    >>> from placer.comparison import compare
    >>> ids = np.array([[[0, 2]], [[1, 3]]] * 20)
    >>> trace = Trace(topk_idx=ids, num_experts=4, sequence=np.arange(40))
    >>> found = compare(trace, Topology.load("dgx-h100").with_shape("1x2x1"), ["refine"], max_loads=[None])
    >>> print(comparison_page(found).verdict)
    Least traffic: refine, no cap: 50 % fewer remote servers than linear on tokens held out, busiest server 30 % above
    mean on average (linear: 0 %).
    """
    require()
    level, every = comparison.level, entries(comparison)
    against = [duel(entry, baseline(every, entry)) for entry in every]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "comparison": comparison.to_dict(),
        "entries": [_means(entry) for entry in every],
        "against_linear": [asdict(each) for each in against],
    }
    if len(every) <= MOST_DUELS:
        document["duels"] = [
            [None if each is None else asdict(each) for each in row] for row in all_duels(every)
        ]
    names = [entry.name for entry in every]
    known = [at for at, each in enumerate(against) if each.change is not None]
    document["figures"] = {
        "front": figures.front(
            runs(document["comparison"])["rows"],
            load=f"busiest {NAMES[level]} over mean",
            traffic=f"remote {NAMES[level]}s of a token",
        ),
        "against": figures.intervals(
            [names[at] for at in known],
            [100.0 * _of(against[at], "change") for at in known],
            [100.0 * _of(against[at], "low") for at in known],
            [100.0 * _of(against[at], "high") for at in known],
            "% against linear",
        ),
        "seconds": figures.times(names, [row["seconds"] for row in document["entries"]]),
    }
    numbers = Numbers(document)
    sentence = _verdict(numbers, every, level)
    html = render(
        "comparison.html.j2",
        document,
        title=comparison.title,
        kind="Methods side by side",
        version=placer.__version__,
        sections=[
            ("front", "Load against traffic"),
            ("numbers", "Numbers"),
            ("duels", "Wins, ties and losses"),
            ("time", "Time"),
        ],
        sentence=sentence,
        step=_step(numbers, every),
        names=names,
        seeds=len({row.seed for row in comparison.rows}),
        level=NAMES[level],
        duels="duels" in document,
        notes=comparison.notes,
        command=command,
        value=numbers.value,
        change=numbers.change,
    )
    return Page(html=html, document=document, verdict=f"{sentence.striptags()}.")


def _of(found: Duel, key: str) -> float:
    """One of the numbers of a duel; its change where there is no interval."""
    value = getattr(found, key)
    return float((found.change or 0.0) if value is None else value)


def _means(entry: Entry) -> dict[str, Any]:
    """Means over the seeds, held out and fitted."""
    row, level = entry.rows[0], entry.level
    parts = {"held_out": [each.held_out for each in entry.rows], "train": [each.train for each in entry.rows]}
    return {
        "name": entry.name,
        "method": row.method,
        "max_load": row.max_load,
        "redundant": row.redundant,
        "seeds": [each.seed for each in entry.rows],
        "seconds": float(np.mean([each.seconds for each in entry.rows])),
        **{
            part: {
                "remote": float(np.mean([report.remote[level] for report in reports])),
                "load": float(np.mean([report.load[level]["max_over_mean"] for report in reports])),
                "load_gpu": float(np.mean([report.load["gpu"]["max_over_mean"] for report in reports])),
                "step": float(np.mean([report.seconds["step"] for report in reports])),
            }
            for part, reports in parts.items()
        },
    }


def _verdict(numbers: Numbers, every: list[Entry], level: str) -> Markup:
    from markupsafe import Markup

    best = min(range(len(every)), key=lambda at: (numbers.get(f"entries.{at}.held_out.remote"), at))
    usual = every.index(baseline(every, every[best]))
    new, old = (f"entries.{at}.held_out.remote" for at in (best, usual))
    unit = NAMES[level]
    if numbers.get(old) - numbers.get(new) <= SAME * numbers.get(old):
        return Markup("No method has fewer remote {}s than linear on tokens held out").format(unit)
    said = Markup(
        "Least traffic: {}: {} fewer remote {}s than linear on tokens held out, busiest {} {} above mean on average"
    ).format(
        every[best].name,
        numbers.change(new, old, "less"),
        unit,
        unit,
        numbers.value(f"entries.{best}.held_out.load", "above"),
    )
    if numbers.get(f"entries.{best}.held_out.load") > numbers.get(f"entries.{usual}.held_out.load") + 0.005:
        said += Markup(" (linear: {})").format(numbers.value(f"entries.{usual}.held_out.load", "above"))
    return said


def _step(numbers: Numbers, every: list[Entry]) -> Markup:
    """The shortest modelled step, which weighs traffic and load against each other."""
    from markupsafe import Markup

    best = min(range(len(every)), key=lambda at: (numbers.get(f"entries.{at}.held_out.step"), at))
    usual = every.index(baseline(every, every[best]))
    if best == usual:
        return Markup("No method has a shorter modelled step than linear on tokens held out.")
    new, old = (f"entries.{at}.held_out.step" for at in (best, usual))
    return Markup("Shortest modelled step: {}: {} instead of {} with linear, on tokens held out.").format(
        every[best].name, numbers.value(new, "seconds"), numbers.value(old, "seconds")
    )
