"""The service on a real node inside this process, called and paid by a dApp."""

from __future__ import annotations

import pytest
from dataset_query.conformance import CASE
from dataset_query.plugin import Plugin
from dataset_query.v1 import dataset_query_pb2 as pb
from dataset_query.v1 import dataset_query_pb2_grpc as rpc

from btt.sdk.errors import InvalidRequest
from btt.sdk.testing import Devnet


async def test_each_row_is_paid_and_no_more_than_the_cap() -> None:
    async with Devnet(
        in_process=True, plugins={"dataset-query": Plugin}, services={"dataset-query": CASE.config}
    ) as net:
        async with await net.client("1 BTT") as btt:
            service = btt.service(rpc.DatasetServiceStub, budget="0.5 BTT")
            async with service as dataset:
                described = await dataset.Describe(pb.DescribeRequest())
                assert (list(described.columns), described.rows) == (["kind", "number"], 250)
                request = pb.QueryRequest(column="kind", equals="even", most_rows=130)
                counts = [message.count async for message in dataset.Query(request)]
                assert counts == [100, 30]
                with pytest.raises(InvalidRequest, match="no column"):
                    async for _ in dataset.Query(pb.QueryRequest(column='"; --', most_rows=1)):
                        pass
        assert btt.receipts[0].paid == service.spent == 130_000
