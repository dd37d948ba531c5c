"""What Python runs at startup under ``qsurgeon run``: the user's own sitecustomize, then ``import qsurgeon``.

It is not part of the package, and may be read by a Python that has no qsurgeon and is older than the one it was
installed for: standard library only, and no recent syntax.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder


class _Refusal:
    """Stops the import of transformers' quantizers, where a model would otherwise load in full precision."""

    def __init__(self, message: str) -> None:
        self.message = message

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "transformers.quantizers.auto":
            raise ImportError(self.message)


_here = os.path.realpath(os.path.dirname(__file__))  # noqa: PTH120  # pathlib would slow down every start
try:
    # Ours hides a sitecustomize further down the path: run it in our place, under its own name.
    _spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.realpath(path) != _here])
    if _spec is not None and _spec.loader is not None:
        sys.modules["sitecustomize"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["sitecustomize"])
finally:
    # Also if that one failed, which Python reports and goes on.
    if "QSURGEON_RUN" in os.environ:
        try:
            import qsurgeon  # noqa: F401
        except ImportError as _error:
            # Not the end of the process: it may be a helper that never loads a model.
            _message = (
                f"qsurgeon run: {sys.executable} cannot import qsurgeon ({_error}), so nothing would be wrapped; "
                "install it in that environment"
            )
            print(f"qsurgeon: pid {os.getpid()}: {_message}", file=sys.stderr, flush=True)  # noqa: T201
            sys.meta_path.insert(0, _Refusal(_message))
