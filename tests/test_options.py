"""README, "Options": where the scripts bind and connect, and what they refuse."""

import os
import re
import shlex
import socket
import subprocess

import pytest
import zmtp
from network import Network
from peers import line_of, message_of
from processes import (
    RunClient,
    Script,
    Start,
    StartServer,
    free_port,
    port_options,
    python,
    server_options,
)
from terminal import Open

import client
import server as server_script

# README, Options: the address, or the network interface such as `eth0`, to listen on


def chat(ports: tuple[int, int], host: str) -> None:
    """Have a line published, by a server at a host."""
    sub = zmtp.connect(ports[1], b"SUB", host)
    push = zmtp.connect(ports[0], b"PUSH", host)
    with sub, push:
        received = b""
        while zmtp.frame(message_of("k", "hi")) not in received:  # until SUB is subscribed
            push.sendall(zmtp.frame(line_of("k", "hi")))
            received += zmtp.receive_until_quiet(sub, 0.05)[0]


ADDRESSES = {  # what is given, what the server says, where it is reached, and where it is not
    "all": ("*", "*", ["127.0.0.1", "::1"], []),
    "IPv4": ("127.0.0.1", "127.0.0.1", ["127.0.0.1"], ["::1"]),
    "IPv6": ("::1", "[::1]", ["::1"], ["127.0.0.1"]),
    "IPv6 in brackets": ("[::1]", "[::1]", ["::1"], ["127.0.0.1"]),
    "all of IPv4": ("0.0.0.0", "0.0.0.0", ["127.0.0.1"], ["::1"]),
    "all of IPv6": ("::", "[::]", ["::1"], []),
}


@pytest.mark.parametrize(
    ("given", "said", "reached", "not_reached"), ADDRESSES.values(), ids=ADDRESSES
)
def test_the_server_binds_to_an_address(
    start_server: StartServer, given: str, said: str, reached: list[str], not_reached: list[str]
) -> None:
    """It picks free ports."""
    server = start_server("--bind", given, ports=(0, 0))
    pull_port, pub_port = server.ports
    assert pull_port and pub_port
    assert server.stderr == (
        f"server.py: PULL is bound to tcp://{said}:{pull_port}, PUB to tcp://{said}:{pub_port}\n"
    )
    for host in reached:
        chat(server.ports, host)
    for host in not_reached:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, pull_port))


HOSTS = {  # the command that changes a host which has an IPv4 and a link-local IPv6 address
    "IPv4 alone": "ip -6 address flush dev {name}",
    "IPv4 and link-local IPv6": "ip -6 address replace fe80::7/64 dev {name} nodad",
    "both families": "ip -6 address replace fd00::7/64 dev {name} nodad",
    "no IPv6 at all": "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.lo.disable_ipv6=1",
}


@pytest.mark.parametrize("command", HOSTS.values(), ids=HOSTS)
def test_the_server_binds_to_an_interface_and_to_all(
    start_server: StartServer, network: Network, command: str
) -> None:
    host = network.server_host
    subprocess.run(host.command(*command.format(name=host.name).split()), check=True)
    for address, said in ((host.name, host.address), ("*", "*")):
        server = start_server("--bind", address, before=host.command())
        assert f"PULL is bound to tcp://{said}:{server.ports[0]}, " in server.stderr
        with network.client_host.inside():
            chat(server.ports, host.address)


# README, Options: port for incoming lines; 0 picks a free one
# README, Options: port for outgoing messages; 0 picks a free one


@pytest.mark.parametrize("taken", [0, 1], ids=["PULL", "PUB"])
def test_an_endpoint_in_use_is_reported(start: Start, taken: int) -> None:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        port, free = sock.getsockname()[1], free_port()
        script = start("server.py", *server_options((free, port) if taken else (port, free)))
        assert script.wait() == 1
    assert re.fullmatch(
        rf"server\.py: cannot bind tcp://\*:{port}: .*(in use|denied).*; see --help\n",
        script.stderr,
    )


EMPTY = [  # Windows takes an empty address for its own.
    pytest.param(address, marks=pytest.mark.skipif(os.name == "nt", reason="valid on Windows"))
    for address in ("", "[")
]


