"""The commands. Imports that bring torch stand inside them, so that ``qsurgeon --help`` answers at once."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, cast, overload

import typer
from typer.core import TyperGroup

from qsurgeon.cli.printing import echo, echo_line
from qsurgeon.errors import CheckpointError, UsageError
from qsurgeon.launch import run as become
from qsurgeon.places import OFFLINE, expanded, is_id, missing, model_here, quoted
from qsurgeon.recipe import find_recipe, said, shipped_recipes
from qsurgeon.version import __version__

if TYPE_CHECKING:
    from qsurgeon.report.rows import Report


class _Commands(TyperGroup):
    """The commands, each of which may be stopped by Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Do what was asked; stopped by Ctrl-C, say so in a line, with what the command says of it, and exit 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            echo_line(f"interrupted{stop}", err=True)
            raise typer.Exit(130) from stop


app = typer.Typer(
    name="qsurgeon",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn the Linear layers of a Hugging Face model into 4-bit layers that still train, from one YAML recipe.",
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, config.json or Hub id; overrides the recipe's.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub (default: main).")]
TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code in the model's repository. Read it first.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Number of threads (default: one per core).")]
ShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Maximum size of each weight file, e.g. 5GB (default: keep unchanged files as they are)."
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Resume an unfinished run; fail if there is none (default: resume if one is found)."),
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Also write weights that contain NaN or infinity.")
]
Repository = Annotated[str | None, typer.Option(metavar="REPO", help="Upload the folder to this Hub repository.")]
Public = Annotated[bool, typer.Option("--public", help="Make a new repository public (default: private).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Html = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Also write it as one HTML file, with charts.")
]
Png = Annotated[str | None, typer.Option("--png", metavar="FILE", help="Also write its charts as a picture.")]
All = Annotated[
    bool,
    typer.Option("--all", help="List every module separately instead of grouping modules that differ only by index."),
]


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"qsurgeon {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def plan(
    recipe: RecipeName,
    model: ModelOption = None,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    every: All = False,
    to_html: Html = None,
    to_png: Png = None,
) -> None:
    """Show what a recipe would do to every module of a model. Reads no weights and changes nothing."""
    source = model_of(said(find_recipe(recipe), "model"), model)  # a typo should not wait for torch

    from qsurgeon.recipe import load_recipe

    loaded = load_recipe(recipe)  # nor for transformers

    if not trust_remote_code:
        _without_torchao()

    from qsurgeon.hf.models import plan as make_plan
    from qsurgeon.report.inspection import report_of

    planned = report_of(make_plan(loaded, source, revision, trust_remote_code=trust_remote_code), source)
    _print_report(planned, as_json, every)
    _draw(planned, to_html, to_png)


