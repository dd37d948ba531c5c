"""The model card that lies beside the weights: which modules are in which format, and from which recipe.

It is made of the record alone, so that whoever loads a model and pushes it on writes the same card. What else stands on
a card is its author's: the text is kept to the letter, and in the front matter only what is said here is replaced.
"""

import re
from collections.abc import Iterable
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from qsurgeon.checkpoint.hub import hub_id
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import Format
from qsurgeon.formats.fields import NONE, shown
from qsurgeon.layers import AS_IT_IS, Quantization
from qsurgeon.recipe.fold import folded
from qsurgeon.surgery import QUANT_METHOD, Record

CARD = "README.md"
SECTION, NOTICE = "qsurgeon", "qsurgeon: notice"  # the marks around what is ours, and is replaced when it is said again
_STORED = {
    "master": "stored in full precision and rounded in every forward pass, so that they can be trained",
    "packed": "stored as the codes and scales of their formats",
}
_WITHOUT = {
    "master": "transformers warns and computes in full precision",
    "packed": "transformers cannot load it",
}


def with_record(card: str, record: Record, summary: str) -> str:
    """Return ``card`` (Markdown with front matter, may be empty) saying once what ``record`` says of the model.

    ``summary``: the headline of the model, see ``surgery.headline``.

    Raises: CheckpointError for a card whose front matter cannot be read.
    """
    data, text = _split(card)
    front = yaml.safe_dump(_merged(data, record), sort_keys=False, allow_unicode=True).strip()
    section = _section(record, summary)
    if not _marked(SECTION).sub("", text).strip():
        body = _block(SECTION, f"# {_title(record)}\n\n{section}") + "\n"
    else:
        body = _placed(_placed(text.strip("\n") + "\n", NOTICE, _notice(record, summary), first=True), SECTION, section)
    return f"---\n{front}\n---\n\n{body}"


# --- front matter


class _Loader(yaml.SafeLoader):
    """YAML as the hub reads it: true and false are the only booleans, and the language ``no`` is Norwegian."""


_Loader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if first in "tTfF" or one[0] != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Return the front matter of a card as data, and the text below it."""
    match = REGEX_YAML_BLOCK.search(card)
    if match is None:
        return {}, card
    try:
        data = yaml.load(match[2], Loader=_Loader)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{CARD}: its front matter is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict | None):
        raise CheckpointError(f"{CARD}: its front matter is {type(data).__name__}; expected keys and values")
    return data or {}, card[match.end() :]


def front_matter(card: str) -> str:
    """Return the front matter of a card without the text below it."""
    match = REGEX_YAML_BLOCK.search(card)
    return match[0] if match else ""


def _merged(data: dict[str, Any], record: Record) -> dict[str, Any]:
    tags = data.get("tags") or []
    ours = [QUANT_METHOD, *_formats(record)]
    merged = {"library_name": "transformers"} | data
    merged["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *ours]))
    pinned = hub_id(record.source)
    if pinned is not None:
        merged |= {"base_model": pinned[0], "base_model_relation": "quantized"}
    return merged


# --- text


def _marked(mark: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- {mark} -->.*?<!-- /{mark} -->", flags=re.DOTALL)


def _block(mark: str, text: str) -> str:
    return f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->"


def _placed(text: str, mark: str, content: str, *, first: bool = False) -> str:
    """Return ``text`` with ``content`` where it stood before, else at the beginning or at the end."""
    block = _block(mark, content)
    if _marked(mark).search(text):
        return _marked(mark).sub(lambda _: block, text, count=1)
    return f"{block}\n\n{text}" if first else f"{text}\n{block}\n"


def _title(record: Record) -> str:
    name = _name(record)
    *most, last = _formats(record)
    formats = f"{', '.join(most)} and {last}" if most else last
    return f"{name.rpartition('/')[2] or 'A model'} in {formats}"


def _name(record: Record) -> str:
    """Return the id of the model on the hub, or its folder's name, or nothing."""
    pinned = hub_id(record.source)
    return pinned[0] if pinned else record.source


