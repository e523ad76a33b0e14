"""One file over the network: continued where an earlier try ended, checked, and only from secure addresses."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from fitune.core.errors import ModelError, shorten
from fitune.core.files import disk, sync
from fitune.core.scratch import alone
from fitune.core.units import MIB
from fitune.models.hub.files import OnBytes, Remote, size

TIMEOUT = 30.0  # seconds without a byte
TRIES = 5
BLOCK = MIB


def open_url(address: str, start: int = 0) -> Any:
    """The answer of an address, from a byte on."""
    check_secure(address, "MODELSCOPE_ENDPOINT")
    request = urllib.request.Request(address, headers={"User-Agent": "fitune"})  # noqa: S310
    if start:
        request.add_header("Range", f"bytes={start}-")
    if token := os.environ.get("MODELSCOPE_API_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Files are often served by another host: it gets the request, and never the token."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """The request to the other address; ModelError for one that is not secure."""
        check_secure(newurl, "a redirect of ModelScope's")
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None and _origin(newurl) != _origin(req.full_url):
            for name in ("Authorization", "Cookie", "Proxy-authorization"):
                made.remove_header(name)
        return made


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def check_secure(address: str, name: str) -> None:
    """Refuse an address whose traffic others could read or forge.

    Args:
        address: https, or http on this machine itself.
        name: where it comes from.

    Raises:
        ModelError: it is another.
    """
    try:
        scheme, host, _ = _origin(address)
    except ValueError:
        scheme, host = "", None
    if host and (scheme == "https" or (scheme == "http" and _is_loopback(host))):
        return
    raise ModelError(
        f"{name} {visible_address(address)}: not secure",
        received=scheme or "no address",
        expected="https://, or http:// on this machine itself (localhost, 127.0.0.1)",
        fix="a token and the files would go over the network in the clear",
    )


def visible_address(address: str) -> str:
    """An address without what it may hold of secrets."""
    parts = urllib.parse.urlsplit(address) if "://" in address else None
    return shorten(f"{parts.scheme}://{parts.hostname or ''}{parts.path}" if parts else address, 200).strip("'")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fetch(address: str, file: Remote, target: Path, on_bytes: OnBytes | None) -> None:
    """Download one file, from where an earlier try ended; it is there whole and checked, or not at all.

    Raises:
        ModelError: the transfer fails, or the file is not the one that the hub lists.
    """
    with disk(target.parent, "free some space, or set FITUNE_CACHE to a folder on another disk"):
        target.parent.mkdir(parents=True, exist_ok=True)
        # named by size and sum: a part of another content is never continued
        partial = target.with_name(f"{target.name}.{file.size}-{(file.sha256 or '')[:8]}.incomplete")
        with alone(partial):
            if size(target) != file.size:  # else another process was faster
                _fetch_alone(address, file, target, partial, on_bytes)
        partial.unlink(missing_ok=True)


def _fetch_alone(address: str, file: Remote, target: Path, partial: Path, on_bytes: OnBytes | None) -> None:
    problem = ""
    for _ in range(TRIES):
        try:
            _transfer(address, file, partial, on_bytes)
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}"
            if error.code in (401, 403, 404):
                break
        except OSError as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        received = size(partial)
        if received > file.size:
            problem = f"{received:,} bytes of {file.size:,}"
            partial.unlink()
            break
        if received == file.size:
            if file.sha256 and _sha256(partial) != file.sha256:
                partial.unlink()
                raise ModelError(
                    f"{file.path}: the downloaded file is damaged (its SHA-256 differs)", fix="download it again"
                )
            sync(partial)
            partial.replace(target)
            sync(target.parent)
            return
    raise ModelError(
        f"{file.path}: the download failed",
        received=problem or f"{max(0, size(partial)):,} bytes of {file.size:,}",
        expected=f"{file.size:,} bytes",
        fix="try again: finished parts are kept",
    )


def _transfer(address: str, file: Remote, partial: Path, on_bytes: OnBytes | None) -> None:
    start = max(0, size(partial))
    if start >= file.size:
        partial.touch()
        return
    with open_url(address, start) as answer, partial.open("ab" if answer.status == 206 else "wb") as out:
        while block := answer.read(BLOCK):
            out.write(block)
            if on_bytes is not None:
                on_bytes(file.path, out.tell(), file.size)
            if out.tell() > file.size:
                return


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
