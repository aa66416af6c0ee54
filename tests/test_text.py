"""README, "Text": what the client sends of its input, and what it prints of a message."""

import contextlib
import json
import re
import subprocess
from codecs import BOM_UTF8

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peers import BareServer, line_of
from processes import RunClient, Script, Start, close, port_options, python
from terminal import Open

import client
import server as server_script

NOT_JSON = 'the server will drop this line: not a JSON object with "user" and "message"'
TO_TYPE = f"{NOT_JSON} (to just type text, use --user NAME): "
ONE_LINE = f"{NOT_JSON} (write the whole object on one line): "


def received(bare_server: BareServer, script: Script) -> list[bytes]:
    """Return what a client pushes until it ends. Lines that have an echo get it."""
    lines = []
    while script.process.poll() is None:
        if bare_server.pull.poll(10):
            lines.append(bare_server.receive())
            with contextlib.suppress(ValueError, TypeError):
                bare_server.echo(lines[-1])
    return lines + bare_server.receive_all(0.1)


class NoLog(server_script.Log):
    """A log that starts no thread, and forgets its reports."""

    def __init__(self) -> None:
        pass

    def report(self, text: str, detail: str = "") -> None:
        pass


def published(line: bytes) -> list[bytes]:
    """Return what the server publishes for a line: a message, or none."""
    return server_script.chat_messages([line], NoLog())


# Each line that is not empty is sent as it was typed, byte for byte and in order. A byte order mark
# at the start of the input is dropped.

ONE = line_of("k", "1")
SPACED = b'{ "message":"m",  "user":"k", "more": [1e999]} '
LONGEST = b'{"user": "k", "message": "' + b"x" * 16_356 + b'"}'
AS_TYPED = {
    "JSON with spaces": (SPACED + b"\n", [SPACED], 0),
    "CRLF": (ONE + b"\r\n" + SPACED + b"\r\n", [ONE, SPACED], 0),
    "empty lines": (b"\n\r\n" + ONE + b"\n\n", [ONE], 0),
    "no line end": (ONE + b"\n" + SPACED, [ONE, SPACED], 0),
    "a byte order mark": (BOM_UTF8 + ONE + b"\n" + SPACED, [ONE, SPACED], 0),
    "a mark alone": (BOM_UTF8 + b"\n" + ONE, [ONE], 0),
    "a mark before text": (BOM_UTF8 + b"hello\n", [b"hello"], 1),
    "a mark in the second line": (ONE + b"\n" + BOM_UTF8 + ONE, [ONE, BOM_UTF8 + ONE], 0),
    "whole numbers": (b'{"user": 5, "message": 7}', [b'{"user": 5, "message": 7}'], 0),
    "text": (b"hello\n \n" + ONE + b"\n  x  ", [b"hello", b" ", ONE, b"  x  "], 1),
    "broken JSON": (b'{"user": "k"\n}\n' + ONE, [b'{"user": "k"', b"}", ONE], 1),
    "not UTF-8": (b"caf\xe9\n" + ONE + b"\n\xff\xfeh\x00", [b"caf\xe9", ONE, b"\xff\xfeh\x00"], 1),
    "a TAB": (b"a\tb\n\t\n" + ONE, [b"a\tb", b"\t", ONE], 1),
    "control characters": (b"\x1b[2J\x00\x7f\ra\n", [b"\x1b[2J\x00\x7f\ra"], 1),
    "the longest": (LONGEST, [LONGEST], 0),
    "one byte longer": (ONE + b"\n " + LONGEST + b"\n" + SPACED, [ONE, SPACED], 1),
    "the longest text": (b"x" * 16_384, [b"x" * 16_384], 1),
}


@pytest.mark.parametrize(("typed", "lines", "status"), AS_TYPED.values(), ids=AS_TYPED)
def test_a_line_is_sent_as_it_was_typed(
    bare_server: BareServer, start: Start, typed: bytes, lines: list[bytes], status: int
) -> None:
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    script = start("client.py", *port_options(bare_server.ports), **streams)
    close(script, typed)
    assert received(bare_server, script) == lines
    assert script.wait() == status


