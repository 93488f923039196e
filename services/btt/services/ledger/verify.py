"""The only maker of operations: what exists as an `Operation` has had its signatures checked.

The writer takes nothing else, so an unverified request cannot move money. Cheap checks come before
ECDSA (about 30 us each with libsecp256k1); what needs the state of the books stays in `rules`.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Final

from btt.sdk.errors import InvalidRequest, SignatureInvalid, SignerMismatch
from btt.sdk.keys import PublicKey
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    Message,
    Query,
    TopUp,
    Transfer,
)
from btt.sdk.signing.layout import preimage

_SEAL: Final = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A request with verified signatures; only `Verifier` can make one.

    Args:
        digest: What was signed; it names the request in the journal, 32 bytes.
        body: The canonical body.
        signatures: What proves the body offline, for the journal; each subclass says its layout.
        signer: Key that signed the body, 33 bytes.
        seal: Held by the verifier alone.
    """

    digest: bytes
    body: bytes
    signatures: bytes
    signer: bytes
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("operations are made by the Verifier only")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOperation(Operation):
    """A transfer. Signatures: signer33, signature65."""

    source: bytes
    to: bytes
    amount: int
    request_id: bytes
    valid_until_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOperation(Operation):
    """T1 with T2; the digest is the channel id. Signatures: signer33, signature65, refund65."""

    payer: bytes
    payee: bytes
    k1: bytes
    k2: bytes
    amount: int
    expires_ms: int
    challenge_ms: int
    flags: int
    fee: int
    refund_signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseOperation(Operation):
    """The payee's close. Signatures: signer33, signature65, cumulative8, update65 (if cumulative > 0).

    `k1` is the key that signed the update; the books compare it with the channel's.
    """

    channel_id: bytes
    capture: int
    cumulative: int
    update_signature: bytes
    k1: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TopUpOperation(Operation):
    """A top-up. Signatures: signer33, signature65. `owner` is the address of the signer."""

    owner: bytes
    channel_id: bytes
    amount: int
    request_id: bytes
    valid_until_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOperation(Operation):
    """A T3 shown to the ledger by anyone who holds it. Signatures: k1 33, signature65.

    The books compare `signer` with the channel's K1.
    """

    channel_id: bytes
    cumulative: int
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCloseOperation(Operation):
    """The payer's wish to close. Signatures: signer33, signature65. `owner` is the signer's address."""

    owner: bytes
    channel_id: bytes
    request_id: bytes
    valid_until_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalizeOperation(Operation):
    """Pays out what is due; nobody signs it, and there are no signatures."""

    channel_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendOperation(Operation):
    """Ends a window later; the ledger alone makes it. Signatures: an operator key 33, signature65."""

    channel_id: bytes
    deadline_ms: int


@lru_cache(maxsize=8192)
def public_key(data: bytes) -> PublicKey:
    """Returns a key, decoded and with its address computed once for those seen often."""
    return PublicKey(data)


