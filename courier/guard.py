"""Which addresses a name may lead to: looked up once, all of them checked, and then called by number."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from jobs.webhooks import NotAllowed, Target

#: Ranges that reach, or may reach, other machines than they seem to: relays and translations of IPv4.
TRANSLATED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.88.99.0/24",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "2001::/32",
        "100::/64",
        "fec0::/10",
    )
)

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> Sequence[str]:
    """Every address of a name, by the system's own rules.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


async def addresses(target: Target, resolve: Resolve) -> Sequence[str]:
    """Where to connect to.

    Raises:
        NotAllowed: one of them is not public, and nobody vouches for the host.
        OSError: there is none.
    """
    found = await resolve(target.host, target.port)
    if not found or not (target.private or all(map(is_public, found))):
        raise NotAllowed
    return found


def is_public(address: str) -> bool:
    """Anybody on the internet has the same machine behind this address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if not ip.is_global or ip.is_multicast or ip.is_reserved or ip.is_unspecified:
        return False
    return not any(ip.version == network.version and ip in network for network in TRANSLATED)
