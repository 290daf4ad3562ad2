"""Summaries, scored by ROUGE-L against one or more references: SciTLDR, and any file of documents with summaries.

The item's score is the F1 of ROUGE-L against the best of its references (rouge-score, stemmed); `text_measures.rouge` says how
several references are combined. Beside it stand the other ROUGE measures, length, repetition, copying, and whether the text ends
in a finished sentence. Whether the model ended it is not visible in a text: the count of truncated answers says that.

Five protocols ask the same question and differ in what is done to the answer before it is scored, so stored answers of one can
be scored under any other. A score that rises a lot tells what the model does wrong: it does not stop, or it repeats itself.

| name                           | scored                                            |
|--------------------------------|---------------------------------------------------|
| summarization/rouge            | the answer: all that the model said, nothing cut  |
| summarization/rouge-first-stop | up to the first end of a sentence or line         |
| summarization/rouge-no-repeats | without the sentences that were said before       |
| summarization/rouge-finished   | without a last sentence that is not finished      |
| summarization/rouge-post-processed | its first paragraph, then both of the last two |

References are never changed. The gold answer of an item, canary and demonstration, is its first reference that the protocol
leaves as it is; under rouge-first-stop an item whose references all have several sentences has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gsil_bench.data.sources import SCITLDR_DEV, SCITLDR_TEST, SCITLDR_TRAIN, Source, locate
from gsil_bench.errors import UserError, unknown_name
from gsil_bench.records import digest, file_sha256
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split
from gsil_bench.tasks.text_measures import (
    LearnedMetric,
    as_it_is,
    cut_at_first_stop,
    described,
    drop_repeats,
    drop_unfinished,
    has_rouge_words,
    post_processed,
    rouge,
)

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SCITLDR: Mapping[str, Source] = {"train": SCITLDR_TRAIN, "dev": SCITLDR_DEV, "test": SCITLDR_TEST}
SCITLDR_PROMPT = "Say in one short sentence what this paper contributes.\n\n{document}"
FILE_PROMPT = "Write a short summary of this text.\n\n{document}"
SCITLDR_TOKENS, FILE_TOKENS = 128, 256
"""Limits of an answer. The summaries of SciTLDR have 21 words on average, the longest one 102."""
SCORED_BY = "F1 of ROUGE-L by rouge-score, Porter's stemmer on, the highest of the references"


@dataclass(frozen=True)
class Variant:
    """What is done to an answer before it is scored."""

    apply: Callable[[str], str]
    words: str
    """For readers of the protocol."""


VARIANTS: Mapping[str, Variant] = {
    "rouge": Variant(as_it_is, "the whole answer"),
    "rouge-first-stop": Variant(cut_at_first_stop, "the answer up to the first end of a sentence or line"),
    "rouge-no-repeats": Variant(drop_repeats, "the answer without sentences that have the words of an earlier one"),
    "rouge-finished": Variant(drop_unfinished, "the answer without an unfinished last sentence, if another is before it"),
    "rouge-post-processed": Variant(
        post_processed,
        "the answer's first paragraph (up to an empty line or a spelled end mark), without repeated sentences, then without an "
        "unfinished last sentence, if another is before it",
    ),
}


@dataclass(frozen=True)
class Row:
    """A document and its acceptable summaries."""

    document: str
    summaries: tuple[str, ...]
    published_id: str
    where: str = ""
    """File and line, for error messages."""

    @property
    def id(self) -> str:
        """16 hex digits that name the row by its content."""
        return digest([self.document, list(self.summaries)])[:16]


@dataclass(frozen=True)
class Summarization:
    """Documents to summarise, under one protocol."""

    name: str
    summary: str
    protocol: AnswerProtocol
    rows: Callable[[Split, Path | None], list[Row]] = field(repr=False)
    """(split, the user's data folder) → the rows in the file's order."""
    apply: Callable[[str], str] = as_it_is
    """What is done to an answer before it is scored; see VARIANTS."""
    version: str = "1"
    metric: str = "ROUGE-L"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False
    takes_learned_metric: bool = True
    """`ScoringResources.learned` is a further measure, in the details as "learned"."""

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """The items of a split, in the file's order. Raises UserError for bad data or a split that does not exist."""
        return [self._item(row) for row in self.rows(split, data_dir)]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item, from 0 to 1.

        Raises:
            UserError: rouge-score is not installed.
        """
        texts = [self.apply(turns[0]) for turns in answers]
        scores = [score_summary(text, item.reference) for text, item in zip(texts, items, strict=True)]
        metric: LearnedMetric | None = resources.learned
        if metric is None:
            return scores
        values = metric.score(texts, [item.reference["summaries"] for item in items])
        return [_with_learned(score, value, metric) for score, value in zip(scores, values, strict=True)]

    def _item(self, row: Row) -> Item:
        prompt = self.protocol.prompt.replace("{document}", row.document)
        kept = [summary for summary in row.summaries if self.apply(summary).split() == summary.split()]
        reference = {"document": row.document, "summaries": list(row.summaries)}
        return Item(row.id, (prompt,), published_id=row.published_id, reference=reference, gold=tuple(kept[:1]))


def score_summary(text: str, reference: Mapping[str, Any]) -> Score:
    """Score one text: ROUGE-L F1 against the best of its references.

    The details: rouge1, rouge2, rougeL, rougeLsum, and what `described` finds beside the best reference.

    Args:
        text: what is scored.
        reference: the item's {"document": text, "summaries": [text, …]}.
    """
    document, summaries = reference["document"], reference["summaries"]
    found = rouge(text, summaries)
    details: dict[str, Any] = {name: value for name, value in asdict(found).items() if name != "best"}
    details |= described(text, document, summaries[found.best])
    reason = f"ROUGE-L {found.rougeL:.3f} against summary {found.best + 1} of {len(summaries)}"
    return Score(found.rougeL, "an empty answer" if details["empty"] else reason, details)


def _with_learned(score: Score, value: float, metric: LearnedMetric) -> Score:
    return Score(score.value, score.reason, {**score.details, "learned": value, "learned_metric": metric.identity})


# --- SciTLDR -------------------------------------------------------------------------------------------------------------------


def _scitldr_rows(split: Split, data_dir: Path | None) -> list[Row]:
    if split not in SCITLDR:
        raise unknown_name("split of summarization", split, SCITLDR)
    with locate(SCITLDR[split], data_dir).open(encoding="utf-8") as lines:
        rows = [_scitldr_row(json.loads(line)) for line in lines]
    return list({row.id: row for row in rows}.values())  # two papers of train are the same


def _scitldr_row(row: Mapping[str, Any]) -> Row:
    """The source's sentences in one line: the few line breaks within them mean nothing."""
    document = " ".join(" ".join(row["source"]).split())
    return Row(document, tuple(summary.strip() for summary in row["target"]), row["paper_id"])


def _scitldr(variant: str) -> Summarization:
    protocol = AnswerProtocol(
        name=f"summarization/{variant}",
        max_new_tokens=SCITLDR_TOKENS,
        prompt=SCITLDR_PROMPT,
        extraction=f"{VARIANTS[variant].words}; {SCORED_BY}",
        data={source.path: source.sha256 for source in SCITLDR.values()},
    )
    summary = f"618 abstracts of papers to be summarised in a sentence (SciTLDR); scored: {VARIANTS[variant].words}"
    return Summarization(protocol.name, summary, protocol, _scitldr_rows, VARIANTS[variant].apply)


# --- the user's files ----------------------------------------------------------------------------------------------------------


def file_task(path: Path | str, variant: str = "rouge") -> Summarization:
    """The task of a user's file, JSON Lines of {"document": text, "summaries": [text, …]}; "id" may name a row.

    A file is the test split. A folder has up to three: train.jsonl, dev.jsonl, test.jsonl.

    Args:
        path: the file or folder.
        variant: a key of VARIANTS.

    Raises:
        UserError: there is no such file, or no such variant. Bad rows are found when the items are read.
    """
    if variant not in VARIANTS:
        raise unknown_name("protocol of summarization", variant, VARIANTS)
    path = Path(path).expanduser()
    files = {split: path / f"{split}.jsonl" for split in SPLITS} if path.is_dir() else {"test": path}
    files = {split: file for split, file in files.items() if file.is_file()}
    if not files:
        wanted = "has none of train.jsonl, dev.jsonl, test.jsonl" if path.is_dir() else "is not a file or folder"
        raise UserError(f"summarization of {path}: it {wanted}")
    protocol = AnswerProtocol(
        name=f"summarization-file/{variant}",
        max_new_tokens=FILE_TOKENS,
        prompt=FILE_PROMPT,
        extraction=f"{VARIANTS[variant].words}; {SCORED_BY}",
        data={file.name: file_sha256(file) for file in files.values()},
    )
    name = f"summarization-{_safe(path.stem)}/{variant}"
    summary = f"documents of {path.name} to be summarised; scored: {VARIANTS[variant].words}"
    return Summarization(name, summary, protocol, partial(_file_rows, files), VARIANTS[variant].apply)


def _safe(stem: str) -> str:
    """A file's name in the letters that a task's name may have."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)[:40]


def _file_rows(files: Mapping[str, Path], split: Split, data_dir: Path | None) -> list[Row]:
    if split not in SPLITS:
        raise unknown_name("split of summarization", split, SPLITS)
    if split == "train" and split not in files:
        return []
    if split not in files:
        known = ", ".join(map(str, files.values()))
        raise UserError(f"no {split} split beside {known}: give a folder that holds {split}.jsonl")
    seen: dict[str, Row] = {}
    for row in _read_rows(files[split]):
        if row.id in seen:
            raise UserError(f"{row.where} repeats {seen[row.id].where}: remove one of them")
        seen[row.id] = row
    if not seen:
        raise UserError(f"{files[split]} has no rows")
    return list(seen.values())


def _read_rows(path: Path) -> Iterator[Row]:
    try:
        # Not splitlines: a JSON text may hold line separators other than "\n".
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for index, (number, line) in enumerate(numbered):
        yield _file_row(line, f"{path}:{number}", str(index))


def _file_row(line: str, where: str, index: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); each line is one JSON object") from error
    document, summaries = (row.get("document"), row.get("summaries")) if isinstance(row, dict) else (None, None)
    if not isinstance(document, str) or not document.strip():
        raise UserError(f'{where}: "document" must be a text that is not empty')
    if not isinstance(summaries, list) or not summaries or not all(isinstance(summary, str) for summary in summaries):
        raise UserError(f'{where}: "summaries" must be a list of one or more texts')
    if not all(map(has_rouge_words, summaries)):
        raise UserError(f"{where}: a summary has no word in a-z or 0-9, so its ROUGE would be 0 whatever is answered")
    if any(0xD800 <= ord(letter) <= 0xDFFF for text in (document, *summaries) for letter in text):
        raise UserError(f"{where}: half of a surrogate pair, which is no character")
    return Row(document.strip(), tuple(summary.strip() for summary in summaries), str(row.get("id", index)), where)


ROUGE = _scitldr("rouge")
ROUGE_FIRST_STOP = _scitldr("rouge-first-stop")
ROUGE_NO_REPEATS = _scitldr("rouge-no-repeats")
ROUGE_FINISHED = _scitldr("rouge-finished")
ROUGE_POST_PROCESSED = _scitldr("rouge-post-processed")
