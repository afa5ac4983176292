"""Training state of a DeepSpeed engine for checkpoints: chunks of parameters, by the names and shapes of the plain model.

A checkpoint is then independent of the ZeRO stage, the offload and the number of workers, and an FSDP2 run can resume from it.
DeepSpeed has no public way to restore a state that it did not write itself: this module uses private parts of its optimizers, as
they are in the version that the lock pins. DeepSpeed itself is not imported.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tandem.checkpoint.flat_chunks import FlatChunks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each weight."""


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The elements of one parameter that this rank keeps, in one of its flat buffers."""

    name: str
    """Name of the parameter; of a tied one, the first name."""
    shape: Sequence[int]
    start: int
    """Index of the first element in the parameter."""
    count: int
    """Number of elements; 0 if other ranks keep all of the parameter."""
    buffer: int
    """Number of the flat buffer."""
    at: int
    """Index of the first element in the buffer."""

    def view_of(self, buffer: Tensor) -> Tensor:
        """View of this fragment in a flat buffer."""
        return buffer.detach().narrow(0, self.at, self.count)


class ZeroState(abc.ABC):
    """The trained weights and the optimizer's state on this rank."""

    def __init__(self, zero: Any, optimizer: Optimizer, model: nn.Module) -> None:
        """`zero`: DeepSpeed's optimizer around `optimizer`, which is AdamW."""
        self._zero = zero
        self._optimizer = optimizer
        self._fragments = [self._fragment(p, name) for name, p in model.named_parameters() if p.requires_grad]

    @staticmethod
    def of(zero: Any, optimizer: Optimizer, model: nn.Module) -> ZeroState:
        """The state of a stage 3 engine, or of one of the others."""
        partitioned = hasattr(zero, "fp32_partitioned_groups_flat")
        return (_Stage3State if partitioned else _Stage1And2State)(zero, optimizer, model)

    def content(self) -> dict[str, dict[str, Any]]:
        """`model` and `optimizer`, to save or to load into."""
        model: dict[str, Any] = {}
        optimizer: dict[str, Any] = {}
        for number in self._buffer_numbers():
            with self._in_memory(number) as (buffer, state):
                for fragment in self._fragments_in(number):
                    # A buffer has one step count, and each of its parameters gets a copy to load into.
                    optimizer[f"{fragment.name}.step"] = state["step"].detach().clone()
                    if fragment.count:
                        model[fragment.name] = self._piece(fragment, buffer)
                        optimizer |= {f"{fragment.name}.{key}": self._piece(fragment, state[key]) for key in MOMENTS}
        return {"model": model, "optimizer": optimizer}

    @torch.no_grad()
    def restore(self, content: dict[str, dict[str, Any]]) -> None:
        """Restore the state that was loaded into `content`. Every rank calls it."""
        for number in self._buffer_numbers():
            with self._in_memory(number, changed=True) as (buffer, state):
                for fragment in self._fragments_in(number):
                    state["step"].copy_(content["optimizer"][f"{fragment.name}.step"])
                    if fragment.count:
                        _copy_loaded(fragment.view_of(buffer), content["model"][fragment.name])
                        for key in MOMENTS:
                            _copy_loaded(fragment.view_of(state[key]), content["optimizer"][f"{fragment.name}.{key}"])
                self._to_parameters(number)
        self._share_parameters()

    @abc.abstractmethod
    def _fragment(self, parameter: nn.Parameter, name: str) -> Fragment: ...

    @abc.abstractmethod
    def _buffer(self, number: int) -> Tensor:
        """A flat buffer of weights, which is a key in the optimizer's state."""

    def _swapped(self, number: int) -> bool:
        """Whether a buffer and its state are offloaded to a disk."""
        return False

    @abc.abstractmethod
    def _to_parameters(self, number: int) -> None:
        """Copy a changed buffer into the model's parameters."""

    @abc.abstractmethod
    def _share_parameters(self) -> None:
        """Send each rank's changes to the others."""

    @contextlib.contextmanager
    def _in_memory(self, number: int, *, changed: bool = False) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """A buffer and its state in memory for a `with` block; with `changed`, offloaded ones are written back to disk."""
        zero, swapped = self._zero, self._swapped(number)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(number)
        buffer = self._buffer(number)
        state: dict[str, Tensor] = self._optimizer.state[buffer]
        if not state:
            # AdamW creates them in its first step, which was not taken yet.
            changed = True
            state |= {key: torch.zeros_like(buffer, requires_grad=False) for key in MOMENTS}
            fused = self._optimizer.defaults.get("fused") or self._optimizer.defaults.get("capturable")
            state["step"] = torch.zeros((), dtype=torch.float32, device=buffer.device if fused else "cpu")
        yield buffer, state
        if swapped and changed:
            zero._optimizer_states_and_gradient_swap_out(number)
        elif swapped:
            zero._release_swap_buffers(number)

    def _piece(self, fragment: Fragment, buffer: Tensor) -> FlatChunks:
        part = fragment.view_of(buffer)
        # A copy: the memory of a swapped buffer is reused for the next one.
        return FlatChunks(part.clone() if self._swapped(fragment.buffer) else part, fragment.shape, fragment.start)

    def _buffer_numbers(self) -> list[int]:
        return sorted({fragment.buffer for fragment in self._fragments})

    def _fragments_in(self, number: int) -> Iterator[Fragment]:
        return (fragment for fragment in self._fragments if fragment.buffer == number)


