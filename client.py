#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyzmq", "colorama"]
# ///
"""The chat client: PUSHes each line of stdin to the server, and prints what SUB brings.

Out: one frame a line, as it was typed; with --user, as JSON `{"user": NAME, "message": line}`.
In:  one frame a message, UTF-8 text in which colours are obeyed and nothing else is.

The loop is that of the talk's slides 8 to 14, except that nobody has to press Enter to see what
was said: a thread waits for the keyboard, and the loop for that thread and SUB together.
"""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterator
from typing import TextIO

import colorama
import zmq

MAX_LINE = 65_536  # bytes: the longest line that a server takes
MAX_KEPT = 1_048_576  # bytes of a longer line, which is refused anyway
MAX_WAITING = 1_000_000  # lines kept for a server that is not there
MAX_DRAIN = 1_000  # messages printed before the keyboard is looked at again

# Seconds.
NO_SERVER_AFTER = 1.5  # without a connection, until the user is told
SETTLING = 0.1  # for a new subscription to take effect, or else the first line's echo is lost
SUB_LATE = 3.0  # waiting for SUB when PUSH is connected already
ECHO_LATE = 1.2  # at the end of input, waiting for the next echo
GIVE_UP = 8.0  # at the end of input, waiting for a server

# C0 and C1 controls, DEL, line separators, direction overrides and lone surrogates. Joiners, which
# emoji and Persian need, and no-break spaces are not among them: those are text.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COLOR = re.compile("(\x1b\\[[0-9;:]*m)")
# What stays on one row of the screen: a colour; or a character, with all that ZWJ joins to it.
GLYPH = re.compile("\x1b\\[[0-9;:]*m|.\ufe0f?(?:\u200d.\ufe0f?)*", re.DOTALL)

Typed = tuple[bytes, str | None]  # what to push, and its echo if a server accepts it

# Only strings matter here, so a number of any length may pass as a float, at no cost.
parse_json = json.JSONDecoder(parse_int=float).raw_decode


