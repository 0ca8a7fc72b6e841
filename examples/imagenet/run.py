"""What train.py trains, from its building to its checkpoints."""

import copy
import dataclasses
import json
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from config import Config
from log import Log

import sprint
from sprint.checkpoint import load_weights
from sprint.models.loading import from_state, load_model
from sprint.training.order import seed_of
from sprint.training.parallel import distribute, full_state, load_full_state

# Options that may change when a run goes on; another value of any other one makes it another run.
FREE = {
    "learning_rate", "warmup_steps", "lr_schedule", "max_train_steps", "max_grad_norm", "ema_decay", "ema_warmup",
    "finetune", "gradient_accumulation_steps", "activation_checkpointing", "parallel", "allow_tf32", "data_dir",
    "num_workers", "init_from", "output_dir", "exp_name", "checkpointing_steps", "checkpoints_total_limit",
    "logging_steps", "report_to", "sampling_steps", "guidance_scale", "vae", "representation_weights",
}  # fmt: skip
TRAINING = (
    "label_drop",
    "path_drop",
    "learnable_mask",
    "repa_depth",
)  # of a model's options, those that its function ignores


def precision(config: Config) -> torch.dtype | None:
    """Of the products."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else None


def build(config: Config, data: sprint.data.LatentDataset, repa_dim: int | None, device: torch.device) -> "Run":
    """Model, average and optimizer, over all processes."""
    sit, dtype = config.sit(channels=data.shape[0] // 2, repa_dim=repa_dim), precision(config)
    folder = sprint.training.RunFolder(config.folder, keep=config.checkpoints_total_limit)
    torch.manual_seed(seed_of(config.seed))
    model = sprint.SiT(sit)
    if config.init_from is not None and not folder.steps:
        begin_from(config.init_from, model, config)
    if sit.sources == "shallow":
        model.middle.blocks.requires_grad_(False)  # they never run, and DDP would wait for their gradients
    model = model.to(device).train().set_checkpointing(config.activation_checkpointing)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = distribute(model, config.parallel, dtype=dtype)
    if config.parallel == "fsdp":
        ema = distribute(ema, "fsdp", dtype=dtype)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    whole = parameters[0].is_cuda and not hasattr(parameters[0], "placements")
    adamw: Any = sprint.AdamW if whole else torch.optim.AdamW  # sprint's is one kernel per whole parameter
    optimizer = adamw(
        parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )  # fmt: skip
    recipe = config.recipe(data.shape[-1], data.about.get("size")).to_json()
    return Run(config, sit, trained, ema, optimizer, data.fingerprint, folder, recipe)


def begin_from(path: str, model: sprint.SiT, config: Config) -> None:
    """Load the weights of a model that is the same function of the same latents."""
    found = load_model(path)
    theirs, ours = dataclasses.asdict(found.config), dataclasses.asdict(model.config)
    if differ := [f"{k}={theirs[k]!r}, here {v!r}" for k, v in ours.items() if k not in TRAINING and theirs[k] != v]:
        raise ValueError(f"init_from={path} is another model, with {'; '.join(differ)}: set the options to its own")
    said, wanted = found.recipe, config.recipe(1, None)
    for name in ("interpolant", "latent_scale", "latent_shift"):
        was, now = getattr(said, name), getattr(wanted, name)
        if None not in (was, now) and was != now:
            raise ValueError(f"init_from={path} was trained with {name}={was!r}, here {now!r}: set the options to its own")
    load_weights(model, found.state_dict(), source=path)


class Warmed:
    """Averages whose decay rises to `decay`: (1 + n) / (10 + n) after n updates, as diffusers' EMAModel has it.

    Args:
        ema: follows the model; `TrainStep` calls `update_parameters`.
        decay: in the end.
        updates: done before.
    """

    def __init__(self, ema: torch.nn.Module, decay: float, updates: int) -> None:
        self.ema, self.decay, self.updates = ema, decay, updates

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """One step towards the weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        self.updates += 1
        pairs = [(a, p) for a, p in zip(self.ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
        averages, parameters = zip(*pairs, strict=True)
        torch._foreach_lerp_(averages, parameters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass
class Run:
    """A model in training."""

    config: Config
    sit: sprint.SiTConfig
    model: torch.nn.Module
    ema: torch.nn.Module
    optimizer: torch.optim.Optimizer
    data: str
    """Fingerprint of the dataset."""
    folder: sprint.training.RunFolder
    recipe: str
    """What sampling must know, as JSON."""

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    def average(self, updates: int) -> Any:
        """The averaged model as `TrainStep` takes it, after some updates."""
        return Warmed(self.ema, self.config.ema_decay, updates) if self.config.ema_warmup else self.ema

    def save(self, step: int, window: dict[str, Any], accelerator: Accelerator) -> None:
        """Write everything on the main process, whole or not at all."""
        state = full_state(self.model, self.optimizer)
        state["ema"] = full_state(self.ema)["model"]
        if accelerator.is_main_process:
            if broken := [name for name, tensor in state["model"].items() if not tensor.isfinite().all()]:
                raise SystemExit(f"{broken[0]} is not finite after step {step}, which is not saved: lower learning_rate")
            settings = {
                "options": json.dumps(dataclasses.asdict(self.config)),
                "sit": json.dumps(dataclasses.asdict(self.sit)),
                "recipe": self.recipe,
            }
            try:
                self.folder.save(step, {**state, **settings, "data": self.data, "window": window})
            except OSError as error:
                raise SystemExit(
                    f"step {step} could not be saved ({error}): make room; older checkpoints are whole"
                ) from error
        accelerator.wait_for_everyone()

    def resume(self, log: Log, accelerator: Accelerator) -> int:
        """Take up the newest whole checkpoint; returns the step to go on from, 0 without a checkpoint."""
        state: dict[str, Any] = {}
        told: list[Any] = [None]
        if accelerator.is_main_process:
            self.folder.lock()
            if (newest := self.folder.newest()) is not None:
                step, state = newest
                if not {"options", "sit", "data", "window"} <= state.keys():
                    raise SystemExit(f"{self.folder.path(step)} is no checkpoint of this script: use another exp_name")
                told[0] = (step, state["options"], state["data"], state["window"])
        told = broadcast_object_list(told)
        if told[0] is None:
            log.go_back(0, {"sums": {}, "counts": {}})
            return 0
        step, options, data, window = told[0]
        if differ := self._differences(step, json.loads(options), data):
            raise SystemExit(f"{self.config.folder} is a run with {'; '.join(differ)}: use another exp_name, or its options")
        load_full_state(state, self.model, self.optimizer)
        load_full_state({"model": state.get("ema", {})}, self.ema)
        log.go_back(step, window)
        return step

    def export(self, accelerator: Accelerator) -> None:
        """Write the averaged model for sample.py, on the main process."""
        ema = full_state(self.ema)["model"]
        if accelerator.is_main_process:
            path = self.config.folder / "model.safetensors"
            settings = {"sit": json.dumps(dataclasses.asdict(self.sit)), "recipe": self.recipe}
            from_state({"ema": ema, **settings}, "this run").save(path)
            print(f"{path}: the averaged model, for sample.py")

    def _differences(self, step: int, theirs: dict[str, Any], data: str) -> list[str]:
        ours = json.loads(json.dumps(dataclasses.asdict(self.config)))
        usual = json.loads(json.dumps(dataclasses.asdict(Config(latent_shift=0.0))))  # of options newer than the run
        theirs = usual | theirs
        differ = [f"{k}={theirs[k]!r}, now {v!r}" for k, v in ours.items() if k not in FREE and theirs[k] != v]
        switch = min(theirs["max_train_steps"], self.config.max_train_steps)
        was, now = theirs["max_train_steps"], self.config.max_train_steps
        if self.config.stages == "both" and was != now and step > switch:
            differ.append(f"max_train_steps={was}, now {now}, after its second stage began")
        if data != self.data:
            differ.append(f"other latents than those in {self.config.data_dir}")
        if step > (steps := self.config.schedule().steps):
            differ.append(f"{step} steps done, now {steps} in all")
        return differ
