"""README, "The wire": which message is published for which line, and which lines are dropped."""

import contextlib
import json
import os
import re
import socket
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmtp
from hypothesis import example, given
from hypothesis import strategies as st
from peers import Join, message_of
from processes import LINUX, POSIX, Script, Start, free_port, server_options, wait_for

import server as server_script

PUBLISHED = {
    "as json.dumps writes it": (b'{"user": "ken", "message": "hello"}', "ken", "hello"),
    "as JSON.stringify writes it": (b'{"user":"ken","message":"hello"}', "ken", "hello"),
    "other order": (b'{"message":"hello","user":"ken"}', "ken", "hello"),
    "more keys": (b'{"user": "k", "a": [1, {}], "message": "m", "n": null}', "k", "m"),
    "space around": (b'\t {"user" : "k","message":"m"}\r ', "k", "m"),
    "line ends between the parts": (b'{\n"user": "k",\r\n"message": "m"\n}\n', "k", "m"),
    "the last of equal keys": (b'{"user": "a", "user": "b", "message": "m"}', "b", "m"),
    "empty strings": (b'{"user": "", "message": ""}', "", ""),
    "a byte order mark": ('\ufeff{"user": "k", "message": "m"}'.encode(), "k", "m"),
    "Chinese": ('{"user": "王", "message": "你好，世界"}'.encode(), "王", "你好，世界"),
    "escapes": (rb'{"user": "\u738b", "message": "\ud83d\ude00 \"\\\/"}', "王", '😀 "\\/'),
    "joined emoji": ('{"user": "k", "message": "👨‍👩‍👧 ❤️"}'.encode(), "k", "👨‍👩‍👧 ❤️"),
    "a Persian joiner": ('{"user": "k", "message": "می‌خواهم"}'.encode(), "k", "می‌خواهم"),
    "no-break spaces": (rb'{"user": "k", "message": "a\u00a0b\u202fc"}', "k", "a\u00a0b\u202fc"),
    "a tab": (rb'{"user": "k", "message": "\tx\ty"}', "k", "\tx\ty"),
    "a whole number as user": (b'{"user": 5, "message": "m"}', "5", "m"),
    "numbers as they are written": (b'{"user": -0, "message": 1.50e999}', "-0", "1.50e999"),
    "a number of any length": (b'{"user": "k", "message": %s}' % (b"9" * 9_999), "k", "9" * 9_999),
    "the longest": (b'{"user":"k","message":"%s"}' % (b"x" * 16_359), "k", "x" * 16_359),
    "the longest beyond ASCII": (
        ('{"user":"k","message":"%s"}' % ("é" * 8_179)).encode(),
        "k",
        "é" * 8_179,
    ),
    "the longest once escaped": (
        b'{"user":"k","message":"%s"}' % (b"\x7f" * 4_093),
        "k",
        r"\x7f" * 4_093,
    ),
}

DROPPED = {
    "empty": b"",
    "cut short": b'{"user": "ken", "mess',
    "two objects": b'{"user": "k", "message": "m"} {}',
    "two lines": b'{"user": "k", "message": "m"}\n{"user": "k", "message": "m"}',
    "an array": b'["ken", "hello"]',
    "a number": b"9" * 9_999,
    "no user": b'{"message": "m"}',
    "no message": b'{"user": "k"}',
    "user is null": b'{"user": null, "message": "m"}',
    "message is an object": b'{"user": "k", "message": {}}',
    "NaN": b'{"user": "k", "message": "m", "n": NaN}',
    "infinity": b'{"user": "k", "message": -Infinity}',
    "nested": b"[" * 16_384,
    "UTF-16": '{"user": "k", "message": "m"}'.encode("utf-16-le"),
    "Latin-1": '{"user": "Zoë", "message": "m"}'.encode("latin-1"),
    "a raw control character": b'{"user": "k", "message": "\x1b[2J"}',
    "a raw line end": b'{"user": "k", "message": "a\nb"}',
    "a space that is none in JSON": '{"user": "k", "message": "m"}\u00a0'.encode(),
    "with a comment": b'{"user": "k", "message": "m"} // a comment',
    "too many DEL": b'{"user": "k", "message": "%s"}' % (b"\x7f" * 4_094),
    "too many separators": b'{"user": "k", "message": "%s"}' % (b"\xe2\x80\xa8" * 2_729),
}


def reason(name: str) -> str:
    """Return why a line of DROPPED is dropped."""
    if name.startswith("too many"):
        return "too long once its control characters are escaped"
    return 'not a JSON object with "user" and "message", in UTF-8'


LINES = [line for line, _, _ in PUBLISHED.values()] + list(DROPPED.values())
SIMPLE = PUBLISHED["as json.dumps writes it"][0]


