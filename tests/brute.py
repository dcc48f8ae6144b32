"""A second evaluator, as plain as possible: Python loops over tokens, homes and picks, nothing from the package.

Slots, tokens and tables are nested lists or arrays that index like them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import Any

LEVELS = ("gpu", "server", "rack")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Levels from the inside out; a level's fan-out is how many of its units the next one holds."""

    fanouts: Sequence[int]
    names: Sequence[str] = LEVELS
    rails: Sequence[bool] = (False,) * len(LEVELS)
    link: str = "switch"
    sides: Sequence[int] = ()  # of a torus
    rates: Sequence[float] = ()  # bytes/s of one GPU over each level's link
    latencies: Sequence[float] = ()

    @property
    def sizes(self) -> list[int]:
        """Ranks in one unit of each level."""
        return [prod(self.fanouts[:level]) for level in range(len(self.fanouts))]

    @property
    def ranks(self) -> int:
        return prod(self.fanouts)

    @property
    def width(self) -> int:
        """GPUs of a server."""
        return self.sizes[list(self.names).index("server")]


def machine_of(shape: tuple[int, int, int]) -> Machine:
    return Machine(fanouts=shape[::-1])


def ranks_per_unit(shape: tuple[int, int, int]) -> dict[str, int]:
    """Ranks in one GPU, server and rack of ``(racks, servers, gpus)``."""
    return dict(zip(LEVELS, machine_of(shape).sizes, strict=True))


