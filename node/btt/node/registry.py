"""Finds the services of a node, makes them, and refuses what cannot be charged or would be lost.

Built-in services come through entry points like those of third parties. Only what the operator
enabled is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, cast

import grpc
import grpc.aio
import structlog

from btt.node.admission import Limits
from btt.node.config import ServiceSection
from btt.node.payments.registrar import Registrar
from btt.sdk.channel import Line, Price, PriceSheet
from btt.sdk.errors import BttError, ConfigError
from btt.sdk.money import Amount, Unit
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.plugin import ServiceContext, ServicePlugin, did_you_mean
from btt.sdk.tls import MAX_MESSAGE

GROUP: Final = "btt.services"
_ENVELOPE: Final = 64 << 10  # room for what a message carries beside its charged bytes

Plugins = Mapping[str, "Callable[[], type[ServicePlugin]]"]
"""How to import the class of each service, by name."""


def installed() -> Plugins:
    """Returns the services that are installed; nothing is imported yet."""
    return {point.name: _importer(point) for point in entry_points(group=GROUP)}


def _importer(point: EntryPoint) -> Callable[[], type[ServicePlugin]]:
    def load() -> type[ServicePlugin]:
        return cast("type[ServicePlugin]", point.load())

    return load


class Collector:
    """Takes handlers where a gRPC server is expected, so that the server is made after its services."""

    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Keeps the handlers of one service."""
        self.handlers.append(grpc.method_handlers_generic_handler(service, handlers))

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Does nothing: what is served is what was registered by method, for only that was checked."""


class _Gate:
    """What a plugin gets as a server: it passes on services by method, and remembers their names."""

    def __init__(self, registrar: Registrar, taken: set[str]) -> None:
        self._registrar = registrar
        self._taken = taken
        self.services: list[str] = []
        self.generic: list[str | None] = []

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        if service in self._taken:
            raise ConfigError(f"{service} is served already.")
        self._registrar.add_registered_method_handlers(service, handlers)
        self._taken.add(service)
        self.services.append(service)

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        for handler in handlers:
            name = handler.service_name() if isinstance(handler, grpc.ServiceRpcHandler) else None
            self.generic.append(name)

    def check(self) -> None:
        for name in self.generic:
            if name not in self.services:
                raise ConfigError(f"{name or 'A handler'} was not registered by method, so it has no charge.")


class Registry:
    """The services of one node.

    Args:
        plugins: What is installed.
        sections: The services' part of the configuration.
        folder: Each service gets a folder of its name in it.
        clock: Unix milliseconds.

    Raises:
        ConfigError: A service is enabled that is not installed, or cannot be imported or made.
    """

    def __init__(
        self,
        plugins: Plugins,
        *,
        sections: Mapping[str, ServiceSection],
        folder: Path,
        clock: Callable[[], int],
    ) -> None:
        self._sections = sections
        self._plugins: dict[str, ServicePlugin] = {}
        self._started: list[str] = []
        self.services: list[str] = []
        self.limits: dict[str, Limits] = {}
        self.prices: dict[Line, Price] = {}
        for name, section in sections.items():
            if name not in plugins:
                raise ConfigError(
                    f'The service "{name}" is configured but not installed.',
                    hint=did_you_mean(name, list(plugins)),
                )
            if not section.enabled:
                continue
            with _blame(name):
                plugin = plugins[name]()
                data_dir = folder / name
                data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
                context = ServiceContext(
                    data_dir=data_dir,
                    config=section.options,
                    log=structlog.get_logger(f"btt.services.{name}").bind(service=name),
                    clock=clock,
                )
                self._plugins[name] = plugin(context)

    async def start(self) -> None:
        """Starts every service; those that started are stopped by `stop`."""
        for name, plugin in self._plugins.items():
            with _blame(name):
                await plugin.start()
            self._started.append(name)

    def register(self, registrar: Registrar, *, credit_limit: int) -> None:
        """Registers every service, and checks that all it charges is priced and can be lent.

        Args:
            registrar: Where what is accepted goes.
            credit_limit: Most that anyone may owe, base units.

        Raises:
            ConfigError: Naming the service and what is wrong.
        """
        taken: set[str] = set()
        for name, plugin in self._plugins.items():
            with _blame(name):
                before = set(registrar.charges)
                gate = _Gate(registrar, taken)
                plugin.register(cast("grpc.aio.Server", gate))
                gate.check()
                prices = dict(plugin.prices())
                charges = [c for path, c in registrar.charges.items() if path not in before]
                _check_prices(charges, prices, credit_limit)
                self.prices |= prices
                self.services += gate.services
                limits = self._sections[name].limits.named(name)
                self.limits |= dict.fromkeys(gate.services, limits)

    async def stop(self) -> None:
        """Stops what was started, the last first; a failure of one does not keep the others."""
        for name in reversed(self._started):
            try:
                await self._plugins[name].stop()
            except Exception:  # noqa: BLE001 - third-party code; logged, and the rest is stopped
                structlog.get_logger(__name__).exception("service.not_stopped", service=name)
        self._started.clear()


def _check_prices(charges: list[MethodCharge], prices: Mapping[Line, Price], credit_limit: int) -> None:
    charged = {line for charge in charges for line in charge.largest()}
    for line in prices.keys() - charged:
        raise ConfigError(f"It prices {line.service} per {line.unit.name}, which no method charges.")
    for charge in charges:
        for line, most in charge.largest().items():
            price = prices.get(line)
            if price is None:
                raise ConfigError(f"{charge.path} charges {line.unit.name}, which has no price.")
            if price.rate.unit is not line.unit:
                raise ConfigError(f"{charge.path} charges {line.unit.name}, priced per another unit.")
            if most > price.verify_units:
                raise ConfigError(
                    f"{charge.path} charges up to {most} units at once, more than the "
                    f"{price.verify_units} of the verify unit it offers."
                )
            largest = max(charge.largest_message, charge.largest_request)
            if line.unit is Unit.BYTE and largest > MAX_MESSAGE - _ENVELOPE:
                raise ConfigError(f"{charge.path} allows messages that are larger than gRPC takes here.")
    cost = PriceSheet(b"", prices).unit_charge
    if cost > credit_limit:
        raise ConfigError(
            f"A message with one verify unit of each price costs {Amount(cost)}, more than anyone may owe.",
            hint=f'Lower its rates, or write, below [payments]: credit_limit = "{Amount(cost)}".',
        )


@contextmanager
def _blame(name: str) -> Iterator[None]:
    """Makes any failure of a plugin one that names it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"services.{name}: {error.message}", hint=error.hint) from error
    except BttError:
        raise
    except Exception as error:
        raise ConfigError(f"services.{name} failed: {type(error).__name__}: {error}.") from error
