"""Methods of the field that edit prompts, logits or decoding, as ways of answering for a setting of a sweep."""

from focuslens.evaluation.methods.context_aware import ContextAwareDecoding
from focuslens.evaluation.methods.document_filter import DocumentFilter
from focuslens.evaluation.methods.dysco import DySCO
from focuslens.evaluation.methods.self_elicit import SelfElicit

__all__ = ["ContextAwareDecoding", "DocumentFilter", "DySCO", "SelfElicit"]
