"""Two hosts and the link between them: the fixture `network`.

Each host is a network namespace with a TUN device. What one device sends, a process of its own
carries to the other: a thread of the tests would wait for the GIL at each packet. That process also
makes the namespaces, and removes them when its stdin ends, so even if the tests are killed.
"""

import contextlib
import ctypes
import json
import math
import os
import random
import select
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.platform != "win32":
    import fcntl

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 1_500  # bytes in a packet at most, as the kernel gives it to a TUN device
QUEUE = 100  # packets that may wait to be sent, in each direction


class Host(NamedTuple):
    """One end of the link. The namespace and the device in it have the same name."""

    name: str
    address: str

    def command(self, *argv: str) -> list[str]:
        """Return the command that runs argv on this host."""
        return ["ip", "netns", "exec", self.name, *argv]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Have sockets that this thread makes belong to this host."""
        setns = ctypes.CDLL(None).setns  # os.setns from Python 3.12 on
        with (
            Path(f"/run/netns/{self.name}").open() as there,
            Path("/proc/thread-self/ns/net").open() as here,
        ):
            assert setns(there.fileno(), 0) == 0
            try:
                yield
            finally:
                assert setns(here.fileno(), 0) == 0


@dataclass(eq=False)
class Link:
    """What the link is like, the same in both directions."""

    rate: float | None = None  # bits per second; None or 0: no limit
    delay: float = 0.0  # seconds that a packet travels once it is sent
    loss: float = 0.0  # the share of packets lost, 0 to 1
    up: bool = True  # if not, packets vanish, and no host notices


class Network(Link):
    """Two hosts and their link. Its attributes may be set at any moment, and hold from then on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        pipe = subprocess.PIPE
        # In a session of its own, or Ctrl-C would end it before it has removed the namespaces.
        self._carrier = subprocess.Popen(
            [sys.executable, __file__], bufsize=0, stdin=pipe, stdout=pipe, start_new_session=True
        )
        self.server_host, self.client_host = hosts(self._carrier.pid)
        self._wait_answer()
        super().__init__()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in Link.__annotations__:
            assert self._carrier.stdin
            with self._lock:
                self._carrier.stdin.write(json.dumps(astuple(self)).encode())
                self._wait_answer()

    def _wait_answer(self) -> None:
        assert self._carrier.stdout
        answer = self._carrier.stdout.readline().decode().strip()
        if answer != "ok":
            self.close()
            raise OSError(answer or "the network's carrier has ended")

    def close(self) -> None:
        """Remove both hosts. Processes on them run on, cut off."""
        assert self._carrier.stdin and self._carrier.stdout
        self._carrier.stdin.close()
        status = self._carrier.wait(10)
        self._carrier.stdout.close()
        if status:
            raise OSError(f"the network's carrier ended with {status}")


@pytest.fixture
def network() -> Iterator[Network]:
    """Give a network whose link is perfect, to begin with. It takes Linux, root and ip."""
    if sys.platform != "linux":
        pytest.skip("needs Linux: network namespaces")
    try:
        made = Network()
    except OSError as error:
        pytest.skip(f"no network can be made here: {error}")
    with contextlib.closing(made):
        yield made


def hosts(carrier: int) -> tuple[Host, Host]:
    """Return the hosts of a carrier, given its process id."""
    return Host(f"net{carrier}s", "10.77.0.1"), Host(f"net{carrier}c", "10.77.0.2")


def ip(*words: str) -> None:
    """Run ip; raise what it says if it fails."""
    ended = subprocess.run(["ip", *words], stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise OSError(f"ip {' '.join(words)}: {ended.stderr.strip()}")


def make(host: Host) -> int:
    """Make a host; return the file descriptor of its device."""
    name, address = host
    with suppress(OSError):
        ip("netns", "delete", name)  # left by a carrier that had this process id and was killed
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")  # before ioctl, whose errors do not say what failed
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    ip("link", "set", name, "netns", name)
    ip("-n", name, "address", "add", f"{address}/30", "dev", name)
    ip("-n", name, "link", "set", name, "up")
    return device


@dataclass
class Direction:
    """One way across the link: a queue, the sender that empties it, and the way itself."""

    source: int
    target: int
    queue: deque[bytes] = field(default_factory=deque)
    way: deque[tuple[float, bytes]] = field(default_factory=deque)  # each with when it was sent
    began: float = 0.0  # when the sender began with the first in the queue

    def receive(self, link: Link, now: float) -> None:
        """Queue what the host sends, or lose it."""
        if not self.queue:
            self.began = max(self.began, now)
        with suppress(BlockingIOError):
            for _ in range(QUEUE // 2):  # then it is the other direction's turn
                packet = os.read(self.source, MTU)
                if random.random() >= link.loss:
                    self.queue.append(packet)

    def advance(self, link: Link, now: float) -> float:
        """Bring each packet to where it is by now; return when the next one is due somewhere.

        The sender's times follow from one another, so a late call does not make the link slower.
        """
        queue, way, due = self.queue, self.way, math.inf
        if not link.up:
            queue.clear()
            way.clear()
        while queue:
            sent = self.began + (len(queue[0]) * 8 / link.rate if link.rate else 0)
            if sent > now:
                due = sent
                break
            self.began = sent
            way.append((sent, queue.popleft()))
        while len(queue) > QUEUE:
            queue.pop()
        while way and way[0][0] + link.delay <= now:
            with suppress(OSError):  # if the device is down
                os.write(self.target, way.popleft()[1])
        return min(due, way[0][0] + link.delay) if way else due


def carry(server: int, client: int) -> None:
    """Carry packets between two devices over the link that stdin describes, until it ends."""
    link, said = Link(), b"-"
    directions = Direction(server, client), Direction(client, server)
    while said:
        due = min([direction.advance(link, time.monotonic()) for direction in directions])
        wait = min(60, max(0, due - time.monotonic()))
        ready = select.select([server, client, 0], [], [], wait)[0]
        now = time.monotonic()
        for direction in directions:
            if direction.source in ready:
                direction.receive(link, now)
        if 0 in ready and (said := os.read(0, 1_000)):
            old, link = link, Link(*json.loads(said))
            if link.rate != old.rate:  # what the senders have begun with, they begin again
                for direction in directions:
                    direction.began = now
            print("ok", flush=True)


def main() -> None:
    """Make the hosts, say "ok" or why they cannot be made, carry between them, and remove them."""
    ends = hosts(os.getpid())
    try:
        devices = [make(host) for host in ends]
    except OSError as error:
        print(error, flush=True)
    else:
        print("ok", flush=True)
        carry(*devices)
    finally:
        for host in ends:
            with suppress(OSError):
                ip("netns", "delete", host.name)


if __name__ == "__main__":
    main()
