"""README.md itself: what it promises has tests, and its commands work as they stand there."""

import contextlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from peers import Join, Peer, line_of, message_of
from processes import (
    ROOT,
    TIMEOUT,
    Script,
    Start,
    StartServer,
    close,
    free_port,
    port_options,
    read_all,
    read_line,
    server_options,
    wait_bound,
    wait_for,
)
from promises import README, SECTIONS, Promise, one_line, read
from terminal import Open

import client
import server

PROMISES, STRAYS = read()
SCRIPTS = ("server.py", "client.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHELL = pytest.mark.skipif(
    os.name != "posix" or not shutil.which("bash"), reason="needs POSIX, and bash"
)


def promises_in(section: str) -> list[str]:
    """Return the bullets, and the rows of the tables, in a section."""
    rows = re.findall(r"^\| (?!\*\*).+\|$(?!\n\|-)", SECTIONS[section], re.MULTILINE)
    bullets = re.findall(r"^- .+(?:\n  .+)*", SECTIONS[section], re.MULTILINE)
    return [one_line(text) for text in bullets + rows]


def blocks(section: str) -> list[str]:
    """Return the indented blocks of a section."""
    found = re.findall(r"(?:^    .+\n+)+", SECTIONS[section], re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in found]


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


def test_every_test_is_under_a_quote() -> None:
    assert STRAYS == []


@pytest.mark.parametrize(
    "section",
    ["What it adds to the original", "Differences from the original", "Delivery in detail",
     "Slow subscribers", "Terminal", "Limits"],
)  # fmt: skip
def test_every_promise_is_quoted(section: str) -> None:
    texts = promises_in(section)
    quotes = [promise.quote for promise in PROMISES if promise.section == section]
    assert [text for text in texts if not any(quote in text for quote in quotes)] == []


def test_the_promises_are_printed_in_the_order_of_the_page() -> None:
    script = [sys.executable, "-X", "utf8", str(ROOT / "tests" / "promises.py")]
    printed = subprocess.check_output(script, encoding="utf-8")
    first = (
        "Tests: lists each promise on this page with its tests\n    test_readme.py::test_a_quote"
    )
    assert first in printed
    headings = [line.partition(":")[0] for line in printed.splitlines() if line[0] != " "]
    assert list(dict.fromkeys(headings)) == [name for name in SECTIONS if name in headings]


def test_the_commands_name_files_that_exist() -> None:
    files = re.findall(r"(?:tests|\.ci)/[\w.]+", "".join(blocks("Tests")))
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


# README, zmq-talk-chat: ![Ken and Ann chat, each in a terminal.


def test_pictures_and_links() -> None:
    pictures = re.findall(r"!\[[^]]+\]\((\S+)\)", README)
    for picture in pictures:
        assert xml.etree.ElementTree.parse(ROOT / picture).getroot().tag.endswith("}svg")
    assert pictures
    anchors = {re.sub(r"[^\w-]", "", name.lower().replace(" ", "-")) for name in SECTIONS}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


# README, zmq-talk-chat: A terminal chat on ZeroMQ in two Python scripts


def test_the_top_level_holds_the_two_scripts_and_little_else() -> None:
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    names -= {f"{PROJECT['name'].replace('-', '_')}.egg-info"}
    assert names == {*SCRIPTS, "tests", "README.md", "pyproject.toml"}


def test_nothing_of_the_project_can_be_imported_by_accident(tmp_path: Path) -> None:
    code = "import importlib.util as i; print(*map(i.find_spec, ['server', 'client', 'tests']))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    assert found.stdout.split() == [b"None"] * 3


# README, zmq-talk-chat: copy `client.py` there. It needs only pyzmq and colorama.


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copied_script_stands_alone(script: str, tmp_path: Path) -> None:
    (tmp_path / script).write_bytes((ROOT / script).read_bytes())
    command = [sys.executable, script, "--help"]
    shown = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
    assert re.search(rf"^example: python {script} ", shown.decode(), re.MULTILINE)
    assert len(shown.splitlines()) < 25


