"""Finds the services of a node, makes them, and refuses what cannot be charged or would be lost.

Built-in services come through entry points like those of third parties. Only what the operator
enabled is imported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, cast

import grpc
import grpc.aio

from btt.node.admission import Limits
from btt.node.config import ServiceSection
from btt.node.limits.limiter import Limiter
from btt.node.payments.registrar import Registrar
from btt.node.plugins.guard import guarded
from btt.node.plugins.host import ServiceHost, State, Surroundings
from btt.sdk.channel import Line, Price, PriceSheet
from btt.sdk.errors import ConfigError
from btt.sdk.money import Amount, Unit
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.plugin import ServicePlugin, did_you_mean
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


class Router(grpc.GenericRpcHandler):
    """Finds the handler of a call among those of all services; services come and go while it serves.

    It also takes handlers where a gRPC server is expected, so that the server is made after its
    services.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Takes the handlers of one service, in place of those that it had."""
        self._handlers[service] = dict(handlers)

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Does nothing: what is served is what was registered by method, for only that was checked."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Returns the handler of a call, or None."""
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        return self._handlers.get(service, {}).get(method)

    @property
    def services(self) -> tuple[str, ...]:
        """Full names of all that is served."""
        return tuple(self._handlers)


class _Guarding:
    """Puts the guard around what was checked, on its way to the router."""

    def __init__(self, router: Router, host: ServiceHost, limiter: Limiter) -> None:
        self._router = router
        self._host = host
        self._limiter = limiter

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        safe = {name: guarded(handler, self._host, self._limiter) for name, handler in handlers.items()}
        self._router.add_registered_method_handlers(service, safe)


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
        around: What the node has for each of them.
        limiter: Of the node.
        credit_limit: Most that anyone may owe, base units.

    Attributes:
        hosts: Each service that is, or was, enabled; by name.
        owners: Name of the service by proto service.
        limits: Which calls the node takes on, by proto service.
        credit_limit: Most that anyone may owe, base units.
    """

    def __init__(
        self, plugins: Plugins, *, around: Surroundings, limiter: Limiter, credit_limit: int
    ) -> None:
        self._plugins = plugins
        self._around = around
        self._limiter = limiter
        self.credit_limit = credit_limit
        self.hosts: dict[str, ServiceHost] = {}
        self.owners: dict[str, str] = {}
        self.limits: dict[str, Limits] = {}
        self._sections: dict[str, ServiceSection] = {}
        self.router = Router()
        self.registrar = Registrar(cast("grpc.aio.Server", self.router))

    @property
    def prices(self) -> dict[Line, Price]:
        """Of all lines that are offered; a service that has failed keeps its own."""
        return {
            line: price
            for host in self.hosts.values()
            if host.state not in (State.DRAINING, State.STOPPED)
            for line, price in host.prices.items()
        }

    @property
    def services(self) -> tuple[str, ...]:
        """Full names of the proto services."""
        return tuple(self.owners)

    @property
    def packages(self) -> dict[str, str]:
        """Name of the service by the package of its code."""
        return {package_of(host.package): host.name for host in self.hosts.values() if host.package}

    def configure(self, sections: Mapping[str, ServiceSection]) -> list[ServiceHost]:
        """Makes those services that are enabled and not there yet.

        Raises:
            ConfigError: A service is enabled that is not installed, or is configured wrongly.
        """
        made = []
        for name, section in sections.items():
            # One that is switched off in so many words may be gone; else its name may be misspelt.
            if name not in self._plugins and (section.enabled or "enabled" not in section.model_fields_set):
                near = did_you_mean(name, list(self._plugins))
                raise ConfigError(
                    f'The service "{name}" is configured but not installed.',
                    hint=f"{near} What is installed is looked for when a node starts.",
                )
            host = self.hosts.get(name)
            if not section.enabled or (host is not None and host.state is not State.STOPPED):
                continue
            host = ServiceHost(name, self._plugins[name], config=section.options, around=self._around)
            host.configure()
            made.append(host)
        self.hosts |= {host.name: host for host in made}
        self._sections |= {host.name: sections[host.name] for host in made}
        return made

    def limit(self, sections: Mapping[str, ServiceSection]) -> None:
        """Makes the limits of services hold, now and when one is started again."""
        self._sections |= sections
        for proto, name in self.owners.items():
            if name in sections:
                self.limits[proto] = sections[name].limits.named(name)

    def check_credit(self, limit: int) -> None:
        """Says whether so much credit is enough for each message that is sold here.

        Args:
            limit: Most that anyone may owe, base units.

        Raises:
            ConfigError: It is not.
        """
        for host in self.hosts.values():
            if host.state not in (State.DRAINING, State.STOPPED):
                _check_cost(host.prices, limit)

    async def begin(self, host: ServiceHost) -> None:
        """Starts one service and registers it; if it fails, it is isolated.

        Raises:
            ConfigError: Its configuration does not do, or what it charges does not.
        """
        await host.start()
        self.register(host)

    def register(self, host: ServiceHost) -> None:
        """Registers a service that was started, unless it has failed; if this fails, it is isolated.

        Raises:
            ConfigError: What it charges does not do.
        """
        if host.state is State.STARTING:
            with host.blamed():
                self._register(host)

    def _register(self, host: ServiceHost) -> None:
        taken = {service for service, owner in self.owners.items() if owner != host.name}
        checked = Registrar(cast("grpc.aio.Server", _Guarding(self.router, host, self._limiter)))
        checked.charges = self.registrar.charges
        gate = _Gate(checked, taken)
        host.register(cast("grpc.aio.Server", gate))
        gate.check()
        host.serve(gate.services, self._priced(host, gate.services))
        self.owners |= dict.fromkeys(gate.services, host.name)
        limits = self._sections[host.name].limits.named(host.name)
        self.limits |= dict.fromkeys(gate.services, limits)

    def _priced(self, host: ServiceHost, services: Collection[str]) -> dict[Line, Price]:
        prices = host.priced()
        charges = [c for path, c in self.registrar.charges.items() if path.split("/")[1] in services]
        _check_prices(charges, prices, self.credit_limit)
        return prices

    def reload(self, name: str, config: Mapping[str, Any]) -> None:
        """Gives a service that runs changed options.

        Raises:
            ConfigError: They do not do; nothing has changed.
        """
        host = self.hosts[name]
        host.reload(config)
        try:
            prices = self._priced(host, host.services)
        except ConfigError as error:
            host.reload(host.config)
            raise ConfigError(f"services.{name}: {error.message}", hint=error.hint) from error
        host.config, host.prices = config, prices

    async def stop(self) -> None:
        """Stops every service, the last first; a failure of one does not keep the others."""
        for host in reversed(self.hosts.values()):
            await host.stop()

    @property
    def abandoned(self) -> list[asyncio.Task[Any]]:
        """Tasks of services that refused to end."""
        return [task for host in self.hosts.values() for task in host.abandoned if not task.done()]


def package_of(module: str) -> str:
    """Returns the package of a service's module: code below it is the service's."""
    return module.rpartition(".")[0] or module


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
    _check_cost(prices, credit_limit)


def _check_cost(prices: Mapping[Line, Price], credit_limit: int) -> None:
    cost = PriceSheet(b"", prices).unit_charge
    if cost > credit_limit:
        raise ConfigError(
            f"A message with one verify unit of each price costs {Amount(cost)}, more than anyone may owe.",
            hint=f'Lower its rates, or write, below [payments]: credit_limit = "{Amount(cost)}".',
        )
