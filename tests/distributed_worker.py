"""What each process of tests/test_distributed.py runs: train one step in several ways, and write down what came out.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed_worker.py BASE

Each folder in BASE holds in model/ a wrapped model, in tokens.pt the rows of the whole batch, of which each process
takes its share, and gets output/.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import qsurgeon
from qsurgeon.layers import PackedLinear, QuantLinear

LEARNING_RATE = 0.1

Check = Callable[[Path, Path, torch.Tensor], None]


def adapted(model: Any) -> Any:
    """Put a LoRA adapter on a model; always the same, and not the zero that peft begins with."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    return wrapped


def sharded(model: Any, **options: Any) -> Any:
    """Shard a model as its users do: each layer, then what is left."""
    for layer in model.get_submodule("base_model.model.model" if hasattr(model, "peft_config") else "model").layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def step(model: Any, tokens: torch.Tensor) -> None:
    """Take one step of gradient descent, and leave the gradients where they are."""
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE).step()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return the whole gradients by their parameters' names; a process that holds shards gathers them."""
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def whole(model: Any) -> dict[str, torch.Tensor]:
    """Return the full state dict on the first process, and an empty one on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def ddp(folder: Path, output: Path, tokens: torch.Tensor) -> None:
    model = DistributedDataParallel(qsurgeon.load(folder))
    step(model, tokens)
    torch.save(gradients(model.module), output / f"ddp-{dist.get_rank()}.pt")


def save_whole_and_sharded(model: Any, folder: Path, output: Path) -> None:
    """Save a whole and a sharded state dict; load the second into a model whose own values are gone, and save that."""
    state = whole(model)
    if dist.get_rank() == 0:
        model.save_pretrained(output / "full", state_dict=state)

    checkpoint.save(get_model_state_dict(model), checkpoint_id=output / "sharded")
    fresh = sharded(qsurgeon.load(folder))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.to_local().zero_()
    shards = get_model_state_dict(fresh)
    checkpoint.load(shards, checkpoint_id=output / "sharded")
    set_model_state_dict(fresh, shards)
    state = whole(fresh)
    if dist.get_rank() == 0:
        torch.save(state, output / "fresh.pt")


def fsdp2(folder: Path, output: Path, tokens: torch.Tensor) -> None:
    model = sharded(qsurgeon.load(folder))
    assert all(isinstance(one, DTensor) for one in model.parameters())
    step(model, tokens)
    torch.save(gradients(model), output / f"fsdp2-{dist.get_rank()}.pt")

    save_whole_and_sharded(model, folder, output)


def lora(folder: Path, output: Path, tokens: torch.Tensor) -> None:
    model = sharded(adapted(qsurgeon.load(folder)))
    step(model, tokens)
    torch.save(gradients(model), output / f"lora-{dist.get_rank()}.pt")
    state = whole(model)
    if dist.get_rank() == 0:
        torch.save(state, output / "lora-state.pt")
        model.save_pretrained(output / "adapter", state_dict=state)


def lora_ddp(folder: Path, output: Path, tokens: torch.Tensor) -> None:
    model = DistributedDataParallel(adapted(qsurgeon.load(folder)))
    step(model, tokens)
    torch.save(gradients(model.module), output / f"lora-ddp-{dist.get_rank()}.pt")


def packed(folder: Path, output: Path, tokens: torch.Tensor) -> None:
    """Shard codes and scales: what they compute, and their state dicts, which nothing here changes."""
    model = sharded(qsurgeon.load(folder))
    assert all(isinstance(one, DTensor) for one in model.parameters())
    with torch.no_grad():
        torch.save(model(input_ids=tokens).logits, output / f"logits-{dist.get_rank()}.pt")

    save_whole_and_sharded(model, folder, output)


def bfloat16(folder: Path, output: Path, tokens: torch.Tensor) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(qsurgeon.load(folder), mp_policy=policy)
    seen = set()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(
                lambda layer, inputs: seen.add((layer.weight.element_size(), inputs[0].dtype))
            )
    found = model(input_ids=tokens, labels=tokens)
    found.loss.backward()
    result = {"seen": seen, "logits": found.logits.detach(), "gradients": gradients(model)}
    torch.save(result, output / f"bfloat16-{dist.get_rank()}.pt")


def watched(folder: Path, output: Path, tokens: torch.Tensor) -> None:
    """Watch a step under DDP, of sharded layers, and of QuantLinears each of which is sharded by itself."""
    numbers = {}
    for how in ("ddp", "fsdp2", "each"):
        model = qsurgeon.load(folder)
        if any(isinstance(one, PackedLinear) for one in model.modules()):
            model = adapted(model)
        if how == "each":
            for module in model.modules():
                if isinstance(module, QuantLinear):
                    fully_shard(module)
        model = DistributedDataParallel(model) if how == "ddp" else sharded(model)
        with qsurgeon.Watch(model, every=1) as watch:
            step(model, tokens)
            numbers[how] = watch.step()
    torch.save(numbers, output / f"watched-{dist.get_rank()}.pt")


def main(base: Path) -> None:
    dist.init_process_group("gloo")
    masters: tuple[Check, ...] = (ddp, fsdp2, lora, bfloat16, watched)
    packs: tuple[Check, ...] = (packed, lora, lora_ddp, bfloat16, watched)
    for folder in sorted(base.iterdir()):
        tokens = torch.load(folder / "tokens.pt").chunk(dist.get_world_size())[dist.get_rank()]
        for check in packs if folder.name.startswith("packed") else masters:
            check(folder / "model", folder / "output", tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is saved. In one run of several, a thread that torch still had made the interpreter's own end abort.
    sys.stderr.flush()
    os._exit(0)
