"""Hugging Face models that are already loaded: shared weights, an unchanged model, and nnsight's wrapper."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import focuslens as fl
from focuslens.directions.checkpoints import export
from focuslens.model.loaded import _sharing
from tests.support.architectures import ARCHITECTURES, build_architecture

PROMPT = "Question: which river runs past the old mill?\nAnswer:"


def plain_at(directory: Any, attention: str = "sdpa") -> Any:
    return cast("Any", AutoModelForCausalLM).from_pretrained(directory, attn_implementation=attention).eval()


def tokenizer_at(directory: Any) -> Any:
    return cast("Any", AutoTokenizer).from_pretrained(directory)


@torch.no_grad()
def logits_of(plain: Any, tokens: Tensor) -> Tensor:
    return plain(tokens[None]).logits[0]


def test_the_parameters_are_shared_and_the_model_stays_as_it_was(checkpoint: Any) -> None:
    plain, tokenizer = plain_at(checkpoint("llama")), tokenizer_at(checkpoint("llama"))
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    before, modules = logits_of(plain, tokens), [type(module) for module in plain.modules()]
    seen: list[int] = []
    plain.model.layers[1].register_forward_hook(lambda module, given, output: seen.append(1))
    model = fl.FocusModel.from_loaded(plain, tokenizer, stop_strings=())
    require_shared(plain, model)
    torch.testing.assert_close(model.logits(PROMPT), before, atol=1e-4, rtol=0)
    edited = model.logits(PROMPT, [fl.HeadAblation([(0, 1)])])
    assert (edited - before).abs().max() > 1e-2
    assert not seen, "a hook on the given model acts on FocusLens's passes"
    assert torch.equal(logits_of(plain, tokens), before)
    assert seen == [1]
    assert [type(module) for module in plain.modules()] == modules
    assert plain.config._attn_implementation == "sdpa"
    with torch.no_grad():
        plain.lm_head.weight.mul_(2)
    torch.testing.assert_close(model.logits(PROMPT), 2 * before, atol=1e-3, rtol=0)


def test_the_description_is_that_of_the_opened_checkpoint(checkpoint: Any) -> None:
    directory = checkpoint("qwen3")
    opened = fl.FocusModel.from_pretrained(str(directory), backend="bridge", device="cpu")
    model = fl.FocusModel.from_loaded(plain_at(directory), tokenizer_at(directory))
    assert model.description == opened.description
    assert model.encoder.chat
    assert model.decoding == opened.decoding
    base = checkpoint("llama")
    assert fl.FocusModel.from_loaded(plain_at(base), tokenizer_at(base)).decoding.stop_strings == ("\n", "Question:")
    named = fl.FocusModel.from_loaded(plain_at(base), tokenizer_at(base), name="mine", n_ctx=64, chat=False)
    assert (named.name, named.shape.n_ctx) == ("mine", 64)


def test_outputs_that_transformers_captures_are_captured_again(checkpoint: Any) -> None:
    """Transformers captures attention by hooks, and marks a model on which they are set. The copy has no hooks."""
    plain, tokenizer = plain_at(checkpoint("llama"), "eager"), tokenizer_at(checkpoint("llama"))
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = plain(tokens, output_attentions=True).attentions
    shared = _sharing(plain)
    with torch.no_grad():
        own = shared(tokens, output_attentions=True).attentions
        after = plain(tokens, output_attentions=True).attentions
    assert len(own) == len(after) == len(before) == 3
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(before, after, own, strict=True))


def test_scores_and_responses_of_another_architecture(checkpoint: Any, samples: Any, tmp_path: Any) -> None:
    (gemma,) = (one for one in ARCHITECTURES if one.name == "Gemma 3")
    directory = build_architecture(gemma, tmp_path, tokenizer_at(checkpoint("llama")))
    plain, tokenizer = plain_at(directory), tokenizer_at(directory)
    model = fl.FocusModel.from_loaded(plain, tokenizer, stop_strings=(), stop_tokens=())
    prompt = model.encode(samples[0].prompt())
    expected = plain.generate(prompt.tokens[None], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert model.generate(prompt, max_new_tokens=6).tokens.tolist() == expected[0, len(prompt.tokens) :].tolist()
    opened = fl.FocusModel.from_pretrained(str(directory), device="cpu", stop_strings=())
    scores = [fl.contextual_scores(one, samples[:1], responses=["the river"]) for one in (model, opened)]
    torch.testing.assert_close(scores[0].relevant, scores[1].relevant, atol=1e-5, rtol=0)


def test_nnsights_model_shares_its_weights_and_its_hooks_still_work(checkpoint: Any) -> None:
    nnsight: Any = pytest.importorskip("nnsight")
    plain, tokenizer = plain_at(checkpoint("llama")), tokenizer_at(checkpoint("llama"))
    wrapped: Any = nnsight.LanguageModel(plain, tokenizer=tokenizer)
    before = traced_logits(nnsight, wrapped)
    model = fl.FocusModel.from_loaded(wrapped)
    require_shared(plain, model)
    torch.testing.assert_close(model.logits(PROMPT), before, atol=1e-4, rtol=0)
    assert torch.equal(traced_logits(nnsight, wrapped), before)
    with torch.no_grad(), wrapped.trace(PROMPT):
        wrapped.model.layers[0].mlp.output[:] = 0
        edited = nnsight.save(wrapped.lm_head.output)
    assert (edited[0] - before).abs().max() > 1e-2
    torch.testing.assert_close(model.logits(PROMPT), before, atol=1e-4, rtol=0)


def require_shared(plain: Any, model: fl.FocusModel) -> None:
    """Every weight is one of the given model's. TransformerLens adds zeros as a bias of the unembedding alone."""
    given = {parameter.data_ptr() for parameter in plain.parameters()}
    used = dict(model.hooked.original_model.named_parameters())
    own = [name for name, parameter in used.items() if parameter.data_ptr() not in given]
    assert given <= {parameter.data_ptr() for parameter in used.values()}
    assert all(name.startswith("lm_head") and not used[name].any() for name in own), own


