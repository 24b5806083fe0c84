"""When is a residual stream of the frozen base read from disk instead of computed?

Batches that come again (cycled text, other seeds or rates, other sessions over the same data) have
the same streams resid_L every time. Each is kept once, as a file of raw numbers [row, pos, d_model]
that is memory-mapped:

    folder / base key / batch key - L . stream
    base key     hash of all weights, the config, the stack, the precision of the forward, the dtype
    batch key    hash of names, shapes, dtypes and entries of all inputs of the batch

so a batch is found again in any order of the data, and nothing but that batch is. A file is written
beside its place, synced and then renamed: what a kill left half-written never has a stream's name.
With F operations a second achieved and B bytes a second read, reading s streams of w bytes a number
instead of computing L blocks takes

    F · w · s / (24 · D · L · B)      of the time; F / (12 · D · L · B) for one stream in bf16

and is done below 1; resid_0 is always computed. F and B are measured here, B from the disk and
not from the system's memory.

Cached are models of one stack that are given token ids alone (no padding mask): then the blocks'
other arguments depend on the batch's shape only, which the first pass that is read is checked for,
as it is for its loss: 1e-3 nat from that of a computed pass, else it is refused. An encoder-decoder
is computed: its decoder blocks take the encoder's output. Where it misleads: a masked model's masks
are new in every cycle, so only another session over the same steps finds its batches again; and
several processes that fill a folder at once each count their own files against the cap.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablate.calls import Output
from ablate.reset import fingerprints
from ablate.stack import Recorded, embed
from experiments.objectives import Batch
from experiments.reset.learning.climb import Pass, evaluate_base
from experiments.reset.learning.parallel import ALONE, Share

CLOSE = 1e-3
"""Nats that the loss of a read pass may be off."""
SAMPLE = 2**25
"""Bytes read to measure the disk."""


@dataclass(eq=False)
class PrefixCache:
    """Residual streams of `model`, whose weights do not change, in `folder`.

    Attributes:
        cap: bytes that all files of the folder may have together; beyond it nothing is added.
        dtype: of the numbers kept; None keeps the model's own. bfloat16 is half of float32.
        rate: operations a second of the machine; None measures it.
        bandwidth: bytes a second of the folder's disk; None measures it.
    """

    model: nn.Module
    folder: Path
    cap: int = 8 * 2**30
    dtype: torch.dtype | None = None
    rate: float | None = None
    bandwidth: float | None = None
    read: int = 0
    computed: int = 0
    checked: bool = False
    _templates: dict[Any, Recorded] = field(default_factory=dict)
    _shares: dict[frozenset[int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.rglob("*.unfinished"):  # of a killed process, not of a running one
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        self._used = sum(file.stat().st_size for file in self.folder.rglob("*.stream"))
        config: Any = getattr(self.model, "config", None)
        said = config.to_json_string() if config is not None else ""
        self._weights = _digest(said, *sorted(map(str, fingerprints(self.model).items())))

    def passing(
        self, batch: Batch, stack: str | None, keep: Collection[int], share: Share = ALONE
    ) -> Pass:
        """The batch's way through the base with its residual streams `keep`, read or computed.

        Raises ValueError where what was read is not what is computed.
        """
        wanted = frozenset(keep)
        if set(batch.inputs) != {"input_ids"} or stack or not max(wanted):
            return Pass.of(self.model, batch, stack, wanted, share)  # pyright: ignore
        places = self._places(batch, wanted)
        shape = tuple(batch.inputs["input_ids"].shape)
        template = self._templates.get(shape)
        if template is None or not self._pays(wanted, template):
            return self._compute(batch, wanted, share, places if template is None else {})
        if not all(place.exists() for place in places.values()):
            return self._compute(batch, wanted, share, places)
        kept = {i: self._from(place, template) for i, place in places.items()}
        if 0 in wanted:
            with torch.no_grad():
                kept[0] = embed(self.model, batch.inputs)
        found = Pass(self.model, batch, replace(template, kept=kept), share)
        if not self.checked:
            self._check(found, Pass.of(self.model, batch, None, wanted))
        self.read += 1
        return found

    def facts(self) -> dict[str, Any]:
        """What was decided and why, as JSON values for the record of a run."""
        rules = [
            {"streams": sorted(keep), "time_to_read_over_time_to_compute": share}
            for keep, share in self._shares.items()
        ]
        return {
            "operations_per_second": self.rate,
            "bytes_per_second": self.bandwidth,
            "rules": rules,
            "passes_read": self.read,
            "passes_computed": self.computed,
            "bytes_kept": self._used,
        }

    def _compute(
        self, batch: Batch, keep: frozenset[int], share: Share, places: Mapping[int, Path]
    ) -> Pass:
        """The base's own pass; its streams are kept in `places`, as far as there is room."""
        found = Pass.of(self.model, batch, None, keep, share)
        self._templates.setdefault(
            tuple(batch.inputs["input_ids"].shape), replace(found.recorded, kept={0: _like(found)})
        )
        self.computed += 1
        if places and self._pays(keep, found.recorded):
            for i, place in places.items():
                stream = found.recorded.resid(i).to(self.dtype or found.recorded.resid(i).dtype)
                if not place.exists() and self._used + stream.nbytes <= self.cap:
                    _write(place, stream)
                    self._used += stream.nbytes
        return found

    def _places(self, batch: Batch, keep: frozenset[int]) -> dict[int, Path]:
        ids = batch.inputs["input_ids"]
        kind = ids.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        base = _digest(self._weights, str(autocast), str(self.dtype), _attention(self.model))
        name = _digest(str(tuple(ids.shape)), str(ids.dtype), ids.cpu().numpy().tobytes())
        return {i: self.folder / base / f"{name}-{i}.stream" for i in keep - {0}}

    def _pays(self, keep: frozenset[int], like: Recorded) -> bool:
        if keep not in self._shares:
            width = like.shape[2]
            numbers = like.resid(next(iter(like.kept)))
            if self.rate is None:
                self.rate = operation_rate(numbers.device.type, numbers.dtype, width)
            if self.bandwidth is None:
                self.bandwidth = read_rate(self.folder)
            size = (self.dtype or numbers.dtype).itemsize
            self._shares[keep] = time_share(
                self.rate, self.bandwidth, width, max(keep), streams=len(keep - {0}), size=size
            )
        return self._shares[keep] < 1

    def _from(self, place: Path, template: Recorded) -> Float[Tensor, "row pos d_model"]:
        like = template.resid(0)
        kind = self.dtype or like.dtype
        raw = np.memmap(place, np.uint8, mode="c")  # nobody else sees what is written to it
        stream = torch.from_numpy(raw).view(kind).unflatten(0, template.shape)
        return stream.to(like.device, like.dtype)

    def _check(self, found: Pass, true: Pass) -> None:
        pairs = zip(found.recorded.calls, true.recorded.calls, strict=True)
        if not all(_same(a.args, b.args) and _same(a.kwargs, b.kwargs) for a, b in pairs):
            raise ValueError(
                f"blocks of {type(self.model).__name__} take more from a batch than its shape:"
                " their residual streams cannot be cached; give no cache"
            )
        for i in found.recorded.kept:
            off = abs(_loss(found, i) - _loss(true, i))
            if not off < CLOSE:
                raise ValueError(
                    f"resid_{i} read from {self.folder} changes the loss by {off:.1g} nat, more"
                    f" than {CLOSE:g}: remove the folder, or keep the streams in float32"
                )
        self.checked = True


