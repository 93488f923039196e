"""The configuration of a node: one TOML file, overridden by the environment.

`BTT_NODE__PAYMENTS__GRACE=30s` overrides `grace` of `[payments]`. Unknown keys are refused with
the one that was probably meant; every error names the file or variable, the key, and what to
write. The sections of services are checked by the services themselves.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from btt.node.admission.apps import ANY, parse_app
from btt.node.admission.limits import Limits
from btt.node.values import Host, Milliseconds, Money, Size, Speed, listen_text, parse_list, parsed
from btt.sdk.channel import BanPolicy
from btt.sdk.errors import ConfigError, InvalidRequest
from btt.sdk.identity import ChannelTerms
from btt.sdk.keys import Address
from btt.sdk.ledger import LedgerAddress
from btt.sdk.money import Amount
from btt.sdk.plugin import did_you_mean

ENV_PREFIX: Final = "BTT_NODE__"

_address = parsed(Address.parse)
Apps = Annotated[tuple[Annotated[str, AfterValidator(parse_app)], ...], BeforeValidator(parse_list)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class NodeSection(_Section):
    """Where the node listens, and what it is called.

    Attributes:
        listen: "host:port" of the paid services; port 0 takes a free one.
        advertise: Host in the node's address; the one it listens on by default.
        name: For people.
    """

    listen: Annotated[str, BeforeValidator(listen_text)] = "127.0.0.1:7800"
    advertise: Host = ""
    name: str = Field(default="", max_length=64)


class LedgerSection(_Section):
    """On which ledger the node is paid.

    Attributes:
        address: Of that ledger; it comes from the operator alone, never from a peer.
    """

    address: Annotated[LedgerAddress, BeforeValidator(parsed(LedgerAddress.parse))]


class PaymentsSection(_Section):
    """Who is paid, what is lent, and which channels are accepted.

    Attributes:
        payee: Account that is paid; "" for the address of the node's payee key.
        credit_limit: Most that anyone may owe.
        strangers_per_hour: What payers without a history may owe together in an hour.
        strangers_per_network: The same for each /24 or /48.
        grace: How long a call waits for payment.
        min_amount: Least that a channel must lock.
        min_challenge: Shortest challenge window: the longest absence of this node.
        min_lifetime: Shortest life of a new channel.
        max_lifetime: Longest life of a new channel.
        close_margin: How long before its lock time a channel is closed.
    """

    payee: Annotated[Address | None, BeforeValidator(lambda text: _address(text) if text else None)] = None
    credit_limit: Money = Amount(1_000_000)
    strangers_per_hour: Money = Amount(1_000_000)
    strangers_per_network: Money = Amount(100_000)
    grace: Milliseconds = 60_000
    min_amount: Money = Amount(1000)
    min_challenge: Milliseconds = 3_600_000
    min_lifetime: Milliseconds = 3_600_000
    max_lifetime: Milliseconds = 30 * 86_400_000
    close_margin: Milliseconds = 900_000

    @model_validator(mode="after")
    def _check(self) -> PaymentsSection:
        if not 0 < self.min_challenge < 2**32:
            raise ValueError('min_challenge must be above 0 and below 49 days; write min_challenge = "1h"')
        if not 0 < self.min_lifetime < self.max_lifetime:
            raise ValueError("min_lifetime must be above 0 and below max_lifetime")
        if not 1000 <= self.grace <= 86_400_000:
            raise ValueError('grace must be between a second and a day; write grace = "60s"')
        # A session may begin while half of min_lifetime is left, and must not be closed under way.
        if not 0 < self.close_margin <= self.min_lifetime // 2:
            raise ValueError("close_margin must be above 0 and at most half of min_lifetime")
        return self

    @property
    def terms(self) -> ChannelTerms:
        """The channel terms as they stand in an offer."""
        return ChannelTerms(
            min_amount=int(self.min_amount),
            min_challenge_ms=self.min_challenge,
            min_lifetime_ms=self.min_lifetime,
            max_lifetime_ms=self.max_lifetime,
        )


class BansSection(_Section):
    """What follows when a payer fails again and again.

    Attributes:
        after: Failures that lead to a ban.
        first: How long the first ban lasts; each further one is twice as long.
        longest: Length that no ban exceeds, and the time in which one doubling is forgotten.
        forget: Time in which one failure is forgotten.
    """

    after: int = Field(default=3, ge=1, le=1000)
    first: Milliseconds = 600_000
    longest: Milliseconds = 86_400_000
    forget: Milliseconds = 3_600_000

    @model_validator(mode="after")
    def _check(self) -> BansSection:
        if not 1000 <= self.first <= self.longest <= 365 * 86_400_000:
            raise ValueError("first must be at least a second, and longest between it and a year")
        if self.forget < 1000:
            raise ValueError('forget must be at least a second; write forget = "1h"')
        return self


class LogSection(_Section):
    """What is logged.

    Attributes:
        level: debug, info, warning or error.
        format: "auto" is for people on a terminal and JSON elsewhere; or "human", or "json".
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "human", "json"] = "auto"


