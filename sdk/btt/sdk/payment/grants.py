"""A grant: one channel, with the key that pays from it and is good for nothing else.

Who has it needs no wallet. Its key, K1, is made for this grant and is not derived from the
account: the wallet that granted it cannot sign on the channel, now or after it was restored from
its words, so two signers never contradict each other. T1 names the key, and with it the signer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.sdk.errors import ConfigError, InvalidRequest, StorageError
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress
from btt.sdk.money import Amount
from btt.sdk.payment.store import OPEN, PayerStore, StoredChannel
from btt.sdk.private_file import write_new
from btt.sdk.signing import ChannelCommit, service_reference

VERSION: Final = 1
_FIELDS: Final = {"btt_grant", "ledger", "node", "commit", "channel_key", "app_grant"}
_LARGEST_FILE: Final = 16 * 2**10


def books_beside(path: Path) -> Path:
    """Returns the folder where the books of a grant are kept, unless somebody says otherwise."""
    return path.with_name(f"{path.name}.books")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a dApp may spend without a wallet: make one with `btt wallet grant`, read it with `open`.

    Attributes:
        folder: Where whoever uses it keeps the books of the channel.
        ledger: Where the channel is.
        node: The only node that it pays.
        commit: T1.
        key: K1. Whoever has it can pay the node what the channel holds.
        app: The application's grant to K1; None if it has none.
    """

    folder: Path
    ledger: LedgerAddress
    node: NodeAddress
    commit: ChannelCommit
    key: PrivateKey
    app: SignedDocument | None = None

    @classmethod
    def open(cls, path: Path | str, *, folder: Path | None = None) -> Grant:
        """Reads a grant.

        Args:
            path: Of the file.
            folder: Where the books are kept; beside the file, with `.books` added, if not given.
                Programs that share a grant share its books.

        Raises:
            ConfigError: There is no such file, or it is no grant.
            StorageError: It could not be read.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(_LARGEST_FILE + 1)
        except FileNotFoundError:
            raise ConfigError(
                f"There is no grant at {path}.", hint="Its user makes one: btt wallet grant."
            ) from None
        except OSError as error:
            raise StorageError(f"The grant {path} cannot be read: {error.strerror}.") from error
        try:
            found = json.loads(data) if len(data) <= _LARGEST_FILE else None
            if not isinstance(found, dict) or found.keys() != _FIELDS or found["btt_grant"] != VERSION:
                raise InvalidRequest("These are not the fields of a grant.")
            return cls(folder or books_beside(path), **_read(found))
        except (ValueError, TypeError, AttributeError, RecursionError, DecodeError, InvalidRequest):
            raise ConfigError(
                f"{path} is no grant, or was altered.", hint="Ask its user for a new one: btt wallet grant."
            ) from None

    def write(self, path: Path) -> None:
        """Writes it to a new file that only its owner can read.

        Raises:
            ConfigError: There is such a file.
            StorageError: It could not be written; none is left behind.
        """
        found = {
            "btt_grant": VERSION,
            "ledger": str(self.ledger),
            "node": str(self.node),
            "commit": self.commit.encode().hex(),
            "channel_key": self.key.secret.hex(),
            "app_grant": self.app.SerializeToString().hex() if self.app else None,
        }
        write_new(path, json.dumps(found, indent=2).encode() + b"\n", what="The grant")

    @property
    def channel_id(self) -> bytes:
        """Of its channel, 32 bytes."""
        return self.commit.channel_id(self.ledger.ledger_id)

    @property
    def amount(self) -> Amount:
        """What T1 locks, and so the most that can be spent."""
        return Amount(self.commit.amount)

    @property
    def expires_ms(self) -> int:
        """Lock time of the channel, Unix milliseconds; sessions end some minutes before."""
        return self.commit.expires_ms

    def begin_books(self, store: PayerStore) -> None:
        """Writes its channel into books that do not have it yet."""
        if store.find(self.channel_id) is None:
            assert self.node.node is not None, "checked when it was read"
            store.add_channel(
                StoredChannel(
                    channel_id=self.channel_id,
                    ledger_id=self.ledger.ledger_id,
                    node=self.node.node,
                    commit=self.commit.encode(),
                    refund_signature=b"",  # the account's business
                    deposit=self.commit.amount,
                    expires_ms=self.expires_ms,
                    signed=0,
                    budget="",
                    base=0,
                    cap=0,
                    state=OPEN,
                ),
                0,
            )


def _read(found: dict[str, Any]) -> dict[str, Any]:
    node, commit = NodeAddress.parse(found["node"]), ChannelCommit.decode(bytes.fromhex(found["commit"]))
    key = PrivateKey(bytes.fromhex(found["channel_key"]))
    app = found["app_grant"]
    if key.public != commit.k1:
        raise InvalidRequest("The key is not K1 of the channel.")
    if node.node is None or service_reference(node.node) != commit.service_ref:
        raise InvalidRequest("The channel is for another node.")
    return {
        "ledger": LedgerAddress.parse(found["ledger"]),
        "node": node,
        "commit": commit,
        "key": key,
        "app": SignedDocument.FromString(bytes.fromhex(app)) if app is not None else None,
    }
