"""The client on a terminal: a real pseudo-terminal, its screen read back through an emulator."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

import pyte  # noqa: E402
from conftest import (  # noqa: E402
    NO_SERVER,
    ROOT,
    TIMEOUT,
    Peer,
    Script,
    free_port,
    port_options,
    wait_for,
)

import client  # noqa: E402

COLUMNS, ROWS = 40, 10


class Terminal:
    """A program on a pseudo-terminal, with the screen that a person would see."""

    def __init__(
        self, *command: str, environment: dict[str, str], stderr: int | None = None
    ) -> None:
        self.screen = pyte.HistoryScreen(COLUMNS, ROWS, history=100_000, ratio=1)
        self._stream = pyte.ByteStream(self.screen)
        self._lock = threading.Lock()
        self._master, self._slave = os.openpty()
        self._set_size(COLUMNS, ROWS)
        self.settings = termios.tcgetattr(self._slave)
        self.received = b""
        self.process = subprocess.Popen(
            command,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave if stderr is None else stderr,
            # Unbuffered, readline would write each byte of an escape sequence by itself.
            env={**os.environ, "PYTHONUNBUFFERED": "", "TERM": "xterm", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65_536):
                with self._lock:
                    self.received += data
                    self._stream.feed(data)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size, as dragging its corner does."""
        with self._lock:
            self.screen.resize(rows, columns)
        self._set_size(columns, rows)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def rows(self) -> list[str]:
        """Return all rows that are or were on the screen, the blank ones at the end left out."""
        with self._lock:
            past = [
                "".join(row[n].data for n in range(len(row))) for row in self.screen.history.top
            ]
            rows = [row.rstrip() for row in [*past, *self.screen.display]]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def cursor(self) -> tuple[str, int]:
        """Return the text of the cursor's row, and the cursor's column."""
        with self._lock:
            return self.screen.display[self.screen.cursor.y].rstrip(), self.screen.cursor.x

    def wait_rows(self, *last: str) -> None:
        """Wait until the last rows are these."""
        wait_for(
            lambda: self.rows()[-len(last) :] == list(last), lambda: (last, self.rows()[-ROWS:])
        )

    def wait_cursor(self, row: str, column: int) -> None:
        """Wait until the cursor is in this row, in this column."""
        wait_for(lambda: self.cursor() == (row, column), self.cursor)

    def wait_connected(self) -> None:
        """Wait until the client is connected, and its line editor has the terminal."""
        self.wait_rows("client.py: connected to localhost")
        wait_for(lambda: not termios.tcgetattr(self._slave)[3] & termios.ICANON, self.rows)

    def close(self) -> None:
        """End the program, if it still runs."""
        self.process.kill()
        self.process.wait(TIMEOUT)
        os.close(self._slave)
        self._reader.join(TIMEOUT)  # or else it might read from the next file with this number
        os.close(self._master)


CLIENT = [sys.executable, str(ROOT / "client.py")]
Open = Callable[..., Terminal]


@pytest.fixture
def open_terminal() -> Iterator[Open]:
    """Give a function that starts client.py on a terminal, against a server's ports."""
    terminals = []

    def open_it(ports: tuple[int, int], *options: str, **environment: str) -> Terminal:
        command = [*CLIENT, *port_options(ports), *options]
        terminals.append(Terminal(*command, environment=environment))
        return terminals[-1]

    yield open_it
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def ken(open_terminal: Open, server: Script) -> Terminal:
    """Give Ken at his terminal, connected."""
    terminal = open_terminal(server.ports, "--user", "ken")
    terminal.wait_connected()
    return terminal


def say(peer: Peer, message: str) -> None:
    """Have someone else say something."""
    peer.push.send_json({"user": "ann", "message": message}, ensure_ascii=False)


def rows_of(notice: str, columns: int = COLUMNS) -> list[str]:
    """Return the rows that a notice takes on the screen."""
    starts = range(0, len(notice) - 1, columns)
    return [notice[start : start + columns].rstrip() for start in starts]


