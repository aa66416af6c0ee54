"""The client in a pipe: its parts, its loop over inproc, and the script as a process over tcp."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from bare import BareServer, body_of, close, read_all, read_line, two_people_chat, write
from conftest import (
    NO_SERVER,
    TIMEOUT,
    RunClient,
    Script,
    Start,
    free_port,
    port_options,
)
from hypothesis import given
from hypothesis import strategies as st

import client
import server as server_script

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FRAMES = {
    "message": (b"ken> \x1b[36mhello\x1b[0m", "ken> hello", "ken> \x1b[36mhello\x1b[0m"),
    "no colour": (b"hello", "hello", "hello"),
    "other colours": (b"a\x1b[1;31mb\x1b[0m", "ab", "a\x1b[1;31mb\x1b[0m"),
    "colour left on": (b"\x1b[31mred", "red", "\x1b[31mred\x1b[0m"),
    "much for a colour": (b"\x1b[" + b"1;" * 25 + b"m", r"\x1b[" + "1;" * 25 + "m", None),
    "colons": (b"\x1b[38:5:9mred\x1b[0m", "red", "\x1b[38:5:9mred\x1b[0m"),
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
    "override": ("\u202eabc".encode(), r"\u202eabc", None),
    "among colours": (b"\x1b[36m\x07\x1b[0m", r"\x07", "\x1b[36m\\x07\x1b[0m"),
    "colour within a sequence": (b"\x1b\x1b[36m[2J\x1b[0m", r"\x1b[2J", "\\x1b\x1b[36m[2J\x1b[0m"),
    "split colour": (b"\x1b[3\x1b[0m6m", r"\x1b[36m", None),
    "not utf-8": (b"a\xff\x80b", "a\ufffd\ufffdb", "a\ufffd\ufffdb"),
    "joiners": ("👨‍👩‍👧 می‌خواهم".encode(), "👨‍👩‍👧 می‌خواهم", "👨‍👩‍👧 می‌خواهم"),
    "nothing": (b"", "", ""),
}

ROWS = {
    "empty": ("", [""]),
    "short": ("abc", ["abc"]),
    "as wide as the screen": ("abcdefghij", ["abcdefghij"]),
    "wider": ("abcdefghijk", ["abcdefghij", "k"]),
    "wide characters": ("漢字漢字漢字", ["漢字漢字漢", "字"]),
    "wide at the edge": ("abcdefghi漢", ["abcdefghi", "漢"]),
    "combining": ("abcdefghije\u0301", ["abcdefghij", "e\u0301"]),
    "combining at the edge": ("abcdefghie\u0301", ["abcdefghie\u0301"]),
    "soft hyphens": ("abcdef\xad" * 2, ["abcdef\xadabc", "def\xad"]),
    "joined emoji": ("abcdef👨‍👩‍👧", ["abcdef👨‍", "👩‍👧"]),
    "colours take no room": ("\x1b[36mabcdefghij\x1b[0m", ["\x1b[36mabcdefghij\x1b[0m"]),
    "colours go on": (
        "\x1b[1mab\x1b[36mcdefghijkl\x1b[0mm",
        ["\x1b[1mab\x1b[36mcdefghij", "\x1b[36mkl\x1b[0mm"],
    ),
}


@pytest.mark.parametrize(("frame", "plain", "colored"), FRAMES.values(), ids=FRAMES)
def test_a_frame_is_only_text(frame: bytes, plain: str, colored: str | None) -> None:
    shown = client.as_text(frame)
    assert shown[0] == plain
    if colored is not None:
        assert shown[1] == colored


@given(st.binary() | st.text(st.sampled_from("\x1b[;0123m36]?hA\x07\n\u009b x")).map(str.encode))
def test_no_frame_does_more_than_colour(frame: bytes) -> None:
    plain, colored = client.as_text(frame)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", plain)
    assert re.sub(r"\x1b\[[0-9;:]*m", "", colored) == plain


@pytest.mark.parametrize(("text", "rows"), ROWS.values(), ids=ROWS)
def test_rows_of_a_screen(text: str, rows: list[str]) -> None:
    assert client.split_rows(text, 10) == rows


@given(st.lists(st.binary(max_size=9).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_are_the_same_however_they_are_cut_in_chunks(
    lines: list[bytes], data: st.DataObject
) -> None:
    rest = b"".join(line + b"\n" for line in lines)
    keyboard, found = client.Keyboard(), list[bytes]()
    with keyboard.pipe, keyboard.thread_end:
        while rest:
            size = data.draw(st.integers(1, 20))
            keyboard.thread_end.sendall(rest[:size])
            found += keyboard.lines()
            rest = rest[size:]
        keyboard.thread_end.close()
        assert keyboard.lines() == []
    assert found == [line.removesuffix(b"\r") for line in lines if line.removesuffix(b"\r")]
    assert keyboard.over


@given(st.text(), st.text())
def test_the_echo_to_expect_is_the_servers(user: str, message: str) -> None:
    body = json.dumps({"user": user, "message": message}).encode()
    assert client.echo_of(body) == client.as_text(server_script.chat_line(body))[0]


def test_the_loop_pushes_lines_and_prints_messages(
    context: zmq.Context[zmq.Socket[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop alone, without tcp. Over inproc, monitors have no news: Link is told by hand."""
    ends = [context.socket(kind) for kind in (zmq.PULL, zmq.PUB)]
    mine = [context.socket(kind) for kind in (zmq.PUSH, zmq.SUB)]
    pull, pub = ends
    push, sub = mine
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    screen = client.Screen(typing=False, color=True)
    link = client.Link(push, sub, "here", screen)
    for number, (end, my_end) in enumerate(zip(ends, mine, strict=True)):
        end.bind(f"inproc://{number}")
        my_end.connect(f"inproc://{number}")
        link.last_event[my_end] = zmq.EVENT_HANDSHAKE_SUCCEEDED
    link.new.update(mine)
    keyboard = client.Keyboard()
    bodies = [b'{"user": "k", "message": "%d"}' % number for number in range(2)]

    def someone_types() -> None:
        for chunk in (bodies[0] + b"\r\n\n", bodies[1][:9], bodies[1][9:] + b"\n\xff", b"\n"):
            keyboard.thread_end.sendall(chunk)
            time.sleep(0.05)  # so that they come one by one
        keyboard.thread_end.close()

    def a_server_answers() -> None:
        pub.send(b"a> \x1b[36mhello\x1b[0m")
        for number in range(2):
            assert pull.recv() == bodies[number]
            pub.send(b"k> \x1b[36m%d\x1b[0m" % number)

    helpers = [threading.Thread(target=target) for target in (someone_types, a_server_answers)]
    for helper in helpers:
        helper.start()
    with keyboard.pipe:
        outbox = client.Outbox(None, link, screen)
        assert client.chat(keyboard, link, outbox, screen) == 1  # for \xff
    for helper in helpers:
        helper.join()
    printed = capsys.readouterr()
    assert printed.out == "".join(
        f"{who}> \x1b[36m{what}\x1b[0m\n" for who, what in (("a", "hello"), ("k", 0), ("k", 1))
    )
    assert printed.err == (
        f"client.py: not sent, {NO_CHAT}: \ufffd\nclient.py: lines not known to be delivered: 1\n"
    )


