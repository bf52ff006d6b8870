"""Spans that scores need, in the prompts of samples that write their prompts themselves."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.sample import Case, MultiDocSample

__all__ = ["require_spans"]


def require_spans(
    samples: Sequence[MultiDocSample], prompts: Sequence[EncodedPrompt], names: Collection[str], case: Case = "long"
) -> None:
    """Check that the prompt of every sample has the spans that its documents should have.

    A span that is missing would count as a part of the prompt without attention.

    Args:
        samples: The samples.
        prompts: Their prompts.
        names: Spans that are needed: ``document`` with one range for each document in the prompt, ``relevant`` and
            ``irrelevant`` if there are such documents in it, or ``question``.
        case: Case of the prompts.

    Raises:
        ValueError: If a span is missing. The message names the sample, the span, and the spans of the prompt.
    """
    for sample, prompt in zip(samples, prompts, strict=True):
        counts = _documents(sample, case)
        for name in names:
            found, wanted = len(prompt.spans.get(name, ())), counts.get(name, 1)
            if (name == "document" and found != wanted) or (wanted and not found):
                raise ValueError(_message(sample, prompt, name, found, wanted, case))


def _documents(sample: MultiDocSample, case: Case) -> dict[str, int]:
    """Number of documents in a prompt, by span."""
    n_relevant = 0 if case == "negative" else len(sample.gold_indices)
    n_irrelevant = 0 if case == "gold" else len(sample.documents) - len(sample.gold_indices)
    return {"document": n_relevant + n_irrelevant, "relevant": n_relevant, "irrelevant": n_irrelevant}


def _message(sample: MultiDocSample, prompt: EncodedPrompt, name: str, found: int, wanted: int, case: Case) -> str:
    fact = f"has {found} ranges in the span {name!r}, for {wanted} documents" if found else f"has no span {name!r}"
    known = ", ".join(f"{span!r} ({len(ranges)})" for span, ranges in prompt.spans.items()) or "none"
    what = "the question" if name == "question" else f"each of the {name} documents".replace("the document ", "the ")
    return (
        f"the {case} prompt of sample {sample.id!r} {fact}; its spans, with their numbers of ranges, are {known}. A "
        f"prompt() of your own must give the characters of {what}: fl.Prompt(text, {{{name!r}: [(start, end)]}})"
    )
