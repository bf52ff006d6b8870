"""Recorded passes give what the passes themselves give: here as lists of kernels, which need no GPU.

Like a CUDA graph, such a list repeats the same kernels on the same tensors and runs nothing of Python. A function that
depends on anything else therefore gives other numbers, or cannot be recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import focuslens as fl
from focuslens.hooks import RowHook
from focuslens.interventions.lanes import Lanes
from focuslens.model import lean_attention, passes
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.passes import PassRunner
from focuslens.scores.base import ResponseMasses, sink_and_documents
from tests.parity.test_lean import HEADS, INTERVENTIONS, MODELS, TOLERANCE, traced
from tests.support.tiers import first_quick


class _Kernels(TorchDispatchMode):
    """Mode that notes every kernel with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            # A GPU would have to wait, for a number or for a tensor made from numbers of Python.
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            places = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            ours = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
            if all(x.untyped_storage().data_ptr() in places for x in ours):
                continue  # views of tensors that other kernels renew
            for old, new in zip(ours, tree_leaves(func(*args, **kwargs)), strict=True):
                old.copy_(new)


class Recorder:
    """Recorder for tests. ``recorded`` and ``replays`` count its calls."""

    def __init__(self) -> None:
        self.recorded, self.replays = 0, 0

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        kernels = _Kernels()
        with kernels:
            result = compute()
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            kernels.replay()

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Recorder of every pass in this test."""
    recorder = Recorder()
    monkeypatch.setattr(PassRunner, "_recorder", lambda _: recorder)
    monkeypatch.setattr(passes, "WORTH_RECORDING", 1)
    return recorder


def unrecorded(monkeypatch: Any) -> None:
    monkeypatch.setattr(PassRunner, "_recorder", lambda _: None)


@pytest.mark.parametrize("name", first_quick(MODELS))
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_recorded_passes_give_what_passes_give(
    name: str, kind: str, load_model: Any, backend: str, samples: Any, recorder: Recorder, monkeypatch: Any
) -> None:
    model = load_model(name, backend)
    interventions = INTERVENTIONS[kind](model.shape.d_head)
    prompts = [sample.prompt() for sample in samples]
    tokens, logits, scores = traced(model, prompts, interventions, monkeypatch)
    # One recording, of which the first replay is compared, and one replay for each of the five other passes.
    assert (recorder.recorded, recorder.replays) == (1, 6)
    unrecorded(monkeypatch)
    expected = traced(model, prompts, interventions, monkeypatch)
    assert tokens == expected[0]
    torch.testing.assert_close(logits, expected[1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scores, expected[2], atol=1e-5, rtol=0)


def test_a_full_buffer_is_followed_by_another_recording(
    tiny_model: fl.FocusModel, samples: Any, recorder: Recorder, monkeypatch: Any
) -> None:
    monkeypatch.setattr(lean_attention, "_BLOCK", 4)
    prompts, edits = [sample.prompt() for sample in samples[:2]], [fl.SplitSoftmax(HEADS, 0.2)]
    tokens, logits, _ = traced(tiny_model, prompts, edits, monkeypatch, n=11)
    assert recorder.recorded == 3
    unrecorded(monkeypatch)
    expected = traced(tiny_model, prompts, edits, monkeypatch, n=11)
    assert tokens == expected[0]
    torch.testing.assert_close(logits, expected[1], atol=TOLERANCE, rtol=0)


def test_all_settings_of_a_sweep_share_one_recording(
    tiny_model: fl.FocusModel, samples: Any, recorder: Recorder, monkeypatch: Any
) -> None:
    kinds = ("none", "split-softmax", "steered response", "knockout")
    given = [INTERVENTIONS[kind](tiny_model.shape.d_head) for kind in kinds]
    prompts = [sample.prompt() for sample in samples[:2]]

    def responses() -> list[list[int]]:
        lanes = tiny_model.copies(tiny_model.prefill(prompts, hold_last=True), len(given))
        found = tiny_model.decode(lanes, [Lanes(given)], max_new_tokens=6, decoding=DecodingSettings((-1,)))
        return [one.tokens.tolist() for one in found]

    found = responses()
    assert (recorder.recorded, recorder.replays) == (1, 6)
    unrecorded(monkeypatch)
    assert found == responses()


def test_layers_around_one_with_hooks_of_others_are_recorded(
    tiny_model: fl.FocusModel, samples: Any, recorder: Recorder, monkeypatch: Any
) -> None:
    point = "blocks.1.mlp.hook_out" if tiny_model.backend.is_bridge else "blocks.1.mlp.hook_post"
    with tiny_model.hooked.hooks(fwd_hooks=[(point, lambda x, hook: 0.5 * x)]):
        found = traced(tiny_model, [samples[0].prompt()], [fl.SplitSoftmax(HEADS, 0.2)], monkeypatch)
        assert (recorder.recorded, recorder.replays) == (2, 12)
        unrecorded(monkeypatch)
        expected = traced(tiny_model, [samples[0].prompt()], [fl.SplitSoftmax(HEADS, 0.2)], monkeypatch)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=TOLERANCE, rtol=0)


def test_hooks_of_others_may_keep_what_they_get_from_recorded_passes(
    tiny_model: fl.FocusModel, samples: Any, recorder: Recorder, monkeypatch: Any
) -> None:
    point = "blocks.1.hook_in" if tiny_model.backend.is_bridge else "blocks.1.hook_resid_pre"

    def kept() -> Tensor:
        seen: list[Tensor] = []
        with tiny_model.hooked.hooks(fwd_hooks=[(point, lambda x, hook: seen.append(x))]):
            prefix = tiny_model.prefill(samples[0].prompt())
            tiny_model.decode(prefix, max_new_tokens=5, decoding=DecodingSettings((-1,)))
        return torch.cat([x for x in seen if x.shape[1] == 1])

    found = kept()
    assert recorder.recorded == 2
    assert len({tuple(row) for row in found[:, 0].tolist()}) > 1
    unrecorded(monkeypatch)
    torch.testing.assert_close(found, kept(), atol=1e-5, rtol=0)


class _Own:
    """Intervention whose function on rows depends on more than its tensor, or cannot be recorded."""

    heads, changes_prompt = (fl.Head(1, 0),), False

    def __init__(self, on_rows: Callable[[Tensor], Tensor]) -> None:
        self.on_rows = on_rows

    def describe(self) -> dict[str, Any]:
        return {"kind": "own"}

    def hooks(self, model: Any, prompt: Any = None, *, cursor: Any = None) -> list[Any]:
        self.cursor = cursor
        return [("blocks.1.attn.hook_z", RowHook(lambda z, hook: self.on_rows(z), self.on_rows))]


def test_functions_that_cannot_be_recorded_run_without_and_a_warning_says_so(
    tiny_model: fl.FocusModel, samples: Any, recorder: Recorder, monkeypatch: Any
) -> None:
    calls = [0]

    def counting(z: Tensor) -> Tensor:
        calls[0] += 1
        return z * calls[0]

    def reading(z: Tensor) -> Tensor:
        return z * (1 + float(z.abs().max() > 0))

    model = fl.FocusModel(tiny_model.hooked, tiny_model.tokenizer, compile=True)
    with pytest.warns(UserWarning, match="compile=True: passes are not recorded: the recorded pass gave other numbers"):
        model.generate(samples[0].prompt(), [_Own(counting)], max_new_tokens=3)
    with pytest.warns(UserWarning, match="not recorded: RuntimeError: operation not permitted when stream is captur"):
        found = traced(model, [samples[0].prompt()], [_Own(reading)], monkeypatch)
    unrecorded(monkeypatch)
    expected = traced(model, [samples[0].prompt()], [_Own(reading)], monkeypatch)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found[2], expected[2], atol=1e-5, rtol=0)


def test_a_function_that_depends_on_the_number_of_the_pass_is_noticed(
    tiny_model: fl.FocusModel, samples: Any, recorder: Recorder, monkeypatch: Any
) -> None:
    """Its recording gives the numbers of the pass that was recorded, but not those of the next one."""
    own = _Own(lambda z: z * (1 + own.cursor.start % 2))
    model = fl.FocusModel(tiny_model.hooked, tiny_model.tokenizer, compile=True)
    with pytest.warns(UserWarning, match="the recorded pass gave other numbers"):
        found = traced(model, [samples[0].prompt()], [own], monkeypatch)
    unrecorded(monkeypatch)
    expected = traced(model, [samples[0].prompt()], [own], monkeypatch)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=TOLERANCE, rtol=0)


def test_an_edit_after_a_reader_is_not_recorded(tiny_model: fl.FocusModel, samples: Any, recorder: Recorder) -> None:
    model = fl.FocusModel(tiny_model.hooked, tiny_model.tokenizer, compile=True)
    prefix = model.prefill(samples[0].prompt(), hold_last=True)
    masses = ResponseMasses(model.shape, prefix.batch, sink_and_documents)
    late = RowHook(lambda p, hook: p * 1.0, lambda p: p * 1.0)
    with pytest.warns(UserWarning, match="a hook that changes an activation comes after one that reads it"):
        model.decode(prefix, max_new_tokens=2, observers=[*masses.hooks(), ("blocks.0.attn.hook_pattern", late)])
    assert not recorder.recorded


def test_on_a_cpu_a_warning_says_once_that_nothing_is_compiled(tiny_model: fl.FocusModel, samples: Any) -> None:
    model = fl.FocusModel(tiny_model.hooked, tiny_model.tokenizer, compile=True)
    with pytest.warns(UserWarning, match="compile=True: passes are not recorded: the model is on cpu"):
        model.generate(samples[0].prompt(), max_new_tokens=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(samples[0].prompt(), max_new_tokens=12)
