"""Lazy access to the multi-document question-answering data of "Lost in the Middle" (Liu et al., 2024)."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

from focuslens.data._distractors import DistractorChoice
from focuslens.data._dropped import warn_of_dropped
from focuslens.data._jsonl import LineStore
from focuslens.data._source import Layout, Source
from focuslens.data.passages import data_name, data_path
from focuslens.data.positions import checked_positions, spread_positions
from focuslens.prompts.sample import MultiDocSample
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
    source = Source(LineStore(data_path(path)), layout, limit)
    warn_of_dropped(source.store.path, source.dropped)
    return MultiDocData(source, range(source.questions * layout.slots))


def _positions(given: Sequence[int] | Literal["spread"] | None, num_documents: int) -> tuple[int, ...] | None:
    if isinstance(given, str) and given == "spread":
        return spread_positions(num_documents)
    return None if given is None else checked_positions(given, num_documents)


class MultiDocData(Sequence[MultiDocSample]):
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
        self._source, self._picks, self._selection = source, picks, selection

    def __len__(self) -> int:
        return len(self._picks)

    @overload
    def __getitem__(self, index: int) -> MultiDocSample: ...
    @overload
    def __getitem__(self, index: slice) -> MultiDocData: ...
    def __getitem__(self, index: int | slice) -> MultiDocSample | MultiDocData:
        if isinstance(index, slice):
            start, stop, by = index.indices(len(self))
            # For a backward slice that ends with sample 0, ``indices`` returns the stop -1. In a slice that is rebuilt
            # from the description, -1 would mean the last sample.
            step = {"step": "slice", "start": start, "stop": None if stop < 0 else stop, "by": by}
            return self._view(self._picks[index], step)
        try:
            pick = self._picks[index]
        except IndexError:
            raise IndexError(f"there is no sample {index}: there are {len(self)}, from 0") from None
        return self._source.sample(pick)

    def __iter__(self) -> Iterator[MultiDocSample]:
        return map(self._source.sample, self._picks)

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
    def questions(self) -> int:
        """Number of distinct questions in this view."""
        return len(self._by_question())

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
            "dropped_answers": len(source.dropped),
            "selection": [dict(step) for step in self._selection],
            "questions": self.questions,
            "samples": len(self),
        }

    def split(self, fraction: float = 0.5, seed: int = 42) -> tuple[MultiDocData, MultiDocData]:
        """Split the samples by question into a training part and a test part.

        All samples of a question are in the same part. The method is that of "Focus Directions" (arXiv 2503.23306).
        ``random.Random(seed)`` shuffles the ``n`` questions, and the first ``floor(fraction * n)`` questions form the
        training part. Both parts keep the shuffled order. On a whole file, the default arguments give the paper's
        questions in the paper's order.

        Raises:
            ValueError: If the training or the test part would be empty.
        """
        groups = list(self._by_question().values())
        random.Random(seed).shuffle(groups)
        # Adding 1e-9 compensates for floating-point error: 0.29 * 100 is 28.999999999999996.
        cut = math.floor(len(groups) * fraction + 1e-9) if 0 < fraction < 1 else 0
        if not 0 < cut < len(groups):
            raise ValueError(
                f"fraction {fraction} of {len(groups)} question(s) leaves one part empty; "
                "it must lie between 0 and 1 and give each part at least one question"
            )
        step = {"step": "split", "fraction": fraction, "seed": seed}
        train, test = ([pick for group in side for pick in group] for side in (groups[:cut], groups[cut:]))
        return self._view(train, {**step, "side": 0}), self._view(test, {**step, "side": 1})

    def sample(self, n: int, seed: int = 42) -> MultiDocData:
        """Draw one sample from each of ``n`` random questions, balanced over the gold positions.

        With the same seed, the samples of a smaller draw are the first samples of a larger draw.

        Raises:
            ValueError: If ``n`` is less than 1 or greater than the number of questions.
        """
        groups = list(self._by_question().values())
        if not 1 <= n <= len(groups):
            raise ValueError(f"n is {n}; it must be 1 to {len(groups)}, the number of questions")
        rng = random.Random(seed)
        rng.shuffle(groups)
        used: Counter[int] = Counter()
        picks: list[int] = []
        for group in groups[:n]:
            # Pick the question's sample whose gold position has been used least so far. Ties are broken at random.
            pick = min(group, key=lambda pick: (used[pick % self._source.layout.slots], rng.random()))
            used[pick % self._source.layout.slots] += 1
            picks.append(pick)
        return self._view(picks, {"step": "sample", "n": n, "seed": seed})

    def close(self) -> None:
        """Close the file for all views, and delete its temporary copy, if any. Samples cannot be read afterwards."""
        self._source.store.close()

    def _view(self, picks: Sequence[int], step: Mapping[str, Any]) -> MultiDocData:
        return MultiDocData(self._source, picks, (*self._selection, step))

    def _by_question(self) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for pick in self._picks:
            groups.setdefault(self._source.first_lines[pick // self._source.layout.slots], []).append(pick)
        return groups
