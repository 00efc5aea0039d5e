"""Transformers' Trainer with ResLoRACallback and AdapterCheckpoints; losses that read a head; sharding's refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    collect_statistics,
    disable_adapter,
    load_adapter,
    merge_reslora,
    shard_reslora,
    unload,
)
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.peft import ResLoRAPeftConfig
from reslora_kernels.reference import chain_forward
from reslora_kernels.testing import relative_error
from reslora_kernels.training import STATISTICS_NAME, AdapterCheckpoints, ResLoRACallback

from .conftest import make_tokenizer
from .distributed.residual import SHORTCUTS, Block, residual
from .models import FAMILIES, llama, randomize

SETTINGS = {"norm_window": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    batch = FAMILIES["llama"].batch(5)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in batch.repeat(2, 1)[:count]]


def trainer(folder: Path, shortcut: str, callback: Any, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    class ResLoRATrainer(AdapterCheckpoints, Trainer):
        pass

    model = llama()
    torch.manual_seed(3)
    apply_reslora(model, ResLoRAConfig(r=2, shortcut=shortcut, pre_num=1, merge="input", **SETTINGS))
    options = {
        "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.02, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "logging_steps": 1, **arguments,
    }  # fmt: skip
    return ResLoRATrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[callback],
    )


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("shortcut", "moments"), [("input", False), ("middle", True)])
def test_resumes_exactly(shortcut: str, moments: bool, tmp_path: Path) -> None:
    """Adapters, optimizer, learning rate, dropout masks and what the merge will use: bit for bit."""
    one, two = (ResLoRACallback(second_moments=moments) for _ in range(2))
    straight = trainer(tmp_path / "run", shortcut, one, gradient_accumulation_steps=2)
    straight.train()
    resumed = trainer(tmp_path / "run", shortcut, two, gradient_accumulation_steps=2)
    (tmp_path / "run" / "checkpoint-3").rename(tmp_path / "elsewhere")
    resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert_same(trained(straight.model), trained(resumed.model))
    assert_same(one.statistics.state_dict(), two.statistics.state_dict())
    assert one.statistics.calls == 12  # a batch each, evaluation not among them
    assert all(layer.observer is None for layer in adapted_layers(straight.model).values())


def train_until_killed(folder: str, writer: str) -> None:
    """In a process of its own: at step 6 it kills itself with SIGKILL in place of a write of the checkpoint."""
    run = trainer(Path(folder), "input", callback := ResLoRACallback(second_moments=True), max_steps=8)
    owner = callback if writer.startswith("on") else run
    write = getattr(owner, writer)

    def die(*args: Any, **kwargs: Any) -> Any:
        if run.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **kwargs)

    setattr(owner, writer, die)
    run.train()


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "newest"), [("_save", 3), ("_save_rng_state", 3), ("on_save", 6)])
def test_killed_between_the_writes_of_a_checkpoint(writer: str, newest: int, tmp_path: Path) -> None:
    """The checkpoint with the Trainer's state, which is written last, is whole; resumed from there it ends the same."""
    straight = trainer(tmp_path / "straight", "input", one := ResLoRACallback(second_moments=True), max_steps=8)
    straight.train()
    code = f"from tests.test_training import train_until_killed as t; t({str(tmp_path / 'killed')!r}, {writer!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    whole = max((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")).parent
    assert whole.name == f"checkpoint-{newest}"
    resumed = trainer(tmp_path / "killed", "input", two := ResLoRACallback(second_moments=True), max_steps=8)
    resumed.train(resume_from_checkpoint=str(whole))
    assert_same(trained(straight.model), trained(resumed.model))
    assert_same(one.statistics.state_dict(), two.statistics.state_dict())


