"""What does a search say: the front of score against parameters, and what chose it?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.hybrids.findings import findings_of, keep_frames
from experiments.hybrids.report.page import differences_said
from experiments.hybrids.searching.candidates import KNOWN
from experiments.hybrids.searching.search import Searched, front
from experiments.report import Report, minus
from experiments.run_folder import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.hybrids.study import Hybrids
    from experiments.run_folder import RunFolder

REPORTED = ("architecture", "parameters", "value", "low", "high", "front")


def finished(study: Hybrids, folder: RunFolder, found: Searched) -> Outcome:
    """Write front, rungs, figure and page into the folder."""
    findings = findings_of(dataclasses.replace(study, search=False), found.reported)
    table = findings.table.assign(
        parameters=lambda rows: rows["architecture"].map(found.parameters)
    ).sort_values("parameters", ignore_index=True)
    table = table.assign(front=front(table))
    best = table.loc[table["value"].idxmax()]
    if folder.leads:
        found.rungs.to_parquet(folder.path / "rungs.parquet", index=False)
        table.to_parquet(folder.path / "front.parquet", index=False)
    keep_frames(folder, found.reported)
    outcome = Outcome(
        f"{study.functions[0]}: best score against {best['baseline']} {_score(best)} by "
        f"{best['architecture']} with {best['parameters']:,} parameters; "
        f"{int(table['front'].sum())} of {len(table)} reported orders on the front; "
        f"{found.flops:.2g} FLOPs of search",
        {"front": table.loc[table["front"], "architecture"].tolist(), "flops": found.flops},
    )
    rows = found.rungs.assign(metric="selection_score", value=found.rungs["score"])
    metrics = pd.concat([findings.metrics, rows.drop(columns="score")], ignore_index=True)
    return folder.finish(
        outcome,
        metrics,
        figures={"front": lambda: front_figure(table), "rungs": lambda: rungs_figure(found.rungs)},
        report=_report(study, found, table, differences_said(findings)),
    )


def _score(row: Any) -> str:
    """The score with its interval, where seeds give one."""
    known = pd.notna(row["low"])
    return minus(
        f"{row['value']:.3f}" + (f" ({row['low']:.3f} to {row['high']:.3f})" if known else "")
    )


def front_figure(table: pd.DataFrame) -> Figure:
    """Score against parameters with intervals over seeds; the front in full colour."""
    from experiments.plots import INK, panels, points

    figure, axes = panels(width=6.4, height=4.0)
    ax: Any = axes[0, 0]
    known = table.loc[table["value"].notna()]
    if known["low"].notna().any():
        below, above = known["value"] - known["low"], known["high"] - known["value"]
        ax.errorbar(
            known["parameters"], known["value"], [below, above], fmt="none", ecolor="0.75", lw=1
        )
    points(
        known,
        x="parameters",
        y="value",
        name="architecture",
        named=len(known),
        xlabel="parameters",
        ylabel=f"ICL regression score / {table['baseline'].iloc[0]}",
        ax=ax,
    )
    best = known.loc[known["front"]].sort_values("parameters")
    ax.plot(best["parameters"], best["value"], drawstyle="steps-post", color="0.75", zorder=1)
    ax.scatter(best["parameters"], best["value"], s=70, facecolor="none", edgecolor=INK, zorder=4)
    return figure


def rungs_figure(rungs: pd.DataFrame) -> Figure:
    """The score of every candidate in every generation, those that went on joined."""
    from matplotlib.ticker import NullLocator

    from experiments.plots import curve, panels

    figure, axes = panels(width=5.4)
    means: Any = rungs.groupby(["blocks", "architecture", "steps"], as_index=False)["score"].mean()
    means["value"] = means["score"]
    means = means.sort_values("steps")
    ax: Any = axes[0, 0]
    for _, rows in means.groupby("blocks"):
        ax.plot(rows["steps"], rows["value"], color="0.75", marker="o", ms=3, lw=1, zorder=1)
    last = means.loc[means["steps"] == means["steps"].max(), "blocks"]
    curve(
        means.loc[means["blocks"].isin(last)],
        x="steps",
        group="architecture",
        xlabel="steps",
        ylabel="score on selection prompts",
        ax=ax,
    )
    steps = sorted(means["steps"].unique())
    ax.set_xscale("log")
    ax.set_xticks(steps, [f"{step:,}".replace(",", "\u202f") for step in steps])
    ax.xaxis.set_minor_locator(NullLocator())
    return figure


def _report(study: Hybrids, found: Searched, table: pd.DataFrame, differences: list[str]) -> Report:
    size = f"{study.most_parameters:,} parameters"
    begun = set(found.rungs["architecture"])
    known = [name for name in KNOWN if name in begun]
    tried = found.rungs.loc[found.rungs["generation"] == 0, "blocks"].nunique()
    return Report(
        title="Which orders of blocks learn best in context?",
        question=(
            f"{tried} orders of {study.layers} blocks of at most {size}, {tried - len(known)} drawn"
            f" at random and {', '.join(known)}, learn {study.functions[0]} functions; the better "
            f"half goes on and trains twice as long ({study.generations} generations, "
            f"{study.seeds} seeds each).\n\n"
            "Scores that choose are of other prompts and other seeds than scores that are reported."
        ),
        findings=[
            *(
                f"{row['architecture']}: S = {_score(row)} against {row['baseline']} with "
                f"{row['parameters']:,} "
                + ("parameters; on the front." if row["front"] else "parameters.")
                for row in table.sort_values("value", ascending=False).to_dict("records")
            ),
            *differences,
        ],
        captions={
            "front": "Score on prompts and seeds that chose nothing, against parameters; the line "
            "and the ringed points are the front, of point estimates: what intervals cannot tell "
            "apart may change places. Intervals are 95 %, over prompts and seeds.",
            "rungs": "Scores that chose, by steps of training: grey what was dropped.",
        },
        tables={"Reported": table.loc[:, list(REPORTED)]},
        caveats=[
            "What learns slowly at first is dropped, whatever it would become.",
            f"{tried} orders of very many were tried.",
            "The best of several is looked at: its score is the report's, on fresh seeds, but that "
            "it is the best of all is not tested.",
        ],
    )
