#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq>=25", "colorama>=0.4.6"]
# ///
r"""The chat server of the talk "Ømq & Services @ Chartboost" (slide 3), in Python.

Clients PUSH lines (on the slide: body). Each is a JSON object. (The talk's client sends what its
user types, so the talk's users type JSON.) The server makes a message from each line and PUBlishes
it to all subscribers, which are the same clients. Lines and messages are in UTF-8. Each is one
ZeroMQ frame: one send, one recv. (A line needs no newline at its end, and may contain newlines.)

line     {"user": USER, "message": TEXT}    a JSON object; the values are strings or numbers
message  USER> \x1b[36mTEXT\x1b[0m          \x1b[36m turns cyan on, \x1b[0m off

In this file, a message is what is published. What the key "message" holds is called text.

libzmq, ZeroMQ's library, has a thread of its own, which moves lines and messages between the
network and queues: one queue of lines from each client, and one of messages for each subscriber.
All are limited by a high-water mark (HWM). If a queue of lines is full, libzmq reads no more from
that client. If a queue of messages is full, PUB by default drops messages for that subscriber. This
server waits up to 2 seconds for the subscriber to catch up, and only then drops messages.

The function serve is the talk's loop. What this file adds to it:
- Invalid lines are dropped and reported on stderr, instead of ending the loop: see make_messages.
- Characters that could garble a terminal are escaped: see sanitize.
- The chat waits for slow subscribers: see Publisher.
- After Ctrl-C, or another signal to exit, the loop goes on for a second, so that lines on their way
  are published, too: see Shutdown.
- Lines are received and parsed in batches, for speed: see receive and match_simple_lines.
- Limits are set, and peers that vanish are disconnected: see make_sockets.
- With --key NAME, all connections are encrypted, and only clients that have the file NAME.key can
  connect.

The loop comes first. The slide's earlier steps are in main, at the end. On a first reading, go from
"Make sockets" straight to main.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import zmq
from colorama import Fore, Style

Sock = zmq.Socket[bytes]  # for type hints: a socket whose recv returns bytes

MAX_SIZE = 16_384  # bytes of a line or a message; libzmq disconnects clients that send longer lines
PULL_HWM = 256  # lines queued per client: at most 4.2 MB
PUB_HWM = 2_000  # messages queued per subscriber: at most 33 MB
MAX_BATCH = 300  # Receive at most this many lines, of all clients, before publishing them.
CYAN, RESET = Fore.CYAN, Style.RESET_ALL

# recv(pull) is pull.recv(), and send(pub, ...) is pub.send(...), but up to twice as fast: these are
# the methods of zmq.Socket's compiled base class.
recv, send = zmq.backend.Socket.recv, zmq.backend.Socket.send


def serve(pull: Sock, pub: Sock, shutdown: Shutdown, log: Log) -> None:
    """Wait for input and forward it to all subscribers (slide 3), until a second after a signal."""
    publisher = Publisher(pub, shutdown, log)
    while not shutdown.loop_must_end():
        lines = receive(pull)
        messages = make_messages(lines, log)
        publisher.publish(messages)


# ---- Receive ----


def receive(pull: Sock) -> list[bytes]:
    """Wait for a line. Return it and any others that have already arrived, up to MAX_BATCH in all.

    Return an empty list if no line comes within 0.2 seconds (RCVTIMEO, see make_sockets), so that
    the loop can end.

    Batches make sending faster. A send must wake libzmq's thread if it is asleep, which costs more
    than the send itself. If a line were received and parsed before each send, the thread might fall
    asleep in between, and each send would pay. In a batch, the sends follow one another: only the
    first one pays.
    """
    lines: list[bytes] = []
    with contextlib.suppress(zmq.Again):  # raised after the timeout, or when no line is queued
        lines.append(recv(pull))
        while len(lines) < MAX_BATCH:
            lines.append(recv(pull, zmq.NOBLOCK))
    return lines


# ---- Make messages ----


def make_messages(lines: list[bytes], log: Log) -> list[bytes]:
    """Return the message for each valid line (slide 3): `user> text`, with the text in cyan.

    For speed, match_simple_lines first takes all lines in one go. For each line that is not simple,
    such as one with an empty user, JSON escapes, or something to sanitize, it returns ("", "").
    Such a line goes to parse_line, the slide's JSON.parse, which could do for all. Invalid lines
    are dropped and reported.
    """
    messages = []
    for line, (user, text) in zip(lines, match_simple_lines(lines), strict=True):
        try:
            if not user:  # not simple: match_simple_lines returned ("", "")
                user, text = parse_line(line)
            message = f"{user}> {CYAN}{text}{RESET}".encode()
            # Only escaping makes a message longer than its line: `> ` and the colors add 11 bytes,
            # fewer than the JSON syntax takes.
            if len(message) > MAX_SIZE:
                raise ValueError("too long once escaped")
            messages.append(message)
        except (ValueError, RecursionError) as error:
            log.report("dropped a line", f"{error}: {line[:60]!r}")
    return messages


# A user or a text may be a number. This decoder returns it as a string, exactly as written.
parse_json = json.JSONDecoder(parse_int=str, parse_float=str).decode


def parse_line(line: bytes) -> tuple[str, str]:
    """Return the user and the text of a line, sanitized.

    Raises ValueError, with the reason, if the line is invalid, and RecursionError if it is nested
    too deeply.
    """
    match parse_json(line.decode().removeprefix("\ufeff")):  # skip a byte order mark
        case {"user": str(user), "message": str(text)}:  # Here, numbers are strings, too.
            return sanitize(user), sanitize(text)
    raise ValueError('not an object whose "user" and "message" are strings or numbers')


# The characters to escape. In a terminal, most of them could move the cursor, or reverse the text.
UNSAFE = [*range(0x09), *range(0x0A, 0x20), *range(0x7F, 0xA0)]  # control characters, except TAB
UNSAFE += [*range(0x2028, 0x202F), *range(0x2066, 0x206A)]  # line separators, text directions
UNSAFE += [*range(0xD800, 0xE000)]  # lone surrogates: JSON may contain "\ud800", UTF-8 may not
ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in UNSAFE}


def sanitize(text: str) -> str:
    r"""Return text with its unsafe characters escaped: ESC becomes the four characters `\x1b`."""
    # Printable text has no unsafe character, and isprintable is faster than translate.
    return text if text.isprintable() else text.translate(ESCAPES)


# ---- Publish ----

MAX_TIMEOUT, MIN_TIMEOUT = 2.0, 0.05  # seconds to wait for full queues
RECOVERY_TIME = 20.0  # seconds after the last stall until the timeout is MAX_TIMEOUT again


class Publisher:
    """Publishes messages, in order, to all subscribers that keep up, and waits for slow ones.

    By default, PUB skips full queues: their subscribers miss messages. In a flood, even the queues
    of fast subscribers fill within milliseconds. So this class waits:

    1. With the option XPUB_NODROP (which works on PUB, too), send is all or nothing: if any queue
       is full, it sends to nobody, and raises zmq.Again. (Once full, a queue takes messages again
       when half of it, 1,000 messages, has gone to the subscriber.)
    2. This class tries again, until a timeout. Meanwhile, lines wait in PULL's queues, or at the
       clients. So the chat goes at the pace of its slowest subscriber.
    3. If a queue is still full after the timeout, its subscriber is called stalled. The class sends
       the message once with XPUB_NODROP off. This send skips the full queues, and from then on,
       libzmq leaves them out of every send, those of step 1 included, until half of such a queue
       has gone. So a stalled subscriber costs the chat one timeout, not one for each message.

    There is one timeout for all subscribers. Each stall halves it, down to MIN_TIMEOUT, so that
    repeated stalls do not delay the chat for long. After RECOVERY_TIME without a stall, it is
    MAX_TIMEOUT again. The price: while it is short, merely slow subscribers may stall, too.
    """

    def __init__(self, pub: Sock, shutdown: Shutdown, log: Log) -> None:
        self.pub, self.shutdown, self.log = pub, shutdown, log
        self.timeout = MAX_TIMEOUT
        self.stalled_at = -math.inf  # when a subscriber last stalled

    def publish(self, messages: list[bytes]) -> None:
        """Send messages, waiting if a queue is full. If there are none, let libzmq free memory."""
        for message in messages:
            try:
                send(self.pub, message, zmq.NOBLOCK)
            except zmq.Again:  # The queue of a subscriber is full.
                self.wait_and_send(message)
        if not messages:
            # libzmq frees the queues of departed subscribers only during some calls on PUB, such as
            # send and this one. (Its result is not needed.)
            self.pub.get(zmq.EVENTS)

    def wait_and_send(self, message: bytes) -> None:
        """Send as soon as no queue is full. After the timeout, skip the full queues."""
        started = time.monotonic()
        if started > self.stalled_at + RECOVERY_TIME:
            self.timeout = MAX_TIMEOUT
        # Wait in short steps, since a signal may shorten the timeout meanwhile.
        while time.monotonic() - started < self.current_timeout():
            with contextlib.suppress(zmq.Again):  # raised while a queue is full
                send(self.pub, message)  # waits up to 10 ms (SNDTIMEO)
                return
        self.pub.set(zmq.XPUB_NODROP, 0)
        send(self.pub, message)  # step 3: skips full queues (see dist_t in libzmq's src/dist.cpp)
        self.pub.set(zmq.XPUB_NODROP, 1)
        self.timeout = max(MIN_TIMEOUT, self.timeout / 2)
        self.stalled_at = time.monotonic()
        self.log.report("a subscriber stalled", "it misses messages until half its queue is read")

    def current_timeout(self) -> float:
        """Return the timeout. After a signal, it is at most a sixth of the time left for waiting.

        All waits must end within 1.6 seconds of the signal (WAIT_END), and several subscribers may
        stall, one after the other. With a small part for each (a sixth is chosen freely), time is
        left for the others. The limit shrinks during a wait. (Without a signal, it is infinite.)
        """
        return min(self.timeout, self.shutdown.time_to_wait() / 6)


# ---- Make sockets ----


def make_sockets(context: zmq.Context[Sock], secret: bytes | None) -> tuple[Sock, Sock]:
    """Return PULL and PUB. They encrypt if a secret key is given (CURVE, ZeroMQ's RFC 26)."""
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    for sock in (pull, pub):
        if secret:
            sock.set(zmq.CURVE_SERVER, 1)
            sock.set(zmq.CURVE_SECRETKEY, secret)
        sock.set(zmq.BACKLOG, 1_000)  # so that many clients may connect at once
        # Probe idle connections after 10 seconds, then every 2 seconds.
        sock.set(zmq.TCP_KEEPALIVE, 1)
        sock.set(zmq.TCP_KEEPALIVE_IDLE, 10)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, 2)
        # On Linux, disconnect a peer that answers no probe, or takes no data, for 20 seconds.
        sock.set(zmq.TCP_MAXRT, 20_000)

    # Set high-water marks before bind: changing them later can crash libzmq 4.3.5.
    pull.set(zmq.RCVHWM, PULL_HWM)
    pull.set(zmq.MAXMSGSIZE, MAX_SIZE + (33 if secret else 0))  # CURVE adds 33 bytes to each frame.
    pull.set(zmq.RCVTIMEO, 200)  # milliseconds that recv waits for a line

    pub.set(zmq.SNDHWM, PUB_HWM)
    pub.set(zmq.XPUB_NODROP, 1)  # see Publisher
    pub.set(zmq.SNDTIMEO, 10)  # milliseconds that send waits at most, unless called with NOBLOCK
    # Keep the kernel's buffers small: on Linux, a full one accepts nothing until a third of it has
    # been sent. With large ones, that might outlast Publisher's timeout, and slow subscribers would
    # count as stalled although they read.
    pub.set(zmq.SNDBUF, 65_536)
    # PUB receives, too: subscriptions. It processes them during sends, so many or long ones would
    # delay the chat. Queue only one at a time per client (the rest wait in the network), and
    # disconnect clients that send one longer than 128 bytes. (CURVE's handshake needs up to 545.)
    pub.set(zmq.RCVHWM, 1)
    pub.set(zmq.MAXMSGSIZE, 545 if secret else 128)
    return pull, pub


