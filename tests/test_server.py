"""The server: its loop over inproc, and the script as a process over tcp."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from conftest import TIMEOUT, Peer, RunClient, Script, Start, free_port, wait_for
from hypothesis import example, given
from hypothesis import strategies as st

import server as server_script

PLAIN = str(Path(__file__).with_name("plain.py"))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

GOOD = {
    "plain": (b'{"user": "ken", "message": "hello"}', "ken", "hello"),
    "other order": (b'{"message":"hello","user":"ken"}', "ken", "hello"),
    "more keys": (b'{"user": "k", "a": [1, {}], "message": "m", "n": null}', "k", "m"),
    "space around": (b'\t {"user" : "k","message":"m"}\r\n ', "k", "m"),
    "last key counts": (b'{"user": "a", "user": "b", "message": "m"}', "b", "m"),
    "empty strings": (b'{"user": "", "message": ""}', "", ""),
    "accents": ('{"user": "Zoë", "message": "déjà vu"}'.encode(), "Zoë", "déjà vu"),
    "cjk": ('{"user": "王", "message": "你好，世界"}'.encode(), "王", "你好，世界"),
    "escapes": (rb'{"user": "\u738b", "message": "\ud83d\ude00 \"\\\/"}', "王", '😀 "\\/'),
    "emoji joiners": ('{"user": "k", "message": "👨‍👩‍👧 ❤️"}'.encode(), "k", "👨‍👩‍👧 ❤️"),
    "persian joiner": ('{"user": "k", "message": "می‌خواهم"}'.encode(), "k", "می‌خواهم"),
    "no-break spaces": (rb'{"user": "k", "message": "a\u00a0b\u202fc"}', "k", "a\u00a0b\u202fc"),
    "long number": (b'{"user": "k", "message": "m", "n": %s}' % (b"9" * 9_999), "k", "m"),
    "longest": (b'{"user":"k","message":"%s"}' % (b"x" * 16_359), "k", "x" * 16_359),
    "longest not ASCII": (
        ('{"user":"k","message":"%s"}' % ("é" * 8_179)).encode(),
        "k",
        "é" * 8_179,
    ),
    "longest once shown": (
        b'{"user":"k","message":"%s"}' % (b"\x7f" * 4_093),
        "k",
        r"\x7f" * 4_093,
    ),
}

NO_CHAT = 'not a JSON object with the strings "user" and "message", in UTF-8'
TOO_LONG = "too long when its control characters are shown"

BAD = {
    "empty": (b"", NO_CHAT),
    "text": (b"hello", NO_CHAT),
    "truncated": (b'{"user": "ken", "mess', NO_CHAT),
    "two objects": (b'{"user": "k", "message": "m"} {}', NO_CHAT),
    "array": (b'["ken", "hello"]', NO_CHAT),
    "string": (b'"hello"', NO_CHAT),
    "huge number": (b"9" * 9_999, NO_CHAT),
    "null": (b"null", NO_CHAT),
    "no user": (b'{"message": "m"}', NO_CHAT),
    "no message": (b'{"user": "k"}', NO_CHAT),
    "user a number": (b'{"user": 1, "message": "m"}', NO_CHAT),
    "message a huge number": (b'{"user": "k", "message": 1e999}', NO_CHAT),
    "not a number": (b'{"user": "k", "message": "m", "n": NaN}', NO_CHAT),
    "infinity": (b'{"user": "k", "message": "m", "n": -Infinity}', NO_CHAT),
    "message an array": (b'{"user": "k", "message": ["m"]}', NO_CHAT),
    "nested": (b"[" * 16_384, NO_CHAT),
    "utf-16": ('{"user": "k", "message": "m"}'.encode("utf-16"), NO_CHAT),
    "utf-16 without a mark": ('{"user": "k", "message": "m"}'.encode("utf-16-le"), NO_CHAT),
    "byte order mark": ('\ufeff{"user": "k", "message": "m"}'.encode(), NO_CHAT),
    "latin-1": ('{"user": "Zoë", "message": "m"}'.encode("latin-1"), NO_CHAT),
    "raw control": (b'{"user": "k", "message": "\x1b[2J"}', NO_CHAT),
    "other spaces": ('{"user": "k", "message": "m"}\u00a0'.encode(), NO_CHAT),
    "control characters": (b'{"user": "k", "message": "%s"}' % (b"\x7f" * 4_094), TOO_LONG),
    "line separators": (
        b'{"user": "k", "message": "%s"}' % (b"\xe2\x80\xa8" * 2_729),
        TOO_LONG,
    ),
}

SHOWN = {
    "escape": ("\x1b[2J", r"\x1b[2J"),
    "colours too": ("\x1b[31mred", r"\x1b[31mred"),
    "title and bell": ("\x1b]0;t\x07", r"\x1b]0;t\x07"),
    "line ends": ("a\nken> b\r", r"a\nken> b\r"),
    "tab, backspace, nul": ("\t\b\x00", r"\t\x08\x00"),
    "DEL": ("\x7f", r"\x7f"),
    "C1": ("\x9b2J\x85", r"\x9b2J\x85"),
    "line separators": ("\u2028\u2029", r"\u2028\u2029"),
    "overrides": ("\u202a\u202e\u2066\u2069", r"\u202a\u202e\u2066\u2069"),
    "lone surrogates": ("\ud800 \udfff", r"\ud800 \udfff"),
    "marks that are text": ("\u200e\u200f\u200d\u00ad", "\u200e\u200f\u200d\u00ad"),
}


def published(user: str, message: str) -> bytes:
    """Return what goes over the wire, written out."""
    return f"{user}> \x1b[36m{message}\x1b[0m".encode()


def chat_body(message: object) -> bytes:
    """Return a body by the user k."""
    return json.dumps({"user": "k", "message": message}).encode()


@pytest.fixture
def serving(
    context: zmq.Context[zmq.Socket[bytes]],
) -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes], Callable[[], None]]]:
    """Run the server's loop over inproc; give a PUSH, a SUB, and a function that ends the loop."""
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    pull.set(zmq.RCVTIMEO, 100)
    pub.set(zmq.XPUB_NODROP, 1)
    pull.bind("inproc://pull")
    pub.bind("inproc://pub")
    push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    push.connect("inproc://pull")
    sub.connect("inproc://pub")
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    ending = server_script.Ending()
    thread = threading.Thread(target=server_script.serve, args=(pull, pub, ending))
    thread.start()

    def end() -> None:
        ending.at = min(ending.at, time.monotonic() + 0.5)
        thread.join(TIMEOUT)
        assert not thread.is_alive()

    yield push, sub, end
    end()


