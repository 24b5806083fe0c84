"""How is the state of a training kept so that a kill at any instant loses nothing half-written?

One safetensors file holds tensors, the states of the random generators and, in its header, JSON.
It is written beside the old one and renamed: there is the old state or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device
) -> None:
    """Keep tensors, JSON and the random generators of the CPU and of `device`."""
    from safetensors.torch import save_file

    kept = {name: t.detach().contiguous() for name, t in tensors.items()}
    kept["rng/cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        kept["rng/cuda"] = torch.cuda.get_rng_state(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(kept, unfinished, metadata={"state": json.dumps(state)})
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on `device` and JSON of a kept state; the random generators go on from there."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=str(device)) as file:
        state = json.loads(file.metadata()["state"])
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    torch.set_rng_state(kept["rng/cpu"].cpu())
    if "rng/cuda" in kept:
        torch.cuda.set_rng_state(kept["rng/cuda"].cpu(), device)
    return kept, state
