"""The life of one service: what may follow what, and what happens when it fails.

    DISCOVERED -> LOADED -> CONFIGURED -> STARTING -> SERVING <-> DRAINING -> STOPPED
                                 any of them -> FAILED(reason) -> LOADED, after a while

Whatever a service does, its methods answer, the others go on, and the node can stop: it is given
time, and no more. Only what its operator configured wrongly (ConfigError) is passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from btt.node.plugins.scope import Scope
from btt.node.plugins.watchdog import Blocked
from btt.node.plugins.weakly import weakly
from btt.sdk.channel import Line, Price
from btt.sdk.errors import ConfigError, ServiceUnavailable, StorageError
from btt.sdk.plugin import Limiter, Meter, Metrics, Quota, Reloadable, ServiceContext, ServicePlugin

if TYPE_CHECKING:
    import grpc.aio

log = structlog.get_logger(__name__)

START_S: Final = 30.0
STOP_S: Final = 5.0
LEAK_S: Final = 1.0
BLOCKS: Final = 3
"""How often a service may hold up the loop before it is stopped."""


class State(StrEnum):
    """Where a service stands."""

    DISCOVERED = "discovered"
    LOADED = "loaded"
    CONFIGURED = "configured"
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


_NEXT: Final[Mapping[State, frozenset[State]]] = {
    State.DISCOVERED: frozenset({State.LOADED, State.FAILED}),
    State.LOADED: frozenset({State.CONFIGURED, State.FAILED}),
    State.CONFIGURED: frozenset({State.STARTING, State.STOPPED, State.FAILED}),
    State.STARTING: frozenset({State.SERVING, State.DRAINING, State.STOPPED, State.FAILED}),
    State.SERVING: frozenset({State.DRAINING, State.STOPPED, State.FAILED}),
    State.DRAINING: frozenset({State.SERVING, State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset({State.LOADED}),
    State.FAILED: frozenset({State.LOADED, State.STOPPED}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a node has for each of its services.

    Attributes:
        folder: Each service gets a folder of its name in it.
        clock: Unix milliseconds.
        limiter: Makes what a service is given of the limiter.
        metrics: The same for the metrics.
        quota: The same for what it may keep.
        meter: Tells a service about the call that runs.
        changed: Called after each change of state.
        start_s: Seconds that a start may take.
        stop_s: Seconds that a stop may take.
        leak_s: Seconds that cancelled tasks may take to end.
    """

    folder: Path
    clock: Callable[[], int]
    limiter: Callable[[str], Limiter]
    metrics: Callable[[str], Metrics]
    quota: Callable[[str], Quota]
    meter: Meter
    changed: Callable[[ServiceHost], None] = lambda _: None
    start_s: float = START_S
    stop_s: float = STOP_S
    leak_s: float = LEAK_S


