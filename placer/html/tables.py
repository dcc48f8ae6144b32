"""Tables: the numbers of two reports, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from placer.html.numbers import SAME, Numbers, relative
from placer.topology import REPORTED

NAMES = {"gpu": "GPU", "server": "server", "rack": "rack"}
LINKS = {"gpu": "scale-up links", "server": "NICs", "rack": "rack uplinks"}
WIDE = 0.005  # of a load, a difference that counts


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One comparison: two numbers, their change, and what it means beside its colour."""

    before: Any
    after: Any
    change: Any
    tone: str
    symbol: str
    said: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table, or a heading with neither label nor cells."""

    label: str = ""
    head: str = ""
    cells: tuple[Cell, ...] = ()


def levels(shape: tuple[int, int, int]) -> list[str]:
    """The levels of which a machine has several units inside the next one.

    Examples
    --------
    >>> levels((1, 8, 8)), levels((2, 4, 1))
    (['gpu', 'server'], ['server', 'rack'])
    """
    racks, servers, gpus = shape
    several = {"gpu": gpus > 1, "server": servers > 1 or (racks > 1 and gpus == 1), "rack": racks > 1}
    return [level for level in REPORTED if several[level]] or ["gpu"]


def before_after(numbers: Numbers, shape: tuple[int, int, int], places: list[str]) -> list[Row]:
    """All rows whose numbers are known.

    Parameters
    ----------
    numbers : Numbers
    shape : (racks, servers, gpus)
    places : list of str
        Where in the document pairs of ``baseline`` and ``report`` stand: ``""``, ``"fitted."``.
    """
    rows: list[Row] = []
    for head, entries in _entries(shape):
        block = [
            Row(label=label, cells=tuple(_cell(numbers, place, path, kind) for place in places))
            for label, path, kind in entries
            if any(
                numbers.get(f"{place}{which}.{path}") for place in places for which in ("baseline", "report")
            )
        ]
        if block:
            rows += [Row(head=head), *block]
    return rows


def _entries(shape: tuple[int, int, int]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    names = levels(shape)
    yield (
        "Traffic, for one token",
        [(f"{NAMES[at]}s touched, a layer", f"touched.{at}", "number") for at in names]
        + [(f"{NAMES[at]}s touched other than the home's", f"remote.{at}", "number") for at in names]
        + [(f"bytes over {LINKS[at]}, all layers", f"bytes_per_token.{at}", "bytes") for at in names],
    )
    yield (
        "Load, busiest over mean",
        [
            (f"busiest {NAMES[at]}, {words}", f"load.{at}.{key}", "number")
            for at in names
            for key, words in (("max_over_mean", "mean of the layers"), ("worst_layer", "worst layer"))
        ],
    )
    for block, head in (
        ("load_per_step", "Load of single steps, busiest over mean"),
        ("load_activated", "Load in steps that use an expert, busiest over mean"),
    ):
        yield (
            head,
            [
                (f"busiest {NAMES[at]}, {words}", f"{block}.{at}.{key}", "number")
                for at in names
                for key, words in (
                    ("mean", "mean"),
                    ("p99", "99th percentile"),
                    ("max", "worst"),
                    ("max_over_mean", "mean of the layers"),
                    ("worst_layer", "worst layer"),
                )
            ],
        )
    yield (
        "One step, modelled",
        [
            ("dispatch", "seconds.dispatch", "seconds"),
            ("combine", "seconds.combine", "seconds"),
            ("experts", "seconds.compute", "seconds"),
            ("all in turn", "seconds.step", "seconds"),
            ("with two batches in turn", "overlap.two_batch.total", "seconds"),
            ("with DualPipe", "overlap.dualpipe.total", "seconds"),
        ],
    )
    yield (
        "Room",
        [
            ("choices dropped by the capacity factor", "dropped", "percent"),
            ("experts on the fullest GPU", "memory.worst_gpu_bytes", "bytes"),
        ],
    )


def _cell(numbers: Numbers, place: str, path: str, kind: str) -> Cell:
    old, new = f"{place}baseline.{path}", f"{place}report.{path}"
    before, after = numbers.get(old), numbers.get(new)
    change = relative(after, before)
    least = WIDE if path.startswith("load") else SAME
    worse = after is not None and before is not None and (after > before)
    if change is not None and abs(change) < least:
        tone = symbol = said = ""
    else:
        tone, symbol, said = ("bad", "\u2716", "worse") if worse else ("good", "\u2714", "better")
    return Cell(
        before=numbers.value(old, kind),
        after=numbers.value(new, kind),
        change=numbers.change(new, old),
        tone=tone,
        symbol=symbol,
        said=said,
    )
