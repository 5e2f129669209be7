"""A small OpenAI-compatible chat server in a thread: a function answers, and faults can be injected."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Brain = Callable[[str, list[np.ndarray], dict[str, Any]], str]


@dataclass
class Server:
    """What the tests see: the URL, the requests so far, and how many of them ran at once."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    busiest: int = 0


def decode(url: str) -> np.ndarray:
    """(H, W, 3) uint8 of a data URL."""
    head, _, data = url.partition(";base64,")
    assert head.startswith("data:image"), head
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def completion(text: Any, finish: str = "stop", **message: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@contextmanager
def serve(
    brain: Brain,
    faults: Iterator[str] | None = None,
    delay: float = 0.0,
    model: str = "judge",
    listing: int = 200,
) -> Iterator[Server]:
    """Answer every question with ``brain(text, images, body)``.

    Args:
        brain: from the question to the answer.
        faults: one word per request: "" (none), a status (with a pause behind it, "429 5"), "drop", "slow", "garbage",
            "wrong", "empty", "cut", "drip", "huge".
        delay: seconds for each request.
        model: the name that /v1/models lists. listing: the status of that answer.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def send(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send(listing, json.dumps({"data": [{"id": model}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                fault = next(faults, "") if faults else ""
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                server.at_once += 1
                server.busiest = max(server.busiest, server.at_once)
            try:
                time.sleep(delay)
                self.answer(body, fault)
            except OSError:  # the client has given up
                self.close_connection = True
            finally:
                with lock:
                    server.at_once -= 1

        def answer(self, body: dict[str, Any], fault: str) -> None:
            assert body["model"] == model and self.path == "/v1/chat/completions"
            content = body["messages"][0]["content"]
            images = [decode(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]
            assert content[-1]["type"] == "text"
            status, _, pause = fault.partition(" ")
            if status.isdigit():
                pause = pause or ("0" if status == "429" else "")
                self.send(int(status), b'{"error": "as told"}', **({"Retry_After": pause} if pause else {}))
            elif fault == "drop":
                self.close_connection = True
                self.connection.close()
            elif fault == "slow":
                time.sleep(1.0)
            elif fault == "drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(40):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
            elif fault == "huge":
                self.send(200, b" " * 9_000_000)
            elif fault == "garbage":
                self.send(200, b"<html>not JSON</html>")
            elif fault == "wrong":
                self.send(200, b'{"choices": [{"text": "another protocol"}]}')
            elif fault == "empty":
                self.send(200, completion(None))
            elif fault == "cut":
                self.send(200, completion(None, "length"))
            else:
                self.send(200, completion(brain(content[-1]["text"], images, body)))

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def greys(*levels: float, size: int = 4) -> Tensor:
    """Plain images, one for each level in [0, 1]: (N, 3, size, size) on the 8-bit grid."""
    return torch.tensor(levels).mul(255).round().div(255).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