def _notice(record: Record, summary: str) -> str:
    what = _name(record) or "This model"
    return (
        f"> **{what}, rewritten by qsurgeon:** {summary}. See [Number formats](#number-formats). Unless it "
        "says otherwise, what is written here, and what was measured, is about the model before that."
    )


def _section(record: Record, summary: str) -> str:
    formats = _formats(record)
    rounded = any(how.weight for how in record.quantizations().values())
    stored = _STORED[record.storage] if rounded else "in full precision"
    return "\n".join(
        [
            "## Number formats",
            "",
            f"Rewritten by qsurgeon {record.qsurgeon_version}{_from(record)}: {summary}. The weights of wrapped "
            f"modules are {stored} (`storage: {record.storage}`). All other modules are in full "
            "precision.",
            "",
            *_table(["modules", "n", "weight", "input", "gradient", "why"], _modules(record)),
            "",
            *_table(["format", "element", "block", "scale", "tensor scale", "bits"], map(_fields, formats.values())),
            "",
            "Bits are per value, block scales counted. Gradient: how it passes the rounding; `ste`, straight through.",
            "",
            "To load it:",
            "",
            "```python",
            "import qsurgeon",
            "",
            'model = qsurgeon.load("folder or hub id of this model")',
            "```",
            "",
            f"After `import qsurgeon` a plain `from_pretrained` does the same; without it {_WITHOUT[record.storage]}.",
            "",
            *_recipe(record.recipe),
        ]
    ).rstrip()


def _from(record: Record) -> str:
    pinned = hub_id(record.source)
    if pinned is None:
        return f" from `{record.source}`" if record.source else ""
    name, commit = pinned
    page = f"https://huggingface.co/{name}"
    return f" from [{name}]({page}/tree/{commit}) at commit `{commit[:12]}`" if commit else f" from [{name}]({page})"


def _formats(record: Record) -> dict[str, Format]:
    """Return the formats that modules compute in, by name, in the order of the record."""
    hows = record.quantizations().values()
    return {format.name: format for how in hows for format in (how.weight, how.input) if format is not None}


def _fields(format: Format) -> list[str]:
    more = [
        text
        for text, said in (
            (f"rounded {format.rounding}", format.rounding != "nearest"),
            (f"rotated, {format.hadamard} values at a time", format.rotation is not None),
            ("four over six", format.four_over_six),
        )
        if said
    ]
    scale = f"{format.scale.name}, {format.scale_rule}" if format.scale else NONE
    return [
        format.name, ", ".join([format.element.name, *more]), shown(format.block), scale, format.tensor_scale,
        f"{format.bits:.4g}",
    ]  # fmt: skip


def _modules(record: Record) -> Iterable[list[str]]:
    """Yield a row of each kind of module that a rule named; those that differ in a number share one."""

    def alike(one: tuple[str, Quantization]) -> tuple[str, ...]:
        how = one[1]
        return how.weight_name, how.input_name, how.gradient, how.rule, how.when

    for name, group in folded(record.quantizations().items(), lambda one: one[0], alike):
        weight, input_, gradient, rule, when = alike(group[0])
        why = f"rule `{rule}`" + (f", {when}" if when else "")
        yield [f"`{name}`", str(len(group)), weight, input_, gradient, why]
    for name, left in folded(record.exclusions().items(), lambda one: one[0], lambda one: one[1]):
        excluded = left[0][1]
        why = f"excluded by `{excluded.pattern}` of rule `{excluded.rule}`"
        yield [f"`{name}`", str(len(left)), AS_IT_IS, AS_IT_IS, AS_IT_IS, why]


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---:" if name in {"n", "bits"} else "---" for name in head]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *cells)]


def _recipe(text: str) -> list[str]:
    """Return the lines that show a recipe in full; none for a record that does not know it."""
    if not text:
        return []
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["The recipe:", "", f"{fence}yaml", text.rstrip(), fence]
