"""Which applications an operator serves.

An application is a key. A session says for which one it is, with a grant of that key to the
session's channel key; without one the application is "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from btt.sdk.errors import AppRefused, InvalidRequest
from btt.sdk.keys import Address
from btt.sdk.payment.apps import AppGrant
from btt.sdk.signing import APP_UNKNOWN

ANY = "*"
UNKNOWN = "unknown"


def parse_app(text: str) -> str:
    """Checks one entry of a list of applications.

    Raises:
        ValueError: It is neither an address, nor "unknown", nor "*".
    """
    if text not in (ANY, UNKNOWN):
        try:
            Address.parse(text)
        except (InvalidRequest, ValueError):
            raise ValueError(f'"{text}" is no application: write its T-address, "unknown" or "*"') from None
    return text


class Apps:
    """The operator's choice.

    Args:
        allow: Addresses, "unknown" for sessions without a grant, or "*" for all.
        deny: The same; it wins.
        clock: Unix milliseconds.
    """

    def __init__(self, *, allow: Collection[str], deny: Collection[str], clock: Callable[[], int]) -> None:
        self._clock = clock
        self.choose(allow=allow, deny=deny)

    def choose(self, *, allow: Collection[str], deny: Collection[str]) -> None:
        """Serves others from now on; sessions that are open stay.

        Args:
            allow: As for the class.
            deny: The same.
        """
        self._allow = frozenset(allow)
        self._deny = frozenset(deny)

    def check(self, app: Address) -> None:
        """Says whether sessions of an application are served here.

        Raises:
            AppRefused: They are not.
        """
        names = {UNKNOWN if app == APP_UNKNOWN else str(app), ANY}
        if names & self._deny or not names & self._allow:
            raise AppRefused(
                "The operator does not serve applications without a grant."
                if app == APP_UNKNOWN
                else f"The operator does not serve the application {app}."
            )

    def check_current(self, grant: AppGrant) -> None:
        """Says whether a session may go on under the grant it was opened with.

        Raises:
            AppRefused: The grant has expired.
        """
        if self._clock() > grant.valid_until_ms:
            raise AppRefused("The application's grant has expired.", hint="Open a session with a new one.")
