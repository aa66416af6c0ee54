#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq>=25", "colorama>=0.4.6"]
# ///
"""The chat server: every JSON line PUSHed to it goes out, in colour, to all who SUBscribe.

In:  one frame, UTF-8 JSON, an object with the strings "user" and "message".
Out: one frame, UTF-8, `{user}> ESC[36m{message}ESC[0m`.

The loop is that of the talk's slides 3 to 7. What it calls sees to it that readers who keep up miss
nothing, that those who stop hardly hold up the others, and that no text does any harm.
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

LONGEST = 16_384  # bytes: the longest line, in and out
READER_QUEUE = 2_000  # lines that wait for each reader: 32 MB of the longest
WRITER_QUEUE = 256  # lines that wait from each writer: 4 MB of the longest
SUBSCRIPTION = 512  # bytes: the longest subscription
BATCH = 300  # lines taken at once from a busy PULL
SILENCE = 0.3  # seconds without a line after which the loop looks around
ENDING = 2.2  # seconds from a signal in which lines are taken, or readers take what waits
PATIENCE = 2.0  # seconds to wait for a reader that is full, before it counts as stopped
LEAST_PATIENCE = 0.05  # seconds to wait even if patience was just used up: it may only be slow
RECOVERY = 20.0  # seconds in which patience grows back
VANISHED = 20  # seconds after which a peer that does not answer, or takes nothing, is cut off


def serve(pull: Sock, pub: Sock, ending: "Ending") -> None:
    """Wait for input, and forward it to all subscribers (slide 3), until it is time to end.

    What is no chat line is dropped. PULL has to have RCVTIMEO set, and PUB XPUB_NODROP.
    """
    patience = Patience(pub, ending)
    dropped = News("dropped lines: {count:,}, the last: {latest}")
    while time.monotonic() < ending.at:
        bodies, lines = arrived(pull), []
        for body, plain in zip(bodies, plain_lines(bodies), strict=True):
            try:
                lines.append(plain or chat_line(body))
            except ValueError as reason:
                dropped.add(f"{reason}: {body[:60]!r}")
        for line in lines:
            try:
                send(pub, line, zmq.NOBLOCK)
            except zmq.Again:  # A reader is full.
                patience.send(line)
        if not bodies:
            pub.get(zmq.EVENTS)  # makes libzmq free the queues of readers that have left.
            if ending.at < math.inf:
                break  # What had arrived is out.
        dropped.tell()
        patience.stopped_readers.tell()
    dropped.tell(at_once=True)
    patience.stopped_readers.tell(at_once=True)


# What arrives, and what goes out. Three things are done for speed, and give several times the rate:
# many lines are taken, and then sent, in one go, which wakes libzmq's own thread once for all of
# them; pyzmq's methods are called without the wrappers that handle str and routing ids; and regular
# expressions find plain lines, all of those taken at once, so that these need not be parsed.

receive = zmq.backend.Socket.recv
send = zmq.backend.Socket.send

# Nearly every line is plain: printable ASCII without escapes, as json.dumps and JSON.stringify
# write it. EACH_PLAIN finds the two strings of each line, or two empty ones if it is not plain.
PLAIN = re.compile(rb'\{"user": ?"([ !#-[\]-~]*)", ?"message": ?"([ !#-[\]-~]*)"\}')
EACH_PLAIN = re.compile(rb"^(?:%b|.*)$" % PLAIN.pattern, re.MULTILINE)

CHAT_LINE = f"%b> {Fore.CYAN}%b{Style.RESET_ALL}".encode()


def arrived(pull: Sock) -> list[bytes]:
    """Return the lines that PULL holds, BATCH at most, or else the next one to come.

    If none comes within RCVTIMEO, the list is empty.
    """
    bodies: list[bytes] = []
    with contextlib.suppress(zmq.Again):
        if not pull.get(zmq.EVENTS):  # Nothing is there yet.
            return [receive(pull)]
        while len(bodies) < BATCH:
            bodies.append(receive(pull, zmq.NOBLOCK))
    return bodies


def plain_lines(bodies: list[bytes]) -> list[bytes]:
    """Return what chat_line makes of each plain body, and an empty line for each other one."""
    if len(bodies) == 1:  # This is faster for a single line.
        plain = PLAIN.fullmatch(bodies[0])
        return [CHAT_LINE % plain.groups() if plain else b""]
    found = EACH_PLAIN.findall(b"\n".join(bodies))
    if len(found) != len(bodies):  # JSON may have line ends. Then none counts as plain.
        return [b""] * len(bodies)
    return [CHAT_LINE % strings if strings[0] else b"" for strings in found]


# What readers see of a line.

# Python refuses integers of many digits, but numbers are not looked at here, so they may be floats.
# Python also takes NaN and Infinity for numbers, which is not JSON, and which int refuses.
parse_json = json.JSONDecoder(parse_int=float, parse_constant=int).decode

# Characters that a terminal could obey, each with the visible form that it is shown in: controls,
# line separators and direction overrides, isolates, and lone surrogates. Joiners, which emoji and
# Persian need, and no-break spaces are not among them: they are text.
CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
OTHERS = (*range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
VISIBLE = {code: chr(code).encode("unicode_escape").decode() for code in (*CONTROLS, *OTHERS)}


def chat_line(body: bytes) -> bytes:
    """Return what subscribers see of a PUSHed body (slide 3): `user> message`, the message in cyan.

    Raises ValueError, with the reason, if the body is no chat line.
    """
    try:
        payload = parse_json(body.decode())
        user, message = harmless(payload["user"]), harmless(payload["message"])
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        reason = 'not a JSON object with the strings "user" and "message", in UTF-8'
        raise ValueError(reason) from None
    line = CHAT_LINE % (user.encode(), message.encode())
    if len(line) > LONGEST:
        raise ValueError("too long when its control characters are shown")
    return line


def harmless(text: str) -> str:
    r"""Return text with its control characters in a visible form, such as `\x1b`."""
    return text if text.isprintable() else text.translate(VISIBLE)  # Nearly all is printable.


# Readers, and how long to wait for them.


class Patience:
    """The patience with readers that are full.

    A wait may take PATIENCE. If the readers do not make room in it, the next one may take only
    LEAST_PATIENCE, and then ever more, until it is PATIENCE again after RECOVERY. So a reader that
    stopped holds up the chat once, and many that stop again and again hold it up little each.
    """

    def __init__(self, pub: Sock, ending: "Ending") -> None:
        self.pub, self.ending = pub, ending
        self.gave_up_at = -math.inf
        text = "a reader has stopped reading, going on without it; times: {count:,}"
        self.stopped_readers = News(text)

    def send(self, line: bytes) -> None:
        """Wait for readers that are full, as patience allows, and send a line.

        Those that still are full then miss it, and what follows until they have read half of what
        waits for them: after one send without XPUB_NODROP, libzmq leaves them out until then.
        """
        now = time.monotonic()
        regained = PATIENCE * (now - self.gave_up_at) / RECOVERY
        patience = max(LEAST_PATIENCE, min(PATIENCE, regained, self.ending.at - now))
        self.pub.set(zmq.SNDTIMEO, int(1_000 * patience))
        try:
            send(self.pub, line)
        except zmq.Again:
            self.pub.set(zmq.XPUB_NODROP, 0)
            send(self.pub, line)
            self.pub.set(zmq.XPUB_NODROP, 1)
            self.gave_up_at = time.monotonic()
            self.stopped_readers.add()


# What the operator is told, on stderr.


class News:
    """News of one kind, which may come in floods: it is told in one line a second at most."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.count = 0
        self.latest = ""
        self.quiet_until = 0.0

    def add(self, latest: str = "") -> None:
        """Count one more."""
        self.count += 1
        self.latest = latest

    def tell(self, at_once: bool = False) -> None:
        """Tell how many there were since the last time, if that was a second ago, or at once."""
        if self.count and (at_once or time.monotonic() >= self.quiet_until):
            if say(self.text.format(count=self.count, latest=self.latest)):
                self.count = 0
            self.quiet_until = time.monotonic() + 1


