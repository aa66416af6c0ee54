"""README, "Platforms": what the client does with whatever it is started with."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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

slow = pytest.mark.slow


def start_client(start: Start, ports: tuple[int, int], **how: object) -> Script:
    """Start a client that speaks as k, with a pipe to stdin unless it gets another one."""
    options = {"stdin": subprocess.PIPE} | how
    return start("client.py", *port_options(ports), "--user", "k", **options)


def sh(command: str) -> list[str]:
    """Return the command that runs another one after, or by, a command of the shell."""
    return ["sh", "-c", command, "sh"]


def chat(script: Script, text: bytes) -> None:
    """Have a client's next message be the echo of a line."""
    write(script, text + b"\n")
    assert read_line(script) == b"k> " + text + b"\n"


# It starts fast: nothing is imported that it does not need.


def test_no_large_module_is_imported() -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", *python("client.py", "--help")[1:]],
        capture_output=True,
        check=True,
    )
    imported = set(re.findall(r"\| +(\S+)$", shown.stderr.decode(), re.MULTILINE))
    assert "zmq" in imported
    large = {"asyncio", "logging", "readline", "zmq.auth", "zmq.utils.monitor", "subprocess"}
    assert not large & imported


# The standard streams may be closed, non-blocking, unreadable or full.


@POSIX
@pytest.mark.parametrize("closed", [
    closed for count in (1, 2, 3) for closed in itertools.combinations((0, 1, 2), count)
])  # fmt: skip
def test_streams_may_be_closed(
    server: Script, start: Start, join: Join, closed: tuple[int, ...]
) -> None:
    peer = join(server.ports)
    closing = " ".join(f"{file}{'<' if file == 0 else '>'}&-" for file in closed)
    script = start_client(start, server.ports, before=sh(f'exec "$@" {closing}'))
    close(script, b"hello\n")
    assert script.wait() == 0
    assert script.stderr == ""
    if 0 not in closed:
        assert peer.receive() == message_of("k", "hello")
    assert read_all(script) == (b"k> hello\n" if closed == (2,) else b"")


