"""AdamW, its learning rate, and the moving average of the weights.

The rate is a pure function of the step, so a resumed run needs no scheduler state. Both schedules rise over the same
share of the steps, whose number the plan knows before training: `one_cycle` then falls until exactly the last step,
`inverse_sqrt` falls more and more slowly and does not depend on where the end is.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddp_asr import config


def learning_rate(step: int, total_steps: int, settings: config.Optim) -> float:
    """The rate of `step` (from 1 to `total_steps`)."""
    if settings.schedule == "inverse_sqrt":
        return _inverse_sqrt(step, total_steps, settings)
    return _one_cycle(step, total_steps, settings)


def _inverse_sqrt(step: int, total_steps: int, settings: config.Optim) -> float:
    """learning_rate x min(step / w, sqrt(w / step)), whose maximum is that of step w, the last one of the warm-up.

    Vaswani et al., "Attention is all you need" (2017), eq. 3, where sizes of the network stand for the maximum.
    """
    warmup_steps = max(1, round(settings.warmup_share * total_steps))
    return settings.learning_rate * min(step / warmup_steps, math.sqrt(warmup_steps / step))


def _one_cycle(step: int, total_steps: int, settings: config.Optim) -> float:
    """From learning_rate / start_divisor up to learning_rate, and down to the first rate / end_divisor.

    Smith and Topin, "Super-convergence" (2018); the arithmetic of `torch.optim.lr_scheduler.OneCycleLR` in two phases.
    """
    lowest_first = settings.learning_rate / settings.start_divisor
    lowest_last = lowest_first / settings.end_divisor
    top = settings.warmup_share * total_steps - 1
    place = step - 1
    if place <= top:
        return _between(lowest_first, settings.learning_rate, place / top if top > 0 else 1.0, settings.anneal)
    share = (place - top) / max(total_steps - 1 - top, 1e-9)
    return _between(settings.learning_rate, lowest_last, min(share, 1.0), settings.anneal)


def _between(start: float, end: float, share: float, anneal: str) -> float:
    if anneal == "cosine":
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
    return start + (end - start) * share


def make_optimizer(model: nn.Module, settings: config.Optim) -> torch.optim.AdamW:
    """AdamW with decay on matrices and kernels only: on biases and norms it only pulls towards a worse scale.

    Its state is allocated at once, exactly as the first step would: the rehearsal needs it in memory (property 6).
    On a GPU one kernel updates all weights (`fused`), with the number of steps on the device, where no step waits for
    the host. That is no part of a checkpoint, which is the same from either and goes on on either.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = True if parameters[0].is_cuda else None
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=fused)
    # torch places `step` by the `fused` of the state that is loaded, which would also replace our own.
    optimizer.register_state_dict_post_hook(lambda _, state: _with_fused(state, None))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: _with_fused(state, fused))
    for parameter in parameters:
        optimizer.state[parameter] = {
            # The types that torch gives it: a fused step counts in float32.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device) if fused else torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes the moments and the counts of steps from the `state_dict` of another AdamW; its settings stay its own.

    Raises:
        KeyError, ValueError: they are of other weights.
    """
    own = optimizer.state_dict()
    for number, moments in own["state"].items():
        for name, moment in moments.items():
            check_fits(f"{name} of weight {number}", state["state"][number][name], moment)
    optimizer.load_state_dict({"state": state["state"], "param_groups": own["param_groups"]})


def check_fits(name: str, value: Any, like: Tensor) -> None:
    """Raises ValueError unless the value is a dense tensor of this shape: `copy_` would repeat a smaller one."""
    if not (isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()):
        raise ValueError(f"{name} is no tensor of floating-point numbers")
    if value.shape != like.shape:
        raise ValueError(f"{name} has the shape {tuple(value.shape)} and not {tuple(like.shape)}")


def _with_fused(state: dict[str, Any], fused: bool | None) -> dict[str, Any]:
    return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}


class WeightAverage:
    """Exponential moving average of a model's weights, started at the first update (Polyak averaging).

    The decay rises with the updates, (1 + n) / (10 + n), until it reaches its setting, so that the first weights,
    which are noise, are forgotten soon.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Moves the average towards the weights after a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        # One kernel for all on a GPU (torch 2.11.0); the name is private, and a loop over `lerp_` does the same.
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in parameters], 1.0 - decay)
