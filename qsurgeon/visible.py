"""Makes text from other sources safe to print: a name cannot control a terminal or forge a line of output.

What is not printable (control characters, line breaks, marks that reverse the direction of text, halves of characters
that are no UTF-8) is written as Python writes it in a string: ``\\x1b``, ``\\n``, ``\\u202e``. Text that is printable
stays as it is, so that doing it twice changes nothing.
"""


def one_line(text: str) -> str:
    """Return ``text`` with everything escaped that is not printable, line breaks too: for names, and whole messages."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def visible(text: str) -> str:
    """Return text of several lines, whose line breaks are ours, with everything else escaped that is not printable."""
    return "\n".join(map(one_line, text.split("\n")))
