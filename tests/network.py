"""Two hosts and the link between them: the fixture `network`.

Each host is a network namespace with a TUN device. What one device sends, a process of its own
carries to the other: a thread of the tests would wait for the GIL at each packet. That process also
makes the namespaces, and removes them when its stdin ends, so even if the tests are killed.
"""

import ctypes
import math
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple

import pytest

if sys.platform != "win32":
    import fcntl

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
Way = deque[tuple[float, bytes]]  # packets on their way, each with the time of its arrival
MAX_QUEUE = 2.0  # seconds that a packet may wait to be sent, before it is dropped
MTU = 1_500  # bytes in a packet at most, as the kernel gives it to a TUN device


class Host(NamedTuple):
    """One end of the link. The namespace and the device in it have the same name."""

    name: str
    address: str

    def command(self, *argv: str) -> list[str]:
        """Return the command that runs argv on this host."""
        return ["ip", "netns", "exec", self.name, *argv]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Have sockets that this thread makes belong to this host."""
        setns = ctypes.CDLL(None).setns  # os.setns from Python 3.12 on
        host, own = Path(f"/run/netns/{self.name}"), Path("/proc/thread-self/ns/net")
        with host.open() as there, own.open() as here:
            assert setns(there.fileno(), 0) == 0
            try:
                yield
            finally:
                assert setns(here.fileno(), 0) == 0


class Network:
    """Two hosts and the link between them. They do not notice what becomes of the link."""

    def __init__(self, carrier: Popen[str]) -> None:
        self.carrier = carrier
        self.server_host, self.client_host = hosts(carrier.pid)

    def become(self, loss: float = 0, delay: float = 0, rate: float = math.inf) -> None:
        """Make the link lose a share of its packets, delay them, and carry `rate` bits a second."""
        print(loss, delay, rate, file=self.carrier.stdin, flush=True)
        assert self.answer() == "ok"

    def answer(self) -> str:
        """Wait for what the carrier says: "ok", or why it cannot make the hosts."""
        assert self.carrier.stdout
        return self.carrier.stdout.readline().strip()


@pytest.fixture
def network() -> Iterator[Network]:
    """Give a network whose link is perfect, to begin with. It takes Linux, root and ip."""
    if sys.platform != "linux":
        pytest.skip("needs Linux: network namespaces")
    command = [sys.executable, __file__]
    # In the session of the tests, Ctrl-C would end it before it has removed the namespaces.
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True) as carrier:
        made = Network(carrier)
        answer = made.answer()
        assert answer, "the carrier has failed"
        if answer != "ok":
            pytest.skip(f"no network can be made here: {answer}")
        yield made
    assert carrier.returncode == 0


def hosts(carrier: int) -> tuple[Host, Host]:
    """Return the hosts of a carrier, given its process id."""
    return Host(f"net{carrier}s", "10.77.0.1"), Host(f"net{carrier}c", "10.77.0.2")


def ip(command: str) -> None:
    """Run ip; raise what it says if it fails."""
    ended = subprocess.run(["ip", *command.split()], stderr=PIPE, text=True)
    if ended.returncode:
        raise OSError(f"ip {command}: {ended.stderr.strip()}")


def make(host: Host) -> int:
    """Make a host; return the file descriptor of its device."""
    name, address = host
    ip(f"netns add {name}")
    ip(f"-n {name} link set lo up")  # before ioctl, whose errors do not say what failed
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    ip(f"link set {name} netns {name}")
    ip(f"-n {name} address add {address}/30 dev {name}")
    ip(f"-n {name} link set {name} up")
    return device


def carry(server: int, client: int) -> None:
    """Carry packets between two devices until stdin ends. It says what the link is like."""
    loss, delay, rate = 0.0, 0.0, math.inf
    ways = [(server, client, Way()), (client, server, Way())]
    while True:
        now = time.monotonic()
        for _, target, way in ways:
            while way and way[0][0] <= now:
                with suppress(OSError):  # if the device is down
                    os.write(target, way.popleft()[1])
        due = min([way[0][0] for _, _, way in ways if way], default=math.inf)
        ready = select.select([server, client, sys.stdin], [], [], min(60, due - now))[0]
        now = time.monotonic()
        for source, _, way in ways:
            if source in ready:
                packet = os.read(source, MTU)
                begin = max(now, way[-1][0] - delay) if way else now
                if random.random() >= loss and begin - now < MAX_QUEUE:
                    way.append((begin + 8 * len(packet) / rate + delay, packet))
        if sys.stdin in ready:
            link = sys.stdin.readline()
            if not link:
                return
            loss, delay, rate = map(float, link.split())
            print("ok", flush=True)


if __name__ == "__main__":
    # Make the hosts, say "ok" or why they cannot be made, carry between them, and remove them.
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
                ip(f"netns delete {host.name}")
