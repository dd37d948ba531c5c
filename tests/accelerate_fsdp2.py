"""Run examples/train_accelerate.py as accelerate's FSDP2 runs it, but on CPUs, where accelerate itself has only DDP.

The environment must be what ``accelerate launch`` makes of an FSDP2 config; the arguments are the example's.
"""

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_accelerate


def main() -> None:
    # One state serves the whole process: the example's own Accelerator finds it as it is left here, which is as
    # AcceleratorState's constructor leaves it on GPUs.
    Accelerator()
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision(AcceleratorState().mixed_precision)
    for state in (PartialState, AcceleratorState):  # each construction copies from the first to the second
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    train_accelerate.train(train_accelerate.parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
