#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq>=25", "colorama>=0.4.6"]
# ///
"""The chat server: it publishes each line that a client PUSHes to every client that SUBscribes.

In:  one frame a line, UTF-8 JSON: an object with "user" and "message".
Out: one frame a message, UTF-8: `{user}> ESC[36m{message}ESC[0m`, where ESC[36m is cyan.

The loop is the talk's, slides 3 to 7. Around it: subscribers that keep up lose nothing, a stalled
one delays the chat once, and control characters are escaped.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path

import zmq
from colorama import Fore, Style

Sock = zmq.Socket[bytes]

MAX_LINE = 16_384  # bytes in a line, and in a message
MAX_SUBSCRIPTION = 512  # bytes in the prefix that a client subscribes to
PULL_HWM = 256  # lines that wait from each client: 4 MB of the longest
PUB_HWM = 2_000  # messages that wait for each subscriber: 32 MB of the longest
BATCH = 300  # lines received, then published, in one go
IDLE = 0.3  # seconds without a line until the loop does other things
SUBSCRIBER_TIMEOUT = 2.0  # seconds that the chat waits for a slow subscriber
SHORT_TIMEOUT = 0.05  # seconds that it waits soon after a wait that did not help
RECOVERY = 20.0  # seconds until it waits SUBSCRIBER_TIMEOUT again
SHUTDOWN_TIMEOUT = 2.2  # seconds from a signal in which lines are published, and messages sent
PEER_TIMEOUT = 20  # seconds without an answer until TCP closes a connection
LOG_INTERVAL = 1.0  # seconds between two reports on stderr


def serve(pull: Sock, pub: Sock, shutdown: "Shutdown", log: "Log") -> None:
    """Wait for input, and forward it to all subscribers (slide 3), until the shutdown.

    PULL must have RCVTIMEO set, and PUB XPUB_NODROP: see make_sockets.
    """
    publisher = Publisher(pub, shutdown, log)
    while time.monotonic() < shutdown.deadline:
        lines = receive(pull)
        publisher.publish(chat_messages(lines, log))
        if not lines:
            pub.get(zmq.EVENTS)  # makes libzmq free the queues of subscribers that have left
            if shutdown.deadline < math.inf:
                break


# Receive. pyzmq's own recv and send first look at options that are not used here. Without them,
# and in batches, for which libzmq's I/O thread wakes only once, the server is much faster.

recv = zmq.backend.Socket.recv
send = zmq.backend.Socket.send


def receive(pull: Sock) -> list[bytes]:
    """Return the lines that wait in PULL, at most BATCH; if there are none, wait for one.

    Return an empty list if none comes within RCVTIMEO.
    """
    lines: list[bytes] = []
    with contextlib.suppress(zmq.Again):
        if not pull.get(zmq.EVENTS):  # To ask takes less time than an exception for each line.
            return [recv(pull)]
        while len(lines) < BATCH:
            lines.append(recv(pull, zmq.NOBLOCK))
    return lines


# Turn lines into messages.

# Characters that a terminal may obey: controls except TAB, line separators, direction overrides,
# and lone surrogates. Joiners, which emoji and Persian need, and no-break spaces are text.
UNSAFE = r"\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE_CHARACTER = re.compile(f"[{UNSAFE}]")

# A line as json.dumps and JSON.stringify write it, whose strings need no unescaping and no
# escaping. It finds the two strings of each such line in a text, and two empty ones in each other.
STRING = rf'"([^"\\\t{UNSAFE}]*)"'
SIMPLE_LINE = re.compile(rf'^(?:\{{"user": ?{STRING}, ?"message": ?{STRING}\}}|.*)$', re.MULTILINE)

CYAN, RESET = Fore.CYAN, Style.RESET_ALL
DROPPED = "dropped lines: {count:,}, the last: {detail}"

# Numbers are kept as they are written. int refuses NaN and Infinity, which are not JSON.
parse_json = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=int).decode


def chat_messages(lines: list[bytes], log: "Log") -> list[bytes]:
    """Return the message of each line (slide 3): `user> message`, the message in cyan.

    Lines that have none are dropped, and reported. To parse a line takes several times as long as
    to find its strings by a regular expression, so only lines that are not simple are parsed.
    """
    strings = SIMPLE_LINE.findall(b"\n".join(lines).decode(errors="surrogateescape"))
    if len(strings) != len(lines):  # JSON may have line ends between its parts.
        strings = [("", "")] * len(lines)
    messages = []
    for line, (user, message) in zip(lines, strings, strict=True):
        if not user:
            try:
                user, message = parse(line)
            except ValueError as error:
                log.report(DROPPED, f"{error}: {line[:60]!r}")
                continue
        messages.append(f"{user}> {CYAN}{message}{RESET}".encode())
    return messages


def parse(line: bytes) -> tuple[str, str]:
    """Return the user and the message of a line, their control characters escaped.

    Raises ValueError, with the reason, if the line has none, or they are too long.
    """
    try:
        payload = parse_json(line.decode("utf-8-sig"))
        user, message = sanitize(payload["user"]), sanitize(payload["message"])
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ValueError('not a JSON object with "user" and "message", in UTF-8') from None
    if len(f"{user}> {CYAN}{message}{RESET}".encode()) > MAX_LINE:
        raise ValueError("too long once its control characters are escaped")
    return user, message


def sanitize(text: str) -> str:
    r"""Return text with its unsafe characters escaped, such as `\x1b`."""
    if text.isprintable():  # as nearly all text is
        return text
    return UNSAFE_CHARACTER.sub(lambda char: char[0].encode("unicode_escape").decode(), text)


# Publish.


class Publisher:
    """Publishes messages to all subscribers, and limits how long a slow one may delay the chat.

    A subscriber whose queue is full delays it by SUBSCRIBER_TIMEOUT at most. It then misses
    messages until it has read half of its queue. For RECOVERY seconds from then on, others delay
    the chat by SHORT_TIMEOUT at most.
    """

    def __init__(self, pub: Sock, shutdown: "Shutdown", log: "Log") -> None:
        self.pub, self.shutdown, self.log = pub, shutdown, log
        self.recovered_at = 0.0  # when SUBSCRIBER_TIMEOUT is in force again

    def publish(self, messages: list[bytes]) -> None:
        """Send messages (slide 3), and wait where the queue of a subscriber is full."""
        for message in messages:
            try:
                send(self.pub, message, zmq.NOBLOCK)
            except zmq.Again:
                self.wait_and_send(message)

    def wait_and_send(self, message: bytes) -> None:
        """Send a message once there is room in all queues, or without those that stay full.

        After one send without XPUB_NODROP, libzmq leaves these out by itself until they have room.
        """
        now = time.monotonic()
        timeout = SUBSCRIBER_TIMEOUT if now >= self.recovered_at else SHORT_TIMEOUT
        timeout = max(SHORT_TIMEOUT, min(timeout, self.shutdown.deadline - now))
        self.pub.set(zmq.SNDTIMEO, int(1_000 * timeout))
        try:
            send(self.pub, message)
        except zmq.Again:
            self.pub.set(zmq.XPUB_NODROP, 0)
            send(self.pub, message)
            self.pub.set(zmq.XPUB_NODROP, 1)
            self.recovered_at = time.monotonic() + RECOVERY
            self.log.report("stalled subscribers, times the chat went on without one: {count:,}")


# Log.


class Log:
    """Writes reports to stderr, once a second at most, and never makes the chat wait for it.

    A thread writes, since stderr may be a terminal or a pipe that nobody reads. Reports may come in
    floods: those of the same text are counted, and written as one.
    """

    def __init__(self) -> None:
        self.reports: dict[str, tuple[int, str]] = {}  # by text: how many, and the last detail
        self.closed = False
        self.changed = threading.Condition()  # guards both
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def report(self, text: str, detail: str = "") -> None:
        """Report something. In text, {count} and {detail} are filled in when it is written."""
        with self.changed:
            count, _ = self.reports.get(text, (0, ""))
            self.reports[text] = count + 1, detail
            self.changed.notify()

    def close(self) -> None:
        """Write what is not written yet, unless stderr takes nothing."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join(0.1)

    def write(self) -> None:
        """Write reports until the log is closed: what the thread does."""
        while self.reports or not self.closed:
            with self.changed:
                self.changed.wait_for(lambda: self.reports or self.closed)
                reports, self.reports = self.reports, {}
            for text, (count, detail) in reports.items():
                line = f"server.py: {text.format(count=count, detail=detail)}\n"
                with contextlib.suppress(OSError):
                    os.write(2, line.encode(errors="backslashreplace"))
            with self.changed:
                self.changed.wait_for(lambda: self.closed, LOG_INTERVAL)


