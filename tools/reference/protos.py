"""The wire: every message, enum and method with its comment and its charge."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from google.protobuf import descriptor_pb2 as d

# Their options have to be known before descriptors are read.
from btt.proto.common.v1 import charge_pb2
from reference.text import Untold, table

ROOT = Path(__file__).resolve().parents[2] / "proto"


@cache
def _files() -> tuple[d.FileDescriptorProto, ...]:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "protos")
        names = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
        command = (sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"--descriptor_set_out={made}")
        subprocess.run([*command, "--include_source_info", *names], check=True)
        found = d.FileDescriptorSet.FromString(made.read_bytes())
    return tuple(sorted(found.file, key=lambda file: file.name))


@cache
def comments(file: str) -> dict[str, str]:
    """The comment of everything in a file, by full name; the file's own is that of its package.

    Raises:
        Untold: Something has none.
    """
    found = next(known for known in _files() if known.name == file)
    told = {tuple(place.path): place.leading_comments for place in found.source_code_info.location}
    names = {(2,): found.package, **dict(_named(found))}
    for path, name in names.items():
        if not told.get(path, "").strip():
            raise Untold(f"{name} in {file} has no comment")
    return {name: _paragraphs(told[path]) for path, name in names.items()}


def _paragraphs(comment: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in comment.split("\n\n"))


def _named(file: d.FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Paths as in descriptor.proto: 4 messages, 5 enums, 6 services, 7 extensions of a file."""
    for number, message in enumerate(file.message_type):
        yield from _message((4, number), f"{file.package}.{message.name}", message)
    for number, enum in enumerate(file.enum_type):
        yield from _enum((5, number), f"{file.package}.{enum.name}", enum)
    for number, service in enumerate(file.service):
        name = f"{file.package}.{service.name}"
        yield (6, number), name
        yield from (((6, number, 2, at), f"{name}.{method.name}") for at, method in enumerate(service.method))
    yield from (((7, number), f"{file.package}.{field.name}") for number, field in enumerate(file.extension))


def _message(
    path: tuple[int, ...], name: str, message: d.DescriptorProto
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    yield from (((*path, 2, at), f"{name}.{field.name}") for at, field in enumerate(message.field))
    for number, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message((*path, 3, number), f"{name}.{nested.name}", nested)
    for number, enum in enumerate(message.enum_type):
        yield from _enum((*path, 4, number), f"{name}.{enum.name}", enum)


def _enum(
    path: tuple[int, ...], name: str, enum: d.EnumDescriptorProto
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    # The full name of a value stands beside its enum, not below it.
    around = name.rpartition(".")[0]
    yield from (((*path, 2, at), f"{around}.{value.name}") for at, value in enumerate(enum.value))


def all_packages() -> str:
    """One section for each package."""
    return "\n".join(_page(file) for file in _files())


def _page(file: d.FileDescriptorProto) -> str:
    told = comments(file.name)
    parts = [f"## {file.package}", "", f"`{file.name}`", ""]
    # The comment of a package may stand over `package`; the reader of the page wants it first.
    parts += [told[file.package], ""]
    for service in file.service:
        parts += _service(f"{file.package}.{service.name}", service, told)
    for message in file.message_type:
        parts += _fields(f"{file.package}.{message.name}", message, told)
    for enum in file.enum_type:
        parts += _values(f"{file.package}.{enum.name}", enum, told)
    if file.extension:
        rows = [
            (f"`{field.name}`", _type(field), f"`{field.extendee[1:]}`", told[f"{file.package}.{field.name}"])
            for field in file.extension
        ]
        parts += ["### Options", "", table(("option", "type", "of", ""), rows)]
    return "\n".join(parts)


def _service(name: str, service: d.ServiceDescriptorProto, told: dict[str, str]) -> list[str]:
    rows = []
    for method in service.method:
        asked = f"{'stream ' * method.client_streaming}{_short(method.input_type)}"
        answer = f"{'stream ' * method.server_streaming}{_short(method.output_type)}"
        charge = method.options.Extensions[charge_pb2.method_charge]
        text = told[f"{name}.{method.name}"]
        rows.append((f"`{method.name}`", f"{asked} → {answer}", text, _charge(charge)))
    return [f"### {service.name}", "", told[name], "", table(("method", "messages", "", "charge"), rows)]


def _charge(charge: charge_pb2.MethodCharge) -> str:
    """All options that are set, so that one which comes later is shown without a change here."""
    set_ = [
        f"{field.name.replace('_', ' ')} {value:,}"
        for field, value in charge.ListFields()
        if field.name != "policy" and isinstance(value, int)
    ]
    policy = charge_pb2.Policy.Name(charge.policy).removeprefix("POLICY_").lower()
    return "-" if policy == "unspecified" else ", ".join([policy, *set_])


def _fields(name: str, message: d.DescriptorProto, told: dict[str, str]) -> list[str]:
    parts = [f"### {name.rpartition('.')[2]}", "", told[name], ""]
    rows = []
    for field in message.field:
        text = told[f"{name}.{field.name}"]
        charge = field.options.Extensions[charge_pb2.field_charge]
        if charge.payable:
            when = charge_pb2.Payable.Name(charge.payable).removeprefix("PAYABLE_").lower()
            cap = f", capped by `{charge.cap_field}` of the request" if charge.cap_field else ""
            text += f" **Charged, payable when: {when}{cap}.**"
        rows.append((str(field.number), f"`{field.name}`", _type(field), text))
    parts += [table(("number", "field", "type", ""), rows) if rows else "It has no fields.", ""]
    for nested in message.nested_type:
        if not nested.options.map_entry:
            parts += _fields(f"{name}.{nested.name}", nested, told)
    for enum in message.enum_type:
        parts += _values(f"{name}.{enum.name}", enum, told)
    return parts


def _values(name: str, enum: d.EnumDescriptorProto, told: dict[str, str]) -> list[str]:
    around = name.rpartition(".")[0]
    rows = [(str(value.number), f"`{value.name}`", told[f"{around}.{value.name}"]) for value in enum.value]
    return [f"### {enum.name}", "", told[name], "", table(("number", "value", ""), rows)]


def _type(field: d.FieldDescriptorProto) -> str:
    if field.type_name:
        kind = _short(field.type_name)
    else:
        kind = d.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    many = field.label == d.FieldDescriptorProto.LABEL_REPEATED
    return f"repeated {kind}" if many else f"optional {kind}" if field.proto3_optional else kind


def _short(name: str) -> str:
    return f"`{name.rpartition('.')[2]}`"
