"""What qsurgeon uses of peft that is not public. All of it was seen in peft 0.20 and 0.21."""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

__all__ = [
    "CHECK_MERGE",
    "CREATE",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "filled",
    "is_target",
]

# Methods of BaseTuner.
CREATE = "_create_and_replace"  # called once for each module that gets an adapter, with ``current_key``: its path
CHECK_MERGE = "_check_merge_allowed"  # called before merge_adapter, merge_and_unload


def filled(tuner: Any, config: Any, model: nn.Module) -> Any:
    """Return ``config``, which is changed, with the targets that peft chooses itself where it names none."""
    return _maybe_include_all_linear_layers(tuner._prepare_adapter_config(config, tuner.get_model_config(model)), model)


def is_target(tuner: Any, config: Any, path: str) -> bool:
    """Return whether peft puts an adapter of a ``filled`` config on the module at ``path``."""
    return bool(tuner._check_target_module_exists(config, path))
