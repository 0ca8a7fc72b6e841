"""Train a SPRINT model on prepared latents, on one GPU or many, in one stage or both.

    accelerate launch examples/imagenet/train.py --config examples/imagenet/configs/256.yaml --set data_dir=latents256
    accelerate launch examples/imagenet/train.py --config examples/imagenet/configs/256.yaml --set stages=both

Killed at any moment, the same command goes on from the newest checkpoint, with the same numbers: what a step draws depends
on the seed, the step and the process alone. The options are in config.py, the walk-through in docs/imagenet.md.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from config import Config, read
from log import Log
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from weights import from_state, load

import sprint
from sprint.checkpoint import load_weights
from sprint.images import save_grid, to_uint8
from sprint.order import Batches, DataOrder, seed_of
from sprint.parallel import distribute, full_state, load_full_state
from sprint.random import normal
from sprint.teacher import Teacher

# Options that may change when a run goes on; another value of any other one makes it another run.
FREE = {
    "learning_rate", "warmup_steps", "lr_schedule", "max_train_steps", "max_grad_norm", "ema_decay", "finetune",
    "gradient_accumulation_steps", "activation_checkpointing", "parallel", "allow_tf32", "data_dir", "num_workers",
    "init_from", "output_dir", "exp_name", "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "report_to",
    "sampling_steps", "guidance_scale", "vae", "representation_weights",
}  # fmt: skip


class Objective:
    """Flow matching on latents drawn from their moments; `TrainStep` calls it."""

    def __init__(self, config: Config) -> None:
        self.scale = config.latent_scale
        self.flow = sprint.FlowMatchingLoss(
            interpolant=config.path_type,
            time=config.weighting,
            prediction=config.prediction,
            repa_weight=config.representation_weight,
        )

    def __call__(self, model: Any, moments: torch.Tensor, y: torch.Tensor, target: Any = None, *, drop: Any) -> Any:
        latents = sprint.draw_latents(moments, scale=self.scale)
        return self.flow(model, latents, y=y, drop=drop, repa_target=target)


@dataclasses.dataclass
class Run:
    """What is trained, and what its checkpoints hold."""

    config: Config
    sit: sprint.SiTConfig
    model: torch.nn.Module
    ema: torch.nn.Module
    optimizer: torch.optim.Optimizer
    samples: int
    grid: tuple[int, int]
    folder: sprint.RunFolder

    def save(self, step: int, window: dict[str, Any], accelerator: Accelerator) -> None:
        """Write everything on the main process, whole or not at all."""
        state = full_state(self.model, self.optimizer)
        state["ema"] = full_state(self.ema)["model"]
        if accelerator.is_main_process:
            texts = {name: json.dumps(dataclasses.asdict(value)) for name, value in self._settings().items()}
            try:
                self.folder.save(step, {**state, **texts, "samples": self.samples, "window": window})
                if step == self.config.schedule().steps:
                    from_state({**texts, **state}, "this run").save(self.config.folder / "model.safetensors")
            except OSError as error:
                raise SystemExit(
                    f"step {step} could not be saved ({error}): make room; older checkpoints are whole"
                ) from error
        accelerator.wait_for_everyone()

    def resume(self, log: Log, accelerator: Accelerator) -> int:
        """Take up the newest whole checkpoint; returns the step to go on from, 0 without a checkpoint."""
        state: dict[str, Any] = {}
        told: list[Any] = [None]
        if accelerator.is_main_process and (newest := self.folder.newest()) is not None:
            step, state = newest
            if not {"options", "sit", "samples", "window"} <= state.keys():
                raise SystemExit(f"{self.folder.path(step)} is no checkpoint of this script: use another exp_name")
            told[0] = (step, state["options"], state["samples"], state["window"])
        told = broadcast_object_list(told)
        if told[0] is None:
            log.go_back(0, {"sums": {}, "counts": {}})
            return 0
        step, options, samples, window = told[0]
        theirs, ours = json.loads(options), json.loads(json.dumps(dataclasses.asdict(self.config)))
        differ = [f"{k}={theirs.get(k)!r}, now {v!r}" for k, v in ours.items() if k not in FREE and theirs.get(k) != v]
        if samples != self.samples:
            differ.append(f"{samples} images, now {self.samples}")
        if differ:
            raise SystemExit(
                f"{self.config.folder} is a run with {'; '.join(differ)}: use another exp_name, or the same options"
            )
        load_full_state(state, self.model, self.optimizer)
        load_full_state({"model": state.get("ema", {})}, self.ema)
        log.go_back(step, window)
        return step

    def _settings(self) -> dict[str, Any]:
        return {"options": self.config, "sit": self.sit}


def open_data(config: Config) -> sprint.LatentDataset:
    """The prepared latents, if they are those that the configuration is about."""
    data = sprint.LatentDataset(config.data_dir, aligned=config.representation_align)
    side, channels = data.shape[-1], data.shape[0] // 2
    if config.input_size not in (None, side):
        raise ValueError(f"input_size={config.input_size}, but the latents in {config.data_dir} are {side} wide")
    if config.in_channels not in (None, channels):
        raise ValueError(f"in_channels={config.in_channels}, but the latents in {config.data_dir} have {channels}")
    if (top := int(data.labels.max())) >= config.num_classes:
        raise ValueError(f"{config.data_dir} has class {top}, but num_classes={config.num_classes}: raise it")
    if side % config.patch_size:
        raise ValueError(f"latents {side} wide do not split into patches of {config.patch_size}: change patch_size")
    if config.representation_align and data.teacher not in (None, config.teacher):
        raise ValueError(f"{config.data_dir} holds features of {data.teacher}, but representation_encoder={config.teacher}")
    if drop := config.drop():
        drop.sample(1, token_grid(config, data))  # raises where the grid has no such ratio
    return data


def build_teacher(config: Config, data: sprint.LatentDataset, device: torch.device) -> tuple[Teacher | None, int | None]:
    """REPA's teacher, unless its features were prepared; and their width."""
    if not config.representation_align:
        return None, None
    if data.teacher is not None:
        return None, data[0][2].shape[-1]
    teacher = Teacher(config.teacher, token_grid(config, data), weights=config.representation_weights).to(device)
    return teacher, teacher.dim


