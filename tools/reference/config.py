"""The configuration of a node: every key with its default, its variable and its text."""

from __future__ import annotations

import json
from importlib.metadata import entry_points

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from btt.node.config import ENV_PREFIX, NodeConfig, ServiceSection
from btt.node.values import parse_speed, speed_text
from btt.sdk.clock import duration_text, parse_duration
from reference.text import Untold, entries, summary, table


def all_keys() -> str:
    """One section for each table of node.toml, then the services that are installed."""
    parts = []
    told = entries(NodeConfig, "Attributes")
    for name, field in NodeConfig.model_fields.items():
        if name not in told:
            raise Untold(f"the section {name} of the node's configuration has no text")
        if name != "services":
            parts += [f"## [{name}]", "", told[name], "", section(_model(field), name), ""]
    parts += ["## [services.NAME]", "", told["services"], "", section(ServiceSection, "services__<NAME>"), ""]
    for point in sorted(entry_points(group="btt.services"), key=lambda known: known.name):
        parts += [f"### [services.{point.name}]", "", summary(point.load(), f"the service {point.name}"), ""]
    return "\n".join(parts)


def section(model: type[BaseModel], name: str) -> str:
    """The keys of one table of the file.

    Raises:
        Untold: A key is not among the Attributes of its class.
    """
    told = entries(model, "Attributes")
    rows: list[tuple[str, ...]] = []
    below: list[str] = []
    for key, field in model.model_fields.items():
        if key not in told:
            raise Untold(f"the key {key} of {model.__name__} has no text")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            place = f"{name}__{key}"
            head = f"\n### `[{place.replace('__', '.')}]`\n\n{summary(field.annotation, place)}\n\n"
            below.append(head + section(field.annotation, place))
            continue
        variable = f"{ENV_PREFIX}{name}__{key}".upper()
        rows.append((f"`{key}`", _default(field), told[key], f"`{variable}`"))
    return table(("key", "default", "", "variable"), rows) + "".join(below)


def _model(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type)
    assert issubclass(field.annotation, BaseModel)
    return field.annotation


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(must be given)"
    value = field.get_default(call_default_factory=True)
    if value is None or value == "":
        return "-"
    readers = {getattr(known, "func", None) for known in field.metadata}
    if parse_duration in readers and value:
        return f'`"{duration_text(value)}"`'
    if parse_speed in readers:
        return f'`"{speed_text(value)}"`'
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{json.dumps([str(one) for one in value])}`"
    return f"`{value}`" if type(value) is int else f'`"{value}"`'
