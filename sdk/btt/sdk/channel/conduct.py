"""How failures of the other side add up to a ban, and are forgotten again.

Both sides keep the same ladder: a node for its payers and their networks, a wallet for
its nodes. Some strikes lead to a ban, each ban is twice as long as the one before, and
what lies back long enough is forgotten, one step at a time. No clock, no database: a
record goes in with the time, and another one comes out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

FOREVER_MS: Final = 2**62
"""End of a ban that an operator set without one."""


@dataclass(frozen=True, slots=True)
class BanPolicy:
    """When a ban begins, and how long it lasts.

    Attributes:
        after: Strikes that lead to a ban.
        first_ms: Length of the first ban; each further one is twice as long.
        longest_ms: Length that no ban exceeds. For each such time of good conduct one
            doubling is forgotten.
        forget_ms: Time of good conduct in which one strike is forgotten.
        apart_ms: Failures nearer to the last strike than this are the same one: calls that
            wait together fail together.
    """

    after: int = 3
    first_ms: int = 10 * 60_000
    longest_ms: int = 24 * 3_600_000
    forget_ms: int = 3_600_000
    apart_ms: int = 60_000


@dataclass(frozen=True, slots=True)
class Conduct:
    """What is remembered against somebody; times are Unix milliseconds.

    Attributes:
        strikes: Failures since the last ban that are not forgotten.
        bans: Bans that are not forgotten.
        at_ms: Last strike.
        until_ms: End of the last ban; 0 if there was none.
        reason: Of the last strike, or of the operator's ban.
        by_operator: The ban was set by hand.
    """

    strikes: int = 0
    bans: int = 0
    at_ms: int = 0
    until_ms: int = 0
    reason: str = ""
    by_operator: bool = False

    def is_banned(self, now_ms: int) -> bool:
        """Says whether the ban lasts still."""
        return now_ms < self.until_ms

    def remaining(self, now_ms: int, policy: BanPolicy) -> Conduct:
        """Returns what is not forgotten yet."""
        strikes = max(0, self.strikes - max(0, now_ms - self.at_ms) // policy.forget_ms)
        good_since = max(self.at_ms, self.until_ms)
        bans = max(0, self.bans - max(0, now_ms - good_since) // policy.longest_ms)
        return replace(self, strikes=strikes, bans=bans)

    def is_forgotten(self, now_ms: int, policy: BanPolicy) -> bool:
        """Says whether nothing is left to remember."""
        left = self.remaining(now_ms, policy)
        return not (left.strikes or left.bans or left.is_banned(now_ms))

    def strike(self, reason: str, *, now_ms: int, policy: BanPolicy, weight: int = 1) -> Conduct:
        """Counts a failure, which may begin a ban.

        Args:
            reason: For people.
            now_ms: Unix milliseconds.
            policy: When a ban begins.
            weight: Strikes that it counts for.

        Returns:
            The new record; the same one while a ban lasts, and for a failure that belongs to
            the last strike.
        """
        if self.is_banned(now_ms) or (self.strikes and 0 <= now_ms - self.at_ms < policy.apart_ms):
            return self
        left = self.remaining(now_ms, policy)
        strikes = left.strikes + weight
        if strikes < policy.after:
            return replace(left, strikes=strikes, at_ms=now_ms, reason=reason, by_operator=False)
        # Shifting by more than this would only make a number that is cut down again.
        length = min(policy.longest_ms, policy.first_ms << min(left.bans, 40))
        return Conduct(strikes=0, bans=left.bans + 1, at_ms=now_ms, until_ms=now_ms + length, reason=reason)
