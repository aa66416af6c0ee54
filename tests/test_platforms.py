"""README, "Options" and "Recipes": the client with whatever streams, signals and files it gets."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest
from peers import BareServer, Join, message_of
from processes import LINUX, POSIX, WINDOWS, Script, Start, after, close, read_all, read_line, write

import client

NOWHERE = 1, 1  # ports where no server is
WINE = sys.platform == "win32" and hasattr(ctypes.windll.ntdll, "wine_get_version")


def chat(script: Script, text: bytes) -> None:
    """Have a client's next message be the echo of a line."""
    write(script, text + b"\n")
    assert read_line(script) == b"k> " + text + b"\n"


# README, Output and exit status: Messages go to stdout, notices and logs to stderr.
# README, Output and exit status: 1 on failure

ONE, ECHO = b"one\n", b"k> one\n"
LONG = b"x" * 20_000 + b"\n"  # It is not sent, and a notice says so.
UNREAD = "client.py: the rest of the input, if any, was not read\n"
BAD_FILE = "client.py: [Errno 9] Bad file descriptor\n"
STREAMS = {  # what the shell does first: the input, the status, and what is on stdout and stderr
    "exec <&-": (b"", 0, b"", ""),  # like /dev/null
    "exec >&-": (ONE, 0, b"", ""),
    "exec 2>&-": (LONG + ONE, 1, ECHO, ""),
    "exec <&- >&- 2>&-": (b"", 0, b"", ""),
    # Three files that are open, but not for this.
    "exec 0>/dev/null": (b"", 1, b"", UNREAD),
    "exec 1</dev/null": (ONE, 1, b"", BAD_FILE),
    "exec 2</dev/null": (LONG + ONE, 1, ECHO, ""),
    "ulimit -n 10": (b"", 1, b"", "client.py: Too many open files\n"),
}


@POSIX
def test_streams_may_be_unusable(server: Script, start_client: Start) -> None:
    for command, (typed, *expected) in STREAMS.items():
        script = start_client(server.ports, before=after(command))
        close(script, typed)
        assert [script.wait(), read_all(script), script.stderr] == expected, command


@POSIX
def test_streams_may_be_non_blocking(server: Script, start_client: Start) -> None:
    """The client makes them blocking again, so that nothing is lost."""
    files = [os.open(os.devnull, os.O_RDWR | os.O_NONBLOCK) for _ in range(3)]
    script = start_client(server.ports, stdin=files[0], stdout=files[1], stderr=files[2])
    assert script.wait() == 0
    for file in files:
        assert os.get_blocking(file)
        os.close(file)


@POSIX
def test_stdin_may_become_non_blocking(server: Script, start_client: Start) -> None:
    """Reading it fails then, which must not look like its end."""
    reading, writing = os.pipe()
    script = start_client(server.ports, stdin=reading)
    os.write(writing, b"one\n")
    assert read_line(script) == b"k> one\n"
    os.set_blocking(reading, False)
    os.write(writing, b"two\n")
    assert (script.wait(), read_all(script), script.stderr) == (1, b"k> two\n", UNREAD)
    os.close(reading)
    os.close(writing)


def test_half_a_line_is_not_sent_if_reading_fails() -> None:
    reads = [b"one\nha", b"lf"]

    def read() -> bytes:
        if not reads:
            raise OSError
        return reads.pop(0)

    stdin, lines = client.Stdin(read, client.Splitter().feed), []
    while not stdin.ended:
        lines += stdin.read_lines()
    assert lines == [b"one"]


# README, What status 0 does not prove: If stdout is closed, for example by `| head -1`, the client
# drops the rest of the input, without a report, and waits for the last echo.
def test_stdout_may_be_closed(server: Script, start_client: Start, join: Join) -> None:
    peer = join(server.ports)
    script = start_client(server.ports)
    chat(script, b"one")
    assert script.process.stdout
    script.process.stdout.close()
    write(script, b"two\n")
    assert (script.wait(), script.stderr) == (0, "")
    assert [peer.receive(), peer.receive()] == [message_of("k", "one"), message_of("k", "two")]


# README, Output and exit status: If SIGINT, SIGTERM, SIGHUP or SIGQUIT ends the client, the status
# is 128 plus the signal number, such as 130 for Ctrl-C, and the client still reports how many lines
# may not have been delivered
@POSIX
def test_a_signal_is_in_the_status(server: Script, start_client: Start) -> None:
    """128 and its number, even while a client waits for somebody to read what it prints."""
    unread, full = os.pipe()
    os.set_blocking(full, False)
    os.write(full, b"x" * 1_000_000)  # as much of it as there is room for
    blocked = [start_client(server.ports, stdout=full), start_client(NOWHERE, stderr=full)]
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)
    scripts = {signum: start_client(NOWHERE) for signum in signals}
    for script in (*blocked, *scripts.values()):
        write(script, b"one\ntwo\n")
    for signum, script in scripts.items():
        script.wait_stderr("no server at localhost .*\n")
        script.process.send_signal(signum)
        assert script.wait() == 128 + signum
        assert script.stderr.endswith("back\nclient.py: 2 lines may not have been delivered\n")
    for script in blocked:  # By now, one has echoes to print, and one has a notice.
        script.process.send_signal(signal.SIGINT)
        assert script.wait() == 130
    os.close(unread)
    os.close(full)


