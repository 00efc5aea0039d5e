"""Images with captions and a Stable Diffusion in diffusers' folders; the loss is that of its UNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks import given_sources as sources
from benchmarks.convergence.tasks.images import Digits, Drawing
from benchmarks.convergence.tasks.kinds import AT_A_TIME, Batch, Task, evaluating, pieces

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
        self.title = f"{model} on {data}"
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
            found = [float(self.loss(model, piece)) * len(piece["sample"]) for piece in pieces(batch)]
        return {"loss": sum(found) / len(batch["sample"])}

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
