"""A model as what training, reference and evaluation need of it: trees in, the log-prob of every scored token out.

One forward pass is: lay the trees out (packing.py), run the backbone with attention over trees (attention.py), gather the hidden
states of the scored positions, and turn those alone into log-probs (head.py). Which layout a model can have is found out on first
use: a faster one must give the log-probs and the gradients of plain padding on that model, or the next slower one is taken and
the reason is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from gsil_bench.errors import unknown_name
from gsil_bench.models.attention import KERNEL, NAME, SEGMENTS, CannotShareError, use_tree_attention
from gsil_bench.models.head import (
    Head,
    UnknownHeadError,
    backbone,
    check_head,
    choose_kernel,
    logps_and_normalisers,
    scored_logps,
)
from gsil_bench.models.noise import EmbeddingNoise
from gsil_bench.models.packing import LAYOUTS, Layout, PackedRow, TokenTree, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

WIDTH_CLASS = 512
"""Rows on a GPU are padded to a multiple of it: the compiled attention kernel then sees few widths."""
TOLERANCE = (1e-4, 1e-3)
"""What a layout may differ by from plain padding in fp32: nats per token, and relative norm of the embeddings' gradient."""
LOW_PRECISION_TOLERANCE = (0.25, 0.2)
"""The same in bf16, where padding differs from itself by as much; a wrong mask moves the gradient by its own size."""
LONGEST_PROBED_WINDOW = 64
"""Tokens; that a longer sliding window is honoured is seen from a model with a short one."""
SHARED_LAYERS = ("full_attention", "sliding_attention")
"""Kinds of layers that can attend over trees; chunked, linear or state-space layers carry more from token to token."""


Output = Literal["logps", "normalisers", "scalars"]


