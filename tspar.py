"""Sparse Group LASSO: the penalty that drives whole groups of weights to exactly zero, for any nn.Module.

A group is a list of (parameter, axis); index j along `axis` of every member belongs to g_j. One definition
serves a column of a matrix, [(W, 1)], and a hidden neuron, [(W_in, 0), (b_in, 0), (W_out, 1)]: its row, its
bias and the next layer's column, which go together or not at all. With size = number of entries of one g_j,

    R(w) = l1 * sum_i |w_i|  +  l2 * sqrt(size) * sum_j ||g_j||_2                                       (1)

The first sum wants single weights at zero, the second whole groups. The norm is not squared, and that is the
idea: ||g|| falls with slope 1 into a corner at zero, so a group that the loss does not defend is pulled in
and held there. ||g||^2 has slope 2 ||g||, a pull that fades as the group shrinks: weight decay, which never
reaches zero. The factor sqrt(size) lets one l2 mean the same for short and for long groups.

    dR/dw_i = l1 * s_i + l2 * sqrt(size) * u_i,      s_i = sign(w_i),      u = g_j / ||g_j||            (2)

At the corners s_i may be anything in [-1, 1] and u anything with ||u|| <= 1; `gradient` takes 0. The
proximal operator, prox(v) = argmin_w ||w - v||^2 / 2 + R(w), is, with S(v, t) = sign(v) max(|v| - t, 0),

    z = S(v, l1),      g_j = max(0, 1 - l2 sqrt(size) / ||z_j||) z_j                                    (3)

and exact: where g_j is not 0, (2) says v = (1 + l2 sqrt(size) / ||g_j||) g_j + l1 s, so v and w agree in
sign, z_j = (1 + l2 sqrt(size) / ||g_j||) g_j, and its norm, ||g_j|| + l2 sqrt(size), turns that into (3).

Two ways to train. `add_gradient_` before optimizer.step() puts (2) into .grad: the paper's penalized loss.
Under Adam it shrinks groups and makes no zeros: Adam divides by the root mean square of the gradient, so its
step is about lr long whatever the strength, (2) changes sign at zero, and the weight rattles within about lr
of it. `prox_` after optimizer.step() lands on zero. Use one or the other, not both.

The proximal step under Adam. Adam moves w to v = w - lr * m / D, with D = sqrt(v_hat) + eps for each entry.
That is argmin_x m.x + (x - w).D(x - w) / (2 lr): a Newton step with D for the Hessian. Adding R(x) makes it a
proximal Newton step, and completing the square leaves argmin_x (x - v).D(x - v) / (2 lr) + R(x). The L1 part
alone would be elementwise; with the norm there is no closed form. So each group gets one number for D,

    d_j = rms of sqrt(v_hat) over g_j, + eps;    step_j = lr / d_j;    (3) with step_j * l1, step_j * l2  (4)

exact where v_hat is constant over the group. What this gives up: training rests where m_i * d_j / D_i, not m_i,
balances (2), so within a group weights with larger gradients are held down more than (1) says, the others
less. ProxGen solves the diagonal L1 problem exactly, RAMDA the group problem by an inner loop. Two things to
know: a group that gets no gradient has d_j = eps and is zero after one step, so begin after a warm-up if a
layer starts silent; and a coupled group at zero stays there once Adam's momentum has run out, because the
gradient of each of its weights has other weights of the group as a factor.

Readings of the paper (TSPAR, arXiv 2510.12666, no published code). Known: cross-entropy plus an L1 and a
group term each for encoder and decoder. Ours: the unsquared norm times sqrt(size), where secondary sources
print squares; coupled groups beside the paper's columns; the proximal step (4).

Sources: (1) to (3) Simon, Friedman, Hastie, Tibshirani, A Sparse-Group Lasso, J. Comp. Graph. Stat. 22
(2013). (4) follows Yun, Lozano, Yang, Adaptive Proximal Gradient Methods for Structured Neural Networks
(ProxGen), NeurIPS 2021, and Huang, Lee, Regularized Adaptive Momentum Dual Averaging (RAMDA), NeurIPS 2024.

Example: |x_0|, one of ten inputs, needs two hidden neurons. The net has no halves: all groups are encoder.*, and
the decoder's strengths are 0.

    net = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    neurons = [(net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)]
    sgl = tspar.SparseGroupLasso({"encoder.neurons": neurons}, 3e-3, 0, 3e-3, 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for x in torch.randn(600, 64, 10):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), x[:, :1].abs()).backward()
        optimizer.step()
        sgl.prox_(optimizer)  # the other way: sgl.add_gradient_() before optimizer.step()
    print(int((net[0].weight.norm(dim=1) > 0).sum()), "of 32 neurons left")
"""
import math

