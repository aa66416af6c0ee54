"""README, "The wire", "Delivery in detail": what the client makes of its input and of messages."""

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

DROPPED = "the server will drop this line: "
NOT_JSON = DROPPED + 'not a JSON object with "user" and "message"'
TO_TYPE = f"{NOT_JSON} (to just type text, use --user NAME): "
ONE_LINE = f"{NOT_JSON} (write the whole object on one line): "
TOO_LONG = "line not sent: {} bytes, but the server takes 16,384 at most"


class NoLog(server_script.Log):
    """A log that starts no thread, and forgets its reports."""

    def __init__(self) -> None:
        pass

    def report(self, text: str, detail: str = "") -> None:
        pass


def published(line: bytes) -> list[bytes]:
    """Return what the server publishes for a line: a message, or none."""
    return server_script.chat_messages([line], NoLog())


def split(*parts: bytes) -> list[bytes]:
    """Return the lines of an input that comes in parts."""
    splitter = client.Splitter()
    return [line for part in (*parts, b"") for line in splitter.feed(part)[0] if line]


# README, Differences from the original: Without `--user`, the client sends the same bytes as the
# original.
# README, Delivery in detail: Empty lines are not sent.

ONE = line_of("k", "1")
SPACED = b'{ "message":"m",  "user":"k", "more": [1e999]} '
LONGEST = b'{"user": "k", "message": "' + b"x" * 16_356 + b'"}'
AS_TYPED = {  # the input, and the lines that are sent
    "JSON with spaces": (SPACED + b"\n", [SPACED]),
    "CRLF": (ONE + b"\r\n" + SPACED + b"\r\n", [ONE, SPACED]),
    "empty lines": (b"\n\r\n" + ONE + b"\n\n", [ONE]),
    "no line end": (ONE + b"\n" + SPACED, [ONE, SPACED]),
    "broken JSON": (b'{"user": "k"\n}\n' + ONE, [b'{"user": "k"', b"}", ONE]),
    "not UTF-8": (b"caf\xe9\n" + ONE + b"\n\xff\xfeh\x00", [b"caf\xe9", ONE, b"\xff\xfeh\x00"]),
    "spaces and TABs": (b"a\tb\n\t\n  x  ", [b"a\tb", b"\t", b"  x  "]),
    "control characters": (b"\x1b[2J\x00\x7f\ra\n", [b"\x1b[2J\x00\x7f\ra"]),
    "the longest": (LONGEST, [LONGEST]),
    "one byte longer": (ONE + b"\n " + LONGEST + b"\n" + SPACED, [ONE, SPACED]),
    "the longest text": (b"x" * 16_384, [b"x" * 16_384]),
    "a mark alone": (BOM_UTF8 + b"\n" + ONE, [ONE]),
    "a mark in the second line": (ONE + b"\n" + BOM_UTF8 + ONE, [ONE, BOM_UTF8 + ONE]),
}


@pytest.mark.parametrize(("typed", "lines"), AS_TYPED.values(), ids=AS_TYPED)
def test_a_line_is_sent_as_it_was_typed(typed: bytes, lines: list[bytes]) -> None:
    outbox = client.Outbox(None)
    for line in split(typed):
        outbox.add(line)
    assert [line.frame for line in outbox.queued] == lines


# README, Delivery in detail: A byte order mark at the start of the input is dropped.
# README, Differences from the original: | sent with the first line | dropped |


