"""Open what another tool quantized straight away: it is imported once, into the cache, and opened from there."""

from pathlib import Path

from qsurgeon.checkpoint.reading.files import refuse_irregular
from qsurgeon.checkpoint.reading.index import weight_files
from qsurgeon.checkpoint.writing.output import hash_of, identities
from qsurgeon.exchange.importing import ImportOptions, import_checkpoint
from qsurgeon.exchange.incoming import SECTIONS
from qsurgeon.exchange.modelopt import CONFIG as MODELOPT_CONFIG
from qsurgeon.exchange.readers import READERS
from qsurgeon.formats.kernels.native import cache_folder
from qsurgeon.reading import read_json
from qsurgeon.telling import say
from qsurgeon.version import __version__

FOLDER = "imported"  # in the cache


def foreign_method_in(folder: Path) -> str | None:
    """Return by which tool a model in ``folder`` is quantized, if it can be imported; None for any other folder."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    section = next((config[key] for key in SECTIONS if isinstance(config.get(key), dict)), None)
    if section is None:
        return "modelopt" if (folder / MODELOPT_CONFIG).is_file() else None
    method = section.get("quant_method")
    return method if method in READERS else None


def imported(folder: Path, *, trust_remote_code: bool = False) -> Path:
    """Return the folder with what is imported of ``folder``, which another tool quantized; it is kept in the cache.

    Raises: as ``import_checkpoint``.
    """
    refuse_irregular(folder)
    files = [*weight_files(folder), *folder.glob("*.json")]
    what = f"{__version__} {folder.resolve()} {sorted(identities(files).items())}"
    place = cache_folder() / FOLDER / f"{folder.resolve().name}-{hash_of(what.encode())[:16]}"
    if not place.is_dir():
        done = import_checkpoint(folder, place, options=ImportOptions(trust_remote_code=trust_remote_code))
        what = f"{folder} is quantized by {done.method}"
        say(f"{what}; it was imported with the codes that it has, and is kept in {place}")
    return place
