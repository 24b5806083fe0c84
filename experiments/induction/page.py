"""What is on the page of a scan: question, captions, tables, the viewer, and what to doubt?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.induction.findings import SKILLS
from experiments.induction.viewer import pattern_viewer
from experiments.report import Report, chosen

if TYPE_CHECKING:
    from experiments.induction.findings import Findings

CAPTIONS = {
    "scores": "Every head's scores, averaged over rows. Prefix matching is attention to what "
    "followed earlier copies of the current token; beside it the same keys on tokens that do not "
    "repeat. White: no such score.",
    "criterion": "Left: prefix matching against the copying score of the criterion; the dashed "
    "corner is its box, red are the heads that pass. Right: what the same keys get where nothing "
    "repeats; a head above the dashed line gets half of its score from position alone.",
    "positions": "Loss on random tokens that repeat, by place in the block, on rows that had no "
    "say in the choice of heads; random sets are as large as that of the heads that pass. Bands "
    "are 95 % intervals over rows.",
    "masked": "Share of a skill that is left with the k strongest induction heads masked, beside k "
    "random heads from anywhere and from the same layers. Bands are 95 % intervals over rows and "
    "random sets.",
    "attention": "Attention of the strongest heads on one row: a block of random tokens, three "
    "times. A stripe one to the right of the earlier copies is prefix matching.",
    "distance": "Where the heads with the most prefix matching look, and the one with the most "
    "attention to the previous token, by distance, averaged over all queries.",
    "importance": "Importance of every head for tasks, from the pruning run, beside its scores; "
    "and how much of the total prefix matching is left as heads go by importance (grey: random "
    "orders).",
}


def report(findings: Findings) -> Report:
    """The page of a run; captions belong to the figures of `figures`."""
    captions = dict(CAPTIONS)
    for stack in ("encoder", "decoder", "cross"):
        captions[f"scores_{stack}"] = f"{stack.capitalize()}. {CAPTIONS['scores']}"
    captions["scores_mixers"] = f"Mixers, by their implicit attention. {CAPTIONS['scores']}"
    return Report(
        title=f"Which heads of {findings.study.model} are induction heads?",
        question=_question(findings),
        findings=_sentences(findings),
        captions=captions,
        tables=_tables(findings),
        caveats=_caveats(findings),
        widgets=_widgets(findings),
    )


def _question(findings: Findings) -> str:
    study = findings.study
    rows = int(findings.judgement["rows"].iloc[0]) if len(findings.judgement) else 0
    return (
        "An induction head looks for what followed earlier copies of the current token and makes "
        "it likelier (Olsson et al. 2022). Rows are random tokens "
        f"({study.repeats} copies of a block, {study.spacing} spacing, vocabulary: "
        f"{study.vocabulary}), {rows} of them. Criterion: {findings.criterion}; not positional "
        "(the same keys on tokens that do not repeat get less than half of the score), not "
        "unspecific (nor do keys behind other tokens of the earlier copies), and matched at more "
        "than one length. q is Benjamini and Hochberg's over all heads, from sign-flip tests over "
        "rows against both nulls.\n\n"
        f"Heads are masked on rows of other seeds ({study.masking_seeds.start} to "
        f"{study.masking_seeds.stop - 1}), beside {study.draws} random sets of each kind."
    )


def _sentences(findings: Findings) -> list[str]:
    said = []
    judged = findings.judgement
    if len(judged):
        rejected = {
            "positional": "score from position alone",
            "unspecific": "look at earlier copies whatever the token",
            "one_length": "match at one length alone",
        }
        strong = judged.loc[(judged["prefix_matching"] >= findings.study.matching)]
        for column, words in rejected.items():
            names = strong.loc[strong[column], "component"].tolist()
            if names:
                said.append(f"Rejected, because they {words}: {', '.join(map(str, names))}.")
        silent = strong.loc[~strong["copies"], "component"].tolist()
        if silent:
            said.append(
                f"Match prefixes, but their {findings.study.by} is not above "
                f"{findings.study.copying:g}: {', '.join(map(str, silent))}."
            )
        q = judged.loc[judged["induction"], "q"]
        if len(q):
            said.append(f"Largest q of a head that passes: {q.max():.2g}.")
    if len(findings.alone):
        parts = [
            f"{row['component']} {row['value']:+.2f}".replace("-", "−")
            for row in findings.alone.to_dict("records")
        ]
        said.append(
            f"Without one head alone the loss on second copies changes by, in nats: "
            f"{', '.join(parts)}. A head that others are built on may cost as much as one that "
            "passes, and random sets that hold it too."
        )
    for row in findings.against("random").to_dict("records"):
        k = row["k"]
        masked = "the head that passes" if k == 1 else f"all {k} heads that pass"
        others = "a random one" if k == 1 else "as many random ones"
        said.append(
            f"Masking {masked} changes {SKILLS[row['measure']]} by {row['difference']:+.2f} nats "
            f"more than masking {others} (95 % interval {row['low']:+.2f} to "
            f"{row['high']:+.2f}).".replace("-", "−")
        )
    for row in findings.against("layer_matched").to_dict("records"):
        said.append(
            f"Against as many heads of the same layers: {row['difference']:+.2f} nats in "
            f"{SKILLS[row['measure']]} ({row['low']:+.2f} to {row['high']:+.2f}).".replace("-", "−")
        )
    if len(findings.overlap):
        most = findings.overlap["shots"].max()
        for row in findings.overlap.loc[findings.overlap["shots"] == most].to_dict("records"):
            said.append(
                f"At {row['shots']} shots {100 * row['overlap']:.0f} % of the {row['k']} heads "
                f"most important for tasks are among the {row['k']} with the highest "
                f"{row['score'].replace('_', ' ')} (chance {100 * row['expected']:.0f} %, "
                f"p = {row['p']:.2g}); over all heads ρ = {row['spearman']:.2f}.".replace("-", "−")
            )
    return said


def _tables(findings: Findings) -> Mapping[str, pd.DataFrame]:
    made: dict[str, pd.DataFrame] = {}
    judged = findings.judgement
    if len(judged):
        by = findings.study.by
        shown = judged.sort_values("prefix_matching", ascending=False)
        columns = {
            "component": "head",
            "prefix_matching": "prefix matching",
            "prefix_matching_low": "from",
            "prefix_matching_high": "to",
            "prefix_matching_control": "control",
            "prefix_matching_shuffled": "shuffled",
            by: by,
            f"{by}_low": f"{by} from",
            f"{by}_high": f"{by} to",
            "q": "q",
            "induction": "induction",
        }
        made["Heads by prefix matching, with 95 % intervals over rows"] = chosen(shown, columns)
    if len(findings.effects):
        rows = findings.effects
        rows = rows.loc[rows["measure"].isin([*SKILLS, "second_copy_loss"])]
        columns = {
            "measure": "skill",
            "k": "masked",
            "set": "set",
            "against": "against",
            "difference": "difference, nats",
            "low": "from",
            "high": "to",
            "left": "share left",
            "lowest": "lowest set",
            "highest": "highest set",
            "rows": "rows",
            "draws": "sets",
        }
        made["What masking changes, paired by row"] = chosen(rows, columns)
    if len(findings.alone):
        columns = {"component": "head", "value": "rise, nats", "low": "from", "high": "to"}
        made[
            "Loss on second copies without one head: those that pass, and those that attend most "
            "to the previous token"
        ] = chosen(findings.alone, columns)
    scores = [c for c in findings.heads if c not in ("component", "stack", "layer", "head")]
    scores = [c for c in scores if not c.endswith("_stderr") and not c.startswith("distance_")]
    names = {str(name): str(name).replace("_", " ") for name in ("component", *scores)}
    made["All scores"] = chosen(findings.heads, names)
    if len(findings.overlap):
        made["Importance for tasks and induction scores: the top 30 %"] = findings.overlap
    return made


def _widgets(findings: Findings) -> Mapping[str, str]:
    if not findings.examples:
        return {}
    scores = findings.heads.set_index("component")["prefix_matching"]
    return {
        f"Attention on {example.of}": pattern_viewer(
            example.tokens,
            {str(component): pattern for component, pattern in example.patterns.items()},
            notes={
                str(c): f"prefix matching {scores[str(c)]:.2f}"
                + (", induction head" if c in findings.induction else "")
                for c in example.patterns
            },
            targets=example.targets,
        )
        for example in findings.examples
    }


def _caveats(findings: Findings) -> Sequence[str]:
    study = findings.study
    said = [
        "Thresholds are conventions: the table has every head's numbers, `--matching`, `--by` and "
        "`--copying` other thresholds.",
        "Random tokens are not text: what a head does on text may differ.",
        "Attribution and copying count the direct path to the logits alone; a head that works "
        "through later layers has neither.",
        "Copying is measured on tokens that do not repeat, where an induction head finds no "
        "match; attribution is measured where it matches.",
        "OV, QK and K-composition are of the weights alone: no positions, no FFN in between.",
        *findings.left_out,
    ]
    if study.spacing == "fixed" and len(study.lengths) == 1:
        said.append("Copies stand back to back and have one length: distance tells them as well.")
    table = findings.effects
    if len(table) and bool(np.isnan(table["low"].to_numpy(float)).any()):
        said.append("There is one row or one random set somewhere: nothing says how sure that is.")
    if len(findings.overlap):
        said.append(
            f"The p-values of {len(findings.overlap)} overlaps (scores by shots) are not corrected."
        )
    return said
