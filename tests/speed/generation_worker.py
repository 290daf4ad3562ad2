"""One generation engine in a process of its own, which answers the same prompts in every round it is told to.

Lines of JSON: the parent writes a `Seat`, then {"round": number} again and again; the worker answers {"ready": facts}, then
{"seconds": …, "answers": …, "cpu_seconds": …} for each round, or {"failed": reason}. It runs under any interpreter that has the
engine: nothing but the standard library is imported before the engine is known.

The model counts down: its residual stream is the embedding of the newest token, because the output projections of every layer
are zero, and its head maps token t to token t - 1. A prompt that ends with token k is therefore answered by k - 1, …, 1, 0, and 0
is the end token. So the right answers are known, all engines do the same work, and a layer costs what it costs in any model.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 512, "tie_word_embeddings": False}
LLAMA |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": LLAMA
    | {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "10m": LLAMA
    | {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6},
}
"""1.2 and 10.2 million parameters; a head has 32 and 64 dimensions."""
END = 0
WORD = "w"
"""Token t is the word "w" + t, so text goes to ids and back without a loss."""
BATCH = 16
"""Rows of padded generate."""

Prompts = Sequence[Sequence[int]]
Answer = Callable[[Prompts], list[list[int]]]
"""Token ids to token ids, each answer up to and including its end token."""


@dataclass(frozen=True)
class Work:
    """Which prompts there are: the same for every engine."""

    prompts: int = 256
    shortest_prompt: int = 16
    longest_prompt: int = 256
    shortest_answer: int = 5
    longest_answer: int = 200
    """Also max_new_tokens of every request: an engine does not know how long an answer will be."""
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of each prompt and of its answer, end token included, in the order of arrival; both uniform."""
        drawn = random.Random(self.seed)
        return [
            (drawn.randint(self.shortest_prompt, self.longest_prompt), drawn.randint(self.shortest_answer, self.longest_answer))
            for _ in range(self.prompts)
        ]

    def requests(self, number: int, vocabulary: int) -> list[list[int]]:
        """The prompts of a round. Lengths are those of every round, tokens are new: no engine may remember them."""
        drawn = random.Random(f"{self.seed}/{number}")
        return [
            [drawn.randrange(self.longest_answer + 1, vocabulary) for _ in range(prompt - 1)] + [answer]
            for prompt, answer in self.lengths()
        ]

    def answers(self) -> list[list[int]]:
        """What every engine must return."""
        return [list(range(answer - 1, -1, -1)) for _, answer in self.lengths()]

    @property
    def new_tokens(self) -> int:
        """Of all answers."""
        return sum(answer for _, answer in self.lengths())


@dataclass(frozen=True)
class Seat:
    """What a worker serves."""

    engine: str
    folder: str
    """A checkpoint that `write_model` made."""
    threads: int
    work: dict[str, int]


def write_model(name: str, folder: Path) -> None:
    """A model that counts down, and a tokenizer for it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODELS[name]))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        directions = torch.nn.functional.normalize(torch.randn_like(model.lm_head.weight), dim=1)
        model.model.embed_tokens.weight.copy_(directions)
        model.lm_head.weight.copy_(directions.roll(-1, 0))  # row t answers to the embedding of t + 1
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, END
    model.save_pretrained(folder)
    words = {WORD + str(token): token for token in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=WORD + "0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = WORD + str(END)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end).save_pretrained(folder)


def load(folder: str, **settings: Any) -> Any:
    """The model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **settings).eval()


