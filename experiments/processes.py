"""Several processes for one study: each with its share of the cores, none outlives the study."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait


def processes(jobs: int) -> ProcessPoolExecutor:
    """A pool of `jobs` fresh interpreters; torch in each has its share of this machine's threads.

    A worker ends at once when the study is killed. Left to themselves, a pool's workers would go
    on writing into a run folder that the same command may take up again meanwhile.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (threads,))


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    study = parent_process()
    assert study is not None

    def end_with_it() -> None:
        wait([study.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
