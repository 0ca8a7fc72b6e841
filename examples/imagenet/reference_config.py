"""The SPRINT reference's configuration files, read as they are: its names and values as ours.

`TRAINING` and `SAMPLING` say of each key what becomes of it: our option of that name, a rule that looks at its value, or why
it is not used here. A key in neither table is an error, and so is a value that we have not.
"""

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any], dict[str, Any]]


class Unused(str):
    """Why a key has no effect here."""


def _one_of(values: dict[Any, dict[str, Any]], advice: str) -> Rule:
    """What each value means; any other one is refused."""

    def rule(value: Any) -> dict[str, Any]:
        known = value.lower() if isinstance(value, str) else value
        for wanted, options in values.items():
            if known == wanted and isinstance(known, bool) == isinstance(wanted, bool):
                return options
        raise ValueError(f"{value!r} is not to be had here: {advice}")

    return rule


def _norm(value: Any) -> dict[str, Any]:
    meanings = {"rmsnorm": {"qk_norm": True}, "none": {"qk_norm": False}}
    return _one_of(meanings, "our models norm queries and keys by RMSNorm, or not at all, none")(value)


def _fp16(value: Any) -> dict[str, Any]:
    values: dict[Any, dict[str, Any]] = {"no": {"mixed_precision": "no"}, False: {"mixed_precision": "no"}}
    values["bf16"] = {"mixed_precision": "bf16"}
    return _one_of(values, "float16 needs loss scaling, which TrainStep has not; write bf16, or no")(value)


def _teacher(value: Any) -> dict[str, Any]:
    return {} if value in (None, "None", "none") else {"representation_encoder": value}


def _mask_type(value: Any) -> dict[str, Any]:
    if value == "structured_with_random_offset_3D":
        raise ValueError(f"{value!r} is for videos, and train.py reads images: write structured_with_random_offset")
    return {"mask_type": value}


def _checkpoint(value: Any) -> dict[str, Any]:
    return {} if value in (None, "", "None") else {"init_from": value}


COMPILE = Unused("TrainStep and CapturedModel compile blocks and capture CUDA graphs by themselves")
LOADER = Unused("the loader keeps its workers and pins memory where there is a GPU")
EVALUATE = Unused("samples are drawn and judged by sample.py and evaluate.py")

