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
from processes import LINUX, TIMEOUT, StartServer, free_port, port_options, python, wait_for
from terminal import ROWS, Open, Terminal

if sys.platform == "win32":
    pytest.skip("needs pseudo-terminals, which Windows has not", allow_module_level=True)

slow = pytest.mark.slow
LEFT, SHELL = "\x1b[D", {"PS1": "$ ", "ENV": ""}
NO_SERVER = (
    "client.py: no server at localhost (or its --key differs);"
    " your lines will be sent when it is back"
)
CONNECTED = "client.py: connected to localhost"
OpenClient = Callable[..., Terminal]


def command(ports: tuple[int, int], *options: str) -> list[str]:
    """Return the command that runs client.py for Ken."""
    return [*python("client.py"), *port_options(ports), "--user", "ken", *options]


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


@pytest.fixture
def open_client(open_terminal: Open, bare_server: BareServer) -> OpenClient:
    """Give a function that starts client.py on a terminal. A server that the test holds is up."""
    return lambda *options, **how: wait_connected(
        open_terminal(*command(bare_server.ports, *options), **how)
    )


@pytest.fixture
def ken(open_client: OpenClient) -> Terminal:
    """Give Ken at his terminal, connected."""
    return open_client()


# A message appears above the line that is being typed. That line stays as it is, in any script and
# in any window, and so does the cursor.

HALF_TYPED = [
    (40, 10, "half a sentence" + LEFT * 9, "half a sentence", 6),
    (40, 10, "Ça va, le cœur ?" + LEFT, "Ça va, le cœur ?", 15),
    (40, 10, "Привет, как дела?" + LEFT * 5, "Привет, как дела?", 12),
    (40, 10, "Γειά σου" + LEFT, "Γειά σου", 7),
    (40, 10, "漢字かな" + LEFT, "漢字かな", 6),
    (40, 10, "e\u0301te\u0301 🎉!" + LEFT, "été 🎉!", 6),
    (40, 10, "много слов " * 20, ("много слов " * 20)[-39:].rstrip(), 39),
    (40, 10, "много слов " * 20 + "\x01", ("много слов " * 20)[:40], 0),
    (40, 10, "漢字" * 30 + LEFT * 10, "漢字" * 10, 28),
    (40, 1, "half" + LEFT, "half", 3),
    (500, 10, "я" * 600, "я" * 499, 499),
    (3, 5, "абвг" + LEFT, "бвг", 2),
    (3, 1, "漢字", "字", 2),
    (2, 4, "абв", "в", 1),
    (1, 3, "абв" + LEFT, "в", 0),
    (1, 1, "абв", "", 0),
]


@pytest.mark.parametrize(("columns", "rows", "keys", "row", "cursor"), HALF_TYPED)
def test_a_half_typed_line(
    open_client: OpenClient,
    bare_server: BareServer,
    columns: int,
    rows: int,
    keys: str,
    row: str,
    cursor: int,
) -> None:
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
    ken.type("Привет, как дела?" + LEFT)
    ken.wait_cursor("Привет, как дела?", 16)
    for columns, rows in ((60, 10), (25, 15), (50, 20), (18, 20)):
        ken.resize(columns, rows)
        say(bare_server, "z" * (columns * 2 - 5))
        ken.wait_text("ann>" + "z" * (columns * 2 - 5) + "Привет,какдела.$")
        ken.wait_cursor("Привет, как дела?", 16)
    for columns, row, cursor in (
        (9, "ак дела?", 7),
        (3, "ла?", 2),
        (1, "?", 0),
        (30, "Привет, как дела?", 16),
    ):
        ken.resize(columns, 20)
        ken.wait_cursor(row, cursor)


MESSAGES = {
    "short": "hello",
    "as wide as the window": "x" * 35,
    "one wider": "x" * 36,
    "a paragraph": "a long paragraph, pasted " * 9,
    "higher than the window": "y" * 40 * (ROWS + 5),
    "cjk": "漢字" * 30,
    "emoji": "👋🎉" * 15,
    "mixed": "a漢б" * 25,
    "accents": "e\u0301" * 50,
    "TABs": "\tif x:\t# no\ty",
}


@pytest.mark.parametrize("columns", [40, 7])
def test_nothing_of_a_message_is_lost(
    open_client: OpenClient, bare_server: BareServer, columns: int
) -> None:
    ken = open_client(columns=columns)
    ken.type("ab" + LEFT)
    shown = squeeze(rows_of(CONNECTED))
    for message in MESSAGES.values():
        say(bare_server, message)
        shown += squeeze([f"ann>{message}"]).replace("e\u0301", "é")
        wait_for(lambda: squeeze(ken.rows()) == f"{shown}ab", lambda: (shown, ken.rows()))  # noqa: B023
        ken.wait_cursor("ab", 1)
    assert "" not in ken.rows()


