"""What a service of a node is: the contract between the node runtime and those who write services.

A service is a class named by an entry point of the group `btt.services`; built-in services
register in the same way as those of third parties. It gets a folder, its section of the
configuration, a log, a clock, metrics, the node's limiter, a quota of what it may keep, a view of
what the meter has counted and a group for its tasks, and never a key: payment is done by the
node's interceptors, which read from the proto what a method costs.
A service that fails is isolated: its methods answer ServiceUnavailable, the node goes on, and the
service is made and started again after a while.

    class EchoPlugin:
        name = "echo"

        def __init__(self, context: ServiceContext) -> None:
            check_keys(context.config, known=("rate",))
            self._rate = read_rate(context.config, "rate", default="0.001 BTT / call", unit=Unit.CALL)

        async def start(self) -> None: ...

        def register(self, server: grpc.aio.Server) -> None:
            add_EchoServiceServicer_to_server(EchoServicer(), server)

        def prices(self) -> Mapping[Line, Price]:
            return {Line("acme.echo.v1.EchoService", Unit.CALL): Price(self._rate, verify_units=1)}

        async def stop(self) -> None: ...
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from btt.sdk.channel.prices import Line, Price
from btt.sdk.errors import ConfigError
from btt.sdk.money import Rate, Unit

if TYPE_CHECKING:
    import asyncio

    import grpc.aio

    from btt.sdk.keys import Address

__all__ = [
    "Limiter",
    "Line",
    "Log",
    "Meter",
    "Metrics",
    "PaidCall",
    "Price",
    "Quota",
    "Rate",
    "Reloadable",
    "ServiceContext",
    "ServicePlugin",
    "Tasks",
    "Unit",
    "check_keys",
    "did_you_mean",
    "read_rate",
]


class Log(Protocol):
    """Where a service writes what an operator should see; keyword arguments become fields."""

    def debug(self, event: str, /, **fields: Any) -> Any:
        """For whoever looks for a fault."""

    def info(self, event: str, /, **fields: Any) -> Any:
        """What happens in good order."""

    def warning(self, event: str, /, **fields: Any) -> Any:
        """What the operator should look at."""

    def error(self, event: str, /, **fields: Any) -> Any:
        """What the operator must look at."""


class Limiter(Protocol):
    """The node's limits on bytes a second, for traffic that is not gRPC.

    The messages of gRPC methods pass it by themselves.
    """

    async def send(self, amount: int, *, flow: str = "") -> None:
        """Returns when bytes may leave.

        Args:
            amount: Bytes.
            flow: For whom, such as the address of a peer; flows share fairly.
        """

    async def receive(self, amount: int, *, flow: str = "") -> None:
        """Returns when bytes may be taken; arguments as `send`."""


class Metrics(Protocol):
    """What an operator may watch; names are lower_case, with their unit at the end."""

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a counter, such as `proofs_total`."""

    def gauge(self, name: str, value: float) -> None:
        """Sets a gauge, such as `used_bytes`."""


class Quota(Protocol):
    """What a service may keep on the operator's machine: `quota` of its section, nothing if that is missing.

    Reservations survive a crash. Reserve before keeping anything; when the service starts, compare
    `reservations` with what its folder holds.
    """

    @property
    def limit(self) -> int:
        """Most that may be reserved, bytes; the operator may change it while the service runs."""

    async def used(self) -> int:
        """Returns the bytes that are reserved; above `limit` if the operator has lowered that since."""

    async def reserve(self, name: str, amount: int) -> None:
        """Sets bytes aside under a name; what the name had before is replaced, so repeating is harmless.

        Args:
            name: Of what is kept, at most 200 characters.
            amount: Bytes, at least one.

        Raises:
            QuotaFull: That is more than is left; a caller may be told so as it is.
            StorageError: The disk failed. In either case nothing has changed.
        """

    async def release(self, name: str) -> bool:
        """Gives back what a name has, once it is no longer kept; says whether it had anything."""

    async def reservations(self) -> Mapping[str, int]:
        """Returns the bytes of each name."""


class PaidCall(Protocol):
    """A paid call that runs, as the node's meter sees it; counting and being paid is not the service's."""

    @property
    def payer(self) -> Address:
        """The account that pays: whoever holds it made this call."""

    @property
    def app(self) -> Address | None:
        """The application it is for; None without one."""

    @property
    def units(self) -> Mapping[Unit, int]:
        """What the call has been charged so far; what was taken back is not in it.

        Where all of a call's first exchange is held in advance, that is the largest it may cost.
        """

    @property
    def paid(self) -> int:
        """What this payer has ever paid here, base units."""

    def acknowledge(self) -> None:
        """Says that all requests of a stream taken so far are done with, such as on disk.

        They are payable from now on, also if the handler refuses a later one; only a handler that
        fails makes all of its call free. Asking for the next request says the same.
        """


