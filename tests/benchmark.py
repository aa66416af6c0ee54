"""Measure the server beside others, and print Markdown tables: `python tests/benchmark.py`.

The load is light, so that two cores work for the programs nearly all the time. It is one process
with plain TCP sockets: a thread sends bytes that were made beforehand, and a loop counts bytes.

All programs get the same lines, each in its own protocol: ZMTP, or that of NATS, of Redis, or MQTT
with QoS 0. NATS, Redis and Mosquitto take part where they are installed, with their default limits.
This server parses each line and publishes its message. All others pass the line on as it is.
Mosquitto gets fewer lines, to save time.

- Lines per second: from the first line sent to the last one delivered. Lost lines do not count.
- Lost: the share of all deliveries that did not come.
- Ratio: this server's lines per second, as a multiple of this row's.

The programs take turns for several rounds. A figure is the median of the rounds; the loss is the
worst of them. Compare figures of one run only: a machine is not always equally fast.
"""

import argparse
import contextlib
import json
import resource
import selectors
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL
from typing import NamedTuple

import zmtp
from peers import message_of
from processes import free_port, python, wait_for

ASCII = b'{"user": "kenneth", "message": "this is line %08d of very many"}'
LETTERS = '{"user": "zoé", "message": "voilà la ligne %08d, ещё одна строка"}'.encode()
LINES = {1: 700_000, 10: 250_000, 100: 50_000, 1_000: 6_000}  # by the number of readers
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


def zmq_program(script: list[str], received: Encode) -> Program:
    """Return a program that is a script here, with PULL and PUB."""
    push, sub = zmtp.HANDSHAKES[b"PUSH"], zmtp.HANDSHAKES[b"SUB"]
    return Program(python(*script), push, sub, zmtp.frame, received, ports=2)


def mqtt(line: bytes) -> bytes:
    """Return the packet of a line of up to 121 bytes."""
    return bytes([0x30, 6 + len(line)]) + b"\0\4chat" + line


MQTT_CONNECT = b"\x10\x0c\0\4MQTT\4\2\0\0\0\0"
NATS_CONNECT = b'CONNECT {"verbose":false}\r\n'
OURS, LOOP, FORWARDER = "this server", "bare pyzmq loop", "libzmq's forwarder"
PROGRAMS = {
    OURS: zmq_program(
        ["server.py", "--pull-port={0}", "--pub-port={1}"],
        lambda line: zmtp.frame(message_of(**json.loads(line))),
    ),
    LOOP: zmq_program(["tests/reference.py", "loop", "{0}", "{1}"], zmtp.frame),
    FORWARDER: zmq_program(["tests/reference.py", "forwarder", "{0}", "{1}"], zmtp.frame),
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


# Measure.


def deliver(program: Program, text: bytes, peers: zmtp.Sockets) -> tuple[float, float]:
    """Send lines until the readers have all, or all is quiet. Return the rate, and the loss."""
    writer, *readers = peers
    count = int(LINES[len(readers)] * program.share)
    lines = b"".join(program.sent(text % number) for number in range(count))
    size = len(program.received(text % 0))
    received = dict.fromkeys(readers, 0)  # bytes
    buffer = bytearray(1 << 20)
    sender = threading.Thread(target=writer.sendall, args=(lines,), daemon=True)
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader, selectors.EVENT_READ, reader)
        began = last = time.perf_counter()
        sender.start()
        while sender.is_alive() or min(received.values()) < count * size:
            time.sleep(REST)
            ready = selector.select(QUIET)
            if not ready and not sender.is_alive():
                break
            for key, _ in ready:
                got = key.data.recv_into(buffer, 0, DISCARD)
                last = time.perf_counter()
                received[key.data] += got
                if not got:  # The program hung up.
                    selector.unregister(key.data)
    # Rounded, since NATS sends a PING to each reader.
    delivered = statistics.mean(round(got / size) for got in received.values())
    return delivered / (last - began), 100 * (1 - delivered / count)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def measure(name: str, text: bytes, readers: int) -> tuple[float, float]:
    """Run a program with a writer and readers. Return its lines per second, and the loss in %."""
    program = PROGRAMS[name]
    ports = [free_port() for _ in range(program.ports)]
    command = [part.format(*ports) for part in program.command]
    handshakes = [(ports[0], program.writer)] + [(ports[-1], program.reader)] * readers
    with (
        subprocess.Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        wait_for(lambda: all(map(listens, ports)), lambda: f"does not listen: {command}")
        peers = [stack.enter_context(zmtp.shake_hands(*handshake)) for handshake in handshakes]
        time.sleep(zmtp.SUBSCRIPTION_DELAY)
        return deliver(program, text, peers)


def compare(names: list[str], text: bytes, readers: int, rounds: int) -> dict[str, float]:
    """Measure programs in turns, and print their figures. Return their rates."""
    figures = [{name: measure(name, text, readers) for name in names} for _ in range(rounds)]
    print(f"| readers: {readers:,} | lines per second | lost, % | ratio |\n|---|---:|---:|---:|")
    medians = {}
    for name in names:
        rates, losses = zip(*(measured[name] for measured in figures), strict=True)
        ratios = [measured[OURS][0] / measured[name][0] for measured in figures]
        medians[name] = statistics.median(rates)
        columns = f"{medians[name]:,.0f} | {max(losses):.2f} | {statistics.median(ratios):.2f}"
        print(f"| {name} | {columns} |")
    print(flush=True)
    return medians


# Draw.


def draw(rates: dict[int, dict[str, float]], file: Path) -> None:
    """Draw what all readers get in a second, in colours that are read on white and on black."""
    from matplotlib import pyplot, ticker  # type: ignore[import-not-found,unused-ignore]

    grey = "#868e96"
    colours = {OURS: "#e8590c", "NATS": "#3b8eea", "Redis": "#2f9e6a", "Mosquitto": "#a87be8"}
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="tight")
    for name, colour in (colours | {FORWARDER: grey}).items():
        line = {readers: readers * by[name] for readers, by in rates.items() if name in by}
        width = 3 if name == OURS else 1.5
        axes.loglog(list(line), list(line.values()), "o-", color=colour, lw=width, label=name)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the chat beside other programs.")
    add = parser.add_argument
    add("--readers", metavar="N", type=int, nargs="+", choices=LINES, default=list(LINES))
    add("--rounds", metavar="N", type=int, default=5, help="default: %(default)s")
    add("--letters", action="store_true", help="send lines with letters beyond ASCII")
    add("--chart", metavar="FILE", type=Path, help="draw the servers' rates as SVG, by matplotlib")
    options = parser.parse_args()
    if options.chart:
        draw({}, options.chart)  # Fail now rather than in five minutes.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(10_000, most), most))  # for all readers
    names = [name for name, program in PROGRAMS.items() if shutil.which(program.command[0])]
    text = LETTERS if options.letters else ASCII
    rates = {number: compare(names, text, number, options.rounds) for number in options.readers}
    if options.chart:
        draw(rates, options.chart)
