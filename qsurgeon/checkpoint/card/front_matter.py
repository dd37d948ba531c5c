"""The front matter of a model card: YAML between two lines of dashes, which may come from anyone."""

from typing import Any

import yaml

from qsurgeon.errors import CheckpointError
from qsurgeon.hub_private import REGEX_YAML_BLOCK

CARD = "README.md"
# Several times what the largest card has, the results of hundreds of benchmarks.
MOST_LETTERS = 4_000_000
MOST_VALUES = 200_000
MOST_LEVELS = 50
MOST_DIGITS = 100
MERGE = "tag:yaml.org,2002:merge"
# What PyYAML raises, in its own words or Python's, for text that is no YAML, or a tag whose value is not of its kind.
_BAD_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """YAML as the hub reads it: true and false are the only booleans, and the language ``no`` is Norwegian."""

    def construct_yaml_int(self, node: Any) -> int:
        """Return a whole number. Those of YAML's base 60 take the square of their length, and Python has a limit."""
        if len(node.value) > MOST_DIGITS:
            raise ValueError(f"a number of {len(node.value):,} digits")
        number: int = super().construct_yaml_int(node)
        return number


_Loader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if first in "tTfF" or one[0] != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def ends(card: str) -> int:
    """Return where the front matter of a card ends, as the hub sees it; 0 if it has none."""
    match = REGEX_YAML_BLOCK.search(card)
    return match.end() if match else 0


def read_front_matter(card: str) -> dict[str, Any]:
    """Return the front matter of a card as data, empty if it has none.

    Raises: CheckpointError for one that is no YAML, no keys and values, or larger than any.
    """
    match = REGEX_YAML_BLOCK.search(card)
    text = match[2] if match else ""
    try:
        _check_extent(text)
        data = yaml.load(text, Loader=_Loader)
    except _BAD_YAML as error:
        raise CheckpointError(f"{CARD}: its front matter is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(data, dict | None):
        raise CheckpointError(f"{CARD}: its front matter is {type(data).__name__}; expected keys and values")
    return data or {}


def written(data: dict[str, Any]) -> str:
    """Return front matter that says ``data``, with its lines of dashes."""
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()}\n---\n"


def _check_extent(text: str) -> None:
    """Raise ValueError for what would exhaust the stack, the memory or our patience, before it is built."""
    if len(text) > MOST_LETTERS:
        raise ValueError(f"it has more than {MOST_LETTERS:,} letters")
    level = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.ScalarEvent) and (event.value == "<<" or event.tag == MERGE):
            raise ValueError("it has a merge key (<<)")  # a few of them in turn make values without end
        if level > MOST_LEVELS:
            raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
        if values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
