"""README, "Options" and "Recipes": the client with whatever streams, signals and files it gets."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from peers import BareServer, Join, line_of, message_of
from processes import (
    LINUX,
    NO_WINE,
    POSIX,
    WINDOWS,
    Script,
    Start,
    StartServer,
    close,
    free_port,
    port_options,
    python,
    read_all,
    read_line,
    server_options,
    wait_for,
    write,
)

import client

if sys.platform != "win32":
    import fcntl
    import termios


def sh(command: str) -> list[str]:
    """Return the command that runs another one after, or by, a command of the shell."""
    return ["sh", "-c", command, "sh"]


def chat(script: Script, text: bytes) -> None:
    """Have a client's next message be the echo of a line."""
    write(script, text + b"\n")
    assert read_line(script) == b"k> " + text + b"\n"


Begin = Callable[..., Script]


@pytest.fixture
def begin(start: Start) -> Begin:
    """Give a function that starts a client, which speaks as k, at a server, or where none is."""

    def start_it(server: Script | BareServer | None, **how: object) -> Script:
        ports = server.ports if server else (free_port(), free_port())
        options = {"stdin": subprocess.PIPE} | how
        return start("client.py", *port_options(ports), "--user", "k", **options)

    return start_it


# README, Options: Notices and logs go to stderr.


@POSIX
def test_streams_may_be_closed(server: Script, begin: Begin, join: Join) -> None:
    """Like /dev/null, a closed stdin is an empty one."""
    peer = join(server.ports)
    scripts = {}
    for count in range(4):
        for closed in itertools.combinations((0, 1, 2), count):
            closing = " ".join(f"{file}{'<' if file == 0 else '>'}&-" for file in closed)
            scripts[closed] = begin(server, before=sh(f'exec "$@" {closing}'))
    for closed, script in scripts.items():
        close(script, b"%d\n" % len(closed))
        assert (script.wait(), script.stderr) == (0, "")
        if 0 not in closed:
            assert peer.receive() == message_of("k", str(len(closed)))
        printed = b"k> %d\n" % len(closed) if not {0, 1} & set(closed) else b""
        assert read_all(script).endswith(printed), closed


