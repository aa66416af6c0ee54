"""README.md itself: what it promises has tests, and its commands work as they stand there."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import tomllib
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType

import pytest
from peers import Join, Peer, line_of, message_of
from processes import ROOT, TIMEOUT, Script, Start, StartServer, free_port, wait_for
from promises import README, SECTIONS, Promise, one_line, read
from terminal import Open, Terminal

import client
import server

PROMISES = read()
SCRIPTS = ["client.py", "server.py"]


def blocks(section: str) -> list[str]:
    """Return the indented blocks of a section."""
    found = re.findall(r"(?:^    .+\n+)+", SECTIONS[section], re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def commands(section: str) -> list[str]:
    """Return the commands in the blocks of a section."""
    text = re.sub(r"^(#.*)?\n", "", "".join(blocks(section)), flags=re.MULTILINE)
    return re.sub(r"\|\n +", "| ", text).splitlines()


# README, Tests: lists each promise on this page with its tests
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.quote[:60])
def test_a_quote_stands_once_in_its_section_and_has_tests(promise: Promise) -> None:
    assert one_line(SECTIONS[promise.section]).count(promise.quote) == 1
    assert [p.quote for p in PROMISES].count(promise.quote) == 1
    assert promise.tests


# The tables of options have a test of their own. The other two report measurements.
@pytest.mark.parametrize("section", sorted({*SECTIONS} - {"Options", "Platforms", "Figures"}))
def test_every_bullet_and_row_is_quoted(section: str) -> None:
    bullets_and_rows = r"^- .+(?:\n  .+)*|^\| (?!\*\*).+\|$(?!\n\|-)"
    quotes = [promise.quote for promise in PROMISES if promise.section == section]
    for text in re.findall(bullets_and_rows, SECTIONS[section], re.MULTILINE):
        assert any(quote in one_line(text) for quote in quotes), text


def test_the_promises_are_printed_with_their_tests() -> None:
    script = [sys.executable, "-X", "utf8", str(ROOT / "tests/promises.py")]
    printed = subprocess.check_output(script, encoding="utf-8")
    for section, quote, tests in PROMISES:
        assert "\n    ".join([f"{section}: {quote}", *tests]) in printed


# README, zmq-talk-chat: ![Ken and Ann chat, each in a terminal.
def test_files_and_sections_that_the_page_names_exist() -> None:
    files = re.findall(r"(?:tests|\.ci|\.github)/[\w.]+", README)
    assert [file for file in files if not (ROOT / file).exists()] == []
    for picture in re.findall(r"!\[[^]]+\]\((\S+)\)", README):
        assert xml.etree.ElementTree.parse(ROOT / picture).getroot().tag.endswith("}svg")
    anchors = {re.sub(r"[^\w-]", "", name.lower().replace(" ", "-")) for name in SECTIONS}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


# README, zmq-talk-chat: A terminal chat on ZeroMQ in two Python scripts
def test_the_top_level_holds_the_two_scripts_and_little_else() -> None:
    names = {path.name for path in ROOT.glob("[!.]*") if path.suffix != ".egg-info"}
    assert names == {*SCRIPTS, "tests", "README.md", "pyproject.toml"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_two_scripts_have_the_requirements_of_the_project(script: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python, packages = project["requires-python"], json.dumps(project["dependencies"])
    block = f'# /// script\n# requires-python = "{python}"\n# dependencies = {packages}\n# ///\n'
    assert block in (ROOT / script).read_text(encoding="utf-8")


# README, zmq-talk-chat: copy `client.py` there.
# README, Options: | server.py | meaning | default |
# README, Options: | client.py | meaning | default |
@pytest.mark.parametrize("module", [server, client])
def test_a_copied_script_has_the_options_and_the_defaults_of_its_table(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = f"{module.__name__}.py"
    table = SECTIONS["Options"].split(f"| {script} |")[1].split("\n\n")[0]
    cells = dict(re.findall(r"^\| `(.+?)` \| .+ \| (.+) \|$", table, re.MULTILINE))
    shutil.copy(ROOT / script, tmp_path)
    shown = subprocess.check_output([sys.executable, script, "--help"], cwd=tmp_path, text=True)
    options = re.findall(r"\[(.+?)\]", shown.replace("{auto,always,never}", "WHEN"))
    assert set(options) == {"-h", *cells}
    assert f"\nexample: python {script} " in shown
    monkeypatch.setattr("sys.argv", [script])
    defaults = vars(module.parse_options())
    for option, cell in cells.items():
        default = defaults[option.split()[0].lstrip("-").lower().replace("-", "_")]
        value = re.match(r"`\S+`|\d+", cell)
        assert str(default) == (value[0].strip("`") if value else "None")


# The commands run in a folder that has the scripts, with free ports as their defaults.


def with_ports(text: str, before: str, ports: tuple[int, int]) -> str:
    """Replace the ports that stand after a text."""
    text = text.replace(f"{before}1337", f"{before}{ports[0]}")
    return text.replace(f"{before}1338", f"{before}{ports[1]}")


class Page:
    """The folder, with stand-ins for programs, and terminals in which the commands run."""

    def __init__(self, folder: Path, open_terminal: Open) -> None:
        self.folder, self.open_terminal = folder, open_terminal
        self.ports = free_port(), free_port()
        self.programs = folder / ".venv/bin"
        self.programs.mkdir(parents=True)
        self.stand_in("python", f'exec {sys.executable} "$@"')
        for script in SCRIPTS:
            text = (ROOT / script).read_text(encoding="utf-8")
            (folder / script).write_text(with_ports(text, "default=", self.ports))

    def stand_in(self, name: str, script: str) -> None:
        """Put a shell script in the place of a program."""
        (self.programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.programs / name).chmod(0o755)

    def run(self, command: str) -> Terminal:
        """Start a command of the page, with HOST replaced."""
        command = f"cd {self.folder}; PATH={self.programs}:$PATH; {command}"
        return self.open_terminal("bash", "-c", command.replace("HOST", "localhost"))


@pytest.fixture
def page(tmp_path: Path, open_terminal: Open) -> Page:
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    return Page(tmp_path, open_terminal)


@pytest.fixture
def ann(page: Page, start_server: StartServer, join: Join) -> Peer:
    """Give a client of the server that the page's commands use."""
    return join(start_server(ports=page.ports).ports)


