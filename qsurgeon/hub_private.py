"""Where versions of huggingface_hub differ, 1.17 to 2.4: the library it speaks HTTP with, and how it finds a commit."""

import re
import sys
from typing import Any

from huggingface_hub import HfApi, constants, file_download, try_to_load_from_cache
from huggingface_hub import errors as _errors
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.repocard import REGEX_YAML_BLOCK

__all__ = ["REGEX_YAML_BLOCK", "HTTPError", "Resolved", "RevisionResolutionError", "TransportError", "resolve"]

# httpx until 1.x, httpx2 from 2.0 on: what its own errors are errors of.
_client: Any = next(
    sys.modules[one.__module__.partition(".")[0]]
    for one in HfHubHTTPError.__mro__
    if one.__module__.startswith("httpx")
)
HTTPError: type[Exception] = _client.HTTPError
TransportError: type[Exception] = _client.TransportError
# From 1.26 on.
RevisionResolutionError: type[Exception] = getattr(_errors, "RevisionResolutionError", LocalEntryNotFoundError)
RESOLVES = hasattr(HfApi, "resolve_revision")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Resolved(str):
    """A commit, as huggingface_hub returns it from 1.26 on: a revision that says which commit it is at."""

    __slots__ = ()

    @property
    def resolved(self) -> str:
        """The commit."""
        return str(self)


def resolve(api: HfApi, model: str, revision: str | None) -> Any:
    """Return the commit that ``revision`` of ``model`` is at: as the hub says, or as the cache remembers.

    Raises: what ``HfApi.resolve_revision`` raises.
    """
    if RESOLVES:
        return api.resolve_revision(model, revision=revision)
    if revision is not None and _COMMIT.fullmatch(revision):
        return Resolved(revision)
    try:
        commit = str(api.model_info(model, revision=revision).sha)
    except (TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        return _remembered(model, revision, error)
    storage = f"{constants.HF_HUB_CACHE}/{file_download.repo_folder_name(repo_id=model, repo_type='model')}"
    file_download._cache_commit_hash_for_specific_revision(
        storage, revision or constants.DEFAULT_REVISION, commit
    )  # a download of a commit notes no revision
    return Resolved(commit)


def _remembered(model: str, revision: str | None, error: Exception) -> Resolved:
    file = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(file, str):
        raise LocalEntryNotFoundError(f"{model} is not in the cache") from error
    return Resolved(file.replace("\\", "/").split("/")[-2])
