"""The reference pages of the documentation, made from the code they describe.

A page of docs/reference holds a line `<!-- generated: NAME -->`; docs/conf.py puts the Markdown of
`GENERATED[NAME]()` in its place while the site is built, so nothing of it is committed. What has no
text in the code raises `Untold`: the build fails, and so does tests/unit/test_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable

from reference import bounds, commands, config, errors, protos

GENERATED: dict[str, Callable[[], str]] = {
    "bounds": bounds.all_bounds,
    "commands": commands.all_commands,
    "config": config.all_keys,
    "errors": errors.all_errors,
    "exit codes": commands.exit_codes,
    "protos": protos.all_packages,
    "reasons": errors.all_reasons,
}
