"""What a model says about its parts: which modules compute its outputs, and which sub-models read no text."""

from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn

# What a sub-model that does not declare its ``input_modalities`` reads, by how its ``main_input_name`` begins.
_READS = {"pixel_values": "image", "image": "image", "input_features": "audio", "input_values": "audio"}


def output_heads(model: nn.Module) -> frozenset[str]:
    """Return the paths in ``model`` of the modules that compute its outputs; what lies beneath is not listed.

    These are what ``get_output_embeddings()`` returns, of the model and of each model inside it. A model without such
    a head may have one for another task (classification, boxes, a CTC): then it is what stands beside its base model,
    and is no model itself. There is none in a base model, and in what is not a PreTrainedModel.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    heads: set[str] = set()
    for outer in _outermost(model):
        inside = [one for one in outer.modules() if isinstance(one, transformers.PreTrainedModel)]
        found = [_output_embeddings(one) for one in inside]
        known = [head for head in found if head is not None and id(head) in paths]
        heads |= {paths[id(head)] for head in known}
        if found[0] is None:
            heads |= {paths[id(child)] for child in _beside_base(outer)}
    return frozenset(heads)


def _output_embeddings(model: Any) -> nn.Module | None:
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # of a class that has no head and says so in this way
        return None
    return head if isinstance(head, nn.Module) else None


def _outermost(model: nn.Module) -> "Iterator[transformers.PreTrainedModel]":
    if isinstance(model, transformers.PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _outermost(child)


def _beside_base(model: "transformers.PreTrainedModel") -> Iterator[nn.Module]:
    base = model.base_model
    for child in model.children() if base is not model else ():
        if not any(one is base or isinstance(one, transformers.PreTrainedModel) for one in child.modules()):
            yield child


def towers(model: nn.Module) -> dict[str, str]:
    """Return the sub-models of ``model`` that read images, sound or the like, and no text: what each reads, by path.

    There are some only in a model that reads something else besides; a tower inside a tower is not listed.
    """
    found: dict[str, str] = {}
    for outer in _outermost(model):
        prefix = next(path for path, module in model.named_modules() if module is outer)
        everything = _modalities(outer)
        for name, part in outer.named_modules():
            path = f"{prefix}.{name}" if prefix and name else prefix or name
            if not isinstance(part, transformers.PreTrainedModel) or any(path.startswith(f"{one}.") for one in found):
                continue
            reads = _modalities(part)
            if "text" not in reads and reads != everything:
                found[path] = ", ".join(sorted(reads))
    return found


def _modalities(model: "transformers.PreTrainedModel") -> set[str]:
    declared = model.input_modalities
    reads = {declared} if isinstance(declared, str) else set(declared)
    if reads == {"text"}:  # also what a class that declares nothing inherits
        reads = {next((what for start, what in _READS.items() if model.main_input_name.startswith(start)), "text")}
    return reads
