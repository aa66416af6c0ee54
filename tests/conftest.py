"""What the tests share: the scripts as real processes, and real sockets to talk to them."""

import contextlib
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq

sys.dont_write_bytecode = True  # so that importing the scripts leaves nothing beside them

pytest_plugins = ["bare", "network"]

ROOT = Path(__file__).parent.parent
CONNECTED = "client.py: connected to localhost\n"
NO_SERVER = "client.py: no server at localhost, or one whose --key differs; lines wait\n"
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = itertools.cycle(random.sample(range(10_000 + WORKER, 32_000, 20), 1_100))
TIMEOUT = 30  # seconds after which a condition counts as failed, on however busy a machine


def wait_for(condition: Callable[[], object], what: Callable[[], object]) -> None:
    """Wait until condition() is true; fail, saying what() there is instead, if it never is."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain, at the end: {what()}"
        time.sleep(0.005)


def free_port() -> int:
    """Return a TCP port that nothing listens on, and that nobody else takes meanwhile.

    It is not among those that systems give to connections, nor among those of another worker.
    """
    while True:
        number = next(PORTS)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", number))
            return number


@dataclass
class Script:
    """A script as a process, what it says on stderr collected as it comes."""

    process: "subprocess.Popen[bytes]"
    said: str = ""
    ports: tuple[int, int] = (0, 0)
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.said += line.decode()

    def wait_said(self, pattern: str) -> "re.Match[str]":
        """Wait until stderr has what matches pattern."""
        wait_for(lambda: re.search(pattern, self.said), lambda: (pattern, self.said))
        match = re.search(pattern, self.said)
        assert match
        return match

    def wait(self) -> int:
        """Wait for the end; return the exit status, with all of stderr in `said`."""
        status = self.process.wait(TIMEOUT)
        self.reader.join(TIMEOUT)
        return status

    def stat(self, name: str) -> int:
        """Return a figure of /proc/PID/status, in kB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[0])

    def cpu_seconds(self) -> float:
        """Return the processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def open_files(self) -> int:
        """Return how many files it has open, one for each connection among them."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


Start = Callable[..., Script]


@pytest.fixture
def start() -> Iterator[Start]:
    """Give a function that starts a script; whatever still runs at the end is killed.

    `before` is a command that runs the command that follows it.
    """
    scripts = []

    def start_script(
        name: str,
        *args: object,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        before: Sequence[str] = (),
    ) -> Script:
        command = [*before, sys.executable, str(ROOT / name), *map(str, args)]
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr)
        scripts.append(Script(process))
        return scripts[-1]

    yield start_script
    for script in scripts:
        script.process.kill()
        script.wait()
        for pipe in (script.process.stdin, script.process.stdout, script.process.stderr):
            if pipe:
                pipe.close()


@pytest.fixture
def start_server(start: Start) -> Callable[..., Script]:
    """Give a function that starts server.py on free ports, or on those named."""

    def start_it(pull_port: int = 0, pub_port: int = 0, before: Sequence[str] = ()) -> Script:
        ports = pull_port or free_port(), pub_port or free_port()
        options = ["--pull-port", ports[0], "--pub-port", ports[1]]
        return listening(start("server.py", *options, before=before))

    return start_it


def listening(script: Script) -> Script:
    """Wait until a server listens, and, if it has a key, until it has told so."""
    heard = script.wait_said(r"PULL listens on tcp://\*:(\d+), PUB on tcp://\*:(\d+)\n")
    script.ports = (int(heard[1]), int(heard[2]))
    if "--key" in script.process.args:  # type: ignore[operator]
        script.wait_said(r"encrypted.*\n")
    return script


@pytest.fixture
def server(start_server: Callable[[], Script]) -> Script:
    """Give a running server.py."""
    return start_server()


def port_options(ports: tuple[int, int]) -> list[str]:
    """Return the options that make client.py use a server's (PULL, PUB) ports."""
    return ["--push-port", str(ports[0]), "--sub-port", str(ports[1])]


RunClient = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def run_client() -> RunClient:
    """Give a function that runs client.py with bytes on stdin until it ends."""

    def run(
        ports: tuple[int, int], typed: bytes, *args: str
    ) -> "subprocess.CompletedProcess[bytes]":
        command = [sys.executable, str(ROOT / "client.py"), *port_options(ports), *args]
        return subprocess.run(command, input=typed, capture_output=True, timeout=TIMEOUT)

    return run


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """Give a context; its sockets are closed at the end, and what they hold is dropped."""
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made.set(zmq.MAX_SOCKETS, 5_000)
    yield made
    made.destroy(linger=0)


class Peer:
    """A PUSH and some SUB sockets of a server, each subscription known to be in effect."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], ports: tuple[int, int], readers: int = 1
    ) -> None:
        self.push = context.socket(zmq.PUSH)
        self.push.connect(f"tcp://127.0.0.1:{ports[0]}")
        self.subs = [context.socket(zmq.SUB) for _ in range(readers)]
        for sub in self.subs:
            sub.setsockopt(zmq.SUBSCRIBE, b"")
            sub.connect(f"tcp://127.0.0.1:{ports[1]}")
        for sock in (self.push, *self.subs):  # Whoever waits for a server that ended fails.
            sock.set(zmq.SNDTIMEO, TIMEOUT * 1_000)
            sock.set(zmq.RCVTIMEO, TIMEOUT * 1_000)
        self.sub = self.subs[0]
        self._join()

    def _join(self) -> None:
        """Push lines until every SUB has had one, then read up to the last of them."""
        sent = 0

        def all_reached() -> bool:
            nonlocal sent
            sent += 1
            self.push.send(b'{"user": "join", "message": "%d"}' % sent)
            return all(sub.poll(20 if sub is self.sub else 0) for sub in self.subs)

        wait_for(all_reached, lambda: "a subscription not in effect")
        for sub in self.subs:
            while sub.recv() != b"join> \x1b[36m%d\x1b[0m" % sent:
                pass

    def receive(self, sub: zmq.Socket[bytes] | None = None) -> bytes:
        """Return the next message; fail if none comes."""
        sub = sub or self.sub
        assert sub.poll(TIMEOUT * 1_000), "no message came"
        return sub.recv()


@pytest.fixture
def join(context: zmq.Context[zmq.Socket[bytes]]) -> Callable[..., Peer]:
    """Give a function that makes a Peer of the server at (PULL, PUB) ports."""
    return lambda ports, readers=1: Peer(context, ports, readers)
