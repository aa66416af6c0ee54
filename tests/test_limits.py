"""README, "Limits": floods, garbage, strangers and few files harm neither the chat nor its host."""

import contextlib
import functools
import re
import selectors
import signal
import socket
import statistics
import sys
import threading
import time

import pytest
import zmtp
from peers import Join, line_of, message_of
from processes import LINUX, POSIX, Script, Start, StartServer, wait_for

slow = pytest.mark.slow
LONGEST = b'{"user":"k","message":"%s"}' % (b"x" * 16_359)


def memory(server: Script) -> float:
    """Return the most memory that the server has used, in MB, where that can be read."""
    return server.memory() if sys.platform == "linux" else 0


# A line has 16,384 bytes at most. The server hangs up at a longer one before it takes it all.


@pytest.mark.parametrize("line", [LONGEST + b" ", b"x" * 50_000_000], ids=["longer", "50 MB"])
def test_the_server_hangs_up_at_a_longer_line(server: Script, join: Join, line: bytes) -> None:
    assert len(LONGEST) == 16_384
    peer = join(server.ports)
    peer.push.send(LONGEST)
    assert peer.receive() == message_of("k", "x" * 16_359)
    before = memory(server)
    with zmtp.connect(server.ports[0], b"PUSH") as stranger:
        with contextlib.suppress(OSError):
            stranger.sendall(zmtp.frame(line))
        wait_for(functools.partial(zmtp.hung_up, stranger), lambda: "connected")
    peer.chat("next")
    assert memory(server) - before < 2


# Of each client, 256 lines wait at most: 4 MB of the longest.


@slow
@LINUX
def test_fifty_clients_of_long_lines_take_4_mb_each(server: Script) -> None:
    before = server.memory()
    lines = zmtp.frame(LONGEST) * 20
    with contextlib.ExitStack() as stack:
        # As this never reads, all lines wait for it.
        stack.enter_context(zmtp.connect(server.ports[1], b"SUB"))
        selector = selectors.DefaultSelector()
        for _ in range(50):
            push = stack.enter_context(zmtp.connect(server.ports[0], b"PUSH"))
            push.setblocking(False)
            selector.register(push, selectors.EVENT_WRITE, [lines])
        until = time.monotonic() + 3  # longer than the server waits for the subscriber
        while time.monotonic() < until:
            for key, _ in selector.select(0.1):
                sock, rest = key.fileobj, key.data[0]
                assert isinstance(sock, socket.socket)
                with contextlib.suppress(BlockingIOError):
                    key.data[0] = rest[sock.send(rest) :] or lines
        grown = server.memory() - before
    assert 100 < grown < 32 + 50 * 4.2 + 20  # the subscriber's queue, the clients', and the rest


# A subscription has 512 bytes at most. One is taken between two messages, so that a flood of them
# does not delay the chat.


def test_the_server_hangs_up_at_a_longer_subscription(server: Script, join: Join) -> None:
    peer = join(server.ports)
    with zmtp.connect(server.ports[1], b"SUB") as stranger:
        stranger.sendall(zmtp.frame(b"\1" + b"x" * 511))
        peer.chat("next")
        assert not zmtp.hung_up(stranger)
        stranger.sendall(zmtp.frame(b"\1" + b"x" * 512))
        wait_for(lambda: zmtp.hung_up(stranger), lambda: "connected")
    before = memory(server)
    with zmtp.connect(server.ports[1], b"SUB") as stranger:
        with contextlib.suppress(OSError):
            for number in range(300):
                stranger.sendall(zmtp.frame(b"\1" + b"%05d" % number * 12_000))
        wait_for(lambda: zmtp.hung_up(stranger), lambda: "connected")
    peer.chat("next")
    assert memory(server) - before < 2


def test_a_flood_of_subscriptions_does_not_delay_the_chat(server: Script, join: Join) -> None:
    peer = join(server.ports)
    topics = [bytes([letter]) * 500 for letter in range(100)]
    frames = b"".join(zmtp.frame(b"\1" + topic) + zmtp.frame(b"\0" + topic) for topic in topics)
    strangers = [zmtp.connect(server.ports[1], b"SUB") for _ in range(3)]
    senders = [
        threading.Thread(target=zmtp.send_until_full, args=(stranger, frames))
        for stranger in strangers
    ]
    for sender in senders:
        sender.start()
    until = time.monotonic() + 1.5
    waits = []
    while time.monotonic() < until:
        waits.append(peer.round_trip())
    for stranger, sender in zip(strangers, senders, strict=True):
        with contextlib.suppress(OSError):
            stranger.shutdown(socket.SHUT_RDWR)
        sender.join()
        zmtp.reset(stranger)
    assert statistics.median(waits) < 0.02


@slow
@LINUX
@pytest.mark.parametrize("size", [500, 1])
def test_a_flood_of_subscriptions_may_be_reset(server: Script, join: Join, size: int) -> None:
    files = server.open_files()
    data = b"".join(zmtp.frame(b"\1%d".ljust(size, b"x") % number) for number in range(2_000))
    for _ in range(3):
        stranger = zmtp.connect(server.ports[1], b"SUB")
        zmtp.send_until_full(stranger, data)
        zmtp.reset(stranger)
    if size > 1:  # An idle server would be busy for minutes with so many short ones.
        wait_for(lambda: server.open_files() == files, server.open_files)
    peer = join(server.ports)
    files += 2
    wait_for(lambda: peer.round_trip() and server.open_files() == files, server.open_files)


