"""What are the words of the study's options that its inner rooms use too? Without torch, so that
help is instant."""

from __future__ import annotations

from typing import Literal

from ablate.law_names import Law

Start = Literal[Law, "linear"]
"""By which law fresh weights are made; `linear` fits what the block did (`linear_start`)."""
Target = Literal["lm", "hidden", "logits", "mix"]
"""What a student is trained on (`climb`)."""
