"""The convergence benchmarks on a model and data that the caller names, in the formats of the paper's data sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.convergence.__main__ import app
from benchmarks.convergence.methods import adapted, base_of
from benchmarks.convergence.runs import read_all
from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks import given_task
from benchmarks.convergence.tasks.kinds import Task
from benchmarks.convergence.tasks.language import final_answer

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

SIZES = Sizes(sequence=48)
WORDS = ("apple", "book", "coin", "pen", "shell", "stamp", "tree", "river", "house", "cloud", "stone", "lamp")
GSM8K = [{"question": f"{w} costs {i} and {i}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i, w in enumerate(WORDS)]
TABLES = {
    "gsm8k": (GSM8K, "exact_match"),
    "svamp": ([{"Body": w, "Question": "How many?", "Answer": float(i)} for i, w in enumerate(WORDS)], "exact_match"),
    "mathqa": (
        [{"Problem": w, "options": "a ) 38 , b ) 27.5 , c ) none", "correct": "abc"[len(w) % 3]} for w in WORDS],
        "accuracy",
    ),
    "hellaswag": (
        [{"ctx": f"A {w}", "endings": ["is.", "runs away.", "is"][: 2 + i % 2], "label": str(i % 2)}
         for i, w in enumerate(WORDS)],
        "accuracy",
    ),
    "completions": ([{"prompt": f"{w}: ", "completion": w[::-1]} for w in WORDS], "exact_match"),
    "text": ([{"text": f"the {w} and the {w}"} for w in WORDS], None),
}  # fmt: skip
PAIRS = {
    "sst2": [{"sentence": f"a {w}", "label": i % 2} for i, w in enumerate(WORDS)],
    "mrpc": [{"sentence1": w, "sentence2": w[::-1], "label": i % 2} for i, w in enumerate(WORDS)],
    "qnli": [{"question": w, "sentence": w * 2, "label": ("no", "yes")[i % 2]} for i, w in enumerate(WORDS)],
    "mnli": [{"premise": w, "hypothesis": "so", "label": i % 3, "idx": i} for i, w in enumerate(WORDS)],
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterable[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


def tokenizer(folder: Path, length: int = 64) -> int:
    """Train a byte-level BPE, save it and return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=length, **names).save_pretrained(folder)
    return bpe.get_vocab_size()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=tokenizer(folder), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import RobertaConfig, RobertaForMaskedLM

    folder = tmp_path_factory.mktemp("roberta")
    config = RobertaConfig(
        vocab_size=tokenizer(folder), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=68, type_vocab_size=1, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def diffusion(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("diffusion")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=tokenizer(folder / "tokenizer", 12), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    diffusers.PNDMScheduler(prediction_type=request.param).save_pretrained(folder / "scheduler")
    return str(folder)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[dict[str, list[dict[str, Any]]]], str]:
    """Writes tables as JSONL by file name; returns the folder."""

    def write(files: dict[str, list[dict[str, Any]]]) -> str:
        for name, rows in files.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)

    return write


