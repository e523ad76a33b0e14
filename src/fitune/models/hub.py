"""Models from the Hugging Face hub, or from ModelScope.

In: an id (`org/name`, `ms:org/name`; `@revision` behind it pins one). Out: a folder in a cache, complete, of one
revision. The disk is checked first, a transfer that breaks is gone on with, and sizes are checked against what the hub
says. HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 forbids the network, HF_TOKEN opens gated models; MODELSCOPE_ENDPOINT
and MODELSCOPE_API_TOKEN are ModelScope's. huggingface_hub does the hub's transfers, ModelScope's are two addresses.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fitune.core.errors import ModelError, shorten
from fitune.core.files import disk, sync, write_json
from fitune.core.scratch import alone
from fitune.core.units import MIB
from fitune.data.cache import default_folder

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin")
MODELSCOPE = "https://www.modelscope.cn"
TIMEOUT = 30.0  # seconds without a byte
TRIES = 5
BLOCK = MIB
OnBytes = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Downloaded:
    """What lies in the cache now."""

    folder: str
    id: str
    revision: str
    files: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Remote:
    """A file on a hub. sha256 where it is told."""

    path: str
    size: int
    sha256: str | None = None


def parse(name: str) -> tuple[str, str, str | None] | None:
    """(hub, id, revision) of an id; None: it is none. The hub is hf or ms."""
    found = re.fullmatch(r"(ms:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if found is None or name.startswith((".", "~", "/")):
        return None
    return ("ms" if found[1] else "hf"), found[2], found[3]


def revision_of(folder: Path) -> str | None:
    """The revision that a folder of a cache is; None: it is no such folder."""
    parts = folder.parts
    return parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" else None


def download(name: str, *, only: Sequence[str] = (), on_bytes: OnBytes | None = None) -> Downloaded:
    """Fetch a model, or what is missing of it.

    Args:
        name: an id.
        only: files to fetch; none: all that a model needs, of weights in two formats the safetensors.
        on_bytes: is told the file, the bytes that are there, and all of them.

    Raises:
        ModelError: no such id, no permission, no network, no room, or a file that is not what the hub says.
    """
    parsed = parse(name)
    if parsed is None:
        raise ModelError(f"{name}: no id of a hub", expected="org/name, or ms:org/name for ModelScope")
    hub, identity, revision = parsed
    if hub == "ms":
        return _from_modelscope(identity, revision or "master", only, on_bytes)
    return _from_hub(identity, revision, only)


def check(name: str) -> None:
    """Raises ModelError where a hub has no model of that id, or it cannot be reached and is not in the cache."""
    parsed = parse(name)
    if parsed is None or parsed[0] == "ms":
        return  # ModelScope's files are listed when they are fetched
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    _, identity, revision = parsed
    if isinstance(try_to_load_from_cache(identity, "config.json", revision=revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{identity}: no such folder, and not in the hub's cache (HF_HUB_OFFLINE is set)",
            fix=f"with a network: fitune download {identity}",
        )
    check_secure(constants.ENDPOINT, "HF_ENDPOINT")
    try:
        HfApi().model_info(identity, revision=revision)
    except Exception as error:
        raise _told(identity, error) from error


def chosen(files: Sequence[Remote], only: Sequence[str] = ()) -> list[Remote]:
    """What is fetched of a model's files: of weights in two formats the safetensors, and nothing from subfolders."""
    if only:
        return [file for file in files if file.path in only]
    safe = any(file.path.endswith(".safetensors") for file in files)
    wanted = [file for file in files if "/" not in file.path and any(fnmatch(file.path, kind) for kind in WANTED)]
    return [file for file in wanted if not (safe and (file.path.endswith(".bin") or ".bin.index" in file.path))]


