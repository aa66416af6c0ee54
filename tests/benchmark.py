"""Measure the chat beside other programs, and print Markdown tables: `python tests/benchmark.py`.

The load is light, so that two cores work for the programs nearly all the time. It is one process
with plain TCP sockets: a thread sends bytes that were made beforehand, and a loop counts bytes,
2,000 times a second at most. One reader's bytes are kept, to check the order of the lines.

All programs get the same lines, each in its own protocol: ZMTP, or that of NATS, of Redis, or MQTT
with QoS 0. NATS, Redis and Mosquitto take part where they are installed, with their default limits.
This server and the plain port of the talk parse each line and publish its message. All others pass
the line on as it is. Slow programs get fewer lines, to save time.

- Lines per second: from the first line sent to the last one delivered. Lost lines do not count.
- Lost: the share of all deliveries that did not come.
- Latency: of a line sent alone, until all readers have it. The programs take turns at this.

The programs take turns for several rounds; one reader of two that never reads is tried once. A
figure is the median of the rounds; the loss, the memory and the longest wait are the worst of them.
In parentheses: the first row's figure as a multiple of that one, the median of the rounds' ratios.
Compare figures of one run only, since a machine is faster at one time than at another.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import operator
import os
import re
import resource
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import zmtp

HERE = Path(__file__).parent
ASCII = b'{"user": "kenneth", "message": "this is line %08d of very many"}'
LETTERS = '{"user": "zoé", "message": "voilà la ligne %08d, ещё одна строка"}'.encode()
LINES = {1: 700_000, 10: 250_000, 100: 50_000, 1_000: 6_000}  # by the number of readers
STALLED_LINES = 600_000  # sent to two readers, one of which never reads
CLIENT_LINES = 200_000  # piped through a client
TURNS = 20  # at the latency
REST = 0.0005  # seconds between two looks at the readers, each of which interrupts the programs
SETTLE = 0.5  # seconds until the last subscription is in effect
QUIET = 1.0  # seconds without a byte after which no more is expected
START_TIMEOUT = 10  # seconds until a program listens
DISCARD = getattr(socket, "MSG_TRUNC", 0)  # Linux counts what it receives, and copies nothing.

Hello = tuple[bytes, bytes, bytes]  # what to say first, the answer, and what to say after it
Encode = Callable[[bytes], bytes]


# The programs.


class Program(NamedTuple):
    """A program, and how to speak to it."""

    command: list[str]  # {0} and {1} are the ports of writers and readers, {0} alone is for both
    writer: Hello
    reader: Hello
    sent: Encode  # a line as a writer sends it
    received: Encode  # a line as a reader gets it
    share: float = 1.0  # of the lines that the others are sent, since it is slow


def message(line: bytes) -> bytes:
    """Return the frame of the message that the chat makes of a line."""
    payload = json.loads(line)
    return zmtp.frame(f"{payload['user']}> \x1b[36m{payload['message']}\x1b[0m".encode())


def zmq_program(received: Encode, script: str, *args: str) -> Program:
    """Return a program that is a script here, with PULL and PUB."""
    push, sub = (zmtp.GREETING + zmtp.ready(kind) for kind in (b"PUSH", b"SUB"))
    return Program(
        [sys.executable, str(HERE / script), *args],
        (push, b"PULL", b""),
        (sub, b"PUB", zmtp.SUBSCRIBE_ALL),
        zmtp.frame,
        received,
    )


def mqtt(line: bytes) -> bytes:
    """Return the packet of a line of up to 121 bytes."""
    return bytes([0x30, 6 + len(line)]) + b"\0\4chat" + line


MQTT_CONNECT = b"\x10\x0c\0\4MQTT\4\2\0\0\0\0"
NATS_CONNECT = b'CONNECT {"verbose":false}\r\n'
OURS, LOOP, FORWARDER = "this server", "bare pyzmq loop", "libzmq's forwarder"
PROGRAMS = {
    OURS: zmq_program(message, "../server.py", "--pull-port={0}", "--pub-port={1}"),
    "plain port": zmq_program(message, "reference.py", "server", "{0}", "{1}")._replace(share=0.2),
    LOOP: zmq_program(zmtp.frame, "reference.py", "loop", "{0}", "{1}"),
    FORWARDER: zmq_program(zmtp.frame, "reference.py", "forwarder", "{0}", "{1}"),
    "NATS": Program(
        ["nats-server", "--addr=127.0.0.1", "--port={0}"],
        (NATS_CONNECT + b"PING\r\n", b"PONG", b""),
        (NATS_CONNECT + b"SUB chat 1\r\nPING\r\n", b"PONG", b""),
        lambda line: b"PUB chat %d\r\n%b\r\n" % (len(line), line),
        lambda line: b"MSG chat 1 %d\r\n%b\r\n" % (len(line), line),
    ),
    "Redis": Program(
        ["redis-server", "--bind", "127.0.0.1", "--port", "{0}", "--save", ""],
        (b"PING\r\n", b"PONG", b"CLIENT REPLY OFF\r\n"),
        (b"SUBSCRIBE chat\r\n", b":1\r\n", b""),
        lambda line: b"*3\r\n$7\r\nPUBLISH\r\n$4\r\nchat\r\n$%d\r\n%b\r\n" % (len(line), line),
        lambda line: b"*3\r\n$7\r\nmessage\r\n$4\r\nchat\r\n$%d\r\n%b\r\n" % (len(line), line),
    ),
    "Mosquitto": Program(
        ["mosquitto", "-p", "{0}"],
        (MQTT_CONNECT, b"\x20\2\0\0", b""),
        (MQTT_CONNECT + b"\x82\x09\0\1\0\4chat\0", b"\x90\3\0\1\0", b""),
        mqtt,
        mqtt,
        share=0.02,
    ),
}


def connect(port: int, hello: Hello) -> socket.socket:
    """Return a socket that has said hello."""
    first, answer, second = hello
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(first)
    heard = b""
    while answer not in heard:
        received = sock.recv(1_000)
        if not received:
            raise ConnectionError(f"{heard!r}, and no {answer!r}")
        heard += received
    sock.sendall(second)
    return sock


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[tuple[int, list[int]]]:
    """Run a program on free ports; give its process id and the ports of writers and readers."""
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        ports = [sock.getsockname()[1] for sock in (one, other)]
    argv = [part.format(*ports) for part in command]
    used = ports if "{1}" in " ".join(command) else ports[:1]
    null = subprocess.DEVNULL
    with subprocess.Popen(argv, stdin=null, stdout=null, stderr=null) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT
            for port in used:
                while socket.socket().connect_ex(("127.0.0.1", port)):
                    if time.monotonic() > deadline:
                        sys.exit(f"does not listen: {' '.join(argv)}")
                    time.sleep(0.01)
            yield process.pid, [used[0], used[-1]]
        finally:
            process.kill()


class Chat(NamedTuple):
    """A running program, and who is connected to it."""

    program: Program
    pid: int
    writer: socket.socket
    readers: list[socket.socket]

    def peak_memory(self) -> float:
        """Return the most memory that the program has used, in MB; NaN where no /proc tells."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) / 1_000
        return float("nan")


