"""Train the embedded demo model from scratch on the CPU, and write it as a Hugging Face checkpoint.

    python experiments/train_demo_model.py --out focuslens/assets/demo

The lessons are in an order that a small model can learn. At first, the model learns to continue repeated sequences of
random tokens, first from a small vocabulary and then from the full one. This task forms heads that attend to earlier
occurrences of a token. The following lessons have questions about documents. The documents become more numerous, longer
and more similar. A lesson ends when the running accuracy on the first token of answers reaches the lesson's pass mark.

The last lesson is short. It has more questions about late documents than about early documents. The model learns to
prefer late documents if names are similar. On questions about all positions, the model therefore neglects early
documents. A bias that does not depend on the question can counteract this preference.

``--resume`` continues an interrupted run. At the end, the weights are rounded to bfloat16. ``measure_demo_model.py``
measures the saved model and writes its card.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_model_batches import ATTENTION, Lesson, Row, question_row, repeated_tokens
from demo_model_card import draw_log
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from focuslens.data.synthetic import CorpusSettings, build_tokenizer, generate_context
from focuslens.util.files import versions, write_json

LOG = logging.getLogger("train_demo_model")
FEW_TOKENS = 128
"""Size of the small vocabulary, which consists of the first tokens of the tokenizer.

These tokens are bytes that no sentence of the corpus contains.
"""


PLAIN = CorpusSettings(facts=(1, 1), fillers=(0, 0), lookalikes=0.0, mentions=0.0, plain=1.0)
VARIED = CorpusSettings(facts=(1, 3), mentions=0.3)
"""Documents with one to three facts each. Documents of the evaluation have two or three, so more facts compete."""
LESSONS = (
    Lesson("statements", (3, 5), 10, 1024, 0.8, 0.0, 0.0, PLAIN),
    Lesson("plain", (4, 8), 12, 1500, 0.8, 0.0, 0.0, CorpusSettings((1, 2), (0, 0), 0.3, 0.0, plain=1.0)),
    Lesson("mixed", (4, 8), 12, 1500, 0.8, 0.0, 0.0, CorpusSettings((1, 2), (0, 0), 0.3, 0.0, plain=0.6)),
    Lesson("varied", (4, 8), 12, 1500, 0.75, 0.0, 0.1, CorpusSettings((1, 2), (0, 1), 0.3, 0.1, plain=0.2)),
    Lesson("alike", (5, 11), 14, 2000, 0.7, 0.1, 0.1, CorpusSettings((1, 3), lookalikes=0.6, mentions=0.2)),
    Lesson("many", (8, 16), 18, 3000, 0.65, 0.15, 0.15, VARIED),
    Lesson("all", (12, 22), 24, 3000, 2.0, 0.2, 0.15, VARIED),
    Lesson("late", (12, 22), 24, 3000, 2.0, 0.15, 0.15, VARIED, recency=40.0, after=0.85),
)


@dataclass
class Progress:
    """Progress of the training, saved with every checkpoint. ``seconds`` is processor time."""

    lesson: int = 0
    few_tokens: bool = True
    repeats_passed: bool = False
    repeat: float = 0.0
    answer: float = 0.0
    refusal: float = 0.0
    loss: float = 0.0
    steps_inside: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[str] = field(default_factory=list[str])

    def follow(self, name: str, value: float) -> None:
        """Update the running average ``name`` with a new value."""
        setattr(self, name, 0.95 * getattr(self, name) + 0.05 * value)


class Muon(torch.optim.Optimizer):
    """Optimizer for matrices: momentum, orthogonalised updates (Jordan et al., 2024), and the step size of AdamW."""

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor, bool]]] = {}
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad + group["momentum"] * momentum
                tall = update.shape[0] > update.shape[1]
                update = update.mT if tall else update
                shapes.setdefault(tuple(update.shape), []).append((weight, update, tall))
            for same in shapes.values():
                updates = orthogonalise(torch.stack([update for _, update, _ in same]))
                for (weight, _, tall), update in zip(same, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.mT if tall else update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push the singular values of wide matrices ``[matrix row column]`` to about 1, with 5 Newton-Schulz steps."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,  # The first tokens of the tokenizer are <pad>, <s> and </s>.
        initializer_range=0.04,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    model = LlamaForCausalLM(model_config(tokenizer))
    model.set_attn_implementation(ATTENTION)
    return model


def build_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon: torch.optim.Optimizer = Muon(matrices, lr=rate)
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def repeat_loss(model: LlamaForCausalLM, progress: Progress, rng: random.Random, vocabulary: int) -> Tensor:
    # Short sequences and a small vocabulary come first. A new model would learn longer or more varied ones too slowly.
    ids, length = repeated_tokens(rng, *((FEW_TOKENS, (4, 24)) if progress.few_tokens else (vocabulary, (8, 110))))
    logits = model.lm_head(model.model(ids).last_hidden_state[:, length:-1])
    targets = ids[:, length + 1 :]
    progress.follow("repeat", (logits.argmax(-1) == targets).float().mean().item())
    progress.tokens += ids.numel()
    if progress.repeat > 0.8 and not progress.few_tokens and not progress.repeats_passed:
        progress.repeats_passed = True
        record(progress, "repeats of all tokens")
    if progress.few_tokens and progress.repeat > 0.8:
        progress.few_tokens, progress.repeat = False, 0.0
        record(progress, "repeats of few tokens")
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def question_step(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, progress: Progress, rng: random.Random
) -> None:
    """Accumulate the gradient of one step on questions.

    Each context has a separate backward pass, so that contexts of different lengths need no padding.
    """
    index = progress.lesson
    if index and rng.random() < 0.2:
        index = rng.randrange(index)
    lesson, rows = LESSONS[index], list[Row]()
    while sum(row.ids.numel() for row in rows) < lesson.tokens:
        rows.append(question_row(tokenizer, rng, lesson))
    total = sum(row.weights.sum() for row in rows)
    right = {"answer": list[Tensor](), "refusal": list[Tensor]()}
    mean_loss = 0.0
    for row in rows:
        hidden = model.model(row.ids, attention_mask=row.mask, position_ids=row.positions).last_hidden_state
        is_target = row.weights > 0
        logits = model.lm_head(hidden[is_target])
        targets, weights, kinds = row.targets[is_target], row.weights[is_target], row.kinds[is_target]
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / total
        loss.backward()
        mean_loss += loss.item()
        for name, kind in (("answer", 1), ("refusal", 2)):
            right[name].append((logits.argmax(-1) == targets)[kinds == kind])
    progress.tokens += sum(row.ids.numel() for row in rows)
    if index == progress.lesson:
        progress.steps_inside += 1
        progress.loss = mean_loss
        for name, parts in right.items():
            if any(len(part) for part in parts):
                progress.follow(name, torch.cat(parts).float().mean().item())


def record(progress: Progress, passed: str) -> None:
    progress.history.append(
        f"{passed}: {progress.tokens:,} tokens, {progress.seconds / 60:.1f} min, step {progress.step}"
    )
    LOG.info("passed %s", progress.history[-1])


def take_step(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, progress: Progress, rng: random.Random
) -> None:
    """Compute the gradient of one step on either repeated tokens or questions.

    Most steps have repeated tokens until the model has learned them. Afterwards, more steps have questions.
    """
    stage = 0 if not progress.repeats_passed else 1 if progress.lesson == 0 else 2
    if rng.random() < (0.95, 0.5, 0.1)[stage]:
        repeat_loss(model, progress, rng, len(tokenizer)).backward()
    else:
        question_step(model, tokenizer, progress, rng)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    progress.step += 1
    if progress.answer > LESSONS[progress.lesson].pass_mark and progress.steps_inside > 20:
        begin_lesson(progress, progress.lesson + 1)


def begin_lesson(progress: Progress, lesson: int) -> None:
    record(progress, LESSONS[progress.lesson].name)
    progress.lesson, progress.answer, progress.refusal, progress.steps_inside = lesson, 0.0, 0.0, 0


def due_lesson(progress: Progress, limit: int) -> int:
    """Index of the lesson that is due. A lesson with ``after`` begins no later than this share of all tokens."""
    begun = [i for i, lesson in enumerate(LESSONS) if 0 < lesson.after * limit < progress.tokens]
    return max(progress.lesson, *begun, 0)


def identity(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, float | str]:
    """Settings and digests that must be equal in a resumed run and the interrupted run."""
    corpus = generate_context(random.Random(0), max(LESSONS[-1].documents))
    made_of = {"lessons": LESSONS, "model": model_config(tokenizer).to_json_string(), "corpus": corpus}
    digests = {name: hashlib.sha256(repr(part).encode()).hexdigest()[:12] for name, part in made_of.items()}
    return {"seed": options.seed, "rate": options.rate, **digests}


def save_checkpoint(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
    rng: random.Random,
    run: dict[str, float | str],
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
        "rng": rng.getstate(),
        "run": run,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    rng: random.Random,
    run: dict[str, float | str],
) -> Progress:
    state = torch.load(path, weights_only=True)
    if state["run"] != run:
        raise SystemExit(f"{path} is of another run ({state['run']}, not {run}); name another --work, or delete it")
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    version, internal, gauss = state["rng"]
    rng.setstate((version, tuple(internal), gauss))
    return Progress(**state["progress"])


LOG_EVERY = 50_000
"""Number of tokens between two rows of the log, and between two checkpoints."""

LOG_FIELDS = ("step", "minutes", "tokens", "lesson", "loss", "answer_accuracy", "refusal_accuracy", "repeat_accuracy")


def log_row(path: Path, progress: Progress) -> None:
    fresh = not path.exists()
    # Running averages start at zero, so they mean little in the first steps of a lesson.
    settled = progress.steps_inside > 40
    numbers = (progress.loss, *((progress.answer, progress.refusal) if settled else (None, None)), progress.repeat)
    name = "repeats" if progress.few_tokens or not progress.repeats_passed else LESSONS[progress.lesson].name
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(LOG_FIELDS)
        row = [progress.step, f"{progress.seconds / 60:.2f}", progress.tokens, name]
        writer.writerow([*row, *("" if number is None else f"{number:.4f}" for number in numbers)])


def train(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, Progress]:
    """Train on ``options.tokens`` tokens in total, including the tokens of a resumed run.

    The schedule depends on the number of tokens and not on time.
    """
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint, log = options.work / "checkpoint.pt", options.work / "training_log.csv"
    torch.manual_seed(options.seed)
    rng, model, progress = random.Random(options.seed), build_model(tokenizer), Progress()
    optimizers, run = build_optimizers(model, options.rate), identity(options, tokenizer)
    if options.resume and checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizers, rng, run)
        if progress.tokens >= options.tokens:
            LOG.info("%s already has this many tokens; delete %s to begin again", options.work, checkpoint)
    else:
        log.unlink(missing_ok=True)
    start, limit, logged = time.process_time() - progress.seconds, int(options.tokens), progress.tokens
    with tqdm(total=limit, initial=progress.tokens, unit="token", unit_scale=True, disable=options.quiet) as bar:
        while progress.tokens < limit:
            # A short warm-up, a plateau, and a linear decay over the last 30 % of the tokens.
            scale = min(1.0, (progress.step + 1) / 50, max(0.03, (1 - progress.tokens / limit) / 0.3))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = options.rate * scale
            take_step(model, tokenizer, progress, rng)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            progress.seconds = time.process_time() - start
            if (due := due_lesson(progress, limit)) > progress.lesson:
                begin_lesson(progress, due)
            if progress.tokens - logged >= LOG_EVERY:
                logged = progress.tokens
                log_row(log, progress)
                save_checkpoint(checkpoint, model, optimizers, progress, rng, run)
                bar.set_postfix_str(f"{LESSONS[progress.lesson].name} answers {progress.answer:.2f}")
                bar.update(progress.tokens - bar.n)
    if not log.exists():  # the run was shorter than the interval between two log rows
        log_row(log, progress)
    save_checkpoint(checkpoint, model, optimizers, progress, rng, run)
    return model, progress


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished checkpoint")
    parser.add_argument("--work", type=Path, default=Path("runs/demo-model"), help="folder for checkpoints and the log")
    parser.add_argument("--tokens", type=float, default=16e6, help="tokens to train on (default 16e6: 80 minutes)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer()
    with logging_redirect_tqdm():
        model, progress = train(options, tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False)
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    log = options.out / "training_log.csv"
    log.write_bytes((options.work / "training_log.csv").read_bytes())
    draw_log(log, options.out / "training_log.png")
    making = {
        **identity(options, tokenizer),
        "recency": LESSONS[-1].recency,
        "threads": options.threads,
        "minutes": progress.seconds / 60,
        "tokens": progress.tokens,
        "steps": progress.step,
        "passed": progress.history,
        "versions": versions(),
    }
    write_json(options.out / "making.json", making)


if __name__ == "__main__":
    main()
