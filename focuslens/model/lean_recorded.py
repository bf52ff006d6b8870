"""Runs of lean layers that are recorded once and then replayed, so that a row costs one call instead of hundreds.

On a GPU, the calls for one row take longer than their arithmetic. A CUDA graph contains the kernels of a run and
repeats them on the same tensors. All tensors therefore keep their shape: buffers have room for later columns, which are
hidden until they are filled, and a tensor contains the place of the new column. What a run reads from outside is copied
into its own tensors before each replay. Functions that only read activations are called after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from focuslens.model.lean_attention import EXACT, Tail
from focuslens.model.lean_layer import LeanLayer, Turn, run_layer

__all__ = ["CudaGraphs", "NotRecorded", "PassInputs", "RecordedLayer", "RecordedRun", "Recorder"]


class NotRecorded(Exception):
    """A run could not be recorded. The message is the reason."""


@runtime_checkable
class Recorder(Protocol):
    """Way to record a function without arguments."""

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record one call.

        Args:
            compute: The function. It reads and writes the same tensors in every call.

        Returns:
            Function that repeats the call on the same tensors, and the tensor that then contains the result.
        """
        ...


_capturing = threading.Lock()
"""Lock of captures. PyTorch captures one graph of a process at a time."""


@dataclass(frozen=True)
class CudaGraphs:
    """Recorder that makes a CUDA graph.

    Attributes:
        device: The GPU.
    """

    device: torch.device

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture one call. Its kernels are not run."""
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(self.device):
            torch.cuda.synchronize()
            # PyTorch's own stream for captures belongs to the first device that captured. After a failed capture,
            # PyTorch leaves the thread on the stream of the capture.
            before = torch.cuda.current_stream()
            try:
                # Other threads may use the GPU meanwhile, for example to load a model.
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                    result = compute()
            finally:
                torch.cuda.set_stream(before)
        return graph.replay, result


class PassInputs(NamedTuple):
    """What the layers of a pass share.

    Attributes:
        turns: Rotary tables, by the key of :attr:`LeanLayer.rotary`.
        hidden: Keys that rows do not attend to, ``[#row 1 1 key]``, by window; ``None`` if they attend to all.
    """

    turns: Mapping[object, Turn]
    hidden: dict[int | None, Bool[Tensor, "#row 1 1 key"] | None]


class RecordedLayer(NamedTuple):
    """A lean layer of a run, with its hooks.

    Attributes:
        layer: Weights and settings.
        tail: Keys and values.
        window: Window of the layer in this response.
        edits: Functions that change activations, by hook point.
        readers: Functions that only read the activation of a hook point, after all changes, by hook point.
    """

    layer: LeanLayer
    tail: Tail
    window: int | None
    edits: Mapping[str, Sequence[Callable[[Tensor], Tensor | None]]]
    readers: Mapping[str, Sequence[Callable[[Tensor], Tensor | None]]]


class RecordedRun:
    """Successive lean layers for one new row per prompt.

    Args:
        layers: The layers.
        rows: Number of prompts.
        recorder: Way to record a call.
    """

    def __init__(self, layers: Sequence[RecordedLayer], rows: int, recorder: Recorder) -> None:
        self._layers, self._rows, self._recorder = layers, rows, recorder
        self._replay: Callable[[], None] | None = None
        self._is_checked = False
        self._x = self._result = self._slot = torch.empty(0)
        self._turns: dict[object, Turn] = {}
        self._hidden: dict[int | None, Tensor] = {}
        self._kept: list[dict[str, Tensor]] = []

    def __call__(self, x: Float[Tensor, "row d_model"], inputs: PassInputs) -> Float[Tensor, "row d_model"]:
        """Output of the last layer, in a tensor of its own. The columns of the new rows are appended.

        Raises:
            NotRecorded: If the run cannot be recorded. Then no column has been appended.
        """
        tails = [layer.tail for layer in self._layers]
        if self._replay is None or tails[0].is_full:
            self._record(x, inputs)
        else:
            self._set(x, inputs)
            self._run_again(self._replay)
        for tail in tails:
            tail.advance()
        n_keys = tails[0].columns
        for layer, kept in zip(self._layers, self._kept, strict=True):
            for point, readers in layer.readers.items():
                value = kept[point][..., :n_keys] if point in _OVER_KEYS else kept[point]
                for read in readers:
                    read(value)
        # Hooks of others may keep what they get, and the next replay changes the result.
        return self._result.clone()

    def _run_again(self, replay: Callable[[], None]) -> None:
        """Replay the recorded pass. The first time, compare it with the pass itself."""
        if self._is_checked:
            replay()
            return
        recorded = self._kept
        expected = self._compute().clone()
        self._kept = recorded
        replay()
        self._require_same(self._result, expected)
        self._is_checked = True

    def _require_same(self, result: Float[Tensor, "row d_model"], expected: Float[Tensor, "row d_model"]) -> None:
        """Check that a recorded pass gives the numbers of the pass itself.

        Other numbers mean that a function of a hook did not read the run's own tensors alone: in the pass that is
        recorded, if it reads another tensor, and in the next one, if it depends on the number of the pass.

        Raises:
            NotRecorded: If it does not.
        """
        tolerance = 1e-4 if result.dtype in EXACT else 0.05
        if not bool((result - expected).abs().max() <= tolerance * expected.abs().max()):
            raise NotRecorded("the recorded pass gave other numbers than the pass itself")

    def _record(self, x: Float[Tensor, "row d_model"], inputs: PassInputs) -> None:
        """Make tensors for the next columns, run the layers once, and record and compare a second run."""
        slot = torch.zeros(1, dtype=torch.long, device=x.device)
        for recorded in self._layers:
            weight = recorded.layer.k.weight
            recorded.tail.reserve(self._rows, weight, len(weight) // recorded.layer.d_head, slot)
        total = self._layers[0].tail.capacity
        self._slot, self._x = slot, x.clone()
        self._turns = {key: turn.copied() for key, turn in inputs.turns.items()}
        self._hidden = {
            window: torch.empty(self._rows, 1, 1, total, dtype=torch.bool, device=x.device) for window in inputs.hidden
        }
        self._set(x, inputs)
        expected = self._compute().clone()
        try:
            replay, result = self._recorder.record(self._compute)
            replay()
        except Exception as error:
            # The end of a capture that failed raises another error, which comes from the cause.
            cause = error.__context__ or error
            raise NotRecorded(f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}") from error
        self._require_same(result, expected)
        self._replay, self._result, self._is_checked = replay, result, False

    def _set(self, x: Float[Tensor, "row d_model"], inputs: PassInputs) -> None:
        """Copy what a pass reads into the tensors of this run."""
        tail = self._layers[0].tail
        self._x.copy_(x)
        self._slot.fill_(tail.filled)
        n_keys = tail.columns + 1
        for key, turn in self._turns.items():
            turn.copy_(inputs.turns[key])
        for window, mask in self._hidden.items():
            hidden = inputs.hidden[window]
            mask[..., n_keys:] = True
            mask[..., :n_keys] = False if hidden is None else hidden

    def _compute(self) -> Float[Tensor, "row d_model"]:
        x, self._kept = self._x, []
        for layer, tail, window, edits, readers in self._layers:
            tail.hidden = self._hidden[window]
            kept: dict[str, Tensor] = {}
            self._kept.append(kept)
            keeping = {point: [*edits.get(point, ()), _keeper(kept, point)] for point in readers}
            tail.edits = {**edits, **keeping}
            x = run_layer(layer, x, 1, self._turns[layer.rotary], tail.attend, tail.edits)
        return x


_OVER_KEYS = ("hook_attn_scores", "hook_pattern")


def _keeper(kept: dict[str, Tensor], point: str) -> Callable[[Tensor], None]:
    def keep(activation: Tensor) -> None:
        kept[point] = activation

    return keep
