"""One rank of an all-to-all-v over TCP: a program of its own, run inside the rank's network namespace.

It imports the standard library only, since as many start together as there are GPUs. It reads a plan and the steps
of a barrier from stdin, one line each, and answers each with a line of JSON on stdout.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time
import zlib
from typing import Any

PORT = 7077
PATIENCE = 60.0  # seconds that a rank waits for another to connect
PERIOD = 251  # of the bytes on the wire: a prime, so that a stream cut or shifted does not look like another
CHUNK = 1 << 18
TOTAL_RETRANSMITS = 100  # offset in struct tcp_info, linux/tcp.h

Ends = dict[int, tuple[socket.socket, int]]  # by peer: connection and bytes


def wire(source: int, target: int) -> memoryview:
    """What one rank sends to another, over and over: at least `CHUNK` bytes from any offset below `PERIOD`.

    Examples
    --------
    >>> bytes(wire(0, 3)[:3]) == bytes([3, 4, 5])
    True
    """
    begin = (31 * source + target) % PERIOD
    return memoryview(bytes(range(PERIOD)) * (CHUNK // PERIOD + 3))[begin:]


def main() -> None:
    """Listen, connect, wait for the common start, exchange, report."""
    plan = json.loads(sys.stdin.readline())
    rank, addresses = plan["rank"], plan["addresses"]
    socket.setdefaulttimeout(PATIENCE)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _choose_reno(listener)
        listener.bind((addresses[rank], PORT))
        listener.listen(len(addresses))
        _say("listening")
        sys.stdin.readline()
        receives: Ends = {}  # receivers connect: a receive buffer has to be set before
        for peer, (size, window) in plan["receive"].items():
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window // 2)  # socket(7): is doubled
            _choose_reno(connection)
            connection.connect((addresses[int(peer)], PORT))
            receives[int(peer)] = connection, size
        sends: Ends = {}
        while len(sends) < len(plan["send"]):
            connection, (host, _) = listener.accept()
            peer = addresses.index(host)
            size, window = plan["send"][str(peer)]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, window // 2)
            sends[peer] = connection, size
    _say("connected")
    start = float(sys.stdin.readline())
    time.sleep(max(0.0, start - time.monotonic()))
    finished, sums = _exchange(rank, sends, receives, plan["lead"], plan["verify"])
    again = sum(_retransmits(connection) for connection, _ in sends.values())
    _say({"finished": finished, "sums": sums, "retransmits": again})
    sys.stdin.readline()  # connections stay open until every rank has all its bytes


def _exchange(
    rank: int, sends: Ends, receives: Ends, lead: float, verify: bool
) -> tuple[float, dict[int, int]]:
    """Send and receive everything at once; when the last byte came in, and a checksum of each stream.

    No stream that is sent gets further ahead of the slowest than `lead`, as a share of its bytes.
    """
    poll = select.epoll()
    left: dict[int, tuple[int, socket.socket, int]] = {}  # by descriptor: peer, connection, bytes to go
    for ends, event in ((sends, select.EPOLLOUT), (receives, select.EPOLLIN)):
        for peer, (connection, size) in ends.items():
            connection.setblocking(False)
            poll.register(connection, event)
            left[connection.fileno()] = peer, connection, size
    views = {peer: wire(rank, peer) for peer in sends}
    share = dict.fromkeys(sends, 1.0)  # of each stream's bytes, to be sent
    waiting: dict[int, int] = {}  # descriptors of streams that are too far ahead, by peer
    sums = dict.fromkeys(receives, 0)
    buffer = bytearray(CHUNK)
    flags = 0 if verify else socket.MSG_TRUNC  # tcp(7): bytes leave the queue without being copied
    finished = time.monotonic()
    while left:
        for descriptor, event in poll.poll():
            peer, connection, size = left[descriptor]
            if event & select.EPOLLOUT:
                begin = (sends[peer][1] - size) % PERIOD
                size -= connection.send(views[peer][begin : begin + min(size, CHUNK)])
                share[peer] = size / sends[peer][1]
                least = max(share.values()) - lead
                if size and share[peer] < least:
                    poll.modify(descriptor, 0)
                    waiting[peer] = descriptor
                for other in [other for other in waiting if share[other] >= least]:
                    poll.modify(waiting.pop(other), select.EPOLLOUT)
            else:
                done = connection.recv_into(buffer, min(size, CHUNK), flags)
                if not done:
                    raise ConnectionError(f"rank {peer} closed the connection with {size} bytes to come")
                if verify:
                    sums[peer] = zlib.crc32(memoryview(buffer)[:done], sums[peer])
                size -= done
                finished = time.monotonic()
            left[descriptor] = peer, connection, size
            if not size:
                poll.unregister(descriptor)
                del left[descriptor]
    return finished, sums


def _choose_reno(connection: socket.socket) -> None:
    """Reno is in every kernel and fills its window; BBR, a common default, would pace by its own estimates."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _retransmits(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TOTAL_RETRANSMITS + 4)
    return int(struct.unpack_from("I", info, TOTAL_RETRANSMITS)[0])


def _say(message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
