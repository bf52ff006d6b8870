"""Construction and tokenisation of prompts, and comparison of responses with accepted answers."""

from focuslens.prompts.prompt import Prompt, Span
from focuslens.prompts.sample import Case, Document, MultiDocSample, prompts_digest

__all__ = ["Case", "Document", "MultiDocSample", "Prompt", "Span", "prompts_digest"]
