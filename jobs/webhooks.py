"""Who may be called back: the operator's list, and addresses judged by it. Resolves nothing, sends nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_URL_CHARACTERS = 2_048
PORTS: Mapping[str, int] = {"https": 443, "http": 80}
ENTRY = re.compile(r"(?:(https?)://)?([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.I)

#: One text for whatever is wrong with an address: it tells nobody what else the list holds.
REFUSED = "must be an address without credentials or fragment at a host that this server may call (webhook_hosts)"
OFF = "callbacks are off here: the operator lists in webhook_hosts who may be called"


class NotAllowed(Exception):
    """The address is none that this server calls."""

    def __init__(self, text: str = REFUSED) -> None:
        super().__init__(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a callback goes, taken apart once, so that what is checked is what is called."""

    scheme: str
    host: str  #: in lower case, without brackets
    port: int
    path: str  #: with the query
    private: bool  #: the operator vouches for wherever the name leads to

    @property
    def netloc(self) -> str:
        """Host and port as the header ``Host`` has them."""
        return located(self.host, self.port) if self.port != PORTS[self.scheme] else located(self.host)


class AllowedHosts:
    """The operator's list. An entry is ``host``, ``host:port`` or ``http://host:port``; https is what is meant else.

    Raises:
        ValueError: an entry is none, naming the setting.
    """

    def __init__(self, public: str = "", private: str = "") -> None:
        """Take comma-separated entries; ``private`` ones may lead to addresses that are not public."""
        self._private = dict.fromkeys(_origins("webhook_hosts", public), False)
        self._private |= dict.fromkeys(_origins("webhook_private_hosts", private), True)

    def __bool__(self) -> bool:
        return bool(self._private)

    def target(self, url: str) -> Target:
        """Judge an address.

        Raises:
            NotAllowed: it is malformed, or the list has no such scheme, host and port.
        """
        if not self:
            raise NotAllowed(OFF)
        origin, path = _split(url)
        if origin not in self._private:
            raise NotAllowed
        scheme, host, port = origin
        return Target(scheme=scheme, host=host, port=port, path=path, private=self._private[origin])


def located(host: str, port: int | None = None) -> str:
    """A host, as a URL has it: an IPv6 address in brackets; with a port where one is given."""
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def _origins(setting: str, entries: str) -> Iterator[tuple[str, str, int]]:
    for entry in filter(None, map(str.strip, entries.split(","))):
        if (found := ENTRY.fullmatch(entry)) is None or found[3] == "0":
            raise ValueError(f"{setting}: must list host, host:port or http://host:port with commas, not {entry!r}")
        scheme = (found[1] or "https").lower()
        yield scheme, found[2].lower().strip("[]"), int(found[3] or PORTS[scheme])


def _split(url: str) -> tuple[tuple[str, str, int], str]:
    """Scheme, host and port; path with query. What two parsers might read differently is refused."""
    plain = url.isascii() and url.isprintable() and not set(url) & set(' \\#"<>^`{|}')
    if not plain or len(url) > MAX_URL_CHARACTERS:
        raise NotAllowed
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise NotAllowed from None
    if parts.scheme not in PORTS or not host or "@" in parts.netloc or port == 0:
        raise NotAllowed
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return (parts.scheme, host, port or PORTS[parts.scheme]), path