# README, zmq-talk-chat: In a second terminal, join the chat (Ctrl-D to leave):
# README, Keys: A client joins like this:
# README, ssh: `python server.py --bind 127.0.0.1` admits only clients on its own host.

SERVER_AND_CLIENTS = [
    commands("zmq-talk-chat")[:2] + re.findall("`(uv run .+?)`", SECTIONS["zmq-talk-chat"]),
    commands("Keys"),
    re.findall("`(python .+?)`", one_line(SECTIONS["ssh"])),
]


@pytest.mark.parametrize("server_and_clients", SERVER_AND_CLIENTS)
def test_start_and_join(page: Page, server_and_clients: list[str]) -> None:
    """What they install is left to .ci/run."""
    for installer in ("python3", "pip"):
        page.stand_in(installer, "exit 0")
    page.stand_in("uv", '[ "$1" = run ] && shift && exec python "$@"')
    server, *clients = server_and_clients
    page.run(server).wait_text("PULLisbound")
    assert clients
    for command in clients:
        ken = page.run(command)
        ken.wait_text("connected")
        ken.type("hello\r")
        ken.wait_rows("ken> hello")
        ken.type("\x04")
        assert ken.process.wait(TIMEOUT) == 0


POST, MAKE, FOLLOW, LISTEN, NOTIFY, KEEP_SERVER, KEEP_CLIENT = commands("Recipes")


