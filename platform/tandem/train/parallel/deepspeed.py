"""DeepSpeed strategy: ZeRO stages 1, 2 and 3, with offload to CPU memory or to a disk.

DeepSpeed keeps float32 weights; lower precisions are autocast, as with DDP. The engine implements `ParallelModel`;
scaling the loss, counting micro-batches and the learning rate stay with the loop. Checkpoints are those of `deepspeed_state`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import cpp_extension

from tandem.checkpoint.tensors import ExportTensor
from tandem.config import DeepSpeedConfig, TrainConfig, to_dict
from tandem.errors import EnvironmentProblem
from tandem.ids import digest
from tandem.settings import export
from tandem.storage import disk_errors
from tandem.train.model.precision import LossScaler
from tandem.train.model.stage import whole_sequence
from tandem.train.optimizer import build_optimizer
from tandem.train.parallel.canonical import persistent_buffers
from tandem.train.parallel.deepspeed_state import ZeroState
from tandem.train.parallel.mesh import Mesh
from tandem.train.parallel.model import ParallelModel

PERSISTENCE_THRESHOLD = 100_000
"""Elements below which ZeRO 3 keeps a parameter unsharded on every rank; DeepSpeed's default."""
BUCKET = 50_000_000
"""Elements of a communication bucket, at most; 200 MB in float32."""


def check_deepspeed(config: TrainConfig) -> None:
    """Raise EnvironmentProblem if `config` uses DeepSpeed and this machine lacks a requirement of it."""
    if config.parallel.strategy != "deepspeed":
        return
    # Read when DeepSpeed is imported; otherwise it probes for devices, and warns if it finds none.
    export({"DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"})
    try:
        import deepspeed.ops.op_builder
    except ImportError as error:
        raise EnvironmentProblem(
            "parallel.strategy 'deepspeed' needs DeepSpeed, which is not installed here. `pip install 'tandem[deepspeed]'` "
            "brings it."
        ) from error
    options = config.deepspeed or DeepSpeedConfig()
    to_disk = [key for key in ("offload_optimizer", "offload_parameters") if getattr(options, key) == "nvme"]
    if not to_disk:
        return
    requirements = {
        "libaio with its header (`apt install libaio-dev`, or name its folders in CFLAGS and LDFLAGS)": (
            deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False)
        ),
        "a C++ compiler (`apt install g++`)": shutil.which(cpp_extension.get_cxx_compiler()),
        "ninja on the PATH (`pip install ninja`)": cpp_extension.is_ninja_available(),
    }
    if unmet := [name for name, met in requirements.items() if not met]:
        raise EnvironmentProblem(
            f"deepspeed.{to_disk[0]} is 'nvme', for which DeepSpeed compiles its async_io. Missing here: {', '.join(unmet)}. "
            f"Install it, or set {' and '.join(to_disk)} to 'cpu'."
        )


def wrap_in_deepspeed(
    model: nn.Module, mesh: Mesh, config: TrainConfig, device: torch.device
) -> tuple[DeepSpeedModel, Optimizer]:
    """`model` (a transformers causal LM, under peft or not, the same on every rank) in a DeepSpeed engine, and its optimizer.

    The process group is initialized. Raises EnvironmentProblem if this machine lacks a requirement, StorageError if the offload
    folder cannot be written.
    """
    check_deepspeed(config)
    import deepspeed

    # An op for inference: DeepSpeed would compile it here, for a minute, and training does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed selects the device LOCAL_RANK; Ray has selected one already.
    export({"LOCAL_RANK": str(device.index or 0)}, override=device.index is not None)
    optimizer = build_optimizer(model, config.optimizer, device)
    folder = offload_folder(config)
    if folder is not None:
        with disk_errors("offloading to deepspeed.nvme_path", folder):
            folder.mkdir(parents=True, exist_ok=True)
    options = engine_options(model, config, pin=device.type == "cuda")
    offload = options["zero_optimization"].get("offload_param", {})
    if offload.get("device") == "nvme":
        # Not left to the engine: on a CPU DeepSpeed 0.19 would then store bfloat16, and round the parameters on disk.
        deepspeed.zero.Init(
            module=model, config_dict_or_path=options, remote_device="nvme", pin_memory=offload["pin_memory"]
        )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    return DeepSpeedModel(engine, optimizer, mesh, folder), optimizer


