"""What is on the page of a study of hybrids: question, sentences, tables, and what to doubt?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from experiments.hybrids.inside.ablations import ALL
from experiments.hybrids.report.inside_figures import SCORES
from experiments.hybrids.report.published import SOURCE
from experiments.report import Report, chosen, minus

if TYPE_CHECKING:
    from experiments.hybrids.findings import Findings

CAPTIONS = {
    "errors": "Squared error after each number of examples, mean over prompts and seeds, beside "
    "baselines (slow ones on the first of these prompts). Bands go from the smallest seed to the "
    "largest.",
    "shifts": "The same on prompts of other distributions than it was trained on.",
    "scores": "ICL regression score: 1 is as good as the baseline named below each function class, "
    "0 no better than predicting 0.",
    "factors": "What each factor changes, averaged over the levels of the others, with 95 % "
    "intervals over prompts and seeds: the score, with interactions, and where most models got "
    "there, the steps to a share of the error of predicting 0, as a ratio. Grey: no change.",
    "training": "Held-out error while training, as a share of that of predicting 0, mean over "
    "seeds; bands go from the smallest to the largest.",
    "schemes": "Whose predictions each checkpoint follows: distance to each baseline's, as a share "
    "of the distance to predicting 0. A row a seed (its number), or of many the first one of each "
    "architecture; σ: standard deviation of initial positions.",
    "published": f"The score beside the published one ({SOURCE}).",
    "importance": "What the score loses without each head, FFN and mixer, one at a time.",
    "attention": "Where heads and mixers of the first seed look: label, attention from an x to the "
    "y's before it; input, to the x's; own, to itself; previous, to the token before; pairing, "
    "from a y to its x; match, to the y behind an earlier copy of the x, beside as many other y's "
    "(shuffled). “even” attends to all before it alike.",
    "probes": "How much of the function's weights can be read off the stream by a linear map, by "
    "layer: means over seeds, bands from the smallest to the largest. Dashed: a control in which "
    "prompts and weights are shuffled; dotted: least squares on the examples.",
}
SHOWN = {
    "architecture": "architecture",
    "task": "functions",
    "baseline": "score against",
    "value": "score",
    "low": "low",
    "high": "high",
    "seeds": "seeds",
    "prompts": "prompts",
    "broken": "not finite",
}


def report(findings: Findings) -> Report:
    """The page of a run; captions belong to the figures of `figures`."""
    return Report(
        title="Which hybrids learn functions in context, and with which parts?",
        question=_question(findings),
        findings=_sentences(findings),
        captions=CAPTIONS,
        tables=_tables(findings),
        caveats=_caveats(findings),
    )


def _question(findings: Findings) -> str:
    study = findings.study
    where = (
        "reference (as the paper's code leaves each)" if study.init == "reference" else "one law"
    )
    return (
        "A prompt shows points (x, f(x)) of a function f that no other prompt has; the model "
        "predicts each f(x) from the points before it. The ICL regression score S is the gain "
        "over predicting 0, divided by a baseline's gain on the same prompts (Campbell, Lojo et "
        "al. 2024).\n\n"
        f"{study.seeds} seeds, {study.steps:,} steps of {study.batch} fresh prompts, width "
        f"{study.d_model}, {study.layers} layer{'s' * (study.layers != 1)}, initial weights "
        f"by {where}; measured on {_prompts(findings)} prompts that nothing was trained or "
        "selected on. Intervals are 95 %, over prompts and seeds."
    )


def _prompts(findings: Findings) -> str:
    """How many were asked: fewer where a score's baseline fits anew for every prefix."""
    rows, most = findings.table, findings.study.prompts
    few = {str(row["task"]): row["prompts"] for row in rows.to_dict("records")}
    said = [f"{count:,.0f} of {task}" for task, count in few.items() if count < most]
    return f"{most:,}" + (f" ({', '.join(said)})" if said else "")


def _sentences(findings: Findings) -> list[str]:
    said = []
    for row in findings.table.to_dict("records"):
        if not row["seeds"]:
            said.append(f"{row['architecture']} on {row['task']}: no seed has finite predictions.")
            continue
        known = math.isfinite(row["low"])
        ends = f" (95 % interval {row['low']:.3f} to {row['high']:.3f})" if known else ""
        said.append(
            f"{row['architecture']} on {row['task']}: S = {row['value']:.3f}{ends} against "
            f"{row['baseline']}, {row['seeds']} seed{'s' * (row['seeds'] != 1)}."
        )
    said += differences_said(findings)
    said += _of_factors(findings)
    said += _of_failures(findings)
    said += _of_parts(findings)
    return [minus(sentence) for sentence in said]


