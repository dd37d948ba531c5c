"""What ``load_adapter`` loaded: until 5.6 transformers reports it and returns nothing, and ``from_pretrained`` fails.

It fails where it is asked for ``output_loading_info`` of an adapter, which qsurgeon always asks for.
"""

from inspect import signature
from typing import Any

from qsurgeon.patching import Method

_LOADED = "_qsurgeon_loaded"


def noting(report: Method) -> Method:
    """Return a ``log_state_dict_report`` that leaves with the model what it reports."""
    parameters = signature(report)

    def log_state_dict_report(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs).arguments
        vars(given["model"])[_LOADED] = given["loading_info"]
        return report(*args, **kwargs)

    return log_state_dict_report


def returning(load: Method) -> Method:
    """Return a ``load_adapter`` that returns what was reported of the model."""

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = load(self, *args, **kwargs)
        reported = vars(self).pop(_LOADED, None)
        return reported if done is None else done

    return load_adapter
