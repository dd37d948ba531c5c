"""The Hugging Face hub: a model's files from it into the cache, and a folder onto it.

All that is asked of the hub is asked here, so that what can go wrong with it is said in one place. Files lie in the
cache that all of Hugging Face's libraries share; what is there whole is not downloaded again.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qsurgeon.checkpoint.reading.files import INDEX, OTHER_ENGINES, PICKLES, SINGLE, refuse_irregular
from qsurgeon.checkpoint.reading.index import named_files, weight_files
from qsurgeon.errors import CheckpointError, nearest
from qsurgeon.hub_private import HTTPError, RevisionResolutionError, TransportError, resolve
from qsurgeon.places import CONFIG, OFFLINE, missing, model_here
from qsurgeon.reading import read_json
from qsurgeon.surgery import read_config
from qsurgeon.version import __version__
from qsurgeon.visible import one_line

# What belongs beside the weights: settings, tokenizers, chat templates, the model card and the license.
BESIDE = ("*.json", "*.txt", "*.md", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.bpe", "LICENSE*", "NOTICE*")
CODE = "*.py"
PARTS = "modules.json"  # of sentence-transformers: parts of the model lie in subfolders
PARTS_WEIGHTS = "*/*.safetensors"
_ORIGIN = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<commit>[0-9a-f]{40}))?")
LOGIN = "`hf auth login`"
AGAIN = "what arrived whole is kept: try again"
_REFUSED = (401, 402, 403, 404)


@dataclass(frozen=True)
class Source:
    """A model's folder on this disk, and where its files came from.

    origin: ``owner/name@commit`` for a snapshot of the hub, the folder's own name for another. commit: at which the
    rest of a model is to be fetched that was asked for by its id.
    """

    folder: Path
    origin: str
    commit: str | None = field(default=None, compare=False)  # one snapshot, by its id and by its path, is the same


def fetch(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """Return the folder of ``model``: itself if it is one, else a snapshot of the hub with weights and all beside them.

    What is missing in the cache is downloaded, with progress on stderr; a connection that breaks is resumed where it
    broke. No pickle is downloaded, and code only with ``trust_remote_code``. With HF_HUB_OFFLINE, or without a network,
    the cache alone decides.

    Raises: CheckpointError if there is no such folder, model or revision, if it may not be read, if it has no
    safetensors, or if it is not in the cache while offline; ConnectionError if the hub cannot be reached.
    """
    here = _here(model, revision)
    if here is not None:
        return here
    name, api = str(model), _api()
    with _reading(name, revision):
        pinned = _pinned(api, name, revision)
        _check_weights(api, name, pinned.resolved)
        wanted = [*BESIDE, CODE] if trust_remote_code else [*BESIDE]
        folder = Path(api.snapshot_download(name, revision=pinned, allow_patterns=wanted))
        wanted += _weights(folder)
        folder = Path(api.snapshot_download(name, revision=pinned, allow_patterns=wanted))
    _check_whole(folder)
    return Source(folder, origin(folder), pinned.resolved)


def fetch_config(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """Return a folder with the config.json of ``model``: itself if it is on this disk, else one file of the hub.

    With ``trust_remote_code`` the model's own code comes with it.

    Raises: as ``fetch``, and CheckpointError for a model on the hub without a config.json.
    """
    here = _here(model, revision)
    if here is not None:
        return here
    name, api = str(model), _api()
    with _reading(name, revision):
        pinned = _pinned(api, name, revision)
        file = api.hf_hub_download(name, CONFIG, revision=pinned)
        if trust_remote_code:
            api.snapshot_download(name, revision=pinned, allow_patterns=[CODE])
    folder = Path(file).parent
    return Source(folder, origin(folder), pinned.resolved)


def config_of(model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Return the config of a folder, a config.json or a hub id. Raises: as ``fetch_config`` and ``read_config``."""
    found = fetch_config(model, revision, trust_remote_code=trust_remote_code)
    return read_config(found.folder, trust_remote_code)


def origin(model: str | Path) -> str:
    """Return what a record calls ``model``: ``owner/name@commit`` for a snapshot of the hub, else a folder's own name.

    A folder's path is nobody's business but its owner's: a record is published with the model. A hub id stays as it
    is: which commit of it transformers has loaded, it does not say.
    """
    path = Path(model)
    if not str(model) or not path.exists():
        return one_line(path.name if path.is_absolute() else str(model))
    folder = path.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return one_line(folder.name)  # of bytes that are not UTF-8, the halves of characters could not be written


def hub_id(origin: str) -> tuple[str, str | None] | None:
    """Return the id and the commit, where it is pinned, of an ``origin`` on the hub; None for a folder's name."""
    match = _ORIGIN.fullmatch(origin)
    if match is None or not ("/" in origin or match["commit"]):
        return None
    return match["id"], match["commit"]


def reserve(repo: str, *, private: bool = True) -> str:
    """Create a repository on the hub unless it is there, and return its whole id.

    Call it before work whose result shall be pushed: who may not write there should hear of it first. ``private``
    decides for a repository that is created, and changes nothing about one that is there. It is the default because
    what was public once is copied and cannot be taken back, and because the license of the model it came from may not
    allow it; the other way is one click.

    Raises: CheckpointError if the hub does not let us; ConnectionError if it cannot be reached.
    """
    api = _api()
    with _writing(repo):
        whole_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.auth_check(whole_id, write=True)  # it may be somebody else's, and there already
    return whole_id