class Verifier:
    """Checks signed requests for one ledger, whose id is 32 bytes."""

    def __init__(self, ledger_id: bytes) -> None:
        self.ledger_id = ledger_id

    def _check(self, key: bytes, message: Message, signature: bytes, body: bytes | None = None) -> bytes:
        # `body` is what the message was decoded from, if it was.
        digest = sha256(preimage(message.TAG, self.ledger_id, body or message.encode())).digest()
        if not self._holds(key, digest, signature):
            raise SignatureInvalid(f"The {type(message).__name__} is not signed by this key for this ledger.")
        return digest

    def _holds(self, key: bytes, digest: bytes, signature: bytes) -> bool:
        return public_key(key).verify(digest, signature)

    def transfer(self, body: bytes, *, signer: bytes, signature: bytes) -> TransferOperation:
        """Verifies a transfer.

        Args:
            body: Canonical Transfer.
            signer: Public key, 33 bytes.
            signature: 65 bytes.

        Raises:
            InvalidRequest: Malformed, or a move of nothing or to itself.
            SignerMismatch: The key is not that of the sender.
            SignatureInvalid: It did not sign this.
        """
        message = Transfer.decode(body)
        if message.amount < 1:
            raise InvalidRequest("A transfer moves at least one base unit.")
        if message.sender == message.recipient:
            raise InvalidRequest("A transfer goes to another account.")
        if public_key(signer).address != message.sender:
            raise SignerMismatch("A transfer is signed by the key of the account it comes from.")
        digest = self._check(signer, message, signature, body)
        return TransferOperation(
            digest=digest,
            body=body,
            signatures=signer + signature,
            signer=signer,
            source=message.sender.data,
            to=message.recipient.data,
            amount=int(message.amount),
            request_id=message.request_id,
            valid_until_ms=message.valid_until_ms,
            seal=_SEAL,
        )

    def open_channel(
        self, body: bytes, *, signer: bytes, signature: bytes, refund_signature: bytes
    ) -> OpenOperation:
        """Verifies a T1 and the consent of K2 to it, T2.

        Args:
            body: Canonical ChannelCommit.
            signer: Public key of the payer's account, 33 bytes.
            signature: Over T1, 65 bytes.
            refund_signature: K2 over the ChannelRefund of this channel, 65 bytes.

        Raises:
            InvalidRequest: Malformed, or keys or parties that must differ do not.
            SignerMismatch: The key is not that of the payer.
            SignatureInvalid: T1 or T2 is not signed as it must be.
        """
        message = ChannelCommit.decode(body)
        if message.amount < 1:
            raise InvalidRequest("A channel locks at least one base unit.")
        if message.payer == message.payee:
            raise InvalidRequest("The payer and the payee are the same account.")
        if message.k1 == message.k2:
            raise InvalidRequest("K1 and K2 are the same key.")
        if public_key(message.k1.data).address == message.payer:
            # A dApp holds K1; the account's key could move all of its money.
            raise InvalidRequest("K1 is the payer's account key; use a key of its own.")
        if public_key(signer).address != message.payer:
            raise SignerMismatch("T1 is signed by the key of the payer's account.")
        digest = self._check(signer, message, signature, body)
        refund = ChannelRefund(channel=digest, not_before_ms=message.expires_ms)
        self._check(message.k2.data, refund, refund_signature)
        return OpenOperation(
            digest=digest,
            body=body,
            signatures=signer + signature + refund_signature,
            signer=signer,
            payer=message.payer.data,
            payee=message.payee.data,
            k1=message.k1.data,
            k2=message.k2.data,
            amount=int(message.amount),
            expires_ms=message.expires_ms,
            challenge_ms=message.challenge_ms,
            flags=message.flags,
            fee=int(message.fee),
            refund_signature=refund_signature,
            seal=_SEAL,
        )

    def close_channel(
        self,
        body: bytes,
        *,
        signer: bytes,
        signature: bytes,
        cumulative: int,
        update_signature: bytes,
        k1: bytes,
    ) -> CloseOperation:
        """Verifies a payee's close and the update it shows.

        Args:
            body: Canonical ChannelClose.
            signer: Public key, 33 bytes.
            signature: Over the close, 65 bytes.
            cumulative: Of the update, base units; 0 without one.
            update_signature: K1 over the update, 65 bytes; empty without one.
            k1: The channel's K1, 33 bytes.

        Raises:
            InvalidRequest: Malformed.
            SignatureInvalid: The close or the update is not signed as it must be.
        """
        message = ChannelClose.decode(body)
        if bool(cumulative) != bool(update_signature):
            raise InvalidRequest("An update is a cumulative payment above 0 and its signature.")
        digest = self._check(signer, message, signature, body)
        if cumulative:
            update = ChannelUpdate(channel=message.channel, cumulative=cumulative)
            self._check(k1, update, update_signature)
        return CloseOperation(
            digest=digest,
            body=body,
            signatures=signer + signature + cumulative.to_bytes(8, "big") + update_signature,
            signer=signer,
            channel_id=message.channel,
            capture=int(message.capture),
            cumulative=cumulative,
            update_signature=update_signature,
            k1=k1,
            seal=_SEAL,
        )

    def top_up(self, body: bytes, *, signer: bytes, signature: bytes) -> TopUpOperation:
        """Verifies a top-up; whose channel it is, the books know.

        Args:
            body: Canonical TopUp.
            signer: Public key of the payer's account, 33 bytes.
            signature: 65 bytes.

        Raises:
            InvalidRequest: Malformed, or nothing is added.
            SignatureInvalid: The key did not sign this.
        """
        message = TopUp.decode(body)
        if message.amount < 1:
            raise InvalidRequest("A top up adds at least one base unit.")
        return TopUpOperation(
            digest=self._check(signer, message, signature, body),
            body=body,
            signatures=signer + signature,
            signer=signer,
            owner=public_key(signer).address.data,
            channel_id=message.channel,
            amount=int(message.amount),
            request_id=message.request_id,
            valid_until_ms=message.valid_until_ms,
            seal=_SEAL,
        )

    def update(self, body: bytes, *, k1: bytes, signature: bytes) -> UpdateOperation:
        """Verifies a T3; anyone may show it.

        Args:
            body: Canonical ChannelUpdate.
            k1: The channel's K1, 33 bytes.
            signature: K1 over it, 65 bytes.

        Raises:
            InvalidRequest: Malformed, or it pays nothing.
            SignatureInvalid: K1 did not sign this.
        """
        message = ChannelUpdate.decode(body)
        if message.cumulative < 1:
            raise InvalidRequest("An update pays at least one base unit.")
        return UpdateOperation(
            digest=self._check(k1, message, signature, body),
            body=body,
            signatures=k1 + signature,
            signer=k1,
            channel_id=message.channel,
            cumulative=int(message.cumulative),
            signature=signature,
            seal=_SEAL,
        )

    def request_close(self, body: bytes, *, signer: bytes, signature: bytes) -> RequestCloseOperation:
        """Verifies a payer's wish to close; whose channel it is, the books know.

        Args:
            body: Canonical CloseRequest.
            signer: Public key of the payer's account, 33 bytes.
            signature: 65 bytes.

        Raises:
            InvalidRequest: Malformed.
            SignatureInvalid: The key did not sign this.
        """
        message = CloseRequest.decode(body)
        return RequestCloseOperation(
            digest=self._check(signer, message, signature, body),
            body=body,
            signatures=signer + signature,
            signer=signer,
            owner=public_key(signer).address.data,
            channel_id=message.channel,
            request_id=message.request_id,
            valid_until_ms=message.valid_until_ms,
            seal=_SEAL,
        )

    def finalize(self, body: bytes) -> FinalizeOperation:
        """Reads a finalize, which nobody signs.

        Args:
            body: Canonical ChannelFinalize.

        Raises:
            InvalidRequest: Malformed.
        """
        message = ChannelFinalize.decode(body)
        return FinalizeOperation(
            digest=message.digest(self.ledger_id),
            body=body,
            signatures=b"",
            signer=b"",
            channel_id=message.channel,
            seal=_SEAL,
        )

    def extension(self, body: bytes, *, signer: bytes, signature: bytes) -> ExtendOperation:
        """Verifies an extension; that the signer is the ledger's operator is up to the caller.

        Args:
            body: Canonical ChannelExtension.
            signer: Public key, 33 bytes.
            signature: 65 bytes.

        Raises:
            InvalidRequest: Malformed.
            SignatureInvalid: The key did not sign this.
        """
        message = ChannelExtension.decode(body)
        return ExtendOperation(
            digest=self._check(signer, message, signature, body),
            body=body,
            signatures=signer + signature,
            signer=signer,
            channel_id=message.channel,
            deadline_ms=int(message.deadline_ms),
            seal=_SEAL,
        )

    def query(self, body: bytes, *, signer: bytes, signature: bytes) -> tuple[Query, bytes]:
        """Verifies a query; who may ask is up to the caller.

        Args:
            body: Canonical Query.
            signer: Public key, 33 bytes.
            signature: 65 bytes.

        Returns:
            The query and its digest.

        Raises:
            InvalidRequest: Malformed.
            SignatureInvalid: The key did not sign this.
        """
        message = Query.decode(body)
        return message, self._check(signer, message, signature, body)
