"""Training rows of the demo model: one context with many questions, and attention that separates the questions.

Questions share the documents of their context. Each question is a block that attends to the documents and to itself,
but to no other block. It has the positions of a prompt with only this question, so one pass over the documents serves
all questions.
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
from focuslens.prompts.prompt import MultiDocSample

__all__ = ["ATTENTION", "Lesson", "Row", "question_row", "repeated_tokens"]

ATTENTION = "questions_apart"
"""Name under which :func:`attend` is registered with transformers."""


@dataclass(frozen=True)
class Lesson:
    """One step of the curriculum: contexts of a kind, and the accuracy that ends it.

    Args:
        name: Name in logs.
        documents: Fewest and most documents of a context.
        questions: Questions per context.
        tokens: Smallest number of tokens per step.
        pass_mark: Running accuracy on the first token of answers that ends the lesson.
        refusals: Share of questions that no document answers.
        alone: Share of contexts with only one document in the prompt, under its own number.
        settings: Difficulty of the corpus.
        recency: Ratio of the frequencies of questions about the last and about the first document; 1 for equal ones.
        after: Share of all training tokens after which the lesson begins regardless of the accuracy; 0 for none.
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
    """One context and its questions; all but the mask are ``[1 pos]``."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    kinds: Tensor  # 1 where the target is the first token of an answer, 2 for that of a refusal, else 0
    mask: Tensor  # [1 1 question_pos pos]: visible keys of the rows behind the documents


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids without the ``<s>``."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def question_block(
    tokenizer: PreTrainedTokenizerFast, question: SyntheticQuestion
) -> tuple[list[int], list[float], int]:
    """Token ids of a question and its response, their weights as targets, and the index of the answer's first token."""
    before, after = question.response.rsplit(question.answer, 1)
    pieces = (f"\n\nQuestion: {question.question}\nAnswer:", f" {before.strip()}", f" {question.answer}", after)
    head, prefix, answer, tail = (encode(tokenizer, piece) for piece in pieces)
    tail += encode(tokenizer, "</s>")
    weights = [0.0] * len(head) + [0.2] * len(prefix) + [1.0] * len(answer) + [0.2] * len(tail)
    return [*head, *prefix, *answer, *tail], weights, len(head) + len(prefix)


def _shown(rng: random.Random, lesson: Lesson) -> tuple[str, SyntheticContext, int]:
    """The prompt's text up to its last document, the context with the possible questions, and their number."""
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
    """One question. With recency, the log-probability of a document grows linearly from the first to the last."""
    if rng.random() < lesson.refusals:
        return rng.choice(context.unanswerable)
    last = max(len(context.documents) - 1, 1)
    chances = [lesson.recency ** ((question.gold_index or 0) / last) for question in context.answerable]
    return rng.choices(context.answerable, chances)[0]


def question_row(tokenizer: PreTrainedTokenizerFast, rng: random.Random, lesson: Lesson) -> Row:
    """A context of the lesson and questions about it, drawn with replacement."""
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
    """Random tokens, repeated once, ``[row pos]``, and the length of one copy."""
    length = rng.randint(*lengths)
    rows = [[rng.randrange(3, vocabulary) for _ in range(length)] for _ in range(max(1, tokens // (2 * length)))]
    return torch.tensor(rows).repeat(1, 2), length


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention in which the last rows have the mask ``attention_mask [1 1 row key]`` instead.

    The documents' rows need no mask, and their attention skips keys above the diagonal, which saves most of the work.
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