def test_without_the_mixin_it_finds_the_checkpoint_by_its_step(tmp_path: Path) -> None:
    callback = ResLoRACallback()
    first = trainer(tmp_path, "input", callback, max_steps=3)
    first.train()
    second = trainer(tmp_path, "input", other := ResLoRACallback(), max_steps=3)
    first.state.global_step = 3
    other.on_train_begin(second.args, first.state, second.control, model=second.model)
    assert_same(other.statistics.state_dict(), callback.statistics.state_dict())
    (tmp_path / "checkpoint-3" / STATISTICS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="saved without a ResLoRACallback"):
        other.on_train_begin(second.args, first.state, second.control, model=second.model)
    (tmp_path / "checkpoint-3" / STATISTICS_NAME).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        other.on_train_begin(second.args, first.state, second.control, model=second.model)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_merged_evaluation(shortcut: str, tmp_path: Path) -> None:
    """The evaluation sees what a merge by hand gives; training goes on as if there had been none."""
    evaluations = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "save_strategy": "no"}
    callback = ResLoRACallback(evaluate="merged")
    merged = trainer(tmp_path / "merged", shortcut, callback, **evaluations)
    before = {name: t.clone() for name, t in merged.model.state_dict().items() if "lora" not in name}
    merged.train()
    plain = trainer(tmp_path / "plain", shortcut, ResLoRACallback(), **evaluations)
    plain.train()
    assert_same(trained(merged.model), trained(plain.model))
    assert_same(before, {name: t for name, t in merged.model.state_dict().items() if "lora" not in name})
    seen, unmerged = ([e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (merged, plain))
    assert seen[0] == unmerged[0] and all(a != b for a, b in zip(seen[1:], unmerged[1:], strict=True))
    assert merged.evaluate()["eval_loss"] == unmerged[-1]
    merge_reslora(merged.model, statistics=callback.statistics)
    assert merged.evaluate()["eval_loss"] == seen[-1]


def test_merged_evaluation_with_calibration_at_epochs_and_after_an_error(tmp_path: Path) -> None:
    """Calibration in place of statistics; an evaluation that fails leaves nothing merged for the next training."""
    batches = [{"input_ids": row["input_ids"][None]} for row in rows(3)]
    callback = ResLoRACallback(evaluate="merged", method="least_squares", calibration=batches)
    run = trainer(tmp_path, "input", callback, max_steps=-1, num_train_epochs=1, eval_strategy="epoch")
    evaluate = run.evaluate
    run.evaluate = lambda *_, **__: (_ for _ in ()).throw(ArithmeticError("planted"))
    with pytest.raises(ArithmeticError):
        run.train()
    assert all(layer.merged for layer in adapted_layers(run.model).values())
    run.evaluate = evaluate
    run.train()
    assert not any(layer.merged for layer in adapted_layers(run.model).values())
    run.eval_dataset = {"one": rows(2), "two": rows(4)}
    with pytest.raises(ValueError, match="one evaluation data set"):
        run.train()
    assert not any(layer.merged for layer in adapted_layers(run.model).values())


def test_state_of_statistics_is_checked() -> None:
    model, other = llama(), llama()
    apply_reslora(model, ResLoRAConfig(r=2, shortcut="middle", target_modules=["q_proj"]))
    apply_reslora(other, ResLoRAConfig(r=3, shortcut="middle", target_modules=["v_proj"]))
    with collect_statistics(model) as statistics:
        model(**FAMILIES["llama"].batch(0))
    with collect_statistics(model) as fresh:
        pass
    fresh.load_state_dict(statistics.state_dict())
    assert_same(fresh.state_dict(), statistics.state_dict())
    with collect_statistics(other) as foreign, pytest.raises(ValueError, match="no adapted layer"):
        foreign.load_state_dict(statistics.state_dict())
    state = statistics.state_dict()
    name = next(key for key in state if key.endswith("/gram"))
    with pytest.raises(ValueError, match="state must hold"):
        fresh.load_state_dict({**state, name: state[name][:1]})
    del state[name]
    with pytest.raises(ValueError, match="state must hold"):
        fresh.load_state_dict(state)


@pytest.mark.parametrize(
    "arguments", [{"evaluate": "both"}, {"method": "average"}, {"calibration": iter([])}], ids=lambda a: next(iter(a))
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ResLoRACallback(**arguments)


@pytest.mark.slow
def test_importing_it_needs_no_transformers_and_leaves_fsdp_alone() -> None:
    code = "import sys, reslora_kernels as r, reslora_kernels.training; r.shard_reslora; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "reslora_kernels.training" in modules
    assert not {"transformers", "torch.distributed.fsdp"} & set(modules)


def test_a_checkpoint_is_an_adapter(tmp_path: Path) -> None:
    run = trainer(tmp_path, "input", ResLoRACallback(), max_steps=3)
    run.train()
    model = load_adapter(llama(), tmp_path / "checkpoint-3")
    assert_same(trained(model), trained(run.model))


WEIGHTS = {"model.safetensors", "config.json", "generation_config.json"}  # the plain Trainer's, of the whole model
ADAPTER = {"reslora_config.json", "reslora_model.safetensors"}


class ResLoRATrainer(AdapterCheckpoints, Trainer):
    pass


def trainer_of(kind: type[Trainer], model: Any, folder: Path, **more: Any) -> Any:
    ids = FAMILIES["llama"].batch(5)["input_ids"].repeat(2, 1)
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.02}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    return kind(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids], **more)


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    return apply_reslora(model, ResLoRAConfig(r=2, shortcut="input", target_modules=["q_proj", "v_proj"]))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_it_writes_what_the_trainer_writes(tmp_path: Path) -> None:
    for kind, model in ((Trainer, llama()), (ResLoRATrainer, adapted(llama()))):
        run = trainer_of(kind, model, tmp_path / kind.__name__, processing_class=make_tokenizer())
        run.train()
        run.save_model(str(tmp_path / kind.__name__ / "saved"))
    for folder in ("checkpoint-4", "saved"):
        plain, adapters = files(tmp_path / "Trainer" / folder), files(tmp_path / "ResLoRATrainer" / folder)
        assert plain >= WEIGHTS and {"tokenizer.json", "training_args.bin"} <= plain
        assert adapters == plain - WEIGHTS | ADAPTER


