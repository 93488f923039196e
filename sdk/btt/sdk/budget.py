"""What a user lets an application spend."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from btt.sdk.errors import InvalidRequest
from btt.sdk.money import Amount


def _fresh_name() -> str:
    return f"once-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Budget:
    """A limit on spending, enforced where money is signed and where channels lock it.

    Args:
        total: Such as "5 BTT", or base units.
        name: Budgets of one name in one wallet share what they spend, over restarts and
            processes, and the total that was said last holds; without a name the budget is fresh.
        within: A budget that pays for this one, too, such as that of the application which all of its
            clients share by its name; settled for good when this budget is used first.

    Raises:
        InvalidRequest: The total is no amount, the name is empty, or the budget is within itself.
    """

    total: Amount | str
    name: str = field(default_factory=_fresh_name)
    within: Budget | None = None

    def __post_init__(self) -> None:
        try:
            amount = Amount.parse(self.total) if isinstance(self.total, str) else Amount(self.total)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"{self.total!r} is no budget: write an amount such as 5 BTT.") from error
        object.__setattr__(self, "total", amount)
        if not self.name:
            raise InvalidRequest("A budget's name cannot be empty.", hint="Leave it out for a fresh budget.")
        above = self.within
        while above is not None:
            if above.name == self.name:
                raise InvalidRequest(f"The budget {self.name} cannot be within itself.")
            above = above.within

    @property
    def amount(self) -> int:
        """The limit, base units."""
        return int(self.total)
