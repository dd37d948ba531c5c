"""Lets peft count the values of packed weights instead of their bytes.

Importing this module changes ``get_nb_trainable_parameters``, which ``print_trainable_parameters`` and
``get_model_status`` ask; ``qsurgeon/__init__.py`` imports it as soon as peft has its models.
"""

from typing import Any

from peft.mixed_model import PeftMixedModel
from peft.peft_model import PeftModel

from qsurgeon.layers import uncounted
from qsurgeon.patching import Method, patch


def _counting_values(count: Method) -> Method:
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trained, total = count(self)
        return trained, total + uncounted(self)

    return get_nb_trainable_parameters


patch(PeftModel, "get_nb_trainable_parameters", _counting_values)
patch(PeftMixedModel, "get_nb_trainable_parameters", _counting_values)