def with_head(tied: bool, **changes: Any) -> Any:
    model = llama()
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return apply_reslora(model, ResLoRAConfig(**{"r": 2, "target_modules": ["q_proj"], **changes}))


def fused(model: Any) -> Any:
    """``model`` with the loss of TRL's trainers, which reads the weight of the head."""
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL runs the head")
    utils.add_fused_lm_head(model)
    return model


class TestFusedHeads:
    IDS = torch.tensor([[4, 5, 6, 7, 4, 8]])

    @pytest.mark.parametrize(
        ("tied", "changes"),
        [
            (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
            (True, {"trainable_token_indices": [4, 7]}),
            (False, {"trainable_token_indices": {"lm_head": [4, 7]}}),
        ],
    )
    def test_trained_tokens_and_tied_adapters_have_their_say(self, tied: bool, changes: dict[str, Any]) -> None:
        model = randomize(with_head(tied, **changes))
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = model(self.IDS, labels=self.IDS).loss
        expected = torch.autograd.grad(loss, parameters)
        per_token = fused(model)(self.IDS, labels=self.IDS, fused_lm_head=True).log_probs
        torch.testing.assert_close(-per_token.sum() / 5, loss)
        found = torch.autograd.grad(-per_token.sum() / 5, parameters)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert type(unload(model).lm_head) is nn.Linear

    @pytest.mark.parametrize(
        ("tied", "changes"),
        [
            (False, {"target_modules": ["q_proj", "lm_head"]}),
            (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, "lora_dropout": 0.1}),
        ],
    )
    def test_what_it_cannot_read_is_refused(self, tied: bool, changes: dict[str, Any]) -> None:
        model = fused(randomize(with_head(tied, **changes))).train()
        with pytest.raises(RuntimeError, match=r"has not run 'lm_head'.*TRL"):
            model(self.IDS, labels=self.IDS, fused_lm_head=True)
        model.eval()
        with disable_adapter(model):
            model(self.IDS, labels=self.IDS, fused_lm_head=True)
        loss = model(self.IDS, labels=self.IDS).loss
        merge_reslora(model)
        per_token = model(self.IDS, labels=self.IDS, fused_lm_head=True).log_probs
        torch.testing.assert_close(-per_token.sum() / 5, loss)

    def test_under_peft(self) -> None:
        config = ResLoRAPeftConfig(r=2, target_modules=["q_proj", "lm_head"])
        model = get_peft_model(llama(), config)
        fused(model.base_model.model)
        with pytest.raises(RuntimeError, match=r"has not run 'lm_head'"):
            model(self.IDS, labels=self.IDS, fused_lm_head=True)


