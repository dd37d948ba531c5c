"""The processes that torchrun or accelerate launch started for one output, and how they wait for each other."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from qsurgeon.checkpoint.writing.layout import Shard
from qsurgeon.errors import OtherRankError

# Rank 0 may download for hours while the others wait, and one may have a file more than another. A process that is gone
# is noticed at once, by its connection.
PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``world`` of them; alone it waits for nobody."""

    rank: int = 0
    world: int = 1
    group: Any = None

    def share(self, value: Any) -> Any:
        """Return what rank 0 calls this with; the others wait for it. Raises: OtherRankError if that never comes."""
        if self.world == 1:
            return value
        box = [value]
        try:
            dist.broadcast_object_list(box, src=0, group=self.group)
        except RuntimeError as error:
            raise OtherRankError(f"rank {self.rank}: rank 0 is gone") from error
        return box[0]

    def wait(self) -> None:
        """Return when every process has come here. Raises: OtherRankError if one never will."""
        if self.world == 1:
            return
        try:
            dist.barrier(group=self.group)
        except RuntimeError as error:
            raise OtherRankError(f"rank {self.rank}: another rank is gone") from error

    def mine(self, shards: Sequence[Shard]) -> tuple[Shard, ...]:
        """Return the files that this process writes: each goes to whoever has the least to read."""
        load = [0] * self.world
        owners: dict[str, int] = {}
        for shard in sorted(shards, key=lambda one: -sum(job.source.size for job in one.jobs)):
            owner = load.index(min(load))
            load[owner] += sum(job.source.size for job in shard.jobs)
            owners[shard.file] = owner
        return tuple(shard for shard in shards if owners[shard.file] == self.rank)


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun (or what speaks as it does) started this process as one of several."""
    return together(environment) > 1


def together(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes were launched together, this one among them."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    return int(environment["WORLD_SIZE"]) if named else 1


def leads(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the one of those that were launched together that speaks to the user."""
    return not launched(environment) or environment["RANK"] == "0"


def ranks() -> Ranks:
    """Return this process's place among those that were launched with it, over gloo."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))
