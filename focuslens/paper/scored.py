"""Contextual scores of many samples, in chunks that are on disk before the next one is begun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from tqdm.auto import tqdm

from focuslens.execution import Executor
from focuslens.files import write_atomically
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.model import FocusModel
from focuslens.prompts import Case, MultiDocSample
from focuslens.scoring import KINDS, ContextualScores, contextual_scores

__all__ = ["CHUNK", "head_mean", "score_in_chunks"]

CHUNK = 64
"""Samples that are scored between two writes."""


def score_in_chunks(
    model: FocusModel | Executor,
    samples: Sequence[MultiDocSample],
    case: Case,
    folder: Path,
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    batch_tokens: int = 2**14,
    progress: bool = False,
) -> ContextualScores:
    """Contextual scores, taken from ``folder`` as far as they are there; see :func:`contextual_scores`.

    The folder's name must tell the model, the samples and the settings from others.
    """
    parts: list[ContextualScores] = []
    starts = range(0, len(samples), CHUNK)
    with tqdm(total=len(samples), desc=f"scores ({case})", unit="sample", disable=not progress) as bar:
        for start in starts:
            chunk, path = samples[start : start + CHUNK], folder / f"{start:06d}.safetensors"
            if not path.exists():
                scores = contextual_scores(
                    model,
                    chunk,
                    case,
                    interventions=interventions,
                    max_new_tokens=max_new_tokens,
                    batch_tokens=batch_tokens,
                )
                write_atomically(path, _packed(scores))
            parts.append(_unpacked(path.read_bytes(), case))
            bar.update(len(chunk))
    return ContextualScores(
        *(torch.cat([getattr(part, kind) for part in parts]) for kind in KINDS),
        case=case,
        sample_ids=tuple(one for part in parts for one in part.sample_ids),
        responses=tuple(one for part in parts for one in part.responses),
        correct=tuple(one for part in parts for one in part.correct),
    )


def head_mean(scores: ContextualScores, kind: str, head: Head) -> float | None:
    """One head's mean score; ``None`` where no sample has one."""
    values = getattr(scores, kind)[:, head.layer, head.head]
    return None if bool(values.isnan().all()) else float(values.nanmean())


def _packed(scores: ContextualScores) -> bytes:
    """Tensors, and what goes with them as metadata: one file, whole or not there."""
    about = {name: json.dumps(list(getattr(scores, name))) for name in ("sample_ids", "responses", "correct")}
    return save({kind: getattr(scores, kind).contiguous() for kind in KINDS}, metadata=about)


def _unpacked(content: bytes, case: Case) -> ContextualScores:
    length = int.from_bytes(content[:8], "little")
    about: dict[str, Any] = json.loads(content[8 : 8 + length])["__metadata__"]
    tensors = load(content)
    return ContextualScores(
        *(tensors[kind] for kind in KINDS),
        case=case,
        **{name: tuple(json.loads(about[name])) for name in ("sample_ids", "responses", "correct")},
    )
