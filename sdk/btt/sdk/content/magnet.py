"""How people write content down: an infohash in hex, or a magnet link with a v2 topic (BEP 9, BEP 52)."""

from __future__ import annotations

import binascii
import urllib.parse

from btt.sdk.errors import InvalidRequest

_MULTIHASH = "1220"  # SHA-256, 32 bytes
_TOPIC = "urn:btmh:"


def parse_infohash(text: str) -> bytes:
    """Reads an infohash.

    Args:
        text: 64 hex digits, the same behind the multihash prefix 1220, or
            `magnet:?xt=urn:btmh:1220...`. Other topics and parameters of the link are ignored.

    Returns:
        The 32 bytes of the v2 infohash.

    Raises:
        InvalidRequest: If there is no v2 infohash in it, or more than one.
    """
    text = text.strip()
    if not text.lower().startswith("magnet:"):
        return _digest(text)
    try:
        fields = urllib.parse.parse_qsl(urllib.parse.urlsplit(text).query, max_num_fields=1000)
    except ValueError as bad:
        raise InvalidRequest(f"The magnet link cannot be read: {bad}.") from bad
    # A link with several topics numbers them: xt.1, xt.2 (BEP 9).
    topics = [value for name, value in fields if name == "xt" or name.startswith("xt.")]
    found = {_digest(t[len(_TOPIC) :]) for t in topics if t.lower().startswith(_TOPIC)}
    if len(found) != 1:
        raise InvalidRequest(
            "The magnet link names more than one v2 infohash."
            if found
            else "The magnet link has no v2 infohash (xt=urn:btmh:1220...)."
        )
    return found.pop()


def magnet_link(infohash: bytes, *, infohash_v1: bytes | None = None, name: str = "") -> str:
    """Writes the magnet link of some content.

    Args:
        infohash: v2, 32 bytes.
        infohash_v1: 20 bytes, for clients that know no v2.
        name: What to show while the metadata is not known.
    """
    parts = [f"xt={_TOPIC}{_MULTIHASH}{infohash.hex()}"]
    if infohash_v1 is not None:
        parts.insert(0, f"xt=urn:btih:{infohash_v1.hex()}")
    if name:
        parts.append("dn=" + urllib.parse.quote(name, safe=""))
    return "magnet:?" + "&".join(parts)


def _digest(text: str) -> bytes:
    digits = text[len(_MULTIHASH) :] if len(text) == 68 and text.startswith(_MULTIHASH) else text
    if len(digits) == 40:
        raise InvalidRequest(
            "This is a v1 infohash (40 digits).", hint="Content is addressed by its v2 infohash, 64 digits."
        )
    try:
        value = binascii.unhexlify(digits)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise InvalidRequest("An infohash is 64 hex digits, or a magnet link with xt=urn:btmh:1220...")
    return value
