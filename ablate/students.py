"""How are K copies of a block, each with weights of its own, run and trained as one?

Students answer the same question from different starts: other seeds, learning rates, initial
laws. Their weights are stacked on a leading axis, W [student, ...], their rows on the batch axis:
row k * batch + b of a residual stream is row b of student k. The block's own code runs once on all
rows, so attention, activations and dropout cost one call; only the modules that hold a trained
tensor know that there are students:

    Linear, Conv1D   one product per student, written into one tensor
    norms            the module's own code, mapped over the student axis
    anything else    (an SSM, experts) the module's own code, once per student

Tensors in which the students agree and which nobody trains stay single: they cost what they cost in
the frozen model. The user's block is never touched: students live in a copy of it.

Where it misleads. Dropout draws one mask for all rows, so two students of one seed see other masks.
One student of K rounds as a model with K times the rows does: 1e-6 of the largest activation.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D


class Students(nn.Module):
    """K copies of `block` as one module; called as the block is, with K times the rows.

    `weights` holds, for every student, tensors by their names in the block; a tensor that is not
    there is the block's. `trained` are the names that get gradients; parameters of this module are
    exactly these, [student, ...] each, under `stacked`.

    Raises ValueError for a name or a shape the block does not have, for a block of which a tensor
    is offloaded, and for no students.
    """

    def __init__(
        self,
        block: nn.Module,
        weights: Sequence[Mapping[str, Tensor]],
        trained: Collection[str],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not weights:
            raise ValueError("no students asked for: give the weights of at least one")
        own = dict(block.named_parameters())
        _check(own, weights, trained)
        self.count = len(weights)
        body = _copy(block)
        body.requires_grad_(False)
        differing = {name for given in weights for name in given} | set(trained)
        self.stacked = nn.ParameterDict()
        self._names: dict[str, str] = {}
        for holder, names in _by_holder(body, differing).items():
            stacks = {}
            for name in names:
                given = [w.get(name, own[name]).detach().to(own[name].device) for w in weights]
                stack = nn.Parameter(torch.stack(given).to(dtype), requires_grad=name in trained)
                self._names[name] = key = name.replace(".", "/")
                self.stacked[key] = stack
                stacks[name.removeprefix(f"{holder}.")] = stack
            body = _planted(body, holder, stacks, self.count)
        self.body = [body]  # in a list: its frozen weights are no parameters of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns, for the rows of all students."""
        return self.body[0](*args, **kwargs)

    def weights(self, student: int) -> dict[str, Tensor]:
        """The tensors of one student by their names in the block: views, not copies."""
        return {name: self.stacked[key].detach()[student] for name, key in self._names.items()}

    def trained(self) -> dict[str, Float[Tensor, "student ..."]]:
        """The stacked tensors that are trained, by their names in the block."""
        named = {name: self.stacked[key] for name, key in self._names.items()}
        return {name: stack for name, stack in named.items() if stack.requires_grad}

    def train(self, mode: bool = True) -> Students:
        """Dropout in the copy on or off."""
        super().train(mode)
        self.body[0].train(mode)
        return self


def _check(
    own: Mapping[str, Tensor], weights: Sequence[Mapping[str, Tensor]], trained: Collection[str]
) -> None:
    for name, tensor in own.items():
        if tensor.is_meta:
            raise ValueError(
                f"{name} of a block with students is offloaded: load the model with a device_map"
                " that keeps the whole block on a device"
            )
    for name in trained:
        if name not in own:
            raise ValueError(f"{name} is to be trained: the block has {', '.join(own)}")
    for given in weights:
        for name, tensor in given.items():
            if name not in own:
                raise ValueError(f"a student has {name}: the block has {', '.join(own)}")
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"a student's {name} is {list(tensor.shape)}, the block's"
                    f" {list(own[name].shape)}: give it the same shape"
                )


