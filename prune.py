"""Two passes of mean/std pruning for openai-whisper, and real removal: smaller and faster, as if masked.

    import copy, prune, whisper
    model = whisper.load_model("tiny")        # or the path of a .pt file
    plan = prune.two_pass(model)              # reads the weights, changes nothing; print(plan) shows it
    prune.remove_(model, plan)                # the matrices shrink, whisper's own code runs on
    prune.save(model, "pruned.pt")            # prune.load("pruned.pt") brings it back

That goes by norms. With the mean squared gradients h that Adam has kept in training, groups go by what they cost, and
with training clips (mels, ids) what stays is fitted to the unpruned model. Far more can go before the model breaks:

    h = {name: adam.state[p]["exp_avg_sq"] / (1 - beta2 ** adam.state[p]["step"])
         for name, p in model.named_parameters() if p in adam.state}
    plan = prune.two_pass(model, z2=None, floor=0, curvature=h, share=0.5)         # half of the parameters in blocks
    before = copy.deepcopy(model)
    prune.remove_(model, plan)
    prune.refit_(model, before, [(mels, ids)])

A group is what must go together. Neuron j of a feed-forward layer is row j of mlp.0, its bias, and column j of mlp.2,
which reads it. `units` lists them as X.mlp, X being encoder.blocks.0 and so on, an attention's value dimensions as
X.vo, its query/key dimensions as X.qk; PARTS has the members. With n_j the root mean square of its weights g_j,

    pass 1   group j goes    where  n_j < max(floor * mean(n), mean(n) + z1 * std(n))                (1)
    pass 2   weight w is 0   where  |w| < mean(|w|) + z2 * std(|w|)    over the groups that stayed   (2)

Pass 1 takes mean and std (dividing by n, not n - 1) over the groups of a side, encoder or decoder, or with curvature
(below) of the model; pass 2 afresh over each matrix, biases left alone: what pass 1 removed does not shift them.

But the loss can hang on small weights and hardly notice large ones; in a Whisper that OpenAI trained it does. So n_j
may instead be what removing the group costs. To second order, setting its weights to zero raises the loss L by

    L(0) - L(w)  =  -sum_i w_i dL/dw_i  +  1/2 sum_ik w_i w_k H_ik  ~  1/2 sum_i w_i^2 h_i                  (3)

where the gradient vanishes, as it does at a minimum, and the diagonal h stands for the whole Hessian H (Optimal Brain
Damage: LeCun, Denker, Solla 1990). Near a minimum of the cross-entropy h_i is about the mean squared gradient, which
Adam keeps. Given that as `curvature`, n_j = sqrt(sum over g_j of w_i^2 h_i), the root of twice (3): the cost of the
whole group, so divided by no size, and the same after value is multiplied by a and out by 1/a. (Adam sees
clipped means over a batch, which changes all n_j by about one factor; (1) does not see that.)

Last, the plan is evened (`_even`): whisper splits an attention into heads of one width, PyTorch fuses it on a CPU only
if query/key and value are equally wide, and dense kernels like multiples of 8. So all heads keep as many dimensions,
of query/key and of value, as the head that keeps most, rounded up like neurons and columns; the best under the cut
fill up the others. A head without value dimensions adds nothing and goes whole; one without query/key dimensions still
averages its values and stays. One head and `multiple` neurons always stay. `mask_` writes zeros, `remove_` cuts to the
same function, `refit_` fits what reads the rest (4), and before them `balance_` may turn heads (5).

A group may also be one column, name -> [(weight, 1)], as the paper words it. A column of out or mlp.2 takes along what
computes its input, as X.vo or X.mlp; if X.qk is no group, query/key keep their width, so only whole heads go. query,
key, value and mlp.0 read what others read too, which stays, and become a `SelectingLinear`. `vocabulary_`, `window_`
cut outside the blocks. Source: TSPAR, arXiv 2510.12666, no code published: two passes and thresholds from mean and std
are the paper's; (1), (2), pooling and floor are our reading of it; (3) to (5) are not in it.
"""
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor, nn
from whisper.model import Linear, ModelDimensions, MultiHeadAttention, TextDecoder, Whisper
from whisper.tokenizer import get_tokenizer

Group = list[tuple[nn.Parameter, int]]     # index j along `axis` of every parameter belongs to group j
PARTS = {"qk": [("query.weight", 0), ("query.bias", 0), ("key.weight", 0)],
         "vo": [("value.weight", 0), ("value.bias", 0), ("out.weight", 1)],
         "mlp": [("mlp.0.weight", 0), ("mlp.0.bias", 0), ("mlp.2.weight", 1)]}
UNITS = {"encoder": ["attn.qk", "attn.vo", "mlp"],
         "decoder": ["attn.qk", "attn.vo", "cross_attn.qk", "cross_attn.vo", "mlp"]}
