"""Incidence: how often tokens touch each GPU, server and rack under a placement and a dispatch rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput

Floats = npt.NDArray[np.float64]

LARGEST_COVER = 64  # experts of a token, as bits of a mask


@dataclass(frozen=True, kw_only=True, eq=False)
class Incidence:
    """Counts of one layer, in tokens; homes are uniform over all ranks and averaged exactly.

    Arrays are (num_levels, num_ranks), units beyond a level's last are zero. Levels run inside out.

    Parameters
    ----------
    touched : tokens that reach a unit for at least one of their experts
    remote : those of them whose home lies outside the unit
    load : expert choices served in the unit
    """

    touched: Floats
    remote: Floats
    load: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """The ranks that may serve each expert, by home; each with equal chance.

    Under the rule "cover", an expert without a copy in the home's server is served where
    `placer.search.covering.plan_cover` says, out of these.

    Parameters
    ----------
    candidates : (homes, num_experts, most_copies) int32
        Ranks; one row for all homes when no expert has copies.
    number : (homes, num_experts) int32
        How many of `candidates` count.
    cover : bool
        Whether the rule is "cover".
    """

    candidates: npt.NDArray[np.int32]
    number: npt.NDArray[np.int32]
    cover: bool = False

    @property
    def rank_of(self) -> npt.NDArray[np.int32] | None:
        """(num_experts,) the one rank of each expert; None with copies."""
        return self.candidates[0, :, 0] if self.candidates.shape[::2] == (1, 1) else None


def targets(
    slots: npt.NDArray[np.int32],
    *,
    num_experts: int,
    num_ranks: int,
    unit_ranks: tuple[int, ...],
    server_ranks: int,
    rule: str = "nearest",
    table: npt.NDArray[np.int32] | None = None,
) -> Targets:
    """Where the dispatch rule sends the choices of one layer.

    Parameters
    ----------
    slots : (num_slots,) int32
        Expert of each slot, -1 = empty.
    num_experts, num_ranks : int
    unit_ranks : tuple of int
        Ranks in one unit of each level, inside out.
    server_ranks : int
        Ranks of one server.
    rule : {"nearest", "spread", "table", "cover"}
        Which copy a token takes; without copies it does not matter.
    table : (num_servers, num_experts) int32, optional
        Slot for each source server and expert, for the rule "table".

    Raises
    ------
    InvalidInput
        When the rule is unknown or needs a table that is not there.
    """
    per_rank = len(slots) // num_ranks
    held = np.flatnonzero(slots >= 0)
    copies = np.bincount(slots[held], minlength=num_experts)
    if copies.max() == 1:
        rank_of = np.empty(num_experts, np.int32)
        rank_of[slots[held]] = held // per_rank
        return Targets(candidates=rank_of[None, :, None], number=np.ones((1, num_experts), np.int32))
    order = held[np.argsort(slots[held], kind="stable")]
    slots_of = np.full((num_experts, int(copies.max())), -1, np.int64)
    first = np.cumsum(copies) - copies
    slots_of[slots[order], np.arange(len(order)) - first[slots[order]]] = order
    if rule == "table":
        candidates, number = _fixed(slots_of, copies, num_ranks, per_rank, server_ranks, table)
    else:
        tiers = {"nearest": unit_ranks, "spread": (), "cover": (1, server_ranks)}
        if rule not in tiers:
            raise InvalidInput(
                f"replica choice: found {rule!r}, expected one of {', '.join((*tiers, 'table'))}"
            )
        candidates, number = _allowed(slots_of, num_ranks, per_rank, tiers[rule])
    return Targets(candidates=candidates, number=number, cover=rule == "cover")


def incidence(
    topk: npt.NDArray[np.signedinteger],
    aimed: Targets,
    *,
    num_ranks: int,
    unit_ranks: tuple[int, ...],
    server: int,
    weights: npt.NDArray[np.int64] | None = None,
) -> Incidence:
    """Count one layer, homes uniform.

    Parameters
    ----------
    topk : (num_tokens, top_k) signed integer
        Experts of each token, -1 = none.
    aimed : Targets
    num_ranks : int
    unit_ranks : tuple of int
        Ranks in one unit of each level, inside out.
    server : int
        Position of the level ``server``.
    weights : (num_tokens,) int64, optional
        How many tokens each row of `topk` stands for; one each by default.
    """
    from placer.search.counting import count_touched, expect_counts

    size = np.array(unit_ranks, np.int64)
    each = np.ones(len(topk), np.int64) if weights is None else weights
    picks = np.bincount(
        topk[topk >= 0], np.broadcast_to(each[:, None], topk.shape)[topk >= 0], aimed.number.shape[1]
    )
    if aimed.rank_of is None:
        touched, remote, load = (np.zeros((len(size), num_ranks)) for _ in range(3))
        if not aimed.cover:
            expect_counts(topk, each, aimed.candidates, aimed.number, *_kinds(aimed), size, touched, remote)
            load = shared_load(picks, aimed, num_ranks=num_ranks, unit_ranks=unit_ranks)
            return Incidence(touched=touched, remote=remote, load=load)
        pairs = np.zeros((3, num_ranks, unit_ranks[server]))
        ports = np.zeros((3, len(size), num_ranks))
        everywhere = np.zeros(0, np.int32)
        add_flows(
            topk, each, everywhere, aimed, size, server, touched, remote, load, pairs, ports, ports.copy()
        )
        return Incidence(touched=touched, remote=remote, load=load)
    units = (aimed.rank_of[None, :] // size[:, None]).astype(np.int32)
    counts = np.zeros((len(size), num_ranks), np.int64)
    count_touched(topk, each, units, counts)
    return Incidence(
        touched=counts.astype(np.float64),
        remote=counts * (1.0 - size[:, None] / num_ranks),
        load=loads(picks.astype(np.float64), units, num_ranks),
    )


def shared_load(
    picks: npt.NDArray[np.integer | np.floating],
    aimed: Targets,
    *,
    num_ranks: int,
    unit_ranks: tuple[int, ...],
) -> Floats:
    """Choices served in each unit, (num_levels, num_ranks), homes uniform, from those of each expert.

    Exact where the copies taken do not depend on a token's other experts: under all rules but "cover".
    """
    homes, _, most = aimed.candidates.shape
    counts = np.arange(most) < aimed.number[:, :, None]
    share = np.where(counts, picks[None, :, None] / (homes * aimed.number[:, :, None]), 0.0)
    by_rank = np.bincount(aimed.candidates[counts], share[counts], minlength=num_ranks).astype(np.float64)
    return loads(by_rank, np.arange(num_ranks)[None, :] // np.array(unit_ranks)[:, None], num_ranks)


def _kinds(aimed: Targets) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Homes by candidates: (homes, num_experts) equal where an expert has the same ones, and how many there are."""
    kind_of = np.zeros(aimed.number.shape, np.int32)
    for expert in np.flatnonzero((aimed.candidates != aimed.candidates[:1]).any(axis=(0, 2))):
        own = np.column_stack([aimed.number[:, expert], aimed.candidates[:, expert]])
        kind_of[:, expert] = np.unique(own, axis=0, return_inverse=True)[1].ravel()
    return kind_of, kind_of.max(axis=0) + np.int32(1)


