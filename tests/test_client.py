"""The client in a pipe: its parts, its loop over inproc, and the script as a process over tcp."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from conftest import (
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
    "joined emoji stay whole": ("abcdef👨‍👩‍👧", ["abcdef", "👨‍👩‍👧"]),
    "colours take no room": ("\x1b[36mabcdefghij\x1b[0m", ["\x1b[36mabcdefghij\x1b[0m"]),
}


@pytest.mark.parametrize(("frame", "plain", "colored"), FRAMES.values(), ids=FRAMES)
def test_a_frame_is_only_text(frame: bytes, plain: str, colored: str | None) -> None:
    shown = client.to_text(frame)
    assert shown[0] == plain
    if colored is not None:
        assert shown[1] == colored


@given(st.binary() | st.text(st.sampled_from("\x1b[;0123m36]?hA\x07\n\u009b x")).map(str.encode))
def test_no_frame_does_more_than_colour(frame: bytes) -> None:
    plain, colored = client.to_text(frame)
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
    begun, found = bytearray(), []
    while rest:
        size = data.draw(st.integers(1, 20))
        found += client.complete_lines(begun, rest[:size])
        rest = rest[size:]
    assert found == [line.removesuffix(b"\r") for line in lines]
    assert not begun


@given(st.text(), st.text())
def test_the_echo_to_expect_is_the_servers(user: str, message: str) -> None:
    body = json.dumps({"user": user, "message": message}).encode()
    assert client.echo_of(body) == client.to_text(server_script.chat_line(body))[0]


def test_the_loop_pushes_lines_and_prints_messages(
    context: zmq.Context[zmq.Socket[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [context.socket(kind) for kind in (zmq.PULL, zmq.PUB, zmq.PAIR, zmq.PAIR, zmq.PAIR)]
    mine = [context.socket(kind) for kind in (zmq.PUSH, zmq.SUB, zmq.PAIR, zmq.PAIR, zmq.PAIR)]
    for number, (end, my_end) in enumerate(zip(ends, mine, strict=True)):
        end.bind(f"inproc://{number}")
        my_end.connect(f"inproc://{number}")
    pull, pub, keys, push_news, sub_news = ends
    push, sub, keyboard, push_events, sub_events = mine
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    connected = [struct.pack("=HI", zmq.EVENT_HANDSHAKE_SUCCEEDED, 0), b"an endpoint"]
    push_news.send_multipart(connected)
    sub_news.send_multipart(connected)
    wakeup, writer = socket.socketpair()

    def someone_types() -> None:
        for chunk in (b"first\r\n\n", b"sec", b"ond\n\xff", b"\n"):
            keys.send(chunk)
            keys.recv()
        keys.send(b"")

    def a_server_answers() -> None:
        assert [pull.recv() for _ in range(3)] == [b"first", b"second", b"\xff"]
        pub.send(b"a> \x1b[36mone\x1b[0m")

    helpers = [threading.Thread(target=target) for target in (someone_types, a_server_answers)]
    for helper in helpers:
        helper.start()
    with wakeup, writer:
        arguments = (keyboard, push, push_events, sub, sub_events, wakeup)
        assert client.chat(*arguments, "here", None, typing=False, color=True) == 0
    for helper in helpers:
        helper.join()
    printed = capsys.readouterr()
    assert printed.out in ("", "a> \x1b[36mone\x1b[0m\n")  # no line had an echo to wait for
    assert printed.err.count("no server shows such a line: it is not JSON") == 1


@pytest.fixture
def raw_server(
    context: zmq.Context[zmq.Socket[bytes]],
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes], tuple[int, int]]:
    """Give a bare PULL and PUB, and their ports."""
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    return (
        pull,
        pub,
        (pull.bind_to_random_port("tcp://*"), pub.bind_to_random_port("tcp://*")),
    )


def receive_all(pull: zmq.Socket[bytes]) -> list[bytes]:
    """Return what PULL holds, once its peer has ended."""
    received = []
    while pull.poll(200):
        received.append(pull.recv())
    return received


PUSHED = {
    "as typed": (b'{ "message":"m",  "user":"k"} \n', [b'{ "message":"m",  "user":"k"} ']),
    "crlf": (b"a\r\nb\r\n", [b"a", b"b"]),
    "empty lines": (b"\n\r\na\n\n", [b"a"]),
    "no line end": (b"a\nb", [b"a", b"b"]),
    "not utf-8": (b"\xff\xfe\x00\n", [b"\xff\xfe\x00"]),
    "not json": (b"hello\n", [b"hello"]),
    "spaces": (b"  \n", [b"  "]),
    "longest": (b"x" * 65_536 + b"\r\n", [b"x" * 65_536]),
}


@pytest.mark.parametrize(("typed", "bodies"), PUSHED.values(), ids=PUSHED)
def test_lines_are_pushed_as_typed(
    raw_server: tuple[zmq.Socket[bytes], zmq.Socket[bytes], tuple[int, int]],
    run_client: RunClient,
    typed: bytes,
    bodies: list[bytes],
) -> None:
    pull, _, ports = raw_server
    assert run_client(ports, typed).returncode == 0
    assert receive_all(pull) == bodies


@pytest.mark.parametrize(
    ("name", "line", "body"),
    [
        ("ken", b"hello", {"user": "ken", "message": "hello"}),
        ('k "q"', b'say "hi" \\\t', {"user": 'k "q"', "message": 'say "hi" \\\t'}),
        ("王", "你好 👋".encode(), {"user": "王", "message": "你好 👋"}),
        ("ken", b"caf\xe9", {"user": "ken", "message": "caf\ufffd"}),
    ],
)
def test_a_name_makes_a_line_json(name: str, line: bytes, body: dict[str, str]) -> None:
    assert json.loads(client.to_body(line, name)) == body


def test_user_makes_valid_json_of_whatever_is_typed(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, b"caf\xe9\n\x1b\n", "--user", os.fsdecode(b"jos\xe9"))
    assert done.stdout.decode() == "jos\ufffd> caf\ufffd\njos\ufffd> \\x1b\n"
    assert (done.stderr, done.returncode) == (b"", 0)


def test_an_echo_that_does_not_come_is_not_waited_for_long(
    raw_server: tuple[zmq.Socket[bytes], zmq.Socket[bytes], tuple[int, int]], run_client: RunClient
) -> None:
    pull, _, ports = raw_server
    assert run_client(ports, b"hello", "--user", "ken").returncode == 0
    assert len(receive_all(pull)) == 1


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
    raw_server: tuple[zmq.Socket[bytes], zmq.Socket[bytes], tuple[int, int]], start: Start
) -> None:
    """A server that takes no line before its reader has taken six messages for the last one."""
    pull, pub, ports = raw_server
    pull.setsockopt(zmq.RCVHWM, 10)
    pub.setsockopt(zmq.SNDHWM, 10)
    pub.setsockopt(zmq.XPUB_NODROP, 1)
    pub.setsockopt(zmq.SNDTIMEO, TIMEOUT * 1_000)
    command = start(
        "client.py", *port_options(ports), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert command.process.stdin
    assert command.process.stdout
    count, message = 3_000, b"x" * 10_000  # more than all buffers between them hold
    pipe, out = command.process.stdin, command.process.stdout
    writer = threading.Thread(target=lambda: (pipe.write((message + b"\n") * count), pipe.close()))
    shown: set[bytes] = set()
    reader = threading.Thread(target=lambda: shown.update(out))
    writer.start()
    reader.start()
    for _ in range(count):
        assert pull.poll(TIMEOUT * 1_000)
        pull.recv()
        for _ in range(6):
            pub.send(message)
    assert command.wait() == 0
    writer.join()
    reader.join()
    assert shown == {message + b"\n"}


def test_two_clients_see_each_other(start: Start, server: Script) -> None:
    people = []
    for name in ("ann", "ken"):
        options = [*port_options(server.ports), "--user", name]
        person = start("client.py", *options, stdin=subprocess.PIPE)
        assert person.process.stdin
        assert person.process.stdout
        person.process.stdin.write(b"here I am\n")
        person.process.stdin.flush()
        assert person.process.stdout.readline() == name.encode() + b"> here I am\n"
        people.append(person.process)
    ann, ken = people
    assert ann.stdout
    assert ken.stdin
    assert ken.stdout
    assert ann.stdout.readline() == b"ken> here I am\n"
    ken.stdin.write("你好 👨‍👩‍👧\n".encode())
    ken.stdin.flush()
    assert ann.stdout.readline() == ken.stdout.readline() == "ken> 你好 👨‍👩‍👧\n".encode()


def test_a_client_may_be_started_before_its_server(
    start: Start, start_server: Callable[..., Script]
) -> None:
    ports = (free_port(), free_port())
    early = start("client.py", *port_options(ports), "--user", "ken", stdin=subprocess.PIPE)
    assert early.process.stdin
    assert early.process.stdout
    early.process.stdin.write(b"one\ntwo\n")
    early.process.stdin.flush()
    early.wait_said("client.py: no server at localhost yet, still trying\n")
    start_server(*ports)
    assert early.process.stdout.readline() == b"ken> one\n"
    assert early.process.stdout.readline() == b"ken> two\n"
    early.wait_said("client.py: connected to localhost\n")


def test_what_is_written_while_the_server_is_away_arrives_when_it_is_back(
    start: Start, start_server: Callable[..., Script]
) -> None:
    first = start_server()
    person = start("client.py", *port_options(first.ports), "--user", "ken", stdin=subprocess.PIPE)
    assert person.process.stdin
    assert person.process.stdout
    person.process.stdin.write(b"before\n")
    person.process.stdin.flush()
    assert person.process.stdout.readline() == b"ken> before\n"
    first.process.kill()
    person.wait_said("client.py: the server went away, what you type is sent when it is back\n")
    person.process.stdin.write(b"meanwhile\nand more\n")
    person.process.stdin.close()
    start_server(*first.ports)
    assert person.process.stdout.read() == b"ken> meanwhile\nken> and more\n"
    assert person.wait() == 0


def test_what_is_not_delivered_is_told(
    raw_server: tuple[zmq.Socket[bytes], zmq.Socket[bytes], tuple[int, int]], start: Start
) -> None:
    """All three at once, for each takes as long as a client waits for a server."""
    pull, pub, ports = raw_server
    nobody = (free_port(), free_port())
    alone = start("client.py", *port_options(nobody), stdin=subprocess.PIPE)
    astray = start("client.py", "no-such-host.invalid", stdin=subprocess.PIPE)
    left = start("client.py", *port_options(ports), "--user", "k", stdin=subprocess.PIPE)
    assert alone.process.stdin
    assert astray.process.stdin
    assert left.process.stdin
    left.process.stdin.write(b"one\n")
    left.process.stdin.flush()
    assert pull.poll(TIMEOUT * 1_000)
    pull.close(linger=0)
    pub.close(linger=0)
    left.wait_said("the server went away")
    began = time.monotonic()
    for script in (alone, astray):
        assert script.process.stdin
        script.process.stdin.write(b'{"user": "k", "message": "1"}\n' * 2_000)
    for script in (alone, astray, left):
        assert script.process.stdin
        script.process.stdin.close()
    for script in (alone, astray, left):
        assert script.wait() == 1
    assert time.monotonic() - began < 10
    assert "no server at localhost yet, still trying\n" in alone.said
    assert "client.py: unknown host name no-such-host.invalid, still trying\n" in astray.said
    for script in (alone, astray):
        assert "client.py: lines not delivered: 2,000; the first: {" in script.said
    assert "lines perhaps not delivered, since the server went away: 1\n" in left.said


def test_nothing_to_say_and_nobody_there(run_client: RunClient) -> None:
    done = run_client((free_port(), free_port()), b"")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


def test_an_over_long_line_is_refused_and_its_neighbours_are_sent(
    server: Script, run_client: RunClient
) -> None:
    typed = b"before\n" + b"x" * 70_000 + b"\n" + b"y" * 3_000_000 + b"\nafter\n"
    done = run_client(server.ports, typed, "--user", "k")
    assert done.stdout == b"k> before\nk> after\n"
    sizes = re.findall(
        rb"client.py: not sent, too long: (.*), where a server takes 65,536\n", done.stderr
    )
    assert sizes == [b"70,028 bytes", b"1,048,604 bytes or more"]


def test_a_bad_line_is_told_once_in_a_pipe(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, b"hello\n[]\nhello\n" * 100)
    assert done.stderr.decode() == "".join(
        f"client.py: no server shows such a line: {why} (to just type, use --user)\n"
        for why in ("it is not JSON", "it is not a JSON object")
    )
    assert done.returncode == 0


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
    assert script.process.stdin
    assert script.process.stdout
    script.process.stdin.write(b"one\n")
    script.process.stdin.flush()
    assert script.process.stdout.readline() == b"k> one\n"
    script.process.stdout.close()
    script.process.stdin.write(b"two\n")
    script.process.stdin.flush()
    assert script.wait() == 0
    assert script.said == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_is_told(server: Script, start: Start) -> None:
    with Path("/dev/full").open("wb") as full:
        script = start(
            "client.py", *port_options(server.ports), "--user", "k",
            stdin=subprocess.PIPE, stdout=full.fileno(),
        )  # fmt: skip
    assert script.process.stdin
    script.process.stdin.write(b"one\n")
    script.process.stdin.close()
    assert script.wait() == 1
    assert script.said == "client.py: cannot write to stdout: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize("there", [True, False])
def test_an_interrupt_is_status_130(server: Script, start: Start, there: bool) -> None:
    ports = server.ports if there else (free_port(), free_port())
    script = start("client.py", *port_options(ports), "--user", "k", stdin=subprocess.PIPE)
    assert script.process.stdin
    script.process.stdin.write(b"one\n")
    script.process.stdin.flush()
    if there:
        assert script.process.stdout
        assert script.process.stdout.readline() == b"k> one\n"
    else:
        script.wait_said("no server")
    script.process.send_signal(signal.SIGINT)
    assert script.wait() == 130
    assert "Traceback" not in script.said


@LINUX
def test_idle_it_uses_no_processor_time(server: Script, start: Start) -> None:
    script = start("client.py", *port_options(server.ports), "--user", "k", stdin=subprocess.PIPE)
    assert script.process.stdin
    assert script.process.stdout
    script.process.stdin.write(b"one\n")
    script.process.stdin.flush()
    assert script.process.stdout.readline() == b"k> one\n"
    before = script.cpu_seconds(), server.cpu_seconds()
    with pytest.raises(subprocess.TimeoutExpired):
        script.process.wait(1)  # a second in which nothing happens
    assert script.cpu_seconds() - before[0] < 0.02
    assert server.cpu_seconds() - before[1] < 0.02


def test_the_client_talks_to_the_plain_server(start: Start, run_client: RunClient) -> None:
    ports = (free_port(), free_port())
    start("tests/plain.py", "server", *ports)
    lines = [b'{"user": "k", "message": "%d"}' % number for number in range(500)]
    done = run_client(ports, b"\n".join(lines))
    assert done.stdout == b"".join(b"k> %d\n" % number for number in range(500))
    assert (done.stderr, done.returncode) == (b"", 0)
