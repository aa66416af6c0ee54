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
from terminal import ROWS, Open, Terminal

if sys.platform == "win32":
    pytest.skip("needs pseudo-terminals, which Windows has not", allow_module_level=True)

slow = pytest.mark.slow
LEFT = "\x1b[D"
NO_SERVER = (
    "client.py: no server at localhost (or its --key differs);"
    " your lines will be sent when it is back"
)
CONNECTED = "client.py: connected to localhost"
OpenClient = Callable[..., Terminal]
Tmux = Callable[..., str]
Leave = str | signal.Signals


def command(ports: tuple[int, int]) -> list[str]:
    """Return the command that runs client.py for Ken."""
    return [*python("client.py"), *port_options(ports), "--user", "ken"]


def wait_connected(terminal: Terminal, times: int = 1) -> Terminal:
    """Wait until a client says that it is connected, and takes the keys."""
    wait_for(lambda: squeeze(terminal.rows()).count("connectedto") >= times, terminal.rows)
    wait_for(terminal.keys_are_taken, terminal.rows)
    return terminal


def squeeze(rows: list[str]) -> str:
    """Return rows as one text without spaces."""
    return re.sub(r"\s", "", "".join(rows))


def rows_of(text: str, columns: int = 40) -> list[str]:
    """Return the rows that a text takes."""
    return [text[start : start + columns].rstrip() for start in range(0, len(text), columns)]


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

HALF_TYPED = [
    (40, 10, "half a sentence" + LEFT * 9, "half a sentence", 6),
    (40, 10, "Привет, как дела?" + LEFT * 5, "Привет, как дела?", 12),
    (40, 10, "漢字かな" + LEFT, "漢字かな", 6),
    (40, 10, "e\u0301te\u0301 🎉!" + LEFT, "été 🎉!", 6),
    (40, 10, "много слов " * 20, ("много слов " * 20)[-39:].rstrip(), 39),
    (40, 10, "много слов " * 20 + "\x01", ("много слов " * 20)[:40], 0),
    (40, 10, "漢字" * 30 + LEFT * 10, "漢字" * 10, 28),
    (40, 1, "half" + LEFT, "half", 3),
    (500, 10, "я" * 600, "я" * 499, 499),
    (3, 5, "абвг" + LEFT, "бвг", 2),
    (2, 4, "абв", "в", 1),
    (1, 1, "абв", "", 0),
]


@pytest.mark.parametrize("case", HALF_TYPED)
def test_a_half_typed_line(
    open_client: OpenClient, bare_server: BareServer, case: tuple[int, int, str, str, int]
) -> None:
    columns, rows, keys, row, cursor = case
    ken = open_client(columns=columns, rows=rows)
    ken.type(keys)
    ken.wait_cursor(row, cursor)
    for number in range(3):
        say(bare_server, f"number {number}")
        ken.wait_text(re.escape(squeeze([f"ann>number{number}{row}"])) + "$")
        ken.wait_cursor(row, cursor)
        ken.type("z\x7f")
        say(bare_server, "end")
        ken.wait_text(re.escape(squeeze([f"ann>end{row}"])) + "$")
        ken.wait_cursor(row, cursor)
    assert squeeze(ken.rows()).count("number") == 3
    ken.type("\r")
    assert len(bare_server.answer(1)) == 1
    wait_for(lambda: row not in ken.cursor()[0] or not row, ken.rows)


def test_after_a_resize(ken: Terminal, bare_server: BareServer) -> None:
    line = "Привет, как дела?"
    type_half(ken, line)
    for columns, rows in ((60, 10), (25, 15), (18, 20)):
        ken.resize(columns, rows)
        say(bare_server, "z" * (columns * 2 - 5))
        ken.wait_text("ann>" + "z" * (columns * 2 - 5) + "Привет,какдела.$")
        ken.wait_cursor(line, 16)
    for columns, row, cursor in ((9, "ак дела?", 7), (3, "ла?", 2), (1, "?", 0), (30, line, 16)):
        ken.resize(columns, 20)
        ken.wait_cursor(row, cursor)


# README, Terminal: Terminals disagree about the width of some emoji and flags.


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


