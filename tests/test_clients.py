"""Other programs, each where it is installed: trainers that take a model as it is, diffusers, torch.export and ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    disable_adapter,
    export_peft,
    load_adapter,
    merge_reslora,
)
from reslora_kernels.training import AdapterCheckpoints

from .conftest import PROSE, make_tokenizer
from .models import FAMILIES, denoised, llama, randomize, roberta, unet

CONFIG = ResLoRAConfig(r=2, shortcut="input", target_modules=["q_proj", "v_proj"], lora_alpha=16)
OPTIONS = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.02}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


def adapted(model: Any, config: ResLoRAConfig = CONFIG) -> Any:
    torch.manual_seed(3)
    return apply_reslora(model, config)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def language_model() -> Any:
    from transformers import LlamaForCausalLM

    config = llama().config
    config.vocab_size, config.eos_token_id = 384, 1
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.mark.slow
def test_trl_sft_trains_and_resumes(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class SFTTrainer(AdapterCheckpoints, trl.SFTTrainer):  # type: ignore[name-defined, misc]
        pass

    def trainer(folder: str) -> Any:
        rows = [{"prompt": sentence + ".", "completion": " So it is."} for sentence in PROSE.split(". ")]
        return SFTTrainer(
            model=adapted(language_model()),
            args=trl.SFTConfig(str(tmp_path / folder), max_length=32, bf16=False, **OPTIONS, **QUIET),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )

    straight, resumed = trainer("straight"), trainer("resumed")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same(trained(resumed.model), trained(straight.model))
    assert_same(
        trained(load_adapter(language_model(), tmp_path / "straight" / "checkpoint-4")), trained(straight.model)
    )
    assert (tmp_path / "straight" / "checkpoint-4" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_sentence_transformers_trains_and_resumes(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=384, pad_token_id=0, **sizes)).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")

    class Trainer(AdapterCheckpoints, library.SentenceTransformerTrainer):  # type: ignore[name-defined, misc]
        pass

    def model() -> Any:
        return library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")

    def trainer(folder: str) -> Any:
        sentences = PROSE.split(". ")
        adapter = CONFIG.replace(target_modules=["query", "value"])
        arguments = library.SentenceTransformerTrainingArguments(str(tmp_path / folder), **OPTIONS, **QUIET)
        data = Dataset.from_dict({"anchor": sentences, "positive": [s.lower() for s in sentences]})
        network = adapted(model(), adapter)
        loss = library.sentence_transformer.losses.MultipleNegativesRankingLoss(network)
        return Trainer(model=network, args=arguments, train_dataset=data, loss=loss)

    straight, resumed = trainer("straight"), trainer("resumed")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same(trained(resumed.model), trained(straight.model))
    loaded = load_adapter(model(), tmp_path / "straight" / "checkpoint-4")
    assert torch.equal(
        loaded.encode("two", convert_to_tensor=True), straight.model.encode("two", convert_to_tensor=True)
    )


def test_lightning_trains_and_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted(llama())

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self.model(input_ids=batch, labels=batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)

    def fit(folder: str, steps: int, start: Path | None = None) -> Any:
        module = Module()
        saves = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / folder, save_top_k=-1, every_n_train_steps=2)
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, callbacks=[saves], enable_progress_bar=False
        )
        data = torch.utils.data.DataLoader(FAMILIES["llama"].batch(5)["input_ids"].repeat(4, 1)[:4], batch_size=2)
        trainer.fit(module, data, ckpt_path=start)
        return module

    straight = fit("straight", 4)
    checkpoint = next((tmp_path / "straight").glob("*step=2.ckpt"))
    assert_same(trained(fit("resumed", 4, checkpoint)), trained(straight))


def test_peft_takes_the_export_by_its_other_doors(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.utils.hotswap import hotswap_adapter
    from transformers import pipeline

    language_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    ids, expected = torch.arange(2, 20)[None], []
    for number, folder in enumerate(("one", "two")):
        model = adapted(language_model())
        model.config._name_or_path = str(tmp_path / "base")
        torch.manual_seed(number)
        for parameter in trained(model):
            model.get_parameter(parameter).data.normal_(0, 0.2)
        export_peft(model, tmp_path / folder, calibration=[{"input_ids": ids}])
        served = peft.PeftModel.from_pretrained(language_model(), tmp_path / folder).eval()
        expected.append(served(input_ids=ids).logits)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(loaded(input_ids=ids).logits, expected[0])
    hotswap_adapter(loaded, str(tmp_path / "two"), adapter_name="default")
    assert torch.equal(loaded(input_ids=ids).logits, expected[1])
    talk = pipeline("text-generation", model=loaded, tokenizer=make_tokenizer())
    (answer,) = talk("two plus", max_new_tokens=4, do_sample=False, return_full_text=False)
    prompt = make_tokenizer()("two plus", return_tensors="pt")["input_ids"]
    own = loaded.generate(prompt, max_new_tokens=4, do_sample=False)
    assert answer["generated_text"] == make_tokenizer().decode(own[0, prompt.shape[1] :])


PARTS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj", "fc1"]}
LORA_NAME = "pytorch_lora_weights.safetensors"


def pipeline() -> Any:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    network = unet()
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=48)
    return StableDiffusionPipeline(
        unet=network,
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=2),
        text_encoder=CLIPTextModel(CLIPTextConfig(bos_token_id=0, eos_token_id=2, **sizes)).eval(),
        tokenizer=None,
        scheduler=PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float64)


@torch.no_grad()
def outputs(pipe: Any) -> list[Tensor]:
    torch.set_default_dtype(torch.float64)  # or the mask of CLIP overflows, in Transformers 4
    text = pipe.text_encoder(torch.arange(3, 13)[None])[0]
    torch.set_default_dtype(torch.float32)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return [text, pipe.unet(noise, 7, text).sample]


def far(some: list[Tensor], others: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(some, others, strict=True)]


def video_model() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip


class TestDiffusers:
    @pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["LoRA", "DoRA"])
    def test_pipeline_loads_all_its_parts(self, dora: bool, tmp_path: Path) -> None:
        pipe = pipeline()
        before = outputs(pipe)
        for name, targets in PARTS.items():
            model = getattr(pipe, name)
            randomize(apply_reslora(model, ResLoRAConfig(r=3, use_dora=dora, target_modules=targets)))
            if dora:
                merge_reslora(model)  # diffusers' DoRA is of the one update
            export_peft(model, tmp_path, layout="diffusers")
        trained, again = outputs(pipe), pipeline()
        again.load_lora_weights(tmp_path)
        assert min(far(trained, before)) > 0.1
        assert max(far(outputs(again), trained)) < 1e-6
        assert {path.name for path in tmp_path.iterdir()} == {LORA_NAME, "README.md"}

    def test_a_part_that_is_exported_again_replaces_only_itself(self, tmp_path: Path) -> None:
        pipe = pipeline()
        for name, targets in PARTS.items():
            apply_reslora(getattr(pipe, name), ResLoRAConfig(r=3, target_modules=targets))
            export_peft(getattr(pipe, name), tmp_path, layout="diffusers")
        first = load_file(tmp_path / LORA_NAME)
        export_peft(randomize(pipe.unet), tmp_path, layout="diffusers")
        second = load_file(tmp_path / LORA_NAME)
        assert first.keys() == second.keys()
        changed = {key for key in first if not torch.equal(first[key], second[key])}
        assert changed == {key for key in first if key.startswith("unet.")}
        card = (tmp_path / "README.md").read_text()
        assert all(card.count(f"## Merge of {name}\n") == 1 for name in PARTS)

    def test_transformer_has_its_own_prefix(self, tmp_path: Path) -> None:
        from diffusers import SD3Transformer2DModel

        def make() -> Any:
            torch.manual_seed(0)
            sizes = dict(num_layers=2, attention_head_dim=8, num_attention_heads=2, patch_size=1, sample_size=4)
            widths = dict(caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16)
            return SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=8, **sizes, **widths).eval()

        def run(model: Any) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            shapes = ((1, 4, 4, 4), (1, 5, 16), (1, 16))
            with torch.no_grad():
                return model(*(torch.randn(shape, generator=generator) for shape in shapes), torch.tensor([3])).sample

        model, again = make(), make()
        apply_reslora(model, ResLoRAConfig(r=3, target_modules=["to_q", "to_v"], shortcut="none"))
        export_peft(randomize(model), tmp_path, layout="diffusers")
        again.load_lora_adapter(str(tmp_path), weight_name=LORA_NAME)
        assert float((run(again) - run(model)).abs().max()) < 1e-5 < float((run(make()) - run(model)).abs().max())

    @pytest.mark.parametrize("make", [unet, video_model])
    def test_fused_projections(self, make: Callable[[], Any]) -> None:
        """Fused, a layer beside to_q, to_k and to_v runs, with the weights of then."""
        config = ResLoRAConfig(r=3, shortcut="block", target_modules=["to_q", "to_v"])
        model = randomize(apply_reslora(make().double(), config))
        expected = denoised(model)
        model.fuse_qkv_projections()
        for refused in (denoised, merge_reslora):
            with pytest.raises(ValueError, match=r"to_[qv]' does not run: .*fuse_qkv_projections.*'to_k?qk?v'"):
                refused(model)
        fused = make().double()
        fused.fuse_qkv_projections()
        with disable_adapter(model), torch.no_grad():
            torch.testing.assert_close(denoised(model), denoised(fused))
        with pytest.raises(ValueError, match=r"does not run: .*fuse_qkv_projections"):
            apply_reslora(fused, config)
        model.unfuse_qkv_projections()
        torch.testing.assert_close(denoised(model), expected)
        merge_reslora(model)
        model.fuse_qkv_projections()
        torch.testing.assert_close(denoised(model), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"layout": "kohya"}, "layout must be .* got 'kohya'"),
            ({"layout": "diffusers", "pattern": True}, "pattern must be False"),
            ({"layout": "diffusers"}, "component must say .* LlamaForCausalLM"),
            ({"layout": "diffusers", "component": "my unet"}, "component must be .* got 'my unet'"),
            ({"layout": "diffusers", "component": "transformer_2"}, "load_into_transformer_2=True"),
            ({"component": "unet"}, "component is for layout='diffusers'"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            export_peft(apply_reslora(llama(), ResLoRAConfig(r=2)), tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()

    def test_what_the_file_cannot_hold_is_refused(self, tmp_path: Path) -> None:
        model = apply_reslora(unet(), ResLoRAConfig(r=2, target_modules=["to_q"], bias="all"))
        with pytest.raises(ValueError, match=r"LoRA matrices only.*'conv_in\.bias'"):
            export_peft(model, tmp_path / "new", layout="diffusers")
        assert not (tmp_path / "new").exists()

    def test_fuse_lora_is_refused_before_it_has_scaled_a_layer(self) -> None:
        from reslora_kernels.peft import ResLoRAPeftConfig

        model = unet()
        model.add_adapter(ResLoRAPeftConfig(r=2, target_modules=["to_q", "to_v"]))
        randomize(model)
        before = denoised(model)
        with pytest.raises(NotImplementedError, match="ResLoRA layers merge as one"):
            model.fuse_lora(lora_scale=0.5)
        assert torch.equal(denoised(model), before)


class TestCard:
    def test_says_what_it_is_how_exact_and_how_to_serve(self, tmp_path: Path) -> None:
        from huggingface_hub import ModelCard

        model = llama()
        model.config._name_or_path = "some/base"
        randomize(apply_reslora(model, ResLoRAConfig(r=3, shortcut="input")))
        report = export_peft(model, tmp_path, "least_squares", calibration=[FAMILIES["llama"].batch(1)])
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model == "some/base"
        assert card.data.library_name == "peft"
        assert {"lora", "reslora"} == set(card.data.tags)
        assert "shortcut `input`" in card.text and "least_squares" in card.text
        assert f"{report.relative_error:.2e}" in card.text
        assert all(f"| {name} |" in card.text for name in report.ranks)
        assert f"rank {report.max_lora_rank} " in card.text

    def test_a_base_in_a_folder_is_no_id_of_the_hub(self, tmp_path: Path) -> None:
        model = llama()
        model.config._name_or_path = str(tmp_path)
        export_peft(apply_reslora(model, ResLoRAConfig(r=3)), tmp_path)
        assert "base_model:" not in (tmp_path / "README.md").read_text()

    def test_of_ones_own_stays(self, tmp_path: Path) -> None:
        model = apply_reslora(roberta(), ResLoRAConfig(r=3))
        export_peft(model, tmp_path)
        export_peft(model, tmp_path)  # its own it replaces
        (tmp_path / "README.md").write_text("mine")
        export_peft(model, tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def adapted_stack(shortcut: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).eval()
    config = ResLoRAConfig(r=2, shortcut=shortcut, target_modules=["up", "down"])
    return randomize(apply_reslora(model, config, example_inputs=torch.randn(1, 4, 8)))


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non-strict", "strict"])
def test_an_export_serves_every_length(shortcut: str, strict: bool, tmp_path: Path) -> None:
    model, length = adapted_stack(shortcut), torch.export.Dim("length")
    exported = torch.export.export(model, (torch.randn(1, 4, 8),), dynamic_shapes=({1: length},), strict=strict)
    torch.export.save(exported, tmp_path / "model.pt2")
    x = torch.randn(1, 9, 8)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x), rtol=0, atol=0)
    assert not any("reslora" in str(node.target) for node in exported.graph.nodes)  # runs without this package


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes that are the same at every length
@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "exported"])
def test_onnx_runtime_serves_an_unmerged_model(shortcut: str, dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = adapted_stack(shortcut).double(), str(tmp_path / "model.onnx")
    dynamic: dict[str, Any] = {"dynamic_axes": {"x": {1: "length"}}}
    if dynamo:
        dynamic = {"dynamic_shapes": ({1: torch.export.Dim("length")},)}
    torch.onnx.export(model, (torch.randn(1, 4, 8).double(),), path, dynamo=dynamo, input_names=["x"], **dynamic)
    x = torch.randn(1, 9, 8).double()
    (y,) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-10, atol=1e-10)
