"""The programs that the chat is compared with: `python reference.py NAME PULL_PORT PUB_PORT`.

server and client are the talk's two scripts (slides 3 and 8), ported line by line. loop and
forwarder pass each frame on and parse nothing: a bare loop of pyzmq, and libzmq's own, in C. These
two keep up to 100,000 frames for each peer, so that they lose few or none.
"""

import json
import sys
import time
from collections.abc import Callable

import zmq
from colorama import Fore, Style

Sock = zmq.Socket[bytes]


def server(pull: Sock, pub: Sock) -> None:
    """Parse each line, and publish its message, as on slide 3."""
    while line := pull.recv():
        payload = json.loads(line)
        pub.send(f"{payload['user']}> {Fore.CYAN}{payload['message']}{Style.RESET_ALL}".encode())


def client(push: Sock, sub: Sock) -> None:
    """Push each line of stdin, and print the messages that SUB holds, as on slide 8.

    To be measured, it also waits for its subscription at the start and for messages at the end.
    """
    sub.subscribe(b"")
    time.sleep(0.5)
    for typed in sys.stdin.buffer:
        if line := typed.rstrip(b"\r\n"):
            push.send(line)
        try:
            while True:
                print(sub.recv(zmq.NOBLOCK).decode())
        except zmq.Again:
            pass
    while sub.poll(1_000):
        print(sub.recv().decode())


def loop(pull: Sock, pub: Sock) -> None:
    while True:
        pub.send(pull.recv())


def main() -> None:
    name, *ports = sys.argv[1:]
    context = zmq.Context()
    kinds = (zmq.PUSH, zmq.SUB) if name == "client" else (zmq.PULL, zmq.PUB)
    socks: list[Sock] = [context.socket(kind) for kind in kinds]
    for sock, port in zip(socks, ports, strict=True):
        if name in ("loop", "forwarder"):
            sock.set_hwm(100_000)
        start = sock.connect if name == "client" else sock.bind
        start(f"tcp://127.0.0.1:{port}")
    programs: dict[str, Callable[[Sock, Sock], object]]
    programs = {"server": server, "client": client, "loop": loop, "forwarder": zmq.proxy}
    programs[name](*socks)


if __name__ == "__main__":
    main()
