"""What vLLM generates from a wrapped checkpoint is what qsurgeon's own model computes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qsurgeon
from qsurgeon.layers import quant_layers
from qsurgeon.layers.packed import PackedLayer
from qsurgeon.layers.product import rounded_weight

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` runs these tests in a venv that has it")

TINY = Path(__file__).parents[2] / "examples/models/tiny-math"
PROMPTS = ("Gia has 92 pens. Gia gets 6. Gia sells 75. How many now?", "Tom has 12 cards. Tom buys 30. Tom loses 7.")
MOST = 2e-6  # nats, in float32: what two engines' products of the same numbers differ by
# A scale in E4M3 follows a difference in an input's last bit, where one that is a power of two does not, and a flipped
# code moves the rest of its text: of NVFP4 inputs half of the tokens are compared, the nearest.
EVERY, HALF = 1.0, 0.5

RECIPES = {
    "mxfp4": "rules: [{target: [layers], weight: mxfp4, input: mxfp4}]",
    "nvfp4": "rules: [{target: [layers], weight: nvfp4, input: nvfp4}]",
    "w4a8": "rules: [{target: [layers], weight: mxfp4, input: mxfp8}]",
    "packed": "storage: packed\nrules: [{target: [layers], weight: mxfp4, input: mxfp4}]",
    "packed nvfp4": "storage: packed\nrules: [{target: [layers], weight: nvfp4, input: nvfp4}]",
    # q and k as one, v with another input, up in full precision, the head, and rotated inputs
    "parts": (
        "untie: true\nformats: {rotated: {like: mxfp4, hadamard: 32}}\nrules:\n"
        "  - {target: ['{q,k}_proj'], weight: nvfp4, input: nvfp4}\n"
        "  - {target: [v_proj], weight: mxfp4, input: mxfp8}\n"
        "  - {target: [gate_proj], weight: mxfp4}\n"
        "  - {target: [down_proj], weight: rotated, input: rotated}\n"
        "  - {target: [o_proj], weight: mxfp4, input: mxfp4, phases: rollout}\n"
        "  - {target: [lm_head], weight: mxfp8, input: mxfp8}"
    ),
    "training": "rules: [{target: [layers], weight: mxfp4, input: mxfp4, phases: training}]",
}

Start = Callable[..., Any]


def written(folder: Path, recipe: str) -> Path:
    """Write a wrapped tiny-math and return its folder."""
    (folder / "it.yaml").write_text(f"version: 1\n{recipe}\n", "utf-8")
    qsurgeon.rewrite(folder / "it.yaml", TINY, folder / "wrapped")
    return folder / "wrapped"


def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [tokenizer(one)["input_ids"] for one in PROMPTS]


def rollouts(engine: Any, **arguments: Any) -> list[tuple[list[int], list[float]]]:
    """Return the greedy tokens of each prompt, and their log-probabilities."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": one} for one in prompts()]
    found = engine.generate(
        asked, SamplingParams(temperature=0, max_tokens=16, logprobs=1), use_tqdm=False, **arguments
    )
    first = [one.outputs[0] for one in found]
    return [
        (list(one.token_ids), [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)])
        for one in first
    ]


def difference(model: Any, found: Sequence[tuple[list[int], list[float]]], share: float = EVERY) -> float:
    """Return the largest difference to the model's log-probabilities of the same tokens, in the nearest ``share``."""
    every: list[float] = []
    with torch.no_grad(), qsurgeon.phase("rollout"):
        for prompt, (tokens, said) in zip(prompts(), found, strict=True):
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            own = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            every += (own - torch.tensor(said)).abs().tolist()
    return sorted(every)[int(share * len(every)) - 1]


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rounded(model: Any) -> dict[str, Tensor]:
    """Return the rounded weight of each wrapped layer of the model, by its name."""
    return {
        name: layer.opened(torch.float32) if isinstance(layer, PackedLayer) else rounded_weight(layer.weight, how)
        for name, layer in quant_layers(model).items()
        for how in layer.quantizations.values()
    }