@given(st.lists(st.binary(max_size=9).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_are_the_same_however_the_input_is_cut(
    lines: list[bytes], data: st.DataObject
) -> None:
    rest = data.draw(st.sampled_from([b"", BOM_UTF8])) + b"".join(line + b"\n" for line in lines)
    expected = [line.removesuffix(b"\r") for line in lines]
    expected[:1] = [line.removeprefix(BOM_UTF8) for line in expected[:1]]
    splitter, found = client.Splitter(), list[bytes]()
    while rest:
        size = data.draw(st.integers(1, 20))
        complete, ended = splitter.feed(rest[:size])
        assert not ended
        found += complete
        rest = rest[size:]
    complete, ended = splitter.feed(b"")
    assert ended
    assert list(filter(None, found + complete)) == list(filter(None, expected))


# With --user, each line becomes the message of a JSON object, with a replacement character for what
# is not UTF-8.

NAMED = {
    "text": ("ken", b"hello", "ken", "hello"),
    "quotes": ('k "q"', b'say "hi" \\ \t', 'k "q"', 'say "hi" \\ \t'),
    "Chinese": ("王", "你好 👋".encode(), "王", "你好 👋"),
    "JSON": ("k", b'{"a": 1}', "k", '{"a": 1}'),
    "not UTF-8": (b"jos\xe9".decode(errors="surrogateescape"), b"caf\xe9", "jos?", "caf\ufffd"),
}


@pytest.mark.parametrize(("name", "typed", "user", "message"), NAMED.values(), ids=NAMED)
def test_a_name_makes_a_line_json(name: str, typed: bytes, user: str, message: str) -> None:
    outbox = client.Outbox(name)
    outbox.add(typed)
    ((frame, echo),) = outbox.lines
    assert json.loads(frame) == {"user": user, "message": message}
    assert echo == hash(client.sanitize(f"{user}> {message}"))


@given(st.binary(), st.text())
def test_with_a_name_every_short_line_has_an_echo(typed: bytes, name: str) -> None:
    outbox = client.Outbox(name)
    outbox.add(typed)
    assert outbox.report() == "1 line may not have been delivered"
    outbox.in_flight = 1
    (message,) = published(outbox.lines[0][0])
    outbox.acknowledge([client.sanitize_message(message)])
    assert outbox.report() == ""


# A line that the server will drop is sent, too, and a notice says why nobody will see it. Only a
# line of more than 16,384 bytes stays back.

ESCAPED_TOO_LONG = json.dumps({"user": "k", "message": "\x85" * 5_000}, ensure_ascii=False).encode()
TOO_LONG = "line not sent: {} bytes, but the server takes 16,384 at most"
PROBLEMS = {
    "text": (b"hello", [], TO_TYPE + "hello"),
    "an array": (b"[1]", [], TO_TYPE + "[1]"),
    "deeply nested": (b"[" * 10_000, [], TO_TYPE + "[" * 80),
    "half an object": (b'{"user": "k",', [], ONE_LINE + '{"user": "k",'),
    "null": (b'{"user": null}', [], ONE_LINE + '{"user": null}'),
    "a control character": (b"\x1b[2J", [], TO_TYPE + r"\x1b[2J"),
    "not UTF-8": (b"caf\xe9", [], "the server will drop this line: not UTF-8: caf\ufffd"),
    "too long once escaped": (
        ESCAPED_TOO_LONG,
        [],
        "the server will drop this line: too long once its control characters are escaped: "
        + client.sanitize(ESCAPED_TOO_LONG[:80].decode(errors="replace")),
    ),
    "too long": (b"x" * 20_000, [], TOO_LONG.format("20,000")),
    "too long, with a name": (b"x" * 20_000, ["--user", "k"], TOO_LONG.format("20,028")),
    "much too long": (b"x" * 3_000_000, [], None),
}


@pytest.mark.parametrize(("typed", "options", "notice"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_line_that_nobody_will_see_is_reported(
    server: Script, run_client: RunClient, typed: bytes, options: list[str], notice: str | None
) -> None:
    first, last = (b"1", b"2") if options else (ONE, line_of("k", "2"))
    done = run_client(server.ports, b"\n".join((first, typed, last)), *options)
    assert done.stdout == b"k> 1\nk> 2\n"
    problem, report = done.stderr.decode().splitlines()
    if notice:
        assert problem == f"client.py: {notice}"
    else:
        assert re.search(r"not sent: 1,0\d\d,\d{3} bytes or more, but ", problem)
    assert report == "client.py: 1 line may not have been delivered"
    assert done.returncode == 1


def test_in_a_pipe_only_the_first_line_of_a_kind_is_reported(
    server: Script, run_client: RunClient
) -> None:
    done = run_client(server.ports, b"hello\n[]\nhello\n%s\n" % (b"x" * 20_000) * 100)
    assert done.stderr.decode().splitlines() == [
        f"client.py: {TO_TYPE}hello",
        f"client.py: {TOO_LONG.format('20,000')}",
        "client.py: 400 lines may not have been delivered",
    ]
    assert done.returncode == 1


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_on_a_terminal_each_of_them_is_reported(
    bare_server: BareServer, open_terminal: Open, term: str
) -> None:
    command = python("client.py", *port_options(bare_server.ports))
    terminal = open_terminal(*command, environment={"TERM": term}, columns=200)
    terminal.wait_text("client.py:connectedtolocalhost")
    for text in ("hello", "[]"):
        terminal.type(f"{text}\r")
        terminal.wait_text(re.escape(f"client.py: {TO_TYPE}{text}".replace(" ", "")))
        assert bare_server.receive() == text.encode()


def test_input_that_is_not_utf_8_is_reported_once(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, b"caf\xe9\nna\xefve\nplain\n", "--user", "k")
    assert done.stdout.decode() == "k> caf\ufffd\nk> na\ufffdve\nk> plain\n"
    assert done.stderr.decode() == "client.py: not UTF-8: invalid bytes are sent as \ufffd\n"
    assert done.returncode == 0


# A TAB and all other text reaches whoever reads it. A number as user or message is text.

SHOWN = {
    "a TAB": (b'{"user": "k", "message": "a\\tb"}', "k> a\tb"),
    "numbers": (b'{"user": 5, "message": -1.50e999}', "5> -1.50e999"),
    "a BOM": (BOM_UTF8 + ONE, "k> 1"),
    "colours": (b'{"user": "k", "message": "\\u001b[31mred"}', r"k> \x1b[31mred"),
    "controls": (b'{"user": "k\\n", "message": "\\u009b2J\\u202e"}', r"k\n> \x9b2J\u202e"),
    "surrogates": (b'{"user": "k", "message": "\\ud800"}', r"k> \ud800"),
    "joiners": (
        '{"user": "k", "message": "👨‍👩‍👧 می‌خواهم"}'.encode(),
        "k> 👨‍👩‍👧 می‌خواهم",
    ),
}


@pytest.mark.parametrize(("line", "shown"), SHOWN.values(), ids=SHOWN)
def test_text_reaches_the_reader(
    server: Script, run_client: RunClient, line: bytes, shown: str
) -> None:
    done = run_client(server.ports, line)
    assert (done.stdout.decode(), done.stderr, done.returncode) == (shown + "\n", b"", 0)


# The client knows each echo in advance: its text, without colours, is what the server publishes.

JSON_LINES = st.fixed_dictionaries(
    {"user": st.text() | st.integers(), "message": st.text() | st.floats() | st.none()},
    optional={"more": st.lists(st.text())},
).map(lambda payload: json.dumps(payload, ensure_ascii=False).encode(errors="replace"))


@given(
    JSON_LINES
    | st.binary()
    | st.from_regex(rb'\A\{"user": ?"[^"]*", ?"message": ?"[^"]*"\}\Z')
    | st.integers(4_080, 4_100).map(lambda count: b'{"user":1,"message":"%s"}' % (b"\x7f" * count))
)
def test_the_echo_to_wait_for_is_what_the_server_publishes(line: bytes) -> None:
    try:
        expected = [client.echo_of(line)]
    except ValueError:
        expected = []
    assert [client.sanitize_message(message)[0] for message in published(line)] == expected


# A message may colour its text. Every other control character but TAB is printed as an escape, and
# colours end with the message.

FRAMES = {  # what a server publishes, what is printed without colours, and what with them
    "message": (b"ken> \x1b[36mhello\x1b[0m", "ken> hello", "ken> \x1b[36mhello\x1b[0m"),
    "no colour": (b"12:01 ken: hi", "12:01 ken: hi", "12:01 ken: hi"),
    "other colours": (b"a\x1b[1;31mb\x1b[0m", "ab", "a\x1b[1;31mb\x1b[0m"),
    "colour left on": (b"\x1b[31mred", "red", "\x1b[31mred\x1b[0m"),
    "colour ended in another way": (b"\x1b[31mred\x1b[m", "red", "\x1b[31mred\x1b[m\x1b[0m"),
    "colons": (b"\x1b[38:5:9mred\x1b[0m", "red", "\x1b[38:5:9mred\x1b[0m"),
    "a TAB": (b"a\t\x1b[36mb\x1b[0m", "a\tb", "a\t\x1b[36mb\x1b[0m"),
    "title": (b"\x1b]0;t\x07", r"\x1b]0;t\x07", r"\x1b]0;t\x07"),
    "clipboard": (b"\x1b]52;c;aGk=\x1b\\", r"\x1b]52;c;aGk=\x1b" "\\", None),
    "cursor": (b"\x1b[2A", r"\x1b[2A", None),
    "clear": (b"\x1b[2J\x1b[H", r"\x1b[2J\x1b[H", None),
    "mode": (b"\x1b[?1049h\x1bc", r"\x1b[?1049h\x1bc", None),
    "key mode like a colour": (b"\x1b[>4;2m", r"\x1b[>4;2m", None),
    "report": (b"\x1b[6n\x05", r"\x1b[6n\x05", None),
    "C1": ("\x9b2J\x85".encode(), r"\x9b2J\x85", None),
    "carriage return": (b"ken> hi\rann> ho", r"ken> hi\rann> ho", None),
    "second line": (b"ken> hi\nann> ho", r"ken> hi\nann> ho", None),
    "line separator": ("a\u2028b".encode(), r"a\u2028b", None),
    "override": ("\u202eabc\u2066".encode(), r"\u202eabc\u2066", None),
    "among colours": (b"\x1b[36m\x07\x1b[0m", r"\x07", "\x1b[36m\\x07\x1b[0m"),
    "colour within a sequence": (b"\x1b\x1b[36m[2J\x1b[0m", r"\x1b[2J", "\\x1b\x1b[36m[2J\x1b[0m"),
    "split colour": (b"\x1b[3\x1b[0m6m", r"\x1b[36m", None),
    "not UTF-8": (b"a\xff\x80b", "a\ufffd\ufffdb", "a\ufffd\ufffdb"),
    "a surrogate": (b"\xed\xa0\x80", "\ufffd" * 3, "\ufffd" * 3),
    "joiners": ("👨‍👩‍👧 می‌خواهم".encode(), "👨‍👩‍👧 می‌خواهم", "👨‍👩‍👧 می‌خواهم"),
    "nothing": (b"", "", ""),
}


@pytest.mark.parametrize(("frame", "uncoloured", "coloured"), FRAMES.values(), ids=FRAMES)
def test_a_message_is_only_text(frame: bytes, uncoloured: str, coloured: str | None) -> None:
    shown = client.sanitize_message(frame)
    assert shown[0] == uncoloured
    if coloured is not None:
        assert shown[1] == coloured


@given(st.binary() | st.text(st.sampled_from("\x1b[;0123m36]?hA\x07\n\t\u009b x")).map(str.encode))
def test_no_message_does_more_than_colour(frame: bytes) -> None:
    uncoloured, coloured = client.sanitize_message(frame)
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", uncoloured)
    assert re.sub(r"\x1b\[[0-9;:]*m", "", coloured) == uncoloured
    assert "\x1b" not in coloured or coloured.endswith("\x1b[0m")
