#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq", "colorama"]
# ///
"""The chat server: every JSON line PUSHed to it goes out, in colour, to all who SUBscribe.

In:  one frame, UTF-8 JSON, an object with the strings "user" and "message".
Out: one frame, UTF-8, `{user}> ESC[36m{message}ESC[0m`.

The loop is that of the talk's slides 3 to 7. What surrounds it sees to it that no line is lost,
that no reader holds up the others, and that nothing a stranger sends does any harm.
"""

import argparse
import contextlib
import json
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import zmq
from colorama import Fore, Style

MAX_LINE = 65_536  # bytes: the longest line taken; libzmq cuts off a peer that sends a longer one
BATCH = 24_000  # bytes taken, then sent: libzmq's own thread is woken once for all, not for each
AT_ONCE = 20e-6  # seconds: to receive a line that is there takes less, to wait for one more
LONG_LINE = 6_000  # bytes: 10,000 of these fill a reader's queue, but only 900 longer ones
PATIENCE = 1_000  # milliseconds to wait for a reader that has stopped, before going on without it
IDLE = 1_000 if sys.platform == "win32" else 60_000  # milliseconds: there, no signal ends a wait
SILENCE = 100  # milliseconds without a line, after which no more have arrived
TOLD_EACH = 10  # dropped lines told one by one in a second; of the rest, only how many

# What a terminal could obey, each character in a visible form. Joiners, which emoji and Persian
# need, and no-break spaces are not among it: they are text.
VISIBLE = {
    code: chr(code).encode("unicode_escape").decode()
    for codes in (
        range(0x20),  # C0 controls
        range(0x7F, 0xA0),  # DEL and C1 controls
        range(0x2028, 0x202F),  # line separators, direction overrides
        range(0x2066, 0x206A),  # direction isolates
        range(0xD800, 0xE000),  # lone surrogates
    )
    for code in codes
}

# Nearly every line: printable ASCII without escapes, as json.dumps or JSON.stringify writes it. It
# needs no parsing, and is told by this in a third of the time.
PLAIN = re.compile(rb'\{"user": ?"([ !#-[\]-~]*)", ?"message": ?"([ !#-[\]-~]*)"\}')

# Only strings matter here, so a number of any length may pass as a float, at no cost.
parse_json = json.JSONDecoder(parse_int=float).raw_decode

# pub.send without what it does for str, routing ids and groups, which takes as long as the sending.
send = zmq.backend.Socket.send


def say(text: str) -> None:
    """Tell the operator, on stderr. A terminal that has gone away does not stop the chat."""
    with contextlib.suppress(OSError):
        print(f"server.py: {text}", file=sys.stderr, flush=True)


def harmless(text: str) -> str:
    r"""Return text with its control characters in a visible form, such as `\x1b`."""
    if text.isprintable():  # so is nearly every line, and this test is a fast one
        return text
    return text.translate(VISIBLE)


def chat_line(body: bytes | None) -> bytes:
    """Return what subscribers see of a PUSHed body (slide 3): `user> message`, the message in cyan.

    A body of None stands for a message of many frames. Raises ValueError, with the reason, if the
    body is no chat line.
    """
    if body is None:
        raise ValueError("many frames, not one")
    if plain := PLAIN.fullmatch(body):
        return b"%b> \x1b[36m%b\x1b[0m" % plain.groups()
    try:
        text = body.decode().strip(" \t\r\n")
        payload, end = parse_json(text)
    except UnicodeDecodeError:
        raise ValueError(f"not UTF-8: {body[:60]!r}") from None
    except RecursionError:
        raise ValueError(f"nested too deeply: {body[:60]!r}") from None
    except ValueError:
        end = -1
    if end != len(text):
        raise ValueError(f"not JSON: {body[:60]!r}")
    if not isinstance(payload, dict):
        raise ValueError(f"not a JSON object: {body[:60]!r}")
    user, message = payload.get("user"), payload.get("message")
    if not isinstance(user, str) or not isinstance(message, str):
        raise ValueError(f'"user" and "message" are not both strings: {body[:60]!r}')
    line = f"{harmless(user)}> {Fore.CYAN}{harmless(message)}{Style.RESET_ALL}".encode()
    if len(line) > MAX_LINE:  # control characters grow
        raise ValueError(f"too long when it is made harmless: {body[:60]!r}")
    return line


def receive(pull: zmq.Socket[bytes], room: int, flags: int) -> list[bytes | None]:
    """Return bodies that PULL holds, until they fill `room` bytes, or none is left.

    Without NOBLOCK among the flags, wait for each as long as RCVTIMEO says. None stands for a
    message of many frames.
    """
    bodies: list[bytes | None] = []
    with contextlib.suppress(zmq.Again):
        while room > 0:
            frame = pull.recv(flags, copy=False)
            bodies.append(None if frame.more else frame.bytes)
            room -= len(frame) + 1
            while frame.more:
                frame = pull.recv(copy=False)
    return bodies


def publish(pub: zmq.Socket[bytes], line: bytes) -> None:
    """Send a line to every reader, waiting SNDTIMEO milliseconds at most for those that are full.

    PUB is to have NODROP set. A reader that is still full then has stopped: one send without NODROP
    makes libzmq leave it out until it reads again, so the next send waits for nobody.
    """
    if len(line) > LONG_LINE:
        pub.setsockopt(zmq.SNDHWM, 900)  # from now on: 60 MB of the longest, shared by all
    try:
        send(pub, line)
    except zmq.Again:
        pub.setsockopt(zmq.XPUB_NODROP, 0)
        pub.send(line)
        pub.setsockopt(zmq.XPUB_NODROP, 1)
        say("a reader has stopped reading: going on without it")


