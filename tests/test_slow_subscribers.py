"""README, "Slow subscribers": who loses messages, who does not, and how long the chat waits."""

import contextlib
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import zmq
import zmtp
from network import Network
from peers import Join, Sock, line_of, message_of
from processes import LINUX, TIMEOUT, Script, StartServer, wait_for

slow = pytest.mark.slow

STALLED = "server.py: a subscriber stalled: the chat goes on without it"


def numbered(count: int, more: str = "") -> tuple[bytes, bytes]:
    """Return the frames of lines with numbers, and those of their messages, each of one size."""
    texts = [f"{number:08}{more}" for number in range(count)]
    lines = b"".join(zmtp.frame(line_of("k", text)) for text in texts)
    return lines, b"".join(zmtp.frame(message_of("k", text)) for text in texts)


@contextlib.contextmanager
def sending(sock: socket.socket, data: bytes) -> Iterator[None]:
    """Send data in a thread."""
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    yield
    sender.join(TIMEOUT)


def read(sock: socket.socket, size: int, rate: float | None = None) -> tuple[bytes, list[float]]:
    """Read a number of bytes, at most `rate` a second; return them, and when each part came."""
    sock.settimeout(TIMEOUT)
    data, times = bytearray(), [time.monotonic()]
    while len(data) < size:
        part = sock.recv(5_000 if rate else 1 << 20)
        assert part, "the server hung up"
        data += part
        times.append(time.monotonic())
        if rate:
            time.sleep(max(0, times[0] + len(data) / rate - time.monotonic()))
    return bytes(data), times


# A subscriber that keeps up loses nothing, however many there are.


def test_ten_subscribers_lose_nothing(server: Script, join: Join) -> None:
    peer = join(server.ports, subscribers=10)
    count = 10_000
    poller = zmq.Poller()
    due: dict[Sock, int] = dict.fromkeys(peer.subs, 0)
    for sub in peer.subs:
        poller.register(sub, zmq.POLLIN)
    with peer.pushing([line_of("k", str(number)) for number in range(count)]):
        while any(number < count for number in due.values()):
            ready = poller.poll(1_000 * TIMEOUT)
            assert ready
            for sub, _ in ready:
                with contextlib.suppress(zmq.Again):
                    while True:
                        assert sub.recv(zmq.NOBLOCK) == message_of("k", str(due[sub]))
                        due[sub] += 1


@slow
def test_a_hundred_subscribers_lose_nothing(server: Script) -> None:
    lines, messages = numbered(20_000)
    selector = selectors.DefaultSelector()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            sub = stack.enter_context(zmtp.connect(server.ports[1], b"SUB"))
            selector.register(sub, selectors.EVENT_READ, [0])
        time.sleep(1)  # until the last subscription is in effect
        push = stack.enter_context(zmtp.connect(server.ports[0], b"PUSH"))
        stack.enter_context(sending(push, lines))
        complete = 0
        while complete < 100:
            ready = selector.select(TIMEOUT)
            assert ready
            for key, _ in ready:
                sock, position = key.fileobj, key.data[0]
                assert isinstance(sock, socket.socket)
                data = sock.recv(1 << 20)
                assert messages.startswith(data, position)
                key.data[0] += len(data)
                complete += key.data[0] == len(messages)


# A slow subscriber makes the chat go at its pace, and loses nothing either.


@pytest.mark.parametrize(
    ("rate", "count"), [(20_000, 30_000), pytest.param(3_000, 36_000, marks=slow)]
)
def test_a_slow_subscriber_loses_nothing(server: Script, rate: int, count: int) -> None:
    """For the slower one, the server waits 0.9 seconds at a time."""
    lines, messages = numbered(count)
    with (
        zmtp.connect(server.ports[1], b"SUB") as sub,
        zmtp.connect(server.ports[0], b"PUSH") as push,
    ):
        sub.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        with sending(push, lines):
            assert read(sub, len(messages), rate * len(messages) / count)[0] == messages
    assert "stalled" not in server.stderr


def test_a_subscriber_that_rests_loses_nothing(server: Script) -> None:
    lines, messages = numbered(60_000)
    with (
        zmtp.connect(server.ports[1], b"SUB") as sub,
        zmtp.connect(server.ports[0], b"PUSH") as push,
    ):
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        data = b""
        with sending(push, lines):
            while len(data) < len(messages):
                data += read(sub, min(1 << 20, len(messages) - len(data)))[0]
                time.sleep(0.5)  # the rest
        assert data == messages
    assert "stalled" not in server.stderr


@slow
def test_a_subscriber_behind_a_slow_link_loses_nothing(
    start_server: StartServer, network: Network
) -> None:
    server = start_server(before=network.server_host.command())
    lines, messages = numbered(20_000)
    address = network.server_host.address
    network.rate, network.delay = 1_000_000, 0.02
    with network.client_host.inside():
        sub = zmtp.connect(server.ports[1], b"SUB", address)
    with network.server_host.inside():
        push = zmtp.connect(server.ports[0], b"PUSH")
    with sub, push:
        time.sleep(1)  # until the subscription is in effect
        with sending(push, lines):
            assert read(sub, len(messages))[0] == messages
    assert "stalled" not in server.stderr


# A stalled subscriber delays the chat by 2 seconds, once. For 20 seconds from then on, another one
# delays it by 0.05 seconds. The other subscribers lose nothing meanwhile.


