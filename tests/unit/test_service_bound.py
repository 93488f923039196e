"""What some calls may cost together: set aside before it is asked for, counted when it came."""

from __future__ import annotations

import pytest

from btt.sdk.channel import Line
from btt.sdk.errors import BudgetExceeded
from btt.sdk.money import Rate, Unit
from btt.sdk.service import Bound

LINE = Line("probe.v1.ProbeService", Unit.COUNT)
STEP = [(LINE, 10)]


def test_calls_that_run_at_once_never_exceed_it_together() -> None:
    bound = Bound(25, {LINE: Rate(1, 1, Unit.COUNT)}, "The budget")
    bound.hold(STEP)
    bound.hold(STEP)
    with pytest.raises(BudgetExceeded):
        bound.hold(STEP)
    assert bound.spent == 0, "nothing came yet"
    bound.settle(STEP, [(LINE, 3)])
    assert bound.spent == 3
    bound.hold(STEP)  # what did not come is free again: 3 + 10 + 10
    with pytest.raises(BudgetExceeded):
        bound.hold([(LINE, 3)])
