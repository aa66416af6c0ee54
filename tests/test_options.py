"""README, "Options": where the scripts bind and connect, and what they refuse."""

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator

import pytest
import zmtp
from network import Network
from peers import line_of, message_of
from processes import (
    RunClient,
    Script,
    Start,
    StartServer,
    close,
    free_port,
    port_options,
    python,
    server_options,
)
from terminal import Open

# The server binds to an address, or to a network interface, and says where.


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


INTERFACES = {  # the command that changes a host which has an IPv4 and a link-local IPv6 address
    "IPv4 alone": "ip -6 address flush dev {name}",
    "IPv4 and link-local IPv6": "ip -6 address replace fe80::7/64 dev {name} nodad",
    "both families": "ip -6 address replace fd00::7/64 dev {name} nodad",
}


@pytest.mark.parametrize("command", INTERFACES.values(), ids=INTERFACES)
def test_the_server_binds_to_an_interface(
    start_server: StartServer, network: Network, command: str
) -> None:
    host = network.server_host
    subprocess.run(host.command(*command.format(name=host.name).split()), check=True)
    server = start_server("--bind", host.name, before=host.command())
    assert f"PULL is bound to tcp://{host.address}:{server.ports[0]}, " in server.stderr
    with network.client_host.inside():
        chat(server.ports, host.address)


def test_the_server_binds_to_all_interfaces_of_a_host_without_ipv6(
    start_server: StartServer, network: Network
) -> None:
    host = network.server_host
    for name in ("all", "lo"):
        setting = f"net.ipv6.conf.{name}.disable_ipv6=1"
        subprocess.run(host.command("sysctl", "-q", "-w", setting), check=True)
    server = start_server(before=host.command())
    with network.client_host.inside():
        chat(server.ports, host.address)


# What it cannot bind, it names in one line, and ends with 1.


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """Give a port that something else listens on."""
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.mark.parametrize("taken", [0, 1], ids=["PULL", "PUB"])
def test_an_endpoint_in_use_is_reported(start: Start, taken: int) -> None:
    with taken_port() as port:
        free = free_port()
        script = start("server.py", *server_options((free, port) if taken else (port, free)))
        assert script.wait() == 1
        assert re.fullmatch(
            rf"server\.py: cannot bind tcp://\*:{port}: .*in use.*; see --help\n", script.stderr
        )
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0", free))  # The other port is free again.


@pytest.mark.parametrize(
    "address", ["no.such.interface", "192.0.2.1", "2001:db8::1", "", "[", "a b"]
)
def test_an_address_that_cannot_be_bound_is_reported(start: Start, address: str) -> None:
    script = start("server.py", "--bind", address, *server_options((0, 0)))
    assert script.wait() == 1
    endpoint = f"[{address}]" if ":" in address else address.strip("[]")
    assert re.fullmatch(
        rf"server\.py: cannot bind tcp://{re.escape(endpoint)}:0: .+; see --help\n", script.stderr
    )


def test_two_servers_cannot_have_the_same_ports(start: Start, server: Script) -> None:
    script = start("server.py", *server_options(server.ports))
    assert script.wait() == 1
    assert script.stderr.startswith(f"server.py: cannot bind tcp://*:{server.ports[0]}: ")


# The client takes the name or the address of the server's host.


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "[::1]"])
def test_the_client_connects_to_a_host(start: Start, server: Script, host: str) -> None:
    ports = port_options(server.ports)
    script = start("client.py", host, *ports, "--user", "k", stdin=subprocess.PIPE)
    close(script, b"hi\n")
    assert script.wait() == 0
    assert script.stderr == ""


HOST_NAMES = [b"caf\xe9", "café".encode(), b"a..b", b"x" * 300, b"-", b"tcp://host", b"a b", b" "]