TRAINING: dict[str, str | Rule | Unused] = {
    "logging.output_dir": "output_dir",
    "logging.exp_name": "exp_name",
    "logging.project_name": Unused("trackers get the run's folder as its name"),
    "logging.logging_dir": Unused("logs are in the run's folder"),
    "logging.report_to": _one_of(
        {name: {"report_to": name} for name in ("tensorboard", "wandb", "none")}, "one of tensorboard, wandb, none"
    ),
    **dict.fromkeys((f"compile.{name}" for name in ("enabled", "mode", "backend", "fullgraph", "dynamic")), COMPILE),
    "model.arch": _one_of({"sit": {}}, "the only architecture is SiT"),
    "model.type": _one_of({size.lower(): {"model": f"{size}/2"} for size in ("S", "B", "L", "XL")}, "S, B, L or XL"),
    "model.network_config.context_size": "input_size",
    "model.network_config.patch_size": "patch_size",
    "model.network_config.in_channels": "in_channels",
    "model.network_config.num_classes": "num_classes",
    "model.network_config.class_dropout_prob": "class_dropout_prob",
    "model.network_config.use_swiglu_large": Unused("released models have the plain MLP whatever it says, and so have ours"),
    "model.network_config.q_norm": _norm,
    "model.network_config.k_norm": _norm,
    "model.network_config.representation_align": "representation_align",
    "model.network_config.representation_depth": "representation_depth",
    "model.network_config.encoder_depth": "encoder_depth",
    "model.network_config.middle_depth": "middle_depth",
    "model.network_config.decoder_depth": "decoder_depth",
    "model.network_config.use_mask_restore": _one_of({True: {}}, "the mask token stands at dropped places, true"),
    "model.network_config.cfg_mask_prob": "path_drop_prob",
    "model.network_config.residual_type": _one_of(
        {"concat_linear": {"residual_type": "both"}}, "SPRINT's fusion is concat_linear; our own files "
        "have its ablations, residual_type=deep and shallow"
    ),
    "model.network_config.use_checkpoint": "activation_checkpointing",
    "dataset.data_dir": "data_dir",
    "dataset.resolution": lambda value: {"resolution": value},
    "dataset.batch_size": "batch_size",
    "dataset.num_workers": "num_workers",
    **dict.fromkeys((f"dataset.{name}" for name in ("prefetch_factor", "persistent_workers", "pin_memory")), LOADER),
    "optimization.allow_tf32": "allow_tf32",
    "optimization.mixed_precision": _fp16,
    "optimization.epochs": Unused("max_train_steps ends the run"),
    "optimization.max_train_steps": "max_train_steps",
    "optimization.resume_step": Unused("the same command goes on from the newest checkpoint by itself"),
    "optimization.gradient_accumulation_steps": "gradient_accumulation_steps",
    "optimization.max_grad_norm": "max_grad_norm",
    "optimization.seed": "seed",
    "optimization.learning_rate": "learning_rate",
    "optimization.adam_beta1": "adam_beta1",
    "optimization.adam_beta2": "adam_beta2",
    "optimization.adam_weight_decay": "adam_weight_decay",
    "optimization.adam_epsilon": "adam_epsilon",
    "optimization.finetune": lambda value: {"finetune": value},
    "optimization.ckpt": _checkpoint,
    "optimization.warmup_steps": "warmup_steps",
    "optimization.warmup_start_factor": Unused("the rate rises from its first step's share, 1 / warmup_steps"),
    "optimization.adaptive_grad_clip": Unused("gradients are clipped at max_grad_norm in every step"),
    "optimization.clip_ema_decay": Unused("it belongs to adaptive_grad_clip"),
    "optimization.update_ema_with_model": _one_of({False: {}}, "the average follows after every update, false"),
    "loss.path_type": "path_type",
    "loss.prediction": "prediction",
    "loss.weighting": "weighting",
    "loss.cfg_prob": lambda value: {"cfg_prob": value},
    "loss.enc_type": _teacher,
    "loss.proj_coeff": "representation_weight",
    "loss.mask_config.mask_ratio": "mask_ratio",
    "loss.mask_config.mask_type": _mask_type,
    "evaluation.checkpointing_steps": "checkpointing_steps",
    "evaluation.checkpointing_steps_list": Unused("checkpoints are kept by their number, checkpoints_total_limit"),
    "evaluation.checkpoints_total_limit": "checkpoints_total_limit",
    "evaluation.sampling_steps": "sampling_steps",
    **dict.fromkeys(
        (
            f"evaluation.{name}"
            for name in (
                "ref_path", "eval_fid", "evaluation_steps", "evaluation_number_samples", "evaluation_batch_size",
                "evaluation_num_steps",
            )
        ),
        EVALUATE,
    ),
}  # fmt: skip

