"""How the server ends at a signal, and what it still delivers."""

import contextlib
import itertools
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmtp
from peers import Join, line_of, message_of
from processes import LINUX, POSIX, TIMEOUT, Script, Start, StartServer, after, wait_for

pytestmark = POSIX
slow = pytest.mark.slow


@contextlib.contextmanager
def ending(server: Script, seconds: float = 3) -> Iterator[None]:
    """Terminate a server; it has to end within some seconds, with status 0."""
    began = time.monotonic()
    server.process.terminate()
    yield
    assert server.wait() == 0
    assert time.monotonic() - began < seconds


# README, More differences: it goes on for one second, lets subscribers receive what is queued, and
# exits within three seconds
@pytest.mark.parametrize("names", ["SIGINT", "SIGTERM", "SIGHUP", "SIGTERM SIGHUP SIGINT"])
def test_lines_that_had_arrived_are_published(server: Script, join: Join, names: str) -> None:
    def has_ended_after_more_signals() -> bool:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            server.process.send_signal(signum)
        return server.process.poll() is not None

    peer = join(server.ports)
    server.process.send_signal(signal.SIGSTOP)
    for number in range(900):  # as many as PUSH and PULL hold
        peer.push.send(line_of("k", str(number)))
    began = time.monotonic()
    for name in (*names.split(), "SIGCONT"):
        server.process.send_signal(getattr(signal, name))
    for number in range(900):
        assert peer.receive() == message_of("k", str(number))
    peer.chat("The chat goes on.")
    wait_for(has_ended_after_more_signals, lambda: "it still runs")
    assert server.wait() == 0
    assert time.monotonic() - began < 3
    assert server.stderr.count("\n") == 1


@slow
@pytest.mark.parametrize("stalled", [1, 8])
def test_they_are_published_although_subscribers_stall(
    server: Script, join: Join, stalled: int
) -> None:
    peer, pushed = join(server.ports), itertools.count()

    def push() -> None:
        peer.push.send(line_of("k", f"{next(pushed)} {'x' * 10_000}"))

    def chat_waits() -> bool:
        push()
        return not peer.sub.poll(200)

    with contextlib.ExitStack() as stack:
        for _ in range(stalled):  # Their queues become full one after the other.
            stack.enter_context(zmtp.subscribers(server.ports[1]))
            for _ in range(100):
                push()
                peer.receive()
        while not chat_waits():
            peer.receive()
        texts = [str(number) for number in range(900)]
        for text in texts:
            peer.push.send(line_of("k", text))
        with ending(server):
            assert b"x" in peer.receive()
            assert [peer.receive() for _ in texts] == [message_of("k", text) for text in texts]


@pytest.mark.parametrize("stalled", [0, *(pytest.param(count, marks=slow) for count in (1, 20))])
def test_a_server_in_a_flood_ends_within_three_seconds(server: Script, stalled: int) -> None:
    line = line_of("k", "x" * 10_000)
    with zmtp.subscribers(server.ports[1], stalled), zmtp.flood(server.ports[0], line):
        time.sleep(0.3)  # The server waits for stalled subscribers by now.
        with ending(server):
            while server.process.poll() is None:  # The shutdown does not begin anew each time.
                server.process.send_signal(signal.SIGINT)
    assert "Traceback" not in server.stderr


@slow
def test_a_subscriber_may_stall_while_the_server_is_ending(server: Script) -> None:
    lines = zmtp.frame(line_of("k", "x" * 16_000)) * 100
    with zmtp.subscribers(server.ports[1]), zmtp.connect(server.ports[0], b"PUSH") as push:
        push.sendall(lines)
        began = time.monotonic()
        with ending(server, 3.2), contextlib.suppress(OSError):
            for number in itertools.count(1):  # A thousand a second fill its queue in two.
                time.sleep(max(0, began + number / 10 - time.monotonic()))
                push.sendall(lines)


# README, Output and exit status: After Ctrl-C or SIGTERM, the server goes on for one second, so
# that lines that have arrived are published. (If that takes longer, as it does for 20,000 lines
# with 300 subscribers, the last ones are lost. In this second, a slow subscriber has less time to
# catch up. If a dozen of them stall one after the other, some of these lines are lost, too.) Then
# subscribers have at least one more second to receive what is queued for them.
def test_a_subscriber_has_two_seconds_to_receive_its_messages(server: Script) -> None:
    lines, messages = zmtp.numbered(900, "x" * 1_000)
    with zmtp.connect(server.ports[0], b"PUSH") as push, zmtp.subscribers(server.ports[1]) as [sub]:
        sub.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        push.sendall(lines)
        with ending(server):
            for pause in (1.2, 0.4):  # After a second, the server only waits for the subscriber.
                time.sleep(pause)
                server.process.send_signal(signal.SIGINT)
            assert zmtp.receive_until_quiet(sub, TIMEOUT) == (messages, True)


@slow
def test_subscribers_receive_the_same_messages_of_a_flood(server: Script) -> None:
    """The chat goes at the pace of the slower one, for which the server nearly always waits."""
    lines, messages = zmtp.numbered(150_000, "x" * 40)

    def read(sub: socket.socket, pause: float) -> bytes:
        received = bytearray()
        while more := sub.recv(65_536):
            received += more
            time.sleep(pause)
        return bytes(received)

    with (
        zmtp.connect(server.ports[0], b"PUSH") as push,
        zmtp.subscribers(server.ports[1], 2) as subs,
        ThreadPoolExecutor() as pool,
        zmtp.sending(push, lines),
    ):
        received = pool.map(read, subs, (0, 0.03))
        time.sleep(1)  # in which the queue of the slower one becomes full
        with ending(server):
            quick, slower = received
    assert len(quick) == len(slower) < len(messages)
    assert messages.startswith(quick) and messages.startswith(slower)
    assert "stalled" not in server.stderr


# README, Output and exit status: The exit status is 0 on success
@LINUX
def test_a_signal_may_come_at_the_start(start: Start) -> None:
    def starting(delay: float) -> Script:
        script = start("server.py", "--pull-port", 0, "--pub-port", 0)
        wait_for(lambda: script.catches(signal.SIGHUP), lambda: script.stderr)
        time.sleep(delay)
        script.process.terminate()
        return script

    for script in [starting(0), starting(0.01), starting(0.02)]:
        assert script.wait() == 0
        assert re.fullmatch(r"(server\.py: ready: PULL is bound .*\n)?", script.stderr)


# README, Recipes: nohup python server.py &
def test_a_signal_that_is_ignored_stays_ignored(start_server: StartServer, join: Join) -> None:
    server = start_server(before=after('trap "" HUP INT'))
    peer = join(server.ports)
    for signum in (signal.SIGHUP, signal.SIGINT):
        server.process.send_signal(signum)
    time.sleep(1.3)  # A server that shuts down has ended by now.
    peer.chat("still here")
    assert server.terminate() == 0
