"""Attributes that other libraries set on modules, parameters and configs, that are not public, and that are used here.

Seen in transformers 5.5.3 to 5.24.0, accelerate 1.13 to 1.15.
"""

# transformers
READ = "_is_hf_initialized"  # on a parameter that was read from a checkpoint, and on a module that is not to be filled
ADAPTED = "_hf_peft_config_loaded"  # on a model that ``add_adapter`` or ``load_adapter`` put an adapter on
SET_ON_CONFIGS = "_is_quantized"  # on the config of each model that has a quantizer, ours too
