"""README, "Slow subscribers": who loses messages, who does not, and how long the chat waits."""

import contextlib
import itertools
import math
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmtp
from network import Network
from peers import Join, line_of, message_of
from processes import LINUX, TIMEOUT, Script, StartServer, wait_for

slow = pytest.mark.slow

STALLED = "server.py: a subscriber stalled: it misses messages until half its queue is read\n"


def read(sock: socket.socket, size: int, rate: float = math.inf, part: int = 1 << 20) -> bytes:
    """Read `size` bytes, at most `rate` a second, and `part` at a time."""
    sock.settimeout(TIMEOUT)
    data, began = bytearray(), time.monotonic()
    while len(data) < size:
        received = sock.recv(min(part, size - len(data)))
        assert received, "the server hung up"
        data += received
        time.sleep(max(0, began + len(data) / rate - time.monotonic()))
    return bytes(data)


# README, More differences: the server slows down to the pace of its subscribers
# README, Slow subscribers: When a queue is full, the chat waits until half of it has been read, but
# not longer than a timeout, normally two seconds. A subscriber that manages this loses nothing, and
# the chat runs at its pace.
# README, Slow subscribers: With the normal timeout, reading 3,000 messages a second is enough.
@pytest.mark.parametrize(
    ("subscribers", "count", "rate", "part"),
    [
        pytest.param(10, 20_000, math.inf, 1 << 20, id="at any speed"),
        pytest.param(100, 20_000, math.inf, 1 << 20, marks=slow, id="a hundred at any speed"),
        pytest.param(1, 30_000, 20_000, 5_000, id="steadily"),
        pytest.param(1, 60_000, 30_000, 500_000, id="with rests"),
        pytest.param(1, 40_000, 3_000, 5_000, marks=slow, id="at the slowest pace"),
    ],
)
def test_subscribers_that_keep_reading_lose_nothing(
    server: Script, subscribers: int, count: int, rate: float, part: int
) -> None:
    """Each reads `rate` messages a second."""
    lines, messages = zmtp.numbered(count, "x" * 20)  # Less than 30 bytes would need a higher rate.
    size = len(messages)
    with (
        zmtp.connect(server.ports[0], b"PUSH") as push,
        zmtp.subscribers(server.ports[1], subscribers) as subs,
        zmtp.sending(push, lines),
        ThreadPoolExecutor(subscribers) as pool,
    ):
        readers = [pool.submit(read, sub, size, rate * size / count, part) for sub in subs]
        assert all(reader.result() == messages for reader in readers)
    assert "stalled" not in server.stderr


# README, Slow subscribers: The server queues up to 2,000 messages for each subscriber.
# README, Slow subscribers: It has delayed the chat by up to two seconds, and now misses messages
# until it has read half of its queue.
# README, More differences: each stall delays the chat by two seconds at most; then the subscriber
# misses messages; the server logs it
def test_a_stalled_subscriber_loses_messages_until_half_is_read(server: Script, join: Join) -> None:
    peer = join(server.ports)
    lines, messages = zmtp.numbered(4_000, "x" * 1_000)
    size = len(messages) // 4_000
    with zmtp.connect(server.ports[0], b"PUSH") as push, zmtp.subscribers(server.ports[1]) as [sub]:
        # A buffer of a fixed size: the kernel might let it grow, and take half of the queue.
        sub.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        with zmtp.sending(push, lines):
            for _ in range(4_000):
                peer.receive()
        server.wait_stderr(STALLED)
        # Besides those in its queue, it has some 300 messages in the buffers of TCP.
        received = read(sub, 200 * size)
        time.sleep(0.1)
        peer.chat("lost")
        received += read(sub, 1_400 * size)
        time.sleep(0.1)
        peer.chat("new")
        received += zmtp.receive_until_quiet(sub)[0]
    new = zmtp.frame(message_of("k", "new"))
    old = received.removesuffix(new)
    assert old != received and messages.startswith(old)
    assert 2_000 <= len(old) / size < 2_700


# README, Slow subscribers: Each stall, by any subscriber, halves it, down to 50 ms.
# README, Slow subscribers: After 20 seconds without a stall, the timeout is two seconds again.
@slow
@pytest.mark.parametrize(("pause", "second_delay"), [(0, 1), (20, 2)])
def test_stalls_halve_the_wait(server: Script, join: Join, pause: float, second_delay: int) -> None:
    peer = join(server.ports)
    lines = [line_of("k", "x" * 500)] * 6_000
    delays = []
    with contextlib.ExitStack() as stack:
        for seconds in (0, pause):
            time.sleep(seconds)
            stack.enter_context(zmtp.subscribers(server.ports[1]))
            times = []
            with peer.pushing(lines):
                for _ in lines:
                    peer.receive()
                    times.append(time.monotonic())
            gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
            delays.append([round(gap) for gap in gaps if gap > 0.5])
    assert delays == [[2], [second_delay]]


# README, What it adds to the original: A slow subscriber gets time to catch up.
# README, Slow subscribers: So if many stall, the first six delay the chat by about four seconds in
# total (2 + 1 + ½ + …), and each one after that by 50 ms.
@slow
def test_many_subscribers_may_stall_again_and_again(server: Script, join: Join) -> None:
    peer = join(server.ports)
    peer.receive_only_round_trips()
    line, waits = line_of("k", "x" * 100), []
    with zmtp.subscribers(server.ports[1], 20) as subs, zmtp.flood(server.ports[0], line):
        server.wait_stderr(STALLED)  # The first one costs two seconds.
        for sub in subs * 8:
            sub.recv(1 << 23)  # It reads half of its queue, and stalls again.
            waits.append(peer.round_trip())
    assert statistics.median(waits) < 0.1
    assert max(waits) < 2.2  # a second, a half, a quarter, ... if those stall one after the other


# README, Slow subscribers: A subscriber whose host stops answering is disconnected after about 20
# seconds, and its queue is freed.
@slow
@pytest.mark.parametrize("flowing", [True, False], ids=["in a flow", "silent"])
def test_a_vanished_subscriber_is_disconnected(
    start_server: StartServer, network: Network, flowing: bool
) -> None:
    server = start_server(before=network.server_host.command())
    files = server.open_files()
    with network.server_host.inside():
        push = zmtp.connect(server.ports[0], b"PUSH")
    address = network.server_host.address
    with push, network.client_host.inside(), zmtp.subscribers(server.ports[1], host=address):
        network.become(loss=1)
        began = time.monotonic()
        while server.open_files() > files + 1 and time.monotonic() - began < 40:
            if flowing:
                push.sendall(zmtp.frame(line_of("k", "x" * 1_000)))
            time.sleep(0.05)
    assert 15 < time.monotonic() - began < 27


@slow
@LINUX
def test_the_queue_of_a_stalled_subscriber_is_freed(server: Script, join: Join) -> None:
    peer = join(server.ports)
    files, before = server.open_files(), server.memory()
    lines = [line_of("k", "x" * 16_000)] * 4_000
    for _ in range(2):  # The second six use the memory of the first ones.
        with zmtp.subscribers(server.ports[1], 6):
            with peer.pushing(lines):
                for _ in lines:
                    peer.receive()
            began = time.monotonic()
            # In MB: the queue that six share, the other subscriber's, a sender's, and the rest.
            assert 30 < server.memory() - before < 32 + 32 + 4 + 12
            assert server.open_files() == files + 6
            wait_for(lambda: server.open_files() == files, server.open_files)
            assert 10 < time.monotonic() - began < 25
            peer.round_trip()
