"""Optimisers by name, and fp32 master weights for models that are held in bf16 or fp16.

Bytes per trained parameter. An fp32 model needs 4 for the weight, 4 for its gradient, and the optimiser's state: 8 (`adamw`),
4 (`rmsprop`) or 2 (`adamw-8bit`). A bf16 model needs 2 for the weight, 4 for the fp32 master, 4 for the gradient (summed in
fp32 on the master; a bf16 gradient lives only until its weight's backward is over) and the same state: 18, 14 or 12 in all, so
7.24 billion parameters take 130, 101 or 87 GB besides activations.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gsil_bench.errors import UserError, library, unknown_name


def _adamw(parameters: Sequence[Parameter], learning_rate: float, betas: tuple[float, float], weight_decay: float) -> Any:
    """AdamW, eps 1e-8, decoupled decay.

    Fused on a GPU, where the default makes copies as large as the weights. On a CPU the fused kernel rounds differently in the
    last bit and is not worth another set of numbers.
    """
    fused = True if all(parameter.is_cuda for parameter in parameters) else None
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=fused)


def _rmsprop(parameters: Sequence[Parameter], learning_rate: float, betas: tuple[float, float], weight_decay: float) -> Any:
    """RMSprop as `optim: rmsprop` of transformers' Trainer sets it, with which SPIN and GSIL were published.

    Torch's defaults: smoothing 0.99 (`betas` are AdamW's and unused), eps 1e-8, no momentum, not centred; the decay is an L2
    term in the gradient, not decoupled (SPIN's runs have none). One weight after another: all at once ("foreach") needs another
    4 bytes per parameter.
    """
    return torch.optim.RMSprop(parameters, lr=learning_rate, alpha=0.99, eps=1e-8, weight_decay=weight_decay, foreach=False)


def _adamw_8bit(parameters: Sequence[Parameter], learning_rate: float, betas: tuple[float, float], weight_decay: float) -> Any:
    """AdamW with moments in blocks of 8 bits; weights of fewer than 4096 elements keep fp32 moments."""
    bitsandbytes = library("bitsandbytes", "optimizer 'adamw-8bit'")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=learning_rate, betas=betas, eps=1e-8, weight_decay=weight_decay)


OPTIMIZERS: Mapping[str, Callable[[Sequence[Parameter], float, tuple[float, float], float], Any]] = {
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "adamw-8bit": _adamw_8bit,
}
"""Name → constructor from parameters, learning rate, betas and weight decay."""


class MasterWeights:
    """An optimiser that works on fp32 copies of bf16 or fp16 parameters and rounds them back after each step.

    A bf16 weight has 8 bits: a step below a 512th of it would be lost, and so would small gradients in a sum over micro-batches.
    Therefore the masters keep the weights' low bits, and each micro-batch's gradient is added to its master's `grad` in fp32 as
    soon as backward has it. Parameters in fp32 are their own masters. `param_groups` hold the masters: clip `trained_parameters`,
    not the model's parameters, whose `grad` is None.

    For one process, or for parameters that FSDP2 has sharded: DDP would find `parameter.grad` gone and average zeros, while each
    rank steps with its own gradient. Hooks and masters go with this object.
    """

    def __init__(self, parameters: Sequence[Parameter], make: Callable[[Sequence[Parameter]], torch.optim.Optimizer]) -> None:
        """Copy what needs a copy; `make` gets the masters in the order of the parameters.

        Raises:
            UserError: several processes hold all the weights each.
        """
        _refuse_replicas(parameters)
        self._pairs: list[tuple[Parameter, Parameter]] = []  # (the model's, its master)
        masters = []
        handles = []
        for parameter in parameters:
            master = parameter
            if _is_low_precision(parameter):
                master = Parameter(parameter.detach().float())
                self._pairs.append((parameter, master))
                hook = functools.partial(_move_gradient, master)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            masters.append(master)
        self._inner = make(masters)
        weakref.finalize(self, _remove, handles)  # a second optimiser of the same model must get the gradients

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimiser's groups, over the masters; setting `lr` works as with any optimiser."""
        return self._inner.param_groups

    def step(self) -> None:
        """Update the masters from their gradients and round them to the model's parameters."""
        self._inner.step()
        self._write_back()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the masters' gradients, and what a backward pass that failed half-way has left on the model's."""
        self._inner.zero_grad(set_to_none=set_to_none)
        for parameter, _ in self._pairs:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Inner state and masters: with them a resumed run repeats the bits of an uninterrupted one."""
        return {"inner": self._inner.state_dict(), "masters": [master.detach() for _, master in self._pairs]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, and write the masters to the model's parameters.

        Raises:
            ValueError: it belongs to other parameters.
        """
        saved: Sequence[Tensor] = state["masters"]
        if [tensor.shape for tensor in saved] != [master.shape for _, master in self._pairs]:
            raise ValueError("the saved master weights have other shapes than the model's parameters")
        self._inner.load_state_dict(state["inner"])
        for (_, master), tensor in zip(self._pairs, saved, strict=True):
            master.copy_(tensor)
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        for parameter, master in self._pairs:
            parameter.copy_(master)


AnyOptimizer = torch.optim.Optimizer | MasterWeights
"""What the loop drives: `param_groups`, `step`, `zero_grad`, `state_dict`, `load_state_dict`."""


def build_optimizer(
    parameters: Iterable[Parameter], name: str, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> AnyOptimizer:
    """The optimiser of a name over the parameters that require a gradient, with fp32 masters if one is below fp32.

    Args:
        parameters: a model's; frozen ones are left out.
        name: one of OPTIMIZERS.
        learning_rate: of the first step; the loop sets each group's `lr` afterwards.
        betas: AdamW's; RMSprop does not use them.
        weight_decay: 0 for none; decoupled for AdamW, an L2 term for RMSprop.

    Raises:
        UserError: an unknown name, or its library is not installed.
        ValueError: nothing requires a gradient.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient")

    def make(masters: Sequence[Parameter]) -> Any:
        return OPTIMIZERS[name](masters, learning_rate, betas, weight_decay)

    return MasterWeights(trained, make) if any(map(_is_low_precision, trained)) else make(trained)


def trained_parameters(optimizer: AnyOptimizer) -> list[Parameter]:
    """What is updated and whose `grad` is the step's gradient, to be clipped: the fp32 masters, or the model's own parameters."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _refuse_replicas(parameters: Iterable[Parameter]) -> None:
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and not all(hasattr(parameter, "full_tensor") for parameter in parameters):  # what a sharded one has
        raise UserError(
            "weights below fp32 cannot be trained by several processes that hold all of them: shard them, or use fp32"
        )


def _is_low_precision(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.element_size() < 4


def _move_gradient(master: Parameter, parameter: Tensor) -> None:
    """Add a parameter's fresh gradient to its master's, in the master's precision, and free it."""
    assert parameter.grad is not None, "called right after the gradient was made"
    if master.grad is None:
        master.grad = parameter.grad.to(master.dtype)
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
