"""Where do the README's numbers come from? From this: `make readme` puts them there.

Between `<!-- name -->` and `<!-- /name -->` stands what a command made: the demo's last line and
figure (`ablate prune` with no option), what was measured of the bundled model (its training
record, and the demo's accuracies of the whole model), and the newest finished `ablate bench` that
measured sweeps, the newest that measured induction scans, the newest that retrained layers, and the
newest that trained hybrids.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.config import ZOO
from experiments.prune.study import Pruning
from experiments.run_folder import RunFolder, run_study

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "experiments" / "findings" / "prune_demo.png"


def demo_block(line: Mapping[str, Any]) -> str:
    """The demo's last line, a key a row."""
    shown = {key: value for key, value in line.items() if key != "run"}
    return f"```json\n{json.dumps(shown, indent=1, ensure_ascii=False)}\n```"


def zoo_block(record: Mapping[str, Any], baseline: pd.DataFrame) -> str:
    """What the bundled model can do, as a table; `baseline` has task, shots, accuracy, stderr."""
    last = record["curve"][-1] | record["held_out"]
    rows = [
        ("held-out loss", f"{last['validation_loss']:.2f} nat per token"),
        (
            "loss at positions 400–500 against 20–60, held-out files",
            f"{last['late_loss']:.2f} against {last['early_loss']:.2f} nat",
        ),
        (
            "loss on random tokens, second copy against first",
            f"{last['second_copy_loss']:.2f} against {last['first_copy_loss']:.2f} nat "
            f"({last['second_copy_loss'] / last['first_copy_loss']:.0%})",
        ),
        (
            "prefix-matching score, best head (best of layer 0)",
            f"{last['prefix_matching']:.2f} ({last['layer0_prefix_matching']:.2f})",
        ),
    ]
    for task, of_task in baseline.groupby("task", sort=False):
        scores = "; ".join(
            f"{row['shots']} shots {100 * row['accuracy']:.0f} ± {196 * row['stderr']:.0f} %"
            for row in of_task.to_dict("records")
        )
        rows.append((f"accuracy, {str(task).replace('_', ' ')}", scores))
    body = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"| measured | |\n|---|---|\n{body}"


def bench_block(folder: RunFolder) -> str:
    """What a finished benchmark measured, on what, when and by which command."""
    from experiments.bench.table import markdown, summary

    here = folder.environment()
    where = f"{here['device']}, {here['cpus']} CPUs, {here['threads']} threads"
    return (
        f"Measured on {here['started'][:10]} ({where}) by `{here['command']}`:\n\n"
        f"{markdown(summary(folder.load()))}"
    )


def newest(runs: Path, work: str) -> RunFolder | None:
    """The benchmark under `runs` that was finished last and measured `work`."""
    finished = sorted(runs.glob("bench/*/metrics.parquet"), key=lambda m: m.stat().st_mtime)
    folders = [RunFolder(metrics.parent, {}) for metrics in finished]
    having = [f for f in folders if f.load()["work"].str.startswith(work).any()]
    return having[-1] if having else None


def replaced(text: str, name: str, block: str) -> str:
    """`text` with `block` between the marks called `name`. ValueError without the marks."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    new, count = re.subn(pattern, lambda m: m[1] + block + m[2], text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md has {count} places between the marks {name}: it needs one")
    return new


def zoo_accuracies(examples: int | None = 400) -> pd.DataFrame:
    """Accuracy of the bundled model on every built-in task: task, shots, accuracy, stderr.

    The standard error treats the examples that share a text as one cluster.
    """
    from ablate import HookedModel
    from experiments.statistics import mean_and_stderr
    from probes.scoring import score_choices
    from probes.tasks import load_tasks

    model = HookedModel.from_pretrained(Pruning().model)
    rows = []
    for shots in Pruning().shots:
        for task in load_tasks(shots=shots, limit=examples):
            frame = score_choices(model, task.examples)
            accuracy, stderr = mean_and_stderr(frame.acc, clusters=frame.group)
            rows.append({"task": task.name, "shots": shots, "accuracy": accuracy, "stderr": stderr})
    return pd.DataFrame(rows)


def main() -> None:
    """Run the demo (or read its finished run) and put all numbers into the README."""
    folder, outcome = run_study("prune", Pruning())
    FIGURE.parent.mkdir(exist_ok=True)
    shutil.copy(folder.path / "figures" / "summary.png", FIGURE)
    record = json.loads((ZOO / Pruning().model / "training.json").read_text())
    readme = ROOT / "README.md"
    text = replaced(readme.read_text(), "demo", demo_block(json.loads(outcome.line(folder.path))))
    text = replaced(text, "zoo", zoo_block(record, zoo_accuracies()))
    for name, work in (
        ("bench", "sweep"),
        ("bench-induction", "induction"),
        ("bench-reset", "reset"),
        ("bench-hybrid", "hybrid"),
    ):
        if (bench := newest(Pruning().runs, work)) is not None:
            text = replaced(text, name, bench_block(bench))
    readme.write_text(text)


if __name__ == "__main__":
    main()
