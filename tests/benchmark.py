"""Measure this server and client beside what they are compared with: `python tests/benchmark.py`.

The load comes from plain TCP sockets that speak ZMTP 3.1 by themselves: lines are put together
beforehand and messages only counted, at most 2,000 times a second, so that on two cores nearly all
the time is the servers'. One reader of each run keeps what it receives, and its order is checked.

Rates are lines per second from the first one sent to the last one delivered. Latency is that of a
single line, from sending it to its arrival at the reader that connected last. The servers take
turns at it, a few lines each, while all of them run.

What a key costs is compared apart, by ready-made peers, since the plain sockets encrypt nothing.
These take most of the time themselves at one reader, so compare their rates with each other alone.

Machines are noisy, so the programs take turns for several rounds. Each figure is the median of the
rounds, what was lost and the memory are the worst of them, and a comparison is the median of the
ratios of one round each.
"""

import contextlib
import itertools
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth

HERE = Path(__file__).parent
PROGRAMS = {
    "this server": [str(HERE.parent / "server.py"), "--pull-port={0}", "--pub-port={1}"],
    "version 1.0": [],  # filled in by version_1
    "plain port": [str(HERE / "plain.py"), "server", "{0}", "{1}"],
    "raw forwarder": [str(HERE / "plain.py"), "forwarder", "{0}", "{1}"],
}
VERSION_1 = "25ff3cf:server.py"  # in git: the server of version 1.0
LINES = {1: 1_500_000, 10: 600_000, 100: 60_000}  # by the number of readers
ROUNDS = 5
TURNS = 20  # in which the latency is measured
REST = 0.0005  # seconds between two looks at the readers: not at each packet, which interrupts much
STALLED_LINES = 600_000  # with one reader of two that never reads
GREETING = b"\xff" + bytes(8) + b"\x7f\3\1" + b"NULL".ljust(20, b"\0") + bytes(32)
KEY_LINES = {1: 100_000, 10: 20_000}  # with a key and without, by the number of readers
QUIET = 1.0  # seconds without a message after which no more is expected

Command = list[str]


def progress(text: str) -> None:
    """Say on stderr what is being measured."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def version_1() -> Iterator[None]:
    """Have the server of version 1.0 among the programs, if git has it."""
    shown = None
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(HERE), "show", VERSION_1]
        shown = subprocess.run(command, capture_output=True)
    if not shown or shown.returncode:
        progress(f"version 1.0 is left out: git does not have {VERSION_1}")
        del PROGRAMS["version 1.0"]
        yield
        return
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "server.py")
        script.write_bytes(shown.stdout)
        PROGRAMS["version 1.0"] = [str(script), "--pull-port={0}", "--pub-port={1}"]
        yield


def zmtp_connect(port: int, kind: bytes) -> socket.socket:
    """Return a TCP socket that has shaken hands as a ZMTP peer of a kind, PUSH or SUB."""
    deadline = time.monotonic() + 10
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", port))
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ready = b"\5READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    sock.sendall(GREETING + b"\4" + bytes([len(ready)]) + ready)
    heard = b""
    while not re.search(b"READY.*P(ULL|UB)", heard, re.DOTALL):
        heard += sock.recv(1_000)
    if kind == b"SUB":
        sock.sendall(b"\0\1\1")  # subscribed to everything
    return sock


def frame(body: bytes) -> bytes:
    """Return a ZMTP frame."""
    size = bytes([0, len(body)]) if len(body) < 256 else b"\2" + len(body).to_bytes(8, "big")
    return size + body


def line(number: int) -> bytes:
    """Return the frame of a line."""
    return frame(b'{"user": "kenneth", "message": "this is line %08d of very many"}' % number)


def message(number: int, program: str) -> bytes:
    """Return the frame of what a program makes of it. All are of one size."""
    if program == "raw forwarder":
        return line(number)
    return frame(b"kenneth> \x1b[36mthis is line %08d of very many\x1b[0m" % number)


@contextlib.contextmanager
def running(program: str) -> Iterator[tuple["subprocess.Popen[bytes]", int, int]]:
    """Run a server on free ports; give its process and the (PULL, PUB) ports."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    command = [sys.executable, *(part.format(*ports) for part in PROGRAMS[program])]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield process, *ports
        finally:
            process.kill()


