"""Reads from the proto what a method costs, once, for the interceptors of both sides.

Whatever does not say how it is charged is refused when it is registered: a method
without a policy, a charged field without a mode, an integer in a response (a bill by
the provider) without a cap, a charge that cannot be counted for certain.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from btt.proto.common.v1 import charge_pb2
from btt.sdk.channel.prices import Line
from btt.sdk.errors import ConfigError
from btt.sdk.money import Unit
from btt.sdk.payment.charges import Count, FieldCharge, MethodCharge, fee_line

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
Found = list[tuple[FieldDescriptor, FieldCharge]]


@lru_cache(maxsize=4096)
def method_charge(path: str) -> MethodCharge:
    """Returns the charge of a method whose proto is loaded.

    Args:
        path: "/package.Service/Method".

    Raises:
        ConfigError: The method is unknown, or its options are missing or wrong.
    """
    if path in FREE_METHODS:
        return MethodCharge(
            path=path, free=True, free_bytes=FREE_BYTES, free_calls_per_minute=FREE_CALLS_PER_MINUTE
        )
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
        ConfigError: Naming the method, the field, and what is wrong with it.
    """
    service = method.containing_service.full_name
    path = f"/{service}/{method.name}"
    options = method.GetOptions().Extensions[charge_pb2.method_charge]
    try:
        requests = _charged(method.input_type, service, ())
        responses = _charged(method.output_type, service, ())
        if options.policy == charge_pb2.POLICY_FREE:
            return _free(method, path, options, charged=bool(requests or responses))
        if options.policy != charge_pb2.POLICY_METERED:
            raise ConfigError("does not say what it costs: set method_charge.")
        return _metered(method, path, options, requests, responses)
    except ConfigError as error:
        raise ConfigError(f"{path} {error.message}", hint=error.hint) from None


def _free(
    method: MethodDescriptor, path: str, options: charge_pb2.MethodCharge, *, charged: bool
) -> MethodCharge:
    if charged or options.fee:
        raise ConfigError("is FREE but has a charged field or a fee.")
    if not options.free_bytes or not options.free_calls_per_minute:
        raise ConfigError("is FREE without bounds: set free_bytes and free_calls_per_minute.")
    return MethodCharge(
        path=path,
        free=True,
        free_bytes=options.free_bytes,
        free_calls_per_minute=options.free_calls_per_minute,
        takes=method.input_type.full_name,
        streams_requests=method.client_streaming,
        streams_responses=method.server_streaming,
    )


def _metered(
    method: MethodDescriptor,
    path: str,
    options: charge_pb2.MethodCharge,
    requests: Found,
    responses: Found,
) -> MethodCharge:
    service = method.containing_service.full_name
    if not (requests or responses or options.fee):
        raise ConfigError("is METERED but has neither a charged field nor a fee.")
    if bool(responses) != bool(options.largest_message):
        raise ConfigError("must set largest_message if a field of its response is charged, and only then.")
    if bool(requests) != bool(options.largest_request):
        raise ConfigError("must set largest_request if a field of its request is charged, and only then.")
    for descriptor, field in requests:
        if field.payable != charge_pb2.PAYABLE_ACKED:
            raise ConfigError(f"cannot charge {descriptor.full_name} of its request but as ACKED.")
    modes = {field.payable for _, field in responses}
    if charge_pb2.PAYABLE_ACKED in modes:
        raise ConfigError("cannot charge a response as ACKED, which is for requests.")
    if len(modes) > 1:
        raise ConfigError("mixes two modes in one response.")
    return MethodCharge(
        path=path,
        fee=((fee_line(service), options.fee),) if options.fee else (),
        requests=tuple(field for _, field in requests),
        largest_request=options.largest_request,
        takes=method.input_type.full_name,
        streams_requests=method.client_streaming,
        streams_responses=method.server_streaming,
        fields=tuple(_capped(method, descriptor, field) for descriptor, field in responses),
        largest_message=options.largest_message,
        verified=charge_pb2.PAYABLE_VERIFIED in modes,
    )


def _capped(method: MethodDescriptor, descriptor: FieldDescriptor, field: FieldCharge) -> FieldCharge:
    if field.line.unit is Unit.BYTE:
        return field
    name = descriptor.GetOptions().Extensions[charge_pb2.field_charge].cap_field
    cap = method.input_type.fields_by_name.get(name)
    if cap is None or cap.type not in _INTEGERS or cap.is_repeated:
        raise ConfigError(
            f"takes {descriptor.full_name}, a bill by the provider: name an unsigned field of "
            f"{method.input_type.full_name} in cap_field."
        )
    return FieldCharge(field.line, field.payable, field.count, cap=_value_of(name))


def _charged(message: Descriptor, service: str, above: tuple[str, ...]) -> Found:
    """Finds charged fields at any depth; those that cannot be counted for certain are refused."""
    found: Found = []
    for field in message.fields:
        if field.GetOptions().HasExtension(charge_pb2.field_charge):
            found.append((field, _field_charge(field, service)))
        elif field.message_type is not None:
            if field.message_type.full_name in (*above, message.full_name):
                continue  # a recursive type: looked at where it first stands
            inside = _charged(field.message_type, service, (*above, message.full_name))
            if inside and field.message_type.GetOptions().map_entry:
                raise ConfigError(f"cannot count {field.full_name}: a charged field in a map.")
            if inside and _recursive(field.message_type):
                raise ConfigError(f"cannot count {field.full_name}: a charged field at any depth.")
            found += [
                (descriptor, FieldCharge(c.line, c.payable, _within(field, c.count)))
                for descriptor, c in inside
            ]
    if found and not above and _recursive(message):
        raise ConfigError(f"cannot count {message.full_name}: a charged field at any depth.")
    return found


def _field_charge(field: FieldDescriptor, service: str) -> FieldCharge:
    payable = field.GetOptions().Extensions[charge_pb2.field_charge].payable
    if payable == charge_pb2.PAYABLE_UNSPECIFIED:
        raise ConfigError(f"does not say when {field.full_name} becomes payable.")
    name = field.name
    if field.type == FieldDescriptor.TYPE_BYTES:
        if field.is_repeated:
            return FieldCharge(Line(service, Unit.BYTE), payable, _length_sum(name))
        return FieldCharge(Line(service, Unit.BYTE), payable, _length_of(name), number=field.number)
    if field.type in _INTEGERS and not field.is_repeated:
        return FieldCharge(Line(service, Unit.COUNT), payable, _value_of(name))
    raise ConfigError(f"cannot charge {field.full_name}: only bytes and single unsigned integers can be.")


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
    if field.is_repeated:
        return lambda message: sum(map(count, getattr(message, name)))
    return lambda message: count(getattr(message, name)) if message.HasField(name) else 0
