"""Pictures that clients give: of data URIs, of other hosts where the operator allows them, of multipart files.

A server that fetches what it is told to can be sent after the machines beside it. So nothing is fetched but from hosts
that are listed; their addresses must be public or listed themselves, are looked up once and connected to as they were
checked; redirects stay on the host; bytes and time are counted. Headers of pictures are judged before anything is
decoded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from nexusgen import __version__
from nexusgen.errors import SampleError
from nexusgen.images import check_image
from pipelines.api_errors import RefusedError
from pipelines.api_settings import FETCH_TIMEOUT_S, MAX_PICTURE_BYTES

MAX_URL_CHARACTERS = 2048
_MAX_REDIRECTS = 3
_DATA_URI = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*;base64,", re.ASCII)
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # NAT64: an IPv4 address in its last 32 bits
_HOST = re.compile(r"[a-z0-9_][a-z0-9_.-]*|[0-9a-f:.]+")
_PORTS = {"http": 80, "https": 443}


class _RefusedAddressError(OSError):
    pass


class HostList:
    """Hosts that pictures may be fetched from, `HOST` on the scheme's port or `HOST:PORT`. Raises: ValueError."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._entries = {_parse_entry(entry) for entry in entries}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def allows(self, host: str, port: int) -> bool:
        """Whether a host's name or address is listed with this port, or without one and this is a scheme's own."""
        return (host, port) in self._entries or (port in _PORTS.values() and (host, None) in self._entries)

    def allows_address(self, address: str, port: int) -> bool:
        """Whether a listed host may have this address: it is public, or listed itself."""
        plain = address.partition("%")[0]
        return _is_public(ipaddress.ip_address(plain)) or self.allows(plain, port)


def _parse_entry(entry: str) -> tuple[str, int | None]:
    try:
        url = URL(f"http://{entry}")
        host, port = _host_of(url), url.explicit_port
    except ValueError:
        host, port = "", None
    if (
        not _HOST.fullmatch(host)
        or url.path not in ("", "/")
        or url.user is not None
        or url.query_string
        or url.fragment
    ):
        raise ValueError(f"allowed_image_hosts holds {entry!r}; wanted HOST or HOST:PORT, such as example.org")
    return host, port


def _host_of(url: URL) -> str:
    return (url.raw_host or "").lower().rstrip(".")


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class _CheckedResolver(AbstractResolver):
    """Looks a host up, and gives only addresses that may be connected to; there is no second look-up to fool."""

    def __init__(self, hosts: HostList) -> None:
        self._hosts = hosts

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results: list[ResolveResult] = []
        for family_, _, protocol, _, address in found:
            if not self._hosts.allows_address(str(address[0]), port):
                raise _RefusedAddressError(f"{host} has the address {address[0]}, which is not public")
            result: Any = {
                "hostname": host,
                "host": address[0],
                "port": port,
                "family": family_,
                "proto": protocol,
                "flags": socket.AI_NUMERICHOST,
            }
            results.append(result)
        return results

    async def close(self) -> None:
        """Nothing is kept."""


