"""The errors: what happened, what to do, and whether trying again can help."""

from __future__ import annotations

from btt.proto.common.v1 import error_pb2
from btt.sdk.cli.failures import exit_code, reason
from btt.sdk.errors import BY_REASON, BttError
from reference.protos import comments
from reference.text import Untold, entries, summary, table


def all_errors() -> str:
    """One section for each class, in the order of the tree."""
    return "\n".join(section(cls, 2) for cls in BttError.__subclasses__())


def section(cls: type[BttError], depth: int) -> str:
    """The section of a class, and those below it.

    Raises:
        Untold: It does not say what happened, or what to do.
    """
    below = cls.__subclasses__()
    happened, _, advice = summary(cls, f"the error {cls.__name__}").partition("\n\n")
    todo = cls.hint or advice
    # What only groups others is caught, never raised; its members say what to do.
    if not todo and not below:
        raise Untold(
            f"the error {cls.__name__} does not say what to do: give it a hint or a second paragraph"
        )
    lines = [f"{'#' * depth} {cls.__name__}", "", happened, ""]
    lines += [f"- What to do: {' '.join(todo.split())}"] if todo else []
    lines += [f"- Trying again as is can help: {'yes' if cls.retryable else 'no'}"]
    lines += [f"- On the wire: `{cls.reason}`"] if cls.reason else []
    lines += [f"- With `--json`: `{reason(cls)}`"] if not cls.reason else []
    # An error is made without __init__: only its class decides the code.
    lines += [f"- Exit code of a command: {exit_code(cls.__new__(cls))}"]
    lines += [f"- `{name}`: {text}" for name, text in entries(cls, "Args").items() if name not in _COMMON]
    return "\n".join([*lines, ""]) + "".join("\n" + section(sub, min(depth + 1, 4)) for sub in below)


_COMMON = ("message", "hint")


def all_reasons() -> str:
    """The closed list of the wire, each with its class."""
    told = comments(error_pb2.DESCRIPTOR.name)
    rows = []
    for value in error_pb2.Reason.DESCRIPTOR.values:
        if value.number == 0:
            continue
        reason = value.name.removeprefix("REASON_")
        cls = BY_REASON.get(reason)
        if cls is None:
            raise Untold(f"no class of btt.sdk.errors has the reason {reason}")
        text = told[f"{error_pb2.DESCRIPTOR.package}.{value.name}"]
        rows.append((str(value.number), f"`{reason}`", text, f"[{cls.__name__}](#{cls.__name__.lower()})"))
    return table(("number", "reason", "what it says", "class"), rows)
