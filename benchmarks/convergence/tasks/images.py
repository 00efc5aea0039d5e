"""Text to image: a small UNet that draws digits in a new style, and a Stable Diffusion on images with captions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks import sources
from benchmarks.convergence.tasks.kinds import AT_A_TIME, Batch, Task, evaluating, pieces, told, training_steps

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


CAPTIONS = ("text", "caption", "prompt")


class GivenImages(Task):
    """Batches are {"sample", "target" [B, C, h, w], "timestep" [B], "input_ids" [B, tokens]}, in latents.

    ``sizes.sequence`` is the side of the square images in pixels.
    """

    kind = "unet"
    unit = "mean squared error of the prediction"
    targets = Digits.targets
    comes_trained = True

    def __init__(self, model: str, data: str, dtype: torch.dtype) -> None:
        from diffusers import DDPMScheduler
        from transformers import AutoTokenizer

        self._parts = sources.datasets_of(data, images=True)
        found = self._parts[0].column_names
        caption = next((name for name in CAPTIONS if name in found), None)
        if caption is None or "image" not in found:
            raise sources.refuse_columns(data, found, [("image", name) for name in CAPTIONS])
        self._caption = caption
        with sources.reading("model", model):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, subfolder="tokenizer")
            self._scheduler: Any = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        if self._scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            predicted = self._scheduler.config.prediction_type
            raise ValueError(f"model {model!r} must predict epsilon or v_prediction, its scheduler says {predicted!r}")
        self.title, self._provenance = sources.title_of(model, data), sources.provenance(model, data, dtype)
        self._model, self._dtype = model, dtype
        self._known: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def base(self, sizes: Sizes) -> nn.Module:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        with sources.reading("model", self._model):
            text = CLIPTextModel.from_pretrained(self._model, subfolder="text_encoder", dtype=self._dtype)
            unet: Any = UNet2DConditionModel.from_pretrained(self._model, subfolder="unet", torch_dtype=self._dtype)
        if unet.config.addition_embed_type is not None:
            raise ValueError(f"model {self._model!r} must be a Stable Diffusion 1 or 2: its UNet takes more than text")
        return Drawing(text, unet)

    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        """Nothing: the model comes trained."""

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        rows = sources.drawn(len(self._parts[0]), count, examples, generator)
        self._encode(0, {i for row in rows for i in row}, sizes.sequence)
        return [self._noised(0, row, sizes.sequence, generator) for row in rows]

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        rows = sources.shuffled(range(len(self._parts[1])))[:examples]
        self._encode(1, set(rows), sizes.sequence)
        return self._noised(1, rows, sizes.sequence, torch.Generator().manual_seed(0))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        named = {name: batch[name] for name in ("timestep", "input_ids")}
        return named | {"sample": batch["sample"].to(self._dtype)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(model(**self.inputs(batch)).float(), batch["target"])

    def figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        with evaluating(model):
            found = [
                float(self.loss(model, piece)) * len(piece["sample"])
                for piece in told(list(pieces(batch)), "measuring, part")
            ]
        return {"loss": sum(found) / len(batch["sample"])}

    def description(self) -> dict[str, Any]:
        return super().description() | self._provenance

    def _noised(self, part: int, rows: list[int], side: int, generator: torch.Generator) -> Batch:
        """Latents drawn from the VAE's distribution, under noise of random timesteps."""
        mean, deviation = (
            torch.stack(parts) for parts in zip(*(self._known[part, i, side] for i in rows), strict=True)
        )
        drawn, noise = (torch.randn(mean.shape, generator=generator) for _ in range(2))
        latents = mean + deviation * drawn
        steps = self._scheduler.config.num_train_timesteps
        timestep = torch.randint(steps, (len(rows),), generator=generator)
        velocity = self._scheduler.config.prediction_type == "v_prediction"
        target = self._scheduler.get_velocity(latents, noise, timestep) if velocity else noise
        captions = [str(text) for text in self._parts[part].select(rows)[self._caption]]
        ids = self._tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        sample = self._scheduler.add_noise(latents, noise, timestep)
        return {"sample": sample, "target": target, "timestep": timestep, "input_ids": ids}

    def _encode(self, part: int, rows: set[int], side: int) -> None:
        """Scaled means and deviations [C, h, w] of the images' latents, kept; on the GPU where there is one.

        Raises:
            ValueError: the VAE has no latents of images of this side.
        """
        from diffusers import AutoencoderKL

        todo = sorted(i for i in rows if (part, i, side) not in self._known)
        if not todo:
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with sources.reading("model", self._model):
            vae: Any = AutoencoderKL.from_pretrained(self._model, subfolder="vae").to(device).eval()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if side % factor:
            raise ValueError(f"sequence must be the images' side in pixels, a multiple of {factor}, got {side}")
        shift = vae.config.shift_factor or 0.0
        for start in range(0, len(todo), AT_A_TIME):
            chosen = todo[start : start + AT_A_TIME]
            pixels = torch.stack([_pixels(self._parts[part][i]["image"], side) for i in chosen])
            with torch.no_grad():
                found = vae.encode(pixels.to(device)).latent_dist
            means = ((found.mean - shift) * vae.config.scaling_factor).cpu()
            deviations = (found.std * vae.config.scaling_factor).cpu()
            for i, mean, deviation in zip(chosen, means, deviations, strict=True):
                self._known[part, i, side] = mean, deviation


def _pixels(image: Any, side: int) -> Tensor:
    """The middle square of a PIL image, [3, side, side] in [-1, 1]."""
    from PIL import ImageOps

    fitted = ImageOps.fit(image.convert("RGB"), (side, side))
    values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return values.view(side, side, 3).permute(2, 0, 1).float() / 127.5 - 1