def test_the_loop_publishes_each_good_body(
    serving: tuple[zmq.Socket[bytes], zmq.Socket[bytes], Callable[[], None]],
) -> None:
    push, sub, _ = serving
    for body, user, message in GOOD.values():
        push.send(body)
        assert sub.poll(TIMEOUT * 1_000)
        assert sub.recv() == published(user, message)


def test_the_loop_publishes_what_had_arrived_when_it_is_to_end(
    serving: tuple[zmq.Socket[bytes], zmq.Socket[bytes], Callable[[], None]],
) -> None:
    push, sub, end = serving
    for number in range(900):
        push.send(chat_body(str(number)))
    end()
    assert [sub.recv(zmq.NOBLOCK) for _ in range(900)] == [
        published("k", str(number)) for number in range(900)
    ]


@pytest.mark.parametrize(("body", "user", "message"), GOOD.values(), ids=GOOD)
def test_a_good_body_is_published(body: bytes, user: str, message: str) -> None:
    assert server_script.chat_line(body) == published(user, message)


PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E))


@given(PRINTABLE, PRINTABLE, st.sampled_from([(",", ":"), (", ", ": ")]))
def test_printable_text_is_published_untouched(
    user: str, message: str, separators: tuple[str, str]
) -> None:
    body = json.dumps({"user": user, "message": message}, separators=separators).encode()
    assert server_script.chat_line(body) == published(user, message)
    for found in server_script.plain_lines([body]) + server_script.plain_lines([body, body]):
        assert found in (b"", published(user, message))


BODIES = [body for body, _, _ in GOOD.values()] + [body for body, _ in BAD.values()]
ONE = GOOD["plain"][0]


@given(st.lists(st.sampled_from(BODIES) | st.binary()))
@example([ONE + b"\n" + ONE, b"hello"])
@example([ONE + b"\n"])
def test_what_is_found_in_many_bodies_is_what_each_of_them_comes_to(bodies: list[bytes]) -> None:
    for body, plain in zip(bodies, server_script.plain_lines(bodies), strict=True):
        assert plain in (b"", chat_line_or_nothing(body))


def chat_line_or_nothing(body: bytes) -> bytes:
    """Return what subscribers see of a body, if it is a chat line."""
    try:
        return server_script.chat_line(body)
    except ValueError:
        return b""


