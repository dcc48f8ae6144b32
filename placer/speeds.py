"""Speeds: GPUs that compute at different rates, and what a fair share of the load is then.

What counts is time: a unit's load over its speed. A placement is even when loads are as speeds are, so the busiest
unit's load over the mean becomes the largest ``load / (total * share of the speed)``, and a cap leaves every unit
that many times its fair share. Where all GPUs are alike this is load over mean as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def unit_speeds(
    speeds: Sequence[float] | Floats, ranks: int, shut: npt.NDArray[np.bool_] | None = None
) -> Floats:
    """Speed of every unit of so many ranks over the mean, (units,).

    Parameters
    ----------
    speeds : (num_ranks,) float
    ranks : int
    shut : (units,) bool, optional
        Units that take no load: they count neither in the mean nor for anything else, and get 1.

    Examples
    --------
    >>> unit_speeds([1.0, 1.0, 1.0, 5.0], 1).tolist(), unit_speeds([1.0, 1.0, 1.0, 5.0], 2).tolist()
    ([0.5, 0.5, 0.5, 2.5], [0.5, 1.5])
    """
    units = np.asarray(speeds, np.float64).reshape(-1, ranks).sum(axis=1)
    used = np.ones(len(units), bool) if shut is None else ~shut
    return np.where(used, units / units[used].mean(), 1.0)


def in_time(load: npt.NDArray[np.floating], speeds: Sequence[float], ranks: int) -> npt.NDArray[np.floating]:
    """Loads (.., units) of units of so many ranks, over the units' speeds; as they are where `speeds` is empty.

    Examples
    --------
    >>> in_time(np.array([3.0, 3.0]), (1.0, 2.0), 1).round(2).tolist(), in_time(np.array([3.0]), (), 1).tolist()
    ([4.5, 2.25], [3.0])
    """
    return load / unit_speeds(speeds, ranks) if len(speeds) else load
