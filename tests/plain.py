"""The programs that the chat is compared with: `python plain.py server|client|forwarder PULL PUB`.

server and client are the talk's two scripts (slides 3 and 8) ported plainly, line by line; the
forwarder is libzmq's own, in C, which parses nothing.
"""

import json
import sys
import time

import zmq
from colorama import Fore, Style


def server(pull_port: int, pub_port: int) -> None:
    """Republish each line, as on slide 3."""
    context = zmq.Context()
    pub = context.socket(zmq.PUB)
    pull = context.socket(zmq.PULL)
    pub.bind(f"tcp://127.0.0.1:{pub_port}")
    pull.bind(f"tcp://127.0.0.1:{pull_port}")
    while body := pull.recv():
        payload = json.loads(body)
        pub.send(f"{payload['user']}> {Fore.CYAN}{payload['message']}{Style.RESET_ALL}".encode())


def client(pull_port: int, pub_port: int) -> None:
    """Push each line of stdin, and print what SUB holds, as on slide 8.

    Around the loop, what it takes to measure it: a wait for the subscription, another for what
    comes after the last line, and on stderr the messages printed and the seconds that took.
    """
    context = zmq.Context()
    sub = context.socket(zmq.SUB)
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    push = context.socket(zmq.PUSH)
    sub.connect(f"tcp://127.0.0.1:{pub_port}")
    push.connect(f"tcp://127.0.0.1:{pull_port}")
    time.sleep(0.5)
    began = last = time.perf_counter()
    count = 0
    for typed in sys.stdin.buffer:
        line = typed.rstrip(b"\r\n")
        if line:
            push.send(line)
        try:
            while True:
                print(sub.recv(zmq.NOBLOCK).decode())
                count += 1
        except zmq.Again:
            pass
    while sub.poll(1_000):
        print(sub.recv().decode())
        count += 1
        last = time.perf_counter()
    print(count, last - began, file=sys.stderr)


def forwarder(pull_port: int, pub_port: int) -> None:
    """Send every frame on as it is, in C."""
    context = zmq.Context()
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    pull.bind(f"tcp://127.0.0.1:{pull_port}")
    pub.bind(f"tcp://127.0.0.1:{pub_port}")
    zmq.proxy(pull, pub)


if __name__ == "__main__":
    run = {"server": server, "client": client, "forwarder": forwarder}[sys.argv[1]]
    run(int(sys.argv[2]), int(sys.argv[3]))
