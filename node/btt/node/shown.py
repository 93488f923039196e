"""The configuration as its operator would write it, with where each value comes from."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from btt.node.config import ENV_PREFIX, ServiceSection, load
from btt.node.folder import CONFIG
from btt.node.reload import needs_restart
from btt.node.values import parse_size, parse_speed, size_text, speed_text
from btt.sdk.clock import duration_text, parse_duration
from btt.sdk.errors import ConfigError
from btt.sdk.plugin import did_you_mean


@dataclass(frozen=True, slots=True)
class Shown:
    """One key.

    Attributes:
        key: Such as "payments.grace".
        value: As it is written.
        origin: "default", the file, or the variable.
        restart: Whether a change needs a restart of the node.
    """

    key: str
    value: Any
    origin: str
    restart: bool


def shown(folder: Path) -> list[Shown]:
    """Returns every key of a node's configuration.

    Raises:
        ConfigError: The configuration does not do.
    """
    config = load(folder / CONFIG)
    text = (folder / CONFIG).read_text("utf-8")
    written = dict(_flat(tomllib.loads(text)))
    return [
        Shown(key, value, _origin(key, written), needs_restart(key)) for key, value in _values(config, "")
    ]


def check_key(folder: Path, key: str) -> None:
    """Checks that a key is one, of the configuration or at least of what its operator wrote.

    Args:
        folder: Of the node.
        key: Of a value or a table, such as "payments.grace".

    Raises:
        ConfigError: It is not.
    """

    def among(keys: Iterable[str]) -> bool:
        return any(f"{one}.".startswith(f"{key}.") for one in keys)

    try:
        written = dict(_flat(tomllib.loads((folder / CONFIG).read_text("utf-8"))))
    except ValueError:
        return  # who writes it will say more
    if among(written):
        return  # it may be a wrong one that has to go
    known = [one.key for one in shown(folder)]
    if not among(known):
        raise ConfigError(f'There is no key "{key}".', hint=did_you_mean(key, known))


def _origin(key: str, written: Mapping[str, Any]) -> str:
    variable = ENV_PREFIX + key.replace(".", "__").upper()
    for name in os.environ:
        if name.upper() == variable:
            return name
    return CONFIG if key in written else "default"


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _values(section: BaseModel, before: str) -> Iterator[tuple[str, Any]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _values(value, f"{before}{name}.")
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from _values(inner, f"{before}{name}.{key}.")
        else:
            yield f"{before}{name}", "" if value is None else _text(field, value)
    if isinstance(section, ServiceSection):
        yield from _flat(section.options, before)


def _text(field: FieldInfo, value: Any) -> Any:
    readers = {getattr(mark, "func", None) for mark in field.metadata}
    if parse_duration in readers:
        return duration_text(value)
    if parse_speed in readers:
        return speed_text(value)
    if parse_size in readers:
        return size_text(value)
    if isinstance(value, tuple):
        return [str(each) for each in value]
    return value if type(value) in (bool, int, str) else str(value)
