"""Who is banned from a node, for how long, and why (P7: repeated failure bans for a while).

A strike needs a payer that is alive and does not pay, or what no honest program sends. A
client that crashed or lost its network breaks its payment stream, is asked for nothing any
more, and gets no strike; what it leaves behind within its allowance is the credit rules'
business. Since those also end the credit of whoever leaves more, and it has to pay a multiple
before it is lent that much again, such defaults alone never add up to a ban.

A payer is banned as a whole, over all its channels and sessions. A network is never refused
for what strangers from it did: newcomers from there are only lent nothing, so that a fresh key
brings no fresh credit while honest ones are served as soon as they pay. Only the operator
refuses a network. The books are the one place where all this is kept, so that what an
operator's command writes there holds for the running node, and what it learnt survives it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Final

import structlog

from btt.sdk.channel import FOREVER_MS, BanPolicy, Conduct
from btt.sdk.errors import Banned, BttError
from btt.sdk.keys import Address
from btt.sdk.payment.bans import (
    all_conduct,
    forget_conduct,
    load_conduct,
    save_conduct,
    save_strike,
)

if TYPE_CHECKING:
    from btt.node.payments.store import PayeeStore

log = structlog.get_logger(__name__)

LOOK_EVERY_S: Final = 1.0
"""How often a running node looks for bans that its operator set, seconds."""


class Failure(Enum):
    """What counts against a payer; the value says it to people."""

    UNPAID = "it did not pay in time"
    DEFAULT = "it left more unpaid than its allowance"
    FORGED = "it sent an update that its channel's key did not sign"
    LIED = "it claimed more units than it can have had"
    MISUSE = "somebody used a channel or a session without its key"


class Bans:
    """The bans of one node.

    Args:
        store: The payee's books.
        policy: When a ban begins, and how long it lasts.
        clock: Unix milliseconds.
    """

    def __init__(self, *, store: PayeeStore, policy: BanPolicy, clock: Callable[[], int]) -> None:
        self._store = store
        self.policy = policy
        self._clock = clock

    async def payer_failed(self, payer: Address, failure: Failure, *, network: str | None) -> Banned | None:
        """Counts a failure of a payer.

        Args:
            payer: Who proved to hold the key of its channel.
            failure: What it did.
            network: Where it came from, if it is a stranger; None for a proven payer.

        Returns:
            Why it is banned now; None if it is not.
        """
        now = self._clock()

        def write(db: sqlite3.Connection) -> Conduct:
            before = load_conduct(db, str(payer))
            if failure is Failure.DEFAULT and before.strikes and before.reason == failure.value:
                return before
            conduct, is_new = save_strike(db, str(payer), failure.value, now_ms=now, policy=self.policy)
            if is_new and network is not None:
                # Payers fail each for itself, however near to one another.
                each = replace(self.policy, apart_ms=0)
                save_strike(db, network, failure.value, now_ms=now, policy=each)
            return conduct

        conduct: Conduct = await self._store.run(write)
        log.warning("payer.failed", payer=str(payer), failure=failure.value, banned=conduct.is_banned(now))
        return self._refusal("payer", conduct)

    async def network_failed(self, network: str) -> None:
        """Counts what somebody did who did not prove to be anybody: nobody's payer suffers for it."""
        now = self._clock()
        reason = Failure.MISUSE.value
        known: Conduct = await self._store.run(lambda db: load_conduct(db, network))
        if known.strike(reason, now_ms=now, policy=self.policy) is known:
            return  # repeated misuse does not make the disk busy
        await self._store.run(lambda db: save_strike(db, network, reason, now_ms=now, policy=self.policy))
        log.warning("network.failed", network=network, failure=reason)

    async def check(self, payer: Address, network: str) -> None:
        """Refuses a banned payer, and everybody from a network that the operator banned.

        Raises:
            Banned: Saying why and until when.
        """
        mine, where = await self._both(payer, network)
        refusal = self._refusal("payer", mine)
        if refusal is None and where.by_operator:
            refusal = self._refusal("network", where)
        if refusal is not None:
            raise refusal

    async def lends_to(self, network: str) -> bool:
        """Says whether strangers from a network are lent anything now."""
        conduct: Conduct = await self._store.run(lambda db: load_conduct(db, network))
        return not conduct.is_banned(self._clock())

    async def among(self, peers: Iterable[tuple[Address, str]]) -> dict[tuple[Address, str], Banned]:
        """Returns which payers, with their networks, are banned now."""
        found: dict[str, Conduct] = await self._store.run(all_conduct)
        banned = {}
        for payer, network in peers:
            where = found.get(network, Conduct())
            refusal = self._refusal("payer", found.get(str(payer), Conduct())) or (
                self._refusal("network", where) if where.by_operator else None
            )
            if refusal is not None:
                banned[payer, network] = refusal
        return banned

    async def all(self) -> dict[str, Conduct]:
        """Returns what is remembered and not forgotten yet, by address or network."""
        now = self._clock()
        found: dict[str, Conduct] = await self._store.run(all_conduct)
        return {
            subject: conduct.remaining(now, self.policy)
            for subject, conduct in found.items()
            if not conduct.is_forgotten(now, self.policy)
        }

    async def ban(self, subject: str, *, for_ms: int | None, reason: str) -> Conduct:
        """Bans a payer or a network by hand.

        Args:
            subject: An address, or a /24 or /48.
            for_ms: How long; for ever if None.
            reason: For people, also for the one that is banned.
        """
        now = self._clock()
        until = FOREVER_MS if for_ms is None else min(FOREVER_MS, now + for_ms)

        def write(db: sqlite3.Connection) -> Conduct:
            before = load_conduct(db, subject)
            conduct = replace(before, at_ms=now, until_ms=until, reason=reason, by_operator=True)
            save_conduct(db, subject, conduct, now_ms=now)
            return conduct

        return await self._store.run(write)  # type: ignore[no-any-return]

    async def unban(self, subject: str) -> bool:
        """Forgets everything against a payer or a network; says whether there was anything."""
        return bool(await self._store.run(lambda db: forget_conduct(db, subject)))

    async def run(self, live: Callable[[], set[tuple[Address, str]]], end: Callable[..., None]) -> None:
        """Ends the sessions of those whom the operator bans, for ever.

        Args:
            live: Returns the payers that have a session, with their networks.
            end: Ends the sessions of a payer, with an error.
        """
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            peers = live()
            if not peers:
                continue
            try:
                for (payer, network), error in (await self.among(peers)).items():
                    end(payer, network, error)
            except BttError as error:
                log.warning("bans.not_read", error=str(error))

    async def _both(self, payer: Address, network: str) -> tuple[Conduct, Conduct]:
        def read(db: sqlite3.Connection) -> tuple[Conduct, Conduct]:
            return load_conduct(db, str(payer)), load_conduct(db, network)

        return await self._store.run(read)  # type: ignore[no-any-return]

    def _refusal(self, what: str, conduct: Conduct) -> Banned | None:
        now = self._clock()
        if not conduct.is_banned(now):
            return None
        until = until_text(conduct.until_ms)
        return Banned(
            f"This {what} is banned {until}: {conduct.reason}.",
            retry_after=0.0 if conduct.until_ms >= FOREVER_MS else (conduct.until_ms - now) / 1000,
        )


def until_text(until_ms: int) -> str:
    """Says the end of a ban: "until 2030-01-31 08:00:00 UTC", or "for good"."""
    try:
        end = datetime.fromtimestamp(until_ms / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return "for good"
    return f"until {end:%Y-%m-%d %H:%M:%S} UTC"
