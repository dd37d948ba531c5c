"""Which modules are wrapped when a checkpoint is opened, completely or in part, under any class of transformers.

The checkpoint decides. Its own config.json is read for that, whatever config the caller passes, and wherever
transformers has put a part of it. Where the class that is opened is not the class that was saved, a module is wrapped
if its weight is filled from the tensors of a wrapped module.
"""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from qsurgeon.checkpoint import read_header
from qsurgeon.checkpoint.reading.naming import Names, names_in
from qsurgeon.errors import CheckpointError, NothingWrappedError
from qsurgeon.reading import read_json
from qsurgeon.surgery import configs_in, inventory, is_ours, skeleton
from qsurgeon.transformers_private.loading import (
    find_adapter_config_file,
    ignored_if_missing,
    ties,
)

ADAPTER = "adapter_config.json"
# What from_pretrained hands on to whatever finds a file, on this disk or on the hub.
FINDING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class Stored:
    """The config of the checkpoint that is being opened.

    source: a folder or a hub id. finding: the arguments that its files are found with. data: its config.json.
    """

    source: str
    finding: Mapping[str, Any]
    data: Mapping[str, Any]
    trust_remote_code: bool

    @property
    def is_ours(self) -> bool:
        """Whether qsurgeon wrote the checkpoint."""
        return is_ours(self.data.get("quantization_config"))

    @property
    def saved_class(self) -> str | None:
        """The name of the class that was saved; None if config.json does not say."""
        names = self.data.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None

    def settle(self, config: Any) -> None:
        """Let ``config``, with which the checkpoint is opened, say of its quantization what the checkpoint says."""
        passed = [part for part in configs_in(config) if is_ours(getattr(part, "quantization_config", None))]
        for part in passed:
            del part.quantization_config
        if self.is_ours:
            config.quantization_config = deepcopy(self.data["quantization_config"])
        elif passed:
            warnings.warn(
                f"{self.source} is a checkpoint in full precision, and is loaded as such; the config that was passed "
                "is that of a model which qsurgeon wrapped",
                UserWarning,
                stacklevel=2,
            )

    def skeleton(self) -> Any:
        """Return the model that was saved, on the meta device."""
        config = transformers.AutoConfig.from_pretrained(
            self.source, trust_remote_code=self.trust_remote_code, **self.finding
        )
        return skeleton(config, self.trust_remote_code)


_opened: ContextVar[Stored | None] = ContextVar("opened", default=None)


def opened() -> Stored | None:
    """Return the config of the checkpoint that ``from_pretrained`` is opening; None outside of it."""
    return _opened.get()


@contextmanager
def opening(source: Any, arguments: Mapping[str, Any]) -> Iterator[Stored | None]:
    """Know inside the block which checkpoint is being opened: ``from_pretrained(source, **arguments)``.

    Raises: CheckpointError if a part of its config has a record of ours and the whole has none.
    """
    stored = _stored(source, arguments)
    token = _opened.set(stored)
    try:
        yield stored
    finally:
        _opened.reset(token)


def finding_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``from_pretrained``'s arguments that say where files are found."""
    return {name: arguments[name] for name in FINDING if arguments.get(name) is not None}


def _stored(source: Any, arguments: Mapping[str, Any]) -> Stored | None:
    if source is None or arguments.get("gguf_file") is not None:
        return None
    finding = finding_in(arguments)
    adapter = adapter_at(source, finding)
    if adapter is not None:
        source = adapter["base_model_name_or_path"]
        finding = {name: value for name, value in finding.items() if name not in ("revision", "subfolder")}
    try:
        data, _ = transformers.PreTrainedConfig.get_config_dict(source, **finding)
    except (OSError, ValueError):
        return None  # from_pretrained finds the same, and says so
    stored = Stored(str(source), finding, data, bool(arguments.get("trust_remote_code")))
    part = next(_parts_of_ours(data), None)
    if part is not None and not stored.is_ours:
        raise CheckpointError(
            f"{source}: {part} in its config.json has a quantization_config of qsurgeon, and the whole model has none: "
            "it was saved by a program that does not import qsurgeon. Remove that section if the weights are in full "
            "precision"
        )
    return stored


