"""Train a SPRINT model on prepared latents, on one GPU or many, in one stage or both.

    accelerate launch examples/imagenet/train.py --config examples/imagenet/configs/256.yaml --set data_dir=latents256
    accelerate launch examples/imagenet/train.py --config examples/imagenet/configs/256.yaml --set stages=both

Killed at any moment, the same command goes on from the newest checkpoint, with the same numbers: what a step draws depends
on the seed, the step and the process alone. The options are in config.py, the walk-through in docs/imagenet.md.
"""

import dataclasses
import importlib.util
import math
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from config import Config
from errors import plain_errors
from log import Log
from reading import parse
from run import Run, build, precision
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import sprint
from sprint.data.images import save_grid, to_uint8
from sprint.data.latents import SCALE
from sprint.data.teacher import Teacher
from sprint.data.vae import VAE, unscaled
from sprint.random import normal
from sprint.training.order import Batches, DataOrder, seed_of
from sprint.training.parallel import leave

VAE_NAME = "stabilityai/sd-vae-ft-mse"


class Objective:
    """Flow matching on latents drawn from their moments; `TrainStep` calls it."""

    def __init__(self, config: Config) -> None:
        self.scaling: dict[str, Any] = {"scale": config.latent_scale, "shift": config.latent_shift}
        self.flow = sprint.FlowMatchingLoss(
            interpolant=config.path_type,
            time=config.weighting,
            prediction=config.prediction,
            repa_weight=config.representation_weight,
        )

    def __call__(self, model: Any, moments: torch.Tensor, y: torch.Tensor, target: Any = None, *, drop: Any) -> Any:
        latents = sprint.data.draw_latents(moments, **self.scaling)
        return self.flow(model, latents, y=y, drop=drop, repa_target=target)


def open_data(config: Config) -> sprint.data.LatentDataset:
    """The prepared latents, if they are those that the configuration is about."""
    data = sprint.data.LatentDataset(config.data_dir, aligned=config.representation_align)
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
    if config.representation_align and data.teacher and len(data[0][2]) != math.prod(token_grid(config, data)):
        raise ValueError(
            f"{config.data_dir} has {len(data[0][2])} features per image for {math.prod(token_grid(config, data))} tokens: "
            f"prepare it with --patch {config.patch_size}"
        )
    return data


def settled(config: Config, data: sprint.data.LatentDataset) -> Config:
    """The options with what is known of the latents in the place of None.

    Raises:
        ValueError: the file says otherwise.
    """
    found: dict[str, Any] = {}
    pixels = (config.vae or data.about.get("vae")) == "none"
    for name, usual in (("latent_scale", 1.0 if pixels else SCALE), ("latent_shift", 0.0), ("vae", VAE_NAME)):
        given, kept = getattr(config, name), data.about.get(name)
        if name != "vae" and None not in (given, kept) and given != kept:
            raise ValueError(f"{name}={given}, but {config.data_dir} was prepared with {kept}: leave {name} out")
        found[name] = given if given is not None else usual if kept is None else kept
        if isinstance(found[name], list) and len(found[name]) != data.shape[0] // 2:
            raise ValueError(f"{name} has {len(found[name])} numbers, the latents {data.shape[0] // 2} channels")
    return dataclasses.replace(config, **found)


def build_teacher(
    config: Config, data: sprint.data.LatentDataset, device: torch.device
) -> tuple[Teacher | None, int | None]:
    """REPA's teacher, unless its features were prepared; and their width."""
    if not config.representation_align:
        return None, None
    if data.teacher is not None:
        return None, data[0][2].shape[-1]
    teacher = Teacher(config.teacher, token_grid(config, data), weights=config.representation_weights).to(device)
    return teacher, teacher.dim


