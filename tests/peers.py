"""The other ends of the scripts: clients of server.py, and a server for client.py."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import zmq
from processes import TIMEOUT, free_port, wait_for

Sock = zmq.Socket[bytes]
Context = zmq.Context[Sock]
Join = Callable[..., "Peer"]


def line_of(user: str, message: str) -> bytes:
    """Return the line that client.py makes of what is typed, with --user."""
    return json.dumps({"user": user, "message": message}).encode()


def message_of(user: str, message: str) -> bytes:
    """Return the message that a server publishes for a line."""
    return f"{user}> \x1b[36m{message}\x1b[0m".encode()


@pytest.fixture
def context() -> Iterator[Context]:
    """Give a context; its sockets are closed at the end, and what they hold is dropped."""
    made: Context = zmq.Context()
    yield made
    made.destroy(linger=0)


class Peer:
    """A PUSH and a SUB socket of a server. The subscription is in effect."""

    def __init__(self, context: Context, ports: tuple[int, int], server_key: bytes | None) -> None:
        self.push, self.sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
        self.sub.subscribe(b"")
        for sock, port in zip((self.push, self.sub), ports, strict=True):
            sock.set(zmq.SNDTIMEO, 1_000 * TIMEOUT)  # If the server ends, a test fails.
            sock.set(zmq.RCVTIMEO, 1_000 * TIMEOUT)
            if server_key:
                sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
                sock.curve_serverkey = server_key
            sock.connect(f"tcp://127.0.0.1:{port}")

        def subscribed() -> bool:
            self.push.send(line_of("join", "?"))
            return bool(self.sub.poll(20))

        wait_for(subscribed, lambda: "the subscription is not in effect")
        self.round_trip("join")

    def receive(self) -> bytes:
        """Return the next message; fail if none comes."""
        return self.sub.recv()

    def round_trip(self, user: str = "k") -> float:
        """Push a line, and skip all messages before its echo; return the seconds until that."""
        began = time.monotonic()
        text = f"round trip {time.monotonic_ns()}"
        self.push.send(line_of(user, text))
        while self.receive() != message_of(user, text):
            pass
        return time.monotonic() - began

    def receive_only_round_trips(self) -> None:
        """Subscribe to the echoes of round_trip only, so that a flood is not received."""
        self.sub.set(zmq.SUBSCRIBE, b"k> \x1b[36mround trip")
        self.sub.set(zmq.UNSUBSCRIBE, b"")

    def chat(self, text: str) -> None:
        """Push a line; the next message must be its echo, so nobody else's was published."""
        self.push.send(line_of("k", text))
        assert self.receive() == message_of("k", text)

    @contextlib.contextmanager
    def pushing(self, lines: Sequence[bytes]) -> Iterator[None]:
        """Push lines in a thread."""
        sender = threading.Thread(target=lambda: [self.push.send(line) for line in lines])
        sender.start()
        yield
        sender.join(TIMEOUT)


@pytest.fixture
def join(context: Context) -> Join:
    """Give a function that makes a Peer of the server at (PULL, PUB) ports, with its key if any."""
    return lambda ports, server_key=None: Peer(context, ports, server_key)


class BareServer:
    """PULL and PUB, which the test holds: it decides what is received, and what is published."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.ports = free_port(), free_port()
        self.open("pull", "pub")

    def open(self, *names: str) -> None:
        """Open "pull", "pub" or both, each time at the same ports."""
        if "pull" in names:
            self.pull = self._bound(zmq.PULL, self.ports[0])
        if "pub" in names:
            self.pub = self._bound(zmq.PUB, self.ports[1])

    def _bound(self, kind: int, port: int) -> Sock:
        sock = self.context.socket(kind)
        sock.set(zmq.SNDHWM, 100_000)

        def bind() -> bool:
            with contextlib.suppress(zmq.ZMQError):  # The one before it is still being closed.
                sock.bind(f"tcp://127.0.0.1:{port}")
                return True
            return False

        wait_for(bind, lambda: f"port {port} is not free")
        return sock

    def close(self, *names: str) -> None:
        """Close "pull", "pub" or both. What was published is still delivered."""
        for name in names:
            getattr(self, name).close(linger=1_000)

    def receive(self) -> bytes:
        """Return the next line; fail if none comes."""
        assert self.pull.poll(1_000 * TIMEOUT), "no line came"
        return self.pull.recv()

    def receive_all(self, quiet: float = 0.3) -> list[bytes]:
        """Return the lines that come until none does for a while."""
        lines = []
        while self.pull.poll(int(1_000 * quiet)):
            lines.append(self.pull.recv())
        return lines

    def expect(self, lines: list[bytes]) -> None:
        """Receive these lines, and no others after them."""
        assert [self.receive() for _ in lines] == lines
        assert self.receive_all(0.1) == []

    def echo(self, *lines: bytes) -> None:
        """Publish the messages of lines."""
        for line in lines:
            self.pub.send(message_of(**json.loads(line)))

    def answer(self, count: int) -> list[bytes]:
        """Receive a number of lines, and echo each as it comes; return them."""
        lines = []
        for _ in range(count):
            lines.append(self.receive())
            self.echo(lines[-1])
        return lines


@pytest.fixture
def bare_server(context: Context) -> BareServer:
    return BareServer(context)
