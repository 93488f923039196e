"""The reference pages are made from the code, and refuse to be made where the code says nothing."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
import typer.main
from pydantic import BaseModel

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

from google.protobuf import descriptor_pb2

from btt.node.config import NodeConfig
from btt.proto.common.v1 import error_pb2
from btt.sdk.cli.commands import plugins
from btt.sdk.errors import BY_REASON
from reference import GENERATED, commands, config, errors, protos
from reference.text import Untold


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return {name: make() for name, make in GENERATED.items()}


def test_every_error_and_reason_is_told(made: dict[str, str]) -> None:
    for cls in BY_REASON.values():
        section = made["errors"].partition(f"# {cls.__name__}\n")[2].partition("\n#")[0]
        assert "- What to do: " in section, cls
        assert f"can help: {'yes' if cls.retryable else 'no'}" in section
    for name in error_pb2.Reason.keys()[1:]:
        assert f"`{name.removeprefix('REASON_')}`" in made["reasons"]


def test_every_key_is_told_with_its_default(made: dict[str, str]) -> None:
    assert (
        '| `grace` | `"1m"` | How long a call waits for payment. | `BTT_NODE__PAYMENTS__GRACE` |'
        in made["config"]
    )
    assert '| `credit_limit` | `"1 BTT"` |' in made["config"]
    assert all(f"## [{name}]" in made["config"] for name in NodeConfig.model_fields if name != "services")
    assert "### [services.content]" in made["config"]


def test_every_command_is_told_also_those_of_plugins(made: dict[str, str]) -> None:
    assert all(f"# btt {name.replace('.', ' ')}\n" in made["commands"] for name in plugins())
    assert "### btt peers ban" in made["commands"]
    assert (
        "--stdin-lifeline" not in made["commands"].partition("### btt content publish")[2].partition("###")[0]
    )


def test_the_wire_is_told_with_what_it_costs(made: dict[str, str]) -> None:
    assert (
        "| `Fetch` | `FetchRequest` → stream `FetchResponse` | Sends runs of a file. | metered,"
        in made["protos"]
    )
    assert "Its bytes. **Charged, payable when: verified.**" in made["protos"]


def test_bounds_are_those_of_the_code(made: dict[str, str]) -> None:
    assert "5 % of what it paid here, at most 1 BTT" in made["bounds"]
    assert "| 1 hour | `min_challenge` |" in made["bounds"]


def test_an_error_that_does_not_say_what_to_do_is_refused() -> None:
    # Not below BttError: it would join the tree that other tests look at.
    class Silent:
        """Something happened."""

        hint, reason, retryable = "", "", False

    with pytest.raises(Untold, match="Silent does not say what to do"):
        errors.section(Silent, 2)
    Silent.__doc__ = None
    with pytest.raises(Untold, match="Silent has no docstring"):
        errors.section(Silent, 2)
    Silent.__doc__ = "Something happened.\n\nCall somebody."
    assert "- What to do: Call somebody." in errors.section(Silent, 2)


def test_a_key_without_text_is_refused() -> None:
    class Section(BaseModel):
        """Some keys.

        Attributes:
            told: What it is.
        """

        told: int = 1
        untold: int = 2

    class Outer(BaseModel):
        """Tables in tables.

        Attributes:
            inner: Another table.
        """

        inner: Section = Section()

    for model in (Section, Outer):
        with pytest.raises(Untold, match="the key untold of Section"):
            config.section(model, "x")


def test_a_command_or_an_option_without_help_is_refused() -> None:
    app = typer.Typer()

    @app.command(help="Does it.")
    def do(untold: Annotated[int, typer.Option()] = 1) -> None: ...

    with pytest.raises(Untold, match="`--untold` of `btt do` has no help"):
        commands.sections(typer.main.get_command(app), None, "btt do")

    app = typer.Typer()

    @app.command()
    def undo() -> None: ...

    with pytest.raises(Untold, match="`btt undo` has no help"):
        commands.sections(typer.main.get_command(app), None, "btt undo")


def test_a_field_without_a_comment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = descriptor_pb2.FileDescriptorProto(name="silent.proto", package="silent")
    file.message_type.add(name="Message").field.add(name="field")
    for path in ([2], [4, 0]):
        file.source_code_info.location.add(path=path, leading_comments=" Told.\n")
    monkeypatch.setattr(protos, "_files", lambda: (file,))
    protos.comments.cache_clear()
    with pytest.raises(Untold, match=r"silent\.Message\.field in silent\.proto has no comment"):
        protos.comments("silent.proto")
