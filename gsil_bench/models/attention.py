"""Attention over trees: one function, registered with transformers, that every model of its attention interface can call.

Segment by segment (SDPA, any device): a prompt attends to itself, a completion to its prompt and itself. On a GPU FlexAttention
does the whole row in one compiled kernel. Sliding windows and soft-caps reach the function as keywords and are honoured;
a keyword that changes attention and is not known here (sinks, position biases) is refused, and the caller falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gsil_bench.models.packing import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gsil_bench_tree"
SEGMENTS = "gsil_bench_segments"
"""The keyword under which a forward pass hands its segments down to the attention layers."""
KERNEL = "gsil_bench_kernel"

REFUSED = ("s_aux", "position_bias", "sinks", "alibi")
"""Keywords of attention functions that change the result and are not known here."""


class CannotShareError(RuntimeError):
    """The model's attention cannot be run over trees."""


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a row of trees; (1, heads, width, head size) in, (1, width, heads, head size) out.

    Raises:
        CannotShareError: no segments reached this layer, or something that changes attention is not known here.
    """
    segments: Segments | None = kwargs.pop(SEGMENTS, None)
    kernel = kwargs.pop(KERNEL, "segments")
    known = segments is not None and query.shape[2] == sum(segments.lengths)
    refuse_unknown(module, known and attention_mask is None, sliding_window, kwargs)
    assert segments is not None
    run = _flex if kernel == "flex" else _by_segments
    return run(module, query, key, value, segments, scaling, sliding_window, softcap), None


def hidden_window(module: torch.nn.Module) -> int | None:
    """The sliding window that the configuration gives a layer, whether or not its code hands it on."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and layer is not None and kinds[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _by_segments(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # grouped-query attention: SDPA on a CPU wants equal numbers of heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # One split for the row: its backward is one concatenation, where slices would each fill a row with zeros.
    parts = zip(*(torch.split(tensor, segments.lengths, 2) for tensor in (query, key, value)), strict=True)
    attended: list[Tensor] = []
    for prompt, branches in segments.trees:
        query_part, prompt_keys, prompt_values = next(parts)
        attended.append(attend(query_part, prompt_keys, prompt_values, 0, segments, scaling, window, softcap))
        for length in branches:
            query_part, keys, values = next(parts)
            if length:
                keys, values = torch.cat((prompt_keys, keys), 2), torch.cat((prompt_values, values), 2)
                attended.append(attend(query_part, keys, values, prompt, segments, scaling, window, softcap))
    if segments.padding:
        attended.append(next(parts)[2])
    return torch.cat(attended, 2).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: int, segments: Segments, scaling: float | None, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Causal attention of a segment that follows `seen` keys."""
    length = query.shape[2]
    plain = seen == 0 and (window is None or length <= window)
    if plain and softcap is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    reach = None if window is None or seen + length <= window else window
    bias = segments.bias(seen, length, reach, query)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + bias
    return torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value


def _flex(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from transformers.integrations.flex_attention import flex_attention_forward

    mask = segments.block_mask(window, query.device)
    # Under autocast rotary embeddings leave queries and keys in fp32, beside values in bf16: SDPA casts them itself.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attended: Tensor = flex_attention_forward(module, query, key, value, mask, scaling=scaling, softcap=softcap)[0]
    return attended


def refuse_unknown(module: torch.nn.Module, known: bool, sliding_window: int | None, kwargs: Mapping[str, Any]) -> None:
    """Raise CannotShareError if a layer's attention is of a form that is not known here, or something changes it that is not.

    Args:
        known: whether the form is.
        kwargs: what transformers handed down besides what the caller takes.
    """
    strange = [name for name in REFUSED if kwargs.get(name) is not None]
    strange += ["a window that it keeps to itself"] if sliding_window is None and hidden_window(module) else []
    if strange or not known:
        raise CannotShareError(
            f"attention of {type(module).__name__} has {', '.join(strange) or 'a form that is not known here'}"
        )


def use_tree_attention(model: PreTrainedModel) -> str:
    """`use_attention` over trees."""
    return use_attention(model, NAME, tree_attention)


def use_attention(model: PreTrainedModel, name: str, function: Callable[..., tuple[Tensor, None]]) -> str:
    """Let the model attend by a function of ours; returns the name of the attention that it had.

    Raises:
        CannotShareError: the model does not use transformers' attention interface.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)
    before: str = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise CannotShareError(f"{type(model).__name__} does not use transformers' attention interface ({error})") from error
    if model.config._attn_implementation != name:  # some models only warn
        raise CannotShareError(f"{type(model).__name__} does not use transformers' attention interface")
    return before
