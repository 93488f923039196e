"""Checks that a service behaves on a node: it is charged for certain, typed when wrong, and ends.

The service runs on a real node of a devnet inside this process, and a real client pays it; so what
the node refuses at registration is refused here, in the node's own words.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

import grpc.aio
from google.protobuf.message import Message

from btt.sdk.client import Client
from btt.sdk.clock import SYSTEM
from btt.sdk.errors import BttError, ConfigError, QuotaFull
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.payment.options import method_charge
from btt.sdk.plugin import Quota, ServiceContext, ServicePlugin
from btt.sdk.service import stub_methods
from btt.sdk.testing.devnet import Devnet

STOP_S: Final = 10.0
"""Seconds that a service may take to stop."""
CALL_S: Final = 30.0
"""Seconds that a call may take here."""
_BUDGET: Final = "100 BTT"
_UNKNOWN: Final = "no-such-key"

Stub = Callable[[grpc.aio.Channel], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is tried with a service (entry point `btt.conformance`).

    Attributes:
        plugin: The class of the service.
        stubs: Generated stub classes of its proto services.
        requests: For each metered method, by its name, requests that it answers, and that cost
            something; a method that takes one is called with the first.
        config: Its section of the configuration.
        quota: What it may keep, such as "1 MiB"; for a service that reserves.
    """

    plugin: type[ServicePlugin]
    stubs: Sequence[Stub]
    requests: Mapping[str, Sequence[Message]]
    config: Mapping[str, Any] = field(default_factory=dict)
    quota: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came out of one check.

    Attributes:
        check: Its name.
        text: What is wrong, for its author; empty if the service behaves.
    """

    check: str
    text: str = ""

    @property
    def ok(self) -> bool:
        """Whether the service behaves."""
        return not self.text


@dataclass(slots=True)
class _Life:
    """How the instance on the node fared."""

    start: str = ""
    stop: str = ""
    left: str = ""
    quota: _Shuttable | None = None


async def run(case: Case) -> list[Finding]:
    """Tries a service; never raises for what the service does.

    Args:
        case: What to try.

    Returns:
        A finding for each check, in the order they were made; a service that does not start ends it.
    """
    found = [_check_config(case)]
    life = _Life()
    name = case.plugin.name
    try:
        net = Devnet(
            in_process=True,
            services={name: {**case.config, "quota": case.quota}},
            plugins={name: cast("type[ServicePlugin]", _watched(case.plugin, life))},
        )
        async with net:
            found.append(Finding("registered", life.start))
            if life.start:
                return found
            found += await _check_calls(case, net)
            found.append(await _check_quota(case, net, life))
    except ConfigError as error:
        found.append(Finding("registered", str(error)))
        return found
    found.append(Finding("stops", life.stop))
    found.append(Finding("leaves no task", f"Still running after stop: {life.left}." if life.left else ""))
    return found


def _watched(plugin: type[ServicePlugin], life: _Life) -> Callable[[ServiceContext], ServicePlugin]:
    """Makes the plugin's instances tell how they stopped, and never hold the node up."""

    def make(context: ServiceContext) -> ServicePlugin:
        life.quota = _Shuttable(context.quota)
        made = plugin(replace(context, quota=life.quota))
        start, stop = made.start, made.stop

        async def started() -> None:
            try:
                await start()
            except ConfigError:
                raise
            except Exception as error:
                life.start = f"start() failed: {error!r}."
                raise

        async def timed() -> None:
            try:
                async with asyncio.timeout(STOP_S):
                    await stop()
            except TimeoutError:
                life.stop = f"stop() took more than {STOP_S:.0f} s."
            except Exception as error:  # noqa: BLE001 - a third party's code; it is reported
                life.stop = f"stop() failed: {error!r}."

            # The node cancels them now; on another day they would have gone on.
            left = {task.get_name() for task in context.tasks.alive if task is not asyncio.current_task()}
            life.left = ", ".join(sorted(left))

        made.start = started  # type: ignore[method-assign]
        made.stop = timed  # type: ignore[method-assign]
        return made

    return make


def _check_config(case: Case) -> Finding:
    wrong: list[tuple[str, Mapping[str, Any]]] = [(_UNKNOWN, {**case.config, _UNKNOWN: 1})]
    wrong += [(key, {**case.config, key: [object()]}) for key in case.config]
    with tempfile.TemporaryDirectory() as folder:
        for key, config in wrong:
            idle = _Idle()
            context = ServiceContext(
                data_dir=Path(folder), config=config, log=_Quiet(), clock=SYSTEM,
                tasks=idle, limiter=idle, metrics=idle, quota=_Full(), meter=idle,
            )  # fmt: skip
            try:
                case.plugin(context)
            except ConfigError:
                continue
            except Exception as error:  # noqa: BLE001 - a third party's code; it is reported
                return Finding("typed configuration errors", f"{key}: {error!r}, not a ConfigError.")
            return Finding("typed configuration errors", f"A wrong {key} was accepted.")
    return Finding("typed configuration errors")


