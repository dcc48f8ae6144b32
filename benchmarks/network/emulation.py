"""A machine out of Linux network namespaces: one for each GPU, and one that holds all switches.

Every GPU has two veth links, a scale-up link to the bridge of its server and a NIC to the bridge of its rack;
racks meet over uplinks at a core bridge. A token bucket (tc-tbf(8)) at both ends of every link limits each
direction. Queues hold everything that can be in flight, so that nothing is dropped: as on fabrics with credits.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from placer import Level, Topology
from placer.errors import InvalidInput, PlacerError

PREFIX = "placer-net-"
SWITCHES = PREFIX + "switches"
#: Ethernet frames of 1514 bytes carry 1448 bytes of TCP payload (with time stamps).
PAYLOAD = 1448 / 1514
#: Bytes that a stream of mean size may have in flight, headers and bookkeeping included, and the limits for others:
#: two segments and their acknowledgements at the least, at the most what Linux allows by default.
WINDOW, _SMALLEST, _LARGEST = 1 << 15, 1 << 14, 1 << 18

#: A full queue can hold a segment for longer than the usual 0.2 s; nothing is lost, so nothing need be sent again.
_PATIENT = "rto_min 10s"
#: What a bucket saves up, so that a late timer costs no bandwidth.
_BURST_BYTES, _BURST_SECONDS = 1 << 16, 0.005
_LOCK = Path("/run/placer-network.lock")
_PATIENCE = 30.0  # seconds to wait for another network to go


def unavailable() -> str | None:
    """Why no network can be built here; None where it can.

    Examples
    --------
    >>> unavailable() is None or isinstance(unavailable(), str)
    True
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} not found: install iproute2"
    probe = f"{PREFIX}probe{os.getpid()}"
    try:
        _checked(["ip", "netns", "add", probe])
        _checked(
            ["ip", "-netns", probe, "-batch", "-"],
            ["link add end0 type veth peer name end1", "link add bridge0 type bridge"],
        )
        _checked(["tc", "-netns", probe, "-batch", "-"], [_bucket("end0", 1e6, 2)])
    except PlacerError as error:
        return f"network namespaces, veth, bridges or tbf are not there: {error}"
    finally:
        _run(["ip", "netns", "del", probe])
    return None


def machine(
    shape: tuple[int, int, int], *, scale_up: float, nic: float, oversubscription: float = 1.0
) -> Topology:
    """The topology of a network of that shape; the same object builds it and predicts it.

    Parameters
    ----------
    shape : (racks, servers, gpus)
    scale_up, nic : float
        Bytes per second on the wire, for each GPU and direction.
    oversubscription : float
        What the NICs of a rack can send over what its uplink carries.

    Examples
    --------
    >>> topology = machine((2, 2, 4), scale_up=67.5e6, nic=7.5e6, oversubscription=2.0)
    >>> topology.shape, [round(level.effective_bandwidth / 1e6, 2) for level in topology.levels]
    ((2, 2, 4), [64.56, 7.17, 3.59])
    """
    racks, servers, gpus = shape

    def level(name: str, fanout: int, bandwidth: float, oversubscription: float = 1.0) -> Level:
        return Level(
            name=name,
            fanout=fanout,
            bandwidth=bandwidth,
            efficiency=PAYLOAD,
            latency=0.0,
            oversubscription=oversubscription,
        )

    return Topology(
        name="namespaces",
        description="network namespaces on one Linux machine",
        levels=(
            level("gpu", gpus, scale_up),
            level("server", servers, nic),
            level("rack", racks, nic, oversubscription),
        ),
        gpu_memory=80e9,  # an H100's; only so that any model's experts have room
        hbm_bandwidth=3.35e12,
        flops_bf16=989e12,
        flops_fp8=1979e12,
    )


def namespace(rank: int) -> str:
    """The namespace of a GPU."""
    return f"{PREFIX}gpu{rank}"


def address(rank: int) -> str:
    """The address of a GPU, on its scale-up link and its NIC alike.

    Examples
    --------
    >>> address(258)
    '10.77.1.2'
    """
    return f"10.77.{rank // 256}.{rank % 256}"


def window(ratio: float) -> int:
    """Bytes in flight of a stream that moves `ratio` times the mean of all streams.

    Streams share a queue in proportion to what they have in it; in proportion to their bytes, they end together.

    Examples
    --------
    >>> window(0.01), window(1.0), window(2.0), window(1000.0)
    (16384, 32768, 65536, 262144)
    """
    return min(max(round(ratio * WINDOW), _SMALLEST), _LARGEST)


@contextmanager
def network(topology: Topology) -> Iterator[Callable[[], int]]:
    """Build the network of a machine and take it away, whatever happens.

    What an earlier run left behind is removed first; only one network exists at a time.

    Parameters
    ----------
    topology : Topology
        Three levels of switches. Nominal bandwidths become the rates of the links; the uplink of a rack carries
        those of its GPUs' rack level together, divided by the oversubscription.

    Yields
    ------
    callable
        Packets dropped so far, in the network's queues and (from whatever traffic) in those of the processors. It
        stays 0 unless the processors fall far behind.

    Raises
    ------
    InvalidInput
        When the machine has other levels, other links or too many GPUs.
    PlacerError
        When a command fails or another run is under way.
    """
    switches, gpus = commands(topology)
    with _only_one():
        remove()
        try:
            _checked(["ip", "-batch", "-"], [f"netns add {name}" for name in (SWITCHES, *gpus)])
            for name, (links, queues) in {SWITCHES: switches, **gpus}.items():
                _checked(["ip", "-netns", name, "-batch", "-"], links)
                _checked(["tc", "-netns", name, "-batch", "-"], queues)
                _checked(["ip", "netns", "exec", name, "sh", "-c", _settings()])
            before = _dropped()
            yield lambda: _dropped() - before
        finally:
            with _uninterrupted():
                remove()