def test_a_burst_shows_each_message_once_and_in_order(
    ken: Terminal, bare_server: BareServer
) -> None:
    ken.type("половина" + LEFT)
    ken.wait_cursor("половина", 7)
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


# Messages are copied as they are, and reflow: the terminal wraps them, not the client.

Tmux = Callable[..., str]


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


def pane(tmux: Tmux) -> tuple[str, int]:
    """Return the last row in tmux's window, and the cursor's column."""
    last = tmux("capture-pane", "-p").rpartition("\n")[2]
    return last, int(tmux("display", "-p", "#{cursor_x}"))


@pytest.mark.parametrize(
    ("line", "columns"), [("half a line", 11), ("Привет, как?", 12), ("漢字かな", 8), ("é ✓ ů", 5)]
)
def test_a_url_is_copied_as_one_line(
    tmux: Tmux, bare_server: BareServer, line: str, columns: int
) -> None:
    url = "https://example.org/" + "0123456789" * 28
    tmux("send-keys", "-l", line)
    wait_for(lambda: pane(tmux) == (line, columns), lambda: pane(tmux))
    say(bare_server, url)
    say(bare_server, "next")
    for width in (60, 37, 100, 13):
        tmux("resize-window", "-x", str(width), "-y", "10")
        end = f"\nann> {url}\nann> next\n{line}"
        wait_for(
            lambda: tmux("capture-pane", "-p", "-J", "-S", "-").endswith(end),  # noqa: B023
            lambda: tmux("capture-pane", "-p", "-J", "-S", "-"),
        )
        wait_for(lambda: pane(tmux) == (line, columns), lambda: pane(tmux))


@pytest.mark.parametrize("cluster", ["🇫🇷", "👩‍👩‍👧", "❤\ufe0f", "👍🏽", "1\ufe0f\u20e3"])
def test_a_cluster_about_which_terminals_differ(
    tmux: Tmux, bare_server: BareServer, cluster: str
) -> None:
    tmux("send-keys", "-l", f"a{cluster}")
    wait_for(lambda: pane(tmux)[0] == f"a{cluster}", lambda: pane(tmux))
    width = pane(tmux)[1]  # as tmux sees it
    tmux("send-keys", "-l", "bc")
    tmux("send-keys", "Left", "Left")
    wait_for(lambda: pane(tmux) == (f"a{cluster}bc", width), lambda: pane(tmux))
    say(bare_server, "hello")
    wait_for(lambda: "ann> hello" in tmux("capture-pane", "-p"), lambda: pane(tmux))
    assert pane(tmux) == (f"a{cluster}bc", width)


# The colours of a message stay in it. Everything else that a terminal could obey is escaped.


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


# A line that is sent gives way to its echo. Without a server it stays, and is sent later.


def test_a_typed_line_gives_way_to_its_echo(ken: Terminal, bare_server: BareServer) -> None:
    before = ken.rows()
    for number in range(2 * ROWS):
        ken.type(f"hello {number}\r\r")
        bare_server.answer(1)
        ken.wait_rows(f"ken> hello {number}")
        ken.wait_cursor("", 0)
    assert ken.rows() == [*before, *(f"ken> hello {number}" for number in range(2 * ROWS))]
    assert b"\a" not in ken.received


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


# A paste is one line after another, with its TABs. Nothing of it is left to the shell.

PASTES = {
    "code": ["def f(x):", "\tif x:", "", "\t\treturn\tx", "", "", "f(1)"],
    "long lines": ["x" * 5_000, "", "漢" * 4_000, "я" * 4_097],
    "a few hundred": [f"line {number}" for number in range(500)],
    "many": pytest.param([f"line {number}" for number in range(20_000)], marks=slow),
}


def open_shell(open_terminal: Open, name: str = "sh") -> Terminal:
    """Start a shell."""
    if not shutil.which(name):
        pytest.skip(f"needs {name}")
    arguments = ["--norc", "--noprofile"] if name == "bash" else []
    shell = open_terminal(name, *arguments, "-i", environment=SHELL)
    shell.wait_cursor("$", 2)
    return shell