def time_share(
    rate: float, bandwidth: float, d_model: int, blocks: int, *, streams: int = 1, size: int = 2
) -> float:
    """Time to read `streams` of `size` bytes a number over the time to compute `blocks` blocks."""
    return rate * size * streams / (24 * d_model * blocks * bandwidth)


@cache
def operation_rate(device: str, dtype: torch.dtype, d_model: int) -> float:
    """Operations a second of the products of an FFN of this width, the best of a few."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1024, d_model, device=device, generator=generator).to(dtype)
    weight = torch.randn(d_model, 4 * d_model, device=device, generator=generator).to(dtype)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        float((x @ weight)[0, 0])  # reading an entry waits for an asynchronous device
        best = min(best, time.perf_counter() - started)
    return 2 * 1024 * d_model * 4 * d_model / best


@cache
def read_rate(folder: Path) -> float:
    """Bytes a second from the folder's disk, from a file the system was told to forget."""
    sample = folder / f"{os.getpid()}.sample"
    try:
        with sample.open("wb") as file:
            file.write(np.random.default_rng(0).bytes(SAMPLE))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        sample.read_bytes()
        return SAMPLE / (time.perf_counter() - started)
    finally:
        sample.unlink(missing_ok=True)


def _write(place: Path, stream: Tensor) -> None:
    """All of it under its name, or nothing."""
    place.parent.mkdir(exist_ok=True)
    unfinished = place.with_suffix(f".{os.getpid()}.unfinished")
    with unfinished.open("wb") as file:
        stream.contiguous().cpu().flatten().view(torch.uint8).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(place)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _like(found: Pass) -> Tensor:
    """A stand-in that remembers dtype and device of a stream, and no numbers."""
    stream = next(iter(found.recorded.kept.values()))
    return stream.new_empty(0, 0, 0)


def _loss(passing: Pass, i: int) -> float:
    """Mean loss when the stream goes on from resid_i."""
    recorded = passing.recorded
    with torch.no_grad():
        last = recorded.run_blocks(i, recorded.n_blocks, recorded.resid(i))
        ended = replace(recorded, kept={recorded.n_blocks: last})
        sums = evaluate_base(Pass(passing.model, passing.batch, ended))
    return float(sums.sum() / passing.batch.predicted.sum())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Output):
        return isinstance(other, Output) and one.index == other.index
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or one == other


def _attention(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None))
