"""Where a model, a recipe or an output is, in the words of the user. Imports nothing heavy.

What a shell would have expanded, it does not if it stands in quotes, behind ``--model=`` or in a recipe: the ``~`` of a
home folder is expanded here, and a variable is refused, so that no folder is ever called ``~`` or ``$HOME``.
"""

import os
import re
import shlex
from pathlib import Path, PureWindowsPath

from qsurgeon.errors import CheckpointError, guess
from qsurgeon.reading import read_json

# Why a model is not to be had while HF_HUB_OFFLINE is set.
OFFLINE = "HF_HUB_OFFLINE is set and the cache has no whole snapshot of it"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
PARTIAL = ".partial"
MOST_BESIDE = 1000  # folders that a name is compared with

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)\}|(?P<bare>[A-Za-z_]\w*))|%(?P<windows>[A-Za-z_]\w*)%")
_ADDRESS = re.compile(r"(?:(?P<scheme>[a-z][a-z0-9+.-]+):/{1,2}|(?P<ssh>git@))(?P<rest>.*)", re.IGNORECASE)
_AROUND = " \t\"'`“”‘’"
_ID = re.compile(r"[\w.-]+/[\w.-]+")  # of a model on the hub
_VIEWS = {"tree", "blob", "resolve", "commit", "raw"}  # of a revision's files, in addresses of the hub
HUBS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")


def expanded(path: str | Path) -> Path:
    """Return ``path`` with the home folder in place of a leading ``~``.

    Raises: CheckpointError for a ``~name`` of nobody, and for a variable of the shell, which is not expanded here.
    """
    text = str(path)
    home = os.path.expanduser(text)  # noqa: PTH111  # which raises for a user that there is not
    user = home.partition("/")[0]
    if user.startswith("~") and not Path(user).exists():
        raise CheckpointError(f"{text}: there is no user '{user[1:]}', whose home folder '{user}' would be")
    _refuse_variable(home)
    return Path(home)


def _refuse_variable(text: str) -> None:
    match = _VARIABLE.search(text)
    if match is None or Path(text[: match.end()] + text[match.end() :].partition("/")[0]).exists():
        return
    name = match["braced"] or match["bare"] or match["windows"]
    value = os.environ.get(name)
    meant = f"write {text.replace(match[0], value)}" if value else f"and there is none called {name}"
    raise CheckpointError(f"{text}: variables are not expanded here; {meant}")


def is_path(text: str) -> bool:
    """Say whether ``text`` can only be a path on this disk, and no hub id."""
    path = Path(text)
    return path.is_absolute() or len(path.parts) > 2 or text.startswith((".", "~")) or text.endswith("/")


def missing(model: str, reason: str) -> str:
    """Return the message on a model that is neither here nor on the hub, for which ``reason`` is the reason."""
    return f"no model at '{model}': no such folder, and {reason}{nearby(Path(model))}"


def is_id(text: str) -> bool:
    """Say whether ``text`` may be ``owner/name`` on the hub."""
    return _ID.fullmatch(text) is not None


def model_here(model: str | Path) -> Path | None:
    """Return the path of ``model`` if it is on this disk, or None if it can only be a hub id.

    Raises: CheckpointError for an address, a path that is not there, and a folder that holds something else.
    """
    text = str(model)
    if not text.strip():
        raise CheckpointError("no model: its name is empty")
    path = expanded(model)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise CheckpointError(f"{text[:100]!r} cannot be the name of a folder") from error
    if there:
        _refuse_other(path)
        return path
    _refuse_address(text)
    if is_path(text):
        raise CheckpointError(f"{path}: no such folder{nearby(path)}")
    _refuse_strange(text)
    return None


def named(model: str | Path) -> str | Path:
    """Return what names a model, or an adapter, with its home folder expanded.

    Raises: CheckpointError for an address, and for a path that cannot be expanded.
    """
    path = expanded(model)
    if not path.exists():
        _refuse_address(str(model))
        if is_path(str(model)):
            raise CheckpointError(f"{path}: no such folder{nearby(path)}")
    return path if str(path) != str(model) and str(model).startswith("~") else model


def nearby(path: Path) -> str:
    """Return the end of a message about a folder that is not there: the one beside it with the nearest name, if any."""
    if not path.parent.is_dir():
        return ""
    beside = [entry.name for entry, _ in zip(os.scandir(path.parent), range(MOST_BESIDE), strict=False)]
    near = guess(path.name, (one for one in beside if (path.parent / one).is_dir()))
    return f"; did you mean '{path.with_name(near)}'?" if near else ""


