"""README, "Terminal": the client on a pseudo-terminal, read back through an emulator or tmux."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyte
import pytest
import zmtp
from peers import BareServer, line_of
from processes import LINUX, TIMEOUT, Script, StartServer, free_port, port_options, python, wait_for
from terminal import CONNECTED, ROWS, Open, Terminal

slow = pytest.mark.slow
LEFT = "\x1b[D"


def command(ports: tuple[int, int]) -> list[str]:
    """Return the command that runs client.py for Ken."""
    return python("client.py", *port_options(ports), "--user", "ken")


def type_half(terminal: Terminal) -> None:
    """Type a line without Enter, and put the cursor before its last letter."""
    terminal.type("половина" + LEFT)
    terminal.wait_cursor("половина", 7)


@pytest.fixture
def ken(open_terminal: Open, bare_server: BareServer) -> Terminal:
    """Give Ken at his terminal, connected to a server that the test holds."""
    terminal = open_terminal(*command(bare_server.ports))
    terminal.wait_text(CONNECTED)
    return terminal


# README, Terminal: The line you are typing occupies one row
# README, What it adds to the original: Messages appear immediately, above the line you are typing.
# README, What it adds to the original: No message can clear the screen, set the window title or
# overwrite other messages.

LINE = "Привет, как дела?"
HALF_TYPED = {  # the keys; then widths, what the row shows in each, and the column of the cursor
    LINE + LEFT: [(18, LINE, 16), (9, "ак дела?", 7), (3, "ла?", 2), (30, LINE, 16)],
    "漢字" * 30 + LEFT * 10: [(40, "漢字" * 10, 28), (10, "字漢字漢字", 6)],
    "абв": [(1, "", 0)],
}
HOSTILE = "\x1b]0;title\x07\x1b[2J\rhello"
MESSAGES = [HOSTILE, "as wide as 40 columns".ljust(35, "x"), "higher than the window" * 30]


@pytest.mark.parametrize("keys", HALF_TYPED, ids=["short", "wide", "narrow"])
def test_messages_appear_above_the_row(ken: Terminal, bare_server: BareServer, keys: str) -> None:
    ken.type(keys)
    for columns, row, cursor in HALF_TYPED[keys]:
        ken.resize(columns, ROWS)
        ken.wait_cursor(row, cursor)
        shown = ""
        for message in MESSAGES:
            bare_server.echo(line_of("ann", message))
            shown += f"ann> {message.encode('unicode_escape').decode()}"
            ken.wait_text(f"{re.escape(re.sub(' ', '', shown + row))}$")
            ken.wait_cursor(row, cursor)
            ken.type("z\x7f")


@slow
def test_typing_is_prompt_in_a_flood(open_terminal: Open, server: Script) -> None:
    ken = open_terminal(*command(server.ports))

    def press(key: str, row: str) -> float:
        began, before, drawn = time.monotonic(), len(ken.received), f"l{row}\x1b7".encode()
        ken.type(key)
        wait_for(lambda: drawn in ken.received[before:], lambda: ken.received[-300:])
        return time.monotonic() - began

    with zmtp.flood(server.ports[0], line_of("ann", "hello")):
        ken.wait_text("ann> hello")
        for _ in range(10):
            assert max(press("я", "я"), press("з", "яз"), press("\x15", "")) < 0.5


# README, Terminal: Terminals disagree about the width of some emoji and flags.
# README, Terminal: The terminal wraps messages itself, so you can copy a long URL, and text reflows
# when you resize the window.
@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
@pytest.mark.parametrize("cluster", ["🇫🇷", "👩‍👩‍👧", "❤\ufe0f", "👍🏽", "1\ufe0f\u20e3", "漢é"])
def test_the_terminal_wraps_messages_and_places_the_cursor(
    request: pytest.FixtureRequest, tmp_path: Path, bare_server: BareServer, cluster: str
) -> None:
    def tmux(*arguments: str) -> str:
        options = ["-u", "-S", str(tmp_path / "tmux"), "-f", "/dev/null"]
        done = subprocess.run(["tmux", *options, *arguments], stdout=subprocess.PIPE, check=True)
        return done.stdout.decode().rstrip("\n")

    def pane() -> str:
        """Return the text as it would be copied, without blank rows, and the cursor's column."""
        show = ["capture-pane", "-p", "-J", "-S", "-", ";", "display", "-p", "#{cursor_x}"]
        return re.sub("\n+", "\n", tmux(*show))

    tmux("new-session", "-d", "-x", "60", "-y", "10", shlex.join(command(bare_server.ports)))
    request.addfinalizer(lambda: tmux("kill-server"))
    wait_for(lambda: CONNECTED in pane(), pane)
    tmux("send-keys", "-l", f"a{cluster}")
    wait_for(lambda: f"\na{cluster}\n" in pane(), pane)
    column = pane().rpartition("\n")[2]
    tmux("send-keys", "-l", f"bc{LEFT * 2}")
    wait_for(lambda: pane().endswith(f"\na{cluster}bc\n{column}"), pane)
    url = "https://example.org/" + "0123456789" * 28
    bare_server.echo(line_of("ann", url), line_of("ann", "next"))
    end = f"\nann> {url}\nann> next\na{cluster}bc\n{column}"
    for width in ("60", "37", "100", "13"):
        tmux("resize-window", "-x", width, "-y", "10")
        wait_for(lambda: pane().endswith(end), pane)


