"""How were the built-in tasks made, and how are they made again?

    $ python -m experiments.make_tasks

Only files of the held-out side of the corpus are read, so no training run on that corpus has seen
them. They are divided once more, by file: one part makes the `test` examples that studies report,
the other the `train` examples that rankings are selected on. The output is one JSON line per scene
(see experiments/scenes.py), read by probes/builtin_tasks/read.py, and `SOURCE.json`, which says
where it came from. The same installation and seed give the same bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from experiments.corpora import Document, load_corpus
from experiments.questions import continuations, identifiers, minimal_pairs
from experiments.scenes import DEMONSTRATIONS, QUERIES, Scene, mapping, scenes, vocabulary

FOLDER = Path(__file__).parents[1] / "probes" / "builtin_tasks"
FILE_TASKS = {
    "code_continuation": (continuations, 3, 3),
    "identifier_recall": (identifiers, 3, 1),
    "minimal_pairs": (minimal_pairs, 1, 3),
}
"""Task → what asks, how many wrong answers there are, how far demonstrations stand apart."""
MAPPINGS = {"pair_mapping": ("{}", " {}"), "call_mapping": ("{}(", "{})")}
"""Task → how the key and the label of a pair are written."""
SCENES_OF_A_FILE = 14
"""At most; otherwise three large files would make half of the examples."""


@dataclass(frozen=True)
class TaskMaking:
    """Make the built-in tasks from the held-out files of the corpus.

    $ python -m experiments.make_tasks --folder /tmp/tasks
    """

    folder: Path = FOLDER
    """Where the JSON lines go."""
    test: int = 100
    """Scenes of the test side of every task; a scene asks five questions."""
    train: int = 80
    """Scenes of the side that rankings are selected on."""
    seed: int = 0
    """Of every draw."""
    corpus: str = "stdlib"
    """'stdlib', or a folder of Python files."""

    def run(self) -> dict[str, int]:
        """Write `<task>.<side>.jsonl` and SOURCE.json; examples per file name.

        Raises ValueError when the held-out files are too few for the scenes asked for.
        """
        corpus = load_corpus(self.corpus)
        sides = halves(corpus.validation)
        self.folder.mkdir(parents=True, exist_ok=True)
        written = {}
        for side, count in (("test", self.test), ("train", self.train)):
            for task, made in self.made(sides[side], side, count):
                name = f"{task}.{side}.jsonl"
                random = Random(f"{self.seed} {task} {side} order")
                lines = [json.dumps(scene.record(random)) + "\n" for scene in made]
                (self.folder / name).write_text("".join(lines), encoding="utf-8")
                written[name] = len(made) * QUERIES
        source = {
            "command": "python -m experiments.make_tasks",
            "corpus": corpus.name,
            "corpus_sha256": corpus.digest,
            "python": platform.python_version(),
            "seed": self.seed,
            "files": {side: [d.path for d in documents] for side, documents in sides.items()},
            "examples": written,
        }
        (self.folder / "SOURCE.json").write_text(json.dumps(source, indent=2) + "\n")
        return written

    def made(
        self, documents: Sequence[Document], side: str, count: int
    ) -> Iterator[tuple[str, list[Scene]]]:
        """(task, scenes) for every task, from the documents of one side."""
        for task, (ask, wrong, gap) in FILE_TASKS.items():
            random = Random(f"{self.seed} {task} {side}")
            found = [
                scene
                for document in documents
                for scene in islice(
                    scenes(document, ask, random, wrong=wrong, gap=gap), SCENES_OF_A_FILE
                )
            ]
            if len(found) < count:
                raise ValueError(
                    f"{count} scenes of {task} asked for the {side} side: its "
                    f"{len(documents)} files give {len(found)}; ask for fewer"
                )
            random.shuffle(found)
            yield task, found[:count]
        words = vocabulary(documents)
        if len(words) < 4 * DEMONSTRATIONS:
            raise ValueError(
                f"mappings asked for the {side} side: its files have {len(words)} short names; "
                "give more files"
            )
        for task, (key, label) in MAPPINGS.items():
            random = Random(f"{self.seed} {task} {side}")
            yield task, [mapping(words, key, label, random) for _ in range(count)]


def halves(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Divide files between test and train, largest first, each to the side with less text."""
    sides: dict[str, list[Document]] = {"test": [], "train": []}
    for document in sorted(documents, key=lambda d: (-len(d.text), d.path)):
        side = min(sides, key=lambda name: sum(len(d.text) for d in sides[name]))
        sides[side].append(document)
    return {side: sorted(held, key=lambda d: d.path) for side, held in sides.items()}


if __name__ == "__main__":
    import tyro

    print(json.dumps(tyro.cli(TaskMaking).run()))