Commands = tuple[list[str], list[str]]


def commands(topology: Topology) -> tuple[Commands, dict[str, Commands]]:
    """Lines for ``ip -batch`` and for ``tc -batch``: in the namespace of the switches, and in each GPU's.

    Raises
    ------
    InvalidInput
        As `network`.
    """
    levels = topology.levels
    if len(levels) != 3 or any(level.link != "switch" or level.rails for level in levels):
        found = ", ".join(f"{level.name} ({level.link}{', rails' * level.rails})" for level in levels)
        raise InvalidInput(f"topology {topology.name}: found levels {found}, expected three switches")
    if topology.num_ranks > 256:
        raise InvalidInput(f"topology {topology.name}: found {topology.num_ranks} GPUs, expected at most 256")
    racks, servers, gpus = topology.shape
    rates = [level.bandwidth / level.oversubscription for level in levels]
    units = {"server": gpus, "rack": gpus * servers}
    bridges = [f"{name}{unit}" for name, size in units.items() for unit in range(topology.num_ranks // size)]
    links = [f"link add {bridge} type bridge" for bridge in (*bridges, "core")]
    links += [f"link set {bridge} up" for bridge in (*bridges, "core")]
    queues = []
    for rack in range(racks):
        links.append(f"link add out{rack} type veth peer name in{rack}")
        for end, bridge in ((f"out{rack}", f"rack{rack}"), (f"in{rack}", "core")):
            links += [f"link set {end} master {bridge}", f"link set {end} up"]
            queues.append(_bucket(end, rates[2] * units["rack"], topology.num_ranks))
    inside: dict[str, Commands] = {}
    for rank in range(topology.num_ranks):
        own_links = [f"address add {address(rank)}/32 dev lo", "link set lo up"]
        own_queues = []
        for end, unit, rate in (("scaleup", "server", rates[0]), ("nic", "rack", rates[1])):
            port = f"{end}{rank}"
            links += [
                f"link add {port} type veth peer name {end} netns {namespace(rank)}",
                f"link set {port} master {unit}{rank // units[unit]}",
                f"link set {port} up",
            ]
            queues.append(_bucket(port, rate, topology.num_ranks))
            own_links.append(f"link set {end} up")
            own_queues.append(_bucket(end, rate, topology.num_ranks))
        first = rank - rank % gpus
        own_links += [
            f"route add {address(peer)}/32 dev scaleup src {address(rank)} {_PATIENT}"
            for peer in range(first, first + gpus)
            if peer != rank
        ]
        own_links.append(f"route add 10.77.0.0/16 dev nic src {address(rank)} {_PATIENT}")
        inside[namespace(rank)] = own_links, own_queues
    return (links, queues), inside


def remove() -> None:
    """Remove every namespace of this program, and end what still runs inside."""
    left = _left()
    for name in left:
        for process in _run(["ip", "netns", "pids", name]).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
    _run(["ip", "-force", "-batch", "-"], [f"netns del {name}" for name in left])


def _left() -> list[str]:
    names = (line.split()[0] for line in _run(["ip", "netns", "list"]).stdout.splitlines() if line.strip())
    return [name for name in names if name.startswith(PREFIX)]


def _settings() -> str:
    """Shell lines for the inside of a namespace.

    Tail loss probes (tcp_early_retrans) take a long queue for a loss. Receive packet steering keeps the packets of
    a stream on one processor: else they overtake each other, which TCP takes for a loss as well.
    """
    processors = (1 << min(os.cpu_count() or 1, 32)) - 1
    return f"""echo 0 > /proc/sys/net/ipv4/tcp_early_retrans
for queue in /sys/class/net/*/queues/rx-*/rps_cpus; do [ ! -e "$queue" ] || echo {processors:x} > "$queue"; done
"""


def _bucket(end: str, rate: float, ranks: int) -> str:
    """A token bucket whose queue holds the windows of all streams together."""
    burst = max(_BURST_BYTES, round(_BURST_SECONDS * rate))
    limit = ranks * ranks * (WINDOW + _SMALLEST)
    return f"qdisc add dev {end} root tbf rate {8 * rate:.0f}bit burst {burst} limit {limit}"


def _dropped() -> int:
    """Packets dropped by the queues of the network, and by those of the processors (net/softnet_stat) since boot."""
    shown = [_checked(["tc", "-netns", name, "-s", "-json", "qdisc", "show"]) for name in _left()]
    queues = sum(queue.get("drops", 0) for text in shown for queue in json.loads(text))
    backlog = Path("/proc/net/softnet_stat").read_text().splitlines()
    return int(queues) + sum(int(line.split()[1], 16) for line in backlog)


def _checked(command: list[str], lines: Sequence[str] = ()) -> str:
    done = _run(command, lines)
    if done.returncode:
        raise PlacerError(f"{' '.join(command)}: {_complaint(done)}")
    return done.stdout


def _run(command: list[str], lines: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """A command in a session of its own: Ctrl-C reaches this program alone, which then cleans up."""
    given = "".join(f"{line}\n" for line in lines)
    return subprocess.run(
        command, input=given, capture_output=True, text=True, check=False, start_new_session=True
    )


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    return "; ".join(done.stderr.split("\n")).strip("; ") or f"exit code {done.returncode}"


@contextmanager
def _only_one() -> Iterator[None]:
    with _LOCK.open("w") as file:
        give_up = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise PlacerError(f"{_LOCK}: held by another network, expected it free") from None
                time.sleep(0.1)
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """No second Ctrl-C ends the cleaning up; handlers belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
