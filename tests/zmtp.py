"""ZMTP over plain TCP sockets: peers that are faster than libzmq's, or do what libzmq never does.

RFC 37 describes it: a greeting, a READY command with the socket type, and then frames.
"""

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator

CONNECT_TIMEOUT = 10  # seconds until something listens on the port
SUBSCRIPTION_DELAY = 0.3  # seconds until a subscription is surely in effect


def greeting(mechanism: bytes, minor: int = 1, as_server: int = 0) -> bytes:
    """Return a greeting of ZMTP 3.x."""
    signature = b"\xff" + bytes(7) + b"\1\x7f"
    return (
        signature + bytes([3, minor]) + mechanism.ljust(20, b"\0") + bytes([as_server, *[0] * 31])
    )


def command(name: bytes, data: bytes = b"") -> bytes:
    """Return the frame of a command."""
    body = bytes([len(name)]) + name + data
    if len(body) < 256:
        return bytes([4, len(body)]) + body
    return b"\6" + struct.pack(">Q", len(body)) + body


def ready(kind: bytes) -> bytes:
    """Return the frame of the READY command of a socket type."""
    return command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind)


def frame(body: bytes) -> bytes:
    """Return the frame of a line or a message."""
    if len(body) < 256:
        return bytes([0, len(body)]) + body
    return b"\2" + struct.pack(">Q", len(body)) + body


GREETING = greeting(b"NULL")
SUBSCRIBE_ALL = frame(b"\1")  # as ZMTP 3.0 does it; 3.1 may use a command


def connect(port: int, kind: bytes, host: str = "127.0.0.1") -> socket.socket:
    """Return a TCP socket after the handshake as a peer of a kind, PUSH or SUB.

    SUB has asked for all messages, which takes effect within SUBSCRIPTION_DELAY.
    """
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            sock = socket.create_connection((host, port))
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
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


def frame_1_0(body: bytes) -> bytes:
    """Return the frame of a short line or message in ZMTP 1.0."""
    return bytes([len(body) + 1, 0]) + body


# The handshakes of PUSH and SUB, and the frames, in all versions that libzmq understands.
OLD_GREETING = b"\xff" + bytes(7) + b"\1\x7f\1"
DIALECTS = {
    "ZMTP 1.0": (b"\1\0", b"\1\0", frame_1_0),
    "ZMTP 2.0": (OLD_GREETING + b"\x08\0\0", OLD_GREETING + b"\2\0\0", frame),
    "ZMTP 3.0": (
        greeting(b"NULL", 0) + ready(b"PUSH"),
        greeting(b"NULL", 0) + ready(b"SUB"),
        frame,
    ),
    "ZMTP 3.1": (GREETING + ready(b"PUSH"), GREETING + ready(b"SUB"), frame),
}


def speak(ports: tuple[int, int], dialect: str, line: bytes) -> tuple[socket.socket, socket.socket]:
    """Return a PUSH that has sent a line, and a SUB that has asked for all messages."""
    *handshakes, to_frame = DIALECTS[dialect]
    socks = []
    for port, handshake, body in zip(ports, handshakes, (line, b"\1"), strict=True):
        socks.append(socket.create_connection(("127.0.0.1", port)))
        with contextlib.suppress(ConnectionError):
            socks[-1].sendall(handshake)
            receive_until_quiet(socks[-1], 0.05)  # Only then is the server ready.
            socks[-1].sendall(to_frame(body))
    return socks[0], socks[1]


def reset(sock: socket.socket) -> None:
    """Break a connection at once."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def send_until_full(sock: socket.socket, data: bytes) -> None:
    """Send data over and over, until none is taken for a moment, or the peer hangs up."""
    sock.settimeout(0.3)
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(data)


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


@contextlib.contextmanager
def flood(port: int, *lines: bytes) -> Iterator[None]:
    """Push lines over and over, as fast as the server takes them."""
    frames = b"".join(map(frame, lines)) * (1 + 100_000 // sum(map(len, lines)))

    def send() -> None:
        with contextlib.suppress(OSError):
            while True:
                push.sendall(frames)

    with connect(port, b"PUSH") as push:
        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # The server may have ended.
                push.shutdown(socket.SHUT_RDWR)
            sender.join()
