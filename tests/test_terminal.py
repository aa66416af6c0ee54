"""README, "Terminal": the client on a pseudo-terminal, read back through an emulator or tmux."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest
from peers import BareServer, line_of, message_of
from processes import LINUX, TIMEOUT, Script, StartServer, free_port, port_options, python, wait_for
from terminal import CONNECTED, ROWS, Open, Terminal

if sys.platform == "win32":
    pytest.skip("needs pseudo-terminals, which Windows has not", allow_module_level=True)

slow = pytest.mark.slow
LEFT = "\x1b[D"
NO_SERVER = (
    "client.py: no server at localhost (or its --key differs);"
    " your lines will be sent when it is back"
)
OpenClient = Callable[..., Terminal]
Tmux = Callable[..., str]


def command(ports: tuple[int, int]) -> list[str]:
    """Return the command that runs client.py for Ken."""
    return python("client.py", *port_options(ports), "--user", "ken")


def wait_connected(terminal: Terminal) -> Terminal:
    """Wait until a client says that it is connected."""
    terminal.wait_text(CONNECTED.replace(" ", ""))
    return terminal


def say(server: BareServer, message: str) -> None:
    """Publish what Ann says."""
    server.pub.send(message_of("ann", message))


def type_half(terminal: Terminal, line: str = "половина") -> None:
    """Type a line without Enter, and put the cursor before its last letter."""
    terminal.type(line + LEFT)
    terminal.wait_cursor(line, len(line) - 1)


@pytest.fixture
def open_client(open_terminal: Open, bare_server: BareServer) -> OpenClient:
    """Give a function that starts client.py on a terminal. A server that the test holds is up."""
    return lambda **how: wait_connected(open_terminal(*command(bare_server.ports), **how))


@pytest.fixture
def ken(open_client: OpenClient) -> Terminal:
    """Give Ken at his terminal, connected."""
    return open_client()


# README, Terminal: The line you are typing occupies one row
# README, What it adds to the original: Messages appear immediately, above the line you are typing.
# README, Differences from the original: it appears immediately, above the line you are typing

HALF_TYPED = {  # columns, keys, what the typed row shows then, the column of the cursor
    "short": (40, "Привет, как дела?" + LEFT * 5, "Привет, как дела?", 12),
    "scrolled": (40, "漢字" * 30 + LEFT * 10, "漢字" * 10, 28),
    "3 columns": (3, "абвг" + LEFT, "бвг", 2),
    "1 column": (1, "абв", "", 0),
}
MESSAGES = ["short", "as wide as 40 columns".ljust(35, "x"), "higher than the window" * 30]


@pytest.mark.parametrize(("columns", "keys", "row", "cursor"), HALF_TYPED.values(), ids=HALF_TYPED)
def test_messages_appear_above_a_half_typed_line(
    open_client: OpenClient, bare_server: BareServer, columns: int, keys: str, row: str, cursor: int
) -> None:
    ken = open_client(columns=columns)
    ken.type(keys)
    ken.wait_cursor(row, cursor)
    shown = CONNECTED
    for message in MESSAGES:
        say(bare_server, message)
        shown += f"ann> {message}"
        everything = re.sub(r"\s", "", shown + row)
        ken.wait_text(f"^{re.escape(everything)}$")
        ken.wait_cursor(row, cursor)
        ken.type("z\x7f")


def test_after_a_resize(ken: Terminal) -> None:
    line = "Привет, как дела?"
    type_half(ken, line)
    sizes = ((18, line, 16), (9, "ак дела?", 7), (3, "ла?", 2), (1, "?", 0), (30, line, 16))
    for columns, row, cursor in sizes:
        ken.resize(columns, ROWS)
        ken.wait_cursor(row, cursor)


@slow
def test_typing_is_prompt_in_a_flood(ken: Terminal, bare_server: BareServer) -> None:
    rate = 30_000  # messages a second

    def flood() -> None:
        began = time.monotonic()
        for number in range(2 * rate):
            say(bare_server, f"number {number}")
            if number % 300 == 0:
                time.sleep(max(0, began + number / rate - time.monotonic()))

    def press(key: str, row: str) -> float:
        began, before = time.monotonic(), len(ken.received)
        ken.type(key)
        drawn = f"l{row}\x1b7".encode()
        wait_for(lambda: drawn in ken.received[before:], lambda: ken.received[-300:])
        return time.monotonic() - began

    flooding = threading.Thread(target=flood)
    flooding.start()
    delays = []
    while flooding.is_alive():
        delays += [press("я", "я"), press("з", "яз"), press("\x15", "")]
    assert len(delays) > 10
    assert max(delays) < 0.5


# README, Terminal: Terminals disagree about the width of some emoji and flags.
# README, Terminal: The terminal wraps messages itself, so you can copy a long URL, and text reflows
# when you resize the window.


@pytest.fixture
def tmux(tmp_path: Path, bare_server: BareServer) -> Iterator[Tmux]:
    """Give a function that runs tmux's commands. A client is in its window of 60 columns."""
    if not shutil.which("tmux"):
        pytest.skip("needs tmux")

    def run(*arguments: str) -> str:
        options = ["-u", "-S", str(tmp_path / "tmux"), "-f", "/dev/null"]
        done = subprocess.run(["tmux", *options, *arguments], stdout=subprocess.PIPE, check=True)
        return done.stdout.decode().rstrip("\n")

    run("new-session", "-d", "-x", "60", "-y", "10", shlex.join(command(bare_server.ports)))
    wait_for(lambda: CONNECTED in run("capture-pane", "-p"), lambda: "no client in tmux")
    yield run
    run("kill-server")


