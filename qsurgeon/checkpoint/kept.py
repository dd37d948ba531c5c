"""Packed weights keep the names of their modules in checkpoints whose tensors transformers splits or joins.

transformers saves a model as its checkpoint was: it joins the parameters that it split when it loaded them, permutes
their rows and renames them. Codes and scales are bytes of a layout of their own, so that none of that may be done to
them: they are saved under the names that their modules have, and loaded by these. What is not packed is converted as
ever.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qsurgeon.errors import CheckpointError
from qsurgeon.layers import packed_layers, quant_layers
from qsurgeon.transformers_private.loading import (
    Transforms,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    copy_of_converter,
    fill_renaming,
    get_model_conversion_mapping,
    joined_name,
    loaded_name,
    renamed_name,
    reversed_transforms,
    sorted_transforms,
)

State = dict[str, Any]


def kept_names(model: Any, packed: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Return which tensors of ``model`` are stored under the names that its modules give them.

    packed: of each packed layer, what the tensors are called in it that its weight consists of; the model itself may
    not be packed yet. Those of a layer are renamed, all of them alike, if that is all that transformers does to them
    and if they are found again; else they are kept, and with them what would have been joined with them.
    """
    forward = get_model_conversion_mapping(model)
    backward, transforms = sorted_transforms(reversed_transforms(forward)), sorted_transforms(forward)
    layers = {layer: {f"{layer}.{key}": key for key in keys} for layer, keys in packed.items()}
    targets = {name: joined_name(name, backward) for own in layers.values() for name in own}
    joined = {target for target, pattern in targets.values() if pattern is not None}
    names = model.state_dict().keys() | targets.keys()
    kept = {name for name in names if joined and joined_name(name, backward)[0] in joined}
    state = dict.fromkeys(names, True)
    for own in layers.values():
        renamed = {name: renamed_name(name, backward[0]) for name in own}
        back = [loaded_name(one, transforms, model.base_model_prefix, state) for one in renamed.values()]
        apart = len({one.removesuffix(own[name]) for name, one in renamed.items()}) > 1  # a mapping of weights alone
        if apart or back != [(name, None) for name in own] or not kept.isdisjoint([*own, *renamed.values()]):
            kept.update(own)
    return frozenset(kept)


def packed_names(model: Any) -> dict[str, tuple[str, ...]]:
    """Return of each packed layer of ``model`` what the tensors are called that its weight consists of."""
    return {name: tuple(layer.stored) for name, layer in packed_layers(model).items()}


def past(transforms: Transforms, kept: frozenset[str], prefix: str) -> list[WeightTransform]:
    """Return ``transforms`` that leave tensors named ``kept`` alone, with the base model's ``prefix`` or without it."""
    if not kept:
        return list(transforms)
    start = f"{prefix}."
    names = kept | {start + name for name in kept} | {name.removeprefix(start) for name in kept}
    renamings = {id(one): _Renaming(one, names) for one in transforms if isinstance(one, WeightRenaming)}
    converters = {id(one): _Converter.of(one, names) for one in transforms if isinstance(one, WeightConverter)}
    return [(renamings | converters)[id(one)] for one in transforms]


class _Renaming(WeightRenaming):
    """A renaming that leaves some names alone, and else does what the one does that it holds."""

    __slots__ = ("inner", "kept")

    def __init__(self, inner: WeightRenaming, kept: frozenset[str]) -> None:
        fill_renaming(self, inner)
        self.inner, self.kept = inner, kept

    def __repr__(self) -> str:
        return repr(self.inner)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key in self.kept:
            return source_key, None
        return self.inner.rename_source_key(source_key)

    def reverse_transform(self) -> Any:
        return self.inner.reverse_transform()

    def was_used(self) -> bool:
        return bool(self.inner.was_used())


class _Converter(WeightConverter):
    """A converter that leaves some names alone."""

    __slots__ = ("kept",)

    def __init__(self, *args: Any, kept: frozenset[str] = frozenset(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = kept

    @classmethod
    def of(cls, one: WeightConverter, kept: frozenset[str]) -> "_Converter":
        new: _Converter = copy_of_converter(one, cls)
        new.kept = kept
        return new

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key in self.kept:
            return source_key, None
        return super().rename_source_key(source_key)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """Let a wrapped model be saved inside the block as it is, and not as the quantized one that it was loaded from.

    transformers saves what it dequantized under the names of what was quantized: it keeps the conversions of the
    quantizer that read the checkpoint, and does them backwards. Without them it has those of the model's type.
    """
    before = getattr(model, "_weight_conversions", None)
    operations = [one for transform in before or () for one in getattr(transform, "operations", ())]
    quantizer = getattr(model, "hf_quantizer", None)
    if all(getattr(one, "hf_quantizer", quantizer) is quantizer for one in operations) or not quant_layers(model):
        yield
        return
    model._weight_conversions = None
    try:
        yield
    finally:
        model._weight_conversions = before


def keeping(revert: Callable[[Any, State], State]) -> Callable[[Any, State], State]:
    """Return a ``revert_weight_conversion``, which save_pretrained calls, that leaves codes and scales alone."""

    def revert_weight_conversion(model: Any, state_dict: State) -> State:
        packed = packed_names(model)
        kept = kept_names(model, packed) if packed else frozenset()
        with _as_it_is(model):
            done = revert(model, {name: one for name, one in state_dict.items() if name not in kept})
        own = {name: one for name, one in state_dict.items() if name in kept}
        if twice := own.keys() & done.keys():
            raise CheckpointError(
                f"the layout of its checkpoint gives another tensor the name {min(twice)}, which a packed weight has: "
                "save it with save_original_format=False"
            )
        return {**done, **own}

    return revert_weight_conversion
