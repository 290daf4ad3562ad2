"""The process that runs vLLM for `vllm_engine`: it is told of jobs on stdin and answers in files.

    python -m gsil_bench.generation.vllm_worker FOLDER

    FOLDER/config.json        the parent's process id, what vLLM is to load, an adapter or null
    FOLDER/ready              written once vLLM has loaded
    FOLDER/job-N.jsonl        one line per request: {"id", "prompt", "sampling"}, where sampling are vLLM's own settings
    FOLDER/answers-N.jsonl    one line per request, flushed as it is finished: {"id", "tokens", "logps", "prompt_logps", "error"}
    FOLDER/reload-N.json      {"folder"}: a checkpoint of the same architecture, whose weights take the place of the old ones
    FOLDER/reloaded-N.json    {"error"}, written once they have; empty if all went well

Commands on stdin are "run N", "drop N", which ends a job (what is unfinished is given up, and the job's files are removed), and
"reload N".
When the parent is gone, however it ended, this process removes the folder and ends itself and every process of its group:
vLLM's own are among them. It must lead its group.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TextIO

WATCH_SECONDS = 1.0
"""How often it looks whether its parent is still there. A closed stdin says so at once, but only if no other process of the
parent's has inherited the other end."""


class Worker:
    """Jobs on a vLLM engine."""

    def __init__(self, engine: Any, adapter: str | None, folder: Path) -> None:
        """Serve jobs of a folder.

        Args:
            engine: vLLM's LLMEngine.
            adapter: folder of a LoRA adapter that every request is served with.
        """
        self._engine, self._adapter, self._folder = engine, adapter, folder
        self._waiting: dict[str, int] = {}
        """Requests in flight, named JOB-ID by vLLM, and their ids."""
        self._answers: dict[str, TextIO] = {}
        """By job."""

    def serve(self, commands: SimpleQueue[str]) -> None:
        """Do what is commanded, for ever."""
        while True:
            for command in _waiting(commands, block=not self._engine.has_unfinished_requests()):
                verb, job = command.split()
                {"run": self._run, "drop": self._drop, "reload": self._reload}[verb](job)
            for output in self._engine.step() if self._engine.has_unfinished_requests() else ():
                if output.finished and output.request_id in self._waiting:
                    self._answer(output.request_id, _answer(output))

    def _run(self, job: str) -> None:
        self._answers[job] = (self._folder / f"answers-{job}.jsonl").open("a", encoding="utf-8")
        for line in (self._folder / f"job-{job}.jsonl").read_text(encoding="utf-8").splitlines():
            request: dict[str, Any] = json.loads(line)
            name = f"{job}-{request['id']}"
            self._waiting[name] = int(request["id"])
            try:
                self._add(name, request["prompt"], request["sampling"])
            except (ValueError, TypeError, NotImplementedError) as error:  # what vLLM says of a request that it will not take
                self._answer(name, {"error": " ".join(str(error).split())[:300] or type(error).__name__})

    def _add(self, name: str, prompt: Sequence[int], sampling: Mapping[str, Any]) -> None:
        lora = None if self._adapter is None else import_module("vllm.lora.request").LoRARequest("adapter", 1, self._adapter)
        # The model's own end tokens are ignored: the request names those that count.
        params = import_module("vllm").SamplingParams(ignore_eos=True, detokenize=False, **sampling)
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params, lora_request=lora)

    def _drop(self, job: str) -> None:
        names = [name for name in self._waiting if name.startswith(f"{job}-")]
        if names:
            self._engine.abort_request(names)
        for name in names:
            del self._waiting[name]
        self._answers.pop(job).close()
        for kind in ("job", "answers"):
            (self._folder / f"{kind}-{job}.jsonl").unlink()

    def _reload(self, job: str) -> None:
        asked = self._folder / f"reload-{job}.json"
        try:
            self._load(json.loads(asked.read_text(encoding="utf-8"))["folder"])
            error = ""
        except Exception as found:  # whatever vLLM's version says: the parent starts another process then
            error = " ".join(f"{type(found).__name__}: {found}".split())[:300]
        asked.unlink()
        partial = self._folder / f"reloaded-{job}.partial"
        partial.write_text(json.dumps({"error": error}), encoding="utf-8")
        partial.rename(partial.with_suffix(".json"))

    def _load(self, folder: str) -> None:
        """Read a checkpoint's weights into the tensors that are there, and forget the keys and values of the old ones."""
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if import_module("vllm.platforms").current_platform.is_cpu():
            self._engine.apply_model(_pack_embeddings)
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not emptied")

    def _answer(self, name: str, answer: Mapping[str, Any]) -> None:
        file = self._answers[name.partition("-")[0]]
        file.write(json.dumps({"id": self._waiting.pop(name), **answer}) + "\n")
        file.flush()


def _pack_embeddings(model: Any) -> None:
    """Pack embeddings and LM head anew: on a CPU, vLLM 0.32 goes on with the old LM head where it is tied to the embeddings."""
    kind = import_module("vllm.model_executor.layers.vocab_parallel_embedding").VocabParallelEmbedding
    for module in model.modules():
        if isinstance(module, kind):
            module.quant_method.process_weights_after_loading(module)


def _waiting(commands: SimpleQueue[str], block: bool) -> Iterator[str]:
    """Commands that have come; waits for one if there is nothing else to do."""
    try:
        while True:
            yield commands.get(block=block)
            block = False
    except Empty:
        return


def _answer(output: Any) -> dict[str, Any]:
    """What vLLM's RequestOutput says."""
    [made] = output.outputs
    if made.finish_reason not in ("stop", "length"):
        return {"error": f"vLLM ended it: {made.finish_reason}"}
    tokens = list(made.token_ids)
    given = list(output.prompt_token_ids)
    return {
        "tokens": tokens,
        "logps": None if made.logprobs is None else _logps(tokens, made.logprobs),
        "prompt_logps": None if output.prompt_logprobs is None else _logps(given[1:], list(output.prompt_logprobs)[1:]),
        "error": "",
    }


def _logps(tokens: Sequence[int], places: Sequence[Any]) -> list[float]:
    """Each token's own, out of those that vLLM gives for its place."""
    return [float(place[token].logprob) for token, place in zip(tokens, places, strict=True)]


def _listen(commands: SimpleQueue[str], folder: Path, parent: int) -> None:
    """Pass commands on; once the parent is gone, end everything."""
    rest = b""
    while os.getppid() == parent:
        if select.select([0], [], [], WATCH_SECONDS)[0]:
            data = os.read(0, 2**16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                commands.put(line.decode())
    shutil.rmtree(folder, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(folder: Path) -> None:
    """Load what the folder's config.json says, and serve its jobs."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    commands: SimpleQueue[str] = SimpleQueue()
    Thread(target=_listen, args=(commands, folder, config["parent"]), daemon=True).start()
    settings = import_module("vllm.engine.arg_utils").EngineArgs(**config["engine"])
    context = import_module("vllm.usage.usage_lib").UsageContext.LLM_CLASS  # with the batch sizes for throughput
    engine = import_module("vllm.v1.engine.llm_engine").LLMEngine.from_engine_args(settings, usage_context=context)
    (folder / "ready").touch()
    Worker(engine, config["adapter"], folder).serve(commands)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
