#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq>=25", "colorama>=0.4.6"]
# ///
"""The chat server: it publishes each line that a client PUSHes to every client that SUBscribes.

A line is what a client pushes. A message is what the server makes of it, and publishes.

In:  each line is one frame, UTF-8 JSON: an object with "user" and "message".
Out: each message is one frame, UTF-8: {user}> ESC[36m{message}ESC[0m, where ESC[36m is cyan.

The loop is the talk's, slides 3 to 7. What it calls makes sure that subscribers that keep up lose
nothing, that a stalled one delays the chat only briefly, and that control characters are escaped.
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
BATCH = 300  # lines, of all clients, that are received and then published in one go
IDLE_TIMEOUT = 0.3  # seconds without a line until the loop looks around
SUBSCRIBER_TIMEOUT = 2.0  # seconds that a slow subscriber may delay the chat
IMPATIENT_TIMEOUT = 0.05  # the same, soon after a subscriber used all of that time
IMPATIENT_TIME = 20.0  # seconds for which that is so
SHUTDOWN_TIMEOUT = 2.2  # seconds from a signal until the loop ends, even if lines keep coming
PEER_TIMEOUT = 20  # seconds without an answer until TCP closes a connection
LOG_INTERVAL = 1.0  # seconds between two writes to stderr
CYAN, RESET = Fore.CYAN, Style.RESET_ALL


def serve(pull: Sock, pub: Sock, shutdown: "Shutdown", log: "Log") -> None:
    """Wait for input, and forward it to all subscribers (slide 3), until the shutdown.

    PULL must have RCVTIMEO set, and PUB XPUB_NODROP: see make_sockets.
    """
    publisher = Publisher(pub, shutdown, log)
    while time.monotonic() < shutdown.deadline:
        lines = receive(pull)
        publisher.publish(chat_messages(lines, log))
        if not lines:
            if shutdown.requested:
                break
            # As long as nothing is sent, only this makes libzmq free the queues of subscribers that
            # have left.
            pub.get(zmq.EVENTS)


# Receive. Two things make the server some three times as fast: batches, for which libzmq's I/O
# thread wakes only once, and pyzmq's compiled recv and send without their Python wrappers.

recv = zmq.backend.Socket.recv
send = zmq.backend.Socket.send


def receive(pull: Sock) -> list[bytes]:
    """Return the lines that wait in PULL, at most BATCH. If there are none, wait for one.

    Return an empty list if none comes within RCVTIMEO.
    """
    lines: list[bytes] = []
    with contextlib.suppress(zmq.Again):
        if not pull.get(zmq.EVENTS):  # Asking first is cheaper than an exception for each line.
            return [recv(pull)]
        while len(lines) < BATCH:
            lines.append(recv(pull, zmq.NOBLOCK))
    return lines


# Turn lines into messages.

# Characters that a terminal may obey: controls except TAB, line separators, direction overrides,
# and lone surrogates. Joiners, which emoji and Persian need, and no-break spaces are text.
UNSAFE = r"\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE_CHARACTER = re.compile(f"[{UNSAFE}]")

# A line as json.dumps and JSON.stringify write it, in which nothing has to be unescaped or escaped.
# The pattern finds its two strings. In any other line, it finds two empty strings. (A TAB is safe,
# but in JSON it has to be written as an escape.)
STRING = rf'"([^"\\\t{UNSAFE}]*)"'
SIMPLE_LINE = re.compile(rf'^(?:\{{"user": ?{STRING}, ?"message": ?{STRING}\}}|.*)$', re.MULTILINE)

# A number is text, as it was written. int("NaN") raises ValueError, since that is not JSON.
parse_json = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=int).decode


def chat_messages(lines: list[bytes], log: "Log") -> list[bytes]:
    """Return the message of each line (slide 3): `user> message`, the message in cyan.

    A line that has no message is dropped and reported. Parsing takes five times as long as finding
    the two strings of a simple line, which is done for all lines at once, so the other lines alone
    are parsed.
    """
    strings = SIMPLE_LINE.findall(b"\n".join(lines).decode(errors="surrogateescape"))
    if len(strings) != len(lines):  # A line has line ends in it, as JSON may. Parse all lines.
        strings = [("", "")] * len(lines)
    messages = []
    for line, (user, message) in zip(lines, strings, strict=True):
        if not user:
            try:
                user, message = parse(line)
            except ValueError as error:
                log.report("dropped a line", f"{error}: {line[:60]!r}")
                continue
        messages.append(f"{user}> {CYAN}{message}{RESET}".encode())
    return messages


def parse(line: bytes) -> tuple[str, str]:
    """Return the user and the message of a line, sanitized.

    Raises ValueError, with the reason, if the line has no message, or its message is too long.
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
    """Publishes messages, and limits how long slow subscribers may delay the chat.

    A subscriber whose queue is full delays it by SUBSCRIBER_TIMEOUT at most. Then the chat goes on
    without it until it has read half of its queue. For IMPATIENT_TIME from then on, any full queue
    delays the chat by IMPATIENT_TIMEOUT at most.
    """

    def __init__(self, pub: Sock, shutdown: "Shutdown", log: "Log") -> None:
        self.pub, self.shutdown, self.log = pub, shutdown, log
        self.impatient_until = 0.0  # on the monotonic clock

    def publish(self, messages: list[bytes]) -> None:
        """Send messages (slide 3), and wait where the queue of a subscriber is full."""
        for message in messages:
            try:
                send(self.pub, message, zmq.NOBLOCK)
            except zmq.Again:
                self.wait_and_send(message)

    def wait_and_send(self, message: bytes) -> None:
        """Send a message as soon as all queues have room, or without waiting any longer."""
        now = time.monotonic()
        timeout = IMPATIENT_TIMEOUT if now < self.impatient_until else SUBSCRIBER_TIMEOUT
        if now + timeout > self.shutdown.deadline:
            timeout = max(IMPATIENT_TIMEOUT, self.shutdown.deadline - now)
        self.pub.set(zmq.SNDTIMEO, int(1_000 * timeout))
        try:
            send(self.pub, message)
        except zmq.Again:
            # Sent once without NODROP, libzmq leaves full queues out until they are half empty.
            self.pub.set(zmq.XPUB_NODROP, 0)
            send(self.pub, message)
            self.pub.set(zmq.XPUB_NODROP, 1)
            self.impatient_until = time.monotonic() + IMPATIENT_TIME
            self.log.report("a subscriber stalled: the chat goes on without it")