NO_CHAT = "no chat line in JSON (to just type, use --user)"
SPACED = b'{ "message":"m",  "user":"k", "more": [1e999]} '
ONE = body_of("k", "1")
PUSHED = {
    "as typed": (SPACED + b"\n", [SPACED], 0),
    "crlf": (ONE + b"\r\n" + SPACED + b"\r\n", [ONE, SPACED], 0),
    "empty lines": (b"\n\r\n" + ONE + b"\n\n", [ONE], 0),
    "no line end": (ONE + b"\n" + SPACED, [ONE, SPACED], 0),
    "no chat line": (b"hello\n \n" + ONE, [ONE], 1),
    "too long": (SPACED + b" " * client.LONGEST + b"\n" + ONE, [ONE], 1),
}


@pytest.mark.parametrize(("typed", "bodies", "status"), PUSHED.values(), ids=PUSHED)
def test_lines_are_pushed_as_typed(
    bare: BareServer, start: Start, typed: bytes, bodies: list[bytes], status: int
) -> None:
    script = start("client.py", *port_options(bare.ports), stdin=subprocess.PIPE)
    write(script, typed)
    close(script)
    for body in bodies:
        assert bare.take() == body
        bare.echo(body)
    assert script.wait() == status
    assert not bare.take_all(100)