def peak_memory(pid: int) -> float | None:
    """Return the most memory that a process has used, in MB, where the system tells."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1_000 if found else None
    return None


@dataclass
class Delivery:
    """What readers got of a number of lines."""

    seconds: float
    counts: list[int]
    in_order: bool
    longest_gap: float  # seconds in which the first reader got nothing


def deliver(
    push: socket.socket, readers: list[socket.socket], lines: bytes, count: int, program: str
) -> Delivery:
    """Send lines, and count what the readers get until all have all, or all is quiet."""
    size = len(message(0, program))
    selector = selectors.DefaultSelector()
    for number, reader in enumerate(readers):
        selector.register(reader, selectors.EVENT_READ, number)
    sender = threading.Thread(target=push.sendall, args=(lines,))
    received = [0] * len(readers)
    kept = bytearray()
    buffer = memoryview(bytearray(1 << 20))
    full = 0
    longest_gap = 0.0
    began = last = last_of_first = time.perf_counter()
    sender.start()
    while full < len(readers):
        time.sleep(REST)
        ready = selector.select(QUIET)
        if not ready and not sender.is_alive():
            break
        for key, _ in ready:
            got = key.fileobj.recv_into(buffer)  # type: ignore[union-attr]
            last = time.perf_counter()
            if key.data == 0:
                kept += buffer[:got]
                longest_gap = max(longest_gap, last - last_of_first)
                last_of_first = last
            was_full = received[key.data] >= count * size
            received[key.data] += got
            full += received[key.data] >= count * size and not was_full
    sender.join()
    numbers = [int(digits) for digits in re.findall(rb"line (\d{8}) of", kept)]
    in_order = all(one < other for one, other in itertools.pairwise(numbers))
    counts = [min(got // size, count) for got in received]
    return Delivery(last - began, counts, in_order, longest_gap)


def latencies(push: socket.socket, readers: list[socket.socket], samples: int) -> list[float]:
    """Return how long single lines took to reach the last reader, in seconds."""
    times = []
    for number in range(samples):
        began = time.perf_counter()
        push.sendall(line(number))
        readers[-1].recv(1_000)
        times.append(time.perf_counter() - began)
        for reader in readers[:-1]:
            reader.recv(1_000)
    return times


@dataclass
class Result:
    """A row of the table."""

    rate: float
    delivered: float  # per second
    lost: float  # of all deliveries
    median: float  # of the latency, seconds
    worst: float  # its 99th percentile
    memory: float | None


@dataclass
class Peers:
    """A running server, and who is connected to it."""

    pid: int
    push: socket.socket
    readers: list[socket.socket]


@contextlib.contextmanager
def talking(program: str, readers: int) -> Iterator[Peers]:
    """Run a server, and give it with a writer and a number of readers."""
    with running(program) as (process, pull_port, pub_port), contextlib.ExitStack() as stack:
        subs = [stack.enter_context(zmtp_connect(pub_port, b"SUB")) for _ in range(readers)]
        push = stack.enter_context(zmtp_connect(pull_port, b"PUSH"))
        yield Peers(process.pid, push, subs)


def measure(readers: int, lines: bytes) -> dict[str, Result]:
    """Measure the servers, by program, with a number of readers each."""
    count = LINES[readers]
    sent = lines[: count * len(line(0))]
    few = 150 // (2 + readers // 10)
    results = {}
    with contextlib.ExitStack() as stack:
        peers = {program: stack.enter_context(talking(program, readers)) for program in PROGRAMS}
        time.sleep(0.5)  # for the last subscription to take effect
        samples: dict[str, list[float]] = {program: [] for program in PROGRAMS}
        for program in TURNS * list(PROGRAMS):
            samples[program] += latencies(peers[program].push, peers[program].readers, few)
        for program, its in peers.items():
            result = deliver(its.push, its.readers, sent, count, program)
            if not result.in_order:
                sys.exit(f"{program}: messages out of order")
            delivered = sum(result.counts)
            results[program] = Result(
                rate=count / result.seconds,
                delivered=delivered / result.seconds,
                lost=1 - delivered / (count * readers),
                median=statistics.median(samples[program]),
                worst=statistics.quantiles(samples[program], n=100)[-1],
                memory=peak_memory(its.pid),
            )
    return results


def measure_stalled(program: str, lines: bytes, count: int) -> tuple[Delivery, float | None]:
    """Measure what one reader gets while another never reads."""
    with talking(program, 2) as peers:
        time.sleep(0.5)  # for the last subscription to take effect
        sent = lines[: count * len(line(0))]
        result = deliver(peers.push, peers.readers[:1], sent, count, program)
        return result, peak_memory(peers.pid)


def client_seconds(ports: tuple[int, int], typed: bytes) -> float:
    """Return how long client.py takes for what is typed, to the last echo."""
    options = [f"--push-port={ports[0]}", f"--sub-port={ports[1]}"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "client.py"), *options],
        input=typed,
        capture_output=True,
        check=True,
    )
    if done.stdout.count(b"\n") != typed.count(b"\n"):
        sys.exit("client.py: not all lines came back")
    return time.perf_counter() - began


def measure_clients(count: int) -> tuple[float, float, int]:
    """Return the round trips per second of client.py and of the plain loop, and what that lost."""
    typed = b"".join(line(number)[2:] + b"\n" for number in range(count))
    with running("this server") as (_, *ports):
        pair = ports[0], ports[1]
        zmtp_connect(pair[1], b"SUB").close()  # it is there
        ours = statistics.median(
            client_seconds(pair, typed) - client_seconds(pair, typed[: typed.index(b"\n") + 1])
            for _ in range(3)
        )
        rates = []
        for _ in range(3):
            plain = subprocess.run(
                [sys.executable, str(HERE / "plain.py"), "client", *map(str, pair)],
                input=typed,
                capture_output=True,
                check=True,
            )
            back, seconds = plain.stderr.split()
            rates.append((int(back) / float(seconds), count - int(back)))
    rate, lost = sorted(rates)[1]
    return count / ours, rate, lost


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def measure_servers(lines: bytes) -> dict[tuple[str, int], list[Result]]:
    """Return the results of all rounds, by program and number of readers."""
    results: dict[tuple[str, int], list[Result]] = {}
    for readers, number in itertools.product(LINES, range(ROUNDS)):
        progress(f"{readers} readers, round {number + 1} of {ROUNDS} ...")
        for program, result in measure(readers, lines).items():
            results.setdefault((program, readers), []).append(result)
    return results


def print_servers(results: dict[tuple[str, int], list[Result]]) -> None:
    """Print the table of the servers."""
    print(row("server", "readers", "lines/s", "delivered/s", "lost", "median", "99 %", "memory"))
    print(row("---", *["---:"] * 7))
    for (program, readers), rounds in results.items():
        memory = [result.memory for result in rounds if result.memory]
        print(
            row(
                program,
                readers,
                f"{statistics.median(result.rate for result in rounds):,.0f}",
                f"{statistics.median(result.delivered for result in rounds):,.0f}",
                f"{max(result.lost for result in rounds):.1%}",
                f"{statistics.median(result.median for result in rounds) * 1_000:.2f} ms",
                f"{statistics.median(result.worst for result in rounds) * 1_000:.2f} ms",
                f"{max(memory):.0f} MB" if memory else "?",
            )
        )
    print()


def print_comparisons(results: dict[tuple[str, int], list[Result]]) -> None:
    """Print how this server compares with the others."""
    figures: dict[str, Callable[[Result], float]] = {
        "lines/s": lambda result: result.rate,
        "median latency": lambda result: result.median,
    }
    print(row("this server, compared with", *(f"{readers} readers" for readers in LINES)))
    print(row("---", *["---:"] * len(LINES)))
    for other in PROGRAMS:
        if other == "this server":
            continue
        for name, figure in figures.items():
            ratios = []
            for readers in LINES:
                pairs = zip(results["this server", readers], results[other, readers], strict=True)
                ratios.append(statistics.median(figure(our) / figure(its) for our, its in pairs))
            print(row(f"{other}, {name}", *(f"{ratio:.2f}" for ratio in ratios)))
    print()


def print_stalled(lines: bytes) -> None:
    """Measure one reader while another never reads, and print the table."""
    count = STALLED_LINES
    print(row("one reader of two never reads", "the other lost", "its longest wait", "memory"))
    print(row("---", *["---:"] * 3))
    for program in PROGRAMS:
        progress(f"{program}, one reader of two never reads ...")
        stalled, memory = measure_stalled(program, lines, count)
        lost = 1 - sum(stalled.counts) / count
        used = f"{memory:.0f} MB" if memory else "?"
        print(row(program, f"{lost:.1%}", f"{stalled.longest_gap:.2f} s", used))
    print()


def print_clients(count: int) -> None:
    """Measure the clients, and print the table."""
    progress(f"clients, {count:,} lines piped ...")
    ours, plain, plain_lost = measure_clients(count)
    print(row(f"client, {count:,} lines piped", "round trips/s", "lost"))
    print(row("---", "---:", "---:"))
    print(row("client.py", f"{ours:,.0f}", 0))
    print(row("plain loop", f"{plain:,.0f}", f"{plain_lost:,}"))
    print(row("ratio", f"{ours / plain:.2f}", ""))


def measure_key(directory: str | None, readers: int, count: int) -> tuple[float, float]:
    """Return the lines per second by ready-made peers, and the share that the first reader lost.

    The other readers keep only the latest message, so that Python hardly has to look at them.
    Given a directory, the server has a key in it, and the peers have its public half.
    """
    program = "this server" if directory is None else "with a key"
    context = zmq.Context()
    push, first, *others = (context.socket(kind) for kind in [zmq.PUSH, *[zmq.SUB] * readers])
    with running(program) as (_, pull_port, pub_port):
        for sock in (push, first, *others):
            if directory is not None:
                sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
                sock.curve_serverkey = zmq.auth.load_certificate(f"{directory}/chat.key")[0]
            if sock is not push:
                sock.set(zmq.RCVHWM, 0)
                sock.set(zmq.CONFLATE, int(sock is not first))
                sock.set(zmq.SUBSCRIBE, b"")
            sock.connect(f"tcp://127.0.0.1:{pull_port if sock is push else pub_port}")
        while not all(sub.poll(10) for sub in (first, *others)):
            push.send(line(0)[2:])
        for sub in (first, *others):
            while sub.poll(300):
                sub.recv()
        bodies = [line(number)[2:] for number in range(1, count + 1)]
        final = message(count, program)[2:]
        sent = got = 0
        began = last = time.perf_counter()
        while (got < count or others) and last > time.perf_counter() - QUIET:
            before = sent + got + readers - len(others)
            with contextlib.suppress(zmq.Again):
                for body in bodies[sent : sent + 300]:
                    push.send(body, zmq.NOBLOCK)
                    sent += 1
            with contextlib.suppress(zmq.Again):
                for _ in range(300):
                    first.recv(zmq.NOBLOCK)
                    got += 1
            if got == count:
                others = [sub for sub in others if not sub.poll(0) or sub.recv() != final]
            if sent + got + readers - len(others) > before:
                last = time.perf_counter()
            else:
                first.poll(1)
    context.destroy(linger=0)
    if others:
        sys.exit(f"{program}: readers that did not get the last line: {len(others)}")
    return count / (last - began), 1 - got / count


def print_keys() -> None:
    """Measure this server with a key and without, in turns, and print the table."""
    print(row("this server, ready-made peers", "readers", "lines/s", "lost", "ratio"))
    print(row("---", *["---:"] * 4))
    with tempfile.TemporaryDirectory() as directory:
        zmq.auth.create_certificates(directory, "chat")
        PROGRAMS["with a key"] = [*PROGRAMS["this server"], f"--key={directory}/chat"]
        for readers, count in KEY_LINES.items():
            progress(f"this server with a key and without, {readers} readers ...")
            plain, keyed = zip(
                *(
                    (measure_key(None, readers, count), measure_key(directory, readers, count))
                    for _ in range(ROUNDS)
                ),
                strict=True,
            )
            ratio = statistics.median(k[0] / p[0] for k, p in zip(keyed, plain, strict=True))
            for name, rounds in (("without a key", plain), ("with a key", keyed)):
                rate = statistics.median(rate for rate, _ in rounds)
                lost = max(lost for _, lost in rounds)
                shown = f"{ratio:.2f}" if rounds is keyed else ""
                print(row(name, readers, f"{rate:,.0f}", f"{lost:.1%}", shown))
        del PROGRAMS["with a key"]
    print()


def main() -> None:
    """Measure everything, and print the tables."""
    began = time.monotonic()
    lines = b"".join(map(line, range(max(STALLED_LINES, *LINES.values()))))
    with version_1():
        results = measure_servers(lines)
        print_servers(results)
        print_comparisons(results)
        print_stalled(lines)
    print_keys()
    print_clients(200_000)
    progress(f"({time.monotonic() - began:.0f} s on {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
