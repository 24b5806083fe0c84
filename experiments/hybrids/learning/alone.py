"""How is one seed trained without paying for an axis of seeds that is 1 long?

`Alone` answers to what `ablate.students.Students` does, for a model that has no company: the model
runs as it is, its parameters being views W[0] of the stacks, so that optimiser, checkpoints and
clipping need not know the difference. A gradient that arrives at a parameter is handed to its
stack, not copied.

Where it misleads. The stacks own the memory: writing to them in place is fine, giving one another
tensor (`stack.data = …`) leaves the model behind.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class Alone(nn.Module):
    """A copy of `model` with these weights, as students of whom there is one.

    All parameters are trained. Parameters of this module are the stacks, [1, ...] each.
    """

    count = 1

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        body = copy.deepcopy(model)
        self.stacked = nn.ParameterDict()
        self._names: dict[str, str] = {}
        for name, parameter in list(body.named_parameters()):
            held = weights[name].detach().to(parameter, copy=True)[None]
            self._names[name] = key = name.replace(".", "/")
            self.stacked[key] = stack = nn.Parameter(held)
            parameter.data = stack.data[0]
            parameter.register_post_accumulate_grad_hook(_handing(stack))
        self.body = [body]  # in a list: its parameters are this module's already, as stacks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return self.body[0](*args, **kwargs)

    def weights(self, student: int) -> dict[str, Tensor]:
        """The tensors of the one student by their names in the model: views, not copies."""
        return {name: stack.detach()[student] for name, stack in self.trained().items()}

    def trained(self) -> dict[str, Float[Tensor, "student ..."]]:
        """The stacked tensors by their names in the model."""
        return {name: self.stacked[key] for name, key in self._names.items()}

    def train(self, mode: bool = True) -> Alone:
        """Dropout on or off."""
        super().train(mode)
        self.body[0].train(mode)
        return self


def _handing(stack: nn.Parameter) -> Any:
    """Take a parameter's gradient away, to its stack."""

    def hand(parameter: Tensor) -> None:
        if parameter.grad is not None:
            grad = parameter.grad[None]
            stack.grad = grad if stack.grad is None else stack.grad + grad
            parameter.grad = None

    return hand
