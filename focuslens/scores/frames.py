"""Data frames of scores per sample, head and document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from focuslens.heads import check_heads
from focuslens.prompts.gold import Gold, gold_documents
from focuslens.util.frames import SHARE, rows_frame, stacked_frames

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["document_frame"]

_COLUMNS = ("sample_id", "question_id", "document", "is_gold", "layer", "head")


def document_frame(
    sample_ids: Sequence[str],
    question_ids: Sequence[str],
    gold: Sequence[Gold],
    values: Mapping[str, Sequence[Tensor]],
    heads: Iterable[tuple[int, int]] | None,
    units: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Data frame with one row per sample, document and head.

    Args:
        sample_ids: Id of each sample.
        question_ids: Question of each sample.
        gold: Index of the gold document of each sample, a tuple of several, or ``None`` for none.
        values: Tensors ``[layer head document]`` of each sample, by column.
        heads: The heads; ``None`` for all.
        units: Units of columns that are no shares of attention.

    Raises:
        ValueError: If ``heads`` contains a head that does not exist.
    """
    import pandas as pd

    columns, frames = list(values), list[pd.DataFrame]()
    for i, (sample, question, places) in enumerate(zip(sample_ids, question_ids, gold, strict=True)):
        n_layers, n_heads, n_documents = values[columns[0]][i].shape
        every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        chosen = every if heads is None else check_heads(heads, n_layers, n_heads)
        if not chosen:
            continue
        layers, indices = [head[0] for head in chosen], [head[1] for head in chosen]
        documents = [document for document in range(n_documents) for _ in chosen]
        content: dict[str, Any] = {
            "sample_id": sample,
            "question_id": question,
            "document": documents,
            "is_gold": [document in gold_documents(places) for document in documents],
            "layer": layers * n_documents,
            "head": indices * n_documents,
            **{name: values[name][i][layers, indices].T.reshape(-1).numpy() for name in columns},
        }
        frames.append(pd.DataFrame(content))
    units = dict.fromkeys(columns, SHARE) | dict(units or {})
    return stacked_frames(frames, units) if frames else rows_frame([], units, (*_COLUMNS, *columns))
