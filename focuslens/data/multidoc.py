"""Lazy access to the multi-document question-answering data of "Lost in the Middle" (Liu et al., 2024)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from focuslens.data._distractors import DistractorChoice
from focuslens.data._dropped import warn_of_dropped
from focuslens.data._jsonl import LineStore
from focuslens.data._records import parse_object
from focuslens.data._source import Layout, Source
from focuslens.data._views import SampleViews
from focuslens.data.passages import data_name, data_path
from focuslens.data.positions import checked_positions, spread_positions
from focuslens.prompts.sample import MultiDocSample
from focuslens.prompts.template import PromptTemplate, described_template
from focuslens.util.checks import checked_integer
from focuslens.util.html import card, table

__all__ = ["MultiDocData", "load_multidoc"]


def load_multidoc(
    path: str | os.PathLike[str],
    *,
    num_documents: int = 20,
    gold_positions: Sequence[int] | Literal["spread"] | None = "spread",
    seed: int = 42,
    limit: int | None = None,
    distractors: DistractorChoice = "random",
    template: PromptTemplate | None = None,
) -> MultiDocData:
    """Load samples from a lost-in-the-middle file, one sample per question and gold position.

    The file is in JSON Lines format, plain or gzipped. There are three kinds of file. The first record determines the
    kind:

    * **Retrieval results** (``nq-open-contriever-msmarco-retrieved-documents``): no passage in ``ctxs`` has the field
      ``isgold``. The distractors are the first ``num_documents - 1`` passages whose ``hasanswer`` is false, shuffled
      anew for each question and gold position. The gold passage consists of the title and the ``chunked_long_answer``
      of ``nq_annotated_gold``.
    * **Placed** (``nq-open-N_total_documents_gold_at_K``): ``ctxs`` contains several passages, and ``isgold`` is true
      for exactly one of them, the gold passage. The distractors are the first ``num_documents - 1`` other passages, in
      file order. The gold passage is moved to each of the ``gold_positions``.
    * **Oracle** (``nq-open-oracle``): ``ctxs`` contains only the gold passage. The distractors are gold passages of
      other questions in the file, drawn at random or, with ``distractors="bm25"``, most similar to the question. All
      distractors of a question are different, and no distractor contains an accepted answer as a whole word. All
      samples of a question have the same distractors, but in different orders.

    With ``distractors="bm25"``, an oracle file gives distractors that distract: passages that share rare words with
    the question. The score is that of BM25 in Lucene's variant, with ``k1`` 1.5 and ``b`` 0.75, over the words of title
    and text in lower case. The passages are ranked in the whole file, also with a ``limit``. Passages with equal scores
    are in file order. Near-duplicates of the gold passage, which share more than half of the word 5-grams of the
    shorter passage with it, count as gold passages, and are left out.
    :attr:`MultiDocData.description` says how many passages were left out.

    This function validates every line once, and keeps line offsets in memory instead of records. A line is read again
    when one of its samples is accessed (see :class:`MultiDocData`). If an accepted answer is empty after normalisation
    and the question has other answers, the empty answer is dropped with a warning, once per file and process. NQ-Open
    has one such answer: "*". Commands show the warning with ``--verbose``, or if there are more than five such answers.

    Args:
        path: Path to the file, or ``"passages"`` for the oracle file of 144 questions that ships with the package.
        num_documents: Number of documents per sample, including the gold document.
        gold_positions: Positions of the gold document, counted from 0. Each position gives one sample per question.
            ``"spread"`` means up to five positions, spread evenly over the documents: 0, 4, 9, 14 and 19 of 20
            documents, and 0, 1 and 2 of three. ``None`` keeps the gold document at its position in the file, which is
            possible only for placed files.
        seed: Random seed for the order of the distractors and, for an oracle file, also for their random choice.
        limit: Maximum number of questions, counted from the first line; ``None`` for no limit. Later lines are read
            only in an oracle file, where they provide distractors.
        distractors: Choice of the distractors from an oracle file: ``"random"``, or ``"bm25"`` for the passages most
            similar to the question. In other files, whose questions have distractors of their own, only ``"random"`` is
            possible, and has no effect.
        template: Wording of the prompts; ``None`` for that of the benchmark.

    Raises:
        FileNotFoundError: If the file does not exist.
        IsADirectoryError: If ``path`` is a directory.
        TypeError: If an argument that must be an integer, or a sequence of integers, is something else.
        ValueError: If an argument is out of range, or if a line is invalid: broken JSON, a missing field, too few or
            too many gold passages, too few distractors, or no usable answer. For an invalid line, the message names
            the file and the line number. Also if ``distractors`` is ``"bm25"`` and the file is no oracle file.
    """
    num_documents, seed = checked_integer(num_documents, "num_documents"), checked_integer(seed, "seed")
    if num_documents < 1:
        raise ValueError(f"num_documents is {num_documents}; it must be at least 1, the gold document")
    layout = Layout(num_documents, _positions(gold_positions, num_documents), seed, distractors)
    limit = None if limit is None else checked_integer(limit, "limit")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 question, or None for all")
    source = Source(LineStore(data_path(path)), layout, limit, template)
    warn_of_dropped(source.store.path, source.dropped)
    return MultiDocData(source, range(source.questions * layout.slots))


def _positions(given: Sequence[int] | Literal["spread"] | None, num_documents: int) -> tuple[int, ...] | None:
    if isinstance(given, str) and given == "spread":
        return spread_positions(num_documents)
    return None if given is None else checked_positions(given, num_documents)


class MultiDocData(SampleViews):
    """Lazy sequence of samples from one file, as returned by :func:`load_multidoc`.

    :func:`load_multidoc` returns the questions in file order, and the samples of each question in the order of
    ``gold_positions``. ``data[i]`` reads the line of one question and, for an oracle file, also the lines of its
    distractors. Slices, :meth:`split` and :meth:`sample` return views of the same file without copying data. Only line
    numbers, line offsets and some parsed records (of an oracle file 4,096, about 8 MB) are kept in memory. A gzipped
    file is decompressed once, into a temporary file. The temporary file is deleted by :meth:`close` or when the last
    view is garbage-collected.

    The ``question_id`` of a sample is the number of the first line with its question, counted from 0. If a later line
    repeats the question, the samples of the later line have that line's number in their ``name``.
    """

    def __init__(self, source: Source, picks: Sequence[int], selection: tuple[Mapping[str, Any], ...] = ()) -> None:
        super().__init__(picks, selection)
        self._source = source

    def _read(self, pick: int) -> MultiDocSample:
        return self._source.sample(pick)

    def _question(self, pick: int) -> int:
        return self._source.first_lines[pick // self._source.layout.slots]

    def _row(self, pick: int) -> Mapping[str, Any]:
        return parse_object(self._source.store[pick // self._source.layout.slots])

    def _place(self, pick: int) -> str:
        return f"{self._source.store.path}, line {pick // self._source.layout.slots + 1}"

    @property
    def path(self) -> Path | None:
        """Path of the file."""
        return self._source.store.path

    def _slot(self, pick: int) -> int:
        return pick % self._source.layout.slots

    def _with(self, picks: Sequence[int], selection: tuple[Mapping[str, Any], ...]) -> MultiDocData:
        return MultiDocData(self._source, picks, selection)

    def __repr__(self) -> str:
        layout = self._source.layout
        gold = "where the file has it" if layout.gold_positions is None else f"at {layout.gold_positions}"
        return (
            f"MultiDocData({self._source.store.path.name!r}: {len(self)} samples of {self.questions} questions, "
            f"{layout.num_documents} documents, gold {gold})"
        )

    def _repr_html_(self) -> str:
        first = [self[i] for i in range(min(3, len(self)))]
        rows = [
            (
                sample.id,
                sample.question,
                "; ".join(sample.answers),
                "-" if sample.gold_index is None else sample.gold_index,
            )
            for sample in first
        ]
        return card(repr(self), table(("id", "question", "accepted", "gold"), rows, "The first samples"))

    @property
    def description(self) -> dict[str, object]:
        """JSON-serialisable description of the samples for result files. Equal descriptions mean equal samples.

        ``sha256`` is the digest of the whole file, computed on first access. ``selection`` lists the slices, splits and
        draws that produced this view, in order. :meth:`SampleSelection.reopen` accepts the description.

        With ``distractors="bm25"``, ``left_out`` counts the passages that were more similar to a question than its last
        distractor, but contain an accepted answer (``answers``), or repeat the gold passage (``near_duplicates``). The
        counts are sums over the questions of the file, up to the ``limit``.
        """
        source, positions = self._source, self._source.layout.gold_positions
        return {
            "file": data_name(source.store.path),
            "sha256": source.sha256,
            "kind": source.kind,
            "num_documents": source.layout.num_documents,
            "gold_positions": None if positions is None else list(positions),
            "seed": source.layout.seed,
            "limit": source.limit,
            "distractors": source.layout.distractors,
            **({} if source.layout.distractors == "random" else {"left_out": dict(source.left_out)}),
            **described_template(source.template),
            "dropped_answers": len(source.dropped),
            "selection": [dict(step) for step in self._selection],
            "questions": self.questions,
            "samples": len(self),
        }

    def close(self) -> None:
        """Close the file for all views, and delete its temporary copy, if any. Samples cannot be read afterwards."""
        self._source.store.close()
