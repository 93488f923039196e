"""The client for programs without an event loop: the same surface, every call waits.

    with SyncClient.connect(budget=Budget("5 BTT")) as btt:
        quote = btt.content.quote(infohash)
        with btt.content.fetch(quote, "downloads") as transfer:
            for step in transfer.progress():
                print(step.done_bytes, step.spent)

All work is done by `Client` in a private thread; here is only waiting. A test compares both surfaces.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from btt.sdk.background import Background, stepwise
from btt.sdk.client import Client, Wallet
from btt.sdk.errors import BttError, ConfigError
from btt.sdk.money import Amount, Rate, Unit
from btt.sdk.payment.options import method_charge
from btt.sdk.selection import DEFAULT_POLICIES, Policy

if TYPE_CHECKING:
    from btt.sdk.budget import Budget
    from btt.sdk.content.client import ContentClient, Quote
    from btt.sdk.content.resuming import ResumeToken
    from btt.sdk.content.stream import ContentStream
    from btt.sdk.content.torrent import Torrent
    from btt.sdk.content.transfer import Part, Progress, Transfer, TransferReceipt
    from btt.sdk.identity import NodeAddress
    from btt.sdk.payment.apps import Granter
    from btt.sdk.payment.estimates import Estimate
    from btt.sdk.payment.grants import Grant
    from btt.sdk.payment.receipt import SessionReceipt
    from btt.sdk.payment.verdicts import Verdicts
    from btt.sdk.service import Service

StubT = TypeVar("StubT")


class SyncClient:
    """As `Client`; made by `connect`, used with `with`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._background: Background | None = None
        self._stack = ExitStack()
        self.content = SyncContent(self, client.content)

    @classmethod
    def connect(
        cls,
        nodes: str | Sequence[str] | None = None,
        *,
        budget: Budget | None = None,
        ledger: str | None = None,
        wallet: Wallet | Path | None = None,
        grant: Grant | Path | str | None = None,
        trust_new: bool = False,
        keep_channels: bool | None = None,
        clock: Callable[[], int] | None = None,
        app: Granter | None = None,
    ) -> SyncClient:
        """As `Client.connect`."""
        return cls(
            Client.connect(
                nodes,
                budget=budget,
                ledger=ledger,
                wallet=wallet,
                grant=grant,
                trust_new=trust_new,
                keep_channels=keep_channels,
                clock=clock,
                app=app,
            )
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._background = Background()
            stack.callback(self._background.close)
            stack.enter_context(self._background.entered(self._client))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self._background = None

    @property
    def background(self) -> Background:
        """Where the work is done.

        Raises:
            ConfigError: The client is not open.
        """
        if self._background is None:
            raise ConfigError("The client is not open.", hint="Use it inside `with`.")
        return self._background

    @property
    def receipts(self) -> list[SessionReceipt]:
        """As `Client.receipts`."""
        return self._client.receipts

    @property
    def unsettled(self) -> dict[NodeAddress, BttError]:
        """As `Client.unsettled`."""
        return self._client.unsettled

    @property
    def ledger_id(self) -> bytes:
        """As `Client.ledger_id`."""
        return self._client.ledger_id

    def close_session(self) -> SessionReceipt | None:
        """As `Client.close_session`."""
        return self.background.run(self._client.close_session())

    def service(
        self,
        stub: Callable[[grpc.Channel], StubT],
        *,
        budget: Amount | str,
        per_call: Amount | str | None = None,
    ) -> SyncService[StubT]:
        """As `Client.service`; the stub's methods wait, and give an iterator of many responses."""
        made = cast("Callable[[grpc.aio.Channel], StubT]", stub)
        return SyncService(self, self._client.service(made, budget=budget, per_call=per_call))


class SyncContent:
    """As `Client.content`."""

    def __init__(self, client: SyncClient, content: ContentClient) -> None:
        self._client = client
        self._content = content

    def quote(self, content: str | bytes, *, policies: Sequence[Policy] = DEFAULT_POLICIES) -> Quote:
        """As `ContentClient.quote`."""
        return self._client.background.run(self._content.quote(content, policies=policies))

    @contextmanager
    def fetch(
        self,
        content: str | bytes | Quote,
        dest: Path | str,
        *,
        max_rate: Rate | None = None,
        first: Sequence[str] = (),
    ) -> Iterator[SyncTransfer]:
        """As `ContentClient.fetch`."""
        background = self._client.background
        fetching = self._content.fetch(content, dest, max_rate=max_rate, first=first)
        with background.entered(fetching) as transfer:
            yield SyncTransfer(background, transfer)

    @contextmanager
    def resume(self, token: str | ResumeToken, dest: Path | str) -> Iterator[SyncTransfer]:
        """As `ContentClient.resume`."""
        background = self._client.background
        with background.entered(self._content.resume(token, dest)) as transfer:
            yield SyncTransfer(background, transfer)

    @contextmanager
    def open_stream(
        self,
        content: str | bytes | Quote,
        dest: Path | str,
        *,
        path: str | None = None,
        max_rate: Rate | None = None,
    ) -> Iterator[SyncContentStream]:
        """As `ContentClient.open_stream`."""
        background = self._client.background
        opening = self._content.open_stream(content, dest, path=path, max_rate=max_rate)
        with background.entered(opening) as stream:
            yield SyncContentStream(background, stream)


class SyncContentStream:
    """As `ContentStream`."""

    def __init__(self, background: Background, stream: ContentStream) -> None:
        self._background = background
        self._stream = stream

    @property
    def size(self) -> int:
        """As `ContentStream.size`."""
        return self._stream.size

    def tell(self) -> int:
        """As `ContentStream.tell`."""
        return self._stream.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As `ContentStream.seek`."""
        return self._stream.seek(offset, whence)

    def read(self, count: int = -1) -> bytes:
        """As `ContentStream.read`."""
        return self._background.run(self._stream.read(count))

    def close(self) -> None:
        """As `ContentStream.close`."""
        self._background.run(self._stream.close())


class SyncTransfer:
    """As `Transfer`."""

    def __init__(self, background: Background, transfer: Transfer) -> None:
        self._background = background
        self._transfer = transfer

    @property
    def torrent(self) -> Torrent:
        """As `Transfer.torrent`."""
        return self._transfer.torrent

    @property
    def token(self) -> ResumeToken:
        """As `Transfer.token`."""
        return self._transfer.token

    @property
    def receipt(self) -> TransferReceipt | None:
        """As `Transfer.receipt`."""
        return self._transfer.receipt

    def progress(self, interval_s: float = 0.2) -> Iterator[Progress]:
        """As `Transfer.progress`."""
        return self._background.iterate(self._transfer.progress(interval_s))

    def state(self) -> Progress:
        """As `Transfer.state`."""
        return self._background.call(self._transfer.state)

    def parts(self) -> tuple[Part, ...]:
        """As `Transfer.parts`."""
        return self._background.call(self._transfer.parts)

    def ended(self) -> None:
        """As `Transfer.ended`."""
        self._background.run(self._transfer.ended())


class SyncService(Generic[StubT]):
    """As `Service`."""

    def __init__(self, client: SyncClient, service: Service[StubT]) -> None:
        self._client = client
        self._service = service
        self._entered: AbstractContextManager[StubT] | None = None

    @property
    def name(self) -> str:
        """As `Service.name`."""
        return self._service.name

    @property
    def spent(self) -> Amount:
        """As `Service.spent`."""
        return self._service.spent

    def rates(self) -> dict[Unit, Rate]:
        """As `Service.rates`."""
        return self._client.background.run(self._service.rates())

    def estimate(self, units: Mapping[Unit, int]) -> Amount:
        """As `Service.estimate`."""
        return self._client.background.run(self._service.estimate(units))

    def estimate_call(self, method: str, *requests: Message) -> Estimate:
        """As `Service.estimate_call`."""
        return self._client.background.run(self._service.estimate_call(method, *requests))

    @contextmanager
    def verdicts(self) -> Iterator[SyncVerdicts]:
        """As `Service.verdicts`."""
        verdicts, background = self._service.verdicts(), self._client.background
        with verdicts.entered():
            try:
                yield SyncVerdicts(background, verdicts)
            finally:
                background.call(verdicts.finish)

    def __enter__(self) -> StubT:
        background = self._client.background
        self._entered = background.entered(self._service)
        return cast(StubT, _Waiting(background, self._entered.__enter__(), self._service.name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._entered is not None, "entered before it is left"
        return self._entered.__exit__(kind, error, trace)


class SyncVerdicts:
    """As `Verdicts`."""

    def __init__(self, background: Background, verdicts: Verdicts) -> None:
        self._background = background
        self._verdicts = verdicts

    def accept(self, message: Any) -> None:
        """As `Verdicts.accept`."""
        self._background.call(lambda: self._verdicts.accept(message))

    def reject(self, message: Any) -> None:
        """As `Verdicts.reject`."""
        self._background.call(lambda: self._verdicts.reject(message))


class _Waiting:
    """A stub whose methods wait."""

    def __init__(self, background: Background, stub: Any, service: str) -> None:
        self._background = background
        self._stub = stub
        self._service = service

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)
        streams_requests = method_charge(f"/{self._service}/{name}").streams_requests

        def call(request: Any, **options: Any) -> Any:
            answer = method(stepwise(request) if streams_requests else request, **options)
            if inspect.isawaitable(answer):
                return self._background.run(cast(Any, answer))
            return self._background.iterate(answer)

        return call
