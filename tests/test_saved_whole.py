"""A model that is saved and loaded onto its base is the same model: shared, new, resized and imported parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    export_peft,
    load_adapter,
    load_peft_adapter,
    merge_reslora,
    save_adapter,
)
from reslora_kernels.adapt.checkpoints import beside
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.adapt.targets import with_heads_saved
from reslora_kernels.files.adapter_format import CONFIG_NAME, WEIGHTS_NAME
from reslora_kernels.peft import ResLoRAPeftConfig
from reslora_kernels.testing import relative_error

from .models import needs_transformers_5, randomize

TOKENS = torch.arange(3, 17).reshape(2, 7)
Q = ResLoRAConfig(r=3, target_modules=["q_proj"])


def tiny(tie: bool = False, seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(**{"vocab_size": 48, "tie_word_embeddings": tie, "pad_token_id": 0, **sizes, **changes})
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits


@torch.no_grad()
def trained(model: Any) -> Any:
    """As after training: every parameter that trains has moved."""
    randomize(model)
    adapters = {id(p) for layer in adapted_layers(model).values() for p in layer.adapter_parameters().values()}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in adapters:
            parameter.mul_(1.25).add_(0.05)
    return model


def same(model: Any, other: Any, tokens: Tensor = TOKENS, tolerance: float = 1e-5) -> bool:
    return float((logits(model, tokens) - logits(other, tokens)).abs().max()) <= tolerance


def with_peft(base: Any, path: Path) -> Any:
    return PeftModel.from_pretrained(base, str(path)).eval()


class TestLinkedFiles:
    """The Hub's cache: a snapshot of links to blobs."""

    @pytest.fixture
    def snapshot(self, tmp_path: Path) -> Path:
        model = trained(apply_reslora(tiny(), Q))
        save_adapter(model, tmp_path / "native")
        export_peft(model, tmp_path / "native")
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "blobs").mkdir()
        for number, file in enumerate((tmp_path / "native").iterdir()):
            blob = file.rename(tmp_path / "blobs" / str(number))
            (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / blob.name)
        return tmp_path / "snapshot"

    def test_are_followed(self, snapshot: Path) -> None:
        model = trained(apply_reslora(tiny(), Q))
        assert same(load_adapter(tiny(), snapshot), model)
        assert same(load_peft_adapter(tiny(), snapshot), model)

    def test_a_save_leaves_the_blobs_alone(self, snapshot: Path) -> None:
        before = {blob: blob.read_bytes() for blob in (snapshot.parent / "blobs").iterdir()}
        save_adapter(randomize(apply_reslora(tiny(), Q), seed=5), snapshot)
        assert {blob: blob.read_bytes() for blob in before} == before

    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, "adapter_config.json", "adapter_model.safetensors"])
    @pytest.mark.parametrize("kind", ["broken link", "link to a device", "pipe", "link to a pipe"])
    def test_what_is_no_file_is_refused(self, snapshot: Path, kind: str, name: str) -> None:
        file, pipe = snapshot / name, snapshot.parent / "pipe"
        file.unlink()
        if "pipe" in kind:
            os.mkfifo(file if kind == "pipe" else pipe)
        if kind != "pipe":
            file.symlink_to({"broken link": "gone", "link to a device": "/dev/zero", "link to a pipe": pipe}[kind])
        load = load_peft_adapter if name.startswith("adapter") else load_adapter
        with pytest.raises(ValueError, match=f"{name} must be a regular file or a link to one"):
            load(tiny(), snapshot)


