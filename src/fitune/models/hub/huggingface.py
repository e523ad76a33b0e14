"""Models from the Hugging Face hub, by huggingface_hub.

HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 forbids the network, HF_TOKEN opens gated models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fitune.core.errors import ModelError
from fitune.models.hub.files import WANTED, Downloaded, Remote, check_room, chosen, size
from fitune.models.hub.transfer import check_secure


def check(identity: str, revision: str | None) -> None:
    """Raises ModelError where the hub has no model of that id, or it cannot be reached and is not in the cache."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

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
        raise _as_model_error(identity, error) from error


def download(identity: str, revision: str | None, only: Sequence[str]) -> Downloaded:
    """Download a model, or what is missing of it; see `hub.download`."""
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return cached(identity, revision, only)
    check_secure(constants.ENDPOINT, "HF_ENDPOINT")
    try:
        info = HfApi().model_info(identity, revision=revision, files_metadata=True)
        files = chosen([Remote(one.rfilename, int(one.size or 0)) for one in info.siblings or []], only)
        if not files:
            raise ModelError(f"{identity}: contains no model", expected="config.json and weights")
        pinned = str(info.sha)
        present = {f.path for f in files if isinstance(try_to_load_from_cache(identity, f.path, revision=pinned), str)}
        missing = [file for file in files if file.path not in present]
        check_room(Path(constants.HF_HUB_CACHE), sum(file.size for file in missing), identity)
        patterns = [_literal(file.path) for file in files]
        folder = Path(snapshot_download(identity, revision=revision, allow_patterns=patterns))
        if folder.name != pinned:  # it was changed between the two requests
            folder = Path(snapshot_download(identity, revision=pinned, allow_patterns=patterns))
    except ModelError:
        raise
    except Exception as error:  # the client raises many kinds; each is reported as it is
        raise _as_model_error(identity, error) from error
    sizes = [(file, size(folder / file.path)) for file in files]
    wrong = [f"{file.path} has {found:,} bytes of {file.size:,}" for file, found in sizes if found != file.size]
    if wrong:
        raise ModelError(
            f"{identity}: files are not as long as the hub lists them",
            received="; ".join(wrong[:3]),
            fix="download it again",
        )
    return Downloaded(str(folder), identity, pinned, len(files), sum(file.size for file in files))


def _literal(path: str) -> str:
    """A path as a pattern that matches it alone."""
    return path.replace("[", "[[]")


def cached(identity: str, revision: str | None, only: Sequence[str]) -> Downloaded:
    """What an earlier download left in the cache, without the network.

    Raises:
        ModelError: it is not there, or not all of it.
    """
    from huggingface_hub import snapshot_download

    def in_cache(kinds: Sequence[str]) -> Path:
        return Path(snapshot_download(identity, revision=revision, local_files_only=True, allow_patterns=list(kinds)))

    try:
        folder = in_cache(only or WANTED[:-1])  # without .bin: a model in both formats was fetched as safetensors alone
        if not only and not any(folder.glob("*.safetensors")):
            folder = in_cache(WANTED)
    except Exception as error:
        raise ModelError(
            f"{identity}: not in the cache, and HF_HUB_OFFLINE is set",
            received=" ".join(str(error).split())[:200],
            fix=f"with a network: fitune download {identity}",
        ) from error
    files = [path for path in folder.rglob("*") if path.is_file()]
    missing = [name for name in only if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{identity}: {', '.join(missing)} is not in the cache, and HF_HUB_OFFLINE is set")
    return Downloaded(str(folder), identity, folder.name, len(files), sum(path.stat().st_size for path in files))


def _as_model_error(identity: str, error: Exception) -> ModelError:
    """The client's error as one message with a fix."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    received = " ".join(str(error).split())[:300]
    if isinstance(error, GatedRepoError):
        what, fix = "access to it must be granted on the hub", "accept its terms on its page, then set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        what, fix = "no such revision", "check the revision behind @"
    elif isinstance(error, RepositoryNotFoundError):
        what = "no such folder, and no such model on the hub"
        fix = "check the spelling; for a private model set HF_TOKEN"
    else:
        what = "no such folder, and the hub did not answer as expected"
        fix = (
            "check the spelling and the network, then try again (finished parts are kept); HF_ENDPOINT names a mirror; "
            "or download the model by hand and give its folder"
        )
    return ModelError(f"{identity}: {what}", received=received, fix=fix)
