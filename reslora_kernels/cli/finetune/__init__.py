"""``reslora finetune``: fine-tune a Transformers model on your data.

Here are the command's options, the order of its work (check all that is cheap, load, train, save, export, merge), and
training data made ready for a model whose weights are not loaded yet.
"""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from reslora_kernels.adapt.apply import apply_reslora
from reslora_kernels.adapt.coverage import inspect
from reslora_kernels.adapt.targets import find_targets
from reslora_kernels.cli.examples import Chat, read_examples
from reslora_kernels.cli.finetune import folder
from reslora_kernels.cli.merge import check_fits
from reslora_kernels.cli.options import (
    DEFAULTS,
    Backend,
    CalibrationExamples,
    Device,
    DType,
    ExcludeModules,
    ExtraRank,
    Gates,
    JointSteps,
    LayersToTransform,
    LoraAlpha,
    MaxLength,
    PreNum,
    Rank,
    Sequential,
    Shortcut,
    Split,
    TargetModules,
    TrustRemoteCode,
    load_model,
    load_model_config,
    load_tokenizer,
    make_config,
    model_without_weights,
    out_option,
    require,
    torch_device,
    torch_dtype,
)
from reslora_kernels.cli.output import check_apart, check_writable
from reslora_kernels.cli.tokenization import PLAIN_CHAT_TEMPLATE, Encoded, Row, encode, max_length_for
from reslora_kernels.config import ResLoRAConfig


