"""Merge a LoRA adapter into its wrapped base, and measure the error that re-quantizing adds.

Under the adapter a layer computed q(W)·q(x) + ΔW·x; merged it computes q(W + ΔW)·q(x). What is stored stays the master
weight, W + ΔW, in the base's dtype. Of a packed weight q(W) is all there is: it stands for W, and the codes of
q(W) + ΔW are stored, one weight after the other.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qsurgeon.checkpoint.reading.files import INDEX, copy_companions, refuse_irregular, write_json
from qsurgeon.checkpoint.reading.gate import BAD_ADAPTER
from qsurgeon.checkpoint.reading.headers import FLOATS, read_header
from qsurgeon.checkpoint.reading.index import read_headers, weight_files
from qsurgeon.checkpoint.writing.progress import Estimate, Events
from qsurgeon.checkpoint.writing.staging import refuse_inside, staged
from qsurgeon.errors import CheckpointError
from qsurgeon.formats.quality import decibels, energy
from qsurgeon.formats.rotation import rotated
from qsurgeon.hf.models import load
from qsurgeon.hf.opening import ADAPTER
from qsurgeon.layers import AS_IT_IS, PackedLayer, QuantProduct
from qsurgeon.peft_private import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from qsurgeon.reading import read_json
from qsurgeon.surgery import inventory

WEIGHTS = "adapter_model.safetensors"
NAME = "default"
REPORT = "qsurgeon-merge.json"
DTYPES = {**FLOATS, "U8": torch.uint8}  # of what a base holds: weights, or codes and scales


@dataclass(frozen=True)
class Change:
    """What the merge did to one module, or to several: every number is a sum, so that changes can be added.

    weight: the name of its format. w, dw: Σ of the squares of W and of ΔW. codes, changed: how many codes q(W) has, and
    how many are others in q(W + ΔW); 0 without a format. signal: Σ of the squares of q(W) + ΔW, which the adapter was
    trained with. noise: of what q(W + ΔW) differs from that.
    """

    module: str
    shape: tuple[int, ...]
    weight: str
    w: float
    dw: float
    codes: int
    changed: int
    signal: float
    noise: float

    @property
    def relative(self) -> float | None:
        """The norm of ΔW relative to that of W; None if W is zero."""
        return (self.dw / self.w) ** 0.5 if self.w else None

    @property
    def share(self) -> float | None:
        """The share of codes that changed; None without a format."""
        return self.changed / self.codes if self.codes else None

    @property
    def sqnr(self) -> float:
        """The SQNR of q(W + ΔW) against q(W) + ΔW, in dB; infinity where they are equal."""
        return decibels(self.signal, self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values; ``sqnr`` is null where it is not finite."""
        return {
            "module": self.module,
            "shape": list(self.shape),
            "weight": self.weight,
            "relative": self.relative,
            "codes": self.codes,
            "changed": self.changed,
            "share": self.share,
            "sqnr": self.sqnr if self.noise and self.signal else None,
        }


def total(changes: Iterable[Change], name: str = "total") -> Change:
    """Return ``changes`` as one, named ``name``, with the shape and format of the first."""
    every = tuple(changes)
    first = every[0]
    sums = {key: sum(getattr(one, key) for one in every) for key in ("w", "dw", "codes", "changed", "signal", "noise")}
    return Change(name, first.shape, first.weight, **sums)


