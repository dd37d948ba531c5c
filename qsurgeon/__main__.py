"""Run ``python -m qsurgeon``."""

from qsurgeon.cli import main

main()
