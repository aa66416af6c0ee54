"""README, "Options": where the scripts bind and connect, and what they refuse."""

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator

import pytest
import zmtp
from network import Network
from peers import line_of, message_of
from processes import Script, Start, StartServer, free_port, server_options

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


# Wrong usage is status 2, and a hint.

WRONG = {
    "not a number": ["--pull-port", "many"],
    "too large": ["--pub-port", "65536"],
    "negative": ["--pull-port", "-1"],
    "unknown": ["--nosuch"],
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_wrong_usage_of_the_server_is_status_2(start: Start, options: list[str]) -> None:
    script = start("server.py", *options)
    assert script.wait() == 2
    assert "usage: server.py" in script.stderr
    assert "Traceback" not in script.stderr
