"""Announce every model that ``from_pretrained`` returns.

Importing this module changes ``PreTrainedModel.from_pretrained``; ``qsurgeon/__init__.py`` imports it right after
``transformers.modeling_utils``, below ``qsurgeon run`` only. The quantizer is no place for it: transformers
makes none for a model that is not quantized, and that model is the one to know about.
"""

from typing import Any

from transformers.modeling_utils import PreTrainedModel

from qsurgeon.launch.announce import announce
from qsurgeon.patching import Method, patch


def _announcing(load: Method) -> Method:
    def load_and_announce(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        announce(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple with output_loading_info=True
        return loaded

    return load_and_announce


patch(PreTrainedModel, "from_pretrained", _announcing)
