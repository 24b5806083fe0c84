"""Masking heads and as many others: the sets, their losses, and intervals over rows and draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ablate import Head, HookedModel, Mask, Mixer
from probes.behaviour import copies, spans, text_rows
from probes.loss import loss_by_position
from probes.masking import effects, masking_effects, over_rows_and_draws, removed_sets
from probes.repeats import drawn
from tests.families import tiny, tokens
from tests.induction_model import VOCAB, induction_opt

GIVEN = (Head(1, 3), Head(2, 0), Head(1, 1), Head(1, 0))


def test_sets_are_nested_of_equal_size_and_of_others():
    model = HookedModel(tiny("opt"))  # 3 layers of 4 heads
    sets = removed_sets(model, GIVEN, draws=6)
    assert {one.k for one in sets if one.set == "induction"} == {1, 2, 4}
    by_draw = {(one.set, one.k, one.draw): one.heads for one in sets}
    assert by_draw["whole", 0, 0] == ()
    assert len(by_draw) == len(sets) == 1 + 3 + 2 * 6 * 3
    for (name, k, draw), removed in by_draw.items():
        assert len(set(removed)) == len(removed) == k
        if name == "induction":
            assert removed == GIVEN[:k]
        elif k:
            assert not set(removed) & set(GIVEN)
            assert by_draw[name, 4, draw][:k] == removed
        if name == "layer_matched":
            # Layer 1 has one other head for its three.
            assert sum(h.layer == 1 for h in removed) == 1
            assert sum(h.layer == 2 for h in removed) >= (k > 1)
            assert removed[0] == Head(1, 2)
    assert len({by_draw["random", 1, draw] for draw in range(6)}) > 1
    assert len({by_draw["layer_matched", 4, draw] for draw in range(6)}) > 1
    assert sets == removed_sets(model, GIVEN, draws=6)
    assert sets != removed_sets(model, GIVEN, draws=6, seed=1)
    assert [one.k for one in removed_sets(model, GIVEN[:3], draws=1)][1:4] == [1, 2, 3]
    assert [one.k for one in removed_sets(model, GIVEN, ks=(3,), draws=1)] == [0, 3, 3, 3]


def test_random_sets_come_from_anywhere_equally():
    model = HookedModel(tiny("opt"))
    sets = removed_sets(model, [Head(1, 3)], draws=440)
    found = [one.heads[0] for one in sets if one.set == "random"]
    counts = [found.count(h) for h in model.heads if h != Head(1, 3)]
    assert len(counts) == 11
    assert stats.chisquare(counts).pvalue > 0.001
    matched = {one.heads[0] for one in sets if one.set == "layer_matched"}
    assert matched == {Head(1, 0), Head(1, 1), Head(1, 2)}


def test_what_a_layer_lacks_comes_from_the_nearest():
    model = HookedModel(tiny("opt"))
    for one in removed_sets(model, [Head(2, h) for h in range(3)], ks=(3,), draws=20):
        if one.set == "layer_matched":
            assert [h.layer for h in one.heads] == [2, 1, 1]
    # A layer that is nearest to others still serves its own head first.
    for one in removed_sets(model, [*(Head(2, h) for h in range(4)), Head(1, 0)], ks=(5,)):
        if one.set == "layer_matched":
            assert [h.layer for h in one.heads] == [1, 1, 0, 0, 1]


def test_mixers_are_masked_against_mixers():
    model = HookedModel(tiny("falcon_h1"))
    mixers = [c for c in model.components if isinstance(c, Mixer)]
    sets = removed_sets(model, mixers[:1], draws=9)
    assert {c for one in sets if one.set == "random" for c in one.heads} == set(mixers[1:])


def test_others_are_of_the_same_stack():
    model = HookedModel(tiny("bart"))
    sets = removed_sets(model, [Head(0, 1, "decoder")], draws=50)
    assert {h.stack for one in sets for h in one.heads} == {"decoder"}
    # All of a decoder's layer 1 but one head: layer 0 is nearer than another attention's layer 1.
    most = [Head(1, h, "decoder") for h in range(3)]
    for one in removed_sets(model, [*most, Head(0, 0, "cross")], ks=(4,), draws=20):
        if one.set == "layer_matched":
            assert one.heads[0] == Head(1, 3, "decoder")
            assert {h.stack for h in one.heads[1:3]} == {"decoder"}
            assert (one.heads[3].stack, one.heads[3].layer) == ("cross", 0)
    with pytest.raises(ValueError, match="heads of an encoder"):
        removed_sets(model, [Head(0, 1, "encoder")])


def test_every_value_is_that_of_a_plain_forward():
    model = HookedModel(tiny("llama"))
    text = text_rows(model, tokens(1, 200)[0], context=40, limit=3)
    batches = list(drawn(model, (5, 8), 3, (0, 1), 8))
    frame = masking_effects(model, [Head(0, 1), Head(1, 2)], batches, text, draws=2)
    (a, b), (c, d) = spans(40)
    checked = 0
    for removed, of in frame.groupby("removed"):
        cells = of.drop_duplicates(["row", "measure"]).set_index(["row", "measure"])["value"]
        with model.ablated(Mask.parse(str(removed))):
            for batch in batches:
                ids = batch.repeated[""]
                found = loss_by_position(model.model, ids)
                copy = copies(ids)[0][:, 1:]
                for row, seed in enumerate(batch.seeds):
                    first, second = (float(found[row][copy[row] == n].mean()) for n in (0, 1))
                    of_row = cells[f"seed {seed}, length {batch.length}"]
                    assert of_row["first_copy_loss"] == pytest.approx(first, abs=3e-5)
                    assert of_row["second_copy_loss"] == pytest.approx(second, abs=3e-5)
                    assert of_row["copy_gain"] == pytest.approx(first - second, abs=3e-5)
                    checked += 3
            by_position = loss_by_position(model.model, text)
            for window in range(3):
                score = by_position[window, c:d].mean() - by_position[window, a:b].mean()
                at = cells[f"window {window}", "icl_score"]
                assert at == pytest.approx(float(score), abs=3e-5)
                checked += 1
    rows = 2 * 2 * 3 + 3
    assert checked == rows * frame["removed"].nunique()
    assert len(frame) == rows * (1 + 2 + 2 * 2 * 2)
    same = frame.drop_duplicates(["set", "k", "draw"]).set_index(["set", "k", "draw"])
    asked = removed_sets(model, [Head(0, 1), Head(1, 2)], draws=2)
    assert len(same) == len(asked)
    for one in asked:
        assert same.loc[(one.set, one.k, one.draw)]["removed"] == str(Mask(one.heads))
    assert (same.loc["induction"]["same_layer"] == [1, 2]).all()
    assert (same.loc["layer_matched"]["same_layer"] == [1, 2, 1, 2]).all()


def test_the_hand_written_heads_are_the_skill_and_others_are_not():
    model = HookedModel(induction_opt())
    batches = drawn(model, (6, 8), 3, range(4), 8)
    frame = masking_effects(model, [Head(1, 1), Head(0, 0)], batches, draws=3)
    assert set(frame["measure"]) == {"first_copy_loss", "second_copy_loss", "copy_gain"}
    table = effects(frame).set_index(["measure", "k", "set", "against"])
    for k in (1, 2):
        masked = table.loc[("copy_gain", k, "induction", "whole")]
        assert masked["left"] == pytest.approx(0, abs=1e-3)
        assert masked["value"] == pytest.approx(0, abs=1e-3)
        assert masked["high"] < -2
        for name in ("random", "layer_matched"):
            others = table.loc[("copy_gain", k, name, "whole")]
            assert others["left"] == pytest.approx(1, abs=1e-4)
            assert others["difference"] == pytest.approx(0, abs=1e-3)
            assert table.loc[("copy_gain", k, "induction", name)]["high"] < -2
    loss = table.loc[("second_copy_loss", 1, "induction", "whole")]
    assert loss["value"] == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert math.isnan(loss["left"])  # a loss is no skill
    assert (table["rows"] == 8).all()


def made(x: dict[str, np.ndarray], k: int = 2, measure: str = "copy_gain") -> pd.DataFrame:
    """A frame of `masking_effects` with given values, set -> [row, draw]."""
    rows = [
        {"set": name, "k": 0 if name == "whole" else k, "draw": d, "row": f"window {r}"}
        | {"removed": f"{name} {d}"}
        | {"measure": measure, "value": values[r, d]}
        for name, values in x.items()
        for r, d in itertools.product(*map(range, values.shape))
    ]
    return pd.DataFrame(rows)


def test_effects_are_paired_by_row():
    rng = np.random.default_rng(0)
    row = rng.normal(8, 3, (12, 1))  # rows differ far more than sets
    x = {
        "whole": row,
        "induction": row - 5 + 0.1 * rng.normal(size=(12, 1)),
        "random": row - 1 + 0.1 * rng.normal(size=(12, 4)),
        "layer_matched": row - 2 + 0.1 * rng.normal(size=(12, 4)),
    }
    frame = made(x)
    table = effects(frame.sample(frac=1, random_state=1)).set_index(["set", "against"])
    pd.testing.assert_frame_equal(table.sort_index(), _indexed(effects(frame)))
    for name, against in (("induction", "whole"), ("random", "whole"), ("induction", "random")):
        d = x[name] - x[against]
        cell = table.loc[(name, against)]
        assert cell["difference"] == pytest.approx(d.mean())
        assert cell["value"] == pytest.approx(x[name].mean())
        assert cell["baseline"] == pytest.approx(x[against].mean())
        a, b = (
            d.mean(1).var(ddof=1) / 12,
            d.mean(0).var(ddof=1) / d.shape[1] if d.shape[1] > 1 else 0,
        )
        assert cell["stderr"] == pytest.approx(math.sqrt(a + b))
        assert cell["draws"] == d.shape[1]
        assert cell["stderr"] < 0.2 < x[name].std(ddof=1) / math.sqrt(12)
    student = stats.ttest_rel(x["induction"][:, 0], x["whole"][:, 0]).confidence_interval()
    assert table.loc[("induction", "whole")]["low"] == pytest.approx(student.low)
    assert table.loc[("induction", "whole")]["high"] == pytest.approx(student.high)
    left = table.loc[("induction", "whole")]
    assert left["left"] == pytest.approx(x["induction"].mean() / row.mean())
    # Half of a skill, exactly, whatever the rows.
    half = effects(made(x | {"induction": row / 2})).set_index(["set", "against"])
    cell = half.loc[("induction", "whole")]
    assert [cell["left_low"], cell["left"], cell["left_high"]] == pytest.approx([0.5] * 3)


def _indexed(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index(["set", "against"]).sort_index()


def test_no_share_is_left_of_no_skill():
    rng = np.random.default_rng(0)
    row = rng.normal(0, 1, (10, 1))
    x = {"whole": row, "induction": row - 1, "random": row + rng.normal(size=(10, 3))}
    x["layer_matched"] = x["random"]
    assert np.isnan(effects(made(x))["left"].to_numpy()).all()
    table = effects(made({name: values - 9 for name, values in x.items()}, measure="icl_score"))
    assert table.loc[table["against"] == "whole", "left"].notna().all()
    assert table.loc[table["against"] != "whole", "left"].isna().all()
    loss = effects(made({name: values + 9 for name, values in x.items()}, measure="loss"))
    assert np.isnan(loss["left"].to_numpy()).all()  # a loss is no skill


def test_the_interval_covers_rows_and_draws():
    """In a crossed design with both variances the truth is in 95 % of the intervals, or more."""
    rng = np.random.default_rng(1)
    for row, draw, rest in ((1.0, 1.0, 1.0), (0.0, 1.0, 0.3), (1.0, 0.0, 0.3), (0.0, 0.0, 1.0)):
        inside = 0
        for _ in range(600):
            x = (
                row * rng.normal(size=(12, 1))
                + draw * rng.normal(size=(1, 5))
                + rest * rng.normal(size=(12, 5))
            )
            spread = over_rows_and_draws(x)
            inside += spread.low <= 0 <= spread.high
        assert inside / 600 >= 0.95 - 2.6 * math.sqrt(0.05 * 0.95 / 600)
    x = rng.normal(size=(9, 1))
    student = stats.ttest_1samp(x[:, 0], 0).confidence_interval(0.9)
    assert over_rows_and_draws(x, 0.9)[2:] == pytest.approx(tuple(student))
    assert over_rows_and_draws(np.full((4, 3), 2.0)) == (2, 0, 2, 2)
    assert math.isnan(over_rows_and_draws(np.ones((1, 3))).stderr)


def test_bad_input_is_one_clear_line():
    model = HookedModel(tiny("opt"))
    for heads, options, message in (
        ((), {}, "masking 0 heads asked for"),
        ((Head(1, 1), Head(1, 1)), {}, "each once"),
        ((Head(9, 0),), {}, "no head L9H0"),
        (model.heads[:7], {}, "7 heads are given and 5 others are left; .* k up to 5"),
        (model.heads[:2], {"ks": (3,)}, "k up to 2"),
        (model.heads[:2], {"ks": (0, 1)}, "k of \\[0, 1\\]"),
        (model.heads[:2], {"draws": 0}, "at least one draw"),
    ):
        with pytest.raises(ValueError, match=message):
            removed_sets(model, heads, **options)
    sets = removed_sets(model, model.heads[:7], ks=(1, 5))
    assert max(one.k for one in sets) == 5
    assert torch.is_grad_enabled()


def test_a_spread_of_next_to_nothing_has_its_interval():
    spread = over_rows_and_draws(np.array([[0.0, 1e-90], [1e-90, 3e-90]]))
    assert np.isfinite(spread).all()


def test_a_set_drawn_twice_is_one_set():
    rows = [
        ("whole", 0, 0, "", 0.0),
        ("induction", 1, 0, "L1H1", 5.0),
        *(("random", 1, draw, name, value) for draw, (name, value) in enumerate(DRAWN)),
        ("layer_matched", 1, 0, "L1H0", 2.0),
        ("layer_matched", 1, 1, "L1H0", 2.0),
    ]
    frame = pd.DataFrame(
        [(*row[:4], f"row {r}", "second_copy_loss", row[4] + r) for row in rows for r in range(3)],
        columns=["set", "k", "draw", "removed", "row", "measure", "value"],
    )
    table = effects(frame)
    found = table[table["against"] == "whole"].set_index("set")
    assert found["draws"].to_dict() == {"induction": 1, "random": 2, "layer_matched": 1}
    assert found.loc["random", "difference"] == pytest.approx(2.5)  # not (1 + 4 + 1) / 3
    assert found.loc["random", ["lowest", "highest"]].tolist() == [2.0, 5.0]


DRAWN = (("L0H0", 1.0), ("L0H1", 4.0), ("L0H0", 1.0))