@pytest.mark.parametrize(
    ("name", "line", "body"),
    [
        ("ken", b"hello", {"user": "ken", "message": "hello"}),
        ('k "q"', b'say "hi" \\\t', {"user": 'k "q"', "message": 'say "hi" \\\t'}),
        ("王", "你好 👋".encode(), {"user": "王", "message": "你好 👋"}),
        ("ken", b"caf\xe9", {"user": "ken", "message": "caf\ufffd"}),
    ],
)
def test_a_name_makes_a_line_json(
    context: zmq.Context[zmq.Socket[bytes]], name: str, line: bytes, body: dict[str, str]
) -> None:
    screen = client.Screen(typing=False, color=False)
    link = client.Link(context.socket(zmq.PUSH), context.socket(zmq.SUB), "here", screen)
    outbox = client.Outbox(name, link, screen)
    outbox.take(line)
    assert json.loads(outbox.lines[0][0]) == body


def test_user_makes_valid_json_of_whatever_is_typed(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, b"caf\xe9\n\x1b\n", "--user", os.fsdecode(b"jos\xe9"))
    assert done.stdout.decode() == "jos?> caf\ufffd\njos?> \\x1b\n"
    assert (done.stderr, done.returncode) == (b"", 0)


def test_a_piped_line_comes_back_every_time(server: Script, run_client: RunClient) -> None:
    for number in range(10):
        line = b'{"user": "ci", "message": "%d"}' % number
        done = run_client(server.ports, line)
        assert (done.stdout, done.stderr, done.returncode) == (b"ci> %d\n" % number, b"", 0)


def test_many_piped_lines_come_back_in_order(server: Script, run_client: RunClient) -> None:
    lines = [b"%d" % number for number in range(50_000)]
    done = run_client(server.ports, b"\n".join(lines), "--user", "k")
    assert done.stdout == b"".join(b"k> " + line + b"\n" for line in lines)
    assert (done.stderr, done.returncode) == (b"", 0)


def test_the_same_line_many_times_comes_back_as_often(
    server: Script, run_client: RunClient
) -> None:
    done = run_client(server.ports, b"again\n" * 5_000, "--user", "k")
    assert done.stdout == b"k> again\n" * 5_000


def test_push_never_blocks_while_sub_fills(
    context: zmq.Context[zmq.Socket[bytes]], start: Start
) -> None:
    """A server that takes no line before its reader has taken six messages for the last one.

    No two lines are equal, or else one message could pass for the echo of another line.
    """
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    pull.set(zmq.RCVHWM, 10)
    pub.set(zmq.SNDHWM, 10)
    pub.set(zmq.XPUB_NODROP, 1)
    pub.set(zmq.SNDTIMEO, TIMEOUT * 1_000)
    ports = (pull.bind_to_random_port("tcp://*"), pub.bind_to_random_port("tcp://*"))
    script = start("client.py", *port_options(ports), stdin=subprocess.PIPE)
    # This is more than all buffers between them hold.
    said = [f"k> {number} {'x' * 10_000}" for number in range(3_000)]
    pipe, out = script.process.stdin, script.process.stdout
    assert pipe
    assert out
    lines = b"".join(body_of("k", message[3:]) + b"\n" for message in said)
    writer = threading.Thread(target=lambda: (pipe.write(lines), pipe.close()))
    shown: set[bytes] = set()
    reader = threading.Thread(target=lambda: shown.update(out))
    writer.start()
    reader.start()
    for message in said:
        assert pull.poll(TIMEOUT * 1_000)
        pull.recv()
        for _ in range(6):
            pub.send(message.encode())
    assert script.wait() == 0
    writer.join()
    reader.join()
    assert shown == {message.encode() + b"\n" for message in said}