@pytest.mark.parametrize(
    "address", ["no.such.interface", "192.0.2.1", "2001:db8::1", "a b", *EMPTY]
)
def test_an_address_that_cannot_be_bound_is_reported(start: Start, address: str) -> None:
    script = start("server.py", "--bind", address, *server_options((0, 0)))
    assert script.wait() == 1
    endpoint = f"[{address}]" if ":" in address else address.strip("[]")
    assert re.fullmatch(
        rf"server\.py: cannot bind tcp://{re.escape(endpoint)}:0: .+; see --help\n", script.stderr
    )


# README, Options: 2 on a usage error

INSTEAD = "HOST: write {} --push-port PORT --sub-port PORT"
WRONG = {  # what is given, and the end of the last line on stderr
    "server.py --pull-port many": "value: 'many'",
    "server.py --pub-port 65536": "value: '65536'",
    "server.py --pull-port -1": "value: '-1'",
    "server.py --nosuch": "arguments: --nosuch",
    "client.py --push-port 0": "value: '0'",
    "client.py --sub-port 65536": "value: '65536'",
    "client.py --nosuch": "arguments: --nosuch",
    "client.py a b": "arguments: b",
    "client.py --color perhaps": "(choose from 'auto', 'always', 'never')",
    "client.py localhost:1337": INSTEAD.format("localhost"),
    "client.py localhost:": INSTEAD.format("localhost"),
    "client.py :1337": INSTEAD.format("HOST"),
    "client.py 127.0.0.1:1337": INSTEAD.format("127.0.0.1"),
    "client.py [::1]:1337": INSTEAD.format("[::1]"),
} | {
    f"client.py {shlex.quote(host)}": f"HOST: {host!r} is not a host name or an address"
    for host in ("", " ", "a b", "/tmp", "tcp://h", "a:b", "::x", "café", "h\x1b[2J", "h\n")
}  # fmt: skip


@pytest.mark.parametrize(("command", "problem"), WRONG.items(), ids=WRONG)
def test_wrong_usage_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, problem: str
) -> None:
    argv = shlex.split(command)
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as raised:
        (server_script if argv[0] == "server.py" else client).parse_options()
    assert raised.value.code == 2
    printed = capsys.readouterr().err
    assert "usage: " in printed
    # Newer Pythons do not quote choices.
    assert printed.replace("'", "").endswith(f"{problem}\n".replace("'", ""))


# README, Options: the server: an IPv4 or IPv6 address, or a host name (resolved to IPv4 only)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "[::1]"])
def test_the_client_connects_to_a_host(server: Script, run_client: RunClient, host: str) -> None:
    done = run_client(server.ports, b"hi\n", "--user", "k", host)
    assert (done.stdout, done.stderr, done.returncode) == (b"k> hi\n", b"", 0)


def test_a_host_that_does_not_exist_is_one_without_a_server(start: Start) -> None:
    ports = port_options((free_port(), free_port()))
    scripts = {}
    for host in ("a..b", "x" * 300, "no-such-host.invalid", "1.2.3", ":::::"):
        scripts[host] = start("client.py", *ports, host, stdin=subprocess.PIPE)
    for host, script in scripts.items():
        script.wait_stderr(rf"^client\.py: no server at {re.escape(host)} .*\n$")


# README, Options: `always`, `never`, or `auto`: on a terminal, unless `NO_COLOR` is set

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
    server: Script, start: Start, open_terminal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for options, environment, in_a_pipe, on_a_terminal in COLORS:
        args = [*port_options(server.ports), "--user", "k", *options.split()]
        piped = start("client.py", *args, stdin=subprocess.PIPE, **environment)
        assert piped.process.communicate(b"hi\n")[0].splitlines() == [in_a_pipe], options
        terminal = open_terminal(*python("client.py", *args), environment=environment)
        terminal.wait_text("connectedtolocalhost")
        terminal.type("hi\r")
        terminal.wait_text("k>hi")
        assert on_a_terminal + b"\r\n" in terminal.received, (options, environment)
        terminal.close()
