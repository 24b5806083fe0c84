"""Which heads does in-context learning need? (after Bansal et al. 2023, arXiv 2212.09095)

Gradient importance of every head on each task and shot count, masks from least to most important,
accuracy at each step on examples that had no say in the order, beside random orders and the order
of the weights' size; and every head removed alone, which is what importance estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from experiments.config import ModelOptions

if TYPE_CHECKING:
    import pandas as pd

    from ablate import Fill, Head, HookedModel, Mask
    from ablate.pruning import Ranking
    from experiments.run_folder import Outcome, RunFolder
    from probes.scoring import Prepared

CRITICAL = 3
"""Heads that cost most alone, measured again on reporting examples."""


@dataclass(frozen=True)
class HeadPruning(ModelOptions):
    """Prune attention heads, least important first, and chart what in-context learning loses.

    $ ablate prune --model stdlib-opt --tasks pair_mapping --shots 0 5
    """

    tasks: tuple[str, ...] = ()
    """Built-in tasks, lm-eval tasks, or folders of lm-eval YAML files; all built-in if empty."""
    shots: tuple[int, ...] = (0, 5)
    """Numbers of demonstrations in the prompt."""
    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Shares of the heads removed."""
    convention: Literal["gate", "token"] = "gate"
    """Importance: |Σ_t ∂L/∂ξ_t| (gate) or Σ_t |∂L/∂ξ_t| (token)."""
    fill: Literal["zero", "mean"] = "zero"
    """What stands in for a removed head's output."""
    random_orders: int = 3
    """Random orders to compare with; their seeds follow --seed."""
    tolerance: float = 0.02
    """Fall of the average accuracy that the headline allows."""
    limit: int | None = 30
    """Use at most this many examples of each task, for selection and again for reporting."""
    strict: bool = False
    """Refuse prompts longer than the context instead of cutting their beginning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for fraction in self.fractions:
            if not 0 <= fraction <= 1:
                raise ValueError(f"--fractions {fraction:g} asked for: give shares in [0, 1]")
        if not any(self.fractions):
            raise ValueError("no share to remove asked for: give --fractions above 0")
        if len(set(self.shots)) < len(self.shots):
            raise ValueError(f"--shots {self.shots} asked for: name each number once")
        if not self.shots or min(self.shots) < 0:
            raise ValueError(f"--shots {self.shots} asked for: give numbers from 0 up")
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"--limit {self.limit} asked for: give at least 2 examples a task")
        if self.random_orders < 1:
            raise ValueError(
                f"--random-orders {self.random_orders}: a ranking without control proves nothing"
            )
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"--tolerance {self.tolerance:g} asked for: give one in [0, 1]")

    def run(self, folder: RunFolder) -> Outcome:
        """Importance and each head alone on selection examples; curves on reporting examples."""
        import pandas as pd
        from tqdm import tqdm

        from experiments.prune_findings import findings_of
        from experiments.prune_report import figures, report

        model = self.load_model()
        require_one_stack_of_heads(model)
        conditions = self._conditions(model)
        folder.create()
        with tqdm(total=sum(c.steps for c in conditions), unit="batch", desc="prune") as bar:
            fill = self._fill(model, conditions)
            chosen = [self._select(folder, model, c, fill, bar) for c in conditions]
            critical = most_costly(pd.concat([alone for _, alone in chosen]), CRITICAL)
            scored = [
                self._report(folder, model, condition, importance, critical, fill, bar)
                for condition, (importance, _) in zip(conditions, chosen, strict=True)
            ]
        findings = findings_of(
            self,
            model,
            importance=pd.concat([importance for importance, _ in chosen], ignore_index=True),
            examples=pd.concat([*(alone for _, alone in chosen), *scored], ignore_index=True),
            critical=critical,
            chances={c.task: c.chance for c in conditions},
            truncated=sum(c.truncated for c in conditions),
        )
        findings.examples.to_parquet(folder.path / "examples.parquet", index=False)
        return folder.finish(
            findings.outcome, findings.metrics, figures=figures(findings), report=report(findings)
        )

    def _conditions(self, model: HookedModel) -> list[Condition]:
        """Every (task, shots) with its two disjoint sets of examples, tokenised."""
        from probes.scoring import prepare
        from probes.tasks import load_tasks

        conditions = []
        for shots in self.shots:
            sides: list[dict[str, Prepared]] = []
            for split in ("selection", "test"):
                tasks = load_tasks(self.tasks, shots, split=split, limit=self.limit, seed=self.seed)
                sides.append(
                    {t.name: prepare(model, t.examples, strict=self.strict) for t in tasks}
                )
            for task, selection in sides[0].items():
                answers = prepare(
                    model,
                    selection.examples,
                    answers_only=True,
                    layout="rows" if selection.layout == "tree" else selection.layout,
                )
                conditions.append(Condition(task, shots, selection, answers, sides[1][task]))
        return conditions

    def _fill(self, model: HookedModel, conditions: Sequence[Condition]) -> Literal["zero"] | Fill:
        """What stands in for a removed head, from the selection examples of all conditions."""
        from ablate.fills import mean_fill
        from probes.readings import inputs_of

        if self.fill == "zero":
            return "zero"
        answers = [condition.answers for condition in conditions]
        return mean_fill(
            model, (inputs_of(model, batch, a.layout) for a in answers for batch in a.batches)
        )

    def _select(
        self,
        folder: RunFolder,
        model: HookedModel,
        condition: Condition,
        fill: Literal["zero"] | Fill,
        bar: Any,
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Importance rows, and every selection example with each head removed alone."""
        from ablate import Mask
        from ablate.importance import answer_importance
        from probes.readings import reading_of

        # Scoring comes first: it names the document where a loss is not finite.
        masks = [Ablation("whole", 0, Mask()), *(alone_without(h) for h in model.heads)]
        alone = self._scored(folder, model, condition, "selection", masks, fill, bar)
        importance = folder.partial(f"{condition.key}-importance")
        if importance is None:
            answers = condition.answers
            readings = [reading_of(model, b, answers.layout, shared=False) for b in answers.batches]
            importance = answer_importance(model, readings).frame()
            importance = importance.assign(task=condition.task, shots=condition.shots)
            folder.keep(f"{condition.key}-importance", importance)
        bar.update()
        return importance, alone

    def _report(
        self,
        folder: RunFolder,
        model: HookedModel,
        condition: Condition,
        importance: pd.DataFrame,
        critical: Sequence[Head],
        fill: Literal["zero"] | Fill,
        bar: Any,
    ) -> pd.DataFrame:
        """Every reporting example at every step of every ranking, and without critical heads."""
        from ablate import Mask
        from ablate.pruning import nested_masks

        fractions = [f for f in self.fractions if f > 0]
        ablations = [Ablation("whole", 0, Mask()), *(alone_without(h) for h in critical)]
        for name, seed, ranking in self._rankings(model, importance):
            masks = nested_masks(ranking, fractions)
            ablations += [Ablation(name, seed, mask) for mask in masks]
        return self._scored(folder, model, condition, "test", ablations, fill, bar)

    def _rankings(
        self, model: HookedModel, importance: pd.DataFrame
    ) -> Iterator[tuple[str, int, Ranking]]:
        """Orders of the heads, least important first: (name, seed, ranking)."""
        import torch

        from ablate.pruning import random_ranking, ranked, weight_magnitudes

        rows = importance[importance.convention == self.convention]
        scores = dict(zip(rows.component, rows.value, strict=True))
        yield "importance", self.seed, ranked({h: scores[str(h)] for h in model.heads})
        norms = weight_magnitudes(model)
        yield "magnitude", self.seed, ranked({h: norms[h] for h in model.heads})
        for seed in range(self.seed, self.seed + self.random_orders):
            # One order a seed for all tasks: the average is then of one and the same pruned model.
            yield "random", seed, random_ranking(model.heads, torch.Generator().manual_seed(seed))

    def _scored(
        self,
        folder: RunFolder,
        model: HookedModel,
        condition: Condition,
        split: Literal["selection", "test"],
        ablations: Sequence[Ablation],
        fill: Literal["zero"] | Fill,
        bar: Any,
    ) -> pd.DataFrame:
        """Every example under every ablation: right or wrong, and its loss. One sweep a batch,
        kept as soon as it is done."""
        import pandas as pd

        from experiments.kept_sweeps import kept_log_likelihoods
        from probes.scoring import grade

        prepared = condition.selection if split == "selection" else condition.test
        bar.set_postfix_str(f"{condition.key} {split}", refresh=False)
        # Two orders may remove the same heads at a step: a mask is scored once.
        masks = list(dict.fromkeys(ablation.mask for ablation in ablations))
        key = f"{condition.key}-{split}"
        values, greedy = kept_log_likelihoods(
            folder, key, model, prepared, masks, fill=fill, tick=bar.update
        )
        frames = {}
        for i, mask in enumerate(masks):
            frame = grade(prepared, values[i], greedy[i], mask=mask)
            losses = [-row[gold] for row, gold in zip(frame.loglik, frame.gold, strict=True)]
            columns = frame[["doc_id", "group", "acc", "acc_norm", "exact_match"]]
            frames[mask] = columns.assign(loss=losses, task=condition.task, shots=condition.shots)
        rows = [
            frames[ablation.mask].assign(
                split=split,
                ranking=ablation.ranking,
                seed=ablation.seed,
                component=ablation.component,
                removed=len(ablation.mask),
            )
            for ablation in ablations
        ]
        return pd.concat(rows, ignore_index=True)