def check_room(folder: Path, needed: int, name: str, free: int | None = None) -> None:
    """Raises ModelError where so many bytes do not fit on the disk."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    there = shutil.disk_usage(place).free if free is None else free
    if needed > there:
        raise ModelError(
            f"{name}: does not fit on the disk",
            received=f"{there / MIB:,.0f} MiB free at {place}",
            expected=f"{needed / MIB:,.0f} MiB",
            fix="free some space, or name another place: HF_HOME (hub), FITUNE_CACHE (ModelScope)",
        )


# ---- Hugging Face ----


def _from_hub(identity: str, revision: str | None, only: Sequence[str]) -> Downloaded:
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return _cached(identity, revision, only)
    check_secure(constants.ENDPOINT, "HF_ENDPOINT")
    try:
        info = HfApi().model_info(identity, revision=revision, files_metadata=True)
        files = chosen([Remote(one.rfilename, int(one.size or 0)) for one in info.siblings or []], only)
        if not files:
            raise ModelError(f"{identity}: holds no model", expected="config.json and weights")
        pinned = str(info.sha)
        there = {f.path for f in files if isinstance(try_to_load_from_cache(identity, f.path, revision=pinned), str)}
        missing = [file for file in files if file.path not in there]
        check_room(Path(constants.HF_HUB_CACHE), sum(file.size for file in missing), identity)
        patterns = [_literal(file.path) for file in files]
        folder = Path(snapshot_download(identity, revision=revision, allow_patterns=patterns))
        if folder.name != pinned:  # it was changed between the two questions
            folder = Path(snapshot_download(identity, revision=pinned, allow_patterns=patterns))
    except ModelError:
        raise
    except Exception as error:  # the client raises many kinds; each is told as it is
        raise _told(identity, error) from error
    sizes = [(file, _size(folder / file.path)) for file in files]
    wrong = [f"{file.path} has {there:,} bytes of {file.size:,}" for file, there in sizes if there != file.size]
    if wrong:
        raise ModelError(f"{identity}: not what the hub says", received="; ".join(wrong[:3]), fix="download it again")
    return Downloaded(str(folder), identity, pinned, len(files), sum(file.size for file in files))


def _literal(path: str) -> str:
    """A path as a pattern that means it alone."""
    return path.replace("[", "[[]")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _cached(identity: str, revision: str | None, only: Sequence[str]) -> Downloaded:
    """What an earlier download left, without the network."""
    from huggingface_hub import snapshot_download

    def there(kinds: Sequence[str]) -> Path:
        return Path(snapshot_download(identity, revision=revision, local_files_only=True, allow_patterns=list(kinds)))

    try:
        folder = there(only or WANTED[:-1])  # without .bin: a model in both formats was fetched as safetensors alone
        if not only and not any(folder.glob("*.safetensors")):
            folder = there(WANTED)
    except Exception as error:
        raise ModelError(
            f"{identity}: not in the cache, and HF_HUB_OFFLINE is set",
            received=" ".join(str(error).split())[:200],
            fix=f"with a network: fitune download {identity}",
        ) from error
    files = [path for path in folder.rglob("*") if path.is_file()]
    lacking = [name for name in only if not (folder / name).is_file()]
    if lacking:
        raise ModelError(f"{identity}: {', '.join(lacking)} is not in the cache, and HF_HUB_OFFLINE is set")
    return Downloaded(str(folder), identity, folder.name, len(files), sum(path.stat().st_size for path in files))


def _told(identity: str, error: Exception) -> ModelError:
    """The client's error as one message with what helps."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    received = " ".join(str(error).split())[:300]
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{identity}: the hub wants permission for it",
            received=received,
            fix="accept its terms on its page, then set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{identity}: no such revision", received=received, fix="check what stands behind @")
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"{identity}: no such folder, and the hub does not give it",
            received=received,
            fix="check the spelling; for a private model set HF_TOKEN",
        )
    return ModelError(
        f"{identity}: no such folder, and the hub does not give it",
        received=received,
        fix="check the spelling and the network (what has arrived is kept: try again), HF_ENDPOINT for a mirror, or "
        "download it by hand and give the folder",
    )


# ---- ModelScope ----


def _from_modelscope(identity: str, revision: str, only: Sequence[str], on_bytes: OnBytes | None) -> Downloaded:
    root = default_folder().parent / "modelscope" / identity.replace("/", "--") / "snapshots" / revision
    listed = root / ".files.json"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        files = _listed(listed)
        lacking = [file.path for file in chosen(files, only) if _size(root / file.path) != file.size]
        if not files or lacking:
            raise ModelError(
                f"ms:{identity}: not in the cache, and HF_HUB_OFFLINE is set", fix=f"fitune download ms:{identity}"
            )
    else:
        files = _files_of(identity, revision)
        root.mkdir(parents=True, exist_ok=True)
        write_json(listed, [asdict(file) for file in files])
        missing = [file for file in chosen(files, only) if _size(root / file.path) != file.size]
        check_room(root, sum(file.size for file in missing), f"ms:{identity}")
        for file in missing:
            _fetch(_address(identity, revision, file.path), file, root / file.path, on_bytes)
    wanted = chosen(files, only)
    if not wanted:
        raise ModelError(f"ms:{identity}: holds no model", expected="config.json and weights")
    return Downloaded(str(root), f"ms:{identity}", revision, len(wanted), sum(file.size for file in wanted))


