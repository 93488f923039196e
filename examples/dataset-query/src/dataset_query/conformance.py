"""What `btt plugin check dataset-query` tries, with a small dataset of its own."""

from __future__ import annotations

import atexit
import shutil
import sqlite3
import tempfile
from pathlib import Path

from btt.sdk.testing.conformance import Case
from dataset_query.plugin import Plugin
from dataset_query.v1 import dataset_query_pb2 as pb
from dataset_query.v1 import dataset_query_pb2_grpc as rpc


def _sample() -> str:
    folder = Path(tempfile.mkdtemp(prefix="dataset-query-"))
    atexit.register(shutil.rmtree, folder)
    path = folder / "sample.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE sample (kind TEXT, number INTEGER)")
    database.executemany("INSERT INTO sample VALUES ('even', ?)", [(2 * n,) for n in range(250)])
    database.commit()
    database.close()
    return str(path)


CASE = Case(
    plugin=Plugin,
    config={"path": _sample(), "table": "sample", "rate": "0.001 BTT / row"},
    stubs=[rpc.DatasetServiceStub],
    requests={"Query": [pb.QueryRequest(column="kind", equals="even", most_rows=220)]},
)
