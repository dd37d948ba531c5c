"""The command ``scan``. Imports that bring torch stand inside it."""

from typing import Annotated

import typer

from qsurgeon.cli.commands import (
    All,
    Json,
    ModelOption,
    RecipeName,
    Revision,
    TrustCode,
    Workers,
    app,
    model_of,
    width,
)
from qsurgeon.cli.printing import echo, echo_line
from qsurgeon.places import expanded
from qsurgeon.recipe import find_recipe, said


@app.command()
def scan(
    recipe: RecipeName,
    model: ModelOption = None,
    formats: Annotated[
        str | None, typer.Option("--formats", metavar="A,B,C", help="Also measure these in place of the recipe's.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write the result to, as JSON.")] = None,
    workers: Workers = None,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    every: All = False,
) -> None:
    """Measure which layers rounding hurts. Changes nothing.

    Weights are measured as they are stored, slab by slab. If it is interrupted, it leaves FILE.partial, and the same
    command goes on from there.
    """
    source = model_of(said(find_recipe(recipe), "model"), model)
    file = None if output is None else str(expanded(output))

    from qsurgeon.recipe import load_recipe

    loaded = load_recipe(recipe)

    from qsurgeon.cli.progress import Share
    from qsurgeon.report.scanning import scan as measure
    from qsurgeon.report.scanning import scan_text

    with Share("scanning") as bar:
        found = measure(
            loaded,
            source,
            formats=listed(formats),
            output=file,
            events=bar,
            workers=workers,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    echo(found.to_json() if as_json else scan_text(found.scan, fold=not every, width=width()))
    if file is not None:
        echo_line(f"all numbers are in {file}", err=True)


def listed(words: str | None) -> list[str]:
    """Return the words of an option that takes several, between commas."""
    return [one.strip() for one in (words or "").split(",") if one.strip()]
