"""How do several processes train the same students, each on its share of the rows?

All processes hold the base and all students. Of P processes, process r takes the r-th P-th of the
rows of every batch. What one process computes from the whole batch are ratios of sums over rows,

    lm, logits    Σ loss / number of predicted targets
    hidden        Σ |out − y|² / Σ |y − x|²

so each process divides its own sums by everybody's denominators (`total`), and the gradients are
added (`add_`): the gradients of one process up to the order of additions, for shares of any size.
Clipping, AdamW and averages follow on every process alike. Held-out batches are dealt out, and
their sums added. Process 0 alone writes; all resume from what it wrote.

    torchrun --nproc-per-node 2 -m experiments reset
    accelerate launch --multi_gpu --num_processes 2 -m experiments reset

Where it misleads. `accelerate launch --cpu` starts a single process whatever --num_processes says,
unless it has mpirun; `joined` says so. The --multi_gpu launcher starts them on a CPU too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.objectives import Batch

BUCKET = 2**24
"""Numbers that are sent at a time, about; a larger tensor goes alone."""
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started."""


@dataclass(frozen=True)
class Share:
    """Which of how many processes this is; the default is one process, for which nothing is done.

    Attributes:
        device: where its backend adds tensors up.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def of(self, batch: Batch) -> Batch:
        """This process's rows of a batch that all of them have.

        Raises ValueError, on all of them, for fewer rows than processes.
        """
        if self.count == 1:
            return batch
        rows = len(batch.targets)
        if rows < self.count:
            raise ValueError(
                f"a step of {rows} row{'s' * (rows != 1)} for {self.count} processes: give steps of"
                f" at least {self.count} rows, or start fewer processes"
            )
        return batch.take(torch.arange(rows).tensor_split(self.count)[self.rank])

    def deals(self, i: int) -> bool:
        """Whether the i-th of some independent things is this process's."""
        return i % self.count == self.rank

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes; for one, `value` itself."""
        if self.count == 1:
            return value
        summed = value.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(summed)
        return summed.to(value.device)

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into every tensor; all have one dtype."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= BUCKET:
                self._add_bucket_(bucket)
                bucket = []
        if bucket:
            self._add_bucket_(bucket)

    def _add_bucket_(self, bucket: list[Tensor]) -> None:
        first = bucket[0]
        if len(bucket) == 1 and first.is_contiguous() and first.device == self.device:
            torch.distributed.all_reduce(first)  # no copy of what is large
            return
        flat = torch.cat([tensor.flatten().to(self.device) for tensor in bucket])
        torch.distributed.all_reduce(flat)
        for tensor, mine in zip(
            bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True
        ):
            tensor.copy_(mine.view_as(tensor))

    def require_same(self, standing: Float[Tensor, "number"], what: str) -> None:
        """ValueError, on all processes, unless all give the numbers that process 0 gives."""
        if self.count == 1:
            return
        first = standing.double().to(self.device, copy=True)
        torch.distributed.broadcast(first, 0)
        same = torch.allclose(first.cpu(), standing.double().cpu(), rtol=1e-6, equal_nan=True)
        others = int(self.total(torch.tensor(0 if same else 1)))
        if others:
            raise ValueError(
                f"{others} of {self.count} processes have not the {what} of process 0: give all of"
                " them the same command, versions and files (--runs on a disk that all can see)"
            )

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Share()


def joined(*, cpu: bool = False, environment: Mapping[str, str] = os.environ) -> Share:
    """This process among those that accelerate or torchrun started; `ALONE` without them.

    With `cpu` no GPU is used. Raises ValueError for a launch that was meant to start several and
    started one.
    """
    if any(int(environment.get(name, 1)) > 1 for name in COUNTS):
        from accelerate import PartialState

        state = PartialState(cpu=cpu)
        device = torch.device(state.device or "cpu")
        if device.type == "cpu":
            device = torch.device("cpu")  # accelerate's has a number
        return Share(state.process_index, state.num_processes, device)
    if "ACCELERATE_USE_CPU" in environment and "MASTER_PORT" in environment:
        raise ValueError(
            "several processes asked of accelerate launch --cpu, which starts one (more need"
            " mpirun): use torchrun --nproc-per-node 2 -m experiments …, or accelerate launch"
            " --multi_gpu --num_processes 2 -m experiments …, which runs on a CPU too"
        )
    return ALONE