QUANTIZED = {
    "NF4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def quantized(kind: str, folder: Path) -> Any:
    """The small model loaded quantised, as Transformers does it."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = QUANTIZED[kind]
    if not folder.exists():
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_key_value_heads": 4,
        }  # what bitsandbytes packs on CPUs
        shape = LlamaConfig(**{**llama().config.to_dict(), **sizes, "head_dim": 16})
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("kind", ["NF4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "torchao"))])
def test_a_quantised_base_trains_and_resumes(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    run = trainer_of(ResLoRATrainer, adapted(quantized(kind, base)), tmp_path / "run")
    assert run.model.is_quantized
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    trained = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    assert all(not torch.equal(trained[name], before[name]) for name in trained)
    resumed = trainer_of(ResLoRATrainer, adapted(quantized(kind, base)), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    loaded = load_adapter(quantized(kind, base), tmp_path / "run" / "checkpoint-4")
    for model in (resumed.model, loaded):
        found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], trained[name]) for name in found)


def test_without_adapters_a_quantised_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(ResLoRATrainer, quantized("NF4", tmp_path / "base"), tmp_path / "run")


def merged() -> nn.Module:
    model = residual("block")
    merge_reslora(model)
    return model


def other_dtype() -> nn.Module:
    model = residual("block")
    model.head.bias = nn.Parameter(model.head.bias.detach().float())
    return model


@pytest.mark.parametrize(
    ("make", "blocks", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), lambda m: [], ValueError, "no ResLoRA adapters"),
        (lambda: residual("block"), lambda m: [], ValueError, "at least one module"),
        (lambda: residual("block"), lambda m: 3, TypeError, "blocks must be modules"),
        (lambda: residual("block"), lambda m: ["blocks.0"], TypeError, r"blocks\[0\] must be an nn.Module, got str"),
        (lambda: residual("block"), lambda m: [m], ValueError, "the model itself"),
        (lambda: residual("block"), lambda m: [nn.Linear(2, 2)], ValueError, "a Linear that is not in the model"),
        (lambda: residual("block"), lambda m: [m.head, m.head], ValueError, "same module twice"),
        (lambda: residual("block"), lambda m: m.blocks, RuntimeError, "init_process_group"),
        (merged, lambda m: m.blocks, ValueError, "unmerge_reslora"),
        (other_dtype, lambda m: m.blocks, ValueError, "'head.bias' is torch.float32"),
    ],
)
def test_shard_reslora_refuses(
    make: Callable[[], nn.Module], blocks: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        shard_reslora(model, blocks(model))
    assert [name for name, _ in model.named_modules()] == before


def test_adapters_must_not_be_ignored() -> None:
    model = residual("block")
    with pytest.raises(ValueError, match="ignored_params must not hold adapters"):
        shard_reslora(model, model.blocks, ignored_params={model.blocks[0].up.lora_A})


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_chains_end_at_stage_borders(shortcut: str) -> None:
    """Every stage's layers compute what the reference computes for chains of that stage alone."""
    torch.manual_seed(0)
    stages = [nn.Sequential(*(Block(12, 18) for _ in range(count))).double() for count in (2, 3)]
    config = ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, pre_num=-1)
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for stage in stages:
        randomize(apply_reslora(stage, config, example_inputs=torch.zeros(1, 2, 12, dtype=torch.float64)))
        for layer in adapted_layers(stage).values():
            layer.register_forward_hook(lambda m, args, y: calls.update({m: (args[0], y)}))
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    for stage in stages:
        x = stage(x)
    for stage, length in zip(stages, (2, 3), strict=True):
        assert [len(chain) for chain in record_of(stage).chains] == [length, length]
        for chain in record_of(stage).chains:
            xs, ys = zip(*(calls[layer] for layer in chain.layers), strict=True)
            weights, biases = [layer.weight for layer in chain.layers], [layer.bias for layer in chain.layers]
            loras = [[getattr(layer, kind) for layer in chain.layers] for kind in ("lora_A", "lora_B")]
            truth = chain_forward(shortcut, -1, config.scaling, list(xs), weights, biases, *loras)
            assert max(relative_error(y, expected) for y, expected in zip(ys, truth, strict=True)) < 1e-14