# Log.


class Log:
    """Writes reports to stderr, once in LOG_INTERVAL, and never makes the chat wait for it.

    A thread writes: stderr may be a terminal or a pipe that nobody reads. Reports may come in
    floods: those of the same text are counted, and written as one, with the last detail.
    """

    def __init__(self) -> None:
        self.reports: dict[str, tuple[int, str]] = {}  # text: (count, last detail)
        self.closed = False  # No more reports come.
        self.changed = threading.Condition()  # of reports or closed; its lock guards both
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def report(self, text: str, detail: str = "") -> None:
        """Have a report written."""
        with self.changed:
            count, _ = self.reports.get(text, (0, ""))
            self.reports[text] = count + 1, detail
            self.changed.notify()

    def close(self) -> None:
        """Have the last reports written, unless stderr takes nothing."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join(0.1)

    def run(self) -> None:
        """Write reports until the log is closed: what the thread does."""
        while self.reports or not self.closed:
            with self.changed:
                self.changed.wait_for(lambda: self.reports or self.closed)
                reports, self.reports = self.reports, {}
            for text, (count, detail) in reports.items():
                times = f" ({count:,} times)" if count > 1 else ""
                line = f"server.py: {text}{times}{': ' * bool(detail)}{detail}\n"
                with contextlib.suppress(OSError):
                    os.write(2, line.encode(errors="backslashreplace"))
            with self.changed:
                self.changed.wait_for(lambda: self.closed, LOG_INTERVAL)


# Start and shut down.


class Shutdown:
    """Whether a signal asked to shut down, and the time at which the loop then ends at the latest.

    The signal's handler raises no exception: that could strike between the receipt of a line and
    its publication, and lose the line.
    """

    def __init__(self) -> None:
        self.requested = False
        self.deadline = math.inf

    def request(self, signum: int, _frame: object) -> None:
        """Handle a signal.

        pyzmq starts its waits anew after each signal, so more of the kind are blocked: a key that
        is held down would keep it waiting. On Windows no signal interrupts a wait.
        """
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signum])
        if not self.requested:
            self.requested, self.deadline = True, time.monotonic() + SHUTDOWN_TIMEOUT


def handle_signals(shutdown: Shutdown) -> None:
    """Shut down at each signal that ends programs. One that is ignored at the start stays ignored.

    A shell script that runs `server.py &` has it ignore SIGINT, so that Ctrl-C ends the script's
    client and not its server.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # SIGBREAK: Windows
        signum = getattr(signal, name, None)
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, shutdown.request)