def differences_said(findings: Findings) -> list[str]:
    """Which architectures differ from the reference one, after Holm."""
    rows = findings.differences
    if rows.empty:
        return []
    rows = rows.loc[rows["shift"] == "none"]
    clear = rows.loc[rows["holm"] < 0.05]
    if clear.empty:
        tested = int(rows["p"].notna().sum())
        return [
            f"No difference from {rows['reference'].iloc[0]} passes Holm over {tested} tests at "
            "5 %."
            if tested
            else "One seed each: differences between architectures cannot be tested."
        ]
    return [
        f"{row['architecture']} differs from {row['reference']} on {row['task']} by "
        f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}; Holm p "
        f"{row['holm']:.2g})."
        for row in clear.to_dict("records")
    ]


def _of_factors(findings: Findings) -> list[str]:
    """What the norm, the FFN and the positions do, where a study crosses them."""
    rows = findings.score_effects
    said = [
        f"On {row['task']}, {row['effect']}: S {row['value']:+.3f} ({row['low']:+.3f} to "
        f"{row['high']:+.3f}; Holm p {row['holm']:.2g}), averaged over the other factors"
        f"{_larger(row['parameters'])}."
        for row in rows.to_dict("records")
        if row["order"] == 1
    ]
    if len(rows):
        clear = rows.loc[(rows["order"] > 1) & (rows["holm"] < 0.05)]
        said += [
            f"On {row['task']}, {row['effect']} interact: {row['value']:+.3f} ({row['low']:+.3f} "
            f"to {row['high']:+.3f}; Holm p {row['holm']:.2g}), half of what the one adds to the "
            "effect of the other."
            for row in clear.to_dict("records")
        ]
        if clear.empty:
            said.append("No interaction of these factors passes Holm at 5 %.")
    said += [
        f"On {row['task']}, {row['effect']}: {row['value']:.2f} times the steps "
        f"({row['low']:.2f} to {row['high']:.2f}; Holm p {row['holm']:.2g}) to "
        f"{row['threshold']:g} of the error of predicting 0; {row['arrived']:.0f} of "
        f"{row['models']:.0f} models got there."
        for row in findings.step_effects.to_dict("records")
    ]
    return said


def _larger(growth: float) -> str:
    """A level may make the model larger, and so be better for that."""
    return "" if abs(growth - 1) < 0.02 else f"; its models have {growth:.2f} times the parameters"


def _of_failures(findings: Findings) -> list[str]:
    rows = findings.failures
    rows = rows.loc[(rows["shift"] == "none") & (rows["failed"] > 0)] if len(rows) else rows
    return [
        f"Failed on {task} (S below 0.5; 95 % interval of the rate): "
        + ", ".join(
            f"{row['architecture']} {row['failed']} of {row['seeds']} ({row['low']:.0%} to "
            f"{row['high']:.0%})"
            for row in part.to_dict("records")
        )
        + "."
        for task, part in rows.groupby("task", sort=False)
    ]


def _of_parts(findings: Findings) -> list[str]:
    """The component whose removal costs each architecture most, over its seeds."""
    rows = findings.measured.frames["ablations"]
    if rows.empty:
        return []
    drops = rows.loc[(rows["metric"] == "score_drop") & (rows["fill"] == "mean")]
    keys = ["architecture", "task", "seed"]
    most = drops.loc[drops.groupby(keys)["value"].idxmax()]
    # The greatest of many is above 0 by chance: it has to be so by more than 3 standard errors.
    seen = most.loc[most["value"] > 3 * most["stderr"]]
    said = []
    for (architecture, task), part in most.groupby(["architecture", "task"], sort=False):
        own = seen.loc[(seen["architecture"] == architecture) & (seen["task"] == task)]
        each = ", ".join(
            f"{row['component']} {row['value']:.2f} ± {row['stderr']:.2f} (seed {row['seed']})"
            for row in own.to_dict("records")
        )
        none = sorted(set(part["seed"]) - set(own["seed"]))
        rest = ", ".join(f"seed {seed}" for seed in none)
        if each:
            said.append(
                f"{architecture} on {task} loses most of S without: {each}; its activation replaced"
                " by its mean, one component at a time, standard error over prompts."
                + (f" Of {rest}, no component is missed." if rest else "")
            )
        else:
            said.append(f"{architecture} on {task}: no single component is missed ({rest}).")
    return said