class ServiceHost:
    """One service of a node.

    Args:
        name: Of its entry point and its section.
        load: Imports its class.
        config: Its options.
        around: What the node has for it.

    Attributes:
        state: Where it stands.
        reason: Why it has failed; empty otherwise.
        running: Its calls that run now.
        services: Full names of its proto services, once registered.
        prices: Of its lines, once registered.
        abandoned: Tasks of it that refused to end.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], type[ServicePlugin]],
        *,
        config: Mapping[str, Any],
        around: Surroundings,
    ) -> None:
        self.name = name
        self.config = config
        self.state = State.DISCOVERED
        self.reason = ""
        self.running = 0
        self.failures = 0
        self.services: tuple[str, ...] = ()
        self.prices: Mapping[Line, Price] = {}
        self.abandoned: list[asyncio.Task[Any]] = []
        self.package = ""
        self.failed = asyncio.Event()
        self._load = load
        self._around = around
        self._blocked = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._scope = Scope(weakly(self._background_failed))
        self.plugin: ServicePlugin | None = None

    def _to(self, state: State, reason: str = "") -> None:
        assert state in _NEXT[self.state], f"{self.name}: {self.state} does not lead to {state}"
        self.state, self.reason = state, reason
        if state is State.FAILED:
            self.failures += 1
            self.failed.set()
            log.error("service.failed", service=self.name, reason=reason)
        else:
            log.debug("service.state", service=self.name, state=state)
        self._around.changed(self)

    def fail(self, reason: str) -> None:
        """Takes it out of service; what supervises it brings it back after a while."""
        if self.state not in (State.FAILED, State.STOPPED):
            self._to(State.FAILED, reason)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Makes whatever fails inside a failure of this service.

        Raises:
            ConfigError: Its configuration does not do; named as this service's.
            StorageError: The node's disk failed, which is no fault of the service.
        """
        try:
            yield
        except ConfigError as error:
            self.fail(error.message)
            raise ConfigError(f"services.{self.name}: {error.message}", hint=error.hint) from error
        except StorageError:
            self.fail("the disk failed")
            raise
        except (Exception, SystemExit) as error:
            log.exception("service.raised", service=self.name)
            self.fail(f"{type(error).__name__}: {error}")

    # Beginning

    def configure(self) -> None:
        """Imports and makes it.

        Raises:
            ConfigError: Its configuration does not do.
        """
        with self.blamed():
            cls = self._load()
            self.package = cls.__module__
            self._to(State.LOADED)
            self.failed.clear()
            data_dir = self._around.folder / self.name
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            context = ServiceContext(
                data_dir=data_dir,
                config=self.config,
                log=structlog.get_logger(f"btt.services.{self.name}").bind(service=self.name),
                clock=self._around.clock,
                tasks=self._scope,
                limiter=self._around.limiter(self.name),
                metrics=self._around.metrics(self.name),
                quota=self._around.quota(self.name),
                meter=self._around.meter,
            )
            self.plugin = self._scope.call(cls, context)
            self._to(State.CONFIGURED)

    async def start(self) -> None:
        """Starts it, if it could be made.

        Raises:
            ConfigError, StorageError: As `blamed`.
        """
        if self.state is not State.CONFIGURED:
            return
        with self.blamed():
            assert self.plugin is not None
            self._to(State.STARTING)
            starting = self._scope.run(self.plugin.start(), name=f"{self.name} start")
            done, _ = await asyncio.wait({starting}, timeout=self._around.start_s)
            if not done:
                starting.cancel()
                raise TimeoutError(f"it did not start within {self._around.start_s:g} s")
            starting.result()

    def register(self, server: grpc.aio.Server) -> None:
        """Lets it register its methods."""
        assert self.plugin is not None
        self._scope.call(self.plugin.register, server)

    def priced(self) -> dict[Line, Price]:
        """Returns what it asks now."""
        assert self.plugin is not None
        return dict(self._scope.call(self.plugin.prices))

    def serve(self, services: Iterable[str], prices: Mapping[Line, Price]) -> None:
        """Its methods are registered, and it answers from now on."""
        self.services, self.prices = tuple(services), prices
        if self.state is State.STARTING:
            self._to(State.SERVING)

    @property
    def began(self) -> bool:
        """It was started, well or not, and must be stopped."""
        return self.plugin is not None and self.state not in (State.STOPPED, State.CONFIGURED)

    def reload(self, config: Mapping[str, Any]) -> None:
        """Takes changed options, with new prices.

        Raises:
            ConfigError: They do not do; nothing has changed.
        """
        assert isinstance(self.plugin, Reloadable), "asked before"
        try:
            self._scope.call(self.plugin.reload, config)
        except ConfigError as error:
            raise ConfigError(f"services.{self.name}: {error.message}", hint=error.hint) from error
        except Exception as error:
            raise ConfigError(f"services.{self.name} failed: {type(error).__name__}: {error}.") from error

    # Serving

    def begin_call(self) -> Scope:
        """A call comes in.

        Returns:
            What it is counted with, for its end.

        Raises:
            ServiceUnavailable: It does not serve now.
        """
        if self.state is not State.SERVING:
            why = "has failed and is being restarted" if self.state is State.FAILED else "is switched off"
            raise ServiceUnavailable(f"The service {self.name} of this node {why}.")
        self.running += 1
        self._idle.clear()
        self._scope.enter()
        return self._scope

    def end_call(self, begun: Scope) -> None:
        """A call ended, one way or another; one from before a restart is counted no more.

        Args:
            begun: As its beginning returned it.
        """
        if begun is not self._scope:
            return
        self.running -= 1
        if not self.running:
            self._idle.set()

    def blocked(self, what: Blocked) -> None:
        """It held up the loop."""
        self._blocked += 1
        log.error("service.blocked", service=self.name, seconds=round(what.seconds, 2), where=what.where)
        if self._blocked >= BLOCKS:
            self.fail(f"it held up the node for {what.seconds:.1f} s, in {what.where}")

    def _background_failed(self, error: BaseException) -> None:
        self.fail(f"in the background: {type(error).__name__}: {error}")

    # Ending

    def begin_drain(self) -> None:
        """Takes no new calls from now on."""
        if State.DRAINING in _NEXT[self.state]:
            self._to(State.DRAINING)

    def end_drain(self) -> None:
        """Takes new calls again; those that ran meanwhile never noticed."""
        if self.state is State.DRAINING:
            self._to(State.SERVING)

    async def drain(self, seconds: float | None = None) -> None:
        """Takes no new calls, and lets those that run end.

        Args:
            seconds: For how long; for ever if None.
        """
        self.begin_drain()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("service.calls_cut", service=self.name, calls=self.running)

    async def stop(self) -> None:
        """Stops it within seconds, whether it wants to or not; ends what it left running."""
        if self.began:
            await self._stop_plugin()
        left = await self._scope.end(self._around.leak_s)
        if left:
            self.abandoned += left
            log.error("service.tasks_refuse", service=self.name, tasks=[task.get_name() for task in left])
        self._scope = Scope(weakly(self._background_failed))
        self.plugin, self._blocked, self.running = None, 0, 0
        self._idle.set()
        if State.STOPPED in _NEXT[self.state]:
            self._to(State.STOPPED, self.reason)

    async def _stop_plugin(self) -> None:
        assert self.plugin is not None
        stopping = self._scope.run(self.plugin.stop(), name=f"{self.name} stop")
        done, _ = await asyncio.wait({stopping}, timeout=self._around.stop_s)
        if not done:
            log.error("service.stop_refused", service=self.name, seconds=self._around.stop_s)
        elif not stopping.cancelled() and (error := stopping.exception()) is not None:
            log.error("service.not_stopped", service=self.name, error=repr(error))
