"""Tokenizers out of GGUF files, with the rules that the original tokenizers have.

A GGUF file names its vocabulary, its merges and a rule for splitting text (``tokenizer.ggml.pre``), and contains no
``tokenizer.json``. A rule that is applied wrongly gives other tokens for digits, spaces or accents, and no error. A
file with an unknown rule is therefore refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from focuslens.model.sources.gguf_file import GgufFile

__all__ = ["gguf_tokenizer", "stop_tokens"]

_CONTROL, _USER_DEFINED = 3, 4
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SIGNS, _SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CAMEL = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SIGNS_AND_SLASH = _SIGNS.replace(r"[\r\n]", r"[\r\n/]")

_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_TEKKEN = rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_SIGNS_AND_SLASH}|{_SPACES}"
_GPT4O = rf"{_CAMEL[0]}{_CONTRACTIONS}?|{_CAMEL[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASH}|{_SPACES}"

_GPT2_RULES = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe")
_DIGIT_RULES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
"""Expressions that match the pieces of a text, per rule."""

_WITHOUT_MERGES = ("llama3", "llama-v3", "llama-bpe", "tekken", "falcon3", "pixtral")
"""Rules under which a piece that is a token of the vocabulary is that token, whatever its merges are."""

_NORMALISED = ("qwen2", "deepseek-r1-qwen")
"""Rules of vocabularies whose tokenizers compose accents first (NFC)."""


def gguf_tokenizer(gguf: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and its chat template.

    Raises:
        ValueError: If the file contains no vocabulary, or a vocabulary or rule that is not known.
    """
    metadata = gguf.metadata
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError(f"{gguf.path.name} contains no vocabulary (tokenizer.ggml.tokens); take another file")
    if kind == "gpt2":
        tokenizer = _byte_level(gguf, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(gguf, tokens)
    else:
        raise ValueError(
            f"{gguf.path.name} has a vocabulary of the kind {kind!r}, which cannot be rebuilt; the kinds 'gpt2' and "
            "'llama' can. Open the model in Hugging Face's format instead"
        )
    _add_special_tokens(tokenizer, metadata, tokens)
    names = {name: _token(metadata, tokens, key) for name, key in _NAMED.items()}
    if kind == "llama" or metadata.get("tokenizer.ggml.add_bos_token"):
        _begin_with_bos(tokenizer, metadata, tokens)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=int(gguf.settings.get("context_length", 10**30)),
        padding_side="left",
        **{name: token for name, token in names.items() if token is not None},
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped


_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def stop_tokens(gguf: GgufFile) -> list[int]:
    """Tokens that end a response: the ends of a text, of a turn and of a message, as far as the file names them."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [gguf.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


def _token(metadata: Any, tokens: Sequence[str], key: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}")
    return None if index is None or not 0 <= index < len(tokens) else str(tokens[index])


def _byte_level(gguf: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with the splitting rule that the file names."""
    merges = gguf.metadata.get("tokenizer.ggml.merges")
    rule = gguf.metadata.get("tokenizer.ggml.pre")
    if not merges:
        raise ValueError(f"{gguf.path.name} contains no merges (tokenizer.ggml.merges), so its tokens are not known")
    whole = rule in _WITHOUT_MERGES
    bpe = models.BPE(_numbered(tokens), [_pair(merge) for merge in merges], ignore_merges=whole)
    tokenizer = Tokenizer(bpe)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in _SPLITS)
    if rule in _SPLITS:
        before = [pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated")]
    elif rule in _DIGIT_RULES:
        before = [pre_tokenizers.Digits(individual_digits=True)]
    elif rule in _GPT2_RULES:
        before = []
    else:
        known = sorted({*_SPLITS, *_DIGIT_RULES, *_GPT2_RULES})
        raise ValueError(
            f"{gguf.path.name} splits text by the rule {rule!r} (tokenizer.ggml.pre), which is not one of "
            f"{', '.join(known)}, so its tokens are not known. Open the model in Hugging Face's format instead"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    if rule in _NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(gguf: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    """BPE over characters with bytes for unknown ones, whose merges follow from the scores of the vocabulary."""
    gemma = gguf.architecture.startswith("gemma")
    if gemma:  # its runs of spaces are spelled with spaces in the file
        tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocabulary = _numbered(tokens)
    if merges := gguf.metadata.get("tokenizer.ggml.merges"):
        pairs = [_pair(merge) for merge in merges]
    else:
        # Gemma's scores do not follow the order of its merges. The order of its tokens does.
        scores = None if gemma else gguf.metadata.get("tokenizer.ggml.scores")
        pairs = _merges(tokens, vocabulary, scores)
    bpe = models.BPE(
        vocabulary,
        pairs,
        byte_fallback=True,
        fuse_unk=True,
        unk_token=_token(gguf.metadata, tokens, "unknown_token_id"),
    )
    tokenizer = Tokenizer(bpe)
    prefix = bool(gguf.metadata.get("tokenizer.ggml.add_space_prefix", not gemma))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer


def _merges(tokens: Sequence[str], vocabulary: dict[str, int], scores: Sequence[float] | None) -> list[tuple[str, str]]:
    """All pairs of tokens that form a token, in the order in which the vocabulary was learned."""
    pairs: list[tuple[float, int, int, tuple[str, str]]] = []
    for index, token in enumerate(tokens):
        rank = float(index) if scores is None else -float(scores[index])
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((rank, vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(pairs, key=lambda entry: entry[:3])]


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _add_special_tokens(tokenizer: Tokenizer, metadata: Any, tokens: Sequence[str]) -> None:
    """Tokens that are matched whole in a text, before it is split. Control tokens are left out of decoded text."""
    types = metadata.get("tokenizer.ggml.token_type") or []
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        matched = [token for token, of_token in zip(tokens, types, strict=False) if of_token == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in matched if token in vocabulary]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _begin_with_bos(tokenizer: Tokenizer, metadata: Any, tokens: Sequence[str]) -> None:
    """Let encoded texts begin with the BOS token, unless the file says that they do not."""
    bos = _token(metadata, tokens, "bos_token_id")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", True):
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
