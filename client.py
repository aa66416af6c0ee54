#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq>=25", "colorama>=0.4.6"]
# ///
"""The chat client: PUSHes each line of stdin to the server, and prints what SUB brings.

Out: one frame a line, as it was typed; with --user, as JSON `{"user": NAME, "message": line}`.
In:  one frame a message, UTF-8 text in which colours are obeyed and nothing else is.

The loop is that of the talk's slides 8 to 14, except that nobody has to press Enter to see what
was said, and that the echo of a line is its receipt: until it is back, the line is kept.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import unicodedata
from typing import Any, NoReturn, TextIO

import colorama
import zmq

with contextlib.suppress(ImportError):  # Windows
    import termios

Sock = zmq.Socket[bytes]

LONGEST = 16_384  # bytes: the longest line that a server takes, and that it publishes
WINDOW = 1_000  # lines that are out at most; when so many wait, a pipe is not read on
DRAIN = 200  # messages that SUB holds at most, and that are printed in one go
TICK = 0.1  # seconds: the longest wait, after which whatever is due is done
SETTLING = 0.1  # seconds from a handshake until the subscription is in effect, nearly always
RETRY = 1.0  # seconds until the user is told that there is no server, and between tries to connect
LATE = 5.0  # seconds without an echo, until the user is told, or a line pushed again
TRIES = 3  # pushes of a line without an echo, after which it is given up
NEVER_THERE = 8.0  # seconds to wait, while no more is read, for a server that never was there
NOT_MOVING = 30.0  # seconds to wait, while no more is read, for the next echo


def chat(keyboard: "Keyboard", link: "Link", outbox: "Outbox", screen: "Screen") -> int:
    """Wait for some input, push it, and print what SUB holds (slide 8), until the input ends.

    Then wait for the last echo. If the reader of stdout has gone, the input ends, too. Return the
    exit status: 0 if the echo of each line, or of one after it, came back, so that everybody could
    see it; 1 if not, and the user is told how many. Raises OSError if stdout cannot be written to.
    """
    now = time.monotonic()
    while (outbox.lines or not keyboard.over) and outbox.stood_still <= link.patience:
        # wait for some input
        reading = (len(outbox.lines) < WINDOW or screen.typing) and not keyboard.over
        stdin = [keyboard.pipe.fileno()] if reading else []
        ready, _, _ = zmq.select([link.sub, *link.monitors.values(), *stdin], [], [], TICK)
        if keyboard.pipe.fileno() in ready:
            for line in keyboard.lines():
                outbox.take(line)

        # dump buffered messages
        messages: list[tuple[str, str]] = []
        with contextlib.suppress(zmq.Again):
            while len(messages) < DRAIN:
                messages.append(as_text(link.sub.recv(zmq.NOBLOCK)))
        if messages:
            try:
                screen.show_messages(messages)
            except BrokenPipeError:
                keyboard.over = True
            outbox.settle(messages)

        # push what may go, and see what is overdue
        link.follow()
        if link.connected:
            outbox.push_lines()
        # A round counts for a second at most: the client may have been asleep, not the server.
        before, now = now, time.monotonic()
        outbox.pass_time(min(now - before, 1), reading)
    return outbox.tell_undelivered(all_read=keyboard.over and not keyboard.failed)


# What is typed.


class Keyboard:
    """The lines of stdin. A thread reads them, since the line editor waits for nothing else."""

    def __init__(self) -> None:
        self.pipe, self.thread_end = socket.socketpair()  # Windows cannot wait for a pipe.
        self.partial = b""  # a line whose end is still to come
        self.over = False
        self.failed = False  # stdin could not be read to its end
        self.enter: object = None  # what GNU readline calls at Enter; None without GNU readline

    def lines(self) -> list[bytes]:
        """Return the lines that are complete now, without their ends and without empty ones."""
        chunk = self.pipe.recv(LONGEST)
        self.over = not chunk
        *lines, partial = (self.partial + (chunk or b"\n")).split(b"\n")
        self.partial = partial[: LONGEST + 2]  # This is enough to tell a line that is too long.
        return [line for line in (line.removesuffix(b"\r") for line in lines) if line]

    # The rest is for the thread.

    def read_stdin(self, editing: bool) -> None:
        """Pass stdin on. While the chat loop reads no more, sendall waits."""
        try:
            while editing:
                line = input()  # With GNU readline, Enter does not end it, but Ctrl-O does.
                columns = os.get_terminal_size(1).columns or 80
                rows = 1 if self.enter else len(split_rows(line, columns))
                os.write(1, b"\x1b[%dA\x1b[J" % rows)  # The echo comes instead.
                self.submit(line)
            while chunk := os.read(0, LONGEST):
                self.thread_end.sendall(chunk)
        except (EOFError, OSError) as end:
            self.failed = isinstance(end, OSError)
        self.thread_end.close()

    def submit(self, line: str) -> None:
        """Pass on a line that was typed."""
        self.thread_end.sendall(line.encode(errors="surrogateescape") + b"\n")


# The connection.


class Link:
    """PUSH and SUB, and what their monitors tell of their connections.

    Make it before the sockets connect, or else the monitors may miss that.
    """

    def __init__(self, push: Sock, sub: Sock, host: str, screen: "Screen") -> None:
        self.push, self.sub, self.host, self.screen = push, sub, host, screen
        self.monitors = {sock: sock.get_monitor_socket() for sock in (push, sub)}
        self.last_event = dict.fromkeys((push, sub), 0)
        self.new: set[Sock] = set()  # sockets with a new connection, until push_lines heeds it
        self.subscribed_at = 0.0  # when the subscription is in effect, if both are connected
        self.connected = False  # both sockets are, and the subscription is in effect
        self.patience = NEVER_THERE  # seconds; NOT_MOVING, once there was a connection
        self.retry_at = time.monotonic() + RETRY
        self.told = False  # that there is no connection

    def follow(self) -> None:
        """Take what the monitors tell; say when a connection comes, and when it goes."""
        for sock, monitor in self.monitors.items():
            while monitor.poll(0):
                # The event's number is in the first two bytes: see zmq_socket_monitor(3).
                event = int.from_bytes(monitor.recv_multipart()[0][:2], sys.byteorder)
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.new.add(sock)
                    # Meanwhile, the loop prints what SUB still holds from its last connection, or
                    # else that would be taken for a proof of this one.
                    self.subscribed_at = time.monotonic() + SETTLING
                self.last_event[sock] = event
        both = all(last == zmq.EVENT_HANDSHAKE_SUCCEEDED for last in self.last_event.values())
        was_connected = self.connected
        self.connected = both and time.monotonic() >= self.subscribed_at
        if self.connected:
            if self.new and (self.screen.typing or self.told):
                self.screen.notice(f"connected to {self.host}")
            self.patience, self.told = NOT_MOVING, False
            self.retry_at = time.monotonic() + RETRY  # libzmq tries first.
        else:
            self.retry(was_connected)

    def retry(self, was_connected: bool) -> None:
        """Tell once that there is no connection; connect anew where libzmq does not try again.

        It does not after an error of the protocol, such as a message that is too long, or a key on
        one side alone. Its last event is then that the connection has gone; where it does try
        again, more events follow at once.
        """
        due = time.monotonic() >= self.retry_at
        if was_connected or (due and not self.told):
            self.told = True
            self.screen.notice(f"no server at {self.host}, or one whose --key differs; lines wait")
        if due:
            self.retry_at = time.monotonic() + RETRY
            for sock in self.monitors:
                if self.last_event[sock] == zmq.EVENT_DISCONNECTED:
                    endpoint = sock.get_string(zmq.LAST_ENDPOINT)
                    sock.disconnect(endpoint)
                    sock.connect(endpoint)
                    self.last_event[sock] = 0  # or else a try longer than RETRY would be cut


# Lines on their way.


class Outbox:
    """Lines to be pushed, of which the first ones are out: they wait for their echoes.

    The echoes of a client come back in the order of its lines, so one settles all lines before it.
    An echo is known by its text alone: the same line, said by someone else of that name, or sent
    again, passes for it.
    """

    def __init__(self, user: str | None, link: Link, screen: "Screen") -> None:
        self.user, self.link, self.screen = user, link, screen
        self.lines: list[tuple[bytes, int]] = []  # each with the hash of its echo
        self.out = 0  # lines that are out
        self.window = 1  # lines that may be out: WINDOW, once a message proved the subscription
        self.tries = 0  # times that lines were pushed, and no echo came
        self.late = 0.0  # seconds without an echo
        self.stood_still = 0.0  # seconds without an echo in which no more was read
        self.lost = 0  # lines that no server shows, and those that were given up

    def take(self, line: bytes) -> None:
        """Take a line to be pushed. If no server shows it, tell the user instead.

        In a pipe, only the first such line is told, and in the end how many there were. What was
        typed is shown here if there will be no echo soon to take its place.
        """
        body = line
        if self.user is not None:
            payload = {"user": self.user, "message": line.decode(errors="replace")}
            body = json.dumps(payload, ensure_ascii=False).encode(errors="replace")
        try:
            self.lines.append((body, hash(echo_of(body))))
        except ValueError as error:
            self.lost += 1
            if self.screen.typing or self.lost == 1:
                self.screen.notice(f"not sent, {error}: {as_text(line)[0][:80]}")
        if self.screen.editing and not (self.link.connected and self.late < LATE):
            self.screen.show_messages([as_text(line)])

    def push_lines(self) -> None:
        """Push lines, until WINDOW are out. Over a new connection, one goes alone first.

        A message that comes then proves that the subscription is in effect. Lines that are out are
        pushed again over a new connection of PUSH. If only SUB was away, the server has them.
        """
        if self.link.new:
            self.take_back(self.out if self.link.push in self.link.new else 0)
            self.window = min(self.out + 1, WINDOW)
            self.link.new.clear()
        with contextlib.suppress(zmq.Again):
            while self.out < min(self.window, len(self.lines)):
                self.link.push.send(self.lines[self.out][0], zmq.NOBLOCK)
                self.out += 1

    def settle(self, messages: list[tuple[str, str]]) -> None:
        """Forget the lines whose echoes are among these new messages, and the lines before them."""
        self.window = WINDOW  # They prove the subscription, whosever they are.
        settled = 0
        echoes = [echo for _, echo in self.lines[: self.out]]
        for plain, _ in messages:
            with contextlib.suppress(ValueError):  # It may not be one of ours.
                settled = echoes.index(hash(plain), settled) + 1
        if settled:
            del self.lines[:settled]
            self.out -= settled
            self.tries, self.late, self.stood_still = 0, 0.0, 0.0

    def take_back(self, count: int) -> None:
        """Take so many of the last lines that are out for not pushed, so that they go again.

        After TRIES, the first of these is given up. It may be at fault: a server may hang up at
        each line that is too long for it.
        """
        self.tries += count > 0
        self.out -= count
        self.late = 0.0
        if self.tries == TRIES:
            given_up = echo_of(self.lines.pop(self.out)[0])[:80]
            self.tries = 0
            self.lost += 1
            self.screen.notice(f"given up after {TRIES} times without an echo: {given_up}")

    def pass_time(self, seconds: float, reading: bool) -> None:
        """Let time pass. After LATE without an echo, tell the user, if there is one at a terminal.

        Then push the last line again, too, since its echo stands for all before it: at each LATE
        while no message has proved the subscription; later once, and only while no more is read.
        The server may have left this client out because nobody read its stdout.
        """
        self.stood_still = 0.0 if reading else self.stood_still + seconds
        before = self.late
        self.late = before + seconds if self.out else 0.0
        if before < LATE <= self.late and self.screen.typing:
            first = echo_of(self.lines[0][0])[:80]
            self.screen.notice(f"no echo yet; lines: {len(self.lines):,}, the first: {first}")
        left_out = not reading and not self.tries
        if self.late >= LATE and self.link.connected and (self.window < WINDOW or left_out):
            self.take_back(1)

    def tell_undelivered(self, all_read: bool) -> int:
        """Tell how many lines may not have been seen by everybody; return the exit status."""
        doubtful = self.lost + len(self.lines)
        rest = "" if all_read else "; the rest of the input was not read"
        if doubtful or rest:
            self.screen.notice(f"lines not known to be delivered: {doubtful:,}{rest}")
        return int(bool(doubtful or rest))


# Nearly every line is printable ASCII without escapes, as json.dumps and JSON.stringify write it.
# This tells such a line, and finds its two strings, in a third of the time of parsing it.
PLAIN = re.compile(rb'\{"user": ?"([ !#-[\]-~]*)", ?"message": ?"([ !#-[\]-~]*)"\}')


def echo_of(body: bytes) -> str:
    """Return what a server makes of a chat line (slide 3), without the colour.

    Raises ValueError, with the reason, if no server shows it.
    """
    if len(body) > LONGEST:
        raise ValueError(f"more than {LONGEST:,} bytes")
    if plain := PLAIN.fullmatch(body):
        return (b"%b> %b" % plain.groups()).decode()
    try:
        # Only strings matter here. Python refuses integers of many digits, so they become floats.
        # It takes NaN and Infinity, which are not JSON, so int gets them, which refuses them.
        payload = json.loads(body.decode(), parse_int=float, parse_constant=int)
        echo = f"{harmless(payload['user'])}> {harmless(payload['message'])}"
    except (ValueError, RecursionError, LookupError, TypeError):
        raise ValueError("no chat line in JSON (to just type, use --user)") from None
    if len(echo.encode()) + len(CYAN + RESET) > LONGEST:
        raise ValueError(f"more than {LONGEST:,} bytes with its control characters made visible")
    return echo


# Text that a terminal only shows.

CYAN, RESET = colorama.Fore.CYAN, colorama.Style.RESET_ALL
COLOR = re.compile("(\x1b\\[[0-9;:]{0,40}m)")  # at most 40, since each row repeats it

# Characters that a terminal could obey: controls, line separators, direction overrides and
# isolates, and lone surrogates. Joiners, which emoji and Persian need, and no-break spaces are not
# among them: they are text.
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    r"""Return text with its control characters in a visible form, such as `\x1b`."""
    return UNSAFE.sub(lambda char: char[0].encode("unicode_escape").decode(), text)


def as_text(frame: bytes) -> tuple[str, str]:
    """Return a frame as text that a terminal only shows: without its colours, and with them."""
    text = frame.decode(errors="replace")
    plain = COLOR.sub("", text)
    if not plain.isprintable():  # This is rare, and takes long.
        plain = harmless(plain)
        text = "".join(part if COLOR.match(part) else harmless(part) for part in COLOR.split(text))
    if "\x1b" in text and not text.endswith(RESET):
        text += RESET  # or else it would colour what is typed
    return plain, text


# The screen.


class Screen:
    """Where the chat goes, stdout, and what is not part of it, stderr.

    If stdin is a terminal, someone may be typing, and what goes to a terminal goes above the typed
    line. If stdout is a terminal, too, the line is edited there, and gives way to its echo.
    """

    def __init__(self, typing: bool, color: bool) -> None:
        self.typing, self.color = typing, color
        self.editing = typing and sys.stdout.isatty()

    def show_messages(self, messages: list[tuple[str, str]]) -> None:
        """Show messages, each given without its colours and with them. Raises OSError."""
        self.show([colored if self.color else plain for plain, colored in messages], sys.stdout)

    def notice(self, text: str) -> None:
        """Tell the user something that is not part of the chat."""
        with contextlib.suppress(OSError):
            self.show([f"client.py: {harmless(text)}"], sys.stderr)

    def show(self, lines: list[str], stream: TextIO) -> None:
        """Write lines, above the typed line if there may be one. Raises OSError.

        For each row of the screen that they take, the typed line moves down by one. The cursor
        keeps its place in it, so that readline, which moves it relatively, goes on undisturbed.
        All is one write, since readline writes here, too.
        """
        text = "".join(f"{line}\n" for line in lines)
        if self.typing and stream.isatty():
            columns = os.get_terminal_size(stream.fileno()).columns or 80
            rows = [row for line in lines for row in split_rows(line, columns)]
            text = NO_WRAP + "".join(f"{OPEN_ROW}{row}{TO_TYPED}" for row in rows) + WRAP
        print(text, end="", file=stream, flush=True)


# Save the cursor; make room below, if this is the last row; insert a row above the typed line.
OPEN_ROW = "\x1b7\n\x1b[A\x1b[L\r"
TO_TYPED = "\x1b8\x1b[B"  # restore the cursor, and follow the typed line down
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"  # cut rows that the terminal finds too long

GLYPH = re.compile("\x1b\\[[0-9;:]*m|.", re.DOTALL)  # a colour or a character


def split_rows(text: str, columns: int) -> list[str]:
    """Split text into the rows that it takes on a screen, each with its colour.

    Wide characters take two columns. Where terminals differ (emoji joined to one by ZWJ), a row is
    rather too short than too long.
    """
    rows, room, color = [""], columns, ""
    for glyph in GLYPH.findall(text):
        if glyph[0] == "\x1b":
            color = glyph
        if columns_of(glyph) > room:
            rows.append(color)
            room = columns
        rows[-1] += glyph
        room -= columns_of(glyph)
    return rows


def columns_of(glyph: str) -> int:
    """Return how many columns of a terminal a colour or a character takes."""
    if glyph[0] == "\x1b" or unicodedata.category(glyph) in ("Mn", "Me"):
        return int(glyph == "\ufe0f")  # It makes a narrow character an emoji, which is wide.
    return 2 if unicodedata.east_asian_width(glyph) in "WF" else 1


# The line editor.


def set_up_readline(keyboard: Keyboard) -> None:
    """Have readline stop at Ctrl-Z, and submit a line at Enter while its editing goes on.

    By itself, it would move the cursor on to the next row at Enter, and leave the terminal to the
    kernel for a while. A message could come just then, and what is typed ahead be shown twice.
    Raises ImportError, AttributeError or OSError if there is no readline, as on Windows.
    """
    import ctypes
    import readline

    libedit = "libedit" in (readline.__doc__ or "")
    if libedit:
        readline.parse_and_bind("setty -x -echo")  # What is typed ahead would be shown twice.
    editor = ctypes.CDLL(readline.__file__)
    signal.signal(signal.SIGTSTP, lambda *_: suspend(editor))
    if libedit:  # It lacks what follows.
        return

    def enter(_count: int, _key: int) -> int:
        if line := readline.get_line_buffer():
            readline.add_history(line)
            keyboard.submit(line)
        editor.rl_revert_line(1, 0)  # A line of the history stays as it was.
        editor.rl_end_of_history(1, 0)
        return int(editor.rl_kill_full_line(1, 0))

    keyboard.enter = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)(enter)
    for key in b"\r\n":
        editor.rl_bind_key(key, keyboard.enter)
    readline.parse_and_bind("set bell-style none")  # Enter would ring it.
    readline.parse_and_bind("set horizontal-scroll-mode on")  # A line takes one row.
    readline.parse_and_bind("set enable-bracketed-paste off")  # Each line of a paste is a line.


def suspend(editor: Any) -> None:
    """Leave the terminal to the shell, stop, and go on editing after fg.

    editor is readline's own library: Python offers none of these functions.
    """
    editor.rl_deprep_terminal()
    put_back()  # libedit leaves the echo off.
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, handler)
    editor.rl_prep_terminal(1)
    os.write(1, b"\r\x1b[J")  # The line is still there if there is no shell, and so no stop.
    editor.rl_forced_update_display()


# Start and end.


# The terminal's settings: a thread that is in readline at the end leaves them changed.
FOUND_SETTINGS = termios.tcgetattr(0) if os.name == "posix" and os.isatty(0) else []


def put_back(last: bytes = b"") -> None:
    """Put back the terminal's settings that were found, and write what is last, if any."""
    if FOUND_SETTINGS:
        with contextlib.suppress(OSError, termios.error):  # The terminal may be gone.
            if os.tcgetpgrp(0) == os.getpgrp():  # Or else it is the shell's, as after Ctrl-Z.
                termios.tcsetattr(0, termios.TCSANOW, FOUND_SETTINGS)
                if zmq.select([], [0], [], 0)[1]:  # or else it would wait, as after Ctrl-S
                    os.write(0, last)
                # Once more: the thread may just have begun to edit a line.
                termios.tcsetattr(0, termios.TCSANOW, FOUND_SETTINGS)


