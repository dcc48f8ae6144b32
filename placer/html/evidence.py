"""Evidence: files of other commands that a page can show beside a report, checked as they are read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from placer import certificate, comparison
from placer.errors import InvalidInput

#: What a line of a search log must say to be an event.
EVENT = ("seconds", "done", "layers", "objective", "linear")
CLOSE = 1e-6  # touched units of a certificate and of a report agree this well


def read_certificate(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``placer bound --json`` printed.

    Raises
    ------
    InvalidInput
        When it is something else.
    """
    document = _document(path, certificate.SCHEMA, "placer bound --json")
    for key in ("touched", "tokens"):
        _number(document, key, path)
    for key in ("bound", "gap"):
        if document.get(key) is not None:
            _number(document, key, path)
    if document.get("level") not in ("gpu", "server", "rack"):
        raise InvalidInput(
            f"{path}: level: found {short(document.get('level'))}, expected gpu, server or rack"
        )
    return document


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in what ``placer solve --log`` wrote; lines of other kinds are passed over.

    Raises
    ------
    InvalidInput
        When a line is not JSON, or none is an event.
    """
    events = []
    for at, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(
                f"{path}: line {at}: expected one JSON object a line: {short(str(error))}"
            ) from None
        if isinstance(row, dict) and all(_finite(row.get(key)) for key in EVENT):
            bound = row.get("bound")
            events.append({key: row[key] for key in EVENT} | {"bound": bound if _finite(bound) else None})
    if not events:
        raise InvalidInput(f"{path}: found no event of a search, expected what 'placer solve --log' writes")
    return events


def read_comparison(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``placer compare --json`` printed.

    Raises
    ------
    InvalidInput
        When it is something else.
    """
    document = _document(path, comparison.SCHEMA, "placer compare --json")
    level, rows = document.get("level"), document.get("rows")
    if level not in ("gpu", "server") or not isinstance(rows, list) or not rows:
        raise InvalidInput(f"{path}: found no level or no rows, expected those of 'placer compare --json'")
    for at, row in enumerate(rows):
        try:
            held = row["held_out"]
            numbers = held["remote"][level], held["load"][level]["max_over_mean"]
            sound = isinstance(row["method"], str) and all(map(_finite, numbers))
        except (KeyError, TypeError, IndexError):
            sound = False
        if not sound:
            raise InvalidInput(
                f"{path}: rows[{at}]: found {short(row)}, expected a method and its held-out report"
            )
    return document


def belongs(
    found: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]], where: str = "certificate"
) -> str:
    """Which of some reports a certificate is for, by the units touched and the tokens.

    Parameters
    ----------
    found : mapping
        A document ``placer/bound/1``.
    reports : mapping
        Documents ``placer/report/1`` by name.

    Raises
    ------
    InvalidInput
        When it is for another placement or other tokens.

    Examples
    --------
    >>> belongs({"level": "gpu", "touched": 2.0, "tokens": 9}, {"report": {"touched": {"gpu": 2.0}, "tokens": 9}})
    'report'
    """
    for name, report in reports.items():
        touched = report["touched"][found["level"]]
        if math.isclose(touched, found["touched"], rel_tol=CLOSE) and report["tokens"] == found["tokens"]:
            return name
    expected = " or ".join(
        f"{report['touched'][found['level']]:.4f} on {report['tokens']:,}" for report in reports.values()
    )
    raise InvalidInput(
        f"{where}: found touched.{found['level']} {found['touched']:.4f} on {found['tokens']:,} tokens, expected "
        f"{expected}: it is the bound of another placement or of other tokens"
    )


def _document(path: str | os.PathLike[str], schema: str, command: str) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: expected what '{command}' prints: {short(str(error))}") from None
    if not isinstance(document, dict) or document.get("schema") != schema:
        found = document.get("schema") if isinstance(document, dict) else document
        raise InvalidInput(
            f"{path}: schema: found {short(found)}, expected {schema!r}, what '{command}' prints"
        )
    return document


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path}: not a text file; expected JSON") from None


def _number(document: Mapping[str, Any], key: str, path: str | os.PathLike[str]) -> None:
    if not _finite(document.get(key)):
        raise InvalidInput(f"{path}: {key}: found {short(document.get(key))}, expected a number")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
