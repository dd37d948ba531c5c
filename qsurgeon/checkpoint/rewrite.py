"""From a folder to a folder: the only place that changes stored tensors.

With ``storage: master`` no weight changes: config.json gets the record and the weights are copied. They are not
hard links, because safetensors writes files in place: saving a trained model over a link would change the source.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from qsurgeon.checkpoint.card import with_section
from qsurgeon.checkpoint.files import INDEX, SINGLE, copy_companions, write_json
from qsurgeon.checkpoint.headers import Tensor
from qsurgeon.checkpoint.index import read_headers, weight_files
from qsurgeon.checkpoint.staging import refuse_inside, staged
from qsurgeon.errors import CheckpointError
from qsurgeon.reading import read_json
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.surgery import (
    QUANT_METHOD,
    Plan,
    build_plan,
    inventory,
    read_config,
    record_of,
    refuse_quantized,
    skeleton,
)
from qsurgeon.version import __version__

CHUNK = 16 * 2**20
WAS_SINGLE = "model-tied.safetensors"
UNTIED = "model-untied.safetensors"

Advance = Callable[[int], None]  # called with the bytes done since the last call


def rewrite(
    recipe: Recipe | str | Path, source: str | Path, destination: str | Path, advance: Advance | None = None
) -> Plan:
    """Write ``destination``, a folder that ``from_pretrained`` opens as ``source`` with ``recipe`` applied.

    Beside the weights lie recipe.yaml, qsurgeon-plan.json (every module's fate, and the versions) and a model
    card. ``advance`` hears of every chunk of weights that was copied.

    Raises: RecipeError, PlanError, CheckpointError; ``destination`` does not exist then, and ``source`` is as it was.
    """
    source, destination = Path(source), Path(os.path.normpath(destination))
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if not source.is_dir():
        raise CheckpointError(f"{source}: {'is a file; expected a folder' if source.exists() else 'no such folder'}")
    refuse_inside(destination, source)
    config = read_json(source / "config.json")
    refuse_quantized(config, str(source))
    plan = build_plan(recipe, inventory(skeleton(read_config(source))))
    tensors = read_headers(source)
    _check_shapes(plan, tensors, source)
    with staged(destination) as folder:
        copy_companions(source, folder)
        for file in weight_files(source):
            _copy(file, folder / file.name, advance)
        if (source / INDEX).is_file():
            shutil.copyfile(source / INDEX, folder / INDEX)
        if recipe.untie:
            _untie(plan, tensors, config, folder)
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            **record_of(plan, __version__).model_dump(mode="json"),
        }
        write_json(folder / "config.json", config)
        write_json(folder / "qsurgeon-plan.json", _plan_json(plan, source))
        (folder / "recipe.yaml").write_text(recipe.text, "utf-8")
        card = folder / "README.md"
        before = card.read_text("utf-8") if card.is_file() else ""
        card.write_text(with_section(before, plan, __version__), "utf-8")
    return plan


def _check_shapes(plan: Plan, tensors: dict[str, Tensor], source: Path) -> None:
    """Refuse a checkpoint whose tensors are not of the shapes that its config.json says."""
    for step in plan.wrapped:
        tensor = tensors.get(f"{step.module.name}.weight")
        if tensor is not None and tensor.shape != step.module.shape:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json says {list(step.module.shape)}"
            )


def _copy(source: Path, destination: Path, advance: Advance | None) -> None:
    buffer = memoryview(bytearray(CHUNK))
    with source.open("rb") as read, destination.open("wb") as write:
        while count := read.readinto(buffer):
            write.write(buffer[:count])
            if advance is not None:
                advance(count)


def _untie(plan: Plan, tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
    """Give each wrapped module whose weight is tied a tensor of its own, and config.json no reason to tie it."""
    copies: dict[str, torch.Tensor] = {}
    for step in plan.wrapped:
        name = f"{step.module.name}.weight"
        if step.module.tied_to is not None and name not in tensors:
            owner = tensors.get(f"{step.module.tied_to}.weight")
            if owner is None:
                raise CheckpointError(
                    f"no file has a tensor {step.module.tied_to}.weight to untie {name} from: its tensors go by other "
                    "names than its modules. Load the model, apply the recipe to it, and save it"
                )
            with safe_open(owner.file, framework="pt") as opened:
                copies[name] = opened.get_tensor(owner.name)
    if not copies:
        return
    save_file(copies, folder / UNTIED, metadata={"format": "pt"})
    if (folder / SINGLE).is_file():  # a loader that finds this name looks no further
        (folder / SINGLE).rename(folder / WAS_SINGLE)
    names = {SINGLE: WAS_SINGLE}
    weight_map = {name: names.get(tensor.file.name, tensor.file.name) for name, tensor in tensors.items()}
    weight_map |= dict.fromkeys(copies, UNTIED)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False


def _plan_json(plan: Plan, source: Path) -> dict[str, Any]:
    versions = {"qsurgeon": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    steps = [{"module": step.module.name, "why": step.why} for step in plan.steps if step.why]
    return {"source": source.name, "versions": versions, "modules": steps}
