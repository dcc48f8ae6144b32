"""Load balance only: minimises the busiest unit of all levels together, blind to who is chosen with whom.

Idea: longest processing time first, top-down. The next heaviest expert goes to the lightest rack with room,
in it to the lightest server, in that to the lightest GPU. Swaps then even out what is left. Load caps are
measured against this arrangement, so it keeps every cap.
Complexity O(slots^2) a swap, at most 40 * slots swaps, compiled. Wins on stragglers when links are fast;
loses on traffic, where it is as bad as random.

References: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969, doi:10.1137/0117039.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer
from placer.solvers import Placed

needs = frozenset({"load"})
handles = frozenset({"caps", "levels", "pins"})


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """The reference arrangement of the layer (`placer.search.balance`)."""
    return Placed(slots=layer.slots(layer.reference))
