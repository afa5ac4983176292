"""Tensor parallelism of decoder layers (Shoeybi et al. 2019), with sequence parallelism (Korthikanti et al. 2022).

Weights become DTensors: projections into heads and into the MLP are column-parallel (their output is sharded), projections out of
them are row-parallel (their input is sharded). With sequence parallelism, norms and residuals are sharded along the sequence;
without it they are replicated. Adapters are split with the layer that they adapt, so they must be in the model before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tandem.train.parallel.expert import ParallelExperts

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linear layers whose output is sharded."""
ROW_PARALLEL = ("o_proj", "down_proj")
"""Linear layers whose input is sharded."""
PER_HEAD = ("q_norm", "k_norm")
"""Norms over one head, which a rank applies to its own heads."""
SEQUENCE_DIM = 1
HEAD_DIM = 2


class TensorParallelLinear(ParallelStyle):
    """A linear layer, with the adapters that peft has put around it, computed on DTensors.

    `colwise`: the output features are sharded, and the input is replicated; otherwise the input features are sharded. DTensor
    inserts the communication that the layouts of input and output require.
    """

    def __init__(self, *, colwise: bool, input_layout: Any, output_layout: Any) -> None:
        super().__init__()
        self._colwise, self._input, self._output = colwise, input_layout, output_layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters()):
            self._split(module, name, parameter, device_mesh)
        module.register_forward_pre_hook(self._prepare(device_mesh))
        module.register_forward_hook(self._finish())
        return module

    def _split(self, module: nn.Module, name: str, parameter: nn.Parameter, mesh: DeviceMesh) -> None:
        inner = "lora_A" in name  # its output is the adapter's rank, which is not split
        outer = "lora_B" in name or "lora_magnitude" in name  # their input is the adapter's rank
        layout: Any = Replicate()
        if self._colwise and not inner:
            layout = Shard(0)
        elif not self._colwise and not outer and parameter.ndim > 1:
            layout = Shard(1)
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        sharded = distribute_tensor(parameter.detach(), mesh, [layout], src_data_rank=None)
        owner.register_parameter(leaf, nn.Parameter(sharded, requires_grad=parameter.requires_grad))

    def _prepare(self, mesh: DeviceMesh) -> Callable[..., Any]:
        placement = Replicate() if self._colwise else Shard(-1)

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *other_arguments = arguments
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, [self._input], run_check=False)
            # Without a change of layout, redistribute would still all-reduce the gradient in backward.
            return (x if x.placements == (placement,) else x.redistribute(placements=[placement]), *other_arguments)

        return hook

    def _finish(self) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: Any, output: DTensor) -> Any:
            return output.redistribute(placements=[self._output]).to_local()

        return hook


def split_tensors(model: Any, mesh: DeviceMesh, *, sequence_parallel: bool, loss_parallel: bool) -> None:
    """Split the decoder layers, the embedding and the head of a causal LM (or of a stage) over `mesh`, in place.

    With `loss_parallel` the logits stay sharded along the vocabulary, as a DTensor.
    """
    if mesh.size() == 1:
        return
    between: Any = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    inner, head = model.model, model.lm_head
    tied = inner.embed_tokens is not None and head is not None and head.weight is inner.embed_tokens.weight
    for layer in inner.layers.values() if isinstance(inner.layers, nn.ModuleDict) else inner.layers:
        parallelize_module(layer, mesh, _layer_plan(layer, between))
    plan: dict[str, ParallelStyle] = {}
    if inner.embed_tokens is not None:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    if head is not None:
        if sequence_parallel:
            plan["model.norm"] = SequenceParallel()
        plan["lm_head"] = _Head(between, keep=loss_parallel)
    parallelize_module(model, mesh, plan)
    if tied:
        head.weight = inner.embed_tokens.weight
    # torch's styles create new parameters, all with requires_grad.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _layer_plan(layer: nn.Module, between: Any) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {}
    sequence_parallel = isinstance(between, Shard)
    for name, _ in layer.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in COLUMN_PARALLEL:
            plan[name] = TensorParallelLinear(colwise=True, input_layout=Replicate(), output_layout=Shard(-1))
        elif leaf in ROW_PARALLEL:
            plan[name] = TensorParallelLinear(colwise=False, input_layout=Shard(-1), output_layout=between)
        elif leaf in PER_HEAD:
            plan[name] = SequenceParallel(sequence_dim=HEAD_DIM, use_local_output=True)
        elif sequence_parallel and leaf in ("input_layernorm", "post_attention_layernorm"):
            plan[name] = SequenceParallel(use_local_output=True)
    experts = any(isinstance(module, ParallelExperts) for module in layer.modules())
    # Attention and MLP need whole sequences. Their inputs stay DTensors up to the matrices, so that the gradients of all matrices
    # are summed before they are communicated: once, not once for each matrix.
    plan["self_attn"] = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": between}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )
    if not experts:
        plan["mlp"] = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
    elif sequence_parallel:
        # Experts return whole sequences; the last matrix of an MLP shards its output itself.
        plan["mlp"] = PrepareModuleInputOutput(
            input_layouts=(between,), desired_input_layouts=(Replicate(),), use_local_input=True,
            output_layouts=(Replicate(),), desired_output_layouts=(between,), use_local_output=True,
        )  # fmt: skip
    return plan


class _Head(TensorParallelLinear):
    """The output embedding: column-parallel, from hidden states in the layout between layers."""

    def __init__(self, between: Any, *, keep: bool) -> None:
        super().__init__(colwise=True, input_layout=between, output_layout=Shard(-1) if keep else Replicate())
        self._keep = keep

    def _finish(self) -> Callable[..., Any]:
        if not self._keep:
            return super()._finish()
        return lambda module, arguments, output: output.redistribute(placements=[Shard(-1)])
