"""ZMTP over plain TCP sockets: peers that are faster than libzmq's, or do what libzmq never does.

RFC 37 describes it: a greeting, a READY command with the socket type, and then frames.
"""

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from peers import line_of, message_of
from processes import TIMEOUT

SUBSCRIPTION_DELAY = 0.3  # seconds until a subscription is surely in effect


def greeting(mechanism: bytes, minor: int = 1) -> bytes:
    """Return the greeting of a client, in ZMTP 3.x."""
    signature = b"\xff" + bytes(7) + b"\1\x7f"
    return signature + bytes([3, minor]) + mechanism.ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = 0) -> bytes:
    """Return a frame: of a line or a message, unless flags say otherwise."""
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | 2]) + struct.pack(">Q", len(body)) + body


def command(name: bytes, data: bytes = b"") -> bytes:
    """Return the frame of a command."""
    return frame(bytes([len(name)]) + name + data, flags=4)


def ready(kind: bytes) -> bytes:
    """Return the frame of the READY command of a socket type."""
    return command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind)


GREETING = greeting(b"NULL")
SUBSCRIBE_ALL = frame(b"\1")  # as ZMTP 3.0 does it; 3.1 may use a command


def connect(port: int, kind: bytes, host: str = "127.0.0.1") -> socket.socket:
    """Return a TCP socket after the handshake as a peer of a kind, PUSH or SUB.

    SUB has asked for all messages, which takes effect within SUBSCRIPTION_DELAY.
    """
    sock = socket.create_connection((host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(GREETING + ready(kind))
    answer = b""
    while not re.search(b"READY.*P(ULL|UB)", answer, re.DOTALL):
        received = sock.recv(1_000)
        if not received:
            raise ConnectionError("the server hung up in the handshake")
        answer += received
    if kind == b"SUB":
        sock.sendall(SUBSCRIBE_ALL)
    return sock


@contextlib.contextmanager
def subscribers(
    port: int, count: int = 1, host: str = "127.0.0.1"
) -> Iterator[list[socket.socket]]:
    """Give subscribers to all messages. One that the test does not read stalls."""
    with contextlib.ExitStack() as stack:
        subs = [stack.enter_context(connect(port, b"SUB", host)) for _ in range(count)]
        time.sleep(SUBSCRIPTION_DELAY)
        yield subs


# The handshakes of PUSH and SUB, and the frames, in all versions that libzmq understands.
OLD_GREETING = b"\xff" + bytes(7) + b"\1\x7f\1"
DIALECTS: dict[str, tuple[bytes, bytes, Callable[[bytes], bytes]]] = {
    "ZMTP 1.0": (b"\1\0", b"\1\0", lambda body: bytes([len(body) + 1, 0]) + body),
    "ZMTP 2.0": (OLD_GREETING + b"\x08\0\0", OLD_GREETING + b"\2\0\0", frame),
    "ZMTP 3.0": (
        greeting(b"NULL", 0) + ready(b"PUSH"),
        greeting(b"NULL", 0) + ready(b"SUB"),
        frame,
    ),
    "ZMTP 3.1": (GREETING + ready(b"PUSH"), GREETING + ready(b"SUB"), frame),
}


def reset(sock: socket.socket) -> None:
    """Break a connection at once."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def receive_until_quiet(sock: socket.socket, quiet: float = 0.3) -> tuple[bytes, bool]:
    """Return what comes until nothing does for a while, and whether the peer hung up."""
    sock.settimeout(quiet)
    received = b""
    try:
        while data := sock.recv(1 << 20):
            received += data
    except TimeoutError:
        return received, False
    except ConnectionError:
        pass
    return received, True


def hung_up(sock: socket.socket) -> bool:
    """Return whether the peer has closed the connection. What it had sent is read."""
    return receive_until_quiet(sock, 0.001)[1]


def numbered(count: int, more: str = "") -> tuple[bytes, bytes]:
    """Return the frames of lines with numbers, and those of their messages, each of one size."""
    texts = [f"{number:08}{more}" for number in range(count)]
    lines = b"".join(frame(line_of("k", text)) for text in texts)
    return lines, b"".join(frame(message_of("k", text)) for text in texts)


@contextlib.contextmanager
def sending(sock: socket.socket, data: bytes, repeat: bool = False) -> Iterator[None]:
    """Send data in a thread: once, or over and over until the end. The peer may hang up."""

    def send() -> None:
        with contextlib.suppress(OSError):
            sock.sendall(data)
            while repeat:
                sock.sendall(data)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        if repeat:
            with contextlib.suppress(OSError):  # The peer may have ended.
                sock.shutdown(socket.SHUT_RDWR)
        sender.join(TIMEOUT)


@contextlib.contextmanager
def flood(port: int, *lines: bytes) -> Iterator[None]:
    """Push lines over and over, as fast as the server takes them."""
    frames = b"".join(map(frame, lines)) * (1 + 100_000 // sum(map(len, lines)))
    with connect(port, b"PUSH") as push, sending(push, frames, repeat=True):
        yield
