"""A server whose sockets the test holds. It takes and echoes only what the test tells it to."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
import zmq
from conftest import Script, Start, free_port, port_options

TIMEOUT = 30_000  # milliseconds


class BareServer:
    """PULL and PUB on ports that stay the same when one of them is closed and bound again."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], longest: int) -> None:
        self.context, self.longest = context, longest
        self.colors = "\x1b[36m", "\x1b[0m"
        self.ports = free_port(), free_port()
        self.open_pull()
        self.open_pub()

    def open_pull(self) -> None:
        """Open PULL, on the port where it was. It hangs up at each line that is too long for it."""
        self.pull = self.context.socket(zmq.PULL)
        self.pull.set(zmq.MAXMSGSIZE, self.longest)
        bind(self.pull, self.ports[0])

    def open_pub(self) -> None:
        """Open PUB, on the port where it was."""
        self.pub = self.context.socket(zmq.PUB)
        self.pub.set(zmq.SNDHWM, 100_000)
        bind(self.pub, self.ports[1])

    def take(self, timeout: int = TIMEOUT) -> bytes:
        """Return the next line that is pushed; fail if none comes."""
        assert self.pull.poll(timeout), "no line came"
        return self.pull.recv()

    def take_all(self, timeout: int = 300) -> list[bytes]:
        """Return the lines that are pushed, until none comes for a while."""
        taken = []
        while self.pull.poll(timeout):
            taken.append(self.pull.recv())
        return taken

    def echo(self, body: bytes) -> None:
        """Publish a line."""
        line = json.loads(body)
        on, off = self.colors
        self.pub.send(f"{line['user']}> {on}{line['message']}{off}".encode())

    def answer(self, count: int) -> list[bytes]:
        """Take and echo as many lines; return them."""
        taken = []
        for _ in range(count):
            taken.append(self.take())
            self.echo(taken[-1])
        return taken


def bind(sock: zmq.Socket[bytes], port: int) -> None:
    """Bind a socket to a port, as soon as it is free."""
    for _ in range(3_000):
        try:
            sock.bind(f"tcp://127.0.0.1:{port}")
        except zmq.ZMQError:  # The socket that had it is still being closed.
            time.sleep(0.01)
        else:
            return
    raise AssertionError(f"port {port} is not free")


MakeBare = Callable[..., BareServer]


@pytest.fixture
def make_bare(context: zmq.Context[zmq.Socket[bytes]]) -> MakeBare:
    """Give a function that makes a BareServer; its lines may be limited to some bytes."""
    return lambda longest=-1: BareServer(context, longest)


@pytest.fixture
def bare(make_bare: MakeBare) -> BareServer:
    """Give a BareServer."""
    return make_bare()


def body_of(user: str, message: str) -> bytes:
    """Return what --user makes of a line."""
    return json.dumps({"user": user, "message": message}).encode()


# What scripts are given to read, and what they print.


def write(script: Script, data: bytes) -> None:
    """Write to a script's stdin."""
    assert script.process.stdin
    script.process.stdin.write(data)
    script.process.stdin.flush()


def close(script: Script, data: bytes = b"") -> None:
    """Write the last of a script's stdin. It may have ended."""
    assert script.process.stdin
    with contextlib.suppress(BrokenPipeError):
        script.process.stdin.write(data)
        script.process.stdin.close()


def read_line(script: Script) -> bytes:
    """Return the next line of a script's stdout; end the script if none comes."""
    assert script.process.stdout
    patience = threading.Timer(TIMEOUT / 1_000, script.process.kill)
    patience.start()
    line = script.process.stdout.readline()
    patience.cancel()
    return line


def read_all(script: Script) -> bytes:
    """Return the rest of a script's stdout."""
    assert script.process.stdout
    return script.process.stdout.read()


def two_people_chat(start: Start, ports: tuple[int, int], *options: object) -> None:
    """Have two clients of a server see each other live."""
    people = []
    for name in ("ann", "ken"):
        person = start(
            "client.py", *port_options(ports), "--user", name, *options, stdin=subprocess.PIPE
        )
        write(person, b"here I am\n")
        assert read_line(person) == name.encode() + b"> here I am\n"
        people.append(person)
    ann, ken = people
    assert read_line(ann) == b"ken> here I am\n"
    write(ken, "你好 👨‍👩‍👧\n".encode())
    assert read_line(ann) == read_line(ken) == "ken> 你好 👨‍👩‍👧\n".encode()