def test_two_clients_see_each_other(start: Start, server: Script) -> None:
    two_people_chat(start, server.ports)


def test_a_client_may_be_started_before_its_server(
    start: Start, start_server: Callable[..., Script]
) -> None:
    ports = (free_port(), free_port())
    early = start("client.py", *port_options(ports), "--user", "ken", stdin=subprocess.PIPE)
    write(early, b"one\ntwo\n")
    early.wait_said(NO_SERVER)
    start_server(*ports)
    assert read_line(early) == b"ken> one\n"
    assert read_line(early) == b"ken> two\n"
    early.wait_said("client.py: connected to localhost\n")


def test_what_is_written_while_the_server_is_away_arrives_when_it_is_back(
    start: Start, start_server: Callable[..., Script]
) -> None:
    first = start_server()
    person = start("client.py", *port_options(first.ports), "--user", "ken", stdin=subprocess.PIPE)
    write(person, b"before\n")
    assert read_line(person) == b"ken> before\n"
    first.process.kill()
    person.wait_said(NO_SERVER)
    close(person, b"meanwhile\nand more\n")
    start_server(*first.ports)
    assert read_all(person) == b"ken> meanwhile\nken> and more\n"
    assert person.wait() == 0


def test_nothing_to_say_and_nobody_there(run_client: RunClient) -> None:
    done = run_client((free_port(), free_port()), b"")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


NOT_SENT = "client.py: not sent, "
REFUSED = {
    "not JSON": (b"hello", NO_CHAT),
    "not UTF-8": (b'{"user": "k", "message": "\xff"}', NO_CHAT),
    "too deep": (b"[" * 10_000, NO_CHAT),
    "no object": (b"[]", NO_CHAT),
    "no string": (b'{"user": 1, "message": "m"}', NO_CHAT),
    "not a number": (b'{"user": "k", "message": "m", "n": NaN}', NO_CHAT),
    "too long": (
        body_of("k", "x" * 16_384),
        "more than 16,384 bytes",
    ),
    "much too long": (body_of("k", "x" * 3_000_000), None),
    "too long as it is shown": (
        json.dumps(
            {"user": "k", "message": "x" * 14_000 + "\x85" * 700}, ensure_ascii=False
        ).encode(),
        "more than 16,384 bytes",
    ),
}