ROWS = "decoder.token_embedding.weight"
REPAIRS = {"_orig": "call torch.nn.utils.prune.remove first",       # what to do by a part of the parameter's name
           "parametrizations": "call torch.nn.utils.parametrize.remove_parametrizations first",
           "weight_g": "call torch.nn.utils.remove_weight_norm first",
           "": "untie weights that are shared, load float weights, merge what wraps the layer"}


class SelectingLinear(Linear):
    """Whisper's Linear on the features `index` of its input (a buffer, so the state dict has it)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.index_select(-1, self.index))


class KeptDecoder(TextDecoder):
    """Whisper's decoder on the embedding rows of some ids. Buffers, in the state dict: row_of (n_vocab,), id -> row,
    -1 where it is gone; kept_ids (rows,), row -> id. ids (B, T), audio (B, positions, d) as whisper's."""

    def kept_logits(self, ids: Tensor, audio: Tensor, kv_cache: dict | None = None) -> Tensor:
        """(B, T, rows), what training needs. ValueError if an id has no row."""
        return super().forward(self.rows(ids), audio, kv_cache)

    def rows(self, ids: Tensor) -> Tensor:
        """row_of, after a check that each has one: -100, say, would wrap around to that of a timestamp."""
        rows = torch.where(ids < 0, -1, self.row_of[ids])
        if not (rows.is_meta or torch.compiler.is_compiling()) and (rows < 0).any():
            raise ValueError(f"ids {ids[rows < 0].unique().tolist()} have no row; give vocabulary_ all ids you use")
        return rows

    def forward(self, ids: Tensor, audio: Tensor, kv_cache: dict | None = None) -> Tensor:
        """(B, T, n_vocab), -inf where the row is gone (index_copy_ is 5 times faster than a look-up in row_of)."""
        kept = self.kept_logits(ids, audio, kv_cache)
        return kept.new_full((*ids.shape, len(self.row_of)), -math.inf).index_copy_(-1, self.kept_ids, kept)


@dataclass
class Plan:
    """What goes, by name and without the model. print(plan) shows it, torch.save(asdict(plan), path) keeps
    it, Plan(**torch.load(path, weights_only=True)) brings it back."""

    settings: dict[str, float | str | None]
    shapes: dict[str, list[int]]           # of every parameter, and [n_head] of every attention
    norms: dict[str, Tensor]               # group name -> n_j, float64
    cuts: dict[str, float]                 # group name -> threshold of pass 1
    keep: dict[str, Tensor]                # group name -> True where it stays, evened
    pass2: dict[str, list[float]]          # Linear name -> mean, std, threshold, weights kept, of how many

    def removed(self) -> tuple[int, int]:
        """(block parameters that `remove_` takes away, of how many); the zeros of pass 2 are not in it."""
        left = {p: [*s] for p, s in self.shapes.items() if ".blocks." in p and p.endswith(("weight", "bias"))}
        of = sum(map(math.prod, left.values()))
        for name, keep in self.keep.items():
            for p, axis in _members(name):
                left[p][axis] = int(keep.sum())
        return of - sum(map(math.prod, left.values())), of

    @property
    def share(self) -> float:
        """Of the block parameters, what `remove_` takes away."""
        return self.removed()[0] / self.removed()[1]

    def heads(self, name: str) -> list[int]:
        """The heads of attention `name` that stay."""
        n_head, = self.shapes[name]
        return self.keep.get(f"{name}.vo", torch.ones(n_head)).view(n_head, -1).any(1).nonzero().flatten().tolist()

    def __str__(self) -> str:
        head = "{:35}    mean     std     cut      kept        of".format
        number = "{:8.2g}" if self.settings.get("n_j") == "curvature" else "{:8.4f}"       # costs are near 1e-5
        row = ("{:35}" + 3 * number + "{:>10}{:>10,}").format
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        lines = [settings, head("pass 1 (*: all norms under the cut)")]
        for name, n in self.norms.items():
            kept = f"{int(self.keep[name].sum()):,}" + ("" if (n >= self.cuts[name]).any() else "*")
            lines.append(row(name, n.mean(), n.std(correction=0), self.cuts[name], kept, len(n)))
        lines += [head("pass 2: |w|")] if self.pass2 else []
        lines += [row(name, *numbers, f"{kept:,}", of) for name, (*numbers, kept, of) in self.pass2.items()]
        lines.append("removed {:,} of {:,} block parameters ({:.1%})".format(*self.removed(), self.share))
        return "\n".join(lines)


def units(model: Whisper) -> dict[str, Group]:
    """The coupled groups: encoder.blocks.0.attn.qk, .attn.vo, .mlp, ..., decoder.blocks.0.cross_attn.qk"""
    params = _parameters(model)
    return {name: [(params[p], axis) for p, axis in _members(name)] for name in _unit_names(model)}


