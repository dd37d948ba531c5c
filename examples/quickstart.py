"""The main job on the bundled model: plan, apply, inspect, reload, and the accuracy before and after.

    python examples/quickstart.py

Each step names the command, or the line of Python, that does the same.
"""

import shutil
from pathlib import Path

import transformers
from tiny_math import accuracy, make_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

import qsurgeon
from qsurgeon.report.inspection import report_of

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "models" / "tiny-math"
OUTPUT = ROOT / "out" / "tiny-math-w4a4"
RECIPE = "w4a4-mxfp4"
PROBLEMS = 256


def heading(command: str) -> None:
    print(f"\n\033[1m$ {command}\033[0m", flush=True)


def main() -> None:
    transformers.logging.disable_progress_bar()
    source, output = SOURCE.relative_to(ROOT), OUTPUT.relative_to(ROOT)
    shutil.rmtree(OUTPUT, ignore_errors=True)  # of an earlier demo

    heading(f"qsurgeon plan {RECIPE} --model {source}")
    print(report_of(qsurgeon.plan(RECIPE, SOURCE)))

    heading(f"qsurgeon apply {RECIPE} --model {source} --output {output}")
    print(f"{output}: {report_of(qsurgeon.rewrite(RECIPE, SOURCE, OUTPUT)).summary}")

    heading(f"qsurgeon inspect {output}")
    print(qsurgeon.inspect(OUTPUT))

    heading(f"python -c \"import qsurgeon; print(qsurgeon.load('{output}').model.layers[0].mlp)\"")
    reloaded = qsurgeon.load(OUTPUT)
    print(reloaded.model.layers[0].mlp)

    heading(f"greedy accuracy on {PROBLEMS} held-out problems")
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    problems = make_problems(PROBLEMS, "heldout")
    print(f"for example: {problems[0].prompt.strip()}  ->  {problems[0].completion}\n")
    for name, model in (("before", AutoModelForCausalLM.from_pretrained(SOURCE)), ("after", reloaded)):
        score = accuracy(model, tokenizer, problems)
        print(f"{name:6s} {score:6.1%}   evaluated with: {qsurgeon.inspect(model).summary}", flush=True)


if __name__ == "__main__":
    main()
