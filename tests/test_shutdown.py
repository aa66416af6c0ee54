"""README, "Differences": how the server ends at a signal, and what it still delivers."""

import contextlib
import itertools
import re
import signal
import socket
import threading
import time

import pytest
import zmq
import zmtp
from peers import Join, line_of, message_of
from processes import LINUX, POSIX, TIMEOUT, Script, Start, StartServer, wait_for

pytestmark = POSIX
slow = pytest.mark.slow
each_signal = pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])

# README, Differences from the original: it publishes what it has received, within three seconds


@each_signal
def test_lines_that_had_arrived_are_published(server: Script, join: Join, name: str) -> None:
    peer = join(server.ports)
    closed = peer.push.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    server.process.send_signal(signal.SIGSTOP)
    for number in range(900):  # as many as PUSH and PULL hold
        peer.push.send(line_of("k", str(number)))
    server.process.send_signal(getattr(signal, name))
    server.process.send_signal(signal.SIGCONT)
    for number in range(900):
        assert peer.receive() == message_of("k", str(number))
    began = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - began < 1  # as no more lines come
    assert closed.poll(1_000 * TIMEOUT)
    assert server.stderr.count("\n") == 1


@slow
def test_lines_that_had_arrived_are_published_while_a_subscriber_stalls(
    server: Script, join: Join
) -> None:
    peer = join(server.ports)
    with zmtp.subscribers(server.ports[1]):
        sent = received = 0
        while sent == received:  # until the server waits
            for _ in range(50):
                peer.push.send(line_of("k", "x" * 5_000))
            sent += 50
            while received < sent and peer.sub.poll(300):
                peer.sub.recv()
                received += 1
        for _ in range(200):
            peer.push.send(line_of("k", "last"))
        time.sleep(0.3)  # By now they have arrived.
        began = time.monotonic()
        server.process.terminate()
        for _ in range(sent + 200 - received):
            peer.receive()
        assert server.wait() == 0
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("stalled", [0, *(pytest.param(count, marks=slow) for count in (1, 20))])
def test_a_server_in_a_flood_ends_within_three_seconds(server: Script, stalled: int) -> None:
    with (
        zmtp.subscribers(server.ports[1], stalled),
        zmtp.flood(server.ports[0], line_of("k", "x" * 10_000)),
    ):
        time.sleep(0.3)  # The server waits for stalled subscribers by now.
        began = time.monotonic()
        server.process.terminate()
        time.sleep(1.5)
        server.process.send_signal(signal.SIGINT)  # It does not begin anew.
        assert server.wait() == 0
        assert time.monotonic() - began < 3
    assert "Traceback" not in server.stderr


@slow
def test_a_server_ends_within_three_seconds_if_a_subscriber_stalls_meanwhile(
    server: Script,
) -> None:
    lines = zmtp.frame(line_of("k", "x" * 16_000)) * 100
    with (
        zmtp.subscribers(server.ports[1]),
        zmtp.connect(server.ports[0], b"PUSH") as push,
        contextlib.suppress(OSError),
    ):
        began = time.monotonic()
        for number in itertools.count():  # A thousand a second fill its queue in two.
            push.sendall(lines)
            if number == 0:
                server.process.terminate()
            time.sleep(max(0, began + number / 10 - time.monotonic()))
    assert server.wait() == 0
    assert time.monotonic() - began < 3.2


# README, Slow subscribers: A server that shuts down gives subscribers two seconds to receive what
# is queued, or half a second if new lines keep coming.


def test_a_subscriber_has_two_seconds_to_receive_its_messages(server: Script) -> None:
    lines, messages = zmtp.numbered(900, "x" * 1_000)
    with (
        zmtp.connect(server.ports[0], b"PUSH") as push,
        zmtp.subscribers(server.ports[1]) as (sub,),
    ):
        sub.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        push.sendall(lines)
        server.process.terminate()
        time.sleep(1.5)  # By now, the server only waits for the subscriber.
        assert zmtp.receive_until_quiet(sub, TIMEOUT) == (messages, True)
    assert server.wait() == 0


@slow
def test_subscribers_receive_the_same_messages_of_a_flood(server: Script) -> None:
    """The chat goes at the pace of the slower one, for which the server nearly always waits."""
    received = [bytearray(), bytearray()]

    def read(sub: socket.socket, into: bytearray, pause: float) -> None:
        while more := sub.recv(65_536):
            into += more
            time.sleep(pause)

    with zmtp.subscribers(server.ports[1], 2) as subs:
        threads = [
            threading.Thread(target=read, args=how)
            for how in zip(subs, received, (0, 0.005), strict=True)
        ]
        for thread in threads:
            thread.start()
        with zmtp.flood(server.ports[0], line_of("k", "x" * 40)):
            time.sleep(1)  # in which the queue of the slower one becomes full
            server.process.terminate()
            for thread in threads:
                thread.join()
    assert len(received[0]) == len(received[1])
    assert hash(bytes(received[0])) == hash(bytes(received[1]))
    assert server.wait() == 0
    assert "stalled" not in server.stderr


# README, Options: The exit status is 0 on success


@pytest.mark.parametrize("pause", [0, 0.01, 0.1])
def test_signals_may_come_again_and_again(server: Script, pause: float) -> None:
    began = time.monotonic()
    while server.process.poll() is None and time.monotonic() - began < 5:
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    assert server.wait() == 0
    assert time.monotonic() - began < 2
    assert server.stderr.count("\n") == 1


@LINUX
@pytest.mark.parametrize(("name", "delay"), [("SIGINT", 0), ("SIGTERM", 0.01), ("SIGHUP", 0.02)])
def test_a_signal_may_come_at_the_start(start: Start, name: str, delay: float) -> None:
    script = start("server.py", "--pull-port", 0, "--pub-port", 0)
    wait_for(lambda: script.catches(signal.SIGHUP), lambda: script.stderr)
    time.sleep(delay)
    script.process.send_signal(getattr(signal, name))
    assert script.wait() == 0
    assert re.fullmatch(r"(server\.py: PULL is bound .*\n)?", script.stderr)


# README, Recipes: nohup python server.py &


@pytest.mark.parametrize("name", ["HUP", "INT"])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    start_server: StartServer, join: Join, name: str
) -> None:
    server = start_server(before=["sh", "-c", f'trap "" {name}; exec "$@"', "sh"])
    peer = join(server.ports)
    server.process.send_signal(getattr(signal, f"SIG{name}"))
    time.sleep(0.5)  # An idle server ends earlier than that.
    peer.chat("still here")
    assert server.terminate() == 0


# README, systemd: restarts it if it ends


def test_clients_come_back_to_a_server_that_was_started_again(
    start_server: StartServer, server: Script, join: Join
) -> None:
    peer = join(server.ports)
    server.kill()
    start_server(ports=server.ports)

    def is_back() -> bool:
        peer.push.send(line_of("k", "back"))
        return bool(peer.sub.poll(50))

    wait_for(is_back, lambda: "no connection")
    assert peer.receive() == message_of("k", "back")
