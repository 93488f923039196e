"""Names the network that a call comes from, for limits that many addresses must share."""

from __future__ import annotations

import ipaddress


def network_of(peer: str) -> str:
    """Returns the /24 or /48 of a gRPC peer name, such as "ipv4:192.0.2.7:4000"."""
    family, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].removeprefix("[").removesuffix("]").replace("%5B", "").replace("%5D", "")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return family
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False))
