"""README, "The wire": which message is published for which line, and which lines are dropped."""

import json
import re
import sys
import time
import unicodedata
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peers import Join, line_of, message_of
from processes import LINUX, POSIX, Script, Start, after, free_port, python, server_options
from terminal import Open

from server import SIMPLE_CHARS, UNSAFE, make_messages

HELLO = line_of("ken", "hello")
COMPACT = b'{"user":"k","message":"%s"}'  # without the message

PUBLISHED = {  # the line, and whose message it becomes
    "as json.dumps writes it": (HELLO, "ken", "hello"),
    "in another order": (b'{"message":"hello","user":"ken"}', "ken", "hello"),
    "more keys": (b'{"user": "k", "a": [1, {}], "message": "m", "n": null}', "k", "m"),
    "space and line ends": (b'\t {\n"user" : "k",\r\n"message":"m"} \r\n', "k", "m"),
    "empty strings": (COMPACT.replace(b"k", b"") % b"", "", ""),
    "a byte order mark": (b"\xef\xbb\xbf" + HELLO, "ken", "hello"),
    "Chinese": ('{"user": "王", "message": "你好，世界"}'.encode(), "王", "你好，世界"),
    "joined emoji": (COMPACT % "👨‍👩‍👧 ❤️".encode(), "k", "👨‍👩‍👧 ❤️"),
    "escapes": (rb'{"user": "\u738b", "message": "\ud83d\ude00 \"\\\/"}', "王", '😀 "\\/'),
    "a fraction as user": (b'{"user": 1.50, "message": "m"}', "1.50", "m"),
    "numbers as they are written": (b'{"user": -0, "message": 1.50e999}', "-0", "1.50e999"),
    "a number of any length": (b'{"user": "k", "message": %s}' % (b"9" * 9_999), "k", "9" * 9_999),
    "the longest": (COMPACT % (b"x" * 16_359), "k", "x" * 16_359),
    "the longest beyond ASCII": (COMPACT % (b"\xc3\xa9" * 8_179), "k", "é" * 8_179),
    "the longest once escaped": (COMPACT % (b"\x7f" * 4_093), "k", r"\x7f" * 4_093),
    "the most escapes": (COMPACT % (rb"\n" * 8_179), "k", r"\n" * 8_179),
}

NO_CHAT = 'not an object whose "user" and "message" are strings or numbers'
DROPPED = {  # the line, and how the reason begins
    "empty": (b"", "Expecting value"),
    "cut short": (b'{"user": "ken", "mess', "Unterminated string"),
    "two lines": (HELLO + b"\n" + HELLO, "Extra data"),
    "an array": (b'["ken", "hello"]', NO_CHAT),
    "a number": (b"9" * 9_999, NO_CHAT),
    "no user": (b'{"message": "m"}', NO_CHAT),
    "user is null": (b'{"user": null, "message": "m"}', NO_CHAT),
    "message is an object": (b'{"user": "k", "message": {}}', NO_CHAT),
    "nested": (b"[" * 16_384, "maximum recursion depth exceeded"),
    "UTF-16": (HELLO.decode().encode("utf-16-le"), "Expecting property name"),
    "Latin-1": (COMPACT % b"Zo\xeb", "'utf-8' codec can't decode byte 0xeb"),
    "a raw control character": (COMPACT % b"\x1b[2J", "Invalid control character"),
    "a raw line end": (COMPACT % b"a\nb", "Invalid control character"),
    "a space that is none in JSON": (HELLO + "\u00a0".encode(), "Extra data"),
    "with a comment": (HELLO + b" // a comment", "Extra data"),
    # The message has 16,385 bytes.
    "too long": (COMPACT % ("ééx" + "\x7f" * 4_092).encode(), "too long once escaped"),
}
LINES = [*(line for line, _ in DROPPED.values()), *(line for line, _, _ in PUBLISHED.values())]
ANY_LINE = st.sampled_from(LINES) | st.binary() | st.binary().map(lambda text: COMPACT % text)
TEXT = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "))


def messages_of(*lines: bytes) -> tuple[list[bytes], list[str]]:
    """Return the messages of lines that the server receives in one go, and its reports."""
    reports: list[str] = []
    log: Any = SimpleNamespace(report=lambda *parts: reports.append(": ".join(parts)))
    return make_messages(list(lines), log), reports


# README, The wire: A ZeroMQ program in any language can take the place of either script, if it
# keeps to this
# README, The wire: A line is one frame of at most 16,384 bytes: a JSON object in UTF-8 with `user`
# and `message`, which are strings or numbers. Other keys are ignored.
# README, The wire: A message is one frame in UTF-8: `{user}> ESC[36m{message}ESC[0m`, where
# `ESC[36m` is cyan.
# README, Differences from the original: publishes it as it was written
# README, More differences: published as `1.5` | published as `1.50`
def test_lines_are_published_in_order_and_the_rest_is_dropped(server: Script, join: Join) -> None:
    peer = join(server.ports)
    for line in LINES:
        peer.push.send(line)
    expected = [message_of(user, message) for _, user, message in PUBLISHED.values()]
    assert [peer.receive() for _ in expected] == expected
    peer.chat("nothing else was published")