def images(folder: Path, caption: str = "text", parts: Iterable[str] = ("train", "test")) -> str:
    from PIL import Image

    for part in parts:
        (folder / part).mkdir(parents=True)
        lines = []
        for i, word in enumerate(WORDS[:4]):
            Image.new("RGB", (20, 16), (60 * i, 10, 200)).save(folder / part / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", caption: f"a {word}"}))
        (folder / part / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def runs(task: Task, sizes: Sizes, folder: Path, methods: Iterable[str] = ("lora", "block")) -> dict[str, float]:
    """One training step with each method; the figures at its end."""
    base = base_of(task, sizes, folder, torch.device("cpu"))
    assert task.comes_trained and not list(folder.glob("*.safetensors"))
    batch, again = task.train(sizes, 2, 3, 0)[1], task.train(sizes, 2, 3, 0)[1]
    held_out = task.held_out(sizes, 4)
    for one, other in ((batch, again), (held_out, task.held_out(sizes, 4))):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(
        not torch.equal(batch[n], o) for n, o in task.train(sizes, 2, 3, 1)[1].items() if o.shape == batch[n].shape
    )
    for method in methods:
        model = adapted(base, task, method, 10, 0)
        start = task.figures(model, held_out)["loss"]
        assert start == pytest.approx(task.figures(base, held_out)["loss"], rel=1e-4)
        with torch.no_grad():
            assert start == pytest.approx(float(task.loss(model.eval(), held_out)), rel=1e-4)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            task.loss(model.train(), batch).backward()
            optimizer.step()
        assert task.figures(model, batch)["loss"] < task.figures(base, batch)["loss"]
        found = task.figures(model, held_out) | task.final_figures(model, held_out)
        assert found.keys() == {"loss", *task.metrics} and all(-1 <= found[name] <= 1 for name in task.metrics)
    return found


@pytest.mark.parametrize("name", TABLES)
def test_decoder(name: str, llama: str, written: Any, tmp_path: Path) -> None:
    rows, metric = TABLES[name]
    task = given_task("decoder", llama, written({"train.jsonl": rows, "test.jsonl": rows[:5]}))
    assert task.metrics == ((metric,) if metric else ())
    runs(task, SIZES, tmp_path, ("lora", "block") if name in ("gsm8k", "hellaswag") else ("block",))
    assert set(task.targets) == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    }  # fmt: skip


def test_only_the_answer_counts(llama: str, written: Any) -> None:
    task: Any = given_task("decoder", llama, written({"train.jsonl": GSM8K}))
    for most in (64, 20):  # a long question loses its beginning, no part of the answer
        for batch in (task.train(Sizes(sequence=most), 1, 6, 0)[0], task.held_out(Sizes(sequence=most), 6)):
            assert batch["input_ids"].shape[1] <= most and (batch["input_ids"][:, 0] == 0).all()
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
                meant = task._tokenizer.decode(labels[labels != -100])
                assert meant.startswith(" ") and "####" in meant and meant.endswith("</s>")
                assert torch.equal(ids[labels != -100], labels[labels != -100]) and mask[labels != -100].all()
    model, held_out = task.base(SIZES).eval(), task.held_out(Sizes(sequence=64), 3)
    with torch.no_grad():  # neither padding nor positions left out change the loss
        logits = model(**task.inputs(held_out)).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, held_out["labels"][:, 1:].flatten()).item()
    assert task.figures(model, held_out)["loss"] == pytest.approx(expected, rel=1e-5)
    assert final_answer("6*200 = 1200\n#### $1,200.") == final_answer(" 1200") != final_answer("120")
    assert final_answer("a tree") == "a tree"


