"""What does one block make of many differently masked streams?

A *visit* sends rows through one block of a recorded forward. Each row is an example of the recorded
batch with its own cut: the components that it loses in this block. Rows that leave the whole model
here need nothing that the whole model has computed already: their z (or ssm_out) is the recorded
one with the cut gated or filled, so the block starts at its output projections.

How the rest of a block hangs together (norms before or after, branches side by side, multipliers)
is the block's own business: its forward runs, and only the modules that would compute z anew are
made to answer with what is known. That is done where a module is seen to do nothing behind its
output projection; elsewhere (Bloom adds the residual there) the block runs whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ablate.components import Component
from ablate.gates import edit_of, place_of
from ablate.hooks import Edit, Place, execution_device, hooked
from ablate.narrow import Narrow
from ablate.sites import Site
from ablate.stack import Recorded

if TYPE_CHECKING:
    from ablate.fills import Fill


@dataclass(eq=False)
class Known:
    """What passed one head or mixer site in the whole model's forward.

    Attributes:
        owner: the module that computes z (an attention, an SSM).
        out: its output projection.
        x: input of `out`, [batch, pos, width].
        rest: what else the owner returned; None if it returned one tensor alone.
        ends_in: what the owner's answer is: the output ("y") or the input ("x") of its projection;
            then it does nothing behind it.
    """

    owner: nn.Module
    out: nn.Module
    x: Tensor | None = None
    rest: tuple[None, ...] | None = None
    ends_in: Literal["x", "y", ""] = ""
    _last: Tensor | None = None

    def entered(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.x = x = args[0]
        if _same_place(self._last, x):
            self.ends_in = "x"

    def projected(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        self._last = returned if not self.ends_in else None

    def answered(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        first = returned[0] if isinstance(returned, tuple) else returned
        # A pattern, a position bias: for other rows they would be others, and nobody reads them.
        self.rest = (None,) * (len(returned) - 1) if isinstance(returned, tuple) else None
        if _same_place(self._last, first):
            self.ends_in = "y"
        self._last = first if not self.ends_in else None


def _same_place(a: Tensor | None, b: Tensor) -> bool:
    """The same numbers in memory: dropout that does nothing may return an alias."""
    return a is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape


@contextmanager
def watched(hf_model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[str, Known]]:
    """Keeps what passes the head and mixer sites in the forward inside: site name -> Known."""
    found: dict[str, Known] = {}
    handles = []
    try:
        for site in sites:
            if site.where != "input":
                continue
            owner = site.attention or site.path.rpartition(".")[0]
            known = Known(hf_model.get_submodule(owner), hf_model.get_submodule(site.path))
            found[site.name] = known
            handles += [
                # First, so that it sees x as it was made, before any context's edit.
                known.out.register_forward_pre_hook(known.entered, prepend=True),
                known.out.register_forward_hook(known.projected),
                known.owner.register_forward_hook(known.answered),
            ]
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _answering(module: nn.Module, answer: Callable[[], Any]) -> Iterator[None]:
    """A call of `module` returns answer() and computes nothing else, while inside."""
    before = module.__dict__.get("forward")  # accelerate puts one there
    module.forward = lambda *args, **kwargs: answer()
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows on their way into a block.

    Attributes:
        example: the recorded example of each row.
        resid: their residual streams.
        cuts: what each row loses in this block.
        fresh: they leave the whole model in this block, so its z is theirs.
    """

    example: Int[Tensor, "row"]
    resid: Float[Tensor, "row pos d_model"]
    cuts: Sequence[frozenset[Component]]
    fresh: bool


