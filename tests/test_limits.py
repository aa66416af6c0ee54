"""README, "Limits": floods, garbage, strangers and few files harm neither the chat nor its host."""

import contextlib
import itertools
import signal
import socket
import statistics
import time
from pathlib import Path

import pytest
import zmq
import zmq.auth
import zmtp
from peers import Join, Peer, line_of, message_of
from processes import LINUX, POSIX, TIMEOUT, Script, Start, StartServer, after, wait_for

import server as server_script

slow = pytest.mark.slow
LONGEST = b'{"user":"k","message":"%s"}' % (b"x" * 16_359)


@pytest.fixture(params=[False, True], ids=["no key", "a key"])
def server_and_peer(
    request: pytest.FixtureRequest, start_server: StartServer, join: Join, tmp_path: Path
) -> tuple[Script, Peer]:
    """Give a server, without a key and with one, and a client of it."""
    server = start_server(*(["--key", tmp_path / "chat"] if request.param else []))
    key = zmq.auth.load_certificate(tmp_path / "chat.key")[0] if request.param else None
    return server, join(server.ports, key)


# README, Differences from the original: | more than 16,384 bytes | accepts it | disconnects the
# sender |
# README, Limits: Lines and messages are at most 16,384 bytes long.
# README, Limits: A subscription to a prefix, instead of everything, can be at most 118 bytes long
# (with `--key`, 502 bytes).
# README, More differences: the server disconnects any other program that sends one
def test_a_client_that_sends_more_is_disconnected(server_and_peer: tuple[Script, Peer]) -> None:
    _, peer = server_and_peer
    longest = 502 if peer.sub.mechanism == zmq.CURVE else 118
    monitors = [sock.get_monitor_socket(zmq.EVENT_DISCONNECTED) for sock in (peer.push, peer.sub)]
    peer.push.send(LONGEST)
    assert peer.receive() == message_of("k", "x" * 16_359)
    peer.sub.subscribe(b"x" * longest)
    peer.chat("still connected")
    assert not any(monitor.poll(100) for monitor in monitors)
    peer.push.send(LONGEST + b" ")
    peer.sub.subscribe(b"x" * (longest + 1))
    assert all(monitor.poll(1_000 * TIMEOUT) for monitor in monitors)


# README, Limits: The queues that the server keeps are bounded: 2,000 messages for each subscriber
# (at most 33 MB; a message that is queued for several is stored once), and 256 lines from each
# sender (at most 4.2 MB).
@slow
@LINUX
def test_fifty_senders_of_long_lines_and_a_subscriber_take_their_share(server: Script) -> None:
    before = server.memory()
    with zmtp.subscribers(server.ports[1]), contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(zmtp.flood(server.ports[0], LONGEST))
        server.wait_stderr("stalled")  # By now it has waited for the subscriber.
    grown = server.memory() - before
    assert 100 < grown < 32 + 50 * 4.2 + 20  # the subscriber's queue, the senders', and the rest


# README, Limits: libzmq limits neither the number of subscriptions nor the number of frames in a
# ZeroMQ message
def test_a_flood_of_subscriptions_does_not_delay_the_chat(server: Script, join: Join) -> None:
    peer = join(server.ports)
    topics = [bytes([letter]) * 118 for letter in range(100)]
    frames = b"".join(zmtp.frame(b"\1" + topic) + zmtp.frame(b"\0" + topic) for topic in topics)
    with zmtp.connect(server.ports[1], b"SUB") as stranger, zmtp.sending(stranger, frames, True):
        waits = [peer.round_trip() for _ in range(500)]
    assert statistics.median(waits) < 0.02


