"""The vLLM engine: its processes and files with a stand-in for vLLM anywhere, its answers where vLLM is installed (on a CPU)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsil_bench.errors import UserError
from gsil_bench.generation import vllm_engine
from gsil_bench.generation.engine import Completion, EngineError, Reloadable, Request, Sampling
from gsil_bench.generation.engines import Served
from gsil_bench.generation.transformers_engine import TransformersEngine
from gsil_bench.generation.vllm_engine import VllmEngine, VllmOptions, last_reason
from gsil_bench.models.adapters import add_lora, merge_lora, save_adapter
from gsil_bench.models.checkpoint import load_model
from gsil_bench.models.packing import TokenTree

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

STAND_IN = {
    "__init__.py": """
        class SamplingParams:
            def __init__(self, **settings):
                self.__dict__.update(settings)
        """,
    "lora/request.py": """
        def LoRARequest(name, number, path):
            return path
        """,
    "usage/usage_lib.py": """
        class UsageContext:
            LLM_CLASS = "LLM_CLASS"
        """,
    "engine/arg_utils.py": """
        class EngineArgs:
            def __init__(self, **settings):
                self.__dict__.update(settings)
        """,
    "platforms.py": """
        class current_platform:
            is_cpu = staticmethod(lambda: True)
        """,
    "model_executor/layers/vocab_parallel_embedding.py": """
        class VocabParallelEmbedding:
            pass
        """,
    "v1/engine/llm_engine.py": """
        import json, os, time
        from types import SimpleNamespace as Record
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        class Head(VocabParallelEmbedding):
            packed = weight = 1

            @property
            def quant_method(self):
                return self

            def process_weights_after_loading(self, layer):
                layer.packed = layer.weight

        class LLMEngine:
            '''Counts up from the prompt's last token by its head's weight, as it was last packed; first tokens of known prompts
            are kept. Log-probs are the process id.'''

            @classmethod
            def from_engine_args(cls, settings, usage_context):
                if settings.model.endswith("broken"):
                    raise ValueError("this model has 7 heads")
                if settings.model.endswith("slow"):
                    time.sleep(600)
                engine = cls()
                engine.requests, engine.head, engine.kept = {}, Head(), {}
                return engine

            def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
                with open(kwargs["weights_path"] + "/config.json") as file:
                    config = json.load(file)
                if config["by"] == 13:
                    raise NotImplementedError("there is no\\n" + method)
                if config["by"] == 66:
                    os._exit(3)
                if config["by"] == 77:
                    time.sleep(600)
                self.head.weight = config["by"]

            def apply_model(self, function):
                function(Record(modules=lambda: [Record(), self.head]))

            def reset_prefix_cache(self):
                if self.requests or self.head.weight == 55:
                    return False
                self.kept.clear()
                return True

            def has_unfinished_requests(self):
                return bool(self.requests)

            def add_request(self, name, prompt, params, lora_request=None):
                if prompt["prompt_token_ids"][0] == 13:
                    raise ValueError("13 is not a token")
                self.requests[name] = (prompt["prompt_token_ids"], params, [])

            def abort_request(self, names):
                for name in names:
                    del self.requests[name]

            def step(self):
                outputs = []
                for name, (prompt, params, made) in list(self.requests.items()):
                    if prompt[0] == 66:
                        raise RuntimeError("the GPU fell off the bus")
                    token = ([*prompt, *made][-1] + self.head.packed) % 50
                    made.append(token if made else self.kept.setdefault(tuple(prompt), token))
                    ended = made[-1] in params.stop_token_ids
                    if prompt[0] != 77 and (ended or len(made) >= params.max_tokens):
                        del self.requests[name]
                        logps = None if params.logprobs is None else [{token: Record(logprob=os.getpid())} for token in made]
                        answer = Record(token_ids=made, finish_reason="stop" if ended else "length", logprobs=logps)
                        whole = {"outputs": [answer], "prompt_token_ids": prompt, "prompt_logprobs": None}
                        outputs.append(Record(request_id=name, finished=True, **whole))
                time.sleep(0.002)
                return outputs
        """,
}
"""A package that looks like vLLM to the worker."""


def served(folder: Path, ends: tuple[int, ...] = (9,), context: int = 64) -> Served:
    def load() -> Any:
        raise AssertionError("the model is not loaded in this process")

    def spell(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    return Served(folder, load, ends, context, spell, "cpu", "fp32", False, lambda text: list(map(int, text.split())), spell)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the children's path where `vllm` is the stand-in; temporary files come into it too."""
    for name, text in STAND_IN.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    (tmp_path / "tmp").mkdir()
    for folder in (tmp_path, tmp_path / "broken", tmp_path / "slow"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text('{"vocab_size": 100}', encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: "vllm-0.0")
    return tmp_path


def leftovers(stand_in: Path) -> list[str]:
    return sorted(path.name for path in (stand_in / "tmp").iterdir() if path.is_dir())


def request(*prompt: int, new: int = 5, **more: Any) -> Request:
    return Request(prompt, Sampling(new), **more)


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def groups(engine: VllmEngine) -> list[int]:
    return [process.pid for process in engine._processes]


def is_gone(group: int) -> bool:
    return group not in vllm_engine._running_groups()


@pytest.mark.parametrize(
    ("settings", "dtype", "said"),
    [
        ({}, "nf4", "nf4"),
        ({"tensor_parallel_size": 0}, "fp32", "tensor_parallel_size=0: must be a number above 0"),
        ({"data_parallel_size": -1}, "fp32", "data_parallel_size=-1: must be a number above 0"),
        ({"gpu_memory_utilization": 1.5}, "fp32", "gpu_memory_utilization=1.5"),
        ({"start_seconds": 0.0}, "fp32", "start_seconds=0.0"),
        ({"start_seconds": float("inf")}, "fp32", "start_seconds=inf"),
        ({"tensor_parallel_size": 2}, "fp32", "on a CPU"),
        ({"batch_invariant": True}, "fp32", "batch_invariant need GPUs"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(
    settings: dict[str, Any], dtype: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        VllmOptions(**settings).check("cpu", dtype, False)
    assert "\n" not in str(error.value)


def test_gpus_are_counted_and_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    options = VllmOptions(tensor_parallel_size=2, data_parallel_size=2)
    options.check("cuda", "bf16", False)
    assert vllm_engine._environment(options, "cuda", 1)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert vllm_engine._environment(options, "cuda", 0)["CUDA_VISIBLE_DEVICES"] == "7,5"
    with pytest.raises(UserError, match="6 GPUs are needed, 4 are visible"):
        VllmOptions(tensor_parallel_size=2, data_parallel_size=3).check("cuda", "bf16", False)
    with pytest.raises(UserError, match=r"compute capability 8\.0 for it, here it is 7\.5"):
        VllmOptions(batch_invariant=True).check("cuda", "bf16", False)


def test_without_vllm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gsil-bench\[vllm\]'"):
        VllmOptions().check("cuda", "bf16", False)


def test_identity_names_what_decides_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: "vllm-0.33.0")
    plain = VllmOptions().identity("bf16", False)
    assert plain == "vllm-0.33.0/v1/bf16" == VllmOptions(data_parallel_size=2, gpu_memory_utilization=0.5).identity("fp32", True)
    decisive = [{"tensor_parallel_size": 2}, {"enforce_eager": True}, {"batch_invariant": True}, {"unmerged": True}]
    identities = {VllmOptions(**settings).identity("bf16", False) for settings in decisive}
    assert len(identities | {plain, VllmOptions().identity("fp32", False)}) == 6


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "its log is empty"),
        ("Loading\n\n", "Loading"),
        (
            "(EngineCore pid=12) ERROR 11-21 08:35:39 [core.py:402] torch.OutOfMemoryError: CUDA out of memory.\n"
            "Traceback (most recent call last):\nRuntimeError: Engine core initialization failed. See root cause above.\n",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, 512 is above 256\n  For",
            "pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, 512 is above 256",
        ),
        (
            "[rank0]: \x1b[31mValueError: no\x1b[0m\n[rank0]:[W1121] Warning: destroy_process_group() was not called",
            "ValueError: no",
        ),
    ],
)
def test_the_log_tells_why_it_ended(log: str, reason: str) -> None:
    assert last_reason(log) == reason


def test_each_request_gets_its_own_answer(stand_in: Path) -> None:
    """The stand-in counts up, so every expected token is known."""
    engine = VllmEngine(VllmOptions(), served(stand_in))
    given = [
        request(1),
        request(6),
        request(13),
        request(),
        request(*range(20, 84)),
        request(*range(60), 30),
        request(2, new=0),
        request(100),
    ]
    answers = dict(engine.complete(given))
    engine.close()
    assert answers[0] == Completion((2, 3, 4, 5, 6), "2 3 4 5 6", "length")
    assert answers[1] == Completion((7, 8, 9), "7 8 9", "stop")
    assert answers[2] == Completion((), "", "error", "13 is not a token")
    assert answers[3].error == "empty prompt"
    assert "64 tokens leaves no room" in answers[4].error
    assert answers[5].tokens == (31, 32, 33)  # 61 tokens in a context of 64
    assert answers[6] == Completion((), "", "length")
    assert answers[7].error == "token ids 100 to 100 do not fit a vocabulary of 100"


def test_a_sample_has_its_own_seed_within_64_bits(stand_in: Path) -> None:
    engine = VllmEngine(VllmOptions(), served(stand_in))
    drawn = Sampling(3, temperature=0.7, top_p=0.9, seed=1)
    first, second = (engine._sampling(Request((1, 2), drawn, sample)) for sample in (0, 1))
    engine.close()
    assert first["seed"] != second["seed"] and max(first["seed"], second["seed"]) < 2**63
    assert (first["temperature"], first["top_p"], first["max_tokens"], first["stop_token_ids"]) == (0.7, 0.9, 3, [9])


def test_copies_of_the_model_share_the_requests_by_prompt(stand_in: Path) -> None:
    engine = VllmEngine(VllmOptions(data_parallel_size=2), served(stand_in))
    pids = groups(engine)
    given = [request(prompt, logps=True, sample=sample) for sample in range(3) for prompt in range(20, 24)]
    answers = dict(engine.complete(given))
    engine.close()
    assert len(pids) == 2 and sorted(answers) == list(range(12))
    for index, completion in answers.items():
        assert completion.logps == (float(pids[index % 2]),) * 5  # the stand-in's log-prob is its process


@pytest.mark.parametrize(("how", "said"), [("error", "RuntimeError: the GPU fell off the bus"), ("kill", "signal 9")])
def test_when_its_process_ends_what_came_before_is_kept(stand_in: Path, how: str, said: str) -> None:
    engine = VllmEngine(VllmOptions(), served(stand_in))
    [group] = groups(engine)
    answers = engine.complete([request(1), request(77)])
    assert next(answers)[1].tokens == (2, 3, 4, 5, 6)
    if how == "kill":
        os.kill(group, signal.SIGKILL)
        with pytest.raises(EngineError, match=said):
            next(answers)
    else:
        with pytest.raises(EngineError, match=said) as error:
            list(engine.complete([request(66)]))
        assert "\n" not in str(error.value)
        log = Path(re.findall(r"log: (.*)\)", str(error.value))[0])
        assert said in log.read_text(encoding="utf-8")
    with pytest.raises(EngineError, match="vLLM's process"):
        list(engine.complete([request(1)]))
    engine.close()
    assert is_gone(group) and leftovers(stand_in) == []


def test_leaving_early_drops_what_is_in_flight(stand_in: Path) -> None:
    engine = VllmEngine(VllmOptions(), served(stand_in))
    answers = engine.complete([request(1), request(77)])  # 77 never ends
    next(answers)
    answers.close()
    assert dict(engine.complete([request(3)]))[0].tokens == (4, 5, 6, 7, 8)
    [folder] = [stand_in / "tmp" / name for name in leftovers(stand_in)]
    until(lambda: not list(folder.glob("*.jsonl")))
    engine.close()


@pytest.mark.parametrize(
    ("model", "said"), [("broken", "ValueError: this model has 7 heads"), ("slow", "has not loaded by then")]
)
def test_a_start_that_fails_leaves_nothing(stand_in: Path, model: str, said: str) -> None:
    options = VllmOptions(data_parallel_size=2, start_seconds=60.0 if model == "broken" else 1.0)
    with pytest.raises(EngineError, match=said):
        VllmEngine(options, served(stand_in / model))
    assert leftovers(stand_in) == []
    assert not [group for group in vllm_engine._running_groups() if _is_worker_in(stand_in, group)]


def _is_worker_in(folder: Path, pid: int) -> bool:
    try:
        return str(folder) in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return False


def test_closing_twice_is_fine_and_a_closed_engine_says_so(stand_in: Path) -> None:
    engine = VllmEngine(VllmOptions(), served(stand_in))
    [group] = groups(engine)
    engine.close()
    assert is_gone(group) and leftovers(stand_in) == []
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        list(engine.complete([request(1)]))


def test_closing_in_the_middle_ends_the_iterator_with_an_error(stand_in: Path) -> None:
    engine = VllmEngine(VllmOptions(), served(stand_in))
    answers = engine.complete([request(1), request(77)])
    next(answers)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        next(answers)


def newer(folder: Path, by: int) -> Path:
    """A checkpoint with which the stand-in counts up by that much, or fails."""
    (folder / "newer").mkdir()
    (folder / "newer" / "config.json").write_text(json.dumps({"vocab_size": 200, "by": by}), encoding="utf-8")
    return folder / "newer"


def test_a_reload_changes_the_weights_of_the_processes_that_run(stand_in: Path) -> None:
    """All of them: the log-probs are their ids. What they kept of a known prompt is gone, and so is what was in flight."""
    engine = VllmEngine(VllmOptions(data_parallel_size=2), served(stand_in, ends=()))
    pids = groups(engine)
    given = [request(prompt, logps=True) for prompt in (20, 21)]
    assert [answer.tokens for _, answer in sorted(engine.complete(given))] == [(21, 22, 23, 24, 25), (22, 23, 24, 25, 26)]
    left = engine.complete([request(1), request(77), request(77, 77)])  # 77 never ends
    next(left)
    left.close()
    folder = newer(stand_in, by=3)
    engine.reload(folder)
    shutil.rmtree(folder)
    answers = [answer for _, answer in sorted(engine.complete(given))]
    assert [answer.tokens for answer in answers] == [(23, 26, 29, 32, 35), (24, 27, 30, 33, 36)]
    assert [answer.logps for answer in answers] == [(float(pid),) * 5 for pid in pids]
    assert next(engine.complete([request(150)]))[1].error == ""  # within the new vocabulary
    assert not list((stand_in / "tmp").glob("*/reload*"))
    engine.close()


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (13, "vllm-0.0 did not change its weights while it ran: NotImplementedError: there is no reload_weights$"),
        (55, "RuntimeError: the prefix cache was not emptied$"),
        (66, "vLLM's process ended with exit code 3"),
        (77, "start_seconds=0.5: vLLM has not loaded by then"),
    ],
)
def test_a_reload_that_fails_says_why(stand_in: Path, by: int, said: str) -> None:
    engine = VllmEngine(VllmOptions(), served(stand_in))
    [group] = groups(engine)
    engine._patience = 0.5 if by == 77 else 60.0
    with pytest.raises(EngineError, match=said) as error:
        engine.reload(newer(stand_in, by))
    assert "\n" not in str(error.value)
    engine.close()
    assert is_gone(group) and leftovers(stand_in) == []
    with pytest.raises(EngineError, match="closed"):
        engine.reload(stand_in)


