"""The LM head on scored positions: hidden states in, the log-prob of each position's target token out, and on request the
normaliser log Σ exp of the logits.

Logits exist for one tile of positions × vocabulary entries at a time, in at least fp32, and are computed again in the backward
pass. Memory therefore does not grow with positions × vocabulary, and a log-prob does not carry the rounding of bf16 logits (a
step of 0.125 at a logit of 20). `Head.of` says what a model does between its last hidden state and its logits, or refuses;
`check_head` compares the result with the model's own logits.

On CUDA a fused kernel takes the tiles' place where one is installed and gives the same values and gradients (`choose_kernel`).
Never run so far, for want of a GPU: the tiles on CUDA, and both fused kernels. What is said about those is from their sources.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

TILES = {"cpu": (1024, 8192), "cuda": (2048, 16384)}
"""Positions × vocabulary entries per tile, 32 and 128 MiB. On a CPU smaller ones were slower; the GPU's are a guess."""


class UnknownHeadError(RuntimeError):
    """What a model does between its last hidden state and its logits is not known."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


@dataclass(frozen=True, eq=False)
class Head:
    """A model's LM head as data: logits = cap(scale * (h Wᵀ + b)), where cap(z) = softcap * tanh(z / softcap)."""

    weight: Tensor
    """(vocabulary, hidden)"""
    bias: Tensor | None
    """(vocabulary,)"""
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: PreTrainedModel) -> Head:
        """The head of a causal language model.

        A wrapper of peft is looked through; an adapter on the head itself is not.

        Raises:
            UnknownHeadError: the model has no plain linear head, or does something to logits that is not known.
        """
        model = _unwrapped(model)
        layer = _plain_linear(model)
        scale, softcap = _logit_changes(model)
        return Head(layer.weight, layer.bias, scale, softcap)

    def tempered(self, temperature: float) -> Head:
        """The head whose logits are those of this one divided by a temperature: cap(z) / T caps z / T at softcap / T."""
        if temperature == 1:
            return self
        softcap = None if self.softcap is None else self.softcap / temperature
        return Head(self.weight, self.bias, self.scale / temperature, softcap)


Kernel = Callable[[Tensor, Head, Tensor], Tensor]
"""(hidden, head, targets) → log-probs; the arguments and the result of `scored_logps`."""