def ours(name: str) -> Callable[[Seat, Work], tuple[Answer, dict[str, Any]]]:
    """An engine of the suite."""

    def make(seat: Seat, work: Work) -> tuple[Answer, dict[str, Any]]:
        from transformers import AutoTokenizer

        from gsil_bench.generation.engine import Request, Sampling
        from gsil_bench.generation.engines import Served, choose_engine

        tokenizer = AutoTokenizer.from_pretrained(seat.folder, local_files_only=True)
        context = MODELS["tiny"]["max_position_embeddings"]

        def decode(tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

        served = Served(
            folder=Path(seat.folder),
            load=lambda: load(seat.folder),
            end_token_ids=[END],
            context_length=context,
            decode=decode,
            device="cpu",
            dtype="fp32",
            autocast=False,
            encode=tokenizer.encode,
            spell=partial(decode, skip_special_tokens=False),
        )
        engine = choose_engine(name, {}, "cpu", "fp32", autocast=False).make(served)
        sampling = Sampling(max_new_tokens=work.longest_answer)

        def answer(prompts: Prompts) -> list[list[int]]:
            found = dict(engine.complete([Request(tuple(prompt), sampling) for prompt in prompts]))
            return [list(found[index].tokens) for index in range(len(prompts))]

        return answer, {"identity": engine.identity, "notes": list(getattr(engine, "notes", []))}

    return make


def generate(cache: str | None) -> Callable[[Seat, Work], tuple[Answer, dict[str, Any]]]:
    """Padded model.generate, batch after batch in the order of arrival."""

    def make(seat: Seat, work: Work) -> tuple[Answer, dict[str, Any]]:
        import torch

        model = load(seat.folder)
        settings: dict[str, Any] = {"max_new_tokens": work.longest_answer, "do_sample": False, "pad_token_id": END}
        settings |= {"cache_implementation": cache, "disable_compile": True} if cache else {}

        def batch(prompts: Prompts) -> list[list[int]]:
            width = max(map(len, prompts))
            ids = torch.tensor([[END] * (width - len(prompt)) + list(prompt) for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            return [_to_end(row) for row in model.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()]

        def answer(prompts: Prompts) -> list[list[int]]:
            return [row for start in range(0, len(prompts), BATCH) for row in batch(prompts[start : start + BATCH])]

        return answer, {"batch_size": BATCH}

    return make


def hflm(seat: Seat, work: Work) -> tuple[Answer, dict[str, Any]]:
    """lm-eval's own model class: text in, text out. Its automatic batch size is found once, and that is not counted."""
    from importlib.metadata import version

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=seat.folder,
        device="cpu",
        dtype="float32",
        batch_size="auto",
        max_length=MODELS["tiny"]["max_position_embeddings"],
    )
    started = time.perf_counter()
    model.batch_size_per_gpu = found = model._detect_batch_size()
    settings = {"until": [WORD + str(END)], "max_gen_toks": work.longest_answer, "do_sample": False}

    def answer(prompts: Prompts) -> list[list[int]]:
        texts = [" ".join(WORD + str(token) for token in prompt) for prompt in prompts]
        asked = [
            Instance(request_type="generate_until", doc={}, arguments=(text, dict(settings)), idx=index)
            for index, text in enumerate(texts)
        ]
        # It cuts the end token's text off.
        return [
            [*(int(word.removeprefix(WORD)) for word in text.split()), END]
            for text in model.generate_until(asked, disable_tqdm=True)
        ]

    facts = {"batch_size": found, "seconds_to_find_it": time.perf_counter() - started, "version": version("lm_eval")}
    return answer, facts


ENGINES: dict[str, Callable[[Seat, Work], tuple[Answer, dict[str, Any]]]] = {
    "transformers": ours("transformers"),
    "generate": generate(None),
    "generate-static": generate("static"),
    "hflm": hflm,
    "vllm": ours("vllm"),
}


def _to_end(tokens: Sequence[int]) -> list[int]:
    return list(tokens[: tokens.index(END) + 1]) if END in tokens else list(tokens)


def cpu_seconds() -> float:
    """Processor time of this process and of those that it started and that started others (vLLM's)."""
    spent, parents = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        spent[int(file.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        parents[int(file.parent.name)] = int(fields[1])
    family = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in family} - family:
        family |= more
    return time.process_time() + sum(spent[process] for process in family - {os.getpid()} if process in spent)


def serve(seat: Seat, answers: Any, commands: Iterator[str]) -> None:
    """Load, then answer the prompts of every round that is asked for."""
    import torch

    torch.set_num_threads(seat.threads)
    work = Work(**seat.work)
    vocabulary = json.loads((Path(seat.folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    answer, facts = ENGINES[seat.engine](seat, work)
    print(json.dumps({"ready": facts}), file=answers, flush=True)
    for command in commands:
        asked = json.loads(command)
        prompts = work.requests(asked["round"], vocabulary)[: asked["prompts"]]
        started, cpu = time.perf_counter(), cpu_seconds()
        given = answer(prompts)
        done = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu, "answers": given}
        print(json.dumps(done), file=answers, flush=True)


def main() -> None:
    """Serve one seat."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not reach the parent
    commands = iter(sys.stdin.readline, "")
    seat = Seat(**json.loads(next(commands)))
    try:
        serve(seat, answers, commands)
    except Exception as error:  # whatever an engine raises leaves its row out, with the reason
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(json.dumps({"failed": reason}), file=answers, flush=True)
        raise


if __name__ == "__main__":
    main()
