"""README, "The wire": which message is published for which line, and which lines are dropped."""

import json
import re

import pytest
import zmtp
from hypothesis import example, given
from hypothesis import strategies as st
from peers import Join, line_of, message_of
from processes import Script

import server as server_script

PUBLISHED = {
    "as json.dumps writes it": (b'{"user": "ken", "message": "hello"}', "ken", "hello"),
    "as JSON.stringify writes it": (b'{"user":"ken","message":"hello"}', "ken", "hello"),
    "other order": (b'{"message":"hello","user":"ken"}', "ken", "hello"),
    "more keys": (b'{"user": "k", "a": [1, {}], "message": "m", "n": null}', "k", "m"),
    "more keys at the end": (b'{"user": "k", "message": "m", "n": {"a": [1.5]}}', "k", "m"),
    "space around": (b'\t {"user" : "k","message":"m"}\r ', "k", "m"),
    "line ends between the parts": (b'{\n"user": "k",\r\n"message": "m"\n}\n', "k", "m"),
    "the last of equal keys": (b'{"user": "a", "user": "b", "message": "m"}', "b", "m"),
    "empty strings": (b'{"user": "", "message": ""}', "", ""),
    "an empty user": (b'{"user": "", "message": "m"}', "", "m"),
    "a byte order mark": ('\ufeff{"user": "k", "message": "m"}'.encode(), "k", "m"),
    "accents": ('{"user": "Zoë", "message": "déjà vu"}'.encode(), "Zoë", "déjà vu"),
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

NO_CHAT = 'not a JSON object with "user" and "message", in UTF-8'
TOO_LONG = "too long once its control characters are escaped"

DROPPED = {
    "empty": (b"", NO_CHAT),
    "text": (b"hello", NO_CHAT),
    "cut short": (b'{"user": "ken", "mess', NO_CHAT),
    "two objects": (b'{"user": "k", "message": "m"} {}', NO_CHAT),
    "two lines": (b'{"user": "k", "message": "m"}\n{"user": "k", "message": "m"}', NO_CHAT),
    "an array": (b'["ken", "hello"]', NO_CHAT),
    "a string": (b'"hello"', NO_CHAT),
    "a number": (b"9" * 9_999, NO_CHAT),
    "null": (b"null", NO_CHAT),
    "no user": (b'{"message": "m"}', NO_CHAT),
    "no message": (b'{"user": "k"}', NO_CHAT),
    "user is null": (b'{"user": null, "message": "m"}', NO_CHAT),
    "user is true": (b'{"user": true, "message": "m"}', NO_CHAT),
    "message is an array": (b'{"user": "k", "message": ["m"]}', NO_CHAT),
    "message is an object": (b'{"user": "k", "message": {}}', NO_CHAT),
    "NaN": (b'{"user": "k", "message": "m", "n": NaN}', NO_CHAT),
    "infinity": (b'{"user": "k", "message": -Infinity}', NO_CHAT),
    "nested": (b"[" * 16_384, NO_CHAT),
    "UTF-16": ('{"user": "k", "message": "m"}'.encode("utf-16"), NO_CHAT),
    "UTF-16 without a mark": ('{"user": "k", "message": "m"}'.encode("utf-16-le"), NO_CHAT),
    "two byte order marks": ('\ufeff\ufeff{"user": "k", "message": "m"}'.encode(), NO_CHAT),
    "Latin-1": ('{"user": "Zoë", "message": "m"}'.encode("latin-1"), NO_CHAT),
    "a raw control character": (b'{"user": "k", "message": "\x1b[2J"}', NO_CHAT),
    "a raw tab": (b'{"user": "k", "message": "\t"}', NO_CHAT),
    "a raw line end": (b'{"user": "k", "message": "a\nb"}', NO_CHAT),
    "a space that is none in JSON": ('{"user": "k", "message": "m"}\u00a0'.encode(), NO_CHAT),
    "too many DEL": (b'{"user": "k", "message": "%s"}' % (b"\x7f" * 4_094), TOO_LONG),
    "too many separators": (
        b'{"user": "k", "message": "%s"}' % (b"\xe2\x80\xa8" * 2_729),
        TOO_LONG,
    ),
}

ESCAPED = {
    "escape": ("\x1b[2J", r"\x1b[2J"),
    "colours": ("\x1b[31mred", r"\x1b[31mred"),
    "title and bell": ("\x1b]0;t\x07", r"\x1b]0;t\x07"),
    "line ends": ("a\nken> b\r", r"a\nken> b\r"),
    "backspace and NUL": ("\b\x00", r"\x08\x00"),
    "DEL": ("\x7f", r"\x7f"),
    "C1": ("\x9b2J\x85", r"\x9b2J\x85"),
    "line separators": ("\u2028\u2029", r"\u2028\u2029"),
    "direction overrides": ("\u202a\u202e\u2066\u2069", r"\u202a\u202e\u2066\u2069"),
    "lone surrogates": ("\ud800 \udfff", r"\ud800 \udfff"),
    "marks that are text": ("\u200e\u200f\u200d\u00ad", "\u200e\u200f\u200d\u00ad"),
}

LINES = [line for line, _, _ in PUBLISHED.values()] + [line for line, _ in DROPPED.values()]
SIMPLE = PUBLISHED["as json.dumps writes it"][0]


class Reports(server_script.Log):
    """A log that keeps its reports, and writes nothing."""

    def __init__(self) -> None:
        self.details: list[str] = []

    def report(self, text: str, detail: str = "") -> None:
        assert text == "dropped a line"
        self.details.append(detail)


def messages_of(*lines: bytes) -> tuple[list[bytes], list[str]]:
    """Return the messages of lines that the server receives in one go, and its reports."""
    reports = Reports()
    return server_script.chat_messages(list(lines), reports), reports.details


# For each line that the original works with, the message is the original's; a number is text.


@pytest.mark.parametrize(("line", "user", "message"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_line_is_published(line: bytes, user: str, message: str) -> None:
    assert messages_of(line) == ([message_of(user, message)], [])


TEXT = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "))


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=3),
    TEXT,
    TEXT,
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": ")]),
)
def test_a_line_is_published_as_by_the_original(
    more: dict[str, object],
    user: str,
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


# Lines are received in batches. What is published for one does not depend on its neighbours.


@given(st.lists(st.sampled_from(LINES) | st.binary()))
@example([SIMPLE + b"\n" + SIMPLE, b"hello"])
@example([SIMPLE, SIMPLE + b"\n"])
@example([b'{"user": "a', b'b", "message": "m"}'])
@example(["é".encode()[:1], "é".encode()[1:]])
def test_a_line_is_published_whatever_comes_with_it(lines: list[bytes]) -> None:
    messages: list[bytes] = []
    reports: list[str] = []
    for line in lines:
        published, reported = messages_of(line)
        messages += published
        reports += reported
    assert messages_of(*lines) == (messages, reports)


# Other lines are dropped, and the reason is reported with their first 60 bytes.


@pytest.mark.parametrize(("line", "reason"), DROPPED.values(), ids=DROPPED)
def test_a_line_is_dropped_with_its_reason(line: bytes, reason: str) -> None:
    assert messages_of(line) == ([], [f"{reason}: {line[:60]!r}"])


@given(st.binary() | st.from_regex(rb'\{"user": ?"[^"]*", ?"message": ?"[^"]*"\}'))
def test_every_line_is_published_or_dropped(line: bytes) -> None:
    messages, reports = messages_of(line)
    assert len(messages) + len(reports) == 1


# Characters that a terminal may obey are escaped, except TAB. All other text is left as it is.


@pytest.mark.parametrize(("text", "escaped"), ESCAPED.values(), ids=ESCAPED)
def test_control_characters_are_escaped(text: str, escaped: str) -> None:
    assert messages_of(line_of(text, text)) == ([message_of(escaped, escaped)], [])


@given(st.text(), st.text(), st.booleans())
def test_no_message_has_a_control_character(user: str, message: str, ascii_only: bool) -> None:
    line = json.dumps({"user": user, "message": message}, ensure_ascii=ascii_only)
    for published in messages_of(line.encode(errors="replace"))[0]:
        text = published.decode().replace("\x1b[36m", "", 1).removesuffix("\x1b[0m")
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)


# The same holds of the server as a process, for each peer, and to the byte.


def test_the_server_publishes_in_order_and_drops_the_rest(server: Script, join: Join) -> None:
    peer = join(server.ports, subscribers=2)
    for line, _ in DROPPED.values():
        peer.push.send(line)
        peer.push.send(SIMPLE)
    for line, _, _ in PUBLISHED.values():
        peer.push.send(line)
    expected = [message_of("ken", "hello")] * len(DROPPED)
    expected += [message_of(user, message) for _, user, message in PUBLISHED.values()]
    for sub in peer.subs:
        assert [peer.receive(sub) for _ in expected] == expected
        assert not sub.poll(0)


@pytest.mark.parametrize("dialect", zmtp.DIALECTS)
def test_every_version_of_the_protocol_is_understood(
    server: Script, join: Join, dialect: str
) -> None:
    peer = join(server.ports)
    push, sub = zmtp.speak(server.ports, dialect, SIMPLE)
    frame = zmtp.DIALECTS[dialect][2]
    with push, sub:
        assert peer.receive() == message_of("ken", "hello")
        peer.chat("to all")
        assert zmtp.receive_until_quiet(sub, 0.1)[0].endswith(frame(message_of("k", "to all")))
