"""README, "Limits": floods, garbage, strangers and few files harm neither the chat nor its host."""

import contextlib
import functools
import re
import selectors
import signal
import socket
import statistics
import sys
import time
from pathlib import Path

import pytest
import zmq
import zmq.auth
import zmtp
from peers import Join, line_of, message_of
from processes import LINUX, POSIX, TIMEOUT, Script, Start, StartServer, wait_for

import server as server_script

slow = pytest.mark.slow
LONGEST = b'{"user":"k","message":"%s"}' % (b"x" * 16_359)


def limited(files: int, kind: str = "") -> list[str]:
    """Return the command that limits the open files of the command that follows it."""
    return ["sh", "-c", f'ulimit {kind} -n {files}; exec "$@"', "sh"]


# README, Limits: Lines and messages are at most 16,384 bytes long. The prefix that a SUB socket
# subscribes to is at most 502 bytes long. The server disconnects a client that sends more.
# README, Differences from the original: the server disconnects any other program that sends one


@pytest.mark.parametrize("keyed", [False, True])
def test_the_server_disconnects_those_who_send_more(
    start_server: StartServer, join: Join, tmp_path: Path, keyed: bool
) -> None:
    server = start_server(*(["--key", tmp_path / "chat"] if keyed else []))
    key = zmq.auth.load_certificate(tmp_path / "chat.key")[0] if keyed else None
    peer = join(server.ports, server_key=key)
    disconnected = [
        sock.get_monitor_socket(zmq.EVENT_DISCONNECTED) for sock in (peer.push, peer.sub)
    ]
    assert len(LONGEST) == 16_384
    peer.push.send(LONGEST)
    assert peer.receive() == message_of("k", "x" * 16_359)
    peer.sub.subscribe(b"x" * 502)
    peer.chat("still connected")
    assert not any(monitor.poll(100) for monitor in disconnected)
    peer.push.send(LONGEST + b" ")
    peer.sub.subscribe(b"x" * 503)
    assert all(monitor.poll(1_000 * TIMEOUT) for monitor in disconnected)


# README, Limits: The queues that the server keeps are bounded: 2,000 messages for each subscriber
# (at most 33 MB; a message that is queued for several is stored once), and 256 lines from each
# sender (at most 4 MB).


@pytest.mark.parametrize("kind", ["PUSH", "SUB"])
def test_what_is_too_long_takes_no_memory(server: Script, join: Join, kind: str) -> None:
    def memory() -> float:
        return server.memory() if sys.platform == "linux" else 0

    peer = join(server.ports)
    before = memory()
    with zmtp.connect(server.ports[kind == "SUB"], kind.encode()) as stranger:
        with contextlib.suppress(OSError):
            for number in range(500):
                stranger.sendall(zmtp.frame(b"\1" + b"%05d" % number * 12_000))
        wait_for(functools.partial(zmtp.hung_up, stranger), lambda: "connected")
    peer.chat("next")
    assert memory() - before < 2


@slow
@LINUX
def test_fifty_senders_of_long_lines_and_a_subscriber_take_their_share(server: Script) -> None:
    before = server.memory()
    lines = zmtp.frame(LONGEST) * 20
    with contextlib.ExitStack() as stack:
        stack.enter_context(zmtp.subscribers(server.ports[1]))  # All lines wait for it.
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
    assert 100 < grown < 32 + 50 * 4.2 + 20  # the subscriber's queue, the senders', and the rest


# README, Limits: libzmq limits neither the number of subscriptions nor the number of frames in a
# ZeroMQ message


def test_a_flood_of_subscriptions_does_not_delay_the_chat(server: Script, join: Join) -> None:
    peer = join(server.ports)
    topics = [bytes([letter]) * 500 for letter in range(100)]
    frames = b"".join(zmtp.frame(b"\1" + topic) + zmtp.frame(b"\0" + topic) for topic in topics)
    waits = []
    with zmtp.subscribers(server.ports[1], 3) as strangers, contextlib.ExitStack() as stack:
        for stranger in strangers:
            stack.enter_context(zmtp.sending(stranger, frames, repeat=True))
        until = time.monotonic() + 1
        while time.monotonic() < until:
            waits.append(peer.round_trip())
    assert statistics.median(waits) < 0.02


# README, Limits: The number of connections is limited only by the hard limit of open files (`ulimit
# -Hn`). Beyond it, new connections are refused, and the chat goes on.