def build_vae(config: Config, data: sprint.data.LatentDataset, device: torch.device) -> VAE | None:
    """The VAE that decodes sample grids, loaded before anything is trained; another one than the latents' is compared."""
    channels, other = data.shape[0] // 2, config.vae not in (VAE_NAME, data.about.get("vae"))
    if not (config.sampling_steps or other) or config.vae == "none":
        if config.sampling_steps and channels not in (1, 3):
            raise ValueError(f"vae=none, but {channels} channels are no picture: name the latents' VAE, or sampling_steps=0")
        return None
    assert config.vae is not None  # settled
    vae = VAE.from_pretrained(config.vae)
    if vae.channels != channels:
        raise ValueError(f"vae={config.vae} has {vae.channels} channels, the latents {channels}: name theirs")
    numbers = [list(n) if isinstance(n, list | tuple) else n for n in (vae.scale, vae.shift)]
    if other and numbers != [config.latent_scale, config.latent_shift]:
        raise ValueError(
            f"vae={config.vae} has latent_scale={vae.scale} and latent_shift={vae.shift}, and these latents "
            f"{config.latent_scale} and {config.latent_shift}: name their own VAE, or give latent_scale and latent_shift"
        )
    return vae.to(device) if config.sampling_steps else None


def token_grid(config: Config, data: sprint.data.LatentDataset) -> tuple[int, int]:
    """(rows, columns) of the tokens."""
    return data.shape[-2] // config.patch_size, data.shape[-1] // config.patch_size


@torch.no_grad()
def draw(config: Config, ema: torch.nn.Module, vae: Any, shape: tuple[int, ...], device: Any, *, file: Path | None) -> None:
    """Sixteen samples, into a file on the main process; all compute them: with FSDP2 each holds a share."""
    y = torch.arange(16, device=device) * config.num_classes // 16
    noise = normal((16, *shape), device=device, generator=torch.Generator().manual_seed(config.seed))
    guidance = sprint.PathDropGuidance(config.guidance_scale)
    with torch.autocast(device.type, precision(config), enabled=precision(config) is not None):
        latents = sprint.sample(
            ema, noise, y=y, steps=50, interpolant=config.path_type, prediction=config.prediction, guidance=guidance
        )
    scaling = {"scale": config.latent_scale, "shift": config.latent_shift}
    latents = unscaled(latents, **scaling) if vae is None else vae.decode(latents, **scaling)
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        save_grid(to_uint8(latents), file)


