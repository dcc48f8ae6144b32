"""Numbers: values of a page's JSON document as text that says where in the document they stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from placer.report import format_bytes, format_seconds

if TYPE_CHECKING:
    from markupsafe import Markup

MINUS, UNKNOWN = "\u2212", "\u2013"
SAME = 0.0005  # changes below are shown as none


class Numbers:
    """Values of one JSON document by their dotted paths.

    Parameters
    ----------
    document : mapping
        What the page embeds.

    Examples
    --------
    >>> numbers = Numbers({"report": {"load": {"gpu": 1.25}}, "baseline": {"load": {"gpu": 1.0}}})
    >>> print(numbers.value("report.load.gpu", "above"))
    <span class="value" data-path="report.load.gpu" data-kind="above">25 %</span>
    >>> numbers.change("report.load.gpu", "baseline.load.gpu").striptags()
    '+25.0 %'
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def get(self, path: str) -> Any:
        """What stands at a path: keys, and positions in lists, with dots between them; None where nothing does."""
        found: Any = self._document
        for key in path.split("."):
            if isinstance(found, list):
                found = found[int(key)] if key.isdigit() and int(key) < len(found) else None
            else:
                found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def value(self, path: str, kind: str) -> Markup:
        """A value as HTML; `kind` is a key of `FORMATS`."""
        found = self.get(path)
        return _span(UNKNOWN if found is None else FORMATS[kind](found), path=path, kind=kind)

    def change(self, new: str, old: str, kind: str = "change") -> Markup:
        """A relative change between two paths as HTML; of kind ``less`` only its size, for sentences."""
        change = relative(self.get(new), self.get(old))
        write = signed if kind == "change" else lambda value: percent(abs(value))
        return _span(UNKNOWN if change is None else write(change), path=new, old=old, kind=kind)


def _span(text: str, *, path: str, kind: str, old: str | None = None) -> Markup:
    from markupsafe import Markup

    compared = Markup("") if old is None else Markup(' data-from="{}"').format(old)
    span = Markup('<span class="value" data-path="{}"{} data-kind="{}">{}</span>')
    return span.format(path, compared, kind, text)


def relative(new: float | None, old: float | None) -> float | None:
    """new / old - 1; None where either is unknown, or there was nothing and now is something."""
    if new is None or old is None or (not old and new):
        return None
    return new / old - 1.0 if old else 0.0


def percent(fraction: float) -> str:
    """A fraction in per cent with two digits, as sentences want it.

    Examples
    --------
    >>> percent(0.2249), percent(0.0061), percent(0.9999), percent(0.0)
    ('22 %', '0.61 %', '99.99 %', '0 %')
    """
    value = 100.0 * fraction
    if not value:
        return "0 %"
    if 99.5 <= abs(value) < 100.0:
        return f"{math.floor(100 * value) / 100:g} %"
    digits = max(0, 1 - math.floor(math.log10(abs(value)) + 1e-12))
    return f"{value:.{min(digits, 3)}f} %".replace("-", MINUS)


def at_most(fraction: float) -> str:
    """The same, never rounded down: what is claimed as a limit must be one.

    Examples
    --------
    >>> at_most(0.00641), at_most(0.13)
    ('0.65 %', '13 %')
    """
    value = 100.0 * fraction
    if value <= 0.0:
        return "0 %"
    digits = min(3, max(0, 1 - math.floor(math.log10(value))))
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:.{digits}f} %"


def signed(change: float) -> str:
    """A relative change with its sign and one digit.

    Examples
    --------
    >>> signed(0.0312), signed(0.0), signed(-0.155) == MINUS + "15.5 %"
    ('+3.1 %', 'no change', True)
    """
    if abs(change) < SAME:
        return "no change"
    return f"{100.0 * change:+.1f} %".replace("-", MINUS)


#: How a value is written, by kind.
FORMATS = {
    "count": lambda value: f"{value:,.0f}",
    "number": lambda value: f"{value:.3f}",
    "bytes": format_bytes,
    "seconds": format_seconds,
    "percent": percent,
    "above": lambda value: percent(value - 1.0),
    "gap": at_most,
    "signed": signed,
}
