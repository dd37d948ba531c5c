"""TRL's AsyncDistillationTrainer, whose loss reads the head's weight. Importing this module makes it refuse."""

from trl.experimental.async_distillation.async_distillation_trainer import AsyncDistillationTrainer

from qsurgeon.hf.heads import refusing_trainer
from qsurgeon.patching import patch

patch(AsyncDistillationTrainer, "__init__", refusing_trainer)