@dataclass(frozen=True)
class Merged:
    """What ``merge`` did: the change of each module with LoRA, and the modules that the adapter replaced whole."""

    adapter: str
    base: str
    changes: tuple[Change, ...]
    replaced: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values; the total is of the modules whose weight has a format."""
        rounded = [one for one in self.changes if one.codes]
        sums = total(rounded).to_dict() if rounded else None
        if sums is not None:
            sums = {key: sums[key] for key in ("relative", "codes", "changed", "share", "sqnr")}
        return {
            "adapter": self.adapter,
            "base": self.base,
            "total": sums,
            "replaced": list(self.replaced),
            "modules": [one.to_dict() for one in self.changes],
        }


def merge(
    adapter: str | Path, destination: str | Path, model: str | Path | None = None, events: Events | None = None
) -> Merged:
    """Write ``destination``: the base of a LoRA adapter with the adapter folded in, wrapped as the base is.

    ``adapter``: its folder. ``model``: the base's folder, if not the one that the adapter names. ``events`` hears of
    every file of weights that was written. What the adapter does not touch is copied to the bit; the report also lies
    in qsurgeon-merge.json.

    Raises: CheckpointError for an adapter that cannot be merged, NothingWrappedError for a base that is not wrapped;
    ``destination`` does not exist then.
    """
    adapter, destination = Path(adapter), Path(os.path.normpath(destination))
    base, events = base_of(adapter, model), events or Events()
    for source in (adapter, base):
        refuse_inside(destination, source)
    sizes = [file.stat().st_size for file in weight_files(base)]
    with staged(destination) as folder:
        events.begin(Estimate(sum(sizes), sum(sizes), len(sizes), sum(sizes)))  # the model is held whole
        root = load(base, dtype="auto")
        ties = {one.name: one.tied_to for one in inventory(root) if one.tied_to is not None}
        loaded = _with_adapter(root, adapter, base)
        names = dict(_adapted(root))
        _refuse_tied(ties, names)
        changes = tuple(_fold(name, layer) for name, layer in names.items() if isinstance(layer, lora.LoraLayer))
        replaced = tuple(name for name, layer in names.items() if isinstance(layer, AuxiliaryTrainingWrapper))
        loaded.merge_and_unload()
        tensors = {
            f"{name}.{key}": tensor for name in names for key, tensor in root.get_submodule(name).state_dict().items()
        }
        _write(tensors, base, folder, events)
        merged = Merged(str(adapter), str(base), changes, replaced)
        write_json(folder / REPORT, merged.to_dict())
    return merged


def base_of(adapter: str | Path, model: str | Path | None = None) -> Path:
    """Return the folder of the base: ``model``, or what the adapter names.

    Raises: CheckpointError if that is not the folder of a model, or if ``adapter`` is none that can be merged.
    """
    config = _config(Path(adapter))
    named = model if model is not None else config.get("base_model_name_or_path")
    if not named or not isinstance(named, str | Path):
        raise CheckpointError(f"{adapter}: names no base; say which: --model FOLDER")
    if not Path(named).is_dir():
        whose = "no such folder" if model is not None else f"the base that {adapter} names is no folder here"
        raise CheckpointError(f"{named}: {whose}; say where it is: --model FOLDER")
    if (Path(named) / ADAPTER).is_file():
        raise CheckpointError(f"{named}: is an adapter itself; expected the folder that qsurgeon apply wrote")
    return Path(named)


def _config(adapter: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises: CheckpointError if there is none, or if it is of nothing we can merge."""
    if adapter.is_dir():
        refuse_irregular(adapter)
    if not (adapter / ADAPTER).is_file():
        raise CheckpointError(f"{adapter}: is not the folder of an adapter; it has no {ADAPTER}")
    config = read_json(adapter / ADAPTER)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{adapter}: is an adapter of kind {config.get('peft_type')}; only LORA can be merged")
    unmergeable = ("layer_replication", "arrow_config", "use_bdlora", "megatron_config")
    for key, plain in (("bias", "none"), *((key, None) for key in unmergeable)):
        if config.get(key, plain) != plain:
            raise CheckpointError(f"{adapter}: has {key}={config[key]!r}, which cannot be merged; expected {plain!r}")
    if not (adapter / WEIGHTS).is_file():
        raise CheckpointError(f"{adapter}: has no {WEIGHTS}")
    return config


def _with_adapter(model: nn.Module, adapter: Path, base: Path) -> Any:
    """Return ``model``, which is ``base``, with the adapter on it. Raises: CheckpointError if it does not fit."""
    # Only the modules that the config names are looked for: with a base of another kind, that is a ValueError, and
    # with values that no config has, whatever peft happens to do with them.
    try:
        loaded = peft.PeftModel(model, peft.PeftConfig.from_pretrained(str(adapter)), NAME)
    except BAD_ADAPTER as error:
        raise CheckpointError(f"{adapter} does not fit {base}: {' '.join(str(error).split())[:300]}") from error
    # peft would only warn of what is missing, and leave it random.
    state = peft.get_peft_model_state_dict(loaded, adapter_name=NAME, save_embedding_layers=False)
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    header = read_header(adapter / WEIGHTS)
    found = {tensor.name: tensor.shape for tensor in header.tensors}
    for key, shape in expected.items():
        if key not in found:
            raise CheckpointError(f"{adapter} does not fit {base}: it has no tensor {key}")
        if found[key] != shape:
            raise CheckpointError(
                f"{adapter} does not fit {base}: {key} has shape {list(found[key])}, the model takes {list(shape)}"
            )
    for tensor in header.tensors:
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype}; expected one of: {', '.join(FLOATS)}"
            )
    # An adapter of an embedding carries the embedding too.
    unknown = [key for key in found if key not in expected and ".base_layer." not in key]
    if unknown:
        raise CheckpointError(f"{adapter} does not fit {base}: the model has no place for {unknown[0]}")
    loaded.load_adapter(str(adapter), NAME)
    return loaded.eval()


