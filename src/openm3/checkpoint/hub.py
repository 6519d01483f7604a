"""From a model's name to a directory: a path, the bundled model, or a repo downloaded from the Hugging Face Hub.

Only files of harmless kinds are fetched, and only those at the repo's top: weights as safetensors, JSON, the chat
template, text. Nothing that could run when read (pickles, Python) ever reaches the disk.
"""

from __future__ import annotations

import re
from pathlib import Path

from openm3.checkpoint.names import CheckpointError

BUNDLED = "openm3-nano"
FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*", "LICENSE*")
REFUSED = ("*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(name_or_dir: str | Path) -> Path:
    """The directory of a model: an existing one, the bundled `openm3-nano`, or a repo id in the local Hub cache.

    Never touches the network. Raises CheckpointError for anything else, saying how to get it.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return path
    if backup_of(path).is_dir():
        return backup_of(path)
    name = str(name_or_dir)
    if path.exists():
        raise CheckpointError(f"{name}: is a file; name the model's directory, a Hub repo, or {BUNDLED}")
    if name == BUNDLED:
        return _bundled()
    if isinstance(name_or_dir, str) and REPO_ID.fullmatch(name):
        return _cached(name)
    raise CheckpointError(f"{name}: no such directory; name a model's directory, a Hub repo as ORG/NAME, or {BUNDLED}")


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetches a model's repo from the Hub and returns its directory; afterwards `resolve(repo_id)` finds it.

    `local_dir` puts the files there instead of the shared cache. A dropped connection is picked up at the byte where it
    broke; run again after a stop, files already whole are not fetched again. `endpoint` None: the Hub, or HF_ENDPOINT.
    Raises CheckpointError, one line, if the repo cannot be found or read, or holds no safetensors checkpoint.
    """
    from huggingface_hub import errors, snapshot_download

    where = f"{repo_id}" + (f" at {revision}" if revision else "")
    transport_error = getattr(errors, "HTTPError", OSError)  # of the HTTP library, which differs between versions
    try:
        path = Path(snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, local_dir=local_dir, endpoint=endpoint,
            allow_patterns=list(FETCHED), ignore_patterns=list(REFUSED),
        ))  # fmt: skip
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo_id}: access is restricted; accept its terms on the Hub and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo_id}: has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id}: no such repo on the Hub (if it is private, log in with `hf auth login`)"
        ) from None
    except errors.HFValidationError:
        raise CheckpointError(f"{repo_id!r}: not a repo's name; it is written ORG/NAME") from None
    except (OSError, transport_error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{where}: not downloaded ({reason}); run it again to go on") from error
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{where}: holds no config.json with safetensors weights, so nothing here can load it")
    return path


def backup_of(directory: Path) -> Path:
    """Where a save keeps the old directory between two renames, on systems that cannot swap them in one step."""
    return directory.with_name(f".{directory.name}.replaced") if directory.name else directory


def _bundled() -> Path:
    path = Path(__file__).parent.parent / "weights" / BUNDLED
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{BUNDLED}: its files are missing from {path}; install openm3 again")
    return path


def _cached(repo_id: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        path = snapshot_download(repo_id, local_files_only=True,
                                 allow_patterns=list(FETCHED), ignore_patterns=list(REFUSED))  # fmt: skip
    except (errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
        part = " wholly" if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())) else ""
        raise CheckpointError(
            f"{repo_id}: neither a directory nor{part} downloaded; get it with `openm3 download {repo_id}`"
        ) from None
    return Path(path)
