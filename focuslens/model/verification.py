"""Comparison of a TransformerLens model with the plain Hugging Face model of the same checkpoint.

Some architectures that TransformerLens opens are computed in another way than by transformers: another rotation, a
cache that is not read, a window that is left out. The numbers look plausible. A model is therefore compared before it
is used: whole passes, rows over a cache, padded batches, and TransformerLens's own call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from focuslens.model.hook_points import kind_of
from focuslens.model.plain import Reference, UnfitError
from focuslens.model.runner import ModelRunner
from focuslens.prompts.batch import EncodedPrompt
from focuslens.util.cache import cache_folder
from focuslens.util.files import versions, write_json
from focuslens.util.memory import is_out_of_memory

__all__ = ["Verified", "reads_own_cache", "require_same_logits"]

_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Largest difference of a row that counts as rounding: root mean square over the vocabulary, in units of the standard
deviation of the logits. The largest difference measured in float32 was 1e-4 (``HookedTransformer``)."""

_FEW_ROWS = 4
_TOLERANCE_OF_ROWS = 0.6
"""Largest difference of any row of a comparison with few rows, in float16 and bfloat16, where rounding can send a token
to another expert. Rows of another model differ by 0.9 or more."""

_Comparison = tuple[str, Tensor, Tensor]
"""What was computed, its logits, and the logits of the plain model."""


@torch.no_grad()
def require_same_logits(runner: ModelRunner, reference: Reference, name: str) -> None:
    """Check that a model has the logits of the plain Hugging Face model.

    In types with fewer digits than float32, single rows may differ, because rounding can send a token to another
    expert. There, the median row counts if there are several rows.

    Raises:
        UnfitError: If the logits differ by more than rounding, or the model cannot be run.
    """
    dtype, kind = runner.hooked.cfg.dtype, kind_of(runner.hooked)
    try:
        comparisons = list(_comparisons(runner, reference))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UnfitError(
            f"{kind} cannot run {name!r} ({type(error).__name__}: {reason}); its architecture is not supported"
        ) from error
    for computed, ours, right in comparisons:
        rows = _differences(ours, right)
        exact, few = dtype in (torch.float32, torch.float64), len(rows) < _FEW_ROWS
        difference = float(rows.max() if exact or few else rows.median())
        tolerance = _TOLERANCES.get(dtype, 0.2) if exact or not few else _TOLERANCE_OF_ROWS
        if not difference <= tolerance:
            raise UnfitError(
                f"{kind} does not compute {name!r} as transformers does: the logits of {computed} differ by "
                f"{difference:.2g} standard deviations, but rounding explains only {tolerance:.2g}. These "
                "numbers would be those of another model, so the checkpoint is refused"
            )


