"""Ledgers of invented students, with the columns of real ones."""

import numpy as np
import pandas as pd

KNOWN = {
    "base": "b0",
    "family": "decoder",
    "architecture": "opt",
    "n_layers": 6,
    "d_model": 64,
    "base_seed": 0,
    "base_share": 1.0,
    "base_tokens": 1e6,
    "unique_tokens": 1e6,
    "parameters": 50_000,
    "arm": "A0",
    "stack": "",
    "layer": 0,
    "layers": "0",
    "variant": "",
    "part": "block",
    "law": "init",
    "target": "lm",
    "origin": "held-out",
    "unique": np.nan,
    "seed": 0,
    "rate": 1e-3,
}


def student(tokens, gaps, *, base_loss=1.0, status="budget", weights="raw", stderr=0.0, known=()):
    """One student's rows; `gaps` start with the damage at 0 tokens."""
    tokens, gaps = np.asarray(tokens, dtype=float), np.asarray(gaps, dtype=float)
    keys = KNOWN | dict(known)
    return pd.DataFrame(
        {name: [value] * tokens.size for name, value in keys.items()}
        | {
            "step": np.arange(tokens.size),
            "tokens": tokens,
            "seconds": tokens / 1e4,
            "weights": weights,
            "loss": base_loss + gaps,
            "gap": gaps,
            "stderr": stderr,
            "loss_base": base_loss,
            "loss_reset": base_loss + gaps[0],
            "loss_skip": base_loss + 0.9 * gaps[0],
            "source_use": np.nan,
            "status": ["running"] * (tokens.size - 1) + [status],
            "budget": tokens[-1],
        }
    )


def crossing_rows(tokens, lower, upper, known):
    """Crossings without a ledger: one row for each of `tokens`, nan where none; `known` columns."""
    tokens, upper = np.asarray(tokens, dtype=float), np.asarray(upper, dtype=float)
    frame = pd.DataFrame({name: [value] * tokens.size for name, value in KNOWN.items()})
    frame = frame.assign(weights="raw", damage=0.5, skip=0.4, kind="absolute", threshold=0.05)
    frame = frame.assign(tokens=tokens, lower=lower, upper=upper)
    frame["status"] = np.where(np.isfinite(upper), "recovered", "censored")
    frame = frame.assign(**dict(known))
    frame["at_budget"] = np.where(np.isfinite(upper), upper, lower)
    return frame.assign(share=frame["tokens"] / frame["base_tokens"])