class Policy(torch.nn.Module):
    """log π(token | everything before it) of every scored token of some trees.

    The log-probs are computed inside `forward`, so that a wrapper (DDP, FSDP2) sees every use of the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout | str = "auto",
        autocast: bool = False,
        temperature: float = 1.0,
        scalar: bool = False,
    ) -> None:
        """Wrap a model, which serves one policy at a time and gets its own attention back from `restore`.

        Args:
            layout: "auto" takes the fastest that gives what padding gives; a name insists on that one.
            autocast: compute matrix products in bf16 under torch.autocast; the weights keep their precision.
            temperature: logits are divided by it.
            scalar: add a scalar head, for the output "scalars".

        Raises:
            CannotShareError: the layout that was insisted on is not possible.
        """
        super().__init__()
        if getattr(model.config, "_attn_implementation", None) == NAME:
            raise RuntimeError("the model belongs to another Policy: restore that one first")
        self.model = silence_dropout(model)
        self.scalar = ScalarHead(model) if scalar else None
        self.recomputes = False
        """Whether activations are computed again in the backward pass."""
        self.autocast = autocast
        self.temperature = temperature
        self.notes: list[str] = []
        """Why something slower than possible is used; empty where nothing is."""
        self.attention_kernel = "flex" if _device(model).type == "cuda" else "segments"
        self.head_note = self._check_head()
        self.layout: Layout = "padded"
        """The layout in use."""
        self._own_attention: str | None = None
        self._choose_layout(layout)

    def forward(
        self, trees: Sequence[TokenTree], outputs: Sequence[Output] = ("logps",), noise: EmbeddingNoise | None = None
    ) -> Tensor:
        """One number for every scored token, at least fp32: tree by tree, completion by completion, token by token.

        Args:
            outputs: which: the token's log-prob, the log Σ exp of the logits that it was predicted from, or the scalar head on
                the hidden state that it was predicted from.
            noise: added to the embeddings.

        Returns:
            (scored,) for one output, (outputs, scored) for several.
        """
        device = _device(self.model)
        row = lay_out(trees, self.layout, WIDTH_CLASS if device.type == "cuda" else 1).to(device)
        added = noise.on(self.model, trees, self.layout) if noise else nullcontext()
        with self._precision(device), added:
            found = self._found(row, outputs)
        return found[outputs[0]] if len(outputs) == 1 else torch.stack([found[name] for name in outputs])

    @torch.no_grad()
    def hidden_states(self, trees: Sequence[TokenTree]) -> Tensor:
        """The last hidden state that each scored token is predicted from, in the order of `forward`; (scored, hidden), fp32."""
        device = _device(self.model)
        row = lay_out(trees, self.layout, WIDTH_CLASS if device.type == "cuda" else 1).to(device)
        with self._precision(device):
            return self._hidden(row).float()

    def recompute_activations(self) -> None:
        """Keep no activations of the layers for the backward pass, but compute them again there."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.recomputes = True
        self._layers_train(True)

    def _layers_train(self, training: bool) -> None:
        """The mode of the layers alone: they recompute in training mode only, without a cache; dropout stays off."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = training

    def __enter__(self) -> Self:
        """The policy; afterwards the model has its own attention back."""
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the model its own attention back."""
        if self._own_attention is not None:
            self.model.set_attn_implementation(self._own_attention)
        self._own_attention, self.layout = None, "padded"

    @contextmanager
    def lent(self) -> Iterator[PreTrainedModel]:
        """The model with its own attention while the block lasts: to complete prompts with the policy that is being trained."""
        ours = self.model.config._attn_implementation
        if self._own_attention is not None:
            self.model.set_attn_implementation(self._own_attention)
        if self.recomputes:
            self._layers_train(False)
        try:
            yield self.model
        finally:
            if self._own_attention is not None:
                self.model.set_attn_implementation(ours)
            if self.recomputes:
                self._layers_train(True)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()

    def _found(self, row: PackedRow, outputs: Sequence[Output]) -> dict[Output, Tensor]:
        """The outputs, (scored,) each."""
        found: dict[Output, Tensor] = {}
        words = set(outputs) - {"scalars"}
        if words and self.head_note:
            both = _from_own_logits(self.model, self._inputs(row), row, self.temperature)
            found |= {"logps": both[0], "normalisers": both[1]}
            words = set()
        if not words and "scalars" not in outputs:
            return found
        hidden = self._hidden(row)
        if self.scalar is not None:
            found["scalars"] = self.scalar(hidden)
        if words:
            head = Head.of(self.model).tempered(self.temperature)
            if "normalisers" in words:
                found["logps"], found["normalisers"] = logps_and_normalisers(hidden, head, row.targets)
            else:
                found["logps"] = scored_logps(hidden, head, row.targets, choose_kernel(head, hidden.shape[1], hidden.device))
        return found

    def _hidden(self, row: PackedRow) -> Tensor:
        """(scored, hidden)"""
        hidden: Tensor = backbone(self.model)(**self._inputs(row)).last_hidden_state
        return hidden.flatten(0, 1)[row.sources]

    def _inputs(self, row: PackedRow) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": row.input_ids, "use_cache": False}
        if row.segments is not None:
            inputs |= {"position_ids": row.position_ids, SEGMENTS: row.segments, KERNEL: self.attention_kernel}
        return inputs

    def _check_head(self) -> str:
        """Why the head on scored positions cannot be used with this model, or nothing."""
        try:
            ids = torch.arange(1, 9, device=_device(self.model)).remainder(Head.of(self.model).weight.shape[0]).reshape(1, 8)
            with torch.no_grad():
                error = check_head(self.model, ids)
            reason = "" if error <= self._tolerance()[0] else f"its log-probs differ by {error:.2g} from the model's own logits"
        except UnknownHeadError as error_:
            reason = str(error_)
        return self._note(f"the LM head runs as the model has it, over whole vocabularies: {reason}") if reason else ""

    def _choose_layout(self, wanted: str) -> None:
        if wanted == "padded":
            return
        failure, kernels = "", dict.fromkeys((self.attention_kernel, "segments"))
        for layout in LAYOUTS[:-1] if wanted == "auto" else [_named(wanted)]:
            for kernel in kernels:
                failure = self._try(layout, kernel)
                if not failure:
                    return
                self._note(f"layout {layout} ({kernel}) is not used: {failure}")
        if wanted != "auto":
            raise CannotShareError(f"layout {wanted} is not possible with {type(self.model).__name__}: {failure}")

    def _try(self, layout: Layout, kernel: str) -> str:
        """Take a layout if it gives what padding gives; why not, otherwise."""
        trees = _probe(self.model)
        plain, alone = _sample(self, trees), _sample(self, trees[:1])
        noise = float((plain.logps[: len(alone.logps)] - alone.logps).abs().max())
        try:
            _check_layers(self.model)
            self._own_attention = use_tree_attention(self.model)
            self.layout, self.attention_kernel = layout, kernel
            packed = _sample(self, trees)
        except (CannotShareError, RuntimeError, TypeError, ValueError, KeyError) as error:
            self.restore()
            return " ".join(str(error).split())[:200]
        difference = float((packed.logps - plain.logps).abs().max())
        gradient = float((packed.gradient - plain.gradient).norm() / plain.gradient.norm())
        most, most_gradient = self._tolerance()
        if difference <= max(most, 10 * noise) and gradient <= most_gradient:
            return ""
        self.restore()
        return f"log-probs differ by {difference:.2g} nats and gradients by {gradient:.2g} from plain padding"

    def _tolerance(self) -> tuple[float, float]:
        exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in self.model.parameters())
        low = self.autocast or not exact  # quantised weights are bytes
        return LOW_PRECISION_TOLERANCE if low else TOLERANCE

    def _note(self, text: str) -> str:
        self.notes.append(text)
        logger.warning("%s: %s", type(self.model).__name__, text)
        return text


