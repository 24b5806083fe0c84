"""What does a benchmark measure together, with which inputs, and on how many components?

A session is one work on one model in one dtype, by us and by every peer that can do it. It is
planned on an outline of the model (a shape of random weights needs no storage for that), so that
whatever cannot be run is refused before anything is written or loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.bench import shapes
from experiments.bench.arithmetic import Weights
from experiments.bench.peers import AGAINST
from experiments.bench.workers import OURS, Measured, Setting
from experiments.bench.works import (
    ALONE,
    APART,
    COMPARED,
    KINDS,
    Cost,
    Name,
    Work,
    cost,
    forwards,
    questions,
    repeated_rows,
    spread,
    token_rows,
)

if TYPE_CHECKING:
    from ablate import HookedModel
    from ablate.components import Component
    from experiments.bench.study import Bench


@dataclass(frozen=True, eq=False)
class Session:
    """One work on one model in one dtype, its arithmetic, and whom it is compared with."""

    setting: Setting
    work: Work
    cost: Cost
    components: int
    """Of the whole model."""
    peers: tuple[str, ...]

    def key(self, peer: str) -> str:
        """Name of a row's shard."""
        return "-".join((self.work.label, self.setting.model, self.setting.dtype, peer or "alone"))

    def frame(self, peer: str, runs: Mapping[str, Sequence[Measured]], rate: float) -> pd.DataFrame:
        """Tidy rows: work, model, dtype, peer, side, run, metric, value (run −1: of the work)."""
        rows: list[tuple[str, int, str, float]] = []
        for side in (OURS, peer) if peer else (OURS,):
            for i, run in enumerate(runs[side]):
                rows += [
                    (side, i, "seconds", run.seconds),
                    (side, i, "peak_bytes", run.peak),
                    (side, i, "growth_bytes", run.peak - run.before),
                ]
        if peer:
            for i, (one, other) in enumerate(zip(runs[OURS], runs[peer], strict=True)):
                difference = float(np.abs(one.values - other.values).max())
                rows.append((peer, i, "max_difference", difference))
            shared = self.cost.grouped if peer.startswith("hflm") else self.cost.peer
            operations = self.cost.of_peers.get(peer, shared)
            rows.append((peer, -1, "operations", operations))
        rows += [
            (OURS, -1, "operations", self.cost.fewest),
            (OURS, -1, "matmul_rate", rate),
            (OURS, -1, "tokens", self.cost.tokens),
            (OURS, -1, "components", len(self.work.components or self.work.students)),
            (OURS, -1, "of_components", self.components),
            (OURS, -1, "head_blocks", self.cost.head_blocks),
        ]
        names = ("side", "run", "metric", "value")
        frame = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows])
        keys = {"work": self.work.label, "model": self.setting.model, "dtype": self.setting.dtype}
        return frame.assign(**keys, peer=peer)


def sessions_of(study: Bench) -> Iterator[Session]:
    """Every session that `study` asks for: model by model, work by work, dtype by dtype.

    Raises ValueError for a model, task or length that cannot be run.
    """
    words = study.works or tuple(word for word in COMPARED if word not in APART)
    for name in study.models:
        alone = name in study.alone
        if set(words) <= set(APART):
            break
        model = shapes.outline(name, study.dtypes[0], study.seed)
        for word in words:
            if word in APART:
                continue
            for work_name in (ALONE if alone else COMPARED)[word]:
                able = AGAINST[KINDS[work_name]]
                peers = () if alone else tuple(p for p in study.peers if p in able)
                if not peers and not alone:
                    continue
                for work in _works(study, model, work_name):
                    work = _within_budget(model, work, study.budget)
                    costs = cost(model, work)
                    for dtype in study.dtypes:
                        setting = Setting(name, dtype, study.device, study.threads, study.seed)
                        yield Session(setting, work, costs, len(model.components), peers)
    if "reset" in words:
        yield from _resets(study)
    if "hybrid" in words:
        yield from _hybrids(study)