def two_pass(model: Whisper, groups: dict[str, Group] | None = None, z1: float = -0.25, z2: float | None = -1.0,
             floor: float = 0.05, multiple: int = 8, curvature: dict[str, Tensor] | None = None,
             share: float | None = None) -> Plan:
    """Decide by (1) and (2) what goes; the model is only read.

    groups    name -> [(parameter, axis)]: units(model) if None, else any of these and any columns
    z1, z2    standard deviations from the mean; z2=None leaves pass 2 out
    floor     share of the mean below which a group goes at any z1, >= 0; with curvature give 0: costs span decades
    multiple  widths are rounded up to it; 1 only evens the heads
    curvature parameter name -> mean squared gradient (h above), any float dtype, for (3); None: the norms
    share     of the block parameters that pass 1 has to remove: takes the z1 that does it (`target`)

    Raises ValueError on a block weight or a setting that is not finite, on a group of another model, on a share out
    of reach, and on curvature that lacks a parameter of a group, has another shape, or is negative or not finite."""
    for key, value in {"z1": z1, "z2": 0.0 if z2 is None else z2, "floor": floor}.items():
        if not math.isfinite(value) or (key == "floor" and value < 0):
            raise ValueError(f"{key} is {value}; give a finite number, and floor at least 0")
    norms, shapes = _norms(model, units(model) if groups is None else groups, curvature), _shapes(model)

    def pass1(z1: float) -> Plan:
        cuts = {}
        for side in sorted({name[:8] if curvature is None else "" for name in norms}):          # "" begins every name
            inside = [name for name in norms if name.startswith(side)]
            pooled = torch.cat([norms[name] for name in inside])
            mean, std = pooled.mean().item(), pooled.std(correction=0).item()
            cuts |= dict.fromkeys(inside, max(floor * mean, mean + z1 * std))
        settings = dict(n_j="norm" if curvature is None else "curvature", z1=z1, z2=z2, floor=floor, multiple=multiple)
        return Plan(settings, shapes, norms, cuts, _even(model, norms, cuts, multiple), {})

    plan = pass1(z1) if share is None else target(share, pass1)
    return plan if z2 is None else replace(plan, pass2=_pass2(model, plan.keep, z2))


def target(share: float, plan_at: Callable[[float], Plan], low: float = -10.0, high: float = 10.0) -> Plan:
    """The plan that removes about `share` of the block parameters, by bisection of plan_at from low to high: the
    nearest met or, as sizes go in steps, the first within 0.1%. ValueError if low and high do not bracket it."""
    plans = [plan_at(low), plan_at(high)]
    least, most = (plan.share for plan in plans)
    if not least <= share <= most:
        raise ValueError(f"a share of {share} cannot be removed, only {least:.3f} to {most:.3f}; ask for one between")
    while abs(plans[-1].share - share) >= 0.001 and len(plans) < 22:
        middle = (low + high) / 2
        plans.append(plan_at(middle))
        low, high = (middle, high) if plans[-1].share < share else (low, middle)
    return min(plans, key=lambda plan: abs(plan.share - share))