def wait_pane(tmux: Tmux, end: str, column: int | None = None) -> int:
    """Wait until what tmux shows ends like this, as it would be copied; return the column."""

    def state() -> tuple[str, int]:
        text = tmux("capture-pane", "-p", "-J", "-S", "-")
        return text[-len(end) :], int(tmux("display", "-p", "#{cursor_x}"))

    wait_for(lambda: state() == (end, state()[1] if column is None else column), state)
    return state()[1]


@pytest.mark.parametrize("cluster", ["🇫🇷", "👩‍👩‍👧", "❤\ufe0f", "👍🏽", "1\ufe0f\u20e3", "漢é"])
def test_the_terminal_wraps_messages_and_places_the_cursor(
    tmux: Tmux, bare_server: BareServer, cluster: str
) -> None:
    tmux("send-keys", "-l", f"a{cluster}")
    column = wait_pane(tmux, f"a{cluster}")
    tmux("send-keys", "-l", "bc")
    tmux("send-keys", "Left", "Left")
    wait_pane(tmux, f"a{cluster}bc", column)
    url = "https://example.org/" + "0123456789" * 28
    say(bare_server, url)
    say(bare_server, "next")
    for width in (60, 37, 100, 13):
        tmux("resize-window", "-x", str(width), "-y", "10")
        wait_pane(tmux, f"\nann> {url}\nann> next\na{cluster}bc", column)


# README, What it adds to the original: No message can clear the screen, set the window title or
# overwrite other messages.


def test_hostile_and_coloured_messages(open_client: OpenClient, bare_server: BareServer) -> None:
    ken = open_client(environment={"NO_COLOR": ""})
    say(bare_server, "\x1b]0;title\x07\x1b[2Jhello")
    bare_server.pub.send(b"other> \x1b[31mred")
    ken.type("half")
    ken.wait_rows(r"ann> \x1b]0;title\x07\x1b[2Jhello", "other> red", "half")
    screen = ken.look()
    assert screen.title == ""
    cells = [screen.buffer[1][9], screen.buffer[2][9], screen.buffer[3][3]]
    assert [cell.fg for cell in cells] == ["cyan", "red", "default"]


# README, Delivery: On a terminal, your line is sent when you press Enter, and the echo then
# replaces it.


def test_the_echo_of_a_typed_line_replaces_it(ken: Terminal, bare_server: BareServer) -> None:
    echoes = []
    for number in range(2 * ROWS):
        ken.type(f"hello {number}\r\r")
        bare_server.answer(1)
        echoes.append(f"ken> hello {number}")
        ken.wait_rows(CONNECTED, *echoes)
        ken.wait_cursor("", 0)


@slow
def test_a_line_whose_echo_is_late_is_printed(ken: Terminal, bare_server: BareServer) -> None:
    ken.type("hello\rhow are you\rhalf")
    late = 'client.py: no echo yet for 2 lines; the first: {"user": "ken", "message": "hello"}'
    ken.wait_rows(CONNECTED, late, "half")
    ken.type(" a line\rhalf")
    ken.wait_rows(late, "half a line", "half")
    bare_server.answer(3)
    ken.wait_rows("half a line", "ken> hello", "ken> how are you", "ken> half a line", "half")
    ken.type("\x15\x04")
    assert ken.process.wait(TIMEOUT) == 0


# README, Delivery: While there is no connection, the line stays on the screen and is sent when the
# server is back.