# Start and shut down.


class Shutdown:
    """The time at which the loop ends at the latest: never, until a signal asks to shut down.

    It ends earlier, once no line comes. A handler that raised an exception instead could strike
    between the receipt of a line and its publication, and lose it.
    """

    def __init__(self) -> None:
        self.deadline = math.inf

    def request(self, signum: int, _frame: object) -> None:
        """Handle a signal. Block more of its kind, each of which would restart pyzmq's waits."""
        if hasattr(signal, "pthread_sigmask"):  # Windows has none, and does not need it.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signum])
        self.deadline = min(self.deadline, time.monotonic() + SHUTDOWN_TIMEOUT)


def handle_signals(shutdown: Shutdown) -> None:
    """Shut down at SIGINT, SIGTERM, and what Windows sends at Ctrl-Break.

    Where one is ignored, it stays so: a shell script starts `server.py &` with SIGINT ignored, so
    that Ctrl-C in the script's client does not end its server.
    """
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        signum = getattr(signal, name, signal.SIGINT)
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, shutdown.request)


def check_files() -> None:
    """Raise OSError unless 20 more files can be opened: libzmq aborts where it cannot open its own.

    A standard stream that is closed is opened, or a socket would take its number, and get what is
    written to it.
    """
    for file in [os.open(os.devnull, os.O_RDWR) for _ in range(20)]:
        if file > 2:
            os.close(file)