def test_whether_it_reloads_is_an_option_that_changes_no_answer(stand_in: Path) -> None:
    for told in (True, False):
        options = VllmOptions(reload=told)
        engine = VllmEngine(options, served(stand_in))
        assert isinstance(engine, Reloadable) and engine.reloads is told
        assert options.identity("fp32", False) == VllmOptions().identity("fp32", False)
        engine.close()


PARENT = """
import sys, tempfile
from pathlib import Path
from gsil_bench.generation import vllm_engine
from gsil_bench.generation.engine import Request, Sampling
from gsil_bench.generation.engines import Served

if sys.argv[3] == "stand-in":
    vllm_engine.installed_version = lambda: "vllm-0.0"
tempfile.tempdir = sys.argv[2]
served = Served(Path(sys.argv[1]), None, (), 10**6 if sys.argv[3] == "stand-in" else 512, str, "cpu", "fp32", False, list, str)
engine = vllm_engine.VllmEngine(vllm_engine.VllmOptions(), served)
print(engine._processes[0].pid, flush=True)
while True:
    for _ in engine.complete([Request((77, number), Sampling(400)) for number in range(64)]):
        pass
"""


def parent(model: Path, temporary: Path, kind: str) -> tuple[subprocess.Popen[str], int]:
    """A process that runs an engine for ever, and the group of its worker."""
    command = [sys.executable, "-c", PARENT, str(model), str(temporary), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_environment())
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def _environment() -> dict[str, str]:
    root = str(Path(vllm_engine.__file__).parent.parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_however_the_parent_ends_nothing_is_left(stand_in: Path, number: int) -> None:
    process, group = parent(stand_in, stand_in / "tmp", "stand-in")
    assert not is_gone(group)
    process.send_signal(number)
    process.wait(60)
    until(lambda: is_gone(group))
    assert leftovers(stand_in) == []


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, mini_folder: Path) -> Path:
    """An untrained Llama with heads of 32, which vLLM has on a CPU, and the embedded tokenizer's vocabulary."""
    return _model(tmp_path_factory.mktemp("vllm") / "model", mini_folder, seed=0)