@given(st.lists(ANY_LINE))
@example([HELLO + b"\n" + HELLO, b"hello"])
@example([HELLO, HELLO + b"\n"])
def test_a_line_is_published_or_dropped_whatever_comes_with_it(lines: list[bytes]) -> None:
    messages, reports = messages_of(*lines)
    assert len(messages) + len(reports) == len(lines)
    assert messages == [message for line in lines for message in messages_of(line)[0]]
    assert reports == [report for line in lines for report in messages_of(line)[1]]


# README, More differences: This server publishes the same bytes as the original for every line that
# is valid JSON in UTF-8 with a string or a whole number (except `-0`) as its `user` and a string as
# its `message`, unless the server has to escape something
@given(TEXT | st.integers(), TEXT)
def test_a_line_is_published_as_by_the_original(user: str | int, message: str) -> None:
    payload = {"user": user, "message": message}
    as_in_python = json.dumps(payload)
    as_in_javascript = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    original = f"{user}> \x1b[36m{message}\x1b[0m".encode()
    for line in (as_in_python, as_in_javascript):
        assert messages_of(line.encode()) == ([original], [])


# README, Differences from the original: | `user` or `message` contains control characters |
# publishes them | escapes them |
# README, The wire: the server escapes control characters (except TAB), line separators, direction
# overrides and lone surrogates. It writes them as, for example, `\x1b` or `\u202e`. All other text
# passes unchanged.
def test_exactly_the_characters_that_may_control_a_terminal_are_escaped() -> None:
    """JSON, too, has escapes: for those below a space, and for lone surrogates."""
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    chars = list(map(chr, range(0x20000)))
    texts = [json.dumps({"user": char, "message": char}, ensure_ascii=False) for char in chars]
    messages, _ = messages_of(*(text.encode(errors="backslashreplace") for text in texts))
    for char, message in zip(chars, messages, strict=True):
        is_control = unicodedata.category(char) in {"Cc", "Zl", "Zp", "Cs"} and char != "\t"
        is_unsafe = is_control or unicodedata.bidirectional(char) in directions
        expected = char.encode("unicode_escape").decode() if is_unsafe else char
        assert message == message_of(expected, expected)


def test_all_other_characters_are_simple() -> None:
    """Nearly all: JSON, too, escapes a few."""
    is_simple = re.compile(f"[{SIMPLE_CHARS}]").fullmatch
    chars = map(chr, range(sys.maxunicode + 1))
    others = [ord(char) for char in chars if not is_simple(char)]
    assert others == sorted([*UNSAFE, *map(ord, '\t"\\')])


# README, Differences from the original: | not a JSON object | crashes | drops it and logs why |
# README, Differences from the original: | `message` is missing, or is not a string or number |
# crashes | drops it and logs why |
# README, Differences from the original: `> message` | drops it and logs why
# README, More differences: JSON in Latin-1, or with comments | accepted | dropped by the server,
# which logs why
# README, Limits: JSON that is nested too deeply is dropped.
@pytest.mark.parametrize("name", DROPPED)
def test_a_line_is_dropped_with_its_reason(name: str) -> None:
    line, reason = DROPPED[name]
    messages, [report] = messages_of(line)
    assert messages == []
    assert report.startswith(f"dropped a line: {reason}")
    assert report.endswith(f": {line[:60]!r}")


@POSIX
def test_dropped_lines_are_logged_soon_and_many_in_few_words(server: Script, join: Join) -> None:
    def logged() -> int:
        counts = re.findall(r"server\.py: dropped a line(?: \(([0-9,]+) times\))?:", server.stderr)
        return sum(int(count.replace(",", "") or 1) for count in counts)

    peer = join(server.ports)
    began = time.monotonic()
    peer.push.send(b"bad")
    server.wait_stderr(r"server\.py: dropped a line: Expecting value: .*: b'bad'\n")
    assert time.monotonic() - began < 0.5
    count = 30_000
    with peer.pushing([b"\x1b]0;title\x07 %d %s" % (n, b"\xff" * 80) for n in range(count)]):
        server.wait_stderr(rf"title\\x07 {count - 1} ")
    assert logged() == 1 + count
    assert len(server.stderr) < 10_000
    assert server.stderr.replace("\n", "").isprintable()
    for _ in range(2_000):
        peer.push.send(b"bad")
    peer.chat("next")
    assert server.terminate() == 0
    assert logged() == 1 + count + 2_000  # What was not logged yet is logged at the end.


def test_the_chat_does_not_wait_for_the_log(open_terminal: Open, join: Join) -> None:
    ports = free_port(), free_port()
    terminal = open_terminal(*python("server.py", *server_options(ports)))
    terminal.type("\x13")  # Ctrl-S: each write to the terminal blocks.
    peer = join(ports)
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        peer.push.send(b"bad")
        assert peer.round_trip() < 1
    assert Script(terminal.process).terminate() == 0
    assert terminal.received == b""


@LINUX
def test_standard_streams_may_be_closed(start: Start, join: Join) -> None:
    ports = free_port(), free_port()
    script = start("server.py", *server_options(ports), before=after("exec <&- >&- 2>&-"))
    peer = join(ports)
    peer.push.send(b"bad")  # This is not logged to a socket that took the number of stderr.
    peer.chat("next")
    assert script.terminate() == 0