def say(text: str) -> bool:
    """Tell the operator something; return False, and do not, if the last text is not out yet.

    A thread writes it, for stderr may be a pipe or a terminal that nobody reads, and the chat is
    not to stand still for that.
    """
    if any(thread.name == "stderr" for thread in threading.enumerate()):
        return False

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"server.py: {text}\n".encode(errors="backslashreplace"))

    writer = threading.Thread(target=write, name="stderr", daemon=True)
    writer.start()
    writer.join(0.1)
    return True


# Start and end.


class Ending:
    """When to end, once a signal came: at the first silence, so that what had arrived goes out.

    A handler that raised could strike between a line's arrival and its sending, and lose it. Each
    signal starts the wait for a line anew, so further ones of its kind are blocked. To ignore them
    would be too late for one that comes meanwhile, and Python would report that.
    """

    def __init__(self) -> None:
        self.at = math.inf  # the time at which the loop ends at the latest, once a signal came

    def begin(self, signum: int, _frame: object) -> None:
        """Handle SIGINT and SIGTERM."""
        if hasattr(signal, "pthread_sigmask"):  # It is not there on Windows, nor needed.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signum])
        self.at = min(self.at, time.monotonic() + ENDING)


def claim_files() -> None:
    """Open standard streams that are closed, so that no socket takes their place.

    Raises OSError if there is no room for the files that sockets need, for then libzmq aborts.
    """
    for file in [os.open(os.devnull, os.O_RDWR) for _ in range(20)]:
        if file > 2:
            os.close(file)