# README, Terminal: When you press Enter, your line disappears, and its echo appears.
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


# README, Terminal: While the server is down, your line stays on the screen, above the one that you
# type next, and is sent when the server is back.
def test_the_server_is_late_and_restarts(open_terminal: Open, start_server: StartServer) -> None:
    ports = free_port(), free_port()
    ken = open_terminal(*command(ports))
    ken.wait_text("no server at localhost .* when it is back$")
    early = [f"line {number}" for number in range(1_500)]  # more than may be in flight
    ken.type("\r".join([*early, "half"]))
    ken.wait_rows(*early, "half")
    server = start_server(ports=ports)
    ken.wait_rows(early[-1], CONNECTED, *(f"ken> {line}" for line in early), "half")
    server.kill()
    ken.wait_text("no server at localhost .* when it is back half$")
    ken.type(" a line\r")
    ken.wait_text("when it is back half a line$")
    start_server(ports=ports)
    ken.wait_rows("half a line", CONNECTED, "ken> half a line")


def test_typing_before_the_client_is_up(open_terminal: Open, bare_server: BareServer) -> None:
    ken = open_terminal("sh", "-c", f"read -r line; exec {shlex.join(command(bare_server.ports))}")
    ken.type("start\rearly\rhalf")
    ken.wait_rows("start", "early", "early", CONNECTED, "half")
    ken.wait_cursor("half", 4)
    assert bare_server.receive_all() == [line_of("ken", "early")]


# README, Terminal: Pasting several lines sends each of them, except the last one if it does not end
# with a newline.
def test_a_paste(ken: Terminal, bare_server: BareServer) -> None:
    code = ["def f(x):", "\tif x:", "", "\t\treturn\tx"]
    lines = [*code, "x" * 5_000, "漢" * 4_000, *map(str, range(5_000))]
    ken.type("\r".join([*lines, "end"]))
    sent = [line for line in lines if line]
    assert [json.loads(line)["message"] for line in bare_server.answer(len(sent))] == sent
    ken.wait_cursor("end", 3)
    ken.type("\r")
    assert bare_server.answer(1) == [line_of("ken", "end")]


# README, Delivery in detail: A terminal is never paused: what you type is kept until there is room.
def test_a_terminal_is_read_even_if_1_000_lines_wait(
    ken: Terminal, bare_server: BareServer
) -> None:
    lines = [str(number) for number in range(5_000)]
    ken.type("\r".join([*lines, "end"]))
    ken.wait_cursor("end", 3)  # None of the lines has been echoed.
    assert [json.loads(line)["message"] for line in bare_server.answer(5_000)] == lines


# README, Terminal: Ctrl-D on an empty line leaves the chat, and Ctrl-C ends the client.

LEAVES = {  # the keys, if any, and the exit status
    "Ctrl-D": ("\x11\x05\x15\x04", 0),  # after Ctrl-Q, for which it would wait
    "Ctrl-C": ("\x03", 130),
    "Ctrl-\\": ("\x1c", 131),
    "SIGTERM": ("", 143),
}


@LINUX
@pytest.mark.parametrize("before", ["", "\x13"], ids=["typing", "Ctrl-S"])
@pytest.mark.parametrize(("keys", "status"), LEAVES.values(), ids=LEAVES)
def test_leaving(ken: Terminal, before: str, keys: str, status: int) -> None:
    type_half(ken)
    ken.type(before + keys)
    if not keys:
        ken.process.terminate()
    assert ken.process.wait(TIMEOUT) == status
    assert ken.settings() == ken.first_settings


def test_leaving_within_a_message(open_terminal: Open, bare_server: BareServer) -> None:
    """The client waits 0.3 seconds for a slow terminal, which may be too short for a busy host."""

    def leaves_no_colour() -> bool:
        ken = open_terminal(*command(bare_server.ports))
        ken.wait_text(CONNECTED)
        ken.paused = True
        bare_server.echo(*[line_of("ann", "x" * 60_000)] * 5)
        wait_for(ken.is_behind, ken.rows)
        ken.process.terminate()
        ken.paused = False
        ken.process.wait(TIMEOUT)
        wait_for(lambda: not ken.is_behind(), ken.rows)
        screen = ken.look()
        return screen.cursor.attrs.fg == "default" and pyte.modes.DECAWM in screen.mode

    assert any(leaves_no_colour() for _ in range(5))


