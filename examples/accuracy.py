"""The accuracy of the bundled model under every shipped recipe that fits it, without any training.

python examples/accuracy.py
"""

from pathlib import Path

from tiny_math import accuracy, make_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

import qsurgeon
from qsurgeon.recipe import shipped_recipes

SOURCE = Path(__file__).parent / "models" / "tiny-math"
PROBLEMS = 512


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    problems = make_problems(PROBLEMS, "heldout")
    plain = AutoModelForCausalLM.from_pretrained(SOURCE)
    print(f"| full precision | - | - | {accuracy(plain, tokenizer, problems):.1%} |", flush=True)
    for recipe in shipped_recipes():
        if recipe.startswith("e13/"):
            continue  # they name layer 27 of a model with 28
        model = qsurgeon.apply(recipe, AutoModelForCausalLM.from_pretrained(SOURCE))
        kinds = {(row.weight, row.input) for row in qsurgeon.inspect(model).rows if row.gradient != "-"}
        ((weight, input_),) = kinds
        print(f"| {recipe} | {weight} | {input_} | {accuracy(model, tokenizer, problems):.1%} |", flush=True)


if __name__ == "__main__":
    main()