def _differences(ours: Float[Tensor, "row d_vocab"], right: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row"]:
    """Difference of each row, in units of the standard deviation of the logits. Rows that overflow alike are equal."""
    ours = ours.float().cpu()
    same = torch.isclose(ours, right, rtol=0, atol=0, equal_nan=True)
    difference = torch.where(same, 0.0, ours - right)
    finite = right[right.isfinite()]
    scale = float(finite.std()) if finite.numel() > 1 else 1.0
    return difference.pow(2).mean(dim=-1).sqrt() / max(scale, 1e-6)


def _comparisons(runner: ModelRunner, reference: Reference) -> Generator[_Comparison]:
    """Yield logits of the model and of the plain model: whole passes, rows over a cache, and a padded batch."""
    lengths = [len(logits) for logits in reference.prompt_logits]
    prompts = [EncodedPrompt(tokens[:length], {}) for tokens, length in zip(reference.sequences, lengths, strict=True)]
    for prompt, right in zip(prompts, reference.prompt_logits, strict=True):
        n = len(prompt.tokens)
        mask = torch.ones(1, n, dtype=torch.long)
        yield f"a pass of {n} tokens", runner.run(prompt.tokens[None], mask, None, last_only=False)[0], right
    yield from _direct(runner, prompts[0], reference.prompt_logits[0])
    for kind, batch in (("one prompt", prompts[:1]), ("one prompt", prompts[1:]), ("a padded batch", prompts)):
        yield from _steps(runner, reference, kind, [prompts.index(prompt) for prompt in batch])


def _direct(runner: ModelRunner, prompt: EncodedPrompt, right: Tensor) -> Generator[_Comparison]:
    """Yield the logits of TransformerLens's own call, and the logits under hooks that return what they are given."""
    tokens = prompt.tokens[None].to(runner.device)
    yield (
        f"TransformerLens's own pass of {len(tokens[0])} tokens",
        runner.hooked(tokens, return_type="logits")[0],
        right,
    )
    # TransformerLens can compute attention in another way as soon as a hook returns a tensor.
    names = [name for name in runner.hooked.hook_dict if name.rsplit(".", 1)[-1] in _EDITED and ".attn." in name]
    with runner.hooked.hooks(fwd_hooks=[(name, _copy) for name in names]):
        mask = torch.ones(1, len(tokens[0]), dtype=torch.long)
        ours = runner.run(tokens.cpu(), mask, None, last_only=False)[0]
    yield f"a pass of {len(tokens[0])} tokens under hooks that change nothing", ours, right


_EDITED = ("hook_q", "hook_k", "hook_rot_q", "hook_attn_scores", "hook_pattern", "hook_z")
"""Hook points on which FocusLens's interventions return tensors."""


def _copy(tensor: Tensor, hook: Any) -> Tensor:
    return tensor.clone()


def _steps(runner: ModelRunner, reference: Reference, kind: str, rows: list[int]) -> Generator[_Comparison]:
    """Yield the logits of the last row of each prompt, and of further rows over a cache."""
    sequences = [reference.sequences[row] for row in rows]
    lengths = [len(reference.prompt_logits[row]) for row in rows]
    prompts = [EncodedPrompt(tokens[:n], {}) for tokens, n in zip(sequences, lengths, strict=True)]
    prefix = runner.prefill(prompts, hold_last=True)
    for step in range(len(reference.step_logits[0])):
        right = torch.stack([reference.step_logits[row][step] for row in rows])
        if step == 0:
            prefix = runner.completed(prefix)
            ours = prefix.logits
            assert ours is not None
        else:
            tokens = torch.stack([ids[n + step - 1] for ids, n in zip(sequences, lengths, strict=True)])
            logits, prefix = runner.extend(prefix, tokens[:, None])
            ours = logits[:, -1]
        yield f"{kind}, {step} tokens over a cache" if step else f"{kind} over a cache", ours, right


@torch.no_grad()
def reads_own_cache(runner: ModelRunner, reference: Reference) -> bool:
    """Whether TransformerLens's own call of a bridge reads a key-value cache, which its ``generate`` relies on."""
    if not runner.backend.is_bridge or len(reference.step_logits[0]) < 2:
        return True
    length, cache = len(reference.prompt_logits[0]), DynamicCache()
    tokens = reference.sequences[0][None].to(runner.device)
    for new in (tokens[:, :length], tokens[:, length : length + 1]):
        logits = runner.hooked(new, return_type="logits", past_key_values=cache, use_cache=True)
    difference = float(_differences(logits[0, -1:], reference.step_logits[0][1:2]).max())
    return difference <= _TOLERANCES.get(runner.hooked.cfg.dtype, 0.2)


@dataclass(frozen=True)
class Verified:
    """Record that a configuration was compared before, with these versions, so that it is not compared again.

    Attributes:
        config: The configuration of the checkpoint.
        backend: Kind of TransformerLens model.
        dtype: Type of the weights.
        device: Type of the device.
    """

    config: Any
    backend: str
    dtype: torch.dtype
    device: str

    @property
    def _path(self) -> Any:
        config = {key: value for key, value in self.config.to_dict().items() if key not in _NAMES_ONLY}
        subject = {"config": config, "backend": self.backend, "dtype": str(self.dtype), "device": self.device}
        content = json.dumps({**subject, "versions": versions()}, sort_keys=True, default=str)
        return cache_folder() / "verified" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"

    def reads_cache(self) -> bool | None:
        """Result of :func:`reads_own_cache` in the record; ``None`` if there is no record that can be read."""
        try:
            return bool(json.loads(self._path.read_text(encoding="utf-8"))["reads_cache"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remember(self, reads_cache: bool) -> None:
        """Write the record. If the cache folder cannot be written, the next load compares again."""
        architecture = (self.config.architectures or [self.config.model_type])[0]
        record = {"architecture": architecture, "backend": self.backend, "reads_cache": reads_cache}
        with suppress(OSError):
            write_json(self._path, {**record, "versions": versions()})


_NAMES_ONLY = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Entries of a configuration that do not change what the model computes."""
