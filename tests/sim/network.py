"""A lossy network under the product's own gRPC stubs and handlers.

It takes the place of `grpc.aio` channels and servers, and nothing above them: the stubs hand it the
serialised bytes, the servers' own handlers and interceptors get the same bytes in the context of the
other process. One call's requests and answers stay in order, since the product pays over TCP; what
happens to them is what TCP lets happen:

- a unary call is lost on its way there or back (the caller hears of it by its timeout), arrives twice
  (a retry under another name; the second answer goes nowhere), late, and before an earlier one;
- a stream breaks: each side hears of it when it will, and what was under way is gone;
- a partition does both to every call between two parties, a death to every call of the dead.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any, Protocol

import grpc
import grpc.aio

from btt.sdk.errors import ConnectError
from sim.calls import Call, Channel
from sim.machine import Process, Room, running

_UNKNOWN = grpc.StatusCode.UNKNOWN


@dataclass
class Weather:
    """How likely things go wrong; seconds and shares of 1."""

    loss: float = 0.0
    duplicate: float = 0.0
    breaks: float = 0.0
    slow: float = 0.0


class Tap(Protocol):
    """Sees what leaves a process, when it leaves."""

    def asked(self, call: Call, data: bytes) -> None: ...

    def answered(self, call: Call, server: Process, data: bytes) -> None: ...

    def heard(self, call: Call, data: bytes) -> None: ...

    def failed(self, call: Call, server: Process, code: grpc.StatusCode, text: str) -> None: ...

    def trace(self, who: str, what: str) -> None: ...


class Network:
    """Everybody's lines.

    Args:
        room: Whose clock it runs on.
        random: Decides everything.
        tap: Sees everything.
    """

    def __init__(self, room: Room, random: Random, tap: Tap) -> None:
        self.room = room
        self.random = random
        self.tap = tap
        self.weather = Weather()
        self.servers: dict[str, Server] = {}
        self.calls: dict[Call, None] = {}
        self._cut: dict[frozenset[str], float] = {}
        self._context = contextvars.copy_context()

    def later(self, delay: float, do: Callable[..., Any], *args: Any) -> None:
        self.room.call_later(delay, do, *args, context=self._context)

    def delay(self) -> float:
        draw = self.random.random
        return draw() * 5.0 if draw() < self.weather.slow else 0.001 + draw() * 0.05

    def happens(self, share: float) -> bool:
        return share > 0 and self.random.random() < share

    def cut(self, a: str, b: str, seconds: float) -> None:
        """Parts two parties for a while."""
        self._cut[frozenset((a, b))] = self.room.time() + seconds
        for call in list(self.calls):
            if {call.client.name, call.party} == {a, b}:
                call.break_off()

    def heal(self) -> None:
        self._cut.clear()
        self.weather = Weather()

    def parted(self, a: str, b: str) -> bool:
        return self._cut.get(frozenset((a, b)), 0.0) > self.room.time()

    def died(self, process: Process) -> None:
        for endpoint in [e for e, s in self.servers.items() if s.process is process]:
            del self.servers[endpoint]
        for call in list(self.calls):
            if call.client is process or call.server is process:
                call.break_off()

    # What the product gets instead of grpc.aio and TLS

    def server(self, handlers: Sequence[Any] = (), interceptors: Sequence[Any] = (), **_: Any) -> Server:
        return Server(self, list(handlers), list(interceptors))

    def channel(
        self, host: str, port: int, certificate: bytes, name: str, *, interceptors: Any = (), **_: Any
    ) -> Channel:
        return Channel(self, f"{host}:{port}", certificate, list(interceptors))

    async def read_certificate(self, host: str, port: int, *, timeout: float = 5.0) -> bytes:
        client = running()
        client.boundary("before dial")
        await asyncio.sleep(self.delay())
        server = self.servers.get(f"{host}:{port}")
        if server is None or self.parted(client.name, server.process.name) or self.happens(self.weather.loss):
            await asyncio.sleep(timeout if server else 0)
            raise ConnectError(f"Nobody answers at {host}:{port}.")
        return server.certificate


class Abort(grpc.aio.AbortError):
    """What a handler's `abort` raises."""


class Context:
    """The part of a ServicerContext that handlers use."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.status: tuple[grpc.StatusCode, str, Any] = (_UNKNOWN, "", ())

    def peer(self) -> str:
        return f"ipv4:{self._call.address}:4000"

    def time_remaining(self) -> float | None:
        return None

    def code(self) -> int:
        return 0

    def set_trailing_metadata(self, trailing: Any) -> None:
        pass

    def trailing_metadata(self) -> Any:
        return self.status[2]

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing: Any = ()) -> None:
        self.status = (code, details, trailing)
        raise Abort(details)


class Server:
    """As `grpc.aio.Server`; it runs in the process that made it."""

    def __init__(self, network: Network, handlers: list[Any], interceptors: list[Any]) -> None:
        self.process = running()
        self.certificate = b""
        self._network = network
        self._handlers = handlers
        self._interceptors = interceptors
        self._endpoint = ""

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        pass  # generated code registers its methods both ways

    def add_secure_port(self, endpoint: str, certificate: bytes) -> int:
        self._endpoint, self.certificate = endpoint, certificate
        return int(endpoint.rpartition(":")[2])

    async def start(self) -> None:
        self._network.servers[self._endpoint] = self

    async def stop(self, grace: float | None) -> None:
        self._network.servers.pop(self._endpoint, None)
        mine = [call for call in self._network.calls if call.server is self.process]
        if mine and grace:
            await asyncio.sleep(grace)
        for call in mine:
            call.break_off()
        await asyncio.sleep(0.01)

    async def _handler(self, details: Any) -> Any:
        async def found(of: Any) -> Any:
            handlers = (h.service(of) for h in self._handlers)
            return next((h for h in handlers if h is not None), None)

        chain = found
        for interceptor in reversed(self._interceptors):
            chain = _intercepted(interceptor, chain)
        return await chain(details)

    async def serve(self, call: Call) -> None:
        """Runs a call's handler to its end; as a task of this server's process."""
        context = Context(call)
        status: tuple[grpc.StatusCode, str, Any] = (grpc.StatusCode.OK, "", ())
        try:
            details = SimpleNamespace(method=call.path, invocation_metadata=call.metadata)
            handler = await self._handler(details)
            if handler is None:
                status = (grpc.StatusCode.UNIMPLEMENTED, "no such method", ())
                return
            answer = handler.response_serializer or bytes
            if handler.request_streaming:
                results = handler.stream_stream(_requests(call, handler.request_deserializer), context)
            else:
                request = handler.request_deserializer(call.requests.popleft())
                if not handler.response_streaming:
                    call.answer(answer(await handler.unary_unary(request, context)))
                    return
                results = handler.unary_stream(request, context)
            try:
                async for message in results:
                    call.answer(answer(message))
                    await asyncio.sleep(0)
            finally:
                await results.aclose()
        except grpc.aio.AbortError:
            status = context.status
        except asyncio.CancelledError:
            status = (grpc.StatusCode.CANCELLED, "", ())
            raise
        except Exception as error:  # noqa: BLE001 - as gRPC does; the tap makes a failure of it
            status = (_UNKNOWN, f"defect: {error!r}", ())
        finally:
            if self.process.alive:
                call.end(status)


def _intercepted(interceptor: Any, inner: Any) -> Any:
    async def chain(details: Any) -> Any:
        return await interceptor.intercept_service(inner, details)

    return chain


async def _requests(call: Call, read: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    while (data := await call.next_request()) is not None:
        yield read(data)
