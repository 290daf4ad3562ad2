"""Per-token log-probs against torch.log_softmax of a plain forward pass, one sequence at a time, in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gsil_bench.data.chat import ChatFormat
from gsil_bench.data.demonstrations import from_items
from gsil_bench.models.checkpoint import end_token_ids, load_model, load_tokenizer
from gsil_bench.models.logprobs import completion_logps, trees_of
from gsil_bench.records import Encoded
from gsil_bench.tasks import load_task


def sequences(seed: int, vocabulary: int, lengths: list[tuple[int, int]]) -> list[Encoded]:
    random = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (length,), generator=random).tolist())

    return [Encoded(ids(prompt), ids(completion)) for prompt, completion in lengths]


def plain(model: torch.nn.Module, sequence: Encoded) -> torch.Tensor:
    """log_softmax of one unpadded sequence's logits, picked at each completion token."""
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.completion_ids]])
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    start = len(sequence.prompt_ids)
    return torch.stack([logps[start + n - 1, token] for n, token in enumerate(sequence.completion_ids)])


LENGTHS = [(5, 9), (1, 1), (40, 3), (2, 70), (17, 17), (3, 1)]


@pytest.fixture(scope="module", params=["mini", "stories260K"])
def folder(request: pytest.FixtureRequest, mini_folder: Path) -> Path:
    if request.param == "mini":
        return mini_folder
    return Path(request.getfixturevalue("data_dir")) / "models" / "stories260K"


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play in the park with her dog.",
    "One day, she saw a big red ball. She wanted to play with it, but it was too high in the tree.",
    'Her friend Tom said, "I can help you." He was very tall and got the ball. Lily was happy and said thank you.',
)


def stories(data_dir: Path) -> tuple[Path, list[Encoded]]:
    """The real tiny model and text of its kind: each sentence after those before it."""
    folder = data_dir / "models" / "stories260K"
    ids = [tuple(load_tokenizer(folder)(text)["input_ids"]) for text in STORY]
    return folder, [Encoded((1, *sum(ids[:n], ())), ids[n]) for n in range(len(ids))]


@pytest.mark.data
@pytest.mark.parametrize("tokens", [1, 64, 10_000])
def test_fp32_equals_fp64_log_softmax_to_1e_5(data_dir: Path, tokens: int) -> None:
    folder, given_ = stories(data_dir)
    model, exact = load_model(folder), load_model(folder).double()
    for order in (given_, given_[::-1]):
        for sequence, logps in zip(order, completion_logps(model, order, tokens), strict=True):
            assert logps.dtype == torch.float32
            torch.testing.assert_close(logps.double(), plain(exact, sequence), rtol=0, atol=1e-5)


def demonstrations(folder: Path, task: str, template: str | None) -> list[Encoded]:
    chat = ChatFormat.of(load_tokenizer(folder), template, end_token_ids(folder))
    return [chat.encode(item.messages, item.answer) for item in from_items(load_task(task).items("train", None)[:8])]


@pytest.mark.parametrize("name", ["mini", "gsm8k"])
def test_what_is_added_to_the_errors_of_the_forward_pass_stays_below_1e_5(
    name: str, mini_folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of 20 carry fp32 errors of up to 4e-5 on text that surprises a model. Beyond those of its own forward pass:"""
    if name == "mini":
        folder, given_ = mini_folder, demonstrations(mini_folder, "mini-gsm8k", None)
    else:
        data = Path(request.getfixturevalue("data_dir"))
        monkeypatch.setenv("GSIL_BENCH_DATA", str(data))
        folder = data / "models" / "stories260K"
        given_ = demonstrations(folder, "gsm8k", "plain")
    model = load_model(folder)
    for sequence, logps in zip(given_, completion_logps(model, given_, 1), strict=True):
        torch.testing.assert_close(logps.double(), plain(model, sequence), rtol=0, atol=1e-5)


def test_fp64_equals_log_softmax_to_1e_12(folder: Path) -> None:
    exact = load_model(folder).double()
    given_ = sequences(1, exact.config.vocab_size, LENGTHS)
    for sequence, logps in zip(given_, completion_logps(exact, given_), strict=True):
        assert logps.dtype == torch.float64
        torch.testing.assert_close(logps, plain(exact, sequence), rtol=0, atol=1e-12)


def test_order_and_neighbours_do_not_matter(folder: Path) -> None:
    exact = load_model(folder).double()
    given_ = sequences(2, exact.config.vocab_size, LENGTHS)
    forwards, backwards = completion_logps(exact, given_), completion_logps(exact, given_[::-1])[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_neighbours_with_one_prompt_are_one_tree(mini_folder: Path) -> None:
    """Three completions of a prompt, then the same prompt again later: two trees of it, and the same log-probs as apart."""
    exact = load_model(mini_folder).double()
    prompt, answers = (5, 6, 7), [(8, 9), (10,), (11, 12, 13)]
    given_ = [*(Encoded(prompt, answer) for answer in answers), Encoded((9, 9), (8,)), Encoded(prompt, (8, 9))]
    assert [len(tree.completions) for tree in trees_of(given_)] == [3, 1, 1]
    for sequence, logps in zip(given_, completion_logps(exact, given_), strict=True):
        torch.testing.assert_close(logps, plain(exact, sequence), rtol=0, atol=1e-12)


def test_a_sequence_without_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a prompt"):
        Encoded((), (1, 2))
