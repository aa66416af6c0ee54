#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq>=25", "colorama>=0.4.6"]
# ///
"""The chat client of the talk "Ømq & Services @ Chartboost" (slides 8 to 14), in Python.

It PUSHes each line of stdin to the server, and prints what SUB receives. The function chat is the
talk's loop, but messages appear without pressing Enter. The exit status is 0 only if every line
that was read was published, as far as echoes tell.

line       what comes from stdin
frame      what is pushed for a line: the line as it was typed (our server wants JSON), or with
           --user, {"user": NAME, "message": LINE}
message    what the server makes of a frame and publishes to everybody, in UTF-8; it is printed with
           its unsafe characters escaped, except colors and TABs
echo       the message of a line of this client
in flight  pushed, but not yet acknowledged by an echo
waiting    in flight, or still to be pushed
pipe       stdin that is not a terminal, even if it is a file (with a terminal, the client is
           interactive)
notice     what this client says itself, on stderr
problem    a notice that something is wrong with a line, "KIND: DETAILS"
report     the notice at the end that says why the exit status is not 0
our server server.py; another server may publish lines in another form, or not at all

What the slides do not say about ZeroMQ:
- Its library, libzmq, connects and reconnects by itself. What was on its way at a break may be
  lost.
- PUSH never learns whether a frame has arrived.
- SUB's subscription takes effect some time after the connection. PUB does not confirm it, and
  the new subscriber gets nothing that was published before. (ZeroMQ calls this a slow joiner.)
- PUB queues messages for each subscriber (our server: 2,000). A subscriber that stalls loses
  messages.

So the client waits for echoes. An echo acknowledges its line and all lines before it, since the
server publishes them in order. Lines that are not acknowledged are pushed again over the next
connection. The client cannot know whether a line was lost, or only its echo. So a line may appear
more than once. While 1,000 lines or more wait, a pipe is not read.

If lines wait and no echo comes for 30 seconds, the client gives up those in flight, or ends: class
Watchdog has the details. A line that our server would drop gets no echo, so it counts as
undelivered once it has been pushed. Another server gets all lines, too. If it does not publish them
as our server does, nothing acknowledges them. In all these cases, the exit status is 1.

If stdin and stdout are terminals that know escape codes, a line editor keeps the line being typed
below the messages. The parts "The line editor" and "The terminal" are about it alone, and can be
skipped at first; main, at the end, connects the parts.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import colorama
import zmq

if sys.platform == "win32":
    import msvcrt
else:
    import termios
    import tty

Sock = zmq.Socket[bytes]
Message = tuple[str, str]  # (plain, colored): the same text, sanitized, without and with colors

MAX_FRAME = 16_384  # bytes of a frame: the server closes the connection at a longer one
# Lines in flight, at most: even if all are pushed twice, their echoes fit our server's queue. While
# WINDOW lines or more wait, the outbox is full, and a pipe is not read.
WINDOW = 1_000
MAX_MESSAGES = 200  # messages that SUB queues, and that one turn of the loop receives, at most
READ_SIZE = 16_384  # bytes read from stdin in one go
TICK = 0.1  # seconds until the loop looks at its clocks and the terminal's width, if nothing comes
CYAN, RESET = colorama.Fore.CYAN, colorama.Style.RESET_ALL

# recv(sub) is sub.recv(), and send(push, ...) is push.send(...), but up to twice as fast: these are
# the methods of zmq.Socket's compiled base class.
recv, send = zmq.backend.Socket.recv, zmq.backend.Socket.send


def chat(
    stdin: Stdin, connection: Connection, outbox: Outbox, watchdog: Watchdog, screen: Screen
) -> None:
    """Wait for some input, push it, and print what SUB holds (slide 8).

    End when stdin has ended and no line waits, or when no echo has come for too long. (The rest of
    slide 8 is in make_sockets and Connection.) Raises OSError if stdout fails.
    """
    while outbox.lines or not stdin.ended:
        # wait for some input, or only for echoes while the outbox is full
        # (a terminal is read even then: typing must not hang)
        reading = not stdin.ended and (len(outbox.lines) < WINDOW or screen.interactive)
        for line in wait_for_input(connection, stdin, reading):
            if not connection.up or watchdog.overdue:
                # It has left the editor, and no echo will show it soon.
                screen.print_typed(line)
            if problem := outbox.add(line):
                screen.print_problem(problem)

        # push it
        connection.update()
        outbox.push_to(connection)
        screen.print_notice(connection.new_notice())

        # dump buffered messages
        messages = receive(connection.sub)
        echo_came = outbox.acknowledge(messages)
        if not screen.print_messages(messages):
            # The reader of stdout has left, as `| head -1` does. It has enough: read no more.
            stdin.ended = True

        # act if no echo comes, and end if none has come for too long
        if watchdog.act(reading, echo_came):
            break

        # redraw the line being typed, or suspend after Ctrl-Z
        screen.refresh()


# ---- Wait for some input ----


def wait_for_input(connection: Connection, stdin: Stdin, reading: bool) -> list[bytes]:
    """Wait for stdin (if reading), SUB, or the monitors. Return the lines of stdin."""
    fd = stdin.receiver.fileno()  # zmq.select takes and returns a plain socket as its number
    sources: list[Sock | int] = [connection.sub, *connection.monitors.values()]
    if reading:
        sources.append(fd)
    ready, _, _ = zmq.select(sources, [], [], TICK)
    return stdin.read_lines() if fd in ready else []


Feed = Callable[[bytes], tuple[list[bytes], bool]]  # returns lines, and whether stdin has ended


class Stdin:
    """The lines of stdin. A thread reads it, because on Windows zmq.select takes only sockets.

    The thread passes everything on through a pair of sockets. It blocks when they are full, until
    the loop reads on.
    """

    def __init__(self, read: Callable[[], bytes], feed: Feed) -> None:
        self.read = read  # reads stdin, and returns b"" at the end
        self.feed = feed  # takes what was read, and returns the lines that it completes
        self.receiver, self.sender = socket.socketpair()
        self.ended = False  # True if no more lines will be read
        self.failed = False  # True if reading failed; set before sender is closed
        threading.Thread(target=self.pass_on, daemon=True).start()

    def pass_on(self) -> None:
        """Pass on everything. This runs in the thread."""
        try:
            while data := self.read():
                self.sender.sendall(data)
        except OSError:
            self.failed = True
        self.sender.close()

    def read_lines(self) -> list[bytes]:
        """Return the lines that have come, without their ends, but no empty ones (slide 8)."""
        data = self.receiver.recv(READ_SIZE)  # nothing, at the end of stdin
        lines, self.ended = self.feed(data)
        if self.failed and not data:
            return []  # The last line may be cut off: do not send it.
        return [line for line in lines if line]


MAX_KEPT = 1_000_000  # bytes kept of a line: far fewer can be sent, but its size is reported


class Splitter:
    """Splits stdin into lines, if there is no line editor."""

    def __init__(self) -> None:
        self.partial = b""  # a line whose end is still to come
        self.bom = codecs.BOM_UTF8  # PowerShell puts it before the first line; empty after that

    def feed(self, data: bytes) -> tuple[list[bytes], bool]:
        """Return the lines that data completes, and whether stdin has ended: data is empty then."""
        new = data or b"\n"  # The end of stdin ends the last line, too.
        *lines, partial = (self.partial + new).split(b"\n")
        self.partial = partial[:MAX_KEPT]  # A longer line is not sent anyway: see Outbox.add.
        if lines:
            lines[0] = lines[0].removeprefix(self.bom)
            self.bom = b""
        return [line.removesuffix(b"\r") for line in lines], not data


# ---- The connection ----

SLOW_JOINER_DELAY = 0.1  # seconds from a handshake until the subscription should be in effect
NOTICE_DELAY = 1.0  # seconds without a connection until a notice
RETRY_INTERVAL = 10.0  # seconds without a connection until a reconnect, in case libzmq gave up
MONITOR_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def make_sockets(context: zmq.Context[Sock], options: argparse.Namespace) -> tuple[Sock, Sock]:
    """Return PUSH and SUB (slide 8). Raises OSError if the key cannot be used."""
    push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    for sock in (push, sub):
        # Turn IPv6 on only for an IPv6 address: if it is on, a name is resolved to IPv6 only.
        sock.set(zmq.IPV6, int(":" in options.host))
        sock.set(zmq.RECONNECT_IVL, 100)  # milliseconds until a reconnect: see Outbox.push_to
        sock.set(zmq.RECONNECT_IVL_MAX, 1_000)  # milliseconds between later attempts, at most
        # On Linux, notice a vanished server within 20 seconds, so that there is time to push lines
        # again before DELIVERY_TIMEOUT.
        sock.set(zmq.TCP_MAXRT, 20_000)
        # Notice it on an idle connection, too: check it after 10 seconds, then every 2 seconds.
        sock.set(zmq.TCP_KEEPALIVE, 1)
        sock.set(zmq.TCP_KEEPALIVE_IDLE, 10)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, 2)
    if options.key is not None:
        encrypt(push, sub, options.key)
    push.set(zmq.IMMEDIATE, 1)  # PUSH queues nothing without a connection: the outbox does.
    sub.set(zmq.LINGER, 0)  # At the end, do not wait to send the subscription to a server.
    sub.set(zmq.MAXMSGSIZE, 4 * MAX_FRAME)  # Another server may publish longer messages than ours.
    sub.set(zmq.RCVHWM, MAX_MESSAGES)
    sub.set(zmq.SUBSCRIBE, b"")
    return push, sub


def encrypt(push: Sock, sub: Sock, key: str) -> None:
    """Encrypt for the server whose public key is in a file (CURVE, ZeroMQ's RFC 26).

    Raises OSError.
    """
    import zmq.auth  # This takes 14 ms, and is only needed here.

    try:
        server_key, _ = zmq.auth.load_certificate(key)
        for sock in (push, sub):
            sock.curve_serverkey = server_key
            # This side needs a key pair as well, but any will do.
            sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
    except (OSError, ValueError, IndexError, zmq.ZMQError) as error:
        raise OSError(f"--key: cannot use {key}: {error}") from None


class Connection:
    """PUSH and SUB. It is up while both are connected and the subscription should be in effect.

    libzmq connects and reconnects by itself, and reports it on other sockets, the monitors.
    """

    def __init__(
        self, push: Sock, sub: Sock, options: argparse.Namespace, interactive: bool
    ) -> None:
        self.push, self.sub, self.host = push, sub, options.host
        self.endpoints = {
            sub: f"tcp://{options.host}:{options.sub_port}",
            push: f"tcp://{options.host}:{options.push_port}",
        }
        # Create the monitors before the sockets connect, or they may miss the first event.
        self.monitors = {s: s.get_monitor_socket(MONITOR_EVENTS) for s in self.endpoints}
        for sock, endpoint in self.endpoints.items():
            sock.connect(endpoint)
        self.unconnected = set(self.endpoints)  # which of the two sockets are not connected
        self.up = False
        self.came_up = False  # whether the last update changed up from False to True
        self.ever_up = False
        self.ready_at = math.inf  # when the subscription should be in effect
        self.notice_at = time.monotonic() + NOTICE_DELAY  # when a notice is due, if still not up
        self.retry_at = time.monotonic() + RETRY_INTERVAL  # when to reconnect, if still not up
        # What the last notice said: "up" or "down". A pipe's first connection is not announced.
        self.announced = "" if interactive else "up"

    def update(self) -> None:
        """Read the monitors, and reconnect if need be.

        After each handshake, up is False for SLOW_JOINER_DELAY, and then came_up is True until the
        next update. So it reports each new connection, even if one call reads a loss and the next
        handshake.
        """
        was_up, now = self.up, time.monotonic()
        for sock, monitor in self.monitors.items():
            while monitor.poll(0):
                # The first part begins with the event, in 16 bits: see zmq_socket_monitor(3).
                # zmq.utils.monitor would import asyncio, which takes as long as all other imports.
                event = int.from_bytes(monitor.recv_multipart()[0][:2], sys.byteorder)
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.unconnected.discard(sock)
                    self.ready_at = now + SLOW_JOINER_DELAY
                else:  # EVENT_DISCONNECTED
                    self.unconnected.add(sock)
        self.up = not self.unconnected and now >= self.ready_at
        self.came_up = self.up and not was_up
        if self.up or was_up:
            self.ever_up = True
            self.notice_at, self.retry_at = now + NOTICE_DELAY, now + RETRY_INTERVAL
        elif now >= self.retry_at:
            self.retry_at = now + RETRY_INTERVAL
            # libzmq gives up after a protocol error: a message is too long, or only one side uses
            # --key.
            for sock in self.unconnected:
                sock.disconnect(self.endpoints[sock])
                sock.connect(self.endpoints[sock])

    def new_notice(self) -> str:
        """Return a notice, once, if the connection has come up or been down for NOTICE_DELAY."""
        if self.up and self.announced != "up":
            self.announced = "up"
            return f"connected to {self.host}"
        # (While both sockets are connected, the connection is about to be up.)
        if self.unconnected and time.monotonic() >= self.notice_at and self.announced != "down":
            self.announced = "down"
            cause = f"no server at {self.host} (or its --key differs)"
            if len(self.unconnected) == 1:
                [sock] = self.unconnected
                cause = f"no answer from {self.endpoints[sock]}"
            return f"{cause}; your lines will be sent when it is back"
        return ""


# ---- Push it ----


class Line(NamedTuple):
    """A line in the outbox."""

    frame: bytes
    # The hash of its echo, or None if our server will drop the line. (Not the echo itself: Python
    # may need 4 bytes for a character, so 60 MB for a thousand echoes.)
    echo_hash: int | None


class Outbox:
    """The lines that wait. The first of them are in flight: pushed, but not acknowledged.

    A line leaves when it is acknowledged or given up. (A line that our server will drop leaves when
    it has been pushed, and counts as undelivered. So each line in flight awaits an echo.)

    A connection that breaks may lose lines. If only new lines were pushed over the next
    connection, their echoes would acknowledge the lost lines as well. So all lines in flight are
    pushed again, in order. (This is go-back-N with cumulative acknowledgements.) For example: push
    A, B, C; A is published, but the connection breaks, and B, C and the echo of A are lost; push
    A, B, C again; their echoes come. Everybody has seen A twice.

    An echo is recognized by its text. So a message of the same text is mistaken for it.
    """

    def __init__(self, user: str | None) -> None:
        self.user = user
        self.lines: list[Line] = []
        # How many of the lines, the first ones, are in flight. To push lines again, lower it: then
        # they count as still to be pushed.
        self.in_flight = 0
        # The hashes of echoes that may come again, as their lines were pushed again
        self.second_echoes: set[int | None] = set()
        self.undelivered = 0  # lines that left without an echo, or were too long

    def add(self, line: bytes) -> str:
        """Add a line, unless it is too long. Return the problem with it, or "".

        A line that our server will drop is added, too: another server may publish it.
        """
        frame, problem = line, ""
        if self.user is not None:
            text = line.decode(errors="replace")
            if text.encode() != line:
                problem = "not UTF-8: invalid bytes are sent as \ufffd"
            payload = {"user": self.user, "message": text}
            # Lone surrogates in NAME (bytes that are not UTF-8) become question marks.
            frame = json.dumps(payload, ensure_ascii=False).encode(errors="replace")
        if len(frame) > MAX_FRAME:
            self.undelivered += 1
            size = f"{len(frame):,} bytes{' or more' if len(line) >= MAX_KEPT else ''}"
            return f"line not sent: {size}, but the server takes {MAX_FRAME:,} at most"
        echo_hash = None
        try:
            echo_hash = hash(echo_of(frame))
        except ValueError as error:
            problem = f"the server will drop this line: {error}: {excerpt(line)}"
        self.lines.append(Line(frame, echo_hash))
        return problem

    def push_to(self, connection: Connection) -> None:
        """Push lines (slide 8), until WINDOW are in flight.

        Over a new connection, the lines in flight must go before new ones. So call this right after
        update, which notices new connections. (If PUSH loses its connection during this call, send
        raises Again. The next connection comes after 100 ms (RECONNECT_IVL) or more.)
        """
        if connection.came_up:  # Go back: the lines in flight are to be pushed again.
            if not self.in_flight:
                self.second_echoes.clear()  # The set must not grow forever.
            self.second_echoes.update(line.echo_hash for line in self.lines[: self.in_flight])
            self.in_flight = 0
        with contextlib.suppress(zmq.Again):  # PUSH is full, or has lost its connection: try later.
            while connection.up and self.can_push():
                line = self.lines[self.in_flight]
                send(connection.push, line.frame, zmq.NOBLOCK)
                if line.echo_hash is None:
                    self.undelivered += 1
                    del self.lines[self.in_flight]
                else:
                    self.in_flight += 1

    def can_push(self) -> bool:
        """Return whether lines are still to be pushed, and fewer than WINDOW are in flight."""
        return self.in_flight < min(WINDOW, len(self.lines))

    def acknowledge(self, messages: list[Message]) -> bool:
        """Remove the lines that the echoes among the messages acknowledge.

        Return whether an echo came, which shows that the server is alive. The second echo of a line
        that was pushed again counts, too, even if the line has left. After a break, a slow link may
        take a minute for a thousand second echoes. If they did not count, the client would end.
        """
        echo_came = False
        expected = [line.echo_hash for line in self.lines[: self.in_flight]]
        for plain, _ in messages:
            echo_hash = hash(plain)
            if echo_hash in expected:
                del expected[: expected.index(echo_hash) + 1]
                echo_came = True
            elif echo_hash in self.second_echoes:
                echo_came = True
        del self.lines[: self.in_flight - len(expected)]
        self.in_flight = len(expected)
        return echo_came

    def probe(self) -> None:
        """Let push_to push the newest line in flight again: its echo acknowledges all of them.

        (There is one if lines wait and can_push is False.)

        This helps if their own echoes were missed, because the subscription took effect late, or
        because stdout was blocked for so long that the server dropped messages for this client.
        (TCP has this as tail loss probe, RFC 8985.)
        """
        self.in_flight -= 1

    def give_up(self) -> None:
        """Forget the lines in flight."""
        self.undelivered += self.in_flight
        del self.lines[: self.in_flight]
        self.in_flight = 0

    def overdue_notice(self) -> str:
        """Return a notice that echoes are overdue."""
        first = excerpt(self.lines[0].frame)
        return f"no echo yet for {lines_in_words(len(self.lines))}; the first: {first}"

    def undelivered_notice(self) -> str:
        """Return how many lines may not have been delivered, or an empty string if all were."""
        count = self.undelivered + len(self.lines)
        return f"{lines_in_words(count)} may not have been delivered" if count else ""


def lines_in_words(count: int) -> str:
    """Return a number of lines, for a notice."""
    return "1 line" if count == 1 else f"{count:,} lines"


def excerpt(frame: bytes) -> str:
    """Return the start of a line or of its frame, to show it in a notice."""
    return frame.decode(errors="replace")[:80]


# What the server makes of a frame. The rules are copied from server.py, so that this script runs
# without it.

# The characters to escape: they could control a terminal, break a line, or mislead a reader.
UNSAFE = (
    r"\x00-\x08\x0a-\x1f\x7f-\x9f"  # control characters, except TAB
    r"\u2028\u2029"  # line separators
    r"\u202a-\u202e\u2066-\u2069"  # they change the direction of text
    r"\ud800-\udfff"  # lone surrogates, which UTF-8 cannot encode
)
UNSAFE_PART = re.compile(f"[{UNSAFE}]+")

# The usual form of a frame, as json.dumps or JSON.stringify writes it if its strings have no
# characters that JSON or sanitize would escape. It is only for speed: without it, a pipe would take
# 1.6 times as long.
SIMPLE_STRING = rf'"([^"\\\t{UNSAFE}]*)"'
SIMPLE_FRAME = re.compile(rf'\{{"user": ?{SIMPLE_STRING}, ?"message": ?{SIMPLE_STRING}\}}')

# "user" and "message" may be JSON numbers. They are kept as strings, as they were written.
parse_json = json.JSONDecoder(parse_int=str, parse_float=str).decode


def echo_of(frame: bytes) -> str:
    """Return the message that our server makes of a frame (slide 3), without its color: its echo.

    Raises ValueError, with the reason, if it makes none.
    """
    try:
        text = frame.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if simple := SIMPLE_FRAME.fullmatch(text):
        # Even with its color, the message is shorter than the frame, which is not too long.
        return f"{simple[1]}> {simple[2]}"
    text = text.removeprefix("\ufeff")  # a byte order mark, as the server does
    try:
        payload = parse_json(text)
    except (ValueError, RecursionError):
        payload = None
    match payload:
        case {"user": str(user), "message": str(message)}:
            echo = f"{sanitize(user)}> {sanitize(message)}"
        case _:
            hint = "to just type text, use --user NAME"
            if text.startswith("{") and not text.endswith("}"):
                hint = "write the whole object on one line"
            raise ValueError(f'not a JSON object with "user" and "message" ({hint})')
    if len(echo.encode()) + len(CYAN + RESET) > MAX_FRAME:
        raise ValueError("too long once escaped")
    return echo


def sanitize(text: str) -> str:
    r"""Return text with its unsafe characters escaped: ESC becomes the four characters `\x1b`."""
    return UNSAFE_PART.sub(lambda part: part[0].encode("unicode_escape").decode(), text)


# ---- Dump buffered messages ----


COLOR = re.compile(r"(\x1b\[[0-9;:]*m)")


def receive(sub: Sock) -> list[Message]:
    """Return the messages that SUB holds (slide 8), but at most MAX_MESSAGES."""
    messages: list[Message] = []
    with contextlib.suppress(zmq.Again):  # SUB holds no more.
        while len(messages) < MAX_MESSAGES:
            messages.append(sanitize_message(recv(sub, zmq.NOBLOCK)))
    return messages


def sanitize_message(data: bytes) -> Message:
    """Return a message from what was received, which may come from any server."""
    text = data.decode(errors="replace")
    plain = text.removesuffix(RESET).replace(CYAN, "", 1)
    if plain.isprintable() and text.endswith(RESET):
        # The usual message of our server. No unsafe character is printable, so there is nothing to
        # escape. (Only for speed: without this, a pipe would take 1.4 times as long.)
        return plain, text
    parts = COLOR.split(text)  # text, color, text, ..., text
    parts[::2] = map(sanitize, parts[::2])
    plain, colored = "".join(parts[::2]), "".join(parts)
    if len(parts) > 1 and not text.endswith(RESET):
        colored += RESET  # Colors must not leak into what follows.
    return plain, colored


# ---- Act if no echo comes ----

ECHO_TIMEOUT = 5.0  # seconds without an echo until a notice, and until a probe
DELIVERY_TIMEOUT = 30.0  # seconds without an echo until lines are given up, or the client ends
CONNECT_TIMEOUT = 8.0  # seconds without an echo until the client ends, if it was never connected


class Watchdog:
    """A clock: how long lines have waited since the last echo. And what the client does about it.

    clock     while the loop reads stdin        while it does not
    5         print a notice, if interactive    the same, and probe: push the newest line again
    8         -                                 end, if there never was a connection
    30        give up the lines in flight       end

    The loop does not read after the end of stdin, nor a pipe while the outbox is full. While it
    reads, it does not probe, because the echo of the next line will acknowledge all lines before
    it. And while it reads but there is no connection, the clock stands still: the lines wait until
    the server is back.
    """

    def __init__(self, outbox: Outbox, connection: Connection, screen: Screen) -> None:
        self.outbox, self.connection, self.screen = outbox, connection, screen
        self.clock = 0.0  # how many seconds lines have waited since the last echo
        self.last_turn = time.monotonic()  # when act was called last
        self.probe_at = ECHO_TIMEOUT  # what the clock shows when a probe is due; inf after it
        # True after 5 seconds without an echo, until the next echo. Giving up does not end it, so
        # that a server that never echoes causes one notice, not one every 30 seconds.
        self.overdue = False

    def act(self, reading: bool, echo_came: bool) -> bool:
        """Let the clock go on, and act as the table says. Return whether the chat has to end."""
        now = time.monotonic()
        # Count two ticks at most: a longer gap means that this process was suspended, or that
        # stdout was blocked.
        elapsed = min(now - self.last_turn, 2 * TICK)
        self.last_turn = now
        if echo_came:
            self.overdue = False
        if echo_came or not self.outbox.lines:
            self.restart()
        elif self.connection.up or not reading:  # else the clock stands still
            self.clock += elapsed
        if self.connection.came_up:
            self.probe_at = self.clock + ECHO_TIMEOUT  # Lines were pushed again: wait for echoes.

        if self.clock >= ECHO_TIMEOUT and not self.overdue:
            self.overdue = True
            if self.screen.interactive:
                self.screen.print_notice(self.outbox.overdue_notice())
        if reading:  # the table's column "while the loop reads stdin"
            if self.clock >= DELIVERY_TIMEOUT:
                self.outbox.give_up()
                self.restart()
            return False
        # The column "while it does not". (Do not probe while new lines can be pushed: their
        # echoes will do what a probe does.)
        if self.clock >= self.probe_at and self.connection.up and not self.outbox.can_push():
            self.outbox.probe()
            self.probe_at = math.inf  # Once is enough, until an echo or a new connection.
        return self.clock >= (DELIVERY_TIMEOUT if self.connection.ever_up else CONNECT_TIMEOUT)

    def restart(self) -> None:
        """Set the clock to zero."""
        self.clock, self.probe_at = 0.0, ECHO_TIMEOUT


# ---- The screen ----

# The errors of a write to stdout when its reader has left. Windows reports EINVAL, or EPIPE.
READER_LEFT = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)


class Screen:
    """Where messages and notices are printed, and how stdin is read.

    With a line editor, it is an EditorScreen.
    """

    def __init__(self, color: bool) -> None:
        self.color = color
        self.interactive = is_terminal(0)  # whether somebody types
        self.printed_kinds: set[str] = set()  # the kinds of problems that were printed

    def open_stdin(self) -> Stdin:
        """Begin to read stdin."""
        if sys.platform == "win32":  # os.read would return text in the console's code page.
            file = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
            return Stdin(lambda: file.read(READ_SIZE), Splitter().feed)
        return Stdin(lambda: os.read(0, READ_SIZE), Splitter().feed)

    def print_messages(self, messages: list[Message]) -> bool:
        """Print messages (slide 8). Return False if the reader of stdout has left.

        Raises OSError if stdout fails otherwise.
        """
        texts = [colored if self.color else plain for plain, colored in messages]
        try:
            if texts:
                self.write("\n".join(texts) + "\n", 1)
        except OSError as error:
            if error.errno not in READER_LEFT:
                raise
            return False
        return True

    def print_problem(self, problem: str) -> None:
        """Print a problem. For a pipe, print only the first of each kind."""
        kind, _, _ = problem.partition(":")
        if self.interactive or kind not in self.printed_kinds:
            self.printed_kinds.add(kind)
            self.print_notice(problem)

    def print_notice(self, text: str) -> None:
        """Print a notice, if there is one."""
        if text:
            with contextlib.suppress(OSError):
                self.write(f"client.py: {sanitize(text)}\n", 2)

    def print_typed(self, line: bytes) -> None:
        """Do nothing: without a line editor, what was typed stays on the terminal anyway."""

    def write(self, text: str, file: int) -> None:
        """Write lines of text to stdout (1) or stderr (2), in UTF-8. Raises OSError."""
        # Use a new stream each time: a signal handler may write the report during a write, which
        # Python's streams do not allow.
        with open(file, "w", encoding="utf-8", errors="replace", closefd=False) as stream:
            stream.write(text)

    def refresh(self) -> None:
        """Redraw what the user has changed: without a line editor, nothing."""

    def close(self, report: str) -> None:
        """Print the report, if there is one, and if that is possible within 0.3 seconds.

        Perhaps nobody reads stderr, or Ctrl-S has stopped the terminal.
        """
        call_with_timeout(0.3, self.print_notice, report)


def is_terminal(file: int) -> bool:
    """Return whether a file is a terminal. On Windows, isatty takes NUL for one as well."""
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            colorama.win32.GetConsoleMode(msvcrt.get_osfhandle(file))
            return True
        return False
    return os.isatty(file)


def call_with_timeout(seconds: float, function: Callable[..., object], *args: object) -> None:
    """Call a function in a thread. Stop waiting for it after some seconds."""
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    thread.join(seconds)


# ---- Start ----


def make_screen(color: str) -> Screen:
    """Return a screen: with a line editor, if stdin and stdout are terminals with escape codes."""
    stdout = sys.stdout
    colorama.just_fix_windows_console()
    wrapped = sys.stdout is not stdout  # by colorama, for a console without escape codes
    has_escapes = is_terminal(1) and not wrapped and os.environ.get("TERM") != "dumb"
    auto_color = has_escapes and not os.environ.get("NO_COLOR")
    screen_class = EditorScreen if has_escapes and is_terminal(0) else Screen
    return screen_class(color == "always" or (color == "auto" and auto_color))


def handle_signals(screen: Screen, outbox: Outbox) -> None:
    """Leave on the signals that end programs, except those that are ignored at startup."""

    def leave(signum: int, _frame: object) -> NoReturn:
        """Handle a signal: exit, whatever the loop is waiting for."""
        screen.close(outbox.undelivered_notice())
        os._exit(128 + signum)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK"):  # SIGBREAK: Windows
        signum = getattr(signal, name, None)
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, leave)


def prepare_streams() -> None:
    """Open devnull in place of each standard stream that is closed, and make all of them blocking.

    Otherwise, a socket could get the number of stderr, and the notices would be written to it. And
    another process that shares a stream may have made it nonblocking.
    """
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass  # open returns the lowest free number. Once that is 2 or more, 0 to 2 are open.
    for file in range(3):
        with contextlib.suppress(OSError, AttributeError):  # Windows
            os.set_blocking(file, True)


def host(text: str) -> str:
    """Return a HOST from the command line.

    Raises ArgumentTypeError, with what to write instead, if text includes a port or is no host.
    """
    has_port = text.count(":") == 1 or "]:" in text  # IPv6 addresses have more colons.
    if not text or has_port or not text.isprintable():
        raise argparse.ArgumentTypeError("write HOST --push-port PORT --sub-port PORT")
    return text


def port(text: str) -> int:
    """Return the port that an option names. Raises ValueError, which argparse reports."""
    number = int(text)
    if not 1 <= number <= 65_535:
        raise ValueError
    return number


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Send each line to a chat server, and show what everyone says.",
        epilog="example: python client.py localhost --user ken",
    )
    add = parser.add_argument
    add("host", metavar="HOST", nargs="?", type=host, default="localhost",
        help="the server (%(default)s)")  # fmt: skip
    add("--user", metavar="NAME", help="speak as NAME; without it, lines are sent as they are")
    add("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    add("--push-port", metavar="PORT", type=port, default=1337, help="for lines (%(default)s)")
    add("--sub-port", metavar="PORT", type=port, default=1338, help="for messages (%(default)s)")
    add("--key", metavar="FILE", help="the server's file NAME.key, if it has one")
    return parser.parse_args()


# ---- The line editor ----

# Input: Editor.feed takes bytes, splits them into keys (KEY_PATTERN), lets each key change the line
# and the cursor (EDITS), and returns the lines that Enter completes.
# Display: Editor.draw makes a row of the line, and EditorScreen.write puts it below the messages.

# A terminal sends a key as one character, or as ESC and more. For example:
#     ESC [ 3 ~    Delete: a control sequence (ECMA-48)
#     ESC O A      Up, in application mode, which an earlier program may have left on
#     ESC b        Alt-B
#     ESC ESC O A  Alt-Up
# ESC may come twice: Alt with a special key. An ESC alone waits for what follows. Keys that edit
# nothing, such as Alt-Up, are only matched to be ignored. So are answers to an earlier program,
# such as ESC ] ... BEL. (An answer that is split between two reads is taken for Alt-] and text.)

# A control sequence is "ESC [", then parameters (0 to ?), intermediates (space to /), and a last
# character (@ to ~). The second [ is for the Linux console, where F1 is ESC [ [ A. (In a VERBOSE
# pattern, spaces count only inside brackets.)
SEQUENCE_BODY = r"\[ \[? [0-?]* [ -/]*"
KEY_PATTERN = re.compile(  # The first alternative that matches counts.
    rf"""
    (?P<partial> \x1b+ (?: {SEQUENCE_BODY} | O[0-9;]* )? \Z )  # ESC, ESC [ 3: the rest is to come
    | \x1b+ {SEQUENCE_BODY} [@-~]?    # ESC [ 3 ~ (or ESC [ 3 alone, if what follows cannot end it)
    | \x1b+ O[0-9;]*.                # ESC O A
    | \x1b+ [\]PX^_] [^\x07\x1b]* (?: \x07 | \x1b\\ )  # ESC ] ... BEL
    | (?P<text> [^\x00-\x08\x0a-\x1f\x7f]+ )  # text, with TABs
    | \x1b* .                        # Enter, Backspace, Ctrl-A, ESC b
    """,
    re.DOTALL | re.VERBOSE,
)
ENTER = ("\r", "\n", "\x1b\r", "\x1b\n")  # Enter or Ctrl-J, perhaps after ESC or with Alt
CTRL_D = "\x04"
# Terminals differ in the codes of some keys.
BINDINGS: dict[tuple[str, ...], Callable[[Editor], object]] = {
    ("\x1b[D", "\x1bOD", "\x02"): lambda e: e.move(e.cursor - 1),  # Left/Ctrl-B
    ("\x1b[C", "\x1bOC", "\x06"): lambda e: e.move(e.cursor + 1),  # Right/Ctrl-F
    ("\x1b[H", "\x1bOH", "\x1b[1~", "\x1b[7~", "\x01"): lambda e: e.move(0),  # Home/Ctrl-A
    ("\x1b[F", "\x1bOF", "\x1b[4~", "\x1b[8~", "\x05"): lambda e: e.move(len(e.line)),  # End/Ctrl-E
    ("\x1b[1;5D", "\x1bOd", "\x1bb"): lambda e: e.move(e.word_edge(-1)),  # Ctrl-Left/Alt-B
    ("\x1b[1;5C", "\x1bOc", "\x1bf"): lambda e: e.move(e.word_edge(1)),  # Ctrl-Right/Alt-F
    ("\x7f", "\x08"): lambda e: e.delete(e.cursor - 1),  # Backspace/Ctrl-H
    ("\x1b[3~", CTRL_D): lambda e: e.delete(e.cursor + 1),  # Delete/Ctrl-D
    ("\x15",): lambda e: e.delete(0, keep=True),  # Ctrl-U
    ("\x0b",): lambda e: e.delete(len(e.line), keep=True),  # Ctrl-K
    # Ctrl-W: up to white space
    ("\x17",): lambda e: e.delete(e.word_edge(-1, r"\s*\S*"), keep=True),
    ("\x1bd",): lambda e: e.delete(e.word_edge(1), keep=True),  # Alt-D
    ("\x19",): lambda e: e.insert(e.killed),  # Ctrl-Y
    ("\x1b[A", "\x1bOA", "\x10"): lambda e: e.recall(-1),  # Up/Ctrl-P
    ("\x1b[B", "\x1bOB", "\x0e"): lambda e: e.recall(1),  # Down/Ctrl-N
}
EDITS = {key: edit for keys, edit in BINDINGS.items() for key in keys}

NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"  # cut off what is too long for a row, or wrap it as usual
# Go to the first column, and clear to the end of the screen. As a signal may have interrupted a
# write, set the color and wrapping to normal, too.
CLEAR = f"\r{RESET}{WRAP}\x1b[J"
SAVE_CURSOR, RESTORE_CURSOR = "\x1b7", "\x1b8"


class Editor:
    """The line being typed, as a list of characters, and the cursor, an index into it.

    Each item is what a person sees as one character, such as a letter with its accents.
    """

    def __init__(self) -> None:
        self.line: list[str] = []
        self.cursor: int = 0
        self.killed: str = ""  # what Ctrl-Y inserts
        self.history: list[str] = [""]  # The last item is for the line not yet sent: see recall.
        self.history_index = -1  # of the line shown, counted from the end
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.partial_key = ""  # a key whose end is still to come

    def feed(self, data: bytes) -> tuple[list[bytes], bool]:
        """Process the keys in data. Return the completed lines, and whether stdin has ended.

        It ends with Ctrl-D in an empty line, or when there is no data. A line without Enter is not
        sent then.
        """
        keys = KEY_PATTERN.finditer(self.partial_key + self.decoder.decode(data))
        self.partial_key = ""
        lines = []
        for match in keys:
            key = match[0]
            if match["partial"]:
                self.partial_key = key
            elif key in ENTER:
                lines.append(self.enter())
            elif key == CTRL_D and not self.line:
                return lines, True
            elif edit := EDITS.get(key):
                edit(self)
            elif match["text"]:
                self.insert(key)
            # Any other key does nothing.
        return lines, not data

    def enter(self) -> bytes:
        """Return the line, add it to the history, and begin a new one."""
        text = "".join(self.line)
        if text:
            self.history[-1:] = [text, ""]
        self.line, self.cursor, self.history_index = [], 0, -1
        return text.encode(errors="surrogateescape")

    def insert(self, text: str) -> None:
        """Insert text at the cursor."""
        # Split it together with the character before, as text may begin with an accent.
        start = max(self.cursor - 1, 0)
        inserted = split_characters("".join(self.line[start : self.cursor]) + text)
        self.line[start : self.cursor] = inserted
        self.cursor = start + len(inserted)

    def delete(self, index: int, keep: bool = False) -> None:
        """Delete the text between the cursor and an index. Keep it for Ctrl-Y, if asked to."""
        start, end = sorted((self.cursor, max(index, 0)))
        if keep and start < end:
            self.killed = "".join(self.line[start:end])
        del self.line[start:end]
        self.cursor = start

    def move(self, index: int) -> None:
        """Move the cursor to an index."""
        self.cursor = min(max(index, 0), len(self.line))

    def recall(self, step: int) -> None:
        """Show an older line of the history (-1), or a newer one (1).

        Lines of the history stay as they were sent: edits to an older line are not kept.
        """
        if -len(self.history) <= self.history_index + step < 0:
            if self.history_index == -1:  # Keep what is not yet sent.
                self.history[-1] = "".join(self.line)
            self.history_index += step
            self.line = split_characters(self.history[self.history_index])
            self.cursor = len(self.line)

    def word_edge(self, step: int, pattern: str = r"\W*\w*") -> int:
        """Return where the word before the cursor starts (-1), or the next one ends (1)."""
        ahead = self.line[self.cursor :] if step > 0 else self.line[: self.cursor][::-1]
        # One letter for each item, without its marks, so that match.end() counts items.
        letters = "".join(character[0] for character in ahead)
        match = re.match(pattern, letters)
        assert match  # Both patterns match the empty string, too.
        return self.cursor + step * match.end()

    def draw(self, columns: int) -> str:
        """Return what draws the line in a row of that width, and puts the cursor in its place.

        If the line is too long, show the end of what is before the cursor. The text from the cursor
        on gets a quarter of the row (less if it is shorter), and always one column more: the cursor
        needs it at the end of the line. For example, with the cursor on the f of
        "the quick brown fox jumps", 16 columns show "uick brown fox j" (11 + 4 + 1).

        Terminals differ in the width of some characters, so the terminal itself remembers where the
        cursor belongs.
        """
        before, after = self.line[: self.cursor], self.line[self.cursor :]
        reserved = sum(map(width, fit(after, columns // 4)))
        before = fit(before[::-1], columns - reserved - 1)[::-1]  # its last characters
        after = fit(after, columns - sum(map(width, before)))  # the columns that are left
        return f"{NO_WRAP}{visible(before)}{SAVE_CURSOR}{visible(after)}{RESTORE_CURSOR}{WRAP}"


def split_characters(text: str) -> list[str]:
    """Split text into what a person sees as characters.

    Marks, skin tones, joiners (U+200D), and what follows a joiner belong to the character before.
    (A flag counts as two.)
    """
    found: list[str] = []
    for point in text:  # each code point
        is_mark = unicodedata.category(point)[0] == "M"
        is_skin_tone = "\U0001f3fb" <= point <= "\U0001f3ff"
        if found and (is_mark or is_skin_tone or "\u200d" in (point, found[-1][-1])):
            found[-1] += point
        else:
            found.append(point)
    return found


def visible(line: list[str]) -> str:
    """Return a line as it is shown: TABs as spaces, unsafe characters as U+FFFD."""
    text = "".join(line).replace("\t", " ")
    return UNSAFE_PART.sub(lambda part: "\ufffd" * len(part[0]), text)


def width(character: str) -> int:
    """Return the columns that a character takes. Where terminals differ, return the most."""
    wide = sum(unicodedata.east_asian_width(point) in "WF" for point in character)
    marks = sum(unicodedata.category(point) in ("Mn", "Me") for point in character)  # Mc takes one
    emoji = character.count("\ufe0f")  # This mark makes a narrow character a wide emoji.
    return len(character) - marks + wide + emoji


def fit(line: list[str], columns: int) -> list[str]:
    """Return the start of a line, as much as fits in so many columns."""
    for index, character in enumerate(line):
        columns -= width(character)
        if columns < 0:
            return line[:index]
    return line


class EditorScreen(Screen):
    """A screen with a row below the messages, which shows the line being typed.

    The cursor is always in this row. The row is never wrapped, and nothing is below it. So CLEAR
    erases just the row. What is written next takes its place, and the row is written again below.
    """

    def __init__(self, color: bool) -> None:
        super().__init__(color)
        self.editor = Editor()
        self.terminal = Terminal()
        self.drawn = ""  # what drew the row last

    def open_stdin(self) -> Stdin:
        """Set up the terminal, and begin to read it."""
        self.terminal.set_up()
        return Stdin(self.terminal.read, self.editor.feed)

    def row(self) -> str:
        """Return what draws the row."""
        columns = os.get_terminal_size(1).columns or 80  # 0 if the terminal does not know
        return self.editor.draw(columns)

    def write(self, text: str, file: int) -> None:
        """Write lines of text, above the row if the file is a terminal. Raises OSError."""
        if is_terminal(file):
            self.drawn = self.row()
            text = CLEAR + text + self.drawn
        super().write(text, file)

    def print_typed(self, line: bytes) -> None:
        """Print a line that has left the row. If it is empty, only redraw the row."""
        text = sanitize(line.decode(errors="replace"))
        with contextlib.suppress(OSError):
            self.write(f"{text}\n" if text else "", 1)

    def refresh(self) -> None:
        """Redraw the row if it or the window has changed. Suspend, if Ctrl-Z was pressed."""
        if self.terminal.suspend_requested:
            super().write(CLEAR, 1)
            self.terminal.suspend()
            self.drawn = ""
        if self.drawn != self.row():
            self.write("", 1)

    def close(self, report: str) -> None:
        """Restore the terminal, and print the line being typed, and the report."""
        self.terminal.restore()
        typed = self.editor.enter()  # It leaves the row, but is not sent.
        call_with_timeout(0.3, self.print_typed, typed)
        super().close(report)


# ---- The terminal ----

# Ctrl-Z calls request_suspend. The next call of refresh clears the row and calls suspend, which
# restores the shell's settings, stops the process until fg, and sets the editor's settings.


if sys.platform != "win32":

    class Terminal:
        """The settings of the terminal: the editor's while this process runs, else the shell's."""

        def __init__(self) -> None:
            if self.in_background():
                # Started with &: another job may have changed the settings. So stop until fg, and
                # read them then. (The kernel sends SIGTTOU to a background job that changes them.)
                signal.raise_signal(signal.SIGTTOU)
            self.shell_settings = termios.tcgetattr(0)
            self.editor_settings = termios.tcgetattr(0)  # a copy to change
            # Pass on each key at once, as it is, and not shown. Ctrl-C remains a signal.
            self.editor_settings[tty.LFLAG] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
            self.editor_settings[tty.LFLAG] |= termios.NOFLSH  # else Ctrl-Z drops queued output
            self.editor_settings[tty.CC][termios.VMIN] = 1
            self.editor_settings[tty.CC][termios.VTIME] = 0
            self.suspend_requested = False  # by Ctrl-Z
            if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:  # else ignored at startup
                signal.signal(signal.SIGTSTP, self.request_suspend)

        def in_background(self) -> bool:
            """Return whether the terminal belongs to the shell, or to another job."""
            with contextlib.suppress(OSError):  # not our controlling terminal, as under setsid
                return os.tcgetpgrp(0) != os.getpgrp()
            return False

        def read(self) -> bytes:
            """Wait for keys, and return them. Return nothing at the end of the input."""
            return os.read(0, READ_SIZE)

        def set_up(self) -> None:
            """Set the editor's settings."""
            with contextlib.suppress(termios.error):  # The terminal may be gone.
                termios.tcsetattr(0, termios.TCSANOW, self.editor_settings)

        def restore(self) -> None:
            """Restore the shell's settings, unless another job has the terminal."""
            if not self.in_background():
                with contextlib.suppress(termios.error):
                    termios.tcsetattr(0, termios.TCSANOW, self.shell_settings)

        def request_suspend(self, _signum: int, _frame: object) -> None:
            """Handle SIGTSTP: only note it, as the process may be printing now."""
            self.suspend_requested = True

        def suspend(self) -> None:
            """Suspend the process. After fg, set the terminal up again."""
            self.suspend_requested = False
            self.restore()
            # SIGTSTP must stop the process, and SIGTERM must end it while it is stopped (a shell's
            # kill sends SIGTERM, then SIGCONT). So set all signals that have handlers to their
            # default actions, and keep the handlers. A handler in Python would come too late:
            # before it, the reading thread, now in the background, would get SIGTTIN, and stop the
            # process again.
            handlers = {
                signum: signal.signal(signum, signal.SIG_DFL)
                for signum in signal.valid_signals()
                if callable(signal.getsignal(signum))
            }
            signal.raise_signal(signal.SIGTSTP)
            self.set_up()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