class _Stage1And2State(ZeroState):
    """ZeRO 1 and 2: each group of parameters is one long buffer, of which each rank keeps an equal shard."""

    def _fragment(self, parameter: nn.Parameter, name: str) -> Fragment:
        group = next(
            n for n, parameters in enumerate(self._zero.bit16_groups) if any(p is parameter for p in parameters)
        )
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        return Fragment(
            name=name,
            shape=tuple(parameter.shape),
            start=mapping.lp_fragment_address.start if mapping else 0,
            count=mapping.lp_fragment_address.numel if mapping else 0,
            buffer=group,
            at=mapping.hp_fragment_address.start if mapping else 0,
        )

    def _buffer(self, number: int) -> Tensor:
        buffer: Tensor = self._zero.single_partition_of_fp32_groups[number]
        return buffer

    def _to_parameters(self, number: int) -> None:
        pass

    def _share_parameters(self) -> None:
        self._zero.update_lp_params()


class _Stage3State(ZeroState):
    """ZeRO 3: each parameter is split into equal shards, the last one padded; a rank's shards are concatenated in buffers."""

    def _fragment(self, parameter: nn.Parameter, name: str) -> Fragment:
        zero, zero_parameter = self._zero, parameter  # converted by DeepSpeed: has `ds_...` attributes
        buffer, at, share = zero.grad_position[zero.get_param_id(zero_parameter)]
        start = dist.get_rank() * share
        numel = zero_parameter.ds_numel  # type: ignore[attr-defined]
        return Fragment(
            name=name,
            shape=tuple(zero_parameter.ds_shape),  # type: ignore[attr-defined]
            start=start,
            count=max(0, min(share, numel - start)),
            buffer=buffer,
            at=at,
        )

    def _buffer(self, number: int) -> Tensor:
        buffer: Tensor = self._zero.fp32_partitioned_groups_flat[number]
        return buffer

    def _swapped(self, number: int) -> bool:
        return bool(self._zero._swappable_optimizer_subgroup(number))

    def _to_parameters(self, number: int) -> None:
        self._zero._reassign_or_swap_out_partitioned_parameters(number)

    def _share_parameters(self) -> None:
        # Small parameters stay unsharded on every rank between steps.
        self._zero._partition_all_parameters()
        self._zero._post_step(set())


def _copy_loaded(part: Tensor, loaded: FlatChunks) -> None:
    if part.data_ptr() != loaded.flat.data_ptr():
        part.copy_(loaded.flat)
