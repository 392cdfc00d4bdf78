"""AdamW, the EMA of the weights and the 16-bit copies of both, for all parameters in one pass:

    g   = gradient * min(1, clip / (norm + 1e-6)) / loss_scale         norm: of the unscaled gradients
    m   = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w   = (1 - lr decay) w - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    ema = ema_decay ema + (1 - ema_decay) w
    student = w, teacher = ema             rounded to their dtype

If the norm is not finite, the update is skipped: no tensor changes, and `skipped` is incremented instead of `step`.
Nothing synchronizes with the host: step, rates and counters are scalars on the device.

The compiled operator (csrc/) reads and writes every tensor once: 38 bytes per parameter with bfloat16 gradients and
copies, 40 with float32 gradients. Every operation is rounded separately and in the same order everywhere: the bits
depend neither on the number of threads nor on the instruction set. The GPU code is compiled from the same functions
under the same rules.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import library


class Lists(NamedTuple):
    """Tensors of N parameters, in one order. Optional parts are empty lists.

    Without gradients, m and v, the weights do not change and only the EMA is updated. Without EMA, this is AdamW alone.
    """

    gradients: Sequence[Tensor]  # float32, bfloat16 or float16
    weights: Sequence[Tensor]  # float32 masters
    m: Sequence[Tensor]  # float32, first moment
    v: Sequence[Tensor]  # float32, second moment
    ema: Sequence[Tensor] = ()  # float32
    student: Sequence[Tensor] = ()  # copies, equal to the weights; a tensor without elements stands for no copy
    teacher: Sequence[Tensor] = ()  # copies of the EMA, likewise


class Scalars(NamedTuple):
    """Scalars on the parameters' device."""

    norm: Tensor  # () float32, of the gradients as they are, multiplied by the loss scale
    step: Tensor  # () int64, number of updates; incremented here
    skipped: Tensor  # () int64, number of updates skipped because the norm was not finite; incremented here
    lr: Tensor  # (G,) float32, learning rate of each group, or () for one rate
    ema_decay: Tensor  # () float32
    clip: Tensor  # () float32, maximum norm of the unscaled gradients; 0: no clipping
    loss_scale: Tensor  # () float32, divisor of the gradients


class Rates(NamedTuple):
    """Factors of one update: float32 scalars on the device."""

    finite: Tensor  # bool; False: the update is skipped
    scale: Tensor  # factor of the gradient: clipping and loss scale
    blend1: Tensor  # 1 - beta1
    blend2: Tensor  # 1 - beta2
    bias1: Tensor  # 1 - beta1^step
    bias2: Tensor  # sqrt(1 - beta2^step)
    lr: Tensor
    blend_ema: Tensor  # 1 - ema_decay


def rates(scalars: Scalars, betas: tuple[float, float]) -> Rates:
    """The factors of one update, after `step` was incremented; lr holds the learning rates of all groups."""
    blend1, blend2 = (torch.full_like(scalars.norm, 1 - beta) for beta in betas)
    step = scalars.step.clamp(min=1).double()
    bias1, bias2 = ((1 - beta**step).float() for beta in betas)
    ratio = (scalars.clip / (scalars.norm / scalars.loss_scale + 1e-6)).clamp(max=1)
    return Rates(
        finite=scalars.norm.isfinite(),
        scale=torch.where(scalars.clip > 0, ratio, 1.0) / scalars.loss_scale,
        blend1=blend1,
        blend2=blend2,
        bias1=bias1,
        bias2=bias2.sqrt(),
        lr=scalars.lr,
        blend_ema=1 - scalars.ema_decay,
    )


