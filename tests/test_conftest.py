"""The guard against network use in tests."""

from __future__ import annotations

import socket

import pytest


def test_connections_to_other_machines_are_refused(expects_network_refusal: None) -> None:
    with pytest.raises(RuntimeError, match="192.0.2.1"), socket.socket() as connection:
        connection.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match="example.org"):
        socket.create_connection(("example.org", 80), timeout=1)


def test_connections_to_this_machine_work() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as c,
    ):
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"hello")
            assert c.recv(5) == b"hello"