class MetricsSection(_Section):
    """Where Prometheus may ask.

    Attributes:
        listen: "host:port" for the operator alone; "" for nowhere.
    """

    listen: Annotated[str, BeforeValidator(lambda text: text and listen_text(text))] = ""


class AppsSection(_Section):
    """Which applications the node serves.

    Attributes:
        allow: T-addresses of applications, "unknown" for callers without one, "*" for all.
        deny: The same; it wins.
    """

    allow: Apps = (ANY,)
    deny: Apps = ()


class LimitsSection(_Section):
    """Which paid calls the node takes on.

    Attributes:
        up: Bytes a second of all services that leave; 0 for no limit.
        down: Bytes a second of all services that come.
        connections: Connections with calls at once; 0 for no limit.
        calls: Those that run at once.
        calls_per_payer: Of those, of one payer.
        calls_per_minute: Those that one payer may begin in a minute; 0 is no bound.
        deadline: How long a call may take, whatever its caller allows it.
    """

    up: Speed = 0
    down: Speed = 0
    connections: int = Field(default=0, ge=0, le=1_000_000)

    calls: int = Field(default=512, ge=1, le=65536)
    calls_per_payer: int = Field(default=32, ge=1, le=65536)
    calls_per_minute: int = Field(default=0, ge=0, le=10**9)
    deadline: Milliseconds = 86_400_000

    @property
    def limits(self) -> Limits:
        """As the node's admission wants them."""
        return Limits(
            calls=self.calls,
            calls_per_payer=self.calls_per_payer,
            calls_per_minute=self.calls_per_minute,
            deadline_s=self.deadline / 1000,
        )


class ServiceLimits(_Section):
    """The same for one service, below those of the node; what is 0 is left to them.

    Attributes:
        up: Bytes a second that leave.
        down: Bytes a second that come.
        calls: Those that run at once.
        calls_per_payer: Of those, of one payer.
        calls_per_minute: Those that one payer may begin in a minute.
        deadline: How long a call may take, whatever its caller allows it.
    """

    up: Speed = 0
    down: Speed = 0
    calls: int = Field(default=0, ge=0, le=65536)
    calls_per_payer: int = Field(default=0, ge=0, le=65536)
    calls_per_minute: int = Field(default=0, ge=0, le=10**9)
    deadline: Milliseconds = 0

    def named(self, name: str) -> Limits:
        """As the node's admission wants them."""
        return Limits(
            name=name,
            calls=self.calls,
            calls_per_payer=self.calls_per_payer,
            calls_per_minute=self.calls_per_minute,
            deadline_s=self.deadline / 1000,
        )