@contextlib.contextmanager
def chatting(name: str, readers: int) -> Iterator[Chat]:
    """Run a program, and give it with a writer and a number of readers."""
    program = PROGRAMS[name]
    with running(program.command) as (pid, ports), contextlib.ExitStack() as stack:
        writer = stack.enter_context(connect(ports[0], program.writer))
        subs = [stack.enter_context(connect(ports[1], program.reader)) for _ in range(readers)]
        yield Chat(program, pid, writer, subs)


# Measure.

RATE, LOST, MEMORY = "lines per second", "lost", "memory, MB"
LATENCY, LATENCY_99 = "latency, median, ms", "latency, 99 %, ms"
WAIT = "longest wait, s"  # of the first reader
FORMATS = {RATE: ",.0f", LOST: ".2%", LATENCY: ".2f", LATENCY_99: ".2f", MEMORY: ".0f", WAIT: ".2f"}
Figures = dict[str, float]  # by these names
Results = dict[tuple[str, int], list[Figures]]  # of all rounds, by program and number of readers


@functools.cache
def bytes_to_send(encode: Encode, text: bytes) -> memoryview:
    """Return the most lines that are ever sent. All are of one size."""
    return memoryview(b"".join(encode(text % number) for number in range(max(LINES.values()))))


def deliver(chat: Chat, readers: int, text: bytes, count: int) -> Figures:
    """Send lines, and count what the first readers get until they have all, or all is quiet."""
    lines = bytes_to_send(chat.program.sent, text)[: count * len(chat.program.sent(text % 0))]
    size = len(chat.program.received(text % 0))
    received = [0] * readers  # bytes
    kept = bytearray()
    buffer = memoryview(bytearray(1 << 20))
    wait = 0.0
    with selectors.DefaultSelector() as selector:
        for number, reader in enumerate(chat.readers[:readers]):
            selector.register(reader, selectors.EVENT_READ, number)
        began = last = last_of_first = time.perf_counter()
        sender = threading.Thread(target=chat.writer.sendall, args=(lines,), daemon=True)
        sender.start()
        while sender.is_alive() or min(received) < count * size:
            time.sleep(REST)
            ready = selector.select(QUIET)
            if not ready and not sender.is_alive():
                break
            for key, _ in ready:
                flags = DISCARD if key.data else 0
                got = key.fileobj.recv_into(buffer, 0, flags)  # type: ignore[union-attr]
                last = time.perf_counter()
                received[key.data] += got
                if not got:  # The program hung up.
                    selector.unregister(key.fileobj)
                elif key.data == 0:
                    kept += buffer[:got]
                    wait = max(wait, last - last_of_first)
                    last_of_first = last
    numbers = re.findall(rb"\d{8}", kept)
    if any(map(operator.ge, numbers, numbers[1:])):
        sys.exit("lines came out of order")
    # Rounded, since NATS sends a PING to each reader.
    delivered = sum(round(got / size) for got in received) / readers
    return {
        RATE: delivered / (last - began),
        LOST: 1 - delivered / count,
        MEMORY: chat.peak_memory(),
        WAIT: wait,
    }


