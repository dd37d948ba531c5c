"""Attributes that transformers sets on modules, parameters and configs. Nothing is imported."""

READ = "_is_hf_initialized"  # on a parameter that was read from a checkpoint, and on a module that is not to be filled
ADAPTED = "_hf_peft_config_loaded"  # on a model that ``add_adapter`` or ``load_adapter`` put an adapter on
SET_ON_CONFIGS = "_is_quantized"  # on the config of each model that has a quantizer, ours too