# README, Recipes: nohup sh -c 'tail -n 0 -F access.log
@POSIX
def test_ignored_signals_stay_ignored(server: Script, start_client: Start) -> None:
    script = start_client(server.ports, before=after('trap "" INT HUP QUIT TERM'))
    chat(script, b"one")
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        script.process.send_signal(signum)
        chat(script, b"two")
    close(script)
    assert script.wait() == 0


# README, Platforms: Python 3.13 for Windows under Wine
@WINDOWS
@pytest.mark.skipif(WINE, reason="Wine has no Ctrl-Break")
def test_ctrl_break_ends_both(start_client: Start, start_server: Start) -> None:
    if sys.platform == "win32":
        how = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        server = start_server(**how)
        script = start_client(server.ports, **how)
        chat(script, b"one")
        script.process.send_signal(signal.CTRL_BREAK_EVENT)
        assert script.wait() == 128 + signal.SIGBREAK
        server.process.send_signal(signal.CTRL_BREAK_EVENT)
        assert server.wait() == 0


def test_a_stdin_without_anything_ends_it(server: Script, start_client: Start) -> None:
    script = start_client(server.ports, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert (script.wait(), script.stderr) == (0, "")


# README, Platforms: The line editor's keys were tested with a simulated console.
class Console:
    """Stands in for msvcrt, with the console of Microsoft's C library.

    A key without a character comes as two, and kbhit does not know of the second.
    """

    def __init__(self, keys: list[str], at_once: bool) -> None:
        self.keys, self.at_once, self.pushed_back = keys.copy(), at_once, ""

    def kbhit(self) -> bool:
        return bool(self.keys) and self.at_once

    def getwch(self) -> str:
        key = self.pushed_back or self.keys.pop(0)
        self.pushed_back = key[1:]
        return key[0]

    def ungetwch(self, char: str) -> None:
        if self.pushed_back:
            raise OSError
        self.pushed_back = char


@WINDOWS
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["a", "b", "\xe0G", "\0S", "\r"], "b"),  # Home, and Delete of the number pad
        (["à", "K", "b", "à", "\xe0K", "\xe0K", "à", "\r"], "àKàbà"),  # The last two are Left.
        (["\0;", "\ud83d", "\udc4b", "\r"], "👋"),  # F1, which does nothing
    ],
)
def test_keys_of_the_console(
    monkeypatch: pytest.MonkeyPatch, keys: list[str], line: str, at_once: bool
) -> None:
    if sys.platform == "win32":
        console, editor, sent = Console(keys, at_once), client.Editor(), list[bytes]()
        monkeypatch.setattr(client, "msvcrt", console)
        while console.keys or console.pushed_back:
            sent += editor.feed(client.Terminal().read())[0]
        assert sent == [line.encode()]


# README, zmq-talk-chat: It speaks the same protocol and also copes with restarts, slow subscribers
# and hostile text.
@LINUX
def test_idle_it_uses_no_processor_time(server: Script, start_client: Start) -> None:
    scripts = [start_client(server.ports), start_client(NOWHERE)]
    chat(scripts[0], b"one")
    scripts[1].wait_stderr("no server")
    before = [script.cpu_seconds() for script in scripts]
    time.sleep(1)  # a second in which nothing happens
    for script, seconds in zip(scripts, before, strict=True):
        assert script.cpu_seconds() - seconds < 0.05


@LINUX
@pytest.mark.slow
def test_endless_input_takes_no_memory(bare_server: BareServer, start_client: Start) -> None:
    """Neither a line nor a message takes memory. SUB breaks the connection, and connects anew."""
    script = start_client(bare_server.ports)
    write(script, b"one\n")
    bare_server.answer(1)
    assert read_line(script) == b"k> one\n"
    before = script.memory()
    write(script, bytes(10_000_000))
    bare_server.pub.send(b"x" * 100_000_000)
    port = bare_server.ports[1]
    no_answer = f"no answer from tcp://localhost:{port}; .*\n"
    script.wait_stderr(f"{no_answer}client.py: connected to localhost\n")
    assert script.memory() < before + 10
    bare_server.pub.send(b"y" * 65_536)
    assert read_line(script) == b"y" * 65_536 + b"\n"