class ScalarHead(torch.nn.Module):
    """A number for each hidden state, w · h + b in fp32: a policy's values, or the scores of a reward model or discriminator.

    It starts at zero everywhere: no value is expected, and a discriminator cannot tell yet.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        size = model.get_output_embeddings().weight.shape[-1]  # what the LM head takes in
        self.weight = torch.nn.Parameter(torch.zeros(size, device=_device(model)))
        self.bias = torch.nn.Parameter(torch.zeros((), device=_device(model)))

    def forward(self, hidden: Tensor) -> Tensor:
        """(positions, hidden) to (positions,)."""
        return (hidden.float() * self.weight).sum(1) + self.bias  # no matrix product: autocast would round it


@dataclass(frozen=True)
class _Sample:
    logps: Tensor
    """(scored,)"""
    gradient: Tensor
    """(token ids, hidden): of a weighted sum of the log-probs with respect to the embeddings, summed by token id."""


def _sample(policy: Policy, trees: Sequence[TokenTree]) -> _Sample:
    """Log-probs of trees, and their gradient down to the embeddings: it has passed through every layer's attention."""
    embedding = policy.model.get_input_embeddings()
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        kept.append((inputs[0], leaf))
        return leaf

    handle = embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logps = policy(trees)
            weights = torch.linspace(-1, 1, len(logps), device=logps.device)
            (gradient,) = torch.autograd.grad((logps * weights).sum(), kept[-1][1])
    finally:
        handle.remove()
    # A token of the prompt is computed once in one layout and more often in another: compare sums by token id.
    ids = kept[-1][0].flatten()
    inputs = {token for tree in trees for side in ((0,), tree.prompt_ids, *tree.completions) for token in side}
    names = torch.tensor(sorted(inputs), device=ids.device)
    summed = gradient.new_zeros(len(names), gradient.shape[-1], dtype=torch.float32)
    return _Sample(logps.detach(), summed.index_add(0, torch.searchsorted(names, ids), gradient.flatten(0, 1).float()))


def silence_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout of the model to 0, also those that a layer keeps as a number and applies itself."""
    model.eval()
    for module in model.modules():
        for name, value in vars(module).items():
            if (
                isinstance(value, float)
                and ("dropout" in name or name == "p")
                and (name != "p" or "Dropout" in type(module).__name__)
            ):
                setattr(module, name, 0.0)
    return model


def _probe(model: PreTrainedModel) -> list[TokenTree]:
    """Random trees that tell a right layout from a wrong one; longer than a sliding window where the window is short."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    long = min(window, LONGEST_PROBED_WINDOW) + 9
    random = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, config.vocab_size, (length,), generator=random).tolist())

    return [
        TokenTree(ids(7), (ids(5), ids(long))),
        TokenTree(ids(1), (ids(1), ids(3))),
        TokenTree(ids(12), (ids(4), ids(6), ids(2))),
        TokenTree(ids(long), (ids(8),)),
    ]


def _check_layers(model: PreTrainedModel) -> None:
    """Raise CannotShareError for a model with layers that carry more from token to token than attention does."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    strange = sorted(kinds - set(SHARED_LAYERS))
    if strange:
        raise CannotShareError(f"it has layers of kind {', '.join(strange)}")


def _from_own_logits(model: PreTrainedModel, inputs: dict[str, Any], row: PackedRow, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and normalisers from the model's own logits: for heads that head.py does not know."""
    logits = model(**inputs).logits.flatten(0, 1)[row.sources]  # (scored, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if temperature == 1 else logits / temperature
    normalisers = logits.logsumexp(1)
    return logits.gather(1, row.targets[:, None]).squeeze(1) - normalisers, normalisers


def _named(layout: str) -> Layout:
    """The layout of that name.

    Raises:
        UserError: there is none.
    """
    for known in LAYOUTS:
        if layout == known:
            return known
    raise unknown_name("layout", layout, ["auto", *LAYOUTS])


def _device(model: PreTrainedModel) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