SAMPLING: dict[str, str | Rule | Unused] = {
    "resolution": lambda value: {"side": int(value) // 8},
    "name": "out",
    "ckpt_path": "checkpoint",
    "seed.global_seed": "seed",
    "precision.tf32": Unused("products are float32, or those of --dtype"),
    "profile.enabled": Unused("use torch.profiler around sprint.sample"),
    "compile.*": COMPILE,
    "model.*": Unused("the checkpoint tells its sizes"),
    "sampling.per_proc_batch_size": "batch",
    "sampling.num_fid_samples": "count",
    "sampling.mode": _one_of({"ode": {"solver": "euler"}, "sde": {"solver": "sde"}}, "ode or sde"),
    "sampling.path_type": "interpolant",
    "sampling.prediction": _one_of({"v": {}}, "the checkpoints predict v"),
    "sampling.num_steps": "steps",
    "sampling.cfg_scale": "scale",
    "sampling.guidance_low": lambda value: {"low": value},
    "sampling.guidance_high": lambda value: {"high": value},
    "sampling.path_drop_guidance": _one_of({True: {"guidance": "pdg"}, False: {"guidance": "cfg"}}, "true or false"),
}


def is_training(content: Mapping[str, Any]) -> bool:
    """Whether a file is one of the reference's for training."""
    model = content.get("model")
    return isinstance(model, dict) and "network_config" in model and "sampling" not in content


def is_sampling(content: Mapping[str, Any]) -> bool:
    """Whether a file is one of the reference's for sampling."""
    return isinstance(content.get("sampling"), dict) or "ckpt_path" in content


def training(content: Mapping[str, Any]) -> dict[str, Any]:
    """A training file's options under our names.

    Raises:
        ValueError: unknown keys, values that we have not, or contradictions.
    """
    options = _translated(content, TRAINING)
    side, resolution = options.get("input_size"), options.pop("resolution", None)
    if side is not None and resolution is not None and resolution != 8 * side:
        raise ValueError(f"dataset.resolution={resolution}, but context_size={side} is that of {8 * side} px: correct one")
    label_drop = options.pop("cfg_prob", None)
    if label_drop is not None and options.setdefault("class_dropout_prob", label_drop) != label_drop:
        raise ValueError(
            f"loss.cfg_prob={label_drop} and class_dropout_prob={options['class_dropout_prob']} are one option here, the "
            "probability of the null condition: give them one value"
        )
    finetune = options.pop("finetune", "init_from" in options)
    if finetune and "init_from" not in options:
        raise ValueError("optimization.finetune is true without a ckpt to start from: give optimization.ckpt")
    if not finetune and options.pop("init_from", None) is not None:
        _say({"optimization.ckpt": "optimization.finetune is false"})
    if options.get("mask_ratio") == 0:
        options.pop("mask_type", None)  # as the fine-tuning files say "no dropping"
    return options


def sampling(content: Mapping[str, Any]) -> dict[str, Any]:
    """A sampling file's options under the names of sample.py's command line.

    Raises:
        ValueError: as `training`.
    """
    options = _translated(content, SAMPLING)
    options["interval"] = [float(options.pop("low", 0.0)), float(options.pop("high", 1.0))]
    scale = float(options.get("scale", 1.0))
    if scale < 1:
        raise ValueError(f"sampling.cfg_scale must be 1 (off) or more, got {scale}")
    if scale == 1:
        options["guidance"] = "none"
    return options


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _translated(content: Mapping[str, Any], table: dict[str, str | Rule | Unused]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    unused: dict[str, str] = {}
    for key, value in _flat(content).items():
        entry = table.get(key) or table.get(f"{key.split('.')[0]}.*")
        if entry is None:
            near = difflib.get_close_matches(key, table, n=3)
            raise ValueError(
                f"unknown option {key!r} in a configuration of the reference's names: "
                + (f"did you mean {' or '.join(near)}?" if near else "it is in no table of reference_config.py")
            )
        if isinstance(entry, Unused):
            unused[key] = entry
            continue
        try:
            taken = {entry: value} if isinstance(entry, str) else entry(value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: {error}") from error
        for name, ours in taken.items():
            if name in options and options[name] != ours:
                raise ValueError(f"{key} gives {name}={ours!r}, another key {options[name]!r}: give them one value")
            options[name] = ours
    _say(unused)
    return options


def _say(unused: dict[str, str]) -> None:
    """What has no effect, once, by reason."""
    if os.environ.get("RANK", "0") != "0":
        return
    reasons: dict[str, list[str]] = {}
    for key, reason in unused.items():
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        print(f"not used here: {', '.join(keys)}, because {reason}", file=sys.stderr)
