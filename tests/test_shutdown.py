"""README, "Running it for good": how the server shuts down, and what it still delivers."""

import contextlib
import itertools
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import zmq
import zmtp
from peers import Join, line_of, message_of
from processes import LINUX, POSIX, TIMEOUT, Script, Start, StartServer, wait_for

import server as server_script

pytestmark = POSIX
slow = pytest.mark.slow
each_signal = pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])


# SIGINT, SIGTERM or SIGHUP ends the server with status 0: within a second if no line comes, and
# within three in a flood, whatever subscribers do.


@each_signal
def test_an_idle_server_ends_within_a_second(server: Script, join: Join, name: str) -> None:
    peer = join(server.ports)
    peer.chat("hello")
    began = time.monotonic()
    server.process.send_signal(getattr(signal, name))
    assert server.wait() == 0
    assert time.monotonic() - began < 1
    assert server.stderr.count("\n") == 1


@pytest.mark.parametrize("stalled", [0, *(pytest.param(count, marks=slow) for count in (1, 20))])
def test_a_server_in_a_flood_ends_within_three_seconds(server: Script, stalled: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(stalled):
            stack.enter_context(zmtp.connect(server.ports[1], b"SUB"))
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        stack.enter_context(zmtp.flood(server.ports[0], line_of("k", "x" * 10_000)))
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
    server: Script, join: Join
) -> None:
    peer = join(server.ports)
    peer.push.linger = 0
    line = line_of("k", "x" * 16_000)
    with zmtp.connect(server.ports[1], b"SUB"):
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        began = time.monotonic()
        for number in itertools.count():  # A thousand a second fill its queue in two.
            with contextlib.suppress(zmq.Again):
                peer.push.send(line, zmq.NOBLOCK)
            if number == 10:
                server.process.terminate()
            if server.process.poll() is not None:
                break
            time.sleep(max(0, began + number / 1_000 - time.monotonic()))
        assert time.monotonic() - began < 3.2
    assert server.wait() == 0


# Before that, it publishes all lines that had arrived, and subscribers have two seconds to receive
# their messages.


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
    assert server.wait() == 0
    assert closed.poll(1_000 * TIMEOUT)
    assert "Traceback" not in server.stderr


@slow
def test_lines_that_had_arrived_are_published_while_a_subscriber_stalls(
    server: Script, join: Join
) -> None:
    peer = join(server.ports)
    with zmtp.connect(server.ports[1], b"SUB"):  # It never reads.
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
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


def test_a_subscriber_has_two_seconds_to_receive_its_messages(server: Script) -> None:
    texts = [f"{number:04} {'x' * 1_000}" for number in range(900)]
    with (
        zmtp.connect(server.ports[1], b"SUB") as sub,
        zmtp.connect(server.ports[0], b"PUSH") as push,
    ):
        sub.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        sub.settimeout(TIMEOUT)
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        push.sendall(b"".join(zmtp.frame(line_of("k", text)) for text in texts))
        server.process.terminate()
        time.sleep(1.5)  # By now, the server only waits for the subscriber.
        received = bytearray()
        while more := sub.recv(1 << 20):
            received += more
    assert received == b"".join(zmtp.frame(message_of("k", text)) for text in texts)
    assert server.wait() == 0


@slow
def test_subscribers_receive_the_same_messages_of_a_flood(server: Script) -> None:
    """The chat goes at the pace of the slower one, for which the server nearly always waits."""
    received = [bytearray(), bytearray()]

    def read(sub: socket.socket, into: bytearray, pause: float) -> None:
        while more := sub.recv(65_536):
            into += more
            time.sleep(pause)

    with contextlib.ExitStack() as stack:
        threads = []
        for into, pause in zip(received, (0, 0.005), strict=True):
            sub = stack.enter_context(zmtp.connect(server.ports[1], b"SUB"))
            threads.append(threading.Thread(target=read, args=(sub, into, pause)))
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        for thread in threads:
            thread.start()
        stack.enter_context(zmtp.flood(server.ports[0], line_of("k", "x" * 40)))
        time.sleep(1)  # in which the queue of the slower one becomes full
        server.process.terminate()
        for thread in threads:
            thread.join()
    assert len(received[0]) == len(received[1])
    assert hash(bytes(received[0])) == hash(bytes(received[1]))
    assert server.wait() == 0
    assert "stalled" not in server.stderr


# Signals may come again, and at any moment.


@pytest.mark.parametrize("pause", [0, 0.1])
def test_signals_may_come_again_and_again(server: Script, pause: float) -> None:
    began = time.monotonic()
    while server.process.poll() is None and time.monotonic() - began < 5:
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    assert server.wait() == 0
    assert time.monotonic() - began < 2
    assert server.stderr.count("\n") == 1


def test_a_second_signal_may_come_at_any_moment(start_server: StartServer) -> None:
    servers = [start_server() for _ in range(6)]
    for server in servers:
        server.process.send_signal(signal.SIGINT)
    for number, server in enumerate(servers):
        time.sleep(0.05)
        server.process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
    for server in servers:
        assert server.wait() == 0
        assert server.stderr.count("\n") == 1


@LINUX
@each_signal
@pytest.mark.parametrize("delay", [0, 0.01])
def test_a_signal_may_come_at_the_start(start: Start, name: str, delay: float) -> None:
    script = start("server.py", "--pull-port", 0, "--pub-port", 0)
    wait_for(lambda: script.catches(signal.SIGTERM), lambda: script.stderr)
    time.sleep(delay)
    script.process.send_signal(getattr(signal, name))
    assert script.wait() == 0
    assert re.fullmatch(r"(server\.py: PULL is bound .*\n)?", script.stderr)


# A signal that is ignored at the start stays ignored: SIGINT for `server.py &` in a shell script,
# and SIGHUP for `nohup server.py`.


@pytest.mark.parametrize("name", ["INT", "HUP"])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    start_server: StartServer, join: Join, name: str
) -> None:
    server = start_server(before=["sh", "-c", f'trap "" {name}; exec "$@"', "sh"])
    peer = join(server.ports)
    server.process.send_signal(getattr(signal, f"SIG{name}"))
    time.sleep(0.5)  # An idle server ends earlier than that.
    peer.chat("still here")
    assert server.terminate() == 0


# Process 1 of a container ignores all signals that it does not handle.


@each_signal
def test_process_1_of_a_container_ends(start_server: StartServer, name: str) -> None:
    container = ["unshare", "--pid", "--fork"]
    if not shutil.which("unshare") or subprocess.run([*container, "true"]).returncode:
        pytest.skip("needs unshare, and the right to use it")
    server = start_server(before=container)
    pid = server.process.pid
    process_1 = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    began = time.monotonic()
    subprocess.run(["kill", f"-{name[3:]}", str(process_1)], check=True)
    assert server.wait() == 0
    assert time.monotonic() - began < 1


# Windows sends SIGBREAK at Ctrl-Break. Its place is taken by another signal here.


def test_sigbreak_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    handled = {}
    monkeypatch.setattr(signal, "signal", lambda signum, handler: handled.update({signum: handler}))
    shutdown = server_script.Shutdown()
    server_script.handle_signals(shutdown)
    assert handled[signal.SIGUSR1] == shutdown.request


# After a server was killed, another one can have its ports at once, and its clients come back.


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
