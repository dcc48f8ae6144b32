"""Machines: nested levels of GPUs, servers and racks, and the links between their units.

One TOML file describes one machine; ``topologies/README.md`` explains the format. Inside the program every
quantity is in SI units: bytes, seconds, bytes per second, floating-point operations per second.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import isfinite, prod
from operator import mul
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Self

from placer.errors import InvalidInput
from placer.files import nearest
from placer.quantity import parse_quantity

LINKS = ("switch", "mesh", "torus")
LARGEST_TORUS = 1024  # every pair of its GPUs is routed
#: Share of the bandwidth that a multi-path fabric reaches under an all-to-all. Packet-level simulations of balanced
#: matrices took 1.52 to 1.58 times the bound with flows hashed to paths, 1.09 to 1.27 with packets sprayed over them
#: (csg-htsim, RoCE and NDP).
ROUTING = {"ideal": 1.0, "ecmp": 0.65, "spray": 0.9}
REPORTED = ("gpu", "server", "rack")


def _check(name: str, value: float, holds: bool, expected: str) -> None:
    if isinstance(value, bool) or not holds or not isfinite(value):
        raise InvalidInput(f"{name} is {shorten(value)}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the machine: units of equal size and the link by which they exchange vectors.

    Parameters
    ----------
    name : str
        ``gpu``, ``server`` and ``rack`` are always there; other names are free.
    fanout : int
        How many units of this level one unit of the next level out holds.
    bandwidth : float
        Nominal bytes per second, for each GPU and direction.
    efficiency : float
        Share of `bandwidth` that real transfers reach, in (0, 1].
    latency : float
        Seconds from one unit to another, for a message of negligible size.
    link : {"switch", "mesh", "torus"}
        ``switch``: only what a GPU sends and receives is limited. ``mesh``: so is every pair. ``torus``: a
        ring or grid of neighbour links; `bandwidth` is the sum over those of one GPU.
    oversubscription : float
        How many times the traffic into this level's links exceeds what they carry onwards; at least 1.
    routing : {"ideal", "ecmp", "spray"}
        How traffic finds one of many paths: without loss, one flow on one path, or packets on all of them. Takes
        effect as the share of the bandwidth in `ROUTING`.
    rails : bool
        Whether the level's uplinks belong to one rail each (leaf switch i takes NIC i of every server).
    dims : tuple of int
        Sides of a torus, their product is `fanout`; by default as near to a cube as can be.

    Raises
    ------
    InvalidInput
        When a value lies outside of its range.

    Examples
    --------
    >>> mesh = Level(name="gpu", fanout=8, bandwidth=448e9, efficiency=0.75, latency=3.33e-6, link="mesh")
    >>> mesh.effective_bandwidth, mesh.pair_bandwidth
    (336000000000.0, 48000000000.0)
    """

    name: str
    fanout: int
    bandwidth: float
    efficiency: float
    latency: float
    link: str = "switch"
    oversubscription: float = 1.0
    routing: str = "ideal"
    rails: bool = False
    dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f'level "{self.name}": '
        whole = isinstance(self.fanout, int) and 1 <= self.fanout < 2**31
        _check(f"{where}fanout", self.fanout, whole, "an integer >= 1")
        _check(
            f"{where}bandwidth", self.bandwidth, 1 <= self.bandwidth <= 1e18, "more than 0 bytes/s: 1 to 1e18"
        )
        _check(
            f"{where}efficiency",
            self.efficiency,
            1e-6 <= self.efficiency <= 1,
            "more than 0 (1e-6) and at most 1",
        )
        _check(f"{where}latency", self.latency, 0 <= self.latency <= 3600, "at least 0 s and at most 3600 s")
        _check(
            f"{where}oversubscription",
            self.oversubscription,
            1 <= self.oversubscription <= 1e6,
            "at least 1 and at most 1e6",
        )
        for key, known in (("link", LINKS), ("routing", tuple(ROUTING))):
            if getattr(self, key) not in known:
                found = shorten(getattr(self, key))
                raise InvalidInput(f"{where}{key} is {found}, expected one of {', '.join(known)}")
        if not isinstance(self.rails, bool):
            raise InvalidInput(f"{where}rails is {shorten(self.rails)}, expected true or false")
        if self.link == "torus" and self.fanout > LARGEST_TORUS:
            raise InvalidInput(f"{where}torus of {self.fanout}, expected at most {LARGEST_TORUS} GPUs on it")
        if self.dims and (self.link != "torus" or prod(self.dims) != self.fanout or min(self.dims) < 1):
            expected = f"sides of a torus whose product is the fanout {self.fanout}"
            raise InvalidInput(f"{where}dims is {list(self.dims)}, expected {expected}")

    @property
    def effective_bandwidth(self) -> float:
        """Bytes per second that one GPU can really send over this level's link, and receive."""
        return self.bandwidth * self.efficiency * ROUTING[self.routing] / self.oversubscription

    @property
    def pair_bandwidth(self) -> float:
        """Bytes per second of one GPU towards one other unit: over one of the mesh's ``fanout - 1`` links, or one
        of the torus's two links a dimension."""
        if self.link == "torus":
            return self.effective_bandwidth / (2 * len(self.sides))
        return self.effective_bandwidth / (max(self.fanout - 1, 1) if self.link == "mesh" else 1)

    @property
    def sides(self) -> tuple[int, ...]:
        """`dims`, or the sides of the torus of three dimensions that is nearest to a cube."""
        return self.dims or _cube(self.fanout, 3)

    def with_fanout(self, fanout: int) -> Self:
        """The level with another fan-out; the links of a mesh keep their rate, so their sum follows."""
        links = max(fanout - 1, 1) / max(self.fanout - 1, 1) if self.link == "mesh" else 1.0
        dims = self.dims if fanout == self.fanout else _cube(fanout, len(self.dims)) if self.dims else ()
        return replace(self, fanout=fanout, bandwidth=self.bandwidth * links, dims=dims)


