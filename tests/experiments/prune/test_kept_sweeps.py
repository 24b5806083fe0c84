"""A sweep that was killed goes on with the batches it has not swept, to the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablate.hooked import HookedModel
from ablate.masks import Mask
from experiments.prune.kept_sweeps import kept_log_likelihoods
from experiments.run_folder import RunFolder
from probes import scoring
from probes.scoring import Prepared, log_likelihoods, prepare
from probes.tasks import Example
from tests.experiments.tiny_opt import write_tiny_opt
from tests.experiments.toy import Counting

MASKS = [Mask(), Mask.parse("L0H1"), Mask.parse("L1F"), Mask.parse("L0H0,L1H1")]
EXAMPLES = [
    Example(
        f"def read(self):\n{'    value = self.value' * n}\n    return", (" value", " self"), 0, n
    )
    for n in range(5)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return HookedModel.from_pretrained(write_tiny_opt(tmp_path_factory.mktemp("opt")))


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that are swept from now on."""
    numbers: list[int] = []

    def counting(*args: Any, **options: Any) -> Any:
        numbers.extend(options["batches"])
        return marked(log_likelihoods(*args, **options))

    monkeypatch.setattr(scoring, "log_likelihoods", counting)
    return numbers


def marked(found: Any) -> Any:
    """A random model is never right: some of its answers are called so here."""
    return found[0], np.floor(found[0]) % 2 == 0


def batched(model: HookedModel) -> Prepared:
    prepared = prepare(model, EXAMPLES, layout="rows", batch_tokens=1)
    assert len(prepared.batches) >= 5
    return prepared


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_killed_sweep_goes_on(
    done: int, model: HookedModel, tmp_path: Path, swept: list[int]
) -> None:
    prepared = batched(model)
    study = Counting(runs=tmp_path)
    ticks: list[int] = []

    def killed() -> None:
        ticks.append(0)
        if len(ticks) == done + 1:
            raise KeyboardInterrupt

    with RunFolder.for_study("count", study) as folder:
        folder.create()
        with pytest.raises(KeyboardInterrupt):
            kept_log_likelihoods(folder, "curve", model, prepared, MASKS, tick=killed)
    assert swept == list(range(done + 1))
    swept.clear()
    with RunFolder.for_study("count", study) as folder:
        folder.create()
        ticks = [-9] * 99
        found = kept_log_likelihoods(folder, "curve", model, prepared, MASKS, tick=killed)
        assert swept == list(range(done + 1, len(prepared.batches)))
        assert len(ticks) == 99 + len(prepared.batches), "the bar counts what is there too"
        swept.clear()
        again = kept_log_likelihoods(folder, "curve", model, prepared, MASKS)
        assert swept == []
    whole = marked(log_likelihoods(model, prepared, MASKS))
    assert whole[1].any()
    assert not whole[1].all()
    for values in (found, again):
        assert np.array_equal(values[0], whole[0])
        assert np.array_equal(values[1], whole[1])


def test_other_keys_are_other_shards(model: HookedModel, tmp_path: Path, swept: list[int]) -> None:
    prepared = batched(model)
    with RunFolder.for_study("count", Counting(runs=tmp_path)) as folder:
        folder.create()
        one, _ = kept_log_likelihoods(folder, "one", model, prepared, MASKS[:1])
        other, _ = kept_log_likelihoods(folder, "other", model, prepared, MASKS[1:2])
    assert len(swept) == 2 * len(prepared.batches)
    assert not np.allclose(one, other, atol=1e-3)