def adapter_at(source: Any, finding: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the adapter at ``source``, in whose place transformers loads its base; None for a model."""
    if (Path(source) / finding.get("subfolder", "") / "config.json").is_file():
        return None
    file = find_adapter_config_file(source, **finding)
    if file is None or not os.path.isfile(file):  # noqa: PTH113  # what transformers returns is a str
        return None
    config: dict[str, Any] = read_json(Path(file))
    base = config.get("base_model_name_or_path")
    return config if isinstance(base, str) and base else None


def _parts_of_ours(data: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield where inside of a config.json a part has a record of ours."""
    for key, value in data.items():
        if isinstance(value, dict) and key != "quantization_config":
            if is_ours(value.get("quantization_config")):
                yield f"{path}{key}"
            yield from _parts_of_ours(value, f"{path}{key}.")


# --- names


def places(model: Any, wrapped: Collection[str], noted: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Return which module of the checkpoint each module of ``model`` is, of those that are ``wrapped`` or ``noted``.

    ``model``: being opened, on the meta device. ``files``: the checkpoint's.

    Raises: CheckpointError if the model lacks a wrapped module, or if the checkpoint lacks a tensor;
    NothingWrappedError if the model has none of the wrapped modules.
    """
    stored = opened()
    names = {module.name for module in inventory(model)}
    is_same = is_whole(model)
    # A class of somebody's own program can only be looked at by that program.
    is_unknown = stored is not None and not hasattr(transformers, stored.saved_class or "")
    if is_same or (is_unknown and names.issuperset(wrapped)):
        _refuse_absent(type(model).__name__, wrapped, names)
        return {name: name for name in (*wrapped, *noted) if name in names}
    return _places_by_tensors(model, stored, {*wrapped, *noted}, wrapped, files)


def is_whole(model: Any) -> bool:
    """Return whether ``model``, which is being opened, is of the class that was saved."""
    stored = opened()
    return stored is None or type(model).__name__ == stored.saved_class


def _refuse_absent(kind: str, wrapped: Collection[str], names: Collection[str]) -> None:
    missing = [name for name in wrapped if name not in names]
    if not missing:
        return
    if len(missing) < len(wrapped):
        there = next(name for name in wrapped if name in names)
        raise CheckpointError(f"{kind} has {there} but no {missing[0]}, which config.json wraps")
    raise NothingWrappedError(
        f"{kind} has none of the {len(wrapped)} modules that config.json wraps, such as {missing[0]}"
    )


def _places_by_tensors(
    model: Any, stored: Any, known: Collection[str], wrapped: Collection[str], files: Iterable[str]
) -> dict[str, str]:
    kind = type(model).__name__
    other = [file for file in files if not file.endswith(".safetensors")]
    if other:
        raise CheckpointError(
            f"{other[0]}: is opened as a {kind}, and only safetensors say which of its modules it has"
        )
    tensors = {tensor.name: tensor for file in files for tensor in read_header(Path(file)).tensors}
    whole = stored.skeleton()
    saved, here = names_in(whole, tensors), names_in(model, tensors)
    _refuse_absent(type(whole).__name__, wrapped, {module.name for module in inventory(whole)})
    _refuse_missing_tensors(whole, saved, model, here)
    weights, saved_weights = ({one.parameter: one.name for one in inventory(it)} for it in (model, whole))
    sources = _sources(saved)
    owners: dict[str, list[str]] = defaultdict(list)
    for parameter, keys in sources.items():
        for key in keys:
            owners[key].append(parameter)
    found = {}
    for parameter, keys in _sources(here).items():
        candidates = [owner for key in keys for owner in owners[key]]
        if parameter in weights and candidates:
            owner = saved_weights.get(max(candidates, key=lambda one: _in_common(one, parameter)), "")
            if owner in known:
                found[weights[parameter]] = owner
    if not _sources(here):
        raise NothingWrappedError(
            f"no tensor of {stored.source} belongs to a {kind}; it was saved as a {stored.saved_class}"
        )
    if not set(found.values()) & set(wrapped):
        warnings.warn(
            f"{kind} has none of the {len(wrapped)} modules that are wrapped in {stored.source}, such as "
            f"{next(iter(wrapped))}: it computes in full precision",
            UserWarning,
            stacklevel=2,
        )
    return found


def _sources(names: Names) -> dict[str, tuple[str, ...]]:
    """Return the tensors that each parameter is made of."""
    converted = {name: one.tensors for name, one in names.converted.items()}
    return {**{name: (tensor,) for name, tensor in names.stored.items()}, **converted}


def _refuse_missing_tensors(whole: Any, saved: Names, model: Any, here: Names) -> None:
    """Do nothing if the checkpoint has all that the model that was saved shares with the one that is opened.

    A model may have been saved without parts that its class can have (BertModel of a BertForMaskedLM has no pooler, and
    config.json does not tell). They are missed only where the class that is opened has them.

    Raises: CheckpointError.
    """
    ignored = ignored_if_missing(whole)
    filled = _sources(saved)
    tied = {name for knot in ties(whole) if not knot.isdisjoint(filled) for name in knot}
    random = {mark for name in here.missing for mark in _marks(model, name)}
    for name in saved.missing:
        if name in tied or any(re.search(pattern, name) for pattern in ignored):
            continue
        if not random.isdisjoint(_marks(whole, name)):
            raise CheckpointError(f"the checkpoint has no tensor {name}")


def _marks(model: Any, parameter: str) -> Iterator[tuple[Any, ...]]:
    """Yield by what a parameter is known again in another class: its own names, and the class of what holds them."""
    module, _, name = parameter.rpartition(".")
    holder, _, leaf = module.rpartition(".")
    yield type(model.get_submodule(holder)), leaf, name
    if not holder:
        yield None, leaf, name  # at the top, a class and its other heads agree on names alone
    owner = type(model.get_submodule(module))
    if not owner.__module__.startswith("torch."):
        yield owner, name  # a parameter of a class of the model's own, wherever that is held


def _in_common(one: str, other: str) -> int:
    """Return how many components two names have in common at their end."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)
