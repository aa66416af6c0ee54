"""Measure the chat beside other programs, and print Markdown tables: `python tests/benchmark.py`.

The load is light, so that two cores work for the programs nearly all the time. It is one process
with plain TCP sockets: a thread sends bytes that were made beforehand, and a loop counts bytes.

All programs get the same lines, each in its own protocol: ZMTP, or that of NATS, of Redis, or MQTT
with QoS 0. NATS, Redis and Mosquitto take part where they are installed, with their default limits.
This server and the plain port of the talk parse each line and publish its message. All others pass
the line on as it is. Slow programs get fewer lines, to save time.

- Lines per second: from the first line sent to the last one delivered. Lost lines do not count.
- Lost: the share of all deliveries that did not come.
- Latency: of a line sent alone, until all readers have it. The programs take turns at this.
- Ratio: the first row's lines per second, as a multiple of this row's.

The programs take turns for several rounds. A figure is the median of the rounds; the loss and the
memory are the worst of them. Compare figures of one run only, since a machine is faster at one time
than at another.
"""

import argparse
import contextlib
import itertools
import json
import math
import resource
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zmtp
from peers import message_of
from processes import Script, free_port, port_options, python, wait_for

ASCII = b'{"user": "kenneth", "message": "this is line %08d of very many"}'
LETTERS = '{"user": "zoé", "message": "voilà la ligne %08d, ещё одна строка"}'.encode()
LINES = {1: 700_000, 10: 250_000, 100: 50_000, 1_000: 6_000}  # by the number of readers
CLIENT_LINES = 200_000  # piped through a client
REST = 0.0005  # seconds between two looks at the readers, each of which interrupts the programs
QUIET = 1.0  # seconds without a byte after which no more is expected
DISCARD = getattr(socket, "MSG_TRUNC", 0)  # Linux counts what it receives, and copies nothing.

Encode = Callable[[bytes], bytes]


# The programs.


class Program(NamedTuple):
    """A program, and how to speak to it."""

    command: list[str]  # {0} and {1} are the ports of writers and readers, {0} alone is for both
    writer: zmtp.Handshake
    reader: zmtp.Handshake
    sent: Encode  # a line as a writer sends it
    received: Encode  # a line as a reader gets it
    ports: int = 1
    share: float = 1.0  # of the lines that the others are sent, since it is slow


def message(line: bytes) -> bytes:
    """Return the frame of the message that the chat makes of a line."""
    return zmtp.frame(message_of(**json.loads(line)))


def zmq_program(received: Encode, script: str, *args: str, share: float = 1.0) -> Program:
    """Return a program that is a script here, with PULL and PUB."""
    push, sub = zmtp.HANDSHAKES[b"PUSH"], zmtp.HANDSHAKES[b"SUB"]
    return Program(python(script, *args), push, sub, zmtp.frame, received, 2, share)


def mqtt(line: bytes) -> bytes:
    """Return the packet of a line of up to 121 bytes."""
    return bytes([0x30, 6 + len(line)]) + b"\0\4chat" + line