def bind(sock: Sock, address: str, port_number: int) -> str:
    """Bind a socket to an address, or to a network interface. Return the bound endpoint.

    Raises zmq.ZMQError.
    """
    # With IPv6 on, * means all addresses, IPv4 included, but an interface such as eth0 means only
    # its IPv6 address. So turn IPv6 on for * and for IPv6 addresses, and off for all others.
    sock.set(zmq.IPV6, int(address == "*" or ":" in address))
    sock.bind(f"tcp://{address}:{port_number}")
    bound = sock.get_string(zmq.LAST_ENDPOINT)  # If the port is 0, the system chooses one.
    # For *, libzmq returns [::], as if only IPv6 were bound.
    return bound.replace("[::]", "*") if address == "*" else bound


# ---- Shut down ----

# The server exits within 3 seconds of a signal, whatever its clients do. These are the latest
# times, in seconds after the signal:
#   1.0  LOOP_END: no further iteration of the loop begins.
#   1.2  receive has returned for the last time (RCVTIMEO).
#   1.6  WAIT_END: Publisher no longer waits for subscribers.
#   2.6  WAIT_END + LINGER: libzmq drops what it has not sent.
#   2.8  Log has had time to write its last entries (see the end of this file).
LOOP_END, WAIT_END = 1.0, 1.6  # seconds after the signal
LINGER = 1_000  # milliseconds after the loop (libzmq's unit)


