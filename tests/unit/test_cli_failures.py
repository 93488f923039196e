"""Exit codes and error texts of the command line."""

from __future__ import annotations

import json

import pytest

from btt.sdk import errors
from btt.sdk.cli import failures, main
from btt.sdk.errors import BttError


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ConfigError, 3),
        (errors.ConnectError, 4),
        (errors.IdentityError, 4),
        (errors.LedgerUnreachable, 4),
        (errors.BudgetExceeded, 5),
        (errors.PriceChanged, 5),
        (errors.InsufficientFunds, 5),
        (errors.AccountUnknown, 5),
        (errors.ContentUnknown, 6),
        (errors.ChannelUnknown, 6),
        (errors.ContentMismatch, 1),
        (errors.StorageError, 1),
        (errors.InternalError, 1),
    ],
)
def test_exit_codes_are_stable(kind: type[BttError], code: int) -> None:
    assert failures.exit_code(kind("It failed.")) == code


@pytest.mark.parametrize("words", [["wallet", "balance"], ["nothing"], ["demo", "--nodes", "0"]])
def test_a_script_reads_what_is_wrong_with_its_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.delenv("BTT_LEDGER", raising=False)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    assert ended.value.code == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["reason"] == "USAGE"
    assert error["message"]
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().out == ""


def test_a_path_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["wallet", "create", "--no-password", "--wallet", "a" * 300, "--json"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert "File name too long" in err
    assert json.loads(out)["error"]["reason"] == "STORAGE"


def test_report_tells_a_person_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.report(errors.ConnectError("Nobody answers.", hint="Start it."), as_json=False) == 4
    out, err = capsys.readouterr()
    assert err == "error: Nobody answers. Start it.\n"
    assert out == ""


def test_report_tells_a_script_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    failures.report(errors.ContentUnknown("Not here."), as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "error": {
            "reason": "CONTENT_UNKNOWN",
            "message": "Not here.",
            "hint": "Check the infohash, or ask another node.",
        }
    }
    assert err.startswith("error: Not here.")


def test_an_error_without_a_reason_on_the_wire_is_named_by_its_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    failures.report(errors.ConnectError("Nobody."), as_json=True)
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "CONNECT"


def test_every_error_has_a_name_of_its_own_for_scripts() -> None:
    def below(cls: type[BttError]) -> list[type[BttError]]:
        return [cls, *(found for sub in cls.__subclasses__() for found in below(sub))]

    kinds = [kind for kind in below(BttError) if kind.__module__.startswith("btt.sdk.errors")]
    names = [failures.reason(kind) for kind in kinds]
    assert len(kinds) > 40
    assert len(set(names)) == len(names)
    assert all(name == name.upper() and name.replace("_", "").isalpha() for name in names)
    assert failures.reason(errors.LedgerRolledBack("It went back.")) == "LEDGER_ROLLED_BACK"


def test_a_terminal_never_gets_control_characters_of_the_other_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = errors.ContentUnknown("No \x1b[2Jsuch \x07file.")
    error.add_note("log:\n\x1b]0;title\x07 line")
    failures.report(error, as_json=False)
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "\x07" not in err
    assert "log:\n" in err


def test_main_returns_the_code_and_shows_no_traceback(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("empty")
    assert main(["wallet", "address", "--wallet", str(folder), "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["reason"] == "CONFIG"
    assert err.startswith("error: There is no wallet")
    assert "Traceback" not in err


def test_main_ends_with_130_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("btt.sdk.cli.commands.run", interrupted)
    assert main([]) == 130
