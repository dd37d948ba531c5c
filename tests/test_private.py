"""What is private of transformers, peft and huggingface_hub stands in one place each, and is there."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft.tuners.tuners_utils import BaseTuner
from transformers import modeling_utils
from versions import at_least

import qsurgeon
from qsurgeon import hub_private, peft_private
from qsurgeon.errors import SurgeryError
from qsurgeon.hf import hooks
from qsurgeon.transformers_private import attributes, loading, quantizers

PACKAGE = Path(qsurgeon.__file__).parent
PLACES = {
    "hub_private.py", "peft_private.py", "installed.py",
    "transformers_private/attributes.py", "transformers_private/experts.py", "transformers_private/loading.py",
    "transformers_private/quantizers.py",
}  # fmt: skip
LIBRARIES = ("accelerate", "huggingface_hub", "peft", "transformers")
# Modules whose names are private though they begin with no underscore: who changes them tells nobody.
INNER = (
    "transformers.conversion_mapping", "transformers.core_model_loading", "transformers.distributed",
    "transformers.dynamic_module_utils", "transformers.models", "transformers.quantizers", "transformers.utils",
    "peft.tuners.tuners_utils", "peft.utils", "huggingface_hub.repocard", "huggingface_hub.file_download", "httpx",
)  # fmt: skip


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        path = str(file.relative_to(PACKAGE))
        if path not in PLACES:
            yield path, ast.parse(file.read_text("utf-8"))


def test_nobody_else_imports_a_private_name() -> None:
    found = [
        f"{path}:{node.lineno}: {node.module}.{alias.name}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in (*LIBRARIES, "httpx", "httpx2")
        for alias in node.names
        if alias.name.startswith("_") or (node.module or "").startswith(INNER)
    ]
    assert found == []


def test_nobody_else_names_a_private_attribute() -> None:
    names = {value for value in vars(attributes).values() if isinstance(value, str) and value.startswith("_")}
    for module in (loading, peft_private):
        names |= {value for name, value in vars(module).items() if name.isupper() and isinstance(value, str)}
    inside = {
        node.attr
        for place in PLACES
        for node in ast.walk(ast.parse((PACKAGE / place).read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    names |= inside
    assert {"_is_hf_initialized", "_create_and_replace", "_keys_to_ignore_on_load_missing"} <= names
    # Functions of a library may be patched by their own name, and called nowhere; methods of ours have some of them.
    ours = {"convert_and_load_state_dict_in_model", "get_model_conversion_mapping", "revert_weight_conversion"}
    used = [
        f"{path}:{node.lineno}: {name}"
        for path, tree in trees()
        for node in ast.walk(tree)
        for name in [node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)]
        if isinstance(node, ast.Attribute | ast.Constant) and isinstance(name, str) and name in names - ours
    ]
    assert used == []


def test_nobody_else_asks_for_a_version_to_decide_by() -> None:
    found = {path for path, tree in trees() for node in ast.walk(tree) if getattr(node, "id", "") == "Version"}
    assert found == set()


@pytest.mark.parametrize("name", ["UPLOAD", "MAKE"])
def test_what_is_replaced_of_a_model_is_there(name: str) -> None:
    assert callable(getattr(transformers.PreTrainedModel, getattr(loading, name)))


@pytest.mark.parametrize("name", ["GET_QUANTIZER", "REVERT", "CONVERSIONS", "LOAD_TENSORS"])
def test_what_is_replaced_of_its_module_is_there(name: str) -> None:
    assert callable(vars(modeling_utils)[getattr(loading, name)])


@pytest.mark.parametrize("name", ["CREATE", "CHECK_MERGE"])
def test_what_is_replaced_of_peft_is_there(name: str) -> None:
    assert callable(getattr(BaseTuner, getattr(peft_private, name)))


def test_what_a_version_can_is_found_as_its_number_says() -> None:
    assert bool(loading.SPLITTING) == at_least("transformers", loading.SEES_PARTS)
    assert at_least("transformers", "5.21") == quantizers.ASKS_OF_EACH_TENSOR
    assert at_least("huggingface_hub", "1.26") == hub_private.RESOLVES


# --- what an old version cannot, whichever is installed

SAYS = (
    "its layers could not tell that they round a part: that needs transformers 5.16 or later, this is "
    f"{transformers.__version__}"
)


@pytest.mark.parametrize(("name", "value"), [("tp_plan", "auto"), ("tp_size", 2), ("distributed_config", object())])
def test_where_layers_cannot_see_parts_a_wrapped_model_is_not_split(
    name: str, value: Any, tiny_qwen2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2).save_pretrained(tmp_path)
    monkeypatch.setattr(hooks, "SPLITTING", ())
    with pytest.raises(SurgeryError) as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **{name: value})
    assert str(caught.value) == (
        f"{tmp_path}: {name} would split the weights of a wrapped model over processes, and {SAYS}"
    )


def test_and_one_that_is_split_is_not_wrapped(tiny_qwen2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SPLITTING", ())
    vars(tiny_qwen2)["_tp_size"] = 1
    qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    vars(tiny_qwen2)["_tp_size"] = 2
    with pytest.raises(SurgeryError) as caught:
        qsurgeon.apply("w4a4-mxfp4", tiny_qwen2)
    assert str(caught.value) == f"transformers split the model over processes, and {SAYS}"