def push(folder: str | Path, repo: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload a checkpoint's folder, the model card in it too, and return the address of the commit.

    ``revision``: the branch to commit to. A repository that is not there is created, as ``reserve`` does. An upload
    that was cut off goes on where it was when it is pushed again.

    Raises: CheckpointError for a folder that is no whole checkpoint, and as ``reserve``.
    """
    folder = Path(folder)
    read_json(folder / CONFIG)
    weight_files(folder)
    whole_id = reserve(repo, private=private)
    with _writing(repo):
        done = _api().upload_folder(
            repo_id=whole_id, folder_path=folder, revision=revision, commit_message=f"Upload {folder.resolve().name}"
        )
    return done.commit_url


def _api() -> HfApi:
    return HfApi(library_name="qsurgeon", library_version=__version__)


# --- what is on this disk


def _here(model: str | Path, revision: str | None) -> Source | None:
    """Return ``model`` as a folder if that is what it is, or None if it can only be a hub id."""
    path = model_here(model)
    if path is None:
        return None
    if revision is not None:
        raise CheckpointError(f"{path} is on this disk; a revision is of a model on the hub")
    folder = path.parent if path.name == CONFIG else path
    if folder.is_dir():
        refuse_irregular(folder)
    return Source(folder, origin(folder))


# --- what is on the hub


def _pinned(api: HfApi, model: str, revision: str | None) -> Any:
    """Return the commit that ``revision`` of ``model`` is at: as the hub says, or as the cache remembers."""
    try:
        return resolve(api, model, revision)
    except RevisionNotFoundError as error:
        refs = api.list_repo_refs(model)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        raise CheckpointError(f"{model} has no revision '{revision}'; {nearest(str(revision), names)}") from error


def _check_weights(api: HfApi, model: str, commit: str) -> None:
    """Refuse a model without safetensors before anything of it is downloaded. Out of reach of the hub, let it pass."""
    try:
        names = {file.rfilename for file in api.model_info(model, revision=commit).siblings or ()}
    except (TransportError, OfflineModeIsEnabled):
        return  # the cache decides
    if names & {INDEX, SINGLE}:
        return
    pickles = sorted(name for name in names if Path(name).suffix in PICKLES | OTHER_ENGINES)
    if pickles:
        raise CheckpointError(
            f"{model} has no safetensors, only {pickles[0]}; a pickle runs code when it is opened, so it is not "
            "downloaded. Convert it with transformers: from_pretrained(…), then save_pretrained(…)"
        )
    raise CheckpointError(f"{model} has neither {SINGLE} nor {INDEX} on the hub")


def _weights(folder: Path) -> list[str]:
    """Return the names of the weight files of a snapshot whose other files are there."""
    return sorted(named_files(folder)) + ([PARTS_WEIGHTS] if (folder / PARTS).is_file() else [])


def _check_whole(folder: Path) -> None:
    """Refuse a snapshot that lacks weights: other libraries leave such in the cache."""
    try:
        weight_files(folder)
    except CheckpointError as error:
        raise CheckpointError(f"the cache has only a part of {origin(folder)}: {error}") from error


# --- what can go wrong, in our words


@contextlib.contextmanager
def _reading(model: str, revision: str | None) -> Iterator[None]:
    """Raise CheckpointError for what the user can mend, ConnectionError for what the network or the hub can."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(missing(model, f"it cannot be a hub id: {_first_line(error)}")) from error
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{model}"
        raise CheckpointError(f"{model} is gated: ask for access at {page}, then log in with {LOGIN}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(missing(model, f"the hub has none, or it is private (log in with {LOGIN})")) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision '{revision}'") from error
    except RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{model} has no {CONFIG} on the hub") from error
    except (LocalEntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled) as error:
        if constants.is_offline_mode():
            raise CheckpointError(missing(model, OFFLINE)) from error
        reason = f"the hub cannot be reached: {_first_line(error.__cause__ or error)}"
        raise ConnectionError(missing(model, reason)) from error
    except HfHubHTTPError as error:
        reason = f"the hub does not give {model}: {error.server_message or _first_line(error)}"
        if error.response.status_code in _REFUSED:
            raise CheckpointError(f"{reason}; log in with {LOGIN}") from error
        raise ConnectionError(reason) from error
    except HTTPError as error:
        raise ConnectionError(f"the hub cannot be reached for {model}: {_first_line(error)}; {AGAIN}") from error


@contextlib.contextmanager
def _writing(repo: str) -> Iterator[None]:
    """Raise CheckpointError for what the user can mend, ConnectionError for what the network or the hub can."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' cannot be a repository of the hub: {_first_line(error)}") from error
    except OfflineModeIsEnabled as error:
        raise CheckpointError(f"{repo}: HF_HUB_OFFLINE is set, so that nothing can be pushed") from error
    except HfHubHTTPError as error:
        if error.response.status_code in _REFUSED:
            reason = error.server_message or _first_line(error)
            raise CheckpointError(
                f"{repo}: the hub does not let us write there ({reason}); log in with {LOGIN}, with a token that may"
            ) from error
        raise ConnectionError(f"{repo}: the hub does not take it: {_first_line(error)}; {AGAIN}") from error
    except (HTTPError, ConnectionError) as error:
        raise ConnectionError(f"{repo}: the upload was cut off: {_first_line(error)}; {AGAIN}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