# README, Recipes: Post from a script or CI: JSON lines, or plain text with --user.
def test_post(page: Page, ann: Peer) -> None:
    page.stand_in("make", "echo cc main.c; echo error >&2")
    for command in (POST, MAKE):
        terminal = page.run(command)
        assert terminal.process.wait(TIMEOUT) == 0, terminal.rows()
    assert ann.receive() == message_of("ci", "build 512 passed")
    assert ann.receive() == message_of("make", "cc main.c")
    assert ann.receive() == message_of("make", "error")


# README, Recipes: Get a desktop notification when somebody mentions you.

SHOWN = {
    LISTEN: {"ken> it is me", "ann> a token", "ann> Hello Ken!"},
    NOTIFY: {"-- chat ann> Hello Ken!"},
}


@pytest.mark.parametrize(("command", "rows"), SHOWN.items(), ids=["listen", "notify"])
def test_listen_and_notify(page: Page, ann: Peer, command: str, rows: set[str]) -> None:
    page.stand_in("notify-send", 'echo "$@"')
    terminal = page.run(command)

    def shown() -> bool:
        for user, text in (("ken", "it is me"), ("ann", "a token"), ("ann", "Hello Ken!")):
            ann.push.send(line_of(user, text))
        return set(terminal.rows()) == rows

    wait_for(shown, terminal.rows)


# README, Recipes: Post a log as it grows.
# README, Recipes: Keep a server, or a client, running after you log out.
def test_a_log_is_posted_even_after_logging_out(page: Page, join: Join) -> None:
    assert FOLLOW.removesuffix(" >/dev/null") in KEEP_CLIENT

    def posted(ann: Peer, text: str) -> bool:
        with (page.folder / "access.log").open("a") as log:
            log.write(f"{text}\n")
        return bool(ann.sub.poll(100)) and ann.receive() == message_of("web", text)

    shell = page.run(f"{KEEP_SERVER}\n{KEEP_CLIENT}\nwait")
    try:
        ann = join(page.ports)
        wait_for(lambda: posted(ann, "GET /"), shell.rows)
        shell.hang_up()
        shell.process.wait(TIMEOUT)
        ann.round_trip()
        wait_for(lambda: posted(ann, "GET /later"), lambda: "nothing is published")
    finally:
        os.killpg(shell.process.pid, signal.SIGKILL)


# README, Recipes: A client whose stdin is `/dev/null`, as it is for background jobs in scripts,
# exits immediately.
def test_without_input(page: Page) -> None:
    assert page.run("python client.py HOST & wait $!").process.wait(TIMEOUT) == 0


# README, The talk's loops: This is the loop of the server, first from slide 3, then from
# `server.py`
def test_the_loop_on_the_page_is_the_servers() -> None:
    [both] = blocks("The talk's loops")
    loop = both.partition("end\n")[2].strip()
    assert textwrap.indent(loop, "    ") in (ROOT / "server.py").read_text()


# README, systemd: With this file as `/etc/systemd/system/chat.service`
# README, systemd: restarts it if it ends
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = blocks("systemd")[-1].replace("/opt/chat/.venv/bin/python", sys.executable)
    assert "\nRestart=always\n" in unit
    file = tmp_path / "chat.service"
    file.write_text(unit)
    said = subprocess.run(["systemd-analyze", "verify", file], capture_output=True)
    assert (said.returncode, said.stdout, said.stderr) == (0, b"", b"")


# README, Beyond one machine: run this forwarder on other hosts (as `python forwarder.py`, say), and
# have clients connect to those hosts.
def test_a_forwarder_loses_nothing(
    server: Script, start: Start, join: Join, tmp_path: Path
) -> None:
    ports = free_port(), free_port()
    text = blocks("Beyond one machine")[0].replace("chat.example.org", "127.0.0.1")
    text = with_ports(with_ports(text, "{SERVER}:", server.ports), "*:", ports)
    (tmp_path / "forwarder.py").write_text(text)
    start(str(tmp_path / "forwarder.py"))
    ann = join(ports)
    with ann.pushing([line_of("ann", str(number)) for number in range(20_000)]):
        for number in range(20_000):
            assert ann.receive() == message_of("ann", str(number))