def harmless(text: str) -> str:
    r"""Return text with its control characters in a visible form, such as `\x1b`."""
    if text.isprintable():  # so is nearly every line, and this test is a fast one
        return text
    return CONTROL.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def echo_of(body: bytes) -> str:
    """Return what a server makes of a body (slide 3), without the colour.

    Raises ValueError, with the reason, if no server accepts the body.
    """
    try:
        text = body.decode().strip(" \t\r\n")
        payload, end = parse_json(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if end != len(text) or not isinstance(payload, dict):
        raise ValueError("it is not a JSON object")
    user, message = payload.get("user"), payload.get("message")
    if not isinstance(user, str) or not isinstance(message, str):
        raise ValueError('its "user" and "message" are not both strings')
    return harmless(f"{user}> {message}")


def to_text(frame: bytes) -> tuple[str, str]:
    """Return a frame as text that a terminal only shows: without its colours, and with them."""
    text = frame.decode(errors="replace")
    # The colours that servers send; this is much faster than to look for any.
    plain = text.replace(colorama.Fore.CYAN, "").replace(colorama.Style.RESET_ALL, "")
    if not plain.isprintable():
        parts = COLOR.split(text)  # text, colour, text, colour, ..., text
        parts[::2] = map(harmless, parts[::2])
        text, plain = "".join(parts), "".join(parts[::2])
    if text != plain and not text.endswith(colorama.Style.RESET_ALL):
        text += colorama.Style.RESET_ALL  # or else it would colour what is typed
    return plain, text


def split_rows(text: str, columns: int) -> list[str]:
    """Split text into the rows that it takes on a screen. Wide characters take two columns.

    Where terminals differ (emoji joined by ZWJ), a row is rather too short than too long.
    """
    rows = [""]
    room = columns
    for glyph in GLYPH.findall(text):
        width = 0 if glyph[0] == "\x1b" else sum(map(columns_of, glyph))
        if width > room:
            rows.append("")
            room = columns
        rows[-1] += glyph
        room -= width
    return rows


def columns_of(char: str) -> int:
    """Return how many columns of a terminal a character takes."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return int(char == "\ufe0f")  # makes an emoji of a narrow character, and so a wide one
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def show(lines: list[str], stream: TextIO, typing: bool) -> None:
    """Print lines, if someone may be typing on the same terminal then above the typed line.

    That line moves down whole: as many line feeds as there are rows make room below it, and as many
    inserted lines above it. The cursor keeps its place in the line, so that readline, which moves
    it relatively, goes on undisturbed. Each step is one write, for readline writes here too.
    """
    if not (typing and stream.isatty()):
        stream.write("".join(f"{line}\n" for line in lines))
        stream.flush()
        return
    columns, height = os.get_terminal_size(stream.fileno())
    rows = [row for line in lines for row in split_rows(line, columns or 80)]
    step = max((height or 24) - 1, 1)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        count = len(some)
        stream.write(
            "\x1b7" + "\n" * count + f"\x1b[{count}A\x1b[{count}L\r"
            # No automatic wrap: a row that the terminal finds too long is cut, and tears nothing.
            "\x1b[?7l" + "\r\n".join(some) + f"\x1b[?7h\x1b8\x1b[{count}B"
        )
        stream.flush()


def notice(text: str, typing: bool) -> None:
    """Tell the user something that is not part of the chat, on stderr."""
    with contextlib.suppress(OSError):
        show([f"client.py: {text}"], sys.stderr, typing)


def read_stdin(keyboard: zmq.Socket[bytes], typing: bool) -> None:
    """Pass stdin on to the chat loop in chunks, each when the loop asks for one; at its end, b"".

    This runs in a thread, because on Windows stdin cannot be waited for together with sockets.
    """
    with contextlib.suppress(EOFError, OSError):
        if typing and sys.stdout.isatty():
            while keyboard.recv():
                keyboard.send(input().encode(sys.stdin.encoding, "surrogateescape") + b"\n")
        elif sys.stdin:
            # Unbuffered: a thread that holds a buffer's lock would keep the process from ending.
            with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
                while keyboard.recv() and (chunk := stdin.read(MAX_LINE)):
                    keyboard.send(chunk)
            keyboard.send(b"\n")  # the last line may have no end of its own
    keyboard.send(b"")


def complete_lines(begun: bytearray, chunk: bytes) -> list[bytes]:
    """Return the lines that a chunk completes, without their ends, and keep in `begun` the rest."""
    first, *others = chunk.split(b"\n")
    begun += first
    del begun[MAX_KEPT:]
    if not others:
        return []
    lines = [bytes(begun), *others[:-1]]
    begun[:] = others[-1]
    return [line.removesuffix(b"\r") for line in lines]


def to_body(line: bytes, user: str | None) -> bytes:
    """Return what to push for a line: the line itself, or with a user's name JSON."""
    if user is None:
        return line
    payload = {"user": user, "message": line.decode(errors="replace")}
    return json.dumps(payload, ensure_ascii=False).encode()


def take_lines(lines: list[bytes], user: str | None, typing: bool, told: set[str]) -> list[Typed]:
    """Return for each line what to push and, if any server accepts it, the echo to expect.

    Empty lines are left out, and lines over MAX_LINE refused. The user is told what is wrong with a
    line: on a terminal each time, in a pipe of each reason once, by way of `told`.
    """
    taken: list[Typed] = []
    for line in filter(None, lines):
        body = to_body(line, user)
        if len(body) > MAX_LINE:
            more = " or more" if len(line) >= MAX_KEPT else ""
            size = f"{len(body):,} bytes{more}"
            notice(f"not sent, too long: {size}, where a server takes {MAX_LINE:,}", typing)
            continue
        try:
            taken.append((body, echo_of(body)))
        except ValueError as error:
            taken.append((body, None))
            if typing or str(error) not in told:
                told.add(str(error))
                notice(f"no server shows such a line: {error} (to just type, use --user)", typing)
    return taken


def push_lines(push: zmq.Socket[bytes], waiting: deque[Typed], unseen: dict[str, int]) -> bool:
    """Push lines until PUSH is full; count their echoes as unseen. Return whether any went."""
    before = len(waiting)
    with contextlib.suppress(zmq.Again):
        while waiting:
            body, echo = waiting[0]
            push.send(body, zmq.NOBLOCK)
            waiting.popleft()
            if echo is not None:
                unseen[echo] = unseen.get(echo, 0) + 1
    return len(waiting) < before


def drain(sub: zmq.Socket[bytes]) -> list[bytes]:
    """Return the messages that SUB holds, without blocking: MAX_DRAIN at most."""
    frames: list[bytes] = []
    with contextlib.suppress(zmq.Again):
        while len(frames) < MAX_DRAIN:
            frames.append(sub.recv(zmq.NOBLOCK))
    return frames


def connected_since(events: zmq.Socket[bytes], since: float | None) -> float | None:
    """Return since when a socket is connected, None if it is not, by the news of its monitor."""
    while events.poll(0):
        event = int.from_bytes(events.recv_multipart()[0][:2], sys.byteorder)
        since = time.monotonic() if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else None
    return since


def may_push(push_since: float | None, sub_since: float | None) -> bool:
    """Return whether a line pushed now will be echoed: that takes a subscription in effect."""
    if push_since is None:
        return False
    if sub_since is None:  # no server's SUB port, perhaps: then at least send
        return time.monotonic() > push_since + SUB_LATE
    return time.monotonic() > sub_since + SETTLING


def undelivered(waiting: deque[Typed], lost: int, typing: bool) -> int:
    """Tell what was not delivered: lines still waiting, or else lost; return the exit status."""
    if waiting:
        first = to_text(waiting[0][0])[0]
        notice(f"lines not delivered: {len(waiting):,}; the first: {first:.60}", typing)
    elif lost:
        notice(f"lines perhaps not delivered, since the server went away: {lost:,}", typing)
    return 1 if waiting or lost else 0


def chat(
    keyboard: zmq.Socket[bytes],
    push: zmq.Socket[bytes],
    push_events: zmq.Socket[bytes],
    sub: zmq.Socket[bytes],
    sub_events: zmq.Socket[bytes],
    wakeup: socket.socket,
    host: str,
    user: str | None,
    typing: bool,
    color: bool,
) -> int:
    """Wait for some input, push it, and print what SUB holds (slide 8), until the input ends.

    Then wait for the echoes of what was pushed. Return the exit status: 0, or 1 if something was
    not delivered, which is told. `wakeup` becomes readable when a signal comes, to end a wait.
    """
    begun = bytearray()  # a line whose end is still to come
    waiting: deque[Typed] = deque()  # lines to push
    unseen: dict[str, int] = {}  # the echoes to come of lines pushed, and of each how many
    told: set[str] = set()
    push_since = sub_since = None
    asked = input_over = connected = absence_told = doubtful = False
    started = moved = time.monotonic()
    poller = zmq.Poller()
    for source in (keyboard, push_events, sub, sub_events, wakeup):
        poller.register(source, zmq.POLLIN)

    while True:
        full = len(waiting) >= MAX_WAITING
        if not (asked or input_over or full or (waiting and connected)):
            keyboard.send(b"more")
            asked = True
        pushing = bool(waiting) and may_push(push_since, sub_since)
        poller.register(push, zmq.POLLOUT if pushing else 0)
        soon = input_over or full or not (connected or absence_told)
        settling = waiting and push_since and not pushing
        ready = dict(poller.poll(20 if soon or settling else None))

        push_since = connected_since(push_events, push_since)
        sub_since = connected_since(sub_events, sub_since)
        was_connected, connected = connected, bool(push_since and sub_since)
        if connected and not was_connected and (typing or absence_told):
            notice(f"connected to {host}", typing)
        elif was_connected and not connected:
            notice("the server went away, what you type is sent when it is back", typing)
            absence_told = True
            doubtful |= bool(unseen)
        elif not (connected or absence_told) and time.monotonic() > started + NO_SERVER_AFTER:
            notice(f"no server at {host} yet, still trying", typing)
            absence_told = True

        if keyboard in ready:
            chunk = keyboard.recv()
            asked, input_over, moved = False, not chunk, time.monotonic()
            lines = list(filter(None, complete_lines(begun, chunk)))
            taken = take_lines(lines, user, typing, told)
            waiting += taken
            if chunk and connected and len(taken) == len(lines) and all(echo for _, echo in taken):
                clear_typed(chunk, typing)

        if pushing and push_lines(push, waiting, unseen):
            moved = time.monotonic()

        if texts := [to_text(frame) for frame in drain(sub)]:
            show([colored if color else plain for plain, colored in texts], sys.stdout, typing)
        for plain, _ in texts:
            if count := unseen.pop(plain, 0):
                moved = time.monotonic()
                if count > 1:
                    unseen[plain] = count - 1

        if input_over and not waiting and not unseen:
            return 0
        patience = ECHO_LATE if push_since and not waiting else GIVE_UP
        if (input_over or full) and time.monotonic() > moved + patience:
            return undelivered(waiting, sum(unseen.values()) if doubtful else 0, typing)


def clear_typed(chunk: bytes, typing: bool) -> None:
    """Clear a line that was just typed: its echo takes its place."""
    if not (typing and sys.stdout.isatty()):
        return
    rows = 1  # readline keeps the line on one
    if "readline" not in sys.modules:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
        rows = len(split_rows(chunk.decode(errors="replace").rstrip("\n"), columns or 80))
    sys.stdout.write(f"\x1b[{rows}A\x1b[J")
    sys.stdout.flush()


@contextlib.contextmanager
def line_editing(typing: bool) -> Iterator[None]:
    """Have lines edited by readline, where there is one, and leave the terminal as it was found.

    A thread that is in readline when the process ends would leave it in readline's own mode.
    """
    try:
        import readline
        import termios
    except ImportError:  # Windows
        typing = False
    if not typing:
        yield
        return
    readline.parse_and_bind("set horizontal-scroll-mode on")  # a line takes one row, see show
    settings = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)
            sys.stdout.write("\x1b[?2004l")  # readline asked for bracketed paste
            sys.stdout.flush()


