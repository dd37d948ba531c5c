"""From a recipe to a changed model: list its modules, decide what happens to each, and replace them."""

from qsurgeon.surgery.adapters import bypassed, merges, method_of, misread, objection, refuse_adapters
from qsurgeon.surgery.current import Origin, current_record, exclusions, inherit, mark
from qsurgeon.surgery.headline import Part, headline, headline_of, in_words, percent
from qsurgeon.surgery.interrupts import uninterrupted
from qsurgeon.surgery.inventory import Module, Tower, inventory, plain_model, quantizations
from qsurgeon.surgery.noise import plan_for
from qsurgeon.surgery.noisy import install, noise_in
from qsurgeon.surgery.operate import operate
from qsurgeon.surgery.plan import Excluded, Plan, Step, build_plan
from qsurgeon.surgery.quantized import configs_in, foreign_method, is_ours, refuse_foreign, refuse_quantized
from qsurgeon.surgery.reads import modules_of
from qsurgeon.surgery.record import QUANT_METHOD, Record, read_record, record_in, record_of
from qsurgeon.surgery.repack import repacked, unwrapped
from qsurgeon.surgery.skeleton import architecture, read_config, skeleton

__all__ = [
    "QUANT_METHOD",
    "Excluded",
    "Module",
    "Origin",
    "Part",
    "Plan",
    "Record",
    "Step",
    "Tower",
    "architecture",
    "build_plan",
    "bypassed",
    "configs_in",
    "current_record",
    "exclusions",
    "foreign_method",
    "headline",
    "headline_of",
    "in_words",
    "inherit",
    "install",
    "inventory",
    "is_ours",
    "mark",
    "merges",
    "method_of",
    "misread",
    "modules_of",
    "noise_in",
    "objection",
    "operate",
    "percent",
    "plain_model",
    "plan_for",
    "quantizations",
    "read_config",
    "read_record",
    "record_in",
    "record_of",
    "refuse_adapters",
    "refuse_foreign",
    "refuse_quantized",
    "repacked",
    "skeleton",
    "uninterrupted",
    "unwrapped",
]