def test_the_server_is_late_goes_away_and_comes_back(
    open_terminal: Open, start_server: StartServer
) -> None:
    ports = free_port(), free_port()
    ken = open_terminal(*command(ports))
    ken.wait_rows(NO_SERVER)
    early = [f"line {number}" for number in range(1_500)]  # more than may be in flight
    ken.type("\r".join([*early, "half"]))
    ken.wait_rows(NO_SERVER, *early, "half")
    server = start_server(ports=ports)
    ken.wait_rows(early[-1], CONNECTED, *(f"ken> {line}" for line in early), "half")
    server.kill()
    ken.wait_rows(NO_SERVER, "half")
    ken.type(" a line\r")
    ken.wait_rows(NO_SERVER, "half a line")
    start_server(ports=ports)
    ken.wait_rows(NO_SERVER, "half a line", CONNECTED, "ken> half a line")


def test_what_is_typed_before_the_client_is_up_is_there_once(
    open_terminal: Open, bare_server: BareServer, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    client = shlex.join(command(bare_server.ports))
    ken = open_terminal("sh", "-c", f"read -r line < {tmp_path}/fifo; exec {client}")
    ken.type("early\rhalf")
    ken.wait_cursor("half", 4)
    (tmp_path / "fifo").write_text("start\n")
    wait_connected(ken)
    ken.wait_cursor("half", 4)
    assert ken.rows() == ["early", CONNECTED, "half"]
    assert bare_server.receive_all() == [line_of("ken", "early")]


# README, Terminal: Pasting several lines sends each of them, except the last one if it does not end
# with a newline.


def open_shell(
    open_terminal: Open, ports: tuple[int, int], name: str = "sh", end: str = ""
) -> Terminal:
    """Start a shell, and the client in it."""
    if not shutil.which(name):
        pytest.skip(f"needs {name}")
    arguments = ["--norc", "--noprofile"] if name == "bash" else []
    shell = open_terminal(name, *arguments, "-i", environment={"PS1": "$ ", "ENV": ""})
    shell.wait_cursor("$", 2)
    shell.type(f"{shlex.join(command(ports))}{end}\r")
    return shell


def assert_prompt(shell: Terminal) -> None:
    """Assert that a shell has its terminal back as it was, and nothing typed into it."""
    shell.wait_cursor("$", 2)
    shell.type("read -r line; echo so''und\r")
    # At its prompt, bash has settings of its own.
    wait_for(lambda: shell.settings() == shell.first_settings, shell.settings)
    shell.type("\r")
    shell.wait_rows("$ read -r line; echo so''und", "", "sound", "$")


PASTES = {
    "code and long lines": ["def f(x):", "\tif x:", "", "\t\treturn\tx", "x" * 5_000, "漢" * 4_000],
    "many": pytest.param([f"line {number}" for number in range(20_000)], marks=slow),
}


@pytest.mark.parametrize("lines", PASTES.values(), ids=PASTES)
def test_a_paste(open_terminal: Open, bare_server: BareServer, lines: list[str]) -> None:
    shell = wait_connected(open_shell(open_terminal, bare_server.ports))
    shell.type("\r".join([*lines, "end"]))
    sent = [line for line in lines if line]
    assert [json.loads(line)["message"] for line in bare_server.answer(len(sent))] == sent
    shell.wait_cursor("end", 3)
    shell.type("\r\x04")
    bare_server.answer(1)
    shell.wait_rows("ken> end", "$")
    assert_prompt(shell)


# README, Terminal: Ctrl-D on an empty line leaves, Ctrl-C interrupts

LEAVES: dict[str, tuple[str | signal.Signals, int]] = {
    "Ctrl-D": ("\x11\x05\x15\x04", 0),  # after Ctrl-Q, for which it would wait
    "Ctrl-C": ("\x03", 130),
    "Ctrl-\\": ("\x1c", 131),
    "SIGTERM": (signal.SIGTERM, 143),
    "SIGHUP": (signal.SIGHUP, 129),
}


@LINUX
@pytest.mark.parametrize("before", ["", "\x13"], ids=["typing", "Ctrl-S"])
@pytest.mark.parametrize(("how", "status"), LEAVES.values(), ids=LEAVES)
def test_leaving(ken: Terminal, before: str, how: str | signal.Signals, status: int) -> None:
    type_half(ken)
    ken.type(before)
    if isinstance(how, str):
        ken.type(how)
    else:
        ken.process.send_signal(how)
    assert ken.process.wait(TIMEOUT) == status
    assert ken.settings() == ken.first_settings


def test_leaving_within_a_message(open_client: OpenClient, bare_server: BareServer) -> None:
    """The client waits 0.3 seconds for a slow terminal, which may be too short for a busy host."""

    def leaves_no_colour() -> bool:
        ken = open_client()
        ken.paused = True
        for _ in range(5):
            say(bare_server, "x" * 60_000)
        wait_for(lambda: ken.waiting() > 1_000, ken.waiting)
        ken.process.terminate()
        ken.paused = False
        ken.process.wait(TIMEOUT)
        wait_for(lambda: ken.waiting() == 0, ken.waiting)
        screen = ken.look()
        return screen.cursor.attrs.fg == "default" and pyte.modes.DECAWM in screen.mode

    assert any(leaves_no_colour() for _ in range(5))


def test_a_hang_up_ends_it(ken: Terminal) -> None:
    type_half(ken)
    ken.hang_up()
    assert ken.process.wait(TIMEOUT) in (1, 129)


MOMENTS = [(range(0, 400, 100), ""), pytest.param(range(0, 320, 6), "hello\r\x04", marks=slow)]


@LINUX
@pytest.mark.parametrize(("milliseconds", "typed"), MOMENTS)
def test_a_signal_at_any_moment(
    open_terminal: Open, bare_server: BareServer, milliseconds: range, typed: str
) -> None:
    for moment in milliseconds:
        ken = open_terminal(*command(bare_server.ports))
        ken.type(typed)
        process = Script(ken.process)
        wait_for(lambda: process.catches(signal.SIGTERM), ken.rows)  # noqa: B023
        time.sleep(moment / 1_000)
        ken.process.send_signal(signal.SIGINT)
        assert ken.process.wait(TIMEOUT) in (130, 0)
        assert ken.settings() == ken.first_settings
        assert not re.search(b"Traceback|client.py: cannot", ken.received)


@LINUX
def test_leaving_where_no_shell_shares_the_terminal(
    open_terminal: Open, bare_server: BareServer
) -> None:
    ken = wait_connected(open_terminal("setsid", "--wait", *command(bare_server.ports)))
    type_half(ken)
    ken.type("\x05\x15\x04")
    assert ken.process.wait(TIMEOUT) == 0
    assert ken.settings() == ken.first_settings


# README, Terminal: Ctrl-Z suspends, and `fg` resumes with the line intact.


def process_state(pid: int) -> str:
    """Return the letter that ps shows for a process: "T" if it is stopped. Z if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    return "Z"


@LINUX
@pytest.mark.parametrize("name", ["sh", "bash"])
def test_suspended_continued_and_killed(
    open_terminal: Open, bare_server: BareServer, name: str
) -> None:
    """Of these two, sh leaves the terminal as it finds it, and bash sets it, each time."""
    shell = open_shell(open_terminal, bare_server.ports, name, " & echo pid=$!")
    shell.wait_text(r"pid=\d.+\$$")
    pid = int(re.findall(r"pid=(\d+)", " ".join(shell.rows()))[0])

    def wait_stopped() -> None:
        wait_for(lambda: process_state(pid) == "T", shell.rows)

    wait_stopped()  # as it was started in the background
    shell.type("fg\r")
    wait_connected(shell)
    for number in range(2):
        type_half(shell)
        shell.type("\x1a")
        assert_prompt(shell)
        if number:
            say(bare_server, "hello")
            shell.type("bg\r")
            shell.wait_text(r"\$bg\[1\].+\$$")
            wait_stopped()  # since the shell has the keys
        shell.type("fg\r")
        shell.wait_cursor("половина", 7)
        shell.wait_rows(*["ann> hello"] * number, "половина")
        shell.type("\x05!\r")
        bare_server.answer(1)
        shell.wait_rows(*["ann> hello"] * number, "ken> половина!")
        shell.wait_cursor("", 0)
    shell.type("half\x1a")
    assert_prompt(shell)
    at_the_prompt = shell.settings()
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: process_state(pid) == "Z", shell.rows)
    assert shell.settings() == at_the_prompt


def test_ctrl_z_where_no_shell_could_continue_it(ken: Terminal, bare_server: BareServer) -> None:
    type_half(ken)
    before = len(ken.received)
    ken.type("\x1a")
    wait_for(lambda: b"\x1b[J" in ken.received[before:], ken.rows)
    say(bare_server, "hello")
    ken.wait_rows("ann> hello", "половина")
    ken.wait_cursor("половина", 7)


# README, Terminal: With `TERM=dumb`, or if stdout is not a terminal, the system's own line editing
# is used


@pytest.mark.parametrize("how", ["TERM=dumb exec {}", "{} | cat", "cat | NO_COLOR=1 {}"])
def test_without_the_line_editor(open_terminal: Open, bare_server: BareServer, how: str) -> None:
    ken = open_terminal("sh", "-c", how.format(shlex.join(command(bare_server.ports))))
    ken.type("onf\x7fe\r")
    assert bare_server.answer(1) == [line_of("ken", "one")]
    ken.wait_rows("ken> one")
    assert ken.rows().count("one") == 1  # as the kernel has shown it
    assert b"\x1b" not in ken.received
    assert ken.settings() == ken.first_settings
