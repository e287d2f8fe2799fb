"""DeepSpeed behind the engine interface: ZeRO 0 to 3 on gloo or NCCL, with our own schedule, loss scaling and state.

DeepSpeed's checkpoints are pickles bound to a world size and a stage, so none is written. Weights and moments go in
and out as full fp32 tensors by parameter name, which fits any stage and any number of ranks.
"""

import logging
import os
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from jobs.engine import Engine, State, buffers, check_names, world
from jobs.optim import MOMENTS, Optim, adamw, empty_moments


class _Phase(nn.Module):
    """One phase of a model. DeepSpeed hangs its hooks on the module that it gets: here each engine on its own."""

    def __init__(self, model: nn.Module, phase: str) -> None:
        super().__init__()
        self.model, self.phase = model, phase

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(batch, self.phase)


class DeepSpeedEngine(Engine):
    """`zero` 0: plain data parallel; 1: moments are split over ranks; 2: gradients too; 3: weights too.

    The process group must exist. accumulate: micro-batches of a step; rows: of a micro-batch on one rank. A phase of
    several needs `zero` < 3.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: Optim,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        zero: int = 0,
        accumulate: int = 1,
        rows: int = 1,
        phase: str = "main",
    ) -> None:
        super().__init__(model, optim, precision, torch.device(device), phase)
        if phase != "main" and zero == 3:
            raise ValueError("zero=3: ZeRO-3 trains one phase, this model has several; set --zero 2 or less")
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # a line per collective
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)  # its setup is a hundred lines at INFO
        # On a CPU it would compile a shared-memory all-reduce first (40 s, and g++ has to be there) that only its
        # inference code calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.zero, self.accumulate = zero, accumulate
        fresh = State({n: v.detach().cpu().clone() for n, v in (self.named | buffers(self.model)).items()})
        self.adam = adamw({name: p for name, p in self.named.items() if p.requires_grad}, optim)
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model if phase == "main" else _Phase(self.model, phase),
            optimizer=self.adam,
            config=self._config(rows),
            dist_init_required=False,
        )
        for name, buffer in buffers(self.model).items():  # DeepSpeed has cast them with the weights
            buffer.data = buffer.data.to(fresh.weights[name].dtype)
        # DeepSpeed takes its fp32 weights from the bf16 ones, which has rounded them; moments do not exist yet.
        trained = [name for name, p in self.named.items() if p.requires_grad]
        self.frozen: dict[str, Tensor] = {}  # name -> fp32, on the CPU: DeepSpeed keeps masters only of what it trains
        fresh.moments = {f"{n}.{m}": torch.zeros_like(fresh.weights[n]) for n in trained for m in MOMENTS}
        self.load(fresh)

    def _config(self, rows: int) -> dict[str, Any]:
        stage = {"stage": self.zero}
        if self.zero == 3:
            # Small models: nothing is worth keeping gathered, and buckets are no larger than what they hold.
            stage |= {"stage3_param_persistence_threshold": 0}
        if self.zero:
            stage |= {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000, "overlap_comm": False}
        config = {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": self.accumulate,
            "zero_optimization": stage,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
            if self.zero:
                config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        if self.optim.clip and not self._clips_itself:
            config["gradient_clipping"] = self.optim.clip
        return config

    @property
    def _clips_itself(self) -> bool:
        """fp32 without ZeRO: DeepSpeed would clip but not tell the norm, so this class does both."""
        return self.zero == 0 and self.precision == "fp32"

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.deepspeed(batch, self.phase) if self.phase == "main" else self.deepspeed(batch)

    def _backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed averages over ranks; our losses are already shares of the global mean.
        self.deepspeed.backward(loss * world()[1], scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # only counts the micro-batch

    def _update(self, lr: float) -> float | Tensor:
        for group in self.adam.param_groups:
            group["lr"] = lr
        norm = self._clip() if self._clips_itself else None
        self.deepspeed.step()
        return self.deepspeed.get_global_grad_norm() if norm is None else norm

    @torch.no_grad()
    def _clip(self) -> Tensor:
        trained = [p for p in self.named.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if self.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(trained, self.optim.clip, norm)
        return norm

    def _after_step(self) -> None:
        with self._whole(list(self.named.values())):
            self.model.after_step()

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> State:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state, keep = State(updates=self.updates), world()[0] == 0
        masters = self._masters()
        for name, parameter in self.named.items():
            if not parameter.requires_grad:
                values = {"": self.frozen[name]}
            elif self.zero:  # collectives: every rank takes part, rank 0 keeps the result
                values = {"": safe_get_full_fp32_param(parameter)}
                values |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            else:
                values = {"": masters[name].detach(), **{m: self.adam.state[masters[name]][m] for m in MOMENTS}}
            if keep:
                state.weights[name] = values.pop("").to("cpu", copy=True)
                state.moments |= {f"{name}.{moment}": value.to("cpu", copy=True) for moment, value in values.items()}
        if keep:
            state.weights |= {name: value.to("cpu", copy=True) for name, value in buffers(self.model).items()}
        return state

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Continues from `state`, which is whole on every rank."""
        check_names(self.model, state, self.phase)
        self._make_moments(state.updates)
        masters = self._masters()
        for name, parameter in self.named.items():
            with self._whole([parameter], write=True):
                parameter.data.copy_(state.weights[name])
            if not parameter.requires_grad:
                self.frozen[name] = state.weights[name].clone()
                continue
            values = {"": state.weights[name], **{m: state.moments[f"{name}.{m}"] for m in MOMENTS}}
            for key, value in values.items():
                if self.zero:
                    self._set_partition(parameter, value.to(self.device), key)
                elif key:
                    self.adam.state[masters[name]][key].copy_(value)
                else:
                    masters[name].data.copy_(value)
        for name, buffer in buffers(self.model).items():
            buffer.copy_(state.weights[name])
        self.updates = state.updates

    def _whole(self, parameters: list[nn.Parameter], write: bool = False):
        """Parameters gathered on every rank; with `write`, what rank 0 wrote is what stays."""
        if self.zero < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(parameters, modifier_rank=0 if write else None)

    def _masters(self) -> dict[str, Tensor]:
        """name -> fp32 weight of ZeRO 0: the parameter itself, or in bf16 the copy DeepSpeed made of it."""
        if self.zero or self.precision == "fp32":
            return self.named
        optimizer = self.deepspeed.optimizer
        pairs = zip(sum(optimizer.fp16_groups, []), sum(optimizer.fp32_groups, []), strict=True)
        found = {id(low): high for low, high in pairs}
        return {name: found[id(p)] for name, p in self.named.items() if p.requires_grad}

    def _make_moments(self, updates: int) -> None:
        """AdamW's state of whatever DeepSpeed optimizes (parameters or flat partitions), at this many updates."""
        optimizer = self.deepspeed.optimizer
        if self.zero == 3:
            flats = optimizer.fp32_partitioned_groups_flat
        else:
            flats = [p for group in self.adam.param_groups for p in group["params"]]
        for flat in flats:
            empty_moments(self.adam, flat)["step"].fill_(updates)
        if self.zero in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()  # links names to flat moments; else its first step does

    def _set_partition(self, parameter: nn.Parameter, value: Tensor, moment: str) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.zero < 3:
            if moment:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                safe_set_full_fp32_param(parameter, value)
            return
        # The full setters of stage 3 fail where the size does not divide by the ranks: cut this rank's part ourselves.
        size, (rank, ranks) = parameter.ds_tensor.numel(), world()
        padded = torch.zeros(size * ranks, dtype=torch.float32, device=self.device)
        padded[: value.numel()] = value.flatten()
        part = padded[size * rank : size * (rank + 1)]
        if moment:
            safe_set_local_optimizer_state(parameter, part, moment)
        else:
            safe_set_local_fp32_param(parameter, part)