@dataclass(frozen=True, eq=False)
class Visit:
    """One block of a recorded forward, ready for rows.

    Attributes:
        recorded: the stack it belongs to.
        block: its number there.
        sites: the sites in it.
        known: what the whole model computed at them; empty where it may not be used.
        fill: what stands in for a removed activation.
        positions: [batch, chosen]: run the block at these positions only; None for everywhere.
    """

    hf_model: nn.Module
    recorded: Recorded
    block: int
    sites: Sequence[Site]
    known: Mapping[str, Known]
    fill: Literal["zero"] | Fill
    positions: Int[Tensor, "batch chosen"] | None = None
    expanded: dict[tuple[int, ...], dict[int, Any]] = field(default_factory=dict)
    """Arguments already made for some rows; shared by the visits of one pass."""

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return execution_device(self.recorded.calls[self.block].block)

    @property
    def starts_at_projections(self) -> bool:
        """Whether rows that leave the whole model here can do without everything before."""
        first = self._first
        return bool(first) and all(
            site.name in self.known and self.known[site.name].ends_in for site in first
        )

    @property
    def _first(self) -> list[Site]:
        """The sites whose owners read the residual stream as it comes in. A cross-attention, and a
        mixer behind an attention, read what that has added, so they are always computed."""
        inputs = (site for site in self.sites if site.where == "input")
        return [site for site in inputs if site.stack != "cross" and not site.behind]

    def run(self, rows: Rows, states: Tensor | None = None) -> Float[Tensor, "row pos d_model"]:
        """The rows behind the block, at all positions or at the chosen ones.

        `states` replaces the encoder's output, which a decoder's cross-attention reads.
        """
        example = rows.example
        call = self.recorded.calls[self.block].select(
            example, self.recorded.batch, self._shared(example)
        )
        if states is not None:
            call = call.map(lambda name, v: states if name == "encoder_hidden_states" else v)
        skips = rows.fresh and self.starts_at_projections
        with ExitStack() as stack:
            if self.positions is None:
                self._edit(stack, rows, None, skips)
                return call.run((rows.resid,))[0]
            positions = self.positions[example]
            narrow = Narrow(call, positions)
            known = None if skips else narrow.keys_values(rows.resid)
            self._edit(stack, rows, positions, skips)
            return narrow.run(narrow.pick(rows.resid), known, rows.resid.shape[1])

    def _shared(self, example: Int[Tensor, "row"]) -> dict[int, Any]:
        key = tuple(example.tolist())
        if key not in self.expanded and len(self.expanded) > 8:
            self.expanded.clear()
        return self.expanded.setdefault(key, {})

    def _edit(self, stack: ExitStack, rows: Rows, positions: Tensor | None, skips: bool) -> None:
        """Put gates on the sites that lose something, and answers on the owners of known z."""
        edits: dict[Place, Edit] = {}
        for site in self.sites:
            components = site.components  # made anew at each asking
            keep = [[float(c not in cut) for c in components] for cut in rows.cuts]
            if any(0.0 in row for row in keep):
                device = execution_device(self.hf_model.get_submodule(site.path))
                gate = torch.tensor(keep, device=device)[:, None]  # [row, 1, width]
                gate = gate if site.kind == "head" else gate[..., 0]
                edits[place_of(site)] = edit_of(site, gate, self._stand_in(site, rows, positions))
        if skips:
            for site in self._first:
                known = self.known[site.name]
                answer = _answer(known, rows.example, positions)
                stack.enter_context(_answering(known.owner, answer))
        stack.enter_context(hooked(self.hf_model, edits))

    def _stand_in(
        self, site: Site, rows: Rows, positions: Tensor | None
    ) -> Callable[[Tensor], Tensor] | None:
        """The fill at a site for these rows, or None for zero."""
        if isinstance(self.fill, str):
            return None
        at = self.fill.at(site, execution_device(self.hf_model.get_submodule(site.path)))
        batch, pos, _ = self.recorded.shape

        def stand_in(x: Tensor) -> Tensor:
            whole = at(x.new_empty(()).expand(batch, pos, x.shape[-1]))
            example = rows.example.to(x.device)
            if positions is None:
                return whole[example]
            return whole[example[:, None], positions.to(x.device)]

        return stand_in


def _answer(
    known: Known, example: Int[Tensor, "row"], positions: Tensor | None
) -> Callable[[], Any]:
    """What an owner would say of some rows of the whole model; its projection is called anew."""

    def answer() -> Any:
        assert known.x is not None
        at = example.to(known.x.device)
        x = known.x[at] if positions is None else known.x[at[:, None], positions.to(at.device)]
        first = known.out(x) if known.ends_in == "y" else x
        return first if known.rest is None else (first, *known.rest)

    return answer
