"""The programs that the chat is compared with: `python reference.py NAME PULL_PORT PUB_PORT`.

server and client are the talk's two scripts (slides 3 and 8), ported line by line. loop and
forwarder pass each frame on and parse nothing: a bare loop of pyzmq, and libzmq's own, in C. These
two keep up to 100,000 frames for each peer, so that they lose few or none.
"""

import json
import sys
import time

import zmq
from colorama import Fore, Style

Sock = zmq.Socket[bytes]
TALK_HWM, LARGE_HWM = 1_000, 100_000  # libzmq's default, as in the talk, and one for long queues


def bind(pull_port: int, pub_port: int, hwm: int) -> tuple[Sock, Sock]:
    """Return PULL and PUB, with a high-water mark."""
    context = zmq.Context()
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    for sock, port in ((pull, pull_port), (pub, pub_port)):
        sock.set_hwm(hwm)
        sock.bind(f"tcp://127.0.0.1:{port}")
    return pull, pub


def server(pull_port: int, pub_port: int) -> None:
    """Parse each line, and publish its message, as on slide 3."""
    pull, pub = bind(pull_port, pub_port, TALK_HWM)
    while line := pull.recv():
        payload = json.loads(line)
        pub.send(f"{payload['user']}> {Fore.CYAN}{payload['message']}{Style.RESET_ALL}".encode())


def client(pull_port: int, pub_port: int) -> None:
    """Push each line of stdin, and print the messages that SUB holds, as on slide 8.

    To be measured, it also waits for its subscription at the start and for messages at the end. It
    writes on stderr how many messages it printed, and in how many seconds.
    """
    context = zmq.Context()
    sub, push = context.socket(zmq.SUB), context.socket(zmq.PUSH)
    sub.setsockopt(zmq.SUBSCRIBE, b"")
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


def loop(pull_port: int, pub_port: int) -> None:
    """Publish each frame as it is."""
    pull, pub = bind(pull_port, pub_port, LARGE_HWM)
    while True:
        pub.send(pull.recv())


def forwarder(pull_port: int, pub_port: int) -> None:
    """Publish each frame as it is, in C."""
    zmq.proxy(*bind(pull_port, pub_port, LARGE_HWM))


if __name__ == "__main__":
    run = {"server": server, "client": client, "loop": loop, "forwarder": forwarder}[sys.argv[1]]
    run(int(sys.argv[2]), int(sys.argv[3]))
