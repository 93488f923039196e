"""The peer `bare RPC`: the same messages over TLS, answered at once with a receipt made beforehand.

What a unary call costs in Python's gRPC, whatever the ledger does: no signature, no books, no
disk. Same certificate type, same options and the same clients as for the product.
"""

from __future__ import annotations

import argparse
import asyncio
import os

import grpc
import grpc.aio

from bench.callers import call
from bench.operations import Operations
from bench.processes import Child, heard, say
from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.signing import Receipt
from btt.sdk.tls import make_certificate, server_credentials
from btt.services.ledger.server import MAX_CALLS, OPTIONS

NAME = "bare.btt"


_BODY, _SIGNATURE = os.urandom(Receipt.SIZE), os.urandom(65)


async def _answer(request: pb.TransferRequest, context: object) -> pb.TransferResponse:
    return pb.TransferResponse(receipt=pb.LedgerReceipt(body=_BODY, signature=_SIGNATURE))


async def _serve() -> None:
    key, certificate = make_certificate(NAME)
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
    handler = grpc.unary_unary_rpc_method_handler(
        _answer, pb.TransferRequest.FromString, pb.TransferResponse.SerializeToString
    )
    service = pb.DESCRIPTOR.services_by_name["LedgerService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Transfer": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(key, certificate))
    await server.start()
    say(
        "ready",
        port=port,
        certificate=certificate.decode("ascii"),
        name=NAME,
        ledger_id=bytes(32).hex(),
        operator="",
    )
    await asyncio.to_thread(heard)
    await server.stop(None)


def contestant(*, clients: int, each: int) -> Operations:
    """Lets the ledger's clients call a bare server.

    Args:
        clients: How many at once.
        each: Calls of one client.
    """
    with Child("server", "bench.peers.bare_rpc", []) as server:
        return call(server, clients=clients, each=each)


if __name__ == "__main__":
    argparse.ArgumentParser().parse_args()
    asyncio.run(_serve())
