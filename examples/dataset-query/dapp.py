"""Asks a dataset for rows and pays for each: `python dapp.py COLUMN VALUE`."""

from __future__ import annotations

import asyncio
import sys

from dataset_query.v1 import dataset_query_pb2 as pb
from dataset_query.v1.dataset_query_pb2_grpc import DatasetServiceStub

from btt.sdk import Budget, Client

MOST_ROWS = 1000


async def main(column: str, value: str) -> None:
    async with Client.connect(budget=Budget("1 BTT")) as btt:
        service = btt.service(DatasetServiceStub, budget="0.5 BTT")
        request = pb.QueryRequest(column=column, equals=value, most_rows=MOST_ROWS)
        print(f"at most {(await service.estimate_call('Query', request)).most}")
        async with service as dataset:
            async for found in dataset.Query(request):
                for row in found.rows:
                    print(row)
        print(f"spent {service.spent}")
    print(f"receipt: paid {btt.receipts[0].paid} base units, counts agree: {btt.receipts[0].counts_agree}")


asyncio.run(main(*sys.argv[1:3]))