def test_generation_that_copies_the_answer_is_right(llama: str, written: Any) -> None:
    """A model trained on one row alone says its answer."""
    task: Any = given_task("decoder", llama, written({"train.jsonl": GSM8K[5:7], "test.jsonl": GSM8K[6:7]}))
    base, held_out = task.base(SIZES).train(), task.held_out(SIZES, 1)
    assert task.final_figures(base, held_out) == {"exact_match": 0.0}
    optimizer = torch.optim.AdamW(base.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        task.loss(base, held_out).backward()
        optimizer.step()
    for method in ("block", "middle", "loha"):
        model = adapted(base.requires_grad_(False).eval(), task, method, 10, 0)
        assert task.final_figures(model, held_out) == {"exact_match": 1.0}


def started(arguments: list[str], cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.convergence", "run", *arguments], cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_DATASETS_CACHE": str(cache)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_here(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def arguments(kind: str, model: str, data: str, out: Path, **more: object) -> list[str]:
    options = {"sequence": 48, "held-out": 4, "seeds": 1, "device": "cpu", "batch": 2, "kind": kind, "model": model}
    options |= {"data": data, "out": out} | more
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@pytest.mark.slow
def test_two_runs_at_a_time_give_what_one_does(llama: str, written: Any, tmp_path: Path) -> None:
    """From the command line: processes that are started for runs find what they are to do by its module's name."""
    options = {"steps": 4, "rates": "1e-2,2e-2", "seeds": 2, "methods": "lora"}
    calls = [
        arguments("decoder", llama, written({"train.jsonl": GSM8K}), tmp_path / jobs, jobs=jobs, **options)
        for jobs in "12"
    ]
    run_here(calls[0])
    process = started(calls[1], tmp_path / "cache")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    found = [read_all(tmp_path / jobs).values() for jobs in "12"]
    curves = [[point["loss"] for result in results for point in result["curve"]] for results in found]
    assert len(curves[0]) == 2 * (1 + 1) + 2 * (1 + 4) and curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(roberta: str, written: Any, tmp_path: Path) -> None:
    """With dropout, so that the random numbers must go on, too; a run is saved after each evaluation."""
    data, outs = written({"train.jsonl": PAIRS["sst2"] * 3}), (tmp_path / "whole", tmp_path / "killed")
    options = {"steps": 40, "evaluations": 40, "rates": "1e-2", "methods": "lora,block-1", "merged-seeds": 1}
    calls = [arguments("encoder", roberta, data, out, **options) for out in outs]
    whole = run_here(calls[0])
    assert "2 runs and 2 merges, about" in whole and "final runs: 1 of 2 done" in whole, whole
    killed = started(calls[1], tmp_path)
    while not any(outs[1].glob("unfinished/*.pt")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not read_all(outs[1])
    (left,) = outs[1].glob("unfinished/*.pt")
    assert 0 < torch.load(left)["step"] < 40
    assert "final runs: 2 of 2 done" in run_here(calls[1])
    expected, found = (read_all(out) for out in outs)
    assert len(found) == 2 and not any(outs[1].glob("unfinished/*.pt"))
    for spec, result in expected.items():
        assert result["merges"]["served"]["loss"] == pytest.approx(result["final"]["loss"], rel=1e-4)
        assert result["merges"]["served in bfloat16"]["loss"] == pytest.approx(result["final"]["loss"], rel=0.05)
        for name in ("curve", "final", "merges", "gradient_norms"):
            assert found[spec][name] == result[name]
    assert str(tmp_path) not in (outs[1] / "runs.jsonl").read_text() + (outs[1] / "REPORT.md").read_text()


@pytest.mark.parametrize("name", PAIRS)
def test_encoder(name: str, roberta: str, written: Any, tmp_path: Path) -> None:
    rows = PAIRS[name]
    test = [row | {"label": -1} for row in rows] if isinstance(rows[0]["label"], int) else rows
    task: Any = given_task(
        "encoder", roberta, written({"train.jsonl": rows, "dev.jsonl": rows[:6], "test.jsonl": test})
    )
    runs(task, SIZES, tmp_path, ("lora", "block") if name == "sst2" else ("lora",))
    assert task.metrics == (
        "accuracy",
        "f1" if name == "mnli" else "f1_positive",
        "matthews",
    ) and task.trained_whole == ("classifier",)
    assert task.classes == (3 if name == "mnli" else 2)
    assert len(task.targets) == 6 and "attention.self.query" in task.targets


def test_tables_in_other_formats(roberta: str, tmp_path: Path) -> None:
    rows = [f'{w} is "so\t{i % 2}' for i, w in enumerate(WORDS)]  # GLUE's files do not quote
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[:3]]))
    task: Any = given_task("encoder", roberta, str(tmp_path))
    assert task._train[1] == (['book is "so'], 1) and len(task._held_out) == 3
    (tmp_path / "one.json").write_text(json.dumps(PAIRS["sst2"] * 5))
    task = given_task("encoder", roberta, str(tmp_path / "one.json"))
    assert (len(task._train), len(task._held_out)) == (54, 6)  # a tenth is held out


def test_unet(diffusion: str, tmp_path: Path) -> None:
    task = given_task("unet", diffusion, images(tmp_path / "images"))
    runs(task, Sizes(sequence=16), tmp_path)
    batch = task.held_out(Sizes(sequence=16), 3)
    assert batch["sample"].shape == batch["target"].shape == (3, 4, 8, 8) and batch["input_ids"].shape == (3, 12)
    with pytest.raises(ValueError, match="sequence must be the images' side in pixels, a multiple of 2, got 15"):
        task.held_out(Sizes(sequence=15), 3)


def test_bad_images(diffusion: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of \{image, text\}.*got \{image, words\}"):
        given_task("unet", diffusion, images(tmp_path / "a", "words"))
    (tmp_path / "file.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"must be a folder of images with metadata\.jsonl"):
        given_task("unet", diffusion, str(tmp_path / "file.jsonl"))
    path = Path(diffusion, "scheduler", "scheduler_config.json")
    config = json.loads(path.read_text())
    other = tmp_path / "model"
    other.mkdir()
    for folder in ("tokenizer", "text_encoder", "unet", "vae"):
        (other / folder).symlink_to(Path(diffusion, folder))
    (other / "scheduler").mkdir()
    (other / "scheduler" / path.name).write_text(json.dumps(config | {"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="must predict epsilon or v_prediction, its scheduler says 'sample'"):
        given_task("unet", str(other), images(tmp_path / "b", "caption", parts=["all"]))


def test_bad_arguments(llama: str, roberta: str, written: Any, tmp_path: Path) -> None:
    one = written({"train.jsonl": GSM8K})
    with pytest.raises(ValueError, match="kind must be one of decoder, encoder, unet, got 'gan'"):
        given_task("gan", llama, one)
    for data in ("/no/such/folder", "./nothing", "train.jsonl"):
        with pytest.raises(ValueError, match=f"data must be a path that exists or a hub id, got '{data}'"):
            given_task("decoder", llama, data)
    with pytest.raises(ValueError, match="model must be a path that exists or a hub id, got '/no/model'"):
        given_task("decoder", "/no/model", one)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"model .* cannot be read"):
        given_task("decoder", str(empty), one).base(SIZES)
    with pytest.raises(ValueError, match=r"must be or hold files that end in \.jsonl, \.json"):
        given_task("decoder", llama, str(empty))


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("decoder", {"train.jsonl": [{"q": "1", "a": "2"}] * 3}, r"\{question, answer\};.*\{text\}; got \{q, a\}"),
        ("encoder", {"train.jsonl": [{"sentence": "1"}] * 3}, r"\{sentence, label\}.*; got \{sentence\}"),
        ("decoder", {"train.jsonl": GSM8K[:1]}, "no train rows"),
        ("decoder", {"train.jsonl": []}, "it is empty"),
        ("decoder", {"dev.jsonl": GSM8K, "test.jsonl": GSM8K}, r"must have a file named train\.\*, got dev.jsonl"),
        ("decoder", {"train.jsonl": [{"Problem": "x", "options": "a ) 1", "correct": "e"}] * 3}, "does not fit"),
        ("encoder", {"train.jsonl": [{"text": w, "label": 1} for w in WORDS]}, r"at least two labels.*got \[1\]"),
        ("encoder", {"train.jsonl": [{"text": w, "label": i / 4} for i, w in enumerate(WORDS)]}, "classes as labels"),
        ("encoder", {"train.jsonl": PAIRS["sst2"], "test.jsonl": [{"sentence": "x", "label": 7}]}, r"labels.*\['7'\]"),
        ("encoder", {"train.jsonl": PAIRS["sst2"], "test.jsonl": [{"sentence": "x", "label": -1}]}, "no labelled held"),
    ],
)  # fmt: skip
def test_bad_data(kind: str, files: Any, message: str, llama: str, roberta: str, written: Any) -> None:
    with pytest.raises(ValueError, match=message):
        given_task(kind, llama if kind == "decoder" else roberta, written(files))