def _tables(findings: Findings) -> dict[str, pd.DataFrame]:
    tables = {"Scores over seeds": chosen(findings.table, SHOWN)}
    beside = findings.beside
    if bool(beside["published"].notna().to_numpy().any()):
        columns = SHOWN | {
            "published": "published",
            "published_denominator": "published against",
            "within": "published is inside",
        }
        columns.pop("broken")
        names = ["published", "published_denominator", "within"]
        shown = beside[names].astype(object).where(beside[names].notna(), "–")
        beside = beside.assign(**{name: shown[name] for name in names})
        tables[f"Beside {SOURCE}"] = chosen(beside, columns)
    shifted = findings.scores
    shifted = shifted.loc[
        (shifted["metric"] == "icl_score") & (shifted["seed"] == -1) & (shifted["shift"] != "none")
    ]
    own = shifted.loc[shifted["baseline"] == shifted["task"].map(findings.denominators)]
    if len(own):
        tables["Out of distribution"] = chosen(
            own, {"architecture": "architecture", "task": "functions", "shift": "shift"} | SHOWN
        )
    tables["Steps to a share of the error of predicting 0"] = chosen(
        findings.waiting,
        {
            "architecture": "architecture",
            "task": "functions",
            "threshold": "share",
            "text": "median steps",
            "arrived": "seeds that got there",
            "seeds": "seeds",
        },
    )
    if len(findings.score_effects):
        tables["Effects of the factors on the score"] = chosen(
            findings.score_effects,
            {"task": "functions", "effect": "effect", "value": "score", "low": "low"}
            | {"high": "high", "p": "p", "holm": "p (Holm)", "seeds": "seeds"},
        )
    if len(findings.step_effects):
        tables["Effects of the factors on the steps, as ratios"] = chosen(
            findings.step_effects,
            {"task": "functions", "threshold": "share", "effect": "effect", "value": "ratio"}
            | {"low": "low", "high": "high", "p": "p", "holm": "p (Holm)"}
            | {"arrived": "seeds that got there", "seeds": "seeds"},
        )
    if len(findings.switches):
        tables["Changes of scheme"] = findings.switches.rename(columns={"task": "functions"})
    tables |= _inside(findings)
    if len(rates := findings.measured.frames["rates"]):
        tables["Learning rates tried, on other seeds and prompts"] = rates
    return tables


def _inside(findings: Findings) -> dict[str, pd.DataFrame]:
    """Where the parts of each seed look; what a linear map reads off the stream, over seeds."""
    tables = {}
    looking = findings.measured.frames["attention"]
    if len(looking):
        rows = looking.loc[(looking["examples"] == ALL) & looking["metric"].isin(SCORES)]
        keys = ["architecture", "task", "seed", "prompts", "component"]
        wide = rows.pivot_table(index=keys, columns="metric", values="value", sort=False)
        columns = [name for name in SCORES if name in wide.columns]
        tables["Where heads and mixers look (even: what attends to all before it alike)"] = (
            wide[columns].reset_index().rename(columns={"task": "functions"})
        )
    probes = findings.measured.frames["probes"]
    if len(probes):
        keys = ["architecture", "task", "examples", "metric"]
        wide = probes.pivot_table(index=keys, columns="layer", values="value", sort=False)
        named = {ALL: "points themselves"} | {n: f"layer {n}" for n in wide.columns if n >= 0}
        tables["R² of the function's weights, read off the stream by a linear map"] = (
            wide.rename(columns=named).reset_index().rename(columns={"task": "functions"})
        )
    return tables


def _parameters(findings: Findings) -> str:
    """How many each architecture has, for the first function class."""
    cells = findings.measured.cells
    first = [cell for cell in cells if cell.task.name == cells[0].task.name]
    return ", ".join(f"{cell.architecture} {cell.parameters:,}" for cell in first)


def _caveats(findings: Findings) -> list[str]:
    study = findings.study
    said = [
        f"{study.seeds} seeds: "
        + (
            "an interval over two is wide and rests on Student's t with one degree of freedom."
            if study.seeds == 2
            else "nothing is known of another seed."
            if study.seeds == 1
            else "rare failures are not seen."
        ),
        *(
            [
                "Small prompts: that an architecture fails here, or does not, says little of larger"
                " ones."
            ]
            if study.size == "small"
            else []
        ),
        "So many steps: what is still on its way counts as it stands.",
        f"Parameters: {_parameters(findings)}"
        + (
            f"; matched to {study.match} by one width each, which is a whole number."
            if study.match
            else "; --match makes them as equal as a width can."
        ),
    ]
    if not study.rates:
        said.append(f"All were trained at one learning rate, {study.rate:g}; give --rates to tune.")
    said += [f"Left out, as it has no meaning: {what}." for what in findings.measured.left_out]
    return said
