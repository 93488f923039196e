"""Reads from the proto what a method costs, once, for the interceptors of both sides.

Whatever does not say how it is charged is refused when it is registered: a method
without a policy, a charged field without a mode, an integer in a response (a bill by
the provider) without a cap, a charge that cannot be counted for certain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from btt.proto.common.v1 import charge_pb2
from btt.sdk.channel.prices import Line
from btt.sdk.errors import ConfigError
from btt.sdk.money import Unit

FREE_METHODS: Final = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
"""Methods of the platform that carry no options of ours."""
FREE_BYTES: Final = 1 << 20
FREE_CALLS_PER_MINUTE: Final = 600

_INTEGERS: Final = {
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_FIXED32,
    FieldDescriptor.TYPE_FIXED64,
}

Count = Callable[[Any], int]


@dataclass(frozen=True, slots=True)
class FieldCharge:
    """One charged field of a message.

    Attributes:
        line: What is counted.
        payable: A btt.proto.common.v1.Payable.
        count: Returns the units of one message.
        cap: Returns the caller's cap on their sum from its request; None for bytes.
        number: Field number of single bytes that stand in the message itself, else 0.
    """

    line: Line
    payable: int
    count: Count
    cap: Count | None
    number: int = 0


@dataclass(frozen=True, slots=True)
class MethodCharge:
    """What a method costs.

    Attributes:
        path: "/package.Service/Method".
        free: Nothing is charged, within the two bounds that follow.
        free_bytes: Most bytes of responses of one call.
        free_calls_per_minute: Most calls a minute from one network.
        largest_message: Most units that one response may carry.
        fields: Charged fields of the response.
        verified: Units become payable when the caller's verifier accepts the message.
    """

    path: str
    free: bool
    free_bytes: int
    free_calls_per_minute: int
    largest_message: int
    fields: tuple[FieldCharge, ...]
    verified: bool

    def units(self, message: Message) -> list[tuple[Line, int]]:
        """Returns the units of a response, per line, without those at 0."""
        if len(self.fields) == 1:
            field = self.fields[0]
            units = field.count(message)
            return [(field.line, units)] if units else []
        return self._sums(message)

    def units_sent(self, message: Message, wire: bytes) -> list[tuple[Line, int]]:
        """Returns the same as `units`, and spares the copy that reading a bytes field makes.

        Args:
            message: A response.
            wire: The same, as we have serialised it.
        """
        if len(self.fields) == 1 and self.fields[0].number:
            units = _length_on_wire(wire, self.fields[0].number)
            return [(self.fields[0].line, units)] if units else []
        return self.units(message)

    def _sums(self, message: Message) -> list[tuple[Line, int]]:
        sums: dict[Line, int] = {}
        for field in self.fields:
            sums[field.line] = sums.get(field.line, 0) + field.count(message)
        return [(line, units) for line, units in sums.items() if units]


@lru_cache(maxsize=4096)
def method_charge(path: str) -> MethodCharge:
    """Returns the charge of a method whose proto is loaded.

    Args:
        path: "/package.Service/Method".

    Raises:
        ConfigError: The method is unknown, or its options are missing or wrong.
    """
    if path in FREE_METHODS:
        return MethodCharge(path, True, FREE_BYTES, FREE_CALLS_PER_MINUTE, 0, (), False)
    service, _, name = path.removeprefix("/").rpartition("/")
    try:
        descriptor = descriptor_pool.Default().FindServiceByName(service)
        method = descriptor.methods_by_name[name]
    except KeyError:
        raise ConfigError(f"{path} is in no loaded proto.") from None
    return read_charge(method)


def read_charge(method: MethodDescriptor) -> MethodCharge:
    """Reads and checks the options of one method.

    Raises:
        ConfigError: Naming the method or field and what is wrong with it.
    """
    service = method.containing_service.full_name
    path = f"/{service}/{method.name}"
    options = method.GetOptions().Extensions[charge_pb2.method_charge]
    requests = _charged(method.input_type, service, ())
    responses = _charged(method.output_type, service, ())
    if options.policy == charge_pb2.POLICY_FREE:
        if requests or responses:
            raise ConfigError(f"{path} is FREE but has a charged field.")
        if not options.free_bytes or not options.free_calls_per_minute:
            raise ConfigError(f"{path} is FREE without bounds: set free_bytes and free_calls_per_minute.")
        return MethodCharge(path, True, options.free_bytes, options.free_calls_per_minute, 0, (), False)
    if options.policy != charge_pb2.POLICY_METERED:
        raise ConfigError(f"{path} does not say what it costs: set method_charge.")
    if requests:
        raise ConfigError(f"{path} charges a field of its request, which this version cannot meter.")
    if not responses:
        raise ConfigError(f"{path} is METERED but has no charged field.")
    if not options.largest_message:
        raise ConfigError(f"{path} does not bound its messages: set largest_message.")
    if len({field.payable for _, field in responses}) > 1:
        raise ConfigError(f"{path} mixes two modes in one response.")
    fields = []
    for descriptor, field in responses:
        if field.payable == charge_pb2.PAYABLE_ACKED:
            raise ConfigError(f"{path} cannot charge a response as ACKED.")
        if field.line.unit is Unit.COUNT:
            name = descriptor.GetOptions().Extensions[charge_pb2.field_charge].cap_field
            cap = method.input_type.fields_by_name.get(name)
            if cap is None or cap.type not in _INTEGERS or _repeated(cap):
                raise ConfigError(
                    f"{descriptor.full_name} is a bill by the provider: name an unsigned field of "
                    f"{method.input_type.full_name} in cap_field."
                )
            field = FieldCharge(field.line, field.payable, field.count, _value_of(name))
        fields.append(field)
    return MethodCharge(
        path=path,
        free=False,
        free_bytes=0,
        free_calls_per_minute=0,
        largest_message=options.largest_message,
        fields=tuple(fields),
        verified=fields[0].payable == charge_pb2.PAYABLE_VERIFIED,
    )


def _charged(
    message: Descriptor, service: str, above: tuple[str, ...]
) -> list[tuple[FieldDescriptor, FieldCharge]]:
    """Finds charged fields at any depth; those that cannot be counted for certain are refused."""
    found: list[tuple[FieldDescriptor, FieldCharge]] = []
    for field in message.fields:
        charge = field.GetOptions().Extensions[charge_pb2.field_charge]
        if field.GetOptions().HasExtension(charge_pb2.field_charge):
            found.append((field, _field_charge(field, charge, service)))
        elif field.message_type is not None:
            if field.message_type.full_name in (*above, message.full_name):
                continue  # a recursive type: looked at where it first stands
            inside = _charged(field.message_type, service, (*above, message.full_name))
            if inside and (field.message_type.GetOptions().map_entry or _recursive(field.message_type)):
                raise ConfigError(f"{field.full_name} holds a charged field in a map or a recursive type.")
            found += [
                (descriptor, FieldCharge(c.line, c.payable, _within(field, c.count), c.cap))
                for descriptor, c in inside
            ]
    if found and not above and _recursive(message):
        raise ConfigError(f"{message.full_name} is charged and recursive: its depth cannot be counted.")
    return found


def _field_charge(field: FieldDescriptor, charge: charge_pb2.FieldCharge, service: str) -> FieldCharge:
    if charge.payable == charge_pb2.PAYABLE_UNSPECIFIED:
        raise ConfigError(f"{field.full_name} does not say when it becomes payable.")
    name = field.name
    if field.type == FieldDescriptor.TYPE_BYTES:
        count: Count = _length_sum(name) if _repeated(field) else _length_of(name)
        number = 0 if _repeated(field) else field.number
        return FieldCharge(Line(service, Unit.BYTE), charge.payable, count, None, number)
    if field.type in _INTEGERS and not _repeated(field):
        return FieldCharge(Line(service, Unit.COUNT), charge.payable, _value_of(name), None)
    raise ConfigError(f"{field.full_name} cannot be charged: only bytes and single unsigned integers can.")


def _repeated(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)


def _recursive(message: Descriptor) -> bool:
    todo, seen = [message], set()
    while todo:
        for field in todo.pop().fields:
            inner = field.message_type
            if inner is None:
                continue
            if inner.full_name == message.full_name:
                return True
            if inner.full_name not in seen:
                seen.add(inner.full_name)
                todo.append(inner)
    return False


def _length_of(name: str) -> Count:
    return lambda message: len(getattr(message, name))


def _length_sum(name: str) -> Count:
    return lambda message: sum(map(len, getattr(message, name)))


def _value_of(name: str) -> Count:
    return lambda message: getattr(message, name)


def _within(field: FieldDescriptor, count: Count) -> Count:
    name = field.name
    if _repeated(field):
        return lambda message: sum(map(count, getattr(message, name)))
    return lambda message: count(getattr(message, name)) if message.HasField(name) else 0


def _length_on_wire(wire: bytes, number: int) -> int:
    """Returns the length of a bytes field of a message that was serialised here."""
    at = length = 0
    while at < len(wire):
        tag, at = _varint(wire, at)
        match tag & 7:
            case 0:
                _, at = _varint(wire, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(wire, at)
                at += size
                if tag >> 3 == number:
                    length = size
            case 5:
                at += 4
            case kind:
                raise ValueError(f"wire type {kind} is in no message of ours")
    return length


def _varint(wire: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while wire[at] >= 0x80:
        value |= (wire[at] & 0x7F) << shift
        at += 1
        shift += 7
    return value | wire[at] << shift, at + 1
