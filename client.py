#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq>=25", "colorama>=0.4.6"]
# ///
"""The chat client: it PUSHes each line of stdin to the server, and prints what SUB receives.

Out: one frame a line, as it was typed; with --user, as JSON `{"user": NAME, "message": line}`.
In:  one frame a message, UTF-8. Its colours and TABs reach the terminal, no other control does.

The loop is the talk's, slides 8 to 14, except that messages appear without a press of Enter. The
server publishes each line to everybody, its sender included. That copy, the echo, acknowledges the
line. Lines without an echo are sent again over the next connection. On a terminal, a line editor
keeps the line that is being typed below the messages.
"""

import argparse
import codecs
import contextlib
import functools
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
from typing import NoReturn, TextIO

import colorama
import zmq

if sys.platform == "win32":
    import msvcrt
else:
    import termios

Sock = zmq.Socket[bytes]
Message = tuple[str, str]  # a message without its colours, and with them

MAX_LINE = 16_384  # bytes in a line: the server hangs up at a longer one
MAX_KEPT = 1_000_000  # bytes of a longer line that are kept, to say how long it is
WINDOW = 1_000  # lines in flight at most
SUB_HWM = 200  # messages that wait in SUB at most
TICK = 0.1  # seconds that the loop waits for something to happen
SLOW_JOINER_DELAY = 0.1  # seconds from a connection until its subscription is in effect
NOTICE_DELAY = 1.0  # seconds without a connection until a notice says so
RETRY_INTERVAL = 10.0  # seconds without a connection until the sockets connect anew
ECHO_TIMEOUT = 5.0  # seconds without an echo until a notice says so
DELIVERY_TIMEOUT = 30.0  # seconds without an echo until lines are given up
CONNECT_TIMEOUT = 8.0  # the same, where there never was a connection
EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED  # what monitors report


def chat(stdin: "Stdin", connection: "Connection", outbox: "Outbox", screen: "Screen") -> None:
    """Wait for some input, push it, and print what SUB holds (slide 8), until the input ends.

    Then wait for the last echo, unless none comes in time. Raises OSError if stdout fails.
    """
    now = time.monotonic()
    while outbox.lines or not stdin.ended:
        # wait for some input
        reading = not stdin.ended and (screen.interactive or len(outbox.lines) < WINDOW)
        for line in wait(connection, stdin, reading):
            if problem := outbox.add(line):
                screen.warn(problem)
            elif not connection.up or outbox.waited >= ECHO_TIMEOUT:
                screen.show_typed(line)  # Its echo will not take its place soon.

        # push it
        if connection.update():
            outbox.go_back()
        if connection.up:
            outbox.push(connection.push)

        # dump buffered messages
        messages = receive(connection.sub)
        outbox.acknowledge(messages)
        try:
            screen.show_messages(messages)
        except BrokenPipeError:  # The reader of stdout has left, as after `| head -1`.
            stdin.end()

        # see what is overdue; time in which this process was stopped does not count
        before, now = now, time.monotonic()
        if connection.up or not reading:
            outbox.pass_time(min(now - before, 1), reading)
        if not reading and outbox.waited >= connection.timeout:
            break
        screen.notice(connection.news(), outbox.news() if screen.interactive else "")
        screen.refresh()


# Wait for some input.


def wait(connection: "Connection", stdin: "Stdin", reading: bool) -> list[bytes]:
    """Wait until something happens; return the lines that were typed, unless reading is off."""
    sources = [stdin.pipe.fileno()] if reading else []
    ready, _, _ = zmq.select(
        [connection.sub, *connection.monitors.values(), *sources], [], [], TICK
    )
    return stdin.lines() if stdin.pipe.fileno() in ready else []


class Stdin:
    """The lines of stdin. A thread passes it on, since Windows can wait for sockets only.

    The thread stands still while the loop does not ask for more lines.
    """

    def __init__(self, source: "Splitter | Editor") -> None:
        self.source = source
        self.pipe, self.thread_end = socket.socketpair()
        self.ended = False
        self.failed = False  # before its end

    def end(self) -> None:
        """Read no more, as at the end of stdin."""
        self.ended = True

    def pass_on(self, read: Callable[[], bytes]) -> None:
        """Pass on what read returns, until that is nothing: what the thread does."""
        try:
            while data := read():
                self.thread_end.sendall(data)
        except OSError:
            self.failed = True
        self.thread_end.close()

    def lines(self) -> list[bytes]:
        """Return the lines that are complete now, without their ends. Leave out empty ones."""
        lines = self.source.feed(self.pipe.recv(MAX_LINE))
        self.ended = self.source.ended
        return [line for line in lines if line]