def _resets(study: Bench) -> Iterator[Session]:
    """Retrained layers, model by model: float32, as students are."""
    for name in study.reset_models:
        model = shapes.outline(name, "float32", study.seed)
        rows = token_rows(model, study.reset_rows, study.length, study.seed)
        blocks = Weights.of(model).blocks
        for work_name in COMPARED["reset"]:
            peers = tuple(peer for peer in study.peers if peer in AGAINST[work_name])
            if not peers:
                continue
            every = tuple((layer, 0) for layer in range(blocks))
            if work_name == "reset-seeds":
                every = tuple((blocks // 2, seed) for seed in range(study.reset_seeds))
            work = Work(work_name, rows, 0, (), (), every)
            once = cost(model, work)
            share = study.budget * 1e12 / max(once.of_peers[peer] for peer in peers)
            if study.budget and share < 1 and work_name != "reset-seeds":
                kept = max(2, int(share * blocks))
                chosen = np.linspace(0, blocks - 1, kept).round().astype(int)
                work = replace(work, students=tuple((int(layer), 0) for layer in chosen))
                once = cost(model, work)
            setting = Setting(name, "float32", study.device, study.threads, study.seed)
            yield Session(setting, work, once, len(every), peers)


def _hybrids(study: Bench) -> Iterator[Session]:
    """Scans by length, then training steps model by model: float32."""
    from experiments.bench import hybrids

    sizes = (study.hybrid_width, study.hybrid_layers)
    shape = f"{hybrids.EXPAND * study.hybrid_width}x{hybrids.D_STATE}"
    scans: list[tuple[Name, str, int]] = [
        ("hybrid-scan", shape, length) for length in study.hybrid_lengths
    ]
    steps: list[tuple[Name, str, int]] = [
        ("hybrid-step", preset, 2 * hybrids.POINTS) for preset in study.hybrid_models
    ]
    for work_name, model, length in (*scans, *steps):
        rows = np.zeros((study.hybrid_rows, length), int)
        work = Work(work_name, rows, 0, (), (), sizes=sizes)
        peers = tuple(p for p in study.peers if p in AGAINST[work_name])
        if work_name == "hybrid-step" and not hybrids.has_mamba(model, sizes):
            peers = tuple(p for p in peers if p not in hybrids.THEIRS)
        if not peers:
            continue
        once = hybrids.operations(model, work)
        tokens = rows.size * (1 if work_name == "hybrid-scan" else hybrids.steps_of(model, work))
        costs = Cost(once["ours"], max(once.values()), 0, tokens, once)
        setting = Setting(model, "float32", study.device, study.threads, study.seed)
        yield Session(setting, work, costs, 0, peers)


def _works(study: Bench, model: HookedModel, name: Name) -> Iterator[Work]:
    """The inputs of a work, the same for every side; all components; a scan at every length."""
    if KINDS[name] != "induction":
        yield _work(study, model, name)
        return
    config: Any = model.model.config
    room = getattr(config, "max_position_embeddings", None)
    fitting = [length for length in study.induction_lengths if room is None or length <= room]
    if not fitting:
        given = " ".join(map(str, study.induction_lengths))
        raise ValueError(
            f"--induction-lengths {given}: {model.name} reads {room} tokens; give fewer"
        )
    for length in fitting:
        rows = repeated_rows(model, study.induction_rows, length, study.seed)
        yield Work(name, rows, 0, (), model.components)


def _work(study: Bench, model: HookedModel, name: Name) -> Work:
    kind = KINDS[name]
    if kind == "choices":
        assert study.limit is not None
        shared = name == "choices-shared"
        examples = questions(study.tasks, study.limit, study.seed, shared=shared)
        return Work(name, np.zeros((0, 0), int), 0, examples, model.components)
    count = study.importance_rows if kind == "importance" else study.rows
    rows = token_rows(model, count, study.length, study.seed)
    scored = study.length - 1 if name == "sweep" else study.answers
    return Work(name, rows, scored, (), model.components)


def _within_budget(model: HookedModel, work: Work, budget: float) -> Work:
    """The same work on as many components as a peer has time for (0: all)."""
    chosen: Sequence[Component] = model.heads
    weights = Weights.of(model)
    if work.name == "sweep-layer":
        chosen = [head for head in model.heads if head.layer == weights.blocks // 2]
    elif work.kind == "forward":
        chosen = ()
    elif work.kind not in ("importance", "induction"):
        once = forwards(weights, model, work)
        allowed = int(budget * 1e12 / once) - 1 if budget else len(model.components)
        chosen = spread(model, max(allowed, weights.blocks // 2, 2))
    return replace(work, components=tuple(chosen))
