"""AdamW, the EMA of the weights and the networks' 16-bit copies of both, of all parameters in one pass:

    g   = gradient * min(1, clip / (norm + 1e-6)) / loss_scale         norm: of the unscaled gradients
    m   = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w   = (1 - lr decay) w - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    ema = ema_decay ema + (1 - ema_decay) w
    student = w, teacher = ema             rounded to their dtype

If the norm is not finite, every tensor keeps its bits and a counter goes up instead of the step. Nothing waits for the
device: step, rates and counters are scalars there.

The compiled operator (csrc/) reads and writes every tensor once: 38 bytes per parameter with bfloat16 gradients and
copies, 40 with float32 gradients. Every operation is rounded by itself and in the same order everywhere, so that the
bits do not depend on the number of threads or on the instruction set. GPU code is compiled from the same functions
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
    """Tensors of N parameters, in one order; an empty list for a part that is not wanted.

    Without gradients, m and v the weights stay and the EMA follows them; without EMA there is AdamW alone.
    """

    gradients: Sequence[Tensor]  # float32, bfloat16 or float16
    weights: Sequence[Tensor]  # float32 masters
    m: Sequence[Tensor]  # float32, first moment
    v: Sequence[Tensor]  # float32, second moment
    ema: Sequence[Tensor] = ()  # float32
    student: Sequence[Tensor] = ()  # copies of the weights; one without elements is left out
    teacher: Sequence[Tensor] = ()  # copies of the EMA, likewise


class Scalars(NamedTuple):
    """Scalars on the parameters' device."""

    norm: Tensor  # () float32, of the gradients as they are, scaled
    step: Tensor  # () int64, updates made; counted up here
    skipped: Tensor  # () int64, updates not made, because the norm was not finite; counted up here
    lr: Tensor  # (G,) float32, learning rate of each group, or () for all
    ema_decay: Tensor  # () float32
    clip: Tensor  # () float32, largest norm of the unscaled gradients; 0 = no clipping
    loss_scale: Tensor  # () float32, what the gradients are to be divided by


class Rates(NamedTuple):
    """What one update does to a parameter: float32 scalars on the device."""

    finite: Tensor  # bool; if not, the step is skipped
    scale: Tensor  # of the gradient
    blend1: Tensor  # 1 - beta1
    blend2: Tensor  # 1 - beta2
    bias1: Tensor  # 1 - beta1^step
    bias2: Tensor  # sqrt(1 - beta2^step)
    lr: Tensor
    blend_ema: Tensor  # 1 - ema_decay


def rates(scalars: Scalars, betas: tuple[float, float]) -> Rates:
    """The rates of one update, the step counted, with the learning rates of all groups."""
    blend1, blend2 = (torch.full_like(scalars.norm, 1 - beta) for beta in betas)
    step = scalars.step.clamp(min=1).double()
    bias1, bias2 = ((1 - beta**step).float() for beta in betas)
    ratio = (scalars.clip / (scalars.norm / scalars.loss_scale + 1e-6)).clamp(max=1)
    scale = torch.where(scalars.clip > 0, ratio, 1.0) / scalars.loss_scale
    finite, blend_ema = scalars.norm.isfinite(), 1 - scalars.ema_decay
    return Rates(finite, scale, blend1, blend2, bias1, bias2.sqrt(), scalars.lr, blend_ema)


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
    """One parameter of `adamw_ema_ref`, in place.

    Args:
        weight, ema: float32, of one shape.
        adam: gradient, m and v of that shape; empty: the weight stays.
        student, teacher: copies of weight and EMA.
        rates: of this update, with one learning rate.
        weight_decay: decoupled.
        eps: of Adam.
    """
    r = rates

    def keep(held: Tensor, new: Tensor) -> None:
        """Every bit of what is held, if the step is skipped."""
        held.copy_(torch.where(r.finite, new.to(held.dtype), held))

    if adam:
        gradient, m, v = adam
        g = gradient.float() * r.scale
        keep(m, m.lerp(g, r.blend1))
        keep(v, v * (1 - r.blend2) + g * (g * r.blend2))
        step_size = m / (v.sqrt() / r.bias2 + eps) * (r.lr / r.bias1)
        keep(weight, weight * (1 - r.lr * weight_decay) - step_size)
    if ema is not None:
        keep(ema, ema.lerp(weight, r.blend_ema))
    for copy, source in ((student, weight), (teacher, ema)):
        if copy is not None:
            keep(copy, source)


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
    """Reference of `adamw_ema`, parameter by parameter; arguments as there.

    Args:
        parameter: `parameter_ref` or the same, compiled.
    """
    finite = scalars.norm.isfinite()
    scalars.step.add_(finite)
    scalars.skipped.add_(~finite)
    of_all = rates(scalars, betas)
    for i, weight in enumerate(lists.weights):
        which = group[i] if group else 0
        own = of_all._replace(lr=of_all.lr.expand(len(weight_decay))[which])
        gradient, m, v, ema, student, teacher = (_flat(part[i]) if part else None for part in (lists[0], *lists[2:]))
        adam = () if gradient is None else (gradient, m, v)
        copies = (None if copy is None or not copy.numel() else copy for copy in (student, teacher))
        parameter(_flat(weight), adam, ema, *copies, own, weight_decay[which], eps)
    if zero_gradients and lists.gradients:
        torch._foreach_zero_(list(lists.gradients))


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's memory in one dimension, so that one compiled function serves every shape. `.data`, because a view
    would bring its base, and a function compiled for each shape of that, along."""
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
    """One pass over all parameters, in place.

    Args:
        lists: contiguous tensors of one device, the i-th of each list of one shape, one dtype to a list, and one for
            both copies.
        scalars: on that device.
        betas, eps: of Adam.
        weight_decay: decoupled, of each of the G groups.
        group: of each parameter, in [0, G); empty: all are in the first.
        zero_gradients: leave the gradients zero, also where the update is not made.

    Raises:
        RuntimeError: naming list and index, what came and what is expected; nothing is changed then.
    """
    if not torch.compiler.is_compiling():  # there the compiler knows what the operator writes to
        written = lists if zero_gradients else lists[1:]
        torch.autograd.graph.increment_version([tensor for part in written for tensor in part])
    torch.ops.sra_fast.adamw_ema_(
        *map(list, lists), *scalars, list(group), list(weight_decay), *betas, eps, zero_gradients
    )


if not library.why_unavailable():

    @torch.library.register_fake("sra_fast::adamw_ema_")
    def _(*_):
        return None
