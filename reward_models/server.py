"""A reward behind HTTP, for machines, environments and processes that the trainer should not share.

    POST /score     {"reward": NAME, "id": ID, "items": [{"image": PNG, "prompt": ..., "metadata": {}, "group": 0}]}
    GET  /health    which rewards are here, with their specs and the limits of a request
    GET  /metrics   counters in Prometheus' text form

`image` is a PNG of 8-bit RGB in base64. The answer holds values, parts and reasons of all items in their order; an item
that cannot be scored is null with a reason, and the others are scored. What may arrive is limited before it costs
anything: the token first, then the length that the request announces, then the size in each PNG's header, and only
then is a pixel unpacked. A request repeated under the same id (and with the same bytes) while the first is worked on,
or soon after, gets the same answer: nothing is scored twice because an answer was lost.

fastapi and uvicorn are needed by this module alone: ``pip install flowrl[serve]``. It has no postponed annotations,
because fastapi reads them when the application is made.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from . import wire
from .protocol import Reward
from .service import Limits, Refusal, Service

try:
    import h11
    import uvicorn
    from fastapi import Depends, FastAPI, Request, Response
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ValueError(
        f"got no module {error.name!r}, expected the packages of the reward server. pip install 'flowrl[serve]'"
    ) from error

SHORTEST_TOKEN = 16
HEAD_S = 15.0  # for the head of a request, which comes before the token can be asked for


def create_app(
    rewards: Mapping[str, Reward],
    *,
    token: str | None = None,
    limits: Limits | None = None,
    batch: int = 32,
    wait_s: float = 0.005,
) -> FastAPI:
    """The ASGI application that serves rewards.

    Args:
        rewards: name -> reward; each is called from a thread of its own, one call at a time.
        token: asked for as ``Authorization: Bearer TOKEN`` at every address; None asks for nothing.
        limits: see `Limits`.
        batch: images of a call that several requests share; 1 calls the reward exactly as its clients do.
        wait_s: how long the first request of a batch waits for others.

    Raises:
        ValueError: no reward, a batch below 1, or a token that can be guessed.
    """
    if not rewards or batch < 1:
        raise ValueError(f"got {len(rewards)} rewards and batch {batch}, expected at least one of each. Name a reward.")
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii()):
        raise ValueError(
            f"got a token of {len(token)} characters, expected at least {SHORTEST_TOKEN} ASCII ones. Make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    service = Service(rewards, limits or Limits(), batch, wait_s)
    expected = None if token is None else f"Bearer {token}".encode()

    async def authorised(request: Request) -> None:  # no thread is spent on strangers
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if expected is not None and not hmac.compare_digest(given, expected):
            raise Refusal(401, "got no valid token, expected the header Authorization: Bearer TOKEN")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        lifespan=lifespan, dependencies=[Depends(authorised)], docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.service = service

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        headers = {"connection": "close"}  # its body may not have been read
        if refusal.retry_s is not None:
            headers["retry-after"] = str(max(1, round(refusal.retry_s)))
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(wire.to_json({"error": refusal.message}), refusal.status, headers, "application/json")

    @app.post("/score")
    async def score(request: Request) -> Response:
        try:
            answer = await service.score(request.headers, request.stream())
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        return Response(answer, 200, {wire.DIGEST: wire.digest(answer)}, "application/json")

    @app.get("/health")
    async def health() -> Response:
        return Response(wire.to_json(service.health()), media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics(), media_type="text/plain; version=0.0.4")

    return app


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A bound socket; port 0 takes any free one.

    Raises:
        ValueError: others can reach it and there is no token, or the address is taken or not of this machine.
    """
    if not is_loopback(host) and token is None:
        raise ValueError(
            f"got host {host} without a token, expected one, because other machines can reach it. Set a token "
            "(--token-env VARIABLE), or serve on 127.0.0.1."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise ValueError(f"got address {host}:{port}, expected a free one of this machine ({error}).") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Impatient(H11Protocol):
    """HTTP that hangs up where a request's head does not come, so that strangers cannot use up all connections."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def _watch(self, last: tuple[bool, Any] | None = None) -> None:
        found = self.conn.their_state is h11.IDLE, self.cycle  # waits for a head; the request before
        if found[0] and found == last:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(HEAD_S, self._watch, found)


def _server(app: Any, limits: Limits) -> uvicorn.Server:
    config = uvicorn.Config(
        app, http=_Impatient, ws="none", log_level="warning", access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=round(limits.timeout_s) + 1,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(
    rewards: Mapping[str, Reward],
    *,
    host: str = "127.0.0.1",
    port: int = 8400,
    token: str | None = None,
    limits: Limits | None = None,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve until a signal ends it; what is being scored then is still answered.

    Args:
        rewards, token, limits, options: see `create_app`.
        host: an address of this machine; one that others can reach needs a token.
        port: 0 takes any free one.
        ready: told the URL before the first request can arrive.

    Raises:
        ValueError: see `create_app` and `listen`.
    """
    app = create_app(rewards, token=token, limits=limits, **options)
    bound = listen(host, port, token)
    if ready is not None:
        ready(url_of(bound))
    _server(app, limits or Limits()).run(sockets=[bound])


@contextlib.contextmanager
def running(
    rewards: Mapping[str, Reward],
    *,
    token: str | None = None,
    limits: Limits | None = None,
    wrap: Callable[[Any], Any] = lambda app: app,
    **options: Any,
) -> Iterator[str]:
    """Serve in a thread of this process, on a free loopback port, for notebooks and tests; yields the URL.

    Args:
        rewards, token, limits, options: see `create_app`.
        wrap: puts ASGI middleware around the application.
    """
    app = create_app(rewards, token=token, limits=limits, **options)
    bound = listen("127.0.0.1", 0, token)
    server = _server(wrap(app), limits or Limits())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
