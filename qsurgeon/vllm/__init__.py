"""The plug-in for vLLM, which loads and computes what qsurgeon wrapped. vLLM alone imports what is beside this file.

Entry point: the group ``vllm.general_plugins`` in pyproject.toml.
"""


def register() -> None:
    """Make ``quant_method: qsurgeon`` known to vLLM, in each of its processes."""
    import qsurgeon.vllm.config  # noqa: F401  # the module registers its class
