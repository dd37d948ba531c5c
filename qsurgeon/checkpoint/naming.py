"""Which parameter of the model a stored tensor becomes: checkpoints and modules do not always share names.

transformers renames what it loads (``visual.blocks…`` to ``model.visual.blocks…``), joins what is stored in parts, and
adds or drops the base model's prefix. Its own mapping is asked here, and what of it is not public stands here alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class Names:
    """What becomes of the tensors of a checkpoint.

    stored: the tensor's name, by the name of the parameter that it is loaded into as it is. joined: the names of the
    tensors that are made into one parameter, by its name. unknown: tensors that the model has no place for. missing:
    parameters that no tensor is loaded into.
    """

    stored: dict[str, str]
    joined: dict[str, tuple[str, ...]]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]


def names_in(model: Any, tensors: Iterable[str]) -> Names:
    """Return what ``model``, which may be on the meta device, makes of ``tensors`` when it is loaded from them."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    stored: dict[str, str] = {}
    joined: dict[str, list[str]] = {}
    unknown: list[str] = []
    for tensor in tensors:
        name, part = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:
            name, part = rename_source_key(tensor, [], [], prefix, state)
        if name not in state:
            unknown.append(tensor)
        elif part is None:
            stored[name] = tensor
        else:
            joined.setdefault(name, []).append(tensor)
    filled = stored.keys() | joined.keys()
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # one that is tied has several names
        owners.setdefault(id(parameter), []).append(name)
    missing = [names[0] for names in owners.values() if filled.isdisjoint(names)]
    return Names(stored, {name: tuple(parts) for name, parts in joined.items()}, tuple(unknown), tuple(missing))