@dataclass(frozen=True, eq=False)
class Condition:
    """One task at one number of shots, with examples to choose by and others to report on."""

    task: str
    shots: int
    selection: Prepared
    answers: Prepared
    """The selection examples with their right answers only, an example a row: for gradients."""
    test: Prepared

    @property
    def key(self) -> str:
        """Name of its shards."""
        return f"{self.task}-{self.shots}"

    @property
    def chance(self) -> float:
        """Expected accuracy of a blind guess; 0 where the answer is to be produced, not chosen."""
        right = [len(e.golds or (e.gold,)) / len(e.choices) for e in self.test.examples]
        return sum(share for share in right if share < 1) / len(right)

    @property
    def steps(self) -> int:
        """Batches to be swept, and one more for importance."""
        return len(self.selection.batches) + len(self.test.batches) + 1

    @property
    def truncated(self) -> int:
        """Prompts that lost their beginning."""
        return self.selection.n_truncated + self.test.n_truncated


@dataclass(frozen=True)
class Ablation:
    """A mask, and by which ranking (and seed) it came to be."""

    ranking: str
    seed: int
    mask: Mask
    component: str = ""


def require_one_stack_of_heads(model: HookedModel) -> None:
    """Refuse what this study's tables and maps cannot show: no heads, or several stacks of them."""
    stacks = sorted({head.stack for head in model.heads})
    if stacks != [""]:
        found = f"heads in {', '.join(stacks)}" if stacks else "no attention heads"
        raise ValueError(
            f"{model.name} has {found}: ablate prune shows models with one stack of heads; mask "
            "others from Python (HookedModel.ablated, ablate.importance)"
        )


def alone_without(head: Head) -> Ablation:
    """The ablation of one head alone."""
    from ablate import Mask

    return Ablation("alone", 0, Mask([head]), str(head))


def most_costly(alone: pd.DataFrame, count: int) -> list[Head]:
    """The heads whose removal alone costs most accuracy, averaged over conditions.

    Equal costs (accuracies are coarse) are told apart by the rise of the loss.
    """
    from ablate.components import Head, parse_component

    means = alone.groupby(["ranking", "component", "task", "shots"])[["acc", "loss"]].mean()
    means = means.groupby(["ranking", "component"]).mean()
    order = means.loc["alone"].sort_values(["acc", "loss"], ascending=[True, False])
    heads = [parse_component(str(name)) for name in order.index[:count]]
    return [head for head in heads if isinstance(head, Head)]
