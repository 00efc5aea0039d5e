"""``reslora plan``: its arithmetic, what it counts against a real run, and the tables of docs/howto/many-gpus.md.

python -m tests.cli.test_plan writes those tables anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from reslora_kernels import ResLoRAConfig, apply_reslora, host
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.cli import main
from reslora_kernels.cli.options import adapted_without_weights
from reslora_kernels.cli.plan import blocks_of, cut_parameters, sizes_of
from reslora_kernels.forward_state import ForwardState
from reslora_kernels.training.many_gpus import Sizes, Split, footprints, zero3

from ..models import llama

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "many-gpus.md"
SHORTCUTS = ("none", "input", "block", "middle")
needs_a_run = pytest.mark.skipif(
    transformers.__version__ < "5", reason="rotary embeddings of Transformers 4 do not run without weights"
)
TOKENS = 400  # of each of two rows; more values than small calls have, which save other tensors


def by_hand() -> Sizes:
    return Sizes(
        blocks=Split(800, 80), block=Split(200, 20), around=Split(100, 20), quantizable=400, widest=50, weight_bytes=2,
        adapters=Split(30, 10), block_count=4, inside=Split(8, 4), block_inside=Split(2, 1), block_input=1, outside=3,
        handed=0.5, summed=(2, 1), heads=2,
    )  # fmt: skip


def test_arithmetic() -> None:
    """Every layout of four GPUs, by hand: of 10 tokens."""
    found = {one.layout: one for one in footprints(by_hand(), 4, 10)}
    assert list(found) == ["DDP", "FSDP2", "TP 2 x FSDP2 2", "ZeRO-3", "NF4 + DDP", "NF4 + FSDP2"]
    ddp, fsdp, plan, nf4 = (found[name] for name in ("DDP", "FSDP2", "TP 2 x FSDP2 2", "NF4 + DDP"))
    assert (ddp.weights, ddp.adapters, ddp.optimizer, ddp.sent) == (1000, 80, 80, 2 * 3 / 4 * 40)
    assert (ddp.activations, ddp.recomputed) == (150, 10 * (4 * 1 + 3 + 3 + 0.5))
    assert (fsdp.weights, fsdp.gathered, fsdp.adapters, fsdp.optimizer) == (250, 2 * 220 + 120, 20 + 80, 20)
    assert fsdp.sent == 3 / 4 * (2 * 880 + 120 + 2 * 40)
    blocks, around, adapters = 480, 70, 25
    assert (plan.weights, plan.gathered) == ((blocks + around) / 2, 2 * 120 + around)
    assert (plan.adapters, plan.optimizer, plan.activations) == (adapters + 2 * adapters, adapters, 10 * (4 + 4 + 3))
    assert plan.sent == 1 / 2 * (2 * blocks + around + 2 * adapters) + 2 * 1 / 2 * (3 * 10 + 10)
    assert nf4.weights == pytest.approx(1000 - 400 * (2 - 0.5625))
    assert nf4.gathered == 50
    packed = found["NF4 + FSDP2"]
    assert packed.weights == pytest.approx((1000 - 400 * (2 - 0.5)) / 4 + 400 / 16)
    assert packed.gathered == pytest.approx(2 * 220 * (1 - 600 / 880) + 120 + 50)
    zero = found["ZeRO-3"]
    assert zero == replace(fsdp, layout="ZeRO-3", gathered=1000, optimizer=30, sent=3 / 4 * (2 * 1000 + 3 * 40))
    assert zero3(replace(by_hand(), around=Split(4e9)), 4, 10).gathered == 2e9
    assert [ddp.fits(memory) for memory in (1310, 1309, 1264)] == ["yes", "with checkpointing", "no"]


@needs_a_run
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_activations_are_those_that_a_run_keeps(shortcut: str) -> None:
    """The same model with values, on other tokens: every tensor that autograd keeps, but weights and T x T ones."""
    config = ResLoRAConfig(r=8, shortcut=shortcut, pre_num=-1)
    sizes = sizes_of(adapted_without_weights(llama().config, config, False))
    model: Any = apply_reslora(llama(), config).train()
    model.set_attn_implementation("eager")  # as on the meta device
    kept: dict[int, Tensor] = {p.untyped_storage()._cdata: p for p in model.parameters()}
    weights = len(kept)

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] != (TOKENS, TOKENS):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    ids = torch.zeros(2, TOKENS, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in list(kept.values())[weights:])
    # Without the host extension u of the first layer that reads x is kept twice: by itself, and in h of all of them.
    close = 0.02 if host.module is not None else 0.1
    assert sizes.inside.total + sizes.outside == pytest.approx(bytes_kept / (2 * TOKENS), rel=close)


@needs_a_run
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_layer_hands_on_r_values_a_token_and_never_more(shortcut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ResLoRAConfig(r=8, shortcut=shortcut, pre_num=-1)
    model = apply_reslora(llama(), config)
    sizes = sizes_of(adapted_without_weights(llama().config, config, False))
    handed: list[int] = []
    hand_on = ForwardState.hand_on

    def count(state: ForwardState, earlier: tuple[Tensor, ...], h: Tensor) -> None:
        handed.append(h.numel())
        assert not earlier
        hand_on(state, earlier, h)

    monkeypatch.setattr(ForwardState, "hand_on", count)
    model(input_ids=torch.zeros(2, 9, dtype=torch.int64))
    handing_on = (
        len(adapted_layers(model)) - 7 if shortcut in ("input", "middle") else 0
    )  # the last of each of 7 chains
    assert handed == [2 * 9 * 8] * handing_on
    assert sizes.handed == handing_on * 8 * 4


@needs_a_run
def test_sizes_add_up() -> None:
    config = ResLoRAConfig(r=8)
    model = adapted_without_weights(llama().config, config, False)
    sizes, adapted = sizes_of(model), adapted_layers(model)
    own = {id(p) for layer in adapted.values() for p in layer.adapter_parameters().values()}
    frozen = sum(p.numel() * 4 for p in model.parameters() if id(p) not in own)
    assert sizes.weights.total == frozen
    assert sizes.adapters.total == sum(4 * 8 * (one.in_features + one.out_features) for one in adapted.values())
    assert [name for name, _ in blocks_of(model)] == [f"model.layers.{n}" for n in range(3)]
    assert {name.split(".")[-2] for name in cut_parameters(model)} >= {"q_proj", "down_proj"}
    rowwise = [one for name, one in adapted.items() if name.endswith(("o_proj", "down_proj"))]
    colwise = [one for name, one in adapted.items() if not name.endswith(("o_proj", "down_proj"))]
    cut = sum(one.lora_A.numel() for one in rowwise) + sum(one.lora_B.numel() for one in colwise)
    assert sizes.adapters.cut == 4 * cut


def test_a_model_that_does_not_run_without_weights_is_named(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("unsupported scalarType")

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    assert main(["plan", str(base), "--gpus", "4"]) == 2
    assert "LlamaForCausalLM without weights, which failed (RuntimeError: unsupported" in capsys.readouterr().err


@needs_a_run
def test_command(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(base), "--gpus", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["layout"] for row in report["layouts"]] == [
        "DDP", "FSDP2", "TP 2 x FSDP2 2", "ZeRO-3", "NF4 + DDP", "NF4 + FSDP2",
    ]  # fmt: skip
    assert {row["fits"] for row in report["layouts"]} == {"yes"}
    assert main(["plan", str(base), "--gpus", "2", "--gpu-memory", "0.00001"]) == 0
    shown = capsys.readouterr().out
    assert "TP 2 " in shown
    assert "yes" not in shown
    assert main(["plan", str(base), "--gpus", "4", "--tp", "3"]) == 2
    assert "--tp must divide --gpus 4, got 3" in capsys.readouterr().err


def with_tables(page: str) -> str:
    """The page with what each of its commands prints, for the configuration that stands last before it."""
    with tempfile.TemporaryDirectory() as folder:

        def run(found: re.Match[str]) -> str:
            head, config, command = found["head"], page[: found.start()].rpartition("```json\n")[2], found["command"]
            program, verb, name, *options = shlex.split(command)
            assert (program, verb) == ("reslora", "plan")
            (Path(folder) / name).mkdir(exist_ok=True)
            (Path(folder) / name / "config.json").write_text(config.partition("```")[0])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert main([verb, str(Path(folder) / name), *options]) == 0
            return f"{head}{printed.getvalue()}```\n"

        pattern = r"(?P<head>```sh\n(?P<command>reslora plan [^\n]*)\n```\n\n```text\n)[^`]*```\n"
        return re.sub(pattern, run, page)


@pytest.mark.slow
def test_tables_of_the_page_are_the_commands() -> None:
    page = PAGE.read_text()
    assert page.count("```text") == 4
    assert with_tables(page) == page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
