"""transformers' own registration: ``quantization_config`` in config.json, and the quantizer that obeys it.

Importing this module registers both; ``qsurgeon/__init__.py`` sees to it that it is imported as soon as
``transformers.quantizers.auto`` is.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import transformers
from torch import nn

from qsurgeon.checkpoint.kept import kept_names, packed_names, past
from qsurgeon.checkpoint.reading.headers import DTYPES
from qsurgeon.errors import CheckpointError
from qsurgeon.hf.opening import is_whole, places
from qsurgeon.hf.rollouts import follow_rollouts
from qsurgeon.layers import PackedLayer, packed_layers, quant_layers
from qsurgeon.patching import Method, patch
from qsurgeon.storage import PACKED
from qsurgeon.storage.packed import WEIGHT
from qsurgeon.surgery import QUANT_METHOD, Origin, Record, current_record, install, mark, operate, read_record
from qsurgeon.torch_private import COMPILED_FROM
from qsurgeon.transformers_private.attributes import READ
from qsurgeon.transformers_private.loading import ConversionOps, WeightConverter
from qsurgeon.transformers_private.quantizers import (
    AUTO_QUANTIZER_MAPPING,
    HfQuantizer,
    QuantizationConfigMixin,
    assign_is_quantized,
    new_dtype,
    register_quantization_config,
    register_quantizer,
)


class QSurgeonConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model: a Record as transformers wants it."""

    def __init__(self, **fields: Any) -> None:
        self.record = read_record(fields, "config.json")
        self._data = self.record.to_dict()
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # the hint says enum, a str is taken

    def __deepcopy__(self, memo: dict[int, Any]) -> "QSurgeonConfig":
        """Return a copy with the same record, which nothing changes.

        Encoder-decoder models copy their config in forward, and dynamo cannot trace pydantic.
        """
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json keeps."""
        return {"quant_method": QUANT_METHOD, **self._data}


class QSurgeonQuantizer(HfQuantizer):
    """Wraps the modules that the config names, before the weights are loaded into them.

    A model with packed weights keeps it: by it, transformers' Trainer knows that there is nothing to train but
    adapters. One with master weights does not: it is an ordinary model.
    """

    quantization_config: Any  # QSurgeonConfig, where transformers' hint says more than it asks
    is_trainable = True

    def __init__(self, quantization_config: QSurgeonConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._packs = not self.pre_quantized  # what is loaded is a plain checkpoint
        self._slots: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}  # what the packed layers are to be filled with
        self._found: set[str] = set()
        self._computing: dict[str, torch.dtype] = {}
        self._kept: frozenset[str] = frozenset()  # names that a checkpoint has as the modules have them
        self._to_save: Any = None

    @property
    def is_packed(self) -> bool:
        """Whether weights are stored as codes and scales."""
        record: Record = self.quantization_config.record
        return record.encoding is not None

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves can be trained."""
        return not self.is_packed

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model."""
        return True

    def is_serializable(self) -> bool:
        """Say that the model can be saved."""
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse to pack what would stay on a disk as it is. Raises: CheckpointError."""
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        encoding = self.quantization_config.record.encoding
        if encoding not in (None, PACKED) and not self.pre_quantized:
            raise CheckpointError(
                f"storage: {encoding.name} is not packed while a plain checkpoint is loaded: write a checkpoint first "
                "(qsurgeon apply), and load that"
            )
        if self.is_packed and not self.pre_quantized and on_disk:
            raise CheckpointError(
                "a weight that is offloaded to disk is not packed on the way: write a packed checkpoint "
                "first (qsurgeon apply), and load that"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> None:
        record: Record = self.quantization_config.record
        wrapped, excluded = record.quantizations(), record.exclusions()
        noisy = {} if record.noise is None else record.noise.modules
        place = places(model, wrapped, [*excluded, *noisy], checkpoint_files or ())
        chosen = {name: wrapped[there] for name, there in place.items() if there in wrapped}
        operate(model, chosen, storage=record.storage)
        mark(
            model,
            Origin(record.source, record.recipe),
            {name: excluded[there] for name, there in place.items() if there in excluded},
        )
        if record.noise is not None:
            lost = [name for name in noisy if name not in place.values()]
            if lost and is_whole(model):
                raise CheckpointError(f"{type(model).__name__} has no {lost[0]}, which config.json gives noise")
            install(model, record.noise, {name: there for name, there in place.items() if there in noisy})
        follow_rollouts(model, chosen.values())
        if self.is_packed:
            patch(transformers.PreTrainedModel, "save_pretrained", _saving_what_is_given)
        self._slots = {
            f"{name}.{key}": (tuple(parameter.shape), parameter.dtype)
            for name, module in packed_layers(model).items()
            for key, parameter in module.named_parameters(recurse=False)
        }

    def conversions_past_codes(self, conversions: Any, model: Any) -> Any:
        """Return ``conversions``, which ``model`` is to be loaded by, that leave codes and scales alone."""
        self._kept = kept_names(model, packed_names(model)) if self.is_packed else frozenset()
        return past(conversions, self._kept, model.base_model_prefix)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Say what a tensor of a checkpoint is to be cast to. transformers asks of each, before it is read.

        Raises: as ``expect``.
        """
        self.expect(converter.target_patterns, isinstance(converter, WeightConverter), param, dtype)
        return new_dtype(self, converter, param, dtype)

    def expect(self, targets: Sequence[str], is_converted: bool, tensor: Any, dtype: torch.dtype | None = None) -> None:
        """Note that a tensor of a checkpoint, not read yet, is about to be loaded into ``targets``.

        Raises: CheckpointError for one that is not what a packed layer takes.
        """
        if is_converted:  # of biases, which are split as ever
            self._found |= {one for one in self._slots if any(part in one for part in targets)}
        name = targets[0]
        if name not in self._slots:
            return
        self._found.add(name)
        shape, kind = self._slots[name]
        found = _Header(tensor)
        if found.shape != shape:
            raise CheckpointError(f"{name} has shape {list(found.shape)}; the packed layer takes {list(shape)}")
        exact = DTYPES.get(kind, "")
        names = (exact.lower(), str(kind).removeprefix("torch."))
        fits = found.is_floating_point if kind.is_floating_point else found.dtype.lower() in names
        if not fits:
            wanted = "floating point" if kind.is_floating_point else exact
            raise CheckpointError(f"{name} is {found.dtype}; the packed layer takes {wanted}")
        layer, _, key = name.rpartition(".")
        if key == WEIGHT and dtype is not None and dtype.is_floating_point:
            self._computing[layer] = dtype  # the model's class keeps it in another dtype than the rest

    def codes(self) -> dict[str, torch.dtype]:
        """Return the parameters of packed layers that hold codes, not numbers, and their dtypes: never to be cast."""
        return {name: dtype for name, (_, dtype) in self._slots.items() if not dtype.is_floating_point}

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Let transformers cast inside the block what it loads, as it casts the tensors of a plain checkpoint."""
        self.pre_quantized = False
        try:
            yield
        finally:
            self.pre_quantized = True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a tensor of a plain checkpoint is a weight to be packed on the way."""
        module, _, key = param_name.rpartition(".")
        if not self._packs or key != WEIGHT:
            return False
        # Of what is split into several weights, transformers asks of the first alone.
        return param_name in self._kept or isinstance(model.get_submodule(module), PackedLayer)

    def get_quantize_ops(self) -> ConversionOps:
        """Return what packs a weight."""
        return _Pack()

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in quant_layers(model).items():
            for key, parameter in module.named_parameters(recurse=False):
                # transformers marks what it read from the checkpoint; the rest it would leave random. What is still
                # on the meta device was offloaded.
                is_read = getattr(parameter, READ, False) or parameter.is_meta
                is_named = self._packs or f"{name}.{key}" not in self._slots.keys() - self._found
                if not (is_read and is_named):
                    raise CheckpointError(f"the checkpoint has no tensor {name}.{key}")
        for name, dtype in self._computing.items():
            model.get_submodule(name).compute_in(dtype)
        self._slots, self._found, self._computing = {}, set(), {}
        record = current_record(model)
        if record is not None:
            model.config.quantization_config = QSurgeonConfig(**record.to_dict())
        if self.is_packed:
            return model
        # From here on it is an ordinary model: an attached quantizer would make save_pretrained ignore
        # `state_dict=`, which FSDP needs, and block .half() and .float().
        model.hf_quantizer = None
        model.is_quantized = False
        vars(model).pop("quantization_method", None)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """Return what save_pretrained was told to save, and nothing for the files' headers."""
        return self._to_save, {}

    @contextmanager
    def saving(self, state_dict: Any) -> Iterator[None]:
        """Let save_pretrained save ``state_dict`` inside the block."""
        self._to_save = state_dict
        try:
            yield
        finally:
            self._to_save = None


class _Pack(ConversionOps):
    """Packs weights of a plain checkpoint as soon as they are read; what else was split off with them stays."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        done: dict[str, Any] = {}
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            path = name.removesuffix(f".{WEIGHT}")
            layer = kwargs["model"].get_submodule(path)
            if not isinstance(layer, PackedLayer):
                done[name] = weight
                continue
            expected = layer.weights[0].row_shape(layer.features)
            if tuple(weight.shape) != expected:
                raise CheckpointError(f"{name} has shape {list(weight.shape)}; expected {list(expected)}")
            layer.compute_in(weight.dtype)
            done |= {f"{path}.{key}": tensor for key, tensor in layer.packed(weight).items()}
        return done


class _Header:
    """What is known of a checkpoint's tensor, which may not be read yet."""

    def __init__(self, tensor: Any) -> None:
        is_read = isinstance(tensor, torch.Tensor)
        self.shape = tuple(tensor.shape if is_read else tensor.get_shape())
        self.dtype = str(tensor.dtype).removeprefix("torch.") if is_read else str(tensor.get_dtype())
        self.is_floating_point = tensor.is_floating_point() if is_read else self.dtype.startswith(("F", "BF"))


def hosts(root: nn.Module) -> list[Any]:
    """Return the models of transformers that are saved and loaded as such: ``root``, or the outermost inside of it."""
    found: list[Any] = []
    inside = ""
    for path, module in root.named_modules():
        if isinstance(module, transformers.PreTrainedModel) and not (inside and path.startswith(inside)):
            found.append(module)
            inside = f"{path}."
            if not path:
                break
    return found


def note(model: Any) -> None:
    """Let a model that was wrapped in memory be in the state of one that was loaded so.

    Its config has the record, and where weights are packed the model has a quantizer. Models of transformers ask
    ``_is_quantized`` where they would read a weight instead of calling its layer.
    """
    record = current_record(model)
    if record is None:
        return
    config = QSurgeonConfig(**record.to_dict())
    vars(model.config)["quantization_config"] = config
    assign_is_quantized(model)
    vars(model).update(hf_quantizer=None, is_quantized=False)
    if record.encoding is not None:
        patch(transformers.PreTrainedModel, "save_pretrained", _saving_what_is_given)
        # accelerate's compile_regions returns a copy that remembers the original (1.15); trainers save that.
        for one in filter(None, (model, vars(model).get(COMPILED_FROM))):
            vars(one)["hf_quantizer"] = QSurgeonQuantizer(config, pre_quantized=True)
            vars(one).update(is_quantized=True, quantization_method=QUANT_METHOD)


def _saving_what_is_given(save: Method) -> Method:
    """Let ``save_pretrained(state_dict=...)`` save that, also of a model that has our quantizer.

    transformers throws it away where there is a quantizer, and FSDP has whole tensors nowhere else.
    """

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = getattr(self, "hf_quantizer", None)
        if not isinstance(quantizer, QSurgeonQuantizer):
            return save(self, *args, **kwargs)
        given = signature(save).bind(self, *args, **kwargs).arguments.get("state_dict")
        with quantizer.saving(given):
            return save(self, *args, **kwargs)

    return save_pretrained


def register() -> None:
    """Make transformers know ``quant_method: qsurgeon``; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(QSurgeonConfig)
        register_quantizer(QUANT_METHOD)(QSurgeonQuantizer)


register()