def engine_options(model: nn.Module, config: TrainConfig, *, pin: bool) -> dict[str, Any]:
    """DeepSpeed's config for a job. `pin`: offload to pinned CPU memory, which a GPU can access."""
    options = config.deepspeed or DeepSpeedConfig()
    sizes = [p.numel() for p in model.parameters()]
    bucket = min(BUCKET, sum(sizes))
    zero: dict[str, Any] = {"stage": options.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if options.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD}
    for key, name in (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param")):
        device = getattr(options, key)
        if device != "none":
            zero[name] = {"device": device, "pin_memory": pin}
        if device == "nvme":
            zero[name]["nvme_path"] = str(offload_folder(config))
    if options.offload_parameters == "nvme":
        zero["offload_param"]["buffer_size"] = max(sizes)
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // config.parallel.data // config.accumulate,
        "gradient_accumulation_steps": config.accumulate,
        # torch's optimizer, on the CPU too: DeepSpeed's own would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def offload_folder(config: TrainConfig) -> Path | None:
    """The folder of a job's offload to a disk, which no other job uses; None without such offload."""
    if config.deepspeed is None or config.deepspeed.nvme_path is None:
        return None
    return Path(config.deepspeed.nvme_path).expanduser() / f"{config.name}-{digest(to_dict(config))[:12]}"


class DeepSpeedModel(ParallelModel):
    """A causal LM in a DeepSpeed engine."""

    _engine: Any

    def __init__(self, engine: Any, optimizer: Optimizer, mesh: Mesh, folder: Path | None) -> None:
        """`folder`: the engine's offload folder on a disk."""
        super().__init__()
        self._folder = folder
        self.mesh = mesh
        self.shard_sequence = whole_sequence
        self.pipeline = None
        self.model = engine.module
        # Not a submodule: the model would be registered twice.
        object.__setattr__(self, "_engine", engine)
        self._state = ZeroState.of(engine.optimizer, optimizer, self.whole)

    @property
    def whole(self) -> nn.Module:
        """See `ParallelModel`; under ZeRO 3, parameters that are not in use are empty."""
        model: nn.Module = self.model
        return model

    @property
    def sharded(self) -> bool:
        """False: ZeRO's parameters are float32, and autocast casts them."""
        return False

    def train(self, mode: bool = True) -> DeepSpeedModel:
        """See `nn.Module`."""
        super().train(mode)
        self._engine.train(mode)
        return self

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        """See `ParallelModel`."""
        return self._engine(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    @contextlib.contextmanager
    def gradients_synced(self, sync: bool) -> Iterator[None]:
        """See `ParallelModel`. ZeRO 2 and 3 keep gradients sharded, so they reduce those of each micro-batch."""
        self._engine.set_gradient_accumulation_boundary(sync)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `ParallelModel`."""
        # The loop has scaled the loss for the whole step: DeepSpeed must not divide it by the number of micro-batches.
        self._engine.backward(loss, scale_wrt_gas=False)

    def finish_gradients(self) -> None:
        """See `ParallelModel`: the engine has reduced all gradients."""

    def step(self, optimizer: Optimizer, limit: float, scaler: LossScaler | None, loss: Tensor) -> tuple[float, bool]:
        """See `ParallelModel`. DeepSpeed skips steps with non-finite gradients; it does not check the loss."""
        zero = self._engine.optimizer
        zero.clip_grad = limit
        if scaler:
            zero.override_loss_scale(scaler.scale)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if scaler:
            # The loop has scaled the loss: DeepSpeed must not scale it again.
            zero.override_loss_scale(1.0)
            scaler.accept(norm)
        return norm, bool(self._engine.was_step_applied())

    def weights(self) -> list[ExportTensor]:
        """See `ParallelModel`."""
        adapters = hasattr(self.whole, "peft_config")
        tensors: dict[str, Tensor] = {n: p for n, p in self.whole.named_parameters() if p.requires_grad or not adapters}
        if not adapters:
            tensors |= dict(persistent_buffers(self.whole))
        return [_export_tensor(name, tensor) for name, tensor in tensors.items()]

    def training_state(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """See `ParallelModel`."""
        return self._state.content()

    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: Optimizer) -> None:
        """See `ParallelModel`."""
        self._state.restore(content)

    def close(self) -> None:
        """See `ParallelModel`: removes the offload folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _export_tensor(name: str, tensor: Any) -> ExportTensor:
    @torch.no_grad()
    def gather() -> Tensor:
        with _gathered(tensor):
            full: Tensor = tensor.detach().clone()
        return full

    return ExportTensor(
        name=name, shape=tuple(getattr(tensor, "ds_shape", tensor.shape)), dtype=tensor.dtype, gather=gather
    )


@contextlib.contextmanager
def _gathered(parameter: Tensor) -> Iterator[None]:
    """Gather a parameter that ZeRO 3 has sharded, for a `with` block."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield
