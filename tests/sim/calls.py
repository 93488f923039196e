"""One call over the simulated network, and the channel that makes it: what stubs hold of `grpc.aio`.

What may happen to a call on its way is said in `network`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from sim.machine import Process, running

if TYPE_CHECKING:
    from sim.network import Network

SILENCE_S = 15.0
"""After so long without an answer the transport gives a call up."""


class Call:
    """One call: what its caller holds, the pipe between, and what its handler holds."""

    def __init__(
        self, network: Network, endpoint: str, path: str, *, read: Any, metadata: Any, timeout: float | None
    ) -> None:
        self.client = running()
        self.server: Process | None = None
        self.path = path
        self.metadata = tuple(metadata or ())
        self.requests: deque[bytes | None] = deque()
        self.twin = False
        self.party = endpoint
        self._network = network
        self._endpoint = endpoint
        self._read = read or bytes
        self._answers: deque[bytes] = deque()
        self._status: tuple[grpc.StatusCode, str, Any] | None = None
        self._broken = False
        self._cancelled = False
        self._woken: asyncio.Future[None] | None = None
        self._heard: asyncio.Future[None] | None = None
        self._callbacks: list[Callable[[Any], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._times = [0.0, 0.0]
        server = network.servers.get(endpoint)
        if server is not None:
            self.party = server.process.name
        network.calls[self] = None
        if timeout is not None:
            network.later(timeout, self._finish, (grpc.StatusCode.DEADLINE_EXCEEDED, "no answer", ()))

    @property
    def address(self) -> str:
        """Each party has a network of its own, by its number."""
        return f"10.0.{sum(self.client.name.encode()) % 256}.1"

    def _at(self, way: int) -> float:
        """Seconds until what is sent now arrives: in order with what was sent before."""
        now = self._network.room.time()
        self._times[way] = max(self._times[way] + 1e-6, now + self._network.delay())
        return self._times[way] - now

    def late(self, seconds: float) -> None:
        self._times[0] = self._network.room.time() + seconds

    # The caller's side

    def begin(self, request: bytes | None) -> None:
        network = self._network
        self.client.boundary(f"before {self.name}")
        if request is not None:
            network.tap.asked(self, request)
        lost = network.parted(self.client.name, self.party) or network.happens(network.weather.loss)
        network.tap.trace(self.client.name, f"{self.name} -> {self.party}{' lost' if lost else ''}")
        if lost:
            network.later(SILENCE_S, self._finish, (grpc.StatusCode.UNAVAILABLE, "silence", ()))
        else:
            network.later(self._at(0), self._arrive, request)
            if request is not None and network.happens(network.weather.duplicate):
                network.later(self._at(0) + network.delay(), self._arrive_again, request)
        self.client.boundary(f"after {self.name}")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def _arrive(self, request: bytes | None) -> None:
        if self._broken or self._status is not None:
            return
        server = self._network.servers.get(self._endpoint)
        if server is None:
            self._finish((grpc.StatusCode.UNAVAILABLE, "nobody listens", ()))
            return
        self.server = server.process
        if request is not None:
            self.requests.append(request)
        self._task = server.process.spawn(server.serve(self))

    def _arrive_again(self, request: bytes) -> None:
        if self._endpoint in self._network.servers and self.client.alive:
            self._network.tap.trace(self.client.name, f"{self.name} again")
            twin = Call.__new__(Call)
            twin.__dict__.update(self.__dict__)
            twin.requests, twin.twin = deque(), True
            twin._answers, twin._callbacks, twin._times = deque(), [], [0.0, 0.0]
            twin._woken = twin._heard = twin._status = twin._task = None
            self._network.calls[twin] = None
            twin._arrive(request)

    async def write(self, message: bytes) -> None:
        """Sends one more request of a stream."""
        if self._status is not None:
            raise asyncio.InvalidStateError("RPC already finished.")
        network = self._network
        self.client.boundary(f"before {self.name} message")
        network.tap.asked(self, message)
        if not self._broken and network.happens(network.weather.breaks):
            self.break_off()
        if not self._broken:
            network.later(self._at(0), self._deliver, message)
        self.client.boundary(f"after {self.name} message")
        await asyncio.sleep(0)

    def _deliver(self, message: bytes) -> None:
        if not self._broken:
            self.requests.append(message)
            _wake(self._heard)

    async def next_answer(self) -> bytes | None:
        """Waits for an answer; None at the end.

        Raises:
            AioRpcError: The call failed.
        """
        while True:
            if self._cancelled:
                raise asyncio.CancelledError
            if self._answers:
                return self._answers.popleft()
            if self._status is not None:
                code, text, trailing = self._status
                if code is grpc.StatusCode.OK:
                    return None
                empty = grpc.aio.Metadata()
                raise grpc.aio.AioRpcError(code, empty, grpc.aio.Metadata(*trailing), text)
            self._woken = self._network.room.create_future()
            try:
                await self._woken
            except asyncio.CancelledError:
                self.cancel()
                raise

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (data := await self.next_answer()) is not None:
            yield self._read(data)

    async def single(self) -> Any:
        data = await self.next_answer()
        assert data is not None, "an answer comes before its status"
        return self._read(data)

    def __await__(self) -> Any:
        return self.single().__await__()

    def cancel(self) -> bool:
        if self._status is not None:
            return False
        self._cancelled = True
        if self._task is not None:
            self._network.later(self._at(0), self._task.cancel)
        self._broken = True
        self._finish((grpc.StatusCode.CANCELLED, "Locally cancelled by application!", ()))
        return True

    async def code(self) -> grpc.StatusCode:
        assert self._status is not None, "nobody asks before the end"
        return self._status[0]

    async def details(self) -> str:
        return self._status[1] if self._status is not None else ""

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        assert self._status is not None, "nobody asks before the end"
        return grpc.aio.Metadata(*self._status[2])

    def cancelled(self) -> bool:
        return self._cancelled

    def done(self) -> bool:
        return self._status is not None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def _finish(self, status: tuple[grpc.StatusCode, str, Any]) -> None:
        if self._status is not None:
            return
        self._status = status
        self._network.calls.pop(self, None)
        if self._task is not None and status[0] is not grpc.StatusCode.OK:
            self._network.later(self._network.delay(), self._task.cancel)
        _wake(self._woken)
        if self.client.alive:
            for callback in self._callbacks:
                self._network.room.call_soon(callback, self, context=self.client.context.copy())

    # The handler's side

    async def next_request(self) -> bytes | None:
        while not self.requests:
            if self._status is not None:
                return None
            self._heard = self._network.room.create_future()
            await self._heard
        return self.requests.popleft()

    def answer(self, data: bytes) -> None:
        network, server = self._network, running()
        server.boundary(f"before answer {self.name}")
        network.tap.answered(self, server, data)
        lost = network.parted(self.client.name, self.party) or network.happens(network.weather.breaks)
        if lost:
            network.tap.trace(server.name, f"{self.name} answer lost")
            self.break_off()
        elif not self._broken:
            network.later(self._at(1), self._hear, data)
        server.boundary(f"after answer {self.name}")

    def _hear(self, data: bytes) -> None:
        if not self._broken and self._status is None and not self.twin:
            self._network.tap.heard(self, data)
            self._answers.append(data)
            _wake(self._woken)

    def end(self, status: tuple[grpc.StatusCode, str, Any]) -> None:
        if status[0] not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            assert self.server is not None
            self._network.tap.failed(self, self.server, status[0], status[1])
        self._task = None
        self._network.later(self._at(1), self._end, status)

    def _end(self, status: tuple[grpc.StatusCode, str, Any]) -> None:
        if not self._broken:
            self._finish(status)

    def break_off(self) -> None:
        """The line is dead from now on; each side hears of it when it will."""
        if self._broken:
            return
        self._broken = True
        gone = (grpc.StatusCode.UNAVAILABLE, "the connection broke", ())
        self._network.later(min(SILENCE_S, self._network.delay() * 20), self._finish, gone)
        if self._task is not None:
            self._network.later(min(SILENCE_S, self._network.delay() * 20), self._task.cancel)


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


class _Stream:
    """A call as a caller of a stub of streams sees it: objects in, objects out."""

    def __init__(self, call: Call, write: Any) -> None:
        self._call = call
        self._write = write
        self.cancel = call.cancel
        self.add_done_callback = call.add_done_callback

    async def write(self, message: Any) -> None:
        await self._call.write(self._write(message))

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._call.__aiter__()


class Channel:
    """As `grpc.aio.Channel`, to one endpoint."""

    def __init__(self, network: Network, endpoint: str, certificate: bytes, interceptors: list[Any]) -> None:
        self._network = network
        self._endpoint = endpoint
        self._interceptors = interceptors
        self._calls: list[Call] = []
        self._dialled = False

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> None:
        """Dials with the first call, whatever is asked."""

    async def close(self, grace: float | None = None) -> None:
        for call in self._calls:
            call.cancel()
        self._calls.clear()

    def _begin(self, path: str, read: Any, request: bytes | None, metadata: Any, timeout: Any) -> Call:
        call = Call(self._network, self._endpoint, path, read=read, metadata=metadata, timeout=timeout)
        if not self._dialled:  # TCP and TLS come first
            self._dialled = True
            call.late(2 * (self._network.delay() + self._network.delay()))
        self._calls = [kept for kept in self._calls if not kept.done()]
        self._calls.append(call)
        call.begin(request)
        return call

    def unary_unary(
        self, path: str, request_serializer: Any = bytes, response_deserializer: Any = bytes, **_: Any
    ) -> Any:
        def start(details: Any, request: Any) -> Call:
            return self._begin(
                path, response_deserializer, request_serializer(request), details.metadata, details.timeout
            )

        async def ask(request: Any, *, timeout: Any = None, metadata: Any = None, **_: Any) -> Any:
            details = grpc.aio.ClientCallDetails(path, timeout, metadata, None, None)
            for interceptor in self._interceptors:
                if isinstance(interceptor, grpc.aio.UnaryUnaryClientInterceptor):
                    return await interceptor.intercept_unary_unary(_awaitable(start), details, request)
            return await start(details, request)

        return ask

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def start(details: Any, request: Any) -> Call:
            return self._begin(
                path, response_deserializer, request_serializer(request), details.metadata, details.timeout
            )

        def ask(request: Any, *, timeout: Any = None, metadata: Any = None, **_: Any) -> Any:
            details = grpc.aio.ClientCallDetails(path, timeout, metadata, None, None)
            for interceptor in self._interceptors:
                if isinstance(interceptor, grpc.aio.UnaryStreamClientInterceptor):
                    return _Intercepted(interceptor, start, details, request)
            return start(details, request)

        return ask

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def ask(*, timeout: Any = None, metadata: Any = None, **_: Any) -> _Stream:
            call = self._begin(path, response_deserializer, None, metadata, timeout)
            return _Stream(call, request_serializer)

        return ask


def _awaitable(start: Callable[[Any, Any], Call]) -> Any:
    async def continuation(details: Any, request: Any) -> Call:
        return start(details, request)

    return continuation


class _Intercepted:
    """A call of a stream whose answers pass an interceptor."""

    def __init__(
        self, interceptor: Any, start: Callable[[Any, Any], Call], details: Any, request: Any
    ) -> None:
        self._interceptor = interceptor
        self._start = start
        self._details = details
        self._request = request
        self._call: Call | None = None

    async def _continue(self, details: Any, request: Any) -> Call:
        self._call = self._start(details, request)
        return self._call

    async def __aiter__(self) -> AsyncIterator[Any]:
        answers = await self._interceptor.intercept_unary_stream(self._continue, self._details, self._request)
        async for message in answers:
            yield message

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
