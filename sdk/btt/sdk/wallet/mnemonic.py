"""BIP-39 words and the account keys they stand for: m/44'/195'/0'/0/index, as TRON wallets do.

bip_utils does the work; it is imported late, since most commands never derive a key.
"""

from __future__ import annotations

from typing import Any, Final

from btt.sdk.errors import ConfigError
from btt.sdk.keys import PrivateKey

PATH: Final = "m/44'/195'/0'/0"
"""BIP-44 with TRON's coin type; the index of the account follows."""
MAX_INDEX: Final = 2**31 - 1


def _bip_utils() -> Any:
    import bip_utils  # type: ignore[import-untyped]

    return bip_utils


def new_words() -> str:
    """Makes twelve English words from the system's randomness (128 bits)."""
    bip = _bip_utils()
    generator = bip.Bip39MnemonicGenerator(bip.Bip39Languages.ENGLISH)
    return str(generator.FromWordsNumber(bip.Bip39WordsNum.WORDS_NUM_12))


def check_words(words: str) -> str:
    """Checks a phrase and returns it in lower case with single spaces.

    Args:
        words: 12, 15, 18, 21 or 24 English words.

    Raises:
        ConfigError: A word is unknown or the checksum is wrong; the text does not repeat the words.
    """
    bip = _bip_utils()
    phrase = " ".join(words.lower().split())
    if not bip.Bip39MnemonicValidator(bip.Bip39Languages.ENGLISH).IsValid(phrase):
        raise ConfigError(
            "These are not the words of a wallet.",
            hint="Check the spelling and the order of all 12 to 24 words.",
        )
    return phrase


def account_key(words: str, index: int = 0) -> PrivateKey:
    """Derives the key of an account.

    Args:
        words: As `check_words` returns them; no BIP-39 passphrase is used.
        index: Number of the account, 0 to MAX_INDEX.

    Raises:
        ConfigError: The index is out of range.
    """
    bip = _bip_utils()
    if not 0 <= index <= MAX_INDEX:
        raise ConfigError(f"A wallet has accounts 0 to {MAX_INDEX}, not {index}.")
    seed = bip.Bip39SeedGenerator(words, bip.Bip39Languages.ENGLISH).Generate()
    node = bip.Bip32Slip10Secp256k1.FromSeed(seed).DerivePath(f"{PATH}/{index}")
    return PrivateKey(node.PrivateKey().Raw().ToBytes())