@torch.no_grad()
def mask_(model: Whisper, plan: Plan) -> Whisper:
    """Write the plan's zeros, shapes unchanged: what the plan means. Returns the model, whose alignment_heads
    no longer list heads that are gone. Raises ValueError if the plan is for another model."""
    params, here = _parameters(model), _shapes(model)
    for name in here | plan.shapes:
        if here.get(name) != plan.shapes.get(name) and name != ROWS:
            raise ValueError(f"the plan is for another model: {name} is {plan.shapes.get(name)} in the plan, "
                             f"{here.get(name)} here; make a new plan with two_pass")
    for name, keep in plan.keep.items():
        for p, axis in _members(name):
            params[p].index_fill_(axis, (~keep).nonzero().flatten().to(model.device), 0)
    for name, (_, _, cut, _, _) in plan.pass2.items():
        weight = params[f"{name}.weight"]
        weight.mul_(weight.float().abs().ge_(cut))    # a float mask: several times faster than masked_fill_
    layers = range(len(model.decoder.blocks))
    stay = {(i, head) for i in layers for head in plan.heads(f"decoder.blocks.{i}.cross_attn")}
    listed = stay.intersection(map(tuple, model.alignment_heads.indices().T.tolist()))
    _align(model, listed or [pair for pair in stay if pair[0] >= len(layers) // 2])       # or whisper's default
    return model


@torch.no_grad()
def remove_(model: Whisper, plan: Plan) -> Whisper:
    """Cut out what the plan names: smaller matrices, the same function as `mask_`. Returns the model. n_head,
    alignment_heads are put right; model.dims stays, as the residual stream does. What was cut is a new
    Parameter: build optimizers and groups after this. Raises what `mask_` raises."""
    mask_(model, plan)
    for name, keep in plan.keep.items():
        for p, axis in _members(name) if not keep.all() else []:
            module, _, leaf = p.rpartition(".")
            linear = model.get_submodule(module)
            old, index = getattr(linear, leaf), keep.nonzero().flatten().to(model.device)
            setattr(linear, leaf, nn.Parameter(old.detach().index_select(axis, index), old.requires_grad))
            linear.out_features, linear.in_features = linear.weight.shape
            if module == name:             # columns of a reader
                linear.register_buffer("index", linear.index[index] if hasattr(linear, "index") else index)
                linear.__class__ = SelectingLinear
    for name, attn in _modules(model, MultiHeadAttention):
        width, attn.n_head = plan.shapes[f"{name}.query.weight"][0] // attn.n_head, len(plan.heads(name))
        for p in attn.query.parameters():
            p.mul_((len(attn.query.weight) / attn.n_head / width) ** 0.5)      # whisper divides by sqrt(head width)
    _align(model, [(i, plan.heads(f"decoder.blocks.{i}.cross_attn").index(head))
                   for i, head in model.alignment_heads.indices().T.tolist()])
    return model


@torch.no_grad()
def balance_(model: Whisper, batches: list[tuple[Tensor, Tensor]], curvature: dict[str, Tensor]) -> dict[str, Tensor]:
    """Before two_pass: turn each head, its function unchanged, so that a few of its dimensions do most of its work;
    returns the curvature by which two_pass then sees that. Where more than half goes, the model keeps far more.

    A head multiplies queries q by keys k, and what it averaged, u, by its columns V of out. So query may be multiplied
    by any invertible T if key is by T^-T; value by T if out is by T^-1. With A = sum of q q' over all positions of
    batches (those of `refit_`), B = sum of k k', k less its clip's mean, which softmax does not see; or A = sum of
    u u', B = V'V: this takes the T of

        T A T' = T^-T B T^-1 = S, diagonal, falling           (balanced truncation: Moore 1981)           (5)

    and sum_j S_j^2 is the sum of the head's (q'k)^2, or of its |V u|^2: no other axes put as much into the first ones.
    What a head costs, the sum of its n_j^2 by (3), is divided in that ratio: the curvature returned, float32, is one
    number a dimension, and the given one outside heads. Raises ValueError without batches and what two_pass raises."""
    if not batches:
        raise ValueError("balance_ needs batches of (mels, ids)")
    norms, h, moments = _norms(model, units(model), curvature), dict(curvature), {}
    with ExitStack() as hooks:
        for _, attn in _modules(model, MultiHeadAttention):
            def add(linear: nn.Module, inputs: tuple, output: Tensor, attn: MultiHeadAttention = attn) -> None:
                x = (inputs[0] if linear is attn.out else output).double()     # sums in float32 may have no root
                x = (x - x.mean(1, keepdim=True) if linear is attn.key else x).unflatten(-1, (attn.n_head, -1))
                moments[linear] = moments.get(linear, 0) + torch.einsum("bthi,bthj->hij", x, x)
            for linear in (attn.query, attn.key, attn.out):
                hooks.enter_context(linear.register_forward_hook(add))
        for mels, ids in batches:
            model.decoder(ids, model.encoder(mels))
    for stem, attn in _modules(model, MultiHeadAttention):
        by_head = lambda p: p.double().unflatten(0, (attn.n_head, -1))     # (n_head, dimensions of a head, others)
        for kind, A in (("qk", moments[attn.query]), ("vo", moments[attn.out])):
            (weight, _), (bias, _), (other, axis) = group = [(attn.get_parameter(p), axis) for p, axis in PARTS[kind]]
            V = by_head(other.movedim(axis, 0))
            T, inverse, square = _balancing(A, moments[attn.key] if kind == "qk" else V @ V.mT)
            weight.copy_((T @ by_head(weight)).flatten(0, 1))
            bias.copy_((T @ by_head(bias)[..., None]).flatten())
            other.movedim(axis, 0).copy_((inverse.mT @ V).flatten(0, 1))
            size = sum(p.double().square().reshape(len(p), -1).sum(1 - axis) for p, axis in group)
            cost = norms[f"{stem}.{kind}"].to(square).view(square.shape).square().sum(1, keepdim=True)
            cost = (cost * square / square.sum(1, keepdim=True)).flatten() / size.clamp(min=1e-30)
            for (p, axis), (leaf, _) in zip(group, PARTS[kind]):
                h[f"{stem}.{leaf}"] = cost.float().view(-1, *[1] * (p.ndim - 1 - axis)).expand_as(p)
    return h


def _balancing(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T, T^-1, both (heads, d, d), and S^2 (heads, d) of (5). What is never used would make T infinite: both get a
    little of a ridge."""
    A, B = (M + torch.eye(len(M[0])).to(M) * (1e-4 * M.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-8)[:, None, None])
            for M in (A, B))
    L = torch.linalg.cholesky(A)
    square, U = (x.flip(-1) for x in torch.linalg.eigh(L.mT @ B @ L))
    square = square.clamp(min=1e-16)
    root = square ** 0.25
    return root[:, :, None] * (U.mT @ torch.linalg.inv(L)), L @ U / root[:, None], square


@torch.no_grad()
def refit_(model: Whisper, before: Whisper, batches: list[tuple[Tensor, Tensor]], ridge: float = 0.1) -> Whisper:
    """After remove_ or mask_: give every out and mlp.2 the weights with which the model follows best what it was
    `before`. From the first layer to the last, so that each also makes up for what the earlier ones lack: with x,
    x* the residual streams of model and before, f* a sublayer of before, u what its reader reads in model,

        W, b = argmin sum |x* + f*(x*) - x - W u - b|^2 + r |(W, b) - (W_0, b_0)|^2, r = ridge * mean_i sum u_i^2 (4)

    over all positions of batches, (mels (B, n_mels, frames), ids (B, T): prompt and text, filled up with the end
    token, which counts too: put clips of like length together); of the encoder's, 255 a clip at most, evenly spread;
    mean_i over the u_i, and the 1 of b, that are not always 0, so that mask_ and remove_ lead to the same function. It
    fills zeros of pass 2, which comes after. Both streams of all clips are kept: 8 bytes a position and channel.
    Returns the model. ValueError without batches, for a ridge below 0, no such pair, or an id without a row."""
    if _parameters(before).keys() != _parameters(model).keys() or before.dims != model.dims or not batches:
        raise ValueError("refit_ needs batches of (mels, ids) and two models with as many layers, of one width")
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; give a number from 0")
    torch.clear_autocast_cache()           # it may hold weights as they were before mask_
    for sublayer in zip(*[zip(_sublayers(before, *batch), _sublayers(model, *batch)) for batch in batches]):
        M = C = 0
        for (x_old, reader_old, read_old, step), (x, reader, read, _) in sublayer:
            x_old += reader_old(read_old())
            u = nn.functional.pad(read()[:, ::step].float(), (0, 1), value=1).flatten(0, 1)
            with torch.autocast(u.device.type, enabled=False):             # sums in bf16 are not positive definite
                M, C = M + u.T @ u, C + (x_old - x)[:, ::step].flatten(0, 1).T @ u
        power, W = M.diagonal(), torch.cat([reader.weight, reader.bias[:, None]], 1)
        r = ridge * power[power > 0].mean()
        M.diagonal().add_(r)
        W = torch.linalg.solve(M.double(), (C + r * W).T.double()).T.to(W.dtype)
        reader.weight.copy_(W[:, :-1])
        reader.bias.copy_(W[:, -1])
        for _, (x, _, read, _) in sublayer:
            x += reader(read())            # computed again: to keep u takes gigabytes
    return model


def _sublayers(model: Whisper, mels: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, nn.Linear, Callable, int]]:
    """Whisper's forward, halting at every sublayer: the residual stream, its last Linear, a function that gives what
    this reads, and 1 in how many positions to look at. The caller adds to the stream what the Linear says."""
    def heads(attn: nn.Module, x: Tensor, audio: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        source = x if audio is None else audio
        return attn.qkv_attention(attn.query(x), attn.key(source), attn.value(source), mask)[0]

    encoder, decoder, gelu = model.encoder, model.decoder, nn.functional.gelu
    x = gelu(encoder.conv2(gelu(encoder.conv1(mels)))).permute(0, 2, 1).float() + encoder.positional_embedding
    step = max(1, x.shape[1] // 128)
    for block in encoder.blocks:
        yield x, block.attn.out, lambda: heads(block.attn, block.attn_ln(x)), step
        yield x, block.mlp[2], lambda: block.mlp[:2](block.mlp_ln(x)), step
    audio, rows = encoder.ln_post(x), decoder.rows(ids) if isinstance(decoder, KeptDecoder) else ids
    x = (decoder.token_embedding(rows) + decoder.positional_embedding[: ids.shape[1]]).float()
    for block in decoder.blocks:
        yield x, block.attn.out, lambda: heads(block.attn, block.attn_ln(x), mask=decoder.mask), 1
        yield x, block.cross_attn.out, lambda: heads(block.cross_attn, block.cross_attn_ln(x), audio), 1
        yield x, block.mlp[2], lambda: block.mlp[:2](block.mlp_ln(x)), 1


@torch.no_grad()
def magnitude_(model: Whisper, fraction: float) -> float:
    """Baseline, a round of Iterative Magnitude Pruning: zero the smallest |w| over all Linear weights of the blocks
    until `fraction` of them is zero, old zeros included. Returns the threshold: |w| <= it is zero."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}; give a number from 0 up to, but not including, 1")
    weights = [weight for weight, _ in zeros(model)]
    flat = torch.cat([w.float().abs().flatten().cpu() for w in weights]).numpy()
    last = round(fraction * len(flat)) - 1
    flat.partition(last)                   # numpy's, in place: torch.kthvalue would hold three more copies
    cut = flat[last].item() if last >= 0 else 0.0
    for w in weights:
        w.mul_(w.float().abs() > cut)
    return cut


def zeros(model: Whisper) -> list[tuple[nn.Parameter, Tensor]]:
    """(weight, True where not zero) of the blocks; weight.data.mul_(keep) after a step keeps zeros zero."""
    _parameters(model)
    return [(linear.weight, linear.weight.detach() != 0) for _, linear in _modules(model, nn.Linear)]


@torch.no_grad()
def vocabulary_(model: Whisper, tokens: Iterable[int]) -> Whisper:
    """Keep the embedding rows of `tokens` (ids), of the 256 single bytes, which can write any text, and of all special
    tokens and timestamps. Returns the model. Ids stay those of the full vocabulary, and dims; logits are -inf where a
    row is gone (`KeptDecoder`), so whisper runs on as it does with suppress_tokens. Training needs no -inf: the
    cross-entropy of model.decoder.kept_logits(ids, audio) with targets model.decoder.rows(ids) is that of the full
    width, as exp(-inf) = 0. Raises ValueError without tokens, or if one is not an id that the model has."""
    old, decoder, V, tokens = _parameters(model)[ROWS], model.decoder, model.dims.n_vocab, [*tokens]
    row_of = getattr(decoder, "row_of", torch.arange(V)).cpu()
    wrong = [t for t in tokens if type(t) is bool or not isinstance(t, Integral) or not 0 <= t < V or row_of[t] < 0]
    if wrong or not tokens:
        raise ValueError(f"tokens to keep are {wrong[:3] or 'none'}; give those of your texts, as whole numbers "
                         f"from 0 to {V - 1} that no earlier vocabulary_ has removed")
    tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages)
    single = [tokenizer.encoding.encode_single_token(bytes([b])) for b in range(256)]
    kept = torch.tensor(sorted({*map(int, tokens), *single, *range(tokenizer.eot, V)}))
    decoder.token_embedding = nn.Embedding.from_pretrained(old.detach()[row_of[kept]], freeze=not old.requires_grad)
    decoder.register_buffer("kept_ids", kept)
    decoder.register_buffer("row_of", torch.full((V,), -1).index_copy_(0, kept, torch.arange(len(kept))))
    decoder.__class__ = KeptDecoder
    return model.to(model.device)          # the two buffers, which were made on the CPU


def window_(model: Whisper, seconds: float) -> Whisper:
    """Cut off the audio positions beyond `seconds`, 50 a second. Returns the model, for mels of 100 * seconds frames:
    whisper.decode takes them, while model.transcribe feeds 30 s and stops. max_initial_timestamp is a share of the
    window to whisper: give 30 / seconds times as much, or None. Raises ValueError for what no window can be."""
    _parameters(model)
    old = model.encoder.positional_embedding
    if type(seconds) is bool or not isinstance(seconds, Real) or not 1 <= 50 * seconds <= len(old):
        raise ValueError(f"seconds is {seconds!r}; give a number from 0.02, one position, to {len(old) / 50:g}, all")
    model.encoder.positional_embedding = old[:int(50 * seconds + 1e-6)].clone()
    model.dims = replace(model.dims, n_audio_ctx=len(model.encoder.positional_embedding))
    return model


def save(model: Whisper, path: str | Path) -> None:
    """Write OpenAI's format plus head counts and alignment heads to a .pt. whisper.load_model reads it where shapes
    are stock; a pruned model needs `load`, or `expand` first. If writing fails, what was at `path` stays whole."""
    _parameters(model)
    checkpoint = {"dims": asdict(model.dims), "model_state_dict": model.state_dict(),
                  "heads": {name: attn.n_head for name, attn in _modules(model, MultiHeadAttention)},
                  "alignment_heads": model.alignment_heads.indices().T.tolist()}
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, device: str | torch.device = "cpu") -> Whisper:
    """The model in a file of `save` or of OpenAI, torch's old format too; no code in it is run. Weights become
    float32, as with whisper.load_model; a prefix of all names (module., _orig_mod.) goes. ValueError if it is none."""
    try:
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        model, heads = Whisper(ModelDimensions(**checkpoint["dims"])), checkpoint.get("heads", {})
        state = checkpoint["model_state_dict"]
        prefix = next((name.removesuffix(ROWS) for name in state if name.endswith(ROWS)), "")
        state = {name.removeprefix(prefix): t for name, t in state.items()}
        for name, linear in _modules(model, nn.Linear):
            for leaf, p in linear.named_parameters():
                p.data = torch.empty(state.get(f"{name}.{leaf}", p).shape)
            linear.out_features, linear.in_features = linear.weight.shape
            if f"{name}.index" in state:
                linear.register_buffer("index", state[f"{name}.index"])
                linear.__class__ = SelectingLinear
        if "decoder.kept_ids" in state:
            vocabulary_(model, state["decoder.kept_ids"].tolist())
        here, there = ({(name, t.shape) for name, t in s.items()} for s in (model.state_dict(), state))
        if wrong := [*dict(sorted(here ^ there))]:
            raise ValueError(f"{len(wrong)} names are missing, unknown or of another shape: {', '.join(wrong[:3])}")
        model.load_state_dict(state)
        for name, attn in _modules(model, MultiHeadAttention):
            rows, attn.n_head = len(attn.query.weight), heads.get(name, attn.n_head)
            if rows % attn.n_head or name not in heads and rows != attn.out.out_features:
                raise ValueError(f"no head count that fits {name}")
        _align(model, checkpoint.get("alignment_heads") or model.alignment_heads.indices().T.tolist())
    except OSError:                        # no such file, or no right to read it
        raise
    except Exception as e:                 # bytes of another kind make torch.load raise nearly everything
        raise ValueError(f"{path} is no Whisper checkpoint (dims and model_state_dict) or is cut short; "
                         f"write it with prune.save ({type(e).__name__}: {str(e).partition('. ')[0]})") from e
    return model.to(device)