# README, Limits: The number of connections is limited only by the hard limit on open files (`ulimit
# -Hn`). Beyond it, new connections are refused, and the chat goes on.
@LINUX
def test_many_clients_may_connect_at_once(start_server: StartServer) -> None:
    server = start_server(before=after("ulimit -S -n 100"))
    server.process.send_signal(signal.SIGSTOP)  # All of them wait to be accepted.
    with contextlib.ExitStack() as stack:
        for port in server.ports * 300:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=0.5))
        server.process.send_signal(signal.SIGCONT)
        sock.settimeout(10)
        assert sock.recv(10)


@LINUX
def test_more_connections_than_files_do_no_harm(start_server: StartServer, join: Join) -> None:
    server = start_server(before=after("ulimit -n 30"))
    peer = join(server.ports)
    with contextlib.ExitStack() as stack:
        for port in server.ports * 50:
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        for _ in range(100):
            assert peer.round_trip() < 1
    join(server.ports).round_trip()  # There is room again.


@POSIX
def test_of_unlimited_files_macos_allows_only_some(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    monkeypatch.setattr("resource.RLIM_INFINITY", -1)
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, -1))
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.append(new))
    server_script.raise_file_limit()
    assert limits == [(10_240, -1)]


@POSIX
@pytest.mark.parametrize(
    "limit", [8, 10, *(pytest.param(n, marks=slow) for n in range(8, 40) if n not in (8, 10))]
)
def test_too_few_open_files_are_reported_in_one_line(start: Start, limit: int) -> None:
    script = start("server.py", "--pull-port=0", "--pub-port=0", before=after(f"ulimit -n {limit}"))
    script.wait_stderr("\n")
    if limit > 10 and "bound" in script.stderr:
        assert script.terminate() == 0
    else:
        assert script.wait() == 1
        assert "Too many open files" in script.stderr
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


# README, Limits: A [key](#keys) or [ssh](#ssh) keeps strangers out
# README, Limits: Floods of invalid data, subscriptions or control characters delay a message by
# about a second at worst, if they come from fewer than about 200 connections.
@LINUX
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line_of("k", "aa\x7f" * 2_700), id="valid"),
        pytest.param(line_of("k", "\x7f" * 16_000), id="too long", marks=slow),
        pytest.param(b"\n" * server_script.MAX_SIZE, id="line ends"),
        pytest.param(b"\xff" * server_script.MAX_SIZE, id="not UTF-8", marks=slow),
    ],
)
def test_a_flood_of_control_characters_hardly_delays_the_chat(
    server: Script, join: Join, line: bytes
) -> None:
    peer, used = join(server.ports), []
    peer.receive_only_round_trips()
    with zmtp.flood(server.ports[0], line), zmtp.flood(server.ports[0], line):
        peer.round_trip()
        for _ in range(3):
            before = server.cpu_seconds()  # On a busy machine, the time of the clock says little.
            peer.round_trip()
            used.append(server.cpu_seconds() - before)
    assert min(used) < 0.6  # Without the table of escapes, it is 0.8 or more.


STRANGERS = [
    b"",
    b"GET / HTTP/1.0\r\n\r\n",
    bytes(range(256)) * 20,
    zmtp.GREETING + bytes(range(256)) * 20,
    zmtp.GREETING + zmtp.ready(b"SUB")[:9],
    zmtp.GREETING + zmtp.ready(b"SUB") + b"\2" + b"\xff" * 8 + b"x" * 1_000,  # a frame without end
]


@LINUX
def test_strangers_do_not_disturb_the_chat(server_and_peer: tuple[Script, Peer]) -> None:
    server, peer = server_and_peer
    files = server.open_files()
    with contextlib.ExitStack() as stack:
        for data, port, leaves in itertools.product(STRANGERS * 10, server.ports, (True, False)):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.sendall(data)
            if leaves:
                zmtp.reset(sock)
        for _ in range(20):
            assert peer.round_trip() < 1
        used = server.cpu_seconds()
        assert not peer.sub.poll(500)  # half a second in which nothing happens
        assert server.cpu_seconds() - used < 0.1
    wait_for(lambda: server.open_files() == files, server.open_files)
    peer.round_trip()