def held(engine: Any) -> dict[str, Tensor]:
    """Return the parameters that the engine computes with, by their names in it."""
    return dict(
        engine.apply_model(lambda inner: {key: one.detach().clone() for key, one in inner.named_parameters()})[0]
    )


def same_weights(engine: Any, model: Any) -> bool:
    """Return whether the engine holds the rounded weights of the model, to the bit."""
    ours, theirs = rounded(model), held(engine)
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, weight in theirs.items():
        head, _, last = name.removesuffix(".weight").rpartition(".")
        parts = [f"{head}.{one}" for one in fused.get(last, (last,))]
        is_wrapped = name.endswith(".weight") and all(one in ours for one in parts)
        if is_wrapped and not torch.equal(weight, torch.cat([ours.pop(one) for one in parts])):
            return False
    return not ours


@pytest.mark.parametrize("name", RECIPES)
def test_log_probabilities_of_what_is_generated_are_the_models(name: str, tmp_path: Path, start: Start) -> None:
    folder = written(tmp_path, RECIPES[name])
    engine = start(folder)
    found, share = rollouts(engine), HALF if name in ("nvfp4", "packed nvfp4") else EVERY
    assert difference(opened(folder), found, share) <= MOST
    plain = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    assert (difference(plain, found) > 100 * MOST) == (name != "training")
    if name not in ("parts", "training"):
        assert same_weights(engine, opened(folder))


def test_an_update_is_rounded_as_it_comes(tmp_path: Path, start: Start) -> None:
    folder = written(tmp_path, "rules: [{target: [layers], weight: mxfp4}]")  # no code of an input flips
    engine, model = start(folder), opened(folder)
    before = rollouts(engine)
    assert same_weights(engine, model)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if (
                "embed_tokens" not in name and "lm_head" not in name
            ):  # on a CPU vLLM keeps a copy of the head, which no update reaches
                one.add_(torch.randn_like(one) * 0.05 * one.std())
    assert not same_weights(engine, model)
    new = [(name, one.detach().clone()) for name, one in model.named_parameters()]
    engine.apply_model(lambda inner: inner.load_weights(new) and None)
    engine.reset_prefix_cache()
    assert same_weights(engine, model)
    after = rollouts(engine)
    assert after != before
    assert difference(model, after) <= 10 * MOST  # it was moved at random, and is less sure of its tokens


def test_an_adapter_beside_the_base_sees_the_unrounded_input(tmp_path: Path, start: Start) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from vllm.lora.request import LoRARequest

    folder = written(tmp_path, RECIPES["mxfp4"])
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], init_lora_weights=False)
    for name in ("one", "two"):
        get_peft_model(opened(folder), config).save_pretrained(str(tmp_path / name))
    engine = start(folder, enable_lora=True, max_lora_rank=8, max_loras=2)
    for place, name in enumerate(("one", "two"), 1):
        found = rollouts(engine, lora_request=LoRARequest(name, place, str(tmp_path / name)))
        model = PeftModel.from_pretrained(opened(folder), tmp_path / name).eval()
        assert difference(model, found) <= MOST


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("rules: [{target: [layers], weight: mxfp4, adapters: merged}]", {"enable_lora": True}, "adapters: merged"),
        (
            "noise: {schedule: linear, sigma_start: 0.1, sigma_end: 0.01}\nrules: [{target: [layers], weight: mxfp4}]",
            {},
            "adds noise",
        ),
    ],
)
def test_what_would_be_another_policy_is_refused(
    recipe: str, arguments: dict[str, Any], message: str, tmp_path: Path, start: Start
) -> None:
    folder = written(tmp_path, recipe)
    with pytest.raises(Exception, match=message):  # vLLM's own class around ours, in some of its versions
        start(folder, **arguments)