@torch.no_grad()
def expand(model: Whisper) -> Whisper:
    """A copy in stock shapes filled up with zeros, the same function; saved, whisper.load_model reads it. Embedding
    rows that `vocabulary_` removed come back as rows that never win; ValueError where `_all_rows` finds none."""
    _parameters(model)
    new = Whisper(model.dims).to(model.device).train(model.training)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state[ROWS] = _all_rows(model.decoder) if isinstance(model.decoder, KeptDecoder) else state[ROWS]
    for name, linear in _modules(model, SelectingLinear):
        wide = linear.weight.new_zeros(linear.out_features, new.get_submodule(name).in_features)
        state[f"{name}.weight"] = wide.index_copy_(1, linear.index, linear.weight)
    for name in _unit_names(model):        # zeros go to the end of each head, and of all heads; neurons are one head
        heads, of = (getattr(m.get_submodule(name.rpartition(".")[0]), "n_head", 1) for m in (model, new))
        for p, axis in _members(name):
            x, full = state[p].movedim(axis, -1).unflatten(-1, (heads, -1)), new.get_parameter(p).shape[axis] // of
            x = x * (full / x.shape[-1]) ** 0.5 if ".query." in p else x
            x = nn.functional.pad(x, (0, full - x.shape[-1], 0, of - heads))
            state[p] = x.flatten(-2).movedim(-1, axis).contiguous()
    new.load_state_dict({name: state[name] for name in new.state_dict()}, assign=True)     # no index, row_of, kept_ids
    new.alignment_heads = model.alignment_heads.clone()
    for name, p in new.named_parameters():
        p.requires_grad_(model.get_parameter(name).requires_grad)
    return new


