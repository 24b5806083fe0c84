"""The page says what the frames say, in the right number, and nothing where there is nothing."""

import re

import numpy as np
import pandas as pd
import pytest

from experiments.report import page
from experiments.reset.report.page import report
from experiments.reset.report.sentences import sentences
from experiments.reset.report.tables import (
    answer_line,
    answers,
    bases,
    cost,
    markdown,
    rates_table,
    shares_table,
    tables,
)
from experiments.reset.result import Result, base_names
from experiments.reset.statistics.crossing import crossings
from tests.experiments.reset import planted
from tests.experiments.reset.planted import T0, diverged, ledger, result, student


@pytest.fixture(scope="module")
def study() -> Result:
    return result(pd.concat([ledger(range(4)), diverged(2)], ignore_index=True))


@pytest.fixture(scope="module")
def said(study: Result) -> str:
    return "\n".join(sentences(study))


def test_the_answer_has_a_line_for_each_target(study: Result):
    line = answer_line(study)
    assert line.startswith(
        "LM loss: median share of the original training tokens to come within 0.05 nat: "
    )
    assert "; local regression: median share" in line
    assert re.search(r": [\d.]+ % \[[\d.]+ %, > 8 %\], 23 % censored, 7\.7 % diverged;", line)
    found = {each.target: each for _, each in answers(study)}
    assert set(found) == {"lm", "hidden"}
    assert (found["lm"].students, found["hidden"].students) == (13, 12)


def test_damage_and_layers_are_those_planted(said: str):
    # Damage 1.6/(1 + L)^1.6; the student that diverged is one of four of L2, at 0.35.
    middle = np.median([1.6, 1.6 / 2**1.6, (3 * 1.6 / 3**1.6 + 0.35) / 4, 1.6 / 4**1.6])
    assert f"by 0.17 (L3) to 1.60 nat (L0), median {middle:.2f}; leaving it out" in said
    assert "LM loss: fastest L3, within 0.05 nat after 0.42 % of the training tokens; " in said
    assert "not within 0.05 nat after 8 %: L0 (medians over seeds)." in said


def test_local_regression_beside_the_lm_loss(said: str):
    assert (
        "local regression takes fewer tokens than the LM loss at 0 of 3 layers, in the median "
        in said
    )
    assert "(1 layer came within it by neither)" in said
    assert "Of 4 layers, local regression overtakes the LM loss at 4, in the median after" in said


def test_the_calm_the_scratch_the_censored_and_the_diverged(said: str):
    assert "stays between 0.000 and 0.006 nat (6 students)" in said
    gap = 4.5 * (1 + 0.08 * T0 / 2e4) ** -0.5
    assert f"from scratch for 8 % of the training tokens is still {gap:.2f} nat above" in said
    assert "6 of 25 students are censored at 0.05 nat" in said
    assert "1 student diverged (0.5 nat above the loss at the reset), of L2 (LM loss)." in said


def test_nothing_is_said_of_what_nobody_measured():
    nothing = pd.DataFrame()
    empty = Result("tiny", nothing, nothing)
    assert sentences(empty) == []
    assert tables(empty) == {}
    assert answer_line(empty) == "no layer was reset and retrained: nothing to answer"
    made = report(empty)
    assert list(made.caveats) == []
    assert page(made, answer_line(empty), {}, {"study": "reset"}, {})
    rows = ledger([2], seeds=(0,), targets=("lm",))
    alone = "\n".join(sentences(result(rows.loc[rows["arm"] == "A0"])))
    for word in ("local regression", "scratch", "without a reset", "diverged", "fastest"):
        assert word not in alone
    assert "Resetting L2 raises the held-out loss by" in alone
    assert "No student of 1 is censored" in alone
    assert "(1 student of 1 base)" in alone
    calm = result(rows.loc[rows["arm"] == "A1"])
    assert "Resetting" not in "\n".join(sentences(calm))


def test_one_censored_student_is_in_the_singular():
    said = "\n".join(sentences(result(student(0))))
    assert "1 of 1 student is censored at 0.05 nat" in said


def test_annealed_ends_are_judged_by_the_noise_of_the_calm():
    rows = ledger(range(2), targets=("lm",))
    ends = rows.loc[rows["arm"] == "A0"].groupby(["layer", "seed"]).tail(1)
    ends = ends.assign(weights="annealed", gap=0.004 + 0.05 * ends["layer"])
    said = "\n".join(sentences(result(pd.concat([rows, ends], ignore_index=True))))
    assert "After the rate went to 0, LM loss leaves a gap of 0.029 nat (median of 6 " in said
    assert "3 are approximately the same as before (within 0.010 nat)." in said
    without = rows.loc[rows["arm"] == "A0"]
    said = "\n".join(sentences(result(pd.concat([without, ends], ignore_index=True))))
    assert "3 are approximately the same as before (within 0.010 nat)." in said


def test_families_are_named_where_there_are_several():
    rows = pd.concat(
        [ledger(range(2)), ledger(range(2), base="bert", family="encoder")], ignore_index=True
    )
    said = sentences(result(rows))
    assert said[0].startswith("Decoder, LM loss: median share")
    assert any(each.startswith("Encoder: resetting a layer raises") for each in said)
    assert any(each.startswith("Encoder: LM loss: fastest") for each in said)
    assert answer_line(result(rows)).startswith("decoder, LM loss: ")