class TestTiedEmbeddings:
    @pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
    def test_trained_are_written_under_both_names(self, name: str, tmp_path: Path) -> None:
        model = trained(apply_reslora(tiny(tie=True), Q.replace(modules_to_save=[name])))
        save_adapter(model, tmp_path)
        export_peft(model, tmp_path)
        for tie in (True, False):  # an untied base gets all of it
            assert same(load_adapter(tiny(tie), tmp_path), model)
            assert same(with_peft(tiny(tie), tmp_path), model)
            assert same(load_peft_adapter(tiny(tie), tmp_path), model)

    def test_adapter_that_trained_them_apart_is_refused_by_a_tied_model(self, tmp_path: Path) -> None:
        save_adapter(trained(apply_reslora(tiny(), Q.replace(modules_to_save=["lm_head"]))), tmp_path / "native")
        peft = get_peft_model(tiny(tie=True), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        peft.save_pretrained(tmp_path / "peft")
        model = tiny(tie=True)
        before = logits(model)
        for load, folder in ((load_adapter, "native"), (load_peft_adapter, "peft")):
            with pytest.raises(ValueError, match=r"'lm_head.weight' apart from 'model.embed_tokens.weight'.*untie"):
                load(model, tmp_path / folder)
        assert torch.equal(logits(model), before)

    def test_layer_in_two_places_is_not_exported(self, tmp_path: Path) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 4)
                self.b = self.a

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x))

        with pytest.raises(ValueError, match="layer 'a' is 'b' too"):
            export_peft(apply_reslora(Twice(), ResLoRAConfig(shortcut="none")), tmp_path / "new")
        assert not (tmp_path / "new").exists()


class TestTaskHead:
    """Loaded from a checkpoint of a language model, a classifier's head has random values each time."""

    # Transformers 4 saves no pooler of a BERT without a head, and draws it anew in each model
    @pytest.fixture(params=["llama", pytest.param("bert", marks=needs_transformers_5), "distilbert"])
    def classifier(self, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Any]:
        import transformers as t

        if request.param == "llama":
            tiny().save_pretrained(tmp_path / "base")
        elif request.param == "bert":
            sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
            t.BertForMaskedLM(t.BertConfig(vocab_size=48, **sizes)).save_pretrained(tmp_path / "base")
        else:
            config = t.DistilBertConfig(vocab_size=48, dim=32, hidden_dim=48, n_layers=1, n_heads=2)
            t.DistilBertForMaskedLM(config).save_pretrained(tmp_path / "base")

        def load(seed: int) -> Any:
            torch.manual_seed(seed)
            return t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2).eval()

        return load

    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "query", "q_lin"]], ids=["all-linear", "queries"])
    def test_is_trained_whole_and_saved(self, targets: Any, classifier: Callable[[int], Any], tmp_path: Path) -> None:
        model = trained(apply_reslora(classifier(1), ResLoRAConfig(r=3, target_modules=targets)))
        heads = [name for name, _ in model.named_parameters() if name.split(".")[0] in ("score", "classifier")]
        assert heads and all(model.get_parameter(name).requires_grad for name in heads)
        assert not {"score", "classifier", "pre_classifier"} & adapted_layers(model).keys()
        save_adapter(model, tmp_path / "adapter")
        export_peft(model, tmp_path / "peft")
        assert same(load_adapter(classifier(2), tmp_path / "adapter"), model)
        assert same(with_peft(classifier(2), tmp_path / "peft"), model)
        assert same(load_peft_adapter(classifier(2), tmp_path / "peft"), model)

    def test_is_found_by_transformers_and_by_pefts_auto_class(
        self, classifier: Callable[[int], Any], tmp_path: Path
    ) -> None:
        from peft import AutoPeftModel
        from transformers import AutoModelForSequenceClassification

        model = trained(apply_reslora(classifier(1), ResLoRAConfig(r=3)))
        export_peft(model, tmp_path / "peft")
        again = classifier(2)
        again.load_adapter(str(tmp_path / "peft"))
        assert same(again, model)
        assert same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "peft", num_labels=2).eval(), model)
        assert same(AutoPeftModel.from_pretrained(tmp_path / "peft", num_labels=2).eval(), model)

    def test_that_is_named_is_adapted_and_its_start_saved(
        self, classifier: Callable[[int], Any], tmp_path: Path
    ) -> None:
        model = apply_reslora(classifier(1), ResLoRAConfig(r=3, target_modules=["score", "classifier"]))
        assert adapted_layers(model).keys() <= {"score", "classifier"}
        trained(model)
        save_adapter(model, tmp_path / "adapter")
        export_peft(model, tmp_path / "peft")
        assert same(load_adapter(classifier(2), tmp_path / "adapter"), model)
        assert same(with_peft(classifier(2), tmp_path / "peft"), model)

    def test_that_its_user_froze_is_saved(self, classifier: Callable[[int], Any], tmp_path: Path) -> None:
        model = apply_reslora(classifier(1), ResLoRAConfig(r=3, target_modules=["q_proj", "query", "q_lin"]))
        model.requires_grad_(False)
        randomize(model)
        save_adapter(model, tmp_path)
        again = load_adapter(classifier(2), tmp_path)
        assert same(again, model)
        save_adapter(again, tmp_path / "again")  # and once more, from what came from the file
        assert same(load_adapter(classifier(3), tmp_path / "again"), model)