def finetune(
    model: Annotated[str, typer.Option("--model", help="Folder of a causal language model, or its id on the Hub.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help='JSON Lines with {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}; a text '
            "file; a saved dataset or the id of one.",
        ),
    ],
    output_dir: Annotated[Path, out_option("New folder for all results.", "--output-dir")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Where the tokenizer is, if not with the model.")
    ] = None,
    split: Split = "train",
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Like --data, to evaluate on.")] = None,
    eval_fraction: Annotated[float, typer.Option("--eval-fraction", help="Or this share of --data, 0 to 1.")] = 0.0,
    max_length: MaxLength = None,
    r: Rank = DEFAULTS["r"],
    lora_alpha: LoraAlpha = DEFAULTS["lora_alpha"],
    lora_dropout: Annotated[float, typer.Option("--lora-dropout", help="Dropout before the projection.")] = 0.0,
    target_modules: TargetModules = DEFAULTS["target_modules"],
    exclude_modules: ExcludeModules = None,
    layers_to_transform: LayersToTransform = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by lora_alpha / sqrt(r).")] = False,
    bias: Annotated[str, typer.Option("--bias", help="Which biases train: none, all or lora_only.")] = "none",
    shortcut: Shortcut = DEFAULTS["shortcut"],
    pre_num: PreNum = DEFAULTS["pre_num"],
    gates: Gates = DEFAULTS["gates"],
    gates_init: Annotated[
        float, typer.Option("--gates-init", help="Where those of earlier terms start: 1, or 0 for LoRA at first.")
    ] = DEFAULTS["gates_init"],
    merge_method: Annotated[
        str, typer.Option("--merge-method", help="How the shortcut merges later: input, weights or least_squares.")
    ] = DEFAULTS["merge"],
    backend: Backend = DEFAULTS["backend"],
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0.0)] = 2e-4,
    num_train_epochs: Annotated[float, typer.Option("--num-train-epochs", min=0.0)] = 3.0,
    max_steps: Annotated[int, typer.Option("--max-steps", help="Instead of epochs; -1 for none.")] = -1,
    per_device_train_batch_size: Annotated[int, typer.Option("--per-device-train-batch-size", min=1)] = 8,
    per_device_eval_batch_size: Annotated[int, typer.Option("--per-device-eval-batch-size", min=1)] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option("--gradient-accumulation-steps", min=1)] = 1,
    lr_scheduler_type: Annotated[str, typer.Option("--lr-scheduler-type", help="As in Transformers.")] = "linear",
    warmup_steps: Annotated[
        float, typer.Option("--warmup-steps", min=0.0, help="Below 1: a share of all steps.")
    ] = 0.0,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option("--max-grad-norm", min=0.0)] = 1.0,
    optim: Annotated[str, typer.Option("--optim", help="As in Transformers.")] = "adamw_torch",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 42,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Train under float16 autocast.")] = False,
    torch_dtype_name: DType = "auto",
    device: Device = "auto",
    logging_steps: Annotated[int, typer.Option("--logging-steps", min=1)] = 10,
    eval_steps: Annotated[int | None, typer.Option("--eval-steps", min=1, help="Not given: once per epoch.")] = None,
    save_steps: Annotated[int | None, typer.Option("--save-steps", min=1, help="Not given: once per epoch.")] = None,
    save_total_limit: Annotated[int, typer.Option("--save-total-limit", min=1, help="Checkpoints to keep.")] = 2,
    dataloader_num_workers: Annotated[int, typer.Option("--dataloader-num-workers", min=0)] = 0,
    merge: Annotated[bool, typer.Option("--merge", help="Also save the merged model, in OUTPUT_DIR/merged.")] = False,
    export: Annotated[bool, typer.Option("--export", help="Also save a PEFT adapter, in OUTPUT_DIR/peft.")] = False,
    sequential: Sequential = False,
    joint_steps: JointSteps = 0,
    extra_rank: ExtraRank = 0,
    calibration_examples: CalibrationExamples = 128,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT_DIR.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run from OUTPUT_DIR first.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fine-tune a causal language model on your data with ResLoRA adapters.

    The loss is on completions and on what the assistant says; a tokenizer without a chat template gets a plain one
    ("### User:" and so on). OUTPUT_DIR/adapter holds the result, OUTPUT_DIR/finetune.json a record of the run, and
    OUTPUT_DIR/checkpoint-N what --resume needs to go on exactly. Options have the names of PEFT and Transformers.
    Several GPUs: torchrun --nproc-per-node N -m reslora_kernels finetune ...; a batch is then N times as large.
    """
    require("transformers", "accelerate")
    config = make_config(
        r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=target_modules,
        exclude_modules=exclude_modules, layers_to_transform=layers_to_transform, use_rslora=use_rslora, bias=bias,
        shortcut=shortcut, pre_num=pre_num, gates=gates, gates_init=gates_init, merge=merge_method, backend=backend,
    )  # fmt: skip
    check_fits(config, config.merge, "--merge-method", sequential, joint_steps, extra_rank)
    torch_dtype(torch_dtype_name)
    target = torch_device(device)
    _check_evaluation(eval_data, eval_fraction)
    if max_steps == 0 or max_steps < -1:
        raise ValueError(f"--max-steps must be at least 1, or -1 for epochs, got {max_steps}")
    if max_steps == -1 and num_train_epochs == 0:
        raise ValueError("--num-train-epochs must be above 0, got 0.0")

    from reslora_kernels.cli.finetune import run  # imports Transformers

    if os.environ.get("RANK", "0") == "0":  # the process that writes: others would find what it tries out
        sources = [source for source in (model, tokenizer, data, eval_data) if source is not None]
        _check_output(output_dir, resume, overwrite, sources)
    checkpoint = folder.last_checkpoint(output_dir) if resume else None
    arguments = run.training_arguments(
        output_dir, evaluate=eval_data is not None or eval_fraction > 0, device=target,
        learning_rate=learning_rate, num_train_epochs=num_train_epochs, max_steps=max_steps,
        per_device_train_batch_size=per_device_train_batch_size, per_device_eval_batch_size=per_device_eval_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, lr_scheduler_type=lr_scheduler_type,
        warmup_steps=warmup_steps, weight_decay=weight_decay, max_grad_norm=max_grad_norm, optim=optim, seed=seed,
        bf16=bf16, fp16=fp16, logging_steps=logging_steps, eval_steps=eval_steps, save_steps=save_steps,
        save_total_limit=save_total_limit, dataloader_num_workers=dataloader_num_workers,
    )  # fmt: skip

    prepared = prepare(
        model, data, config, tokenizer=tokenizer, split=split, eval_data=eval_data, eval_fraction=eval_fraction,
        max_length=max_length, seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if merge and getattr(prepared.model_config, "quantization_config", None) is not None:
        raise ValueError(
            "--merge: the base model is quantised, and such weights hold no update; merge into the one it was made of "
            "(reslora merge ADAPTER --base ...), or --export"
        )
    settings = {
        "model": model.rstrip("/") or model,
        "config": config.to_dict(),
        "data_sha256": run.fingerprint(prepared.train),
        "max_length": prepared.max_length,
        "seed": seed,
        "max_steps": max_steps,
        "num_train_epochs": num_train_epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "processes": arguments.world_size,
        "lr_scheduler_type": lr_scheduler_type,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "optim": optim,
        "precision": "bf16" if bf16 else "fp16" if fp16 else "as the weights",
        "torch_dtype": torch_dtype_name,
    }
    if resume:
        folder.check_same_run(output_dir, settings)

    from transformers import AutoModelForCausalLM, set_seed

    network = load_model(
        "--model", model, prepared.model_config, AutoModelForCausalLM,
        dtype=torch_dtype_name, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    generation = copy.deepcopy(getattr(network, "generation_config", None))
    set_seed(seed)
    apply_reslora(network, config)
    coverage = inspect(network)
    trainer = run.make_trainer(network, arguments, prepared.train, prepared.evaluation, prepared.tokenizer)
    first = arguments.process_index == 0  # it alone writes and talks; all processes train
    say = typer.echo if first else _say_nothing
    say(
        f"{len(coverage.layers)} layers adapted in {len({row.chain for row in coverage.layers})} chains, "
        f"{coverage.trainable_parameters:,} trainable parameters; {len(prepared.train)} training and "
        f"{len(prepared.evaluation)} evaluation sequences of at most {prepared.max_length} tokens"
    )
    if prepared.dropped:
        say(
            f"left out {prepared.dropped} of {prepared.examples} examples: no token to learn within --max-length "
            f"{prepared.max_length}"
        )
    record: dict[str, Any] = {"status": "started", "settings": settings, "versions": run.versions()}
    run.wait_for_all()  # each has looked at the folder before it is changed
    started = time.monotonic()
    try:
        if not resume and first:
            folder.set_aside(output_dir)
            folder.write_record(output_dir, record)
            trainer.add_callback(run.AfterFirstStep(lambda: folder.drop(output_dir)))
        run.wait_for_all()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException as error:
        if first and not resume:
            folder.bring_back(output_dir)
        if isinstance(error, ValueError):  # a checkpoint that could not be loaded is not saved
            run.refuse_diverged(network)
        raise
    run.save_trained(network, prepared.tokenizer, output_dir / "adapter" if first else None)
    record |= {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "seconds": round(time.monotonic() - started, 3),
        "losses": run.losses(trainer.state.log_history),
        "train_sequences": len(prepared.train),
        "eval_sequences": len(prepared.evaluation),
        "dropped_examples": prepared.dropped,
        "plain_chat_template": prepared.plain_template,
        "trainable_parameters": coverage.trainable_parameters,
        "total_parameters": coverage.total_parameters,
        "outputs": {"adapter": str(output_dir / "adapter")},
    }
    if first:
        folder.write_record(output_dir, record | {"status": "trained", "log": trainer.state.log_history})
    if generation is not None:
        network.generation_config = generation  # the Trainer's has changed, and may not be one that can be saved
    try:
        if merge or export:
            batches = run.calibration_for(config, prepared.train, calibration_examples, seed, network.device)
            options: dict[str, Any] = {"calibration": batches}
            if batches is not None:
                options |= {"sequential": sequential, "joint_steps": joint_steps, "extra_rank": extra_rank}
            network.eval()
        if export and first:
            record["peft"] = run.export_trained(network, prepared.tokenizer, output_dir / "peft", options)
            record["outputs"]["peft"] = str(output_dir / "peft")
        if merge:
            merged = output_dir / "merged" if first else None
            record["merge"] = run.merge_trained(network, prepared.tokenizer, merged, options)
            record["outputs"]["merged"] = str(output_dir / "merged")
            if prepared.evaluation:
                record["losses"]["eval_merged"] = trainer.evaluate()["eval_loss"]
    except Exception as error:
        saved = f"the trained adapter is in {str(output_dir / 'adapter')!r}"
        raise RuntimeError(f"{saved}; what was to follow failed: {error}") from error
    record |= {"status": "finished", "log": trainer.state.log_history}
    if first:
        folder.write_record(output_dir, record)
        for line in run.summary(record):
            typer.echo(line)
    run.part()


def _say_nothing(message: str) -> None:
    """For all processes but the first."""


def _check_evaluation(eval_data: str | None, eval_fraction: float) -> None:
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"--eval-fraction must be at least 0 and below 1, got {eval_fraction}")
    if eval_data is not None and eval_fraction:
        raise ValueError("give --eval-data or --eval-fraction, not both")


def _check_output(output_dir: Path, resume: bool, overwrite: bool, sources: list[str]) -> None:
    check_writable("--out", output_dir)
    if not resume:
        check_apart(output_dir, sources)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if resume or not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"--out {str(output_dir)!r} is not empty; give another folder, --resume to go on with the run in it, or "
            "--overwrite to remove that"
        )
    if not folder.is_earlier_run(output_dir):
        raise FileExistsError(f"--out {str(output_dir)!r} is not overwritten: other files than a run's are in it")


@dataclass(frozen=True)
class Prepared:
    """Rows to train and to evaluate on, and what they were made with."""

    model_config: Any
    tokenizer: Any
    train: list[Row]
    evaluation: list[Row]
    max_length: int
    examples: int
    dropped: int
    plain_template: bool


def prepare(
    model: str,
    data: str,
    adapter: ResLoRAConfig,
    *,
    tokenizer: str | None,
    split: str,
    eval_data: str | None,
    eval_fraction: float,
    max_length: int | None,
    seed: int,
    trust_remote_code: bool,
) -> Prepared:
    """Read and encode the data, and see that ``adapter`` matches layers of the model.

    Raises:
        OSError, ValueError: data, tokenizer or the model's configuration is missing, malformed, or does not fit.
    """
    from transformers import AutoModelForCausalLM

    examples = read_examples("--data", data, split)
    eval_examples = [] if eval_data is None else read_examples("--eval-data", eval_data, split)
    config = load_model_config("--model", model, trust_remote_code)
    find_targets(model_without_weights(config, AutoModelForCausalLM, trust_remote_code), adapter)
    length = max_length_for(max_length, config)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    option, source = ("--model", model) if tokenizer is None else ("--tokenizer", tokenizer)
    words = load_tokenizer(option, source, trust_remote_code)
    plain = words.chat_template is None and any(isinstance(example, Chat) for example in (*examples, *eval_examples))
    if plain:
        words.chat_template = PLAIN_CHAT_TEMPLATE
    encoded = encode(examples, words, length, vocabulary)
    train, evaluation = split_rows(encoded, eval_fraction, seed)
    if eval_examples:
        evaluation = encode(eval_examples, words, length, vocabulary).rows
    return Prepared(config, words, train, evaluation, length, len(examples), encoded.dropped, plain)


def split_rows(encoded: Encoded, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows. Examples are drawn at random and stay whole; of a single text, the end is held out.

    Raises:
        ValueError: nothing is left to train on.
    """
    rows = encoded.rows
    if not fraction:
        return rows, []
    if len(encoded.groups) == 1:
        held_out = math.ceil(fraction * len(rows))
        train, evaluation = rows[:-held_out], rows[-held_out:]
    else:
        order = torch.randperm(len(encoded.groups), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = set(order[: math.ceil(fraction * len(order))])
        train = [row for i, group in enumerate(encoded.groups) if i not in chosen for row in group]
        evaluation = [row for i, group in enumerate(encoded.groups) if i in chosen for row in group]
    if not train:
        raise ValueError(f"--eval-fraction {fraction} of {len(rows)} sequences leaves none to train on")
    return train, evaluation