@pytest.mark.parametrize("cluster", ["🇫🇷", "👩‍👩‍👧", "❤\ufe0f", "👍🏽", "1\ufe0f\u20e3"])
def test_the_cursor_is_where_the_terminal_puts_it(
    tmux: Tmux, bare_server: BareServer, cluster: str
) -> None:
    tmux("send-keys", "-l", f"a{cluster}")
    width = wait_pane(tmux, f"a{cluster}")
    tmux("send-keys", "-l", "bc")
    tmux("send-keys", "Left", "Left")
    wait_pane(tmux, f"a{cluster}bc", width)
    say(bare_server, "hello")
    wait_pane(tmux, f"ann> hello\na{cluster}bc", width)


# README, Terminal: The terminal wraps messages itself, so you can copy a long URL, and text reflows
# when you resize the window.


@pytest.mark.parametrize(("line", "column"), [("half a line", 11), ("漢字かな", 8), ("é ✓ ů", 5)])
def test_a_url_is_copied_as_one_line(
    tmux: Tmux, bare_server: BareServer, line: str, column: int
) -> None:
    url = "https://example.org/" + "0123456789" * 28
    tmux("send-keys", "-l", line)
    wait_pane(tmux, line, column)
    say(bare_server, url)
    say(bare_server, "next")
    for width in (60, 37, 100, 13):
        tmux("resize-window", "-x", str(width), "-y", "10")
        wait_pane(tmux, f"\nann> {url}\nann> next\n{line}", column)


MESSAGES = [
    "short",
    "x" * 35,  # as wide as the window
    "x" * 36,
    "a long paragraph, pasted " * 9,
    "y" * 40 * (ROWS + 5),  # higher than the window
    "漢字" * 30,
    "👋🎉" * 15,
    "a漢б" * 25,
    "e\u0301" * 50,
    "\tif x:\t# no\ty",
]


@pytest.mark.parametrize("columns", [40, 7])
def test_nothing_of_a_message_is_lost(
    open_client: OpenClient, bare_server: BareServer, columns: int
) -> None:
    ken = open_client(columns=columns)
    type_half(ken, "ab")
    shown = squeeze(rows_of(CONNECTED))
    for message in MESSAGES:
        say(bare_server, message)
        shown += squeeze([f"ann>{message}"]).replace("e\u0301", "é")
        wait_for(lambda: squeeze(ken.rows()) == f"{shown}ab", lambda: (shown, ken.rows()))  # noqa: B023
        ken.wait_cursor("ab", 1)
    assert "" not in ken.rows()


# README, What it adds to the original: Messages appear immediately, above the line you are typing.
# README, Differences from the original: it appears immediately, above the line you are typing


def test_a_burst_shows_each_message_once_and_in_order(
    ken: Terminal, bare_server: BareServer
) -> None:
    type_half(ken)
    for number in range(3_000):
        say(bare_server, f"number {number}")
    ken.wait_rows("ann> number 2999", "половина")
    assert ken.rows()[1:-1] == [f"ann> number {number}" for number in range(3_000)]
    ken.wait_cursor("половина", 7)


@slow
def test_typing_is_prompt_in_a_flood(ken: Terminal, bare_server: BareServer) -> None:
    count, rate = 60_000, 30_000

    def flood() -> None:
        began = time.monotonic()
        for number in range(count):
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
    end = f"number {count - 1}\x1b".encode()
    wait_for(lambda: end in ken.received, lambda: ken.received[-300:])
    numbers = re.findall(rb"ann> \x1b\[36mnumber (\d+)\x1b\[0m\r\n", ken.received)
    assert numbers == [b"%d" % number for number in range(count)]
    assert len(delays) > 10
    assert max(delays) < 0.5


# README, What it adds to the original: No message can clear the screen, set the title or change
# another line.


def test_colours(open_client: OpenClient, bare_server: BareServer) -> None:
    coloured, uncoloured = open_client(), open_client(environment={"NO_COLOR": "1"})
    say(bare_server, "\x1b]0;title\x07\x1b[2Jhello " + "z" * 60)
    bare_server.pub.send(b"other> \x1b[31mred")
    for terminal in (coloured, uncoloured):
        terminal.type("half")
        terminal.wait_rows(
            r"ann> \x1b]0;title\x07\x1b[2Jhello zzzzzz", "z" * 40, "z" * 14, "other> red", "half"
        )
        assert terminal.look().title == ""
    cells = [coloured.look().buffer[row] for row in range(1, 6)]
    assert [row[39].fg for row in cells[:2]] == ["cyan", "cyan"]
    assert (cells[2][13].fg, cells[3][8].fg) == ("cyan", "red")
    assert [cells[4][column].fg for column in range(40)] == ["default"] * 40
    assert b"\x1b[3" not in uncoloured.received


