"""Training rows of the demo model: one context with many questions, and attention that separates the questions.

All questions of a row share the documents of its context. Each question is a block of tokens that attends to the
documents and to itself, but not to the blocks of other questions. A block has the positions that it would have in a
prompt with only this question. One pass over the documents therefore serves all questions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from transformers import AttentionInterface, PreTrainedTokenizerFast

from focuslens.data.synthetic import CorpusSettings, SyntheticContext, SyntheticQuestion, generate_context
from focuslens.prompts.sample import MultiDocSample

__all__ = ["ATTENTION", "Lesson", "Row", "question_row", "repeated_tokens"]

ATTENTION = "questions_apart"
"""Name under which :func:`attend` is registered with transformers."""


@dataclass(frozen=True)
class Lesson:
    """Lesson of the curriculum: the kind of its contexts, and the accuracy at which it ends.

    Args:
        name: Name in logs.
        documents: Minimum and maximum number of documents per context.
        questions: Number of questions per context.
        tokens: Minimum number of tokens per step.
        pass_mark: Running accuracy at which the lesson ends, measured on the first token of each answer.
        refusals: Share of questions that no document answers.
        alone: Share of contexts with only one document in the prompt. This document keeps its number.
        settings: Difficulty of the corpus.
        recency: Frequency of questions about the last document, relative to questions about the first document.
        after: Share of all training tokens after which the lesson begins regardless of accuracy; 0 disables this start.
    """

    name: str
    documents: tuple[int, int]
    questions: int
    tokens: int
    pass_mark: float
    refusals: float
    alone: float
    settings: CorpusSettings
    recency: float = 1.0
    after: float = 0.0


class Row(NamedTuple):
    """One context and its questions. All tensors except ``mask`` have the shape ``[1 pos]``."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    kinds: Tensor  # 1 if the target is an answer's first token, 2 if it is a refusal's first token, otherwise 0
    mask: Tensor  # [1 1 question_pos pos]: keys that are visible from each token after the documents


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text, without the start token ``<s>``."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def question_block(
    tokenizer: PreTrainedTokenizerFast, question: SyntheticQuestion
) -> tuple[list[int], list[float], int]:
    """Token ids of a question and its response, their loss weights, and the index of the answer's first token."""
    before, after = question.response.rsplit(question.answer, 1)
    pieces = (f"\n\nQuestion: {question.question}\nAnswer:", f" {before.strip()}", f" {question.answer}", after)
    head, prefix, answer, tail = (encode(tokenizer, piece) for piece in pieces)
    tail += encode(tokenizer, "</s>")
    weights = [0.0] * len(head) + [0.2] * len(prefix) + [1.0] * len(answer) + [0.2] * len(tail)
    return [*head, *prefix, *answer, *tail], weights, len(head) + len(prefix)


def _shown(rng: random.Random, lesson: Lesson) -> tuple[str, SyntheticContext, int]:
    """Text of a prompt up to the last document, the context to draw questions from, and the number of questions."""
    context = generate_context(rng, rng.randint(*lesson.documents), "train", lesson.settings)
    if rng.random() >= lesson.alone:
        prompt = MultiDocSample("?", ("?",), context.documents, None).prompt()
        return str(prompt)[: prompt.spans["document"][-1][1]], context, lesson.questions
    index = rng.randrange(len(context.documents))
    prompt = MultiDocSample("?", ("?",), context.documents, index).prompt("gold")
    answerable = tuple(question for question in context.answerable if question.gold_index == index)
    alone = SyntheticContext(context.documents, answerable, context.unanswerable)
    return str(prompt)[: prompt.spans["document"][-1][1]], alone, 2 * len(answerable)


def _draw_question(rng: random.Random, context: SyntheticContext, lesson: Lesson) -> SyntheticQuestion:
    """Draw one question. ``recency`` makes the log-probability of a document linear in the document's index."""
    if rng.random() < lesson.refusals:
        return rng.choice(context.unanswerable)
    last = max(len(context.documents) - 1, 1)
    chances = [lesson.recency ** ((question.gold_index or 0) / last) for question in context.answerable]
    return rng.choices(context.answerable, chances)[0]


def question_row(tokenizer: PreTrainedTokenizerFast, rng: random.Random, lesson: Lesson) -> Row:
    """Draw a context of the lesson, and draw questions about this context with replacement."""
    text, context, count = _shown(rng, lesson)
    shared: list[int] = tokenizer(text).input_ids
    size = len(shared)
    ids, positions, blocks = [*shared], [*range(size)], [0] * size
    targets, weights, kinds = [-100] * size, [0.0] * size, [0] * size
    for block in range(1, count + 1):
        question = _draw_question(rng, context, lesson)
        new, new_weights, answer_start = question_block(tokenizer, question)
        marks = [0] * len(new)
        marks[answer_start - 1] = 2 if question.gold_index is None else 1
        ids += new
        positions += range(size, size + len(new))
        blocks += [block] * len(new)
        targets += [*new[1:], -100]
        weights += [*new_weights[1:], 0.0]
        kinds += marks
    columns = [torch.tensor(column)[None] for column in (ids, positions, targets, weights, kinds)]
    block = torch.tensor(blocks)
    own = block[size:, None] == block
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[size:] & (own | (block == 0))
    return Row(*columns, mask=mask[None, None])


def repeated_tokens(
    rng: random.Random, vocabulary: int, lengths: tuple[int, int], tokens: int = 1024
) -> tuple[Tensor, int]:
    """Rows ``[row pos]``, each a random sequence followed by its copy, and the length of the sequence."""
    length = rng.randint(*lengths)
    rows = [[rng.randrange(3, vocabulary) for _ in range(length)] for _ in range(max(1, tokens // (2 * length)))]
    return torch.tensor(rows).repeat(1, 2), length


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention, except that the last rows use the mask ``attention_mask``, ``[1 1 row key]``.

    The rows of the documents come first and need no mask. For these rows, keys above the diagonal are skipped, which
    saves most of the work.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (repeat(x, "batch kv pos d -> batch (kv group) pos d", group=group) for x in (key, value))
    size = query.shape[2] - (0 if attention_mask is None else attention_mask.shape[2])
    z = F.scaled_dot_product_attention(
        query[:, :, :size], key[:, :, :size], value[:, :, :size], is_causal=True, scale=scaling
    )
    if attention_mask is not None:
        rest = F.scaled_dot_product_attention(query[:, :, size:], key, value, attn_mask=attention_mask, scale=scaling)
        z = torch.cat((z, rest), dim=2)
    return rearrange(z, "batch head pos d -> batch pos head d"), None


AttentionInterface.register(ATTENTION, attend)