def allow_many_subscribers() -> None:
    """Raise the soft limit of open files to the hard one. Each connection takes one.

    Where there is none left, libzmq refuses connections in a busy loop.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard == resource.RLIM_INFINITY:  # macOS says so, but refuses it.
            hard = max(soft, 10_240)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def load_keys(name: str) -> tuple[bytes, bytes]:
    """Return the keys in NAME.key (public) and NAME.key_secret; make both if neither exists.

    Raises ValueError, with the reason, if they cannot be used.
    """
    import zmq.auth  # This takes 14 ms, and is only needed here.

    public_file, secret_file = Path(f"{name}.key"), Path(f"{name}.key_secret")
    try:
        if public_file.name == ".key":
            raise ValueError("it needs a name, such as --key chat")
        if not public_file.exists() and not secret_file.exists():
            os.umask(0o077)  # Nobody else may read the secret key.
            zmq.auth.create_certificates(public_file.parent, public_file.stem)
        published, _ = zmq.auth.load_certificate(public_file)
        public, secret = zmq.auth.load_certificate(secret_file)
        if not secret or not published == public == zmq.curve_public(secret):
            raise ValueError("they are not a pair")
    except (OSError, ValueError, IndexError, zmq.ZMQError) as error:
        raise ValueError(f"--key: cannot use {public_file} and {secret_file}: {error}") from None
    return public, secret


def make_sockets(context: zmq.Context[Sock], keys: tuple[bytes, bytes] | None) -> tuple[Sock, Sock]:
    """Return PULL and PUB. With keys, they admit only clients that have the public one (RFC 26).

    All options are set before bind: changing a high-water mark later can make libzmq 4.3.5 use a
    freed pipe.
    """
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    for sock in (pull, pub):
        if keys:
            sock.curve_server = 1
            sock.curve_publickey, sock.curve_secretkey = keys
        sock.set(zmq.BACKLOG, 1_000)  # Many clients may connect at once.
        sock.set(zmq.TCP_KEEPALIVE, 1)  # finds a peer that vanished while nothing was sent
        sock.set(zmq.TCP_KEEPALIVE_IDLE, PEER_TIMEOUT // 2)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, PEER_TIMEOUT // 10)
        sock.set(zmq.TCP_KEEPALIVE_CNT, 5)
        sock.set(zmq.TCP_MAXRT, 1_000 * PEER_TIMEOUT)  # finds a peer that acknowledges nothing
    encryption = 33 if keys else 0  # bytes that it adds to a frame, and that MAXMSGSIZE counts
    pull.set(zmq.MAXMSGSIZE, MAX_LINE + encryption)
    pull.set(zmq.RCVHWM, PULL_HWM)
    pull.set(zmq.RCVTIMEO, int(1_000 * IDLE))
    pub.set(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION + encryption)
    pub.set(zmq.RCVHWM, 1)  # one subscription between two sends: a flood of them delays nothing
    pub.set(zmq.SNDHWM, PUB_HWM)
    pub.set(zmq.XPUB_NODROP, 1)  # A full queue makes send wait, rather than drop the message.
    pub.set(zmq.SNDBUF, 65_536)  # A small kernel buffer shows early that a slow subscriber reads.
    return pull, pub


def bind(sock: Sock, address: str, port: int) -> str:
    """Bind a socket to an address, or a network interface, and a port. Return the real endpoint.

    Raises ValueError, with the reason.
    """
    address = address.strip("[]")
    # libzmq finds no IPv4 address of an interface if IPv6 is on, where that has an IPv6 address.
    sock.set(zmq.IPV6, int(address == "*" or ":" in address))
    endpoint = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        raise ValueError(
            f"cannot bind {endpoint}: {zmq.strerror(error.errno or 0)}; see --help"
        ) from None
    bound = sock.get_string(zmq.LAST_ENDPOINT)
    return f"tcp://*:{bound.rpartition(':')[2]}" if address == "*" else bound


def port(text: str) -> int:
    """Return the port that an option names. Raises ValueError if it is none."""
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
    allow_many_subscribers()
    log = Log()
    try:
        check_files()
        keys = None if options.key is None else load_keys(options.key)
        context = zmq.Context()
        pull, pub = make_sockets(context, keys)
        pull_endpoint = bind(pull, options.bind, options.pull_port)
        pub_endpoint = bind(pub, options.bind, options.pub_port)
    except (OSError, ValueError) as error:
        hint = "; raise the limit of open files: ulimit -n" if isinstance(error, OSError) else ""
        log.report(f"{error}{hint}")
        log.close()
        return 1
    log.report(f"PULL is bound to {pull_endpoint}, PUB to {pub_endpoint}")
    if keys:
        log.report(f"the chat is encrypted; give {options.key}.key to everyone you invite")
    serve(pull, pub, shutdown, log)
    # Subscribers have the rest of the time, half a second at least, to receive their queues.
    context.destroy(linger=int(1_000 * max(0.5, shutdown.deadline - time.monotonic())))
    log.close()
    return 0


if __name__ == "__main__":
    # Not sys.exit, which gives signals back their default action: the next one would kill this.
    os._exit(main())
