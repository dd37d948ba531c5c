"""What a merge says of each module and of all, and its table."""

import math
from typing import Any

from qsurgeon.merging import Change, Merged, total
from qsurgeon.report.merging import merge_text


def change(module: str, **sums: Any) -> Change:
    return Change(
        module,
        (2, 4),
        "mxfp4",
        **{"w": 4.0, "dw": 1.0, "codes": 8, "changed": 2, "signal": 100.0, "noise": 1.0, **sums},
    )


def test_changes_add_up() -> None:
    every = (change("a.0"), change("a.1", w=12.0, dw=3.0, changed=6, signal=900.0, noise=9.0))
    one = total(every)
    assert (one.module, one.relative, one.share, one.sqnr) == ("total", 0.5, 0.5, 20.0)


def test_a_change_says_what_it_cannot_tell() -> None:
    assert change("a", w=0.0).relative is None
    assert change("a", signal=0.0).sqnr == -math.inf
    assert change("a", signal=0.0).to_dict()["sqnr"] is None


def test_the_table_folds_what_differs_in_a_number() -> None:
    done = Merged("adapter", "base", (change("layers.0.up"), change("layers.1.up")), ("head",))
    assert (
        merge_text(done)
        == """\
module            n  shape  weight    ΔW/W  codes changed    dB
layers.{0..1}.up  2  2x4    mxfp4   50.00%          25.0%  20.0

2 modules are merged, 2 of them rounded again: ΔW/W 50.00%, 25.0% of their codes changed, 20.0 dB
replaced as the adapter has them: head
dB: q(W + ΔW), which the merged layer computes with, against q(W) + ΔW, which the adapter trained with"""
    )
    assert "layers.1.up" in merge_text(done, fold=False)
