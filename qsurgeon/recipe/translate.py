"""Patterns of other tools in our language: regular expressions, slices, ranges, several in one string.

Nothing here is ever matched with: what is found is offered in an error message.
"""

import re
from collections.abc import Iterator

ALL_LINEAR = {"all-linear", "all_linear", "linear", "nn.linear", "torch.nn.linear", "all", "linears", "all-linears"}
_QUOTES = " \t\"'`“”‘’"

# What a regular expression consists of, as far as it has an equal here. The order decides.
_TOKENS = re.compile(
    r"""
    (?P<edge>\^|\$|\\[AbBZ]|\(\?:\^\|\\\.\)|\(\^\|\\\.\)|\((?:\?:)?(?:\\\.\|\$|\$\|\\\.)\))
    |(?P<deep>\(?\.[*+]\??\)?)
    |(?P<any>\(?(?:\\[dwS]|\[0-9\]|\[\^\\?\.\]|\[[a-zA-Z0-9_-]*[a-zA-Z]-[a-zA-Z][a-zA-Z0-9_-]*\])(?:[*+]\??|\{\d+(?:,\d*)?\})?\)?)
    |\[(?P<first>\d)-(?P<last>\d)\]
    |\[(?P<class>[\w]+)\]
    |\((?:\?:|\?P<\w+>)?(?P<choice>[\w.\\-]+(?:\|[\w.\\-]+)*)\)
    |(?P<dot>\\?\.)
    |(?P<text>(?:[\w-]|\\[-_])+)
    """,
    re.VERBOSE,
)
_REGEX = re.compile(r"^re:|\w\[\d\d+\]|[\\^$()|+]|\.\*|\[.*\][*+.$]|\[[^\]]*[-^][^\]]*\]$")
_SLICE = re.compile(r"\.?\[(?P<first>-?\d*)(?P<colon>:?)(?P<last>-?\d*)\]")
_RANGE = re.compile(r"\{?(?P<first>\d+) ?(?:-|:|…|\.\.\.|,\.\.\.?,|to) ?(?P<last>-?\d+)\}?")
_LIST = re.compile(r"[,;]\s*|\s+")
_NAME = re.compile(r"[\w*.-]+")
Tokens = list[tuple[str, str]]


def is_regex(text: str) -> bool:
    """Say whether ``text`` is written as a regular expression."""
    return _REGEX.search(text.strip(_QUOTES)) is not None


def is_negated(text: str) -> bool:
    """Say whether ``text`` is written as what is not to be named."""
    return text.strip(_QUOTES)[:1] in {"!", "~", "-"} or "(?!" in text or "(?<!" in text


def from_regex(text: str) -> tuple[str, str] | None:
    """Return the pattern that names what a regular expression finds, and one that names whole names alone.

    They differ beside any text: ``.*q_proj`` is ``*q_proj``, and ``q_proj`` if that is the whole name. None if the
    expression says what no pattern can.
    """
    body = text.strip(_QUOTES).removeprefix("re:")
    if len(body) > 1 and body[0] == body[-1] == "/":
        body = body[1:-1]
    if "|" in body and "(" not in body:
        body = f"({body})"
    tokens = _tokens(body)
    if len(tokens) == 1 and body.endswith("$") and not body.startswith("^"):
        tokens = [("deep", ".*"), *tokens]
    whole, wide = _joined(tokens), _joined(_widened(tokens))
    if not whole:
        return None
    part = whole.startswith("_") or whole.endswith("_") or "._" in whole  # of a name, and none itself
    return wide, wide if part else whole


def _tokens(body: str) -> Tokens:
    """Return what an expression consists of, or nothing if a part of it is unknown here."""
    found: Tokens = []
    at = 0
    while at < len(body):
        match = _TOKENS.match(body, at)
        if match is None:
            return []
        at = match.end()
        if match.lastgroup != "edge":
            found.append(_token(match))
    return found


def _token(match: re.Match[str]) -> tuple[str, str]:
    kind, text = match.lastgroup or "", match[0]
    match kind:
        case "last":
            return "word", f"{{{match['first']}..{text[-2]}}}"
        case "class":
            return "word", "{" + ",".join(text[1:-1]) + "}"
        case "choice":
            inside = re.sub(r"^\((?:\?:|\?P<\w+>)?|\)$", "", text).replace("\\", "")
            return "word", "{" + inside.replace("|", ",") + "}" if "|" in inside else inside
        case "any":
            return "word", "{0..9}" if text in {"\\d", "[0-9]"} else "*"
        case "text":
            return "word", text.replace("\\", "")
    return kind, text


def _widened(tokens: Tokens) -> Tokens:
    """Return tokens with a ``*`` where any text meets a name: it may be a part of that name."""
    wide: Tokens = []
    for place, (kind, text) in enumerate(tokens):
        if kind == "word":
            before = place and tokens[place - 1][0] == "deep" and not text.startswith("*")
            after = place + 1 < len(tokens) and tokens[place + 1][0] == "deep" and not text.endswith("*")
            text = "*" * bool(before) + text + "*" * after
        wide.append((kind, text))
    return wide


def _joined(tokens: Tokens) -> str:
    """Return tokens as a pattern; any text between two names is any number of components."""
    parts: list[str] = [""]
    for kind, text in tokens:
        if kind == "word":
            parts[-1] += text
        elif kind == "dot":
            parts.append("")
        else:
            parts += ["**", ""]
    kept = [part for part in parts if part]
    while len(kept) > 1 and kept[0] == "**":
        kept = kept[1:]
    while len(kept) > 1 and (kept[-1] == "**" or (kept[-1] == "*" and tokens[-1][0] == "dot")):
        kept = kept[:-1]
    return ".".join(kept)


def variants(text: str) -> Iterator[str]:
    """Yield what a text that is no pattern, or names nothing, may mean; whoever offers one tries it first."""
    bare = text.strip(_QUOTES)
    optional = "?" if bare.endswith("?") else ""
    bare = bare.removesuffix("?")
    yield bare + optional
    bare = bare.removesuffix(".weight").removesuffix(".bias")
    yield bare + optional
    if bare.casefold() in ALL_LINEAR:
        yield "**"
    bare = _SLICE.sub(_from_slice, bare)
    if "/" in bare:
        bare = bare.strip("/").replace("/", ".")
    yield bare + optional
    ranged = ".".join(_RANGE.sub(r"{\g<first>..\g<last>}", part) for part in bare.replace("..", "\0").split("."))
    yield ranged.replace("\0", "..") + optional
    if "*" in bare and bare.strip("*"):  # as a shell or a regular expression has it, across dots
        found = from_regex(re.sub(r"(?<!\.)\*+", ".*", bare))
        yield from (one + optional for one in (reversed(found) if found else ()))


def _from_slice(found: re.Match[str]) -> str:
    """Return Python's ``[3]``, ``[:4]`` or ``[-2:]`` as a component."""
    first, last = found["first"], found["last"]
    if not found["colon"]:
        return f".{first}" if first else found[0]
    end = str(int(last) - 1) if last and last != "0" else "-1"
    return f".{{{first or 0}..{end}}}"


def several(text: str) -> list[str]:
    """Return the patterns in a text that separates them by commas or blanks, or nothing if it is not such."""
    words = [word for word in _LIST.split(text.strip(_QUOTES)) if word]
    return words if len(words) > 1 and all(_NAME.fullmatch(word) for word in words) else []