# Subscribers that leave take nothing with them, and leave nothing behind.


def test_subscribers_may_leave_in_a_flood_of_long_lines(server: Script, join: Join) -> None:
    with zmtp.flood(server.ports[0], line_of("k", "x" * 10_000)):
        for _ in range(40):
            with zmtp.connect(server.ports[1], b"SUB") as sub:
                for _ in range(20):
                    sub.recv(100_000)
    join(server.ports).round_trip()
    assert server.process.poll() is None


@slow
@LINUX
def test_subscribers_that_come_and_go_leave_nothing(server: Script, join: Join) -> None:
    files = server.open_files()
    used = []
    for _ in range(3):
        for _ in range(1_000):
            zmtp.reset(zmtp.connect(server.ports[1], b"SUB"))
        wait_for(lambda: server.open_files() == files, server.open_files)
        time.sleep(0.6)  # in which the server is idle twice
        used.append(server.memory("VmRSS"))
    assert used[-1] - used[0] < 16  # MB: it is 22 if all are kept until the next line
    join(server.ports).round_trip()


# Strangers that speak something else, or nothing, change nothing.

READY = zmtp.ready(b"SUB")
STRANGERS = {
    "silent": b"",
    "HTTP": b"GET / HTTP/1.0\r\n\r\n",
    "TLS": b"\x16\3\1\2\0\1\0\1\xfc\3\3" + bytes(512),
    "half a greeting": zmtp.GREETING[:11],
    "a greeting and no more": zmtp.GREETING,
    "another mechanism": zmtp.greeting(b"CURVE"),
    "the wrong socket type": zmtp.GREETING + zmtp.ready(b"REP"),
    "half a command": zmtp.GREETING + READY[:9],
    "lengths that lie": zmtp.GREETING + b"\4\x19\5READY\x0bSocket-Type\xff\xff\xff\xffSUB",
    "a frame without end": zmtp.GREETING + READY + b"\2" + b"\xff" * 8 + b"x" * 1_000,
    "a huge frame announced": zmtp.GREETING + READY + b"\2\x7f" + bytes(7) + b"x" * 1_000,
    "noise": bytes(range(256)) * 20,
    "a greeting and noise": zmtp.GREETING + bytes(range(256)) * 20,
}


@LINUX
def test_strangers_change_nothing(server: Script, join: Join) -> None:
    peer = join(server.ports)
    files = server.open_files()
    with contextlib.ExitStack() as stack:
        for number, data in enumerate(list(STRANGERS.values()) * 20):
            port = server.ports[number % 2]
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.sendall(data)
            if number % 4 < 2:
                zmtp.reset(sock)
        for _ in range(20):
            assert peer.round_trip() < 1
        used = server.cpu_seconds()
        assert not peer.sub.poll(500)  # half a second in which nothing happens
        assert server.cpu_seconds() - used < 0.1
    wait_for(lambda: server.open_files() == files, server.open_files)
    peer.round_trip()


# Many clients may connect at once, more than the soft limit of open files. Where there are too few
# files, the server says so in one line, or refuses connections.


@LINUX
def test_many_clients_may_connect_at_once(start_server: StartServer) -> None:
    server = start_server(before=["sh", "-c", 'ulimit -S -n 100; exec "$@"', "sh"])
    server.process.send_signal(signal.SIGSTOP)  # All of them wait to be accepted.
    with contextlib.ExitStack() as stack:
        for number in range(600):
            sock = socket.create_connection(("127.0.0.1", server.ports[number % 2]), timeout=0.5)
            stack.enter_context(sock)
        server.process.send_signal(signal.SIGCONT)
        sock.settimeout(10)
        assert sock.recv(10)


@POSIX
@pytest.mark.parametrize(
    "limit", [8, 10, *(pytest.param(n, marks=slow) for n in range(6, 40) if n not in (8, 10))]
)
def test_too_few_open_files_are_reported_in_one_line(start: Start, limit: int) -> None:
    before = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"]
    script = start("server.py", "--pull-port", 0, "--pub-port", 0, before=before)
    script.wait_stderr("\n")
    if "bound" in script.stderr:
        assert limit > 10
        assert script.terminate() == 0
    else:
        assert script.wait() == 1
        assert re.fullmatch(
            r"server\.py: .*Too many open files.*; raise the limit of open files: ulimit -n\n",
            script.stderr,
        )
    assert script.stderr.count("\n") == 1


@LINUX
def test_more_connections_than_files_do_not_disturb_the_chat(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(before=["sh", "-c", 'ulimit -n 30; exec "$@"', "sh"])
    peer = join(server.ports)
    with contextlib.ExitStack() as stack:
        for number in range(100):
            port = server.ports[number % 2]
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        for _ in range(100):
            assert peer.round_trip() < 1
    join(server.ports).round_trip()  # There is room again.
