"""Gallery: the figures of a report page, from its JSON document and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from placer.flows import gpus
from placer.html import figures
from placer.html.figures import Figure
from placer.html.measures import Measures
from placer.html.tables import NAMES, levels
from placer.report import format_bytes, format_seconds
from placer.topology import Topology

LARGEST_ICICLE = 512  # GPUs shown one by one
READABLE = 16  # units side by side whose text can be read
BOTH = ("baseline", "report")


def gallery(
    document: Mapping[str, Any], measured: Mapping[str, Measures], topology: Topology, brightest: float
) -> Iterator[tuple[str, Figure]]:
    """Every figure with its name.

    Parameters
    ----------
    document : mapping
        What the page embeds, so far.
    measured : mapping
        Of ``baseline`` and ``report``.
    topology : Topology
    brightest : float
        The share of tokens at which co-activation is shown brightest.
    """
    before, after = (measured[which] for which in BOTH)
    width = gpus(topology)
    for which in BOTH:
        if "coactivation" in document:
            yield f"coactivation_{which}", figures.coactivation(None, brightest)
    means = [each.load.mean(axis=0) for each in (after, before)]
    group = width if 1 < width < topology.num_ranks else 0
    yield "load_gpu", figures.load_bars("GPU", *means, group=group)
    if group:
        yield (
            "load_server",
            figures.load_bars("server", *(mean.reshape(-1, width).mean(axis=1) for mean in means)),
        )
    shown = _shown(measured, topology)
    top = max(float(each.busy[level].max()) for each in measured.values() for level in shown)
    for which in BOTH:
        yield f"icicle_{which}", figures.icicle(_nodes(measured[which], topology, shown), top)
    if before.moved is not None and after.moved is not None and after.moved.any():
        brim = max(float(before.moved.max()), float(after.moved.max()))
        for which, moved in zip(BOTH, (before.moved, after.moved), strict=True):
            lines = group if after.moved_by == "GPU" else 0
            yield f"flow_{which}", figures.flow(after.moved_by, moved, brim, group=lines)
    if "front" in document:
        yield "front", _front(document)
    if "events" in document:
        yield "convergence", figures.convergence(document["events"])
    reports = [document[which]["per_layer"] for which in ("report", "baseline")]
    for name, label, path in per_layer(topology.shape):
        block, _, key = path.partition(".")
        yield name, figures.per_layer(label, reports[0]["layer_ids"], *(each[block][key] for each in reports))


def per_layer(shape: tuple[int, int, int]) -> list[tuple[str, str, str]]:
    """Name, label and path in ``per_layer`` of a report, of the small figures.

    Examples
    --------
    >>> [name for name, _, _ in per_layer((1, 8, 1))]
    ['layer_touched_server', 'layer_remote_server', 'layer_load_server', 'layer_seconds_dispatch']
    """
    known = levels(shape)
    found = []
    for block, words in (
        ("touched", "{}s touched by a token"),
        ("remote", "{}s touched other than the home's"),
        ("load", "busiest {} over mean"),
    ):
        for level in reversed(known):
            found.append((f"layer_{block}_{level}", words.format(NAMES[level]), f"{block}.{level}"))
    return [*found, ("layer_seconds_dispatch", "seconds of dispatch", "seconds.dispatch")]


def _shown(measured: Mapping[str, Measures], topology: Topology) -> list[int]:
    """Levels with links that carry something, from the outside in."""
    used = [
        level
        for level, number in enumerate(topology.num_units)
        if number > 1 and any(each.sent[level].any() for each in measured.values())
        if level > 0 or gpus(topology) > 1
        if level > 0 or number <= LARGEST_ICICLE
    ]
    return used[::-1] or [0]


def _nodes(measures: Measures, topology: Topology, shown: list[int]) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = [
        {
            "id": "machine",
            "parent": "",
            "name": topology.name,
            "gpus": topology.num_ranks,
            "seconds": 0.0,
            "text": "",
            "told": True,
        }
    ]
    around: int | None = None
    for level in shown:
        size = topology.unit_sizes[level]
        for unit in range(topology.num_units[level]):
            parent = "machine" if around is None else f"{around}-{unit * size // topology.unit_sizes[around]}"
            volume, busy = float(measures.sent[level][unit]), float(measures.busy[level][unit])
            nodes.append(
                {
                    "id": f"{level}-{unit}",
                    "parent": parent,
                    "name": f"{topology.levels[level].name} {unit}",
                    "gpus": size,
                    "seconds": busy,
                    "text": f"{format_bytes(volume)}, {format_seconds(busy)}",
                    "told": topology.num_units[level] <= READABLE,
                }
            )
        around = level
    return nodes


def _front(document: Mapping[str, Any]) -> Figure:
    runs = document["front"]
    level, report, linear = runs["level"], document["report"], document["baseline"]

    def point(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "method": name,
            "text": f"{name}, on the tokens of this page",
            "load": found["load"][level]["max_over_mean"],
            "traffic": found["remote"][level],
        }

    return figures.front(
        [*runs["rows"], point("contiguous", linear)],
        point(figures.PLACED, report),
        load=f"busiest {NAMES[level]} over mean",
        traffic=f"remote {NAMES[level]}s of a token",
    )


def runs(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What the front needs of a document ``placer/comparison/1``."""
    level = comparison["level"]
    rows = []
    for row in comparison["rows"]:
        cap, spare = row.get("max_load"), row.get("redundant")
        words = [row["method"]]
        words += [] if cap is None else [f"max load {cap}"]
        words += [f"redundant {spare}"] if spare else []
        words += [] if row.get("seed") is None else [f"seed {row['seed']}"]
        rows.append(
            {
                "method": row["method"],
                "text": ", ".join(words),
                "load": row["held_out"]["load"][level]["max_over_mean"],
                "traffic": row["held_out"]["remote"][level],
            }
        )
    return {"level": level, "title": str(comparison.get("title", "")), "rows": rows}
