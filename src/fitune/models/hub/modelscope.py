"""Models from ModelScope: one address lists the files of a revision, another gives each of them.

MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN are its settings, HF_HUB_OFFLINE=1 forbids the network here too.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fitune.core.errors import ModelError
from fitune.core.files import write_json
from fitune.data.cache import default_folder
from fitune.models.hub.files import Downloaded, OnBytes, Remote, check_room, chosen, size
from fitune.models.hub.transfer import BLOCK, fetch, open_url

MODELSCOPE = "https://www.modelscope.cn"


def download(identity: str, revision: str, only: Sequence[str], on_bytes: OnBytes | None) -> Downloaded:
    """Download a model, or what is missing of it; see `hub.download`."""
    root = default_folder().parent / "modelscope" / identity.replace("/", "--") / "snapshots" / revision
    listed = root / ".files.json"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        files = _listed(listed)
        absent = [file.path for file in chosen(files, only) if size(root / file.path) != file.size]
        if not files or absent:
            raise ModelError(
                f"ms:{identity}: not in the cache, and HF_HUB_OFFLINE is set", fix=f"fitune download ms:{identity}"
            )
    else:
        files = _files_of(identity, revision)
        root.mkdir(parents=True, exist_ok=True)
        write_json(listed, [asdict(file) for file in files])
        missing = [file for file in chosen(files, only) if size(root / file.path) != file.size]
        check_room(root, sum(file.size for file in missing), f"ms:{identity}")
        for file in missing:
            fetch(_address(identity, revision, file.path), file, root / file.path, on_bytes)
    wanted = chosen(files, only)
    if not wanted:
        raise ModelError(f"ms:{identity}: contains no model", expected="config.json and weights")
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


def _files_of(identity: str, revision: str) -> list[Remote]:
    asked = urllib.parse.urlencode({"Revision": revision, "Recursive": "true"})
    address = f"{_endpoint()}/api/v1/models/{identity}/repo/files?{asked}"
    try:
        with open_url(address) as answer:
            found = json.loads(answer.read(64 * BLOCK))["Data"]["Files"]
        blobs = [one for one in found if one["Type"] == "blob"]
        files = [Remote(one["Path"], int(one["Size"]), one.get("Sha256") or None) for one in blobs]
    except urllib.error.HTTPError as error:
        restricted = "access to it is restricted"
        known = {401: restricted, 403: restricted, 404: "no such model, or no such revision"}
        raise ModelError(
            f"ms:{identity}: {known.get(error.code, 'ModelScope did not answer as expected')}",
            received=f"{error.code} {error.reason}",
            fix="check the spelling; for a gated model set MODELSCOPE_API_TOKEN",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"ms:{identity}: ModelScope did not answer as expected",
            received=" ".join(str(error).split())[:200],
            fix="check the network, or MODELSCOPE_ENDPOINT",
        ) from error
    for file in files:
        if file.path.startswith("/") or ".." in Path(file.path).parts or "\\" in file.path:
            raise ModelError(f"ms:{identity}: lists a file outside of its folder", received=file.path)
    return files
