"""Similarity of texts by a transformer's last hidden states, in the manner of BERTScore, from a model in a local folder.

Each token of one text is matched with the most similar token of the other, by cosine. Precision is the mean over the candidate's
tokens, recall over the reference's; the score is their harmonic mean. Differences from the bert-score package: the last layer
(there, one chosen per model), special tokens take no part at all (there, they may be matched), no weights by frequency, no
rescaling. Its numbers are therefore comparable among themselves only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsil_bench.errors import UserError
from gsil_bench.models.checkpoint import check_architecture, load_tokenizer, resolve_model, weights_sha256

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 1 << 16
"""Tokens of a text, where neither model nor tokenizer has a limit."""


@dataclass(frozen=True)
class EmbeddingF1:
    """BERTScore-style F1 of the model in a folder. Implements `gsil_bench.tasks.text_measures.LearnedMetric`."""

    folder: Path
    device: str = "cpu"
    batch_size: int = 32
    """Texts per forward pass."""

    @cached_property
    def identity(self) -> str:
        """Name of the measure, fingerprint of the weights, and the length to which longer texts are cut."""
        return f"embedding-f1-v1:{weights_sha256(self._resolved)[:16]}:{self._limit}"

    def score(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """F1 per candidate, the highest over its references; 0 for a text without tokens. From -1 to 1, in practice above 0.

        A text that is longer than the model's context is cut to it, special tokens included.

        Raises:
            UserError: the folder holds no model that can be used, or a candidate has no reference.
        """
        for candidate, texts in zip(candidates, references, strict=True):
            if not texts:
                raise UserError(f"a learned metric needs a reference for each text; there is none for {candidate[:60]!r}")
        step = max(1, self.batch_size // 4)  # a candidate brings about three references along
        scores: list[float] = []
        for start in range(0, len(candidates), step):
            scores += self._score_some(candidates[start : start + step], references[start : start + step])
        return scores

    def _score_some(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        texts = list(dict.fromkeys([*candidates, *(text for several in references for text in several)]))
        vectors = dict(zip(texts, self._embed(texts), strict=True))
        pairs = zip(candidates, references, strict=True)
        return [max(matching_f1(vectors[one], vectors[other]) for other in several) for one, several in pairs]

    def _embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Unit vectors of each text's tokens, special ones left out: (tokens, width)."""
        encoded = [self._encode(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index][0]))  # little padding
        vectors: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            hidden = self._hidden([encoded[index][0] for index in batch])
            for index, states in zip(batch, hidden, strict=True):
                kept = states[: len(encoded[index][0])][[not special for special in encoded[index][1]]]
                vectors[index] = kept / kept.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return [vectors[index] for index in range(len(texts))]

    def _encode(self, text: str) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are special."""
        encoded = self._tokenizer(text, truncation=True, max_length=self._limit, return_special_tokens_mask=True)
        return encoded["input_ids"], [bool(special) for special in encoded["special_tokens_mask"]]

    def _hidden(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states: (rows, longest, width), in float32. Texts are padded on the right."""
        import torch

        longest = max(1, *(len(row) for row in rows))
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        with torch.inference_mode():
            states: Tensor = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states.float().cpu()

    @cached_property
    def _resolved(self) -> Path:
        return resolve_model(str(self.folder))

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._resolved)

    @cached_property
    def _model(self) -> Any:
        return load_encoder(self._resolved).to(self.device)

    @cached_property
    def _limit(self) -> int:
        """Tokens that the model reads."""
        from transformers import AutoConfig

        check_architecture(self._resolved)
        config = AutoConfig.from_pretrained(self._resolved, trust_remote_code=False, local_files_only=True).get_text_config()
        limit = int(getattr(config, "max_position_embeddings", None) or self._tokenizer.model_max_length)
        if "roberta" in config.model_type:  # their positions begin after the padding's
            limit -= int(config.pad_token_id) + 1
        return min(limit, int(self._tokenizer.model_max_length), LONGEST)


def load_encoder(folder: Path) -> Any:
    """The model of a folder without its head, in float32. Safetensors only, no remote code.

    Raises:
        UserError: it cannot be loaded, lacks weights, or reads pairs of texts (encoder-decoder).
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # as for policies
    try:
        model, info = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model in {folder} cannot be loaded for a learned metric: {reason}") from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # the hidden states do not pass through it
    if missing:
        raise UserError(f"the model in {folder} lacks weights: {', '.join(missing[:3])}")
    if model.config.is_encoder_decoder:
        raise UserError(f"the model in {folder} is an encoder-decoder; a learned metric needs hidden states of one text")
    return model.eval()


def matching_f1(candidate: Tensor, reference: Tensor) -> float:
    """Harmonic mean of precision and recall of the greedy matching.

    Args:
        candidate: unit vectors of a text's tokens, (tokens, width).
        reference: the same of the other text.

    Returns:
        0 if either text has no tokens, or if precision and recall do not sum to more than 0.
    """
    if not len(candidate) or not len(reference):
        return 0.0
    similar = candidate @ reference.T  # (candidate tokens, reference tokens)
    precision, recall = float(similar.max(dim=1).values.mean()), float(similar.max(dim=0).values.mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