def parameter_ref(
    weight: Tensor,
    adam: Sequence[Tensor],
    ema: Tensor | None,
    student: Tensor | None,
    teacher: Tensor | None,
    rates: Rates,
    weight_decay: float,
    eps: float,
) -> None:
    """Update of one parameter, in place.

    Args:
        weight, ema: float32, of one shape.
        adam: (gradient, m, v) of that shape, or empty: the weight does not change.
        student, teacher: copies of weight and EMA.
        rates: of this update, with a single learning rate.
        weight_decay: decoupled.
        eps: of Adam.
    """

    def assign(target: Tensor, value: Tensor) -> None:
        """A skipped update keeps every bit of the target."""
        target.copy_(torch.where(rates.finite, value.to(target.dtype), target))

    if adam:
        gradient, m, v = adam
        g = gradient.float() * rates.scale
        assign(m, m.lerp(g, rates.blend1))
        assign(v, v * (1 - rates.blend2) + g * (g * rates.blend2))
        step_size = m / (v.sqrt() / rates.bias2 + eps) * (rates.lr / rates.bias1)
        assign(weight, weight * (1 - rates.lr * weight_decay) - step_size)
    if ema is not None:
        assign(ema, ema.lerp(weight, rates.blend_ema))
    for copy, source in ((student, weight), (teacher, ema)):
        if copy is not None:
            # After a skipped update the source is what it was, and so is its copy, which need not be read.
            copy.copy_(source)  # pyright: ignore[reportArgumentType]: the teacher has copies of an EMA only


@torch.no_grad()
def adamw_ema_ref(
    lists: Lists,
    scalars: Scalars,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Sequence[float] = (0.0,),
    group: Sequence[int] = (),
    zero_gradients: bool = False,
    parameter: Callable[..., None] = parameter_ref,
) -> None:
    """Reference of `adamw_ema`, one parameter after the other; arguments as there.

    Args:
        parameter: `parameter_ref`, or torch.compile of it.
    """
    finite = scalars.norm.isfinite()
    scalars.step.add_(finite)
    scalars.skipped.add_(~finite)
    update = rates(scalars, betas)
    lr = update.lr.expand(len(weight_decay))
    for i, weight in enumerate(lists.weights):
        number = group[i] if group else 0
        gradient, m, v, ema, student, teacher = (_flat(part[i]) if part else None for part in (lists[0], *lists[2:]))
        adam = () if gradient is None else (gradient, m, v)
        copies = (None if copy is None or not copy.numel() else copy for copy in (student, teacher))
        parameter(_flat(weight), adam, ema, *copies, update._replace(lr=lr[number]), weight_decay[number], eps)
    if zero_gradients and lists.gradients:
        torch._foreach_zero_(list(lists.gradients))


def _flat(tensor: Tensor) -> Tensor:
    """The tensor as one dimension, so that one compiled function serves all shapes. `.data`, because torch.compile also
    specializes on the base of a view and would compile a function for each shape of it."""
    return tensor.view(-1).data


def adamw_ema(
    lists: Lists,
    scalars: Scalars,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Sequence[float] = (0.0,),
    group: Sequence[int] = (),
    zero_gradients: bool = False,
) -> None:
    """Update all parameters in one pass, in place.

    Args:
        lists: contiguous tensors on one device. The i-th tensors of all lists have one shape; each list has one dtype,
            and so have both lists of copies together.
        scalars: on that device.
        betas, eps: of Adam.
        weight_decay: decoupled, one for each of the G groups.
        group: group of each parameter, in [0, G); empty: all are in the first.
        zero_gradients: zero the gradients, also if the update is skipped.

    Raises:
        RuntimeError: with the list, the index, the value and what is expected. Nothing is changed.
    """
    if not torch.compiler.is_compiling():  # torch.compile knows from the schema what is written
        mutated = lists if zero_gradients else lists[1:]
        torch.autograd.graph.increment_version([tensor for part in mutated for tensor in part])
    torch.ops.sra_fast.adamw_ema_(
        *map(list, lists), *scalars, list(group), list(weight_decay), *betas, eps, zero_gradients
    )


if not library.why_unavailable():

    @torch.library.register_fake("sra_fast::adamw_ema_")
    def _(*_):
        return None
