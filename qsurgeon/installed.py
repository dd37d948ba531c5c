"""Which versions of other libraries are installed."""

from importlib.metadata import version

from packaging.version import Version


def is_before(library: str, first: str) -> bool:
    """Return whether the installed version of ``library`` is older than ``first``, such as 0.21."""
    return Version(version(library)) < Version(first)