def address_families(host: str) -> set[int]:
    """Return the families of a host's addresses: none if the name is unknown.

    A name service that takes more than a second does not hold up the chat: IPv4 is assumed.
    """
    found: set[int] = set()

    def look_up() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.update(info[0] for info in socket.getaddrinfo(host, None))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(1)
    return {socket.AF_INET} if thread.is_alive() else found


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
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "host", metavar="HOST", nargs="?", default="localhost", help="name or address of the server"
    )
    add(
        "--user",
        metavar="NAME",
        help="speak as NAME; otherwise each line is sent as it is, as JSON",
    )
    add("--color", choices=("auto", "always", "never"), default="auto", help="colour messages")
    add("--sub-port", metavar="PORT", type=port, default=1338, help="messages come from here")
    add("--push-port", metavar="PORT", type=port, default=1337, help="lines go there")
    return parser.parse_args()


def main() -> int:
    """Make the sockets, chat until the input ends, and return the exit status."""
    options = parse_options()
    for name in ("SIGTERM", "SIGQUIT"):  # these, too, are to leave the terminal as it was found
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    wakeup, writer = socket.socketpair()  # by these a signal ends libzmq's waiting, even on Windows
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    smart = os.environ.get("TERM") != "dumb"
    typing = smart and bool(sys.stdin) and sys.stdin.isatty()
    color = options.color == "always" or (
        options.color == "auto" and smart and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    colorama.just_fix_windows_console()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    user = options.user and os.fsencode(options.user).decode(errors="replace")

    context = zmq.Context()
    sub, push = context.socket(zmq.SUB), context.socket(zmq.PUSH)
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    sub.setsockopt(zmq.MAXMSGSIZE, 16 * MAX_LINE)  # control characters grow when they are shown
    keyboard, keyboard_thread_end = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    keyboard.bind("inproc://keyboard")
    keyboard_thread_end.connect("inproc://keyboard")
    news = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
    push_events, sub_events = push.get_monitor_socket(news), sub.get_monitor_socket(news)
    reader = threading.Thread(target=read_stdin, args=(keyboard_thread_end, typing), daemon=True)

    try:
        families = address_families(options.host)
        if not families:
            notice(f"unknown host name {options.host}, still trying", typing=False)
        for sock in (sub, push):
            sock.setsockopt(zmq.IPV6, int(families == {socket.AF_INET6}))
            sock.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)  # milliseconds, from 100 upwards
            sock.setsockopt(zmq.HEARTBEAT_IVL, 5_000)  # a server that vanished without a word ...
            sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)  # ... is found to have gone away
        host = f"[{options.host}]" if ":" in options.host else options.host
        sub.connect(f"tcp://{host}:{options.sub_port}")
        push.connect(f"tcp://{host}:{options.push_port}")
        with line_editing(typing and sys.stdout.isatty()):
            reader.start()
            status = chat(
                keyboard, push, push_events, sub, sub_events, wakeup,
                options.host, user, typing, color,
            )  # fmt: skip
    except KeyboardInterrupt:
        if typing:  # the shell's prompt is to have a row of its own
            print(file=sys.stderr)
        return 130
    except zmq.ZMQError:
        notice(f"not a host name or address: {options.host}", typing=False)
        return 2
    except OSError as error:
        # Python flushes stdout once more at the end, in vain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read stdout has had enough
            return 0
        notice(f"cannot write to stdout: {error.strerror}", typing=False)
        return 1
    if status == 0:
        # What was pushed last may be on its way still. In a thread, so that nothing can hang.
        flush = threading.Thread(target=context.destroy, args=(1_000,), daemon=True)
        flush.start()
        flush.join(2)
    return status


if __name__ == "__main__":
    sys.exit(main())