import torch
from torch import Tensor, nn

Group = list[tuple[Tensor, int]]  # (parameter, axis), all equally long along their axes


def columns(module: nn.Module) -> dict[str, Group]:
    """Every nn.Linear weight in `module`: dotted name of the layer -> [(weight, 1)]; a shared weight once."""
    groups, seen = {}, set()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            groups[name] = [(layer.weight, 1)]
    return groups


def penalty(group: Group, l1: float, l2: float) -> Tensor:
    """Equation (1) for one group: a scalar to add to a loss; autograd follows it.

    group   [(parameter, axis), ...], any float dtype; summed in float32 (float64 stays float64)
    l1, l2  strengths, finite and >= 0, in units of the loss per unit of weight
    Raises ValueError, naming the group (here by its shapes): any other strength, an axis out of range,
    members of unequal length, a parameter that comes twice.
    """
    size = _check(group, l1, l2)
    total = torch.zeros((), dtype=_wide(group[0][0]), device=group[0][0].device)
    if l1:
        total = total + l1 * sum(w.abs().sum(dtype=_wide(w)) for w, _ in group)
    if l2:
        # vector_norm has gradient 0 at 0, where (W**2).sum(0).sqrt() has nan.
        norm = torch.linalg.vector_norm
        parts = [norm(w.unsqueeze(-1), dim=_others(w, axis), dtype=_wide(w)) for w, axis in group]
        total = total + l2 * size ** 0.5 * norm(torch.stack(parts), dim=0).sum()
    return total


@torch.no_grad()
def gradient(group: Group, l1: float, l2: float) -> list[Tensor]:
    """Equation (2) in closed form: one tensor per member, of its shape and dtype. Arguments as in `penalty`.

    The first term is 0 where the weight is 0, the second where the norm of the group is 0; never nan.
    """
    _check(group, l1, l2)
    out = [torch.zeros_like(w) for w, _ in group]
    _add_gradient_(group, out, l1, l2)
    return out


@torch.no_grad()
def prox_(group: Group, l1: float, l2: float) -> None:
    """Equation (3), in place: soft-threshold by l1, then group soft-threshold by l2 * sqrt(size).

    Arguments as in `penalty`, in units of weight: after a gradient step of length t pass t * l1 and t * l2.
    Half precision rounds the result: a threshold below half the spacing at w changes nothing.
    """
    _check(group, l1, l2)
    w, axis = group[0]
    _shrink_(group, l1, l2, torch.ones(w.shape[axis], dtype=_wide(w), device=w.device))


