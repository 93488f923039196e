"""The node's configuration says what is wrong, where, and what to write instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from btt.node import config
from btt.node.admission import Limits
from btt.node.config import parse
from btt.node.values import parse_listen
from btt.sdk.clock import parse_duration
from btt.sdk.errors import ConfigError
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress
from btt.sdk.money import Amount

OPERATOR = PrivateKey(bytes(31) + b"\1").public.address
LEDGER = str(LedgerAddress(OPERATOR, "127.0.0.1", 7400, bytes(range(32))))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("BTT_")]:
        monkeypatch.delenv(name)


def made(**tables):
    return parse({"ledger": {"address": LEDGER}, **tables}, source="node.toml")


def refusal(**tables) -> str:
    with pytest.raises(ConfigError) as caught:
        made(**tables)
    return str(caught.value)


def test_a_ledger_is_all_that_must_be_configured():
    found = made()
    assert found.ledger.address == LedgerAddress.parse(LEDGER)
    assert parse_listen(found.node.listen)[0] == "127.0.0.1", "a fresh node is not open to the world"
    assert found.payments.credit_limit > 0
    assert found.payments.close_margin * 2 <= found.payments.min_lifetime < found.payments.max_lifetime
    assert found.services == {}


def test_reads_the_file(tmp_path: Path):
    path = tmp_path / "node.toml"
    path.write_text(
        f"""
        [node]
        listen = "[::1]:0"
        [ledger]
        address = "{LEDGER}"
        [payments]
        payee = "{OPERATOR}"
        credit_limit = "2.5 BTT"
        grace = "90s"
        min_challenge = "2h"
        [services.content]
        enabled = true
        rate = "3 BTT / GiB"
        """
    )
    found = config.load(path)
    assert parse_listen(found.node.listen) == ("::1", 0)
    assert found.payments.payee == OPERATOR
    assert found.payments.credit_limit == Amount.parse("2.5 BTT")
    assert found.payments.grace == 90_000
    assert found.payments.terms.min_challenge_ms == 7_200_000
    assert found.services["content"].enabled
    assert found.services["content"].options == {"rate": "3 BTT / GiB"}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"payments": {"credit_limt": "1 BTT"}}, ["node.toml", "payments.credit_limt", '"credit_limit"']),
        ({"paymets": {}}, ["node.toml", '"paymets"', '"payments"']),
        ({"payments": {"credit_limit": 5}}, ["payments.credit_limit", '"0.5 BTT"']),
        ({"payments": {"credit_limit": 0.5}}, ["payments.credit_limit", '"0.5 BTT"']),
        ({"payments": {"credit_limit": "five"}}, ["payments.credit_limit", '"0.5 BTT"']),
        ({"payments": {"grace": 60}}, ["payments.grace", '"30s"']),
        ({"payments": {"grace": "0s"}}, ["grace", '"60s"']),
        ({"payments": {"min_challenge": "0s"}}, ["min_challenge"]),
        ({"payments": {"min_challenge": "50d"}}, ["min_challenge"]),
        ({"payments": {"min_lifetime": "8d", "max_lifetime": "7d"}}, ["min_lifetime"]),
        ({"payments": {"close_margin": "31m"}}, ["close_margin", "half of min_lifetime"]),
        ({"payments": {"payee": "Tnobody"}}, ["payments.payee"]),
        ({"node": {"listen": "7800"}}, ["node.listen", '"0.0.0.0:7800"']),
        ({"node": {"listen": "::1:7800"}}, ["node.listen"]),
        ({"node": {"listen": "127.0.0.1:65536"}}, ["node.listen"]),
        ({"node": {"listen": "127.0.0.1:000001234567"}}, ["node.listen"]),
        ({"node": {"listen": "a..b:7800"}}, ["node.listen"]),
        ({"node": {"advertise": "203.0.113.5:7800"}}, ["node.advertise", "without a port"]),
        ({"node": {"advertise": "[2001:db8::1]"}}, ["node.advertise", "an IP address"]),
        ({"node": {"advertise": "my host"}}, ["node.advertise", "a host name"]),
        ({"payments": {"max_lifetime": "999999999999d"}}, ["payments.max_lifetime", "a century"]),
        ({"payments": {"grace": "25h"}}, ["grace", '"60s"']),
        ({"limits": {"calls": 0}}, ["limits.calls"]),
        ({"limits": {"deadline": 60}}, ["limits.deadline", '"30s"']),
        ({"apps": {"allow": ["Tnobody"]}}, ["apps.allow", "Tnobody", '"unknown"']),
        ({"apps": {"deny": "unknown"}}, ["apps.deny"]),
        ({"services": {"content": {"limits": {"cals": 1}}}}, ["services.content.limits.cals"]),
        ({"ledger": {"address": "btt-ledger://x"}}, ["ledger.address", "btt-ledger://"]),
        ({"ledger": {}}, ["ledger.address", "btt-ledger://"]),
        ({"services": {"content": {"enabled": "perhaps"}}}, ["services.content.enabled"]),
    ],
)
def test_an_error_names_file_key_and_what_to_write(tables, words):
    text = refusal(**tables)
    assert [word for word in words if word not in text] == [], text


def test_without_a_ledger_it_says_where_to_get_the_address():
    with pytest.raises(ConfigError, match=r"ledger\.address is missing.*btt ledger serve"):
        parse({}, source="node.toml")


def test_the_environment_wins_over_the_file(monkeypatch):
    monkeypatch.setenv("BTT_NODE__PAYMENTS__CREDIT_LIMIT", "7 BTT")
    monkeypatch.setenv("BTT_NODE__SERVICES__CONTENT__RATE", "9 BTT / GiB")
    monkeypatch.setenv("BTT_NODE__SERVICES__CONTENT__ENABLED", "true")
    found = made(
        payments={"credit_limit": "1 BTT", "grace": "5s"}, services={"content": {"rate": "1 BTT / GiB"}}
    )
    assert found.payments.credit_limit == Amount.parse("7 BTT")
    assert found.payments.grace == 5000, "what the environment does not name stays"
    assert found.services["content"].enabled
    assert found.services["content"].options == {"rate": "9 BTT / GiB"}


@pytest.mark.parametrize("host", ["", "node.example.org", "203.0.113.5", "2001:db8::1", "localhost"])
def test_hosts_by_which_others_reach_a_node(host):
    assert made(node={"advertise": host}).node.advertise == host


def test_every_kind_of_key_can_stand_in_the_environment(monkeypatch):
    for key, value in (
        ("LEDGER__ADDRESS", LEDGER.replace("7400", "7401")), ("PAYMENTS__PAYEE", str(OPERATOR)),
        ("APPS__ALLOW", f'["unknown", "{OPERATOR}"]'), ("LIMITS__CALLS", "7"), ("LIMITS__UP", "1 MiB/s"),
        ("SERVICES__CONTENT__LIMITS__CALLS", "8"), ("SERVICES__CONTENT__QUOTA", "1 GiB"),
    ):  # fmt: skip
        monkeypatch.setenv(f"BTT_NODE__{key}", value)
    found = made()
    assert found.ledger.address.port == 7401
    assert found.payments.payee == OPERATOR
    assert found.apps.allow == ("unknown", str(OPERATOR))
    assert (found.limits.calls, found.limits.up) == (7, 1 << 20)
    assert (found.services["content"].limits.calls, found.services["content"].quota) == (8, 1 << 30)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BTT_NODE__LEDGER__ADDRESS", ["BTT_NODE__LEDGER__ADDRESS", "btt-ledger://"]),
        ("BTT_NODE__APPS__ALLOW", ["BTT_NODE__APPS__ALLOW", 'write a list, such as ["unknown"]']),
        ("BTT_NODE__PAYMENTS", ["BTT_NODE__PAYMENTS", "dictionary"]),
        ("BTT_NODE__SERVICES", ["BTT_NODE__SERVICES", "dictionary"]),
        ("BTT_NODE__PAYMENTS__CREDIT_LIMIT", ["BTT_NODE__PAYMENTS__CREDIT_LIMIT", '"0.5 BTT"']),
        ("BTT_NODE__PAYMENTS__CREDT_LIMIT", ["BTT_NODE__PAYMENTS__CREDT_LIMIT", '"credit_limit"']),
        ("BTT_NODE__PAYMNTS__CREDIT_LIMIT", ["BTT_NODE__PAYMNTS__CREDIT_LIMIT", '"payments"']),
    ],
)
def test_an_error_in_the_environment_names_the_variable(monkeypatch, name, words):
    monkeypatch.setenv(name, "nothing")
    text = refusal()
    assert [word for word in words if word not in text] == [], text


def test_no_file_and_no_toml(tmp_path: Path):
    with pytest.raises(ConfigError, match="btt node init"):
        config.load(tmp_path / "node.toml")
    (tmp_path / "node.toml").write_text("[node\n")
    with pytest.raises(ConfigError, match=r"node\.toml is not TOML"):
        config.load(tmp_path / "node.toml")


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("500ms", 500), ("30s", 30_000), ("15m", 900_000), ("1h", 3_600_000), ("7 d", 604_800_000)],
)
def test_durations(text, milliseconds):
    assert parse_duration(text) == milliseconds


@pytest.mark.parametrize("text", ["", "5", "1.5h", "-1s", "1h30m", "1w", 60, None])
def test_no_durations(text):
    with pytest.raises(ValueError, match="30s"):
        parse_duration(text)


def test_limits_of_the_node_and_of_a_service():
    found = made(
        limits={"calls": 5, "deadline": "90s"},
        services={"content": {"limits": {"calls_per_minute": 7, "deadline": "2s"}, "rate": "1 BTT / GiB"}},
    )
    assert found.limits.limits == Limits(calls=5, calls_per_payer=32, deadline_s=90)
    section = found.services["content"]
    assert section.limits.named("content") == Limits(name="content", calls_per_minute=7, deadline_s=2)
    assert section.options == {"rate": "1 BTT / GiB"}, "the service does not see the node's part"


def test_by_default_every_application_is_served():
    assert (made().apps.allow, made().apps.deny) == (("*",), ())
