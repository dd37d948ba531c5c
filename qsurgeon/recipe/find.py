"""Which file a recipe's name refers to, and its model and output keys, before anything heavy is imported."""

import difflib
import re
import stat
from pathlib import Path as FilePath

from qsurgeon.errors import CheckpointError, Mistake, RecipeError, guess
from qsurgeon.places import CONFIG, expanded
from qsurgeon.recipe.text import parse, read_source

_PACKAGE = FilePath(__file__).parents[1]
# In a wheel the recipes lie inside the package, in a checkout beside it.
SHIPPED = next(folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir())
SUFFIXES = (".yaml", ".yml", ".json")
MOST_BESIDE = 1000  # files that a name is compared with
MOST_GUESSES = 3


def shipped_recipes() -> dict[str, FilePath]:
    """Return the recipes that come with qsurgeon by name: ``w4a4-mxfp4``, ``e13/e13h-mxfp4-w4a4``."""
    return {str(file.relative_to(SHIPPED).with_suffix("")): file for file in sorted(SHIPPED.rglob("*.yaml"))}


def find_recipe(name: str | FilePath, beside: FilePath | None = None) -> FilePath:
    """Return the file that ``name`` means: a path (from the folder ``beside``), else a shipped recipe.

    Raises: RecipeError with the nearest name if there is neither.
    """
    if not str(name).strip():
        raise RecipeError([Mistake("", "no recipe: its name is empty")])
    try:
        path = expanded(name)
    except CheckpointError as error:
        raise RecipeError([Mistake("", str(error))]) from error
    path = path if beside is None else beside / path
    mode = _mode(path)
    if stat.S_ISREG(mode):
        return path
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if stat.S_ISDIR(mode):
        what = "the folder of a model" if (path / CONFIG).is_file() else "a folder"
        raise RecipeError([Mistake(str(path), f"is {what}; expected a recipe file")])
    if mode:
        raise RecipeError([Mistake(str(path), "is not a regular file; expected a recipe file")])
    around = stat.S_ISDIR(_mode(path.parent))
    near = _guesses(str(name), shipped, path)
    others = f"; expected one of: {', '.join(sorted(shipped))}"
    if path.suffix in SUFFIXES or not around or _mode(path, follow_symlinks=False):
        raise RecipeError([Mistake(str(path), f"no such file{_question(near)}")])
    raise RecipeError([Mistake("", f"no recipe '{name}'{_question(near) or others}")])


def _mode(path: FilePath, *, follow_symlinks: bool = True) -> int:
    """Return what kind of file there is, as ``stat`` tells it; 0 for none, also where no file can have the name."""
    try:
        return path.stat(follow_symlinks=follow_symlinks).st_mode
    except (OSError, ValueError):
        return 0


def _question(near: list[str]) -> str:
    if not near:
        return ""
    *others, last = [f"'{one}'" for one in near]
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def _guesses(name: str, shipped: dict[str, FilePath], path: FilePath) -> list[str]:
    """Return the recipes, shipped or beside ``path``, that ``name`` may mean, the likeliest first; few, or none."""
    stem = _stem(name)
    there = [str(file) for file in _beside(path)]
    last = stem.rpartition("/")[2]
    exact = [one for one in there if _stem(one) == stem]
    exact += [one for one in shipped if last in {one.casefold(), one.rpartition("/")[2].casefold()}]
    if exact:
        return exact[:MOST_GUESSES]
    parts = set(re.split(r"[-_ /]+", last)) - {""}
    whole = [one for one in shipped if parts and parts <= set(re.split(r"[-/]", one))]
    if whole:  # of names with all of these parts, those with the fewest others
        return sorted(whole, key=lambda one: (len(re.split(r"[-/]", one)), len(one), one))[:MOST_GUESSES]
    typo = guess(last, [*shipped, *(one.rpartition("/")[2] for one in shipped)])
    stems = {_stem(one).rpartition("/")[2]: one for one in there}
    near = [stems[one] for one in difflib.get_close_matches(last, stems, n=1, cutoff=0.7)]
    return [*near, *(one for one in shipped if typo in {one, one.rpartition("/")[2]})][:MOST_GUESSES]


def _stem(name: str) -> str:
    """Return a recipe's name without what people write differently: case, suffix, quotes, the way to it."""
    bare = name.strip(" \t\"'`“”‘’").replace("\\", "/").casefold()
    while bare.endswith(SUFFIXES):
        bare = bare[: bare.rindex(".")]
    return re.sub(r"[_ ]+", "-", bare.removeprefix("./").removeprefix("recipes/"))


def _beside(path: FilePath) -> list[FilePath]:
    """Return files beside ``path`` that may be recipes."""
    if not stat.S_ISDIR(_mode(path.parent)):
        return []
    files = (file for file, _ in zip(path.parent.iterdir(), range(MOST_BESIDE), strict=False))
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.name != CONFIG)


def said(file: FilePath, *keys: str) -> dict[str, str]:
    """Return what a recipe, or else those that it extends, says of ``keys``; unchecked, and without what it says wrong.

    Raises: RecipeError for a file that cannot be read, or is not YAML.
    """
    found: dict[str, str] = {}
    seen: set[FilePath] = set()
    while file.resolve() not in seen:
        seen.add(file.resolve())
        raw = parse(read_source(file))
        found = {key: raw[key] for key in keys if isinstance(raw.get(key), str)} | found
        base = raw.get("extends")
        if not isinstance(base, str):
            break
        try:
            file = find_recipe(base, beside=file.parent)
        except RecipeError:  # said by who loads it, with the line
            break
    return found
