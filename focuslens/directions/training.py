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
import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.directions.activations import ActivationStore, LayerHeads, RowActivations, sample_rows
from focuslens.directions.gold_responses import gold_responses, response_limits
from focuslens.directions.objective import Attention, direction_losses, record_attention, require_same_attention
from focuslens.directions.sites import trainable_heads
from focuslens.heads import Head
from focuslens.interventions.directions import FocusDirections, Site
from focuslens.model.batching import BATCH_TOKENS, RunOptions
from focuslens.model.execution import Executor, executor_for
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.answers import list_samples
from focuslens.prompts.sample import Case, MultiDocSample, prompts_digest
from focuslens.util.files import versions, write_atomically
from focuslens.util.progress import progress_bar
from focuslens.util.refused_runs import without_defaults

__all__ = ["TrainingConfig", "train_focus_directions"]

_CHECKPOINT_SECONDS = 60.0
"""Longest time between two checkpoints, unless a single step takes longer."""


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

    def __post_init__(self) -> None:
        if self.site not in get_args(Site):
            raise ValueError(f"site is {self.site!r}; it must be one of {', '.join(get_args(Site))}")
        if self.prompts not in ("long", "gold"):
            raise ValueError(f"prompts is {self.prompts!r}; it must be 'long' or 'gold'")
        for name in ("epochs", "batch_size", "learning_rate", "max_new_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")
        for name in ("weight_decay", "init_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(eq=False)
class _State:
    """Mutable state of a training run."""

    query: Float[Tensor, "n d_head"]
    key: Float[Tensor, "m d_head"] | None
    optimizer: torch.optim.Optimizer
    step: int = 0
    losses: list[Float[Tensor, "n"]] = field(default_factory=list[Tensor])
    running: Float[Tensor, "n"] | None = None

    @property
    def vectors(self) -> list[Tensor]:
        return [self.query] if self.key is None else [self.query, self.key]


@dataclass
class _Checkpoint:
    """File from which an interrupted training run resumes. The fingerprint identifies the run that wrote the file."""

    path: Path
    fingerprint: str
    every: int
    saved: float = field(default_factory=time.monotonic)

    def is_due(self, state: _State) -> bool:
        """Whether to save: after ``every`` steps, at the end of an epoch, and a minute after the last time."""
        late = time.monotonic() - self.saved >= _CHECKPOINT_SECONDS
        return late or state.step % self.every == 0 or state.running is None

    def save(self, state: _State) -> None:
        content = io.BytesIO()
        torch.save(
            {
                "fingerprint": self.fingerprint,
                "vectors": [v.detach().cpu() for v in state.vectors],
                "step": state.step,
                "optimizer": state.optimizer.state_dict(),
                "losses": state.losses,
                "running": state.running,
            },
            content,
        )
        write_atomically(self.path, content.getvalue())
        self.saved = time.monotonic()

    def load(self, state: _State) -> None:
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        if saved["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.path} is a checkpoint of another training (other model, samples, gold responses, heads or "
                "settings); name another file, or delete it"
            )
        with torch.no_grad():
            for vector, value in zip(state.vectors, saved["vectors"], strict=True):
                vector.copy_(value)
        state.optimizer.load_state_dict(saved["optimizer"])
        state.step, state.losses, state.running = saved["step"], saved["losses"], saved["running"]


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

    The ``losses`` attribute of the result contains the mean loss of each head in each epoch.

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
            the model's attention is not supported, or if ``checkpoint`` belongs to a different training run.
        TypeError: If both ``config`` and settings by name are passed, or if a setting is unknown.
    """
    if config is not None and settings:
        raise TypeError(f"give either config or single settings, not both: {', '.join(settings)}")
    config = config or TrainingConfig(**settings)
    data = getattr(samples, "description", None) if data is None else data
    executor = executor_for(model)
    options = RunOptions(config.max_new_tokens, batch_tokens, progress)
    sample_list = list_samples(samples)
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
    state_file = None if checkpoint is None else _Checkpoint(Path(checkpoint), fingerprint, checkpoint_every)
    if state_file is not None and state_file.path.exists():
        state_file.load(state)
    memory = int(memory_gb * 2**30)
    activations = ActivationStore(executor, usable, responses, groups, config.prompts, config.site, memory)
    check = partial(_checked_rows, groups=groups, case=config.prompts, site=config.site)
    activations.keep(0, next(executor.map(check, [(usable[0], responses[0])])))
    attention = _attention(executor, groups, usable, responses, config)
    _run_epochs(attention, state, groups, activations, config, state_file, progress)
    return FocusDirections(
        chosen,
        state.query,
        _key_by_head(state.key, chosen, groups),
        config.site,
        {**provenance, "losses": torch.stack(state.losses).tolist()},
    )


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
    attention: Attention,
    state: _State,
    groups: Sequence[LayerHeads],
    activations: ActivationStore,
    config: TrainingConfig,
    state_file: _Checkpoint | None,
    progress: bool | None,
) -> None:
    """Run the remaining optimizer steps, starting from ``state.step``."""
    samples, size = len(activations), config.batch_size
    batches = math.ceil(samples / size)
    total = config.epochs * batches
    with progress_bar("focus directions", total, unit="step", done=state.step, show=progress) as bar:
        while state.step < total:
            epoch, first = divmod(state.step, batches)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order = torch.randperm(samples, generator=generator).tolist()[first * size :]
            rows = activations.follow(order)
            for start in range(0, len(order), size):
                n = min(size, len(order) - start)
                losses = _step(attention, state, groups, islice(rows, n), n, config.site)
                state.running = losses if state.running is None else state.running + losses
                state.step += 1
                if state.step % batches == 0:
                    state.losses.append(state.running / samples)
                    state.running = None
                if state_file is not None and state_file.is_due(state):
                    state_file.save(state)
                bar.update()


def _start(executor: Executor, heads: Sequence[Head], groups: Sequence[LayerHeads], config: TrainingConfig) -> _State:
    d_head, device = executor.shape.d_head, executor.device

    def noise(places: Sequence[tuple[int, int]], of_keys: int) -> Tensor:
        """Random initial vectors. The vector of a head does not depend on which other heads are trained."""
        rows: list[Tensor] = []
        for layer, head in places:
            digest = hashlib.sha256(f"{config.seed}/{of_keys}/{layer}/{head}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            rows.append(torch.randn(d_head, generator=generator))
        return (torch.stack(rows) * config.init_std).to(device).requires_grad_()

    query = noise(heads, 0)
    key_value_heads = [(group.layer, head) for group in groups for head in group.key_value_heads]
    key = noise(key_value_heads, 1) if config.site == "projection" else None
    vectors = [query] if key is None else [query, key]
    optimizer = torch.optim.AdamW(vectors, lr=config.learning_rate, weight_decay=config.weight_decay)
    return _State(query, key, optimizer)


def _step(
    attention: Attention,
    state: _State,
    groups: Sequence[LayerHeads],
    batch: Iterable[RowActivations],
    size: int,
    site: Site,
) -> Float[Tensor, "n"]:
    """Run one AdamW step on the mean loss of a batch of ``size`` samples.

    Returns:
        Loss of each head before the step, summed over the samples.
    """
    total = torch.zeros(len(state.query))
    gradients = [torch.zeros_like(vector) for vector in state.vectors]
    for rows in batch:
        losses = direction_losses(attention, state.query, state.key, groups, rows, site)
        # autograd.grad computes only the gradients of the directions. The model's parameters get no gradients.
        for sum_, gradient in zip(gradients, torch.autograd.grad(losses.sum(), state.vectors), strict=True):
            sum_ += gradient
        total += losses.detach().cpu()
    for vector, gradient in zip(state.vectors, gradients, strict=True):
        vector.grad = gradient / size
    state.optimizer.step()
    return total


def _key_by_head(
    key: Float[Tensor, "m d_head"] | None, heads: Sequence[Head], groups: Sequence[LayerHeads]
) -> Float[Tensor, "n d_head"] | None:
    """Key vector of each query head: the vector of the key-value head that the query head reads."""
    if key is None:
        return None
    rows = [0] * len(heads)
    first = 0
    for group in groups:
        for place, read in zip(group.places, group.reads, strict=True):
            rows[place] = first + read
        first += len(group.key_value_heads)
    return key[rows]


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
