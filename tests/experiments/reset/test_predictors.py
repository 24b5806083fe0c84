"""Is each predictor what its formula says, computed the plain way on a copy of the model?"""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from ablate.places import Place, places_of, weights_at
from ablate.reset import fingerprints, reset_
from ablate.stack import record
from experiments.corruption import Infilling, Masking, Spans
from experiments.objectives import Batch, NextToken, Task, loss
from experiments.reset.statistics.linearity import PENALTIES, Moments, linear_cka, linear_r2
from experiments.reset.statistics.predictors import predictors
from tests.families import VOCAB, tiny

TASKS: dict[str, Task] = {
    "opt": NextToken(),
    "gpt2": NextToken(),
    "jamba": NextToken(),
    "bert": Masking(3, 4, VOCAB),
    "t5": Spans(tuple(range(4, 12)), eos=1, start=0),
    "bart": Infilling(3, pad=0, start=2),
}


def batches(family: str) -> list[Batch]:
    """Two batches of unequal size, with their task's masks."""
    draw = torch.Generator().manual_seed(0)
    return [
        TASKS[family](
            torch.randint(12, VOCAB, (rows, 12), generator=draw), np.random.default_rng(rows)
        )
        for rows in (5, 3)
    ]


def mean_loss(model: nn.Module, given: list[Batch]) -> Tensor:
    """The mean over all targets of all batches, by the model's own forward."""
    total, count = torch.zeros(()), 0
    for batch in given:
        predicted = int((batch.targets >= 0).sum())
        total = total + loss(model(**batch.inputs).logits, batch) * predicted
        count += predicted
    return total / count


def value(frame: pd.DataFrame, place: Place, predictor: str) -> float:
    rows = frame[
        (frame["stack"] == place.stack)
        & (frame["layer"] == place.layer)
        & (frame["predictor"] == predictor)
    ]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