def _copy(block: nn.Module) -> nn.Module:
    """A copy without hooks: the user's (and accelerate's) stay where they are.

    Accelerate's are not copied on the way: they hold on to the weights of other blocks.
    """
    hooks = [module._hf_hook for module in block.modules() if hasattr(module, "_hf_hook")]  # noqa: SLF001
    body = copy.deepcopy(block, {id(hook): hook for hook in hooks})
    remove_hook_from_module(body, recurse=True)
    for module in body.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):  # noqa: SLF001
            hooks.clear()
    return body


def _by_holder(body: nn.Module, names: Collection[str]) -> dict[str, list[str]]:
    """Module that has to know of students -> the tensors it gets, by their names in the block."""
    holders = {name.rpartition(".")[0] for name in names}
    # A module with tensors of its own beside submodules uses them as it likes: all under it is its.
    apart = {
        h for h in holders if any(body.get_submodule(h).children()) and not _is_product(body, h)
    }
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        holder = name.rpartition(".")[0]
        above = [h for h in apart if h == "" or f"{holder}.".startswith(f"{h}.")]
        found.setdefault(min(above, key=len, default=holder), []).append(name)
    return found


def _is_product(body: nn.Module, holder: str) -> bool:
    return isinstance(body.get_submodule(holder), nn.Linear | Conv1D)


def _planted(
    body: nn.Module, holder: str, stacks: Mapping[str, nn.Parameter], count: int
) -> nn.Module:
    """`body` with the module at `holder` replaced by one that holds these stacks."""
    module = body.get_submodule(holder)
    direct = all("." not in name for name in stacks)
    if _is_product(body, holder):
        kind: type[_Holder] = _Linears
    elif direct and not any(module.children()) and _is_norm(module):
        kind = _Mapped
    else:
        kind = _Apart
    planted = kind(module, stacks, count)
    if not holder:
        return planted
    parent, _, name = holder.rpartition(".")
    setattr(body.get_submodule(parent), name, planted)
    return body


def _is_norm(module: nn.Module) -> bool:
    """A map of one vector to one vector of its size, with vectors for weights."""
    return (
        all(tensor.ndim == 1 for tensor in module.parameters()) and "Norm" in type(module).__name__
    )


class _Holder(nn.Module):
    """A module whose tensors have a student axis; other attributes are the module's own."""

    def __init__(self, module: nn.Module, stacks: Mapping[str, nn.Parameter], count: int) -> None:
        super().__init__()
        self.count = count
        self.stacks = dict(stacks)
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class _Linears(_Holder):
    """y_k = x_k W_kᵀ + b_k; Conv1D keeps Wᵀ."""

    def forward(self, x: Float[Tensor, "rows *pos d_in"]) -> Float[Tensor, "rows *pos d_out"]:
        module: Any = self.module
        weight = self._stack("weight")
        bias = self._stack("bias") if module.bias is not None else None
        if isinstance(module, Conv1D):
            weight = weight.mT
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        elif x.dtype != weight.dtype:
            weight = weight.to(x.dtype)
            bias = bias if bias is None else bias.to(x.dtype)
        rows = x.reshape(self.count, -1, x.shape[-1])
        return _products(rows, weight, bias).reshape(*x.shape[:-1], weight.shape[1])

    def _stack(self, name: str) -> Tensor:
        if name in self.stacks:
            return self.stacks[name]
        shared = getattr(self.module, name)
        return shared.expand(self.count, *shared.shape)


def _products(
    x: Float[Tensor, "student n d_in"],
    weight: Float[Tensor, "student d_out d_in"],
    bias: Float[Tensor, "student d_out"] | None,
) -> Float[Tensor, "student n d_out"]:
    """x_k W_kᵀ + b_k for every student."""
    if len(weight) == 1:
        # squeeze, not [0]: the gradient of an index is written into zeros.
        alone = None if bias is None else bias.squeeze(0)
        return nn.functional.linear(x.squeeze(0), weight.squeeze(0), alone)[None]
    if x.device.type != "cpu":
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias[:, None], x, weight.mT)
    return _OneByOne.apply(x, weight, bias)  # pyright: ignore[reportReturnType]


