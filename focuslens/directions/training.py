"""Training of focus directions (section 3.1 of the paper) on response rows, for all heads at once.

For each head, ``d_Q`` minimises ``-S_C`` on activations of the unmodified model. At the projection site, ``d_K`` is
trained as well. Each training prompt is followed by the response that the model generates for the sample's gold prompt,
which contains only the gold document. The loss of a head depends only on the vectors of this head, and AdamW updates
every parameter independently. Therefore, training all heads together is equivalent to training each head alone. The
only exception is ``d_K`` at the projection site: query heads that share a key-value head also share ``d_K``.

At the rotary site, ``d_K`` is not trained. Its contribution to the logits, ``(q_i + d_Q) . d_K``, is the same for every
key. Softmax ignores such a constant, and the gradient of ``d_K`` is zero.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.directions.activations import ActivationStore, LayerHeads, RowActivations, sample_rows
from focuslens.directions.answer_objective import AnsweredPrompts, answer_loss
from focuslens.directions.gold_responses import gold_responses, response_limits
from focuslens.directions.objective import Attention, direction_losses, record_attention, require_same_attention
from focuslens.directions.sites import trainable_heads
from focuslens.directions.training_state import StateFile, TrainedVectors, TrainingState, initial_vectors
from focuslens.heads import Head
from focuslens.interventions.directions import FocusDirections, Site
from focuslens.model.batching import BATCH_TOKENS, RunOptions
from focuslens.model.execution import Executor, executor_for
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.answers import list_samples
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.sample import Case, MultiDocSample, prompts_digest
from focuslens.util.checks import checked_integer
from focuslens.util.estimates import Estimate
from focuslens.util.files import versions
from focuslens.util.progress import progress_bar
from focuslens.util.refused_runs import without_defaults

__all__ = ["TrainingConfig", "train_focus_directions"]


@dataclass(frozen=True)
class TrainingConfig:
    """Settings for training focus directions. The defaults follow the paper and the code of its authors.

    Attributes:
        site: Site at which the vectors are added: ``rotary`` or ``projection`` (see :class:`FocusSteering`).
        prompts: Case of the prompts in the training sequences: ``long`` as in the authors' code, or ``gold`` as in the
            paper's text. The response in a training sequence is always the response to the gold prompt.
        epochs: Number of passes over the samples, each in a new random order.
        batch_size: Number of samples per optimizer step. The loss is averaged over these samples. The authors' code
            uses a batch size of 1.
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW. The authors' code keeps PyTorch's default of 0.01.
        init_std: Standard deviation of the normal distribution from which the initial vectors are drawn.
        max_new_tokens: Maximum length of the response to the gold prompt, in tokens.
        seed: Seed of the initial vectors and of the sample order.
        rank: Rank of ``U V^T`` in ``d_Q(q) = d_Q + U V^T q``, where ``q`` is the query to which ``d_Q(q)`` is added.
            With 0, as in the paper, every query gets the same vector. ``U`` and ``V`` are updated like ``d_Q``: they
            are not normalised, and the weight decay acts on each of them.
        objective: Loss of the training: ``score``, the paper's ``-S_C``, or ``answer``, the mean negative
            log-likelihood of the response's tokens while all heads are steered together, which takes gradients through
            the whole model. One sample is run at a time.
    """

    site: Site = "rotary"
    prompts: Literal["long", "gold"] = "long"
    epochs: int = 10
    batch_size: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    init_std: float = 0.01
    max_new_tokens: int = 100
    seed: int = 0
    rank: int = 0
    objective: Literal["score", "answer"] = "score"

    def __post_init__(self) -> None:
        if self.site not in get_args(Site):
            raise ValueError(f"site is {self.site!r}; it must be one of {', '.join(get_args(Site))}")
        if self.prompts not in ("long", "gold"):
            raise ValueError(f"prompts is {self.prompts!r}; it must be 'long' or 'gold'")
        if self.objective not in ("score", "answer"):
            raise ValueError(f"objective is {self.objective!r}; it must be 'score' or 'answer'")
        if checked_integer(self.rank, "rank") < 0:
            raise ValueError(f"rank is {self.rank}; it must not be negative")
        for name in ("epochs", "batch_size", "learning_rate", "max_new_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")
        for name in ("weight_decay", "init_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@torch.inference_mode(False)  # TransformerLens's notebooks disable gradients globally
@torch.enable_grad()
def train_focus_directions(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    heads: Iterable[tuple[int, int]] | None = None,
    *,
    config: TrainingConfig | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    memory_gb: float = 4.0,
    batch_tokens: int = BATCH_TOKENS,
    data: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> FocusDirections:
    """Train one focus direction per head, for all heads together, on a frozen model (equation 4, loss ``-S_C``).

    The ``losses`` attribute of the result contains the mean loss of each head in each epoch. With
    ``objective="answer"``, all heads share one loss. Its mean in each epoch is in ``provenance["answer_losses"]``.

    Args:
        model: The model, whose weights stay unchanged, or an executor such as :class:`RayPool` that runs the forward
            passes in other processes. The optimizer steps are small and always run in this process.
        samples: Training samples. Samples without a gold document or with an empty response are left out.
        heads: Heads to train; by default all heads of the model.
        config: Training settings. Alternatively, settings can be passed by name, such as ``site="projection"``.
        checkpoint: Path of a checkpoint file. If the file exists, training resumes from it, with the same result. The
            responses that the model generates before training are written beside it, in a file that ends in
            ``.responses.jsonl``.
        checkpoint_every: Maximum number of steps between checkpoints. A checkpoint is also written after each epoch,
            and once a minute.
        memory_gb: Maximum size of the activations that are stored between epochs, in units of ``2**30`` bytes. All
            other activations are recomputed in each epoch.
        batch_tokens: Maximum number of prompt tokens per batch when responses are generated.
        data: Description of the data for ``provenance``; by default the ``description`` attribute of ``samples``.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.
        **settings: Fields of :class:`TrainingConfig`.

    Raises:
        ValueError: If no sample has both a gold document and a response, if a prompt leaves no room for a response, if
            the model's attention is not supported, if ``checkpoint`` belongs to a different training run, if the rank
            exceeds ``d_head``, or if ``objective`` is ``answer`` and the model runs in other processes.
        TypeError: If both ``config`` and settings by name are passed, or if a setting is unknown.
    """
    if config is not None and settings:
        raise TypeError(f"give either config or single settings, not both: {', '.join(settings)}")
    config = config or TrainingConfig(**settings)
    data = getattr(samples, "description", None) if data is None else data
    executor = executor_for(model)
    options = RunOptions(config.max_new_tokens, batch_tokens, progress)
    sample_list = list_samples(samples)
    if config.objective == "answer":
        _require_model(executor)
    limited = response_limits(executor, sample_list, config.prompts, options)
    chosen = trainable_heads(executor, heads, config.site)
    usable, responses = gold_responses(executor, limited, config.prompts, options, checkpoint)
    if not usable:
        n = len(sample_list)
        raise ValueError(f"none of the {n} samples has a gold document and a response to its gold prompt")
    groups = LayerHeads.group(chosen, executor.shape)
    state = _start(executor, chosen, groups, config)
    provenance = _provenance(executor, usable, config, data)
    made_of = [without_defaults(provenance), chosen, [response.tolist() for response in responses]]
    fingerprint = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    state_file = None if checkpoint is None else StateFile(Path(checkpoint), fingerprint, checkpoint_every)
    if state_file is not None and state_file.path.exists():
        state_file.load(state)
    answered = (usable, responses)
    inputs, loss = (
        _answer_objective(executor, groups, answered, config)
        if config.objective == "answer"
        else _score_objective(executor, groups, answered, config, int(memory_gb * 2**30))
    )
    _run_epochs(loss, state, inputs, config, state_file, progress)
    name, losses = ("answer_losses", torch.cat) if config.objective == "answer" else ("losses", torch.stack)
    provenance[name] = losses(state.losses).tolist()
    query, key, product = state.vectors.query, state.vectors.key_by_head(groups), state.vectors.product
    u, v = (None, None) if product is None else (product.u, product.v)
    return FocusDirections(chosen, query, key, config.site, provenance, u, v)


_Loss: TypeAlias = Callable[[TrainedVectors, Any], Float[Tensor, "loss"]]
"""Function from the trained vectors and the inputs of one sample to losses, which are minimised together."""

_Answered: TypeAlias = tuple[Sequence[MultiDocSample], Sequence[Tensor]]
"""Samples, and the tokens of the response to the gold prompt of each."""


def _score_objective(
    executor: Executor, groups: Sequence[LayerHeads], answered: _Answered, config: TrainingConfig, memory: int
) -> tuple[ActivationStore, _Loss]:
    """Activations of the samples, and the loss ``-S_C`` of each head."""
    samples, responses = answered
    activations = ActivationStore(executor, samples, responses, groups, config.prompts, config.site, memory)
    check = partial(_checked_rows, groups=groups, case=config.prompts, site=config.site)
    activations.keep(0, next(executor.map(check, [(samples[0], responses[0])])))
    attention = _attention(executor, groups, samples, responses, config)

    def loss(vectors: TrainedVectors, rows: RowActivations) -> Tensor:
        return direction_losses(attention, vectors.query, vectors.key, groups, rows, config.site, vectors.product)

    return activations, loss


def _answer_objective(
    executor: Executor, groups: Sequence[LayerHeads], answered: _Answered, config: TrainingConfig
) -> tuple[AnsweredPrompts, _Loss]:
    """Prompts and responses of the samples, and the negative log-likelihood of the responses."""
    model = _require_model(executor)

    def loss(vectors: TrainedVectors, sample: tuple[EncodedPrompt, Tensor]) -> Tensor:
        return answer_loss(model, vectors, groups, *sample, config.site)

    return AnsweredPrompts(model, *answered, config.prompts), loss


def _require_model(executor: Executor) -> FocusModel:
    """The model of an executor that runs in this process.

    Raises:
        ValueError: If the executor runs in other processes, through which gradients cannot go.
    """
    if not isinstance(executor, FocusModel):
        raise ValueError(
            f"objective='answer' takes gradients through the model, which a {type(executor).__name__} runs in other "
            "processes; pass a FocusModel, or train with objective='score'"
        )
    return executor


def _checked_rows(
    model: FocusModel,
    sample: MultiDocSample,
    response: Tensor,
    groups: Sequence[LayerHeads],
    case: Case,
    site: Site,
) -> RowActivations:
    """Record the activations of a sample, and check that the model's attention has the form that training assumes."""
    rows = sample_rows(model, sample, response, groups, case, site)
    require_same_attention(model, model.encode(sample.prompt(case)), response, groups, rows, site)
    return rows


