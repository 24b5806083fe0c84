"""Under what circumstances was a number measured: versions, commit, machine, threads, device."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "ablate",
    "torch",
    "transformers",
    "accelerate",
    "lm-eval",
    "transformer-lens",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "matplotlib",
)
"""The distributions whose versions a run records."""


def environment() -> dict[str, Any]:
    """Facts about this process and machine, as JSON values; nothing that names a person or host."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "commit": commit(Path(__file__).parent.parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **_torch_facts(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Installed versions of PACKAGES; a package that is absent is left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """The git commit checked out in `folder`, with `+changes` if files differ; None outside git."""
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, check=True, text=True, timeout=10
    ).stdout.strip()


def _torch_facts() -> dict[str, Any]:
    """Threads and device, from a torch the study has loaded; importing it here costs seconds."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if cuda else platform.processor() or "cpu",
    }