def _adapted(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each module that the adapter changes, by its name in the plain model, in the model's order.

    Raises: CheckpointError for one whose change cannot be merged.
    """
    inside = ""
    for name, layer in root.named_modules():
        if (inside and name.startswith(inside)) or not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        inside = f"{name}."
        kind = type(layer).__name__
        if isinstance(layer, lora.Linear | lora.Embedding):
            variant = layer.lora_variant.get(NAME)
            if variant is not None:
                kind = type(variant).__name__.removesuffix("Variant")
        if kind not in ("Linear", "Embedding") and not isinstance(layer, ModulesToSaveWrapper | TrainableTokensWrapper):
            raise CheckpointError(
                f"{name}: its adapter is a {kind}; only plain LoRA of a Linear or Embedding is merged"
            )
        if isinstance(layer, lora.Linear) and layer.lora_bias[NAME] and layer.get_base_layer().bias is None:
            raise CheckpointError(
                f"{name}: its adapter has a bias (lora_bias=True), and the layer has none that it could be added to; "
                "train without lora_bias, or on modules that have a bias"
            )
        yield name, layer


def _refuse_tied(ties: Mapping[str, str], names: Iterable[str]) -> None:
    """Do nothing if no module of ``names`` is in ``ties`` (whose weight is whose). Raises: CheckpointError."""
    for name in names:
        for one, owner in ties.items():
            if name in (one, owner):
                raise CheckpointError(
                    f"{one} is tied to {owner}: merging an adapter of {name} would change both. "
                    "Untie them in the recipe (untie: true), or train without it"
                )


@torch.no_grad()
def _fold(name: str, layer: Any) -> Change:
    """Add ΔW to the weight that ``layer`` holds, make ΔW zero, and return what that changed."""
    base = layer.get_base_layer()
    if isinstance(base, PackedLayer):
        return _fold_packed(name, layer, base)
    weight: Tensor = base.weight
    before, delta = weight.detach().clone(), layer.get_delta_weight(NAME).float()
    after = (before.float() + delta).to(weight.dtype)
    if not after.isfinite().all():
        raise CheckpointError(f"{name}: W + ΔW is not finite everywhere in {weight.dtype}")
    weight.copy_(after)
    if isinstance(layer, lora.Linear):
        _fold_bias(layer, base)
        factor: Any = layer.lora_B[NAME]
        factor.weight.zero_()  # peft, which now takes the adapter off, adds what is left of it, in the base's dtype
    else:
        layer.lora_embedding_B[NAME].zero_()
    how = base.quantization.weight if isinstance(base, QuantProduct) else None
    w, dw, shape = energy(before), energy(delta), tuple(weight.shape)
    if how is None:
        trained = before.float() + delta
        return Change(name, shape, AS_IT_IS, w, dw, 0, 0, energy(trained), energy(after.float() - trained))
    declared = base.weights[0]
    old, new = (how.as_weight.quantize(declared.rows(one)) for one in (before, after))
    changed = int((old.codes != new.codes).sum())
    trained = old.dequantize().float() + declared.rows(delta)
    noise = energy(new.dequantize().float() - trained)
    return Change(name, shape, how.name, w, dw, weight.numel(), changed, energy(trained), noise)


def _fold_packed(name: str, layer: Any, base: PackedLayer) -> Change:
    """Pack q(W) + ΔW in place of q(W), where both are rotated if the format rotates, and return what that changed."""
    grid, declared = base.grid, base.weights[0]
    shape = declared.row_shape(base.features)
    before = base.opened(torch.float32)
    delta = rotated(declared.rows(layer.get_delta_weight(NAME).float()), base.quantization.rotation)
    trained = before + delta
    if not trained.isfinite().all():
        raise CheckpointError(f"{name}: W + ΔW is not finite everywhere")
    _fold_bias(layer, base)
    old = base.codes()
    base.repack(trained)
    layer.set_adapter([])  # for peft, which now takes the adapter off, there is nothing left to merge
    changed = int((old != base.codes()).sum())
    noise = energy(base.opened(torch.float32) - trained)
    return Change(name, shape, grid.name, energy(before), energy(delta), old.numel(), changed, energy(trained), noise)


def _fold_bias(layer: Any, base: Any) -> None:
    """Add what the adapter adds to the bias, and make that zero."""
    factor = layer.lora_B[NAME]
    if factor.bias is not None:
        base.bias.copy_(base.bias.float() + factor.bias.float() * layer.scaling[NAME])
        factor.bias.zero_()


def _write(tensors: dict[str, Tensor], base: Path, folder: Path, events: Events) -> None:
    """Write the files of ``base`` to ``folder``, with ``tensors`` in place of their own."""
    headers = read_headers(base)
    for name, tensor in tensors.items():
        there = headers.get(name)
        if there is None:
            raise CheckpointError(
                f"no file of {base} has a tensor {name}: its tensors go by other names than its modules"
            )
        if there.shape != tuple(tensor.shape) or DTYPES.get(there.dtype) != tensor.dtype:
            raise CheckpointError(
                f"{there.file}: {name} is {there.dtype} {list(there.shape)}, merged it is "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    copy_companions(base, folder)
    if (base / INDEX).is_file():
        shutil.copyfile(base / INDEX, folder / INDEX)
    for file in weight_files(base):
        if any(headers[name].file == file for name in tensors):
            with safe_open(file, framework="pt") as opened:
                kept = {key: tensors[key] if key in tensors else opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                save_file({k: v.contiguous() for k, v in kept.items()}, folder / file.name, metadata=opened.metadata())
        else:
            shutil.copyfile(file, folder / file.name)
        events.advance(file.stat().st_size)
