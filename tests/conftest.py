"""Tests see no network, and draw the same examples each time on any machine."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
from hypothesis import settings

settings.register_profile("ablate", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("ablate")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the shape and type checker off: for what a user, who has none, is told."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