class _Idle:
    """Tasks, limiter, metrics and meter of a service that is never started."""

    alive: Sequence[asyncio.Task[Any]] = ()

    def create(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        work.close()
        raise ConfigError(f"{name} begins before the service is started.")

    async def send(self, amount: int, *, flow: str = "") -> None:
        pass

    receive = send

    def count(self, name: str, amount: float = 1) -> None:
        pass

    def gauge(self, name: str, value: float) -> None:
        pass

    def call(self) -> None:
        return None


class _Full:
    """A quota in which nothing is left."""

    limit = 0

    async def used(self) -> int:
        return 0

    async def reserve(self, name: str, amount: int) -> None:
        raise QuotaFull(f"Nothing is left for the {amount} bytes of {name}.")

    async def release(self, name: str) -> bool:
        return False

    async def reservations(self) -> Mapping[str, int]:
        return {}


class _Shuttable:
    """The quota of the node, until it is shut: then nothing is left of it."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self.is_shut = self.was_asked = False

    @property
    def limit(self) -> int:
        return 0 if self.is_shut else self._quota.limit

    async def used(self) -> int:
        return await self._quota.used()

    async def reserve(self, name: str, amount: int) -> None:
        self.was_asked = True
        await (_Full() if self.is_shut else self._quota).reserve(name, amount)

    async def release(self, name: str) -> bool:
        return await self._quota.release(name)

    async def reservations(self) -> Mapping[str, int]:
        return await self._quota.reservations()


class _Quiet:
    """A log that nobody reads."""

    def _write(self, event: str, /, **fields: Any) -> None:
        logging.getLogger(__name__).debug("%s %s", event, fields)

    debug = info = warning = error = _write


def _metered(case: Case) -> list[tuple[Stub, str, MethodCharge]]:
    methods = [(stub, path, method_charge(path)) for stub in case.stubs for path in stub_methods(stub)]
    return [(stub, path, charge) for stub, path, charge in methods if not charge.free]


async def _check_quota(case: Case, net: Devnet, life: _Life) -> Finding:
    """When its operator's cap is reached, callers are told that, or served, and pay for no failure."""
    check = "a full quota is told"
    if life.quota is None or not life.quota.was_asked:
        return Finding(check)
    life.quota.is_shut = True
    wrong = [text for one in _metered(case) if (text := await _full(case, net, *one))]
    life.quota.is_shut = False
    return Finding(check, " ".join(wrong))


async def _full(case: Case, net: Devnet, stub: Stub, path: str, charge: MethodCharge) -> str:
    client = await net.client(_BUDGET)
    try:
        async with asyncio.timeout(CALL_S), client:
            await _read(client, case, stub, path, charge, None)
    except QuotaFull:
        return ""
    except (BttError, TimeoutError) as error:
        return f"{path}: {error!r}, not QuotaFull, when nothing is left of its quota."
    return ""


async def _check_calls(case: Case, net: Devnet) -> list[Finding]:
    metered = _metered(case)
    missing = [path for _, path, _ in metered if not case.requests.get(path.rpartition("/")[2])]
    if missing:
        return [Finding("every method is tried", f"There is no request for {', '.join(missing)}.")]
    found = [Finding("every method is tried")]
    for check, one in (
        ("refused without payment", _unpaid),
        ("paid as counted", _paid),
        ("books agree after a cancelled call", _cancelled),
    ):
        wrong = [text for stub, path, charge in metered if (text := await one(case, net, stub, path, charge))]
        found.append(Finding(check, " ".join(wrong)))
    return found


async def _unpaid(case: Case, net: Devnet, stub: Stub, path: str, charge: MethodCharge) -> str:
    async with await net.client(_BUDGET) as btt:
        channel = (await btt.node()).channel(label="free")
        try:
            async with asyncio.timeout(CALL_S):
                async for _ in _call(stub(channel), case, path, charge):
                    return f"{path} answers who does not pay."
        except grpc.aio.AioRpcError:
            return ""  # whatever it is told, nothing came
        finally:
            await channel.close()
    return f"{path} ends well for who does not pay."


async def _paid(case: Case, net: Devnet, stub: Stub, path: str, charge: MethodCharge) -> str:
    return await _with_client(case, net, stub, path, charge, most=None)


async def _cancelled(case: Case, net: Devnet, stub: Stub, path: str, charge: MethodCharge) -> str:
    return await _with_client(case, net, stub, path, charge, most=1)


async def _with_client(
    case: Case, net: Devnet, stub: Stub, path: str, charge: MethodCharge, *, most: int | None
) -> str:
    client = await net.client(_BUDGET)
    try:
        async with asyncio.timeout(CALL_S), client:
            spent = await _read(client, case, stub, path, charge, most)
    except TimeoutError:
        return f"{path} took more than {CALL_S:.0f} s."
    except BttError as error:
        return f"{path}: {error}"
    [receipt] = client.receipts
    if not receipt.counts_agree or receipt.paid < receipt.owed:
        return f"{path}: the node counted {receipt.owed}, the client paid {receipt.paid} base units."
    if most is None and receipt.paid != spent:
        return f"{path}: cost {spent} by its messages, and {receipt.paid} was paid."
    if most is None and not spent:
        return f"{path}: its request costs nothing; try one that does."
    return ""


async def _read(
    client: Client, case: Case, stub: Stub, path: str, charge: MethodCharge, most: int | None
) -> int:
    service = client.service(stub, budget="1 BTT")
    async with service as made:
        with service.verdicts() as verdicts:
            count = 0
            async with aclosing(_call(made, case, path, charge)) as responses:
                async for message in responses:
                    if charge.verified:
                        verdicts.accept(message)
                    count += 1
                    if count == most:
                        break
    return int(service.spent)


async def _call(stub: Any, case: Case, path: str, charge: MethodCharge) -> AsyncGenerator[Any, None]:
    name = path.rpartition("/")[2]
    requests = case.requests[name]
    answer = getattr(stub, name)(iter(requests) if charge.streams_requests else requests[0])
    if hasattr(answer, "__aiter__"):
        async for message in answer:
            yield message
    else:
        yield await answer
