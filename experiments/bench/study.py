"""How much sooner is the same answer here than by what a user would otherwise run?

Every work of `works.py` is done by this toolkit and by its peers, alternately, on the same inputs;
the ratio of the times is taken within each round. Beside it stand what arithmetic allows (the
peer's operations over the fewest that an exact method needs), the largest difference of the
results, the peak memory of each, and the share of the machine's matrix-product rate that was
reached. A model named in `--alone` is measured without a peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import tyro

from experiments.config import INPUT, POSITIONAL, RunOptions

if TYPE_CHECKING:
    import pandas as pd

    from experiments.bench.plan import Session
    from experiments.bench.workers import Measured
    from experiments.run_folder import Outcome, RunFolder

Word = Literal["sweep", "choices", "importance", "induction", "reset", "hybrid"]
Peer = Literal[
    "hf-loop",
    "bridge",
    "hflm",
    "hflm-batched",
    "reference",
    "bridge-last",
    "hf-attentions",
    "plain",
    "plain-stopping",
    "every-gradient",
    "lean-gpt2",
    "hf-mamba",
    "hf-mamba-kept",
]


@dataclass(frozen=True)
class Bench(RunOptions):
    """Measure sweeps, choices, importance and induction scans beside what one would otherwise run.

    $ ablate bench sweep choices --models opt-768 --dtypes float32
    """

    works: tyro.conf.Positional[tuple[Word, ...]] = field(default=(), metadata=POSITIONAL)
    """What to measure; all but reset and hybrid if none is named."""
    models: tuple[str, ...] = field(default=("stdlib-opt", "opt-768"), metadata=INPUT)
    """Models, and shapes of random weights: opt-256, opt-768, opt-6.7b, opt-66b."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    """Of the weights, on both sides."""
    peers: tuple[Peer, ...] = get_args(Peer)
    """Whom to compare with; each is asked for the works it can do."""
    alone: tuple[str, ...] = ("opt-66b",)
    """Models measured without a peer: a forward, the heads of one layer, importance, induction."""
    device_map: str | None = None
    """One device for both sides, such as cuda:0; without it, the CPU."""
    threads: int | None = None
    """Threads of each side; without it, torch's choice."""
    repeats: int = 3
    """Timed runs of each side, after one that is not timed."""
    rows: int = 2
    """Rows of tokens in a sweep."""
    length: int = 256
    """Tokens in a row."""
    answers: int = 4
    """Last tokens of a row that are read where not all are."""
    importance_rows: int = 4
    """Rows of tokens for importance."""
    induction_lengths: tuple[int, ...] = (512, 1024, 2048)
    """Tokens in a row that is scanned for induction; what a model cannot read is left out."""
    induction_rows: int = 1
    """Rows in such a scan."""
    reset_models: tuple[str, ...] = field(default=("opt-256", "stdlib-opt"), metadata=INPUT)
    """Models whose layers are reset and retrained, in float32."""
    reset_rows: int = 4
    """Rows of --length tokens in a training step."""
    reset_seeds: int = 3
    """Students of one layer that train as one module."""
    hybrid_models: tuple[str, ...] = ("gpt2", "mamba", "mambaformer")
    """Presets, or blocks in words, of the hybrids that train, in float32."""
    hybrid_layers: int = 4
    """Of such a preset."""
    hybrid_width: int = 128
    """Of its stream; a scan has four times as many channels, with 16 states each."""
    hybrid_rows: int = 64
    """Prompts in a training step, and rows of a scan."""
    hybrid_lengths: tuple[int, ...] = (24, 82)
    """Tokens in a scan; a training step reads 12 points, 24 tokens."""
    tasks: tuple[str, ...] = ("pair_mapping",)
    """Tasks of the choices, with 5 demonstrations a question."""
    limit: int | None = 5
    """Use at most this many examples of each task."""
    budget: float = 1.2
    """10¹² operations of a peer's run at most (one component in two layers at least); 0: all."""

    def __post_init__(self) -> None:
        for name in (
            "repeats",
            "rows",
            "importance_rows",
            "induction_rows",
            "answers",
            "reset_rows",
            "reset_seeds",
            "hybrid_layers",
            "hybrid_width",
            "hybrid_rows",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give ≥ 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads}: give ≥ 1")
        if self.limit is None or self.limit < 1:
            raise ValueError(f"--limit {self.limit}: give a count of at least 1")
        if self.length < self.answers + 2:
            raise ValueError(f"--length {self.length}: give more than --answers {self.answers} + 1")
        if self.budget < 0:
            raise ValueError(f"--budget {self.budget:g}: give 0 or more")
        if not self.induction_lengths or min(self.induction_lengths) < 5:  # BOS and four copies
            given = " ".join(map(str, self.induction_lengths))
            raise ValueError(f"--induction-lengths {given}: give lengths of at least 5")
        if self.hybrid_lengths and min(self.hybrid_lengths) < 1:
            given = " ".join(map(str, self.hybrid_lengths))
            raise ValueError(f"--hybrid-lengths {given}: give ≥ 1")
        for name in (
            "works",
            "models",
            "dtypes",
            "peers",
            "tasks",
            "induction_lengths",
            "reset_models",
            "hybrid_models",
            "hybrid_lengths",
        ):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{' '.join(map(str, given))}: name each of them once")
        if not (self.models and self.dtypes and self.tasks):
            raise ValueError("nothing to run: name one of --models, of --dtypes and of --tasks")

    @property
    def device(self) -> str:
        """Where both sides run. ValueError for a map of several places."""
        import torch

        wanted = self.device_map or "cpu"
        try:
            device = torch.device(wanted)
        except RuntimeError:
            raise ValueError(
                f"--device-map {wanted}: both sides run on one device; give cpu or cuda:0"
            ) from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"--device-map {wanted}: this machine has {torch.cuda.device_count()} CUDA "
                "devices; give cpu"
            )
        return wanted

    def run(self, folder: RunFolder) -> Outcome:
        """Plan every work on every model and dtype, then measure what is not measured yet."""
        import pandas as pd
        from tqdm import tqdm

        from experiments.bench.plan import sessions_of
        from experiments.bench.report import figures_of, outcome_of, report
        from experiments.bench.table import printed, summary
        from experiments.bench.workers import matmul_rate

        for dtype in self.dtypes:
            matmul_rate(self.device, dtype, side=64, tries=1)  # refuses what the device lacks
        sessions = list(sessions_of(self))
        if not sessions:
            raise ValueError("nothing to measure: the models of --alone have no choices")
        folder.create()
        frames = []
        rounds = 1 + self.repeats
        with tqdm(total=sum(rounds * (1 + len(s.peers)) for s in sessions), unit="run") as bar:
            for session in sessions:
                frames += self._measured(folder, session, bar)
        metrics = pd.concat(frames, ignore_index=True)
        table = summary(metrics)
        print(printed(table))
        return folder.finish(
            outcome_of(table),
            metrics,
            figures=figures_of(table),
            report=report(self, table),
        )

    def _measured(self, folder: RunFolder, session: Session, bar: Any) -> list[pd.DataFrame]:
        """One frame a peer; what a try before has measured is not measured again."""
        frames = {peer: folder.partial(session.key(peer)) for peer in session.peers or ("",)}
        missing = [peer for peer, frame in frames.items() if frame is None]
        done = len(frames) - len(missing) + (not missing)  # our runs among them
        bar.update((1 + self.repeats) * done)
        if missing:
            runs, rate = self._runs(session, [peer for peer in missing if peer], bar)
            for peer in missing:
                frames[peer] = frame = session.frame(peer, runs, rate)
                folder.keep(session.key(peer), frame)
        return [frame for frame in frames.values() if frame is not None]

    def _runs(
        self, session: Session, peers: Sequence[str], bar: Any
    ) -> tuple[dict[str, list[Measured]], float]:
        """Every contender's timed runs, in turns, and the machine's matrix-product rate."""
        from experiments.bench.workers import OURS, Worker, turns

        contenders = [OURS, *peers]
        runs: dict[str, list[Measured]] = {contender: [] for contender in contenders}
        with ExitStack() as stack:
            workers = {
                contender: stack.enter_context(Worker(contender, session.setting, session.work))
                for contender in contenders
            }
            for worker in workers.values():
                worker.wait_until_ready()
            rates = []
            for number, order in enumerate(turns(contenders, 1 + self.repeats)):
                for contender in order:
                    setting = session.setting
                    bar.set_description(f"{session.work.name} {setting.model} {setting.dtype}")
                    measured = workers[contender].run()
                    if number:  # the first round warms up
                        runs[contender].append(measured)
                    bar.set_postfix_str(f"{contender} {measured.seconds:.2f} s", refresh=False)
                    bar.update()
                rates.append(workers[OURS].matmul_rate())
            return runs, max(rates)