def width(text: str) -> int:
    """Return the columns that the emulator gives to a text without joiners."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


MESSAGES = {
    "short": "hello",
    "as wide as the screen": "x" * (COLUMNS - 5),
    "one wider": "x" * (COLUMNS - 4),
    "a paragraph": "a long paragraph, pasted " * 9,
    "higher than the screen": "y" * COLUMNS * (ROWS + 5),
    "cjk": "漢字" * 30,
    "emoji": "👋🎉" * 15,
    "mixed": "a漢b" * 25,
}


@pytest.mark.parametrize("at_bottom", [False, True], ids=["top", "bottom"])
@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_a_message_leaves_the_half_typed_line_whole(
    ken: Terminal, server: Script, join: Callable[..., Peer], message: str, at_bottom: bool
) -> None:
    peer = join(server.ports)
    if at_bottom:
        for number in range(ROWS):
            say(peer, f"line {number}")
        ken.wait_rows(*(f"ann> line {number}" for number in range(ROWS)))
    ken.type("half a sentence")
    ken.wait_cursor("half a sentence", 15)
    ken.type("\x1b[D" * 9)
    ken.wait_cursor("half a sentence", 6)
    say(peer, message)
    say(peer, "end")
    ken.wait_rows("ann> end", "half a sentence")
    ken.wait_cursor("half a sentence", 6)
    rows = ken.rows()[:-2]
    start = max(n for n, row in enumerate(rows) if row.startswith("ann> ") and "line " not in row)
    assert "".join(row.ljust(COLUMNS) for row in rows[start:]).replace(" ", "") == (
        f"ann> {message}".replace(" ", "")
    )
    assert len(rows[start:]) <= -(-width(f"ann> {message}") // (COLUMNS - 1))
    ken.type("n odd\x05!\r")
    ken.wait_rows("ann> end", "ken> half an odd sentence!")


def test_a_burst_shows_each_message_once_and_in_order(
    ken: Terminal, server: Script, join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    ken.type("half a sentence\x1b[D")
    ken.wait_cursor("half a sentence", 14)
    for number in range(3_000):
        say(peer, f"number {number}")
    ken.wait_rows("ann> number 2999", "half a sentence")
    assert [row for row in ken.rows() if "number" in row] == [
        f"ann> number {number}" for number in range(3_000)
    ]
    ken.wait_cursor("half a sentence", 14)


def test_after_a_resize(ken: Terminal, server: Script, join: Callable[..., Peer]) -> None:
    peer = join(server.ports)
    ken.type("half a sentence")
    ken.wait_cursor("half a sentence", 15)
    for columns, rows in ((60, 10), (25, 15), (50, 20)):
        ken.resize(columns, rows)
        message = "z" * (columns * 2 - 5)
        say(peer, message)
        ken.wait_rows("ann> " + "z" * (columns - 5), "z" * columns, "half a sentence")
        ken.type("!\x7f")
        ken.wait_cursor("half a sentence", 15)


@pytest.mark.parametrize("enter", ["\r", "\x0f"])  # At Ctrl-O, readline's editing ends.
def test_a_line_longer_than_the_screen_stays_on_its_row(
    ken: Terminal, server: Script, join: Callable[..., Peer], enter: str
) -> None:
    peer = join(server.ports)
    say(peer, "first")
    ken.wait_rows("ann> first")
    before = ken.rows()
    ken.type("word " * 30)
    wait_for(lambda: ken.cursor()[0].endswith("word"), ken.rows)
    say(peer, "hello")
    wait_for(lambda: ken.rows()[:-1] == [*before, "ann> hello"], ken.rows)
    ken.type(enter)
    said = "ken>" + "word" * 30
    wait_for(lambda: "".join(ken.rows()).replace(" ", "").endswith("hello" + said), ken.rows)
    assert ken.rows()[: len(before) + 1] == [*before, "ann> hello"]


def test_a_typed_line_gives_way_to_its_echo(ken: Terminal) -> None:
    before = ken.rows()
    for number in range(2 * ROWS):
        ken.type(f"hello {number}\r")
        ken.wait_rows(f"ken> hello {number}")
        ken.wait_cursor("", 0)
    ken.type("\r")  # an empty line leaves no trace
    ken.type("last\r")
    ken.wait_rows("ken> last")
    expected = [*before, *(f"ken> hello {number}" for number in range(2 * ROWS)), "ken> last"]
    assert ken.rows() == expected
    assert b"\a" not in ken.received


@pytest.mark.parametrize("keys", ["\r", "\n", "\x1b3\r", "\x1b\n\r"])  # the last in vi mode
def test_enter_sends_in_every_mode(ken: Terminal, keys: str) -> None:
    ken.type("a line" + keys)
    ken.wait_rows("client.py: connected to localhost", "ken> a line")
    ken.wait_cursor("", 0)


def test_the_up_arrow_brings_back_what_was_said(ken: Terminal) -> None:
    ken.type("once\r")
    ken.wait_rows("ken> once")
    ken.type("\x1b[A")
    ken.wait_cursor("once", 4)
    ken.type("\x15twice\x01and \r")
    ken.wait_rows("ken> once", "ken> and twice")


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_after_ctrl_z_the_shell_has_its_terminal_and_after_fg_editing_goes_on(
    server: Script, join: Callable[..., Peer], shell: str
) -> None:
    """Of these two, sh leaves the terminal as it finds it, and bash sets it, each time."""
    if not shutil.which(shell):
        pytest.skip(f"has no {shell}")
    environment = {"PS1": "$ ", "ENV": ""}
    arguments = ["--norc", "--noprofile"] if shell == "bash" else []
    terminal = Terminal(shell, *arguments, "-i", environment=environment)
    peer = join(server.ports)
    with contextlib.closing(terminal):
        wait_for(lambda: terminal.cursor() == ("$", 2), terminal.rows)
        terminal.type(shlex.join([*CLIENT, *port_options(server.ports), "--user", "ken"]) + "\r")
        terminal.wait_connected()
        for number in range(2):
            terminal.type("half a sentence\x1b[D")
            terminal.wait_cursor("half a sentence", 14)
            terminal.type("\x1a")
            wait_for(lambda: terminal.cursor() == ("$", 2), terminal.rows)
            if shell == "sh":
                assert termios.tcgetattr(terminal._slave) == terminal.settings
            say(peer, f"hello {number}")  # while it is stopped
            terminal.type("echo so''und\r")
            wait_for(lambda: "sound" in terminal.rows(), terminal.rows)
            terminal.type("fg\r")
            terminal.wait_rows(f"ann> hello {number}", "half a sentence")
            terminal.wait_cursor("half a sentence", 14)
            terminal.type("\x05!\r")
            terminal.wait_rows(f"ann> hello {number}", "ken> half a sentence!")
            terminal.wait_cursor("", 0)
        terminal.type("half\x03")
        wait_for(lambda: terminal.cursor() == ("$", 2), terminal.rows)
        if shell == "sh":
            assert termios.tcgetattr(terminal._slave) == terminal.settings


def test_ctrl_z_does_no_harm_where_no_shell_could_go_on(
    ken: Terminal, server: Script, join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    ken.type("half a sentence\x1b[D")
    ken.wait_cursor("half a sentence", 14)
    for number in range(3):
        ken.type("\x1a")
        # The line is drawn anew. Until then, the kernel may drop what is shown: see NOFLSH in
        # termios(3).
        wait_for(lambda: ken.received.count(b"\x1b[J") > number, ken.rows)  # noqa: B023
        say(peer, f"hello {number}")
        ken.wait_rows(*(f"ann> hello {n}" for n in range(number + 1)), "half a sentence")
        ken.wait_cursor("half a sentence", 14)
    ken.type("\x05!\r")
    ken.wait_rows("ann> hello 2", "ken> half a sentence!")


def has_ended(pid: str) -> bool:
    """Return whether a process is none any more, or one that is not waited for yet."""
    try:
        return "zombie" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not shutil.which("bash"), reason="has no bash")
def test_a_job_that_is_killed_while_it_is_stopped_leaves_the_shell_its_terminal(
    server: Script,
) -> None:
    shell = Terminal("bash", "--norc", "--noprofile", "-i", environment={"PS1": "$ "})
    with contextlib.closing(shell):
        wait_for(lambda: shell.cursor() == ("$", 2), shell.rows)
        shell.type(shlex.join([*CLIENT, *port_options(server.ports)]) + "\r")
        shell.wait_connected()
        shell.type("\x1a")
        wait_for(lambda: shell.cursor() == ("$", 2), shell.rows)
        shell.type("echo pid=`jobs -p`\r")
        wait_for(lambda: re.search(r"pid=\d+$", "\n".join(shell.rows()), re.M), shell.rows)
        (pid,) = re.findall(r"pid=(\d+)$", "\n".join(shell.rows()), re.M)
        wait_for(lambda: shell.cursor() == ("$", 2), shell.rows)
        at_the_prompt = termios.tcgetattr(shell._slave)
        os.kill(int(pid), signal.SIGTERM)
        os.kill(int(pid), signal.SIGCONT)
        wait_for(lambda: has_ended(pid), shell.rows)
        assert termios.tcgetattr(shell._slave) == at_the_prompt
        assert not at_the_prompt[3] & termios.ICANON


def test_what_cannot_start_in_the_background_ends_there(server: Script) -> None:
    """Who changes the terminal's settings there is stopped."""
    shell = Terminal("bash", "--norc", "--noprofile", "-i", environment={"PS1": "$ "})
    with contextlib.closing(shell):
        wait_for(lambda: shell.cursor() == ("$", 2), shell.rows)
        command = shlex.join([*CLIENT, *port_options(server.ports), "--key", "/nope"])
        shell.type(f"{command} 2> /dev/null & wait $!; echo status=$?\r")
        wait_for(lambda: re.search(r"status=\d+$", "\n".join(shell.rows()), re.M), shell.rows)
        assert "status=1" in shell.rows()