# README, Delivery: On a terminal, when you press Enter, the echo of your line replaces it.


def test_a_typed_line_gives_way_to_its_echo(ken: Terminal, bare_server: BareServer) -> None:
    before = ken.rows()
    for number in range(2 * ROWS):
        ken.type(f"hello {number}\r\r")
        bare_server.answer(1)
        ken.wait_rows(f"ken> hello {number}")
        ken.wait_cursor("", 0)
    assert ken.rows() == [*before, *(f"ken> hello {number}" for number in range(2 * ROWS))]
    assert b"\a" not in ken.received


@slow
def test_a_line_whose_echo_is_late_is_printed(
    open_client: OpenClient, bare_server: BareServer
) -> None:
    ken = open_client(columns=80)
    ken.type("hello\rhow are you\rhalf")
    late = 'client.py: no echo yet for 2 lines; the first: {"user": "ken", "message": "hello"}'
    ken.wait_rows(CONNECTED, *rows_of(late, 80), "half")
    ken.type(" a line\rhalf")
    ken.wait_rows(*rows_of(late, 80), "half a line", "half")
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
    wait_for(ken.keys_are_taken, ken.rows)
    ken.type("early\r")
    late = ["early", *rows_of(NO_SERVER)]
    ken.wait_rows(*late)
    server = start_server(ports=ports)
    ken.wait_rows(*late, CONNECTED, "ken> early")
    ken.type("half")
    ken.wait_cursor("half", 4)
    server.kill()
    ken.wait_rows(*rows_of(NO_SERVER), "half")
    ken.type(" a line\r")
    ken.wait_rows(*rows_of(NO_SERVER), "half a line")
    start_server(ports=ports)
    ken.wait_rows(*rows_of(NO_SERVER), "half a line", CONNECTED, "ken> half a line")