def assert_prompt(shell: Terminal) -> None:
    """Assert that a shell has its terminal, and that nothing was typed into it yet."""
    shell.wait_cursor("$", 2)
    shell.type("echo so''und\r")
    shell.wait_rows("$ echo so''und", "sound", "$")


@pytest.mark.parametrize("lines", PASTES.values(), ids=PASTES)
def test_a_paste(open_terminal: Open, bare_server: BareServer, lines: list[str]) -> None:
    shell = open_shell(open_terminal)
    shell.type(shlex.join(command(bare_server.ports)) + "\r")
    wait_connected(shell)
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
    shell = open_shell(open_terminal)
    shell.type(shlex.join(command(ports)) + "\r")
    shell.wait_rows(*rows_of(NO_SERVER))
    lines = [f"line {number}" for number in range(4_000)]
    shell.type("\r".join([*lines, ""]))
    shell.wait_rows(*lines[-ROWS:])
    server = start_server(ports=ports)
    shell.wait_rows(f"ken> {lines[-1]}")
    assert shell.rows()[-len(lines) :] == [f"ken> {line}" for line in lines]
    server.kill()
    shell.wait_rows(*rows_of(NO_SERVER))
    shell.type("\r".join([*lines, ""]))
    shell.wait_rows(*lines[-ROWS:])
    shell.type("\x03")
    assert_prompt(shell)


# What was typed before the client was up is there once, and is sent.


@pytest.mark.parametrize(
    ("keys", "sent", "rows"),
    [
        ("half", [], [CONNECTED, "half"]),
        ("early\rhalf", ["early"], ["early", CONNECTED, "half"]),
    ],
)
def test_typed_early(
    open_terminal: Open,
    bare_server: BareServer,
    tmp_path: Path,
    keys: str,
    sent: list[str],
    rows: list[str],
) -> None:
    os.mkfifo(tmp_path / "fifo")
    client = shlex.join(command(bare_server.ports))
    ken = open_terminal("sh", "-c", f"read -r line < {tmp_path}/fifo; exec {client}")
    ken.type(keys)
    ken.wait_cursor("half", 4)
    (tmp_path / "fifo").write_text("start\n")
    wait_connected(ken)
    ken.wait_cursor("half", 4)
    assert ken.rows() == rows
    assert bare_server.receive_all() == [line_of("ken", text) for text in sent]


# The terminal belongs to the shell again, however the client ends, and while it is stopped.

LEAVE: dict[str, tuple[str | signal.Signals, int]] = {
    "Ctrl-D": ("\x15\x04", 0),
    "Ctrl-C": ("\x03", 130),
    "Ctrl-\\": ("\x1c", 131),
    "SIGTERM": (signal.SIGTERM, 143),
    "SIGHUP": (signal.SIGHUP, 129),
}


@LINUX
@pytest.mark.parametrize("state", ["typing", "no server", "Ctrl-S"])
@pytest.mark.parametrize(("leave", "status"), LEAVE.values(), ids=LEAVE)
def test_leaving(
    open_terminal: Open, bare_server: BareServer, state: str, leave: str | int, status: int
) -> None:
    if state == "no server":
        bare_server.pull.close()
    ken = open_terminal(*command(bare_server.ports))
    wait_for(ken.keys_are_taken, ken.rows)
    ken.type("половина")
    ken.wait_cursor("половина", 8)
    if state == "Ctrl-S":
        ken.type("\x13" if status else "\x13\x11")  # At Ctrl-D, the client waits for Ctrl-Q.
    if isinstance(leave, str):
        ken.type(leave)
    else:
        ken.process.send_signal(leave)
    assert ken.process.wait(TIMEOUT) == status
    assert ken.settings() == ken.first_settings
    # The kernel echoes Ctrl-C after it sent the signal, and may find the settings put back by then.
    if state != "Ctrl-S":
        wait_for(lambda: re.fullmatch(r"|половина|\^.", ken.cursor()[0]), ken.rows)
    assert b"Traceback" not in ken.received


@pytest.mark.parametrize("leave", ["\x03", signal.SIGTERM])
def test_leaving_within_a_message(
    ken: Terminal, bare_server: BareServer, leave: str | signal.Signals
) -> None:
    ken.type("half")
    ken.wait_cursor("half", 4)
    ken.paused = True
    for _ in range(5):
        say(bare_server, "x" * 60_000)
    wait_for(lambda: ken.waiting() > 1_000, ken.waiting)
    if isinstance(leave, str):
        ken.type(leave)
    else:
        ken.process.send_signal(leave)
    ken.paused = False
    ken.process.wait(TIMEOUT)
    assert ken.settings() == ken.first_settings
    wait_for(lambda: ken.waiting() == 0, ken.waiting)
    screen = ken.look()
    assert screen.cursor.attrs.fg == "default"
    assert pyte.modes.DECAWM in screen.mode