class Shutdown:
    """Notes when a signal first asks the server to exit. The deadlines follow from that time."""

    def __init__(self) -> None:
        """Handle the usual signals, except those that were ignored at startup.

        In a shell script, `server.py &` starts with SIGINT ignored. Then Ctrl-C is for the program
        in the foreground, such as a client, and must not end the server.
        """
        self.signal_at = math.inf  # until a signal comes
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # SIGBREAK: Windows
            signum = getattr(signal, name, None)
            if signum and signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self.on_signal)

    def on_signal(self, _signum: int, _frame: object) -> None:
        """Note the time of the first signal, and ignore later ones.

        This raises no exception, unlike Python's own handler for Ctrl-C: between receiving a line
        and publishing it, an exception would lose the line.
        """
        if self.signal_at == math.inf:  # More may come: on Windows, or through Log's thread.
            self.signal_at = time.monotonic()
            if hasattr(signal, "pthread_sigmask"):  # not on Windows
                # Block later signals in the main thread. Each would interrupt libzmq's calls there:
                # recv would start its timeout anew, and context.destroy would end too soon.
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def loop_must_end(self) -> bool:
        """Return whether LOOP_END has come: then no further iteration may begin."""
        return time.monotonic() >= self.signal_at + LOOP_END

    def time_to_wait(self) -> float:
        """Return the seconds left to WAIT_END, below zero after it. Without a signal: infinite."""
        return self.signal_at + WAIT_END - time.monotonic()


