"""Opening of checkpoints: the first kind of TransformerLens model that computes what transformers computes."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from focuslens.model.backends import Backend, backend_for
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.loading import Checkpoint, as_hooked, boot
from focuslens.model.plain import MEASURED_TOKENS, Reference, UnfitError
from focuslens.model.runner import ModelRunner
from focuslens.model.stand_in import stand_in
from focuslens.model.verification import Verified, reads_own_cache, require_same_logits
from focuslens.prompts.batch import EncodedPrompt, PromptInput
from focuslens.util.memory import is_out_of_memory, release_memory

__all__ = ["open_backend"]

_LOG = logging.getLogger(__name__)


class _TokenRunner(ModelRunner):
    """Runner for prompts that are tokens already."""

    def encode(self, prompt: PromptInput) -> EncodedPrompt:
        if not isinstance(prompt, EncodedPrompt):
            raise TypeError(f"the prompt is a {type(prompt).__name__}; this runner accepts an EncodedPrompt only")
        return prompt


def open_backend(checkpoint: Checkpoint, tokenizer: Any, backend: str | None, n_ctx: int | None) -> Backend:
    """Open a checkpoint, and compare it with the plain Hugging Face model.

    The comparison runs once per configuration, dtype, kind of device and set of versions; see
    :class:`focuslens.model.verification.Verified`.

    Raises:
        UnfitError: If no kind of TransformerLens model computes what transformers computes.
        ValueError: If the weights are not exactly those of the architecture, or ``n_ctx`` is out of range.
    """
    require_context(checkpoint.config, n_ctx)
    refusals: list[UnfitError] = []
    for kind in checkpoint.backends(backend):
        try:
            return _open(checkpoint, tokenizer, kind, n_ctx)
        except UnfitError as error:
            _LOG.info("not as %s: %s", kind, error)
            # The traceback holds the model that was refused, whose memory the next kind needs.
            error.__cause__ = error.__context__ = None
            refusals.append(error.with_traceback(None))
        release_memory()
    raise refusals[-1]


def _open(checkpoint: Checkpoint, tokenizer: Any, kind: str, n_ctx: int | None) -> Backend:
    device = "mapped" if checkpoint.device is None else torch.device(checkpoint.device).type
    verified = Verified(checkpoint.config, kind, checkpoint.dtype, device)
    reads_cache = None if checkpoint.has_own_code else verified.reads_cache()
    loaded = checkpoint.load(kind, tokenizer, n_ctx=n_ctx, measure=reads_cache is None)
    if n_ctx is not None:
        # The Hugging Face configuration stays as it is, because rotary tables can depend on its context length.
        loaded.hooked.cfg.n_ctx = n_ctx
    elif (declared := _undeclared_to_bridges(checkpoint.config)) is not None:
        loaded.hooked.cfg.n_ctx = declared
    backend = backend_for(loaded.hooked, checkpoint.config)
    if loaded.reference is not None:
        runner = _TokenRunner(backend, tokenizer, DecodingSettings())
        require_same_logits(runner, loaded.reference, checkpoint.name)
        complete = _require_same_stand_in(checkpoint, tokenizer, kind)
        reads_cache = reads_own_cache(runner, loaded.reference)
        if complete and not checkpoint.has_own_code and (n_ctx is None or n_ctx >= MEASURED_TOKENS):
            verified.remember(reads_cache)
    if not reads_cache:
        warnings.warn(
            f"TransformerLens's own generate of {checkpoint.name!r} does not read its key-value cache, so its "
            "responses are wrong; FocusLens's generate, scores and sweeps read the cache. For model.hooked.generate, "
            "pass use_past_kv_cache=False",
            stacklevel=4,
        )
    return backend


def _require_same_stand_in(checkpoint: Checkpoint, tokenizer: Any, kind: str) -> bool:
    """Compare a tiny stand-in, whose windows and rotary tables end within a few tokens.

    Returns ``False`` if no stand-in could be made and run. The weights alone have then been compared.
    """
    try:
        plain = stand_in(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
        reference = None if plain is None else Reference.of(plain)
        if plain is None or reference is None:
            raise ValueError("no sizes fit its architecture")
        settings: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        if kind == "hooked":
            hooked = as_hooked(plain, tokenizer, **settings)
        else:
            hooked = boot(checkpoint.name, tokenizer, hf_model=plain, **settings)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _LOG.warning("%s: no tiny stand-in (%s), so windows and long tables were not compared", checkpoint.name, reason)
        return False
    # Some of the sequences are longer than the context that the length-dependent tables of a stand-in start from.
    hooked.cfg.n_ctx = max(map(len, reference.sequences))
    runner = _TokenRunner(backend_for(hooked, plain.config), tokenizer, DecodingSettings())
    require_same_logits(runner, reference, checkpoint.name)
    return True


def _undeclared_to_bridges(config: Any) -> int | None:
    """Context length under a name that TransformerLens does not read, such as MPT's; ``None`` if there is none."""
    if any(getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")):
        return None
    names = ("max_seq_len", "seq_length")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def require_context(config: Any, n_ctx: int | None) -> None:
    """Check a context length against the configuration. Only rotary tables can be computed for further positions.

    Raises:
        ValueError: If ``n_ctx`` is not positive, or exceeds the positions of an architecture that cannot have more.
    """
    if n_ctx is None:
        return
    if n_ctx < 1:
        raise ValueError(f"n_ctx is {n_ctx}; it must be at least 1")
    names = ("n_positions", "max_position_embeddings", "max_seq_len", "seq_length")
    declared = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    rotary = getattr(config, "rope_parameters", None)
    if declared is not None and n_ctx > declared and not rotary:
        raise ValueError(
            f"n_ctx is {n_ctx}, but the configuration of {config.model_type} declares positions for {declared} tokens, "
            "and a larger n_ctx needs rotary embeddings"
        )
