"""Who may ask: API keys, and the proxies that are believed.

A key is needed for POST /generate and DELETE /requests/{id}, which spend the device's time or
somebody's work. Health, metrics, docs, /v2, /info, /classes and /limits stay open: probes and
scrapers have no keys, and nothing there is a secret. Without keys everybody may ask.

Only sha256 digests are kept, so that no log, repr or traceback can hold a key.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

from fastapi.params import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import HTTPConnection

from rae.server.errors import UnauthorizedError

KEYS_VARIABLE = "RAE_API_KEYS"
ENTRY = re.compile(
    r"(?P<name>[A-Za-z0-9._@-]{1,64}):(?P<key>[!-+\--9;-~]{16,})(:(?P<weight>[0-9.]{1,20}))?"
)
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
ALLOWED = (
    "name:key or name:key:weight: a name of up to 64 letters, digits and ._@-, a key of 16 or more "
    f"ASCII characters without spaces, commas and colons, a weight from {MIN_WEIGHT:g} to "
    f"{MAX_WEIGHT:g}"
)
# An address needs 45 characters; a proxy that passes on what clients claim may hand over more.
MAX_ADDRESS = 64


@dataclass(frozen=True)
class Client:
    """Who asks, and the share of the device against that of others."""

    name: str
    weight: float = 1.0


class Access:
    """`keys` are clients by the sha256 of their key; nobody needs one where there are none."""

    def __init__(self, keys: Mapping[bytes, Client]) -> None:
        self._keys = dict(keys)

    @classmethod
    def read(cls, file: Path | None, environment: Mapping[str, str]) -> Self:
        """The keys of a file and of `RAE_API_KEYS`.

        Raises ValueError that names the file or the entry, never what is in it.
        """
        sources: dict[str, Sequence[str]] = {}
        if file is not None:
            try:
                text = file.read_text("utf-8-sig", errors="replace")
            except OSError as error:
                raise ValueError(f"--api-keys-file {file}: {error.strerror}") from error
            sources["line {} of --api-keys-file"] = text.splitlines()
        if KEYS_VARIABLE in environment:
            sources[f"entry {{}} of {KEYS_VARIABLE}"] = re.split(
                r"[,\n]", environment[KEYS_VARIABLE]
            )
        keys = dict(_parse(sources))
        # An empty file or variable is a secret that did not arrive: it must not let everybody in.
        if sources and not keys:
            places = " and ".join(place.partition(" of ")[2] for place in sources)
            raise ValueError(f"{places} holds no key; without it everybody may ask")
        return cls(keys)

    @property
    def needs_key(self) -> bool:
        return bool(self._keys)

    @property
    def documented(self) -> Sequence[Depends]:
        """Dependencies of a route that calls `client`: they check nothing, /docs shows them."""
        if not self.needs_key:
            return ()
        bearer = HTTPBearer(auto_error=False, description="An API key.")
        header = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same key.")
        return (Security(bearer), Security(header))

    def client(self, http: HTTPConnection) -> Client:
        """Who sent this request: the key's owner, or the address where no keys are needed.

        Raises UnauthorizedError.
        """
        if not self.needs_key:
            return Client(http.client.host[:MAX_ADDRESS] if http.client else "")
        scheme, _, token = http.headers.get("authorization", "").partition(" ")
        # The first is ours alone; what is in front of us may have a use for the second.
        key = http.headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")
        if not key:
            raise UnauthorizedError("an API key is needed")
        found = self._find(key)
        if found is None:
            raise UnauthorizedError("this API key is not known")
        return found

    def _find(self, key: str) -> Client | None:
        """Takes as long whichever key it is, and whether it is one."""
        digest, found = sha256(key.encode()).digest(), None
        for known, client in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = client
        return found


def _parse(sources: Mapping[str, Iterable[str]]) -> Iterator[tuple[bytes, Client]]:
    names: set[str] = set()
    digests: set[bytes] = set()
    for place, entries in sources.items():
        for number, entry in enumerate(map(str.strip, entries), 1):
            if not entry or entry.startswith("#"):
                continue
            found = ENTRY.fullmatch(entry)
            weight = _weight(found["weight"]) if found else None
            if not found or not weight:
                raise ValueError(f"{place.format(number)} is not {ALLOWED}")
            name, digest = found["name"], sha256(found["key"].encode()).digest()
            if name in names or digest in digests:
                twice = "name" if name in names else "key"
                raise ValueError(f"{place.format(number)} has a {twice} that was given before")
            names.add(name)
            digests.add(digest)
            yield digest, Client(name, weight)


def _weight(text: str | None) -> float | None:
    try:
        weight = float(text or 1)
    except ValueError:  # of several points
        return None
    return weight if MIN_WEIGHT <= weight <= MAX_WEIGHT else None


def proxies(text: str) -> list[str]:
    """Whose X-Forwarded-For is believed. Raises ValueError for what no address can match."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts if parts != ["*"] else ():
        try:
            ipaddress.ip_network(part)
        except ValueError as error:
            allowed = "addresses and networks, as 10.1.2.3 or 10.0.0.0/8, separated by commas, or *"
            raise ValueError(f"trusted-proxies has {part!r}; allowed: {allowed}") from error
    return parts
