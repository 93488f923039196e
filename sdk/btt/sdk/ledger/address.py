"""Where a ledger is and who it must be, in one line of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from btt.sdk.errors import InvalidRequest
from btt.sdk.keys import Address

_SCHEME: Final = "btt-ledger://"
_LONGEST: Final = 512
_FORM: Final = "btt-ledger://<operator address>@host:port/<ledger id>"


def tls_name(operator: Address) -> str:
    """Returns the DNS name in a ledger's certificate."""
    return f"{operator}.ledger.btt"


@dataclass(frozen=True, slots=True)
class LedgerAddress:
    """The address of a ledger.

    Args:
        operator: Address of the operator's key, which signs everything the ledger says.
        host: DNS name or IP address.
        port: TCP port.
        ledger_id: 32 bytes; part of everything that is signed for the ledger.

    Raises:
        InvalidRequest: A field is out of range.
    """

    operator: Address
    host: str
    port: int
    ledger_id: bytes

    def __post_init__(self) -> None:
        if len(self.ledger_id) != 32:
            raise InvalidRequest("A ledger id is 32 bytes.")
        if not 0 < self.port < 65536:
            raise InvalidRequest(f"{self.port} is not a port.")
        if not self.host or not self.host.isascii() or any(c in "@/[] " for c in self.host):
            raise InvalidRequest("The ledger's host is not a name or an IP address.")

    @classmethod
    def parse(cls, text: str) -> LedgerAddress:
        """Reads `btt-ledger://T...@host:port/<64 hex digits>`; IPv6 hosts stand in brackets.

        Raises:
            InvalidRequest: It is no such address.
        """
        refused = InvalidRequest(f'"{text[:200]}" is no ledger address: write {_FORM}.')
        rest = text.strip()
        if len(rest) > _LONGEST or not rest.startswith(_SCHEME):
            raise refused
        operator, at, rest = rest.removeprefix(_SCHEME).partition("@")
        place, slash, ledger_id = rest.partition("/")
        host, colon, port = place.rpartition(":")
        if ":" in host:
            if not (host.startswith("[") and host.endswith("]")):
                raise refused
            host = host[1:-1]
        if not (at and slash and colon and port.isascii() and port.isdigit() and len(port) <= 5):
            raise refused
        try:
            if len(ledger_id) != 64:
                raise refused
            return cls(Address.parse(operator), host, int(port), bytes.fromhex(ledger_id))
        except ValueError:
            raise refused from None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{_SCHEME}{self.operator}@{host}:{self.port}/{self.ledger_id.hex()}"
