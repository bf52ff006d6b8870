"""Tokens of the forward pass that is running, so that hooks can tell their own prompt from another one.

A hook receives activations, which do not tell the tokens. The embedding does. A PyTorch hook on the embedding therefore
notes the tokens of each pass, and another one on the unembedding forgets them. Neither is a TransformerLens hook:
``hook_dict`` and ``reset_hooks`` do not know them, and the hooks of an intervention stay the edits alone.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from focuslens.prompts.batch import PromptBatch

__all__ = ["RunningTokens"]


class RunningTokens:
    """Tokens of the forward pass that is running. They are unknown in a pass that does not begin with the embedding."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None
        self._agreed: list[PromptBatch] = []

    @classmethod
    def of(cls, hooked: Any) -> RunningTokens:
        """The record of a TransformerLens model, which all FocusModels of this model share."""
        embed = getattr(hooked, "embed", None)
        # Found on the model, not in a table of models, so that a deep copy of the model keeps a record of its own.
        hooks = () if embed is None else embed._forward_pre_hooks.values()
        records = [getattr(hook, "__self__", None) for hook in hooks]
        known = next((record for record in records if isinstance(record, cls)), None)
        return cls()._set_on(embed, getattr(hooked, "unembed", None)) if known is None else known

    def _set_on(self, embed: Any, unembed: Any) -> RunningTokens:
        if embed is not None:
            embed.register_forward_pre_hook(self._note, with_kwargs=True)
        if unembed is not None:
            unembed.register_forward_hook(self._end)
        return self

    def _note(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.forget()
        tokens = next((value for value in (*arguments, *named.values()) if isinstance(value, Tensor)), None)
        if tokens is not None and tokens.ndim in (1, 2) and not tokens.is_floating_point():
            self._tokens = tokens.reshape(-1, tokens.shape[-1])

    def _end(self, module: Any, arguments: Any, result: Any) -> None:
        self.forget()

    def forget(self) -> None:
        """Treat the tokens as unknown until the embedding runs again."""
        self._tokens, self._agreed = None, []

    def require(self, batch: PromptBatch, start: int, n_rows: int | None) -> None:
        """Check that the pass runs the prompts of ``batch``, as far as it runs columns of the prompts.

        Args:
            batch: The prompts that hooks were made for.
            start: Column of the first row in the pass.
            n_rows: Number of rows in the pass; ``None`` if it is known that the pass began with the embedding.

        Raises:
            ValueError: If a token differs. The tokens are compared once per pass and batch.
        """
        if self._tokens is None or start >= batch.width or any(batch is agreed for agreed in self._agreed):
            return
        tokens = self._tokens[batch.rows]
        if n_rows not in (None, tokens.shape[1]) or len(tokens) != len(batch):
            return  # tokens of an earlier pass
        if (difference := _difference(batch, start, tokens)) is not None:
            self.forget()
            if _skips_embedding():
                return
            raise ValueError(_another_prompt(batch, *difference))
        self._agreed.append(batch)


def _skips_embedding() -> bool:
    """Whether the pass that is running began behind the embedding, so that the known tokens are of an earlier pass.

    TransformerLens's models take the argument ``start_at_layer`` for this. It is looked up only before an error.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and "start_at_layer" in frame.f_locals:
            return bool(frame.f_locals["start_at_layer"])  # 0 in a pass from the embedding on
        frame = frame.f_back
    return False


def _difference(batch: PromptBatch, start: int, tokens: Tensor) -> tuple[int, int, int] | None:
    """Row, column and token of the first place where ``tokens``, from column ``start`` on, are not the prompts'."""
    columns, ran = slice(start, start + tokens.shape[1]), tokens[:, : batch.width - start].cpu()
    different = (batch.mask()[:, columns] == 1) & (batch.tokens(0)[:, columns] != ran)
    if not different.any():
        return None
    row, column = different.nonzero()[0].tolist()
    return row, start + column, int(ran[row, column])


def _another_prompt(batch: PromptBatch, row: int, column: int, ran: int) -> str:
    """Error message for a pass whose token in a column of the batch is not the prompt's."""
    position = column - batch.padding[row]
    token, which = int(batch.prompts[row].tokens[position]), "" if len(batch) == 1 else f" {row} (counted from 0)"
    return (
        f"these hooks are for another prompt: token {position} of their prompt{which} is {token}, and the pass runs "
        f"{ran} there; make hooks for the prompt that is run, intervention.hooks(model, prompt), and run its tokens, "
        "model.to_tokens(prompt), alone or followed by a response"
    )
