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
from collections.abc import Callable, Iterator
from functools import partial
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
    return text.translate(VISIBLE)


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


def read_stdin(keyboard: zmq.Socket[bytes], typing: bool, ready: threading.Event) -> None:
    """Pass stdin on to the chat loop in chunks, each after the first when it asks; at last, b"".

    This runs in a thread, because on Windows stdin cannot be waited for together with sockets. From
    `ready` on, what is typed is edited.
    """

    def submit(line: str) -> None:
        keyboard.send(line.encode(sys.stdin.encoding, "surrogateescape") + b"\n")
        keyboard.recv()

    with contextlib.suppress(EOFError, OSError):
        if typing and sys.stdout.isatty():
            set_up_readline(submit, ready)
            while True:
                line = input()
                clear_typed(line)
                submit(line)
        ready.set()
        if sys.stdin:
            # Unbuffered: a thread that holds a buffer's lock would keep the process from ending.
            with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
                while chunk := stdin.read(MAX_LINE):
                    keyboard.send(chunk)
                    keyboard.recv()
            keyboard.send(b"\n")  # the last line may have no end of its own
    keyboard.send(b"")


def set_up_readline(submit: Callable[[str], None], ready: threading.Event) -> None:
    """Have lines edited by readline, if there is one, and submitted without leaving it.

    At Enter, readline itself would move the cursor on to the next row, and leave the terminal to
    the kernel for a while. A message could come just then, and what is typed ahead be shown twice.
    So Enter completes the line, which calls Python, and then clears it.
    """
    try:
        import readline
    except ImportError:  # Windows
        ready.set()
        return

    def complete(_text: str, _state: int) -> None:
        line = readline.get_line_buffer()
        if line:
            readline.add_history(line)
        submit(line)

    readline.set_startup_hook(ready.set)
    readline.set_completer(complete)
    enter = r"\C-x1\C-x2\C-x3\C-x4"
    for binding in (
        "set horizontal-scroll-mode on",  # a line takes one row: see show
        "set enable-bracketed-paste off",  # each line of a paste is a line
        "set bell-style none",
        r'"\C-x1": complete',
        r'"\C-x2": revert-line',  # a line of the history stays as it was
        r'"\C-x3": end-of-history',
        r'"\C-x4": kill-whole-line',
        rf'"\C-m": "{enter}"',
        rf'"\C-j": "{enter}"',
    ):
        readline.parse_and_bind(binding)


def clear_typed(line: str) -> None:
    """Clear a line just typed without readline. If it is to stay, the chat loop shows it."""
    columns = os.get_terminal_size(sys.stdout.fileno()).columns
    sys.stdout.write(f"\x1b[{len(split_rows(line, columns or 80))}A\x1b[J")
    sys.stdout.flush()


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


def take_lines(
    lines: list[bytes],
    waiting: deque[Typed],
    user: str | None,
    typing: bool,
    connected: bool,
    told: set[str],
) -> None:
    """Queue lines to push. Empty lines are left out, and lines over MAX_LINE refused.

    A line typed on a terminal stays there if no echo is to take its place. The user is told what is
    wrong with a line: on a terminal each time, in a pipe of each reason once, by way of `told`.
    """
    for line in filter(None, lines):
        body = to_body(line, user)
        too_long = len(body) > MAX_LINE
        try:
            echo, trouble = echo_of(body), ""
        except ValueError as error:
            echo, trouble = None, f"no server shows such a line: {error} (to just type, use --user)"
        if too_long:
            size = f"{len(body):,} bytes" + (" or more" if len(line) >= MAX_KEPT else "")
            echo, trouble = None, f"not sent, too long: {size}, where a server takes {MAX_LINE:,}"
        else:
            waiting.append((body, echo))
        if typing and sys.stdout.isatty() and not (connected and echo):
            show([to_text(line)[0]], sys.stdout, typing)
        if trouble and (typing or too_long or trouble not in told):
            told.add(trouble)
            notice(trouble, typing)


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


def mark_seen(plain_texts: list[str], unseen: dict[str, int]) -> bool:
    """Count down the echoes to come by those among these messages; return whether any was."""
    any_seen = False
    for plain in plain_texts:
        if count := unseen.pop(plain, 0):
            any_seen = True
            if count > 1:
                unseen[plain] = count - 1
    return any_seen


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
    if sub_since is None:  # perhaps its port cannot be reached: then at least send
        return time.monotonic() > push_since + SUB_LATE
    return time.monotonic() > sub_since + SETTLING


