"""Greedy decoding as a checkpoint declares it: ends of responses, penalties, and tokens that must not occur."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from focuslens.model.generation import Prefix
from focuslens.model.stop_strings import checked_stop_strings
from focuslens.util.checks import checked_integer

__all__ = ["DecodingSettings", "LogitsRule", "checked_stop_tokens"]

LogitsRule: TypeAlias = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Function of logits ``[batch d_vocab]`` and of the tokens of each step, ``[batch]``, that returns changed logits."""

_NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "min_length": 0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "max_time": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "token_healing": False,
    "watermarking_config": None,
}
"""Settings of a generation config that would change greedy responses and that are not applied, with the values at which
they change nothing."""


@dataclass(frozen=True)
class DecodingSettings:
    """How a checkpoint decodes greedily. The fields have the names and meanings of Hugging Face's ``GenerationConfig``.

    Attributes:
        stop_tokens: Tokens that end a response.
        repetition_penalty: Penalty on tokens that the prompt or the response already contains; 1 for no penalty.
        no_repeat_ngram_size: Size of the token sequences that may occur once only; 0 for no limit.
        bad_words: Token sequences that a response must not contain.
        min_new_tokens: Number of tokens before which no stop token may occur.
        suppress_tokens: Tokens that a response must not contain.
        begin_suppress_tokens: Tokens with which a response must not begin.
        stop_strings: Texts that end a response, which ends before the text; see
            :class:`focuslens.model.stop_strings.ResponseText`.

    Raises:
        TypeError: If the stop strings are not a sequence of texts.
        ValueError: If a stop string is empty, or the penalty is not positive.
    """

    stop_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_strings", checked_stop_strings(self.stop_strings))
        if not self.repetition_penalty > 0:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, and 1 means no penalty"
            )

    @classmethod
    def of(cls, name: str, config: Any, tokenizer: Any, revision: str | None = None) -> DecodingSettings:
        """Settings of a checkpoint, as Hugging Face's ``generate`` applies them.

        They come from ``generation_config.json``, or from ``config.json`` if that file does not exist. If the file
        names no stop token, the stop token is the tokenizer's EOS token. Settings that are not applied give a warning.
        """
        declared: Any = None
        try:
            declared = cast("Any", GenerationConfig).from_pretrained(name, revision=revision)
        except OSError as error:
            if (Path(name) / "generation_config.json").is_file():
                raise ValueError(f"generation_config.json of {name!r} cannot be read ({error}); correct it") from error
            # A configuration of transformers keeps none of these settings, so they are read from the file.
            file = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
            raw = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
            declared = cast("Any", GenerationConfig).from_model_config({**config.to_dict(), **raw})
        return cls.of_generation_config(declared, config, tokenizer, name, stacklevel=5)

    @classmethod
    def of_generation_config(
        cls, declared: Any, config: Any, tokenizer: Any, name: str, *, stacklevel: int = 3
    ) -> DecodingSettings:
        """Settings of a ``GenerationConfig``, as Hugging Face's ``generate`` applies them.

        Settings that are not applied give a warning, whose line is ``stacklevel`` calls above.
        """
        declared = cast("Any", GenerationConfig)() if declared is None else declared
        ignored = {
            key: value
            for key, neutral in _NEUTRAL.items()
            if (value := getattr(declared, key, None)) is not None and value != neutral
        }
        if declared.use_cache is False and _depends_on_cache(config):
            ignored["use_cache"] = False
        if ignored:
            settings = ", ".join(f"{key}={value!r}" for key, value in sorted(ignored.items()))
            warnings.warn(
                f"the generation config of {name!r} has {settings}, which FocusLens does not apply: its responses are "
                "greedy, and differ from those of transformers",
                stacklevel=stacklevel,
            )
        stops, strings = declared.eos_token_id, declared.stop_strings
        return cls(
            stop_tokens=_ids(tokenizer.eos_token_id if stops is None else stops),
            repetition_penalty=float(declared.repetition_penalty or 1.0),
            no_repeat_ngram_size=int(declared.no_repeat_ngram_size or 0),
            bad_words=tuple(tuple(word) for word in declared.bad_words_ids or ()),
            min_new_tokens=int(declared.min_new_tokens or 0),
            suppress_tokens=_ids(declared.suppress_tokens),
            begin_suppress_tokens=_ids(declared.begin_suppress_tokens),
            stop_strings=(strings,) if isinstance(strings, str) else tuple(strings or ()),
        )

    def ending(
        self,
        stop_tokens: Sequence[int | str] | None,
        stop_strings: Sequence[str] | None,
        tokenizer: Any,
        d_vocab: int,
    ) -> DecodingSettings:
        """The settings with other ends of responses; ``None`` for those of these settings.

        Raises:
            TypeError: If stop tokens or stop strings are no sequence of such.
            ValueError: If a stop token is not in the vocabulary, or a stop string is empty.
        """
        changes: dict[str, Any] = {}
        if stop_tokens is not None:
            changes["stop_tokens"] = checked_stop_tokens(stop_tokens, tokenizer, d_vocab)
        if stop_strings is not None:
            changes["stop_strings"] = checked_stop_strings(stop_strings)
        return replace(self, **changes) if changes else self

    def describe(self) -> dict[str, Any]:
        """All settings that are not the defaults, except stop tokens, as JSON values, for result files."""
        neutral = DecodingSettings()
        names = [name for name in self.__dataclass_fields__ if name != "stop_tokens"]
        settings = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(neutral, name)}
        return {name: _lists(value) for name, value in settings.items()}

    @property
    def changes_logits(self) -> bool:
        """Whether a setting changes the logits. Stop tokens and stop strings alone do not."""
        return not self.describe().keys() <= {"stop_strings"}

    def rule(self, prefix: Prefix) -> LogitsRule:
        """Function that applies the settings to the logits after a prefix, in the order in which Hugging Face does.

        Each row is processed alone, because Hugging Face's processors would count padding as tokens of the prompt.
        """
        if not self.changes_logits:
            return lambda logits, steps: logits
        rows = zip(prefix.tokens, prefix.mask, prefix.batch.prompts, strict=True)
        # The last prompt token may be held back. It is then not part of the prefix.
        held = slice(-1, None) if prefix.logits is None else slice(0, 0)
        prompts = [torch.cat((tokens[mask.bool()], prompt.tokens[held])) for tokens, mask, prompt in rows]
        made: list[list[Any]] = []

        def changed(
            logits: Float[Tensor, "batch d_vocab"], steps: Sequence[Int[Tensor, "batch"]]
        ) -> Float[Tensor, "batch d_vocab"]:
            if not made:
                made.extend(self._processors(len(prompt), logits.device) for prompt in prompts)
            responses = torch.stack(list(steps), dim=1) if steps else torch.zeros(len(logits), 0, dtype=torch.long)
            changed_rows: list[Tensor] = []
            for row, prompt, response, processors in zip(logits.float(), prompts, responses, made, strict=True):
                ids = torch.cat((prompt, response))[None].to(logits.device)
                scores = row[None]
                for processor in processors:
                    scores = processor(ids, scores)
                changed_rows.append(scores)
            return torch.cat(changed_rows)

        return changed

    def _processors(self, prompt_length: int, device: torch.device) -> list[Any]:
        """Hugging Face's processors for a prompt of a length, in the order of its ``generate``."""
        stops = list(self.stop_tokens)
        made: list[Any] = []
        if self.repetition_penalty != 1:
            made.append(transformers.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size > 0:
            made.append(transformers.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.bad_words:
            made.append(transformers.NoBadWordsLogitsProcessor([list(word) for word in self.bad_words], stops or None))
        if self.min_new_tokens > 0 and stops:
            made.append(
                transformers.MinNewTokensLengthLogitsProcessor(
                    prompt_length, self.min_new_tokens, cast("Any", stops), device=str(device)
                )
            )
        if self.suppress_tokens:
            made.append(transformers.SuppressTokensLogitsProcessor(list(self.suppress_tokens)))
        if self.begin_suppress_tokens:
            made.append(
                transformers.SuppressTokensAtBeginLogitsProcessor(list(self.begin_suppress_tokens), prompt_length)
            )
        return made


def checked_stop_tokens(tokens: Sequence[int | str], tokenizer: Any, d_vocab: int) -> tuple[int, ...]:
    """Ids of stop tokens that are given as ids, or as the texts that the vocabulary has for them, such as ``"</s>"``.

    Raises:
        TypeError: If the argument is a text, or no sequence of ids and texts.
        ValueError: If an id or a text is not in the vocabulary.
    """
    wanted = "give a list of token ids, or of tokens such as '</s>', or [] for none"
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"stop_tokens is {tokens!r}; {wanted}")
    ids: list[int] = []
    for token in tokens:
        if isinstance(token, str):
            known: Mapping[str, int] = tokenizer.get_vocab()
            if token not in known:
                raise ValueError(f"stop_tokens has {token!r}, which is no single token of the vocabulary; {wanted}")
            token = known[token]
        number = checked_integer(token, "a stop token", "a token id, or a token such as '</s>'")
        # Tokenizers can have tokens that the model has no embedding for. Such tokens never occur.
        if not 0 <= number < max(d_vocab, len(tokenizer)):
            raise ValueError(f"stop_tokens has {number}; the vocabulary has the ids 0 to {d_vocab - 1}")
        ids.append(number)
    return tuple(ids)


def _depends_on_cache(config: Any) -> bool:
    """Whether a model responds otherwise without a cache.

    It does if its rotary tables depend on the length, or if only its cache has a window that attention ignores.
    """
    rope = cast("Mapping[str, Any]", getattr(config, "rope_parameters", None) or {})
    left_over = getattr(config, "sliding_window", None) and "sliding_window" not in type(config)().to_dict()
    return bool(left_over) or rope.get("rope_type") in ("dynamic", "longrope")


def _ids(tokens: Any) -> tuple[int, ...]:
    """Token ids from a setting that holds one id, a list of ids, or ``None``."""
    if tokens is None:
        return ()
    return tuple(int(token) for token in tokens) if isinstance(tokens, list | tuple) else (int(tokens),)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
