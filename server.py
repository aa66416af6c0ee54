#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq>=25", "colorama>=0.4.6"]
# ///
"""The chat server: clients PUSH lines, and the server PUBlishes each to all clients that SUBscribe.

A line is what a client pushes. (The client on the slides pushes what is typed, so one has to type
JSON there.) A message is what the server makes of a line, and publishes.

In:  each line is one frame, UTF-8 JSON: {"user": USER, "message": TEXT}.
Out: each message is one frame, UTF-8: USER> TEXT, with TEXT between ESC[36m (cyan) and ESC[0m.

ZeroMQ's library, libzmq, queues lines and messages for each peer, up to a high-water mark (HWM). A
thread of libzmq moves them between these queues and the network. PULL's recv waits for a line. When
the queue of a subscriber is full, PUB's send would drop the message for that subscriber. With the
option NODROP, send waits instead. So a slow subscriber slows down the chat: while the server waits,
PULL's queues fill, and then the clients wait, too.

main, at the end, makes the two sockets (slide 3). serve is the talk's loop. The code around it
guarantees:
- while the server runs, a subscriber loses messages only if its connection breaks, or if it stalls:
  its queue is full, and it takes longer than 2 seconds (less, after recent stalls) to read half of
  the queue, 1,000 messages. Then it is skipped until it has read that half;
- a shutdown takes less than 3 seconds. What cannot be published and received by then is lost;
- characters that could control a terminal are escaped.

The code of the chat ends with the class Publisher. What follows is the log, start and shutdown.
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

Sock = zmq.Socket[bytes]

MAX_SIZE = 16_384  # bytes of a line (libzmq disconnects clients that send more) and of a message
PULL_HWM = 256  # lines queued from each client: 4 MB at most
PUB_HWM = 2_000  # messages queued for each subscriber: 33 MB at most
BATCH = 300  # the most lines, of all clients, to receive before publishing; more is no faster
RECEIVE_TIMEOUT = 0.2  # seconds that receive waits for a line, so that the loop sees a shutdown
CYAN, RESET = Fore.CYAN, Style.RESET_ALL


def serve(pull: Sock, pub: Sock, shutdown: Shutdown, log: Log) -> None:
    """Wait for input, and forward it to all subscribers (slide 3), until shutdown.

    Without a signal, this loops forever: the time left is infinite. After a signal, it goes on with
    what still arrives, until receive returns nothing, or little time is left: the last messages may
    have to wait for a subscriber.
    """
    publisher = Publisher(pub, shutdown, log)
    while shutdown.time_left() > RECEIVE_TIMEOUT:
        lines = receive(pull)
        if shutdown.requested and not lines:
            break
        publisher.publish(chat_messages(lines, log))


# Receive.


def receive(pull: Sock) -> list[bytes]:
    """Wait for a line. Return it, and those that have arrived as well, at most BATCH.

    Return an empty list if none comes in time. Receiving many lines, then sending them all, makes
    the server several times as fast. If receiving and sending took turns, libzmq's thread would
    run out of work after each send and fall asleep, and waking it costs more than the send.
    """
    recv = pull.recv  # looked up once, which saves a third of the time of each call
    lines: list[bytes] = []
    if pull.poll(int(1_000 * RECEIVE_TIMEOUT)):
        with contextlib.suppress(zmq.Again):  # when no more are there
            while len(lines) < BATCH:
                lines.append(recv(zmq.NOBLOCK))
    return lines


# Turn lines into messages.


def chat_messages(lines: list[bytes], log: Log) -> list[bytes]:
    """Return the message of each line (slide 3): `user> text`, the text in cyan.

    parse_simple reads lines of the usual form, fast. parse reads all others. Invalid lines are
    dropped, and reported.
    """
    messages = []
    for line, (user, text) in zip(lines, parse_simple(lines), strict=True):
        try:
            if not user:  # The line is not simple. (Or its user is empty: parse finds the same.)
                user, text = map(sanitize, parse(line))
            message = f"{user}> {CYAN}{text}{RESET}".encode()
            if len(message) > MAX_SIZE:
                raise ValueError(TOO_LONG)
            messages.append(message)
        except ValueError as error:
            log.report("dropped a line", f"{error}: {line[:60]!r}")
    return messages


# A user or a text may be a JSON number. It is shown as it was written.
parse_json = json.JSONDecoder(parse_int=str, parse_float=str).decode


def parse(line: bytes) -> tuple[str, str]:
    """Return the user and the text of a line.

    Raises ValueError if the line is not UTF-8, not JSON, nested too deeply, or not an object with a
    user and a message that are strings or numbers.
    """
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        payload = parse_json(line.decode("utf-8-sig"))  # -sig: drop a byte order mark
        user, text = payload["user"], payload["message"]  # a TypeError if it is no object
        if isinstance(user, str) and isinstance(text, str):
            return user, text
    raise ValueError('not a JSON object with "user" and "message", in UTF-8')


# Control characters (TAB is safe), line separators and direction overrides, which could control a
# terminal, and lone surrogates, which UTF-8 cannot encode.
UNSAFE = r"\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE_PART = re.compile(f"[{UNSAFE}]+")
TOO_LONG = "too long once its control characters are escaped"


def sanitize(text: str) -> str:
    r"""Return text with its unsafe characters escaped, such as `\x1b`.

    Raises ValueError if it becomes much too long. (This is a cheap check before the slow escaping.
    chat_messages checks the exact size.)
    """
    most = (MAX_SIZE - len(text)) // 3  # characters to escape: each adds three, or more
    unsafe = len(text) - len(UNSAFE_PART.sub("", text, most + 1))
    if unsafe > most:
        raise ValueError(TOO_LONG)
    return UNSAFE_PART.sub(lambda part: part[0].encode("unicode_escape").decode(), text)


# A simple line is as json.dumps or JSON.stringify writes it, {"user": "ann", "message": "hi"}, and
# its strings need no unescaping and no escaping. findall gives one pair for each line: the user and
# the text if the line is simple. Any other line matches .* instead, and its pair is ("", "").
STRING = rf'"([^"\\\t{UNSAFE}]*+)"'  # no raw TAB: JSON forbids it; *+ does not backtrack
LINE = re.compile(
    r'^(?:\{"user": ?' + STRING + r', ?"message": ?' + STRING + r"\}|.*)$", re.MULTILINE
)


def parse_simple(lines: list[bytes]) -> list[tuple[str, str]]:
    """Return the user and the text of each simple line, and ("", "") for each other line.

    This is only for speed. One search in all lines is five times as fast as to parse each line, and
    triples the rate of the server.
    """
    # Invalid UTF-8 becomes lone surrogates. These are unsafe, so such a line is not simple.
    pairs = LINE.findall(b"\n".join(lines).decode(errors="surrogateescape"))
    # JSON may hold "\n" between its tokens. Then a line gives more than one pair, and parse has to
    # read all lines. (If there are no lines, findall gives one pair, and the result is empty.)
    return pairs if len(pairs) == len(lines) else [("", "")] * len(lines)


# Publish.

# send without pyzmq's wrapper in Python, which doubles its cost (recv has no wrapper)
compiled_send = zmq.backend.Socket.send

SUBSCRIBER_TIMEOUT = 2.0  # seconds to wait for a subscriber whose queue is full
MIN_TIMEOUT = 0.05  # seconds, after many stalls
RECOVERY_TIME = 20.0  # seconds without a stall, after which it is SUBSCRIBER_TIMEOUT again


class Publisher:
    """Publishes messages. Waits for slow subscribers, but not for stalled ones.

    When the queue of a subscriber is full, send waits (with the option NODROP) until the subscriber
    has read half of it, 1,000 messages. Until then, nobody gets the message. So a slow subscriber
    sets the pace of the chat.

    If this takes longer than a timeout, the subscriber has stalled. Then one send without NODROP
    drops the message for all subscribers whose queue is full. From then on, libzmq skips them, even
    with NODROP, until they have read that half. (On Linux, TCP_MAXRT disconnects them if they read
    nothing for 20 seconds.)

    There is one timeout for all subscribers, and each stall halves it. Thus the first stall delays
    the chat by 2 seconds, the next by 1, then 0.5, and so on down to MIN_TIMEOUT. RECOVERY_TIME
    after the last stall, the timeout is 2 seconds again. So neither subscribers that stall one
    after another, nor one that stalls again and again, can hold up the chat. The price: while the
    timeout is short, a subscriber that is merely slow can count as stalled, too.
    """

    def __init__(self, pub: Sock, shutdown: Shutdown, log: Log) -> None:
        self.pub, self.shutdown, self.log = pub, shutdown, log
        self.timeout = SUBSCRIBER_TIMEOUT
        self.stalled_at = 0.0  # the time of the last stall

    def publish(self, messages: list[bytes]) -> None:
        """Send messages (slide 3), waiting if the queue of a subscriber is full.

        Usually, no queue is full. Only if one is, send raises zmq.Again, having sent the message to
        nobody.
        """
        for message in messages:
            try:
                compiled_send(self.pub, message, zmq.NOBLOCK)
            except zmq.Again:
                self.wait_and_send(message)
        if not messages:
            # libzmq frees the queues of departed subscribers only during calls on PUB, so make one.
            self.pub.get(zmq.EVENTS)

    def wait_and_send(self, message: bytes) -> None:
        """Send once no queue is full, or without the stalled subscribers after the timeout."""
        if time.monotonic() > self.stalled_at + RECOVERY_TIME:
            self.timeout = SUBSCRIBER_TIMEOUT
        deadline = time.monotonic() + min(self.timeout, self.shutdown.time_left())
        while time.monotonic() < deadline:
            with contextlib.suppress(zmq.Again):  # after SNDTIMEO: a signal may have come
                self.pub.send(message)
                return
        self.pub.set(zmq.XPUB_NODROP, 0)
        self.pub.send(message)
        self.pub.set(zmq.XPUB_NODROP, 1)  # libzmq skips the stalled ones nevertheless.
        self.timeout = max(MIN_TIMEOUT, self.timeout / 2)
        self.stalled_at = time.monotonic()
        self.log.report("a subscriber stalled: the chat goes on without it")


# Log.


class Log:
    """Reports to the operator, on stderr. The chat never waits for it.

    A thread does the writing, because a write blocks if stderr is a pipe that nobody reads. Reports
    may come in floods, so the thread writes every 0.2 seconds. Reports of the same text in that
    time become one, with their count and the last detail.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reports: dict[str, tuple[int, str]] = {}  # text: (count, last detail), not written yet
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def report(self, text: str, detail: str = "") -> None:
        """Queue a report. If one of the same text is queued, only count this one."""
        with self.lock:
            count, _ = self.reports.get(text, (0, ""))
            self.reports[text] = count + 1, detail

    def close(self) -> None:
        """Write what is queued, unless stderr is blocked."""
        self.closing.set()
        self.thread.join(0.1)

    def run(self) -> None:
        """Write reports until the log is closed. This runs in the thread."""
        closed = False
        while not closed:
            closed = self.closing.wait(0.2)
            with self.lock:
                reports, self.reports = self.reports, {}
            for text, (count, detail) in reports.items():
                times = f" ({count:,} times)" if count > 1 else ""
                suffix = f": {detail}" if detail else ""
                entry = f"server.py: {text}{times}{suffix}{os.linesep}"
                if sys.stderr:  # else it was closed before the start
                    with contextlib.suppress(OSError):
                        # in UTF-8, whatever the locale is
                        sys.stderr.buffer.write(entry.encode(errors="backslashreplace"))
                        sys.stderr.buffer.flush()


