"""A second opinion about the ledger: what its journal means, written from the rules and not from the code.

It shares with the product the layouts that are signed and the check of a signature, and nothing of
`rules`, `machine`, `overlay` or `audit`. It reads each entry when it is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from btt.sdk.errors import BttError
from btt.sdk.keys import PublicKey
from btt.sdk.signing import (
    EARLY_CLOSE,
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    KeyRotation,
    LedgerRecovery,
    TopUp,
    Transfer,
    verify,
)
from btt.services.ledger.journal import Entry, Kind, Side


class Violation(AssertionError):
    """Something that must hold does not."""


@dataclass(slots=True)
class Line:
    """A channel; times in milliseconds, amounts in base units."""

    terms: ChannelCommit
    deposit: int
    best: int = 0
    captured: int = 0
    deadline: int = 0
    closed: bool = False
    locked: dict[bytes, int] = field(default_factory=dict)
    """Amount of T1 and of each top-up, by what it was asked with: T1's id or the request's."""

    @property
    def abandoned(self) -> int:
        return self.terms.expires_ms + 2 * self.terms.challenge_ms


class Books:
    """Everything that the journal says so far."""

    def __init__(self, ledger_id: bytes) -> None:
        self.ledger_id = ledger_id
        self.balances: dict[bytes, int] = {}
        self.channels: dict[bytes, Line] = {}
        self.hashes: list[bytes] = [bytes(32)]
        self.now = 0
        self._issued = 0
        self._used: set[tuple[bytes, bytes]] = set()
        self.digests: set[bytes] = set()
        self._readers: dict[Kind, Callable[[Entry], dict[bytes, int]]] = {
            Kind.GENESIS: self._genesis,
            Kind.TRANSFER: self._transfer,
            Kind.OPEN_CHANNEL: self._open,
            Kind.TOP_UP: self._top_up,
            Kind.UPDATE: self._update,
            Kind.REQUEST_CLOSE: self._request_close,
            Kind.CLOSE_CHANNEL: self._close,
            Kind.FINALIZE: self._finalize,
            Kind.EXTEND: self._extend,
            Kind.ROTATE_KEY: self._rotate,
            Kind.RECOVER: self._recover,
        }

    @property
    def seq(self) -> int:
        return len(self.hashes) - 1

    def take(self, entry: Entry) -> None:
        """Reads the next entry.

        Raises:
            Violation: It should not be there.
        """
        who = f"entry {entry.seq} ({entry.kind.name})"
        must(entry.seq == self.seq + 1 and entry.prev_hash == self.hashes[-1], f"{who} does not follow")
        must(entry.time_ms >= self.now, f"{who} goes back in time")
        must(entry.request_digest not in self.digests, f"{who} was carried out before")
        self.now = entry.time_ms
        try:
            expected = self._readers[entry.kind](entry)
        except BttError as error:
            raise Violation(f"{who}: {error}") from error
        except Violation as error:
            raise Violation(f"{who}: {error}") from None
        moved: dict[bytes, int] = {}
        for leg in entry.postings:
            must(leg.amount > 0, f"{who} moves nothing")
            amount = leg.amount if leg.side is Side.CREDIT else -leg.amount
            moved[leg.account] = moved.get(leg.account, 0) + amount
        must(sum(moved.values()) == 0, f"{who} does not balance")
        wanted = {account: amount for account, amount in expected.items() if amount}
        must({a: n for a, n in moved.items() if n} == wanted, f"{who} moves {moved}, not {wanted}")
        for account, amount in moved.items():
            self.balances[account] = self.balances.get(account, 0) + amount
            must(account == _GENESIS or self.balances[account] >= 0, f"{who} overdraws an account")
        held = sum(n for account, n in self.balances.items() if account != _GENESIS)
        must(held == self._issued, f"{who} makes {held} of {self._issued}")
        self.hashes.append(entry.hash)
        self.digests.add(entry.request_digest)

    def _once(self, account: bytes, request_id: bytes) -> None:
        must((account, request_id) not in self._used, "its request id was used before")
        self._used.add((account, request_id))

    def _genesis(self, entry: Entry) -> dict[bytes, int]:
        must(entry.seq == 1, "money is issued")
        self._issued = int.from_bytes(entry.body[20:], "big")
        return {_user(entry.body[:20]): self._issued, _GENESIS: -self._issued}

    def _transfer(self, entry: Entry) -> dict[bytes, int]:
        m = Transfer.decode(entry.body)
        self._signed(entry, m, m.sender.data)
        self._once(m.sender.data, m.request_id)
        must(entry.time_ms < m.valid_until_ms, "it comes too late")
        if m.sender == m.recipient:
            return {}
        return {_user(m.sender.data): -m.amount, _user(m.recipient.data): int(m.amount)}

    def _open(self, entry: Entry) -> dict[bytes, int]:
        m = ChannelCommit.decode(entry.body)
        channel = m.channel_id(self.ledger_id)
        self._signed(entry, m, m.payer.data)
        verify(
            m.k2,
            ChannelRefund(channel=channel, not_before_ms=m.expires_ms),
            self.ledger_id,
            entry.signatures[98:],
        )
        must(channel not in self.channels and entry.time_ms < m.expires_ms, "it cannot be opened")
        self.channels[channel] = Line(m, int(m.amount), locked={channel: int(m.amount)})
        return {_user(m.payer.data): -m.amount, _locked(channel): int(m.amount)}

    def _top_up(self, entry: Entry) -> dict[bytes, int]:
        m = TopUp.decode(entry.body)
        line = self._line(m.channel)
        self._signed(entry, m, line.terms.payer.data)
        self._once(line.terms.payer.data, m.request_id)
        must(not line.deadline and entry.time_ms < line.terms.expires_ms, "it is too late")
        line.deposit += m.amount
        line.locked[m.request_id] = int(m.amount)
        return {_user(line.terms.payer.data): -m.amount, _locked(m.channel): int(m.amount)}

    def _update(self, entry: Entry) -> dict[bytes, int]:
        m = ChannelUpdate.decode(entry.body)
        line = self._line(m.channel)
        verify(line.terms.k1, m, self.ledger_id, entry.signatures[33:98])
        must(line.best < m.cumulative <= line.deposit, "it is old, or too much")
        must(not line.deadline or entry.time_ms < line.deadline, "its window has ended")
        line.best = int(m.cumulative)
        return {}

    def _request_close(self, entry: Entry) -> dict[bytes, int]:
        m = CloseRequest.decode(entry.body)
        line = self._line(m.channel)
        self._signed(entry, m, line.terms.payer.data)
        self._once(line.terms.payer.data, m.request_id)
        allowed = entry.time_ms >= line.terms.expires_ms or line.terms.flags & EARLY_CLOSE
        must(not line.deadline and bool(allowed), "it is closing, or locked")
        line.deadline = max(entry.time_ms, min(entry.time_ms + line.terms.challenge_ms, line.abandoned))
        return {}

    def _close(self, entry: Entry) -> dict[bytes, int]:
        m = ChannelClose.decode(entry.body)
        line = self._line(m.channel)
        self._signed(entry, m, line.terms.k2.address.data)
        must(not line.deadline or entry.time_ms < line.deadline, "its window has ended")
        shown = int.from_bytes(entry.signatures[98:106], "big")
        if shown:
            update = ChannelUpdate(channel=m.channel, cumulative=shown)
            verify(line.terms.k1, update, self.ledger_id, entry.signatures[106:])
        must(m.capture <= max(shown, line.best) <= line.deposit, "it takes more than was paid")
        return self._paid_out(m.channel, line, int(m.capture))

    def _finalize(self, entry: Entry) -> dict[bytes, int]:
        channel = ChannelFinalize.decode(entry.body).channel
        line = self._line(channel)
        must(entry.time_ms >= (line.deadline or line.abandoned), "it is not due")
        return self._paid_out(channel, line, line.best)

    def _recover(self, entry: Entry) -> dict[bytes, int]:
        m = LedgerRecovery.decode(entry.body)
        must((m.ended_seq, m.ended_hash) == (self.seq, self.hashes[-1]), "it goes on from elsewhere")
        must(m.reached_seq >= m.ended_seq, "it had not come that far")
        verify(PublicKey(entry.signatures[:33]), m, self.ledger_id, entry.signatures[33:98])
        verify(m.next_key, m, self.ledger_id, entry.signatures[98:])
        return {}

    def _extend(self, entry: Entry) -> dict[bytes, int]:
        m = ChannelExtension.decode(entry.body)
        line = self._line(m.channel)
        verify(PublicKey(entry.signatures[:33]), m, self.ledger_id, entry.signatures[33:98])
        must(line.deadline > 0 or entry.time_ms >= line.terms.expires_ms, "it is not closing")
        must(line.deadline < m.deadline_ms <= entry.time_ms + line.terms.challenge_ms, "it is too long")
        line.deadline = int(m.deadline_ms)
        return {}

    def _rotate(self, entry: Entry) -> dict[bytes, int]:
        m = KeyRotation.decode(entry.body)
        verify(PublicKey(entry.signatures[:33]), m, self.ledger_id, entry.signatures[33:98])
        verify(m.next_key, m, self.ledger_id, entry.signatures[98:])
        return {}

    def _paid_out(self, channel: bytes, line: Line, capture: int) -> dict[bytes, int]:
        line.closed, line.captured = True, capture
        payer, payee = _user(line.terms.payer.data), _user(line.terms.payee.data)
        moved = {_locked(channel): -line.deposit, payee: capture}
        moved[payer] = moved.get(payer, 0) + line.deposit - capture
        return moved

    def _line(self, channel: bytes) -> Line:
        line = self.channels.get(channel)
        must(line is not None and not line.closed, "there is no such open channel")
        assert line is not None
        return line

    def _signed(self, entry: Entry, message: object, owner: bytes) -> None:
        signer = PublicKey(entry.signatures[:33])
        must(signer.address.data == owner, "another one signed it")
        verify(signer, message, self.ledger_id, entry.signatures[33:98])  # type: ignore[arg-type]


_GENESIS = b"\x81"


def _user(address: bytes) -> bytes:
    return b"\x01" + address


def _locked(channel: bytes) -> bytes:
    return b"\x02" + channel


def must(holds: bool, what: str) -> None:
    """Raises a Violation unless something holds."""
    if not holds:
        raise Violation(what)
