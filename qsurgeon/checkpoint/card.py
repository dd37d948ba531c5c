"""The model card that lies beside the weights: which modules are in which format, from which recipe."""

from collections import Counter

from qsurgeon.layers import Quantization
from qsurgeon.surgery import Plan

_START, _END = "<!-- qsurgeon -->", "<!-- /qsurgeon -->"


def with_section(card: str, plan: Plan, version: str) -> str:
    """Return ``card`` (Markdown, may be empty) with the section that says what was done, once."""
    before, start, rest = card.partition(_START)
    after = rest.partition(_END)[2] if start else ""
    head = before.rstrip() + "\n\n" if before.strip() else "# A model in other number formats\n\n"
    return head + _section(plan, version) + after.rstrip() + "\n"


def _section(plan: Plan, version: str) -> str:
    counts: Counter[Quantization] = Counter(step.fate for step in plan.steps if isinstance(step.fate, Quantization))
    rows = [
        f"| {how.rule} | {n} | {how.weight_name} | {how.input_name} | {how.gradient} |" for how, n in counts.items()
    ]
    return "\n".join(
        [
            _START,
            "## Number formats",
            "",
            f"Rewritten by qsurgeon {version}: {plan.summary}.",
            "",
            "| rule | modules | weight | input | gradient |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Load it with `qsurgeon.load(folder)`, or `import qsurgeon` before `from_pretrained`: without it",
            "transformers warns and computes in full precision. The recipe:",
            "",
            "```yaml",
            plan.recipe.text.rstrip(),
            "```",
            _END,
        ]
    )