def test_caveats_follow_the_frames(study: Result):
    caveats = "\n".join(report(study).caveats)
    assert "One base seed (decoder)" in caveats
    assert "One length was tried." in caveats
    assert "The learning rate was fixed beforehand (0.001)" in caveats
    assert "what takes more than 8 % of T0 is only known to take more" in caveats
    assert "the base's own training text, in the same order: unseen text" in caveats
    several = [
        ledger(
            range(2), base_seed=s, base=f"b{s}-{share}", base_share=share, base_tokens=share * T0
        )
        for s in (0, 1)
        for share in (0.5, 1.0)
    ]
    swept = pd.DataFrame({"arm": ["A0"], "target": "lm", "rate": 1e-3, "gap": 0.1, "picked": True})
    other = result(pd.concat(several, ignore_index=True).assign(origin="held-out"), rates=swept)
    caveats = "\n".join(report(other).caveats)
    for words in ("One base seed", "One length", "fixed beforehand", "own training text, in"):
        assert words not in caveats
    assert "text the base never saw, of the same kind" in caveats


def test_unknown_length_is_said_and_no_share_is_printed():
    rows = ledger(range(3), base_tokens=np.nan)
    made = report(result(rows))
    text = "\n".join([*made.findings, *made.caveats, made.question, *made.captions.values()])
    assert "How many tokens tiny was trained on is not known" in text
    assert "% of the training tokens" not in text
    assert "share of the original" not in text
    assert "640 k" in text
    assert "tokens" in shares_table(result(rows).crossings).columns


def test_captions_belong_to_figures_and_name_no_arm_that_is_not_there(study: Result):
    captions = report(study).captions
    assert "from scratch" in captions["recovery"]
    assert "{" not in "".join(captions.values())
    rows = study.ledger.loc[study.ledger["arm"] == "A0"]
    captions = report(result(rows)).captions
    assert "from scratch" not in captions["recovery"]
    assert "without a reset" not in captions["recovery"]


def test_places_that_are_level_are_all_named():
    rows = pd.concat(
        [student(layer, gap=lambda t: 1.0 if t == 0 else 0.01) for layer in (1, 3)]
        + [student(2, gap=lambda t: 1.0 if t < 0.01 * T0 else 0.01)],
        ignore_index=True,
    )
    said = "\n".join(sentences(result(rows)))
    assert re.search(r"LM loss: fastest L1 and L3, within 0\.05 nat .*; slowest L2, after", said)


def test_a_base_in_a_folder_goes_by_its_shape_in_tables(study: Result):
    folders = study.ledger.assign(base="runs/pretrain/1a2b/model", architecture="opt")
    made = list(tables(result(folders)).values())
    assert all(set(table["base"]) == {"opt 4×64, seed 0"} for table in made)
    two = pd.concat([folders, folders.assign(base="elsewhere/model")], ignore_index=True)
    named = base_names(two)  # one name for two would hide one of them
    assert named == {}


def test_bases_and_cost_count_what_was_done(study: Result):
    table = bases(study.ledger)
    assert len(table) == 1
    assert table.iloc[0][["N", "D", "T0, tokens", "held-out loss, nat"]].tolist() == [
        4,
        64,
        T0,
        2.0,
    ]
    spent = cost(study.ledger).set_index(["arm", "target"])
    assert spent.loc[("A0", "LM loss"), "students"] == 13
    assert spent.loc[("A7", "LM loss"), "tokens, all students"] == 0.08 * T0
    assert spent.loc[("A7", "LM loss"), "longest clock, s"] == pytest.approx(64)


def test_shares_table_says_what_never_came(study: Result):
    table = shares_table(study.crossings)
    row = table.loc[
        (table["target"] == "LM loss") & (table["place"] == "L0") & (table["within, nat"] == "0.05")
    ].iloc[0]
    assert row["share of T0"] == ">8 %"
    assert (row["smallest"], row["largest"], row["censored, %"]) == (
        "not reached",
        "not reached",
        100,
    )
    lost = table.loc[(table["place"] == "L2") & (table["target"] == "LM loss")].iloc[0]
    assert (lost["seeds"], lost["diverged"]) == (4, 1)


def test_rates_say_how_much_a_neighbour_costs():
    rates = pd.DataFrame(
        {
            "arm": "A0",
            "target": ["lm"] * 3 + ["hidden"] * 2,
            "rate": [5e-4, 1e-3, 2e-3, 1e-3, 2e-3],
            "gap": [0.3, 0.2, 0.25, 0.4, 0.1],
            "picked": [False, True, False, False, True],
        }
    )
    table = rates_table(rates).set_index("target")
    assert table.loc["LM loss", "rate"] == "0.001"
    assert table.loc["LM loss", "neighbours cost, nat"] == pytest.approx(0.1)
    assert table.loc["LM loss", "in the sweep"] == "inside"
    assert table.loc["local regression", "in the sweep"] == "at its end"
    assert rates_table(pd.DataFrame()).empty


def test_markdown_is_a_table_of_the_same_numbers():
    frame = pd.DataFrame({"base": ["a|b", "c"], "gap": [0.5, np.nan]})
    assert markdown(frame) == "| base | gap |\n| --- | ---: |\n| a\\|b | 0.5 |\n| c | – |\n"
    assert markdown(frame.iloc[:0]) == ""


def test_the_page_has_all_of_it(study: Result):
    html = page(report(study), answer_line(study), {}, {"study": "reset"}, {})
    assert "How much data does one reset layer of tiny need?" in html
    assert "&gt;8 %" in html
    assert "What this does not show" in html


def test_frames_are_not_written_to(study: Result):
    before = study.ledger.copy(), study.crossings.copy()
    report(study)
    pd.testing.assert_frame_equal(study.ledger, before[0])
    pd.testing.assert_frame_equal(study.crossings, before[1])
    assert planted.result(study.ledger).crossings.equals(crossings(study.ledger))
