"""How does lm-eval read the built-in tasks, and where do their demonstrations come from?

The YAML files beside this one name `scenes` as their dataset and `OwnDemonstrations` as their
few-shot sampler, so lm-eval's own harness builds the same prompts:

    lm-eval run --tasks code_continuation --include_path probes/builtin_tasks ...

A line of `<task>.<side>.jsonl` is one scene: demonstrations `[query, answer]` in the order of the
file they come from, and the queries that share them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.samplers import ContextSampler

FOLDER = Path(__file__).parent


def scenes(name: str, **_: object) -> datasets.DatasetDict:
    """Both sides of the built-in task `name`, one document per query, held in memory.

    A document carries its own demonstrations, each with the fields of a document. lm-eval also
    passes the task's metadata, which is not needed.
    """
    return datasets.DatasetDict(
        {
            side: datasets.Dataset.from_list(list(_documents(FOLDER / f"{name}.{side}.jsonl")))
            for side in ("train", "test")
        }
    )


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1]):
        scene = json.loads(line)
        shown = [
            {"query": query, "choices": [answer], "gold": 0}
            for query, answer in scene["demonstrations"]
        ]
        for query in scene["queries"]:
            yield {
                "scene": number,
                "file": scene["file"],
                "row": query["row"],
                "query": query["query"],
                "choices": query["choices"],
                "gold": query["gold"],
                "answered_by": query.get("answered_by"),
                "demonstrations": shown,
            }


class OwnDemonstrations(ContextSampler):
    """The demonstrations that a document carries: its last `n`, which stand nearest to it.

    Where one of them holds the answer (`answered_by`) and is not among the last `n`, it takes the
    place of one that is.
    """

    def sample(
        self,
        n: int,
        eval_doc: Mapping[str, Any] | None = None,
        df: Sequence[Mapping[str, Any]] | None = None,
        **_: object,
    ) -> Sequence[dict[str, Any]]:
        """`n` demonstrations of `eval_doc`. ValueError when it carries fewer."""
        assert eval_doc is not None, "lm-eval passes the document when fewshot_split == test_split"
        carried = list(eval_doc["demonstrations"])
        if n > len(carried):
            raise ValueError(
                f"{n} shots asked for: the documents of this task carry {len(carried)} "
                "demonstrations each; ask for fewer shots"
            )
        chosen = carried[len(carried) - n :]
        needed = eval_doc["answered_by"]
        if needed is not None and 0 < n < len(carried) - needed:
            chosen[needed % n] = carried[needed]
        return chosen
