"""The content service as a plugin of a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from btt.sdk.content.torrent import RUN
from btt.sdk.plugin import Line, Price, ServiceContext, Unit, check_keys, read_rate
from btt.services.content.catalogue import Catalogue
from btt.services.content.service import SERVICE, ContentServicer, register

if TYPE_CHECKING:
    import grpc.aio

DEFAULT_RATE = "1 BTT / GiB"


class ContentPlugin:
    """Serves what was published in its folder, at one rate per byte.

    Configuration: `rate`, a price per bytes ("1 BTT / GiB").
    """

    name: ClassVar[str] = "content"

    def __init__(self, context: ServiceContext) -> None:
        self.reload(context.config)
        self._folder = context.data_dir
        self._log = context.log
        self._catalogue: Catalogue | None = None
        self._servicer: ContentServicer | None = None

    def reload(self, config: Mapping[str, Any]) -> None:
        """Takes the price of bytes."""
        check_keys(config, known=("rate",))
        self._rate = read_rate(config, "rate", default=DEFAULT_RATE, unit=Unit.BYTE)

    async def start(self) -> None:
        """Opens the catalogue."""
        self._catalogue = Catalogue(self._folder)
        self._servicer = ContentServicer(self._catalogue)
        self._log.info("content.open", entries=len(self._catalogue.list()))

    def register(self, server: grpc.aio.Server) -> None:
        """Adds ContentService."""
        assert self._servicer is not None, "started before it is registered"
        register(self._servicer, server)

    def prices(self) -> Mapping[Line, Price]:
        """Bytes of runs; a run is what the caller verifies and pays at once."""
        return {Line(SERVICE, Unit.BYTE): Price(self._rate, verify_units=RUN)}

    async def stop(self) -> None:
        """Ends the reading threads, then closes the catalogue."""
        if self._servicer is not None:
            self._servicer.close()
        if self._catalogue is not None:
            self._catalogue.close()
