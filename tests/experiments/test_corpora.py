"""The split by file: near-duplicates together, sides stable, undecodable files left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.corpora import load_corpus, near_duplicate_clusters


def lines(start: int, count: int) -> str:
    return "\n".join(f"line number {i}" for i in range(start, start + count))


def test_files_that_share_half_their_shingles_are_one_cluster():
    original, copy, other = lines(0, 40), lines(0, 30) + "\n" + lines(900, 10), lines(500, 40)
    clusters = {frozenset(c) for c in near_duplicate_clusters([original, copy, other])}
    assert clusters == {frozenset({0, 1}), frozenset({2})}


def test_near_duplicates_are_transitive():
    # 0 and 2 share nothing; 1 holds both.
    a, b = lines(0, 30), lines(100, 30)
    assert len(near_duplicate_clusters([a, a + "\n" + b, b])) == 1


def test_boilerplate_alone_joins_nothing():
    header = "\n".join(f"licence {i}" for i in range(8))
    texts = [header + "\n" + lines(1000 * i, 6) for i in range(25)]
    assert len(near_duplicate_clusters(texts)) == 25


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(60):
        (tmp_path / f"file{i:02}.py").write_text(lines(1000 * i, 30))
        (tmp_path / f"twin{i:02}.py").write_text("# a twin\n" + lines(1000 * i, 30))
    return tmp_path


def test_twins_stay_on_one_side_and_every_file_is_used_once(folder: Path):
    corpus = load_corpus(str(folder), validation_share=0.3)
    train, held = ({d.path for d in side} for side in (corpus.train, corpus.validation))
    assert train | held == {p.name for p in folder.iterdir()}
    assert not train & held
    for side in (train, held):
        assert {p[4:] for p in side if p.startswith("twin")} == {
            p[4:] for p in side if p.startswith("file")
        }
    assert 5 < len(held) < 70


def test_a_files_side_does_not_depend_on_the_others(folder: Path):
    before = {d.path for d in load_corpus(str(folder), validation_share=0.3).validation}
    (folder / "file00.py").unlink()
    (folder / "twin00.py").unlink()
    after = {d.path for d in load_corpus(str(folder), validation_share=0.3).validation}
    assert after == before - {"file00.py", "twin00.py"}


def test_undecodable_and_empty_files_are_left_out(folder: Path):
    (folder / "bad.py").write_bytes(b"\xff\xfe\x00 not utf-8")
    (folder / "declared.py").write_bytes(b"# -*- coding: nonsense -*-\nx = 1\n")
    (folder / "empty.py").write_text("")
    corpus = load_corpus(str(folder), validation_share=0.3)
    paths = {d.path for d in (*corpus.train, *corpus.validation)}
    assert not paths & {"bad.py", "declared.py", "empty.py"}


@pytest.mark.parametrize(
    ("name", "share", "words"),
    [("no-such-folder", 0.1, "no corpus"), ("stdlib", 1.5, "validation share")],
)
def test_bad_corpora_are_refused(name: str, share: float, words: str):
    with pytest.raises(ValueError, match=words):
        load_corpus(name, validation_share=share)


def test_a_corpus_with_one_side_is_refused(tmp_path: Path):
    (tmp_path / "only.txt").write_text("one file")
    with pytest.raises(ValueError, match="one side"):
        load_corpus(str(tmp_path))