def leave(signum: int, _frame: object) -> NoReturn:
    """End at once: handle SIGINT, SIGTERM or SIGQUIT, at whatever moment they come.

    An exception might be raised where nothing can catch it.
    """
    put_back(b"\n")  # The shell's prompt is to have a row of its own.
    os._exit(128 + signum)


def claim_files() -> None:
    """Open standard streams that are closed, so that no socket takes their place; speak UTF-8.

    Raises OSError if there is no room for the files that sockets need, for then libzmq aborts.
    """
    for file in [os.open(os.devnull, os.O_RDWR) for _ in range(32)]:
        if file > 2:
            os.close(file)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace")  # noqa: SIM115


def make_sockets(context: zmq.Context[Sock], ipv6: bool, key: str | None) -> tuple[Sock, Sock]:
    """Return PUSH and SUB, for IPv6 or for IPv4, since libzmq tries but one address of a name.

    With the file of a server's public key, they are encrypted (CURVE, RFC 26). Raises OSError if
    there is no key in it.
    """
    push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    for sock in (push, sub):
        sock.set(zmq.IPV6, int(ipv6))
        sock.set(zmq.RECONNECT_IVL_MAX, 1_000)  # milliseconds, from 100 upwards
        sock.set(zmq.TCP_KEEPALIVE, 1)  # finds a server that vanished while nothing was said.
        sock.set(zmq.TCP_KEEPALIVE_IDLE, 10)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, 2)
        sock.set(zmq.TCP_KEEPALIVE_CNT, 5)
        sock.set(zmq.TCP_MAXRT, 20_000)  # cuts off a server that takes nothing.
    if key is not None:
        encrypt(push, sub, key)
    push.set(zmq.IMMEDIATE, 1)  # Without a connection, lines wait in the outbox, and only there.
    sub.set(zmq.MAXMSGSIZE, 4 * LONGEST)  # Another server may publish longer lines than ours.
    sub.set(zmq.RCVHWM, DRAIN)
    sub.set(zmq.SUBSCRIBE, b"")
    return push, sub


