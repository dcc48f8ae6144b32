"""A uniformly random permutation: minimises nothing, the null that every other method has to beat.

Idea: shuffle the experts and hand them out in equal parts. Spare slots stay empty, spread over the ranks.
Where the router is group-limited, this is far worse than leaving the experts in order.
Complexity O(slots). Wins never, except as a baseline or as one of many starts; it destroys gate groups and
balances load only by luck.

References: Durstenfeld, "Algorithm 235: Random permutation", 1964, doi:10.1145/364520.364540.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer
from placer.solvers import Placed

needs = frozenset[str]()
handles = frozenset[str]()


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """A permutation from `rng`, over the slots that `linear` without copies would fill."""
    occupant = layer.linear()
    held = occupant < layer.num_experts
    occupant[held] = rng.permutation(layer.num_experts).astype(np.int32)
    return Placed(slots=layer.slots(occupant))