def test_a_hang_up_ends_it(ken: Terminal) -> None:
    ken.type("half")
    ken.wait_cursor("half", 4)
    ken.hang_up()
    assert ken.process.wait(TIMEOUT) in (1, 129)


WRAPPERS = {
    "setsid": "setsid -w sh {}",
    "script": "script -qec 'sh {}' /dev/null",
    "su": "su -s /bin/sh -c 'sh {}'",
    "tmux": "tmux -S tmux -f once new-session 'sh {}'",
    "screen": "screen -c once sh {}",
}


@LINUX
@pytest.mark.parametrize("name", WRAPPERS)
def test_inside(open_terminal: Open, bare_server: BareServer, tmp_path: Path, name: str) -> None:
    """Leave by Ctrl-D, then by SIGTERM."""
    if not shutil.which(name) or (name == "su" and os.getuid() != 0):
        pytest.skip(f"needs {name}")
    client = shlex.join(command(bare_server.ports))
    (tmp_path / "run").write_text(
        f"cd {tmp_path}\nstty -g > settings\n"
        f"for n in 1 2; do sh -c 'echo $$ > pid; exec {client}'; stty -g >> settings; done\n"
    )
    ends = {"tmux": "set -g destroy-unattached on", "screen": "autodetach off"}
    (tmp_path / "once").write_text(f"{ends.get(name)}\n")  # End with the test, if it fails.
    wrapper = WRAPPERS[name].format(tmp_path / "run")
    environment = {"SCREENDIR": str(tmp_path), "LC_ALL": "C.UTF-8", "TMUX": ""}
    tmp_path.chmod(0o700)
    outer = open_terminal(
        "sh", "-c", f"cd {tmp_path}; exec {wrapper}", environment=environment, columns=80
    )
    leaves: tuple[str | signal.Signals, ...] = ("\x05\x15\x04", signal.SIGTERM)
    for times, leave in enumerate(leaves, 1):
        wait_connected(outer, times)
        outer.type("половина" + LEFT)
        outer.wait_cursor("половина", 7)
        if isinstance(leave, str):
            outer.type(leave)
        else:
            os.kill(int((tmp_path / "pid").read_text()), leave)
    outer.process.wait(TIMEOUT)
    before, *after = (tmp_path / "settings").read_text().split()
    assert after == [before, before]
    assert outer.settings() == outer.first_settings


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
    shell = open_shell(open_terminal, name)
    shell.type(shlex.join(command(bare_server.ports)) + "\r")
    wait_connected(shell)
    pid = client_pid(bare_server.ports)
    for number in range(2):
        shell.type("половина" + LEFT)
        shell.wait_cursor("половина", 7)
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
    ken.type("half a sentence" + LEFT)
    ken.wait_cursor("half a sentence", 14)
    for number in range(3):
        before = len(ken.received)
        ken.type("\x1a")
        # Until the line is drawn anew, the kernel may drop output: see NOFLSH in termios(3).
        wait_for(lambda: b"\x1b[J" in ken.received[before:], ken.rows)  # noqa: B023
        say(bare_server, f"hello {number}")
        ken.wait_rows(*(f"ann> hello {n}" for n in range(number + 1)), "half a sentence")
        ken.wait_cursor("half a sentence", 14)


@LINUX
@pytest.mark.parametrize("how", ["Ctrl-Z", "started in the background"])
def test_kill_while_it_is_stopped(open_terminal: Open, bare_server: BareServer, how: str) -> None:
    shell = open_shell(open_terminal, "bash")
    client = shlex.join(command(bare_server.ports))
    if how == "Ctrl-Z":
        shell.type(client + "\r")
        wait_connected(shell)
        shell.type("\x1a")
        shell.wait_cursor("$", 2)
    else:
        shell.type(client + " &\r")
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
    shell = open_shell(open_terminal, "bash")
    shell.type(shlex.join(command(bare_server.ports)) + " &\r")
    shell.wait_text(r"Stopped|\$$")
    shell.type("fg\r")
    wait_connected(shell)
    shell.type("hello\r\x04")
    bare_server.answer(1)
    shell.wait_rows("ken> hello", "$")
    assert_prompt(shell)
    shell.type("stty -a | grep -o -w -e '-*icanon' -e '-*echo' -e '-*icrnl'\r")
    shell.wait_rows("icrnl", "icanon", "echo", "$")


