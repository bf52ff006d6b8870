"""Construction and tokenisation of prompts, and comparison of responses with accepted answers."""

from focuslens.prompts.prompt import Case, Document, MultiDocSample, Prompt, Span, prompts_digest

__all__ = ["Case", "Document", "MultiDocSample", "Prompt", "Span", "prompts_digest"]
