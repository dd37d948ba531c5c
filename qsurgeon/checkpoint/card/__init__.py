"""The model card beside the weights: which modules have which format, and from which recipe.

It is made of the record alone, so that whoever loads a model and pushes it on writes the same card. What else stands on
a card is its author's: the text is kept to the letter, and in the front matter only what is said here is replaced.
"""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from qsurgeon.checkpoint.card.front_matter import CARD, ends, read_front_matter, written
from qsurgeon.checkpoint.card.markdown import code, fenced, inline, table
from qsurgeon.checkpoint.hub import hub_id
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import Format
from qsurgeon.formats.fields import NONE, shown
from qsurgeon.layers import AS_IT_IS, Quantization
from qsurgeon.surgery import QUANT_METHOD, Record
from qsurgeon.surgery.fold import folded
from qsurgeon.words import FIELDS, Behavior

SECTION, NOTICE = "qsurgeon", "qsurgeon: notice"  # the marks around what is ours, and is replaced when it is said again
_TRAINED = "stored in full precision and rounded in every forward pass, so that they can be trained"
_WARNED = "transformers warns and computes in full precision"


def with_record(card: str, record: Record, summary: str) -> str:
    """Return ``card`` (Markdown with front matter, may be empty) saying once what ``record`` says of the model.

    ``summary``: the headline of the model, see ``surgery.headline``.

    Raises: CheckpointError for a card whose front matter cannot be read.
    """
    text = card[ends(card) :]
    front = written(_merged(read_front_matter(card), record))
    section = _section(record, summary)
    if not _without(text, SECTION).strip():
        body = _block(SECTION, f"# {_title(record)}\n\n{section}") + "\n"
    else:
        body = _placed(_placed(text.strip("\n") + "\n", NOTICE, _notice(record, summary), first=True), SECTION, section)
    return f"{front}\n{body}"


def without_record(card: str) -> str:
    """Return ``card`` without what ``with_record`` said below the front matter."""
    text = _without(_without(card[ends(card) :], SECTION), NOTICE).strip("\n")
    return f"{card[: ends(card)]}{text}\n" if text else card[: ends(card)]


def front_matter(card: str) -> str:
    """Return the front matter of a card without the text below it."""
    return card[: ends(card)]


