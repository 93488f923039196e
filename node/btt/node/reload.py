"""Takes a changed configuration while the node runs: all of what can be taken, or nothing if it is wrong.

Limits, credit, bans, terms, the log level, prices and which services run change at once. The rest
needs a restart, and is named: addresses, who is paid, and the two times that the transport and
the watch over channels are built on (`payments.grace`, `payments.min_challenge`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from btt.node import config as node_config
from btt.node.config import NodeConfig, ServiceSection
from btt.node.folder import CONFIG
from btt.node.logs import LEVEL
from btt.node.payments.sessions import CreditPolicy
from btt.node.plugins.host import ServiceHost, State
from btt.sdk.errors import BttError
from btt.sdk.plugin import Reloadable

if TYPE_CHECKING:
    from btt.node.runtime import Node

log = structlog.get_logger(__name__)

_PAYMENTS_AT_ONCE = (
    "credit_limit",
    "strangers_per_hour",
    "strangers_per_network",
    "min_amount",
    "min_lifetime",
    "max_lifetime",
    "close_margin",
)
_AT_ONCE = (
    "apps.",
    "bans.",
    "limits.",
    "log.level",
    "services.",
    *(f"payments.{key}" for key in _PAYMENTS_AT_ONCE),
)
_NODES_OWN = tuple(ServiceSection.model_fields)
"""Keys of a service's section that are the node's."""
_OFF = ServiceSection()


def needs_restart(key: str) -> bool:
    """Says whether a key, such as "node.listen", is read only when a node starts."""
    return not key.startswith(_AT_ONCE)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What came of a reload.

    Attributes:
        applied: Keys that changed and hold now.
        restart: Keys that changed and need a restart.
        error: Why nothing was taken; empty if it was.
    """

    applied: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns it for machines."""
        return {"applied": list(self.applied), "restart": list(self.restart), "error": self.error}


def credit_policy(config: NodeConfig, *, unit: int = 0) -> CreditPolicy:
    """Returns what a node lends by its configuration.

    Args:
        config: Of the node.
        unit: Cost of the dearest verify unit, base units.
    """
    payments = config.payments
    return CreditPolicy(
        unit=unit,
        limit=int(payments.credit_limit),
        strangers_per_hour=int(payments.strangers_per_hour),
        strangers_per_network=int(payments.strangers_per_network),
        grace_s=payments.grace / 1000,
        bans=config.bans_policy,
    )


def changed_keys(old: NodeConfig, new: NodeConfig) -> Iterator[str]:
    """Yields the keys that differ."""
    for section in NodeConfig.model_fields:
        before, after = getattr(old, section), getattr(new, section)
        if section == "services":
            for name in sorted(before.keys() | after.keys()):
                yield from (
                    f"services.{name}.{key}"
                    for key in _changed_in(before.get(name, _OFF), after.get(name, _OFF))
                )
        else:
            for key in type(after).model_fields:
                if getattr(before, key) != getattr(after, key):
                    yield f"{section}.{key}"


def _changed_in(before: ServiceSection, after: ServiceSection) -> Iterator[str]:
    for key in _NODES_OWN:
        if getattr(before, key) != getattr(after, key):
            yield key
    options = before.options.keys() | after.options.keys()
    yield from sorted(key for key in options if before.options.get(key) != after.options.get(key))


class Reloader:
    """Changes one running node.

    Args:
        node: Which serves already.

    Attributes:
        held: What holds now: as read at the start, with all that changed since.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self.held = node.folder.config
        self._lock = asyncio.Lock()
        self._retiring: dict[str, asyncio.Task[None]] = {}

    async def reload(self) -> Reloaded:
        """Reads the file and the environment, and takes what changed."""
        async with self._lock:
            try:
                result = await self._reload(node_config.load(self._node.folder.path / CONFIG))
            except BttError as error:
                result = Reloaded(error=str(error))
        (log.warning if result.error else log.info)("config.reloaded", **result.as_json())
        return result

    async def _reload(self, new: NodeConfig) -> Reloaded:
        services, held = self._node.services.registry, self.held
        keys = list(changed_keys(held, new))
        restart = [key for key in keys if needs_restart(key)]
        # Whatever may be wrong comes first, so that a wrong configuration changes nothing.
        await self._stopped(new)
        made = services.configure(new.services)
        begun = {host.name: new.services[host.name] for host in made}
        back = self._bring_back(new)
        try:
            # A service starts with what it may keep and send; of all else the old holds meanwhile.
            self.apply_limits(held.model_copy(update={"services": held.services | begun}))
            for host in made:
                await host.start()
            stuck = self._change_services(new, made)
        except BttError:
            for host in reversed(made):
                await host.stop()
            for host in back:
                self._retire(host)
            self.apply_limits(held)
            raise
        for host in stuck:
            before, after = held.services[host.name], new.services[host.name]
            restart += [
                f"services.{host.name}.{key}" for key in _changed_in(before, after) if key not in _NODES_OWN
            ]
        payments = {key: getattr(new.payments, key) for key in _PAYMENTS_AT_ONCE}
        self.held = held.model_copy(
            update={"bans": new.bans, "payments": held.payments.model_copy(update=payments)}
        )
        self.apply_limits(new)
        self._apply_payments()
        for host in (*made, *back):
            self._node.services.supervisor.follow(host)
        for host in services.hosts.values():
            if host.state is State.STOPPED or host.name in self._retiring:
                continue
            if not new.services.get(host.name, _OFF).enabled:
                self._retire(host)
        await self._node.reprice()
        kept = {name: new.services[name] for name in new.services if name not in {h.name for h in stuck}}
        for host in stuck:
            own = {key: getattr(new.services[host.name], key) for key in _NODES_OWN}
            kept[host.name] = held.services[host.name].model_copy(update=own)
        self.held = self.held.model_copy(
            update={
                "apps": new.apps,
                "limits": new.limits,
                "log": held.log.model_copy(update={"level": new.log.level}),
                "services": kept,
            }
        )
        applied = [key for key in keys if key not in restart]
        return Reloaded(tuple(applied), tuple(restart))

    def _change_services(self, new: NodeConfig, made: Iterable[ServiceHost]) -> list[ServiceHost]:
        """Gives services their options, and serves those that were started; all, or none.

        Returns:
            Services that take their options only when the node starts.

        Raises:
            ConfigError: One does not do.
        """
        services = self._node.services.registry
        credit_before = services.credit_limit
        changed = self._changed_services(new)
        stuck = [host for host in changed if not self._takes(host)]
        done: list[tuple[ServiceHost, Mapping[str, Any]]] = []
        try:
            services.credit_limit = new.payments.credit_limit
            for host in changed:
                if host not in stuck:
                    before = host.config
                    services.reload(host.name, new.services[host.name].options)
                    done.append((host, before))
            services.check_credit(new.payments.credit_limit)
            for host in made:
                services.register(host)
        except BttError:
            services.credit_limit = credit_before
            for host, before in done:
                services.reload(host.name, before)
            for host in made:
                host.begin_drain()
            raise
        return stuck

    def _changed_services(self, new: NodeConfig) -> list[ServiceHost]:
        """Those that run, go on running, and have other options."""
        return [
            host
            for host in self._node.services.registry.hosts.values()
            if host.state not in (State.STOPPED, State.DRAINING)
            and new.services.get(host.name, _OFF).enabled
            and new.services[host.name].options != host.config
        ]

    def _takes(self, host: ServiceHost) -> bool:
        return host.state is State.SERVING and isinstance(host.plugin, Reloadable)

    async def _stopped(self, new: NodeConfig) -> None:
        """Waits for services that are switched on again while they stop, which takes seconds."""
        hosts = self._node.services.registry.hosts
        while stopping := [
            task
            for name, task in self._retiring.items()
            if new.services.get(name, _OFF).enabled and not hosts[name].running
        ]:
            await asyncio.wait(stopping)

    def _bring_back(self, new: NodeConfig) -> list[ServiceHost]:
        """Services that are switched on again before their last calls ended go on as they are."""
        hosts = self._node.services.registry.hosts
        back = [hosts[name] for name in self._retiring if new.services.get(name, _OFF).enabled]
        for host in back:
            self._retiring.pop(host.name).cancel()
            host.end_drain()
        return back

    def _retire(self, host: ServiceHost) -> None:
        async def retire() -> None:
            await host.drain()
            await host.stop()

        self._node.services.supervisor.leave(host)
        host.begin_drain()
        task = asyncio.create_task(retire(), name=f"retire {host.name}")
        self._retiring[host.name] = task
        task.add_done_callback(lambda done: self._retired(host.name, done))

    def _retired(self, name: str, done: asyncio.Task[None]) -> None:
        if self._retiring.get(name) is done:
            del self._retiring[name]

    def apply_limits(self, config: NodeConfig) -> None:
        """Makes the limits of a configuration hold."""
        node, limits = self._node, config.limits
        node.limiter.limit(
            up=limits.up,
            down=limits.down,
            services={name: (s.limits.up, s.limits.down) for name, s in config.services.items()},
        )
        node.quotas.limit({name: section.quota for name, section in config.services.items()})
        LEVEL.set(config.log.level)
        node.connections.most = limits.connections
        node.admission.limit(limits.limits)
        node.admission.apps.choose(allow=config.apps.allow, deny=config.apps.deny)
        node.services.registry.limit(config.services)

    def _apply_payments(self) -> None:
        self._node.sessions.lend_by(credit_policy(self.held))
        self._node.closer.margin_ms = self.held.payments.close_margin

    async def close(self) -> None:
        """Waits no longer for services that are being switched off."""
        retiring = list(self._retiring.values())
        for task in retiring:
            task.cancel()
        await asyncio.gather(*retiring, return_exceptions=True)