def latencies(chat: Chat, text: bytes, samples: int) -> list[float]:
    """Return how long single lines took to reach all readers, in milliseconds."""
    times = []
    for number in range(samples):
        began = time.perf_counter()
        chat.writer.sendall(chat.program.sent(text % number))
        for reader in reversed(chat.readers):  # The last one usually gets it last.
            while b"%08d" % number not in reader.recv(1_000):
                pass
        times.append(1_000 * (time.perf_counter() - began))
    return times


def measure(results: Results, names: list[str], text: bytes, readers: int) -> None:
    """Measure programs in one round, with a number of readers each."""
    with contextlib.ExitStack() as stack:
        chats = {name: stack.enter_context(chatting(name, readers)) for name in names}
        time.sleep(SETTLE)
        times: dict[str, list[float]] = {name: [] for name in names}
        for name in TURNS * names:
            times[name] += latencies(chats[name], text, max(1, 50 // (1 + readers // 10)))
        for name, chat in chats.items():
            figures = deliver(chat, readers, text, int(LINES[readers] * chat.program.share))
            figures[LATENCY] = statistics.median(times[name])
            figures[LATENCY_99] = statistics.quantiles(times[name], n=100)[-1]
            results.setdefault((name, readers), []).append(figures)


def measure_stalled(results: Results, names: list[str]) -> None:
    """Measure what programs deliver to one reader while another never reads."""
    for name in names:
        with chatting(name, 2) as chat:
            time.sleep(SETTLE)
            figures = deliver(chat, 1, ASCII, int(STALLED_LINES * chat.program.share))
            results.setdefault((name, 2), []).append(figures)


def run(typed: bytes, script: str, *args: str) -> tuple[float, bytes, bytes]:
    """Run a script with something on stdin; return the seconds, its stdout and its stderr."""
    began = time.perf_counter()
    command = [sys.executable, str(HERE / script), *args]
    done = subprocess.run(command, input=typed, capture_output=True, check=True)
    return time.perf_counter() - began, done.stdout, done.stderr


def measure_clients(results: Results) -> None:
    """Measure in one round how many lines the clients take there and back, once started."""
    typed = [ASCII % number + b"\n" for number in range(CLIENT_LINES)]
    with tempfile.TemporaryDirectory() as directory:
        key = f"--key={directory}/chat.key"
        for name, options in {"client.py": [], "client.py with a key": [key]}.items():
            with running([*PROGRAMS[OURS].command, *options]) as (_, ports):
                argv = [f"--push-port={ports[0]}", f"--sub-port={ports[1]}", *options]
                start, _, _ = run(typed[0], "../client.py", *argv)
                whole, messages, _ = run(b"".join(typed), "../client.py", *argv)
            lost = 1 - messages.count(b"\n") / CLIENT_LINES
            figures = {RATE: CLIENT_LINES / (whole - start), LOST: lost}
            results.setdefault((name, 1), []).append(figures)
    with running(PROGRAMS[OURS].command) as (_, ports):
        _, _, told = run(b"".join(typed), "reference.py", "client", *map(str, ports))
    count, seconds = map(float, told.split())
    figures = {RATE: count / seconds, LOST: 1 - count / CLIENT_LINES}
    results.setdefault(("the talk's loop", 1), []).append(figures)


# Print and draw.


def cell(results: Results, name: str, readers: int, figure: str) -> str:
    """Return a cell of a table. The first program is what the others are compared with."""
    first = next(iter(results))[0]
    firsts, its = ([f[figure] for f in results[program, readers]] for program in (first, name))
    value = max(its) if figure in (LOST, MEMORY, WAIT) else statistics.median(its)
    if name == first or figure not in (RATE, LATENCY):
        return format(value, FORMATS[figure])
    ratio = statistics.median(a / b for a, b in zip(firsts, its, strict=True))
    return f"{value:{FORMATS[figure]}} ({ratio:.2f})"


def print_table(title: str, results: Results, columns: dict[str, tuple[int, str]]) -> None:
    """Print a table of what was measured. A heading stands for a number of readers and a figure."""
    if not results:
        return
    print(f"| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name in dict.fromkeys(name for name, _ in results):
        cells = [cell(results, name, *column) for column in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print(flush=True)


def draw(results: Results, file: Path) -> None:
    """Draw what all readers get in a second, in colours that are read on white and on black."""
    from matplotlib import pyplot, ticker  # type: ignore[import-not-found,unused-ignore]

    pyplot.rcParams["svg.hashsalt"] = "chart"  # The same figures make the same file.
    grey = "#868e96"
    colours = {OURS: "#e8590c", "NATS": "#3b8eea", "Redis": "#2f9e6a", "Mosquitto": "#a87be8"}
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="tight")
    for name, colour in (colours | {FORWARDER: grey}).items():
        rates = {
            readers: readers * statistics.median(figures[RATE] for figures in rounds)
            for (program, readers), rounds in results.items()
            if program == name
        }
        width = 3 if name == OURS else 1.5
        axes.loglog(list(rates), list(rates.values()), "o-", color=colour, lw=width, label=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.set_title("messages delivered per second, by the number of subscribers", color=grey)
    axes.tick_params(colors=grey)
    axes.spines[:].set_color(grey)
    axes.grid(color=grey, alpha=0.25)
    axes.legend(frameon=False, labelcolor="linecolor")
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def main() -> None:
    """Measure what the options ask for, and print it."""
    parser = argparse.ArgumentParser(description="Measure the chat beside other programs.")
    add = parser.add_argument
    parts = ["servers", "letters", "stalled", "clients"]
    add("--only", metavar="NAME", nargs="+", choices=parts, default=parts, help=", ".join(parts))
    add("--readers", metavar="N", type=int, nargs="+", choices=LINES, default=list(LINES))
    add("--rounds", metavar="N", type=int, default=5, help="default: %(default)s")
    add("--chart", metavar="FILE", type=Path, help="draw the servers' rates as SVG, by matplotlib")
    options = parser.parse_args()
    if options.chart:  # Fail now rather than in five minutes.
        importlib.import_module("matplotlib")
        options.chart.touch()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(10_000, most), most))  # for all readers
    names = [name for name, program in PROGRAMS.items() if shutil.which(program.command[0])]
    began = time.monotonic()
    servers, letters, stalled, clients = (Results() for _ in parts)
    for number, part in itertools.product(range(1, options.rounds + 1), options.only):
        print(f"round {number} of {options.rounds}: {part} ...", file=sys.stderr)
        for readers in options.readers:
            if part == "servers":
                measure(servers, names, ASCII, readers)
            elif part == "letters" and readers <= 100:
                measure(letters, [OURS, LOOP], LETTERS, readers)
        if part == "clients":
            measure_clients(clients)
        elif part == "stalled" and number == 1:
            measure_stalled(stalled, names)
    for text, results, figures in (
        ("", servers, (RATE, LOST, LATENCY, LATENCY_99, MEMORY)),
        (" beyond ASCII", letters, (RATE, LOST)),
    ):
        columns = dict.fromkeys(readers for _, readers in results)
        for figure in figures:
            table = {f"{readers:,}": (readers, figure) for readers in columns}
            print_table(f"{figure}{text}, by readers", results, table)
    table = {figure: (2, figure) for figure in (LOST, WAIT, MEMORY)}
    print_table("one reader of two never reads", stalled, table)
    table = {figure: (1, figure) for figure in (RATE, LOST)}
    print_table(f"{CLIENT_LINES:,} lines piped through", clients, table)
    if options.chart:
        draw(servers, options.chart)
    print(f"({time.monotonic() - began:.0f} s on {os.cpu_count()} cores)", file=sys.stderr)


if __name__ == "__main__":
    main()