class TestEmbeddings:
    def resized(self, base: Path, seed: int) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(seed)
        model.resize_token_embeddings(56, mean_resizing=False)
        return model.eval()

    @pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
    def test_resized_are_saved(self, tie: bool, tmp_path: Path) -> None:
        tiny(tie).save_pretrained(tmp_path / "base")
        new = torch.arange(48, 56)[None]
        model = trained(apply_reslora(self.resized(tmp_path / "base", 1), Q))
        save_adapter(model, tmp_path / "adapter")
        export_peft(model, tmp_path / "peft")
        for again in (
            load_adapter(self.resized(tmp_path / "base", 2), tmp_path / "adapter"),
            load_peft_adapter(self.resized(tmp_path / "base", 2), tmp_path / "peft"),
            with_peft(self.resized(tmp_path / "base", 2), tmp_path / "peft"),
        ):
            assert same(again, model, new)
        assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)

    def test_as_large_as_before_are_not_saved(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        tiny().save_pretrained(tmp_path / "base")
        model = apply_reslora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), Q)
        save_adapter(model, tmp_path / "adapter")
        assert all("lora_" in key for key in load_file(tmp_path / "adapter" / WEIGHTS_NAME))

    def test_of_a_peft_adapter_reach_the_next_save_and_export(self, tmp_path: Path) -> None:
        def base(seed: int) -> Any:
            model = tiny()
            torch.manual_seed(seed)
            model.resize_token_embeddings(56, mean_resizing=False)
            return model.eval()

        peft = get_peft_model(base(1), LoraConfig(r=3, target_modules=["q_proj"]))
        peft.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
        model = load_peft_adapter(base(2), tmp_path / "peft")
        save_adapter(model, tmp_path / "native")
        export_peft(model, tmp_path / "again")
        new = torch.arange(48, 56)[None]
        for again in (load_adapter(base(3), tmp_path / "native"), with_peft(base(3), tmp_path / "again")):
            assert same(again, peft, new)

    def test_resized_after_adapting_name_the_layer_that_is_gone(self, tmp_path: Path) -> None:
        model = apply_reslora(tiny(), Q.replace(target_modules=["q_proj", "lm_head"]))
        model.resize_token_embeddings(56, mean_resizing=False)
        for act in (lambda: save_adapter(model, tmp_path / "new"), lambda: export_peft(model, tmp_path / "new"),
                    lambda: merge_reslora(model)):  # fmt: skip
            with pytest.raises(ValueError, match=r"'lm_head'.*resize_token_embeddings"):
                act()
        assert not (tmp_path / "new").exists()