class SparseGroupLasso:
    """The paper's four strengths over named groups: L1 and group strength, for encoder and decoder.

    groups  name -> [(parameter, axis), ...]; the name begins with `encoder.` or `decoder.`, which picks its
            strengths. A parameter may be in several groups: gradients add up, and proximal steps follow one
            another, which is not the proximal operator of the sum but lands on zeros just as well.
    relative  True: strengths are in units of the loss's gradient. Each step multiplies them by the root mean square
            of .grad over all weights of the side's groups, so 1 pulls a weight as hard as the loss does on average,
            in a toy and in Whisper-medium alike. Call the methods after backward(), before zero_grad(). A gradient
            that is not finite counts as none: a GradScaler skips that step
    scale   an attribute that multiplies all four, 1 at first: raise it from 0 to let the penalty set in slowly
    Raises ValueError, naming the group: a name with another beginning, a member that is no parameter but computed
    from some, and all that tspar.penalty refuses; later, where strengths are relative and no gradient is there.
    """

    def __init__(self, groups: dict[str, Group], l1_encoder: float, l1_decoder: float,
                 l2_encoder: float, l2_decoder: float, relative: bool = False):
        if not groups:
            raise ValueError("groups is empty; give {'encoder.NAME': [(parameter, axis), ...]}")
        strengths = {"encoder.": (l1_encoder, l2_encoder), "decoder.": (l1_decoder, l2_decoder)}
        self.groups, self.scale, self.relative = {}, 1.0, relative
        for name, group in groups.items():
            side = name[:8]  # as long as both beginnings
            if side not in strengths:
                raise ValueError(f"group {name!r} must begin with 'encoder.' or 'decoder.', which choose its "
                                 f"strengths; call it 'encoder.{name}', for example")
            _check(group, *strengths[side], name)
            if not all(w.is_leaf for w, _ in group):
                raise ValueError(f"group {name!r}: a member is computed from other parameters, which no step would "
                                 "reach; remove the parametrization (torch.nn.utils.parametrize, .prune)")
            self.groups[name] = (group, *strengths[side])

    def penalty(self) -> Tensor:
        """Equation (1) summed over all groups: the scalar that is added to cross-entropy."""
        units = self._units()
        return sum(units[name[:8]] * penalty(*entry) for name, entry in self.groups.items())

    @torch.no_grad()
    def add_gradient_(self) -> None:
        """Add equation (2) to .grad: what penalty().backward() does, with no graph, in a third of the time.

        A parameter without .grad gets one; a frozen one (requires_grad False) does not, yet its norm counts.
        With a GradScaler, call it between scaler.unscale_ and scaler.step. Adam's second moment is that of the sum
        then: who wants the loss's mean squared gradient, as importance, keeps it before this call.
        """
        units = self._units()
        for name, (group, l1, l2) in self.groups.items():
            for w, _ in group:
                if w.requires_grad and w.grad is None and (l1 or l2):
                    w.grad = torch.zeros_like(w)
            _add_gradient_(group, [w.grad if w.requires_grad else None for w, _ in group],
                           units[name[:8]] * l1, units[name[:8]] * l2)

    @torch.no_grad()
    def prox_(self, optimizer: torch.optim.Optimizer) -> None:
        """Equation (4), in place; call it after optimizer.step().

        Adam, AdamW (amsgrad too): lr and D are those of each member's param group and state. A group with a
        member that has never been stepped has no D and stays as it is. SGD: D = 1, and lr / (1 - momentum),
        the length that steps with momentum add up to. A group that is frozen altogether stays as it is.
        Raises ValueError, naming the group, for a member that is not in the optimizer, or is frozen while
        others are not; TypeError for another kind of optimizer.
        """
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)):
            raise TypeError(f"prox_ knows the step of Adam, AdamW and SGD, not of {type(optimizer).__name__}; "
                            "for another optimizer call tspar.prox_(group, step * l1, step * l2)")
        options = {id(w): option for option in optimizer.param_groups for w in option["params"]}
        units = self._units()
        for name, (group, l1, l2) in self.groups.items():
            group = [(w, axis) for w, axis in group if w.numel()]  # a mean over nothing is nan
            if not (l1 or l2) or not any(w.requires_grad for w, _ in group):
                continue
            for w, _ in group:
                if id(w) not in options or not w.requires_grad:
                    why = "not in the optimizer" if w.requires_grad else "frozen"
                    raise ValueError(f"group {name!r}: a member of shape {tuple(w.shape)} is {why} and cannot "
                                     "go to zero with the others; give the optimizer all of them or none")
            step = _step(group, [options[id(w)] for w, _ in group], optimizer.state)
            if step is not None:
                _shrink_(group, units[name[:8]] * l1, units[name[:8]] * l2, step)

    def _units(self) -> dict[str, float]:
        """What multiplies the strengths of each side now: `scale`, and the size of the gradient if `relative`."""
        units = {}
        for side in ("encoder.", "decoder."):
            weights = {id(w): w for name, (group, l1, l2) in self.groups.items() if name[:8] == side and (l1 or l2)
                       for w, _ in group}
            grads = [w.grad.detach() for w in weights.values() if w.grad is not None and w.numel()]
            units[side] = self.scale
            if self.relative and any(w.requires_grad for w in weights.values()):
                if not grads:
                    raise ValueError(f"no {side}* group has a gradient to measure relative strengths by; call this "
                                     "between backward() and zero_grad()")
                norms = [torch.linalg.vector_norm(grad, dtype=_wide(grad)).to(grads[0].device) for grad in grads]
                rms = (torch.stack(norms).double().square().sum() / sum(map(torch.numel, grads))).sqrt().item()
                units[side] *= rms if math.isfinite(rms) else 0.0
        return units


