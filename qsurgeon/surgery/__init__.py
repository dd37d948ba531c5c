"""From a recipe to a changed model: list its modules, decide each one's fate, operate."""

from qsurgeon.surgery.adapters import bypassed, misread, objection, refuse_adapters
from qsurgeon.surgery.current import Origin, current_record, exclusions, inherit, mark
from qsurgeon.surgery.inventory import Module, inventory, plain_model
from qsurgeon.surgery.operate import operate
from qsurgeon.surgery.plan import Excluded, Plan, Step, build_plan
from qsurgeon.surgery.quantized import configs_in, foreign_method, is_ours, refuse_foreign, refuse_quantized
from qsurgeon.surgery.record import QUANT_METHOD, Record, read_record, record_in, record_of
from qsurgeon.surgery.skeleton import architecture, read_config, skeleton

__all__ = [
    "QUANT_METHOD",
    "Excluded",
    "Module",
    "Origin",
    "Plan",
    "Record",
    "Step",
    "architecture",
    "build_plan",
    "bypassed",
    "configs_in",
    "current_record",
    "exclusions",
    "foreign_method",
    "inherit",
    "inventory",
    "is_ours",
    "mark",
    "misread",
    "objection",
    "operate",
    "plain_model",
    "read_config",
    "read_record",
    "record_in",
    "record_of",
    "refuse_adapters",
    "refuse_foreign",
    "refuse_quantized",
    "skeleton",
]