def allow_many_readers() -> None:
    """Raise the soft limit of open files to the hard one: each reader takes one.

    Once they run out, libzmq refuses readers in a busy loop.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard == resource.RLIM_INFINITY:  # macOS says so, and then refuses it.
            hard = max(soft, 10_240)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def load_keys(name: str) -> tuple[bytes, bytes]:
    """Return the keys in NAME.key (public) and NAME.key_secret; make both if neither is there.

    Raises ValueError if they cannot be used.
    """
    import zmq.auth  # This takes 14 ms, and is not needed without a key.

    public_file, secret_file = Path(f"{name}.key"), Path(f"{name}.key_secret")
    try:
        if public_file.name == ".key":
            raise ValueError("a name is needed, such as chat")
        if not public_file.exists() and not secret_file.exists():
            os.umask(0o077)  # Or else the secret would be there for all to read.
            zmq.auth.create_certificates(public_file.parent, public_file.stem)
        published, _ = zmq.auth.load_certificate(public_file)
        public, secret = zmq.auth.load_certificate(secret_file)
        if not secret or not published == public == zmq.curve_public(secret):
            raise ValueError("they do not belong together")
    except (OSError, ValueError, IndexError, zmq.ZMQError) as error:
        raise ValueError(f"--key: cannot use {public_file} and its secret: {error}") from None
    return public, secret


def make_sockets(context: zmq.Context[Sock], keys: tuple[bytes, bytes] | None) -> list[Sock]:
    """Return PULL and PUB, encrypted if there are keys: then only who has the public one gets in.

    The high-water marks are never set again: libzmq 4.3.5 may pass them to a freed pipe.
    """
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    for sock in (pull, pub):
        if keys:
            sock.curve_server = 1
            sock.curve_publickey, sock.curve_secretkey = keys
        sock.set(zmq.IPV6, 1)  # as well as IPv4
        sock.set(zmq.BACKLOG, 1_000)  # A crowd may come at once.
        sock.set(zmq.TCP_KEEPALIVE, 1)  # finds a peer that vanished while nothing was said.
        sock.set(zmq.TCP_KEEPALIVE_IDLE, VANISHED // 2)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, VANISHED // 10)
        sock.set(zmq.TCP_KEEPALIVE_CNT, 5)
        sock.set(zmq.TCP_MAXRT, 1_000 * VANISHED)  # cuts off a peer that takes nothing.
    encryption = 33 if keys else 0  # bytes that it adds to a frame (RFC 26)
    pull.set(zmq.MAXMSGSIZE, LONGEST + encryption)
    pull.set(zmq.RCVHWM, WRITER_QUEUE)
    pull.set(zmq.RCVTIMEO, int(1_000 * SILENCE))
    pub.set(zmq.MAXMSGSIZE, SUBSCRIPTION + encryption)
    pub.set(zmq.RCVHWM, 1)  # Or else a flood of subscriptions is taken before the next line.
    pub.set(zmq.SNDHWM, READER_QUEUE)
    pub.set(zmq.XPUB_NODROP, 1)  # A reader that is full makes send wait, and misses nothing.
    pub.set(zmq.SNDBUF, 65_536)  # If larger, it is seen too late that a slow reader moves.
    return [pull, pub]


def bind(sock: Sock, address: str, port: int) -> str:
    """Bind a socket to a TCP port, 0 for any free one; return the endpoint with the real port.

    Raises ZMQError, with the reason.
    """
    host = f"[{address}]" if ":" in address else address
    sock.bind(f"tcp://{host}:{port}")
    return f"tcp://{host}:{sock.get_string(zmq.LAST_ENDPOINT).rpartition(':')[2]}"


def port(text: str) -> int:
    """Return the port that an option names. Raises ValueError if it is none."""
    number = int(text)
    if not 0 <= number <= 65_535:
        raise ValueError
    return number


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Republish each JSON line that clients push to all who subscribe.",
        epilog="example: python server.py --bind 127.0.0.1 --pull-port 4001 --pub-port 4002",
    )
    add = parser.add_argument
    add("--bind", metavar="ADDRESS", default="*", help="where to listen (%(default)s)")
    add("--pull-port", metavar="PORT", type=port, default=1337, help="lines come in (%(default)s)")
    add("--pub-port", metavar="PORT", type=port, default=1338, help="and go out (%(default)s)")
    add("--key", metavar="NAME", type=lambda name: name.removesuffix(".key"),
        help="encrypt, and let in only who has NAME.key; it is made if it is missing")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Make the sockets, serve until told to end, and return the exit status."""
    ending = Ending()
    signal.signal(signal.SIGINT, ending.begin)
    signal.signal(signal.SIGTERM, ending.begin)
    options = parse_options()
    allow_many_readers()
    try:
        claim_files()
        keys = None if options.key is None else load_keys(options.key)
        context = zmq.Context()
        pull, pub = make_sockets(context, keys)
        pull_endpoint = bind(pull, options.bind, options.pull_port)
        pub_endpoint = bind(pub, options.bind, options.pub_port)
    except (OSError, ValueError, zmq.ZMQError) as error:
        say(f"{error}; see {'ulimit -n' if isinstance(error, OSError) else '--help'}")
        return 1
    say(f"PULL listens on {pull_endpoint}, PUB on {pub_endpoint}")
    if keys:
        say(f"the chat is encrypted, and open to those to whom you give {options.key}.key")
    serve(pull, pub, ending)
    # Readers have the rest of the time, half a second at least, to take what waits for them.
    context.destroy(linger=int(1_000 * max(0.5, ending.at - time.monotonic())))
    return 0


if __name__ == "__main__":
    # Not sys.exit, which gives signals back their default action: the next one would kill this.
    os._exit(main())
