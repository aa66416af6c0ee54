"""A peer that vanishes: last of all, since a server waits for it for a quarter of a minute."""

import socket

from conftest import TIMEOUT


def test_a_peer_that_vanished_is_cut_off(vanished_peer: socket.socket) -> None:
    vanished_peer.settimeout(TIMEOUT)
    received = b""
    while data := vanished_peer.recv(65_536):
        received += data
    assert b"\x04PING" in received  # asked whether it is there, it did not answer, and was cut off
