"""Which text does a study train and measure on, and which text has no training run ever seen?

The corpus that every Python installation carries is the standard library's own source. It is
split by file, and near-duplicate files stay on one side: two files are near-duplicates when half
of the smaller one's five-line shingles stand in the other (containment, Broder 1997), and the
split is made over the connected components of that relation.

Any folder of text files works the same way. Where it misleads: installations differ (some
distributions leave out the test suite), so a corpus is identified by the hash of its files.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHINGLE_LINES = 5
"""Lines in one shingle of the near-duplicate test."""
CONTAINMENT = 0.5
"""Share of the smaller file's shingles that makes two files near-duplicates."""
COMMON_SHINGLE = 20
"""A shingle in more files than this is boilerplate (a licence header) and proves nothing."""


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the corpus root, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A train / validation split by file, with what identifies it.

    `digest` is the SHA-256 over the sorted paths and texts of both sides.
    """

    name: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    digest: str

    @property
    def characters(self) -> int:
        """Characters of the train side."""
        return sum(len(document.text) for document in self.train)


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(name: str = "stdlib", *, validation_share: float = 0.05, seed: int = 0) -> Corpus:
    """The corpus called `name`: ``stdlib``, or a folder whose text files are split the same way.

    Files go to the validation side by the hash of (seed, first path of their near-duplicate
    cluster), so that a file's side does not depend on unrelated files. Families of more than
    COMMON_SHINGLE look-alikes are not joined: their shingles count as boilerplate.

    Raises ValueError when the folder does not exist, holds fewer than two clusters of text files,
    or when `validation_share` is not inside (0, 1).
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation share {validation_share} asked for: give one inside (0, 1)")
    root, pattern = (stdlib_root(), "*.py") if name == "stdlib" else (Path(name), "*")
    if not root.is_dir():
        raise ValueError(f"no corpus {name}: give 'stdlib' or a folder of text files")
    documents = list(_read(root, pattern))
    sides: dict[bool, list[Document]] = {True: [], False: []}
    for cluster in near_duplicate_clusters([document.text for document in documents]):
        first = min(documents[i].path for i in cluster)
        draw = int.from_bytes(hashlib.sha256(f"{seed}:{first}".encode()).digest()[:8], "big")
        sides[draw < validation_share * 2**64] += [documents[i] for i in cluster]
    if not sides[True] or not sides[False]:
        raise ValueError(
            f"corpus {name} has {len(documents)} text files, all on one side of the split: "
            f"give more files or another validation share than {validation_share}"
        )
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.path}\0{document.text}\0".encode())
    train, validation = (
        tuple(sorted(sides[side], key=lambda document: document.path)) for side in (False, True)
    )
    return Corpus(name, train, validation, digest.hexdigest())


def near_duplicate_clusters(texts: Sequence[str]) -> list[list[int]]:
    """Connected components of the near-duplicate relation over `texts`, as sorted index lists."""
    shingles = [_shingles(text) for text in texts]
    holders: dict[bytes, list[int]] = defaultdict(list)
    for i, own in enumerate(shingles):
        for shingle in own:
            holders[shingle].append(i)
    shared: dict[tuple[int, int], int] = defaultdict(int)
    for files in holders.values():
        if len(files) <= COMMON_SHINGLE:
            for a in range(len(files)):
                for b in range(a + 1, len(files)):
                    shared[files[a], files[b]] += 1
    parent = list(range(len(texts)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for (a, b), count in shared.items():
        if count >= CONTAINMENT * min(len(shingles[a]), len(shingles[b])):
            parent[find(a)] = find(b)
    clusters: dict[int, list[int]] = defaultdict(list)
    for i in range(len(texts)):
        clusters[find(i)].append(i)
    return list(clusters.values())


def _shingles(text: str) -> set[bytes]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    windows: Iterable[list[str]] = (
        lines[i : i + SHINGLE_LINES] for i in range(max(1, len(lines) - SHINGLE_LINES + 1))
    )
    return {hashlib.blake2b("\n".join(w).encode(), digest_size=8).digest() for w in windows}


def _read(root: Path, pattern: str) -> Iterator[Document]:
    """Every readable text file under `root`, by path; installed third-party packages left out."""
    for path in sorted(root.rglob(pattern)):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or "__pycache__" in relative.parts:
            continue
        if not path.is_file() or path.stat().st_size == 0:
            continue
        try:
            # PEP 263: Python sources declare their own encoding; plain UTF-8 otherwise.
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # the standard library's tests keep files that are undecodable on purpose
        if text.strip():
            yield Document(relative.as_posix(), text)