@pytest.mark.parametrize("lines", [[], ["early"]])
def test_what_is_typed_before_the_client_is_up_is_there_once(
    open_terminal: Open, bare_server: BareServer, tmp_path: Path, lines: list[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    client = shlex.join(command(bare_server.ports))
    ken = open_terminal("sh", "-c", f"read -r line < {tmp_path}/fifo; exec {client}")
    ken.type("\r".join([*lines, "half"]))
    ken.wait_cursor("half", 4)
    (tmp_path / "fifo").write_text("start\n")
    wait_connected(ken)
    ken.wait_cursor("half", 4)
    assert ken.rows() == [*lines, CONNECTED, "half"]
    assert bare_server.receive_all() == [line_of("ken", line) for line in lines]


# README, Terminal: Pasting several lines sends each of them, except the last one if it does not end
# with Enter.

PASTES = {
    "code": ["def f(x):", "\tif x:", "", "\t\treturn\tx", "", "", "f(1)"],
    "long lines": ["x" * 5_000, "", "漢" * 4_000, "я" * 4_097],
    "a few hundred": [f"line {number}" for number in range(500)],
    "many": pytest.param([f"line {number}" for number in range(20_000)], marks=slow),
}


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
    """Assert that a shell has its terminal, and that nothing was typed into it yet."""
    shell.wait_cursor("$", 2)
    shell.type("echo so''und\r")
    shell.wait_rows("$ echo so''und", "sound", "$")


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


def test_a_paste_without_a_server(open_terminal: Open, start_server: StartServer) -> None:
    ports = free_port(), free_port()
    shell = open_shell(open_terminal, ports)
    shell.wait_rows(*rows_of(NO_SERVER))
    lines = [f"line {number}" for number in range(1_500)]
    shell.type("\r".join([*lines, ""]))
    shell.wait_rows(*lines[-ROWS:])
    server = start_server(ports=ports)
    shell.wait_rows(f"ken> {lines[-1]}")
    assert shell.rows()[-len(lines) :] == [f"ken> {line}" for line in lines]
    server.kill()
    shell.wait_rows(*rows_of(NO_SERVER))
    shell.type("\r".join([*lines[:99], ""]))
    shell.wait_rows(*lines[:99][-ROWS:])
    shell.type("\x03")
    assert_prompt(shell)


# README, Terminal: Ctrl-D on an empty line leaves, Ctrl-C interrupts

LEAVES: dict[str, tuple[Leave, int]] = {
    "Ctrl-D": ("\x05\x15\x04", 0),
    "Ctrl-C": ("\x03", 130),
    "Ctrl-\\": ("\x1c", 131),
    "SIGTERM": (signal.SIGTERM, 143),
    "SIGHUP": (signal.SIGHUP, 129),
}


def leave(terminal: Terminal, how: Leave) -> None:
    """Press keys, or send a signal."""
    if isinstance(how, str):
        terminal.type(how)
    else:
        terminal.process.send_signal(how)


@LINUX
@pytest.mark.parametrize("state", ["typing", "no server", "Ctrl-S"])
@pytest.mark.parametrize(("how", "status"), LEAVES.values(), ids=LEAVES)
def test_leaving(
    open_terminal: Open, bare_server: BareServer, state: str, how: Leave, status: int
) -> None:
    if state == "no server":
        bare_server.pull.close()
    ken = open_terminal(*command(bare_server.ports))
    wait_for(ken.keys_are_taken, ken.rows)
    type_half(ken)
    if state == "Ctrl-S":
        ken.type("\x13" if status else "\x13\x11")  # At Ctrl-D, the client waits for Ctrl-Q.
    leave(ken, how)
    assert ken.process.wait(TIMEOUT) == status
    assert ken.settings() == ken.first_settings
    # The kernel echoes Ctrl-C after it sent the signal, and may find the settings put back by then.
    if state != "Ctrl-S":
        wait_for(lambda: re.fullmatch(r"|половина|\^.", ken.cursor()[0]), ken.rows)
    assert b"Traceback" not in ken.received


@pytest.mark.parametrize("how", ["\x03", signal.SIGTERM])
def test_leaving_within_a_message(
    open_client: OpenClient, bare_server: BareServer, how: Leave
) -> None:
    """The client waits 0.1 seconds for a slow terminal, which may be too short for a busy host."""

    def leaves_no_colour() -> bool:
        ken = open_client()
        ken.paused = True
        for _ in range(5):
            say(bare_server, "x" * 60_000)
        wait_for(lambda: ken.waiting() > 1_000, ken.waiting)
        leave(ken, how)
        ken.paused = False
        ken.process.wait(TIMEOUT)
        assert ken.settings() == ken.first_settings
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


WRAPPERS = ["setsid -w", "script -qec {} /dev/null", "su -s /bin/sh -c {}"]


@LINUX
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside(open_terminal: Open, bare_server: BareServer, wrapper: str) -> None:
    if not shutil.which(wrapper.split()[0]) or (wrapper[:2] == "su" and os.getuid() != 0):
        pytest.skip(f"needs {wrapper.split()[0]}")
    client = shlex.join(command(bare_server.ports))
    how = wrapper.format(shlex.quote(client)) if "{}" in wrapper else f"{wrapper} {client}"
    outer = wait_connected(open_terminal("sh", "-c", how))
    type_half(outer)
    outer.type("\x05\x15\x04")
    assert outer.process.wait(TIMEOUT) == 0
    assert outer.settings() == outer.first_settings


# README, Terminal: Ctrl-Z suspends, and `fg` resumes with the line intact.


def client_pid(ports: tuple[int, int]) -> int:
    """Return the process ID of the client that uses these ports; 0 if there is none."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if set(port_options(ports)) <= set(os.fsdecode(path.read_bytes()).split("\0")):
                return int(path.parent.name)
    return 0


def process_state(pid: int) -> str:
    """Return the letter that ps shows for a process: "T" if it is stopped. Z if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    return "Z"


@LINUX
@pytest.mark.parametrize("name", ["sh", "bash"])
def test_ctrl_z_fg_and_bg(open_terminal: Open, bare_server: BareServer, name: str) -> None:
    """Of these two, sh leaves the terminal as it finds it, and bash sets it, each time."""
    shell = wait_connected(open_shell(open_terminal, bare_server.ports, name))
    pid = client_pid(bare_server.ports)
    for number in range(2):
        type_half(shell)
        shell.type("\x1a")
        shell.wait_cursor("$", 2)
        if name == "sh":
            assert shell.settings() == shell.first_settings
        assert_prompt(shell)
        if number:
            say(bare_server, "hello")
            shell.type("bg\r")
            wait_for(lambda: process_state(pid) == "T", shell.rows)  # The shell has the keys.
        shell.type("fg\r")
        shell.wait_cursor("половина", 7)
        shell.wait_rows(*["ann> hello"] * number, "половина")
        shell.type("\x05!\r")
        bare_server.answer(1)
        shell.wait_rows(*["ann> hello"] * number, "ken> половина!")
        shell.wait_cursor("", 0)
    shell.type("half\x03")
    assert_prompt(shell)
    if name == "sh":
        assert shell.settings() == shell.first_settings


def test_ctrl_z_where_no_shell_could_continue_it(ken: Terminal, bare_server: BareServer) -> None:
    type_half(ken)
    for number in range(3):
        before = len(ken.received)
        ken.type("\x1a")
        wait_for(lambda: b"\x1b[J" in ken.received[before:], ken.rows)  # noqa: B023
        say(bare_server, f"hello {number}")
        ken.wait_rows(*(f"ann> hello {n}" for n in range(number + 1)), "половина")
        ken.wait_cursor("половина", 7)


@LINUX
@pytest.mark.parametrize("how", ["Ctrl-Z", "started in the background"])
def test_kill_while_it_is_stopped(open_terminal: Open, bare_server: BareServer, how: str) -> None:
    shell = open_shell(open_terminal, bare_server.ports, "bash", "" if how == "Ctrl-Z" else " &")
    if how == "Ctrl-Z":
        wait_connected(shell).type("\x1a")
        shell.wait_cursor("$", 2)
    wait_for(lambda: process_state(client_pid(bare_server.ports)) == "T", shell.rows)
    pid = client_pid(bare_server.ports)
    at_the_prompt = shell.settings()
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    try:
        wait_for(lambda: process_state(pid) == "Z", shell.rows)
    finally:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    assert shell.settings() == at_the_prompt
    assert shell.keys_are_taken()


def test_started_in_the_background(open_terminal: Open, bare_server: BareServer) -> None:
    shell = open_shell(open_terminal, bare_server.ports, "bash", " &")
    shell.wait_text(r"Stopped|\$$")
    shell.type("fg\r")
    wait_connected(shell)
    shell.type("hello\r\x04")
    bare_server.answer(1)
    shell.wait_rows("ken> hello", "$")
    assert_prompt(shell)
    shell.type("stty -a | grep -o -w -e '-*icanon' -e '-*echo' -e '-*icrnl'\r")
    shell.wait_rows("icrnl", "icanon", "echo", "$")


# README, Terminal: With `TERM=dumb`, or if stdout is not a terminal, the system's own line editing
# is used

PLAIN = {
    "TERM=dumb": ("exec {}", {"TERM": "dumb"}),
    "stdout to a file": ("exec {} > chat", {}),
    "stdin from a pipe": ("cat | {}", {"NO_COLOR": "1"}),
}


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_without_the_line_editor(
    open_terminal: Open, start_server: StartServer, tmp_path: Path, case: tuple[str, dict[str, str]]
) -> None:
    """Nothing but plain text is written, and the notices are the same."""
    how, environment = case
    ports = free_port(), free_port()
    client = shlex.join([*python("client.py"), *port_options(ports)])
    shell = f"cd {tmp_path}; " + how.format(client)
    ken = open_terminal("sh", "-c", shell, environment=environment, columns=200)
    ken.wait_rows(NO_SERVER)
    ken.type("hello\r")
    drop = 'client.py: the server will drop this line: not a JSON object with "user" and "message"'
    ken.wait_text(squeeze([drop]).replace("(", r"\("))
    start_server(ports=ports)
    if "|" not in how:
        ken.wait_rows(CONNECTED)
    ken.type('{"user": "ken", "message": "onf\x7fe"}\r')
    chat = tmp_path / "chat"
    if chat.exists():
        wait_for(lambda: chat.read_text() == "ken> one\n", chat.read_text)
    else:
        ken.wait_rows("ken> one")
    wait_for(lambda: ken.rows().count('{"user": "ken", "message": "one"}') == 1, ken.rows)
    assert b"\x1b" not in ken.received
    assert ken.settings() == ken.first_settings
