"""ZMTP over plain TCP sockets: peers that are faster than libzmq's, or do what libzmq never does.

RFC 37 describes it: a greeting, a READY command with the socket type, and then frames.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

from peers import line_of, message_of
from processes import TIMEOUT

SUBSCRIPTION_DELAY = 0.3  # seconds until a subscription is surely in effect
Sockets = list[socket.socket]


def frame(body: bytes) -> bytes:
    """Return the frame of a line, a message or a subscription."""
    if len(body) < 256:
        return bytes([0, len(body)]) + body
    return b"\2" + struct.pack(">Q", len(body)) + body


def ready(kind: bytes) -> bytes:
    """Return the READY command of a socket type."""
    body = b"\5READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return bytes([4, len(body)]) + body


GREETING = b"\xff" + bytes(7) + b"\1\x7f\3\1" + b"NULL".ljust(20, b"\0") + bytes(32)
Handshake = tuple[bytes, bytes, bytes]  # what to say first, the answer, and what to say after it
HANDSHAKES: dict[bytes, Handshake] = {
    b"PUSH": (GREETING + ready(b"PUSH"), b"PULL", b""),
    b"SUB": (GREETING + ready(b"SUB"), b"PUB", frame(b"\1")),
}


def shake_hands(port: int, handshake: Handshake, host: str = "127.0.0.1") -> socket.socket:
    """Return a TCP socket after a handshake, in ZMTP or another protocol."""
    first, answer, second = handshake
    sock = socket.create_connection((host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(first)
    heard = b""
    while answer not in heard:
        received = sock.recv(1_000)
        assert received, f"hung up in the handshake after {heard!r}"
        heard += received
    sock.sendall(second)
    return sock


def connect(port: int, kind: bytes, host: str = "127.0.0.1") -> socket.socket:
    """Return a TCP socket after the handshake of a PUSH, or of a SUB that wants all messages."""
    return shake_hands(port, HANDSHAKES[kind], host)


@contextlib.contextmanager
def subscribers(port: int, count: int = 1, host: str = "127.0.0.1") -> Iterator[Sockets]:
    """Give subscribers to all messages. One that the test does not read stalls."""
    with contextlib.ExitStack() as stack:
        subs = [stack.enter_context(connect(port, b"SUB", host)) for _ in range(count)]
        time.sleep(SUBSCRIPTION_DELAY)
        yield subs


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
    except (TimeoutError, ConnectionError) as error:
        return received, isinstance(error, ConnectionError)
    return received, True


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
def flood(port: int, line: bytes) -> Iterator[None]:
    """Push a line over and over, as fast as the server takes it."""
    frames = frame(line) * (1 + 100_000 // len(line))
    with connect(port, b"PUSH") as push, sending(push, frames, repeat=True):
        yield
