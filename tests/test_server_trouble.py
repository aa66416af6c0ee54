"""The server under trouble: floods, strangers, readers that stop or vanish, signals, few files."""

import contextlib
import functools
import itertools
import os
import re
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import benchmark
import pytest
import zmq
from benchmark import GREETING, frame, zmtp_connect
from conftest import TIMEOUT, Peer, Script, Start, free_port, wait_for
from network import Network
from test_server import BAD, chat_body, published

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sends signals")
slow = pytest.mark.slow

StartServer = Callable[..., Script]
Join = Callable[..., Peer]

READY = b"\4\x19\5READY\x0bSocket-Type\0\0\0\3SUB"


def reset(sock: socket.socket) -> None:
    """Break a connection at once."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def send_all_it_takes(sock: socket.socket, data: bytes) -> None:
    """Send data over and over, until nothing more is taken for a moment, or it is cut off."""
    sock.settimeout(0.3)
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(data)


def cut_off(sock: socket.socket) -> bool:
    """Read what there is; return whether the server has closed the connection."""
    sock.setblocking(False)
    try:
        while sock.recv(1 << 20):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def flood(port: int, *bodies: bytes) -> Iterator[None]:
    """Push lines over and over, as fast as they are taken."""
    frames = b"".join(map(frame, bodies)) * (1 + 100_000 // sum(map(len, bodies)))

    def send() -> None:
        with contextlib.suppress(OSError):
            while True:
                push.sendall(frames)

    with zmtp_connect(port, b"PUSH") as push:
        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # if the server has ended
                push.shutdown(socket.SHUT_RDWR)
            sender.join()


@contextlib.contextmanager
def pushing(peer: Peer, bodies: Sequence[bytes]) -> Iterator[None]:
    """Push lines in a thread."""
    sender = threading.Thread(target=lambda: [peer.push.send(body) for body in bodies])
    sender.start()
    yield
    sender.join(TIMEOUT)


def good(peer: Peer) -> float:
    """Have a line published, what was before it passed over; return how long that took."""
    text = f"good {time.monotonic_ns()}"
    began = time.monotonic()
    peer.push.send(chat_body(text))
    while peer.receive() != published("k", text):
        pass
    return time.monotonic() - began


def told(script: Script) -> int:
    """Return how many dropped lines a server has told of."""
    counts = re.findall(r"dropped lines: ([0-9,]+), ", script.said)
    return sum(int(count.replace(",", "")) for count in counts)


# Told right.


def test_bad_bodies_are_told_and_none_is_published(server: Script, join: Join) -> None:
    peer = join(server.ports)
    for body, _ in BAD.values():
        peer.push.send(body)
        peer.push.send(chat_body("good"))
        assert peer.receive() == published("k", "good")
    wait_for(lambda: told(server) == len(BAD), lambda: server.said)
    body, reason = next(iter(BAD.values()))
    assert f"server.py: dropped lines: 1, the last: {reason}: {body[:60]!r}\n" in server.said
    body, reason = list(BAD.values())[-1]
    assert server.said.endswith(f", the last: {reason}: {body[:60]!r}\n")
    assert server.said.replace("\n", "").isprintable()


def test_an_isolated_bad_line_is_told_at_once(server: Script, join: Join) -> None:
    peer = join(server.ports)
    for number in range(2):
        if number:
            time.sleep(1)  # which is what makes it isolated
        began = time.monotonic()
        peer.push.send(b"bad %d" % number)
        server.wait_said(rf"dropped lines: 1, the last: .*: b'bad {number}'\n")
        assert time.monotonic() - began < 0.5


def test_what_is_untold_is_told_at_the_end(server: Script, join: Join) -> None:
    peer = join(server.ports)
    for number in range(100):
        peer.push.send(b"bad %d" % number)
    good(peer)
    server.process.terminate()
    assert server.wait() == 0
    assert told(server) == 100
    assert server.said.endswith("in UTF-8: b'bad 99'\n")


@pytest.mark.parametrize("count", [50_000, pytest.param(300_000, marks=slow)])
def test_a_flood_of_garbage_leaves_a_few_kilobytes(server: Script, join: Join, count: int) -> None:
    peer = join(server.ports)
    with pushing(peer, [b"\x1b]0;hostile\x07 %d %s" % (n, b"\xff" * 80) for n in range(count)]):
        wait_for(lambda: told(server) == count, lambda: server.said[-1_000:])
    good(peer)
    assert len(server.said) < 4_000
    assert "\x1b" not in server.said


def whole_lines(ends: tuple[int, int]) -> int:
    """Fill a pipe or a terminal; return how many lines it took whole, and close it."""
    os.set_blocking(ends[1], False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while os.write(ends[1], FILLER) == len(FILLER):
            count += 1
    for end in ends:
        os.close(end)
    return count


@contextlib.contextmanager
def full_stderr(make: Callable[[], tuple[int, int]]) -> Iterator[int]:
    """Give a file that has no room for a line, and that nobody reads.

    A little room is left: then select says of a terminal that it can be written to, and a write
    blocks all the same.
    """
    count = whole_lines(make())
    ends = make()
    os.set_blocking(ends[1], False)  # The room differs a little from one to the next.
    with contextlib.suppress(BlockingIOError):
        for _ in range(count):
            os.write(ends[1], FILLER)
    os.set_blocking(ends[1], True)
    yield ends[1]
    for end in ends:
        os.close(end)


FILLER = b"x" * 50 + b"\n"  # shorter than any line of the server


@pytest.mark.parametrize("make", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_stderr_that_nobody_reads_holds_up_nobody(
    start: Start, join: Join, make: Callable[[], tuple[int, int]]
) -> None:
    ports = free_port(), free_port()
    options = ["--pull-port", ports[0], "--pub-port", ports[1]]
    with full_stderr(make) as stderr:
        script = start("server.py", *options, stderr=stderr)
        peer = join(ports)
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            peer.push.send(b"bad")
            assert good(peer) < 1
        script.process.terminate()
        assert script.wait() == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(start: Start, join: Join, closed: str) -> None:
    ports = free_port(), free_port()
    before = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    options = ["--pull-port", ports[0], "--pub-port", ports[1]]
    script = start("server.py", *options, before=before)
    peer = join(ports)
    peer.push.send(b"bad")
    good(peer)
    for file in range(3):  # Nothing else has taken a place that a print might go to.
        place = Path(f"/proc/{script.process.pid}/fd/{file}").readlink()
        assert str(place).startswith(("/dev/null", "pipe:"))
    script.process.terminate()
    assert script.wait() == 0
    assert "Traceback" not in script.said
    assert ("dropped lines: 1" in script.said) == ("2>" not in closed)


# It stands.


def test_readers_leave_in_a_flow_of_long_lines(server: Script, join: Join) -> None:
    with flood(server.ports[0], chat_body("x" * 10_000)):
        for _ in range(40):
            with zmtp_connect(server.ports[1], b"SUB") as reader:
                for _ in range(20):
                    reader.recv(100_000)
    good(join(server.ports))
    assert server.process.poll() is None


@slow
@pytest.mark.parametrize("size", [500, 1])
def test_subscriptions_flooded_and_reset(server: Script, join: Join, size: int) -> None:
    files = server.open_files()
    subscriptions = b"".join(frame(b"\1%d".ljust(size, b"x") % number) for number in range(2_000))
    for _ in range(3):
        stranger = zmtp_connect(server.ports[1], b"SUB")
        send_all_it_takes(stranger, subscriptions)
        reset(stranger)
    if size > 1:  # so many short ones have come that an idle server is busy with them for minutes
        wait_for(lambda: server.open_files() == files, server.open_files)
    peer = join(server.ports)
    files += 2
    wait_for(lambda: good(peer) and server.open_files() == files, server.open_files)


def test_a_flood_of_subscriptions_holds_up_nobody(server: Script, join: Join) -> None:
    peer = join(server.ports)
    topics = [bytes([letter]) * 500 for letter in range(100)]
    frames = b"".join(frame(b"\1" + topic) + frame(b"\0" + topic) for topic in topics)
    strangers = [zmtp_connect(server.ports[1], b"SUB") for _ in range(3)]
    senders = [
        threading.Thread(target=send_all_it_takes, args=(stranger, frames))
        for stranger in strangers
    ]
    for sender in senders:
        sender.start()
    until = time.monotonic() + 1.5
    waits = []
    while time.monotonic() < until:
        waits.append(good(peer))
    for stranger, sender in zip(strangers, senders, strict=True):
        stranger.shutdown(socket.SHUT_RDWR)
        sender.join()
        reset(stranger)
    assert statistics.median(waits) < 0.02


def test_long_subscriptions_are_cut_off(server: Script, join: Join) -> None:
    peer = join(server.ports)
    before = server.stat("VmHWM")
    with zmtp_connect(server.ports[1], b"SUB") as stranger:
        with contextlib.suppress(OSError):
            for number in range(300):
                stranger.sendall(frame(b"\1" + b"%05d" % number * 12_000))
        wait_for(lambda: cut_off(stranger), lambda: "connected")
    good(peer)
    assert server.stat("VmHWM") - before < 2_000


@slow
def test_readers_that_come_and_go_leave_nothing(server: Script, join: Join) -> None:
    files = server.open_files()
    grown = []
    for _ in range(3):
        for _ in range(1_000):
            reset(zmtp_connect(server.ports[1], b"SUB"))
        wait_for(lambda: server.open_files() == files, server.open_files)
        time.sleep(0.6)  # in which nothing is said
        grown.append(server.stat("VmRSS"))
    assert grown[-1] - grown[0] < 16_000  # 22,000 if all were kept until the next line
    good(join(server.ports))


STRANGERS = {
    "silent": b"",
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "tls": b"\x16\3\1\2\0\1\0\1\xfc\3\3" + bytes(512),
    "half a greeting": GREETING[:11],
    "greeting and no more": GREETING,
    "zmtp 1": b"\1\0",
    "zmtp 2": b"\xff" + bytes(8) + b"\x7f\1\2\0\0",
    "other mechanism": GREETING.replace(b"NULL\0", b"CURVE"),
    "wrong socket type": GREETING + READY.replace(b"SUB", b"REP"),
    "half a command": GREETING + READY[:9],
    "lengths that lie": GREETING + b"\4\x19\5READY\x0bSocket-Type\xff\xff\xff\xffSUB",
    "a frame that never ends": GREETING + READY + b"\2" + b"\xff" * 8 + b"x" * 1_000,
    "a huge frame announced": GREETING + READY + b"\2" + b"\x7f" + bytes(7) + b"x" * 1_000,
    "noise": bytes(range(256)) * 20,
    "greeting and noise": GREETING + bytes(range(256)) * 20,
}


def test_strangers_change_nothing(server: Script, join: Join) -> None:
    peer = join(server.ports)
    files = server.open_files()
    with contextlib.ExitStack() as open_sockets:
        for number, said in enumerate(list(STRANGERS.values()) * 20):
            sock = socket.create_connection(("127.0.0.1", server.ports[number % 2]))
            open_sockets.enter_context(sock)
            sock.sendall(said)
            if number % 4 < 2:
                reset(sock)
        for _ in range(20):
            assert good(peer) < 1
        used = server.cpu_seconds()
        assert not peer.sub.poll(500)  # half a second in which nothing happens
        assert server.cpu_seconds() - used < 0.1
    wait_for(lambda: server.open_files() == files, server.open_files)
    good(peer)


@pytest.mark.parametrize(
    "limit", [8, 10, *(pytest.param(n, marks=slow) for n in range(6, 40) if n not in (8, 10))]
)
def test_too_few_open_files_is_one_line_and_status_1(start: Start, limit: int) -> None:
    before = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"]
    script = start("server.py", "--pull-port", 0, "--pub-port", 0, before=before)
    script.wait_said("\n")
    if "listens" in script.said:  # it has enough
        assert limit > 10
        script.process.terminate()
        assert script.wait() == 0
    else:
        assert script.wait() == 1
        assert re.fullmatch(r"server\.py: .*Too many open files: \S+; see ulimit -n\n", script.said)
    assert script.said.count("\n") == 1


def test_more_readers_than_files_change_nothing_for_the_others(
    start_server: StartServer, join: Join
) -> None:
    server = start_server(before=["sh", "-c", 'ulimit -n 30; exec "$@"', "sh"])
    peer = join(server.ports)
    with contextlib.ExitStack() as open_sockets:
        for number in range(100):
            sock = socket.create_connection(("127.0.0.1", server.ports[number % 2]))
            open_sockets.enter_context(sock)
        for _ in range(100):
            assert good(peer) < 1
    good(join(server.ports))  # there is room again


def test_more_readers_than_the_soft_limit_of_files(start_server: StartServer, join: Join) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3_000:
        pytest.skip("the hard limit of open files is too low")
    server = start_server(before=["sh", "-c", 'ulimit -S -n 200; exec "$@"', "sh"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        peer = join(server.ports, readers=500)
        peer.push.send(chat_body("to all"))
        for sub in peer.subs:
            assert peer.receive(sub) == published("k", "to all")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Bounded.


def test_longest_lines_pass_and_longer_ones_cut_their_sender_off(
    server: Script, join: Join
) -> None:
    peer = join(server.ports)
    longest = b'{"user":"k","message":"%s"}' % (b"x" * 16_359)
    assert len(longest) == 16_384
    peer.push.send(longest)
    assert peer.receive() == published("k", "x" * 16_359)
    for body in (longest + b" ", b"x" * 50_000_000):
        before = server.stat("VmHWM")
        with zmtp_connect(server.ports[0], b"PUSH") as hostile:
            with contextlib.suppress(OSError):
                hostile.sendall(frame(body))
            wait_for(functools.partial(cut_off, hostile), lambda: "connected")
        good(peer)
        assert server.stat("VmHWM") - before < 2_000


@slow
def test_fifty_writers_of_long_lines_take_4_mb_each(server: Script) -> None:
    before = server.stat("VmHWM")
    lines = frame(chat_body("x" * 16_350)) * 20
    with contextlib.ExitStack() as stack:
        stack.enter_context(zmtp_connect(server.ports[1], b"SUB"))  # never reads: all waits for it
        writers = [stack.enter_context(zmtp_connect(server.ports[0], b"PUSH")) for _ in range(50)]
        selector = selectors.DefaultSelector()
        for writer in writers:
            writer.setblocking(False)
            selector.register(writer, selectors.EVENT_WRITE, [lines])
        until = time.monotonic() + 3  # longer than the server's patience
        while time.monotonic() < until:
            for key, _ in selector.select(0.1):
                writer = key.fileobj  # type: ignore[assignment]
                with contextlib.suppress(BlockingIOError):
                    rest = key.data[0]
                    key.data[0] = rest[writer.send(rest) :] or lines
        grown = (server.stat("VmHWM") - before) / 1_000
    assert 100 < grown < 32 + 50 * 4.2 + 20  # MB: the reader's queue, the writers', and some more


class Stallers:
    """Readers, all in one thread, each of which reads for a while and then stalls, in turn."""

    def __init__(self, port: int, count: int, seconds: float) -> None:
        self.readers = [zmtp_connect(port, b"SUB") for _ in range(count)]
        self.seconds = seconds
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        buffer = bytearray(1 << 20)
        for reader in self.readers:
            reader.setblocking(False)
        while not self.ended.wait(0.002):
            for number, reader in enumerate(self.readers):
                phase = time.monotonic() / self.seconds + number / len(self.readers)
                with contextlib.suppress(OSError):
                    while phase % 1 < 0.5 and reader.recv_into(buffer) == len(buffer):
                        pass

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        for reader in self.readers:
            reader.close()


@pytest.mark.parametrize(
    ("count", "seconds"), [(20, 1), pytest.param(100, 30, marks=slow)], ids=["20", "100"]
)
def test_readers_that_stall_in_turn_cost_next_to_nothing(
    server: Script, context: zmq.Context[zmq.Socket[bytes]], count: int, seconds: float
) -> None:
    polite, push = context.socket(zmq.SUB), context.socket(zmq.PUSH)
    polite.set(zmq.SUBSCRIBE, b"polite> ")
    polite.connect(f"tcp://127.0.0.1:{server.ports[1]}")
    push.connect(f"tcp://127.0.0.1:{server.ports[0]}")

    def latency() -> float:
        began = time.monotonic()
        push.send(b'{"user": "polite", "message": "m"}')
        assert polite.poll(TIMEOUT * 1_000)
        polite.recv()
        return time.monotonic() - began

    wait_for(lambda: not push.send(b'{"user": "polite", "message": "m"}') and polite.poll(20), str)
    drain(polite)
    with Stallers(server.ports[1], count, 6), flood(server.ports[0], chat_body("x" * 100)):
        server.wait_said("a reader has stopped reading")  # the first one, which costs two seconds
        waits = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            waits.append(latency())
    assert statistics.median(waits) < 0.1
    assert sum(wait for wait in waits if wait > 0.1) < seconds / 3  # it took a tenth at most
    assert server.said.count("stopped reading") < seconds + 5


@slow
def test_one_that_stopped_costs_the_others_no_line_however_fast_they_come() -> None:
    count = 600_000
    lines = b"".join(map(benchmark.line, range(count)))
    for _ in range(3):
        delivery, _ = benchmark.measure_stalled("this server", lines, count)
        assert delivery.counts == [count]


# Nobody misses anything, and nobody is held up.


def test_nothing_is_lost_with_ten_readers(server: Script, join: Join) -> None:
    peer = join(server.ports, readers=10)
    count = 20_000
    poller = zmq.Poller()
    due = dict.fromkeys(peer.subs, 0)
    for sub in peer.subs:
        poller.register(sub, zmq.POLLIN)
    with pushing(peer, [chat_body(str(number)) for number in range(count)]):
        while any(number < count for number in due.values()):
            ready = poller.poll(TIMEOUT * 1_000)
            assert ready
            for sub, _ in ready:
                with contextlib.suppress(zmq.Again):
                    while True:
                        assert sub.recv(zmq.NOBLOCK) == published("k", str(due[sub]))
                        due[sub] += 1


@slow
def test_nothing_is_lost_with_a_hundred_readers(server: Script) -> None:
    count = 20_000
    lines = b"".join(frame(chat_body(f"{number:08}")) for number in range(count))
    due = count * len(frame(published("k", f"{0:08}")))
    selector = selectors.DefaultSelector()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            reader = stack.enter_context(zmtp_connect(server.ports[1], b"SUB"))
            selector.register(reader, selectors.EVENT_READ, [0])
        time.sleep(1)  # for the last subscription to take effect
        push = stack.enter_context(zmtp_connect(server.ports[0], b"PUSH"))
        sender = threading.Thread(target=push.sendall, args=(lines,))
        sender.start()
        full = 0
        while full < 100:
            ready = selector.select(TIMEOUT)
            assert ready
            for key, _ in ready:
                key.data[0] += len(key.fileobj.recv(1 << 20))  # type: ignore[union-attr]
                full += key.data[0] == due
        sender.join()


@slow
def test_a_reader_that_rests_misses_nothing(server: Script, join: Join) -> None:
    peer = join(server.ports)
    count = 80_000
    with pushing(peer, [chat_body(str(number)) for number in range(count)]):
        for number in range(count):
            if number % 20_000 == 10_000:
                time.sleep(0.5)  # the rest itself, not a wait for anything
            assert peer.receive() == published("k", str(number))
    assert "stopped" not in server.said


@slow
def test_a_steady_reader_misses_nothing(server: Script) -> None:
    rate, count = 3_000, 36_000  # The server waits for it for 0.9 s at most.
    frames = [frame(published("k", f"{number:08}")) for number in range(count)]
    lines = b"".join(frame(chat_body(f"{number:08}")) for number in range(count))
    heard = bytearray()
    with (
        zmtp_connect(server.ports[1], b"SUB") as reader,
        zmtp_connect(server.ports[0], b"PUSH") as push,
    ):
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        reader.settimeout(TIMEOUT)
        time.sleep(0.5)  # for the subscription to take effect
        sender = threading.Thread(target=push.sendall, args=(lines,))
        sender.start()
        began = time.monotonic()
        while not heard.endswith(frames[-1]):
            heard += reader.recv(100 * len(frames[0]))
            time.sleep(max(0, len(heard) / len(frames[0]) / rate - time.monotonic() + began))
        sender.join()
    assert heard == b"".join(frames)
    assert "stopped" not in server.said


STOPPED_READER = """
import os, signal, sys, zmq
sub = zmq.Context().socket(zmq.SUB)
sub.setsockopt(zmq.SUBSCRIBE, b"")
sub.connect(sys.argv[1])
sub.recv()
print("reading", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
while b"awake" not in sub.recv():
    pass
print("awake", flush=True)
"""


def test_a_stopped_reader_holds_up_the_others_once(
    server: Script, join: Join, start_other: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    peer = join(server.ports)
    stopped = start_other(STOPPED_READER, f"tcp://127.0.0.1:{server.ports[1]}")
    assert stopped.stdout
    wait_for(lambda: wrote(stopped, peer, "hi"), lambda: "no reader")
    stopped.stdout.readline()
    wait_for(lambda: process_state(stopped.pid) == "T", lambda: "a running reader")
    drain(peer.sub)
    large = "x" * 1_000  # so that the buffers are full soon
    count = 20_000
    waits = []
    with pushing(peer, [chat_body(f"{number} {large}") for number in range(count)]):
        for number in range(count):
            before = time.monotonic()
            assert peer.receive() == published("k", f"{number} {large}")
            waits.append(time.monotonic() - before)
    assert [round(wait) for wait in waits if wait > 0.5] == [2]
    assert server.said.count("a reader has stopped reading, going on without it; times: 1\n") == 1
    assert server.stat("VmHWM") < 60_000
    stopped.send_signal(signal.SIGCONT)
    wait_for(lambda: wrote(stopped, peer, "awake"), lambda: "a sleeping reader")
    assert stopped.stdout.readline() == b"awake\n"


@pytest.fixture
def start_other() -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Give a function that starts Python code as a process; it is killed at the end."""
    with contextlib.ExitStack() as stack:

        def start_code(
            code: str, *args: object, before: Sequence[str] = ()
        ) -> "subprocess.Popen[bytes]":
            command = [*before, sys.executable, "-c", code, *map(str, args)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start_code


def wrote(process: "subprocess.Popen[bytes]", peer: Peer, message: str) -> bool:
    """Push a message, and return whether a process that reads has written something."""
    peer.push.send(chat_body(message))
    with selectors.DefaultSelector() as selector:
        assert process.stdout
        selector.register(process.stdout, selectors.EVENT_READ)
        return bool(selector.select(0.02))


def process_state(pid: int) -> str:
    """Return the state of a process, T when it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def drain(sub: zmq.Socket[bytes]) -> None:
    """Read all that is on its way to a SUB."""
    while sub.poll(200):
        sub.recv()


@slow
def test_stopped_readers_are_cut_off_and_their_queue_is_freed(server: Script, join: Join) -> None:
    peer = join(server.ports)
    files = server.open_files()
    lines = [chat_body("x" * 16_000)] * 4_000

    def stop_six() -> list[socket.socket]:
        readers = [zmtp_connect(server.ports[1], b"SUB") for _ in range(6)]
        with pushing(peer, lines):
            for _ in lines:
                peer.receive()
        return readers

    before = server.stat("VmHWM")
    readers = stop_six()
    began = time.monotonic()
    grown = server.stat("VmHWM") - before
    # The queue that the six share, that of the other reader, a writer's, and what is at work.
    bound = 32_000 + 32_000 + 4_000 + 12_000
    assert 30_000 < grown < bound
    assert server.open_files() == files + 6
    wait_for(lambda: server.open_files() == files, server.open_files)
    assert 10 < time.monotonic() - began < 25
    good(peer)
    readers += stop_six()
    assert server.stat("VmHWM") - before < bound  # They take the place of the first six.
    for reader in readers:
        reader.close()


# Over a network.

READER = """
import sys, zmq
sub = zmq.Context().socket(zmq.SUB)
sub.set(zmq.SUBSCRIBE, sys.argv[2].encode())
sub.connect(sys.argv[1])
while True:
    sys.stdout.buffer.write(sub.recv() + b"\\n")
    sys.stdout.flush()
"""
WRITER = """
import sys, zmq
push = zmq.Context().socket(zmq.PUSH)
push.connect(sys.argv[1])
for line in sys.stdin.buffer:
    push.send(line[:-1])
"""


@slow
@pytest.mark.parametrize("flowing", [True, False], ids=["in a flow", "silent"])
def test_a_vanished_reader_is_cut_off(
    start_server: StartServer,
    start_other: Callable[..., "subprocess.Popen[bytes]"],
    network: Network,
    flowing: bool,
) -> None:
    server = start_server(before=network.server_host.command())
    pull, pub = (f"tcp://{network.server_host.address}:{port}" for port in server.ports)
    files = server.open_files()
    writer = start_other(WRITER, pull, before=network.server_host.command())
    here = start_other(READER, pub, "", before=network.server_host.command())
    there = start_other(READER, pub, "", before=network.client_host.command())
    assert writer.stdin and here.stdout and there.stdout
    wait_for(lambda: server.open_files() == files + 3, server.open_files)
    for process in (here, there):
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]

            def hears(selector: selectors.DefaultSelector = selector) -> bool:
                assert writer.stdin
                writer.stdin.write(chat_body("hello") + b"\n")
                writer.stdin.flush()
                return bool(selector.select(0.05))

            wait_for(hears, lambda: "a reader that hears nothing")
    threading.Thread(target=lambda: [None for _ in here.stdout or ()], daemon=True).start()
    network.up = False
    began = time.monotonic()
    while server.open_files() > files + 2 and time.monotonic() - began < 40:
        if flowing:
            writer.stdin.write(chat_body("x" * 1_000) + b"\n")
            writer.stdin.flush()
        time.sleep(0.05)
    assert 15 < time.monotonic() - began < 27


@slow
def test_a_reader_behind_a_slow_link_misses_nothing(
    start_server: StartServer,
    start_other: Callable[..., "subprocess.Popen[bytes]"],
    network: Network,
) -> None:
    server = start_server(before=network.server_host.command())
    pull, pub = (f"tcp://{network.server_host.address}:{port}" for port in server.ports)
    network.rate = 1_000_000
    network.delay = 0.02
    reader = start_other(READER, pub, "", before=network.client_host.command())
    writer = start_other(WRITER, pull, before=network.server_host.command())
    assert reader.stdout and writer.stdin
    with selectors.DefaultSelector() as selector:
        selector.register(reader.stdout, selectors.EVENT_READ)

        def hears() -> bool:
            assert writer.stdin
            writer.stdin.write(chat_body("hello") + b"\n")
            writer.stdin.flush()
            return bool(selector.select(0.05))

        wait_for(hears, lambda: "a reader that hears nothing")
    count = 20_000
    lines = [chat_body(f"this is line {number:05} of very many") for number in range(count)]
    piping = threading.Thread(target=writer.stdin.write, args=(b"\n".join([*lines, b""]),))
    piping.start()
    due = 0
    for line in reader.stdout:
        if b"hello" not in line:
            assert line == published("k", f"this is line {due:05} of very many") + b"\n"
            due += 1
            if due == count:
                break
    piping.join()
    assert due == count
    assert "stopped" not in server.said


# Ends right.


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_when_all_that_had_arrived_is_published(
    server: Script, join: Join, signum: int
) -> None:
    peer = join(server.ports)
    gone = peer.push.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    count = 900  # what PUSH and PULL hold without anyone reading
    server.process.send_signal(signal.SIGSTOP)
    for number in range(count):
        peer.push.send(chat_body(str(number)))
    server.process.send_signal(signum)
    server.process.send_signal(signal.SIGCONT)
    assert [peer.receive() for _ in range(count)] == [
        published("k", str(number)) for number in range(count)
    ]
    assert server.wait() == 0
    assert gone.poll(TIMEOUT * 1_000)
    assert "Traceback" not in server.said


@slow
def test_what_had_arrived_goes_out_though_the_server_waits_for_a_reader_that_stopped(
    server: Script, join: Join
) -> None:
    peer = join(server.ports)
    with zmtp_connect(server.ports[1], b"SUB"):  # It never reads.
        time.sleep(0.3)  # for the subscription to take effect
        sent = heard = 0
        while sent == heard:  # until the server waits
            for _ in range(50):
                peer.push.send(chat_body("x" * 5_000))
            sent += 50
            while heard < sent and peer.sub.poll(300):
                peer.sub.recv()
                heard += 1
        for _ in range(200):
            peer.push.send(chat_body("last"))
        time.sleep(0.3)  # By now they have arrived.
        began = time.monotonic()
        server.process.terminate()
        for _ in range(sent + 200 - heard):
            peer.receive()
        assert server.wait() == 0
        assert time.monotonic() - began < 3


def test_a_reader_has_two_seconds_to_take_what_is_left_at_the_end(server: Script) -> None:
    frames = [frame(published("k", f"{number:04} {'x' * 1_000}")) for number in range(900)]
    with (
        zmtp_connect(server.ports[1], b"SUB") as reader,
        zmtp_connect(server.ports[0], b"PUSH") as push,
    ):
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        reader.settimeout(TIMEOUT)
        time.sleep(0.3)  # for the subscription to take effect
        push.sendall(b"".join(frame(chat_body(f"{n:04} {'x' * 1_000}")) for n in range(900)))
        server.process.terminate()
        time.sleep(1.5)  # the reader's rest itself: by now, the server only waits for it
        heard = bytearray()
        while more := reader.recv(1 << 20):
            heard += more
    assert heard == b"".join(frames)
    assert server.wait() == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_within_a_second_where_all_is_quiet(
    server: Script, join: Join, signum: int
) -> None:
    peer = join(server.ports)
    good(peer)
    began = time.monotonic()
    server.process.send_signal(signum)
    assert server.wait() == 0
    assert time.monotonic() - began < 1
    assert server.said.count("\n") == 1


@pytest.mark.parametrize(
    "readers",
    ["none", *(pytest.param(name, marks=slow) for name in ("one stalled", "many stalled"))],
)
def test_it_ends_within_three_seconds_in_a_flood(server: Script, readers: str) -> None:
    count = {"none": 0, "one stalled": 1, "many stalled": 20}[readers]
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(zmtp_connect(server.ports[1], b"SUB"))
        time.sleep(0.3)  # for the subscriptions to take effect
        stack.enter_context(flood(server.ports[0], chat_body("x" * 10_000)))
        time.sleep(0.3)  # with a reader that is stalled, the server waits for it by now
        began = time.monotonic()
        server.process.terminate()
        assert server.wait() == 0
        assert time.monotonic() - began < 3
    assert "Traceback" not in server.said


@slow
def test_it_ends_within_three_seconds_though_a_reader_is_full_only_then(
    server: Script, join: Join
) -> None:
    peer = join(server.ports)
    peer.push.linger = 0
    body = chat_body("x" * 16_000)
    with zmtp_connect(server.ports[1], b"SUB"):
        time.sleep(0.3)  # for the subscription to take effect
        began = time.monotonic()
        for number in itertools.count():  # A thousand a second fill its queue in two.
            with contextlib.suppress(zmq.Again):
                peer.push.send(body, zmq.NOBLOCK)
            if number == 10:
                server.process.terminate()
            if server.process.poll() is not None:
                break
            time.sleep(max(0, began + number / 1_000 - time.monotonic()))
        assert time.monotonic() - began < 3.2
    assert server.wait() == 0


@slow
def test_readers_who_read_on_miss_nothing_of_a_flood_in_which_it_ends(server: Script) -> None:
    """The chat goes at the pace of the slower one, for which the server nearly always waits."""
    heard = [bytearray(), bytearray()]

    def read(reader: socket.socket, into: bytearray, pause: float) -> None:
        while more := reader.recv(65_536):
            into += more
            time.sleep(pause)

    with contextlib.ExitStack() as stack:
        threads = []
        for into, pause in zip(heard, (0, 0.005), strict=True):
            reader = stack.enter_context(zmtp_connect(server.ports[1], b"SUB"))
            threads.append(threading.Thread(target=read, args=(reader, into, pause)))
        time.sleep(0.3)  # for the subscriptions to take effect
        for thread in threads:
            thread.start()
        stack.enter_context(flood(server.ports[0], chat_body("x" * 40)))
        time.sleep(1)  # in which the queue of the slower one becomes full
        server.process.terminate()
        for thread in threads:
            thread.join()
    assert len(heard[0]) == len(heard[1])
    assert hash(bytes(heard[0])) == hash(bytes(heard[1]))
    assert server.wait() == 0
    assert "stopped" not in server.said


@pytest.mark.parametrize("pause", [0, 0.1])
def test_signals_may_come_again_and_again(server: Script, pause: float) -> None:
    began = time.monotonic()
    while server.process.poll() is None and time.monotonic() - began < 5:
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    assert server.wait() == 0
    assert time.monotonic() - began < 2
    assert server.said.count("\n") == 1  # and that is "listens"


def test_a_second_signal_may_come_at_any_moment(start_server: StartServer) -> None:
    servers = [start_server() for _ in range(12)]
    for server in servers:
        server.process.send_signal(signal.SIGINT)
    for number, server in enumerate(servers):
        time.sleep(0.05)
        server.process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
    for server in servers:
        assert server.wait() == 0
        assert server.said.count("\n") == 1


def signals_caught(pid: int) -> int:
    """Return the signals that a process has handlers for, as a mask."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        return int(re.findall(r"^SigCgt:\s+(\w+)", text, re.MULTILINE)[0], 16)
    return 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0, 0.01])
def test_a_signal_may_come_while_it_starts(start: Start, signum: int, delay: float) -> None:
    script = start("server.py", "--pull-port", 0, "--pub-port", 0)
    deadline = time.monotonic() + TIMEOUT
    while not signals_caught(script.process.pid) & 1 << signal.SIGTERM - 1:
        assert time.monotonic() < deadline
    time.sleep(delay)
    script.process.send_signal(signum)
    assert script.wait() == 0
    assert re.fullmatch(r"(server\.py: PULL listens .*\n)?", script.said)