class Reports(server_script.Log):
    """A log that keeps the details of its reports, and writes nothing."""

    def __init__(self) -> None:
        self.details: list[str] = []

    def report(self, text: str, detail: str = "") -> None:
        assert text == "dropped a line"
        self.details.append(detail)


def messages_of(*lines: bytes) -> tuple[list[bytes], list[str]]:
    """Return the messages of lines that the server receives in one go, and its reports."""
    reports = Reports()
    return server_script.chat_messages(list(lines), reports), reports.details


# README, The wire: A line is one frame of at most 16,384 bytes. It holds a JSON object in UTF-8
# with `user` and `message`, which are strings or numbers. Other keys are ignored.
# README, The wire: A message is one frame in UTF-8: `{user}> ESC[36m{message}ESC[0m`, where
# `ESC[36m` is cyan. It has at most 16,384 bytes: the server drops a line whose message would be
# longer.
# README, Differences from the original: published as it was written


@pytest.mark.parametrize(("line", "user", "message"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_line_is_published(line: bytes, user: str, message: str) -> None:
    assert messages_of(line) == ([message_of(user, message)], [])


@given(
    st.lists(
        st.sampled_from(LINES)
        | st.binary()
        | st.tuples(st.binary(), st.binary()).map(lambda two: b'{"user":"%s","message":"%s"}' % two)
    )
)
@example([SIMPLE + b"\n" + SIMPLE, b"hello"])
@example([SIMPLE, SIMPLE + b"\n"])
@example([b'{"user": "a', b'b", "message": "m"}'])
@example(["é".encode()[:1], "é".encode()[1:]])
def test_a_line_is_published_or_dropped_whatever_comes_with_it(lines: list[bytes]) -> None:
    messages: list[bytes] = []
    reports: list[str] = []
    for line in lines:
        published, reported = messages_of(line)
        assert len(published) + len(reported) == 1
        messages += published
        reports += reported
    assert messages_of(*lines) == (messages, reports)


def test_the_server_publishes_in_order_and_drops_the_rest(server: Script, join: Join) -> None:
    peer = join(server.ports)
    for line in DROPPED.values():
        peer.push.send(line)
        peer.push.send(SIMPLE)
    for line, _, _ in PUBLISHED.values():
        peer.push.send(line)
    expected = [message_of("ken", "hello")] * len(DROPPED)
    expected += [message_of(user, message) for _, user, message in PUBLISHED.values()]
    assert [peer.receive() for _ in expected] == expected
    assert not peer.sub.poll(0)


# README, The wire: Any ZeroMQ program, in any language, can be the other end.


@pytest.mark.parametrize(
    ("push_handshake", "sub_handshake", "frame"), zmtp.DIALECTS.values(), ids=zmtp.DIALECTS
)
def test_every_version_of_the_protocol_is_understood(
    server: Script,
    join: Join,
    push_handshake: bytes,
    sub_handshake: bytes,
    frame: Callable[[bytes], bytes],
) -> None:
    peer = join(server.ports)
    with (
        socket.create_connection(("127.0.0.1", server.ports[0])) as push,
        socket.create_connection(("127.0.0.1", server.ports[1])) as sub,
    ):
        for sock, handshake, body in (
            (push, push_handshake, SIMPLE),
            (sub, sub_handshake, b"\1"),  # Subscribe to everything.
        ):
            sock.sendall(handshake)
            zmtp.receive_until_quiet(sock, 0.05)  # Only then is the server ready.
            sock.sendall(frame(body))
        assert peer.receive() == message_of("ken", "hello")
        peer.chat("to all")
        assert zmtp.receive_until_quiet(sub, 0.1)[0].endswith(frame(message_of("k", "to all")))


# README, Differences from the original: The server publishes the same bytes as the original if
# `user` is a string or a whole number, `message` is a string, and nothing has to be escaped.

TEXT = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "))


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=3),
    TEXT | st.integers(),
    TEXT,
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": ")]),
)
def test_a_line_is_published_as_by_the_original(
    more: dict[str, object],
    user: str | int,
    message: str,
    ascii_only: bool,
    separators: tuple[str, str],
) -> None:
    line = json.dumps(
        more | {"user": user, "message": message}, ensure_ascii=ascii_only, separators=separators
    ).encode()
    payload = json.loads(line)
    original = f"{payload['user']}> \x1b[36m{payload['message']}\x1b[0m".encode()
    assert messages_of(line) == ([original], [])


# README, The wire: the server escapes control characters (except TAB), line separators, direction
# overrides and lone surrogates. It writes them as, for example, `\x1b` or `\u202e`. All other text
# passes unchanged, including joined emoji.


