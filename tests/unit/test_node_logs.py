"""The log of a node: readable by people and machines, and without secrets."""

from __future__ import annotations

import errno
import io
import json
import logging

import pytest
import structlog

from btt.node.config import LogSection
from btt.node.logs import LEVEL, REDACTED, configure
from btt.sdk.keys import PrivateKey

KEY = PrivateKey.generate()
HEX = KEY.secret.hex()
PEM = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n-----END PRIVATE KEY-----"


@pytest.fixture
def log():
    """Returns a function that configures the log, and gives where it goes."""
    kept, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def start(to=None, **section):
        stream = to or io.StringIO()
        configure(LogSection(**section), stream)
        return stream

    yield start
    structlog.reset_defaults()
    structlog.configure(**kept)
    root.handlers[:] = handlers
    root.setLevel(level)
    LEVEL.set("info")


@pytest.mark.parametrize("shape", ["json", "human"])
@pytest.mark.parametrize(
    "fields",
    [
        {"token": b"short"},
        {"wallet_password": "swordfish"},
        {"payee_key": "anything"},
        {"thing": KEY},
        {"raw": KEY.secret},
        {"note": f"the key is {HEX}, take it"},
        {"nested": {"deep": [{"secret": "swordfish"}, HEX]}},
        {"error": ValueError(f"bad key {HEX}")},
        {"pem": PEM},
        {"text": f"before {PEM} after"},
        {"words": "abandon ability able about above absent absorb abstract absurd abuse access accident"},
        {"metadata": (("btt-token-bin", KEY.secret),)},
    ],
)
def test_secrets_are_taken_out_whatever_they_are_called(log, shape, fields):
    stream = log(format=shape)
    structlog.get_logger().info("something", **fields)
    text = stream.getvalue()
    assert "something" in text
    assert "redacted" in text
    for secret in (
        HEX,
        repr(KEY.secret),
        "swordfish",
        "MIGHAgEAMBMGByqGSM49",
        "abandon",
        "short",
        "anything",
    ):
        assert secret not in text


def test_secrets_are_taken_out_of_tracebacks_and_of_what_libraries_say(log):
    stream = log(format="json")
    try:
        raise ValueError(f"cannot use {HEX}")
    except ValueError:
        structlog.get_logger().exception("failed")
    logging.getLogger("some.library").warning("password is %s", HEX)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 2
    assert "Traceback" in lines[0]["exception"]
    assert HEX not in stream.getvalue()
    assert stream.getvalue().count(REDACTED) >= 2


def test_what_is_public_stays(log):
    stream = log(format="json")
    ledger = f"btt-ledger://{KEY.address}@127.0.0.1:1/{HEX}"
    structlog.get_logger().info("ok", channel=HEX, address=ledger, payer=str(KEY.address))
    line = json.loads(stream.getvalue())
    assert (line["channel"], line["address"], line["payer"]) == (HEX, ledger, str(KEY.address))
    assert line["level"] == "info"
    assert line["timestamp"]


class Full(io.StringIO):
    """A file on a disk without room."""

    room = False

    def write(self, text):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)

    def flush(self):
        self.write("")


def test_a_log_that_cannot_be_written_ends_no_work(log):
    stream = log(to=Full(), format="json")
    for logger in (structlog.get_logger(), logging.getLogger("library")):
        logger.error("lost")
    stream.room = True
    structlog.get_logger().error("kept")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["kept"]


def test_the_level_changes_while_it_runs(log):
    stream = log(format="json", level="warning")
    logger = structlog.get_logger()
    logger.info("quiet")
    LEVEL.set("debug")
    logger.debug("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]
