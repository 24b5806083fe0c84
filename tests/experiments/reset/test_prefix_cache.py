"""Streams read from disk against computed ones: losses, kills, caps, keys, the rule."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ablate.reset import Place
from experiments.reset.learning import prefix_cache
from experiments.reset.learning.climb import Pass
from experiments.reset.learning.prefix_cache import PrefixCache, time_share
from experiments.reset.learning.session import Session, retrain
from experiments.reset.learning.treatments import Treatment
from experiments.reset.learning.whole import retrain_whole
from tests.experiments.reset.sessions import session
from tests.families import tiny

FAST, SLOW = 1e18, 1e-9


def treated(layer: int, target: str = "lm", stack: str = "") -> Treatment:
    place = Place(layer, "block", stack)  # pyright: ignore[reportArgumentType]
    return Treatment("A0", (place,), (place,), "moments", target, 0, 1e-2)  # pyright: ignore


def cached(model: nn.Module, folder: Path, **options: object) -> PrefixCache:
    """A cache that always reads."""
    given = {"dtype": torch.float32, "rate": 1.0, "bandwidth": FAST, **options}
    return PrefixCache(model, folder, **given)  # pyright: ignore[reportArgumentType]


def cycling(family: str, treatments: list[Treatment], model: nn.Module) -> Session:
    """Two steps' rows, over and over."""
    asked = session(family, treatments, model=model)
    order = dataclasses.replace(asked.objective.order, cycle=2)
    objective = dataclasses.replace(asked.objective, order=order)
    return dataclasses.replace(asked, objective=objective)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("opt", None), ("llama", torch.float32), ("gpt2", None), ("mamba", torch.bfloat16)],
)
def test_read_passes_train_as_computed_and_plain_ones(
    family: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    treatments = [treated(1), treated(1, "hidden"), treated(0, "mix")]
    model = tiny(family)
    asked = cycling(family, treatments, model)
    cache = cached(model, tmp_path, dtype=dtype)
    read = retrain(dataclasses.replace(asked, cache=cache))
    assert cache.read == asked.last - 2
    assert cache.facts()["passes_computed"] == 2
    computed = retrain(asked)
    close = 1e-6 if dtype is not torch.bfloat16 else 1e-3
    assert np.abs(read["loss"].to_numpy() - computed["loss"].to_numpy()).max() < close
    for treatment in treatments[:2]:
        alone = retrain_whole(asked, treatment)["loss"].to_numpy()
        mine = read[read["name"] == treatment.name]["loss"].to_numpy()
        assert np.abs(mine - alone).max() < 1e-3


def test_another_session_over_the_same_data_reads_from_the_start(tmp_path: Path) -> None:
    model = tiny("bert")
    asked = session("bert", [treated(1)], model=model)
    for expected in (0, asked.last - 1):  # the first pass shows how the blocks are called
        cache = cached(model, tmp_path)
        rows = retrain(dataclasses.replace(asked, cache=cache))
        assert cache.read == expected
    assert np.allclose(rows["loss"], retrain(asked)["loss"], atol=1e-6)


def test_what_was_half_written_at_a_kill_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("opt")
    batch = session("opt").batch(0)

    class KilledError(Exception):
        pass

    def die(_: int) -> None:
        raise KilledError

    cache = cached(model, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die)
        with pytest.raises(KilledError):
            cache.passing(batch, None, {1, 2})
    assert not list(tmp_path.rglob("*.stream"))
    assert list(tmp_path.rglob("*.unfinished"))
    again = cached(model, tmp_path)
    again.passing(batch, None, {1, 2})
    assert again.read == 0
    again.passing(batch, None, {1, 2})
    assert again.read == 1


def test_the_cap_is_kept_to(tmp_path: Path) -> None:
    asked = session("opt")
    size = Pass.of(asked.model, asked.batch(0)).recorded.resid(1).nbytes
    for _ in range(2):  # what is there already counts
        cache = cached(asked.model, tmp_path, cap=3 * size + 1)
        for step in range(5):
            cache.passing(asked.batch(step), None, {1, 2})
        kept = [file.stat().st_size for file in tmp_path.rglob("*.stream")]
        assert kept == [size] * 3
        assert cache.facts()["bytes_kept"] == sum(kept)


def test_only_the_same_weights_batch_precision_and_dtype_are_read(tmp_path: Path) -> None:
    asked = session("opt")
    first, second = asked.batch(0), asked.batch(1)
    cache = cached(asked.model, tmp_path)
    cache.passing(first, None, {2})
    cache.passing(second, None, {1})  # another stream of another batch
    cache.passing(second, None, {2})
    assert cache.read == 0
    found = cache.passing(second, None, {1, 2})
    true = Pass.of(asked.model, second, None, {1, 2})
    assert cache.read == 1
    for i in (1, 2):
        assert torch.equal(found.recorded.resid(i), true.recorded.resid(i))
    with torch.autocast("cpu", torch.bfloat16):
        cache.passing(second, None, {2})
    assert cache.read == 1
    other = tiny("opt")
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    for strange in (cached(other, tmp_path), cached(asked.model, tmp_path, dtype=torch.bfloat16)):
        for _ in range(2):
            strange.passing(first, None, {3})  # so that it knows the blocks' arguments
        before = strange.read
        strange.passing(second, None, {2})
        assert strange.read == before


def test_a_stream_that_changes_the_loss_is_refused(tmp_path: Path) -> None:
    asked = session("opt")
    batch = asked.batch(0)
    cached(asked.model, tmp_path).passing(batch, None, {2})
    (file,) = tmp_path.rglob("*.stream")
    file.write_bytes(np.random.default_rng(0).normal(size=file.stat().st_size // 4).astype("f4"))
    cache = cached(asked.model, tmp_path)
    cache.passing(asked.batch(1), None, {2})
    with pytest.raises(ValueError, match="resid_2 read from .* remove the folder"):
        cache.passing(batch, None, {2})


def test_padding_and_two_stacks_are_computed(tmp_path: Path) -> None:
    asked = session("t5", stack="decoder")
    cache = cached(asked.model, tmp_path)
    padded = session("opt").batch(0)
    mask = torch.ones_like(padded.targets)
    masked = dataclasses.replace(padded, inputs={**padded.inputs, "attention_mask": mask})
    for _ in range(2):
        cache.passing(asked.batch(0), "decoder", {1})
    cache = cached(tiny("opt"), tmp_path)
    for _ in range(2):
        cache.passing(masked, None, {1})
        cache.passing(padded, None, {0})  # costs nothing to compute
    assert not list(tmp_path.rglob("*.stream"))


def test_the_rule_of_reading_against_computing(tmp_path: Path) -> None:
    """The cases that the cost model names, and a disk too slow for a tiny model."""
    assert time_share(4e10, 1e9, 128, 3) == pytest.approx(4e10 / (12 * 128 * 3 * 1e9))
    assert time_share(4e14, 3e9, 768, 6) == pytest.approx(2.4, abs=0.02)
    assert time_share(4e14, 5e10, 768, 6) == pytest.approx(0.14, abs=0.01)
    assert time_share(4e14, 3e9, 2048, 12) == pytest.approx(0.45, abs=0.01)
    assert time_share(1e9, 1e9, 64, 4, streams=3, size=4) == pytest.approx(
        6 * time_share(1e9, 1e9, 64, 4)
    )
    asked = session("opt")
    slow = cached(asked.model, tmp_path, rate=1.0, bandwidth=SLOW)
    for _ in range(3):
        slow.passing(asked.batch(0), None, {2})
    assert slow.read == 0
    assert not list(tmp_path.rglob("*.stream"))
    (rule,) = slow.facts()["rules"]
    assert rule["streams"] == [2]
    assert rule["time_to_read_over_time_to_compute"] > 1


def test_the_machine_is_measured_once(tmp_path: Path) -> None:
    asked = session("opt")
    cache = PrefixCache(asked.model, tmp_path)
    cache.passing(asked.batch(0), None, {2})
    facts = cache.facts()
    assert facts["operations_per_second"] > 1e6
    assert facts["bytes_per_second"] > 1e4
    assert not list(tmp_path.rglob("*.sample"))
    assert prefix_cache.read_rate(tmp_path) == facts["bytes_per_second"]