def picks(expert: int, home: int, slots: Sequence[int], machine: Machine, rule: str, table: Any) -> list[int]:
    """Ranks of the copies that a token at `home` takes with equal chances."""
    per_rank = len(slots) // machine.ranks
    copies = [slot // per_rank for slot in range(len(slots)) if slots[slot] == expert]
    if rule == "table":
        slot = int(table[home // machine.width][expert])
        return [slot // per_rank] if slot >= 0 else copies
    if rule in ("nearest", "cover"):
        for size in machine.sizes if rule == "nearest" else (1, machine.width):
            near = [rank for rank in copies if rank // size == home // size]
            if near:
                return near
    return copies


def outcomes(
    token: Sequence[int], home: int, slots: Sequence[int], machine: Machine, rule: str, table: Any
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every combination of picks of one token at one home, as (chance, rank that serves each choice)."""
    choices = [picks(int(e), home, slots, machine, rule, table) for e in token if e >= 0]
    ways = covered(choices, home, machine) if rule == "cover" else [choices]
    for left in ways:
        served = list(product(*left))
        for ranks in served:
            yield 1.0 / len(ways) / len(served), ranks


def covered(choices: Sequence[Sequence[int]], home: int, machine: Machine) -> list[list[list[int]]]:
    """The choices left of every smallest set of servers that holds all of them besides the home's own."""
    away = [server for server in range(machine.ranks // machine.width) if server != home // machine.width]
    for size in range(len(away) + 1):
        found = []
        for servers in combinations(away, size):
            allowed = {home // machine.width, *servers}
            left = [[rank for rank in ranks if rank // machine.width in allowed] for ranks in choices]
            if all(left):
                found.append(left)
        if found:
            return found
    raise AssertionError("some expert is held nowhere")


def measure(
    slots: Sequence[int],
    tokens: Sequence[Sequence[int]],
    shape: tuple[int, int, int],
    rule: str = "nearest",
    table: Any = None,
) -> dict[str, Any]:
    """One layer: touched and remote a token, load of every unit, vectors a token over each level's links."""
    machine = machine_of(shape)
    num_ranks = machine.ranks
    units = ranks_per_unit(shape)
    touched = dict.fromkeys(LEVELS, 0.0)
    remote = dict.fromkeys(LEVELS, 0.0)
    load = {level: [0.0] * (num_ranks // units[level]) for level in LEVELS}
    naive = dict.fromkeys(LEVELS, 0.0)
    for token in tokens:
        for home in range(num_ranks):
            for chance, ranks in outcomes(token, home, slots, machine, rule, table):
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


# -- every token over every link ------------------------------------------------------------------------------
# A crossing is ("pair", from rank, to rank) inside a server, or ("out" or "in", level, rank) at a rank's port.

Crossing = tuple[str, int, int]


def send(machine: Machine, source: int, target: int) -> list[Crossing]:
    """One vector straight from rank to rank."""
    crossings: list[Crossing] = []
    if source != target and source // machine.width == target // machine.width:
        crossings.append(("pair", source, target))
    for level in range(1, len(machine.fanouts)):
        if source // machine.sizes[level] != target // machine.sizes[level]:
            crossings += [("out", level, source), ("in", level, target)]
    return crossings


def fan_out(machine: Machine, home: int, reached: set[int]) -> list[Crossing]:
    """One vector to each remote unit with a reached rank, at the home's rail, and from there to those ranks."""
    rail = home % machine.width
    crossings: list[Crossing] = []
    for level in range(1, len(machine.fanouts)):
        size = machine.sizes[level]
        for unit in {rank // size for rank in reached} - {home // size}:
            crossings += [("out", level, home), ("in", level, unit * size + rail % size)]
    for rank in reached:
        crossings.append(("pair", rank - rank % machine.width + rail, rank))
    return crossings


def dispatch(machine: Machine, scheme: str, home: int, serving: Sequence[int]) -> list[Crossing]:
    """What one token's dispatch crosses, given the rank that serves each of its choices."""
    if scheme == "allgather":
        return fan_out(machine, home, set(range(machine.ranks)))
    if scheme == "hierarchical":
        return fan_out(machine, home, set(serving))
    targets = list(serving) if scheme in ("naive", "low_latency", "follow") else sorted(set(serving))
    return [crossing for target in targets for crossing in send(machine, home, target)]


def reverse(crossings: list[Crossing]) -> list[Crossing]:
    back = {"out": "in", "in": "out"}
    return [("pair", b, a) if what == "pair" else (back[what], a, b) for what, a, b in crossings]


def neighbours(machine: Machine, source: int, target: int) -> Iterator[tuple[str, float]]:
    """Torus links from one GPU of a server to another and the share of a vector that takes each."""

    def coordinates(rank: int) -> list[int]:
        place = []
        for side in reversed(machine.sides):
            place.append(rank % side)
            rank //= side
        return place[::-1]

    def gpu(place: list[int]) -> int:
        number = 0
        for at, side in zip(place, machine.sides, strict=True):
            number = number * side + at
        return number

    here, there = coordinates(source), coordinates(target)
    for axis, side in enumerate(machine.sides):
        up, down = (there[axis] - here[axis]) % side, (here[axis] - there[axis]) % side
        for sign, turn, distance, other in (("+", 1, up, down), ("-", -1, down, up)):
            if 0 < distance <= other:
                place = list(here)
                for _ in range(distance):
                    yield f"gpu {gpu(place)} axis {axis} {sign}", 0.5 if distance == other else 1.0
                    place[axis] = (place[axis] + turn) % side
        here[axis] = there[axis]


def links_of(machine: Machine, crossing: Crossing) -> Iterator[tuple[str, str, float]]:
    """(level, link, share of the vector) for all links that a crossing means."""
    what, first, second = crossing
    width = machine.width
    if what == "pair" and width == 1:
        return  # to itself, and no link leads there
    if what == "pair":
        yield "gpu", f"gpu {first} out", 1.0
        yield "gpu", f"gpu {second} in", 1.0
        if machine.link == "mesh" and first != second:
            yield "gpu", f"gpu {first} to gpu {second % width} of its server", 1.0
        if machine.link == "torus":
            for name, share in neighbours(machine, first % width, second % width):
                yield "gpu", f"server {first // width} {name}", share
        return
    level, unit, rail = machine.names[first], second // machine.sizes[first], second % width
    if level == "server":
        yield level, f"server {unit} NIC {rail} {what}", 1.0
    elif machine.rails[first]:
        yield level, f"{level} {unit} rail {rail} uplinks {what}", 1.0
    else:
        yield level, f"{level} {unit} uplinks {what}", 1.0


def rate_of(machine: Machine, level: str, link: str) -> float:
    """Bytes per second of a link."""
    position = list(machine.names).index(level)
    rate, size = machine.rates[position], machine.sizes[position]
    if "axis" in link:
        return rate / (2 * len(machine.sides))
    if "to gpu" in link:
        return rate / (machine.width - 1)
    if "rail" in link:
        return rate * size / machine.width
    return rate * size if "uplinks" in link else rate


Loads = dict[tuple[str, str], float]  # vectors by level and link


def loads(machine: Machine, crossings: dict[Crossing, float]) -> Loads:
    found: Loads = defaultdict(float)
    for crossing, vectors in crossings.items():
        for level, link, share in links_of(machine, crossing):
            found[level, link] += share * vectors
    return dict(found)


def seconds(machine: Machine, carried: Loads, vector_bytes: float) -> float:
    """The largest latency of the levels that are used, then the busiest link."""
    if not carried:
        return 0.0
    latency = max(machine.latencies[list(machine.names).index(level)] for level, _ in carried)
    return latency + max(n * vector_bytes / rate_of(machine, *link) for link, n in carried.items())


def walk(
    machine: Machine,
    scheme: str,
    slots: Any,
    topk: Any,
    *,
    homes: Sequence[int] | None = None,
    weights: Any = None,
    rule: str = "nearest",
    table: Any = None,
) -> list[tuple[Loads, Loads]]:
    """Vectors over every link in the dispatch and the combine of each layer, without `homes` from all in turn.

    `slots` is [layer][slot], `topk` and `weights` [token][layer][choice], `table` [layer][server][expert].
    """
    count = len(slots)
    there: list[dict[Crossing, float]] = [defaultdict(float) for _ in range(count)]
    back: list[dict[Crossing, float]] = [defaultdict(float) for _ in range(count)]
    for number, token in enumerate(topk):
        starts = range(machine.ranks) if homes is None else [int(homes[number])]
        for start in starts:
            at = start
            for layer in range(count):
                chosen = [int(e) for e in token[layer]]
                fixed = None if table is None else table[layer]
                for chance, serving in outcomes(chosen, at, slots[layer], machine, rule, fixed):
                    weight = chance / len(starts)
                    crossings = dispatch(machine, scheme, at, serving)
                    returning = reverse(crossings)
                    if scheme == "follow" and serving:
                        gates = [0.0] * len(chosen) if weights is None else weights[number][layer]
                        kept = [float(gate) for gate, e in zip(gates, chosen, strict=True) if e >= 0]
                        at = serving[kept.index(max(kept))]
                        returning = [x for rank in serving for x in send(machine, rank, at)]
                    for crossing in crossings:
                        there[layer][crossing] += weight
                    for crossing in returning:
                        back[layer][crossing] += weight
    return [(loads(machine, a), loads(machine, b)) for a, b in zip(there, back, strict=True)]
