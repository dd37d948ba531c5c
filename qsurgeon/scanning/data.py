"""What a scan runs a model on: a file of examples, or of text, as batches of equal length, so that nothing is padded.

A padded place would count as an input of every layer.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsurgeon.errors import CalibrationError
from qsurgeon.reading import open_regular

SAMPLES = 64  # that are taken where nobody says how many
LENGTH = 512  # tokens of a sample at most
IGNORED = -100  # the label of a place that is not to be predicted, as transformers' losses have it
MOST_ROWS = 8  # of a batch
MOST_LOGITS = 2**26  # values that a batch's logits have at most, if it has more than one row
KEYS = ("text", "prompt and completion", "messages", "input_ids")


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and the labels (rows, places) of what it should say, where there are such."""

    inputs: Mapping[str, Any]
    labels: Tensor | None

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        first: Tensor = next(one for one in self.inputs.values() if isinstance(one, Tensor))
        return first.shape[0] * first.shape[1] if first.dim() > 1 else first.shape[0]

    @property
    def rows(self) -> int:
        """How many samples it has."""
        return int(next(one for one in self.inputs.values() if isinstance(one, Tensor)).shape[0])


@dataclass(frozen=True)
class Examples:
    """Batches, and where they are from. identity: what tells them from others. cut: how many samples were cut off."""

    source: str
    batches: tuple[Batch, ...]
    identity: str
    cut: int = 0

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(batch.rows for batch in self.batches)

    @property
    def tokens(self) -> int:
        """How many tokens they have."""
        return sum(batch.tokens for batch in self.batches)


def given(batches: Iterable[Mapping[str, Any]]) -> Examples:
    """Return batches that a caller made: each is what the model is called with; ``labels`` are not handed to it.

    Raises: CalibrationError if there are none.
    """
    made = []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        made.append(Batch(inputs, batch.get("labels")))
    if not made:
        raise CalibrationError("there is no batch to scan with")
    digest = hashlib.sha256()
    for one in made:
        for key, value in [*one.inputs.items(), ("labels", one.labels)]:
            digest.update(f"{key} {value.tolist() if isinstance(value, Tensor) else value!r}".encode())
    return Examples("batches", tuple(made), digest.hexdigest())


def from_rows(file: Path, tokenizer: Any, samples: int, length: int, vocabulary: int) -> Examples:
    """Return the first ``samples`` rows of a JSON Lines file, each cut off at ``length`` tokens.

    A row has ``text``; or ``prompt`` and ``completion``, of which the completion alone counts; or ``messages`` for the
    tokenizer's chat template; or ``input_ids``, and ``labels`` if not all places count.

    Raises: CalibrationError, naming the line, for a row without these, and for a file without rows.
    """
    rows: list[tuple[list[int], list[int]]] = []
    digest = hashlib.sha256()
    with open_regular(file) as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            if len(rows) == samples:
                break
            digest.update(line)
            rows.append(_row(line, f"{file}:{number}", tokenizer))
    if not rows:
        raise CalibrationError(f"{file}: has no rows")
    cut = sum(len(ids) > length for ids, _ in rows)
    kept = [(ids[:length], labels[:length]) for ids, labels in rows]
    return Examples(file.name, _batches(kept, vocabulary), digest.hexdigest(), cut)


def from_text(file: Path, tokenizer: Any, samples: int, length: int, vocabulary: int) -> Examples:
    """Return the first ``samples`` windows of ``length`` tokens of a text file, special tokens around each.

    Raises: CalibrationError for a file that is not UTF-8, or whose text is too short for one.
    """
    with open_regular(file) as opened:
        data = opened.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file}: is no text in UTF-8: {error.reason} at byte {error.start:,}") from error
    before, after = _around(tokenizer)
    inner = length - len(before) - len(after)
    ids = _ids(tokenizer, text, special=False)
    windows = [[*before, *ids[at : at + inner], *after] for at in range(0, len(ids), inner)][:samples]
    rows = [(one, one) for one in windows if len(one) > len(before) + len(after) + 1]
    if not rows:
        raise CalibrationError(f"{file}: has no text to scan with")
    return Examples(file.name, _batches(rows, vocabulary), hashlib.sha256(data).hexdigest())


def _row(line: bytes, where: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of a row, and the label of each."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where}: is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: expects an object, got {type(row).__name__}")
    match row:
        case {"text": str(text)}:
            ids = _ids(tokenizer, text)
            labels = ids
        case {"prompt": str(prompt), "completion": str(completion)}:
            begins = _around(tokenizer)[0] + _ids(tokenizer, prompt, special=False)
            ends = _ids(tokenizer, completion, special=False)
            ends += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids, labels = begins + ends, [IGNORED] * len(begins) + ends
        case {"messages": list(messages)}:
            ids = _templated(tokenizer, messages, where)
            labels = ids
        case {"input_ids": list(ids)}:
            labels = row.get("labels", ids)
        case _:
            raise CalibrationError(
                f"{where}: has {', '.join(map(repr, row)) or 'nothing'}; expected one of: {', '.join(KEYS)}"
            )
    if not _are_tokens(ids) or not _are_tokens(labels) or len(ids) != len(labels) or len(ids) < 2:
        raise CalibrationError(f"{where}: expected two tokens or more, whole numbers, and a label for each")
    return ids, labels


def _are_tokens(found: Any) -> bool:
    return isinstance(found, list) and all(type(one) is int for one in found)


def _ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    # A text is cut into windows by us: that it is longer than the model's is nothing to warn of.
    found: list[int] = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    return found


def _templated(tokenizer: Any, messages: Sequence[Any], where: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(f"{where}: has messages, and the tokenizer has no chat template; say text instead")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return _ids(tokenizer, text, special=False)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    bare, whole = _ids(tokenizer, "a", special=False), _ids(tokenizer, "a")
    at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]


def _batches(rows: Sequence[tuple[list[int], list[int]]], vocabulary: int) -> tuple[Batch, ...]:
    """Return rows of the same length together, as many as a batch may have, those that come first first."""
    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for row in rows:
        by_length.setdefault(len(row[0]), []).append(row)
    made = []
    for length, same in by_length.items():
        most = max(1, min(MOST_ROWS, MOST_LOGITS // max(1, length * vocabulary)))
        for start in range(0, len(same), most):
            ids, labels = (torch.tensor(one) for one in zip(*same[start : start + most], strict=True))
            made.append(Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
    return tuple(made)
