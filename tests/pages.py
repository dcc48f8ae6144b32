"""A page as a test sees it: its text, and whether a number in it is that of the JSON, by no code of the package."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}


def text_of(page: str) -> str:
    """What a reader sees of a page's source."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", body))


def at(document: Any, path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    for key in path.split("."):
        if document is None:
            break
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def approximates(text: str, attributes: Mapping[str, str], document: Any) -> bool:
    """Whether a text, to the digits it shows, is the number at its path, or the change between its two."""
    value = at(document, attributes["data-path"])
    kind = attributes["data-kind"]
    if value is None:
        return text == "\u2013"
    if kind in ("change", "less"):
        old = at(document, attributes["data-from"])
        if old is None or (not old and value):
            return text == "\u2013"
        value = value / old - 1 if old else 0.0
        value = abs(value) if kind == "less" else value
    if kind == "above":
        value = value - 1
    if text == "no change":
        return abs(value) < 0.0005
    match = re.fullmatch(r"([-+\u2212]?[\d,]+(?:\.(\d+))?)(?:e[-+]?\d+)?(?: (\S+))?", text)
    if match is None:
        return False
    number = float(match[1].replace(",", "").replace("\u2212", "-"))
    decimals, unit = len(match[2] or ""), match[3]
    if unit == "%":
        scaled = 100 * value
    elif unit is not None:
        scaled = value / UNITS[unit]
    else:
        scaled = value
    if kind in ("bytes", "seconds"):  # three digits, zeros at the end left out
        return math.isclose(number, scaled, rel_tol=0.0051)
    slack = (1.0 if kind == "gap" else 0.5) * 10**-decimals
    return abs(number - scaled) <= slack * 1.001 and not (kind == "gap" and number < scaled - 1e-5)
