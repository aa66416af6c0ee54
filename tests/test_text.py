"""README, "The wire", "Delivery in detail": what the client makes of its input and of messages."""

import json
import queue
import re
import subprocess
from codecs import BOM_UTF8
from unittest.mock import Mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peers import BareServer, line_of
from processes import RunClient, Script, Start, close, port_options, python
from terminal import CONNECTED, Open

import client
from server import make_messages

WILL_BE_DROPPED = "the server will drop this line: "
NOT_JSON = f'{WILL_BE_DROPPED}not a JSON object with "user" and "message"'
TO_TYPE = f"{NOT_JSON} (to just type text, use --user NAME): "
ONE_LINE = f"{NOT_JSON} (write the whole object on one line): "
TOO_LONG = "line not sent: {}, but the server takes 16,384 at most"


# README, More differences: Without `--user`, each line that the client sends has the same bytes as
# in the original, except that the client drops a byte order mark at the start of a pipe or a file.
# README, Delivery in detail: Empty lines are not sent.
# README, Delivery in detail: A byte order mark at the start of a pipe or a file is dropped.

ONE = line_of("k", "1")
SPACED = b'{ "message":"m",  "user":"k", "more": [1e999]} '
LONGEST = line_of("k", "x" * 16_356)
AS_TYPED = {  # the input, and the lines that are sent
    "JSON with spaces": (SPACED + b"\n", [SPACED]),
    "CRLF and empty lines": (b"\r\n" + ONE + b"\r\n\n" + ONE, [ONE, ONE]),
    "broken JSON": (b'{"user": "k"\n}\n', [b'{"user": "k"', b"}"]),
    "not UTF-8": (b"caf\xe9\n\xff\xfeh\x00", [b"caf\xe9", b"\xff\xfeh\x00"]),
    "spaces and TABs": (b"a\tb\n\t\n  x  ", [b"a\tb", b"\t", b"  x  "]),
    "control characters": (b"\x1b[2J\x00\x7f\ra\n", [b"\x1b[2J\x00\x7f\ra"]),
    "the longest": (LONGEST + b"\n " + LONGEST + b"\n" + ONE, [LONGEST, ONE]),
    "byte order marks": (BOM_UTF8 + ONE + b"\n" + BOM_UTF8 + ONE, [ONE, BOM_UTF8 + ONE]),
}


@pytest.mark.parametrize("size", [1, 2, 7, client.READ_SIZE])
@pytest.mark.parametrize(("typed", "lines"), AS_TYPED.values(), ids=AS_TYPED)
def test_a_line_is_sent_as_it_was_typed(typed: bytes, lines: list[bytes], size: int) -> None:
    """However the input is cut. Its end is a read without data."""
    reads, outbox = queue.SimpleQueue[bytes](), client.Outbox(None)
    stdin = client.Stdin(reads.get, client.Splitter().feed)
    for start in range(0, len(typed) + size, size):
        reads.put(typed[start : start + size])
        for line in stdin.read_lines():
            outbox.add(line)
    assert [frame for frame, _ in outbox.lines] == lines
    assert stdin.ended


# README, Delivery in detail: With `--user`, invalid UTF-8 is reported, and its invalid bytes are
# sent as `�`.
def test_input_that_is_not_utf_8_is_reported_once(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, b"caf\xe9\nna\xefve\nplain\n", "--user", "k")
    assert done.stdout.decode() == "k> caf\ufffd\nk> na\ufffdve\nk> plain\n"
    assert done.stderr.decode() == "client.py: not UTF-8: invalid bytes are sent as \ufffd\n"
    assert done.returncode == 0


