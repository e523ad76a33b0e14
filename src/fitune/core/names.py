"""What settings are called elsewhere: in Trainer (transformers), TRL, PEFT, LLaMA-Factory, ms-swift, Unsloth, axolotl.

In: settings, or a command line, by whatever names. Out: the same by ours. What means exactly the same is taken; what
does not is refused with what to type instead. The tables stand on top and are the whole list; none of the names in
SAME, MEANS and INSTEAD is one of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar, get_args

from fitune.core.errors import Collector, ConfigError
from fitune.core.options import ROWS, TrackerName

T = TypeVar("T")


def _each(table: Mapping[T, str]) -> dict[str, T]:
    """A table by each of the names in its texts."""
    return {name: value for value, names in table.items() for name in names.split()}


# our name: names of others with the same meaning and the same values
SAME: dict[str, str] = _each(
    {
        "model": "model_name_or_path base_model model_path model_id",
        "data": "dataset datasets dataset_name dataset_path data_path train_data train_file train_files train_dataset",
        "eval_data": "eval_dataset val_dataset validation_file eval_file test_datasets",
        "output": "output_dir",
        "method": "finetuning_type train_type tuner_type tuning_method peft_type",
        "adapter": "adapter_name_or_path lora_model_dir",
        "lr": "learning_rate peak_lr",
        "epochs": "num_train_epochs num_epochs train_epochs",
        "batch_size": "per_device_train_batch_size micro_batch_size",
        "accumulation": "gradient_accumulation_steps grad_accumulation_steps",
        "max_length": "cutoff_len max_seq_length max_seq_len sequence_len model_max_length",
        "warmup": "warmup_ratio",
        "optimizer": "optim",
        "epsilon": "adam_epsilon",
        "max_grad_norm": "gradient_clipping clip_grad_norm",
        "checkpointing": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing",
        "offload": "activation_offloading enable_activation_offloading",
        "seed": "random_state random_seed",
        "track_project": "wandb_project swanlab_project",
        "eval_every": "eval_steps",
        "save_every": "save_steps",
        "patience": "early_stopping_patience",
        "lora.rank": "lora_rank lora_r r",
        "lora.alpha": "lora_alpha",
        "lora.dropout": "lora_dropout",
        "lora.targets": "lora_target lora_targets lora_target_modules target_modules",
        "lora.ranks": "rank_pattern",
        "lora.dora": "use_dora lora_use_dora",
        "lora.rslora": "use_rslora lora_use_rslora",
        "lora.b_rate": "loraplus_lr_ratio lorap_lr_ratio",
        "lora.save": "modules_to_save lora_modules_to_save additional_target",
        "quant.double": "bnb_4bit_use_double_quant double_quantization use_bnb_nested_quant",
        "quant.kind": "bnb_4bit_quant_type quantization_type",
        "quant.threshold": "llm_int8_threshold",
        "dpo.label_smoothing": "dpo_label_smoothing",
        "kto.desirable_weight": "kto_chosen_weight",
        "kto.undesirable_weight": "kto_rejected_weight",
        "simpo.gamma": "simpo_gamma",
    }
)
BF16, FP16, FP32 = ({"precision": name} for name in ("bf16", "fp16", "fp32"))
NF4, INT8, PLAIN = ({"quant": {"name": name}} for name in ("nf4", "int8", "none"))
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
DTYPES |= {f"torch.{name}": ours for name, ours in DTYPES.items()}
DTYPE = {name: {"precision": ours} for name, ours in {**DTYPES, "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}.items()}
BITS, COSINE = {"4": NF4, "8": INT8, "none": PLAIN}, {"cosine": dict[str, object]()}
OBJECTIVE = {name: {"objective": name} for name in ROWS}
START = {"true": {"lora": {"init": "default"}}, "pissa": {"lora": {"init": "pissa"}}}
NOT_SO: dict[str, dict[str, object]] = {"false": {}}
# names of others whose values are settings of ours; any other value is refused with the text in INSTEAD
MEANS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "bf16": {"true": BF16, "auto": {"precision": "auto"}},
    "fp16": {"true": FP16},
    **dict.fromkeys(("torch_dtype", "dtype", "infer_dtype", "model_dtype"), DTYPE),
    "load_in_4bit": {"true": NF4, "false": PLAIN},
    "load_in_8bit": {"true": INT8, "false": PLAIN},
    **dict.fromkeys(("quantization_bit", "quant_bits", "quantize_bits"), BITS),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), COSINE),
    **dict.fromkeys(("stage", "rlhf_type", "rl"), OBJECTIVE),
    "report_to": {"none": {}, **{name: {"track": [name]} for name in get_args(TrackerName)}},
    "do_train": {"true": {}},
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "packing", "sample_packing", "neat_packing"), NOT_SO),
    **dict.fromkeys(("trust_remote_code", "overwrite_output_dir", "push_to_hub"), NOT_SO),
    "mask_history": {"true": {"train_on": "last"}, "false": {"train_on": "all"}},
    "load_best_model_at_end": {"true": {"final": "best"}, "false": {"final": "last"}},
    "lora_target_linear": {"true": {"lora": {"targets": "all-linear"}}},
    "pissa_init": {"true": {"lora": {"init": "pissa"}}, "false": {"lora": {"init": "default"}}},
    **dict.fromkeys(("init_lora_weights", "init_weights"), START),
}
# values that others write for our names: the value here, or the settings that it stands for
VALUES: Mapping[str, Mapping[str, object]] = {
    "method": {
        "qlora": {"method": "lora", **NF4},
        "dora": {"method": "lora", "lora": {"dora": True}},
        "rslora": {"method": "lora", "lora": {"rslora": True}},
        "pissa": {"method": "lora", "lora": {"init": "pissa"}},
        **{name: {"method": f"peft:{name.upper()}"} for name in ("adalora", "oft", "vera", "boft")},
        **_each({"prompt": "prompt-tuning prompt_tuning", "p-tuning": "ptuning p_tuning", "adapter": "adapters"}),
        **_each({"prefix": "prefix-tuning prefix_tuning p-tuning-v2 ptuning-v2", "ia3": "(ia)3 (ia)^3"}),
    },
    "optimizer": _each(
        {
            "adamw": "adamw_torch adamw_torch_fused adamw_hf",
            "adamw-8bit": "adamw_8bit adamw_bnb_8bit",
            "paged-adamw-8bit": "paged_adamw_8bit",
            "lion-8bit": "lion_8bit",
        }
    ),
    **{
        name: {one: {name: ours} for one, ours in DTYPES.items()}
        for name in ("precision", "storage_dtype", "trainable_dtype")
    },
    "quant": _each({"nf4": "4bit 4-bit int4 4 bnb-4bit", "int8": "8bit 8-bit 8 bnb-8bit llm.int8"}),
    "lora.targets": _each({"all-linear": "all all_linear"}),
    "checkpointing": {
        "unsloth": {"checkpointing": True},
        "offload": {"checkpointing": True, "offload": True},
    },
}
OUT = "leave it out: "
# what to type instead: names of others
INSTEAD: dict[str, str] = _each(
    {
        "--precision bf16, fp16, fp32 or auto": "bf16 fp16 torch_dtype dtype infer_dtype model_dtype compute_dtype",
        "--precision bf16 or fp16": "bnb_4bit_compute_dtype",
        "--precision bf16 --trainable-dtype bf16": "pure_bf16",
        "--quant nf4 (4 bits) or --quant int8 (8 bits)": "load_in_4bit load_in_8bit quantization_bit quant_bits "
        "quantize_bits quantization_method quant_method quantization_config",
        "--quant.storage": "bnb_4bit_quant_storage",
        OUT + "the learning rate rises over --warmup, then falls to 0 as a cosine": "lr_scheduler_type lr_scheduler "
        "scheduler lr_scheduler_kwargs cosine_min_lr_ratio",
        "--warmup, a share of all steps: 0.05 is one in twenty": "warmup_steps",
        OUT + "adamw has 0.9 and 0.999": "adam_beta1 adam_beta2",
        "--objective sft, dpo, ipo, kto, orpo or simpo": "stage rlhf_type rl pref_loss loss_type",
        "--dpo.beta, or that of another objective: --kto.beta, --simpo.beta, ...": "beta pref_beta rl_beta",
        OUT + "the reference is the model as it is before training": "ref_model ref_model_name_or_path "
        "precompute_ref_log_probs sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        OUT + "a prompt gets what --max-length leaves beside the longer answer": "max_prompt_length "
        "max_completion_length",
        "fitune train": "do_train",
        "fitune eval RUN --data F": "do_eval do_predict predict_with_generate",
        OUT + "prompts are never trained; --train-on says which answers are": "train_on_inputs train_on_prompt "
        "assistant_only_loss completion_only_loss loss_scale",
        "--train-on last": "mask_history",
        OUT + "nothing is padded here, and documents never see each other": "packing sample_packing neat_packing "
        "eval_packing eval_sample_packing group_by_length pad_to_sequence_len padding_free flash_attn flash_attention "
        "attn_implementation attn_impl",
        OUT + "the loss is computed in pieces as it is": "enable_liger_kernel use_liger_kernel use_liger",
        "--val-share 0.1 (at most --val-rows rows)": "val_size val_set_size split_dataset_ratio",
        "--take N, rows drawn with the seed": "max_samples max_train_samples train_dataset_sample",
        "--batch-size, the rows of a micro-batch; times --accumulation they are those of a step": "total_batch_size "
        "train_batch_size global_batch_size",
        OUT + "held-out rows are measured by --batch-size": "per_device_eval_batch_size eval_batch_size",
        "--eval-every STEPS": "eval_strategy evaluation_strategy evals_per_epoch",
        "--save-every STEPS": "save_strategy saves_per_epoch",
        "--keep-last N, the newest checkpoints; the best one is kept beside": "save_total_limit",
        "--final best": "load_best_model_at_end",
        OUT + "it is the held-out loss": "metric_for_best_model greater_is_better",
        OUT + "checkpoints hold what was trained, and what a resumed run needs": "save_only_model save_safetensors",
        "--resume --output RUN": "resume_from_checkpoint",
        "another --output: nothing is overwritten": "overwrite_output_dir",
        OUT + "every step is logged (steps.jsonl in the run folder, and report.html)": "logging_steps logging_strategy "
        "logging_first_step logging_dir plot_loss wandb_name",
        "--track tensorboard, trackio, wandb, swanlab or mlflow; several at once": "report_to use_wandb use_swanlab",
        "--output, the run folder": "run_name",
        OUT + "nothing leaves this machine": "push_to_hub hub_model_id",
        "--model, the model's folder or hub id": "model_name",
        OUT + "the model's folder says it": "model_type tokenizer_type tokenizer_name tokenizer_name_or_path "
        "tokenizer_config use_fast_tokenizer",
        "--model org/name@revision": "model_revision",
        "the environment's HF_HOME (models), or --cache FOLDER (prepared data)": "cache_dir dataset_prepared_path",
        "--cache none": "overwrite_cache",
        "the environment's HF_TOKEN": "hf_hub_token token",
        "--data with paths; of a folder every file is read": "dataset_dir",
        "--map COLUMN=text": "dataset_text_field text_column",
        "--map COLUMN=prompt": "prompt_column",
        "--map COLUMN=completion": "response_column",
        "--map COLUMN=input": "input_column",
        "--map COLUMN=OURS for each": "column_mapping columns",
        "--max-length, of prompt and answer together": "max_source_length max_target_length max_prompt_length",
        "--sample-tokens, the longest answer in the report": "max_new_tokens",
        "--weight, one for each source of --data": "mix_strategy interleave_probs dataset_weights",
        "--template, a name or a YAML file": "chat_template prompt_template",
        "a system message in the rows, or a --template of your own": "default_system system system_prompt",
        "--new-tokens": "add_tokens new_special_tokens add_special_tokens resize_vocab special_tokens",
        "--method bitfit trains biases": "lora_bias bias",
        "--lora.targets auto, all-linear or names": "lora_target_linear",
        "--method lora": "use_peft",
        "--lora.init pissa or default": "pissa_init init_lora_weights init_weights",
        "--lora.alpha, for all targets": "alpha_pattern",
        "--freeze.blocks N, the last ones": "freeze_trainable_layers num_layer_trainable",
        "--freeze.patterns": "freeze_trainable_modules trainable_parameters unfrozen_parameters",
        "--prompt.tokens, --p-tuning.tokens or --prefix.tokens": "num_virtual_tokens",
        "--prefix.tokens": "pre_seq_len",
        "--prefix.projection": "prefix_projection",
        "--gpus N; --parallel shard where one of them has no room for the whole": "deepspeed fsdp fsdp_config "
        "fsdp_transformer_layer_cls_to_wrap",
        "--collective-timeout MINUTES": "ddp_timeout",
        OUT + "whoever starts the processes says it": "local_rank ddp_find_unused_parameters",
        OUT + "code in a model folder is never run": "trust_remote_code",
        "--device": "device_map",
        "--device cpu": "use_cpu no_cuda",
        OUT
        + "there is nothing of the kind here": "tf32 loftq_config layers_to_transform create_new_adapter use_galore "
        "use_badam neftune_noise_alpha noisy_embedding_alpha label_smoothing_factor torch_compile disable_tqdm "
        "preprocessing_num_workers dataloader_num_workers dataset_num_proc remove_unused_columns use_unsloth strict",
    }
)
OF_ANSWERS = {"max_tokens": "max_new_tokens"}  # of the verbs that answer
ANSWER = ("chat", "eval")
LISTS = ("data", "eval_data", "lora.targets", "lora.save")  # others write several as one text with commas
GROUPS = ("lora", "quant", "freeze", "tail", "bitfit", "prompt", "p_tuning", "prefix", "bottleneck", "ia3")
ONE_OF = (("bf16", "fp16"), ("load_in_4bit", "load_in_8bit"))  # of which one is true where the other is false


def ours(values: Mapping[str, object]) -> dict[str, Any]:
    """Settings by our names, `-` and `_` alike. What cannot be taken stays under its own name: see `problem`."""
    there = {_plain(name): value for name, value in values.items()}
    out: dict[str, object] = {}
    for given, value in sorted(values.items(), key=lambda item: _of_others(_plain(item[0]))):
        name = _plain(given)
        if value is False and any(name in pair and there.get(other) is True for pair in ONE_OF for other in pair):
            continue
        taken = _ours(name, value)
        if taken is not None and _joined(out, taken) == out:
            continue
        if taken is None or _twice(out, taken, there, name):
            out[str(given)] = value
        else:
            out = _joined(out, taken)
    return out


def _of_others(name: str) -> bool:
    return name in SAME or name in MEANS or name in INSTEAD


def _plain(name: object) -> str:
    return str(name).strip().replace("-", "_")


def _twice(out: Mapping[str, object], taken: Mapping[str, object], given: Mapping[str, object], name: str) -> bool:
    """Is this setting given by another name too?"""
    for mine, value in taken.items():
        there = out.get(mine)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            if _twice(there, value, {}, ""):
                return True
        elif mine in out or (mine in given and mine != name and not isinstance(value, Mapping)):
            return True
    return False


def _joined(out: Mapping[str, object], more: Mapping[str, object]) -> dict[str, object]:
    joined = dict(out)
    for name, value in more.items():
        before = joined.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = _joined(before, value)
        joined[name] = value
    return joined


def _ours(name: str, value: object) -> Mapping[str, Any] | None:
    """One setting of whoever's name as ours; None: it cannot be taken."""
    if name in MEANS:
        return MEANS[name].get(str(value).lower())
    if name in INSTEAD:
        return None
    mine = SAME.get(name, name)
    if mine in LISTS and isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",") if part.strip()]
    if mine in VALUES and isinstance(value, (str, int)) and str(value).lower() in VALUES[mine]:
        value = VALUES[mine][str(value).lower()]
        return value if isinstance(value, dict) else _ours(mine, value)
    if mine == "quant" and isinstance(value, str):
        value = {"name": value}
    if mine in GROUPS and isinstance(value, Mapping):
        return {mine: _group(mine, value)}
    return _nested(mine, value)


