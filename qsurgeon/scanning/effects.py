"""What rounding does to what a model says: how far its distribution moves, and by how much its loss grows."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsurgeon.errors import CalibrationError
from qsurgeon.layers import Quantization, QuantLayer
from qsurgeon.layers.kinds import kind_of
from qsurgeon.scanning.data import IGNORED, Batch
from qsurgeon.scanning.result import Effect

KL, RELATIVE = "kl", "relative_l2"
_PIECE = 2**22  # logits that are compared at once

Hows = Mapping[str, Mapping[str, Quantization]]  # by a module's path, and by the name of its weight


@contextmanager
def rounding(model: nn.Module, hows: Hows) -> Iterator[None]:
    """Let the modules at some paths compute inside the block as they do once they are wrapped; no weight is changed."""
    with ExitStack() as undo:
        for path, how in hows.items():
            module = model.get_submodule(path)
            kind = kind_of(module)
            assert kind is not None
            kind.wrap(module, how, path)
            assert isinstance(module, QuantLayer)
            undo.callback(module.unwrap)
        yield


def said(model: nn.Module, batch: Batch) -> tuple[Tensor, str]:
    """Return what a model says of a batch: logits, or without such its last hidden states; and how they are compared.

    Raises: CalibrationError for a model that returns neither.
    """
    output: Any = model(**batch.inputs)
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits, KL
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        return hidden, RELATIVE
    raise CalibrationError(
        f"{type(model).__name__} returns neither logits nor a last hidden state: what rounding does to it is not known"
    )


def compared(plain: Tensor, rounded: Tensor, how: str, batch: Batch, *, shifts: bool) -> Effect:
    """Return how far ``rounded`` is from ``plain``, what a model says of ``batch`` in full precision.

    shifts: whether a place says what comes after it, as a decoder's does.
    """
    if how == RELATIVE:
        one, other = plain.float().flatten(0, -2), rounded.float().flatten(0, -2)
        distance = ((other - one).square().sum(-1) / one.square().sum(-1)).double().sum().item()
        return Effect(distance, 0.0, one.shape[0], 0)
    labels = batch.labels
    if plain.dim() == 3 and shifts:
        plain, rounded = plain[:, :-1], rounded[:, :-1]
        labels = None if labels is None else labels[:, 1:]
    p, q = plain.flatten(0, -2), rounded.flatten(0, -2)
    targets = torch.full((p.shape[0],), IGNORED) if labels is None else labels.reshape(-1)
    if labels is not None:
        counts = targets != IGNORED
        p, q, targets = p[counts], q[counts], targets[counts]
    return _divergence(p, q, targets)


def _divergence(p: Tensor, q: Tensor, targets: Tensor) -> Effect:
    """Return the sums of KL(p‖q) and of the loss over logits (places, words)."""
    distance = loss = 0.0
    predicted = int((targets != IGNORED).sum())
    piece = max(1, _PIECE // max(1, p.shape[-1]))
    for start in range(0, p.shape[0], piece):
        log_p, log_q = (one[start : start + piece].float().log_softmax(-1) for one in (p, q))
        distance += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
        if predicted:
            own = targets[start : start + piece, None].to(log_q.device)
            loss -= log_q.gather(-1, own).double().sum().item()
    return Effect(distance, loss, p.shape[0], predicted)
