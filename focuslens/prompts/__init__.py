"""Prompts with known document positions, the tokens of prompts, and the comparison of responses with answers."""

from focuslens.prompts.prompt import Case, Document, MultiDocSample, Prompt, Span, prompts_digest

__all__ = ["Case", "Document", "MultiDocSample", "Prompt", "Span", "prompts_digest"]
