"""Permutations: a placement as another order of a model's experts.

A stack that gives each rank a run of consecutive experts (Megatron, DeepSpeed, vLLM without a map) has any placement
without copies as soon as the experts themselves stand in its order; `placer.permuted` writes such checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.placement import Placement, whole_numbers


@dataclass(frozen=True, eq=False)
class Permutation:
    """The experts of some layers in another order.

    Parameters
    ----------
    old_expert : (num_layers, num_experts) int32
        The former number of the expert that has each number now.
    layer_ids : tuple of int
        The model's own numbers of the layers.

    Raises
    ------
    InvalidInput
        When a row is no permutation, or layers and rows differ in number.

    Examples
    --------
    >>> permutation = Permutation(np.array([[2, 0, 1]]), (3,))
    >>> permutation.inverse().old_expert.tolist()
    [[1, 2, 0]]
    >>> permutation.after(permutation.inverse()).is_identity
    True
    """

    old_expert: npt.NDArray[np.int32]
    layer_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        old = whole_numbers(self.old_expert, "old_expert")
        layers = whole_numbers(self.layer_ids, "layer_ids")
        if old.ndim != 2 or not old.size or layers.shape != old.shape[:1]:
            raise InvalidInput(
                f"old_expert: found shape {old.shape} for {layers.size} layers, expected a row for each"
            )
        if layers.min() < 0 or len(np.unique(layers)) < len(layers):
            raise InvalidInput("layer_ids: expected distinct ids, none negative")
        wrong = (np.sort(old, axis=1) != np.arange(old.shape[1])).any(axis=1)
        if wrong.any():
            raise InvalidInput(
                f"layer {layers[wrong.argmax()]}: expected every expert 0..{old.shape[1] - 1} once"
            )
        frozen = old.astype(np.int32)
        frozen.setflags(write=False)
        object.__setattr__(self, "old_expert", frozen)
        object.__setattr__(self, "layer_ids", tuple(layers.tolist()))

    @classmethod
    def from_placement(cls, placement: Placement) -> Permutation:
        """The order in which ranks that hold consecutive experts hold those of a placement.

        Raises
        ------
        InvalidInput
            When the placement has copies or empty slots, naming the layer.
        """
        slots = placement.physical_to_logical
        for layer, row, count in zip(placement.layer_ids, slots, placement.replica_count, strict=True):
            if (count > 1).any():
                raise InvalidInput(
                    f"layer {layer}: expert {(count > 1).argmax()} is in {count.max()} slots, "
                    "expected one slot an expert: a checkpoint holds no copies"
                )
            if (row < 0).any():
                rank = (row < 0).argmax() // placement.slots_per_rank
                raise InvalidInput(
                    f"layer {layer}: rank {rank} has an empty slot, expected {placement.num_experts} full ones: "
                    "ranks that hold consecutive experts hold equally many"
                )
        return cls(slots, placement.layer_ids)

    @property
    def num_experts(self) -> int:
        """Experts of each layer."""
        return int(self.old_expert.shape[1])

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return bool((self.old_expert == np.arange(self.num_experts)).all())

    def rows(self) -> dict[int, npt.NDArray[np.int32]]:
        """The old experts of each layer by its number."""
        return dict(zip(self.layer_ids, self.old_expert, strict=True))

    def inverse(self) -> Permutation:
        """What undoes it."""
        return Permutation(np.argsort(self.old_expert, axis=1).astype(np.int32), self.layer_ids)

    def after(self, first: Permutation) -> Permutation:
        """Both in one: `first`, then this.

        Raises
        ------
        InvalidInput
            When they are of different numbers of experts.
        """
        if first.num_experts != self.num_experts:
            raise InvalidInput(f"found {first.num_experts} experts, expected {self.num_experts}")
        here, there = self.rows(), first.rows()
        layers = sorted(here.keys() | there.keys())
        same = np.arange(self.num_experts)
        return Permutation(
            np.array([there.get(layer, same)[here.get(layer, same)] for layer in layers]), tuple(layers)
        )

    def check_groups(self, num_groups: int) -> None:
        """Refuse a permutation that takes gate groups apart: a router picks groups of consecutive experts first.

        Raises
        ------
        InvalidInput
            Naming the layer and the group.

        Examples
        --------
        >>> Permutation(np.array([[3, 2, 0, 1]]), (5,)).check_groups(2)
        >>> Permutation(np.array([[3, 1, 0, 2]]), (5,)).check_groups(2)
        Traceback (most recent call last):
        placer.errors.InvalidInput: layer 5: group 0 would be of experts from groups 0, 1, expected one whole group: ...
        """
        if self.num_experts % num_groups:
            raise InvalidInput(
                f"found {num_groups} gate groups, expected a divisor of {self.num_experts} experts"
            )
        width = self.num_experts // num_groups
        groups = (self.old_expert // width).reshape(len(self.layer_ids), num_groups, width)
        torn = (groups != groups[..., :1]).any(axis=2)
        if torn.any():
            layer, group = np.argwhere(torn)[0]
            mixed = ", ".join(map(str, np.unique(groups[layer, group])))
            raise InvalidInput(
                f"layer {self.layer_ids[layer]}: group {group} would be of experts from groups {mixed}, "
                f"expected one whole group: the model's router picks among {num_groups} groups"
            )
