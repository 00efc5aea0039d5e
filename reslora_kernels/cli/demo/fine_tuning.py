"""The demo's settings, its text, and training on it: losses, a step's time, a few generated lines.

The text is English prose and Python source that come with CPython, as bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reslora_kernels.adapt.apply import apply_reslora
from reslora_kernels.bench.timing import CpuClock, Plan, Subject, measure, relative
from reslora_kernels.config import ResLoRAConfig, Shortcut

BASELINE: Shortcut = "none"
TITLES: dict[Shortcut, str] = {"none": "LoRA", "input": "input", "block": "block", "middle": "middle"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A base model and its pre-training; ``sequence`` in bytes, or pixels a side for images."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 6
    heads: int = 4
    sequence: int = 128
    batch: int = 8
    pretraining_steps: int = 400
    pretraining_rate: float = 4e-3


@dataclass(frozen=True, kw_only=True)
class Settings(Sizes):
    """A LLaMA over bytes, pre-trained on English prose, and how it is adapted. Rates are peak learning rates."""

    name: str
    seed: int = 0
    shortcuts: tuple[Shortcut, ...] = ("input", "block", "middle")
    # fine-tuning on Python source
    finetuning_steps: int = 120
    finetuning_rate: float = 1e-2  # the best for plain LoRA of 3e-3, 5e-3, 1e-2 and 2e-2
    warmup_steps: int = 10
    r: int = 4
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] = "all-linear"
    pre_num: int = 2
    # measuring
    evaluations: int = 10
    evaluation_sequences: int = 64
    calibration_batches: int = 16
    timing_rounds: int = 9
    sample_bytes: int = 120
    sample_temperature: float = 0.5

    @property
    def runs(self) -> tuple[Shortcut, ...]:
        """What is trained: plain LoRA first, then the shortcuts."""
        return (BASELINE, *self.shortcuts)

    def replace(self, **changes: Any) -> Settings:
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)

    def adapter_config(self, shortcut: Shortcut) -> ResLoRAConfig:
        """The configuration of one run. They differ in the shortcut alone."""
        return ResLoRAConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            target_modules=self.target_modules,
            shortcut=shortcut,
            pre_num=self.pre_num,
        )


FULL = Settings(name="full")
QUICK = Settings(
    name="quick",
    hidden_size=96,
    intermediate_size=256,
    layers=4,
    pretraining_steps=150,
    finetuning_steps=50,
    evaluations=5,
    evaluation_sequences=32,
    calibration_batches=8,
    timing_rounds=5,
    sample_bytes=80,
)


EVALUATION_BATCH = 16  # sequences in one forward
HELD_OUT_MODULES = ("argparse", "calendar", "configparser", "copy", "heapq", "shelve", "textwrap", "uuid")
HELD_OUT_TOPICS = 8  # every eighth topic
SMALLEST = 20_000  # bytes of a part of the data below which nothing useful can be learnt or measured


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes, each a 1-dimensional int64 tensor of values 0 to 255."""

    train: Tensor
    held_out: Tensor


def prose() -> Corpus:
    """The help topics of ``pydoc``; every eighth is held out.

    Raises:
        RuntimeError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError("this Python has no pydoc_data.topics, the English prose that the demo trains on") from None
    texts = [topics[name].encode() for name in sorted(topics)]
    held_out = texts[::HELD_OUT_TOPICS]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT_TOPICS]
    return Corpus(_joined(train, "pydoc_data.topics"), _joined(held_out, "pydoc_data.topics"))


def python_source() -> Corpus:
    """The modules at the top of the standard library; those in ``HELD_OUT_MODULES`` are held out.

    Raises:
        RuntimeError: this Python keeps its standard library elsewhere than in source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    train: list[bytes] = []
    held_out: list[bytes] = []
    for path in sorted(folder.glob("*.py")):
        (held_out if path.stem in HELD_OUT_MODULES else train).append(path.read_bytes())
    return Corpus(_joined(train, str(folder)), _joined(held_out, str(folder)))


def random_batches(data: Tensor, count: int, sequences: int, length: int, seed: int) -> Tensor:
    """Crops at random places [count, sequences, length], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - length + 1, (count, sequences), generator=generator)
    return data[starts[..., None] + torch.arange(length)]


def spread_batch(data: Tensor, sequences: int, length: int) -> Tensor:
    """Crops at even distances over all of the data [sequences, length]."""
    starts = torch.linspace(0, len(data) - length, sequences).long()
    return data[starts[:, None] + torch.arange(length)]


def _joined(texts: Sequence[bytes], where: str) -> Tensor:
    joined = b"\n".join(texts)
    if len(joined) < SMALLEST:
        raise RuntimeError(f"the demo needs {SMALLEST:,} bytes of text out of {where}, found {len(joined):,}")
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


class Curve(NamedTuple):
    """Evaluation losses (nats per byte) over training steps, from step 0 to the last."""

    steps: list[int]
    losses: list[float]


def new_model(settings: Settings) -> nn.Module:
    """A LLaMA over bytes with random weights; the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=4 * settings.sequence,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(settings.seed)
    model: nn.Module = LlamaForCausalLM(config)
    return model


