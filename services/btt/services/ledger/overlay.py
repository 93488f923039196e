"""One batch on top of the stored books: what the operations of a batch see and change.

A rule looks at the books through the batch, so it sees the operations before it; an accepted
effect is absorbed whole, a refused one leaves nothing. Nothing here is visible to anybody until
the store has committed the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from btt.sdk.errors import BttError, InternalError
from btt.services.ledger import books, journal, rules
from btt.services.ledger.books import Account, Decision, Effect, Refusal, Repeat, Request, Terms, View
from btt.services.ledger.journal import Entry, EntryRef, Head
from btt.services.ledger.machine import Channel, Phase
from btt.services.ledger.verify import Operation


class Base(View, Protocol):
    """The stored books under a batch."""

    @property
    def head(self) -> Head:
        """The end of the journal."""
        ...

    @property
    def next_account(self) -> int:
        """Number of the next new account."""
        ...


class Batch:
    """Operations that will be committed together.

    Args:
        base: The stored books.
        clock_ms: What the clock says; ledger time is never before the last entry.
        terms: What this ledger accepts.
    """

    def __init__(self, base: Base, *, clock_ms: int, terms: Terms) -> None:
        self._base = base
        self._terms = terms
        self.before = base.head
        self.head = base.head
        self.now_ms = max(clock_ms, base.head.time_ms)
        self.entries: list[Entry] = []
        self.accounts: dict[bytes, Account] = {}
        self.channels: dict[bytes, Channel] = {}
        self.requests: dict[tuple[bytes, bytes], Request] = {}
        self.epochs: list[tuple[int, bytes, int]] = []
        self._refs: dict[bytes, EntryRef] = {}
        self._old_accounts: dict[bytes, Account | None] = {}
        self._old_channels: dict[bytes, Channel | None] = {}
        self._next_account = base.next_account

    def account(self, account: bytes) -> Account | None:
        """Returns an account as this batch leaves it."""
        return self.accounts.get(account) or self._base.account(account)

    def channel(self, channel_id: bytes) -> Channel | None:
        """Returns a channel as this batch leaves it."""
        return self.channels.get(channel_id) or self._base.channel(channel_id)

    def request(self, account: bytes, request_id: bytes) -> Request | None:
        """Returns what became of a request id."""
        return self.requests.get((account, request_id)) or self._base.request(account, request_id)

    def entry(self, request_digest: bytes) -> EntryRef | None:
        """Returns the entry a request made."""
        return self._refs.get(request_digest) or self._base.entry(request_digest)

    @property
    def next_account(self) -> int:
        """Number of the next new account after this batch."""
        return self._next_account

    def stored_account(self, account: bytes) -> Account | None:
        """Returns an account of `accounts` as it was before this batch."""
        return self._old_accounts[account]

    def stored_channel(self, channel_id: bytes) -> Channel | None:
        """Returns a channel of `channels` as it was before this batch."""
        return self._old_channels[channel_id]

    def number_of(self, account: bytes) -> int:
        """Returns the number of an account that exists after this batch."""
        found = self.account(account)
        assert found is not None
        return found.number

    @property
    def empty(self) -> bool:
        """True when there is nothing to commit."""
        return not self.entries and not self.requests

    def run(
        self, operation: Operation, charge: Callable[[bytes], object] = lambda key: None
    ) -> EntryRef | BttError:
        """Applies one operation; it succeeds or fails alone.

        Args:
            operation: Verified.
            charge: Called with whom it counts for, before it takes effect; may refuse it. What is new
                counts for its signer. What is known, or refused without a trace, counts for its digest
                alone: others may hold a copy, and send it as often as they like.

        Returns:
            The entry for its receipt, or why it was refused. Neither may be told before the batch
            is committed.
        """
        if not isinstance(operation, Operation):
            return InternalError("The ledger applies verified operations only.")
        decision = self._decide(operation)
        new = isinstance(decision, Effect) or (isinstance(decision, Refusal) and decision.request)
        try:
            if counts_for := operation.signer if new else operation.digest:  # nobody signs a finalize
                charge(counts_for)
        except BttError as error:
            return error
        if isinstance(decision, Repeat):
            return decision.entry
        if isinstance(decision, Refusal):
            if decision.request is not None:
                self._remember(decision.request)
            return decision.error
        return self.absorb(
            decision, digest=operation.digest, body=operation.body, signatures=operation.signatures
        )

    def _decide(self, operation: Operation) -> Decision:
        try:
            return rules.decide(self, operation, now_ms=self.now_ms, seq=self.head.seq + 1, terms=self._terms)
        except BttError as error:
            return Refusal(error, None)

    def absorb(self, effect: Effect, *, digest: bytes, body: bytes, signatures: bytes) -> EntryRef:
        """Writes an accepted effect into the batch.

        Args:
            effect: What it does.
            digest: Of the signed request, 32 bytes.
            body: Canonical body of the request.
            signatures: Its proof.
        """
        entry = journal.append(
            self.head,
            time_ms=self.now_ms,
            kind=effect.kind,
            request_digest=digest,
            body=body,
            signatures=signatures,
            postings=effect.postings,
        )
        for leg in effect.postings:
            self.accounts[leg.account] = self._touch(leg.account).moved(books.change_of(leg))
        if effect.channel is not None:
            self._put_channel(effect.channel)
        if effect.learned is not None:
            owner, key = effect.learned
            account = self._touch(owner)
            if account.public_key is None:
                self.accounts[owner] = replace(account, public_key=key)
        if effect.request is not None:
            self._remember(effect.request)
        self.entries.append(entry)
        self.head = Head(entry.epoch, entry.seq, entry.hash, entry.time_ms)
        ref = self._refs[digest] = entry.ref
        return ref

    def begin_epoch(self, epoch: int, operator_key: bytes) -> None:
        """Lets the entries that follow belong to a new epoch with a new operator key (33 bytes)."""
        self.head = replace(self.head, epoch=epoch)
        self.epochs.append((self.head.epoch, operator_key, self.head.seq + 1))

    def _put_channel(self, channel: Channel) -> None:
        old = self.channel(channel.id)
        self._old_channels.setdefault(channel.id, old)
        payer = books.user(channel.payer)
        account = self._touch(payer)
        self.accounts[payer] = replace(
            account,
            locked=account.locked + channel.held - (old.held if old else 0),
            open_channels=account.open_channels + _counts(channel) - _counts(old),
        )
        self.channels[channel.id] = channel

    def _remember(self, request: Request) -> None:
        self.requests[request.account, request.request_id] = request

    def _touch(self, account: bytes) -> Account:
        """Returns an account that this batch is about to change; it may be new."""
        found = self.accounts.get(account)
        if found is None:
            found = self._old_accounts[account] = self._base.account(account)
        if found is None:
            found = self.accounts[account] = Account(self._next_account, account, 0)
            self._next_account += 1
        return found


def _counts(channel: Channel | None) -> int:
    return 0 if channel is None or channel.phase is Phase.CLOSED else 1
