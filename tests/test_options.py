"""README, "Options": where the scripts bind and connect, and what they refuse."""

import os
import re
import shlex
import socket
import subprocess

import pytest
from network import Network
from processes import POSIX, RunClient, Script, Start, StartServer, free_port, port_options, python
from terminal import Open

import client
import server as server_script


# README, Options: the address, or the network interface such as `eth0`, to listen on
# README, Options: the server: an IPv4 or IPv6 address, or a host name (resolved to IPv4 only)
def chat(run_client: RunClient, server: Script, host: str) -> None:
    """Have a client's line published by a server at a host."""
    done = run_client(server.ports, b"hi\n", "--user", "k", host)
    assert (done.stdout, done.stderr, done.returncode) == (b"k> hi\n", b"", 0)


ADDRESSES: dict[str, tuple[str, list[str], list[str]]] = {
    # What is given: what the server says, where it is reached, and where it is not.
    "*": ("*", ["127.0.0.1", "::1"], []),
    "127.0.0.1": ("127.0.0.1", ["localhost"], ["::1"]),
    "::1": ("[::1]", ["::1"], ["127.0.0.1"]),
    "[::1]": ("[::1]", ["[::1]"], ["127.0.0.1"]),
    "0.0.0.0": ("0.0.0.0", ["127.0.0.1"], ["::1"]),
    "::": ("[::]", ["::1"], []),
}


@pytest.mark.parametrize("given", ADDRESSES)
def test_the_server_binds_to_an_address(
    start_server: StartServer, run_client: RunClient, given: str
) -> None:
    """It picks free ports."""
    said, reached, not_reached = ADDRESSES[given]
    server = start_server("--bind", given, ports=(0, 0))
    pull, pub = server.ports
    bound = f"server.py: ready: PULL is bound to tcp://{said}:{pull}, PUB to tcp://{said}:{pub}\n"
    assert server.stderr == bound
    for host in reached:
        chat(run_client, server, host)
    for host in not_reached:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, pull))


def test_the_server_binds_to_an_interface_and_to_all(
    start_server: StartServer, run_client: RunClient, network: Network
) -> None:
    host = network.server_host
    for change in (
        f"ip -6 address add fd00::7/64 dev {host.name} nodad",
        "sysctl -qw net.ipv6.conf.all.disable_ipv6=1",
    ):
        subprocess.run(host.command(*change.split()), check=True)
        for address, said in ((host.name, host.address), ("*", "*")):
            server = start_server("--bind", address, before=host.command())
            assert f"PULL is bound to tcp://{said}:{server.ports[0]}, " in server.stderr
            with network.client_host.inside():
                chat(run_client, server, host.address)


def test_a_host_that_does_not_exist_is_one_without_a_server(start: Start) -> None:
    ports = port_options((free_port(), free_port()))
    hosts = ("a..b", "x" * 300, "no-such-host.invalid", "1.2.3", ":::::")
    scripts = [start("client.py", *ports, host, stdin=subprocess.PIPE) for host in hosts]
    for host, script in zip(hosts, scripts, strict=True):
        script.wait_stderr(rf"^client\.py: no server at {re.escape(host)} .*\n$")


@pytest.mark.parametrize("host", ["a b", "café"])
def test_a_host_that_cannot_be_one_is_reported(run_client: RunClient, host: str) -> None:
    done = run_client((1, 2), b"hi\n", host)
    assert done.returncode == 1
    assert re.fullmatch(rf"client\.py: .+ \(addr='tcp://{host}:2'\)\n", done.stderr.decode())


# README, Options: port for incoming lines; 0 picks a free one
# README, Options: port for outgoing messages; 0 picks a free one

REFUSED = [  # options, and the endpoint; {} is a port that is taken
    ("--pull-port {} --pub-port 0", "*:{}"),
    ("--pull-port 0 --pub-port {}", "*:{}"),
    ("--pull-port 0 --bind no.such.interface", "no.such.interface:0"),
    ("--pull-port 0 --bind 192.0.2.1", "192.0.2.1:0"),
    ("--pull-port 0 --bind 2001:db8::1", "2001:db8::1:0"),
    pytest.param("--pull-port 0 --bind ''", ":0", marks=POSIX),  # Windows takes it for its own.
]


@pytest.mark.parametrize(("options", "endpoint"), REFUSED)
def test_an_endpoint_that_cannot_be_bound_is_reported(
    start: Start, options: str, endpoint: str
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        script = start("server.py", *shlex.split(options.format(port)))
        assert script.wait() == 1
    address = re.escape(f"(addr='tcp://{endpoint.format(port)}'); see --help")
    assert re.fullmatch(rf"server\.py: cannot start: .+ {address}\n", script.stderr)


# README, Output and exit status: 2 on a usage error

INSTEAD = "HOST: write HOST --push-port PORT --sub-port PORT\n"
WRONG = {  # what is given, and what is on stderr
    "server.py --pull-port many": "value: 'many'",
    "server.py --pub-port 65536": "value: '65536'",
    "server.py --pull-port -1": "value: '-1'",
    "client.py --push-port 0": "value: '0'",
    "client.py --sub-port 65536": "value: '65536'",
    "client.py --color perhaps": "choice: 'perhaps'",
    "client.py ''": INSTEAD,
    "client.py localhost:1337": INSTEAD,
    "client.py localhost:": INSTEAD,
    "client.py :1337": INSTEAD,
    "client.py [::1]:1337": INSTEAD,
    "client.py tcp://localhost": INSTEAD,
    "client.py 'h\x1b[2J'": INSTEAD,
    "client.py \udcff": INSTEAD,
}


@pytest.mark.parametrize(("command", "problem"), WRONG.items(), ids=WRONG)
def test_wrong_usage_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, problem: str
) -> None:
    argv = shlex.split(command)
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as raised:
        (server_script if argv[0] == "server.py" else client).parse_options()
    assert raised.value.code == 2
    assert problem in capsys.readouterr().err


# README, Options: `always`, `never`, or `auto` (colors on a terminal, unless `NO_COLOR` is set)

PLAIN, CYAN = b"k> hi", b"k> \x1b[36mhi\x1b[0m"
COLORS = [  # options, the environment, and what comes out in a pipe and on a terminal
    ("", {}, PLAIN, CYAN),
    ("--color auto", {"NO_COLOR": "1"}, PLAIN, PLAIN),
    ("--color auto", {"NO_COLOR": ""}, PLAIN, CYAN),
    ("", {"TERM": "dumb"}, PLAIN, PLAIN),
    ("--color never", {}, PLAIN, PLAIN),
    ("--color always", {"NO_COLOR": "1", "TERM": "dumb"}, CYAN, CYAN),
]


def test_colour(
    server: Script, run_client: RunClient, open_terminal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for options, environment, in_a_pipe, on_a_terminal in COLORS:
        args = ["--user", "k", *options.split()]
        done = run_client(server.ports, b"hi\n", *args, env=os.environ | environment)
        assert done.stdout == in_a_pipe + b"\n", (options, environment)
        command = python("client.py", *port_options(server.ports), *args)
        terminal = open_terminal(*command, environment=environment)
        terminal.type("hi\r")
        terminal.wait_text("k>hi")
        assert on_a_terminal + b"\r\n" in terminal.received, (options, environment)
        terminal.close()
