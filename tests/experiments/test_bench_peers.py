"""Every contender computes the same table, and the plain loop computes the right one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ablate import FFN, Head, HookedModel
from experiments.bench.arithmetic import Weights
from experiments.bench.ours import ours
from experiments.bench.peers import AGAINST, PEERS
from experiments.bench.works import (
    KINDS,
    Name,
    Work,
    cost,
    questions,
    repeated_rows,
    spread,
    token_rows,
)
from tests.experiments.tiny_opt import write_tiny_opt

NONE = np.zeros((0, 0), int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model"))


def work_of(model: HookedModel, name: Name) -> Work:
    if KINDS[name] == "choices":
        examples = questions(["pair_mapping"], 3, 0, shared=name == "choices-shared")
        return Work(name, NONE, 0, examples, model.components[::2])
    if KINDS[name] == "induction":
        return Work(name, repeated_rows(model, 3, 38, seed=0), 0, (), model.heads)
    rows = token_rows(model, 3, 14, seed=0)
    scored = 13 if name == "sweep" else 3
    return Work(name, rows, scored, (), model.components)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        (n, p)
        for n in KINDS
        if KINDS[n] in AGAINST and n != "sweep-layer"
        for p in AGAINST[KINDS[n]]
    ],
)
def test_a_peers_numbers_are_ours(name: Name, peer: str, folder: Path):
    model, theirs = (HookedModel.from_pretrained(folder) for _ in range(2))
    work = work_of(model, name)
    found, expected = ours(model, work)(), PEERS[peer](theirs, work)()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < (1e-5 if KINDS[name] == "induction" else 1e-4)
    assert np.abs(found - found[0]).max() > 1e-2  # the components matter here


def test_the_plain_loop_equals_zeroed_weights(folder: Path):
    model = HookedModel.from_pretrained(folder)
    work = work_of(model, "sweep-answers")
    losses = PEERS["hf-loop"](model, work)()
    ids = torch.from_numpy(work.rows)
    for row, component in enumerate(work.components, start=1):
        hurt = copy.deepcopy(model.model)
        layer = hurt.model.decoder.layers[component.layer]
        with torch.no_grad():
            if isinstance(component, Head):
                layer.self_attn.out_proj.weight[:, 8 * component.head :][:, :8] = 0
            else:
                assert isinstance(component, FFN)
                layer.fc2.weight.zero_()
                layer.fc2.bias.zero_()
            log_p = hurt(ids).logits.log_softmax(-1)
        expected = [
            -np.mean([float(log_p[r, t - 1, ids[r, t]]) for t in (11, 12, 13)]) for r in range(3)
        ]
        assert losses[row] == pytest.approx(np.array(expected), abs=1e-5)


def test_a_scan_equals_plain_loops_over_eager_patterns(folder: Path):
    model = HookedModel.from_pretrained(folder)
    work = work_of(model, "induction")
    assert work.label == "induction-38"
    found = ours(model, work)()
    model.model.set_attn_implementation("eager")
    out = model.model(torch.from_numpy(work.rows), output_attentions=True)
    patterns = torch.stack(out.attentions, 1).flatten(1, 2).detach().numpy()  # [row, head, q, k]
    assert found.shape == (4, 3, patterns.shape[1])
    for row, ids in enumerate(work.rows.tolist()):
        keys: list[list[list[int]]] = [[], [], [], []]
        for q in range(38):
            earlier = [k for k in range(q) if ids[k] == ids[q]]
            keys[0].append([k + 1 for k in earlier])
            keys[1].append(earlier)
            keys[2].append([q - 1] if q else [])
            keys[3].append([0] if q else [])
        for score, of_queries in enumerate(keys):
            for head, pattern in enumerate(patterns[row]):
                sums = [sum(pattern[q, k] for k in of_q) for q, of_q in enumerate(of_queries)]
                expected = sum(sums) / sum(map(bool, of_queries))
                assert found[score, row, head] == pytest.approx(expected, abs=1e-6)


def test_rows_of_a_scan_repeat_themselves(folder: Path):
    model = HookedModel.from_pretrained(folder)
    rows = repeated_rows(model, 2, 38, seed=0)
    assert (rows[:, 0] == 2).all()
    for row in rows.tolist():
        block = row[1:11]
        assert len(set(block)) == 10  # four copies, the last one cut
        assert row[1:] == (4 * block)[:37]
    assert rows[0].tolist() != rows[1].tolist()
    with pytest.raises(ValueError, match="has 280 tokens, too few for 500 distinct"):
        repeated_rows(model, 1, 2001, seed=0)


def test_a_forward_is_the_last_tokens_loss(folder: Path):
    model = HookedModel.from_pretrained(folder)
    work = work_of(model, "forward")
    ids = torch.from_numpy(work.rows)
    log_p = model.model(ids).logits.detach().log_softmax(-1)
    expected = [[-float(log_p[r, -2, ids[r, -1]]) for r in range(3)]]
    assert ours(model, work)() == pytest.approx(np.array(expected), abs=1e-5)


def test_demonstrations_are_shared_or_not():
    own = questions(["pair_mapping"], 4, 0, shared=False)
    assert len({example.group for example in own}) == len(own) == 4
    together = questions(["pair_mapping"], 4, 0, shared=True)
    assert len({example.group for example in together}) == 1
    assert len(together) == 5
    with pytest.raises(ValueError, match="--limit 1000: pair_mapping has 100 such examples"):
        questions(["pair_mapping"], 1000, 0, shared=False)


def test_sharing_lowers_the_fewest_operations_only(folder: Path):
    model = HookedModel.from_pretrained(folder)
    costs = {n: cost(model, work_of(model, n)) for n in ("choices", "choices-shared")}
    bounds = {name: of.peer / of.fewest for name, of in costs.items()}
    assert 3 < bounds["choices"] < bounds["choices-shared"]
    for of in costs.values():
        assert of.fewest < of.grouped <= of.peer


def layers_of(components: Sequence[Head | FFN]) -> list[int]:
    return [component.layer for component in components]


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13, 40, 155, 156, 400])
def test_a_subset_is_spread_in_proportion_and_not_upwards(count: int):
    from experiments.bench import shapes

    model = shapes.outline("opt-768", "float32", 0)
    chosen = spread(model, count)
    assert len(set(chosen)) == len(chosen) == min(count, 156)
    ffns = [c for c in chosen if isinstance(c, FFN)]
    assert len(ffns) == max(1, round(len(chosen) * 12 / 156))
    heads = [c for c in chosen if isinstance(c, Head)]
    for part in (ffns, heads):
        # Lower layers cost us more: a subset may flatter the peer, never us.
        assert not part or np.mean(layers_of(part)) <= 5.5
    assert Weights.of(model).blocks == 12
