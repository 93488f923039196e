"""What a person or a script sees when a command fails: one line, and a stable exit code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Final

from btt.sdk import errors
from btt.sdk.cli.render import rejections
from btt.sdk.errors import BttError

FAILED: Final = 1
CONFIG: Final = 3
UNREACHABLE: Final = 4
PAYMENT: Final = 5
NOT_FOUND: Final = 6

_CODES: Final[tuple[tuple[type[BttError], int], ...]] = (
    (errors.ConfigError, CONFIG),
    (errors.TransportError, UNREACHABLE),
    (errors.LedgerUnreachable, UNREACHABLE),
    (errors.PaymentError, PAYMENT),
    (errors.InsufficientFunds, PAYMENT),
    # A wallet that never received anything has no account: to its owner that is a lack of funds.
    (errors.AccountUnknown, PAYMENT),
    (errors.ChannelExhausted, PAYMENT),
    (errors.ContentUnknown, NOT_FOUND),
    (errors.ChannelUnknown, NOT_FOUND),
    (errors.NoProviders, NOT_FOUND),
)


def exit_code(error: BttError) -> int:
    """Returns the exit code for an error; the classes not named here give 1."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)


def reason(error: BttError | type[BttError]) -> str:
    """Returns the name of an error for scripts: its reason on the wire, or one made of its class."""
    name = (error if isinstance(error, type) else type(error)).__name__.removesuffix("Error")
    return error.reason or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()


def report(error: BttError, *, as_json: bool, more: Mapping[str, object] | None = None) -> int:
    """Tells a person on standard error what happened, and a script on standard output.

    Args:
        error: What ended the command.
        as_json: Also print `{"error": {"reason", "message", "hint"}}` on standard output.
        more: What a script learns besides.

    Returns:
        The exit code.
    """
    lines = [f"error: {error}", *getattr(error, "__notes__", ())]
    nodes = error.rejections if isinstance(error, errors.NoProviders) else ()
    lines += [f"  {each.node} is {each.cause}: {each.detail}" for each in nodes]
    sys.stderr.write("".join(f"{_printable(line)}\n" for line in lines))
    if as_json:
        found: dict[str, object] = {
            "reason": reason(error),
            "message": error.message,
            "hint": error.hint,
            **(more or {}),
        }
        if isinstance(error, errors.NoProviders):
            found |= {"counts": error.counts, "rejections": rejections(error.rejections)}
        sys.stdout.write(json.dumps({"error": found}) + "\n")
    return exit_code(error)


def _printable(text: str) -> str:
    # Parts of the text may come from the other side; a terminal must not obey them.
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