def _all_rows(decoder: KeptDecoder) -> Tensor:
    """The embedding with n_vocab rows; those that are gone share one logit, 100 below any other's, whatever is said:
    LayerNorm gives w n + b, with sum(n) = 0 and ||n|| <= sqrt(d), so a row a / w has the logit a sum(b / w), and a
    row E one of at least -(sqrt(d) ||E w|| + |E b|). ValueError if that sum is nearly 0, as before any training."""
    w, b, E = (p.double() for p in (decoder.ln.weight, decoder.ln.bias, decoder.token_embedding.weight))
    total = (b / w).sum()
    if not len(w) + (b / w).abs().sum() < 1000 * total.abs():
        raise ValueError("decoder.ln allows no embedding row that never wins; expand the model before vocabulary_")
    lowest = -(len(w) ** 0.5 * (E * w).norm(dim=1) + (E @ b).abs()).max() - 100
    return torch.where(decoder.row_of[:, None] < 0, lowest / total / w, E[decoder.row_of]).to(decoder.ln.weight)


def _unit_names(model: Whisper) -> list[str]:
    return [f"{side}.blocks.{i}.{unit}" for side in UNITS for i in range(len(getattr(model, side).blocks))
            for unit in UNITS[side]]


def _members(name: str) -> list[tuple[str, int]]:
    """(parameter name, axis) of what a group name stands for: X.qk, X.vo, X.mlp, or columns of a Linear."""
    stem, _, kind = name.rpartition(".")
    return [(f"{stem}.{p}", axis) for p, axis in PARTS.get(kind, [(f"{kind}.weight", 1)])]