def republish(bodies: list[bytes | None], pub: zmq.Socket[bytes]) -> list[str]:
    """Publish what the bodies say; return why each that is no chat line was dropped."""
    lines, reasons = [], []
    for body in bodies:
        try:
            lines.append(chat_line(body))
        except ValueError as reason:
            reasons.append(str(reason))
    for line in lines:
        publish(pub, line)
    return reasons


def teller_of_drops() -> Callable[[list[str]], None]:
    """Return a function that tells the operator why lines were dropped, and stays brief in a flood.

    In any second it tells the first TOLD_EACH reasons, and after it how many more there were, for
    which it is to be called, with no reasons, even when there are none.
    """
    told = untold = 0
    second_ends = 0.0

    def tell(reasons: list[str]) -> None:
        nonlocal told, untold, second_ends
        if time.monotonic() >= second_ends:
            if untold:
                say(f"dropped {untold:,} more lines")
            told = untold = 0
            second_ends = time.monotonic() + 1
        first = reasons[: TOLD_EACH - told]
        for reason in first:
            say(f"dropped a line: {reason}")
        told += len(first)
        untold += len(reasons) - len(first)

    return tell


def serve(pull: zmq.Socket[bytes], pub: zmq.Socket[bytes], stop: threading.Event) -> None:
    """Wait for input, and forward it to all subscribers (slide 3), until told to stop.

    What has arrived by then is still published: until PULL is silent, but for a second at most.
    """
    tell_dropped = teller_of_drops()
    stop_at = math.inf
    while time.monotonic() < stop_at:
        idle_since = time.monotonic()
        bodies = receive(pull, 1, 0)
        if time.monotonic() < idle_since + AT_ONCE:  # this one had been there, so may be others
            bodies += receive(pull, BATCH, zmq.NOBLOCK)
        reasons = republish(bodies, pub)
        tell_dropped(reasons)
        if reasons or not bodies:
            pull.setsockopt(zmq.RCVTIMEO, 1_000 if reasons else IDLE)  # soon, to tell how many more
        if stop.is_set():
            pull.setsockopt(zmq.RCVTIMEO, SILENCE)
            stop_at = min(stop_at, time.monotonic() + 1) if bodies else 0


def stop_on_signals(pull: zmq.Socket[bytes]) -> threading.Event:
    """Return what is set by SIGINT and SIGTERM, which also have PULL wait no longer for a line.

    A handler that raised could strike between a line's arrival and its sending, and lose it.
    """
    stop = threading.Event()

    def handle(_signum: int, _frame: FrameType | None) -> None:
        stop.set()
        pull.setsockopt(zmq.RCVTIMEO, SILENCE)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def allow_many_readers() -> None:
    """Raise the soft limit of open files to the hard one: each reader takes one.

    Once they run out, libzmq refuses readers in a busy loop.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def bind(sock: zmq.Socket[bytes], address: str, port: int) -> str:
    """Bind a socket to a TCP port, 0 for any free one; return the endpoint with the real port.

    Raises zmq.ZMQError, its `strerror` naming the endpoint.
    """
    host = f"[{address}]" if ":" in address else address
    try:
        sock.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError as error:
        error.strerror = f"cannot listen on tcp://{host}:{port}: {error.strerror}"
        raise
    return f"tcp://{host}:{sock.get_string(zmq.LAST_ENDPOINT).rpartition(':')[2]}"


def port(text: str) -> int:
    """Return the port that an option names. Raises ValueError if it is none."""
    number = int(text)
    if not 0 <= number <= 65_535:
        raise ValueError
    return number


def main() -> int:
    """Make the sockets, serve until told to stop, and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Republish each JSON line that clients push to all who subscribe.",
        epilog="example: python server.py --bind 127.0.0.1 --pull-port 4001 --pub-port 4002",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--bind", metavar="ADDRESS", default="*", help="address to listen on")
    parser.add_argument(
        "--pull-port", metavar="PORT", type=port, default=1337, help="lines come in"
    )
    parser.add_argument("--pub-port", metavar="PORT", type=port, default=1338, help="and go out")
    options = parser.parse_args()

    allow_many_readers()
    context = zmq.Context()
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    stop = stop_on_signals(pull)
    for sock in (pull, pub):
        sock.setsockopt(zmq.IPV6, 1)  # as well as IPv4
        sock.setsockopt(zmq.BACKLOG, 1_000)  # a crowd may come at once
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_LINE)
        sock.setsockopt(zmq.HEARTBEAT_IVL, 5_000)  # a peer that vanished without a word ...
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)  # ... is cut off, its queue freed
    pull.setsockopt(zmq.RCVTIMEO, IDLE)
    pull.setsockopt(zmq.RCVHWM, 600)  # lines from each peer: 39 MB of the longest
    pub.setsockopt(zmq.SNDHWM, 10_000)  # lines for each reader: 60 MB at most, shared by all
    pub.setsockopt(zmq.XPUB_NODROP, 1)  # at that mark wait for the reader, instead of dropping,
    pub.setsockopt(zmq.SNDTIMEO, PATIENCE)  # but not for ever
    pub.setsockopt(
        zmq.SNDBUF, 131_072
    )  # bytes: a slow reader is seen to move sooner than with more
    pub.setsockopt(zmq.LINGER, 500)
    try:
        pull_endpoint = bind(pull, options.bind, options.pull_port)
        pub_endpoint = bind(pub, options.bind, options.pub_port)
    except zmq.ZMQError as error:
        say(f"{error.strerror}; stop what listens there, or see --help for other endpoints")
        return 1
    say(f"PULL listens on {pull_endpoint}, PUB on {pub_endpoint}")
    serve(pull, pub, stop)
    context.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
