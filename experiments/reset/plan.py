"""Which jobs does a study consist of, and in which order are they done?

A job is a set of students that read the same batches: one base, one seed, one order of the data,
and of an encoder-decoder one stack. Arms that train a whole model are jobs of one student. The
costliest job is first, so that several processes end together. A job is known by the hash of what
it is, and its rows are kept under that name: a study killed and run again does what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ablate.components import Stack
from ablate.reset import Part, has_identity, places_of
from experiments.prompted_data import PromptData
from experiments.reset.learning import arms, aside
from experiments.reset.learning.linear_start import refusal
from experiments.reset.learning.treatments import Treatment
from experiments.reset.opened import Opened, held_out

if TYPE_CHECKING:
    from torch import nn

    from experiments.reset.study import Resetting

Pick = tuple[str, str, int, str]
"""Base and share, stack, layer, and arm with target: what takes a learning rate of its own."""


@dataclass(frozen=True)
class Job:
    """Students that read the same batches.

    Attributes:
        base: index of the base in the study.
        steps: of the budget; the rate falls after it.
        unique: tokens after which the data begins again; 0 never.
        split: of the held-out rows it is judged on.
        cost: in blocks · tokens · width², for the order of jobs.
    """

    base: int
    stack: Stack
    seed: int
    unique: float
    steps: int
    treatments: tuple[Treatment, ...]
    split: str = "report"
    cost: float = field(default=0.0, compare=False)

    def key(self, bases: Sequence[Opened], study: Resetting) -> str:
        """Name under which its rows are kept."""
        opened = bases[self.base]
        what = {
            "base": [opened.name, opened.base.share, opened.origin, opened.steps_in],
            "job": [self.stack, self.seed, self.unique, self.steps, self.split],
            "treatments": [treatment.name for treatment in self.treatments],
            "measured": [study.evaluate, study.per_decade, study.anneal, study.dtype],
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.split}-{self.treatments[0].arm}-s{self.seed}-{digest}"

    @property
    def is_whole(self) -> bool:
        """Whether it is one student that is trained the plain way."""
        first = self.treatments[0]
        return first.scope != "places" or bool(first.encoder)


@dataclass(frozen=True)
class Plan:
    """The jobs, costliest first, and what is left out of them."""

    jobs: tuple[Job, ...]
    picks: tuple[Job, ...] = ()
    """To choose learning rates by, on rows that no result is measured on."""
    left_out: tuple[str, ...] = ()

    def at_rates(self, rates: Mapping[Pick, float], bases: Sequence[Opened]) -> Plan:
        """The same with the learning rates that were picked."""
        if not rates:
            return self
        jobs = []
        for job in self.jobs:
            changed = tuple(
                dataclasses.replace(t, rate=rates.get(pick_of(bases[job.base], t), t.rate))
                for t in job.treatments
            )
            jobs.append(dataclasses.replace(job, treatments=changed))
        return dataclasses.replace(self, jobs=tuple(jobs))


def pick_of(opened: Opened, treatment: Treatment) -> Pick:
    """What the treatment shares its learning rate with."""
    columns = treatment.columns()
    kind = (treatment.arm, treatment.target, treatment.law, columns["trains"], treatment.variant)
    what = " ".join(filter(None, kind))
    return f"{opened.name} {opened.base.share:g}", columns["stack"], columns["layer"], what


def planned(study: Resetting, bases: tuple[Opened, ...]) -> Plan:
    """All jobs of the study.

    Raises ValueError for a layer, stack, part or share that a base does not have, a text shorter
    than asked for, and weights that cannot be reset.
    """
    jobs: list[Job] = []
    picks: list[Job] = []
    left_out: list[str] = []
    for index, opened in enumerate(bases):
        outline = _outline(opened)
        budget = opened.amount(study.budget, "budget")
        _check_text(study, opened, budget)
        _check_vocabulary(opened, outline)
        lenders = _lenders(study, bases, index, left_out)
        for unique in study.unique:
            tokens = opened.amount(unique, "unique")
            for seed in range(study.seed, study.seed + study.seeds):
                jobs += _jobs(
                    study, opened, outline, index, seed, tokens, budget, lenders, left_out
                )
        if len(study.rates) > 1:
            picks += _pick_jobs(study, jobs, opened, index, budget)
    if not jobs:
        why = f": {'; '.join(dict.fromkeys(left_out))}" if left_out else ""
        raise ValueError(
            f"--arms {' '.join(study.arms)} of {', '.join(study.models)}: nothing is left to do"
            f"{why}; give another arm, or a model that has what it resets"
        )
    return Plan(
        tuple(sorted(jobs, key=lambda j: -j.cost)),
        tuple(sorted(picks, key=lambda j: -j.cost)),
        tuple(dict.fromkeys(left_out)),
    )


def _jobs(
    study: Resetting,
    opened: Opened,
    outline: nn.Module,
    index: int,
    seed: int,
    unique: float,
    budget: float,
    lenders: aside.Lenders | None,
    left_out: list[str],
) -> Iterator[Job]:
    steps, rate = opened.steps(budget), study.rates[0]
    base = opened.base
    unit = budget * base.d_model**2
    for stack in opened.stacks:
        if study.stacks and stack not in study.stacks and stack:
            continue
        site = _site(study, opened, outline, stack, left_out)
        together = []
        asked = list(arms.treatments(study, site, seed, rate))
        if lenders is not None and stack == "decoder":
            first = seed == study.seed
            asked += aside.treatments(site.layers, site.n_blocks, lenders, seed, rate, first=first)
        for treatment in asked:
            if treatment.scope == "places" and not treatment.encoder:
                together.append(treatment)
            elif not unique:
                cost = 3 * base.n_layers * unit
                yield Job(index, stack, seed, 0, steps, (treatment,), cost=cost)
        if together:
            cost = sum(2 * (base.n_layers - min(t.layers)) + 1 for t in together) * unit
            yield Job(index, stack, seed, unique, steps, tuple(together), cost=cost)
    if not unique:
        for treatment in arms.whole(study, seed, rate):
            cost = 3 * base.n_layers * unit
            yield Job(index, opened.stacks[-1], seed, 0, steps, (treatment,), cost=cost)


def _pick_jobs(
    study: Resetting, jobs: list[Job], opened: Opened, index: int, budget: float
) -> Iterator[Job]:
    """Every treatment of the first seed at every rate, on a short budget and another seed."""
    from experiments.reset.study import PICK_SHARE

    mine = [j for j in jobs if j.base == index and j.seed == study.seed and not j.unique]
    for job in mine:
        seed = study.seed + study.seeds
        tried = tuple(
            dataclasses.replace(t, seed=seed, rate=t.rate * rate / study.rates[0])
            for t in job.treatments
            if t.trains or t.scope != "places"
            for rate in study.rates
        )
        steps = opened.steps(budget * PICK_SHARE)
        groups = [(t,) for t in tried] if job.is_whole else [tried]
        for group in groups:
            share = PICK_SHARE * len(group) / len(job.treatments)
            yield dataclasses.replace(
                job, seed=seed, steps=steps, treatments=group, split="pick", cost=job.cost * share
            )


def _lenders(
    study: Resetting, bases: tuple[Opened, ...], index: int, left_out: list[str]
) -> aside.Lenders | None:
    """Whose encoders A13 gives to a base; None where it is not asked for, or has no meaning."""
    if "A13" not in study.arms:
        return None
    opened = bases[index]
    if opened.base.kind != "encoder-decoder":
        left_out.append(f"A13 of {opened.name}: it has no cross-attention")
        return None
    return aside.lenders_of(opened, aside.candidates(study, bases, index), left_out)


def _outline(opened: Opened) -> nn.Module:
    """The base's architecture without storage, to ask what it has."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from ablate.placement import auto_class

    config = AutoConfig.from_pretrained(opened.base.weights)
    with init_empty_weights():
        return auto_class(config).from_config(config)


