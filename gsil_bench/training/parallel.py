"""Who trains: one process, or several that share a step's micro-batches (DDP) and perhaps the weights too (FSDP2).

Every rank knows the whole step, so the loss is divided by the step's counts without talking to anyone; ranks take turns over the
micro-batches, and one that gets none in the last turn repeats one with weight zero, because collectives need everybody. Gradients
are averaged by the wrappers, so each rank multiplies its loss by the number of ranks. torch's own wrappers are used:
docs/decisions/0006-torch-wrappers.md says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Team:
    """One process; the others extend it."""

    rank: int = 0
    size: int = 1
    casts: bool = False
    """Whether fp32 weights are cast to bf16 for each pass."""

    def wrap(self, policy: torch.nn.Module) -> torch.nn.Module:
        """The policy as the loop calls it."""
        return policy

    def accumulate(self, wrapped: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: gradients meet in the step's last one only."""
        return nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""
        return values

    def together(self, values: list[str]) -> list[str]:
        """The values of all ranks, one after the other."""
        return values

    def barrier(self) -> None:
        """Wait for everyone."""

    def gather(self, policy: torch.nn.Module, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trained weights and the optimiser's state, whole."""
        return trained_weights(policy), optimizer.state_dict()

    def scatter(self, policy: torch.nn.Module, optimizer: Any, weights: Mapping[str, Tensor], moments: Mapping[str, Any]) -> None:
        """Load what `gather` gave."""
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])
        optimizer.load_state_dict(moments)

    def all_finite(self, policy: torch.nn.Module) -> bool:
        """Whether no weight is NaN or infinite, anywhere."""
        return all(bool(parameter.isfinite().all()) for parameter in policy.parameters())

    def whole_weights(self, policy: torch.nn.Module) -> dict[str, Tensor] | None:
        """The model's weights, where the model itself does not hold them whole."""
        return None

    @property
    def device(self) -> str:
        """Where small tensors must lie to be summed."""
        return "cpu"

    def close(self) -> None:
        """Leave the team."""


ALONE = Team()


def trained_weights(policy: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter that is trained, by name."""
    return {name: parameter.detach() for name, parameter in policy.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class DataParallel(Team):
    """Every rank holds the weights (DDP)."""

    def wrap(self, policy: torch.nn.Module) -> torch.nn.Module:
        """DDP, which averages gradients over the ranks."""
        device = next(policy.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(policy, device_ids=ids, gradient_as_bucket_view=True)

    def accumulate(self, wrapped: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged in the backward pass of the last micro-batch."""
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
        return nullcontext() if last else wrapped.no_sync()

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed

    def together(self, values: list[str]) -> list[str]:
        """The values of all ranks, one after the other."""
        gathered: list[list[str]] = [[] for _ in range(self.size)]
        torch.distributed.all_gather_object(gathered, values)
        return [value for rank in gathered for value in rank]

    def barrier(self) -> None:
        """Wait for everyone."""
        torch.distributed.barrier()

    @property
    def device(self) -> str:
        """NCCL sums on GPUs only."""
        return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"

    def close(self) -> None:
        """Leave the team."""
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Sharded(DataParallel):
    """Every rank holds a part of each weight (FSDP2); layers are gathered when they are used."""

    def wrap(self, policy: torch.nn.Module) -> torch.nn.Module:
        """fully_shard on every layer and on the whole; the parameters become DTensors."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        kind = next(policy.parameters()).device.type
        mesh = init_device_mesh(kind, (self.size,))
        mixed = MixedPrecisionPolicy(torch.bfloat16 if self.casts else None, torch.float32)
        for layer in layers(policy):
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
        fully_shard(policy, mesh=mesh, mp_policy=mixed)
        return policy

    def accumulate(self, wrapped: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients are reduced and scattered in the backward pass of the last micro-batch."""
        return _reduce_gradients(wrapped, last)

    def gather(self, policy: torch.nn.Module, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Whole weights and moments, on rank 0's CPU."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        return get_state_dict(policy, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def scatter(self, policy: torch.nn.Module, optimizer: Any, weights: Mapping[str, Tensor], moments: Mapping[str, Any]) -> None:
        """Every rank takes its part."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            policy,
            optimizer,
            model_state_dict=dict(weights),
            optim_state_dict=dict(moments),
            options=StateDictOptions(full_state_dict=True),
        )

    def all_finite(self, policy: torch.nn.Module) -> bool:
        """Whether no weight is NaN or infinite, in any rank's part."""
        parts = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in policy.parameters()]
        wrong = sum(int((~part.isfinite()).sum()) for part in parts)
        return float(self.total(torch.tensor(float(wrong), device=self.device))) == 0

    def whole_weights(self, policy: torch.nn.Module) -> dict[str, Tensor]:
        """The model's weights under its own names, on rank 0's CPU."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(policy, options=options)
        own = {name for name, _ in policy.named_parameters()}  # a tied weight once
        return {name.removeprefix("model."): weight for name, weight in weights.items() if name in own}


@contextmanager
def _reduce_gradients(wrapped: Any, last: bool) -> Iterator[None]:
    wrapped.set_requires_gradient_sync(last)
    yield


def layers(policy: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder's layers: the longest list of modules in the model."""
    lists = [list(module) for module in policy.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def join_team(device: str, sharded: bool = False, bf16: bool = False) -> Team:
    """The team that torchrun started this process in, or a team of one.

    Args:
        device: "cuda" or "cpu": where the weights are going to be; ranks on a GPU take one each.
        sharded: divide weights and optimiser among the ranks.
        bf16: compute in bf16 over fp32 weights, where they are divided.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    kind = Sharded if sharded else DataParallel
    return kind(torch.distributed.get_rank(), torch.distributed.get_world_size(), casts=sharded and bf16)