def _refuse_address(text: str) -> None:
    """Refuse an address, with the hub id in it if it is one of the hub's."""
    address = _ADDRESS.fullmatch(text.strip())
    rest = address["rest"].replace(":", "/") if address else text.strip()
    host, _, path = rest.partition("/")
    own = os.environ.get("HF_ENDPOINT", HUBS[0]).rpartition("//")[2].rstrip("/").lower()
    if address and (address["scheme"] or "").lower() == "hf":
        path = rest
    elif host.lower() not in {*HUBS, own} or not host or not path:
        if address:
            raise CheckpointError(
                f"{text} is an address; a model is a folder, or an id on the hub like owner/name: download it first"
            )
        return
    parts = [part for part in re.split(r"[?#]", path)[0].split("/") if part]
    if not parts or parts[0] in {"datasets", "spaces"}:
        raise CheckpointError(f"{text} is an address, and not of a model; the id of a model is like owner/name")
    at = next((place for place, part in enumerate(parts) if part in _VIEWS), len(parts))
    name = "/".join(parts[: min(at, 2)]).removesuffix(".git")
    revision = next(iter(parts[at + 1 :]), "main")
    also = f", with --revision {revision} (in Python, revision={revision!r})" if revision != "main" else ""
    raise CheckpointError(f"{text} is an address; the id of that model is {name}: say that instead{also}")


def _refuse_strange(text: str) -> None:
    """Refuse what is neither a folder nor can be a hub id, with what is likely meant."""
    if text != unquoted(text):
        raise CheckpointError(f"'{text}': no such folder: blanks or quotes stand around the name{nearby(Path(text))}")
    if "\\" in text:
        here = PureWindowsPath(text).as_posix()
        hint = f"; did you mean '{here}'?" if Path(here).exists() else ""
        raise CheckpointError(f"{text}: no such folder: here, folders are separated by '/'{hint}")
    several = [one for one in re.split(r"[,;]\s*|\s+", text) if one]
    if len(several) > 1 and all(Path(one).exists() or _ID.fullmatch(one) for one in several):
        raise CheckpointError(f"'{text}': one model at a time; say {several[0]} first")


def _refuse_other(path: Path) -> None:
    """Refuse what is there and is no model, if it can be told what it is."""
    if path.is_dir():
        what = None if (path / CONFIG).is_file() else _content(path)
        if what is not None:
            raise CheckpointError(f"{path} {what}")


def _content(folder: Path) -> str | None:
    """Return what a folder without a config.json is, and what to do, or None if it is nothing that we know."""
    if (folder / ADAPTER).is_file():
        base = _base(folder / ADAPTER)
        return (
            f"is an adapter of {base}, and no model of its own; name its base, or fold it in first: "
            f"qsurgeon merge {quoted(folder)} --output FOLDER"
        )
    if folder.name.endswith(PARTIAL) and (folder / folder.name.removesuffix(PARTIAL)).is_dir():
        final = folder.with_name(folder.name.removesuffix(PARTIAL))
        return f"is an unfinished {final}: run the same apply again to resume it and create {final}"
    if (folder / "model_index.json").is_file():
        parts = sorted(one.parent.name for one in folder.glob(f"*/{CONFIG}"))
        has = f", of which {', '.join(parts)} have a {CONFIG}" if parts else ""
        return f"is a pipeline of diffusers; expected a model of transformers{has}"
    if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
        return f"is the hub's cache of a model; say its id: {folder.name.removeprefix('models--').replace('--', '/')}"
    if any(folder.glob("*.gguf")):
        return "holds GGUF; expected safetensors and a config.json: take the model it was made from"
    inside = sorted(str(one.parent) for one in folder.glob(f"*/{CONFIG}"))
    if inside:
        more = f" or {len(inside) - 1} more" if len(inside) > 1 else ""
        return f"has no {CONFIG}; expected a model's folder, such as {inside[-1]} in it{more}"
    return None


def _base(file: Path) -> str:
    """Return the base that an adapter names, or another word for it."""
    try:
        name = read_json(file).get("base_model_name_or_path")
    except CheckpointError:
        return "another model"
    return name if isinstance(name, str) and name and name.isprintable() else "another model"


def unquoted(text: str) -> str:
    """Return a name without the blanks and quotes around it."""
    return text.strip(_AROUND)


def quoted(path: str | Path) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(str(path))