def _attention(
    executor: Executor,
    groups: Sequence[LayerHeads],
    samples: Sequence[MultiDocSample],
    responses: Sequence[Tensor],
    config: TrainingConfig,
) -> Attention:
    """Attention properties of the model, for the optimizer steps in this process."""
    if isinstance(executor, FocusModel):
        return executor.backend
    prompts = [executor.encode(sample.prompt(config.prompts)) for sample in samples]
    lengths = [len(prompt.tokens) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    layers = [group.layer for group in groups]
    return next(executor.map(record_attention, [(layers, [min(lengths), max(lengths)], config.site)]))


def _run_epochs(
    loss: _Loss,
    state: TrainingState,
    data: ActivationStore | AnsweredPrompts,
    config: TrainingConfig,
    state_file: StateFile | None,
    progress: bool | None,
) -> None:
    """Run the remaining optimizer steps, starting from ``state.step``."""
    samples, size = len(data), config.batch_size
    batches = math.ceil(samples / size)
    total = config.epochs * batches
    bar = progress_bar("focus directions", total, unit="step", done=state.step, show=progress)
    with bar, Estimate(total - state.step, unit="step") as estimate:
        while state.step < total:
            epoch, first = divmod(state.step, batches)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order = torch.randperm(samples, generator=generator).tolist()[first * size :]
            inputs = data.follow(order)
            for start in range(0, len(order), size):
                n = min(size, len(order) - start)
                losses = _step(loss, state, islice(inputs, n), n)
                state.running = losses if state.running is None else state.running + losses
                state.step += 1
                if state.step % batches == 0:
                    state.losses.append(state.running / samples)
                    state.running = None
                if state_file is not None and state_file.is_due(state):
                    state_file.save(state)
                estimate.finish(1)
                bar.update()


def _start(
    executor: Executor, heads: Sequence[Head], groups: Sequence[LayerHeads], config: TrainingConfig
) -> TrainingState:
    vectors = initial_vectors(
        heads,
        groups,
        executor.shape.d_head,
        executor.device,
        std=config.init_std,
        seed=config.seed,
        rank=config.rank,
        keys=config.site == "projection",
    )
    optimizer = torch.optim.AdamW(vectors.tensors, lr=config.learning_rate, weight_decay=config.weight_decay)
    return TrainingState(vectors, optimizer)


def _step(loss: _Loss, state: TrainingState, batch: Iterable[Any], size: int) -> Float[Tensor, "loss"]:
    """Run one AdamW step on the mean loss of a batch of ``size`` samples.

    Returns:
        Losses before the step, summed over the samples.
    """
    tensors, total = state.vectors.tensors, torch.zeros(())
    gradients = [torch.zeros_like(tensor) for tensor in tensors]
    for sample in batch:
        losses = loss(state.vectors, sample)
        # autograd.grad computes only the gradients of the directions. The model's parameters get no gradients.
        for sum_, gradient in zip(gradients, torch.autograd.grad(losses.sum(), tensors), strict=True):
            sum_ += gradient
        total = total + losses.detach().cpu()
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient / size
    state.optimizer.step()
    return total


def _provenance(
    executor: Executor, samples: Sequence[MultiDocSample], config: TrainingConfig, data: Mapping[str, Any] | None
) -> dict[str, Any]:
    shape = {name: getattr(executor.shape, name) for name in ("n_layers", "n_heads", "n_key_value_heads", "d_head")}
    return {
        "model": executor.description,
        "shape": shape,
        "data": {**(data or {}), "samples": len(samples), "prompts_sha256": prompts_digest(samples, config.prompts)},
        "settings": asdict(config),
        "versions": versions(),
    }