# Start and shut down.

SHUTDOWN_TIMEOUT = 2.3  # seconds for the loop after a signal
MIN_LINGER = 0.5  # seconds that subscribers get, at least, to receive what is queued


class Shutdown:
    """The deadline for the loop: infinite, until a signal requests a shutdown.

    A shutdown takes less than 3 seconds:
    - the loop, until the chat is idle: at most SHUTDOWN_TIMEOUT;
    - the linger, in which subscribers receive what is queued: what the loop has left of its time,
      or MIN_LINGER, if that is longer. It ends sooner if they have received all;
    - the log: at most 0.1 seconds.
    """

    def __init__(self) -> None:
        self.deadline = math.inf

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.deadline < math.inf

    def time_left(self) -> float:
        """Return the seconds until the deadline, but not less than 0."""
        return max(0, self.deadline - time.monotonic())

    def on_signal(self, _signum: int, _frame: object) -> None:
        """Set the deadline, unless it is set already.

        Do not raise an exception, as Python's own handler for Ctrl-C does. It could strike between
        receiving a line and publishing it, and lose the line.
        """
        self.deadline = min(self.deadline, time.monotonic() + SHUTDOWN_TIMEOUT)


def handle_signals(shutdown: Shutdown) -> None:
    """Shut down on these signals, except those that are ignored at startup.

    In a shell script, `server.py &` starts with SIGINT ignored. Then Ctrl-C is for the program in
    the foreground, such as a client, and must not end the server.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # SIGBREAK: Windows
        signum = getattr(signal, name, None)
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, shutdown.on_signal)


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard limit. Each connection takes a file.

    When none are left, libzmq tries again and again to accept a connection, without a pause.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS says that it has no limit, but refuses more than this.
        most = max(soft, 10_240) if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def load_key(name: str) -> bytes:
    """Return the key in NAME.key_secret. Make it and NAME.key, the public key, if neither exists.

    Raises ValueError, with the reason, if they cannot be used.
    """
    import zmq.auth  # slow to import, and only needed here

    public_file, secret_file = Path(f"{name}.key"), Path(f"{name}.key_secret")
    folder, base = os.path.split(name)
    try:
        if base in ("", ".", ".."):
            raise ValueError("it needs a name, such as --key chat")
        if not public_file.exists() and not secret_file.exists():
            os.umask(0o077)  # Nobody else may read the secret key.
            zmq.auth.create_certificates(folder, base)
        public, _ = zmq.auth.load_certificate(public_file)
        _, secret = zmq.auth.load_certificate(secret_file)
        if not secret or public != zmq.curve_public(secret):
            raise ValueError("they are not a pair")
    except (OSError, ValueError, IndexError, zmq.ZMQError) as error:  # IndexError: no key in a file
        raise ValueError(f"--key: cannot use {public_file} and {secret_file}: {error}") from None
    return secret


def make_sockets(context: zmq.Context[Sock], key: bytes | None) -> tuple[Sock, Sock]:
    """Return PULL and PUB. With a secret key, they encrypt (CURVE, RFC 26).

    The server admits any client that has its public key. So despite its name, that key is a shared
    password.
    """
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    for sock in (pull, pub):
        if key:
            sock.curve_server = 1
            sock.curve_secretkey = key
        sock.set(zmq.BACKLOG, 1_000)  # Many clients may connect at once.
        # Disconnect a peer that has vanished: after 10 idle seconds and 5 probes, 2 seconds apart.
        sock.set(zmq.TCP_KEEPALIVE, 1)
        sock.set(zmq.TCP_KEEPALIVE_IDLE, 10)
        sock.set(zmq.TCP_KEEPALIVE_CNT, 5)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, 2)
        # Disconnect a peer that takes no data for 20 seconds. On Linux, this includes one that is
        # there, but does not read.
        sock.set(zmq.TCP_MAXRT, 20_000)
    overhead = 33 if key else 0  # bytes that CURVE adds to each frame: MAXMSGSIZE counts them
    pull.set(zmq.MAXMSGSIZE, MAX_SIZE + overhead)
    # Never set a high-water mark after bind: this can crash libzmq 4.3.5.
    pull.set(zmq.RCVHWM, PULL_HWM)
    # Clients send subscriptions to PUB. A send first processes those that are queued. Since a flood
    # of them would delay the chat, queue only one for each client. Others wait in the network.
    pub.set(zmq.RCVHWM, 1)
    pub.set(zmq.MAXMSGSIZE, 512 + overhead)  # the longest subscription, in bytes
    pub.set(zmq.SNDHWM, PUB_HWM)
    pub.set(zmq.XPUB_NODROP, 1)  # A full queue makes send wait, rather than drop the message.
    pub.set(zmq.SNDTIMEO, 10)  # milliseconds; pyzmq starts a wait again if a signal interrupts it
    # The kernel reports room in its buffer only when a good part of the buffer is free. In a large
    # buffer, a slow subscriber frees this part so rarely that it would look stalled.
    pub.set(zmq.SNDBUF, 65_536)
    return pull, pub


def bind(sock: Sock, address: str, port_number: int) -> str:
    """Bind a socket to an address, or to a network interface. Return the bound endpoint.

    Raises ValueError, with the reason.
    """
    address = address.strip("[]")
    # With IPv6 on, * means all addresses, IPv4 as well. But eth0 means only its IPv6 address then.
    sock.set(zmq.IPV6, int(address == "*" or ":" in address))
    host = f"[{address}]" if ":" in address else address
    endpoint = f"tcp://{host}:{port_number}"
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        raise ValueError(f"cannot bind: {error}; see --help") from None
    bound = sock.get_string(zmq.LAST_ENDPOINT)  # If the port is 0, the system chooses one.
    return f"tcp://*:{bound.rpartition(':')[2]}" if address == "*" else bound


def port(text: str) -> int:
    """Return the port that an option names. Raises ValueError if it is not a port."""
    number = int(text)
    if not 0 <= number <= 65_535:
        raise ValueError
    return number


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Publish each JSON line that a client pushes to every client that subscribes.",
        epilog="example: python server.py --bind 127.0.0.1 --pull-port 4001 --pub-port 4002",
    )
    add = parser.add_argument
    add("--bind", metavar="ADDRESS", default="*", help="an address or interface (%(default)s: all)")
    add("--pull-port", metavar="PORT", type=port, default=1337, help="for lines (%(default)s)")
    add("--pub-port", metavar="PORT", type=port, default=1338, help="for messages (%(default)s)")
    add("--key", metavar="NAME", type=lambda name: name.removesuffix(".key"),
        help="encrypt, and admit only clients that have NAME.key; made if missing")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Make the sockets, serve until a signal, and return the exit status."""
    shutdown = Shutdown()
    handle_signals(shutdown)
    options = parse_options()
    raise_file_limit()
    log = Log()
    try:
        context = zmq.Context()
        key = None if options.key is None else load_key(options.key)
        pull, pub = make_sockets(context, key)
        pull_endpoint = bind(pull, options.bind, options.pull_port)
        pub_endpoint = bind(pub, options.bind, options.pub_port)
    except (ValueError, zmq.ZMQError) as error:
        log.report(str(error))
        log.close()
        return 1
    log.report(f"PULL is bound to {pull_endpoint}, PUB to {pub_endpoint}")
    if key:
        log.report(f"clients need {options.key}.key")
    serve(pull, pub, shutdown, log)
    linger = max(MIN_LINGER, shutdown.time_left())  # finite, as serve ends only after a signal
    context.destroy(linger=int(1_000 * linger))
    log.close()
    return 0


if __name__ == "__main__":
    # Not sys.exit, which could hang on a stderr that nobody reads, or, after a failed start, on the
    # open sockets. A signal during its cleanup could also change the status.
    os._exit(main())
