"""TRL's DistillationTrainer, whose loss reads both heads' weights. Importing this module makes it refuse."""

from trl.trainer.distillation_trainer import DistillationTrainer

from qsurgeon.hf.heads import refusing_trainer
from qsurgeon.patching import patch

patch(DistillationTrainer, "__init__", refusing_trainer)
