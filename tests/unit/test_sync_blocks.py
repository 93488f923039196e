"""A block of SyncClient ends as one of Client does, whatever leaves it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from btt.sdk.background import Background


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


@pytest.mark.timeout(20)  # what is wrong here hangs
@pytest.mark.parametrize("kind", [LookupError, StopIteration, StopAsyncIteration, KeyboardInterrupt])
def test_what_leaves_a_block_ends_it_and_reaches_the_caller(
    background: Background, kind: type[BaseException]
) -> None:
    seen: list[object] = []

    @asynccontextmanager
    async def session() -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            seen.append(error)
            raise
        finally:
            seen.append("closed")

    mine = kind("mine")
    with pytest.raises(kind) as raised, background.entered(session()):
        raise mine
    assert raised.value is mine
    assert seen == ([mine, "closed"] if isinstance(mine, Exception) else ["closed"])