MQTT_CONNECT = b"\x10\x0c\0\4MQTT\4\2\0\0\0\0"
NATS_CONNECT = b'CONNECT {"verbose":false}\r\n'
OURS, LOOP, FORWARDER = "this server", "bare pyzmq loop", "libzmq's forwarder"
PROGRAMS = {
    OURS: zmq_program(message, "server.py", "--pull-port={0}", "--pub-port={1}"),
    LOOP: zmq_program(zmtp.frame, "tests/reference.py", "loop", "{0}", "{1}"),
    "plain port": zmq_program(message, "tests/reference.py", "server", "{0}", "{1}", share=0.2),
    FORWARDER: zmq_program(zmtp.frame, "tests/reference.py", "forwarder", "{0}", "{1}"),
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


class Chat(NamedTuple):
    """A running program, and who is connected to it."""

    program: Program
    script: Script
    writer: socket.socket
    readers: list[socket.socket]


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def start(stack: contextlib.ExitStack, name: str, readers: int) -> Chat:
    """Run a program until the stack ends; connect a writer and readers."""
    program = PROGRAMS[name]
    ports = [free_port() for _ in range(program.ports)]
    command = [part.format(*ports) for part in program.command]
    null = subprocess.DEVNULL
    script = Script(subprocess.Popen(command, stdin=null, stdout=null, stderr=null))
    script.ports = ports[0], ports[-1]
    stack.callback(script.kill)
    wait_for(lambda: all(map(listens, ports)), lambda: f"does not listen: {command}")
    writer = zmtp.shake_hands(ports[0], program.writer)
    subs = [zmtp.shake_hands(ports[-1], program.reader) for _ in range(readers)]
    for sock in (writer, *subs):
        stack.enter_context(sock)
    return Chat(program, script, writer, subs)


# Measure.

RATE, LOST, MEMORY = "lines per second", "lost, %", "memory, MB"
LATENCY, LATENCY_99 = "latency, median, ms", "latency, 99 %, ms"
Figures = dict[str, float]  # by these names
Round = dict[str, Figures]  # by program


def deliver(chat: Chat, text: bytes, count: int) -> Figures:
    """Send lines, and count what the readers get until they have all, or all is quiet."""
    lines = b"".join(chat.program.sent(text % number) for number in range(count))
    size = len(chat.program.received(text % 0))
    received = [0] * len(chat.readers)  # bytes
    buffer = bytearray(1 << 20)
    with selectors.DefaultSelector() as selector:
        for number, reader in enumerate(chat.readers):
            selector.register(reader, selectors.EVENT_READ, number)
        began = last = time.perf_counter()
        sender = threading.Thread(target=chat.writer.sendall, args=(lines,), daemon=True)
        sender.start()
        while sender.is_alive() or min(received) < count * size:
            time.sleep(REST)
            ready = selector.select(QUIET)
            if not ready and not sender.is_alive():
                break
            for key, _ in ready:
                got = chat.readers[key.data].recv_into(buffer, 0, DISCARD)
                last = time.perf_counter()
                received[key.data] += got
                if not got:  # The program hung up.
                    selector.unregister(key.fileobj)
    # Rounded, since NATS sends a PING to each reader.
    delivered = statistics.mean(round(got / size) for got in received)
    return {
        RATE: delivered / (last - began),
        LOST: 100 * (1 - delivered / count),
        MEMORY: chat.script.memory() if sys.platform == "linux" else math.nan,
    }


def latency(chat: Chat, text: bytes, number: int) -> float:
    """Return how long a line takes to reach all readers, in milliseconds."""
    began = time.perf_counter()
    chat.writer.sendall(chat.program.sent(text % number))
    for reader in reversed(chat.readers):  # The last one usually gets it last.
        while b"%08d" % number not in reader.recv(1_000):
            pass
    return 1_000 * (time.perf_counter() - began)


def measure(names: list[str], text: bytes, readers: int) -> Round:
    """Measure programs in one round, with a number of readers each."""
    figures: Round = {}
    with contextlib.ExitStack() as stack:
        chats = {name: start(stack, name, readers) for name in names}
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number, name in itertools.product(range(20_000 // (20 + readers)), names):
            times[name].append(latency(chats[name], text, number))
        for name, chat in chats.items():
            figures[name] = deliver(chat, text, int(LINES[readers] * chat.program.share))
            percentiles = statistics.quantiles(times[name], n=100)
            figures[name] |= {LATENCY: percentiles[49], LATENCY_99: percentiles[98]}
    return figures


def measure_clients() -> Round:
    """Measure in one round how many lines the clients take there and back, once started."""
    figures: Round = {}
    lines = [ASCII % number + b"\n" for number in range(CLIENT_LINES)]
    with contextlib.ExitStack() as stack:
        ports = start(stack, OURS, readers=0).script.ports
        for name, command in {
            "client.py": python("client.py", *port_options(ports)),
            "the talk's loop": python("tests/reference.py", "client", *ports),
        }.items():
            seconds = []
            for typed in (lines[0], b"".join(lines)):
                began = time.perf_counter()
                done = subprocess.run(command, input=typed, capture_output=True, check=True)
                seconds.append(time.perf_counter() - began)
            lost = 100 * (1 - done.stdout.count(b"\n") / CLIENT_LINES)
            figures[name] = {RATE: CLIENT_LINES / (seconds[1] - seconds[0]), LOST: lost}
    return figures


# Print and draw.


def print_table(title: str, rounds: list[Round]) -> None:
    """Print the figures of all rounds: a row for each program."""
    first, *_ = rounds[0]
    columns = rounds[0][first]
    print(f"| {title} | {' | '.join(columns)} | ratio |\n|---|{'---:|' * len(columns)}---:|")
    for name in rounds[0]:
        cells = []
        for column in columns:
            choose = max if column in (LOST, MEMORY) else statistics.median
            value = choose(measured[name][column] for measured in rounds)
            cells.append(f"{value:,.0f}" if value >= 100 else f"{value:.2f}")
        ratio = statistics.median(figures[first][RATE] / figures[name][RATE] for figures in rounds)
        print(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")
    print(flush=True)


def draw(servers: dict[int, list[Round]], file: Path) -> None:
    """Draw what all readers get in a second, in colours that are read on white and on black."""
    from matplotlib import pyplot, ticker  # type: ignore[import-not-found,unused-ignore]

    grey = "#868e96"
    colours = {OURS: "#e8590c", "NATS": "#3b8eea", "Redis": "#2f9e6a", "Mosquitto": "#a87be8"}
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="tight")
    for name, colour in (colours | {FORWARDER: grey}).items():
        rates = {
            readers: readers * statistics.median(measured[name][RATE] for measured in rounds)
            for readers, rounds in servers.items()
            if name in rounds[0]
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
    figure.savefig(file, format="svg", transparent=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the chat beside other programs.")
    add = parser.add_argument
    add("--readers", metavar="N", type=int, nargs="+", choices=LINES, default=list(LINES))
    add("--rounds", metavar="N", type=int, default=5, help="default: %(default)s")
    add("--chart", metavar="FILE", type=Path, help="draw the servers' rates as SVG, by matplotlib")
    options = parser.parse_args()
    if options.chart:
        draw({}, options.chart)  # Fail now rather than in five minutes.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(10_000, most), most))  # for all readers
    names = [name for name, program in PROGRAMS.items() if shutil.which(program.command[0])]
    rounds = range(options.rounds)
    servers = {}
    for readers in options.readers:
        servers[readers] = [measure(names, ASCII, readers) for _ in rounds]
        print_table(f"readers: {readers:,}", servers[readers])
        if readers <= 100:
            letters = [measure([OURS, LOOP], LETTERS, readers) for _ in rounds]
            print_table(f"readers: {readers:,}, lines beyond ASCII", letters)
    print_table(f"{CLIENT_LINES:,} lines piped through", [measure_clients() for _ in rounds])
    if options.chart:
        draw(servers, options.chart)


if __name__ == "__main__":
    main()
