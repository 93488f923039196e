"""A transfer as a line of text: what another process needs to go on with it.

What arrived is on disk, and says itself what is missing; so a token holds only which content, which
files come first, the price that was agreed, and which nodes had it. It is no secret, except that it
tells what is fetched, and no permission: it makes nobody dial or pay, and a budget still bounds it.
"""

from __future__ import annotations

import binascii
import hashlib
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from typing import Final

from btt.sdk.errors import InvalidRequest
from btt.sdk.identity import NodeAddress
from btt.sdk.money import Rate, Unit
from btt.sdk.selection import DEFAULT_POLICIES, Policy, max_price

FAMILY: Final = "btt-resume"
VERSION: Final = "1"
MOST_CHARS: Final = 8192
MOST_NODES: Final = 16
MOST_FIRST: Final = 256
_HEAD: Final = struct.Struct(">32sQQH")
_CHECK: Final = 4


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """What a transfer needs to go on; `str` is what to keep.

    Attributes:
        infohash: 32 bytes.
        first: Indices of files to fetch before the others.
        rate: The highest price that was agreed.
        nodes: Those that had the content, by identity.
    """

    infohash: bytes
    first: tuple[int, ...]
    rate: Rate
    nodes: tuple[NodeAddress, ...]

    @classmethod
    def parse(cls, text: str) -> ResumeToken:
        """Reads a token, which may come from anybody.

        Raises:
            InvalidRequest: It is none, is damaged, or is of another version.
        """
        family, _, rest = text.strip().partition(".")
        if family.removeprefix(FAMILY) != VERSION and family.startswith(FAMILY) and len(family) < 32:
            raise InvalidRequest(
                "This token is of another version.",
                hint="Fetch the content by its infohash: it resumes, too.",
            )
        if family != FAMILY + VERSION or len(text) > MOST_CHARS:
            raise InvalidRequest(f"This is no token: one begins with {FAMILY}{VERSION}.")
        try:
            body = urlsafe_b64decode(rest + "=" * (-len(rest) % 4))
            payload = body[:-_CHECK]
            infohash, amount, per, count = _HEAD.unpack_from(payload)
            first = struct.unpack_from(f">{count}I", payload, _HEAD.size)
            names = payload[_HEAD.size + 4 * count :].decode().split(",")
            token = cls(infohash, first, Rate(amount, per, Unit.BYTE), tuple(map(NodeAddress.parse, names)))
        except (ValueError, struct.error, binascii.Error, InvalidRequest):
            raise InvalidRequest("The token is damaged.", hint="Copy all of it.") from None
        # Written again it is the same, check and all, or somebody changed it.
        is_plain = all(node.node and node.host.isprintable() for node in token.nodes)
        if str(token) != text.strip() or not is_plain or len(names) > MOST_NODES or count > MOST_FIRST:
            raise InvalidRequest("The token is damaged.", hint="Copy all of it.")
        return token

    def __str__(self) -> str:
        head = _HEAD.pack(self.infohash, self.rate.amount, self.rate.per, len(self.first))
        names = ",".join(map(str, self.nodes)).encode()
        payload = head + struct.pack(f">{len(self.first)}I", *self.first) + names
        body = payload + hashlib.sha256(payload).digest()[:_CHECK]
        return f"{FAMILY}{VERSION}.{urlsafe_b64encode(body).decode('ascii').rstrip('=')}"

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Which nodes may go on: as always, and none that asks more than was agreed."""
        return (max_price(self.rate), *DEFAULT_POLICIES)
