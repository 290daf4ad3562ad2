"""Make the embedded model: train a tokenizer and a Llama of about a million parameters on the noisy corpus of the
embedded suite.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python scripts/pretrain_mini.py

One pass over a seeded stream of conversations, loss on the assistant's tokens only, Muon and AdamW with warm-up and cosine
decay. The model is meant to be imperfect: what it reads is mostly right and often sloppy, and training stops early. It
writes a folder that transformers loads, with a README that says how it was made and the training log beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gsil_bench.data import mini
from gsil_bench.data.mini import corpus

PAD, USER, ASSISTANT, SYSTEM, END = SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CONTEXT_LENGTH = 512
IGNORED = -100

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

Example = tuple[list[int], list[int]]
"""Token ids, and the label of each (IGNORED where nothing is learned)."""


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit and every line break is a token of its own.

    Line breaks stand alone so that no token spans the border between the template and an answer: the tokens of a prompt
    are then always a prefix of the tokens of the conversation.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, messages: Sequence[str]) -> Example:
    """A conversation as token ids and labels: the answers and their end token are learned."""
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        prompt = tokenizer.encode(f"{USER}\n{question}{END}\n{ASSISTANT}\n", add_special_tokens=False)
        learned = tokenizer.encode(f"{answer}{END}", add_special_tokens=False)
        after = tokenizer.encode("\n", add_special_tokens=False)
        ids += prompt + learned + after
        labels += [IGNORED] * len(prompt) + learned + [IGNORED] * len(after)
    return ids, labels


def batches(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Shuffled batches of examples of similar length, so that little of a batch is padding."""
    rng = random.Random(seed)
    pool = 100 * size
    for start in range(0, len(examples), pool):
        group = sorted(examples[start : start + pool], key=lambda example: len(example[0]))
        groups = [group[index : index + size] for index in range(0, len(group), size)]
        rng.shuffle(groups)
        yield from groups


def collate(batch: list[Example], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors; attention needs no mask for padding on the right of a causal model."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in batch])  # (conversations, tokens)
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in batch])  # (conversations, tokens)
    return {"ids": ids, "labels": labels}


def answer_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; the LM head runs on these positions only."""
    hidden = model.model(input_ids=batch["ids"][:, :-1], use_cache=False).last_hidden_state
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORED
    logits = model.lm_head(hidden[learned])
    return torch.nn.functional.cross_entropy(logits.float(), targets[learned])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to 5 % of the peak."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and heads of 32 dimensions (what fast CPU attention kernels support)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embeddings and the norms.

    With small batches Muon needs about a third of AdamW's tokens here (measured: docs/lab-log.md).
    """
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    others = [value for name, value in model.named_parameters() if value.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, examples: list[Example], pad: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One pass over the examples; returns the log, one record per 100 steps."""
    optimizers = build_optimizers(model)
    steps = math.ceil(len(examples) / arguments.batch)
    log: list[dict[str, Any]] = []
    losses: list[float] = []
    tokens = 0
    start = time.perf_counter()
    for step, rows in enumerate(batches(examples, arguments.batch, arguments.seed)):
        rate = learning_rate(step, steps, arguments.lr)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        loss = answer_loss(model, collate(rows, pad))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens += sum(len(ids) for ids, _ in rows)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            record = {
                "step": step + 1,
                "loss": round(sum(losses) / len(losses), 4),
                "lr": round(rate, 6),
                "tokens": tokens,
                "seconds": round(seconds, 1),
            }
            log.append(record)
            losses.clear()
            print(json.dumps(record), f"{tokens / seconds:.0f} tokens/s", flush=True)
    return log


def readme(arguments: argparse.Namespace, model: LlamaForCausalLM, log: list[dict[str, Any]]) -> str:
    """What the folder says about itself."""
    command = (
        f"OMP_NUM_THREADS={torch.get_num_threads()} OMP_WAIT_POLICY=passive python scripts/pretrain_mini.py "
        f"--conversations {arguments.conversations} --seed {arguments.seed} --lr {arguments.lr} "
        f"--batch {arguments.batch}"
    )
    marks = [log[round(share * (len(log) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
    rows = "\n".join(f"| {m['step']} | {m['tokens']:,} | {m['loss']} | {m['seconds']} |" for m in marks)
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}"
    )
    paragraphs = [
        "# The model of the embedded suite",
        f"A Llama of {model.num_parameters():,} parameters, trained from scratch on the noisy generated corpus of "
        "`gsil_bench.data.mini.corpus`. It is meant to be imperfect: a start for methods that learn from "
        "demonstrations, not a good model. No test, dev or train problem of the suite is in its corpus (a problem "
        "belongs to a part by the hash of its content).",
        f"    {command}",
        f"- corpus version {corpus.VERSION}, suite version {mini.VERSION}, {arguments.conversations:,} conversations, "
        f"one pass, seed {arguments.seed}\n- {versions}\n- the same command gives the same tokenizer, and nearly the "
        "same weights: the order of floating-point sums depends on the processor and the number of threads",
        f"| step | tokens read | loss per answer token | seconds |\n|---|---|---|---|\n{rows}",
        "Full log: `training_log.jsonl`. The content is generated by this project and falls under its licence.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Train and write the model folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=mini.MODEL_DIR, help="folder to write")
    parser.add_argument("--conversations", type=int, default=56_000, help="size of the corpus")
    parser.add_argument("--vocabulary", type=int, default=1024, help="entries of the tokenizer")
    parser.add_argument("--batch", type=int, default=16, help="conversations per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus, the initial weights and the order")
    arguments = parser.parse_args()

    stream = corpus.conversations(arguments.seed, arguments.conversations)
    sample = list(islice(corpus.conversations(arguments.seed, arguments.conversations), 20_000))
    tokenizer = train_tokenizer([text for item in sample for text in item.messages], arguments.vocabulary)
    examples = [encode(tokenizer, conversation.messages) for conversation in stream]
    print(f"{len(examples)} conversations, {sum(len(ids) for ids, _ in examples)} tokens, vocabulary {len(tokenizer)}")
    model = build_model(tokenizer, arguments.seed)
    print(f"{model.num_parameters():,} parameters")
    log = train(model, examples, tokenizer.pad_token_id, arguments)

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    (arguments.out / "README.md").write_text(readme(arguments, model, log))


if __name__ == "__main__":
    main()