def _merged(data: dict[str, Any], record: Record) -> dict[str, Any]:
    tags = data.get("tags") or []
    if not isinstance(tags, str | list) or not all(isinstance(one, Hashable) for one in tags):
        raise CheckpointError(f"{CARD}: its front matter has tags that are no words; expected a list of them")
    ours = [QUANT_METHOD, *_formats(record)]
    merged = {"library_name": "transformers"} | data
    merged["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *ours]))
    pinned = hub_id(record.source)
    if pinned is not None:
        merged |= {"base_model": pinned[0], "base_model_relation": "quantized"}
    return merged


# --- text


def _block(mark: str, text: str) -> str:
    return f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->"


def _find(text: str, mark: str, after: int = 0) -> tuple[int, int] | None:
    """Return where the first block ``after`` a place begins and ends, if there is a whole one; none lies in another."""
    opens, closes = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    while (end := text.find(closes, after)) >= 0:
        start, after = text.rfind(opens, after, end), end + len(closes)
        if start >= 0:
            return start, after
    return None


def _without(text: str, mark: str) -> str:
    kept, at = [], 0
    while (found := _find(text, mark, at)) is not None:
        kept.append(text[at : found[0]])
        at = found[1]
    return "".join([*kept, text[at:]])


def _placed(text: str, mark: str, content: str, *, first: bool = False) -> str:
    """Return ``text`` with ``content`` where it stood before, else at the beginning or at the end."""
    block, found = _block(mark, content), _find(text, mark)
    if found is not None:
        return text[: found[0]] + block + text[found[1] :]
    return f"{block}\n\n{text}" if first else f"{text}\n{block}\n"


def _title(record: Record) -> str:
    name = _name(record)
    *most, last = map(inline, _formats(record))
    formats = f"{', '.join(most)} and {last}" if most else last
    return f"{inline(name.rpartition('/')[2]) or 'A model'} in {formats}"


def _name(record: Record) -> str:
    """Return the id of the model on the hub, or its folder's name, or nothing."""
    pinned = hub_id(record.source)
    return pinned[0] if pinned else record.source


def _notice(record: Record, summary: str) -> str:
    what = inline(_name(record)) or "This model"
    return (
        f"> **{what}, rewritten by qsurgeon:** {inline(summary)}. See [Number formats](#number-formats). Unless it "
        "says otherwise, what is written here, and what was measured, is about the model before that."
    )


def _section(record: Record, summary: str) -> str:
    formats = _formats(record)
    rounded = any(how.weight for how in record.quantizations().values())
    encoding = record.encoding
    stored = (_TRAINED if encoding is None else encoding.stored) if rounded else "in full precision"
    elsewhere = _WARNED if encoding is None else encoding.elsewhere
    return "\n".join(
        [
            "## Number formats",
            "",
            f"Rewritten by qsurgeon {inline(record.qsurgeon_version)}{_from(record)}: {inline(summary)}. The weights "
            f"of wrapped modules are {stored} (`storage: {record.storage}`). All other modules are in full precision.",
            "",
            *table(["modules", "n", "weight", "input", *Behavior().columns, "why"], _modules(record)),
            "",
            *table(["format", "element", "block", "scale", "tensor scale", "bits"], map(_fields, formats.values())),
            "",
            " ".join(["Bits are per value, block scales counted.", *_explained()]),
            "",
            "To load it:",
            "",
            "```python",
            "import qsurgeon",
            "",
            'model = qsurgeon.load("folder or hub id of this model")',
            "```",
            "",
            f"After `import qsurgeon` a plain `from_pretrained` does the same; without it {elsewhere}.",
            "",
            *_recipe(record.recipe),
        ]
    ).rstrip()


def _from(record: Record) -> str:
    pinned = hub_id(record.source)
    if pinned is None:
        return f" from {code(record.source)}" if record.source else ""
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
        inline(format.name), ", ".join([format.element.name, *more]), shown(format.block), scale, format.tensor_scale,
        f"{format.bits:.4g}",
    ]  # fmt: skip


def _modules(record: Record) -> Iterable[list[str]]:
    """Yield a row of each kind of module that a rule named; those that differ in a number share one."""

    def alike(one: tuple[str, Quantization]) -> tuple[str, ...]:
        how = one[1]
        return how.weight_name, how.input_name, *map(str, how.behavior.fields.values()), how.rule

    for name, group in folded(record.quantizations().items(), lambda one: one[0], alike):
        how = group[0][1]
        why = ", ".join([f"rule {code(how.rule)}", *map(inline, how.behavior.reasons())])
        yield [
            code(name), str(len(group)), inline(how.weight_name), inline(how.input_name),
            *map(inline, how.behavior.columns.values()), why,
        ]  # fmt: skip
    for name, left in folded(record.exclusions().items(), lambda one: one[0], lambda one: one[1]):
        excluded = left[0][1]
        why = f"excluded by {code(excluded.pattern)} of rule {code(excluded.rule)}"
        yield [code(name), str(len(left)), AS_IT_IS, AS_IT_IS, *[AS_IT_IS for _ in Behavior().columns], why]


def _explained() -> Iterator[str]:
    """Yield what each column of the table of modules means that is a field of Behavior."""
    for field in FIELDS:
        if field.shown.column:
            yield f"{field.name.capitalize()}: {field.description[:1].lower()}{field.description[1:]}"


def _recipe(text: str) -> list[str]:
    """Return the lines that show a recipe in full; none for a record that does not know it."""
    return ["The recipe:", "", *fenced(text, "yaml")] if text.strip() else []