def interrupt(terminal: Terminal, seconds: float) -> None:
    """Send SIGINT some time after the client handles it."""
    process = Path(f"/proc/{terminal.process.pid}/status")
    wait_for(
        lambda: int(re.findall(r"SigCgt:\s+(\w+)", process.read_text())[0], 16) >> 14 & 1,
        terminal.rows,
    )
    time.sleep(seconds)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(TIMEOUT) in (130, 0)
    assert terminal.settings() == terminal.first_settings
    assert b"Traceback" not in terminal.received
    assert b"client.py: cannot" not in terminal.received


MOMENTS = [(range(0, 400, 100), ""), pytest.param(range(0, 320, 6), "hello\r\x04", marks=slow)]


@LINUX
@pytest.mark.parametrize(("milliseconds", "typed"), MOMENTS)
def test_a_signal_at_any_moment(
    open_terminal: Open, bare_server: BareServer, milliseconds: range, typed: str
) -> None:
    for moment in milliseconds:
        ken = open_terminal(*command(bare_server.ports))
        ken.type(typed)
        interrupt(ken, moment / 1_000)


@LINUX
@pytest.mark.parametrize("gone", [False, True])
def test_a_signal_though_nobody_reads_stderr(
    open_terminal: Open, bare_server: BareServer, gone: bool
) -> None:
    """A terminal for stdin and stdout, and for stderr a pipe that is full, or was closed."""
    end, stderr = os.pipe()
    os.set_blocking(stderr, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(stderr, bytes(4_096))
    os.set_blocking(stderr, True)
    if gone:
        os.close(end)
    ken = open_terminal(*command(bare_server.ports), stderr=stderr)
    interrupt(ken, 0.2)
    os.close(stderr)
    if not gone:
        os.close(end)


# With TERM=dumb, stdout to a file or stdin from a pipe, nothing but plain text is written, the
# kernel edits the line, and the notices are the same.

PLAIN = {
    "terminal": ("exec {}", {}),
    "TERM=dumb": ("exec {}", {"TERM": "dumb"}),
    "stdout to a file": ("exec {} > chat", {}),
    "stdin from a pipe": ("cat | {}", {"NO_COLOR": "1"}),
}


@slow
@pytest.mark.parametrize(("how", "environment"), PLAIN.values(), ids=PLAIN)
def test_notices(
    open_terminal: Open,
    start_server: StartServer,
    tmp_path: Path,
    how: str,
    environment: dict[str, str],
) -> None:
    ports = free_port(), free_port()
    client = shlex.join([*python("client.py"), *port_options(ports)])
    shell = f"cd {tmp_path}; " + how.format(client)
    ken = open_terminal("sh", "-c", shell, environment=environment, columns=200)
    ken.wait_rows(NO_SERVER)
    ken.type("hello\r")
    drop = 'client.py: the server will drop this line: not a JSON object with "user" and "message"'
    ken.wait_text(squeeze([drop]).replace("(", r"\("))
    server = start_server(ports=ports)
    interactive = "|" not in how
    if interactive:
        ken.wait_rows(CONNECTED)
    ken.type('{"user": "ken", "message": "one"}\r')
    chat = tmp_path / "chat"
    if chat.exists():
        wait_for(lambda: chat.read_text() == "ken> one\n", chat.read_text)
    else:
        ken.wait_rows("ken> one")
    server.process.send_signal(signal.SIGSTOP)
    ken.type('{"user": "ken", "message": "two"}\r')
    if interactive:
        late = 'client.py: no echo yet for 1 line; the first: {"user": "ken", "message": "two"}'
        wait_for(lambda: late in ken.rows(), ken.rows)
    if how != "exec {}" or environment:
        assert b"\x1b" not in ken.received
        assert ken.settings() == ken.first_settings
        assert ken.rows().count('{"user": "ken", "message": "one"}') == 1
    server.process.send_signal(signal.SIGCONT)


def test_a_dumb_terminal(open_terminal: Open, bare_server: BareServer) -> None:
    ken = open_terminal(*command(bare_server.ports), environment={"TERM": "dumb"})
    ken.wait_rows(CONNECTED)
    ken.type("hellp\x7fo\r")
    bare_server.answer(1)
    ken.wait_rows("hello", "ken> hello")
    say(bare_server, "hi")
    ken.wait_rows("ann> hi")
    assert ken.settings() == ken.first_settings
    assert b"\x1b" not in ken.received
