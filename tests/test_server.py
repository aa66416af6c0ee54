"""The server: its loop over inproc, and the script as a process over tcp."""

import contextlib
import json
import re
import select
import signal
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
from hypothesis import given
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
    "longest": (b'{"user":"k","message":"%s"}' % (b"x" * 65_508), "k", "x" * 65_508),
}

BAD = {
    "empty": (b"", "not JSON"),
    "text": (b"hello", "not JSON"),
    "truncated": (b'{"user": "ken", "mess', "not JSON"),
    "two objects": (b'{"user": "k", "message": "m"} {}', "not JSON"),
    "array": (b'["ken", "hello"]', "not a JSON object"),
    "string": (b'"hello"', "not a JSON object"),
    "huge number": (b"9" * 9_999, "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no user": (b'{"message": "m"}', "not both strings"),
    "no message": (b'{"user": "k"}', "not both strings"),
    "user a number": (b'{"user": 1, "message": "m"}', "not both strings"),
    "message a huge number": (b'{"user": "k", "message": 1e999}', "not both strings"),
    "message an array": (b'{"user": "k", "message": ["m"]}', "not both strings"),
    "nested": (b"[" * 60_000, "nested too deeply"),
    "utf-16": ('{"user": "k", "message": "m"}'.encode("utf-16"), "not UTF-8"),
    "utf-16 without a mark": ('{"user": "k", "message": "m"}'.encode("utf-16-le"), "not JSON"),
    "byte order mark": ('\ufeff{"user": "k", "message": "m"}'.encode(), "not JSON"),
    "latin-1": ('{"user": "Zoë", "message": "m"}'.encode("latin-1"), "not UTF-8"),
    "raw control": (b'{"user": "k", "message": "\x1b[2J"}', "not JSON"),
    "other spaces": ('{"user": "k", "message": "m"}\u00a0'.encode(), "not JSON"),
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
    """Run the server's loop over inproc; give a PUSH, a SUB, and a function that stops the loop."""
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    pull.bind("inproc://pull")
    pub.bind("inproc://pub")
    push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    push.connect("inproc://pull")
    sub.connect("inproc://pub")
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    pull.setsockopt(zmq.RCVTIMEO, 100)
    stop = threading.Event()
    thread = threading.Thread(target=server_script.serve, args=(pull, pub, stop))
    thread.start()

    def end() -> None:
        stop.set()
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


def test_the_loop_publishes_what_had_arrived_when_it_is_stopped(
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


@pytest.mark.parametrize(("body", "reason"), BAD.values(), ids=BAD)
def test_a_bad_body_is_refused_with_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        server_script.chat_line(body)
    assert str(error.value).isprintable()


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


def test_every_kind_of_bad_body_is_told_and_none_is_published(
    server: Script, join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    for body, _ in BAD.values():
        peer.push.send(body)
        peer.push.send(chat_body("good"))
        assert peer.receive() == published("k", "good")
    server.wait_said(r"dropped \d+ more lines")
    told = re.findall(r"server.py: dropped a line: (.*)", server.said)
    more = sum(map(int, re.findall(r"dropped (\d+) more", server.said)))
    assert len(told) + more == len(BAD)
    for line, (_, reason) in zip(told[:10], BAD.values(), strict=False):
        assert reason in line
    assert server.said.replace("\n", "").isprintable()


def test_a_message_of_many_frames_is_dropped_whole(
    server: Script, join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    peer.push.send_multipart([chat_body("first"), chat_body("second"), chat_body("third")])
    peer.push.send(chat_body("alone"))
    assert peer.receive() == published("k", "alone")
    server.wait_said("dropped a line: many frames, not one")
    assert server.said.count("dropped") == 1


@LINUX
def test_a_flood_of_bad_lines_stays_brief(server: Script, join: Callable[..., Peer]) -> None:
    peer = join(server.ports)
    for number in range(50_000):
        peer.push.send(b"\x1b]0;hostile\x07 %d" % number)
    peer.push.send(chat_body("good"))
    assert peer.receive() == published("k", "good")
    wait_for(
        lambda: (
            len(re.findall("dropped a line", server.said))
            + sum(
                int(n.replace(",", "")) for n in re.findall("dropped ([0-9,]+) more", server.said)
            )
            == 50_000
        ),
        lambda: server.said,
    )
    assert len(server.said) < 20_000
    assert "\x1b" not in server.said


@LINUX
def test_a_huge_message_costs_nothing_and_hurts_nobody(
    server: Script, context: zmq.Context[zmq.Socket[bytes]], join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    before = server.stat("VmHWM")
    hostile = context.socket(zmq.PUSH)
    cut_off = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    hostile.connect(f"tcp://127.0.0.1:{server.ports[0]}")
    hostile.send(b"x" * 50_000_000)
    assert cut_off.poll(TIMEOUT * 1_000)
    peer.push.send(chat_body("good"))
    assert peer.receive() == published("k", "good")
    assert server.stat("VmHWM") - before < 10_000


@LINUX
def test_connections_that_speak_no_zmtp_change_nothing(
    server: Script, join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    with contextlib.ExitStack() as open_sockets:
        for number in range(300):
            said = (b"GET / HTTP/1.0\r\n\r\n", b"\xff\0\0\0\0\0\0\0\1\x7f\3", b"")[number % 3]
            sock = socket.create_connection(("127.0.0.1", server.ports[number % 2]))
            open_sockets.enter_context(sock)
            sock.sendall(said)
        peer.push.send(chat_body("good"))
        assert peer.receive() == published("k", "good")
        before = server.cpu_seconds()
        assert not peer.sub.poll(1_000)  # a second in which nothing happens
        assert server.cpu_seconds() - before < 0.1


@LINUX
def test_more_readers_than_the_soft_limit_of_files(start: Start, join: Callable[..., Peer]) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3_000:
        pytest.skip("the hard limit of open files is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        script = start("server.py", "--pull-port", 0, "--pub-port", 0)
        heard = script.wait_said(r"tcp://\*:(\d+), PUB on tcp://\*:(\d+)\n")
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        peer = join((int(heard[1]), int(heard[2])), readers=500)
        peer.push.send(chat_body("to all"))
        for sub in peer.subs:
            assert peer.receive(sub) == published("k", "to all")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_nothing_is_lost_with_ten_readers(server: Script, join: Callable[..., Peer]) -> None:
    peer = join(server.ports, readers=10)
    count = 20_000
    sender = threading.Thread(
        target=lambda: [peer.push.send(chat_body(str(n))) for n in range(count)]
    )
    sender.start()
    poller = zmq.Poller()
    due = dict.fromkeys(peer.subs, 0)
    for sub in peer.subs:
        poller.register(sub, zmq.POLLIN)
    while any(number < count for number in due.values()):
        ready = poller.poll(TIMEOUT * 1_000)
        assert ready
        for sub, _ in ready:
            with contextlib.suppress(zmq.Again):
                while True:
                    assert sub.recv(zmq.NOBLOCK) == published("k", str(due[sub]))
                    due[sub] += 1
    sender.join()


def test_a_reader_that_pauses_misses_nothing(server: Script, join: Callable[..., Peer]) -> None:
    peer = join(server.ports)
    count = 100_000
    sender = threading.Thread(
        target=lambda: [peer.push.send(chat_body(str(n))) for n in range(count)]
    )
    sender.start()
    for number in range(count):
        if number % 20_000 == 10_000:
            time.sleep(0.5)  # the pause itself, not a wait for anything
        assert peer.receive() == published("k", str(number))
    sender.join()


STOPPED_READER = """
import os, signal, sys, zmq
sub = zmq.Context().socket(zmq.SUB)
sub.setsockopt(zmq.SUBSCRIBE, b"")
sub.connect(sys.argv[1])
sub.recv()
print("reading", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
while b"awake" not in sub.recv():
    pass
print("awake", flush=True)
"""


@LINUX
def test_a_stopped_reader_holds_up_the_others_once(
    server: Script, join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    stopped = subprocess.Popen(
        [sys.executable, "-c", STOPPED_READER, f"tcp://127.0.0.1:{server.ports[1]}"],
        stdout=subprocess.PIPE,
    )
    with stopped:
        try:
            assert stopped.stdout
            wait_for(lambda: wrote(stopped, peer, "hi"), lambda: "no reader")
            stopped.stdout.readline()
            wait_for(lambda: process_state(stopped.pid) == "T", lambda: "a running reader")
            drain(peer.sub)
            large = "x" * 1_000  # so that the buffers are full soon
            count = 20_000
            sender = threading.Thread(
                target=lambda: [peer.push.send(chat_body(f"{n} {large}")) for n in range(count)]
            )
            sender.start()
            waits = []
            for number in range(count):
                before = time.monotonic()
                assert peer.receive() == published("k", f"{number} {large}")
                waits.append(time.monotonic() - before)
            sender.join()
            assert sum(wait > 0.5 for wait in waits) == 1
            assert server.said.count("a reader has stopped reading") == 1
            assert server.stat("VmHWM") < 128_000
            stopped.send_signal(signal.SIGCONT)
            wait_for(lambda: wrote(stopped, peer, "awake"), lambda: "a sleeping reader")
            assert stopped.stdout.readline() == b"awake\n"
        finally:
            stopped.kill()


def wrote(process: "subprocess.Popen[bytes]", peer: Peer, message: str) -> bool:
    """Push a message, and return whether a process that reads has written something."""
    peer.push.send(chat_body(message))
    assert process.stdout
    return bool(select.select([process.stdout], [], [], 0.02)[0])


def process_state(pid: int) -> str:
    """Return the state of a process, T when it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def drain(sub: zmq.Socket[bytes]) -> None:
    """Read all that is on its way to a SUB."""
    while sub.poll(200):
        sub.recv()


@pytest.mark.parametrize("taken", ["pull", "pub"])
def test_an_endpoint_in_use_is_named(start: Start, taken: str) -> None:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        in_use, free = sock.getsockname()[1], free_port()
        ports = {"pull": in_use, "pub": free} if taken == "pull" else {"pull": free, "pub": in_use}
        script = start("server.py", "--pull-port", ports["pull"], "--pub-port", ports["pub"])
        assert script.wait() == 1
    assert re.fullmatch(
        rf"server.py: cannot listen on tcp://\*:{in_use}: .*in use.*\n", script.said
    )
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
    assert script.said.startswith("server.py: cannot listen on tcp://no.such.interface:0: ")
    assert script.said.count("\n") == 1


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_it_listens_where_it_is_told(start: Start, run_client: RunClient, address: str) -> None:
    script = start("server.py", "--bind", address, "--pull-port", 0, "--pub-port", 0)
    heard = script.wait_said(r"PULL listens on tcp://\S+:(\d+), PUB on tcp://\S+:(\d+)\n")
    echoed = run_client((int(heard[1]), int(heard[2])), chat_body("hi"), address)
    assert (echoed.stdout, echoed.returncode) == (b"k> hi\n", 0)


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_when_all_that_had_arrived_is_published(
    server: Script, join: Callable[..., Peer], signum: int
) -> None:
    peer = join(server.ports)
    arrived = peer.push.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    count = 900  # what PUSH and PULL hold without anyone reading
    server.process.send_signal(signal.SIGSTOP)
    for number in range(count):
        peer.push.send(chat_body(str(number)))
    server.process.send_signal(signum)
    server.process.send_signal(signal.SIGCONT)
    assert [peer.receive() for _ in range(count)] == [
        published("k", str(number)) for number in range(count)
    ]
    assert server.wait() == 0
    assert arrived.poll(TIMEOUT * 1_000)
    assert "Traceback" not in server.said


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