# README, What it adds to the original: **You type text instead of JSON**, with `--user NAME`.
# README, Options: send what you type as `{"user": NAME, "message": TEXT}`
@given(st.text(), st.binary())
@example('k "q"', b'say "hi" \\ \t')
@example("王", "你好 👋".encode())
@example("jos\udce9", b"caf\xe9")
def test_with_a_name_a_line_is_sent_as_json(name: str, typed: bytes) -> None:
    outbox = client.Outbox(name)
    outbox.add(typed)
    user, message = name.encode(errors="replace").decode(), typed.decode(errors="replace")
    assert json.loads(outbox.lines[0][0]) == {"user": user, "message": message}


# README, Delivery in detail: A line that this server would drop is sent anyway, since another
# server may accept it. A line that is too long is not sent. In both cases, a notice says what is
# wrong with the line. (From a pipe or a file, only the first line with each kind of problem gets a
# notice.)
# README, More differences: the client prints a notice instead of sending it

DELETES = LONGEST.replace(b"x", b"\x7f")
ESCAPED = f"{WILL_BE_DROPPED}too long once escaped: "
PROBLEMS = {  # the user, the line, and the notice
    "text": (None, b"hello", f"{TO_TYPE}hello"),
    "an array": (None, b"[1]", f"{TO_TYPE}[1]"),
    "deeply nested": (None, b"[" * 10_000, TO_TYPE + "[" * 80),
    "half an object": (None, b'{"user": "k",', ONE_LINE + '{"user": "k",'),
    "an object without a text": (None, b'{"user": "k"}', TO_TYPE + '{"user": "k"}'),
    "not UTF-8": (None, b"caf\xe9", f"{WILL_BE_DROPPED}not UTF-8: caf\ufffd"),
    "too long once escaped": (None, DELETES, ESCAPED + DELETES[:80].decode()),
    "too long": (None, b"x" * 16_385, TOO_LONG.format("16,385 bytes")),
    "too long with a name": ("k", b"x" * 16_357, TOO_LONG.format("16,385 bytes")),
    "far too long": (None, b"x" * 1_000_000, TOO_LONG.format("1,000,000 bytes or more")),
}