class Meter(Protocol):
    """What the node has counted."""

    def call(self) -> PaidCall | None:
        """Returns the call in whose handler, or in a task begun there, this runs; None in a free one."""


class Tasks(Protocol):
    """The tasks of one service; what is left of them when it stops is cancelled."""

    def create(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Begins work in the background; if it fails, the service has failed.

        Args:
            work: What to do.
            name: For the log.
        """

    @property
    def alive(self) -> Sequence[asyncio.Task[Any]]:
        """All tasks of the service that have not ended, also those that it made without this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceContext:
    """What a node gives to one service.

    Attributes:
        data_dir: A folder for the service alone; it exists.
        config: The service's section of the configuration, without `enabled`. The service
            checks it. Values from the environment are text.
        log: Where to write what the operator should see.
        clock: Unix milliseconds.
        tasks: Work in the background.
        limiter: Bytes a second, for traffic that is not gRPC.
        metrics: What an operator may watch.
        quota: What the service may keep.
        meter: What calls have been charged.
    """

    data_dir: Path
    config: Mapping[str, Any]
    log: Log
    clock: Callable[[], int]
    tasks: Tasks
    limiter: Limiter
    metrics: Metrics
    quota: Quota
    meter: Meter


class ServicePlugin(Protocol):
    """A service of a node. The runtime calls the methods in the order in which they stand here."""

    name: ClassVar[str]
    """The name of its entry point and of its section of the configuration: `[services.<name>]`."""

    def __init__(self, context: ServiceContext) -> None:
        """Checks the configuration.

        Raises:
            ConfigError: Naming the key and what to write there.
        """

    async def start(self) -> None:
        """Opens what the service needs.

        If it fails it is tried again after a while, with a new object; a ConfigError keeps the
        node from starting.
        """

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the gRPC services, with the generated `add_...Servicer_to_server` functions.

        The node refuses a method that does not say how it is charged, and one that writes its
        responses instead of yielding them. Only these functions may be used on `server`.
        Handlers are `async def`; what one is given of a stream of charged requests is
        acknowledged, and so payable, when it asks for the next, yields or returns: it asks
        when it is done with the last. What it refuses is free.
        """

    def prices(self) -> Mapping[Line, Price]:
        """Returns the price of each line that the methods charge; called again after a reload."""

    async def stop(self) -> None:
        """Closes everything, within seconds; called also after `start` failed half-way."""


@runtime_checkable
class Reloadable(Protocol):
    """A service that takes a changed configuration while it runs; others need a restart for that."""

    def reload(self, config: Mapping[str, Any]) -> None:
        """Takes a changed configuration whole, or raises and changes nothing.

        Args:
            config: As in ServiceContext.

        Raises:
            ConfigError: Naming the key and what to write there.
        """


def check_keys(config: Mapping[str, Any], *, known: Collection[str]) -> None:
    """Refuses a configuration with a key that nobody knows.

    Args:
        config: As in ServiceContext.
        known: The keys the service understands.

    Raises:
        ConfigError: Naming the key, and the one that was probably meant.
    """
    for key in config:
        if key not in known:
            raise ConfigError(f'There is no key "{key}".', hint=did_you_mean(key, known))


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Returns a sentence that names the closest known word, or all of them."""
    close = difflib.get_close_matches(word, list(known), n=1)
    if close:
        return f'Did you mean "{close[0]}"?'
    return f"Known are: {', '.join(sorted(known))}." if known else "It takes no keys."


def read_rate(config: Mapping[str, Any], key: str, *, default: str, unit: Unit) -> Rate:
    """Reads a price such as "1 BTT / GiB" from a configuration.

    Args:
        config: As in ServiceContext.
        key: Where the price stands.
        default: The price if it does not.
        unit: What the service counts.

    Raises:
        ConfigError: It is no price, or is per another unit.
    """
    text = config.get(key, default)
    hint = f'Write it like {key} = "{default}".'
    if not isinstance(text, str):
        raise ConfigError(f"{key} is not a price.", hint=hint)
    try:
        rate = Rate.parse(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}.", hint=hint) from None
    if rate.unit is not unit:
        raise ConfigError(f'{key}: "{text}" is per the wrong unit.', hint=hint)
    return rate