def add_flows(
    topk: npt.NDArray[np.signedinteger],
    weights: npt.NDArray[np.int64],
    homes: npt.NDArray[np.int32],
    aimed: Targets,
    size: npt.NDArray[np.int64],
    server: int,
    *counters: Floats,
) -> None:
    """Count tokens into the `counters` of `placer.search.counting.expect_flows`.

    Raises
    ------
    InvalidInput
        When servers are to be chosen for more experts a token than fit into a bit mask.
    """
    from placer.search.counting import expect_flows

    if aimed.cover and topk.shape[1] > LARGEST_COVER:
        raise InvalidInput(
            f"replica choice 'cover': found {topk.shape[1]} experts a token, expected at most {LARGEST_COVER}"
        )
    expect_flows(topk, weights, homes, aimed.candidates, aimed.number, size, server, aimed.cover, *counters)


def loads(
    used: npt.NDArray[np.floating], units: npt.NDArray[np.integer], num_units: int
) -> npt.NDArray[np.float64]:
    """Choices served in each unit of each level, (num_levels, num_units), from those of each expert.

    Parameters
    ----------
    used : (num_experts,) floating
    units : (num_levels, num_experts) integer
        Unit that holds each expert.
    """
    return np.stack([np.bincount(row, used, minlength=num_units) for row in units]).astype(np.float64)


Candidates = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


def _fixed(
    slots_of: npt.NDArray[np.int64],
    copies: npt.NDArray[np.int64],
    num_ranks: int,
    per_rank: int,
    server_ranks: int,
    table: npt.NDArray[np.int32] | None,
) -> Candidates:
    """The one rank that the table names for each home and expert."""
    if table is None:
        raise InvalidInput(
            "replica choice 'table': the placement holds no dispatch table; solve with it first"
        )
    fixed = table[np.arange(num_ranks) // server_ranks]
    if ((fixed < 0) & (copies > 1)).any():
        expert = int(np.argwhere((fixed < 0) & (copies > 1))[0][1])
        raise InvalidInput(f"dispatch table: no slot for expert {expert}, which has copies")
    chosen = np.where(fixed < 0, slots_of[:, 0], fixed) // per_rank
    return chosen[:, :, None].astype(np.int32), np.ones(chosen.shape, np.int32)


def _allowed(
    slots_of: npt.NDArray[np.int64], num_ranks: int, per_rank: int, tiers: tuple[int, ...]
) -> Candidates:
    """Ranks that may serve each home and expert: those in the innermost of `tiers` that has any, else all."""
    rank_of = np.where(slots_of >= 0, slots_of // per_rank, -1)
    allowed = np.broadcast_to(rank_of >= 0, (num_ranks, *rank_of.shape))
    home = np.arange(num_ranks)[:, None, None]
    for size in tiers[::-1]:
        near = allowed & (rank_of[None] // size == home // size)
        allowed = np.where(near.any(axis=2, keepdims=True), near, allowed)
    order = np.argsort(~allowed, axis=2, kind="stable")
    candidates = np.take_along_axis(np.broadcast_to(rank_of, allowed.shape), order, axis=2)
    return candidates.astype(np.int32), allowed.sum(axis=2).astype(np.int32)
