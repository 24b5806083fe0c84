"""Tests see no network, and draw the same examples each time on any machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("ablate", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("ablate")
