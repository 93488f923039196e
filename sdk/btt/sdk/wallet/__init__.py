"""The wallet: an encrypted keystore file, its BIP-39 words, and the keys derived from them."""

from __future__ import annotations

from btt.sdk.wallet.channel_key import derive_channel_key
from btt.sdk.wallet.keystore import Keystore

__all__ = ["Keystore", "derive_channel_key"]
