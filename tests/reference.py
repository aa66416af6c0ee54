"""The programs that the chat is compared with: `python reference.py NAME PULL_PORT PUB_PORT`."""

import json
import sys
from collections.abc import Callable

import zmq
from colorama import Fore, Style

Sock = zmq.Socket[bytes]


def server(pull: Sock, pub: Sock) -> None:
    """Publish the message of each line: the talk's server (slide 3), ported line by line."""
    while line := pull.recv():
        payload = json.loads(line)
        pub.send(f"{payload['user']}> {Fore.CYAN}{payload['message']}{Style.RESET_ALL}".encode())


def loop(pull: Sock, pub: Sock) -> None:
    """Pass each line on, and parse nothing: a bare loop of pyzmq."""
    while True:
        pub.send(pull.recv())


PROGRAMS: dict[str, Callable[[Sock, Sock], object]]
PROGRAMS = {"server": server, "loop": loop, "forwarder": zmq.proxy}  # the last is libzmq's, in C

if __name__ == "__main__":
    name, *ports = sys.argv[1:]
    context = zmq.Context()
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    for sock, port in zip((pull, pub), ports, strict=True):
        if name != "server":
            sock.set_hwm(100_000)  # so that they lose few lines or none
        sock.bind(f"tcp://127.0.0.1:{port}")
    PROGRAMS[name](pull, pub)