class Splitter:
    """Splits what is not typed into the line editor into lines."""

    def __init__(self) -> None:
        self.partial = b""  # a line whose end is still to come
        self.bom = codecs.BOM_UTF8  # what PowerShell puts in front of the first line
        self.ended = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that end in data. No data is the end of stdin, and of the last line."""
        *lines, partial = (self.partial + (data or b"\n")).split(b"\n")
        self.partial = partial[:MAX_KEPT]
        self.ended = not data
        if lines:
            lines[0] = lines[0].removeprefix(self.bom)
            self.bom = b""
        return [line.removesuffix(b"\r") for line in lines]


# The connection.


class Connection:
    """PUSH and SUB. It is up while both are connected and the subscription is in effect.

    Make it before the sockets connect: a monitor that is made later may miss the first event.
    """

    def __init__(self, push: Sock, sub: Sock, host: str, interactive: bool) -> None:
        self.push, self.sub, self.host = push, sub, host
        self.monitors = {sock: sock.get_monitor_socket(EVENTS) for sock in (push, sub)}
        self.connected: set[Sock] = set()  # those of the two sockets that are
        self.ready_at = 0.0  # when the subscription is in effect, once both are connected
        self.up = False
        self.timeout = CONNECT_TIMEOUT  # DELIVERY_TIMEOUT, once the connection was up
        self.was_up_at = time.monotonic()  # or when it began to connect
        self.retry_at = self.was_up_at + RETRY_INTERVAL
        self.reported_up = None if interactive else True  # In a pipe, only trouble is reported.

    def update(self) -> bool:
        """Read the monitors. Return whether the connection has just come up."""
        now, was_up = time.monotonic(), self.up
        for sock, monitor in self.monitors.items():
            while monitor.poll(0):
                # By hand, since zmq.utils.monitor imports asyncio: see zmq_socket_monitor(3).
                event = int.from_bytes(monitor.recv_multipart()[0][:2], sys.byteorder)
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.connected.add(sock)
                    self.ready_at = now + SLOW_JOINER_DELAY
                else:
                    self.connected.discard(sock)
        self.up = len(self.connected) == 2 and now >= self.ready_at
        if self.up:
            self.timeout = DELIVERY_TIMEOUT
            self.was_up_at, self.retry_at = now, now + RETRY_INTERVAL
        elif now >= self.retry_at:
            self.retry_at = now + RETRY_INTERVAL
            self.connect_anew()
        return self.up and not was_up

    def connect_anew(self) -> None:
        """Connect the sockets that are not connected, in case that libzmq does not try again.

        It does not after a protocol error: a message that is too long, a key on one side alone.
        """
        for sock in self.monitors.keys() - self.connected:
            endpoint = sock.get_string(zmq.LAST_ENDPOINT)
            sock.disconnect(endpoint)
            sock.connect(endpoint)

    def news(self) -> str:
        """Return a notice if the connection has come up, or has been down for NOTICE_DELAY."""
        recent = time.monotonic() < self.was_up_at + NOTICE_DELAY
        if self.up == self.reported_up or (recent and not self.up):
            return ""
        self.reported_up = self.up
        if self.up:
            return f"connected to {self.host}"
        problem = f"no server at {self.host} (or its --key differs)"
        if self.connected:
            (missing,) = self.monitors.keys() - self.connected
            port = missing.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
            problem = f"no answer from port {port} of {self.host}"
        return f"{problem}; your lines will be sent when it is back"


# Push it.


class Outbox:
    """The lines that are not acknowledged. The first ones are in flight: pushed, in this order.

    As in TCP, an echo acknowledges its line and all lines before it, for a connection keeps their
    order. Over a new connection, all lines go again (go back N).
    """

    def __init__(self, user: str | None) -> None:
        self.user = user
        self.lines: list[tuple[bytes, int | None]] = []  # frames, each with the hash of its echo
        self.in_flight = 0
        self.waited = 0.0  # seconds without an echo in which lines waited for one
        self.retransmit_at = ECHO_TIMEOUT  # seconds of these after which the newest line goes again
        self.undelivered = 0  # lines that were given up, not sent, or that the server will drop
        self.reported = False  # that there is no echo

    def add(self, line: bytes) -> str:
        """Queue a line. Return what is wrong with it, or an empty text.

        A line that the server will drop is queued as well, without an echo to wait for.
        """
        frame, problem = line, ""
        if self.user is not None:
            text = line.decode(errors="replace")
            problem = "" if text.encode() == line else "not UTF-8: the server gets \ufffd instead"
            payload = {"user": self.user, "message": text}
            frame = json.dumps(payload, ensure_ascii=False).encode(errors="replace")
        if len(frame) > MAX_LINE:
            self.undelivered += 1
            size = f"{len(frame):,} bytes{' or more' if len(line) >= MAX_KEPT else ''}"
            return f"line not sent: it has {size}, and the server takes {MAX_LINE:,}"
        try:
            self.lines.append((frame, hash(echo_of(frame))))
        except ValueError as error:
            self.lines.append((frame, None))
            self.undelivered += 1
            problem = f"the server will drop this line: {error}: {as_text(line)}"
        return problem

    def push(self, push: Sock) -> None:
        """Push lines (slide 8), until WINDOW are in flight."""
        with contextlib.suppress(zmq.Again):
            while self.in_flight < min(WINDOW, len(self.lines)):
                push.send(self.lines[self.in_flight][0], zmq.NOBLOCK)
                self.in_flight += 1
        self.remove(0)

    def acknowledge(self, messages: list[Message]) -> None:
        """Remove the lines whose echoes are among the messages, and all lines before them."""
        echoes = [echo for _, echo in self.lines[: self.in_flight]]
        acknowledged = 0
        for message, _ in messages:
            with contextlib.suppress(ValueError):  # It may be someone else's.
                acknowledged = echoes.index(hash(message), acknowledged) + 1
        if acknowledged:
            self.remove(acknowledged)
            self.waited, self.retransmit_at = 0.0, ECHO_TIMEOUT

    def remove(self, count: int) -> None:
        """Remove the first lines, and those behind them in flight that have no echo."""
        while count < self.in_flight and self.lines[count][1] is None:
            count += 1
        del self.lines[:count]
        self.in_flight -= count

    def go_back(self) -> None:
        """Have all lines pushed over a new connection: rather twice than not at all."""
        self.in_flight = 0
        self.retransmit_at = self.waited + ECHO_TIMEOUT

    def pass_time(self, seconds: float, reading: bool) -> None:
        """Count time in which lines wait for an echo, and see what is overdue.

        While no more input is read, the newest line goes again after ECHO_TIMEOUT, once. Its echo
        acknowledges all lines before it, whose echoes this client may have missed. While more is
        read, lines in flight are given up after DELIVERY_TIMEOUT, for good: this server may be one
        whose messages look different.
        """
        self.waited += seconds if self.lines else 0
        if not reading and self.in_flight and self.waited >= self.retransmit_at:
            echoes = [echo for _, echo in self.lines[: self.in_flight]]
            self.in_flight = max(n for n, echo in enumerate(echoes) if echo is not None)
            self.retransmit_at = math.inf
        if reading and self.waited >= DELIVERY_TIMEOUT:
            self.undelivered += sum(echo is not None for _, echo in self.lines[: self.in_flight])
            self.remove(self.in_flight)
            self.waited = ECHO_TIMEOUT

    def news(self) -> str:
        """Return a notice if there is no echo for ECHO_TIMEOUT, once until there is one."""
        was_reported, self.reported = self.reported, self.waited >= ECHO_TIMEOUT
        if was_reported or not self.reported:
            return ""
        first = as_text(self.lines[0][0])
        return f"no echo yet for {count_lines(len(self.lines))}; the first: {first}"

    def report(self) -> str:
        """Return how many lines may not have been delivered, or an empty text if all were."""
        count = self.undelivered + sum(echo is not None for _, echo in self.lines)
        return f"{count_lines(count)} may not have been delivered" if count else ""


def count_lines(count: int) -> str:
    """Return a number of lines in words."""
    return "1 line" if count == 1 else f"{count:,} lines"


def as_text(frame: bytes) -> str:
    """Return the start of a frame for a notice."""
    return frame[:80].decode(errors="replace")


# What the server makes of a line.

# Characters that a terminal may obey: controls except TAB, line separators, direction overrides,
# and lone surrogates. Joiners, which emoji and Persian need, and no-break spaces are text.
UNSAFE = r"\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE_CHARACTER = re.compile(f"[{UNSAFE}]")

# A line as json.dumps and JSON.stringify write it, whose strings need no unescaping and no
# escaping. It finds them in a third of the time that it takes to parse the line.
STRING = rf'"([^"\\\t{UNSAFE}]*)"'
SIMPLE_LINE = re.compile(rf'\{{"user": ?{STRING}, ?"message": ?{STRING}\}}')

# Numbers are kept as they are written. int refuses NaN and Infinity, which are not JSON.
parse_json = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=int).decode
COLORS = len(colorama.Fore.CYAN + colorama.Style.RESET_ALL)


def echo_of(frame: bytes) -> str:
    """Return the message that the server makes of a line (slide 3), without its colour.

    Raises ValueError, with the reason, if it makes none.
    """
    try:
        line = frame.decode("utf-8-sig")
        if simple := SIMPLE_LINE.fullmatch(line):
            return f"{simple[1]}> {simple[2]}"
        payload = parse_json(line)
        echo = f"{sanitize(payload['user'])}> {sanitize(payload['message'])}"
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        hint = "to just type text, use --user NAME"
        if line.startswith("{"):
            hint = "write the whole object on one line"
        raise ValueError(f'not a JSON object with "user" and "message" ({hint})') from None
    if len(echo.encode()) + COLORS > MAX_LINE:
        raise ValueError("too long once its control characters are escaped")
    return echo


def sanitize(text: str) -> str:
    r"""Return text with its unsafe characters escaped, such as `\x1b`."""
    if text.isprintable():  # as nearly all text is
        return text
    return UNSAFE_CHARACTER.sub(lambda char: char[0].encode("unicode_escape").decode(), text)


# Dump buffered messages.

COLOR = re.compile("(\x1b\\[[0-9;:]*m)")


def receive(sub: Sock) -> list[Message]:
    """Return the messages that SUB holds (slide 8)."""
    messages: list[Message] = []
    with contextlib.suppress(zmq.Again):
        while len(messages) < SUB_HWM:
            messages.append(sanitize_message(sub.recv(zmq.NOBLOCK)))
    return messages


def sanitize_message(frame: bytes) -> Message:
    """Return a message without its colours, and with them, everything else escaped."""
    text = frame.decode(errors="replace")
    plain = COLOR.sub("", text)
    if not plain.isprintable():
        plain = sanitize(plain)
        text = "".join(part if COLOR.match(part) else sanitize(part) for part in COLOR.split(text))
    if "\x1b" in text and not text.endswith(colorama.Style.RESET_ALL):
        text += colorama.Style.RESET_ALL  # Colours must not reach what follows.
    return plain, text


class Screen:
    """stdout for messages, stderr for notices. On a terminal, both appear above the typed row.

    Whatever is written to the terminal ends with the typed row, and the cursor is in that row.
    """

    def __init__(self, color: str) -> None:
        stdout = sys.stdout
        colorama.just_fix_windows_console()
        # colorama replaces stdout where the console knows no escape sequences.
        smart = sys.stdout is stdout and os.environ.get("TERM") != "dumb"
        auto = smart and os.isatty(1) and not os.environ.get("NO_COLOR")
        self.color = color == "always" or (color == "auto" and auto)
        self.interactive = os.isatty(0)
        editing = smart and self.interactive and os.isatty(1)
        self.editor = Editor() if editing else None
        self.terminal = Terminal() if editing and sys.platform != "win32" else None
        self.drawn = ("", 0)  # the typed row as it was drawn last, and the window's columns then
        self.warned: set[str] = set()  # the kinds of problems that a notice named

    def show_messages(self, messages: list[Message]) -> None:
        """Show messages (slide 8). Raises OSError."""
        if messages:
            self.write([message[self.color] for message in messages], sys.stdout)

    def show_typed(self, line: bytes) -> None:
        """Show a line that was typed into the editor."""
        if self.editor:
            self.write([sanitize(line.decode(errors="replace"))], sys.stdout)

    def notice(self, *texts: str) -> None:
        """Print notices, which are not part of the chat. Leave out empty ones."""
        with contextlib.suppress(OSError):
            for text in filter(None, texts):
                self.write([f"client.py: {sanitize(text)}"], sys.stderr)

    def warn(self, problem: str) -> None:
        """Print a notice about a line: on a terminal each, in a pipe the first one of a kind."""
        kind = problem.partition(":")[0]
        if self.interactive or kind not in self.warned:
            self.warned.add(kind)
            self.notice(problem)

    def write(self, lines: list[str], stream: TextIO) -> None:
        """Write lines, on a terminal above the typed row. Raises OSError."""
        text = "".join(f"{line}\n" for line in lines)
        if self.editor and stream.isatty():
            self.drawn = self.editor.row(columns()), columns()
            text = CLEAR + text + self.drawn[0]
        stream.write(text)
        stream.flush()

    def refresh(self) -> None:
        """Draw the typed row anew if it or the window changed. Stop, if Ctrl-Z was pressed."""
        if self.terminal and self.terminal.stop_requested:
            os.write(1, CLEAR.encode())
            self.terminal.stop()
            self.drawn = ("", 0)
        if self.editor and self.drawn != (self.editor.row(columns()), columns()):
            self.write([], sys.stdout)

    def close(self, report: str) -> None:
        """Give the terminal back, and print a last notice, unless nothing can be printed now.

        A thread prints: output may be stopped, as by Ctrl-S, or be a pipe that nobody reads.
        """
        if self.terminal:
            self.terminal.give_back()

        def write() -> None:
            with contextlib.suppress(OSError):
                if self.editor and self.editor.line:
                    os.write(1, b"\n")
                if report:
                    os.write(2, f"client.py: {sanitize(report)}\n".encode(errors="replace"))

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(0.1)


def columns() -> int:
    """Return the width of the terminal."""
    return os.get_terminal_size(1).columns or 80


# The line editor: keys in, lines out.


class Editor:
    """The line that is being typed, as a list of characters, and the cursor, an index of it.

    What a person sees as one character is one item of the list, such as a letter with its accents.
    """

    def __init__(self) -> None:
        self.line: list[str] = []
        self.cursor = 0
        self.killed = ""  # what Ctrl-Y inserts
        self.history: list[str] = []
        self.place = 0  # of the line in the history; behind its end if the line is new
        self.draft = ""  # the new line, while an old one is shown
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.partial_key = ""  # a key whose end is still to come
        self.ended = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take the keys in data; return the lines that were sent. No data is the end of stdin."""
        self.ended = not data
        keys = KEY.finditer(self.partial_key + self.decoder.decode(data))
        self.partial_key = ""
        lines = []
        for match in keys:
            key = match[0]
            if match["partial"]:
                self.partial_key = key
            elif key in ENTER:
                lines.append(self.enter())
            elif key == CTRL_D and not self.line:
                self.ended = True
                break
            elif edit := EDITS.get(key):
                edit(self)
            elif key[0] == "\t" or key[0] >= " ":
                self.insert(key)
        return lines

    def enter(self) -> bytes:
        """Return the line, and begin a new one."""
        text = "".join(self.line)
        if text:
            self.history.append(text)
        self.line, self.cursor, self.draft, self.place = [], 0, "", len(self.history)
        return text.encode(errors="surrogateescape")

    def insert(self, text: str) -> None:
        """Insert text at the cursor. It may join the character before the cursor."""
        start = max(self.cursor - 1, 0)
        inserted = characters("".join(self.line[start : self.cursor]) + text)
        self.line[start : self.cursor] = inserted
        self.cursor = start + len(inserted)

    def delete(self, place: int) -> str:
        """Delete, and return, what is between the cursor and a place in the line."""
        start, end = sorted((self.cursor, min(max(place, 0), len(self.line))))
        deleted = "".join(self.line[start:end])
        del self.line[start:end]
        self.cursor = start
        return deleted

    def kill(self, place: int) -> None:
        """Delete in the same way, for Ctrl-Y to insert it again."""
        self.killed = self.delete(place) or self.killed

    def move(self, place: int) -> None:
        """Move the cursor to a place in the line."""
        self.cursor = min(max(place, 0), len(self.line))

    def recall(self, step: int) -> None:
        """Show an older line of the history (-1), or a newer one (1). None of them ever changes."""
        if 0 <= self.place + step <= len(self.history):
            if self.place == len(self.history):
                self.draft = "".join(self.line)
            self.place += step
            self.line = characters([*self.history, self.draft][self.place])
            self.cursor = len(self.line)

    def word(self, step: int, pattern: str = r"\W*\w*") -> int:
        """Return where the word before the cursor starts (-1), or the one behind it ends (1)."""
        way = self.line[self.cursor :] if step > 0 else self.line[: self.cursor][::-1]
        letters = "".join(character[0] for character in way)
        return self.cursor + step * len(re.findall(pattern, letters)[0])

    def row(self, columns: int) -> str:
        """Return what draws the line in a row of so many columns, with the cursor in its place.

        The terminal notes that place by itself, between the two parts. Terminals differ in the
        width of some characters, but here widths only choose which part of a long line is shown.
        """
        before, after = self.line[: self.cursor], self.line[self.cursor :]
        ahead = sum(map(width, fit(after, columns // 4)))  # to be seen even if the line is long
        before = fit(before[::-1], columns - 1 - ahead)[::-1]
        after = fit(after, columns - sum(map(width, before)))
        parts = (UNSAFE_CHARACTER.sub("\ufffd", "".join(part)) for part in (before, after))
        return (NO_WRAP + SAVE_CURSOR.join(parts) + RESTORE_CURSOR + WRAP).replace("\t", " ")


def characters(text: str) -> list[str]:
    """Split text into what a person sees as characters.

    A mark, a skin tone, a ZWJ, and what is behind a ZWJ belong to the character before them.
    """
    found: list[str] = []
    for char in text:
        is_mark = unicodedata.category(char)[0] == "M" or "\U0001f3fb" <= char <= "\U0001f3ff"
        if found and (is_mark or "\u200d" in (char, found[-1][-1])):
            found[-1] += char
        else:
            found.append(char)
    return found


def width(character: str) -> int:
    """Return the columns that a character takes at most."""
    return sum(
        # U+FE0F makes the character before it an emoji, which is wide. Other marks take no column.
        int(char == "\ufe0f")
        if unicodedata.category(char) in ("Mn", "Me")
        else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in character
    )


def fit(line: list[str], columns: int) -> list[str]:
    """Return the first characters, as many as fit in so many columns."""
    for place, character in enumerate(line):
        columns -= width(character)
        if columns < 0:
            return line[:place]
    return line


# A key that is incomplete at the end of the data; a key that is an escape sequence (with Alt, ESC
# stands in front), or a mouse report; text; any other control character.
KEY = re.compile(
    r"(?P<partial>\x1b+(?:O|\[(?:M.{0,2}|\[|[0-?]*[ -/]*))?\Z)"
    r"|\x1b+(?:\[M...|\[\[.|\[[0-?]*[ -/]*[@-~]?|O.|.)"
    r"|[^\x00-\x08\x0a-\x1f\x7f]+"
    r"|.",
    re.DOTALL,
)
ENTER = ("\r", "\n", "\x1b\r", "\x1b\n")
CTRL_D = "\x04"
KEYS: dict[str, Callable[[Editor], object]] = {
    "\x1b[D \x1bOD \x02": lambda editor: editor.move(editor.cursor - 1),  # Left, Ctrl-B
    "\x1b[C \x1bOC \x06": lambda editor: editor.move(editor.cursor + 1),  # Right, Ctrl-F
    "\x1b[H \x1bOH \x1b[1~ \x1b[7~ \x01": lambda editor: editor.move(0),  # Home, Ctrl-A
    "\x1b[F \x1bOF \x1b[4~ \x1b[8~ \x05": lambda editor: editor.move(len(editor.line)),  # End
    "\x1b[1;5D \x1bOd \x1bb": lambda editor: editor.move(editor.word(-1)),  # Alt-B
    "\x1b[1;5C \x1bOc \x1bf": lambda editor: editor.move(editor.word(1)),  # Alt-F, Ctrl-Right
    "\x7f \x08": lambda editor: editor.delete(editor.cursor - 1),  # Backspace
    f"\x1b[3~ {CTRL_D}": lambda editor: editor.delete(editor.cursor + 1),  # Delete
    "\x15": lambda editor: editor.kill(0),  # Ctrl-U
    "\x0b": lambda editor: editor.kill(len(editor.line)),  # Ctrl-K
    "\x17": lambda editor: editor.kill(editor.word(-1, r"\s*\S*")),  # Ctrl-W
    "\x1bd": lambda editor: editor.kill(editor.word(1)),  # Alt-D
    "\x19": lambda editor: editor.insert(editor.killed),  # Ctrl-Y
    "\x1b[A \x1bOA \x10": lambda editor: editor.recall(-1),  # Up, Ctrl-P
    "\x1b[B \x1bOB \x0e": lambda editor: editor.recall(1),  # Down, Ctrl-N
}
EDITS = {key: edit for keys, edit in KEYS.items() for key in keys.split(" ")}

CLEAR = "\r\x1b[J"  # go to the first column, and clear to the end of the screen
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"  # cut text that the terminal finds too long for the row
SAVE_CURSOR, RESTORE_CURSOR = "\x1b7", "\x1b8"


# The terminal.


if sys.platform != "win32":

    class Terminal:
        """The settings of the terminal on stdin: the shell's while this process is stopped."""

        def __init__(self) -> None:
            self.shells = termios.tcgetattr(0)
            self.stop_requested = False  # by Ctrl-Z
            if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self.request_stop)

        def take(self) -> None:
            """Have each key passed on as it is pressed, without an echo. Signals stay."""
            settings = [*self.shells[:6], [*self.shells[6]]]
            settings[0] &= ~termios.ICRNL
            settings[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
            settings[6][termios.VMIN], settings[6][termios.VTIME] = 1, 0
            with contextlib.suppress(termios.error):  # The terminal may be gone.
                termios.tcsetattr(0, termios.TCSANOW, settings)

        def give_back(self) -> None:
            """Put the shell's settings back, unless the shell has the terminal, as after Ctrl-Z."""
            with contextlib.suppress(OSError):  # as under setsid, where no shell can have it
                if os.tcgetpgrp(0) != os.getpgrp():
                    return
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSANOW, self.shells)

        def request_stop(self, _signum: int, _frame: object) -> None:
            """Handle SIGTSTP: have the loop stop this process, since it may be printing now."""
            self.stop_requested = True

        def stop(self) -> None:
            """Stop, and take the terminal again after fg."""
            self.stop_requested = False
            self.give_back()
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, self.request_stop)
            self.take()

else:
    # What follows a NUL or 0xE0 from getwch, and what other terminals send for the key: the arrows,
    # Home, End, Delete, Ctrl-Left, Ctrl-Right, Alt-B, Alt-F, Alt-D.
    CONSOLE_KEYS = {
        "H": "\x1b[A", "P": "\x1b[B", "K": "\x1b[D", "M": "\x1b[C", "G": "\x1b[H", "O": "\x1b[F",
        "S": "\x1b[3~", "s": "\x1b[1;5D", "t": "\x1b[1;5C", "0": "\x1bb", "!": "\x1bf", " ": "\x1bd"
    }  # fmt: skip

    def read_console() -> bytes:
        """Wait for keys in Windows' console, which does not echo them, and return them."""
        keys = ""
        while not keys or msvcrt.kbhit():
            char = msvcrt.getwch()
            if char == "\0" or (char == "\xe0" and msvcrt.kbhit()):  # 0xE0 alone is the letter à.
                char = CONSOLE_KEYS.get(msvcrt.getwch(), "")
            elif char == "\x03":
                signal.raise_signal(signal.SIGINT)
            keys += char.replace("\x1a", CTRL_D)  # Ctrl-Z, which ends the input here
        return keys.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# Start and end.


def leave(screen: Screen, outbox: Outbox, signum: int, _frame: object) -> NoReturn:
    """End at once, whatever the loop waits for: handle a signal."""
    screen.close(outbox.report())
    os._exit(128 + signum)


def handle_signals(screen: Screen, outbox: Outbox) -> None:
    """Leave at each signal that asks to. One that is ignored at the start stays ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK"):
        signum = getattr(signal, name, signal.SIGINT)
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, functools.partial(leave, screen, outbox))


def prepare_files() -> None:
    """Check that 32 more files can be opened: libzmq aborts where it cannot open its own.

    Standard streams that are closed are opened, or a socket would take their number; they block,
    whatever another process set; and they speak UTF-8. Raises OSError.
    """
    for file in [os.open(os.devnull, os.O_RDWR) for _ in range(32)]:
        if file > 2:
            os.close(file)
    for file in range(3):
        with contextlib.suppress(OSError, AttributeError):  # Windows
            os.set_blocking(file, True)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace")  # noqa: SIM115


def make_sockets(context: zmq.Context[Sock], ipv6: bool, key: str | None) -> tuple[Sock, Sock]:
    """Return PUSH and SUB, for IPv6 or for IPv4, since libzmq tries only one address of a name.

    With the file of a server's public key, they are encrypted (CURVE, RFC 26). Raises OSError if
    that has no key.
    """
    push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    for sock in (push, sub):
        sock.set(zmq.IPV6, int(ipv6))
        sock.set(zmq.RECONNECT_IVL_MAX, 1_000)  # milliseconds, from 100 upwards
        sock.set(zmq.TCP_KEEPALIVE, 1)  # finds a server that vanished while nothing was sent
        sock.set(zmq.TCP_KEEPALIVE_IDLE, 10)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, 2)
        sock.set(zmq.TCP_KEEPALIVE_CNT, 5)
        sock.set(zmq.TCP_MAXRT, 20_000)  # finds a server that acknowledges nothing
    if key is not None:
        encrypt(push, sub, key)
    push.set(zmq.IMMEDIATE, 1)  # Without a connection, lines wait in the outbox, and only there.
    sub.set(zmq.MAXMSGSIZE, 4 * MAX_LINE)  # Another server may publish longer messages than ours.
    sub.set(zmq.RCVHWM, SUB_HWM)
    sub.set(zmq.SUBSCRIBE, b"")
    return push, sub


def encrypt(push: Sock, sub: Sock, key: str) -> None:
    """Encrypt for a server whose public key is in a file. Raises OSError."""
    import zmq.auth  # This takes 14 ms, and is only needed here.

    try:
        server_key, _ = zmq.auth.load_certificate(key)
        for sock in (push, sub):
            sock.curve_serverkey = server_key
            # This side needs a key pair as well, but any will do.
            sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
    except (OSError, ValueError, IndexError, zmq.ZMQError) as error:
        raise OSError(f"--key: cannot use {key}: {error}") from None


def host(text: str) -> str:
    """Return the HOST that the command line names. Raises ArgumentTypeError, with advice."""
    if re.fullmatch(r"[^:]*:\d*|\[.*\]:\d*", text):
        advice = f"write {text.rpartition(':')[0]}, and the ports as --push-port and --sub-port"
        raise argparse.ArgumentTypeError(advice)
    if not re.fullmatch(r"[a-zA-Z0-9:\[][a-zA-Z0-9.:%_\[\]-]*", text):  # what libzmq takes
        raise argparse.ArgumentTypeError(f"not a host name or address: {text!r}")
    return text


def port(text: str) -> int:
    """Return the port that an option names. Raises ValueError if it is none."""
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
    add("--push-port", metavar="PORT", type=port, default=1337, help="lines go here (%(default)s)")
    add("--sub-port", metavar="PORT", type=port, default=1338, help="and come back (%(default)s)")
    add("--key", metavar="FILE", help="the server's public key, if it has one: NAME.key")
    return parser.parse_args()


def run(options: argparse.Namespace, screen: Screen, outbox: Outbox) -> str:
    """Make the sockets, and chat until the input ends. Return what may not have been delivered.

    Raises OSError if the key cannot be used, or stdout fails.
    """
    context = zmq.Context()
    push, sub = make_sockets(context, ":" in options.host, options.key)
    connection = Connection(push, sub, options.host, screen.interactive)
    sub.connect(f"tcp://{options.host}:{options.sub_port}")
    push.connect(f"tcp://{options.host}:{options.push_port}")
    read = functools.partial(os.read, 0, MAX_LINE)
    if screen.terminal:
        screen.terminal.take()
    elif sys.platform == "win32" and screen.editor:
        read = read_console
    stdin = Stdin(screen.editor or Splitter())
    threading.Thread(target=stdin.pass_on, args=(read,), daemon=True).start()
    chat(stdin, connection, outbox, screen)
    # Lines without an echo may still be on their way. A name service that hangs takes longer.
    closing = threading.Thread(target=context.destroy, args=(1_000,), daemon=True)
    closing.start()
    closing.join(1)
    unread = "" if stdin.ended and not stdin.failed else "the rest of the input was not read"
    return "; ".join(filter(None, (outbox.report(), unread)))


def main() -> int:
    """Read the options, chat, and return the exit status."""
    options = parse_options()
    try:
        prepare_files()
    except OSError as error:
        os.write(2, f"client.py: {error}; raise the limit of open files: ulimit -n\n".encode())
        return 1
    screen, outbox = Screen(options.color), Outbox(options.user)
    handle_signals(screen, outbox)
    try:
        report = run(options, screen, outbox)
    except OSError as error:
        report = str(error)
    screen.close(report)
    return int(bool(report))


if __name__ == "__main__":
    # Not sys.exit, which would wait for the thread that reads stdin.
    os._exit(main())
