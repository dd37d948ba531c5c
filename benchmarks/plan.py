"""What a plan of a large model takes, after imports: from its config.json to every module's fate, without a weight.

python benchmarks/plan.py

Each model is planned in a process of its own, on a config of its published shape, and its first plan is what counts.
The ratio is to importing what is needed for it. Then, what a command line takes as a whole, in seconds of CPU, beside
importing torch and transformers, and beside importing the class of one model, which a plan cannot do without.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "vocab_size": 129280,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
MODELS = {"Llama 70B": LLAMA_70B, "DeepSeek-V3": DEEPSEEK_V3}
ONE = """\
import importlib, json, sys, time
start = time.perf_counter()
import qsurgeon
from qsurgeon.hf.models import plan
from qsurgeon.report.inspection import report_of
kind = json.load(open(sys.argv[1] + "/config.json"))["model_type"]
importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
imported = time.perf_counter()
made = plan("w4a4-mxfp4", sys.argv[1])
text = str(report_of(made))
print(json.dumps({"imports": imported - start, "plan": time.perf_counter() - imported, "summary": made.summary}))
"""


TINY_MATH = str(Path(__file__).parents[1] / "examples/models/tiny-math")
PROGRAM = ["-m", "qsurgeon", "plan"]
STARTS = {
    "import torch, transformers": ["-c", "import torch, transformers"],
    "import a model's class": ["-c", "import transformers.models.qwen2.modeling_qwen2"],
    "plan": [*PROGRAM, "w4a4-mxfp4", "--model", TINY_MATH],
    "plan, a mistyped recipe": [*PROGRAM, "w4a4-mxpf4", "--model", TINY_MATH],
    "plan, a missing folder": [*PROGRAM, "w4a4-mxfp4", "--model", "./nowhere"],
    "plan, no model": [*PROGRAM, "w4a4-mxfp4"],
}
ROUNDS = 5


def cpu(words: list[str]) -> float:
    """Return the seconds of CPU that Python takes for ``words``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=False, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def starts() -> None:
    took = {name: min(cpu(words) for _ in range(ROUNDS)) for name, words in STARTS.items()}
    base = next(iter(took.values()))
    for name, seconds in took.items():
        print(f"{name:27} {seconds:5.2f} s of CPU, {seconds / base:.2f} x")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            (Path(folder) / "config.json").write_text(json.dumps(config))
            said = subprocess.run(
                [sys.executable, "-c", ONE, folder], check=True, capture_output=True, text=True
            ).stdout
            took = json.loads(said.splitlines()[-1])
            ratio = took["plan"] / took["imports"]
            print(f"{name:12} {took['plan']:5.2f} s, {ratio:.2f} x the imports; {took['summary']}")

    starts()


if __name__ == "__main__":
    main()
