"""Libraries that train an adapted model as it is, each where it is installed: checkpoints and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reslora_kernels import ResLoRAConfig, apply_reslora, export_peft, load_adapter
from reslora_kernels.training import AdapterCheckpoints

from .cli.conftest import PROSE, make_tokenizer
from .models import FAMILIES, llama

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