def encrypt(push: Sock, sub: Sock, key: str) -> None:
    """Encrypt for a server with the public key in a file. Raises OSError."""
    import zmq.auth  # This takes 14 ms, and is not needed without a key.

    try:
        server_key, _ = zmq.auth.load_certificate(key)
        for sock in (push, sub):
            sock.curve_serverkey = server_key
            # This side needs a pair, too, but any will do.
            sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
    except (OSError, ValueError, IndexError, zmq.ZMQError) as error:
        raise OSError(f"--key: cannot use {key}: {error}") from None


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
    add("host", metavar="HOST", nargs="?", default="localhost", help="the server (%(default)s)")
    add("--user", metavar="NAME", help="speak as NAME; without it, lines are sent as they are")
    add("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    add("--push-port", metavar="PORT", type=port, default=1337, help="lines go here (%(default)s)")
    add("--sub-port", metavar="PORT", type=port, default=1338, help="and come back (%(default)s)")
    add("--key", metavar="FILE", help="the server's public key, if it has one: NAME.key")
    return parser.parse_args()


def run(options: argparse.Namespace, screen: Screen) -> int:
    """Make the sockets, chat until the input ends, and return the exit status.

    Raises OSError if the key cannot be used, or stdout cannot be written to.
    """
    # This context is never freed. To free it might take as long as a name service that hangs.
    push, sub = make_sockets(zmq.Context.instance(), ":" in options.host, options.key)
    link = Link(push, sub, options.host, screen)
    try:
        sub.connect(f"tcp://{options.host}:{options.sub_port}")
        push.connect(f"tcp://{options.host}:{options.push_port}")
    except (zmq.ZMQError, UnicodeError):
        screen.notice(f"not a host name or address: {options.host}")
        return 2
    keyboard = Keyboard()
    if screen.editing:
        with contextlib.suppress(ImportError, AttributeError, OSError):
            set_up_readline(keyboard)
    threading.Thread(target=keyboard.read_stdin, args=(screen.editing,), daemon=True).start()
    return chat(keyboard, link, Outbox(options.user, link, screen), screen)


def main() -> int:
    """Be ready for signals, read the options, chat, and return the exit status."""
    for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGQUIT", signal.SIGINT)):
        signal.signal(signum, leave)
    options = parse_options()
    try:
        claim_files()
        colorama.just_fix_windows_console()
        smart = os.environ.get("TERM") != "dumb"  # knows cursor movements and colours
        auto = smart and os.isatty(1) and not os.environ.get("NO_COLOR")
        color = options.color == "always" or (options.color == "auto" and auto)
        return run(options, Screen(smart and os.isatty(0), color))
    except OSError as error:
        os.write(2, f"client.py: {error}\n".encode(errors="backslashreplace"))
        return 1
    finally:
        put_back()


if __name__ == "__main__":
    # Not sys.exit: a thread may be in readline, and a signal may come while Python ends.
    os._exit(main())
