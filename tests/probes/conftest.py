"""A tokenizer as the bundled model has one, only smaller."""

import pytest

from experiments.tokens import train_tokenizer

CODE = """
def read(path, mode="r"):
    with open(path, mode) as file:
        return file.read()

for name in names:
    if name in self.values:
        self.values[name] = read(name)
"""
VOCAB = 320


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Byte-level BPE of 320 entries that puts `</s>` before a text."""
    return train_tokenizer([CODE], VOCAB, tmp_path_factory.mktemp("tokenizer"))