def _cube(count: int, dimensions: int) -> tuple[int, ...]:
    """Factors of `count`, ascending, as near to each other as can be.

    Examples
    --------
    >>> _cube(64, 3), _cube(24, 3), _cube(7, 2)
    ((4, 4, 4), (2, 3, 4), (1, 7))
    """
    if dimensions == 1:
        return (count,)
    sides = [side for side in range(1, count + 1) if side**dimensions <= count and count % side == 0]
    options = [(side, *_cube(count // side, dimensions - 1)) for side in sides]
    return min((tuple(sorted(option)) for option in options), key=lambda option: option[-1] - option[0])


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A machine: its levels from the inside out, and what one GPU can hold and do.

    Ranks count GPUs in topology order: all GPUs of the first server, then of the second, and so on.

    Parameters
    ----------
    name, description : str
    levels : tuple of Level
        From the inside out; ``gpu`` first, ``server`` and ``rack`` in this order, others where they belong.
    gpu_memory, hbm_bandwidth : float
        Bytes, and bytes per second, of one GPU's memory; bytes of the smallest where GPUs differ.
    gpu_memories : tuple of float
        Bytes of each GPU of a server, the same in all servers, or of each GPU of the machine; empty where all have
        `gpu_memory`. A file lists them under ``gpu_memory``.
    gpu_speeds : tuple of float
        Compute speed of each GPU of a server, the same in all servers, or of each GPU of the machine, 1 being that of
        `flops_bf16`; empty where all have that.
    flops_bf16, flops_fp8 : float
        Dense floating-point operations per second of one GPU.

    Raises
    ------
    InvalidInput
        When a level is missing, doubled or out of order, or a figure is not positive.

    Examples
    --------
    >>> topology = Topology.load("dgx-h100").with_shape("2x4x8")
    >>> topology.shape, topology.num_ranks, topology.unit_sizes
    ((2, 4, 8), 64, (1, 8, 32))
    """

    name: str
    description: str
    levels: tuple[Level, ...]
    gpu_memory: float
    hbm_bandwidth: float
    flops_bf16: float
    flops_fp8: float
    gpu_memories: tuple[float, ...] = ()
    gpu_speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        names = [level.name for level in self.levels]
        in_order = [name for name in names if name in REPORTED] == list(REPORTED)
        if not in_order or names[0] != "gpu" or len(set(names)) < len(names):
            expected = "gpu first, then server and rack, each once, from the inside out"
            raise InvalidInput(f"levels are {', '.join(names) or 'missing'}; expected {expected}")
        for level in self.levels[1:]:
            if level.link != "switch":
                where = f'level "{level.name}": link is {level.link}'
                raise InvalidInput(f"{where}, expected switch; mesh and torus join the GPUs of a server")
        inside = self.levels[: names.index("server") + 1]
        for level in inside:
            if level.rails:
                raise InvalidInput(
                    f'level "{level.name}": rails is true, expected it only beyond the servers'
                )
        if self.levels[0].link != "switch" and len(inside) > 2:
            where = f'level "gpu": link is {self.levels[0].link}'
            raise InvalidInput(
                f"{where}, expected switch, since level {inside[1].name} parts the server's GPUs"
            )
        for key in ("gpu_memory", "hbm_bandwidth", "flops_bf16", "flops_fp8"):
            _check(key, getattr(self, key), getattr(self, key) > 0, "more than 0")
        if self.gpu_memories:
            self._check_memories()
        if self.gpu_speeds:
            self._check_number("gpu_speeds", len(self.gpu_speeds), "speeds")
            for speed in self.gpu_speeds:
                _check(
                    "gpu_speeds", speed, 1e-3 <= speed <= 1e3, "speeds from 0.001 to 1000, 1 for flops_bf16"
                )

    def _check_number(self, key: str, found: int, what: str) -> None:
        server, machine = self.shape[2], self.num_ranks
        if found not in (server, machine):
            raise InvalidInput(
                f"{key} lists {found} {what}, expected {server}, one for each GPU of a server, "
                f"or {machine}, one for each GPU of the machine"
            )

    def _check_memories(self) -> None:
        self._check_number("gpu_memory", len(self.gpu_memories), "sizes")
        least = min(self.gpu_memories)
        if self.gpu_memory != least:
            raise InvalidInput(
                f"gpu_memory is {shorten(self.gpu_memory)}, expected the least of gpu_memories, {least}"
            )

    @property
    def unit_sizes(self) -> tuple[int, ...]:
        """Ranks in one unit of each level: 1 for ``gpu``, the GPUs of a server for ``server``, and so on."""
        return tuple(accumulate((level.fanout for level in self.levels[:-1]), mul, initial=1))

    @property
    def num_ranks(self) -> int:
        """GPUs in the whole machine."""
        return prod(level.fanout for level in self.levels)

    @property
    def speeds(self) -> tuple[float, ...]:
        """Speed of every GPU of the machine; empty where all are alike."""
        if len(set(self.gpu_speeds)) < 2:
            return ()
        return self.gpu_speeds * (self.num_ranks // len(self.gpu_speeds))

    @property
    def num_units(self) -> tuple[int, ...]:
        """Units of each level in the whole machine."""
        return tuple(self.num_ranks // size for size in self.unit_sizes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Racks, servers in a rack, GPUs in a server."""
        server, rack = (self.unit_sizes[self.index(name)] for name in ("server", "rack"))
        return self.num_ranks // rack, rack // server, server

    def index(self, name: str) -> int:
        """Position of a level in ``levels``; InvalidInput when there is none of this name."""
        names = [level.name for level in self.levels]
        if name not in names:
            raise InvalidInput(f"topology {self.name}: no level {name!r}, {nearest(name, names)}")
        return names.index(name)

    def with_shape(self, shape: str | tuple[int, int, int]) -> Self:
        """The same machine with other numbers of racks, servers in a rack and GPUs in a server.

        Further levels keep their fan-outs, and the counts must divide by them. Memories and speeds listed for each GPU
        of a server stay with it, so servers keep their GPUs; those for each GPU of the machine keep their number.

        Raises
        ------
        InvalidInput
            When the text is not ``RACKSxSERVERSxGPUS``, a count is below 1, does not divide, or is not that of the
            memories or speeds listed.
        """
        text = shape if isinstance(shape, str) else "x".join(map(str, shape))
        where = f"--shape {shorten(text)}"
        match = re.fullmatch(
            r"0*([1-9][0-9]{0,8})[xX]0*([1-9][0-9]{0,8})[xX]0*([1-9][0-9]{0,8})", text.strip()
        )
        if not match:
            raise InvalidInput(f"{where}: expected RACKSxSERVERSxGPUS, for example 1x8x8")
        starts = [0, self.index("server"), self.index("rack"), len(self.levels)]
        levels: list[Level] = []
        for start, end, digits in zip(starts, starts[1:], reversed(match.groups()), strict=False):
            first, *outer = self.levels[start:end]
            kept = prod(level.fanout for level in outer)
            count, rest = divmod(int(digits), kept)
            if rest:
                raise InvalidInput(
                    f"{where}: {digits} {first.name}s do not divide by the {kept} of level "
                    f'"{outer[-1].name}" in {self.name}'
                )
            levels += [first.with_fanout(count), *outer]
        try:
            return replace(self, levels=tuple(levels))
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error}") from None

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Self:
        """Read a shipped topology by its name, in any case, or a TOML file by its path.

        Raises
        ------
        InvalidInput
            When the name is unknown, or the file cannot be read or says something impossible.
        """
        text = os.fspath(source)
        shipped = _shipped()
        path = shipped.get(text.lower())
        if path is None:
            if not (os.sep in text or "/" in text or text.lower().endswith(".toml") or os.path.isfile(text)):
                raise InvalidInput(f"unknown topology {shorten(text)}: {nearest(text, shipped)}")
            path = Path(text)
        try:
            table = tomllib.loads(path.read_bytes().decode())
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{path}: expected a TOML file: {error}") from None
        try:
            read = _read(Topology, {"name": path.stem} | table)
            if isinstance(read["gpu_memory"], tuple):
                read |= {"gpu_memory": min(read["gpu_memory"]), "gpu_memories": read["gpu_memory"]}
            return cls(**read)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from None


def shipped() -> list[str]:
    """Names of the topologies that come with the package, sorted.

    Examples
    --------
    >>> "dgx-h100" in shipped()
    True
    """
    return sorted(_shipped())


def _shipped() -> dict[str, Path]:
    package = Path(__file__).parent
    folder = package / "topologies"  # in a wheel; in a source checkout the folder stands beside the package
    folder = folder if folder.is_dir() else package.parent / "topologies"
    return {path.stem: path for path in folder.glob("*.toml")}


OPTIONAL = ("oversubscription", "routing", "rails", "dims", "gpu_speeds")
DERIVED = ("gpu_memories",)  # fields that are no keys
_KINDS = {
    "bandwidth": "bandwidth",
    "efficiency": "number",
    "latency": "seconds",
    "oversubscription": "number",
    "gpu_memory": "bytes",
    "hbm_bandwidth": "bandwidth",
    "flops_bf16": "flops",
    "flops_fp8": "flops",
}


def _read(kind: type, table: object, where: str = "") -> dict[str, Any]:
    """The arguments of a Level or Topology from one table of the file, whose keys are the field names."""
    if not isinstance(table, dict):
        raise InvalidInput(f"{where}found {shorten(table)}, expected a table")
    keys = [field.name for field in fields(kind) if field.name not in DERIVED]
    for key in table:
        if key not in keys:
            raise InvalidInput(f"{where}unknown key {shorten(key)}, {nearest(key, keys)}")
    for key in keys:
        if key not in table and key not in OPTIONAL:
            raise InvalidInput(f'{where}key "{key}" is missing')
    return {key: _value(key, value, f"{where}{key}") for key, value in table.items()}


def _value(key: str, value: Any, where: str) -> Any:
    if key in ("name", "description") and not (isinstance(value, str) and value and value.isprintable()):
        raise InvalidInput(f"{where} is {shorten(value)}, expected one line of text")
    if key == "levels":
        if not isinstance(value, list):
            raise InvalidInput(f"{where} is {shorten(value)}, expected [[levels]] tables")
        return tuple(Level(**_read(Level, table, f"level {i}: ")) for i, table in enumerate(value, 1))
    if key == "dims":
        if not (isinstance(value, list) and value and all(type(side) is int for side in value)):
            raise InvalidInput(f"{where} is {shorten(value)}, expected a list of integers, as in [4, 4, 4]")
        return tuple(value)
    if key == "gpu_speeds":
        if not (isinstance(value, list) and value and all(type(speed) in (int, float) for speed in value)):
            raise InvalidInput(f"{where} is {shorten(value)}, expected a list of numbers, as in [1.0, 0.5]")
        return tuple(float(speed) for speed in value)
    if key == "gpu_memory" and isinstance(value, list):
        if not value:
            raise InvalidInput(f"{where} is [], expected a size such as 80 GB, or a list of them")
        return tuple(parse_quantity(size, "bytes", where) for size in value)
    return parse_quantity(value, _KINDS[key], where) if key in _KINDS else value
