"""Who does the jobs, in how many processes, and what is not done twice?

A finished job is a shard of the run folder; an unfinished one has a checkpoint beside it. With
several processes every one takes the costliest job that nobody has begun, with its share of the
machine's threads, and hands its rows back: only the study's own process writes shards.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.processes import processes
from experiments.reset.learning.foreign import retrain_foreign
from experiments.reset.learning.parallel import joined
from experiments.reset.learning.prefix_cache import PrefixCache
from experiments.reset.learning.session import Session, retrain
from experiments.reset.learning.whole import retrain_whole
from experiments.reset.opened import (
    Opened,
    held_out,
    initial_weights,
    loaded,
    opened_at,
    precision_of,
)
from experiments.reset.plan import Job, Pick, Plan, pick_of
from experiments.training import log_spaced

if TYPE_CHECKING:
    from experiments.reset.study import Resetting
    from experiments.run_folder import RunFolder

FORETELLING = 8_192
"""Held-out tokens that predictors are measured on, of the rows that results are not."""
ENOUGH = 0.01
"""Nat: a student that stays this close to the base has recovered."""


def picked(
    study: Resetting, bases: Sequence[Opened], plan: Plan, folder: RunFolder
) -> tuple[dict[Pick, float], pd.DataFrame]:
    """The learning rate of every arm, target and layer, and all that were tried.

    Columns of the frame: those of the ledger at the end of the short runs, and picked.
    """
    if not plan.picks:
        return {}, pd.DataFrame()
    rows = _done(study, plan.picks, bases, folder, "learning rates")
    tried = {
        (bases[job.base].name, bases[job.base].base.share, t.name): pick_of(bases[job.base], t)
        for job in plan.picks
        for t in job.treatments
    }
    ended = (rows["weights"] == "averaged") & (rows["status"] != "running")
    last = rows.loc[ended].reset_index(drop=True)
    last["gap"] = np.where(np.isfinite(last["loss"]), last["gap"], np.inf)
    students = zip(last["base"], last["base_share"], last["name"], strict=True)
    keys = [tried[student] for student in students]
    last["pick"] = [" ".join(map(str, key)) for key in keys]
    best = last.loc[last.groupby(["base", "base_share", "pick"])["gap"].idxmin()]
    last["picked"] = last.index.isin(best.index)
    chosen = zip(keys, last["rate"], last["picked"], strict=True)
    return {key: float(rate) for key, rate, is_best in chosen if is_best}, last


def ledger_of(
    study: Resetting, bases: Sequence[Opened], plan: Plan, folder: RunFolder
) -> pd.DataFrame:
    """The rows of all jobs."""
    return _done(study, plan.jobs, bases, folder, "retrain")


def foretold(study: Resetting, bases: Sequence[Opened], folder: RunFolder) -> pd.DataFrame:
    """What may foretell recovery, of every layer of every base, if it was asked for."""
    from experiments.reset.statistics.predictors import predictors

    tables = []
    for base in bases if study.predictors else ():
        key = f"predictors-{base.name}-{base.base.share:g}"
        if (kept := folder.partial(key)) is None:
            model = loaded(base.base.weights, study.dtype, study.device_map)
            rows = held_out(base, FORETELLING, "pick")
            kept = predictors(model, rows, initial=base.base.initial, seeds=(study.seed,))
            kept = kept.assign(base=base.name, base_share=base.base.share)
            folder.keep(key, kept)
        tables.append(kept)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _done(
    study: Resetting, jobs: Sequence[Job], bases: Sequence[Opened], folder: RunFolder, what: str
) -> pd.DataFrame:
    from tqdm import tqdm

    keys = [job.key(bases, study) for job in jobs]
    found = {key: kept for key in keys if (kept := folder.partial(key)) is not None}
    left = [(job, key) for job, key in zip(jobs, keys, strict=True) if key not in found]
    total = sum(job.cost for job in jobs)
    ready = sum(job.cost for job, key in zip(jobs, keys, strict=True) if key in found)
    with tqdm(
        total=1.0,
        initial=ready / total if total else 0.0,
        desc=what,
        file=sys.stderr,
        disable=not folder.leads,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
    ) as bar:

        def advance(share: float) -> None:
            bar.update(min(share / total, 1.0 - bar.n))

        bar.set_postfix_str(f"{len(found)} of {len(jobs)} jobs")
        for key, rows in _each(study, left, folder.path / "partial", advance):
            folder.keep(key, rows)
            if folder.leads:
                (folder.path / "partial" / f"{key}.safetensors").unlink(missing_ok=True)
            found[key] = rows
            bar.set_postfix_str(f"{len(found)} of {len(jobs)} jobs")
    return pd.concat([found[key] for key in keys], ignore_index=True)


def _each(
    study: Resetting,
    jobs: Sequence[tuple[Job, str]],
    place: Path,
    advance: Callable[[float], None],
) -> Iterator[tuple[str, pd.DataFrame]]:
    if study.jobs == 1 or len(jobs) < 2:
        for job, key in jobs:
            done = 0.0

            def progress(step: int, steps: int, job: Job = job) -> None:
                nonlocal done
                advance(job.cost * (step / steps - done))
                done = step / steps

            yield key, do(study, job, place / f"{key}.safetensors", progress)
        return
    with processes(study.jobs) as pool:
        waiting = {
            pool.submit(do, study, job, place / f"{key}.safetensors"): (job, key)
            for job, key in jobs
        }
        for future in as_completed(waiting):
            job, key = waiting[future]
            rows = future.result()
            advance(job.cost)
            yield key, rows


def do(
    study: Resetting,
    job: Job,
    checkpoint: Path,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> pd.DataFrame:
    """The rows of one job."""
    session = session_of(study, opened_at(study, job.base), job)
    if job.treatments[0].encoder:
        return retrain_foreign(session, job.treatments[0], checkpoint, progress=progress)
    if job.is_whole:
        return retrain_whole(session, job.treatments[0], checkpoint, progress=progress)
    if not job.unique or not study.cache or job.stack:
        return retrain(session, checkpoint, progress=progress)
    # Data that begins again is read more than once: its streams may be worth keeping.
    cache = PrefixCache(session.model, checkpoint.parent / "streams", int(study.cache * 2**30))
    rows = retrain(dataclasses.replace(session, cache=cache), checkpoint, progress=progress)
    record = checkpoint.parent.parent / f"cache-{checkpoint.stem}.json"
    record.write_text(json.dumps(cache.facts(), indent=1) + "\n")
    return rows


def session_of(study: Resetting, base: Opened, job: Job) -> Session:
    """What a job is, with the base loaded."""
    model = loaded(base.base.weights, study.dtype, study.device_map)
    unique = job.unique or None
    objective = base.data.reading(
        base.origin, seed=job.seed, unique=unique, other=study.other or None
    )
    T0 = base.base.tokens
    autocast = precision_of(study, next(model.parameters()).device)
    keys: dict[str, Any] = {
        **base.keys,
        "origin": base.origin,
        "unique": float("nan") if unique is None else unique / T0 if T0 else float("nan"),
        "unique_asked": float("nan") if unique is None else float(unique),
        "precision": str(autocast or next(model.parameters()).dtype).removeprefix("torch."),
        "budget": float(study.budget if study.budget >= 1 else study.budget * (T0 or 0)),
    }
    anneal = study.anneal if job.split == "report" else 0.0
    first = max(1, job.steps // 50)
    return Session(
        model,
        objective,
        held_out(base, study.evaluate, job.split),
        job.treatments,
        keys,
        job.steps,
        log_spaced(job.steps, study.per_decade if job.split == "report" else 1, first),
        stack=job.stack or None,
        parts=base.steps_in,
        anneal=anneal,
        enough=ENOUGH,
        initial=None if base.base.initial is None else initial_weights(str(base.base.initial)),
        autocast=autocast,
        save_every=study.save_every,
        share=joined(cpu=study.device_map is None),
        dropout=study.dropout,
    )
