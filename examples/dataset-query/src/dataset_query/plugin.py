"""Sells the rows of one table of an SQLite file, which the operator names in the node's configuration."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc.aio

from btt.sdk.errors import ConfigError, InvalidRequest
from btt.sdk.plugin import Line, Price, ServiceContext, Unit, check_keys, read_rate
from btt.sdk.rpc import abort
from dataset_query.v1 import dataset_query_pb2 as pb
from dataset_query.v1 import dataset_query_pb2_grpc as rpc

ROWS = Line("dataset_query.v1.DatasetService", Unit.COUNT)
ROWS_A_MESSAGE = 100


class Dataset:
    """One table, read in one thread, never written."""

    def __init__(self, path: Path, table: str) -> None:
        self._thread = ThreadPoolExecutor(1, "dataset")
        self._path = path
        self._table = '"' + table.replace('"', '""') + '"'
        self.columns: list[str] = []
        self.rows = 0

    async def open(self) -> None:
        """Opens the file, and learns what is in it."""

        def work() -> None:
            self._database = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True)
            found = self._database.execute(f"SELECT * FROM {self._table} LIMIT 0")  # noqa: S608 - quoted
            self.columns = [column[0] for column in found.description]
            self.rows = self._database.execute(f"SELECT count(*) FROM {self._table}").fetchone()[0]  # noqa: S608

        try:
            await self._run(work)
        except sqlite3.Error as error:
            raise ConfigError(f"The dataset {self._path} cannot be read: {error}.") from error

    async def close(self) -> None:
        """Closes the file and ends the thread."""
        await self._run(lambda: self._database.close())
        self._thread.shutdown()

    async def select(self, column: str, equals: str, most: int) -> AsyncIterator[list[str]]:
        """Yields rows as JSON, some at a time; nothing is read ahead of who pays for it."""
        quoted = '"' + column.replace('"', '""') + '"'
        statement = f"SELECT * FROM {self._table} WHERE CAST({quoted} AS TEXT) = ? LIMIT ?"  # noqa: S608
        cursor = await self._run(lambda: self._database.execute(statement, (equals, most)))
        try:
            while rows := await self._run(lambda: cursor.fetchmany(ROWS_A_MESSAGE)):
                yield [json.dumps(row) for row in rows]
        finally:
            await self._run(cursor.close)

    async def _run(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class Plugin:
    """Sells rows."""

    name = "dataset-query"

    def __init__(self, context: ServiceContext) -> None:
        check_keys(context.config, known=("path", "table", "rate"))
        self._rate = read_rate(context.config, "rate", default="0.0001 BTT / row", unit=Unit.COUNT)
        path, table = context.config.get("path"), context.config.get("table")
        if not isinstance(path, str) or not isinstance(table, str):
            raise ConfigError("It needs a dataset.", hint='Write path = "film.sqlite" and table = "films".')
        self._dataset = Dataset(Path(path), table)

    async def start(self) -> None:
        """Opens the dataset."""
        await self._dataset.open()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to the node."""
        rpc.add_DatasetServiceServicer_to_server(DatasetServicer(self._dataset), server)

    def prices(self) -> Mapping[Line, Price]:
        """Says what a row costs."""
        return {ROWS: Price(self._rate, verify_units=ROWS_A_MESSAGE)}

    async def stop(self) -> None:
        """Closes the dataset."""
        await self._dataset.close()


class DatasetServicer(rpc.DatasetServiceServicer):
    """Answers queries; the node counts and is paid."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """Says what there is to ask."""
        return pb.DescribeResponse(columns=self._dataset.columns, rows=self._dataset.rows)

    async def Query(self, request: pb.QueryRequest, context: Any) -> AsyncIterator[pb.QueryResponse]:
        """Sends the rows that match."""
        if request.column not in self._dataset.columns:
            await abort(context, InvalidRequest(f"There is no column {request.column[:60]!r}."))
        most = min(request.most_rows, self._dataset.rows)
        async for rows in self._dataset.select(request.column, request.equals, most):
            yield pb.QueryResponse(rows=rows, count=len(rows))