class ServiceSection(BaseModel):
    """One service; its other keys are checked by the service.

    Attributes:
        enabled: Whether the node runs it.
        quota: Most that it may keep on this machine, "" for nothing; only services that keep what
            others send ask for it.
        limits: What it may take of what the node has, and which of its calls the node takes on.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    enabled: bool = False
    quota: Size = 0
    limits: ServiceLimits = ServiceLimits()

    @property
    def options(self) -> dict[str, Any]:
        """The keys that the service checks."""
        return dict(self.model_extra or {})


class NodeConfig(BaseSettings):
    """The whole configuration; make it with `load`, or `NodeConfig(ledger={"address": ...})`.

    Attributes:
        node: Where it listens.
        ledger: Where it is paid.
        payments: Credit and channel terms.
        bans: What follows when payment fails again and again.
        apps: For whom.
        limits: What it takes on at once.
        log: What it logs.
        metrics: Where Prometheus may ask.
        services: Each service by its name.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        enable_decoding=False,  # a variable is written as the file is, and not in JSON
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
    )

    node: NodeSection = NodeSection()
    ledger: LedgerSection
    payments: PaymentsSection = Field(default_factory=PaymentsSection)
    bans: BansSection = Field(default_factory=BansSection)
    apps: AppsSection = AppsSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()
    services: dict[str, ServiceSection] = Field(default_factory=dict)

    @property
    def bans_policy(self) -> BanPolicy:
        """When a ban begins, and how long it lasts."""
        return BanPolicy(
            after=self.bans.after,
            first_ms=self.bans.first,
            longest_ms=self.bans.longest,
            forget_ms=self.bans.forget,
            # One call after another fails no faster than by the grace time; calls that wait
            # together fail together, and once.
            apart_ms=self.payments.grace // 2,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file; nothing else is read."""
        return env_settings, init_settings


def load(path: Path) -> NodeConfig:
    """Reads a configuration file, and the environment.

    Raises:
        ConfigError: Naming the file or variable, the key, and what to write.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no {path}.", hint="Make a node with `btt node init`.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None
    return parse(found, source=str(path))


def parse(found: Mapping[str, Any], *, source: str) -> NodeConfig:
    """Checks a configuration that was read from a file, together with the environment.

    Args:
        found: The tables of the file.
        source: Its name, for error texts.

    Raises:
        ConfigError: As `load`.
    """
    _check_environment()
    try:
        return NodeConfig(**found)
    except ValidationError as error:
        raise _explain(error, source) from None
    except InvalidRequest as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_environment() -> None:
    sections = set(NodeConfig.model_fields)
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            section = name[len(ENV_PREFIX) :].partition("__")[0].lower()
            if section not in sections:
                raise ConfigError(
                    f'The environment variable {name} names no section: "{section}".',
                    hint=did_you_mean(section, sections),
                )


def _explain(error: ValidationError, source: str) -> ConfigError:
    problem = error.errors(include_url=False)[0]
    place = [str(part) for part in problem["loc"]]
    variable = ENV_PREFIX + "__".join(place).upper()
    where = next((f"The variable {name}" for name in os.environ if name.upper() == variable), source)
    key = ".".join(place)
    if problem["type"] == "extra_forbidden":
        return ConfigError(f'{where}: there is no key "{key}".', hint=did_you_mean(place[-1], _known(place)))
    if problem["type"] == "missing":
        if key in ("ledger", "ledger.address"):
            return ConfigError(
                f"{where}: ledger.address is missing.",
                hint='Write, below [ledger]: address = "btt-ledger://…", as `btt ledger serve` prints it.',
            )
        return ConfigError(f"{where}: {key} is missing.")
    if problem["type"] == "tuple_type":
        return ConfigError(f'{where}: {key}: write a list, such as ["unknown"].')
    text = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return ConfigError(f"{where}: {key}: {text}.")


def _known(place: list[str]) -> list[str]:
    if len(place) == 1:
        return list(NodeConfig.model_fields)
    if place[0] == "services":  # of a service itself only its limits are checked here
        return list(ServiceLimits.model_fields)
    section = NodeConfig.model_fields[place[0]].annotation
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    return list(section.model_fields)