class _OneByOne(torch.autograd.Function):
    """The products as K large ones: CPU libraries run a batched product at 80 % of their rate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        out = x.new_empty(*x.shape[:2], weight.shape[1])
        for k in range(len(weight)):
            if bias is None:
                torch.mm(x[k], weight[k].T, out=out[k])
            else:
                torch.addmm(bias[k], x[k], weight[k].T, out=out[k])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        to_x = torch.empty_like(x) if need_x else None
        to_weight = weight.new_empty(weight.shape) if need_weight else None
        for k in range(len(weight)):
            if to_x is not None:
                torch.mm(grad[k], weight[k], out=to_x[k])
            if to_weight is not None:
                torch.mm(grad[k].T, x[k], out=to_weight[k])
        return to_x, to_weight, grad.sum(1) if ctx.has_bias and need_bias else None


class _Mapped(_Holder):
    """A norm's own forward, mapped over the student axis."""

    def forward(self, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        rows = x.unflatten(0, (self.count, -1))
        if isinstance(self.module, nn.LayerNorm):
            return self._layer_norm(rows).flatten(0, 1)
        if type(self.module) is nn.RMSNorm:  # torch's own: no mapping needed
            normed = nn.functional.rms_norm(
                rows, self.module.normalized_shape, None, self.module.eps
            )
            gain = self.stacks["weight"].reshape(self.count, *[1] * (rows.ndim - 2), -1)
            return (normed * gain).flatten(0, 1).to(x.dtype)
        names = list(self.stacks)

        def one(row: Tensor, *tensors: Tensor) -> Tensor:
            return functional_call(self.module, dict(zip(names, tensors, strict=True)), (row,))

        return torch.vmap(one)(rows, *self.stacks.values()).flatten(0, 1).to(x.dtype)

    def _layer_norm(self, rows: Tensor) -> Tensor:
        module: Any = self.module
        given = {**dict(module.named_parameters()), **self.stacks}
        if self.count == 1 and all(t.dtype == rows.dtype for t in given.values()):
            own = {n: t.squeeze(0) if n in self.stacks else t for n, t in given.items()}
            weight, bias = own.get("weight"), own.get("bias")
            normed = nn.functional.layer_norm(
                rows, module.normalized_shape, weight, bias, module.eps
            )
            return normed.to(rows.dtype)
        shape = (self.count, *[1] * (rows.ndim - 1 - len(module.normalized_shape)))
        normed = nn.functional.layer_norm(rows, module.normalized_shape, None, None, module.eps)
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            if (tensor := given.get(name)) is not None:
                stacked = name in self.stacks
                tensor = tensor.reshape(*shape, *module.normalized_shape) if stacked else tensor
                normed = combine(normed, tensor)
        return normed.to(rows.dtype)


class _Apart(_Holder):
    """A module's own forward, once per student on that student's rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).shape[0]
        own, answers = dict(self.module.named_parameters()), []
        for k in range(self.count):
            given = {name: stack[k].to(own[name].dtype) for name, stack in self.stacks.items()}
            mine = [_share(a, rows, k, self.count) for a in args]
            named = {n: _share(a, rows, k, self.count) for n, a in kwargs.items()}
            answers.append(functional_call(self.module, given, tuple(mine), named))
        return _joined(answers)


def _share(value: Any, rows: int, student: int, count: int) -> Any:
    """The part of an argument that belongs to one student: its rows, where it has rows."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
        return value.unflatten(0, (count, -1))[student]
    if isinstance(value, tuple):
        return tuple(_share(item, rows, student, count) for item in value)
    return value


def _joined(answers: Sequence[Any]) -> Any:
    first = answers[0]
    if isinstance(first, Tensor):
        return torch.cat(list(answers))
    if isinstance(first, tuple):
        return tuple(_joined(items) for items in zip(*answers, strict=True))
    return first