@app.command()
def apply(
    recipe: RecipeName,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or Hub id to read; overrides the recipe's.")
    ] = None,
    revision: Revision = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to write; overrides the recipe's.")
    ] = None,
    workers: Workers = None,
    max_shard_size: ShardSize = None,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    trust_remote_code: TrustCode = False,
    push_to_hub: Repository = None,
    public: Public = False,
) -> None:
    """Apply a recipe to a checkpoint and write a folder that from_pretrained opens.

    If it is interrupted, it leaves FOLDER.partial, and the same command resumes there. Under torchrun or accelerate
    launch the processes share the work.
    """
    own = said(find_recipe(recipe), "model", "output")
    source = model_of(own, model)
    destination = output or own.get("output")
    if destination is None:
        raise UsageError("no output folder: pass --output FOLDER, or set 'output:' in the recipe")
    destination = str(expanded(destination))
    if public and push_to_hub is None:
        raise UsageError("--public requires --push-to-hub REPO")

    from qsurgeon.recipe import load_recipe

    loaded = load_recipe(recipe)

    from qsurgeon.checkpoint import Options, reserve, rewrite
    from qsurgeon.checkpoint.writing.ranks import launched
    from qsurgeon.cli.progress import Bar
    from qsurgeon.report.inspection import report_of

    options = Options(workers, max_shard_size, resume, allow_nonfinite, launched(), revision, trust_remote_code)
    reserved: list[str] = []

    def reserve_repository() -> None:
        if push_to_hub is not None:
            reserved.append(reserve(push_to_hub, private=not public))

    with Bar("writing weights", reserve_repository) as bar:
        done = rewrite(loaded, source, destination, bar, options)
    if not bar.leads:
        return
    echo_line(f"{destination}: {report_of(done).summary}")
    for repo in reserved:
        echo_line(_pushed(destination, repo, private=not public))
    echo_line(f"see it with: qsurgeon inspect {quoted(destination)}", err=True)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA adapter that peft saved.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder of its wrapped base model; overrides the one that the adapter names."
        ),
    ] = None,
    as_json: Json = False,
    every: All = False,
) -> None:
    """Merge a LoRA adapter into its wrapped base model and report the error that re-quantizing adds."""
    adapter, output = str(expanded(adapter)), str(expanded(output))
    model = None if model is None else str(expanded(model))

    from qsurgeon.cli.progress import Bar
    from qsurgeon.merging import merge as fold
    from qsurgeon.report.merging import merge_text

    with Bar("merging") as bar:
        done = fold(adapter, output, model, bar)
    echo(json.dumps(done.to_dict(), indent=2) if as_json else merge_text(done, fold=not every, width=width()))
    echo_line(f"load it with: qsurgeon.load({output!r})", err=True)


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that qsurgeon wrote.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="KIND", help="Kind of checkpoint: compressed-tensors, modelopt, or dense (values)."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
    engine: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="ENGINE", help="What will serve it; fail if it would compute with other weights."
        ),
    ] = None,
    weight_only: Annotated[
        bool, typer.Option("--weight-only", help="Ask for inputs in full precision, whatever the model trained with.")
    ] = False,
    workers: Workers = None,
    max_shard_size: ShardSize = None,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Export a model to another tool's checkpoint, and show what each engine will compute with it."""
    folder, output = str(expanded(folder)), str(expanded(output))

    if not trust_remote_code:
        _without_torchao()

    from qsurgeon.cli.progress import Bar
    from qsurgeon.exchange import ExportOptions
    from qsurgeon.exchange import export as write
    from qsurgeon.report.exchange import export_text

    options = ExportOptions(weight_only, workers, max_shard_size, resume, allow_nonfinite, trust_remote_code)
    with Bar("exporting") as bar:
        done = write(folder, output, to, engine, bar, options)
    echo(json.dumps(done.to_dict(), indent=2) if as_json else export_text(done, width()))


