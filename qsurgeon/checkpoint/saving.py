"""What transformers saves and pushes carries our model card.

transformers writes a card of its own into what it pushes, after ``save_pretrained``, and none into what it saves.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi

from qsurgeon.checkpoint.card import front_matter, with_record
from qsurgeon.checkpoint.front_matter import CARD
from qsurgeon.patching import Method, patch
from qsurgeon.surgery import Record


def carry_cards(record_in: Callable[[Any], Record | None]) -> None:
    """Let a model whose config has a record be saved and pushed with its card; a second call does nothing.

    ``save_pretrained`` writes the card where none is. Into what is pushed comes the card of the repository, with our
    section in it, or ours alone where the repository has none.
    """

    def record_of(model: Any) -> Record | None:
        adapter_alone = getattr(model, "_hf_peft_config_loaded", False)
        return None if adapter_alone else record_in(model.config)

    def saving(save: Method) -> Method:
        def with_card(self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
            done = save(self, save_directory, is_main_process, *args, **kwargs)
            record, card = record_of(self), Path(save_directory) / CARD
            if record is None or not self.should_save_on_this_rank(is_main_process):
                return done
            if card.parent.is_dir() and not card.exists():
                card.write_text(with_record("", record), "utf-8")
            return done

        return with_card

    def uploading(upload: Method) -> Method:
        def with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
            record, card = record_of(self), Path(working_dir) / CARD
            if record is not None:
                # Where the repository has no card, all that transformers wrote are headings to be filled in.
                there = HfApi().file_exists(repo_id, CARD, token=kwargs.get("token"))
                text = card.read_text("utf-8")
                card.write_text(with_record(text if there else front_matter(text), record), "utf-8")
            return upload(self, working_dir, repo_id, *args, **kwargs)

        return with_card

    patch(transformers.PreTrainedModel, "save_pretrained", saving)
    patch(transformers.PreTrainedModel, "_upload_modified_files", uploading)
