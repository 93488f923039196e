"""The log of a node: for people on a terminal, JSON elsewhere, and never with a secret in it.

Secrets are found by the name of a field and by what they look like: keys, seed words, tokens and
passwords of whoever wrote the line. What is public and looks like a key, such as a channel or a
digest, has a name of its own below.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Final, TextIO, cast

import structlog

from btt.node.config import LogSection
from btt.sdk.keys import PrivateKey

REDACTED: Final = "[redacted]"
_SECRET_NAME = re.compile(
    r"secret|password|passphrase|token|mnemonic|words|seed|private|proof|credential", re.I
)
_SECRET_KEY = re.compile(r"(?:^|_)(?:key|pem)$", re.IGNORECASE)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)
# 32 bytes or more in hex, without a name that says what they are, may be a key.
_HEX = re.compile(r"(?<![0-9a-fA-F])[0-9a-fA-F]{64,}(?![0-9a-fA-F])")
_PUBLIC: Final = frozenset({"channel", "digest", "infohash", "entry_hash", "ledger_id", "address"})
_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def redact(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Takes secrets out of a line; a processor of structlog, the last before it is written."""
    for name, value in event.items():
        event[name] = _clean(name, value)
    return event


def _clean(name: str, value: Any) -> Any:
    if _SECRET_NAME.search(name) or _SECRET_KEY.search(name) or isinstance(value, PrivateKey):
        return REDACTED
    if isinstance(value, bytes | bytearray | memoryview):
        return REDACTED if len(value) >= 32 and name not in _PUBLIC else bytes(value).hex()
    if isinstance(value, Mapping):
        return {str(key): _clean(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(name, inner) for inner in value]
    if isinstance(value, BaseException):
        value = repr(value)
    if isinstance(value, str):
        text = _PEM.sub(REDACTED, value)
        return text if name in _PUBLIC else _HEX.sub(_keep_addresses(text), text)
    return value


def _keep_addresses(text: str) -> Any:
    def decide(match: re.Match[str]) -> str:
        # The id of a ledger stands behind its address, and is public.
        return match.group() if text[: match.start()].endswith("/") and "btt-ledger://" in text else REDACTED

    return decide


class Level:
    """A bound that can change while a node runs."""

    def __init__(self, name: str) -> None:
        self.set(name)

    def set(self, name: str) -> None:
        """Lets through lines of this level and above: debug, info, warning or error."""
        self._least = _LEVELS[name]

    def __call__(self, _: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Drops what is below; a processor of structlog."""
        if _LEVELS.get(method.replace("exception", "error"), 50) < self._least:
            raise structlog.DropEvent
        return event


class _Dropping:
    """A stream whose disk may be full, or whose terminal gone: that a line is lost ends no work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


LEVEL: Final = Level("info")
"""Of this process."""


def configure(section: LogSection, stream: TextIO = sys.stderr) -> None:
    """Sends the log of this process to a stream; standard output carries answers alone.

    Args:
        section: Level and format.
        stream: Where it goes.
    """
    LEVEL.set(section.level)
    lines = _Dropping(stream)
    human = section.format == "human" or (section.format == "auto" and stream.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty())
        if human
        else structlog.processors.JSONRenderer()
    )
    shared: list[Any] = [
        LEVEL,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
        redact,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", lines)),
    )
    # What libraries say goes the same way.
    handler = logging.StreamHandler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared[1:], processors=[_bare, renderer])
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)


_bare = structlog.stdlib.ProcessorFormatter.remove_processors_meta