@app.command("import")
def import_(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder or Hub id of a model that another tool quantized.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Store the values as master weights, for full fine-tuning.")
    ] = False,
    workers: Workers = None,
    max_shard_size: ShardSize = None,
    resume: Resume = False,
    allow_nonfinite: AllowNonfinite = False,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Import a model that another tool quantized, with the codes that it has, as packed weights."""
    folder, output = str(expanded(folder)), str(expanded(output))

    if not trust_remote_code:
        _without_torchao()

    from qsurgeon.cli.progress import Bar
    from qsurgeon.exchange import ImportOptions, import_checkpoint
    from qsurgeon.report.exchange import import_text

    options = ImportOptions(dequantize, workers, max_shard_size, resume, allow_nonfinite, trust_remote_code)
    with Bar("importing") as bar:
        done = import_checkpoint(folder, output, bar, options)
    echo(json.dumps(done.to_dict(), indent=2) if as_json else import_text(done, output))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, config.json or Hub id.")],
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    every: All = False,
    to_html: Html = None,
    to_png: Png = None,
) -> None:
    """Show what every module of a model computes with, and why. Exits 1 if nothing is wrapped."""
    _look_for(model)

    if not trust_remote_code:
        _without_torchao()

    from qsurgeon.report.inspection import inspect as ask

    report = ask(model, revision=revision, trust_remote_code=trust_remote_code)
    _print_report(report, as_json, every)
    _draw(report, to_html, to_png)
    if not report.wrapped:
        raise typer.Exit(1)


@app.command()
def formats(
    name: Annotated[str | None, typer.Argument(help="Show only this format.")] = None, as_json: Json = False
) -> None:
    """List the number formats that recipes can use, with the accuracy (SQNR) of each."""
    from qsurgeon.report.formats import format_rows, formats_text

    if name is not None:
        from qsurgeon.formats import get_format

        get_format(name)
    rows = [row for row in format_rows() if name is None or name in row.names]
    echo(json.dumps([row.to_dict() for row in rows], indent=2) if as_json else formats_text(rows, width()))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None, as_json: Json = False
) -> None:
    """List the shipped recipes, or print one to start from."""
    if name is not None:
        echo(find_recipe(name).read_text("utf-8"), nl=False)
        return
    rows = {one: file.read_text("utf-8").splitlines()[0].lstrip("# ") for one, file in shipped_recipes().items()}
    if as_json:
        echo(json.dumps(rows, indent=2))
        return

    from qsurgeon.report.tables import Column, table_text

    echo(table_text([Column("recipe", [*rows]), Column("what it does", [*rows.values()])]))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from qsurgeon.recipe import Recipe

    echo(json.dumps(Recipe.model_json_schema(), indent=2))


# Options behind the command's first word are the command's, also without `--`.
@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND", help="The program to start, and its arguments.")
    ] = None,
) -> None:
    """Start a program whose Python processes all import qsurgeon and report what is wrapped in the models they load."""
    become(command or [])


def _pushed(folder: str, repo: str, *, private: bool) -> str:
    """Return where the commit is that has the folder, or say how to repeat the upload and fail."""
    from qsurgeon.checkpoint import push

    try:
        return push(folder, repo, private=private)
    except (CheckpointError, ConnectionError):
        echo_line(f"{folder} is complete; upload it with: hf upload {repo} {quoted(folder)}", err=True)
        raise


def model_of(own: Mapping[str, str], model: str | None) -> str:
    """Return the model that is asked for, by the option or by what a recipe says itself, after a look for a folder."""
    source = model or own.get("model")
    if source is None:
        raise UsageError("no model: pass --model FOLDER, or set 'model:' in the recipe")
    _look_for(source)
    return source


def _look_for(model: str) -> None:
    """Do nothing for a model that may be there. Raises: CheckpointError for one that is not, as far as a look tells."""
    if model_here(model) is not None or not (is_id(model) or is_id(f"owner/{model}")):
        return

    from huggingface_hub import constants

    kept = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    if constants.is_offline_mode() and not kept.exists():
        raise CheckpointError(missing(model, OFFLINE))


def _without_torchao() -> None:
    """Let transformers not find torchao, which takes longer to import than a plan, and which reads quantized weights.

    A plan reads no weight. A program that has imported transformers already is not ours alone, and left as it is.
    """
    if "transformers" not in sys.modules:
        sys.modules.setdefault("torchao", cast(ModuleType, None))


def _draw(report: "Report", to_html: str | None, to_png: str | None) -> None:
    if to_html is not None:
        free(to_html).write_text(report.to_html(), "utf-8")
    if to_png is not None:
        free(to_png).write_bytes(report.to_png())


def _print_report(report: "Report", as_json: bool, every: bool) -> None:
    from qsurgeon.report.rows import report_text

    if as_json:
        echo(report.to_json())
        return
    echo(report_text(report, fold=not every, width=width()))


@overload
def free(file: None, *, there: bool = False) -> None: ...
@overload
def free(file: str | Path, *, there: bool = False) -> Path: ...
def free(file: str | Path | None, *, there: bool = False) -> Path | None:
    """Return the path of a file that is to be written, or one that is ``there`` to be read.

    Raises: CheckpointError for one that is in the way, or is not there.
    """
    if file is None:
        return None
    path = expanded(file)
    if there and not path.is_file():
        raise CheckpointError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
    if not there and (path.exists() or path.is_symlink()):
        raise CheckpointError(f"{path} exists; name another file or remove it first")
    return path


def width() -> int | None:
    """Return the width of a terminal that is looked at, or None."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