def unread(script: Script) -> int:
    """Return how many bytes are in the pipe that is stdout. It takes 65,536 mostly."""
    assert script.process.stdout
    size = fcntl.ioctl(script.process.stdout.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(size, sys.byteorder)


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """Give a pipe that nobody reads, and that takes no more."""
    ends = os.pipe()
    os.set_blocking(ends[1], False)
    try:
        while True:
            os.write(ends[1], b"x" * 4_096)
    except BlockingIOError:
        os.set_blocking(ends[1], True)
    yield ends
    for end in ends:
        os.close(end)


NONBLOCKING = """
import os, sys
for n in range(3):
    os.set_blocking(n, False)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@POSIX
def test_streams_may_be_non_blocking(
    server: Script, begin: Begin, join: Join, full_pipe: tuple[int, int]
) -> None:
    before = [sys.executable, "-c", NONBLOCKING]
    script = begin(server, before=before, stderr=full_pipe[1])
    for number in range(3):  # Before each but the first, stdin has nothing.
        chat(script, b"%d" % number)
    peer = join(server.ports)
    for _ in range(300):
        peer.push.send(line_of("ann", "x" * 1_000))
        peer.receive()  # so that it is before what the client sends next
    wait_for(lambda: unread(script) > 50_000, lambda: unread(script))
    close(script, b"x" * 20_000 + b"\nlast\n")  # A notice is due, for which there is no room.
    received = bytearray()
    reader = threading.Thread(target=lambda: received.extend(read_all(script)))
    reader.start()
    notices = b""
    while b"client.py: line not sent: " not in notices:
        notices = (notices + os.read(full_pipe[0], 4_096)).lstrip(b"x")
    assert script.wait() == 1
    reader.join()
    assert received.count(b"ann> " + b"x" * 1_000 + b"\n") == 300
    assert received.endswith(b"k> last\n")


@POSIX
def test_a_reader_of_stderr_may_leave(server: Script, begin: Begin) -> None:
    ends = os.pipe()
    os.close(ends[0])
    script = begin(server, stderr=ends[1])
    os.close(ends[1])
    write(script, b"x" * 20_000 + b"\n")
    chat(script, b"one")
    close(script)
    assert script.wait() == 1


# README, Options: 1 on failure


@POSIX
def test_a_stdin_that_cannot_be_read_is_reported(
    server: Script, begin: Begin, tmp_path: Path
) -> None:
    with (tmp_path / "for writing").open("wb") as stdin:
        script = begin(server, stdin=stdin.fileno())
    assert script.wait() == 1
    assert script.stderr == "client.py: the rest of the input was not read\n"


FULL = "client.py: [Errno 28] No space left on device\n"
UNREPORTED = {  # the line, where stdout and stderr go, and what is on stderr
    "a full disk": (b"one", ">/dev/full", FULL),
    "closed stderr": (b"x" * 20_000, "2>&-", ""),
    "full stderr": (b"x" * 20_000, "2>/dev/full", ""),
    "both closed": (b"x" * 20_000, "1>&- 2>&-", ""),
}


@POSIX
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize(("line", "redirection", "said"), UNREPORTED.values(), ids=UNREPORTED)
def test_output_that_fails_is_in_the_status(
    server: Script, begin: Begin, line: bytes, redirection: str, said: str
) -> None:
    script = begin(server, before=sh(f'exec "$@" {redirection}'))
    close(script, line + b"\n")
    assert (script.wait(), script.stderr) == (1, said)


@LINUX
def test_too_few_open_files_are_one_line_and_status_1(server: Script, begin: Begin) -> None:
    limits = (8, 10, 20, 34)
    for script in [begin(server, before=sh(f'ulimit -n {n}; exec "$@"')) for n in limits]:
        close(script, b"one\n")
        assert script.wait() == 1
        assert re.fullmatch(
            r".*Too many open files.*; raise the limit of .*: ulimit -n\n", script.stderr
        )


# README, Delivery in detail: If stdout is closed, as by `| head -1`, the client reads no more input
# and waits for the last echo.


def test_a_reader_of_stdout_may_leave(server: Script, begin: Begin, join: Join) -> None:
    peer = join(server.ports)
    script = begin(server)
    chat(script, b"one")
    assert script.process.stdout
    script.process.stdout.close()
    write(script, b"two\n")
    assert script.wait() == 0
    assert script.stderr == ""
    assert [peer.receive(), peer.receive()] == [message_of("k", "one"), message_of("k", "two")]


# README, Options: If a signal ends the client, the status is 128 plus the number of the signal,
# such as 130 for Ctrl-C.


@POSIX
def test_a_signal_is_in_the_status(server: Script, begin: Begin) -> None:
    """128 and its number, with and without a connection."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    connected = [(signum, begin(server)) for signum in signals]
    waiting = [(signum, begin(None)) for signum in signals]
    for _, script in waiting:
        write(script, b"one\ntwo\n")
    for signum, script in connected:
        write(script, b"%d\n" % signum)
        while read_line(script) != b"k> %d\n" % signum:
            pass
        script.process.send_signal(signum)
        assert (script.wait(), script.stderr) == (128 + signum, "")
    for signum, script in waiting:
        script.wait_stderr("no server at localhost .*\n")
        script.process.send_signal(signum)
        assert script.wait() == 128 + signum
        assert script.stderr.endswith("back\nclient.py: 2 lines may not have been delivered\n")


@POSIX
def test_a_signal_ends_it_while_nobody_reads_what_it_prints(
    server: Script, begin: Begin, join: Join, full_pipe: tuple[int, int]
) -> None:
    silent = begin(None, stderr=full_pipe[1])
    began = time.monotonic()
    script = begin(server)
    chat(script, b"one")
    peer = join(server.ports)
    for _ in range(1_000):
        peer.push.send(line_of("ann", "x" * 1_000))
    wait_for(lambda: unread(script) > 40_000, lambda: unread(script))
    time.sleep(max(0, began + 1.5 - time.monotonic()))  # A notice is due on stderr by then.
    for each in (script, silent):
        began = time.monotonic()
        each.process.send_signal(signal.SIGINT)
        assert each.wait() == 130
        assert time.monotonic() - began < 2


# README, Recipes: nohup sh -c 'tail -n 0 -F access.log


@POSIX
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(server: Script, begin: Begin) -> None:
    """As nohup ignores SIGHUP."""
    script = begin(server, before=sh('trap "" INT HUP QUIT TERM; exec "$@"'))
    chat(script, b"one")
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        script.process.send_signal(signum)
        chat(script, b"two")
    close(script)
    assert script.wait() == 0


# README, Platforms: Python 3.13 for Windows under Wine


@WINDOWS
@NO_WINE
def test_ctrl_break_ends_both(begin: Begin, start_server: StartServer) -> None:
    if sys.platform == "win32":
        how = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        server = start_server(**how)
        script = begin(server, **how)
        chat(script, b"one")
        script.process.send_signal(signal.CTRL_BREAK_EVENT)
        assert script.wait() == 128 + signal.SIGBREAK
        server.process.send_signal(signal.CTRL_BREAK_EVENT)
        assert server.wait() == 0


@pytest.mark.parametrize("stdout", [subprocess.PIPE, subprocess.DEVNULL])
def test_a_stdin_without_anything_ends_it(server: Script, begin: Begin, stdout: int) -> None:
    script = begin(server, stdin=subprocess.DEVNULL, stdout=stdout)
    assert script.wait() == 0
    assert script.stderr == ""


def test_what_is_printed_has_the_line_ends_of_the_platform(server: Script) -> None:
    for name, options in (  # The ports are taken; the line is too long.
        ("server.py", server_options(server.ports)),
        ("client.py", port_options(server.ports)),
    ):
        done = subprocess.run([*python(name), *options], input=b"x" * 20_000, capture_output=True)
        lines = done.stderr.split(os.linesep.encode())
        assert done.returncode == 1
        assert lines.pop() == b""
        assert lines
        assert not any(b"\n" in line for line in lines)


# README, Platforms: the line editor by hand in Wine's console


@WINDOWS
@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        (["a", "à", "b", "\r"], ["aàb"]),
        (["a", "\xe0K", "b", "\r"], ["ba"]),  # Left
        (["a", "b", "\xe0G", "\0S", "\r"], ["b"]),  # Home, and Delete of the number pad
        (["à", "K", "à", "\xe0K", "à", "\r"], ["àKàà"]),
        (["\0;", "\ud83d", "\udc4b", "\r"], ["👋"]),  # F1, which does nothing
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_keys_of_the_console(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], lines: list[str], at_once: bool
) -> None:
    if sys.platform == "win32":
        console, editor, sent = Console(typed, at_once), client.Editor(), list[bytes]()
        monkeypatch.setattr(client, "msvcrt", console)
        while console.keys or console.pushed_back:
            sent += editor.feed(client.read_console())[0]
        assert [line.decode() for line in sent] == lines


