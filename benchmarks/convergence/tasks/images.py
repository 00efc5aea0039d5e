"""Text to image: a small diffusers UNet and text encoder that draw scikit-learn's digits, adapted to a new style."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.steps import training_steps
from benchmarks.convergence.tasks.kinds import Batch, Task, evaluating

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = {word: i + 1 for i, word in enumerate(("a", "handwritten", *WORDS))}  # 0 is padding
CAPTION_TOKENS = 4
TIMESTEPS = 200
SAMPLING_STEPS = 20
PER_DIGIT = 10  # images drawn of each for the classifier
SIDE = 8


class Drawing(nn.Module):
    """A CLIP text encoder and a UNet; adapters go into the UNet alone."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, sample: Tensor, timestep: Tensor, input_ids: Tensor) -> Tensor:
        """The noise in ``sample`` [B, 1, 8, 8] under captions [B, tokens]."""
        states = self.text_encoder(input_ids=input_ids).last_hidden_state
        noise: Tensor = self.unet(sample, timestep, encoder_hidden_states=states).sample
        return noise


class Digits(Task):
    """Batches are {"sample", "noise" [B, 1, 8, 8], "timestep" [B], "input_ids" [B, tokens]}; the loss is the noise's.

    Args:
        title: for headings.
        style: what is done to scikit-learn's images [B, 1, 8, 8] in [-1, 1] that the base model has not seen.
    """

    kind = "unet"
    unit = "mean squared error of the noise"
    metrics = ("digits_recognised",)
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(self, title: str, style: Callable[[Tensor], Tensor]) -> None:
        self.title, self.style = title, style

    def base(self, sizes: Sizes) -> nn.Module:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        width = sizes.hidden_size
        text = CLIPTextConfig(
            vocab_size=len(VOCABULARY) + 1, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=sizes.heads, max_position_embeddings=CAPTION_TOKENS, projection_dim=width,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=SIDE, in_channels=1, out_channels=1, block_out_channels=(width, 2 * width),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=sizes.layers,
            cross_attention_dim=width, attention_head_dim=8, norm_num_groups=8,
        )  # fmt: skip
        return Drawing(CLIPTextModel(text), unet)

    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        batches = _batches(_digits()[0], sizes.pretraining_steps, sizes.batch, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), sizes.pretraining_rate, weight_decay=0.01)
        for _ in training_steps(model, optimizer, batches, 10, self.loss):
            pass

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        return _batches(self._styled(0), count, examples, seed)

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        return _batches(self._styled(1), 1, examples, seed=0)[0]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: batch[name] for name in ("sample", "timestep", "input_ids")}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(model(**self.inputs(batch)).float(), batch["noise"])

    def final_figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """How many of ``PER_DIGIT`` images of each digit a classifier of real ones in this style takes for it."""
        digits = torch.arange(10).repeat_interleave(PER_DIGIT)
        images = drawn(model, digits, seed=0)
        found = self._classifier.predict(images.flatten(1).numpy())
        return {"digits_recognised": float((torch.from_numpy(found) == digits).float().mean())}

    def samples(self, model: nn.Module) -> list[Any]:
        """One image of each digit."""
        images: list[Any] = ((drawn(model, torch.arange(10), seed=1)[:, 0] + 1) * 127.5).round().int().tolist()
        return images

    def _styled(self, part: int) -> tuple[Tensor, Tensor]:
        images, labels = _digits()[part]
        return self.style(images), labels

    @cached_property
    def _classifier(self) -> Any:
        from sklearn.svm import SVC

        images, labels = self._styled(0)
        return SVC(gamma="scale", C=5.0).fit(images.flatten(1).numpy(), labels.numpy())


def inverted(images: Tensor) -> Tensor:
    """Black on white becomes white on black."""
    return -images


def slanted(images: Tensor) -> Tensor:
    """Sheared by three quarters of a pixel per row, empty where nothing comes in."""
    shear = torch.tensor([[1.0, 0.75, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    grid = nn.functional.affine_grid(shear, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def drawn(model: nn.Module, digits: Tensor, seed: int) -> Tensor:
    """Images [B, 1, 8, 8] in [-1, 1] for captions of ``digits`` [B], by DDIM."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=TIMESTEPS, clip_sample=True)
    scheduler.set_timesteps(SAMPLING_STEPS)
    device = next(model.parameters()).device
    sample = torch.randn(len(digits), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(device)
    captions = _captions(digits).to(device)
    with evaluating(model):
        for t in scheduler.timesteps:
            noise = model(sample, t.to(device).expand(len(digits)), captions)
            sample = scheduler.step(noise, t, sample).prev_sample
    return sample.clamp(-1, 1).float().cpu()


def _captions(digits: Tensor) -> Tensor:
    """ "a handwritten three", as token ids [B, tokens]."""
    rows = [[VOCABULARY["a"], VOCABULARY["handwritten"], VOCABULARY[WORDS[d]], 0] for d in digits.tolist()]
    return torch.tensor(rows)


@cache
def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 images and their digits: four in five to train on, one in five held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target)
    held_out = torch.arange(len(images)) % 5 == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def _batches(known: tuple[Tensor, Tensor], count: int, examples: int, seed: int) -> list[Batch]:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS)
    generator = torch.Generator().manual_seed(seed)
    images, labels = known
    batches = []
    for _ in range(count):
        rows = torch.randint(len(images), (examples,), generator=generator)
        noise = torch.randn(examples, 1, SIDE, SIDE, generator=generator)
        timestep = torch.randint(TIMESTEPS, (examples,), generator=generator)
        sample = scheduler.add_noise(images[rows], noise, timestep)
        batches.append({"sample": sample, "noise": noise, "timestep": timestep, "input_ids": _captions(labels[rows])})
    return batches