def test_a_hang_up_ends_it(ken: Terminal) -> None:
    type_half(ken)
    ken.hang_up()
    assert ken.process.wait(TIMEOUT) in (1, 129)


@LINUX
@pytest.mark.parametrize("interval", [100, pytest.param(8, marks=slow)])
def test_a_signal_at_any_time(open_terminal: Open, bare_server: BareServer, interval: int) -> None:
    for milliseconds in range(0, 400, interval):
        ken = open_terminal(*command(bare_server.ports))
        ken.type("hello\r\x04")
        process = Script(ken.process)
        wait_for(lambda: process.catches(signal.SIGTERM), ken.rows)  # noqa: B023
        time.sleep(milliseconds / 1_000)
        ken.process.terminate()
        assert ken.process.wait(TIMEOUT) == 143
        assert ken.settings() == ken.first_settings
        assert not re.search(b"Traceback|client.py: cannot", ken.received)


@LINUX
def test_leaving_where_no_shell_is(open_terminal: Open, bare_server: BareServer) -> None:
    ken = open_terminal("setsid", "--wait", *command(bare_server.ports))
    ken.wait_text(CONNECTED)
    type_half(ken)
    ken.type("\x05\x15\x04")
    assert ken.process.wait(TIMEOUT) == 0
    assert ken.settings() == ken.first_settings


# README, Terminal: Ctrl-Z suspends it, and `fg` resumes it with the line intact
def assert_prompt(shell: Terminal) -> None:
    """Assert that a shell has its terminal back as it was, and nothing typed into it."""
    shell.wait_cursor("$", 2)
    shell.type("read -r line; echo so''und\r")
    # At its prompt, bash has settings of its own.
    wait_for(lambda: shell.settings() == shell.first_settings, shell.settings)
    shell.type("\r")
    shell.wait_rows("$ read -r line; echo so''und", "", "sound", "$")


@LINUX
@pytest.mark.parametrize("program", ["sh -i", "bash --norc --noprofile -i"])
def test_suspended_and_killed(open_terminal: Open, bare_server: BareServer, program: str) -> None:
    """Of these two, sh leaves the terminal as it finds it, and bash sets it, each time."""
    shell = open_terminal(*program.split(), environment={"PS1": "$ ", "ENV": ""})
    shell.wait_cursor("$", 2)
    shell.type(f"{shlex.join(command(bare_server.ports))} & echo pid=$!\r")
    shell.wait_text(r"pid=\d.+\$$")
    pid = int(re.findall(r"pid=(\d+)", " ".join(shell.rows()))[0])

    def state() -> str:
        """Return the letter that ps shows for the client: "T" if it is stopped. Z if it is gone."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        return "Z"

    wait_for(lambda: state() == "T", shell.rows)  # as it was started in the background
    shell.type("fg\r")
    shell.wait_text(CONNECTED)
    type_half(shell)
    shell.type("\x1a")
    assert_prompt(shell)
    bare_server.echo(line_of("ann", "hello"))
    shell.type("bg\r")
    shell.wait_text(r"\$bg\[1\].+\$$")
    wait_for(lambda: state() == "T", shell.rows)  # since the shell has the keys
    shell.type("fg\r")
    shell.wait_rows("ann> hello", "половина")
    shell.wait_cursor("половина", 7)
    shell.type("\x05!\r")
    bare_server.answer(1)
    shell.wait_rows("ann> hello", "ken> половина!")
    shell.wait_cursor("", 0)
    type_half(shell)
    shell.type("\x1a")
    assert_prompt(shell)
    shell.type("fg\r")
    shell.wait_cursor("половина", 7)
    shell.type("\x1a")
    assert_prompt(shell)
    at_the_prompt = shell.settings()
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: state() == "Z", shell.rows)
    assert shell.settings() == at_the_prompt


def test_ctrl_z_where_no_shell_could_continue_it(ken: Terminal, bare_server: BareServer) -> None:
    type_half(ken)
    before = len(ken.received)
    ken.type("\x1a")
    wait_for(lambda: b"\x1b[J" in ken.received[before:], ken.rows)
    bare_server.echo(line_of("ann", "hello"))
    ken.wait_rows("ann> hello", "половина")
    ken.wait_cursor("половина", 7)


# README, Terminal: With `TERM=dumb`, or if stdout is not a terminal, the system's own line editing
# is used.
@pytest.mark.parametrize("how", ["TERM=dumb exec {}", "{} | cat", "cat | NO_COLOR=1 {}"])
def test_without_the_line_editor(open_terminal: Open, bare_server: BareServer, how: str) -> None:
    ken = open_terminal("sh", "-c", how.format(shlex.join(command(bare_server.ports))))
    ken.type("onf\x7fe\r")
    assert bare_server.answer(1) == [line_of("ken", "one")]
    ken.wait_rows("ken> one")
    assert ken.rows().count("one") == 1  # as the kernel has shown it
    assert b"\x1b" not in ken.received
    assert ken.settings() == ken.first_settings
