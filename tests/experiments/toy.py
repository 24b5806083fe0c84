"""A study small enough to watch: it counts, keeps each count, and can be told to fail."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from experiments.config import INPUT, NOT_HASHED, RunOptions

if TYPE_CHECKING:
    from experiments.run_folder import Outcome, RunFolder


@dataclass(frozen=True)
class Counting(RunOptions):
    """Count, one number at a time.

    $ ablate count --numbers 0 1 2
    """

    numbers: tuple[int, ...] = (0, 1, 2)
    """What to count."""
    source: str = field(default="nowhere", metadata=INPUT)
    """A file the result depends on."""
    fail: Literal[
        "no", "refuse", "refuse-late", "bug", "key", "kill", "terminate", "interrupt", "disk"
    ] = "no"
    """How the study ends."""
    width: int = field(default=8, metadata=NOT_HASHED)
    """Changes the cost alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(number < 0 for number in self.numbers):
            raise ValueError(f"--numbers {self.numbers}: numbers start at 0, give no less")

    def run(self, folder: RunFolder) -> Outcome:
        import pandas as pd

        from experiments.run_folder import Outcome

        if self.fail == "refuse":
            raise ValueError("no model colossus:\n the bundled one is tiny; give that")
        folder.create()
        counted = 0
        for number in self.numbers:
            if folder.partial(f"count {number}") is None:
                counted += 1
                row = {"number": number, "metric": "count", "value": float(number)}
                folder.keep(f"count {number}", pd.DataFrame([row]))
            self._fail(number)
        shards = [
            shard for n in self.numbers if (shard := folder.partial(f"count {n}")) is not None
        ]
        outcome = Outcome(f"counted to {max(self.numbers)}", {"counted": counted})
        return folder.finish(outcome, pd.concat(shards, ignore_index=True))

    def _fail(self, number: int) -> None:
        if number < 1:
            return
        if self.fail == "refuse-late":
            raise LookupError(f"L0H{number} gives NaN on example 3: the weights are damaged")
        if self.fail == "bug":
            raise RuntimeError("a bug")
        if self.fail == "key":
            raise KeyError("gone")
        if self.fail == "disk":
            raise OSError(28, "No space left on device", "somewhere")
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        ends = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}
        if self.fail in ends and not os.environ.get("SPARE"):
            os.kill(os.getpid(), ends[self.fail])