def _modules(model: Whisper, kind: type) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if ".blocks." in name and isinstance(m, kind)]


def _shapes(model: Whisper) -> dict[str, list[int]]:
    heads = {name: [attn.n_head] for name, attn in _modules(model, MultiHeadAttention)}
    return {name: list(p.shape) for name, p in model.named_parameters()} | heads


def _parameters(model: Whisper) -> dict[str, nn.Parameter]:
    """The model's parameters by name, after a check that it is a Whisper, has values, and that nothing hides a block's
    weights: the wrong tensor would be cut, silently."""
    if not isinstance(model, Whisper):
        raise ValueError(f"a whisper.model.Whisper is needed, not a {type(model).__name__}; unwrap it")
    params = dict(model.named_parameters())
    if meta := [name for name, p in params.items() if p.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device and has no values; load weights first")
    for name in [*params, *(p for unit in _unit_names(model) for p, _ in _members(unit))]:
        own = name in params and name.endswith((".weight", ".bias")) and params[name].is_floating_point()
        if ".blocks." in name and not own:
            repair = next(repair for sign, repair in REPAIRS.items() if sign in name)
            raise ValueError(f"{name} is not there as a float parameter, or not Whisper's own; {repair}")
    return params


def _norms(model: Whisper, groups: dict[str, Group], curvature: dict | None) -> dict[str, Tensor]:
    """n_j of every group, under the name of what goes with it (`_members`)."""
    params = _parameters(model)
    for name, p in params.items():
        if ".blocks." in name and not torch.linalg.vector_norm(p.detach().float()).isfinite():
            raise ValueError(f"{name} holds NaN, infinite or overflowing values; reload or mend the weights")
    known = {frozenset(m): name for name in [*dict(_modules(model, nn.Linear)), *_unit_names(model)]
             for m in (_members(name), _members(name)[-1:])}    # the last member takes the others along
    names, norms = {p: name for name, p in params.items()}, {}
    for given, group in groups.items():
        name = known.get(frozenset((names.get(p), axis) for p, axis in group))
        if name is None or name in norms:
            raise ValueError(f"group {given} is neither in units(model) nor the columns of a block's Linear, "
                             "or it comes twice; build groups from this model, and again after remove_")
        total = 0
        for p, axis in group:
            cost = p.detach().float().square()
            if curvature is not None:
                h = curvature.get(names[p])
                if h is None or h.shape != p.shape:
                    what = "missing" if h is None else f"of shape {list(h.shape)}"
                    raise ValueError(f"curvature has {names[p]} {what}, needed is {list(p.shape)}; give every "
                                     "parameter's mean squared gradient, and not that from before remove_")
                h = h.detach().to(p.device, torch.float32)
                if not (h.isfinite() & (h >= 0)).all():
                    raise ValueError(f"curvature of {names[p]} is negative or not finite; give mean squared gradients")
                cost *= h
            total = total + cost.reshape(len(p), -1).sum(1 - axis, dtype=torch.float64).cpu()
        size = sum(p.numel() // p.shape[axis] for p, axis in group) if curvature is None else 1
        norms[name] = (total / size).sqrt()
    return norms


def _even(model: Whisper, norms: dict, cuts: dict, multiple: int) -> dict[str, Tensor]:
    """True where a group stays: those not under the cut, and the strongest others up to an even width."""
    def strongest(n: Tensor, count: int) -> Tensor:
        count = min(n.shape[-1], math.ceil(max(count, 1) / multiple) * multiple)
        return torch.zeros_like(n, dtype=torch.bool).scatter_(-1, n.topk(count).indices, True)

    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple is {multiple}; give a whole number from 1")
    over = {name: n - cuts[name] for name, n in norms.items()}
    keep = {name: strongest(n, int((n >= 0).sum())) for name, n in over.items()}
    for stem, attn in _modules(model, MultiHeadAttention):
        pair = [f"{stem}.qk", f"{stem}.vo"]
        if over.keys().isdisjoint(pair):
            continue
        endless = torch.full((len(attn.query.weight),), math.inf)          # who is not asked about stays
        qk, vo = (over.get(name, endless).view(attn.n_head, -1) for name in pair)
        alive = vo.amax(1) >= min(0.0, vo.max())                           # a head lives by its values
        width = max(int((n >= 0).sum(1)[alive].max()) for n in (qk, vo))
        keep |= {name: (strongest(n, width) & alive[:, None]).flatten() for name, n in zip(pair, (qk, vo))}
    return keep


def _pass2(model: Whisper, keep: dict[str, Tensor], z2: float) -> dict[str, list[float]]:
    """(2) for every matrix that the groups touch: mean, std, threshold, weights kept, of how many."""
    pass2, members = {}, [(p, axis, mask) for name, mask in keep.items() for p, axis in _members(name)]
    for name, linear in _modules(model, nn.Linear):
        masks, w = [m for m in members if m[0] == f"{name}.weight"], linear.weight.detach().float().abs()
        for _, axis, mask in masks:
            w = w.index_select(axis, mask.nonzero().flatten().to(w.device))
        if masks:
            std, mean = (x.item() for x in torch.std_mean(w, correction=0))
            cut = mean + z2 * std
            pass2[name] = [mean, std, cut, int(torch.count_nonzero(w >= cut)), w.numel()]
    return pass2


def _align(model: Whisper, pairs: Iterable[tuple[int, int]]) -> None:
    """Make `pairs`, (layer, head), the model's alignment_heads."""
    mask = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
    mask[tuple(zip(*pairs))] = True
    model.register_buffer("alignment_heads", mask.to_sparse().to(model.device), persistent=False)
