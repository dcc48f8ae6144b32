"""Quantities with units, as files and options write them, in SI units."""

from __future__ import annotations

import re
from decimal import Decimal
from math import inf, isfinite
from reprlib import repr as shorten

from placer.errors import InvalidInput

_DECIMAL = {"": "1", "k": "1e3", "K": "1e3", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15"}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_BYTES = {f"{prefix}B": Decimal(size) for prefix, size in (_DECIMAL | _BINARY).items()}
_UNITS: dict[str, tuple[str, dict[str, Decimal]]] = {
    "bytes": ("a size such as 80 GB or 16 GiB", _BYTES),
    "bandwidth": (
        "a bandwidth such as 50 GB/s or 400 Gb/s",
        {f"{unit}/s": size for unit, size in _BYTES.items()}
        | {f"{prefix}b/s": Decimal(size) / 8 for prefix, size in _DECIMAL.items()},
    ),
    "seconds": (
        "a time such as 3.33 us",
        {
            f"{p}s": Decimal(x)
            for p, x in {"": "1", "m": "1e-3", "u": "1e-6", "µ": "1e-6", "n": "1e-9"}.items()
        },
    ),
    "flops": ("a rate such as 989.4 TFLOP/s", {f"{p}FLOP/s": Decimal(x) for p, x in _DECIMAL.items()}),
    "number": ("a number >= 0", {}),
}
_QUANTITY = re.compile(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*(\S*)\s*")


def parse_quantity(text: str | float, unit_kind: str, where: str = "") -> float:
    """Read a quantity with its unit; a bare number is in SI units already.

    Parameters
    ----------
    text : str or float
        For example ``"450 GB/s"``, ``"80GB"``, ``"3.33 us"`` or ``50e9``. ``GB/s`` is bytes, ``Gb/s`` bits.
    unit_kind : {"bytes", "bandwidth", "seconds", "flops", "number"}
        Which units are understood: bytes, bytes per second, seconds, FLOP/s, or none at all.
    where : str
        Option or key that the text came from; starts the error message.

    Returns
    -------
    float
        The quantity in SI units, finite and not negative.

    Raises
    ------
    InvalidInput
        When there is no number, the unit is unknown, or the value is negative, infinite or not a number.

    Examples
    --------
    >>> parse_quantity("400 Gb/s", "bandwidth"), parse_quantity("80GB", "bytes")
    (50000000000.0, 80000000000.0)
    """
    expected, units = _UNITS[unit_kind]
    value = inf
    if isinstance(text, str):
        match = _QUANTITY.fullmatch(text)
        factor = ({"": Decimal(1)} | units).get(match[2]) if match else None
        if match and factor is not None:
            value = float(Decimal(match[1]) * factor)  # in decimal, so that "3.33 us" is exactly 3.33e-6
    elif isinstance(text, (int, float)) and not isinstance(text, bool) and 0 <= text < 1e300:
        value = float(text)
    if not isfinite(value):
        raise InvalidInput(f"{where} {shorten(text)}: expected {expected}".lstrip())
    return value
