"""What a node agrees to: the terms of a channel, before money is locked in it and whenever it is used."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

from btt.sdk.errors import ChannelExpired, RequestExpired, SignerMismatch, TermsRefused
from btt.sdk.identity import Offer
from btt.sdk.signing import EARLY_CLOSE, ChannelCommit, service_reference

NONCE_LIFE_MS: Final = 60_000
MAX_NONCES: Final = 4096


class Nonces:
    """Nonces that a session request must name, each good for one within a minute.

    Args:
        clock: Unix milliseconds.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._until: dict[bytes, int] = {}

    def give(self) -> bytes:
        """Returns a new one, 16 bytes; when too many are out, the oldest is forgotten."""
        now = self._clock()
        if len(self._until) >= MAX_NONCES:
            self._until = {nonce: until for nonce, until in self._until.items() if until > now}
            while len(self._until) >= MAX_NONCES:
                del self._until[next(iter(self._until))]
        nonce = secrets.token_bytes(16)
        self._until[nonce] = now + NONCE_LIFE_MS
        return nonce

    def take(self, nonce: bytes) -> None:
        """Uses one up.

        Raises:
            RequestExpired: It was not given here, is used up, or too old.
        """
        if self._until.pop(nonce, 0) < self._clock():
            raise RequestExpired("The session request has no nonce of this node.", hint="Call Begin first.")


def check_terms(commit: ChannelCommit, offer: Offer, *, now_ms: int) -> None:
    """Checks a channel that is to be opened (paper: step 4).

    Args:
        commit: Its T1.
        offer: The current one.
        now_ms: Unix milliseconds.

    Raises:
        TermsRefused: The channel does not suit; says why.
    """
    terms, problem = offer.terms, None
    if commit.payee != offer.payee or commit.k2 != offer.payee_key:
        problem = "It does not pay this node."
    elif commit.service_ref != service_reference(offer.node):
        problem = "It is for another node."
    elif commit.amount < terms.min_amount:
        problem = f"It must lock at least {terms.min_amount} base units."
    elif not terms.min_lifetime_ms <= commit.expires_ms - now_ms <= terms.max_lifetime_ms:
        problem = "Its lock time is outside this node's terms."
    elif commit.flags & EARLY_CLOSE and commit.challenge_ms < terms.min_challenge_ms:
        # A window shorter than our longest absence would let a payer close on us unseen.
        problem = f"Its challenge window must be at least {terms.min_challenge_ms} ms."
    if problem:
        raise TermsRefused(f"The node refuses this channel. {problem}")


def check_channel(commit: ChannelCommit, offer: Offer, *, now_ms: int) -> None:
    """Checks an open channel that a session is to use; `commit` is what the ledger says.

    Args:
        commit: Its T1.
        offer: The one that the session pins.
        now_ms: Unix milliseconds.

    Raises:
        SignerMismatch: It pays somebody else, or is for another node.
        TermsRefused: Its challenge window is too short.
        ChannelExpired: Its lock time is too near.
    """
    if commit.payee != offer.payee or commit.k2 != offer.payee_key:
        raise SignerMismatch("The channel does not pay this node.")
    if commit.service_ref != service_reference(offer.node):
        raise SignerMismatch("The channel is for another node.")
    if commit.flags & EARLY_CLOSE and commit.challenge_ms < offer.terms.min_challenge_ms:
        raise TermsRefused("The channel's challenge window is too short for this node.")
    if commit.expires_ms - now_ms < offer.terms.min_lifetime_ms // 2:
        raise ChannelExpired("The channel's lock time is too near.")