def delays(server: Script, pauses: Sequence[float]) -> list[list[float]]:
    """Have a subscriber stall after each pause, and then lines come.

    Return the delays that another subscriber notices, of half a second or more.
    """
    lines, messages = numbered(6_000, "x" * 500)
    found = []
    with contextlib.ExitStack() as stack:
        sub = stack.enter_context(zmtp.connect(server.ports[1], b"SUB"))
        push = stack.enter_context(zmtp.connect(server.ports[0], b"PUSH"))
        for pause in pauses:
            time.sleep(pause)
            stack.enter_context(zmtp.connect(server.ports[1], b"SUB"))
            time.sleep(zmtp.SUBSCRIPTION_DELAY)
            with sending(push, lines):
                data, times = read(sub, len(messages))
            assert data == messages
            gaps = [later - earlier for earlier, later in pairwise(times)]
            found.append([gap for gap in gaps if gap > 0.5])
    return found


def test_a_stalled_subscriber_delays_the_chat_once(server: Script) -> None:
    (first,), *others = delays(server, [0, 0, 0])
    assert 1.9 < first < 2.5
    assert others == [[], []]
    server.wait_stderr(STALLED + "\n")


@slow
def test_twenty_seconds_later_a_stalled_subscriber_delays_the_chat_again(server: Script) -> None:
    (first,), others, (last,) = delays(server, [0, 0, 20])
    assert round(first) == round(last) == 2
    assert others == []


def test_a_stalled_subscriber_that_reads_again_receives_what_is_new(
    server: Script, join: Join
) -> None:
    lines, messages = numbered(6_000, "x" * 500)
    peer = join(server.ports)
    with (
        zmtp.connect(server.ports[1], b"SUB") as stalled,
        zmtp.connect(server.ports[0], b"PUSH") as push,
    ):
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        with sending(push, lines):
            for _ in range(6_000):
                peer.receive()
        server.wait_stderr(STALLED)
        queue = zmtp.receive_until_quiet(stalled)[0]
        peer.chat("new")
        new = zmtp.frame(message_of("k", "new"))
        received = queue[: -len(new)] if queue.endswith(new) else queue
        assert messages.startswith(received)
        assert 2_000 <= len(received) * 6_000 / len(messages) < 6_000
        assert zmtp.receive_until_quiet(stalled)[0] == new


class Stallers:
    """Subscribers, all in one thread, each of which reads for a while and then stalls, in turn."""

    def __init__(self, port: int, count: int, seconds: float) -> None:
        self.subs = [zmtp.connect(port, b"SUB") for _ in range(count)]
        self.seconds = seconds
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        buffer = bytearray(1 << 20)
        for sub in self.subs:
            sub.setblocking(False)
        while not self.ended.wait(0.002):
            for number, sub in enumerate(self.subs):
                phase = time.monotonic() / self.seconds + number / len(self.subs)
                with contextlib.suppress(OSError):
                    while phase % 1 < 0.5 and sub.recv_into(buffer) == len(buffer):
                        pass

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        for sub in self.subs:
            sub.close()


@slow
@pytest.mark.parametrize(("count", "seconds"), [(20, 5), (100, 30)])
def test_subscribers_that_stall_in_turn_delay_the_chat_little(
    server: Script, join: Join, count: int, seconds: float
) -> None:
    peer = join(server.ports)
    peer.sub.set(zmq.SUBSCRIBE, b"k> \x1b[36mround trip")
    peer.sub.set(zmq.UNSUBSCRIBE, b"")
    waits: list[float] = []
    with Stallers(server.ports[1], count, 6), zmtp.flood(server.ports[0], line_of("k", "x" * 100)):
        server.wait_stderr(STALLED)  # The first one costs two seconds.
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            waits.append(peer.round_trip())
    assert statistics.median(waits) < 0.1
    assert sum(wait for wait in waits if wait > 0.1) < seconds / 3


# A subscriber that takes nothing, or has vanished, is cut off after some 20 seconds.


@slow
@LINUX
def test_stalled_subscribers_are_cut_off_and_their_queue_is_freed(
    server: Script, join: Join
) -> None:
    peer = join(server.ports)
    files = server.open_files()
    lines = [line_of("k", "x" * 16_000)] * 4_000

    def stall_six() -> list[socket.socket]:
        subs = [zmtp.connect(server.ports[1], b"SUB") for _ in range(6)]
        with peer.pushing(lines):
            for _ in lines:
                peer.receive()
        return subs

    before = server.memory()
    subs = stall_six()
    began = time.monotonic()
    grown = server.memory() - before
    # The queue that the six share, that of the other subscriber, a client's, and the rest, in MB.
    bound = 32 + 32 + 4 + 12
    assert 30 < grown < bound
    assert server.open_files() == files + 6
    wait_for(lambda: server.open_files() == files, server.open_files)
    assert 10 < time.monotonic() - began < 25
    peer.round_trip()
    subs += stall_six()
    assert server.memory() - before < bound  # They use the memory of the first six.
    for sub in subs:
        sub.close()


@slow
@pytest.mark.parametrize("flowing", [True, False], ids=["in a flow", "silent"])
def test_a_vanished_subscriber_is_cut_off(
    start_server: StartServer, network: Network, flowing: bool
) -> None:
    server = start_server(before=network.server_host.command())
    files = server.open_files()
    with network.server_host.inside():
        push = zmtp.connect(server.ports[0], b"PUSH")
    with network.client_host.inside():
        sub = zmtp.connect(server.ports[1], b"SUB", network.server_host.address)
    with push, sub:
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        push.sendall(zmtp.frame(line_of("k", "hello")))
        assert zmtp.receive_until_quiet(sub)[0].endswith(zmtp.frame(message_of("k", "hello")))
        assert server.open_files() == files + 2
        network.up = False
        began = time.monotonic()
        while server.open_files() > files + 1 and time.monotonic() - began < 40:
            if flowing:
                push.sendall(zmtp.frame(line_of("k", "x" * 1_000)))
            time.sleep(0.05)
    assert 15 < time.monotonic() - began < 27