@pytest.mark.parametrize("host", HOST_NAMES)
def test_any_bytes_may_be_a_host_name(start: Start, host: bytes) -> None:
    ports = port_options((free_port(), free_port()))
    script = start("client.py", *ports, "--", os.fsdecode(host), stdin=subprocess.PIPE)
    script.wait_stderr(r"client\.py: .*(no server at|not a host name or address: ).*\n")
    close(script)
    assert script.wait() in (0, 2)
    assert "Traceback" not in script.stderr


# Messages keep their colours on a terminal, unless NO_COLOR is set or it is dumb. --color says
# otherwise.

PLAIN, CYAN = b"k> hi", b"k> \x1b[36mhi\x1b[0m"
COLORS = {  # options, the environment, and what comes out in a pipe and on a terminal
    "default": ([], {}, PLAIN, CYAN),
    "auto": (["--color", "auto"], {}, PLAIN, CYAN),
    "NO_COLOR": ([], {"NO_COLOR": "1"}, PLAIN, PLAIN),
    "an empty NO_COLOR": ([], {"NO_COLOR": ""}, PLAIN, CYAN),
    "dumb": ([], {"TERM": "dumb"}, PLAIN, PLAIN),
    "never": (["--color", "never"], {}, PLAIN, PLAIN),
    "always": (["--color", "always"], {}, CYAN, CYAN),
    "always, NO_COLOR": (["--color", "always"], {"NO_COLOR": "1"}, CYAN, CYAN),
    "always, dumb": (["--color", "always"], {"TERM": "dumb"}, CYAN, CYAN),
}


@pytest.mark.parametrize(
    ("options", "environment", "pipe", "terminal"), COLORS.values(), ids=COLORS
)
def test_colour(
    server: Script,
    run_client: RunClient,
    open_terminal: Open,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    environment: dict[str, str],
    pipe: bytes,
    terminal: bytes,
) -> None:
    """In a pipe and on a terminal."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_client(server.ports, b"hi", "--user", "k", *options).stdout == pipe + b"\n"
    command = python("client.py", *port_options(server.ports), "--user", "k", *options)
    shown = open_terminal(*command, environment=environment)
    shown.wait_text("connectedtolocalhost")
    shown.type("hi\r")
    shown.wait_text("k>hi")
    assert terminal + b"\r\n" in shown.received


# Wrong usage is status 2, and a hint.

PORTS = "and the ports as --push-port and --sub-port"
WRONG = {  # what is given, and the end of the last line on stderr
    "the server's port, not a number": ("server.py --pull-port many", "value: 'many'"),
    "the server's port, too large": ("server.py --pub-port 65536", "value: '65536'"),
    "the server's port, negative": ("server.py --pull-port -1", "value: '-1'"),
    "the server's, unknown": ("server.py --nosuch", "arguments: --nosuch"),
    "the client's port, none": ("client.py --push-port 0", "value: '0'"),
    "the client's port, too large": ("client.py --sub-port 65536", "value: '65536'"),
    "the client's, unknown": ("client.py --nosuch", "arguments: --nosuch"),
    "two hosts": ("client.py a b", "arguments: b"),
    "a colour": ("client.py --color perhaps", "(choose from 'auto', 'always', 'never')"),
    "a port in HOST": ("client.py localhost:1337", f"write localhost, {PORTS}"),
    "a port in an address": ("client.py 127.0.0.1:1337", f"write 127.0.0.1, {PORTS}"),
    "a port in an IPv6 address": ("client.py [::1]:1337", f"write [::1], {PORTS}"),
    "no host": ("client.py ", "not a host name or address: ''"),
    "a path": ("client.py /tmp", "not a host name or address: '/tmp'"),
}


@pytest.mark.parametrize(("command", "problem"), WRONG.values(), ids=WRONG)
def test_wrong_usage_is_status_2(start: Start, command: str, problem: str) -> None:
    script = start(*command.split(" "), stdin=subprocess.PIPE)
    assert script.wait() == 2
    assert "usage: " in script.stderr
    assert script.stderr.endswith(f"{problem}\n")
    assert "Traceback" not in script.stderr