def prepare_files() -> None:
    """Check that 20 more files can be opened, since libzmq aborts where it cannot open its own.

    If a standard stream is closed, /dev/null takes its place, since a socket would get its number
    otherwise. Raises OSError.
    """
    for file in [os.open(os.devnull, os.O_RDWR) for _ in range(20)]:
        if file > 2:
            os.close(file)


def allow_many_subscribers() -> None:
    """Raise the soft limit of open files to the hard one. Each connection takes a file.

    Where there is none left, libzmq refuses connections in a busy loop.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS says that it has no limit, but refuses more than this.
        most = max(soft, 10_240) if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


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
        public_in_file, _ = zmq.auth.load_certificate(public_file)
        public, secret = zmq.auth.load_certificate(secret_file)
        if not secret or not public_in_file == public == zmq.curve_public(secret):
            raise ValueError("they are not a pair")
    except (OSError, ValueError, IndexError, zmq.ZMQError) as error:
        raise ValueError(f"--key: cannot use {public_file} and {secret_file}: {error}") from None
    return public, secret


def make_sockets(context: zmq.Context[Sock], keys: tuple[bytes, bytes] | None) -> tuple[Sock, Sock]:
    """Return PULL and PUB. With keys (CURVE, RFC 26), they admit only clients with the public one.

    All options are set before bind: changing a high-water mark later can make libzmq 4.3.5 use a
    freed pipe.
    """
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    for sock in (pull, pub):
        if keys:
            sock.curve_server = 1
            sock.curve_publickey, sock.curve_secretkey = keys
        sock.set(zmq.BACKLOG, 1_000)  # Many clients may connect at once.
        # TCP finds a peer that vanished: by probes while nothing is sent, or else by TCP_MAXRT.
        sock.set(zmq.TCP_KEEPALIVE, 1)
        sock.set(zmq.TCP_KEEPALIVE_IDLE, PEER_TIMEOUT // 2)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, PEER_TIMEOUT // 10)
        sock.set(zmq.TCP_KEEPALIVE_CNT, 5)
        sock.set(zmq.TCP_MAXRT, 1_000 * PEER_TIMEOUT)
    encryption = 33 if keys else 0  # bytes that it adds to a frame, and that MAXMSGSIZE counts
    pull.set(zmq.MAXMSGSIZE, MAX_LINE + encryption)
    pull.set(zmq.RCVHWM, PULL_HWM)
    pull.set(zmq.RCVTIMEO, int(1_000 * IDLE_TIMEOUT))
    pub.set(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION + encryption)
    # Take one subscription between two sends, so that a flood of them cannot delay messages.
    pub.set(zmq.RCVHWM, 1)
    pub.set(zmq.SNDHWM, PUB_HWM)
    pub.set(zmq.XPUB_NODROP, 1)  # A full queue makes send wait, rather than drop the message.
    pub.set(zmq.SNDBUF, 65_536)  # A small kernel buffer shows early that a subscriber reads.
    return pull, pub


def bind(sock: Sock, address: str, port_number: int) -> str:
    """Bind a socket to an address, or to a network interface. Return the endpoint that is bound.

    Raises ValueError, with the reason.
    """
    address = address.strip("[]")
    # With IPv6 on, libzmq binds an interface that has an IPv6 address to that one only.
    sock.set(zmq.IPV6, int(address == "*" or ":" in address))
    endpoint = f"tcp://{f'[{address}]' if ':' in address else address}:{port_number}"
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        raise ValueError(f"cannot bind {endpoint}: {zmq.strerror(error.errno or 0)}") from None
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
        prepare_files()
        keys = None if options.key is None else load_keys(options.key)
        context = zmq.Context()
        pull, pub = make_sockets(context, keys)
        pull_endpoint = bind(pull, options.bind, options.pull_port)
        pub_endpoint = bind(pub, options.bind, options.pub_port)
    except (OSError, ValueError) as error:
        is_limit = isinstance(error, OSError)
        log.report(
            f"{error}; {'raise the limit of open files: ulimit -n' if is_limit else 'see --help'}"
        )
        log.close()
        return 1
    log.report(f"PULL is bound to {pull_endpoint}, PUB to {pub_endpoint}")
    if keys:
        log.report(f"the chat is encrypted; give {options.key}.key to those you invite")
    serve(pull, pub, shutdown, log)
    # Subscribers have the rest of the time, half a second at least, to receive their queues.
    context.destroy(linger=int(1_000 * max(0.5, shutdown.deadline - time.monotonic())))
    log.close()
    return 0


if __name__ == "__main__":
    # Not sys.exit: while Python shuts down, a second Ctrl-C would change the exit status.
    os._exit(main())
