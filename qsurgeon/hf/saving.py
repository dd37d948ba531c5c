"""Saving and pushing with transformers: the record describes the model at that moment, and the card is written.

The config object that a model has may be shared by others, and what it said when a recipe was applied may no longer be
true. So the record is made from the model's modules each time, and is in the config only while that is being written.
transformers writes a card of its own into what it pushes, after ``save_pretrained``, and none into what it saves.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from qsurgeon.checkpoint.card import front_matter, with_record
from qsurgeon.checkpoint.card.front_matter import CARD
from qsurgeon.layers.compiling import uncompiled
from qsurgeon.patching import Method
from qsurgeon.surgery import (
    QUANT_METHOD,
    Record,
    configs_in,
    current_record,
    headline_of,
    inventory,
    is_ours,
    record_in,
)
from qsurgeon.transformers_private.attributes import ADAPTED
from qsurgeon.transformers_private.loading import saves_here


def saving(save: Method) -> Method:
    """Return a ``save_pretrained`` that writes the record of what is in the model, and a card where none is."""

    def save_what_is_there(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        if _saves_adapter_alone(self):
            return save(self, save_directory, is_main_process, *args, **kwargs)
        record = current_record(self)
        _tell_what_is_lost(self, record)
        with _recorded(self.config, record), nullcontext() if record is None else uncompiled(self):
            done = save(self, save_directory, is_main_process, *args, **kwargs)
        card = Path(save_directory) / CARD
        is_writer = saves_here(self, is_main_process)
        if record is not None and is_writer and card.parent.is_dir() and not card.exists():
            card.write_text(with_record("", record, headline_of(self)), "utf-8")
        return done

    return save_what_is_there


def uploading(upload: Method) -> Method:
    """Return an ``_upload_modified_files`` that puts our section into the card of the repository.

    Where the repository has no card, ours alone is pushed.
    """

    def upload_with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        record = None if _saves_adapter_alone(self) else current_record(self)
        card = Path(working_dir) / CARD
        if record is not None:
            # Where the repository has no card, all that transformers wrote are headings to be filled in.
            there = HfApi().file_exists(repo_id, CARD, token=kwargs.get("token"))
            text = card.read_text("utf-8")
            card.write_text(with_record(text if there else front_matter(text), record, headline_of(self)), "utf-8")
        return upload(self, working_dir, repo_id, *args, **kwargs)

    return upload_with_card


def _saves_adapter_alone(model: Any) -> bool:
    return bool(getattr(model, ADAPTED, False))


@contextmanager
def _recorded(config: Any, record: Record | None) -> Iterator[None]:
    """Let ``config`` say inside the block what ``record`` says, and the configs of its parts nothing."""
    before = [
        (part, part.quantization_config)
        for part in configs_in(config)
        if is_ours(getattr(part, "quantization_config", None))
    ]
    for part, _ in before:
        del part.quantization_config
    try:
        if record is not None:
            config.quantization_config = {"quant_method": QUANT_METHOD, **record.to_dict()}
        yield
    finally:
        if record is not None:
            del config.quantization_config
        for part, section in before:
            part.quantization_config = section


def _tell_what_is_lost(model: Any, record: Record | None) -> None:
    """Warn of modules that were wrapped when the config was last told, and that are in the model and are not now."""
    before = record_in(model.config)
    if before is None or record is None:  # a model of its own that only shares the config, or one with nothing left
        return
    left = before.quantizations().keys() - record.quantizations().keys()
    lost = [module for module in inventory(model) if module.name in left]
    if lost:
        warnings.warn(
            f"{lost[0].name} was wrapped and is a {lost[0].kind} now ({len(lost)} modules in all): it is saved as it "
            "is, in full precision",
            UserWarning,
            stacklevel=4,
        )
