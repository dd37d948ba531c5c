"""TRL's SFTTrainer, which has a fused head of its own from 1.2 to 1.14. Importing this module makes that refuse."""

from trl.trainer import sft_trainer

from qsurgeon.hf.heads.trl import refusing
from qsurgeon.patching import patch

_FUSING = "_patch_chunked_ce_lm_head"

if hasattr(sft_trainer, _FUSING):
    patch(sft_trainer, _FUSING, refusing)
