"""How values of the configuration are written: durations, speeds, amounts, addresses to listen on."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator

from btt.sdk.clock import LONGEST_MS, parse_duration
from btt.sdk.errors import InvalidRequest
from btt.sdk.money import Amount


def parse_amount(text: object) -> Amount:
    """Reads "0.5 BTT".

    Raises:
        ValueError: It is no amount.
    """
    if isinstance(text, Amount):
        return text
    if not isinstance(text, str):
        raise ValueError('write an amount like "0.5 BTT", in quotes')  # noqa: TRY004 - pydantic wants it
    return Amount.parse(text)


def parsed(parse: Callable[[str], Any]) -> Callable[[object], Any]:
    """Makes a reader of text out of one that raises our errors."""

    def read(text: object) -> Any:
        if not isinstance(text, str):
            raise ValueError("write it in quotes")  # noqa: TRY004
        try:
            return parse(text)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None

    return read


def parse_listen(text: str) -> tuple[str, int]:
    """Reads "host:port"; IPv6 hosts stand in brackets, port 0 takes a free one.

    Raises:
        ValueError: It is no such thing.
    """
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not colon
        or not bare
        or (":" in bare and not host.startswith("["))
        or not _is_host(bare)
        or not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 65536)
    ):
        raise ValueError('write it like "0.0.0.0:7800"')
    return bare, int(port)


_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def _is_host(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return len(text) < 254 and _NAME.fullmatch(text) is not None
    return True


def host_text(text: str) -> str:
    """Checks a host name or an IP address, and leaves it as it is.

    Raises:
        ValueError: It is neither.
    """
    if not _is_host(text):
        raise ValueError('write a host name or an IP address, without a port, like "node.example.org"')
    return text


def at_most_a_century(milliseconds: int) -> int:
    """Checks a duration: longer ones do not fit into what is signed, or into a timer.

    Raises:
        ValueError: It is longer.
    """
    if milliseconds > LONGEST_MS:
        raise ValueError("a century is the longest")
    return milliseconds


def parse_list(text: object) -> object:
    """Reads a list that stands in the environment as it does in the file; leaves all else as it is."""
    try:
        return tomllib.loads(f"list = {text}")["list"] if isinstance(text, str) else text
    except tomllib.TOMLDecodeError:
        return text


def listen_text(text: object) -> str:
    """Checks "host:port", and leaves it as it is.

    Raises:
        ValueError: It is no such thing.
    """
    if not isinstance(text, str):
        raise ValueError('write it like "0.0.0.0:7800", in quotes')  # noqa: TRY004
    parse_listen(text)
    return text


def is_everywhere(listen: str) -> bool:
    """Whether it stands for all addresses of the machine, so that others need to be told one."""
    return parse_listen(listen)[0] in ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


_RATE = re.compile(r"([0-9]{1,9})\s*(B|KiB|MiB|GiB)/s")
_SIZE = re.compile(r"([0-9]{1,9})\s*(B|KiB|MiB|GiB|TiB)")
_SIZES: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_speed(text: object) -> int:
    """Reads a limit such as "20 MiB/s"; "" is none.

    Returns:
        Bytes a second; 0 for no limit.

    Raises:
        ValueError: It is no speed.
    """
    if text == "":
        return 0
    match = _RATE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or not int(match.group(1)):
        raise ValueError('write a speed like "500 KiB/s" or "20 MiB/s", or "" for no limit')
    return int(match.group(1)) * _SIZES[match.group(2)]


def parse_size(text: object) -> int:
    """Reads what may be kept, such as "200 GiB"; "" is nothing.

    Returns:
        Bytes.

    Raises:
        ValueError: It is no size.
    """
    if text == "":
        return 0
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ValueError('write a size like "500 MiB" or "2 TiB", or "" for nothing')
    return int(match.group(1)) * _SIZES[match.group(2)]


def speed_text(rate: int) -> str:
    """Writes bytes a second as they are read."""
    if not rate:
        return ""
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "B") if rate % _SIZES[unit] == 0)
    return f"{rate // _SIZES[unit]} {unit}/s"


def size_text(size: int) -> str:
    """Writes bytes as they are read."""
    unit = next(unit for unit in ("TiB", "GiB", "MiB", "KiB", "B") if size % _SIZES[unit] == 0)
    return f"{size // _SIZES[unit]} {unit}" if size else ""


Money = Annotated[Amount, BeforeValidator(parse_amount)]
Milliseconds = Annotated[int, BeforeValidator(parse_duration), AfterValidator(at_most_a_century)]
Speed = Annotated[int, BeforeValidator(parse_speed)]
Size = Annotated[int, BeforeValidator(parse_size)]
Host = Annotated[str, AfterValidator(lambda text: text and host_text(text))]