else:
    # The second character of a special key (its scan code), and what other terminals send for it.
    CONSOLE_KEYS = {
        # Up, Down, Left, Right, Home, End
        "H": "\x1b[A", "P": "\x1b[B", "K": "\x1b[D", "M": "\x1b[C", "G": "\x1b[H", "O": "\x1b[F",
        # Delete, Ctrl-Left, Ctrl-Right, Alt-B, Alt-F, Alt-D
        "S": "\x1b[3~", "s": "\x1b[1;5D", "t": "\x1b[1;5C", "0": "\x1bb", "!": "\x1bf", " ": "\x1bd"
    }  # fmt: skip

    class Terminal:
        """Windows' console. It needs no settings, and Ctrl-Z does not suspend."""

        suspend_requested = False

        def set_up(self) -> None:
            """Do nothing."""

        restore = suspend = set_up

        def read(self) -> bytes:
            """Wait for keys, which the console does not echo, and return them."""
            keys = ""
            # An emoji comes in halves: wait for the second one.
            while not keys or msvcrt.kbhit() or "\ud800" <= keys[-1] <= "\udbff":
                keys += self.read_key()
            # Join the halves of emoji.
            return keys.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

        def read_key(self) -> str:
            """Wait for a key. Return its character, or what other terminals send for it."""
            char = msvcrt.getwch()
            if char == "\x03":  # Ctrl-C (The editor ignores it.)
                signal.raise_signal(signal.SIGINT)
            if char == "\x1a":  # Ctrl-Z, which ends the input on Windows
                return CTRL_D
            if char not in "\0\xe0":
                return char
            # A special key is NUL or 0xE0, and a second character: Up is 0xE0 and H. But the letter
            # à is 0xE0 alone. To tell them apart, try to put the character back into the console.
            # This fails while getwch holds the second character of a special key.
            try:
                msvcrt.ungetwch(char)
            except OSError:
                return CONSOLE_KEYS.get(msvcrt.getwch(), "")
            return msvcrt.getwch()  # the letter


