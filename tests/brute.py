"""A second evaluator, as plain as possible: Python loops over tokens, homes and picks, nothing from the package.

Slots, tokens and tables are nested lists or arrays that index like them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

LEVELS = ("gpu", "server", "rack")


def ranks_per_unit(shape: tuple[int, int, int]) -> dict[str, int]:
    """Ranks in one GPU, server and rack of ``(racks, servers, gpus)``."""
    _, servers, gpus = shape
    return {"gpu": 1, "server": gpus, "rack": gpus * servers}


def picks(
    expert: int, home: int, slots: Sequence[int], shape: tuple[int, int, int], rule: str, table: Any
) -> list[int]:
    """Ranks of the copies that a token at `home` takes with equal chances."""
    racks, servers, gpus = shape
    per_rank = len(slots) // (racks * servers * gpus)
    copies = [slot // per_rank for slot in range(len(slots)) if slots[slot] == expert]
    if rule == "table":
        slot = int(table[home // gpus][expert])
        return [slot // per_rank] if slot >= 0 else copies
    if rule == "nearest":
        for size in ranks_per_unit(shape).values():
            near = [rank for rank in copies if rank // size == home // size]
            if near:
                return near
    return copies


def outcomes(
    token: Sequence[int], home: int, slots: Sequence[int], shape: tuple[int, int, int], rule: str, table: Any
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every combination of picks of one token at one home, as (chance, rank that serves each choice)."""
    choices = [picks(int(e), home, slots, shape, rule, table) for e in token if e >= 0]
    combinations = list(product(*choices))
    for ranks in combinations:
        yield 1.0 / len(combinations), ranks


def measure(
    slots: Sequence[int],
    tokens: Sequence[Sequence[int]],
    shape: tuple[int, int, int],
    rule: str = "nearest",
    table: Any = None,
) -> dict[str, Any]:
    """One layer: touched and remote a token, load of every unit, vectors a token over each level's links."""
    racks, servers, gpus = shape
    num_ranks = racks * servers * gpus
    units = ranks_per_unit(shape)
    touched = dict.fromkeys(LEVELS, 0.0)
    remote = dict.fromkeys(LEVELS, 0.0)
    load = {level: [0.0] * (num_ranks // units[level]) for level in LEVELS}
    naive = dict.fromkeys(LEVELS, 0.0)
    for token in tokens:
        for home in range(num_ranks):
            for chance, ranks in outcomes(token, home, slots, shape, rule, table):
                weight = chance / num_ranks
                for level, size in units.items():
                    reached = {rank // size for rank in ranks}
                    touched[level] += weight * len(reached)
                    remote[level] += weight * len(reached - {home // size})
                    for rank in ranks:
                        load[level][rank // size] += weight
                for rank in ranks:
                    if rank // units["server"] != home // units["server"]:
                        naive["server"] += weight
                    elif rank != home:
                        naive["gpu"] += weight
                    if rank // units["rack"] != home // units["rack"]:
                        naive["rack"] += weight
    for totals in (touched, remote, naive):
        for level in LEVELS:
            totals[level] /= len(tokens)
    hierarchical = {"gpu": touched["gpu"], "server": remote["server"], "rack": remote["rack"]}
    return {
        "touched": touched,
        "remote": remote,
        "load": load,
        "vectors": {"hierarchical": hierarchical, "naive": naive},
    }


def max_over_mean(load: Sequence[float]) -> float:
    """Busiest unit over the mean; 1 when there is no load."""
    return max(load) * len(load) / sum(load) if sum(load) > 0 else 1.0


def report(
    slots: Any,
    topk: Any,
    shape: tuple[int, int, int],
    *,
    vector_bytes: float,
    alltoall: str = "hierarchical",
    rule: str = "nearest",
    table: Any = None,
) -> dict[str, Any]:
    """All layers: `slots` is [layer][slot], `topk` [token][layer][choice], `vector_bytes` there and back together."""
    layers = []
    for layer in range(len(slots)):
        tokens = [[int(e) for e in row[layer]] for row in topk]
        fixed = None if table is None else table[layer]
        layers.append(measure([int(e) for e in slots[layer]], tokens, shape, rule, fixed))
    count = len(layers)
    heat = {level: [max_over_mean(row["load"][level]) for row in layers] for level in LEVELS}
    return {
        "touched": {level: sum(row["touched"][level] for row in layers) / count for level in LEVELS},
        "remote": {level: sum(row["remote"][level] for row in layers) / count for level in LEVELS},
        "bytes_per_token": {
            level: vector_bytes * sum(row["vectors"][alltoall][level] for row in layers) for level in LEVELS
        },
        "load": {
            level: {"max_over_mean": sum(heat[level]) / count, "worst_layer": max(heat[level])}
            for level in LEVELS
        },
    }