class PictureReader:
    """Reads the pictures of requests. `allowed_hosts` as `ApiSettings.allowed_image_hosts`."""

    def __init__(self, allowed_hosts: Sequence[str]) -> None:
        self._hosts = HostList(allowed_hosts)

    async def read_urls(self, urls: Sequence[tuple[str, str]]) -> tuple[bytes, ...]:
        """The pictures at (URL, parameter that names it), headers checked. Raises: RefusedError (400, 413)."""
        pictures: list[bytes] = []
        room = MAX_PICTURE_BYTES
        for url, param in urls:
            if url[:5].lower() == "data:":
                picture = await asyncio.to_thread(_decode_data_uri, url, param)
            else:
                picture = await self._fetch(url, param, room)
            room -= len(picture)
            if room < 0:
                raise _too_large(param)
            await check_picture(picture, param)
            pictures.append(picture)
        return tuple(pictures)

    async def _fetch(self, text: str, param: str, max_bytes: int) -> bytes:
        url = self._check_url(text, param)
        timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S)
        connector = aiohttp.TCPConnector(
            resolver=_CheckedResolver(self._hosts), use_dns_cache=False, force_close=True, limit=1
        )
        headers = {"User-Agent": f"nexusgen/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
        try:
            async with (
                asyncio.timeout(FETCH_TIMEOUT_S),  # for all of it, redirects included
                aiohttp.ClientSession(
                    connector=connector,
                    timeout=timeout,
                    headers=headers,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    trust_env=False,
                    auto_decompress=False,
                ) as session,
            ):
                for _ in range(1 + _MAX_REDIRECTS):
                    async with session.get(url, allow_redirects=False) as response:
                        if response.status in (301, 302, 303, 307, 308):
                            target = url.join(URL(response.headers.get("location", "")))
                            if _host_of(target) != _host_of(url):
                                raise _not_fetched(param, "it redirects to another host")
                            url = self._check_url(str(target), param)
                            continue
                        if response.status != 200:
                            raise _not_fetched(param, f"its host answered {response.status}")
                        return await _read_counted(response, param, max_bytes)
                raise _not_fetched(param, f"it redirects more than {_MAX_REDIRECTS} times")
        except TimeoutError:
            raise _not_fetched(param, f"its host took longer than {FETCH_TIMEOUT_S:g} s") from None
        except (_RefusedAddressError, aiohttp.ClientConnectorError) as error:
            cause = error if isinstance(error, _RefusedAddressError) else error.os_error
            if isinstance(cause, _RefusedAddressError):
                raise _not_allowed(param, "its host has an address that is not public") from None
            raise _not_fetched(param, "its host can't be reached") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise _not_fetched(param, "its host can't be reached or speaks no HTTP") from None

    def _check_url(self, text: str, param: str) -> URL:
        if len(text) > MAX_URL_CHARACTERS:
            raise RefusedError(400, f"Invalid {param!r}: the URL has more than {MAX_URL_CHARACTERS} characters.", param)
        try:
            url = URL(text)
            host, port, scheme = _host_of(url), url.port, url.scheme
        except ValueError:
            raise RefusedError(400, f"Invalid {param!r}: not a URL.", param, "invalid_image_url") from None
        if scheme not in _PORTS:
            message = f"Invalid {param!r}: send pictures as data:image/...;base64,... URIs."
            raise RefusedError(400, message, param, "invalid_image_url")
        if not host or port is None or url.user is not None or url.password is not None:
            message = f"Invalid {param!r}: the URL must name a host, and no user or password."
            raise RefusedError(400, message, param, "invalid_image_url")
        if not self._hosts.allows(host, port):
            raise _not_allowed(param, "its host is not on this server's list of allowed_image_hosts")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return url
        # An address is connected to without being looked up.
        if not self._hosts.allows_address(str(address), port):
            raise _not_allowed(param, "its address is not public")
        return url


async def _read_counted(response: aiohttp.ClientResponse, param: str, max_bytes: int) -> bytes:
    picture = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        picture += chunk
        if len(picture) > max_bytes:
            raise _too_large(param)
    return bytes(picture)


def _decode_data_uri(text: str, param: str) -> bytes:
    found = _DATA_URI.match(text[:256])
    if found is None:
        message = f"Invalid {param!r}: a data URI must be of the form data:image/png;base64,..."
        raise RefusedError(400, message, param, "invalid_image_url")
    try:
        return base64.b64decode(text[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(400, f"Invalid {param!r}: not valid base64.", param, "invalid_base64") from None


async def check_picture(picture: bytes, param: str) -> None:
    """Judge a picture's header, apart from the event loop. Raises: RefusedError (400)."""
    try:
        await asyncio.to_thread(check_image, picture)
    except SampleError as error:
        raise RefusedError(400, f"Invalid {param!r}: {error.reason}.", param, error.reason_code) from None


def _too_large(param: str) -> RefusedError:
    message = f"The request's pictures have more than {MAX_PICTURE_BYTES} bytes together, which is the limit."
    return RefusedError(413, message, param, "body_too_large")


def _not_allowed(param: str, reason: str) -> RefusedError:
    message = f"Invalid {param!r}: not fetched, as {reason}; send the picture as a data URI."
    return RefusedError(400, message, param, "image_url_not_allowed")


def _not_fetched(param: str, reason: str) -> RefusedError:
    return RefusedError(400, f"Invalid {param!r}: not fetched, as {reason}.", param, "image_url_failed")
