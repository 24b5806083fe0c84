"""Files come back as written, and a file for another model is refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pandas as pd
import pytest
import torch

from ablate import FFN, Head, HookedModel, KVGroup
from ablate.ranking_files import read_scores, write_scores
from tests.families import tiny

MODEL = HookedModel(tiny("opt"))  # 3 layers of 4 heads
SCORES = {c: (i * 0.1) ** 3 - 0.1 for i, c in enumerate(MODEL.components)}


def _refusal(path: Path, model: HookedModel = MODEL) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        read_scores(path, model)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("family", ["llama", "t5", "jamba"])
def test_what_was_written_is_read_exactly(family: str, suffix: str, tmp_path: Path):
    model = HookedModel(tiny(family))
    scores = {c: 1 / (i + 3) for i, c in enumerate(reversed(model.components))}
    write_scores(tmp_path / f"all{suffix}", scores)
    found = read_scores(tmp_path / f"all{suffix}", model)
    assert found == scores
    assert [p.name for p in tmp_path.iterdir()] == [f"all{suffix}"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_layers_and_heads_in_columns_come_in_the_models_order(suffix: str, tmp_path: Path):
    rows = [
        {"task": "x", "layer": h.layer, "head": h.head, "value": SCORES[h]}
        for h in reversed(MODEL.heads)
    ]
    path = tmp_path / f"heads{suffix}"
    table = pd.DataFrame(rows)
    table.to_csv(path) if suffix == ".csv" else table.to_parquet(path)
    found = read_scores(path, MODEL)
    assert tuple(found) == MODEL.heads
    assert found == {h: SCORES[h] for h in MODEL.heads}


def test_a_file_of_groups_fits_a_model_that_shares_keys(tmp_path: Path):
    model = HookedModel(tiny("llama"))
    groups = {KVGroup(layer, group): 1.0 + layer for layer in range(2) for group in range(2)}
    write_scores(tmp_path / "groups.csv", groups)
    assert read_scores(tmp_path / "groups.csv", model) == groups
    assert "scores 4 key/value groups and" in _refusal(tmp_path / "groups.csv")


def test_another_models_file_is_refused(tmp_path: Path):
    path = tmp_path / "other.csv"
    fewer = {c: v for c, v in SCORES.items() if c.layer < 2}
    write_scores(path, fewer)
    assert _refusal(path) == (
        "other.csv is for another model: it scores 8 heads and opt has 12; L2H0 is in the model "
        "only"
    )
    write_scores(path, SCORES | {Head(0, 4): 1.0})
    assert "13 heads and opt has 12; L0H4 is in the file only" in _refusal(path)
    write_scores(path, {FFN(layer): 0.0 for layer in range(4)})
    assert "4 FFNs and opt has 3; L3F is in the file only" in _refusal(path)
    write_scores(path, {Head(0, 0, "encoder"): 0.0})
    assert "1 heads in the stack 'encoder' and opt has 0" in _refusal(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "bad.csv is no csv table"),
        ("component,value\n", "no rows"),
        ("component,score\nL0H0,1\n", "has the columns component, score"),
        ("component,value\nL0X0,1\n", "row 1 of bad.csv: no component is written 'L0X0'"),
        ("component,value\nL0H0,1\nL0H0,2\n", "several rows for L0H0"),
        ("component,value\nL0H0,1\nL0H1,\n", "row 2 of bad.csv: the value of L0H1 is nan"),
        ("component,value\nL0H0,much\n", "row 1 of bad.csv: could not convert"),
        ("layer,head,value\n0,1.5,1\n", "a layer or head of 1.5"),
        ("layer,head,value\n0,-1,1\n", "head -1 of a Head"),
        ("layer,head,value\n0,,1\n", "row 1 of bad.csv"),
        ('component,value\n"L0H0,1\n', "bad.csv"),
    ],
)
def test_bad_tables_are_refused_in_one_line(text: str, words: str, tmp_path: Path):
    (tmp_path / "bad.csv").write_text(text)
    assert words in _refusal(tmp_path / "bad.csv")


def test_bad_files_are_refused_in_one_line(tmp_path: Path):
    assert "no ranking file" in _refusal(tmp_path / "absent.csv")
    (tmp_path / "text.parquet").write_text("component,value\n")
    assert "text.parquet is no parquet table" in _refusal(tmp_path / "text.parquet")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00component")
    assert "binary.csv is no csv table" in _refusal(tmp_path / "binary.csv")
    (tmp_path / "scores.json").write_text("{}")
    assert "scores.json is no ranking file: use one of" in _refusal(tmp_path / "scores.json")


def test_nothing_half_written_is_left(tmp_path: Path):
    with pytest.raises(ValueError, match="L0H0 is nan"):
        write_scores(tmp_path / "x.csv", {Head(0, 0): float("nan")})
    with pytest.raises(ValueError, match=r"use \.csv or \.parquet"):
        write_scores(tmp_path / "x.pkl", SCORES)
    assert not list(tmp_path.iterdir())


def test_the_references_pickles_become_scores(tmp_path: Path):
    heads = torch.randn(3, 4)
    (tmp_path / "piqa.pkl").write_bytes(pickle.dumps(heads))
    found = read_scores(tmp_path / "piqa.pkl", MODEL)
    assert found == {h: float(heads[h.layer, h.head]) for h in MODEL.heads}
    (tmp_path / "piqa_fc.pkl").write_bytes(pickle.dumps([2, 0, 1]))
    assert read_scores(tmp_path / "piqa_fc.pkl", MODEL) == {FFN(0): 1, FFN(1): 2, FFN(2): 0}
    # Another model's, another rank's, not finite, twice.
    for content, words in [
        (torch.zeros(4, 3), "12 heads and opt has 12; L3H0 is in the file only"),
        (torch.zeros(3), r"a tensor of shape [3]"),
        (torch.full((3, 4), torch.nan), "L0H0 is nan"),
        ([0, 1, 1], "lists a layer twice"),
        ([0, 1], "2 FFNs and opt has 3"),
    ]:
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
        assert words in _refusal(tmp_path / "bad.pkl")
