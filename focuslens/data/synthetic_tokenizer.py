"""Tokenizer of the synthetic corpus, with one token per word and byte tokens for all other text."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from focuslens.data.synthetic_words import words

__all__ = ["build_tokenizer"]

_SPECIAL = ("<pad>", "<s>", "</s>")
_INSTRUCTION = "high answer for the given question using only provided search results of which might be irrelevant"
# Words that do not follow a space in the prompt, and pieces that contain punctuation or line breaks.
_UNSPACED = ("Write", "Document", "Question", "Answer", "(Title", "-quality", " (some", "\n\n", " [", "'s")
# "(Title" is one piece, so that the span of a document starts with a whole token. Digits are grouped in pairs, so that
# a year is two pieces.
_PIECES = r"\(Title|-quality| \(some|'s| ?[A-Za-z]+| ?[0-9]{1,2}|\n\n| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a fast tokenizer that prepends ``<s>`` to a text, and encodes and decodes any text without loss.

    Every word of the corpus, together with the space before it, is one token. A year is two tokens, such as "18" and
    "74". All other text is split into bytes. The tokenizer has no chat template, because the demo model is a base
    model.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spaced = [f" {word}" for word in words()]
    instruction = [f" {word}" for word in _INSTRUCTION.split()]
    pairs = [f"{number:02d}" for number in range(100)]
    pieces = [*_UNSPACED, *spaced, *instruction, *pairs]
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    visible = ["".join(text for text, _ in encode.pre_tokenize_str(piece)) for piece in pieces]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*_SPECIAL, *alphabet, *visible]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, encode])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
