"""Text to train tiny models on: folders of small files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def modules(folder: Path, files: int) -> Path:
    """Python modules of twelve short functions each."""
    for i in range(files):
        text = "\n".join(f"def f{i}_{j}(x):\n    return x * {i * j}" for j in range(12))
        (folder / f"module{i:02}.py").write_text(text)
    return folder


def sayings(folder: Path, files: int = 40) -> Path:
    """Lines of twelve words, each drawn from WORDS by itself."""
    generator = np.random.default_rng(0)
    for n in range(files):
        lines = [" ".join(generator.choice(WORDS, 12)) for _ in range(30)]
        (folder / f"{n}.txt").write_text("\n".join(lines))
    return folder