# ---- Match simple lines (only for speed) ----

# Most lines are simple: the keys are "user" and "message", in this order, and their values are
# strings that are not empty, without JSON escapes and without UNSAFE characters. So the user and
# the text are exactly what the quotation marks enclose.

# The characters of simple strings: all but the UNSAFE ones and three others that JSON must escape:
# TAB, quotation mark and backslash. They are written out, because [^...] would be slower for text
# beyond ASCII. A test in tests/test_wire.py compares them with UNSAFE.
SIMPLE_CHARS = r" !#-\[\]-~"  # space to !, # to [, ] to ~: ASCII without " and \
SIMPLE_CHARS += r"\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff"
STRING = f'"([{SIMPLE_CHARS}]+)"'
# The spaces are optional: json.dumps writes them, JSON.stringify does not.
SIMPLE_LINE = rf'\{{"user": ?{STRING}, ?"message": ?{STRING}\}}'  # In f-strings, `{{` is `{`.
# Any other line matches `.*\n`, and leaves both groups empty.
SIMPLE_OR_ANY_LINE = re.compile(rf"{SIMPLE_LINE}\n|.*\n")


def match_simple_lines(lines: list[bytes]) -> list[tuple[str, str]]:
    """Return the user and the text of each simple line, and ("", "") for each other line.

    For a simple line, this takes less than a sixth of the time that parse_line would take.
    """
    batch = b"\n".join([*lines, b""])  # each line, followed by a newline
    if batch.count(b"\n") > len(lines):
        # Some line contains newlines. JSON allows them between the parts of an object. Parse all.
        return [("", "")] * len(lines)
    # There is one match for each line, in order. (surrogateescape turns invalid bytes into lone
    # surrogates, which SIMPLE_CHARS excludes. So the line is not simple, and parse_line drops it.)
    return SIMPLE_OR_ANY_LINE.findall(batch.decode(errors="surrogateescape"))


# ---- Log ----