class TestNothingIsSavedThatCannotBeLoaded:
    @pytest.mark.parametrize("fault", ["NaN", "Inf", "shape", "no layer", "ZeRO-3"])
    def test_the_good_adapter_stays(self, fault: str, tmp_path: Path) -> None:
        good = trained(apply_reslora(tiny(), Q))
        save_adapter(good, tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        model = randomize(apply_reslora(tiny(), Q), seed=3)
        layer = model.model.layers[1].self_attn.q_proj
        if fault in ("NaN", "Inf"):
            layer.lora_B.data[0, 0] = float(fault)
        elif fault == "shape":
            layer.lora_A.data = layer.lora_A.data[:2]
        elif fault == "no layer":
            model.model.layers[1].self_attn.q_proj = layer.leave()
        else:
            for parameter in layer.parameters():
                parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj"):
            save_adapter(model, tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert same(load_adapter(tiny(), tmp_path), good)

    def test_nan_in_a_trained_head(self, tmp_path: Path) -> None:
        model = trained(apply_reslora(tiny(), Q.replace(modules_to_save=["lm_head"])))
        model.lm_head.weight.data[0, 0] = float("nan")
        for act in (save_adapter, export_peft):
            with pytest.raises(ValueError, match=r"lm_head\.weight.*NaN"):
                act(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_quantised_layers_biases_go_by_their_plain_names(tmp_path: Path) -> None:
    import transformers as t

    tiny(attention_bias=True, hidden_size=64).save_pretrained(tmp_path / "base")

    def base() -> Any:
        settings = t.BitsAndBytesConfig(load_in_4bit=True)
        return t.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")

    model = trained(apply_reslora(base(), Q.replace(bias="lora_only", shortcut="none")))
    save_adapter(model, tmp_path / "adapter")
    export_peft(model, tmp_path / "peft")
    assert "model.layers.0.self_attn.q_proj.bias" in load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    for again in (load_adapter(base(), tmp_path / "adapter"), load_peft_adapter(base(), tmp_path / "peft")):
        layer = again.model.layers[0].self_attn.q_proj
        assert torch.equal(layer.bias, model.model.layers[0].self_attn.q_proj.bias)


class HeadForSequenceClassification(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"query": nn.Linear(4, 4)})
        self.classifier = nn.ModuleDict({"dense": nn.Linear(4, 4), "out": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("wanted", "saved"),
    [
        (["query"], ("classifier",)),
        (["query", "dense"], None),
        (["query", "classifier.out"], None),
        ("all-linear", ("classifier",)),
    ],
)
def test_a_head_is_trained_whole_unless_a_layer_of_it_is_named(wanted: Any, saved: Any) -> None:
    model, config = HeadForSequenceClassification(), ResLoRAConfig(r=2, target_modules=wanted)
    assert with_heads_saved(config, model).modules_to_save == saved
    named = config.replace(modules_to_save=["classifier"])
    assert with_heads_saved(named, model) == named


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("whole", [None, ["normalization"]])
def test_running_statistics_go_with_the_adapter(whole: list[str] | None, tmp_path: Path) -> None:
    """They move in training though their layer is frozen; PEFT alone saves them with modules_to_save only."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            return model(images).logits  # type: ignore[no-any-return]

    config = ResLoRAConfig(r=2, shortcut="none", target_modules=["convolution"], modules_to_save=whole)
    resnet().save_pretrained(tmp_path / "base")  # as from the Hub: the model knows where it comes from
    model = apply_reslora(type(resnet()).from_pretrained(tmp_path / "base"), config)
    assert not any("running" in name for name in beside(model).frozen)
    model.train()
    for _ in range(3):
        run(model)
    model.eval()
    expected, moved = run(model), beside(model).frozen.keys()
    assert relative_error(expected, run(resnet())) > 0.01
    save_adapter(model, tmp_path / "native")
    loaded = load_adapter(resnet(), tmp_path / "native")
    assert torch.equal(run(loaded), expected)
    assert beside(loaded).frozen.keys() == moved
    export_peft(model, tmp_path / "peft")
    by_transformers = resnet()
    by_transformers.load_adapter(str(tmp_path / "peft"))
    by_peft = PeftModel.from_pretrained(resnet(), str(tmp_path / "peft"))
    for each in (by_peft, by_transformers, load_peft_adapter(resnet(), tmp_path / "peft")):
        assert relative_error(run(each.eval()), expected) < 1e-5


def test_running_statistics_under_peft(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = get_peft_model(resnet(), ResLoRAPeftConfig(r=2, target_modules=["classifier.1"])).train()
    for _ in range(3):
        model(images)
    expected = model.eval()(images).logits
    model.save_pretrained(tmp_path)
    loaded = resnet()
    loaded.load_adapter(str(tmp_path))
    for each in (loaded, with_peft(resnet(), tmp_path)):
        assert torch.equal(each.eval()(images).logits, expected)