# ---- Main ----


def run(options: argparse.Namespace, screen: Screen, outbox: Outbox) -> None:
    """Make the sockets, and chat.

    Raises OSError if the key cannot be used, stdin was not read to its end, or stdout fails, and
    zmq.ZMQError if libzmq refuses an address.
    """
    context = zmq.Context()
    push, sub = make_sockets(context, options)
    connection = Connection(push, sub, options, screen.interactive)
    stdin = screen.open_stdin()
    chat(stdin, connection, outbox, Watchdog(outbox, connection, screen), screen)
    # Lines that our server will drop have no echo to wait for, so they may still be in libzmq. Let
    # it send them, for a second at most. (It may hang in a name lookup: so do this in a thread.)
    call_with_timeout(1, context.destroy)
    if stdin.failed or not stdin.ended:  # main reports it like any other error.
        raise OSError("the rest of the input, if any, was not read")


def main() -> int:
    """Read the options, chat, and return the exit status: 1 if there is anything to report."""
    prepare_streams()
    options = parse_options()
    screen, outbox = make_screen(options.color), Outbox(options.user)
    handle_signals(screen, outbox)
    reason = ""
    try:
        run(options, screen, outbox)
    except (OSError, zmq.ZMQError) as error:
        reason = str(error)
    finally:
        report = "; ".join(filter(None, (reason, outbox.undelivered_notice())))
        screen.close(report)
    return int(bool(report))


if __name__ == "__main__":
    # Not sys.exit, which would wait for libzmq if it hangs in a name lookup.
    os._exit(main())