def pretrain(model: nn.Module, batches: Tensor, settings: Settings, each_step: Callable[[float], None]) -> None:
    """Train every weight on ``batches`` [steps, sequences, bytes]; ``each_step`` is told the training loss."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.pretraining_rate, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for loss in training_steps(model, optimizer, batches, settings.warmup_steps):
        each_step(loss)
    model.eval().requires_grad_(False)


def adapted(base: nn.Module, shortcut: Shortcut, settings: Settings) -> nn.Module:
    """A copy of ``base`` with fresh adapters. The same seed gives every shortcut the same A."""
    model = copy.deepcopy(base)
    torch.manual_seed(settings.seed)
    return apply_reslora(model, settings.adapter_config(shortcut))


def finetune(
    model: nn.Module, batches: Tensor, evaluation: Tensor, settings: Settings, each_step: Callable[[float], None]
) -> Curve:
    """Train the adapters on ``batches`` [steps, sequences, bytes] and evaluate at even distances.

    ``each_step`` is told the latest evaluation loss. Returns the evaluation losses.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, settings.finetuning_rate, weight_decay=0.0)
    curve = Curve([0], [evaluate(model, evaluation)])
    marks = {round(len(batches) * i / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    model.train()
    for step, _ in enumerate(training_steps(model, optimizer, batches, settings.warmup_steps), 1):
        if step in marks:
            curve.steps.append(step)
            curve.losses.append(evaluate(model, evaluation))
        each_step(curve.losses[-1])
    model.eval()
    return curve


def training_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    warmup_steps: int,
    loss_of: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Iterator[float]:
    """Take one step per batch, gradients clipped at norm 1, and yield its training loss; the gradients are there then.

    The learning rate rises linearly over ``warmup_steps``, then falls as a cosine to 5 % of its peak. ``batches`` has a
    length; ``loss_of`` is ``language_loss`` unless given.
    """
    clipped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup_steps, 0.525 + 0.475 * math.cos(math.pi * step / len(batches))),
    )
    for batch in batches:
        loss = (loss_of or language_loss)(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Tensor) -> float:
    """Mean next-byte loss in nats over ``sequences`` [count, bytes], in evaluation mode."""
    training = model.training
    model.eval()
    parts = [sequences[i : i + EVALUATION_BATCH] for i in range(0, len(sequences), EVALUATION_BATCH)]
    total = sum(language_loss(model, part).item() * len(part) for part in parts)
    model.train(training)
    return total / len(sequences)


def language_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-byte loss of ``batch`` [sequences, bytes]."""
    loss: Tensor = model(**inputs(batch), labels=batch).loss
    return loss


def inputs(batch: Tensor) -> dict[str, Any]:
    """The model's arguments for bytes [sequences, length]."""
    return {"input_ids": batch, "use_cache": False}


def steps_to_reach(curve: Curve, target: float) -> float | None:
    """The first step at which the loss is ``target`` or below, interpolated between evaluations; None if never."""
    for i, loss in enumerate(curve.losses):
        if loss <= target:
            if i == 0:
                return 0.0
            before, share = curve.losses[i - 1], curve.steps[i] - curve.steps[i - 1]
            return curve.steps[i - 1] + share * (before - target) / (before - loss)
    return None


FROZEN = "frozen"

DEFINITION = (
    "A step is forward and backward of one batch, down to the output of the embeddings, and for adapters AdamW's "
    "update. The frozen model is the pre-trained one without adapters or any weight gradient. Models take turns; the "
    "figures are medians over the rounds, the relative time that of the quotients within a round."
)


@dataclass(frozen=True)
class StepTime:
    """Medians: milliseconds, and the quotient with the frozen model's time in the same round."""

    milliseconds: float
    relative: float


def time_steps(
    frozen: nn.Module, models: Mapping[Shortcut, nn.Module], batch: Tensor, rounds: int, each_round: Callable[[], None]
) -> tuple[float, dict[Shortcut, StepTime]]:
    """Median milliseconds of a frozen model's step, and the step times of ``models``, which are left as they are.

    One round more runs beforehand, to warm up.
    """
    subjects = [Subject(name, _step(model, batch)) for name, model in ({FROZEN: frozen} | dict(models)).items()]
    plan = Plan(most=rounds, least=rounds, warmup=1)
    samples = measure(subjects, CpuClock(), plan, _fail, on_round=each_round)
    floor = samples[FROZEN].forward
    return 1e3 * statistics.median(floor), {
        name: StepTime(1e3 * statistics.median(own), relative(own, floor).median)
        for name, own in ((name, samples[name].forward) for name in models)
    }


def _fail() -> None:
    raise RuntimeError("a step that was to be timed failed")


def _step(model: nn.Module, batch: Tensor) -> Callable[[int], None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0) if trainable else None  # moves nothing
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def step(_: int) -> None:
        embedded = embeddings(batch).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=batch, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


PROMPTS = (b"import s", b"def get_", b"class Re")  # of one length: they are one batch


def generate(model: nn.Module, count: int, temperature: float, seed: int) -> list[str]:
    """Each prompt continued by ``count`` sampled bytes, as text. The same seed draws the same random numbers."""
    prompts = torch.tensor([list(prompt) for prompt in PROMPTS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sequences: Tensor = model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            min_new_tokens=count,
            max_new_tokens=count,
        )
    return [bytes(sequence.tolist()).decode("utf-8", errors="replace") for sequence in sequences]
