"""How are contenders timed side by side without one disturbing the other?

Each contender lives in a process of its own, with its own copy of the model, and waits; the parent
asks them in turn, so that only one runs at a time, in the same minutes on the same machine. A run
is timed inside its process, from text or token ids to values. Memory is the highest resident size
during the run (Linux; the mark is reset before), on a CUDA device what torch allocated at most.

A process that dies (out of memory, say) ends the benchmark with one line, never with a wait.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    import torch
    from jaxtyping import Float

    from experiments.bench.ours import Run
    from experiments.bench.works import Work

OURS = "ours"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SIDES = {"cpu": 3072, "cuda": 8192}
"""Side of the square matrices whose product is the ceiling, by type of device."""


@dataclass(frozen=True)
class Setting:
    """What both sides share: the model, where and how it is loaded, and the threads."""

    model: str
    dtype: str
    device: str
    threads: int | None
    seed: int


@dataclass(frozen=True, eq=False)
class Measured:
    """One run of one contender.

    Attributes:
        seconds: of wall clock.
        values: what it computed, as `works.py` lays them out.
        peak: bytes at the highest point of the run.
        before: bytes when its model was loaded and nothing had run.
    """

    seconds: float
    values: Float[np.ndarray, "..."]
    peak: int
    before: int


class Worker:
    """One contender in its process; leaving the context ends it."""

    def __init__(self, contender: str, setting: Setting, work: Work) -> None:
        self.what = f"{contender} ({work.name} on {setting.model} in {setting.dtype})"
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=serve, args=(theirs, contender, setting, work), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()  # an idle worker ends by itself
        if error is not None:
            self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def wait_until_ready(self) -> None:
        """Until the model is loaded. ChildProcessError when it cannot be."""
        self._answer()

    def run(self) -> Measured:
        """Have the work done once. ChildProcessError when the process dies or refuses."""
        return self._ask("run")

    def matmul_rate(self) -> float:
        """Operations a second of a large product of this dtype, here and now."""
        return self._ask("rate")

    def _ask(self, word: str) -> Any:
        with suppress(BrokenPipeError):  # it is dead: `_answer` says so
            self._connection.send(word)
        return self._answer()

    def _answer(self) -> Any:
        wait([self._connection, self._process.sentinel])
        try:
            refused, answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise ChildProcessError(f"{self.what} {_ending(self._process.exitcode)}") from None
        if refused:
            raise ChildProcessError(f"{self.what}: {answer}")
        return answer


def serve(connection: Connection, contender: str, setting: Setting, work: Work) -> None:
    """The life of a worker: load, say so, then run as often as asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    import torch
    from transformers.utils import logging as transformers_logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    try:
        run = prepared(contender, setting, work)
        device = torch.device(setting.device)
        loaded = _allocated(device)  # later runs start higher: not all memory is given back
        connection.send((False, "ready"))
        while True:
            if connection.recv() == "run":
                connection.send((False, replace(measured(run, device), before=loaded)))
            else:
                connection.send((False, matmul_rate(setting.device, setting.dtype)))
    except (ValueError, LookupError, NotImplementedError, torch.OutOfMemoryError) as error:
        connection.send((True, " ".join(f"{type(error).__name__}: {error}".split())))
    except (EOFError, ConnectionResetError, BrokenPipeError):  # the parent is gone
        sys.exit(0)


def prepared(contender: str, setting: Setting, work: Work) -> Run:
    """The contender with its model loaded, ready to run."""
    from experiments.bench import hybrids, shapes
    from experiments.bench.ours import ours
    from experiments.bench.peers import PEERS

    if work.kind == "hybrid":
        return hybrids.prepared(contender, setting, work)
    model = shapes.load(setting.model, setting.dtype, setting.device, setting.seed)
    return ours(model, work) if contender == OURS else PEERS[contender](model, work)


def measured(run: Run, device: torch.device) -> Measured:
    """One run: its time, its values, its memory and that just before it."""
    import torch

    cuda = device.type == "cuda"
    before = _allocated(device)
    started = time.perf_counter()
    values = run()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) if cuda else _resident()
    return Measured(seconds, values, peak, before)


def matmul_rate(device: str, dtype: str, *, side: int | None = None, tries: int = 3) -> float:
    """Operations a second of the best of several products of two square matrices.

    Raises ValueError for a dtype in which this device multiplies no matrices.
    """
    import torch

    kind = torch.device(device)
    side = side or SIDES.get(kind.type, SIDES["cpu"])
    generator = torch.Generator(kind).manual_seed(0)
    numbers = torch.randn(side, side, device=kind, generator=generator)
    best = float("inf")
    try:
        matrix = numbers.to(getattr(torch, dtype))
        for _ in range(tries):
            started = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # reading an entry waits for an asynchronous device
            best = min(best, time.perf_counter() - started)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"dtype {dtype} on {device}: it multiplies no such matrices ({reason}); "
            "give another of --dtypes"
        ) from None
    return 2 * side**3 / best


def turns(contenders: Sequence[str], repeats: int) -> list[list[str]]:
    """Who runs when: every contender once a round, forwards and backwards in turn."""
    return [list(contenders)[:: -1 if r % 2 else 1] for r in range(repeats)]


def _allocated(device: torch.device) -> int:
    """Bytes in use now, from where the highest point counts from here on."""
    import torch

    if device.type != "cuda":
        return _resident(reset=True)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _resident(*, reset: bool = False) -> int:
    """Bytes of the highest resident size so far; `reset` sets the mark to the present size."""
    if not STATUS.exists():  # no Linux: the highest since the process began
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        CLEAR.write_text("5")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was killed by {name}{why}: give fewer --rows or a shorter --length"
    return f"ended with exit code {code}: its own words are above"