def test_what_is_typed_is_not_in_a_file_that_the_chat_goes_to(
    start_server: Callable[..., Script], tmp_path: Path
) -> None:
    ports = (free_port(), free_port())
    command = shlex.join([*CLIENT, *port_options(ports), "--user", "ken"])
    log = tmp_path / "log"
    ken = Terminal("sh", "-c", f"exec {command} > {log}", environment={})
    with contextlib.closing(ken):
        ken.wait_rows(*rows_of(NO_SERVER))
        ken.type("hello\r")
        ken.wait_cursor("", 0)
        start_server(*ports)
        ken.wait_rows("client.py: connected to localhost")
        ken.type("\x04")
        assert ken.process.wait(TIMEOUT) == 0
    assert log.read_text() == "ken> hello\n"


def test_a_paste_is_one_line_after_another(ken: Terminal) -> None:
    lines = [f"line {number}" for number in range(500)]
    ken.type("\r".join(lines))
    ken.wait_cursor("line 499", 8)
    ken.wait_rows("ken> line 498", "line 499")
    assert ken.rows()[1:-1] == [f"ken> {line}" for line in lines[:-1]]


def test_colours_and_what_is_no_colour(
    open_terminal: Open, server: Script, join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    colored = open_terminal(server.ports)
    plain = open_terminal(server.ports, NO_COLOR="1")
    for terminal in (colored, plain):
        terminal.wait_connected()
    say(peer, "\x1b]0;title\x07\x1b[2Jhello")
    for terminal in (colored, plain):
        terminal.wait_rows(r"ann> \x1b]0;title\x07\x1b[2Jhello")
        assert terminal.screen.title == ""
    assert colored.screen.buffer[1][6].fg == "cyan"
    assert plain.screen.buffer[1][6].fg == "default"


def test_a_message_is_coloured_in_all_its_rows(
    ken: Terminal, server: Script, join: Callable[..., Peer]
) -> None:
    ken.type("half")
    ken.wait_cursor("half", 4)
    say(join(server.ports), "z" * (3 * COLUMNS - 5))
    ken.wait_rows("ann> " + "z" * (COLUMNS - 5), "z" * COLUMNS, "z" * COLUMNS, "half")
    ken.wait_cursor("half", 4)
    typed = ken.screen.cursor.y
    ends = [ken.screen.buffer[row][COLUMNS - 1].fg for row in range(typed - 3, typed + 1)]
    assert ends == ["cyan", "cyan", "cyan", "default"]


def test_a_paste_without_a_server_is_not_left_to_the_shell(
    open_terminal: Open, start_server: Callable[..., Script]
) -> None:
    ports = (free_port(), free_port())
    ken = open_terminal(ports, "--user", "ken")
    ken.wait_rows(*rows_of(NO_SERVER))
    lines = [f"line {number}" for number in range(client.WINDOW + 50)]
    ken.type("\r".join(lines) + "\r")
    ken.wait_rows(*lines[-ROWS:])  # They were taken, since they are shown.
    start_server(*ports)
    ken.wait_rows(f"ken> {lines[-1]}")
    assert ken.rows()[-len(lines) :] == [f"ken> {line}" for line in lines]


def test_the_server_is_late_goes_away_and_comes_back(
    open_terminal: Open, start_server: Callable[..., Script]
) -> None:
    ports = (free_port(), free_port())
    ken = open_terminal(ports, "--user", "ken")
    ken.type("early\r")
    late = ["early", *rows_of(NO_SERVER)]
    ken.wait_rows(*late)
    first = start_server(*ports)
    ken.wait_rows(*late, "client.py: connected to localhost", "ken> early")
    ken.type("half")
    ken.wait_cursor("half", 4)
    first.process.kill()
    gone = rows_of(NO_SERVER)
    ken.wait_rows(*gone, "half")
    ken.type(" a line\r")
    ken.wait_rows(*gone, "half a line")
    start_server(*ports)
    ken.wait_rows(*gone, "half a line", "client.py: connected to localhost", "ken> half a line")


def test_a_line_that_no_server_shows_is_explained_and_stays(
    open_terminal: Open, server: Script
) -> None:
    ken = open_terminal(server.ports)
    ken.wait_connected()
    notice = "client.py: not sent, no chat line in JSON (to just type, use --user): hello"
    for count in (1, 2):
        ken.type("hello\r")
        expected = notice.replace(" ", "") * count
        wait_for(lambda: "".join(ken.rows()).replace(" ", "").endswith(expected), ken.rows)  # noqa: B023
        ken.wait_cursor("", 0)


def state_at(name: str, ken: Terminal) -> None:
    """Bring Ken into a state in which he may want to leave."""
    if name == "typing":
        ken.type("half a sentence")
        ken.wait_cursor("half a sentence", 15)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the settings through the other end")
@pytest.mark.parametrize("state", ["typing", "waiting"])
@pytest.mark.parametrize(
    ("leave", "status"),
    [("\x03", 130), ("\x1c", 131), ("\x04", 0), (signal.SIGTERM, 143), (signal.SIGQUIT, 131)],
)
def test_leaving_leaves_the_terminal_as_it_was(
    ken: Terminal, state: str, leave: str | signal.Signals, status: int
) -> None:
    state_at(state, ken)
    if isinstance(leave, signal.Signals):
        ken.process.send_signal(leave)
    else:
        ken.type("\x15" + leave if leave == "\x04" else leave)
    assert ken.process.wait(TIMEOUT) == status
    assert termios.tcgetattr(ken._slave) == ken.settings
    # The kernel echoes Ctrl-C after it sent the signal, and may find the settings put back by then.
    wait_for(lambda: ken.cursor() in (("", 0), ("^C", 2), ("^\\", 2)), ken.cursor)
    assert b"Traceback" not in ken.received


def test_a_signal_ends_it_though_the_terminal_shows_nothing_more(ken: Terminal) -> None:
    ken.type("half a sentence")
    ken.wait_cursor("half a sentence", 15)
    termios.tcflow(ken._slave, termios.TCOOFF)  # as Ctrl-S does
    ken.process.terminate()
    assert ken.process.wait(TIMEOUT) == 143
    assert termios.tcgetattr(ken._slave) == ken.settings


@pytest.mark.slow
def test_a_late_echo_is_told_and_what_the_server_took_with_it_is_sent_again(
    open_terminal: Open, server: Script, start_server: Callable[..., Script]
) -> None:
    ken = open_terminal(server.ports, "--user", "ken")
    ken.resize(80, 10)
    ken.wait_connected()
    ken.type("hi\r")
    ken.wait_rows("ken> hi")
    server.process.send_signal(signal.SIGSTOP)
    ken.type("hello\rhow are you\rhalf")
    late = "client.py: no echo yet; lines: 2, the first: ken> hello"
    before = ["ken> hi", late]
    ken.wait_rows(*before, "half")  # once
    ken.type(" a line\rhalf")
    ken.wait_rows(*before, "half a line", "half")
    server.process.kill()
    ken.wait_rows(*before, "half a line", *rows_of(NO_SERVER, 80), "half")
    start_server(*server.ports)
    said = ["ken> hello", "ken> how are you", "ken> half a line"]
    ken.wait_rows("client.py: connected to localhost", *said, "half")
    ken.type("\x15\x04")
    assert ken.process.wait(TIMEOUT) == 0


def signals_caught(ken: Terminal) -> int:
    """Return the signals that have a handler, a bit for each."""
    status = Path(f"/proc/{ken.process.pid}/status").read_text()
    return int(re.findall(r"SigCgt:\s+(\w+)", status)[0], 16)


def interrupt_after(ken: Terminal, seconds: float) -> None:
    """Press Ctrl-C some time after main has set its handlers, SIGTERM's after SIGINT's."""
    wait_for(lambda: signals_caught(ken) >> (signal.SIGTERM - 1) & 1, lambda: "no handler")
    time.sleep(seconds)
    ken.process.send_signal(signal.SIGINT)
    assert ken.process.wait(TIMEOUT) in (130, 0)
    assert termios.tcgetattr(ken._slave) == ken.settings
    assert b"Traceback" not in ken.received
    assert b"client.py: cannot" not in ken.received


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("moment", range(8))
def test_ctrl_c_ends_it_quietly_at_any_moment(
    open_terminal: Open, server: Script, moment: int
) -> None:
    interrupt_after(open_terminal(server.ports, "--user", "ken"), moment * 0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("typed", ["", "hello\r\x04"])
def test_ctrl_c_ends_it_quietly_at_any_of_many_moments(
    open_terminal: Open, server: Script, typed: str
) -> None:
    for moment in range(80):
        ken = open_terminal(server.ports, "--user", "ken")
        ken.type(typed)
        interrupt_after(ken, moment * 0.004)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("read", [False, True], ids=["full", "gone"])
def test_ctrl_c_ends_it_though_nobody_reads_stderr(server: Script, read: bool) -> None:
    """A terminal for stdin and stdout, and for stderr a pipe that is full, or was closed."""
    end, stderr = os.pipe()
    os.set_blocking(stderr, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(stderr, bytes(4_096))
    os.set_blocking(stderr, True)
    if read:
        os.close(end)
    ken = Terminal(*CLIENT, *port_options(server.ports), stderr=stderr, environment={})
    os.close(stderr)
    with contextlib.closing(ken):
        wait_for(lambda: signals_caught(ken) >> (signal.SIGTERM - 1) & 1, lambda: "no handler")
        ken.process.send_signal(signal.SIGINT)
        assert ken.process.wait(TIMEOUT) == 130
        assert termios.tcgetattr(ken._slave) == ken.settings
    if not read:
        os.close(end)


@pytest.mark.parametrize("leave", ["\x03", "\x04"])
def test_leaving_when_there_is_no_server(open_terminal: Open, leave: str) -> None:
    ken = open_terminal((free_port(), free_port()))
    ken.wait_rows(*rows_of(NO_SERVER))
    ken.type(leave)
    assert ken.process.wait(TIMEOUT) == (130 if leave == "\x03" else 0)


@pytest.mark.parametrize("missing", ["readline", "ctypes"])
def test_without_readline(
    open_terminal: Open, server: Script, join: Callable[..., Peer], tmp_path: Path, missing: str
) -> None:
    (tmp_path / f"{missing}.py").write_text("raise ImportError\n")
    peer = join(server.ports)
    ken = open_terminal(server.ports, "--user", "ken", PYTHONPATH=str(tmp_path))
    ken.wait_rows("client.py: connected to localhost")
    ken.type("half")
    ken.wait_cursor("half", 4)
    say(peer, "hello")
    ken.wait_rows("ann> hello", "half")
    ken.type(" a line " + "x" * COLUMNS + "\r")
    echo = "ken> half a line " + "x" * COLUMNS
    expected = ["client.py: connected to localhost", "ann> hello", echo[:COLUMNS], echo[COLUMNS:]]
    ken.wait_rows(*expected)
    assert ken.rows() == expected
    ken.type("\x03")
    assert ken.process.wait(TIMEOUT) == 130


def test_a_dumb_terminal_gets_plain_lines(
    open_terminal: Open, server: Script, join: Callable[..., Peer]
) -> None:
    peer = join(server.ports)
    ken = open_terminal(server.ports, "--user", "ken", TERM="dumb")
    ken.type("hello\r")
    ken.wait_rows("hello", "ken> hello")
    say(peer, "hi")
    ken.wait_rows("ann> hi")
    assert b"\x1b" not in ken.received