def _model(folder: Path, mini_folder: Path, seed: int, tied: bool = True) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(mini_folder)),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


ENDS = tuple(range(40))
"""Many end tokens, so that an untrained model meets one now and then."""


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(VllmOptions(), served(model_folder, ENDS, 512))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> TransformersEngine:
    return TransformersEngine(load_model(model_folder), ENDS, 512, lambda ids: " ".join(map(str, ids)))


def prompts(count: int, longest: int = 400) -> list[tuple[int, ...]]:
    """Of 1 to `longest` tokens."""
    random = np.random.default_rng(0)
    lengths = np.linspace(1, longest, count).astype(int)
    return [tuple(random.integers(40, 500, length).tolist()) for length in random.permutation(lengths)]


@needs_vllm
def test_greedy_answers_are_those_of_transformers(engine: VllmEngine, reference: TransformersEngine) -> None:
    """Where they part, a plain forward pass must find the two tokens within 1e-4 of each other."""
    given = [Request(prompt, Sampling(48), logps=True) for prompt in prompts(64)]
    ours, theirs = dict(engine.complete(given)), dict(reference.complete(given))
    assert sorted(ours) == sorted(theirs) == list(range(64))
    for index in range(64):
        one, other = ours[index], theirs[index]
        same = next((n for n, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
        if same is None:
            assert (one.tokens, one.finish_reason, one.text) == (other.tokens, other.finish_reason, other.text)
        else:
            with torch.no_grad():
                ids = torch.tensor([[*given[index].prompt_ids, *one.tokens[:same]]])
                logits = reference.model(input_ids=ids).logits[0, -1]
            assert abs(float(logits[one.tokens[same]] - logits[other.tokens[same]])) < 1e-4
        assert one.logps is not None and other.logps is not None and len(one.logps) == len(one.tokens)
        np.testing.assert_allclose(one.logps[:same], other.logps[:same], atol=1e-4)


@needs_vllm
def test_sampled_answers_do_not_depend_on_order_or_company(engine: VllmEngine) -> None:
    given = [Request(prompt, Sampling(24, 1.0, 0.95, seed=3), sample) for prompt in prompts(40) for sample in range(3)]
    whole, backwards = dict(engine.complete(given)), dict(engine.complete(given[::-1]))
    part = dict(engine.complete(given[5:7]))
    assert [whole[n].tokens for n in range(120)] == [backwards[119 - n].tokens for n in range(120)]
    assert [part[n].tokens for n in range(2)] == [whole[n].tokens for n in (5, 6)]
    assert whole[0].tokens != whole[1].tokens  # samples of one prompt


@needs_vllm
def test_samples_follow_the_distribution(engine: VllmEngine, reference: TransformersEngine) -> None:
    """2,000 first tokens after one prompt: each frequent token's count within 5 standard errors of its probability."""
    with torch.no_grad():
        chances = torch.softmax(reference.model(input_ids=torch.tensor([[50, 60, 70]])).logits[0, -1].double(), 0).numpy()
    answers = engine.complete([Request((50, 60, 70), Sampling(1, 1.0), sample) for sample in range(2000)])
    counts = np.bincount([completion.tokens[0] for _, completion in answers], minlength=len(chances))
    for token in np.argsort(chances)[-5:]:
        assert abs(counts[token] / 2000 - chances[token]) < 5 * np.sqrt(chances[token] * (1 - chances[token]) / 2000)


@needs_vllm
def test_an_answer_holds_the_end_token_if_it_stopped(engine: VllmEngine) -> None:
    answers = [completion for _, completion in engine.complete([Request((50, 60, 70), Sampling(20, 1.0), n) for n in range(100)])]
    assert {completion.finish_reason for completion in answers} == {"stop", "length"}
    for completion in answers:
        assert (completion.tokens[-1] in ENDS) == (completion.finish_reason == "stop")
        assert not set(ENDS) & set(completion.tokens[:-1])
        assert completion.finish_reason == "stop" or len(completion.tokens) == 20


@needs_vllm
def test_prompts_at_the_limit(engine: VllmEngine) -> None:
    long = tuple(int(token) for token in np.random.default_rng(1).integers(40, 500, 600))
    lengths = (510, 511, 512, 600)
    answers = dict(engine.complete([Request(long[:length], Sampling(9, 1.0)) for length in lengths]))
    assert [answers[n].finish_reason == "error" for n in range(4)] == [False, False, True, True]
    assert 1 <= len(answers[0].tokens) <= 2 and len(answers[1].tokens) == 1


@needs_vllm
def test_given_continuations_get_the_log_probs_of_transformers(engine: VllmEngine, reference: TransformersEngine) -> None:
    random = np.random.default_rng(2)
    trees = [
        TokenTree(prompt, tuple(tuple(random.integers(0, 500, n).tolist()) for n in (1, 7, 0, 30))) for prompt in prompts(12)
    ]
    trees.append(TokenTree((50,) * 500, ((60,) * 12,)))  # fills the context to the last token
    ours, theirs = engine.logps(trees), reference.logps(trees)
    assert [[len(one) for one in tree] for tree in ours] == [[len(one) for one in tree] for tree in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for first, second in zip(one, other, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-4)
    with pytest.raises(EngineError, match="513 tokens"):
        engine.logps([TokenTree((50,) * 500, ((60,) * 13,))])


@needs_vllm
def test_engines_after_one_another(engine: VllmEngine, mini_folder: Path, tmp_path: Path, model_folder: Path) -> None:
    """Two copies answer as one does; another model in the next engine answers otherwise."""
    given = [Request(prompt, Sampling(12)) for prompt in prompts(20)]
    found = []
    for options, folder in (
        (VllmOptions(data_parallel_size=2), model_folder),
        (VllmOptions(), _model(tmp_path / "m", mini_folder, 1)),
    ):
        other = VllmEngine(options, served(folder, ENDS, 512))
        workers = groups(other)
        found.append({index: completion.tokens for index, completion in other.complete(given)})
        other.close()
        assert all(map(is_gone, workers))
    assert found[0] == {index: completion.tokens for index, completion in engine.complete(given)}
    assert found[1] != found[0]


@needs_vllm
@pytest.mark.parametrize("tied", [True, False])
def test_reloaded_weights_are_served_as_a_fresh_engine_serves_them(mini_folder: Path, tmp_path: Path, tied: bool) -> None:
    """Tokens and log-probs, also after prompts whose keys and values were kept, and after requests that were dropped."""
    older, fresh = (_model(tmp_path / str(seed), mini_folder, seed, tied) for seed in (1, 2))
    given = [Request(prompt, Sampling(12), logps=True) for prompt in prompts(12)]
    drawn = [Request(prompt, Sampling(12, 1.0, seed=3), logps=True) for prompt in prompts(12)]
    trees = [TokenTree(prompt, ((60, 70, 80), (90,))) for prompt in prompts(6)]
    engine = VllmEngine(VllmOptions(), served(older, ENDS, 512))
    before = dict(engine.complete(given))
    left = engine.complete([request(60, n, new=400) for n in range(40, 80)] + [request(50, new=1)])
    next(left)
    left.close()
    engine.reload(fresh)
    ours = [dict(engine.complete(given)), dict(engine.complete(drawn)), engine.logps(trees)]
    engine.close()
    engine = VllmEngine(VllmOptions(), served(fresh, ENDS, 512))
    theirs = [dict(engine.complete(given)), dict(engine.complete(drawn)), engine.logps(trees)]
    engine.close()
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        for index in range(12):
            assert one[index].tokens == other[index].tokens
            np.testing.assert_allclose(one[index].logps, other[index].logps, atol=1e-5)
    for first, second in zip(ours[2], theirs[2], strict=True):
        np.testing.assert_allclose(np.concatenate(first), np.concatenate(second), atol=1e-5)
    assert all(before[index].tokens != theirs[0][index].tokens for index in range(12))


@needs_vllm
def test_killed_in_the_middle_it_says_so_and_keeps_what_came(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the log is kept there
    engine = VllmEngine(VllmOptions(), served(model_folder, (), 512))
    [group] = groups(engine)
    answers = engine.complete([request(50, new=2), *(request(60, n, new=500) for n in range(40, 340))])
    index, completion = next(answers)
    assert index == 0 and len(completion.tokens) == 2
    os.kill(group, signal.SIGKILL)
    with pytest.raises(EngineError, match="vLLM's process was killed by signal 9"):
        list(answers)
    engine.close()
    assert is_gone(group)


@needs_vllm
def test_vllm_ends_with_a_parent_that_was_killed(model_folder: Path, tmp_path: Path) -> None:
    process, group = parent(model_folder, tmp_path, "vllm")
    process.kill()
    process.wait(60)
    until(lambda: is_gone(group))
    assert list(tmp_path.iterdir()) == []


@needs_vllm
def test_a_model_that_vllm_refuses_is_named_with_vllms_reason(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has 256 positions."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the log is kept there
    with pytest.raises(EngineError, match=r"exit code 1: .*ValidationError.*\(1024\) is greater"):
        VllmEngine(VllmOptions(), served(tiny_model, (0,), 1024))


@pytest.fixture(scope="module")
def adapted_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an adapter that changes much, merged."""
    folder = tmp_path_factory.mktemp("adapted")
    adapted = add_lora(load_model(model_folder), rank=4, alpha=8.0)
    with torch.no_grad():
        for number, (name, weight) in enumerate(adapted.named_parameters()):
            if "lora_B" in name:
                weight.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(number))
    save_adapter(adapted, folder, base=str(model_folder))
    merge_lora(adapted).save_pretrained(folder)
    return folder


@needs_vllm
def test_an_unmerged_adapter_answers_as_its_merged_weights_do(model_folder: Path, adapted_folder: Path) -> None:
    trees = [TokenTree(prompt, ((60, 70, 80, 90), (100,))) for prompt in prompts(8, 100)]
    found = []
    for unmerged, folder in ((True, adapted_folder), (False, adapted_folder), (True, model_folder)):
        engine = VllmEngine(VllmOptions(unmerged=unmerged), served(folder, ENDS, 512))
        found.append(np.concatenate([logps for tree in engine.logps(trees) for logps in tree]))
        engine.close()
    unmerged, merged, base = found
    np.testing.assert_allclose(unmerged, merged, atol=1e-3)
    assert np.abs(base - merged).max() > 0.1  # so the adapter was there


def test_an_adapter_is_served_on_the_base_it_was_trained_on(adapted_folder: Path, model_folder: Path) -> None:
    settings, adapter = vllm_engine._settings(VllmOptions(unmerged=True), served(adapted_folder))
    assert (settings["model"], settings["max_lora_rank"], adapter) == (str(model_folder), 8, str(adapted_folder / "adapter"))
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert settings["lora_target_modules"] == projections  # not the LM head
    settings, adapter = vllm_engine._settings(VllmOptions(), served(adapted_folder))
    assert (settings["model"], adapter, "enable_lora" in settings) == (str(adapted_folder), None, False)


@pytest.mark.parametrize("base", ["another", "/no/such"])
def test_an_adapter_without_its_base_is_refused(adapted_folder: Path, mini_folder: Path, tmp_path: Path, base: str) -> None:
    """Another base would answer, and its answers would be kept as the checkpoint's."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(adapted_folder, folder)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    name = str(_model(tmp_path / "another", mini_folder, seed=5)) if base == "another" else base
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    said = (
        "is not what .* was merged from" if base == "another" else "base of the adapter in .*: model '/no/such': no such folder"
    )
    with pytest.raises(UserError, match=said):
        vllm_engine._settings(VllmOptions(unmerged=True), served(folder))