def _nested(name: str, value: object) -> dict[str, object]:
    head, dot, rest = name.partition(".")
    return {head: _nested(rest, value) if dot else value}


def _group(group: str, values: Mapping[str, object]) -> dict[str, object]:
    """Names inside a group of settings: `lora: {r: 16}`."""
    out: dict[str, object] = {}
    for given, value in values.items():
        name = _plain(given)
        mine = next((SAME[n] for n in (name, f"{group}_{name}") if SAME.get(n, "").startswith(f"{group}.")), None)
        taken = (_ours(mine or f"{group}.{name}", value) or {}).get(group, {name: value})
        taken = {given: value} if mine is not None and mine.partition(".")[2] in values else taken
        out = _joined(out, taken)
    return out


def problem(given: str, value: object) -> ConfigError | None:
    """Why a name of another tool was not taken; None: nobody has that name."""
    name = _plain(given.removeprefix("--")).rpartition(".")[2]
    if name in MEANS or name in INSTEAD:
        received = repr(value) if name in MEANS else None
        return ConfigError(f"{given}: a name of another tool", received=received, fix=INSTEAD[name])
    if name in SAME:
        return ConfigError(f"{given}: another name of {SAME[name]}, which is given too", fix=f"leave {given} out")
    return None


# ---- the command line ----