@pytest.mark.parametrize(("line", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_line_that_no_server_shows_is_told_and_its_neighbours_go(
    server: Script, run_client: RunClient, line: bytes, reason: str | None
) -> None:
    done = run_client(server.ports, b"\n".join((ONE, line, body_of("k", "2"))))
    assert done.stdout == b"k> 1\nk> 2\n"
    told = done.stderr.decode().splitlines()
    assert told[0].startswith(NOT_SENT + (reason or ""))
    assert told[1:] == ["client.py: lines not known to be delivered: 1"]
    assert done.returncode == 1


@pytest.mark.parametrize("excess", [0, 1])
def test_the_longest_line_that_is_shown(server: Script, run_client: RunClient, excess: int) -> None:
    room = client.LONGEST - len(body_of("k", "")) + excess
    done = run_client(server.ports, b"x" * room, "--user", "k")
    assert (done.stdout, done.returncode) == (
        (b"", 1) if excess else (b"k> " + b"x" * room + b"\n", 0)
    )


def test_in_a_pipe_only_the_first_refused_line_is_told_and_then_how_many(
    server: Script, run_client: RunClient
) -> None:
    done = run_client(server.ports, b"hello\n[]\nhello\n" * 100)
    assert done.stderr.decode().splitlines() == [
        f"{NOT_SENT}{NO_CHAT}: hello",
        "client.py: lines not known to be delivered: 300",
    ]
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ([], {}, b"k> hi\n"),
        (["--color", "auto"], {}, b"k> hi\n"),
        (["--color", "never"], {}, b"k> hi\n"),
        (["--color", "always"], {}, b"k> \x1b[36mhi\x1b[0m\n"),
        (["--color", "always"], {"NO_COLOR": "1"}, b"k> \x1b[36mhi\x1b[0m\n"),
    ],
)
def test_colour_in_a_pipe(
    server: Script,
    run_client: RunClient,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    environment: dict[str, str],
    expected: bytes,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_client(server.ports, b"hi", "--user", "k", *options).stdout == expected


@pytest.mark.parametrize(
    "options", [["--color", "perhaps"], ["--push-port", "0"], ["--nosuch"], ["a", "b"], ["a b"]]
)
def test_wrong_usage_is_status_2(start: Start, options: list[str]) -> None:
    script = start("client.py", *options)
    assert script.wait() == 2
    assert script.said.splitlines()[-1].startswith("client.py: ")


def test_a_reader_that_leaves_ends_it_quietly(server: Script, start: Start) -> None:
    script = start("client.py", *port_options(server.ports), "--user", "k", stdin=subprocess.PIPE)
    write(script, b"one\n")
    assert read_line(script) == b"k> one\n"
    assert script.process.stdout
    script.process.stdout.close()
    write(script, b"two\n")
    assert script.wait() == 0
    assert script.said == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_is_told(server: Script, start: Start) -> None:
    with Path("/dev/full").open("wb") as full:
        script = start(
            "client.py", *port_options(server.ports), "--user", "k",
            stdin=subprocess.PIPE, stdout=full.fileno(),
        )  # fmt: skip
    close(script, b"one\n")
    assert script.wait() == 1
    assert script.said == "client.py: [Errno 28] No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_is_told_by_the_status(
    server: Script, start: Start, there: bool, signum: signal.Signals
) -> None:
    ports = server.ports if there else (free_port(), free_port())
    script = start("client.py", *port_options(ports), "--user", "k", stdin=subprocess.PIPE)
    write(script, b"one\n")
    if there:
        assert read_line(script) == b"k> one\n"
    else:
        script.wait_said("no server")
    script.process.send_signal(signum)
    assert script.wait() == 128 + signum
    assert "Traceback" not in script.said


@LINUX
def test_idle_it_uses_no_processor_time(server: Script, start: Start) -> None:
    script = start("client.py", *port_options(server.ports), "--user", "k", stdin=subprocess.PIPE)
    write(script, b"one\n")
    assert read_line(script) == b"k> one\n"
    before = script.cpu_seconds(), server.cpu_seconds()
    with pytest.raises(subprocess.TimeoutExpired):
        script.process.wait(1)  # a second in which nothing happens
    assert script.cpu_seconds() - before[0] < 0.05
    assert server.cpu_seconds() - before[1] < 0.05


def test_the_client_talks_to_the_plain_server(start: Start, run_client: RunClient) -> None:
    ports = (free_port(), free_port())
    start("tests/plain.py", "server", *ports)
    lines = [b'{"user": "k", "message": "%d"}' % number for number in range(500)]
    done = run_client(ports, b"\n".join(lines))
    assert done.stdout == b"".join(b"k> %d\n" % number for number in range(500))
    assert (done.stderr, done.returncode) == (b"", 0)