def test_plain_bodies_are_found_among_others() -> None:
    bodies = [ONE, b"hello", GOOD["accents"][0], ONE]
    plain = published("ken", "hello")
    assert server_script.plain_lines(bodies) == [plain, b"", b"", plain]


@pytest.mark.parametrize(("body", "reason"), BAD.values(), ids=BAD)
def test_a_bad_body_is_refused_with_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        server_script.chat_line(body)


@pytest.mark.parametrize(("text", "shown"), SHOWN.values(), ids=SHOWN)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    body = json.dumps({"user": text, "message": text}).encode()
    assert server_script.chat_line(body) == published(shown, shown)


@given(st.text(), st.text())
def test_no_text_can_do_harm(user: str, message: str) -> None:
    line = server_script.chat_line(json.dumps({"user": user, "message": message}).encode()).decode()
    assert not re.search(
        r"[\x00-\x1f\x7f-\x9f]", line.replace("\x1b[36m", "").replace("\x1b[0m", "")
    )
    if user.isprintable() and message.isprintable():
        assert line == f"{user}> \x1b[36m{message}\x1b[0m"


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
    st.text(st.characters(exclude_categories=["C", "Z"])),
    st.text(st.characters(exclude_categories=["C", "Z"])),
    st.booleans(),
)
def test_valid_payloads_are_published_as_by_the_original(
    more: dict[str, object], user: str, message: str, ascii_only: bool
) -> None:
    """The original's own expression, on whatever payload it takes."""
    body = json.dumps(more | {"user": user, "message": message}, ensure_ascii=ascii_only).encode()
    payload = json.loads(body)
    original = f"{payload['user']}> \x1b[36m{payload['message']}\x1b[0m".encode()
    assert server_script.chat_line(body) == original


@pytest.mark.parametrize("taken", ["pull", "pub"])
def test_an_endpoint_in_use_is_named(start: Start, taken: str) -> None:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        in_use, free = sock.getsockname()[1], free_port()
        ports = {"pull": in_use, "pub": free} if taken == "pull" else {"pull": free, "pub": in_use}
        script = start("server.py", "--pull-port", ports["pull"], "--pub-port", ports["pub"])
        assert script.wait() == 1
    problem = f"Address already in use (addr='tcp://*:{in_use}')"
    assert script.said == f"server.py: {problem}; see --help\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0", free))  # nothing was left bound


@pytest.mark.parametrize(
    "options",
    [["--pull-port", "many"], ["--pub-port", "65536"], ["--pull-port", "-1"], ["--nosuch"], ["x"]],
)
def test_wrong_usage_is_status_2(start: Start, options: list[str]) -> None:
    assert start("server.py", *options).wait() == 2


def test_an_address_that_is_none_is_status_1(start: Start) -> None:
    script = start("server.py", "--bind", "no.such.interface", "--pull-port", 0)
    assert script.wait() == 1
    assert "tcp://no.such.interface:0" in script.said
    assert script.said.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "host"),
    [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost"), ("::1", "::1"), ("::1", "[::1]")],
)
def test_it_listens_where_it_is_told(
    start: Start, run_client: RunClient, address: str, host: str
) -> None:
    script = start("server.py", "--bind", address, "--pull-port", 0, "--pub-port", 0)
    heard = script.wait_said(r"PULL listens on tcp://\S+:(\d+), PUB on tcp://\S+:(\d+)\n")
    echoed = run_client((int(heard[1]), int(heard[2])), chat_body("hi"), host)
    assert (echoed.stdout, echoed.returncode) == (b"k> hi\n", 0)


def test_clients_find_a_server_that_was_started_again(
    start_server: Callable[..., Script], join: Callable[..., Peer]
) -> None:
    first = start_server()
    peer = join(first.ports)
    first.process.kill()
    first.wait()
    start_server(*first.ports)

    def back() -> bool:
        peer.push.send(chat_body("back"))
        return bool(peer.sub.poll(50))

    wait_for(back, lambda: "no server found")
    assert peer.receive() == published("k", "back")


def test_the_plain_client_talks_to_this_server(server: Script, join: Callable[..., Peer]) -> None:
    peer = join(server.ports)
    plain = subprocess.run(
        [sys.executable, PLAIN, "client", *map(str, server.ports)],
        input=b"".join(body.strip() + b"\n" for body, _, _ in GOOD.values()),
        timeout=TIMEOUT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert plain.returncode == 0
    assert [peer.receive() for _ in GOOD] == [
        published(user, message) for _, user, message in GOOD.values()
    ]