class Log:
    """Reports to the operator, on stderr. The chat never waits for it.

    A thread does the writing, because a write blocks if stderr is a pipe that nobody reads. As
    reports may come in floods, it writes every 0.1 seconds, and merges those of the same event.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reports: dict[str, tuple[int, str]] = {}  # event: (count, last detail) to write
        threading.Thread(target=self.run, daemon=True).start()

    def report(self, event: str, detail: str) -> None:
        """Queue "event: detail". If the event is queued already, count it, and keep this detail."""
        with self.lock:
            count, _ = self.reports.get(event, (0, ""))
            self.reports[event] = (count + 1, detail)

    def run(self) -> None:
        """Write what is queued every 0.1 seconds, until the process exits."""
        while True:
            time.sleep(0.1)
            with self.lock:  # only for the swap: report must never wait for a write
                reports, self.reports = self.reports, {}
            for event, (count, detail) in reports.items():
                times = f" ({count:,} times)" if count > 1 else ""
                # AttributeError: sys.stderr is None if it was closed when Python started.
                with contextlib.suppress(OSError, AttributeError):
                    sys.stderr.write(f"server.py: {event}{times}: {detail}\n")


# ---- Start ----


def raise_file_limit() -> None:
    """Raise the limit on open files to the hard limit. Each connection takes a file descriptor.

    When descriptors run out, libzmq keeps trying to accept connections in a busy loop.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # On Windows or if refused, go on.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # If there is no hard limit (as on macOS), ask for 10,240: macOS refuses more.
        limit = max(soft, 10_240) if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def load_key(name: str) -> bytes:
    """Return the secret key in the file NAME.key_secret.

    The server does not authenticate its clients: any client that knows the server's public key can
    connect. So keep NAME.key as secret as a password, although the key in it is called public. If
    neither file exists, make both. Raises ValueError, with the reason, if the files cannot be used.
    """
    import zmq.auth  # slow to import and only needed here

    public_file, secret_file = Path(f"{name}.key"), Path(f"{name}.key_secret")
    try:
        if not public_file.exists() and not secret_file.exists():
            os.umask(0o077)  # Nobody else may read the keys.
            zmq.auth.create_certificates("", name)
        public, _ = zmq.auth.load_certificate(public_file)
        _, secret = zmq.auth.load_certificate(secret_file)
        if not secret or public != zmq.curve_public(secret):
            raise ValueError("they are not a pair")
    except (OSError, ValueError, IndexError, zmq.ZMQError) as error:  # IndexError: damaged file
        raise ValueError(f"--key: cannot use {public_file} and {secret_file}: {error}") from None
    return secret


def port(text: str) -> int:
    """Convert an option to a port number.

    Raises ValueError, which argparse reports with this function's name: "invalid port value".
    """
    number = int(text)
    if not 0 <= number <= 65_535:
        raise ValueError
    return number


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="The server of a chat.", epilog="example: python server.py --bind 127.0.0.1"
    )
    add = parser.add_argument
    add("--bind", metavar="ADDRESS", default="*", help="an address or an interface (default: all)")
    add("--pull-port", metavar="PORT", type=port, default=1337, help="for lines (%(default)s)")
    add("--pub-port", metavar="PORT", type=port, default=1338, help="for messages (%(default)s)")
    # Accept NAME.key as well as NAME.
    add("--key", metavar="NAME", type=lambda name: name.removesuffix(".key"),
        help="encrypt; clients need NAME.key (the key files are made if missing)")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Make the sockets, serve until a shutdown, and return the exit status."""
    shutdown = Shutdown()  # first: a signal during the start must not end in a traceback
    options = parse_options()
    raise_file_limit()
    log = Log()
    try:
        context = zmq.Context()
        secret = None if options.key is None else load_key(options.key)
        pull, pub = make_sockets(context, secret)
        pull_endpoint = bind(pull, options.bind, options.pull_port)
        pub_endpoint = bind(pub, options.bind, options.pub_port)
    except (ValueError, zmq.ZMQError) as error:
        log.report("cannot start", f"{error}; see --help")
        return 1
    log.report("ready", f"PULL is bound to {pull_endpoint}, PUB to {pub_endpoint}")
    if secret:
        log.report("encrypted", f"clients need {options.key}.key")
    serve(pull, pub, shutdown, log)
    context.destroy(linger=LINGER)
    return 0


if __name__ == "__main__":
    status = main()
    time.sleep(0.2)  # Let Log write its last entries.
    # os._exit skips Python's cleanup. That could hang, on a stderr that nobody reads or on open
    # sockets after a failed start, and a signal during it could change the exit status.
    os._exit(status)