@pytest.mark.parametrize("script", SCRIPTS)
def test_its_metadata_is_that_of_the_project(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    block = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///\n", text, re.MULTILINE)[0]
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    assert metadata == {key: PROJECT[key] for key in ("requires-python", "dependencies")}


# README, Options: | server.py | meaning | default |
# README, Options: | client.py | meaning | default |


@pytest.mark.parametrize("module", [server, client])
def test_the_tables_have_the_options_and_their_defaults(
    module: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SECTIONS["Options"].split(f"| {module.__name__}.py |")[1].split("\n\n")[0]
    cells = re.findall(r"^\| `(.+?)` \| .+ \| (.+) \|$", table, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [module.__name__])
    defaults = {name: str(value) for name, value in vars(module.parse_options()).items()}
    for option, cell in cells:
        name = option.split()[0].lstrip("-").lower().replace("-", "_")
        value = re.match(r"`(.+?)`|(\d+)|", cell)
        assert value
        assert defaults.pop(name) == (value[1] or value[2] or "None")
    assert defaults == {}
    monkeypatch.setattr(sys, "argv", [module.__name__, "--help"])
    with pytest.raises(SystemExit):
        module.parse_options()
    shown = capsys.readouterr().out.replace("{auto,always,never}", "WHEN")
    assert re.findall(r"^  (?!-h)(-*[\w-]+(?: [A-Z]+)?)", shown, re.MULTILINE) == sorted(
        (option for option, _ in cells), key=lambda option: option[0] == "-"
    )


# The commands run in a folder where `python` gives the scripts free ports.


class Page:
    """A folder to run commands in, with stand-ins for programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, (free_port(), free_port())
        self.environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PS1": "$ "}
        self.started: list[Script] = []
        for name in ("bin", ".venv/bin"):
            (folder / name).mkdir(parents=True)
            self.stand_in(
                f"{name}/python",
                "script=$1; shift; case $script in\n"
                f'server.py) set -- {" ".join(server_options(self.ports))} "$@";;\n'
                f'client.py) set -- {" ".join(port_options(self.ports))} "$@";;\n'
                f'esac; exec {sys.executable} {ROOT}/$script "$@"',
            )

    def stand_in(self, name: str, script: str) -> None:
        """Put a shell script in the place of a program."""
        (self.folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.folder / name).chmod(0o755)

    def run(self, command: str) -> Script:
        """Start a command of the page, with HOST replaced."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            ["bash", "-c", command.replace("HOST", "localhost")],
            cwd=self.folder,
            env=os.environ | self.environment,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
        self.started.append(Script(process))
        return self.started[-1]

    def lines(self, name: str) -> list[str]:
        """Return the lines of a file in the folder; there may be none."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def kill_group(group: int) -> None:
    """Kill all that a shell has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """Give a Page."""
    page = Page(tmp_path)
    yield page
    for script in page.started:
        kill_group(script.process.pid)
        script.wait()
        for pipe in (script.process.stdin, script.process.stdout, script.process.stderr):
            assert pipe
            pipe.close()


@pytest.fixture
def ann(page: Page, start_server: StartServer, join: Join) -> Peer:
    """Give a client of the server that the page's commands use."""
    return join(start_server(ports=page.ports).ports)


def repeat(action: Callable[[], object], condition: Callable[[], object]) -> None:
    """Do something every 0.1 seconds, until a condition is true."""

    def act() -> object:
        action()
        time.sleep(0.1)
        return condition()

    wait_for(act, lambda: "nothing happens")


def wait_followed(page: Page, ann: Peer, text: str) -> None:
    """Append lines to access.log until one is published."""

    def append() -> None:
        with (page.folder / "access.log").open("a") as log:
            log.write(f"{text}\n")

    repeat(append, lambda: ann.sub.poll(0) and ann.sub.recv() == message_of("web", text))


# README, zmq-talk-chat: In a second terminal, join the chat (Ctrl-D to leave):
# README, Keys: A client joins like this:
# README, ssh: `python server.py --bind 127.0.0.1` admits only clients on its own host.

COMMANDS = [
    commands("zmq-talk-chat")[:2] + re.findall("`(uv run .+?)`", SECTIONS["zmq-talk-chat"]),
    commands("Keys"),
    re.findall("`(python .+?)`", one_line(SECTIONS["ssh"])),
]


@SHELL
@pytest.mark.parametrize("server_and_clients", COMMANDS)
def test_start_and_join(page: Page, server_and_clients: list[str]) -> None:
    """What they install is left to .ci/run."""
    for installer in ("bin/python3", ".venv/bin/pip"):
        page.stand_in(installer, "exit 0")
    page.stand_in("bin/uv", '[ "$1" = run ] && shift && exec python "$@"')
    server, *clients = server_and_clients
    wait_bound(page.run(server))
    assert clients
    for command in clients:
        ken = page.run(command)
        close(ken, b"hello\n")
        assert read_all(ken) == b"ken> hello\n"
        assert ken.wait() == 0


# README, Recipes: Post from a script or CI: JSON lines, or plain text with --user.


@SHELL
def test_post(page: Page, ann: Peer) -> None:
    page.stand_in("bin/make", "echo cc main.c; echo error >&2")
    statuses = [page.run(command).wait() for command in commands("Recipes")[:2]]
    assert statuses == [0, 0]
    assert ann.receive() == message_of("ci", "build 512 passed")
    assert ann.receive() == message_of("make", "cc main.c")
    assert ann.receive() == message_of("make", "error")


# README, Recipes: Post a log as it grows, or just listen, with an input that never ends.


@SHELL
def test_follow_and_listen(page: Page, ann: Peer) -> None:
    (page.folder / "access.log").write_text("old\n")
    follow, listen = commands("Recipes")[2:4]
    page.run(follow)
    wait_followed(page, ann, "GET /")
    listener = page.run(listen)
    assert listener.process.stdout
    heard = selectors.DefaultSelector()
    heard.register(listener.process.stdout, selectors.EVENT_READ)
    repeat(lambda: ann.push.send(line_of("ann", "hello")), lambda: heard.select(0))
    assert read_line(listener) == b"ann> hello\n"


# README, Recipes: Get a desktop notification when somebody mentions you.


@SHELL
def test_notifications(page: Page, ann: Peer) -> None:
    page.stand_in("bin/notify-send", 'echo "$@" >> notified')
    page.run(commands("Recipes")[4])
    lines = [line_of("ken", "it is me"), line_of("ann", "a token"), line_of("ann", "Hello Ken!")]
    repeat(lambda: [*map(ann.push.send, lines)], lambda: page.lines("notified"))
    assert set(page.lines("notified")) == {"-- chat ann> Hello Ken!"}


# README, Recipes: Keep it running after you log out.


@SHELL
def test_after_logging_out(page: Page, join: Join, open_terminal: Open) -> None:
    (page.folder / "access.log").touch()
    shell = open_terminal("bash", "--norc", "--noprofile", "-i", environment=page.environment)
    recipe = "\r".join(commands("Recipes")[5:7]).replace("HOST", "localhost")
    try:
        shell.type(f"cd {page.folder}\r{recipe}\rjobs -p > jobs\r")
        wait_for(lambda: len(page.lines("jobs")) == 2, shell.rows)
        ann = join(page.ports)
        wait_followed(page, ann, "GET /")
        shell.hang_up()
        shell.process.wait(TIMEOUT)
        ann.round_trip()
        wait_followed(page, ann, "GET /later")
    finally:
        for job in page.lines("jobs"):
            kill_group(int(job))


# README, Recipes: A client whose stdin is `/dev/null`, as it is for background jobs in scripts,
# exits immediately.


@SHELL
def test_without_input(page: Page, ann: Peer) -> None:
    assert page.run("python client.py HOST & wait $!").wait() == 0
    ann.round_trip()


# README, systemd: With this file as `/etc/systemd/system/chat.service`


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = blocks("systemd")[-1].replace("/opt/chat/.venv/bin/python", sys.executable)
    (tmp_path / "chat.service").write_text(unit)
    command = ["systemd-analyze", "verify", str(tmp_path / "chat.service")]
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (said.returncode, said.stdout) == (0, b"")


# README, Beyond one machine: run this forwarder on other hosts, and have clients connect to them.


def with_ports(text: str, host: str, ports: tuple[int, int]) -> str:
    """Replace the ports of a host."""
    return text.replace(f"{host}1337", f"{host}{ports[0]}").replace(
        f"{host}1338", f"{host}{ports[1]}"
    )


def test_forwarders_lose_nothing(server: Script, start: Start, join: Join, tmp_path: Path) -> None:
    text = blocks("Beyond one machine")[0].replace("chat.example.org", "127.0.0.1")
    text = with_ports(text, "{SERVER}:", server.ports)
    peers = [join(server.ports)]
    for _ in range(2):
        ports = free_port(), free_port()
        script = tmp_path / f"forwarder{ports[0]}.py"
        script.write_text(with_ports(text, "*:", ports))
        start(str(script))
        peers.append(join(ports))
    users = [f"user {number}" for number in range(3)]
    with contextlib.ExitStack() as stack:
        for user, peer in zip(users, peers, strict=True):
            stack.enter_context(peer.pushing([line_of(user, str(n)) for n in range(2_000)]))
        for peer in peers:
            received: list[bytes] = []
            while len(received) < 6_000:
                received += [m for m in [peer.receive()] if not m.startswith(b"join>")]
            for user in users:
                mine = [message for message in received if message.startswith(user.encode())]
                assert mine == [message_of(user, str(n)) for n in range(2_000)]