def unread(pipe: int) -> int:
    """Return how many bytes are in a pipe. It takes 65,536 mostly."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


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


NONBLOCKING = (
    "import os, sys; [os.set_blocking(n, False) for n in range(3)]; os.execvp(sys.argv[1], "
    "sys.argv[1:])"
)


@POSIX
def test_streams_may_be_non_blocking(
    server: Script, start: Start, join: Join, full_pipe: tuple[int, int]
) -> None:
    script = start_client(
        start, server.ports, before=[sys.executable, "-c", NONBLOCKING], stderr=full_pipe[1]
    )
    for number in range(3):  # Before each but the first, stdin has nothing.
        chat(script, b"%d" % number)
    peer = join(server.ports)
    for _ in range(300):
        peer.push.send(line_of("ann", "x" * 1_000))
    assert script.process.stdout
    pipe = script.process.stdout.fileno()
    wait_for(lambda: unread(pipe) > 60_000, lambda: unread(pipe))
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
def test_a_stdin_that_cannot_be_read_is_reported(
    server: Script, start: Start, tmp_path: Path
) -> None:
    with (tmp_path / "for writing").open("wb") as stdin:
        script = start_client(start, server.ports, stdin=stdin.fileno())
    assert script.wait() == 1
    assert script.stderr == "client.py: the rest of the input was not read\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_is_reported(server: Script, start: Start) -> None:
    with Path("/dev/full").open("wb") as full:
        script = start_client(start, server.ports, stdout=full.fileno())
    close(script, b"one\n")
    assert script.wait() == 1
    assert script.stderr == "client.py: [Errno 28] No space left on device\n"


@LINUX
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "1>&- 2>&-"])
def test_what_cannot_be_reported_is_in_the_status(
    server: Script, start: Start, redirection: str
) -> None:
    script = start_client(start, server.ports, before=sh(f'exec "$@" {redirection}'))
    close(script, b"x" * 20_000 + b"\n")
    assert script.wait() == 1
    assert script.stderr == ""


# Whoever reads stdout may leave: it reads no more input then. Whoever reads stderr may leave, and
# the chat goes on.


def test_a_reader_of_stdout_may_leave(server: Script, start: Start, join: Join) -> None:
    peer = join(server.ports)
    script = start_client(start, server.ports)
    chat(script, b"one")
    assert script.process.stdout
    script.process.stdout.close()
    write(script, b"two\n")
    assert script.wait() == 0
    assert script.stderr == ""
    assert [peer.receive(), peer.receive()] == [message_of("k", "one"), message_of("k", "two")]


@POSIX
def test_a_reader_of_stderr_may_leave(server: Script, start: Start) -> None:
    ends = os.pipe()
    os.close(ends[0])
    script = start_client(start, server.ports, stderr=ends[1])
    os.close(ends[1])
    write(script, b"x" * 20_000 + b"\n")
    chat(script, b"one")
    close(script)
    assert script.wait() == 1


# A signal ends it at once, with status 128 and its number, whatever it waits for. One that is
# ignored at the start stays ignored.

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if os.name == "posix":
    SIGNALS += [signal.SIGHUP, signal.SIGQUIT]


@POSIX
@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_in_the_status(
    server: Script, start: Start, connected: bool, signum: signal.Signals
) -> None:
    script = start_client(start, server.ports if connected else (free_port(), free_port()))
    if connected:
        chat(script, b"one")
    else:
        write(script, b"one\ntwo\n")
        script.wait_stderr("no server at localhost .*\n")
    script.process.send_signal(signum)
    assert script.wait() == 128 + signum
    report = script.stderr.rpartition("is back\n")[2]
    assert report == ("" if connected else "client.py: 2 lines may not have been delivered\n")


@POSIX
def test_a_signal_ends_it_while_nobody_reads_stdout(
    server: Script, start: Start, join: Join
) -> None:
    script = start_client(start, server.ports)
    chat(script, b"one")
    peer = join(server.ports)
    for _ in range(1_000):
        peer.push.send(line_of("ann", "x" * 1_000))
    assert script.process.stdout
    pipe = script.process.stdout.fileno()
    wait_for(lambda: unread(pipe) > 40_000, lambda: unread(pipe))
    script.process.send_signal(signal.SIGINT)
    assert script.wait() == 130


@POSIX
def test_a_signal_ends_it_while_nobody_reads_stderr(
    start: Start, full_pipe: tuple[int, int]
) -> None:
    script = start_client(start, (free_port(), free_port()), stderr=full_pipe[1])
    time.sleep(1.5)  # A notice is due by then.
    began = time.monotonic()
    script.process.send_signal(signal.SIGINT)
    assert script.wait() == 130
    assert time.monotonic() - began < 2


@POSIX
@pytest.mark.parametrize("name", ["INT", "HUP", "QUIT", "TERM"])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    server: Script, start: Start, name: str
) -> None:
    script = start_client(start, server.ports, before=sh(f'trap "" {name}; exec "$@"'))
    chat(script, b"one")
    script.process.send_signal(getattr(signal, f"SIG{name}"))
    chat(script, b"two")
    close(script)
    assert script.wait() == 0


# On Windows, Ctrl-Break ends both scripts, as does closing the window.


@WINDOWS
@NO_WINE
def test_ctrl_break_ends_both(start: Start, start_server: StartServer) -> None:
    if sys.platform == "win32":
        how = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        server = start_server(**how)
        script = start_client(start, server.ports, **how)
        chat(script, b"one")
        script.process.send_signal(signal.CTRL_BREAK_EVENT)
        assert script.wait() == 128 + signal.SIGBREAK
        server.process.send_signal(signal.CTRL_BREAK_EVENT)
        assert server.wait() == 0


# Windows says that NUL is a terminal, and its pipes and its console have rules of their own.


@pytest.mark.parametrize("stdout", [subprocess.PIPE, subprocess.DEVNULL])
def test_a_stdin_without_anything_ends_it(server: Script, start: Start, stdout: int) -> None:
    script = start_client(start, server.ports, stdin=subprocess.DEVNULL, stdout=stdout)
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


# It uses little: some files, no processor time while nothing happens, and bounded memory.


@LINUX
@pytest.mark.parametrize("files", [8, 10, 20, 34])
def test_too_few_open_files_are_one_line_and_status_1(
    server: Script, start: Start, files: int
) -> None:
    script = start_client(start, server.ports, before=sh(f'ulimit -n {files}; exec "$@"'))
    close(script, b"one\n")
    status = script.wait()
    assert (status, script.stderr.count("\n")) == (1, 1), (status, script.stderr)
    assert re.search(r"Too many open files.*; raise the limit of .*: ulimit -n\n", script.stderr)


@LINUX
@pytest.mark.parametrize("connected", [True, False])
def test_idle_it_uses_no_processor_time(server: Script, start: Start, connected: bool) -> None:
    script = start_client(start, server.ports if connected else (free_port(), free_port()))
    if connected:
        chat(script, b"one")
    else:
        script.wait_stderr("no server")
    before = script.cpu_seconds()
    with pytest.raises(subprocess.TimeoutExpired):
        script.process.wait(1)  # a second in which nothing happens
    assert script.cpu_seconds() - before < 0.05


@LINUX
def test_a_line_that_never_ends_takes_little_memory(server: Script, start: Start) -> None:
    with Path("/dev/zero").open("rb") as zero:
        script = start_client(start, server.ports, stdin=zero.fileno())
    wait_for(lambda: script.cpu_seconds() > 1, script.cpu_seconds)
    assert script.memory() < 60


@LINUX
@slow
def test_a_message_without_end_takes_no_memory(bare_server: BareServer, start: Start) -> None:
    """SUB breaks the connection, and connects anew after a while."""
    script = start_client(start, bare_server.ports)
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