@pytest.mark.parametrize(("user", "line", "notice"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_is_reported(user: str | None, line: bytes, notice: str) -> None:
    outbox = client.Outbox(user)
    assert outbox.add(line) == notice
    assert outbox.undelivered_notice() == "1 line may not have been delivered"
    will_be_sent = [line] if notice.startswith(WILL_BE_DROPPED) else []
    assert [frame for frame, _ in outbox.lines] == will_be_sent
    assert make_messages([line], log=Mock()) == []


def test_a_pipe_reports_the_first_of_a_kind(server: Script, run_client: RunClient) -> None:
    pipe = b"\x1b[2Jhello\n[]\ncaf\xe9\n%s\n%s\n" % (ONE, b"x" * 20_000) * 100
    done = run_client(server.ports, pipe)
    assert done.stdout == b"k> 1\n" * 100
    assert done.stderr.decode().splitlines() == [
        rf"client.py: {TO_TYPE}\x1b[2Jhello",
        f"client.py: {TOO_LONG.format('20,000 bytes')}",
        "client.py: 400 lines may not have been delivered",
    ]
    assert done.returncode == 1


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_reports_each(bare_server: BareServer, open_terminal: Open, term: str) -> None:
    command = python("client.py", *port_options(bare_server.ports))
    terminal = open_terminal(*command, environment={"TERM": term})
    terminal.wait_text(CONNECTED)
    for text in ("hello", "[]"):
        terminal.type(f"{text}\r")
        terminal.wait_text(re.escape(f"client.py: {TO_TYPE}{text}".replace(" ", "")))
        assert bare_server.receive() == text.encode()


def test_lines_to_be_dropped_are_sent_in_turn(bare_server: BareServer, start: Start) -> None:
    """As to a server that takes plain text. When the client ends, this one is still behind."""
    script = start("client.py", *port_options(bare_server.ports), stdin=subprocess.PIPE)
    texts = [b"%d %s" % (number, b"x" * 16_000) for number in range(1_500)]
    close(script, b"\n".join(texts))
    assert [bare_server.receive() for _ in texts] == texts
    assert bare_server.receive_all(0.1) == []
    assert script.wait() == 1
    assert script.stderr.endswith("client.py: 1,500 lines may not have been delivered\n")


# README, How it works: The sender's own copy is the *echo* of its line.

JSON_LINES = st.fixed_dictionaries(
    {"user": st.text() | st.integers(), "message": st.text() | st.floats() | st.none()},
    optional={"more": st.lists(st.text())},
).map(lambda payload: json.dumps(payload, ensure_ascii=False).encode(errors="replace"))


@given(JSON_LINES | st.binary() | st.from_regex(rb'\A\{"user": ?"[^"]*", ?"message": ?"[^"]*"\}\Z'))
@example(BOM_UTF8 + ONE)
@example(b"{}")
@example(ONE + b"x")
@example(b'{"user": "k", "message": "m", "n": NaN}')
@example(rb'{"user": "k", "message": "\ud800"}')
@example(b'{"user": "k", "message": "%s"}' % (b"\x7f" * 4_093))  # the longest once escaped
@example(b'{"user": "k", "message": "%s"}' % (b"\x7f" * 4_094))
def test_the_echo_to_wait_for_is_what_the_server_publishes(line: bytes) -> None:
    try:
        expected = [client.echo_of(line)]
    except ValueError:
        expected = []
    published = make_messages([line], log=Mock())
    assert [client.sanitize_message(message)[0] for message in published] == expected


# README, More differences: the client escapes them, too (all but colors and TAB), in case it talks
# to another server
# README, The wire: All other text passes unchanged.

COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
FRAMES = {  # what a server publishes, and what is printed
    "message": (b"ken> \x1b[36mhello\x1b[0m", "ken> \x1b[36mhello\x1b[0m"),
    "other colours": (b"\x1b[1;31ma\x1b[38:5:9mb\x1b[0m", "\x1b[1;31ma\x1b[38:5:9mb\x1b[0m"),
    "colour left on": (b"\x1b[31mred\x1b[m", "\x1b[31mred\x1b[m\x1b[0m"),
    "among colours": (b"\x1b[36m\t\x07\x1b[0m", "\x1b[36m\t\\x07\x1b[0m"),
    "colour within a sequence": (b"\x1b\x1b[36m[2J\x1b[0m", "\\x1b\x1b[36m[2J\x1b[0m"),
    "title": (b"\x1b]0;t\x07", r"\x1b]0;t\x07"),
    "clear": (b"\x1b[2J\x1b[H\x1bc", r"\x1b[2J\x1b[H\x1bc"),
    "key mode like a colour": (b"\x1b[>4;2m", r"\x1b[>4;2m"),
    "line ends": (b"ken> hi\rann> ho\n", r"ken> hi\rann> ho\n"),
    "beyond ASCII": ("\x9b2J\u2028\u202eabc\u2066".encode(), r"\x9b2J\u2028\u202eabc\u2066"),
    "not UTF-8": (b"a\xff\xed\xa0\x80b", "a\ufffd\ufffd\ufffd\ufffdb"),
    "joiners": ("👨‍👩‍👧 می‌خواهم".encode(), "👨‍👩‍👧 می‌خواهم"),
}


@pytest.mark.parametrize(("frame", "printed"), FRAMES.values(), ids=FRAMES)
def test_a_message_is_only_text_and_colours(frame: bytes, printed: str) -> None:
    assert client.sanitize_message(frame) == (COLOUR.sub("", printed), printed)


@given(st.binary() | st.text(st.sampled_from("\x1b[;0123m36]?hA\x07\n\t\u009b x")).map(str.encode))
def test_no_message_does_more_than_colour(frame: bytes) -> None:
    uncoloured, coloured = client.sanitize_message(frame)
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", uncoloured)
    assert COLOUR.sub("", coloured) == uncoloured
    assert "\x1b" not in coloured or coloured.endswith("\x1b[0m")