@given(st.lists(st.binary(max_size=9).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_are_the_same_however_the_input_is_cut(
    lines: list[bytes], data: st.DataObject
) -> None:
    rest = data.draw(st.sampled_from([b"", BOM_UTF8])) + b"".join(line + b"\n" for line in lines)
    parts = []
    while rest:
        size = data.draw(st.integers(1, 20))
        parts.append(rest[:size])
        rest = rest[size:]
    expected = [line.removesuffix(b"\r") for line in lines]
    expected[:1] = [line.removeprefix(BOM_UTF8) for line in expected[:1]]
    assert split(*parts) == list(filter(None, expected))


# README, Delivery in detail: Input that is not UTF-8 is reported once; with `--user`, its invalid
# bytes are sent as `�`.


def test_input_that_is_not_utf_8_is_reported_once(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, b"caf\xe9\nna\xefve\nplain\n", "--user", "k")
    assert done.stdout.decode() == "k> caf\ufffd\nk> na\ufffdve\nk> plain\n"
    assert done.stderr.decode() == "client.py: not UTF-8: invalid bytes are sent as \ufffd\n"
    assert done.returncode == 0


# README, What it adds to the original: You type text, not JSON
# README, Options: send each line as `{"user": NAME, "message": line}`

NAMED = {
    "text": ("ken", b"hello", "ken", "hello"),
    "quotes": ('k "q"', b'say "hi" \\ \t', 'k "q"', 'say "hi" \\ \t'),
    "Chinese": ("王", "你好 👋".encode(), "王", "你好 👋"),
    "JSON": ("k", b'{"a": 1}', "k", '{"a": 1}'),
    "not UTF-8": ("jos\udce9", b"caf\xe9", "jos?", "caf\ufffd"),
}


@pytest.mark.parametrize(("name", "typed", "user", "message"), NAMED.values(), ids=NAMED)
def test_a_name_makes_a_line_json(name: str, typed: bytes, user: str, message: str) -> None:
    outbox = client.Outbox(name)
    outbox.add(typed)
    (line,) = outbox.queued
    assert json.loads(line.frame) == {"user": user, "message": message}
    assert line.echo_hash == hash(client.sanitize(f"{user}> {message}"))


@given(st.binary(), st.text())
def test_with_a_name_every_short_line_has_an_echo(typed: bytes, name: str) -> None:
    outbox = client.Outbox(name)
    outbox.add(typed)
    assert outbox.report() == "1 line may not have been delivered"
    outbox.in_flight.append(outbox.queued.popleft())
    (message,) = published(outbox.in_flight[0].frame)
    outbox.acknowledge([client.sanitize_message(message)])
    assert outbox.report() == ""


# README, Delivery in detail: A line that this server would drop is sent anyway, unless it is too
# long, since another server may accept it. A notice says why this server would drop it: on a
# terminal for each such line, from a pipe only for the first.

TOO_LONG_ESCAPED = '{"user": "k", "message": "%s"}' % ("\x85" * 5_000)
PROBLEMS = {
    "text": (b"hello", TO_TYPE + "hello"),
    "an array": (b"[1]", TO_TYPE + "[1]"),
    "deeply nested": (b"[" * 10_000, TO_TYPE + "[" * 80),
    "half an object": (b'{"user": "k",', ONE_LINE + '{"user": "k",'),
    "null": (b'{"user": null}', ONE_LINE + '{"user": null}'),
    "a control character": (b"\x1b[2J", TO_TYPE + r"\x1b[2J"),
    "not UTF-8": (b"caf\xe9", DROPPED + "not UTF-8: caf\ufffd"),
    "too long once escaped": (
        TOO_LONG_ESCAPED.encode(),
        f"{DROPPED}too long once its control characters are escaped: "
        f"{client.sanitize(TOO_LONG_ESCAPED[:53])}",
    ),
}


@pytest.mark.parametrize(("typed", "notice"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_line_that_the_server_will_drop_is_reported(
    capsys: pytest.CaptureFixture[str], typed: bytes, notice: str
) -> None:
    outbox = client.Outbox(None)
    problem = outbox.add(typed)
    assert problem
    client.Screen("never").print_problem(problem)
    assert capsys.readouterr().err == f"client.py: {notice}\n"
    assert outbox.report() == "1 line may not have been delivered"
    assert published(typed) == []


def test_in_a_pipe_only_the_first_line_of_a_kind_is_reported(
    server: Script, run_client: RunClient
) -> None:
    pipe = b"hello\n[]\ncaf\xe9\n%s\n%s\n" % (ONE, b"x" * 20_000) * 100
    done = run_client(server.ports, pipe)
    assert done.stdout == b"k> 1\n" * 100
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


def test_lines_that_will_be_dropped_are_sent_in_their_turn(
    bare_server: BareServer, start: Start
) -> None:
    """As to a server that takes plain text. When the client ends, this one is still behind."""
    script = start("client.py", *port_options(bare_server.ports), stdin=subprocess.PIPE)
    texts = [b"%d %s" % (number, b"x" * 16_000) for number in range(1_500)]
    close(script, b"\n".join(texts))
    assert [bare_server.receive() for _ in texts] == texts
    assert bare_server.receive_all(0.1) == []
    assert script.wait() == 1
    assert script.stderr.endswith("client.py: 1,500 lines may not have been delivered\n")


# README, Differences from the original: the client prints a notice instead of sending it

LONG = {
    "text": (None, b"x" * 16_385, "16,385"),
    "with a name": ("k", b"x" * 20_000, "20,028"),
    "very long": (None, b"x" * 1_000_000, "1,000,000 bytes or more"),
}


@pytest.mark.parametrize(("user", "typed", "size"), LONG.values(), ids=LONG)
def test_a_line_that_is_too_long_is_not_sent(user: str | None, typed: bytes, size: str) -> None:
    outbox = client.Outbox(user)
    problem = outbox.add(typed)
    assert problem
    assert ": ".join(problem) == TOO_LONG.format(size).replace("more bytes", "more")
    assert not outbox.queued
    assert outbox.report() == "1 line may not have been delivered"


# README, The wire: All other text passes unchanged, including joined emoji.

SHOWN = {  # a line, and what a client in a pipe prints
    b'{"user": "k", "message": "a\\tb"}': "k> a\tb",
    b'{"user": 5, "message": -1.50e999}': "5> -1.50e999",
    b'{"user": "k", "message": "\\u001b[31mred"}': r"k> \x1b[31mred",
    b'{"user": "k\\n", "message": "\\u009b2J\\u202e"}': r"k\n> \x9b2J\u202e",
    b'{"user": "k", "message": "\\ud800"}': r"k> \ud800",
    '{"user": "k", "message": "👨‍👩‍👧 می‌خواهم"}'.encode(): "k> 👨‍👩‍👧 می‌خواهم",
}


def test_text_reaches_the_reader(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, BOM_UTF8 + b"\n".join(SHOWN))
    assert done.stdout.decode() == "".join(f"{text}\n" for text in SHOWN.values())
    assert (done.stderr, done.returncode) == (b"", 0)


# README, How it works: The sender's own copy is the *echo* of its line.

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


# README, Differences from the original: the client escapes them, too (all but colors and TAB), in
# case it talks to another server

FRAMES = {  # what a server publishes, what is printed without colours, and what with them
    "message": (b"ken> \x1b[36mhello\x1b[0m", "ken> hello", "ken> \x1b[36mhello\x1b[0m"),
    "other colours": (b"a\x1b[1;31mb\x1b[0m", "ab", "a\x1b[1;31mb\x1b[0m"),
    "colour left on": (b"\x1b[31mred", "red", "\x1b[31mred\x1b[0m"),
    "colour ended in another way": (b"\x1b[31mred\x1b[m", "red", "\x1b[31mred\x1b[m\x1b[0m"),
    "colons": (b"\x1b[38:5:9mred\x1b[0m", "red", "\x1b[38:5:9mred\x1b[0m"),
    "a TAB": (b"a\t\x1b[36mb\x1b[0m", "a\tb", "a\t\x1b[36mb\x1b[0m"),
    "among colours": (b"\x1b[36m\x07\x1b[0m", r"\x07", "\x1b[36m\\x07\x1b[0m"),
    "colour within a sequence": (b"\x1b\x1b[36m[2J\x1b[0m", r"\x1b[2J", "\\x1b\x1b[36m[2J\x1b[0m"),
    "split colour": (b"\x1b[3\x1b[0m6m", r"\x1b[36m", "\\x1b[3\x1b[0m6m\x1b[0m"),
}
UNCOLOURED = {  # what a server publishes, and what is printed
    "text": (b"12:01 ken: hi", "12:01 ken: hi"),
    "title": (b"\x1b]0;t\x07", r"\x1b]0;t\x07"),
    "clipboard": (b"\x1b]52;c;aGk=\x1b\\", r"\x1b]52;c;aGk=\x1b" "\\"),
    "clear": (b"\x1b[2J\x1b[H\x1b[2A", r"\x1b[2J\x1b[H\x1b[2A"),
    "mode": (b"\x1b[?1049h\x1bc", r"\x1b[?1049h\x1bc"),
    "key mode like a colour": (b"\x1b[>4;2m", r"\x1b[>4;2m"),
    "report": (b"\x1b[6n\x05", r"\x1b[6n\x05"),
    "C1": ("\x9b2J\x85".encode(), r"\x9b2J\x85"),
    "line ends": (b"ken> hi\rann> ho\n", r"ken> hi\rann> ho\n"),
    "line separator": ("a\u2028b".encode(), r"a\u2028b"),
    "override": ("\u202eabc\u2066".encode(), r"\u202eabc\u2066"),
    "not UTF-8": (b"a\xff\x80b", "a\ufffd\ufffdb"),
    "a surrogate": (b"\xed\xa0\x80", "\ufffd" * 3),
    "joiners": ("👨‍👩‍👧 می‌خواهم".encode(), "👨‍👩‍👧 می‌خواهم"),
    "nothing": (b"", ""),
}
FRAMES |= {name: (frame, text, text) for name, (frame, text) in UNCOLOURED.items()}


@pytest.mark.parametrize(("frame", "uncoloured", "coloured"), FRAMES.values(), ids=FRAMES)
def test_a_message_is_only_text(frame: bytes, uncoloured: str, coloured: str) -> None:
    assert client.sanitize_message(frame) == (uncoloured, coloured)


@given(st.binary() | st.text(st.sampled_from("\x1b[;0123m36]?hA\x07\n\t\u009b x")).map(str.encode))
def test_no_message_does_more_than_colour(frame: bytes) -> None:
    uncoloured, coloured = client.sanitize_message(frame)
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", uncoloured)
    assert re.sub(r"\x1b\[[0-9;:]*m", "", coloured) == uncoloured
    assert "\x1b" not in coloured or coloured.endswith("\x1b[0m")
