"""What a holder keeps of an operation: the signed request and the ledger's receipt, byte for byte.

Together they prove offline what the ledger acknowledged, and they are enough to bring the
operation back when the ledger has lost it (`btt ledger recover`). A receipt covers the request and
not its signatures, so anybody who has it can show the request with others: versions of it, of which
one stands. A payee's best update counts without a receipt too: whoever holds it may show it.

A file of evidence is 13 bytes of magic and then records, each a big-endian u32 length and that many
bytes: first an EvidenceHeader, which says who signs for the ledger, then AcknowledgedOperations.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeVar

from google.protobuf.message import DecodeError

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.disk import appearing
from btt.sdk.errors import (
    BttError,
    ConfigError,
    EvidenceInvalid,
    InvalidRequest,
    SignerMismatch,
    StorageError,
    WrongLedger,
)
from btt.sdk.keys import Address, PublicKey
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.ledger.rotation import OperatorKey, follow, key_named, signer_of, undone_by
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    Message,
    Receipt,
    TopUp,
    Transfer,
    verify,
)

MAGIC: Final = b"bttevidence1\n"
_LENGTH: Final = struct.Struct(">I")
_LONGEST: Final = 64 * 1024
_Found = TypeVar("_Found")
_UPDATE: Final = int(pb.ENTRY_KIND_UPDATE)
_EXTEND: Final = int(pb.ENTRY_KIND_EXTEND)
_FINALIZE: Final = int(pb.ENTRY_KIND_FINALIZE)
_MESSAGES: Final[dict[int, type[Message]]] = {
    pb.ENTRY_KIND_TRANSFER: Transfer,
    pb.ENTRY_KIND_OPEN_CHANNEL: ChannelCommit,
    pb.ENTRY_KIND_CLOSE_CHANNEL: ChannelClose,
    pb.ENTRY_KIND_TOP_UP: TopUp,
    _UPDATE: ChannelUpdate,
    pb.ENTRY_KIND_REQUEST_CLOSE: CloseRequest,
    _FINALIZE: ChannelFinalize,
    _EXTEND: ChannelExtension,
}
_SIGNED: Final = 33 + 65
_SIZES: Final[dict[int, tuple[int, ...]]] = dict.fromkeys(_MESSAGES, (_SIGNED,)) | {
    pb.ENTRY_KIND_OPEN_CHANNEL: (_SIGNED + 65,),
    pb.ENTRY_KIND_CLOSE_CHANNEL: (_SIGNED + 8, _SIGNED + 8 + 65),
    _FINALIZE: (0,),
}
"""Bytes of the keys and signatures: with more behind them they would be another version of the same."""
KINDS: Final = frozenset(_MESSAGES)
"""Kinds of entries that users make; the ledger's own need no holder."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One operation, kept by its holder.

    Args:
        kind: An EntryKind of KINDS.
        body: The canonical body that was signed.
        signatures: Keys and signatures that prove it, in the layout of the journal.
        receipt: The ledger's; None for an update that it was never shown.
    """

    kind: int
    body: bytes
    signatures: bytes
    receipt: SignedReceipt | None

    @classmethod
    def read(cls, found: pb.AcknowledgedOperation) -> Evidence:
        """Reads an operation as it travels; nothing is verified yet.

        Raises:
            EvidenceInvalid: It is malformed.
        """
        if found.kind not in KINDS:
            raise EvidenceInvalid(f"Operations of kind {found.kind} are not kept as evidence.")
        receipt = None
        if found.HasField("receipt"):
            try:
                receipt = SignedReceipt(Receipt.decode(found.receipt.body), found.receipt.signature)
            except InvalidRequest as error:
                raise EvidenceInvalid(f"A receipt is malformed: {error.message}") from error
        elif found.kind != _UPDATE:
            raise EvidenceInvalid("Only an update is evidence without a receipt.")
        return cls(int(found.kind), found.body, found.signatures, receipt)

    def write(self) -> pb.AcknowledgedOperation:
        """Returns it as it travels."""
        made = pb.AcknowledgedOperation(
            kind=pb.EntryKind.ValueType(self.kind), body=self.body, signatures=self.signatures
        )
        if self.receipt is not None:
            made.receipt.CopyFrom(
                pb.LedgerReceipt(body=self.receipt.encode(), signature=self.receipt.signature)
            )
        return made

    @property
    def message(self) -> Message:
        """What was signed.

        Raises:
            EvidenceInvalid: The body is malformed.
        """
        try:
            return _MESSAGES[self.kind].decode(self.body)
        except InvalidRequest as error:
            raise EvidenceInvalid(f"A body is malformed: {error.message}") from error

    @property
    def signer(self) -> PublicKey:
        """The key that the request is shown with; a payout has none.

        Raises:
            InvalidRequest: It is no key.
        """
        return PublicKey(self.signatures[:33])

    def digest(self, ledger_id: bytes) -> bytes:
        """Returns what names the request in the journal, 32 bytes."""
        return self.message.digest(ledger_id)

    def check_request(self, ledger_id: bytes) -> None:
        """Checks that the request is signed, and that the receipt is for it.

        A transfer is signed by its sender, T1 by its payer and T2 by its K2: their bodies say so. Of
        the rest the signature is checked, and not whose key it is: a channel's keys stand in its T1,
        and whoever replays this compares them. Until then it counts as one version of the request.

        Raises:
            EvidenceInvalid: It is not.
        """
        message = self.message
        try:
            self._check_signatures(message, ledger_id)
        except InvalidRequest as error:
            what = f"A {type(message).__name__} is not signed as it must be for this ledger"
            raise EvidenceInvalid(f"{what}: {error.message}") from error
        if self.receipt is None:
            return
        receipt = self.receipt.receipt
        if receipt.request_digest != message.digest(ledger_id) or receipt.code != 0:
            raise EvidenceInvalid(f"The receipt of entry {receipt.seq} is for another request.")

    def _check_signatures(self, message: Message, ledger_id: bytes) -> None:
        if len(self.signatures) not in _SIZES[self.kind]:
            raise InvalidRequest("The proof is not in its layout.")
        if self.kind == _FINALIZE:
            return  # that one nobody signs
        verify(self.signer, message, ledger_id, self.signatures[33:_SIGNED])
        if isinstance(message, Transfer) and self.signer.address != message.sender:
            raise SignerMismatch("A transfer is signed by the key of the account it comes from.")
        if isinstance(message, ChannelCommit):
            if self.signer.address != message.payer:
                raise SignerMismatch("T1 is signed by the key of the payer's account.")
            t2 = ChannelRefund(channel=message.channel_id(ledger_id), not_before_ms=message.expires_ms)
            verify(message.k2, t2, ledger_id, self.signatures[_SIGNED:])

    def check(self, keys: Sequence[OperatorKey], ledger_id: bytes) -> bool:
        """Checks everything that can be checked offline.

        Args:
            keys: Of the ledger's operator, from `follow`.
            ledger_id: 32 bytes.

        Returns:
            True when it stands; False when the ledger signed it and went back behind it since, in a
            recovery that it says so itself.

        Raises:
            EvidenceInvalid: It proves nothing.
        """
        self.check_request(ledger_id)
        if self.receipt is None:
            return True
        if self.kind == _EXTEND and self.signatures[:33] not in {known.key.data for known in keys}:
            raise EvidenceInvalid(f"Entry {self.receipt.seq} is not signed by the ledger's operator.")
        try:
            if undone_by(self.receipt, keys) is None:
                signer_of(self.receipt, keys, ledger_id)
                return True
            self.receipt.verify(key_named(self.receipt, keys).key, ledger_id)
        except BttError as error:
            raise EvidenceInvalid(f"Entry {self.receipt.seq}: {error.message}") from error
        return False

    def __str__(self) -> str:
        message, seq = self.message, f"entry {self.receipt.seq}" if self.receipt else "never shown"
        match message:
            case Transfer():
                what = f"transfer of {message.amount} from {message.sender} to {message.recipient}"
            case ChannelCommit():
                what = f"channel of {message.amount} opened by {message.payer} for {message.payee}"
            case TopUp():
                what = f"top-up of {message.amount} for channel {message.channel.hex()}"
            case ChannelUpdate():
                what = f"payment of {message.cumulative} in channel {message.channel.hex()}"
            case ChannelClose():
                what = f"close with {message.capture} of channel {message.channel.hex()}"
            case ChannelExtension():
                what = f"extension to {message.deadline_ms} of channel {message.channel.hex()}"
            case CloseRequest():
                what = f"request to close channel {message.channel.hex()}"
            case _:
                what = f"payout of channel {self.body[:32].hex()}"
        return f"{seq}: {what}"


def operator_keys(header: pb.EvidenceHeader, first: Address) -> tuple[OperatorKey, ...]:
    """Returns the keys of a ledger's operator, in order, as a header proves them.

    Args:
        header: Of a file of evidence.
        first: Of the operator in the ledger's address, from one's own configuration.

    Raises:
        EvidenceInvalid: The chain is broken, or begins with somebody else.
    """
    try:
        current = PublicKey(header.operator_key)
        return follow(first, current, header.rotations, ledger_id=header.ledger_id)
    except BttError as error:
        raise EvidenceInvalid(error.message) from error


def export(target: Path, header: pb.EvidenceHeader, operations: Iterable[Evidence]) -> int:
    """Writes evidence to a new file; it appears complete or not at all.

    Returns:
        How many operations it holds.

    Raises:
        ConfigError: The file exists, or cannot be made.
        StorageError: The disk failed.
    """
    count = 0
    try:
        with appearing(target) as unfinished, unfinished.open("wb") as file:
            file.write(MAGIC)
            _write(file, header.SerializeToString())
            for operation in operations:
                _write(file, operation.write().SerializeToString())
                count += 1
    except OSError as error:
        raise StorageError(f"The evidence could not be written to {target}: {error}.") from error
    return count


def load(source: Path, ledger_id: bytes) -> tuple[pb.EvidenceHeader, Iterator[Evidence]]:
    """Opens a file of evidence; its records are read one by one, and verified by whoever reads them.

    Args:
        source: The file.
        ledger_id: The ledger it must be about, 32 bytes.

    Raises:
        ConfigError: There is no such file, or it is something else.
        WrongLedger: It is about another ledger.
        EvidenceInvalid: It is damaged; the iterator raises it too.
        StorageError: It cannot be read.
    """
    try:
        with source.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ConfigError(f"{source} is no evidence of this version.")
            header = _parsed(_read(file) or b"", pb.EvidenceHeader.FromString)
            begins = file.tell()
    except FileNotFoundError:
        raise ConfigError(f"There is no file {source}.") from None
    except OSError as error:
        raise StorageError(f"The file {source} cannot be read: {error}.") from error
    if header.ledger_id != ledger_id:
        raise WrongLedger(f"{source} is about another ledger.")
    return header, _records(source, begins)


def _records(source: Path, begins: int) -> Iterator[Evidence]:
    try:
        with source.open("rb") as file:
            file.seek(begins)
            while (data := _read(file)) is not None:
                yield Evidence.read(_parsed(data, pb.AcknowledgedOperation.FromString))
    except OSError as error:
        raise StorageError(f"The file {source} cannot be read: {error}.") from error


def _parsed(data: bytes, parse: Callable[[bytes], _Found]) -> _Found:
    try:
        return parse(data)
    except DecodeError as error:
        raise EvidenceInvalid("A record of the evidence is damaged.") from error


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(_LENGTH.pack(len(data)) + data)


def _read(file: IO[bytes]) -> bytes | None:
    length = file.read(_LENGTH.size)
    if not length:
        return None
    if len(length) < _LENGTH.size or (size := _LENGTH.unpack(length)[0]) > _LONGEST:
        raise EvidenceInvalid("The evidence is damaged.")
    data = file.read(size)
    if len(data) < size:
        raise EvidenceInvalid("The evidence ends within a record.")
    return data
