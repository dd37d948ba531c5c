"""The command line: parse, call one function, print. Results on stdout, messages and progress on stderr.

Exit codes: 0 done, 1 found something wrong or the environment failed, 2 the user's mistake, 130 stopped by Ctrl-C.
"""

import os
import sys

from typer.main import get_command

from qsurgeon.cli.commands import app
from qsurgeon.cli.lines import check
from qsurgeon.cli.printing import tamed_messages
from qsurgeon.cli.scan import scan  # noqa: F401  # which joins the app
from qsurgeon.cli.streams import complain, give_up, prepare
from qsurgeon.errors import OtherRankError, QSurgeonError, in_words
from qsurgeon.visible import visible

COMPLETION = "_QSURGEON_COMPLETE"  # set by a shell that asks how a line may go on


def main() -> None:
    """Run the command line."""
    prepare()
    if sys.stdout is None and sys.argv[1:2] != ["run"]:  # whose output is that of another program
        sys.exit(_complain("standard output is closed; to throw the output away, say > /dev/null", 1))
    try:
        _invoke()
    except OtherRankError:
        sys.exit(1)
    except QSurgeonError as error:
        sys.exit(_complain(str(error), 2))
    except BrokenPipeError:  # whoever read our output has enough
        give_up()
        sys.exit(1)
    except OSError as error:
        give_up()
        sys.exit(_complain(in_words(error), 1))


def _invoke() -> None:
    try:
        command = get_command(app)
        if COMPLETION not in os.environ:
            check(sys.argv[1:], command)
        with tamed_messages():
            command(prog_name="qsurgeon")
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here an error has words; while the interpreter shuts down it has none


def _complain(message: str, code: int) -> int:
    complain(visible(f"error: {message}") + "\n")
    return code