@LINUX
def test_many_clients_may_connect_at_once(start_server: StartServer) -> None:
    server = start_server(before=limited(100, "-S"))
    server.process.send_signal(signal.SIGSTOP)  # All of them wait to be accepted.
    with contextlib.ExitStack() as stack:
        for number in range(600):
            sock = socket.create_connection(("127.0.0.1", server.ports[number % 2]), timeout=0.5)
            stack.enter_context(sock)
        server.process.send_signal(signal.SIGCONT)
        sock.settimeout(10)
        assert sock.recv(10)


@LINUX
def test_more_connections_than_files_do_not_disturb_the_chat(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(before=limited(30))
    peer = join(server.ports)
    with contextlib.ExitStack() as stack:
        for number in range(100):
            port = server.ports[number % 2]
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        for _ in range(100):
            assert peer.round_trip() < 1
    join(server.ports).round_trip()  # There is room again.


@POSIX
@pytest.mark.parametrize(
    ("hard", "raised"), [(4_096, 4_096), (-1, 10_240)], ids=["limited", "unlimited"]
)
def test_the_soft_limit_is_raised_and_the_hard_one_kept(
    monkeypatch: pytest.MonkeyPatch, hard: int, raised: int
) -> None:
    limits = []
    monkeypatch.setattr("resource.RLIM_INFINITY", -1)
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, hard))
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.append(new))
    server_script.allow_many_subscribers()
    assert limits == [(raised, hard)]


@POSIX
@pytest.mark.parametrize(
    "limit", [8, 10, *(pytest.param(n, marks=slow) for n in range(6, 40) if n not in (8, 10))]
)
def test_too_few_open_files_are_reported_in_one_line(start: Start, limit: int) -> None:
    script = start("server.py", "--pull-port", 0, "--pub-port", 0, before=limited(limit))
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


def test_subscribers_may_leave_in_a_flood_of_long_lines(server: Script, join: Join) -> None:
    with zmtp.flood(server.ports[0], line_of("k", "x" * 10_000)):
        for _ in range(20):
            with zmtp.connect(server.ports[1], b"SUB") as sub:
                for _ in range(20):
                    sub.recv(100_000)
    join(server.ports).round_trip()
    assert server.process.poll() is None


# README, Limits: Floods of garbage or subscriptions do not delay the chat.

READY = zmtp.ready(b"SUB")
STRANGERS = [
    b"",
    b"GET / HTTP/1.0\r\n\r\n",
    b"\x16\3\1\2\0\1\0\1\xfc\3\3" + bytes(512),  # TLS
    zmtp.GREETING[:11],
    zmtp.GREETING,
    zmtp.greeting(b"CURVE"),
    zmtp.GREETING + zmtp.ready(b"REP"),
    zmtp.GREETING + READY[:9],
    zmtp.GREETING + b"\4\x19\5READY\x0bSocket-Type\xff\xff\xff\xffSUB",  # a length that lies
    zmtp.GREETING + READY + b"\2" + b"\xff" * 8 + b"x" * 1_000,  # a frame without end
    zmtp.GREETING + bytes(range(256)) * 20,
    bytes(range(256)) * 20,
]


@LINUX
def test_strangers_that_speak_something_else_change_nothing(server: Script, join: Join) -> None:
    peer = join(server.ports)
    files = server.open_files()
    with contextlib.ExitStack() as stack:
        for number, data in enumerate(STRANGERS * 20):
            port = server.ports[number // len(STRANGERS) % 2]
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.sendall(data)
            if number // len(STRANGERS) % 4 < 2:
                zmtp.reset(sock)
        for _ in range(20):
            assert peer.round_trip() < 1
        used = server.cpu_seconds()
        assert not peer.sub.poll(500)  # half a second in which nothing happens
        assert server.cpu_seconds() - used < 0.1
    wait_for(lambda: server.open_files() == files, server.open_files)
    peer.round_trip()


# README, Limits: Names are not verified. Two people can use the same one.


def test_two_people_can_use_the_same_name(server: Script, join: Join) -> None:
    peer = join(server.ports)
    with zmtp.connect(server.ports[0], b"PUSH") as other:
        other.sendall(zmtp.frame(line_of("k", "as k")))
        assert peer.receive() == message_of("k", "as k")
    peer.chat("as k")
