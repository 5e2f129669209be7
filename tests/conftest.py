"""What every test runs under: one thread, no hub, no network beyond this machine, seeded hypothesis."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from reward_models.torchvision_ops import ready

ready()  # transformers, diffusers and timm import torchvision, which may have been built for another torch
torch.set_num_threads(1)
hypothesis.settings.register_profile("flowrl", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("flowrl")


class NetworkUsed(RuntimeError):
    """A test without the marker `network` tried to leave this machine."""


def _is_local(host: Any) -> bool:
    if host in (None, "", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse name look-ups and connections to anywhere but this machine, and fail even if the refusal was swallowed."""
    if "network" in request.keywords:
        yield
        return
    attempts: list[str] = []

    def refuse(host: Any) -> None:
        if not _is_local(host):
            attempts.append(str(host))
            raise NetworkUsed(f"the test tried to reach {host!r}; mark it `network` or leave the network out")

    def guarded(name: str) -> Any:
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(address[0])
            return original(self, address)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return look_up(host, *args, **kwargs)

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name), raising=True)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    if attempts and "expects_network_refusal" not in request.fixturenames:
        pytest.fail(f"the test tried to reach {', '.join(attempts)}")


@pytest.fixture
def expects_network_refusal() -> None:
    """For the test of the guard itself."""