def traced_logits(nnsight: Any, wrapped: Any) -> Tensor:
    with torch.no_grad(), wrapped.trace(PROMPT):
        logits = nnsight.save(wrapped.lm_head.output)
    return logits[0]


class StandardizedTransformer:
    """A wrapper as of nnterp, which may not be installed: it passes on all attributes of the model that it holds."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self.tokenizer = model, tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_wrapper_that_passes_on_attributes_is_unwrapped(checkpoint: Any) -> None:
    plain, tokenizer = plain_at(checkpoint("llama")), tokenizer_at(checkpoint("llama"))
    model = fl.FocusModel.from_loaded(StandardizedTransformer(plain, tokenizer))
    torch.testing.assert_close(model.logits(PROMPT), logits_of(plain, model.encode(PROMPT).tokens), atol=1e-4, rtol=0)


def test_what_cannot_be_opened_is_refused(checkpoint: Any, load_model: Any, tmp_path: Any) -> None:
    tokenizer = tokenizer_at(checkpoint("llama"))
    with pytest.raises(TypeError, match=r"expected a loaded Hugging Face model .*, got Linear"):
        fl.FocusModel.from_loaded(torch.nn.Linear(1, 1), tokenizer)
    with pytest.raises(TypeError, match=r"TransformerBridge is passed to FocusModel\(...\)"):
        fl.FocusModel.from_loaded(load_model("llama", "bridge").hooked, tokenizer)
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match=r"not loaded .*meta.* dispatch"):
        fl.FocusModel.from_loaded(empty, tokenizer)
    with pytest.raises(ValueError, match=r"pass one: FocusModel.from_loaded\(model, tokenizer\)"):
        fl.FocusModel.from_loaded(plain_at(checkpoint("llama")))
    slow = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="the tokenizer is a SlowTokenizer, a slow one"):
        fl.FocusModel.from_loaded(plain_at(checkpoint("llama")), slow)
    vectors = fl.FocusDirections([(0, 1)], torch.ones(1, 16), None, "rotary")
    export(checkpoint("llama"), fl.FocusSteering(vectors, 1.0), tmp_path / "out")
    steered = cast("Any", AutoModelForCausalLM).from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match="focus directions in its code"):
        fl.FocusModel.from_loaded(steered, tokenizer)


def test_a_model_that_was_changed_is_compared_each_time(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of an earlier comparison does not count, because the weights' computation can have been replaced."""
    from focuslens.model.plain import UnfitError

    plain, tokenizer = plain_at(checkpoint("llama")), tokenizer_at(checkpoint("llama"))
    fl.FocusModel.from_loaded(plain, tokenizer)
    layer = plain.model.layers[0].self_attn
    layer.scaling = layer.scaling * 3  # a bridge reads the scale from its own configuration, or follows the model
    changed = logits_of(plain, tokenizer(PROMPT, return_tensors="pt").input_ids[0])
    try:
        model = fl.FocusModel.from_loaded(plain, tokenizer)
    except UnfitError:
        return
    torch.testing.assert_close(model.logits(PROMPT), changed, atol=1e-4, rtol=0)
