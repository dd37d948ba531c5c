"""The command ``scan``. Imports that bring torch stand inside it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qsurgeon.cli.commands import (
    All,
    Html,
    Json,
    ModelOption,
    Png,
    RecipeName,
    Revision,
    TrustCode,
    Workers,
    app,
    free,
    model_of,
    width,
)
from qsurgeon.cli.printing import echo, echo_line
from qsurgeon.errors import UsageError
from qsurgeon.places import quoted
from qsurgeon.recipe import find_recipe, said

if TYPE_CHECKING:
    from qsurgeon.report.scanning import ScanReport
    from qsurgeon.scanning import Suggestion


@app.command()
def scan(
    recipe: RecipeName,
    model: ModelOption = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Examples to run the model on, one JSON a line.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="FILE", help="Text to run the model on.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples, or windows of the text, that are taken.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sample at most.")] = 512,
    formats: Annotated[
        str | None, typer.Option("--formats", metavar="A,B,C", help="Also measure these in place of the recipe's.")
    ] = None,
    srdd: Annotated[bool, typer.Option("--srdd", help="Also do the scan of SRDD, to compare.")] = False,
    suggest: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="Write a recipe with so many bits per weight, beside the output."),
    ] = None,
    suggest_exclude: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Write a recipe that spares N modules, beside the output.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write the result to, as JSON.")] = None,
    to_html: Html = None,
    to_png: Png = None,
    workers: Workers = None,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    every: All = False,
) -> None:
    """Measure which layers rounding hurts. Changes nothing.

    Weights are measured as they are stored, slab by slab. With --data or --text the model is run too: each module's
    input and output, and what rounding it does to the whole model. If it is interrupted, it leaves FILE.partial, and
    the same command goes on from there.
    """
    source = model_of(said(find_recipe(recipe), "model"), model)
    recipes = _recipes(suggest, suggest_exclude, output, has_data=data is not None or text is not None)
    for file in (output, to_html, to_png, *(path for path, _ in recipes)):
        free(file)

    from qsurgeon.recipe import load_recipe

    loaded = load_recipe(recipe)

    from qsurgeon.cli.progress import Share
    from qsurgeon.report.scanning import scan as measure
    from qsurgeon.report.scanning import scan_text

    with Share("scanning") as bar:
        found = measure(
            loaded,
            source,
            data=free(data, there=True),
            text=free(text, there=True),
            samples=samples,
            length=length,
            formats=listed(formats),
            srdd=srdd,
            output=free(output),
            events=bar,
            workers=workers,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    echo(found.to_json() if as_json else scan_text(found.scan, fold=not every, width=width()))
    if output is not None:
        echo_line(f"all numbers are in {output}", err=True)
    for path, make in recipes:
        suggestion = make(found)
        path.write_text(suggestion.text, "utf-8")
        echo_line(
            f"{path}: {suggestion.what}, {suggestion.bits:.4g} bits per weight; see it with: qsurgeon plan "
            f"{quoted(path)} --model {quoted(source)}",
            err=True,
        )
    if to_html is not None:
        free(to_html).write_text(found.to_html(), "utf-8")
    if to_png is not None:
        free(to_png).write_bytes(found.to_png())


Recipes = list[tuple[Path, Callable[["ScanReport"], "Suggestion"]]]


def _recipes(bits: float | None, count: int | None, output: str | None, *, has_data: bool) -> Recipes:
    """Return the recipes that are to be written, beside the output. Raises: UsageError where they cannot be."""
    if bits is None and count is None:
        return []
    option = "--suggest" if count is None else "--suggest-exclude"
    if not has_data:
        raise UsageError(f"{option} needs to know what each layer does to the model's answer: pass --data or --text")
    if output is None:
        raise UsageError(f"{option} writes a recipe beside the output: pass --output scan.json")
    file = free(output)
    found: Recipes = []
    if bits is not None:
        found.append((file.with_name(f"{file.stem}-{bits:g}-bits.yaml"), lambda report: report.suggest(bits)))
    if count is not None:
        name = f"{file.stem}-without-{count}.yaml"
        found.append((file.with_name(name), lambda report: report.suggest_exclude(count)))
    return found


def listed(words: str | None) -> list[str]:
    """Return the words of an option that takes several, between commas."""
    return [one.strip() for one in (words or "").split(",") if one.strip()]