def build_vae(config: Config, channels: int, device: torch.device) -> Any:
    """The VAE that decodes sample grids, loaded before anything is trained."""
    if not config.sampling_steps or config.vae == "none":
        if config.sampling_steps and channels not in (1, 3):
            raise ValueError(f"vae=none, but {channels} channels are no picture: name the latents' VAE, or sampling_steps=0")
        return None
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(config.vae)
    return vae.to(device).eval()


def build(config: Config, data: sprint.LatentDataset, repa_dim: int | None, device: torch.device) -> Run:
    """Model, average and optimizer, over all processes."""
    sit, dtype = config.sit(channels=data.shape[0] // 2, repa_dim=repa_dim), precision(config)
    torch.manual_seed(seed_of(config.seed))
    model = sprint.SiT(sit)
    if config.init_from is not None:
        load_weights(model, load(Path(config.init_from)).state_dict(), source=config.init_from)
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
    folder = sprint.RunFolder(config.folder, keep=config.checkpoints_total_limit)
    return Run(config, sit, trained, ema, optimizer, len(data), token_grid(config, data), folder)


def token_grid(config: Config, data: sprint.LatentDataset) -> tuple[int, int]:
    """(rows, columns) of the tokens."""
    return data.shape[-2] // config.patch_size, data.shape[-1] // config.patch_size


def precision(config: Config) -> torch.dtype | None:
    """Of the products."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else None


@torch.no_grad()
def draw(config: Config, ema: torch.nn.Module, vae: Any, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Sixteen samples, uint8; all processes compute them, since with FSDP2 each holds a share of the model."""
    y = torch.arange(16, device=device) * config.num_classes // 16
    noise = normal((16, *shape), device=device, generator=torch.Generator().manual_seed(config.seed))
    guidance = sprint.PathDropGuidance(config.guidance_scale)
    with torch.autocast(device.type, precision(config), enabled=precision(config) is not None):
        latents = sprint.sample(
            ema, noise, y=y, steps=50, interpolant=config.path_type, prediction=config.prediction, guidance=guidance
        )
    return to_uint8(latents if vae is None else vae.decode(latents / config.latent_scale).sample)


def batches(loader: Any, config: Config, teacher: Teacher | None, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Moments, labels and, with REPA, the teacher's features, on the device."""
    for batch in loader:
        tensors = [tensor.to(device, non_blocking=True) for tensor in batch]
        if teacher is not None:
            with torch.autocast(device.type, precision(config), enabled=precision(config) is not None):
                tensors[2] = teacher(tensors[2])
        yield tensors


def introduce(run: Run, begin: int, plan: Batches) -> None:
    """Say what is trained and, before the sparse stage, what it will save."""
    size = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {run.samples} images, {plan.share[1]} processes, from step {begin} on")
    if (drop := run.config.schedule().pretrain.drop) is not None and begin < plan.end:
        print(sprint.cost(sprint.SiT(run.sit), grid=run.grid, drop=drop, batch=plan.each(begin)))


def train(config: Config, accelerator: Accelerator) -> None:
    """The whole run: everything is checked and loaded before the first step."""
    device, main = accelerator.device, accelerator.is_main_process
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    data, schedule = open_data(config), config.schedule()
    order, share = DataOrder(len(data), seed=config.seed), (accelerator.process_index, accelerator.num_processes)
    switch = schedule.pretrain.steps
    stages = [(0, switch), (switch, schedule.steps)] if schedule.finetune else [(0, switch)]
    plans = [
        Batches(order, schedule, first, end, share=share, accumulate=config.accumulation(stage))
        for stage, (first, end) in enumerate(stages)
    ]
    teacher, repa_dim = build_teacher(config, data, device)
    shape = (data.shape[0] // 2, *data.shape[1:])
    vae = build_vae(config, shape[0], device)
    run, log = build(config, data, repa_dim, device), Log(config.folder, accelerator)
    begin = last = run.resume(log, accelerator)
    if main:
        introduce(run, begin, plans[0])
    bar = tqdm(initial=begin, total=schedule.steps, disable=not main, unit="step")
    for plan in plans:
        if begin >= plan.end:
            continue
        plan.start = max(begin, plan.start)
        step = sprint.TrainStep(
            run.model, Objective(config), run.optimizer, clip=config.max_grad_norm, ema=run.ema,
            ema_decay=config.ema_decay, accumulate=plan.accumulate, autocast=precision(config),
        )  # fmt: skip
        workers: dict[str, Any] = {"num_workers": config.num_workers, "pin_memory": device.type == "cuda"}
        stream = batches(DataLoader(data, batch_sampler=plan, **workers), config, teacher, device)
        for done in range(plan.start + 1, plan.end + 1):
            moment = schedule.at(done - 1)
            for group in run.optimizer.param_groups:
                group["lr"] = moment.lr
            for call in range(plan.accumulate):
                batch = next(stream)  # before the seed: a loader draws one of its own when it starts
                torch.manual_seed(seed_of(config.seed, done, call, share[0]))
                log.add(step(*batch, drop=moment.drop), moment.batch // plan.accumulate)
            bar.update()
            logs, saves = done % config.logging_steps == 0, done % config.checkpointing_steps == 0 or done == schedule.steps
            if logs or saves:
                sums = log.check(done, last)
                if logs:
                    log.write(done, sums, lr=moment.lr, stage=moment.stage)
                if saves:
                    run.save(done, log.window(sums), accelerator)
                    last = done
            if config.sampling_steps and done % config.sampling_steps == 0:
                images = draw(config, run.ema, vae, shape, device)
                if main:
                    (config.folder / "samples").mkdir(exist_ok=True)
                    save_grid(images, config.folder / "samples" / f"{done:08d}.png")
    if main:
        print(f"{config.folder / 'model.safetensors'}: the averaged model, for sample.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; the options are in config.py")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options that differ from the file")
    args = parser.parse_args()
    config = read(args.config, args.set)
    tracker = None if config.report_to == "none" else config.report_to
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise SystemExit(f"report_to={tracker} is not installed: pip install {tracker}, or report_to=none")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # of the others, while one writes a large checkpoint
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=tracker, project_dir=config.folder, kwargs_handlers=[patience]
    )
    try:
        if tracker:
            plain = {k: v for k, v in dataclasses.asdict(config).items() if isinstance(v, int | float | str)}
            accelerator.init_trackers("sprint", plain)
        train(config, accelerator)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise SystemExit(f"{args.config}: {error}") from error
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    main()
