"""Prompts with known document positions, their tokens, and the matching of answers."""

from focuslens.prompts.prompt import Case, Document, MultiDocSample, Prompt, Span, prompts_digest

__all__ = ["Case", "Document", "MultiDocSample", "Prompt", "Span", "prompts_digest"]