def _site(
    study: Resetting, opened: Opened, outline: nn.Module, stack: Stack, left_out: list[str]
) -> arms.Site:
    blocks = [place.layer for place in places_of(outline, "block") if place.stack == stack]
    if unknown := [layer for layer in study.layers if layer not in blocks]:
        raise ValueError(
            f"--layers {unknown[0]} asked for: {opened.name} has {len(blocks)} blocks"
            f"{f' in its {stack}' if stack else ''}, 0 to {len(blocks) - 1}"
        )
    parts: list[Part] = []
    for part in study.parts:
        if any(place.stack == stack for place in places_of(outline, part)):
            parts.append(part)
    laws = list(study.laws)
    if "identity" in laws and not has_identity(outline, arms.Place(0, "block", stack)):
        laws.remove("identity")
        if "A10" in study.arms:
            left_out.append(f"law identity in {opened.name}: its blocks end in a norm")
    if "rewind" in laws and opened.base.initial is None:
        raise ValueError(
            f"--laws rewind asked for {opened.name}: its first weights were not kept; leave the law"
            " out, or give a base that `ablate pretrain` wrote"
        )
    if "linear" in laws:
        found = (refusal(outline, arms.Place(n, "block", stack)) for n in study.layers or blocks)
        if why := next(filter(None, found), ""):
            laws.remove("linear")
            if "A10" in study.arms:
                left_out.append(f"{why} ({opened.name})")
    if "A9" in study.arms:
        missing = [part for part in study.parts if part not in parts]
        left_out += [f"part {part} in {opened.name}: it has none" for part in missing]
    return arms.Site(stack, study.layers or tuple(blocks), len(blocks), parts, tuple(laws))


def _check_text(study: Resetting, opened: Opened, budget: float) -> None:
    """ValueError where the text is shorter than what is asked of it."""
    held_out(opened, study.evaluate, "report")
    order = opened.data.objective.order
    step = order.step_tokens(0) // opened.steps_in
    if budget < step:
        raise ValueError(
            f"--budget {budget:,.0f} tokens asked for: a step of {opened.name} reads {step:,}; give"
            " at least that, or a smaller --step"
        )
    if isinstance(opened.data, PromptData):
        return  # there are always more prompts
    stream = opened.data.objective.order.legs[0].rows.stream
    if opened.origin == "held-out":
        stream = opened.data.reserved
    most = max((opened.amount(u, "unique") for u in study.unique), default=0)
    if most > len(stream) or (opened.origin == "held-out" and budget > len(stream)):
        asked = max(most, budget if opened.origin == "held-out" else 0)
        raise ValueError(
            f"{asked:,.0f} different tokens asked for: the {opened.origin} text of {opened.name}"
            f" has {len(stream):,}; give fewer with --unique or --budget, or a larger corpus"
        )


def _check_vocabulary(opened: Opened, outline: nn.Module) -> None:
    """ValueError where the text has ids that the model has no embedding of."""
    if isinstance(opened.data, PromptData):
        return
    table = outline.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    read = (leg.rows.stream.max(initial=0) for leg in opened.data.objective.order.legs)
    largest = max(int(opened.data.objective.rows.max()), *map(int, read))
    if largest >= len(table.weight):
        raise ValueError(
            f"{opened.name} has {len(table.weight):,} embeddings, and its tokenizer gives ids up to"
            f" {largest:,}: give the tokenizer that it was trained with"
        )