def batches(loader: Any, config: Config, teacher: Teacher | None, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Moments, labels and, with REPA, the teacher's features, on the device."""
    for batch in loader:
        tensors = [tensor.to(device, non_blocking=True) for tensor in batch]
        if teacher is not None:
            with torch.autocast(device.type, precision(config), enabled=precision(config) is not None):
                tensors[2] = teacher(tensors[2])
        yield tensors


def introduce(run: Run, begin: int, plans: list[Batches], grid: tuple[int, int]) -> None:
    """Say what is trained, what dropping will save, and what will not fit into memory."""
    plan, tokens, model = (
        plans[0],
        math.prod(grid),
        sprint.SiT(run.sit).set_checkpointing(run.config.activation_checkpointing),
    )
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {plan.order.count} images, {plan.share[1]} processes, from step {begin} on")
    for plan in plans:
        if begin >= plan.end:
            continue
        first = max(begin, plan.start)
        drop = run.config.schedule().at(first).drop
        predicted = sprint.cost(model, grid=grid, drop=drop or sprint.StructuredDrop(0.75), batch=plan.each(first))
        if drop is not None and begin == 0:
            kept = drop.sample(1, grid).num_kept
            print(f"{kept} of {tokens} tokens ({100 * kept / tokens:.3g} %) pass through the middle blocks")
            print(predicted)
        path = "shallow" if run.sit.sources == "shallow" else "full" if drop is None else "sparse"
        states = (2 * predicted.weights + predicted.states) / (plan.share[1] if run.config.parallel == "fsdp" else 1)
        needed = states + predicted.memory(path) - predicted.weights - predicted.states
        if needed > (there := memory(run.device)):
            print(
                f"WARNING: steps from {first} on, of {plan.each(first)} images on {path} tokens, take about "
                f"{needed / 2**30:.1f} GiB, and there are {there / 2**30:.1f}: raise gradient_accumulation_steps, or set "
                "activation_checkpointing=true, or parallel=fsdp on several GPUs"
            )


class Terminated:
    """Whether this run was asked to end (SIGTERM, as schedulers send before they kill): it then saves and ends."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.asked = True

    def everywhere(self, accelerator: Accelerator, step: int) -> bool:
        """Whether any process was asked; several look every tenth step, since to ask the others waits for the device."""
        if accelerator.num_processes == 1:
            return self.asked
        if step % 10:
            return False
        asked: Any = accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum")
        return asked.item() > 0


def outlive(worker: int) -> None:
    """Readers go on after SIGTERM, which a whole process group gets; they end with the process that they read for."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def memory(device: torch.device) -> int:
    """Bytes of a device, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def train(config: Config, accelerator: Accelerator) -> None:
    """The whole run: everything is checked and loaded before the first step."""
    device, main = accelerator.device, accelerator.is_main_process
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    data, schedule = open_data(config), config.schedule()
    config = settled(config, data)
    order, share = DataOrder(len(data), seed=config.seed), (accelerator.process_index, accelerator.num_processes)
    switch = schedule.pretrain.steps
    stages = [(0, switch), (switch, schedule.steps)] if schedule.finetune else [(0, switch)]
    plans = [
        Batches(order, schedule, first, end, share=share, accumulate=config.accumulation(stage))
        for stage, (first, end) in enumerate(stages)
    ]
    teacher, repa_dim = build_teacher(config, data, device)
    shape = (data.shape[0] // 2, *data.shape[1:])
    vae = build_vae(config, data, device)
    run, log = build(config, data, repa_dim, device), Log(config.folder, accelerator)
    begin = last = run.resume(log, accelerator)
    if main:
        introduce(run, begin, plans, token_grid(config, data))
    terminated = Terminated()
    bar = tqdm(initial=begin, total=schedule.steps, disable=not main, unit="step", dynamic_ncols=True)
    for plan in plans:
        if begin >= plan.end:
            continue
        plan.start = max(begin, plan.start)
        step = sprint.TrainStep(
            run.model, Objective(config), run.optimizer, clip=config.max_grad_norm, ema=run.average(plan.start),
            ema_decay=config.ema_decay, accumulate=plan.accumulate, autocast=precision(config),
        )  # fmt: skip
        workers: dict[str, Any] = {"num_workers": config.num_workers, "pin_memory": device.type == "cuda"}
        workers["worker_init_fn"] = outlive
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
            ends = terminated.everywhere(accelerator, done)
            logs = done % config.logging_steps == 0
            saves = ends or done % config.checkpointing_steps == 0 or done == schedule.steps
            if logs or saves:
                sums = log.check(done, last)
                if logs:
                    said = log.write(done, sums, lr=moment.lr, stage=moment.stage)
                    bar.set_postfix({"loss": f"{said['loss']:.4f}", "images/s": f"{said['images_per_s']:.4g}"})
                if saves:
                    run.save(done, log.window(sums), accelerator)
                    last = done
            if ends:
                print(f"asked to end (SIGTERM): step {done} is saved, and the same command goes on from there")
                leave()
                raise SystemExit(128 + signal.SIGTERM)
            if config.sampling_steps and done % config.sampling_steps == 0:
                draw(
                    config, run.ema, vae, shape, device, file=config.folder / "samples" / f"{done:08d}.png" if main else None
                )
    run.export(accelerator)


def main() -> None:
    config, file = parse(__doc__)
    tracker = None if config.report_to == "none" else config.report_to
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise SystemExit(f"report_to={tracker} is not installed: pip install {tracker}, or report_to=none")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # of the others, while one writes a large checkpoint
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=tracker, project_dir=config.folder, kwargs_handlers=[patience]
    )
    try:
        with plain_errors(str(file)):
            if tracker:
                plain = {k: v for k, v in dataclasses.asdict(config).items() if isinstance(v, int | float | str)}
                accelerator.init_trackers("sprint", plain)
            train(config, accelerator)
            leave()
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    main()
