"""Books are opened by several processes that share a wallet, at any moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from btt.sdk.database import open_books

OPENERS = 4


def test_books_that_several_make_at_the_same_moment_are_made_once(tmp_path):
    together = Barrier(OPENERS)

    def opened(path):
        together.wait()
        db = open_books(path, schema="CREATE TABLE places(name TEXT);\n", version=1)
        db.execute("INSERT INTO places VALUES('here')")
        db.close()

    with ThreadPoolExecutor(OPENERS) as threads:
        for number in range(25):
            path = tmp_path / f"{number}.db"
            list(threads.map(opened, [path] * OPENERS))
            db = open_books(path, schema="", version=1)
            assert db.execute("SELECT count(*) FROM places").fetchone() == (OPENERS,)
            db.close()