def _check(group: Group, l1: float, l2: float, name: str | None = None) -> int:
    """The number of entries of one g_j, after refusing what has no meaning."""
    label = f"group {name!r}" if name else f"group {[(tuple(w.shape), axis) for w, axis in group]}"
    if not group:
        raise ValueError(f"{label} has no members; give [(parameter, axis), ...]")
    for key, value in (("l1", l1), ("l2", l2)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{label}: {key} is {value}; a strength must be finite and >= 0")
    for w, axis in group:
        if not 0 <= axis < w.ndim:
            raise ValueError(f"{label}: axis {axis} for shape {tuple(w.shape)}; it must be 0 to {w.ndim - 1}")
    lengths = [w.shape[axis] for w, axis in group]
    if len(set(lengths)) > 1:
        raise ValueError(f"{label}: members are {lengths} long along their axes; they must be equally long")
    if len({id(w) for w, _ in group}) < len(group):
        raise ValueError(f"{label}: one parameter comes twice; put its two axes into two groups")
    return _size(group)


def _size(group: Group) -> int:
    """The number of entries of one g_j."""
    return sum(math.prod(w.shape[:axis] + w.shape[axis + 1:]) for w, axis in group)


def _wide(w: Tensor) -> torch.dtype:
    """The dtype of sums: in float16, 768 * 3072 entries of 0.05 would add up to inf."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def _others(w: Tensor, axis: int) -> list[int]:
    """Every axis of w.unsqueeze(-1) but `axis`: a bias alone has no other, and torch takes dim=[] for all."""
    return [d for d in range(w.ndim + 1) if d != axis]


def _along(x: Tensor, w: Tensor, axis: int) -> Tensor:
    """x, one number per group, to broadcast along `axis` of w; in w's dtype, or torch would copy w to x's."""
    x = x.clamp(max=torch.finfo(w.dtype).max).to(w.dtype)
    return x.view([-1 if d == axis else 1 for d in range(w.ndim)])


def _sum(x: Tensor, axis: int) -> Tensor:
    """The sum over every axis but `axis`."""
    return x.unsqueeze(-1).sum(dim=_others(x, axis), dtype=_wide(x))


def _norms(group: Group) -> Tensor:
    """||g_j|| for every j, without a graph: so not with vector_norm, far slower on the columns of a CPU."""
    return sum(_sum(w.square() if w.dtype == _wide(w) else w.to(_wide(w)).square_(), axis)
               for w, axis in group).sqrt()


def _add_gradient_(group: Group, out: list[Tensor | None], l1: float, l2: float) -> None:
    """Add equation (2) to `out`, member by member; None skips one."""
    if l2:
        norms = _norms(group)
        scale = torch.where(norms > 0, l2 * _size(group) ** 0.5 / norms, 0.0)
    for (w, axis), g in zip(group, out):
        if g is not None and l1:
            g.add_(w.sign(), alpha=l1)
        if g is not None and l2:
            g.addcmul_(w, _along(scale, w, axis))


def _shrink_(group: Group, l1: float, l2: float, step: Tensor) -> None:
    """Equation (3) with strengths step * l1 and step * l2, one step per g_j."""
    if l1:
        for w, axis in group:
            t = _along(l1 * step, w, axis)
            w.sub_(w.clamp(min=-t).clamp_(max=t))  # S(w, t), exactly 0 where |w| <= t
    if l2:
        norms, t = _norms(group), l2 * _size(group) ** 0.5 * step
        keep = torch.where(norms > t, 1 - t / norms, 0.0)
        for w, axis in group:
            w.mul_(_along(keep, w, axis))


def _step(group: Group, options: list[dict], states: dict) -> Tensor | None:
    """step_j of equation (4), as 1 / rms of D / lr: members may differ in lr. None if one has not moved."""
    total = 0.0  # sum of (D / lr)^2 over g_j, for every j
    for (w, axis), option in zip(group, options):
        lr, state, size = float(option["lr"]), states.get(w, {}), _size([(w, axis)])
        steps = float(state.get("step", 0))  # also 0 where a fused Adam's first step was skipped by a GradScaler
        if "betas" not in option:  # SGD
            lr *= (1 - option["dampening"]) / (1 - option["momentum"]) if option["momentum"] else 1
            D = torch.ones(w.shape[axis], dtype=_wide(w), device=w.device)
        elif steps:
            v = state["max_exp_avg_sq" if option["amsgrad"] else "exp_avg_sq"]
            v_hat = _sum(v, axis) / (size * (1 - option["betas"][1] ** steps))
            D = v_hat.sqrt() + option["eps"]
        else:
            return None
        total = total + size * (D / lr) ** 2  # lr = 0 makes the step 0
    return (_size(group) / total).sqrt()