def flags(arguments: Sequence[str], verb: str, own: Collection[str] = ()) -> list[str]:
    """A command line by our names: `--learning_rate 1e-4` is `--lr 1e-4`.

    Args:
        arguments: as typed.
        verb: the first of them.
        own: names of options of the verb itself, which mean what it says, whatever they mean elsewhere.

    Raises:
        ConfigError, Problems: names of others that cannot be taken.
    """
    out: list[str] = []
    problems, at = Collector(), 0
    while at < len(arguments):
        argument, at = arguments[at], at + 1
        typed, equals, value = argument.partition("=")
        name = _plain(typed[2:]) if argument.startswith("--") else ""
        if name in own and _of_others(name):
            out.append(argument)
            continue
        if not (_of_others(name) or name in VALUES or _of_answers(name, verb)):
            out.append(argument)
            continue
        values = [value] if equals else list(takewhile(lambda one: not one.startswith("--"), arguments[at:]))
        at += 0 if equals else len(values)
        with problems.gather():
            out += _flag(typed, name, values, verb)
    problems.raise_any()
    return out


def _of_answers(name: str, verb: str) -> bool:
    return verb in ANSWER and name in OF_ANSWERS


def _flag(typed: str, name: str, values: list[str], verb: str) -> list[str]:
    """One flag with its values by our names."""
    if _of_answers(name, verb):
        return [_flag_name(OF_ANSWERS[name]), *values]
    said = values[0].lower() if values else "true"
    if name in MEANS:
        if said in MEANS[name]:
            return [*_typed(MEANS[name][said]), *values[1:]]
        if "true" in MEANS[name] and said != "false":  # it stands alone: what comes next is not its value
            return [*_typed(MEANS[name]["true"]), *values]
    if name in MEANS or name in INSTEAD:
        error = problem(typed, values[0] if values else None)
        assert error is not None
        raise error
    mine = SAME.get(name, name)
    if mine in LISTS and len(values) == 1:
        values = [part.strip() for part in values[0].split(",") if part.strip()]
    if mine in VALUES and values and said in VALUES[mine]:
        meant = VALUES[mine][said]
        return [*_typed(meant if isinstance(meant, dict) else {mine: meant}), *values[1:]]
    if values and said in ("true", "false"):
        return [f"{_flag_name(mine)}={said}", *values[1:]]
    return [_flag_name(mine), *values]


def _flag_name(name: str) -> str:
    return "--quant" if name == "quant.name" else f"--{name.replace('_', '-')}"


def _typed(settings: Mapping[str, object], above: str = "") -> list[str]:
    """Settings as they are typed."""
    out: list[str] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            out += _typed(value, f"{above}{name}.")
        else:
            out += [_flag_name(above + name), *([] if value is True else [str(value)])]
    return out