def tiled_logps(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """`scored_logps` in plain PyTorch, on every device."""
    return logps_and_normalisers(hidden, head, targets)[0]


def logps_and_normalisers(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log π(target) and log Σ exp of the logits at every position, both as `scored_logps` and differentiable; always in tiles.

    Returns:
        (positions,) each; their sum is the target's logit.
    """
    dtype = _operand_dtype(hidden, head)
    tile = TILES.get(hidden.device.type, TILES["cuda"])
    both: tuple[Tensor, Tensor] = _TiledLogps.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head.scale, head.softcap, dtype, tile
    )
    return both


def scored_logps(hidden: Tensor, head: Head, targets: Tensor, kernel: Kernel = tiled_logps) -> Tensor:
    """log π(target) at every position, (positions,), at least fp32; differentiable in hidden, weight and bias.

    Logits and their sums are at least fp32 whatever the dtype of hidden states and head. Operands of different dtypes are
    promoted; under torch.autocast they are rounded to its dtype, as a linear layer's are (the bias is not, nor are the logits).

    Args:
        hidden: (positions, hidden), the backbone's last hidden states.
        targets: (positions,) int64, each below the vocabulary's size; one that is not gives nan.
        kernel: what computes it, see `choose_kernel`.
    """
    return kernel(hidden, head, targets) if len(hidden) else tiled_logps(hidden, head, targets)


class _TiledLogps(torch.autograd.Function):
    """z[target] − max z − log Σ exp(z − max z), and max z + log Σ exp(z − max z), tile by tile, with z computed again in the
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), scale, softcap, dtype, tile)
        with torch.autocast(hidden.device.type, enabled=False):
            logps, largest, total = _forward(tiles, targets)
        ctx.save_for_backward(hidden, weight, bias, targets, largest, total)
        ctx.setting = (scale, softcap, dtype, tile)
        ctx.set_materialize_grads(False)  # a loss that does not use the normalisers takes the shorter way back
        return logps, largest + total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logps: Tensor | None, of_normalisers: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, largest, total = ctx.saved_tensors
        tiles = _Tiles(hidden, weight, bias, *ctx.setting)
        if of_logps is None:
            of_logps = torch.zeros_like(largest)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _backward(tiles, targets, largest, total, of_logps, of_normalisers, ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None, None


@dataclass(frozen=True, eq=False)
class _Tiles:
    """A head on some positions, cut into tiles of logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype
    """What operands of matrix products are rounded to."""
    shape: tuple[int, int]

    @property
    def exact(self) -> torch.dtype:
        """The dtype of logits, sums and accumulators."""
        return torch.promote_types(self.dtype, torch.float32)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of positions, and their hidden states as operands."""
        for rows in _blocks(len(self.hidden), self.shape[0]):
            yield rows, self.operand(self.hidden[rows])

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the vocabulary, and their weights as operands."""
        for columns in _blocks(len(self.weight), self.shape[1]):
            yield columns, self.operand(self.weight[columns])

    def buffer(self) -> Tensor:
        """Room for the largest tile."""
        size = min(self.shape[0], len(self.hidden)) * min(self.shape[1], len(self.weight))
        return self.hidden.new_empty(size, dtype=self.exact)

    def operand(self, part: Tensor) -> Tensor:
        """A factor of a matrix product: rounded to `dtype`, and in the dtype that the device multiplies in."""
        rounded = part.to(self.dtype)
        return rounded if self._multiplies_narrow else rounded.to(self.exact)

    def logits(self, hidden: Tensor, weight: Tensor, columns: slice, buffer: Tensor) -> Tensor:
        """One tile of logits, (rows, columns), written into the buffer."""
        z = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        if self._multiplies_narrow:
            torch.mm(hidden, weight.T, out_dtype=self.exact, out=z)
            z = z.mul_(self.scale) if self.scale != 1 else z
            z = z.add_(self.bias[columns], alpha=self.scale) if self.bias is not None else z
        elif self.bias is None:
            torch.addmm(z, hidden, weight.T, beta=0, alpha=self.scale, out=z)
        else:
            torch.addmm(self.bias[columns].to(self.exact), hidden, weight.T, beta=self.scale, alpha=self.scale, out=z)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left @ right to an accumulator in at least fp32."""
        if self._multiplies_narrow:
            total.add_(torch.mm(left.to(self.dtype), right, out_dtype=self.exact))
        else:
            total.addmm_(left, right)

    @property
    def _multiplies_narrow(self) -> bool:
        """Whether the device multiplies operands narrower than fp32 into an fp32 result; on others fp32 does the same."""
        return self.dtype != self.exact and self.hidden.is_cuda and _has_out_dtype()


def _forward(tiles: _Tiles, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, largest logits and Σ exp(z − largest), each (positions,)."""
    buffer = tiles.buffer()
    chosen = buffer.new_full((len(targets),), torch.nan)
    # not −inf: a tile of −inf alone must not give −inf − −inf
    largest = torch.full_like(chosen, torch.finfo(buffer.dtype).min)
    total = torch.zeros_like(chosen)
    for rows, hidden in tiles.rows():
        for columns, weight in tiles.columns():
            z = tiles.logits(hidden, weight, columns, buffer)
            index, inside = _place(targets[rows], columns)
            chosen[rows] = torch.where(inside, z.gather(1, index[:, None]).squeeze(1), chosen[rows])
            top = torch.maximum(largest[rows], z.amax(1))
            total[rows] *= (largest[rows] - top).exp_()
            total[rows] += z.sub_(top[:, None]).exp_().sum(1)
            largest[rows] = top
    # this order keeps a confident target's log-prob: its z − max is exactly 0
    return (chosen - largest) - total.log(), largest, total


def _backward(
    tiles: _Tiles,
    targets: Tensor,
    largest: Tensor,
    total: Tensor,
    of_logps: Tensor,
    of_normalisers: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias in their dtypes; of those that are needed, None for the others.

    With gradients g of the log-prob and n of the normaliser, that of a logit is g (onehot − p) + n p: a row's slope p − onehot
    times the factor −g, or, where there is an n, (g − n) p − g onehot times −1.
    """
    buffer = tiles.buffer()
    of_hidden, of_weight, of_bias = (
        torch.zeros(source.shape, dtype=buffer.dtype, device=buffer.device) if need and source is not None else None
        for source, need in zip((tiles.hidden, tiles.weight, tiles.bias), needed, strict=True)
    )
    factor = of_logps.to(buffer.dtype) * -tiles.scale
    weights: tuple[Tensor, Tensor] | None = None
    if of_normalisers is not None:
        weights = (of_logps.to(buffer.dtype) - of_normalisers.to(buffer.dtype), of_logps.to(buffer.dtype))
        factor = torch.full_like(factor, -tiles.scale)
    for rows, hidden in tiles.rows():
        weighted = hidden * factor[rows, None] if of_weight is not None else hidden
        for columns, weight in tiles.columns():
            z = tiles.logits(hidden, weight, columns, buffer)
            of_rows = None if weights is None else (weights[0][rows], weights[1][rows])
            slope = _slope(tiles, z, columns, targets[rows], largest[rows], total[rows], of_rows)
            if of_hidden is not None:
                tiles.add_product(of_hidden[rows], slope, weight)
            if of_weight is not None:
                tiles.add_product(of_weight[columns], slope.T, weighted.to(hidden.dtype))
            if of_bias is not None:
                of_bias[columns] += slope.T @ factor[rows]
    if of_hidden is not None:
        of_hidden *= factor[:, None]
    return (
        None if of_hidden is None else of_hidden.to(tiles.hidden.dtype),
        None if of_weight is None else of_weight.to(tiles.weight.dtype),
        None if of_bias is None or tiles.bias is None else of_bias.to(tiles.bias.dtype),
    )


def _slope(
    tiles: _Tiles,
    z: Tensor,
    columns: slice,
    targets: Tensor,
    largest: Tensor,
    total: Tensor,
    weights: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """−d log π(target) / dz before cap, over a tile of z and in its place: (p − onehot) · cap′, in at least fp32.

    Args:
        weights: of p and of onehot in each row, where they are not 1.
    """
    cap = None if tiles.softcap is None else 1 - (z / tiles.softcap).square_()
    share = total.reciprocal() if weights is None else weights[0] / total
    p = z.sub_(largest[:, None]).exp_().mul_(share[:, None])
    index, inside = _place(targets, columns)
    here = inside.to(p.dtype) if weights is None else inside * weights[1]
    p.scatter_add_(1, index[:, None], -here[:, None])
    return p if cap is None else p.mul_(cap)


def _place(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's place within a block of the vocabulary, and whether it is in it (without a wait for the GPU)."""
    index = targets - columns.start
    inside = (index >= 0) & (index < columns.stop - columns.start)
    return index.clamp_(0, columns.stop - columns.start - 1), inside


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _operand_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """What hidden states and weights are rounded to before they are multiplied: what autocast rounds to, where it is on."""
    device, dtype = hidden.device.type, torch.promote_types(hidden.dtype, head.weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


@cache
def _has_out_dtype() -> bool:
    """Whether this torch has a matrix product from bf16 into fp32 (2.8 and newer)."""
    return hasattr(torch.ops.aten.mm, "dtype")


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The module whose `last_hidden_state` feeds the head.

    Raises:
        UnknownHeadError: there is none apart from the model itself.
    """
    model = _unwrapped(model)
    body = model.base_model
    if body is model:  # Llama 4 names another attribute than the one it has
        body = getattr(model, "model", model)
    if body is model or not isinstance(body, torch.nn.Module):
        raise UnknownHeadError(type(model).__name__, "its backbone is not a module of its own")
    return body


@torch.no_grad()
def check_head(model: PreTrainedModel, input_ids: Tensor) -> float:
    """How far log-probs through the head differ at most from the log_softmax of the model's own logits, in nats per token.

    Compared at every position for the given, the likeliest and the unlikeliest token. What the rounding of the model's own logits
    explains is taken off: in bf16 those of size 100 are a quarter apart from the truth.

    Args:
        model: in eval mode.
        input_ids: (rows, width), without padding.

    Raises:
        UnknownHeadError: there is no head to compare.
    """
    head = Head.of(model)
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    if hidden.shape[-1] != head.weight.shape[1] or len(hidden) != len(logps):
        raise UnknownHeadError(type(model).__name__, "its head does not fit its backbone")
    differences = [
        scored_logps(hidden, head, targets) - logps.gather(1, targets[:, None]).squeeze(1)
        for targets in (input_ids.flatten(), logps.argmax(1), logps.argmin(1))
    ]
    rounding = float(logits.abs().max()) * torch.finfo(logits.dtype).eps  # half a step each of a logit and of the largest
    return max(0.0, float(torch.stack(differences).abs().max()) - rounding)


def _unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model that peft wrapped, or the model itself. Adapters inside its layers stay at work."""
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnknownHeadError(type(model).__name__, "its adapter is a learned prompt")
    inner: PreTrainedModel = model.get_base_model()
    return inner


def _plain_linear(model: PreTrainedModel) -> torch.nn.Linear:
    """The head's layer, if it is a plain linear layer and the only one after the backbone.

    Raises:
        UnknownHeadError: it is not.
    """
    what, layer = type(model).__name__, model.get_output_embeddings()
    if model.config.is_encoder_decoder:
        raise UnknownHeadError(what, "it is an encoder with a decoder")
    # quantised layers inherit from Linear, and other libraries hang their own forward on the object
    if not isinstance(layer, torch.nn.Linear) or type(layer).forward is not torch.nn.Linear.forward or "forward" in vars(layer):
        raise UnknownHeadError(what, f"its head is no plain linear layer but {type(layer).__name__}")
    body = backbone(model)
    children = [(name, child) for name, child in model.named_children() if child not in (layer, body)]
    others = [name for name, child in children if next(child.parameters(), None) is not None]
    if others:
        raise UnknownHeadError(what, f"there is more beside backbone and head: {', '.join(others)}")
    return layer


_SUSPECT = re.compile(r"logit|lm_head|unembed|soft_?cap|output_(multiplier|scal)|mup_width|dim_model_base|unpadded_vocab")
"""Names of configuration values that may change logits …"""
_HARMLESS = re.compile(r"^(attn|attention|conf_attention|gate|num)_|router|init_value|_bias$|inputs_to_logits|chunk|freeze")
"""… and of those that do not: attention, routers, initial values; and a bias, which is the layer's own."""
_KNOWN = {
    "final_logit_softcapping": {"": "cap"},
    "logits_soft_cap": {"recurrent_gemma": "cap"},
    "output_logit_soft_cap": {"xlstm": "cap"},
    "logit_scale": {"cohere": "multiply"},
    "logits_scaling": {"granite": "divide", "minicpm3": "divide", "hyperclovax": "multiply"},
    "dim_model_base": {"minicpm3": "ignore"},  # logits_scaling says it
    "lm_head_multiplier": {"falcon_h1": "multiply"},
    "output_multiplier": {"muse_glimmer": "multiply"},
    "logits_mup_width_multiplier": {"inkling": "divide"},
}
"""Configuration value → beginning of the family's model_type → what it does. One name means opposite things in two families."""


def _logit_changes(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and cap of the logits, from the configuration.

    Raises:
        UnknownHeadError: a value that looks like a change of logits is not known for this family.
    """
    config: PretrainedConfig = model.config.get_text_config()
    scale, softcap = 1.0, None
    for name in dir(config):
        if not _SUSPECT.search(name) or _HARMLESS.search(name):
            continue
        value = getattr(config, name)
        if value is None or value is False or callable(value) or (value == 1 and value is not True and "cap" not in name):
            continue
        known = (effect for family, effect in _KNOWN.get(name, {}).items() if config.model_type.startswith(family))
        match next(known, None):
            case "multiply":
                scale *= float(value)
            case "divide":
                scale /= float(value)
            case "cap":
                softcap = float(value)
            case None:
                raise UnknownHeadError(type(model).__name__, f"what {name}={value!r} does to its logits is not known")
    return scale, softcap


def choose_kernel(head: Head, hidden_size: int, device: torch.device) -> Kernel:
    """The first of KERNELS that gives what the tiles give, or the tiles; on a CPU, the tiles.

    The first call for a kind of head tries the installed kernels on a random problem of that vocabulary.
    """
    if device.type != "cuda":
        return tiled_logps
    dtype = _operand_dtype(torch.empty(0, device=device, dtype=head.weight.dtype), head)
    return _first_right(
        (len(head.weight), min(hidden_size, CHECKED_WIDTH)), head.bias is not None, head.scale, head.softcap, dtype, device
    )


def _liger(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Liger's kernel: no bias and no cap. Its path for other GPUs than Hopper rounds logits to bf16: refused by the check."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # type: ignore[import-not-found,unused-ignore]

    if head.bias is not None or head.softcap is not None:
        raise NotImplementedError("no bias and no cap")
    dtype = _operand_dtype(hidden, head)
    nll: Tensor = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden.to(dtype), head.weight.to(dtype), targets, 1 / head.scale
    )
    return -nll


def _cut_cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Apple's kernel, without its gradient filter and with fp32 sums. A scale is put on the hidden states, in their dtype."""
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found,unused-ignore]

    dtype = _operand_dtype(hidden, head)
    bias = None if head.bias is None else head.bias.to(dtype) * head.scale
    options = {"filter_eps": None, "accum_e_fp32": True, "accum_c_fp32": True, "softcap": head.softcap, "reduction": "none"}
    scaled = hidden.to(dtype) * head.scale
    nll: Tensor = linear_cross_entropy(scaled, head.weight.to(dtype), targets, bias=bias, impl="cce", **options)
    return -nll


KERNELS: dict[str, Kernel] = {"liger_kernel": _liger, "cut_cross_entropy": _cut_cross_entropy}
"""What may take the tiles' place on CUDA, in the order of trial; their speed was not measured."""
KERNEL_TOLERANCE = (1e-3, 1e-4, 1e-2)
"""Nats per token; relative norm of each gradient's difference for fp32 operands, and for narrower ones (rounded slopes)."""
CHECKED_POSITIONS = 600
"""More than the 512 positions that Liger's slower paths take at a time."""
CHECKED_WIDTH = 512
"""Hidden size of the check, at most: its weights and gradients must fit beside a model in training."""


@cache
def _first_right(
    shape: tuple[int, int], biased: bool, scale: float, softcap: float | None, dtype: torch.dtype, device: torch.device
) -> Kernel:
    """The first of KERNELS that passes the check on random operands, or the tiles."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device).to(dtype)

    # logits of size 5 with a few of 20: there bf16 logits are wrong by more than the tolerance
    spread = 5 / (shape[1] ** 0.5 * abs(scale))
    head = Head(normal(*shape), normal(shape[0]) if biased else None, scale, softcap)
    hidden = normal(CHECKED_POSITIONS, shape[1]) * spread
    targets = torch.randint(shape[0], (CHECKED_POSITIONS,), generator=random, device=device)
    for name, kernel in KERNELS.items():
        if _is_right(name, kernel, hidden, head, targets):
            return kernel
    return tiled_logps


def _is_right(name: str, kernel: Kernel, hidden: Tensor, head: Head, targets: Tensor) -> bool:
    """Whether a kernel gives the tiles' values and gradients; one that does not leaves a warning, one not installed nothing."""
    try:
        found, wanted = (_with_gradients(each, hidden, head, targets) for each in (kernel, tiled_logps))
    except (ImportError, NotImplementedError):  # not installed, or not made for such a head
        return False
    except Exception as error:  # a compiler's errors have every type
        logger.warning(
            "the kernel %s is not used: it failed with %s: %s", name, type(error).__name__, " ".join(str(error).split())
        )
        return False
    nats = float((found[0] - wanted[0]).abs().max())
    gradient = max(float((a - b).norm() / b.norm()) for a, b in zip(found[1:], wanted[1:], strict=True))
    if nats <= KERNEL_TOLERANCE[0] and gradient <= KERNEL_TOLERANCE[1 if hidden.dtype in (torch.float32, torch.float64) else 2]:
        return True
    logger.warning("the kernel %s is not used: off by %.2g nats per token and %.2g of the gradient", name, nats, gradient)
    return False


def _with_gradients(kernel: Kernel, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, ...]:
    """Log-probs and the gradients of a weighted sum of them."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (hidden, head.weight, head.bias) if leaf is not None]
    with torch.enable_grad():
        logps = kernel(leaves[0], Head(leaves[1], leaves[2] if len(leaves) > 2 else None, head.scale, head.softcap), targets)
        weights = torch.linspace(-1, 1, len(logps), device=logps.device)
        gradients = torch.autograd.grad((logps * weights).sum(), leaves)
    return tuple(part.detach().float() for part in (logps, *gradients))
