"""Workers of a study: their share of the cores, and none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.processes import processes

STUDY = """
import time
from experiments.processes import processes
if __name__ == "__main__":
    with processes(1) as pool:
        print(pool.submit(__import__("os").getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
"""


def test_threads_are_shared() -> None:
    jobs = os.cpu_count() or 1
    with processes(jobs) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1


def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    study = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert study.stdout is not None
    worker = Path("/proc", study.stdout.readline().strip())
    assert worker.exists()
    study.send_signal(signal.SIGKILL)
    study.wait()
    study.stdout.close()
    until = time.monotonic() + 30
    while worker.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not worker.exists()
