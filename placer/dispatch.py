"""Dispatch: the slot that serves each choice of a batch of tokens, for engines.

The functions take numpy arrays or torch tensors, on any device, and return the same kind with the same numbers. They
work on whole batches of one layer; nothing is drawn at random, ties are shared out by a hash of the token's index.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.placement import Placement

Array = Any  # numpy.ndarray or torch.Tensor

LARGEST_TOP_K = 62  # experts of a token, as bits of a signed mask


def complete_table(placement: Placement) -> npt.NDArray[np.int32]:
    """The placement's dispatch table with a slot for every expert, ready for `take_table`.

    Returns
    -------
    (num_layers, num_servers, num_experts) int32
        Slot that a token from each server takes.

    Raises
    ------
    InvalidInput
        When there is no table, or it leaves an expert that has copies open.

    Examples
    --------
    >>> placement = Placement(
    ...     physical_to_logical=np.array([[0, 1, 0, 2]]), num_experts=3, shape=(1, 2, 1),
    ...     rule="table", table=np.array([[[0, -1, -1], [2, -1, -1]]]))
    >>> complete_table(placement).tolist()
    [[[0, 1, 3], [2, 1, 3]]]
    """
    if placement.table is None:
        raise InvalidInput("dispatch table: the placement holds none, expected one for the rule 'table'")
    unknown = (placement.table < 0) & (placement.replica_count > 1)[:, None]
    if unknown.any():
        layer, server, expert = np.argwhere(unknown)[0]
        raise InvalidInput(
            f"dispatch table[{layer}][{server}]: no slot for expert {expert}, which has copies"
        )
    only = placement.logical_to_physical[:, None, :, 0]
    return np.where(placement.table < 0, only, placement.table).astype(np.int32)


def take_table(topk_idx: Array, homes: Array, table: Array, *, server_ranks: int) -> Array:
    """The slots that a dispatch table names: one look-up, fit for a captured graph.

    Parameters
    ----------
    topk_idx : (num_tokens, top_k) integer
        Experts of each token, -1 = none.
    homes : (num_tokens,) integer
        Rank of each token.
    table : (num_servers, num_experts) integer
        One layer of `complete_table`.
    server_ranks : int
        GPUs of one server.

    Returns
    -------
    (num_tokens, top_k) int64
        Slots, -1 where there is no expert.

    Raises
    ------
    InvalidInput
        When the shapes do not fit each other.

    Examples
    --------
    Two servers of two GPUs: expert 0 has a copy in both.

    >>> table = np.array([[0, 2, 5], [4, 2, 5]])
    >>> take_table(np.array([[0, 1], [0, -1]]), np.array([1, 2]), table, server_ranks=2).tolist()
    [[0, 2], [4, -1]]
    """
    _check(topk_idx, homes, num_experts=table.shape[1], num_ranks=len(table) * server_ranks)
    xp = _library(topk_idx)
    ids, at = _int64(topk_idx), _int64(homes) // server_ranks
    slots = _int64(table)[at[:, None], xp.where(ids < 0, 0, ids)]
    return xp.where(ids < 0, -1, slots)


def take_cover(
    topk_idx: Array,
    homes: Array,
    slots_of: Array,
    *,
    slots_per_rank: int,
    server_ranks: int,
    num_servers: int,
    first: int = 0,
) -> Array:
    """The slots under the dispatch rule ``cover``: copies at home, else in the fewest other servers.

    The number of servers is the exact minimum for every token, as in `placer.evaluate`: all sets of one more server
    are tried for all tokens at once until some set holds everything, so memory grows with the number of copies to the
    power of the servers that remain to be chosen.

    Parameters
    ----------
    topk_idx : (num_tokens, top_k) integer
        Experts of each token, -1 = none.
    homes : (num_tokens,) integer
        Rank of each token.
    slots_of : (num_experts, most_copies) integer
        Slots of each expert, -1 filled: a layer of `placer.placement.Placement.logical_to_physical`.
    slots_per_rank, server_ranks, num_servers : int
        Slots of one rank, GPUs of one server, servers over all racks.
    first : int
        Index of the batch's first token. The choice among equally good sets and copies is a hash of a token's
        index; counting on from batch to batch shares out ties evenly also with small batches.

    Returns
    -------
    (num_tokens, top_k) int64
        Slots, -1 where there is no expert.

    Raises
    ------
    InvalidInput
        When the shapes do not fit each other or a token has more than 62 experts.

    Examples
    --------
    Three servers of one GPU hold 0 and 1, 2, 1 and 2: expert 1 goes where the token is sent anyway.

    >>> slots_of = np.array([[0, -1], [1, 4], [2, 5]])
    >>> machine = dict(slots_per_rank=2, server_ranks=1, num_servers=3)
    >>> take_cover(np.array([[0, 1], [1, 2], [1, -1]]), np.array([1, 0, 2]), slots_of, **machine)[[0, 2]].tolist()
    [[0, 1], [4, -1]]
    """
    _check(topk_idx, homes, num_experts=len(slots_of), num_ranks=num_servers * server_ranks)
    if topk_idx.shape[1] > LARGEST_TOP_K:
        raise InvalidInput(
            f"topk_idx: found {topk_idx.shape[1]} experts a token, expected at most {LARGEST_TOP_K}"
        )
    xp = _library(topk_idx)
    ids, home, copies_of = _int64(topk_idx), _int64(homes)[:, None, None], _int64(slots_of)
    expert = xp.where(ids < 0, 0, ids)
    copies = copies_of[expert]
    usable = (copies >= 0) & (ids >= 0)[:, :, None]
    rank = copies // slots_per_rank
    server = rank // server_ranks
    on_gpu = usable & (rank == home)
    on_server = usable & (server == home // server_ranks)
    away = (ids >= 0) & ~on_server.any(2)
    tokens, every = _count(len(ids), ids), _count(num_servers, ids)
    holds = ((copies_of // (slots_per_rank * server_ranks))[:, :, None] == every).any(1)
    turn = _mixed(tokens + first)
    chosen = _covers(xp, expert, away, holds, turn)
    chosen_copy = chosen[tokens[:, None, None], xp.where(usable, server, 0)]
    near = xp.where(on_gpu.any(2)[:, :, None], on_gpu, on_server)
    allowed = xp.where(away[:, :, None], usable & chosen_copy, near)
    lot = _mixed(turn[:, None] + _count(ids.shape[1], ids) + 1) % allowed.sum(2).clip(1)
    taken = allowed & (allowed.cumsum(2) - 1 == lot[:, :, None])
    return xp.where(ids < 0, -1, (copies * taken).sum(2))


def _covers(xp: Any, expert: Array, away: Array, holds: Array, turn: Array) -> Array:
    """A smallest set of servers that holds the experts that are away, (num_tokens, num_servers) bool.

    Parameters: expert (n, k), away (n, k) bool, holds (num_experts, num_servers) bool, turn (n,): which of equals.
    """
    held = [holds[expert[:, j]] & away[:, j, None] for j in range(expert.shape[1])]
    sole = holds.sum(1) == 1
    masks = xp.zeros_like(holds[expert[:, 0]] * 1)  # of each server the experts it would serve, as bits
    chosen = masks != 0
    for j, servers in enumerate(held):
        masks = masks | servers * (1 << j)
        chosen = chosen | servers & sole[expert[:, j], None]
    rest = xp.zeros_like(turn)
    for j, servers in enumerate(held):
        rest = rest + (away[:, j] & ~(servers & chosen).any(1)) * (1 << j)
    every = _count(holds.shape[1], turn)
    # Each row is a set in the making: its token, experts left, servers chosen, servers that rows before it have tried.
    token = _count(len(turn), turn)[rest != 0]
    left, path = rest[token], chosen[token]
    shut = xp.zeros_like(path)
    while len(token):
        fits = ((masks[token] & (left & -left)[:, None]) != 0) & ~shut
        row = xp.broadcast_to(_count(len(token), token)[:, None], fits.shape)[fits]
        server = xp.broadcast_to(every, fits.shape)[fits]
        token, left = token[row], left[row] & ~masks[token[row], server]
        shut = shut[row] | fits[row] & (every < server[:, None])
        path = path[row] | (every == server[:, None])
        done = left == 0
        number = xp.bincount(token[done], minlength=len(turn))
        before = number.cumsum(0) - number
        found = token[done]
        mine = _count(len(found), found) - before[found] == turn[found] % number[found]
        chosen[found[mine]] = path[done][mine]
        open_ = number[token] == 0
        token, left, path, shut = token[open_], left[open_], path[open_], shut[open_]
    return chosen


def _mixed(number: Array) -> Array:
    """A hash of 32 bits: two rounds of multiply and shift; the products stay below 2**63."""
    x = number & 0xFFFFFFFF
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def _check(topk_idx: Array, homes: Array, *, num_experts: int, num_ranks: int) -> None:
    if not (hasattr(topk_idx, "ndim") and hasattr(homes, "shape")):
        found = f"{type(topk_idx).__name__} and {type(homes).__name__}"
        raise InvalidInput(f"topk_idx and homes: found {found}, expected numpy arrays or torch tensors")
    if topk_idx.ndim != 2 or tuple(homes.shape) != tuple(topk_idx.shape[:1]):
        raise InvalidInput(
            f"found topk_idx of shape {tuple(topk_idx.shape)} and homes of {tuple(homes.shape)}, "
            "expected (num_tokens, top_k) and (num_tokens,)"
        )
    if num_ranks < 1:
        raise InvalidInput(f"ranks: found {num_ranks} over all servers, expected at least 1")
    if not isinstance(topk_idx, np.ndarray):
        return  # a look at the values of a tensor would wait for the device
    for what, array, least, end in (
        ("topk_idx", topk_idx, -1, num_experts),
        ("homes", homes, 0, num_ranks),
    ):
        if array.size and not (array.dtype.kind in "iu" and least <= array.min() and array.max() < end):
            found = f"{array.dtype} from {array.min()} to {array.max()}"
            raise InvalidInput(f"{what}: found {found}, expected integers from {least} to {end - 1}")


def _library(array: Array) -> Any:
    """The module that the array is from: numpy, or torch, which is only imported here."""
    return np if isinstance(array, np.ndarray) else import_module("torch")


def _int64(array: Array) -> Array:
    return array.astype(np.int64) if isinstance(array, np.ndarray) else array.long()


def _count(number: int, like: Array) -> Array:
    """0, 1, ... below a number, on the device of an array."""
    xp = _library(like)
    return xp.arange(number) if xp is np else xp.arange(number, device=like.device)