def test_exactly_the_characters_that_may_control_a_terminal_are_escaped() -> None:
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for char in map(chr, range(0x20000)):
        unsafe = (
            unicodedata.category(char) in {"Cc", "Zl", "Zp", "Cs"}
            or unicodedata.bidirectional(char) in directions
        ) and char != "\t"
        expected = char.encode("unicode_escape").decode() if unsafe else char
        assert server_script.sanitize(char) == expected


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped in JSON", "as they are"])
def test_control_characters_are_escaped_in_both_strings(ascii_only: bool) -> None:
    text, escaped = "a\x1b[2J\t\x9b2J\n\u202e", r"a\x1b[2J" + "\t" + r"\x9b2J\n\u202e"
    for payload in ({"user": text, "message": text}, {"message": text, "user": text}):
        line = json.dumps(payload, ensure_ascii=ascii_only).encode()
        assert messages_of(line) == ([message_of(escaped, escaped)], [])
    line = '{"user": "\x9b2J", "message": "\u202e"}'.encode()
    assert messages_of(line) == ([message_of(r"\x9b2J", r"\u202e")], [])


# README, Differences from the original: the server drops it and logs why
# README, Differences from the original: the client prints a notice; the server drops and logs it as
# well
# README, Differences from the original: JSON in Latin-1, or with comments
# README, Differences from the original: an empty line from another program


@pytest.mark.parametrize("name", DROPPED)
def test_a_line_is_dropped_with_its_reason(name: str) -> None:
    line = DROPPED[name]
    assert messages_of(line) == ([], [f"{reason(name)}: {line[:60]!r}"])


def logged(server: Script) -> int:
    """Return how many dropped lines the server has logged."""
    counts = re.findall(
        r"^server\.py: dropped a line(?: \(([0-9,]+) times\))?: ", server.stderr, re.M
    )
    return sum(int(count.replace(",", "") or 1) for count in counts)


def test_a_dropped_line_is_logged_within_half_a_second(server: Script, join: Join) -> None:
    peer = join(server.ports)
    began = time.monotonic()
    peer.push.send(b"bad")
    server.wait_stderr(rf"server\.py: dropped a line: {reason('bad')}: b'bad'\n")
    assert time.monotonic() - began < 0.5


@POSIX
def test_a_flood_of_dropped_lines_is_logged_in_a_few(server: Script, join: Join) -> None:
    peer = join(server.ports)
    count = 30_000
    with peer.pushing([b"\x1b]0;title\x07 %d %s" % (n, b"\xff" * 80) for n in range(count)]):
        wait_for(lambda: logged(server) == count, lambda: server.stderr[-1_000:])
    assert len(server.stderr) < 10_000
    assert server.stderr.replace("\n", "").isprintable()
    assert f"title\\x07 {count - 1} " in server.stderr
    for _ in range(2_000):
        peer.push.send(b"bad")
    peer.chat("next")
    assert server.terminate() == 0
    assert logged(server) == count + 2_000  # What was not logged yet is logged at the end.


FILLER = b"x" * 50 + b"\n"  # shorter than any entry of the log


@contextlib.contextmanager
def full(make: Callable[[], tuple[int, int]]) -> Iterator[int]:
    """Give a pipe or a terminal that has no room for an entry, and that nobody reads.

    A little room is left: then select calls a terminal writable, and a write blocks all the same.
    """
    first, second = make(), make()
    os.set_blocking(first[1], False)
    with contextlib.suppress(BlockingIOError):
        while os.write(first[1], FILLER) == len(FILLER):
            os.write(second[1], FILLER)
    yield second[1]
    for end in (*first, *second):
        os.close(end)


@POSIX
@pytest.mark.parametrize("kind", ["pipe", "openpty"])
def test_the_chat_does_not_wait_for_the_log(start: Start, join: Join, kind: str) -> None:
    ports = free_port(), free_port()
    with full(getattr(os, kind)) as stderr:
        script = start("server.py", *server_options(ports), stderr=stderr)
        peer = join(ports)
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            peer.push.send(b"bad")
            assert peer.round_trip() < 1
        assert script.terminate() == 0


@LINUX
@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(start: Start, join: Join, closed: str) -> None:
    ports = free_port(), free_port()
    before = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    script = start("server.py", *server_options(ports), before=before)
    peer = join(ports)
    peer.push.send(b"bad")
    peer.chat("next")
    for number in range(3):  # None is a socket, which would get what is logged.
        file = Path(f"/proc/{script.process.pid}/fd/{number}").readlink()
        assert str(file).startswith(("/dev/null", "pipe:"))
    assert script.terminate() == 0
    assert "Traceback" not in script.stderr
    assert ("dropped a line: " in script.stderr) == ("2>" not in closed)
