"""One trained module, with its optimizer, learning rate, clipping and EMA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from rae.training.distributed import Strategy, World, parallelize, set_sync
from rae.training.ema import EMA
from rae.training.lr_schedule import LRSchedule

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """`lr` is the peak of the schedule; `clip_norm` bounds the norm of all gradients together."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    clip_norm: float | None = None


class Learner(Generic[M]):
    """Weights, gradients and moments are fp32.

    `module` is the bare network; `parallel` is what a training step calls. After `update` the
    gradients are gone.
    """

    def __init__(
        self,
        module: M,
        world: World,
        config: AdamWConfig,
        lr_schedule: LRSchedule,
        *,
        ema_decay: float | None,
        ema_rises: bool = False,
        strategy: Strategy = "ddp",
    ) -> None:
        self.module = module.to(world.device)
        self.config, self.lr_schedule = config, lr_schedule
        self.parallel = parallelize(self.module, world, strategy)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            eps=config.eps,
            fused=True,
        )
        # torch makes the state by a step of rate 0, which Adam counts: a first snapshot may not.
        get_optimizer_state_dict(self.module, self.optimizer)
        for state in self.optimizer.state.values():
            state["step"].zero_()
        self.ema = None if ema_decay is None else EMA(module, ema_decay, rises=ema_rises)
        self.num_updates = 0

    @property
    def lr(self) -> float:
        """Of the next update."""
        return self.config.lr * self.lr_schedule.factor(self.num_updates)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Around a forward of `parallel` and its backward; gradients add up until the last."""
        set_sync(self.parallel, is_last)
        yield

    def update(self) -> Tensor:
        """Take a step where the gradients are finite; their norm before clipping, 0-d."""
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.num_updates)
            self.num_updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[M]:
        """The module in eval mode, with its EMA weights where it has them."""
        was_training = self.module.training
        self.module.eval()
        try:
            if self.ema is None:
                yield self.module
            else:
                with self.ema.applied():
                    yield self.module
        finally:
            self.module.train(was_training)

    def averages(self) -> dict[str, Tensor]:
        """The module's state dict with the EMA weights, whole and on the CPU, in the first
        process; every process has to ask."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with self.averaged() as module:
            state = get_model_state_dict(module, options=whole)
            return {name: cast(Tensor, value).clone() for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Sharded as the module is; `load_state_dict` takes one of any number of processes."""
        return {
            "module": get_model_state_dict(self.module),
            "optimizer": get_optimizer_state_dict(self.module, self.optimizer),
            "ema": dict(self.ema.averages) if self.ema is not None else {},
            "num_updates": torch.tensor(self.num_updates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.module, state["module"])
        set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
        if self.ema is not None:
            for name, average in self.ema.averages.items():
                average.copy_(state["ema"][name])
        self.num_updates = int(state["num_updates"])
