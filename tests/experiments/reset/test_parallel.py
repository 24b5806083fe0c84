"""Two processes against one: the same curves, checkpoints that either takes up, one that writes."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from ablate.reset import Place
from experiments.objectives import Batch
from experiments.reset.learning.parallel import ALONE, Share, joined
from experiments.reset.learning.session import Session, retrain
from experiments.reset.learning.treatments import Treatment
from experiments.reset.learning.whole import retrain_whole
from tests.experiments.reset.sessions import session

VALUES = ["loss", "gap", "stderr", "loss_base", "loss_reset", "loss_skip"]
CASES = {"opt": 5, "bert": 2, "t5": 3}
"""Family -> rows of a step: uneven shares, rows of which nothing is predicted."""


WHOLE = (
    Treatment("A3", (Place(0),), (), scope="all", rate=1e-3),
    Treatment("A7", (), (), scope="scratch", rate=1e-3),
    Treatment("A8", (), (Place(1),), target="mix", scope="random-context", rate=1e-3),
)
"""Students that are trained the plain way."""


def asked(family: str, share: Share = ALONE, rows: int = 0, **options: object) -> Session:
    """Students of every target, of two layers and of a part."""
    stack = "decoder" if family == "t5" else ""
    one, other = Place(0, stack=stack), Place(1, "ffn", stack)
    treatments = [
        *(
            Treatment("A0", (one,), (one,), "moments", target, rate=1e-2)
            for target in ("lm", "hidden", "logits", "mix")
        ),
        Treatment("A0", (one,), (one,), "moments", "hidden", 1, 3e-3),
        Treatment("A9", (other,), (other,), "moments"),
    ]
    return session(
        family, treatments, stack=stack or None, batch=rows or CASES[family], share=share, **options
    )


class KilledError(Exception):
    """What ends a session in the middle."""


def killed(asked: Session, checkpoint: Path) -> None:
    """Run a session to its fourth step, keeping every state."""

    def die(step: int, _: int) -> None:
        if step == 4:
            raise KilledError

    with pytest.raises(KilledError):
        retrain(asked, checkpoint, progress=die)


def work(rank: int, port: int, folder: Path) -> None:
    """What each of the two processes does; files tell the test about it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the test holds the port
    torch.set_num_threads(1)
    share = joined(cpu=True)
    assert share == Share(rank, 2)
    for family in CASES:
        rows = retrain(asked(family, share))
        rows.to_parquet(folder / f"{family}-{rank}.parquet")
    for treatment in WHOLE:
        rows = retrain_whole(asked("opt", share, save_every=0), treatment, folder / f"w{rank}")
        rows.to_parquet(folder / f"{treatment.arm}-{rank}.parquet")
        (folder / "w0").unlink(missing_ok=True)
        share.wait()
    killed(asked("opt", share, save_every=0), folder / f"two-{rank}.safetensors")
    share.wait()
    for one in ("one", "two-0"):
        rows = retrain(asked("opt", share), folder / f"{one}.safetensors")
        rows.to_parquet(folder / f"{one}-{rank}.parquet")
    refusals = []
    for other in (
        asked("opt", share, rows=1),
        asked("opt", share, rows=5, parts=5),
        session("opt", [Treatment("A0", (Place(rank),), (Place(rank),), "moments")], share=share),
    ):
        try:
            retrain(other)
        except ValueError as error:
            refusals.append(str(error))
    (folder / f"refusals-{rank}").write_text("\n".join(refusals))
    torch.distributed.destroy_process_group()


def guarded(rank: int, port: int, folder: Path) -> None:
    """`work`, with what it raised in a file: the parent sees only that it failed."""
    try:
        work(rank, port, folder)
    except BaseException:
        (folder / f"failure-{rank}").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    path = tmp_path_factory.mktemp("two")
    killed(asked("opt", save_every=0), path / "one.safetensors")
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    try:
        spawn(guarded, (store.port, path), nprocs=2)
    except ProcessRaisedException:
        pytest.fail("\n".join(file.read_text() for file in path.glob("failure-*")))
    return path


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """The same rows but for the seconds, losses to 1e-5."""
    keys = [c for c in one.columns if c not in (*VALUES, "seconds", "source_use")]
    pd.testing.assert_frame_equal(one[keys], other[keys])
    if "source_use" in one:  # a ratio of differences, some of them of a thousandth of a nat
        np.testing.assert_allclose(one["source_use"], other["source_use"], rtol=1e-2, atol=1e-3)
    for name in VALUES:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CASES)
def test_two_processes_have_the_curves_of_one(family: str, folder: Path) -> None:
    alone = retrain(asked(family))
    for rank in (0, 1):
        same(pd.read_parquet(folder / f"{family}-{rank}.parquet"), alone)


@pytest.mark.parametrize("treatment", WHOLE, ids=lambda t: t.arm)
def test_whole_models_too(treatment: Treatment, folder: Path) -> None:
    alone = retrain_whole(asked("opt"), treatment)
    for rank in (0, 1):
        same(pd.read_parquet(folder / f"{treatment.arm}-{rank}.parquet"), alone)
    assert not (folder / "w1").exists()


@pytest.mark.parametrize("kept", ["one", "two-0"])
def test_two_processes_take_up_what_one_or_two_left(kept: str, folder: Path) -> None:
    whole = pd.read_parquet(folder / "opt-0.parquet")
    for rank in (0, 1):
        same(pd.read_parquet(folder / f"{kept}-{rank}.parquet"), whole)


def test_one_process_takes_up_what_two_left_and_only_the_first_writes(folder: Path) -> None:
    same(retrain(asked("opt"), folder / "two-0.safetensors"), retrain(asked("opt")))
    assert not (folder / "two-1.safetensors").exists()


def test_what_is_refused_is_refused_by_both(folder: Path) -> None:
    for rank in (0, 1):
        rows, parts, others = (folder / f"refusals-{rank}").read_text().splitlines()
        assert rows.startswith("a step of 1 row for 2 processes: give steps of at least 2 rows")
        assert rows == parts
        assert others.startswith("1 of 2 processes have not the students of process 0")


def test_a_launch_that_started_one_process_of_several_is_refused() -> None:
    assert joined(environment={}) is ALONE
    assert joined(environment={"WORLD_SIZE": "1", "RANK": "0"}) is ALONE
    launched = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(ValueError, match=r"starts one .*use torchrun --nproc-per-node 2"):
        joined(environment=launched)


def test_shares_are_all_rows_once() -> None:
    rows = torch.arange(7)
    batch = Batch({"input_ids": rows[:, None]}, rows[:, None], 7)
    parts = [Share(rank, 3).of(batch).targets.flatten() for rank in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat(parts), rows)
    assert [sum(Share(rank, 3).deals(i) for rank in range(3)) for i in range(5)] == [1] * 5
    assert ALONE.of(batch) is batch
    assert ALONE.total(rows) is rows