@pytest.mark.parametrize("family", TASKS)
def test_every_predictor_the_plain_way(family: str) -> None:
    model, given = tiny(family), batches(family)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before, flags = fingerprints(model), [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    initial = dict(tiny(family, seed=7).named_parameters())
    frame = predictors(model, given, initial=initial, seeds=(4, 5))
    assert fingerprints(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert list(frame.columns) == ["stack", "layer", "predictor", "value"]
    places = places_of(model)
    assert len(frame) == 7 * len(places)
    for place in places:
        own = weights_at(model, place)
        square = sum(float((own[n] - initial[n]).detach().double().square().sum()) for n in own)
        assert value(frame, place, "distance") == pytest.approx(math.sqrt(square))
        _check_skip(model, given, place, value(frame, place, "skip"))
        norms = []
        for seed in (4, 5):
            twin = copy.deepcopy(model)
            new = reset_(twin, place, seed=seed)
            mean_loss(twin, given).backward()
            gradients = [p.grad for p in new.values() if p.grad is not None]
            norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        expected = sum(norms) / 2
        assert value(frame, place, "gradient_norm") == pytest.approx(expected, rel=1e-3)
    place = places[-1]
    twin, total, rows = copy.deepcopy(model), 0.0, 0
    own = weights_at(twin.requires_grad_(True), place)
    for batch in given:
        for row in range(len(batch.targets)):
            twin.zero_grad()
            mean_loss(twin, [batch.take(torch.tensor([row]))]).backward()
            total += sum(float(p.grad.square().sum()) for p in own.values() if p.grad is not None)
            rows += 1
    assert value(frame, place, "fisher") == pytest.approx(total / rows, rel=1e-3)


def _check_skip(model: nn.Module, given: list[Batch], place: Place, found: float) -> None:
    """Against the law that makes the block the identity, on a copy."""
    twin = copy.deepcopy(model)
    if model.config.model_type in ("bert", "bart"):
        assert math.isnan(found)
        return
    with torch.no_grad():
        clean = mean_loss(model, given)
        reset_(twin, place, "identity")
        assert found == pytest.approx(float(mean_loss(twin, given) - clean), abs=2e-5)
    assert abs(found) > 1e-3


@pytest.mark.parametrize("family", ["opt", "bart"])
def test_shapes_of_streams_the_plain_way(family: str) -> None:
    """Block influence, CKA and the choice of penalty, from the tokens themselves."""
    model, given = tiny(family), batches(family)
    frame = predictors(model, given, seeds=(0,))
    assert "distance" not in set(frame["predictor"])
    place = places_of(model)[1]
    xs, ys, quarters = [], [], []
    row = 0
    with torch.no_grad():
        for batch in given:
            run = record(model, batch.inputs, keep=(1, 2), stack=place.stack)
            for r in range(len(batch.targets)):
                seen = batch.inputs.get(
                    "attention_mask", torch.ones_like(batch.inputs["input_ids"])
                )
                keep = seen[r].bool()
                xs.append(run.resid(1)[r, keep].double())
                ys.append(run.resid(2)[r, keep].double())
                quarters += [row % 4] * int(keep.sum())
                row += 1
    x, y, quarter = torch.cat(xs), torch.cat(ys), torch.tensor(quarters)
    cosine = nn.functional.cosine_similarity(x, y, dim=-1).mean()
    assert value(frame, place, "block_influence") == pytest.approx(1 - float(cosine))
    xc, yc = x - x.mean(0), y - y.mean(0)
    kernels = xc @ xc.T, yc @ yc.T  # HSIC with linear kernels, token by token
    hsic = [
        float((a * b).sum())
        for a, b in ((kernels[0], kernels[1]), (kernels[0],) * 2, (kernels[1],) * 2)
    ]
    assert value(frame, place, "cka") == pytest.approx(hsic[0] / math.sqrt(hsic[1] * hsic[2]))
    fit, choose, test = quarter < 2, quarter == 2, quarter == 3

    def ridge(on: Tensor, penalty: float) -> Ridge:
        inputs = x[on].numpy()
        scaled = penalty * inputs.var(0).sum() * len(inputs) / inputs.shape[1]
        return Ridge(alpha=scaled, solver="cholesky").fit(inputs, (y - x)[on].numpy())

    def missed(map_: Ridge, on: Tensor) -> float:
        return float(((map_.predict(x[on].numpy()) - (y - x)[on].numpy()) ** 2).sum())

    best = min(PENALTIES, key=lambda penalty: missed(ridge(fit, penalty), choose))
    update = (y - x)[test]
    spread = float((update - update.mean(0)).square().sum())
    expected = 1 - missed(ridge(fit | choose, best), test) / spread
    assert value(frame, place, "linear_r2") == pytest.approx(expected, abs=1e-4)


def _moments(x: Tensor, y: Tensor) -> tuple[Moments, Moments, Moments]:
    streams = torch.stack([x, y]).unflatten(1, (-1, 10))
    row = torch.arange(streams.shape[1]) % 4
    chosen = torch.ones(streams.shape[1:3], dtype=torch.bool)
    parts = [Moments.of(streams, chosen & w[:, None]) for w in (row < 2, row == 2, row == 3)]
    return parts[0], parts[1], parts[2]


def test_linear_maps_noise_and_rotations() -> None:
    """R² is the share of the update that is linear; CKA does not see rotations and scales."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=draw, dtype=torch.float64) + 3
    a = torch.randn(8, 8, generator=draw, dtype=torch.float64)
    noise = torch.randn(4000, 8, generator=draw, dtype=torch.float64)
    assert linear_r2(*_moments(x, x + x @ a + 5), 0) == pytest.approx(1.0)
    half = (x @ a).var(0).mean() / noise.var(0).mean()
    parts = _moments(x, x + x @ a + noise * half.sqrt())
    assert linear_r2(*parts, 0) == pytest.approx(0.5, abs=0.05)
    assert abs(linear_r2(*_moments(x, x + noise), 0)) < 0.02
    assert abs(linear_r2(*_moments(x, x + (x - 3) ** 2), 0)) < 0.02  # all curve
    rotation = torch.linalg.qr(a)[0]
    whole = _moments(x, 2 * x @ rotation + 1)
    assert linear_cka(whole[0] + whole[1] + whole[2], 0) == pytest.approx(1.0)
    other = _moments(x, noise)
    assert linear_cka(other[0] + other[1] + other[2], 0) < 0.02
    assert math.isnan(linear_r2(*_moments(x, x), 0))  # no update, nothing to explain


def test_padding_says_nothing() -> None:
    """Sources of unequal length: what stands in the padding changes no predictor."""
    model, given = tiny("bart"), batches("bart")
    assert any((batch.inputs["attention_mask"] == 0).any() for batch in given)
    other = []
    for batch in given:
        ids = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, 17)
        other.append(Batch(batch.inputs | {"input_ids": ids}, batch.targets, batch.tokens))
    a, b = (predictors(model, rows, seeds=(0,)) for rows in (given, other))
    assert a["value"].to_numpy() == pytest.approx(b["value"].to_numpy(), rel=1e-4, nan_ok=True)


def test_what_cannot_be_predicted_from() -> None:
    model, given = tiny("opt"), batches("opt")
    with pytest.raises(ValueError, match="3 rows for predictors: give at least 4"):
        predictors(model, given[1:])
    with pytest.raises(ValueError, match="no seeds"):
        predictors(model, given, seeds=())
    with pytest.raises(ValueError, match="rewind|lack"):
        predictors(model, given, initial={})
    with pytest.raises(ValueError, match="call .eval"):
        predictors(tiny("opt").train(), given)
    with pytest.raises(ValueError, match="BertModel makes no logits"):
        predictors(tiny("bert-bare"), batches("bert"))
    model.model.decoder.layers[2].to("meta")
    with pytest.raises(ValueError, match="is offloaded"):
        predictors(model, given)