def _listed(path: Path) -> list[Remote]:
    try:
        return [Remote(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _endpoint() -> str:
    return os.environ.get("MODELSCOPE_ENDPOINT", MODELSCOPE).rstrip("/")


def _address(identity: str, revision: str, path: str) -> str:
    asked = urllib.parse.urlencode({"Revision": revision, "FilePath": path})
    return f"{_endpoint()}/api/v1/models/{identity}/repo?{asked}"


def _open(address: str, start: int = 0) -> Any:
    check_secure(address, "MODELSCOPE_ENDPOINT")
    request = urllib.request.Request(address, headers={"User-Agent": "fitune"})  # noqa: S310
    if start:
        request.add_header("Range", f"bytes={start}-")
    if token := os.environ.get("MODELSCOPE_API_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Files often lie with another host: it is sent the request, and never the token."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """The request to the other address, or ModelError for one that is not secure."""
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
    """Refuse an address that anybody on the way could read or answer.

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


def _files_of(identity: str, revision: str) -> list[Remote]:
    asked = urllib.parse.urlencode({"Revision": revision, "Recursive": "true"})
    address = f"{_endpoint()}/api/v1/models/{identity}/repo/files?{asked}"
    try:
        with _open(address) as answer:
            found = json.loads(answer.read(64 * BLOCK))["Data"]["Files"]
        blobs = [one for one in found if one["Type"] == "blob"]
        files = [Remote(one["Path"], int(one["Size"]), one.get("Sha256") or None) for one in blobs]
    except urllib.error.HTTPError as error:
        known = {401: "it wants permission", 403: "it wants permission", 404: "no such model, or no such revision"}
        raise ModelError(
            f"ms:{identity}: {known.get(error.code, 'ModelScope does not give it')}",
            received=f"{error.code} {error.reason}",
            fix="check the spelling; for a gated model set MODELSCOPE_API_TOKEN",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"ms:{identity}: ModelScope does not give it",
            received=" ".join(str(error).split())[:200],
            fix="check the network, or MODELSCOPE_ENDPOINT",
        ) from error
    for file in files:
        if file.path.startswith("/") or ".." in Path(file.path).parts or "\\" in file.path:
            raise ModelError(f"ms:{identity}: names a file outside of its folder", received=file.path)
    return files


def _fetch(address: str, file: Remote, target: Path, on_bytes: OnBytes | None) -> None:
    """One file, going on from where an earlier try ended; whole and checked, or not at all."""
    with disk(target.parent, "free some space, or name another place: FITUNE_CACHE"):
        target.parent.mkdir(parents=True, exist_ok=True)
        # by size and sum: of another content nothing is gone on with
        partial = target.with_name(f"{target.name}.{file.size}-{(file.sha256 or '')[:8]}.incomplete")
        with alone(partial):
            if _size(target) != file.size:  # else another process was faster
                _fetch_alone(address, file, target, partial, on_bytes)
        partial.unlink(missing_ok=True)


def _fetch_alone(address: str, file: Remote, target: Path, partial: Path, on_bytes: OnBytes | None) -> None:
    told = ""
    for _ in range(TRIES):
        try:
            _transfer(address, file, partial, on_bytes)
        except urllib.error.HTTPError as error:
            told = f"{error.code} {error.reason}"
            if error.code in (401, 403, 404):
                break
        except OSError as error:
            told = " ".join(str(error).split()) or type(error).__name__
        there = _size(partial)
        if there > file.size:
            told = f"{there:,} bytes of {file.size:,}"
            partial.unlink()
            break
        if there == file.size:
            if file.sha256 and _sha256(partial) != file.sha256:
                partial.unlink()
                raise ModelError(f"{file.path}: arrived damaged (its SHA-256 differs)", fix="download it again")
            sync(partial)
            partial.replace(target)
            sync(target.parent)
            return
    raise ModelError(
        f"{file.path}: does not arrive",
        received=told or f"{max(0, _size(partial)):,} bytes of {file.size:,}",
        expected=f"{file.size:,} bytes",
        fix="try again: what has arrived is kept",
    )


def _transfer(address: str, file: Remote, partial: Path, on_bytes: OnBytes | None) -> None:
    start = max(0, _size(partial))
    if start >= file.size:
        partial.touch()
        return
    with _open(address, start) as answer, partial.open("ab" if answer.status == 206 else "wb") as out:
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