class Console:
    """Stands in for msvcrt, with the console of Microsoft's C library.

    A key without a character comes as two, and kbhit does not know of the second.
    """

    def __init__(self, keys: list[str], at_once: bool) -> None:
        self.keys, self.at_once = keys.copy(), at_once
        self.pushed_back = ""

    def kbhit(self) -> bool:
        return bool(self.keys) and self.at_once

    def getwch(self) -> str:
        key, self.pushed_back = self.pushed_back or self.keys.pop(0), ""
        self.pushed_back = key[1:]
        return key[0]

    def ungetwch(self, char: str) -> None:
        if self.pushed_back:
            raise OSError
        self.pushed_back = char


# README, zmq-talk-chat: The chat survives restarts, slow subscribers and hostile text.


@LINUX
def test_idle_it_uses_no_processor_time(server: Script, begin: Begin) -> None:
    scripts = [begin(server), begin(None)]
    chat(scripts[0], b"one")
    scripts[1].wait_stderr("no server")
    before = [script.cpu_seconds() for script in scripts]
    time.sleep(1)  # a second in which nothing happens
    for script, seconds in zip(scripts, before, strict=True):
        assert script.cpu_seconds() - seconds < 0.05


@LINUX
def test_a_line_that_never_ends_takes_little_memory(server: Script, begin: Begin) -> None:
    with Path("/dev/zero").open("rb") as zero:
        script = begin(server, stdin=zero.fileno())
    wait_for(lambda: script.cpu_seconds() > 0.5, script.cpu_seconds)
    assert script.memory() < 60


@LINUX
@pytest.mark.slow
def test_a_message_without_end_takes_no_memory(bare_server: BareServer, begin: Begin) -> None:
    """SUB breaks the connection, and connects anew after a while."""
    script = begin(bare_server)
    write(script, b"one\n")
    bare_server.answer(1)
    assert read_line(script) == b"k> one\n"
    before = script.memory()
    bare_server.pub.send(b"x" * 100_000_000)
    script.wait_stderr(
        f"no answer from port {bare_server.ports[1]} of localhost; .*\n"
        "client.py: connected to localhost\n"
    )
    assert script.memory() < before + 10
    bare_server.pub.send(b"y" * 65_536)
    assert read_line(script) == b"y" * 65_536 + b"\n"
    close(script, b"two\n")
    bare_server.answer(1)
    assert script.wait() == 0