def undelivered(waiting: deque[Typed], lost: int, typing: bool) -> int:
    """Tell what was not delivered, lines still waiting or else lost; return the exit status."""
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
    unseen: dict[str, int] = {}  # the echoes to come of lines pushed, and how many of each
    told: set[str] = set()
    push_since = sub_since = None
    asked = True
    input_over = connected = absence_told = doubtful = False
    started = moved = time.monotonic()
    poller = zmq.Poller()
    for source in (keyboard, push_events, sub, sub_events, wakeup):
        poller.register(source, zmq.POLLIN)

    while True:
        # More input is asked for when the last has been pushed, or is kept for want of a server.
        full = len(waiting) >= MAX_WAITING
        if not (asked or input_over or full or (waiting and connected)):
            keyboard.send(b"more")
            asked = True

        # Wait, for no longer than 20 ms while something is due at a certain time.
        pushing = bool(waiting) and may_push(push_since, sub_since)
        due = input_over or full or not (connected or absence_told)
        settling = waiting and push_since and not pushing
        poller.register(push, zmq.POLLOUT if pushing else 0)
        ready = dict(poller.poll(20 if due or settling else None))

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
            lines = complete_lines(begun, chunk)
            take_lines(lines, waiting, user, typing, connected, told)

        if pushing and push_lines(push, waiting, unseen):
            moved = time.monotonic()

        if texts := [to_text(frame) for frame in drain(sub)]:
            show([colored if color else plain for plain, colored in texts], sys.stdout, typing)
            if mark_seen([plain for plain, _ in texts], unseen):
                moved = time.monotonic()

        patience = ECHO_LATE if push_since and not waiting else GIVE_UP
        over = input_over and not waiting and not unseen
        if over or ((input_over or full) and time.monotonic() > moved + patience):
            push.setsockopt(zmq.LINGER, 1_000 if push_since else 0)  # for what was pushed last
            return undelivered(waiting, sum(unseen.values()) if doubtful else 0, typing)


def edit_after_suspension() -> None:
    """Set the terminal for readline again, as it is now, after Ctrl-Z and fg: a shell resets it."""
    with contextlib.suppress(ImportError):  # Windows
        import termios

        settings = termios.tcgetattr(sys.stdin)
        set_again = partial(termios.tcsetattr, sys.stdin, termios.TCSANOW, settings)
        signal.signal(signal.SIGCONT, lambda *_: set_again())


@contextlib.contextmanager
def terminal_kept() -> Iterator[None]:
    """Leave the terminal as it was found: a thread that is in readline at the end does not."""
    try:
        import termios

        settings = termios.tcgetattr(sys.stdin)
    except (ImportError, termios.error):  # Windows; stdin is no terminal
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)


def is_smart_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal that knows cursor movements and colours."""
    return bool(stream and stream.isatty() and os.environ.get("TERM") != "dumb")


def wake_on_signals() -> socket.socket:
    """Return a socket that is readable once a signal has come, so that waiting for it ends then.

    On Windows nothing else ends it. SIGTERM and SIGQUIT become interrupts as SIGINT is, so that
    they, too, leave the terminal as it was found.
    """
    wakeup, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for name in ("SIGTERM", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    return wakeup


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


def connect(sock: zmq.Socket[bytes], host: str, port: int, ipv6: bool) -> None:
    """Connect a socket to a server's port. Raises zmq.ZMQError if the host is no name or address.

    IPv6 only where there is nothing else: a server may listen on IPv4 alone.
    """
    sock.setsockopt(zmq.IPV6, int(ipv6))
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)  # milliseconds, from 100 upwards
    sock.setsockopt(zmq.HEARTBEAT_IVL, 5_000)  # a server that vanished without a word ...
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)  # ... is found to have gone away
    sock.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")


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
    add("--color", metavar="WHEN", choices=("auto", "always", "never"), default="auto",
        help="auto (the default: on a terminal), always or never")  # fmt: skip
    add("--push-port", metavar="PORT", type=port, default=1337, help="lines go here (%(default)s)")
    add("--sub-port", metavar="PORT", type=port, default=1338, help="and come back (%(default)s)")
    return parser.parse_args()


def main() -> int:
    """Make the sockets, chat until the input ends, and return the exit status."""
    options = parse_options()
    wakeup = wake_on_signals()
    typing = is_smart_terminal(sys.stdin)
    if typing and os.name == "posix" and os.environ.pop("PYTHONUNBUFFERED", ""):
        # It has readline, too, write byte by byte: a message could split an escape sequence.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    color = options.color == "always" or (
        options.color == "auto" and is_smart_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    )
    user = options.user and os.fsencode(options.user).decode(errors="replace")
    colorama.just_fix_windows_console()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)

    context = zmq.Context()
    sub, push = context.socket(zmq.SUB), context.socket(zmq.PUSH)
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    sub.setsockopt(zmq.MAXMSGSIZE, 16 * MAX_LINE)  # control characters grow when they are shown
    news = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
    push_events, sub_events = push.get_monitor_socket(news), sub.get_monitor_socket(news)
    keyboard, thread_end = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    keyboard.bind("inproc://keyboard")
    thread_end.connect("inproc://keyboard")

    ready = threading.Event()
    reader = threading.Thread(target=read_stdin, args=(thread_end, typing, ready), daemon=True)

    try:
        families = address_families(options.host)
        ipv6 = families == {socket.AF_INET6}
        with terminal_kept():
            reader.start()
            ready.wait(1)
            if typing:
                edit_after_suspension()
            connect(sub, options.host, options.sub_port, ipv6)
            connect(push, options.host, options.push_port, ipv6)
            if not families:
                notice(f"unknown host name {options.host}, still trying", typing)
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
        # Python writes what is left once more at the end: let it go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read stdout has had enough
            return 0
        notice(f"cannot write to stdout: {error.strerror}", typing=False)
        return 1
    if status == 0:
        # What was pushed last may still be on its way. In a thread, so that nothing can hang.
        closing = threading.Thread(target=context.destroy, daemon=True)
        closing.start()
        closing.join(2)
    return status


if __name__ == "__main__":
    sys.exit(main())
