"""Sparse Group LASSO: by hand, at its limits, against autograd and direct minimization, and under Adam."""
import math
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import whisper
from torch import nn
from torch.nn.functional import mse_loss, softshrink

import bench
import tspar


def random_group(seed: int = 0, dtype=torch.float64) -> tspar.Group:
    """Five g_j over four members: rows of a matrix, a bias, columns of a matrix, a convolution's inputs."""
    rng = torch.Generator().manual_seed(seed)
    shapes = ((5, 3), 0), ((5,), 0), ((4, 5), 1), ((2, 5, 3), 1)
    return [(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_(), axis)
            for shape, axis in shapes]


def pieces(group: tspar.Group, tensors=None) -> list[torch.Tensor]:
    """Every g_j as one flat vector, by plain indexing; of `tensors` instead of the parameters, if given."""
    tensors = [w.detach() for w, _ in group] if tensors is None else tensors
    return [torch.cat([t.select(axis, j).reshape(-1) for t, (_, axis) in zip(tensors, group)])
            for j in range(group[0][0].shape[group[0][1]])]


def soft(v: torch.Tensor, t: float) -> torch.Tensor:
    """S(v, t), written out."""
    return v.sign() * (v.abs() - t).clamp(min=0)


# ---------------------------------------------------------------- by hand

COLUMNS = torch.tensor([[3., 0.], [4., 0.], [0., 0.], [0., 0.]])


def test_penalty_by_hand():
    """Columns (3,4,0,0) and 0: |w| sums to 7, norms to 5 + 0, root of size 4 is 2, so 1*7 + 10*2*5 = 107."""
    assert tspar.penalty([(COLUMNS, 1)], 1, 10).item() == 107


def test_rows_by_hand():
    """The same matrix by rows: norms 3 + 4, root of size 2, so 7 + 10*sqrt(2)*7."""
    assert tspar.penalty([(COLUMNS, 0)], 1, 10).item() == pytest.approx(7 + 70 * 2 ** 0.5)


def neuron() -> tspar.Group:
    """Two neurons: the first (1, 2 | 2 | 4) has norm 5 and four entries, the second is zero."""
    return [(torch.tensor([[1., 2.], [0., 0.]]), 0), (torch.tensor([2., 0.]), 0), (torch.tensor([[4., 0.]]), 1)]


def test_neuron_by_hand():
    """Row, bias and column are one norm of 5: 9 + 10*2*5 = 109, and the gradient is sign(w) + 20/5 * w."""
    group = neuron()
    assert tspar.penalty(group, 1, 10).item() == 109
    weight, bias, out = tspar.gradient(group, 1, 10)
    assert weight.tolist() == [[5, 9], [0, 0]] and bias.tolist() == [9, 0] and out.tolist() == [[17, 0]]


def test_bias_is_not_summed_to_one_number():
    """A bias alone: every entry is a group of size 1 (torch's sum(dim=[]) would make one group of all)."""
    bias = torch.tensor([3., -4., 0.])
    assert tspar.penalty([(bias, 0)], 0, 10).item() == 70
    assert tspar.gradient([(bias, 0)], 0, 10)[0].tolist() == [10, -10, 0]


def test_prox_by_hand():
    """(4,-5,.5,1): soft-threshold by 1 gives (3,-4,0,0), norm 5; minus 1*sqrt(4) leaves 3/5 of it."""
    w = torch.tensor([[4.], [-5.], [0.5], [1.]])
    tspar.prox_([(w, 1)], 1, 1)
    torch.testing.assert_close(w, torch.tensor([[1.8], [-2.4], [0.], [0.]]))
    assert w[2:].eq(0).all()


def test_prox_of_a_neuron_by_hand():
    """The neuron (1, 2 | 2 | 4) without L1: norm 5 minus 0.5*2 leaves 4/5; a second, weak one vanishes."""
    group = neuron()
    group[1][0][1] = 0.9
    tspar.prox_(group, 0, 0.5)
    assert [w.tolist() for w, _ in group] == [
        [pytest.approx([0.8, 1.6]), [0, 0]], pytest.approx([1.6, 0]), [pytest.approx([3.2, 0])]]


# ---------------------------------------------------------------- the gradient

def test_gradcheck():
    """Finite differences of the penalty agree with autograd, in float64 and away from zero."""
    group = random_group()
    weights, axes = zip(*group)
    assert torch.autograd.gradcheck(lambda *ws: tspar.penalty(list(zip(ws, axes)), 0.3, 0.7), weights)


@pytest.mark.parametrize("l1, l2", [(0.3, 0.7), (0.3, 0), (0, 0.7), (0, 0)])
def test_closed_form_is_autograd(l1, l2):
    """`gradient` is what autograd finds, on a group with a zero g_j and a zero weight in another."""
    group = random_group()
    with torch.no_grad():
        for w, axis in group:
            w.select(axis, 2).zero_()
        group[0][0][0, 0] = 0
    weights = [w for w, _ in group]
    grads = torch.autograd.grad(tspar.penalty(group, l1, l2) + 0 * sum(w.sum() for w in weights), weights)
    for found, expected in zip(tspar.gradient(group, l1, l2), grads):
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
    assert pieces(group, grads)[2].eq(0).all(), "a zero group pulls on nothing, and nan nowhere"


FOUR = "l1_encoder", "l1_decoder", "l2_encoder", "l2_decoder"


def model_and_penalty(seed: int = 0, **strengths) -> tuple[nn.Module, tspar.SparseGroupLasso]:
    """Encoder and decoder of two layers: neurons of both, columns of one; one weight is in two groups."""
    torch.manual_seed(seed)
    net = nn.ModuleDict({side: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
                         for side in ("encoder", "decoder")})
    groups = {f"{side}.mlp": [(net[side][0].weight, 0), (net[side][0].bias, 0), (net[side][2].weight, 1)]
              for side in ("encoder", "decoder")}
    groups["encoder.columns"] = [(net["encoder"][0].weight, 1)]
    return net, tspar.SparseGroupLasso(groups, **{**dict(zip(FOUR, (0.1, 0.2, 0.3, 0.4))), **strengths})


def test_add_gradient_is_backward_of_penalty():
    """.grad is what penalty().backward() makes of it: on top of a .grad, or where there was none."""
    net, sgl = model_and_penalty()
    net["decoder"][2].weight.grad = torch.ones_like(net["decoder"][2].weight)
    sgl.penalty().backward()
    expected = [w.grad for w in net.parameters()]
    for w in net.parameters():
        w.grad = None
    net["decoder"][2].weight.grad = kept = torch.ones_like(net["decoder"][2].weight)
    sgl.add_gradient_()
    assert net["decoder"][2].weight.grad is kept, "in place"
    for w, e in zip(net.parameters(), expected):
        if e is None:
            assert w.grad is None  # the last bias is in no group
        else:
            torch.testing.assert_close(w.grad, e)
            assert not w.grad.requires_grad, "no graph"


def test_four_strengths():
    """Each of the four reaches its own half and its own term of R, and nothing else."""
    for name in FOUR:
        net, sgl = model_and_penalty(**{**dict.fromkeys(FOUR, 0), name: 2})
        key, side = name.split("_")
        expected = 0
        for group_name, (group, _, _) in sgl.groups.items():
            if group_name.startswith(side):
                for x in pieces(group):
                    expected += 2 * (x.abs().sum() if key == "l1" else len(x) ** 0.5 * x.norm())
        assert sgl.penalty().item() == pytest.approx(expected.item(), rel=1e-5)
        sgl.add_gradient_()
        other = "decoder" if side == "encoder" else "encoder"
        assert all(w.grad is None for w in net[other].parameters()), "a strength of 0 leaves .grad alone"
        assert net[side][0].weight.grad.abs().sum() > 0


def test_scale_multiplies_all_four():
    """With scale 1/2, penalty, gradient and proximal step are those of half the strengths; scale 0 changes nothing."""
    strengths = dict(zip(FOUR, (0.5, 0.25, 1.0, 2.0)))
    results = []
    for half, scale in ((False, 0.5), (True, 1.0)):
        net, sgl = model_and_penalty(**{name: value / (1 + half) for name, value in strengths.items()})
        sgl.scale = scale
        value = sgl.penalty().item()
        sgl.add_gradient_()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        sgl.prox_(optimizer)
        results.append([torch.tensor(value)]
                       + [x for w in net.parameters() for x in (w.detach(), w.grad) if x is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    net, sgl = model_and_penalty(**strengths)
    before, sgl.scale = [w.clone() for w in net.parameters()], 0.0
    sgl.prox_(torch.optim.SGD(net.parameters(), lr=0.01))
    assert sgl.penalty() == 0 and all(map(torch.equal, net.parameters(), before))


def test_a_frozen_member_counts_but_gets_no_gradient():
    """As with autograd: the norm includes the frozen matrix, its .grad stays None."""
    net, sgl = model_and_penalty()
    frozen, trained = net["encoder"][2].weight.requires_grad_(False), net["encoder"][0].bias
    sgl.penalty().backward()
    expected, trained.grad = trained.grad, None
    sgl.add_gradient_()
    assert frozen.grad is None
    frozen.grad = torch.zeros_like(frozen)  # left from before it was frozen
    sgl.add_gradient_()
    assert frozen.grad.eq(0).all()
    trained.grad /= 2
    torch.testing.assert_close(trained.grad, expected)


# ---------------------------------------------------------------- limits

def test_groups_of_one_are_lasso():
    """A bias has groups of one, so R = (l1 + l2) sum|w|, and the prox is torch's own softshrink."""
    w = torch.linspace(-2, 2, 21, dtype=torch.float64)
    assert tspar.penalty([(w, 0)], 0.25, 0.5).item() == pytest.approx(0.75 * w.abs().sum().item())
    shrunk = w.clone()
    tspar.prox_([(shrunk, 0)], 0.25, 0.5)
    torch.testing.assert_close(shrunk, softshrink(w, 0.75))


@pytest.mark.parametrize("l1, l2", [(0.6, 0), (0, 0.3)])
def test_one_strength_alone(l1, l2):
    """l2 = 0 is LASSO, every weight on its own; l1 = 0 group LASSO: a group keeps its direction or is zero."""
    group = random_group()
    before = pieces(group)
    tspar.prox_(group, l1, l2)
    for v, w in zip(before, pieces(group)):
        if l1:
            torch.testing.assert_close(w, softshrink(v, l1))
        else:
            torch.testing.assert_close(w, v * max(0, 1 - l2 * len(v) ** 0.5 / v.norm().item()))


def test_scaling():
    """R(3w) = 3 R(w), the gradient at 3w is that at w, and prox(3v) with tripled strengths is 3 prox(v)."""
    group, tripled = random_group(), random_group()
    with torch.no_grad():
        for w, _ in tripled:
            w.mul_(3)
    torch.testing.assert_close(tspar.penalty(tripled, 0.3, 0.2), 3 * tspar.penalty(group, 0.3, 0.2))
    for a, b in zip(tspar.gradient(tripled, 0.3, 0.2), tspar.gradient(group, 0.3, 0.2)):
        torch.testing.assert_close(a, b)
    tspar.prox_(group, 0.3, 0.2)
    tspar.prox_(tripled, 0.9, 0.6)
    for (a, _), (b, _) in zip(tripled, group):
        torch.testing.assert_close(a, 3 * b)


def test_zero_strength_changes_nothing():
    """With l1 = l2 = 0 the penalty is 0 and the prox is the identity, bit for bit."""
    group = random_group()
    before = [w.detach().clone() for w, _ in group]
    tspar.prox_(group, 0, 0)
    nothing = tspar.penalty(group, 0, 0)
    assert nothing.item() == 0 and nothing.dtype == torch.float64
    assert all(w.equal(b) for (w, _), b in zip(group, before))


def test_critical_strength_of_one_group():
    """Just past l2 = ||S(v, l1)|| / sqrt(size) all of g_j is exactly zero, just before it is not."""
    v = torch.tensor([[1.0], [-2.0], [0.1], [0.5]], dtype=torch.float64)
    critical = soft(v, 0.2).norm().item() / 2
    for factor, zero in ((1 + 1e-9, True), (1 - 1e-9, False)):
        w = v.clone()
        tspar.prox_([(w, 1)], 0.2, factor * critical)
        assert w.eq(0).all().item() is zero


def test_critical_strength_of_a_regression():
    """Past max_j ||S(X_j'y, l1)|| / sqrt(size) the solution is exactly zero; at 0.95 one group is left."""
    rng = torch.Generator().manual_seed(0)
    X, y = torch.randn(50, 13, generator=rng, dtype=torch.float64).split([12, 1], dim=1)
    y = y[:, 0]
    l1 = 1.0
    critical = soft((X.T @ y).view(4, 3), l1).norm(dim=1).max().item() / 3 ** 0.5
    left = []
    for factor in (1.001, 0.95):
        w = nn.Parameter(torch.randn(4, 3, generator=rng, dtype=torch.float64))
        sgl = tspar.SparseGroupLasso({"encoder.w": [(w, 0)]}, l1, 0, factor * critical, 0)
        optimizer = torch.optim.SGD([w], lr=0.9 / torch.linalg.matrix_norm(X, 2).item() ** 2)
        for _ in range(500):
            optimizer.zero_grad()
            (0.5 * (y - X @ w.view(-1)).square().sum()).backward()
            optimizer.step()
            sgl.prox_(optimizer)
        left.append(int(w.ne(0).any(dim=1).sum()))
    assert left == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """768 x 3072 weights of 0.05 sum to about 118,000, which float16 calls inf: sums run in float32."""
    w = torch.full((768, 3072), 0.05, dtype=dtype)
    value = w[0, 0].item()
    total = tspar.penalty([(w, 1)], 1, 1)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(2 * value * w.numel(), rel=1e-4)  # sqrt(768) ||g_j|| is sum|g_j| here
    g, = tspar.gradient([(w, 1)], 0.5, 0.25)
    assert g.dtype == dtype and g.float().sub(0.75).abs().max() < 0.005
    tspar.prox_([(w, 1)], 0.01, 0.01)
    assert w.dtype == dtype and w.float().sub(value - 0.02).abs().max() < 0.0005
    tiny = torch.full((8, 2), 1e-4, dtype=dtype)  # its square is 0 in float16
    assert tspar.gradient([(tiny, 1)], 0, 1)[0].float().sub(1).abs().max() < 0.01
    tspar.prox_([(w, 1)], 0, 0.04)
    assert w.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    """No more than the largest matrix once in float32 at a time, so at most twice it, and the grads it has."""
    group = [(nn.Parameter(torch.ones(shape, dtype=dtype)), axis)
             for shape, axis in (((800, 200), 0), ((200, 800), 1))]
    sgl = tspar.SparseGroupLasso({"encoder.w": group}, 0.1, 0, 0.1, 0)
    optimizer = torch.optim.AdamW([w for w, _ in group])
    sgl.add_gradient_()
    optimizer.step()
    assert all(w.grad.dtype == dtype for w, _ in group)
    for call in (sgl.add_gradient_, lambda: sgl.prox_(optimizer)):
        assert 0 < bench.held(call, "cpu") < 1.1 * 4 * 800 * 200  # norms and scales come on top


def test_the_smallest_weights():
    """Near the end of the number range the gradient stays finite, though 1 / norm or the norm itself does not."""
    faint = torch.full((4, 2), 6e-8, dtype=torch.float16)  # the least above 0; 2 / norm is 17 million
    g, = tspar.gradient([(faint, 1)], 0, 1)
    assert g.isfinite().all() and (0 < g).all() and (g <= 1).all()
    fainter = torch.full((4, 2), 1e-30, requires_grad=True)  # its square is 0 in float32
    tspar.penalty([(fainter, 1)], 0, 1).backward()
    g, = tspar.gradient([(fainter, 1)], 0, 1)
    assert g.equal(fainter.grad) and g.eq(0).all()


# ---------------------------------------------------------------- the proximal operator

def minimize(v: torch.Tensor, l1: float, l2: float) -> torch.Tensor:
    """argmin ||w - v||^2 / 2 + R(w) for one g_j, knowing nothing of (3): L-BFGS on ever sharper corners."""
    w = v.clone().requires_grad_()
    for corner in (1e-1, 1e-2, 1e-4, 1e-6):
        def smoothed() -> torch.Tensor:
            return (0.5 * (w - v).square().sum() + l1 * (w.square() + corner ** 2).sqrt().sum()
                    + l2 * len(v) ** 0.5 * (w.square().sum() + corner ** 2).sqrt())
        optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
                                      line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = smoothed()
            loss.backward()
            return loss
        optimizer.step(closure)
    return w.detach()


@pytest.mark.parametrize("l1, l2", [(0.3, 0.2), (0.5, 0), (0, 0.5), (0.8, 0.4)])
def test_prox_against_direct_minimization(l1, l2):
    """prox_ finds what a numerical minimizer finds, and its objective is no higher."""
    group = random_group(seed=1)
    before = pieces(group)
    tspar.prox_(group, l1, l2)
    for v, w in zip(before, pieces(group)):
        def objective(u):
            return 0.5 * (u - v).square().sum() + l1 * u.abs().sum() + l2 * len(v) ** 0.5 * u.norm()
        found = minimize(v, l1, l2)
        torch.testing.assert_close(w, found, atol=1e-4, rtol=0)
        assert objective(w) <= objective(found) + 1e-12


def test_prox_satisfies_the_subdifferential():
    """v - w = l1 s + l2 sqrt(size) u, with s = sign(w) or in [-1, 1] and u = w/||w|| or in the unit ball."""
    l1, l2, seen = 0.5, 0.25, set()
    for seed in range(20):
        group = random_group(seed)
        before = pieces(group)
        tspar.prox_(group, l1, l2)
        for v, w in zip(before, pieces(group)):
            c = l2 * len(v) ** 0.5
            seen.add(bool(w.any()))
            if w.any():
                rest = v - w - c * w / w.norm()
                torch.testing.assert_close(rest[w != 0], l1 * w[w != 0].sign())
                assert rest[w == 0].abs().le(l1 * (1 + 1e-12)).all()
            else:
                assert soft(v, l1).norm() <= c * (1 + 1e-12)
    assert seen == {True, False}, "both corners were met"


def design(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Truth, (40 groups, 5 weights), and b = X'y for y = X truth + noise, 200 columns orthonormal."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.zeros(40, 5, dtype=torch.float64)
    truth[0], truth[1, :2] = torch.tensor([1., -1., 1., -1., 1.]), torch.tensor([2., -2.])
    X = torch.linalg.qr(torch.randn(250, 200, generator=rng, dtype=torch.float64)).Q
    y = X @ truth.view(-1) + 0.25 * torch.randn(250, generator=rng, dtype=torch.float64)
    return truth, (X.T @ y).view(40, 5)


def shrink(b: torch.Tensor, l1: float, l2: float) -> torch.Tensor:
    """The regression's solution, without touching b."""
    w = b.clone()
    tspar.prox_([(w, 0)], l1, l2)
    return w


def test_lesson_on_an_orthogonal_design():
    """Three penalties on one regression whose truth is known: only the sparse group LASSO recovers it.

    In group 0 all five weights are at work, in group 1 two of five, in groups 2 to 39 none. X'X = 1 turns
    ||y - X beta||^2 / 2 into ||beta - X'y||^2 / 2 plus a constant, so the solution is the prox at b = X'y.
    """
    truth, b = design(seed=1)
    works, idle = b[truth != 0].abs(), b[truth == 0].abs()

    # The squared norm divides everything by one number. Nothing becomes zero, at any strength.
    for strength in (0.1, 10, 1000):
        assert (b / (1 + 2 * strength)).ne(0).all()

    # LASSO looks at one weight at a time. The loudest idle weight is louder than the faintest working one,
    # so a strength that silences the first loses the second: no l1 recovers the support.
    assert idle.max() > works.min()
    for l1 in torch.linspace(0, 3, 61).tolist():
        assert not (shrink(b, l1, 0) != 0).equal(truth != 0)

    # Group LASSO hears that the others in the loud weight's group are silent. But a group is all or nothing.
    group_lasso = shrink(b, 0, 0.5)
    assert group_lasso.ne(0).any(dim=1).tolist() == 2 * [True] + 38 * [False]
    assert group_lasso[1].ne(0).all(), "three idle weights of group 1 stay"

    # Both: dead groups by l2, idle weights in a living group by l1. The support, to the last weight.
    both = shrink(b, 0.5, 0.3)
    assert (both != 0).equal(truth != 0) and both.sign().equal(truth.sign())


def test_lesson_over_a_hundred_draws():
    """Not one lucky draw: one fixed pair of strengths finds the support far more often than LASSO's best l1."""
    sparse_group = lasso = 0
    for seed in range(100):
        truth, b = design(seed)
        sparse_group += (shrink(b, 0.5, 0.3) != 0).equal(truth != 0)
        lasso += bool(b[truth == 0].abs().max() < b[truth != 0].abs().min())  # then an l1 in between is right
    assert sparse_group > 70 > 55 > lasso, (sparse_group, lasso)  # 83 and 46


# ---------------------------------------------------------------- under an optimizer

def train(way: str, steps: int = 400) -> torch.Tensor:
    """A linear layer of 8 inputs, of which two matter, under Adam; `way` is add_gradient_ or prox_."""
    rng = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(0.3 * torch.randn(4, 8, generator=rng))
    teacher = torch.zeros(4, 8)
    teacher[:, :2] = torch.tensor([[1., -1.], [1., 1.], [-1., 1.], [-1., -1.]])
    sgl = tspar.SparseGroupLasso({"encoder." + name: group for name, group in tspar.columns(layer).items()},
                                 0.02, 0, 0.05, 0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for _ in range(steps):
        x = torch.randn(32, 8, generator=rng)
        optimizer.zero_grad()
        mse_loss(layer(x), x @ teacher.T + 0.5 * torch.randn(32, 4, generator=rng)).backward()
        if way == "add_gradient_":
            sgl.add_gradient_()
        optimizer.step()
        if way == "prox_":
            sgl.prox_(optimizer)
    return layer.weight.detach()


def test_only_the_proximal_step_makes_zeros_under_adam():
    """Six of eight inputs are noise. prox_ makes their columns exactly zero; the gradient only small."""
    proximal, gradient = train("prox_"), train("add_gradient_")
    assert proximal[:, 2:].eq(0).all()
    assert proximal[:, :2].abs().min() > 0.5, "the two that matter stay"
    assert gradient.ne(0).all(), "no exact zero in the whole matrix"
    assert gradient[:, 2:].abs().max() < 0.1 < 0.5 < gradient[:, :2].abs().min()


@pytest.mark.parametrize("kind, options", [
    (torch.optim.AdamW, {}), (torch.optim.Adam, {"amsgrad": True, "betas": (0.5, 0.7)}),
    (torch.optim.AdamW, {"foreach": True, "eps": 1e-2}), (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}), (torch.optim.SGD, {"dampening": 0.5})])
def test_step_length_by_loops(kind, options):
    """Equation (4), one g_j at a time: rms of sqrt(v_hat) + eps over lr, and the prox with its inverse."""
    group = random_group()
    lrs = [0.1, 0.2, 0.1, 0.1]  # the bias of the group has its own
    optimizer = kind([{"params": [w], "lr": lr} for (w, _), lr in zip(group, lrs)], lr=0.1, **options)
    rng = torch.Generator().manual_seed(3)
    for scale in (2.0, 1.0, 0.1):
        for w, _ in group[scale == 2.0:]:  # the first member misses the first step
            w.grad = scale * torch.randn(w.shape, generator=rng, dtype=w.dtype).pow(3)  # unequal D
        optimizer.step()
    before = pieces(group)
    D = []
    for (w, axis), lr, steps in zip(group, lrs, (2, 3, 3, 3)):
        state = optimizer.state[w]
        if kind is torch.optim.SGD:
            D.append(torch.ones_like(w) / (lr * 0.5 / 0.1 if "momentum" in options else lr))
        else:
            beta, eps = optimizer.defaults["betas"][1], optimizer.defaults["eps"]
            v_hat = state["max_exp_avg_sq" if optimizer.defaults["amsgrad"] else "exp_avg_sq"] / (1 - beta ** steps)
            D.append(torch.empty_like(w))
            for j in range(w.shape[axis]):
                D[-1].select(axis, j).fill_((v_hat.select(axis, j).mean().sqrt() + eps) / lr)
    l1, l2 = 0.5, 0.25
    tspar.SparseGroupLasso({"decoder.g": group}, 9, l1, 9, l2).prox_(optimizer)
    for v, d, w in zip(before, pieces(group, [d.detach() for d in D]), pieces(group)):
        step = 1 / d.square().mean().sqrt().item()
        z = soft(v, step * l1)
        expected = z * max(0, 1 - step * l2 * len(v) ** 0.5 / max(z.norm().item(), 1e-30))
        torch.testing.assert_close(w, expected.detach(), rtol=1e-6, atol=1e-9)


def test_groups_of_one_are_exact_under_adam():
    """Where a group is one weight, d_j is D itself and (4) is the exact proximal Newton step: ProxGen's L1."""
    w = nn.Parameter(torch.linspace(-1, 1, 11, dtype=torch.float64))
    optimizer = torch.optim.Adam([w], lr=0.1)
    w.grad = torch.linspace(1, 3, 11, dtype=torch.float64)
    optimizer.step()
    v = w.detach().clone()
    tspar.SparseGroupLasso({"encoder.w": [(w, 0)]}, 2, 0, 1, 0).prox_(optimizer)
    torch.testing.assert_close(w.detach(), soft(v, 1.0 * 0.1 * 3 / (w.grad + 1e-8)))


def test_adam_in_half_precision():
    """Second moments of 40 over 4096 rows add up to more than float16 holds; 0.05 - lr - lr/200 * l1 = 0.035."""
    w = nn.Parameter(torch.full((4096, 2), 0.05, dtype=torch.float16))
    optimizer = torch.optim.Adam([w], lr=0.01)
    w.grad = torch.full_like(w, 200)
    optimizer.step()
    tspar.SparseGroupLasso({"encoder.w": [(w, 1)]}, 100, 0, 0, 0).prox_(optimizer)
    assert w.float().sub(0.035).abs().max() < 5e-4


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sgd_rests_at_the_solution(momentum):
    """Under SGD, with momentum or without, ||w - b||^2 / 2 + R(w) rests at prox(b), which is its minimum."""
    b = torch.tensor([[4., -5., 0.5, 1.], [0.5, 0.5, 0.5, -0.5]], dtype=torch.float64)
    expected = b.clone()
    tspar.prox_([(expected, 0)], 0.25, 0.2)
    w = nn.Parameter(torch.ones_like(b))
    sgl = tspar.SparseGroupLasso({"encoder.w": [(w, 0)]}, 0.25, 0, 0.2, 0)
    optimizer = torch.optim.SGD([w], lr=0.05, momentum=momentum)
    for _ in range(600):
        w.grad = w.detach() - b
        optimizer.step()
        sgl.prox_(optimizer)
    torch.testing.assert_close(w.detach(), expected, atol=1e-6, rtol=0)
    assert (w != 0).equal(expected != 0)


def test_a_learning_rate_in_a_tensor():
    """prox_ reads it, and does not write the length with momentum back into it."""
    for lr in (0.125, torch.tensor(0.125)):
        w = nn.Parameter(torch.ones(4, 2))
        optimizer = torch.optim.SGD([w], lr=lr, momentum=0.75)
        sgl = tspar.SparseGroupLasso({"encoder.w": [(w, 1)]}, 0.25, 0, 0, 0)
        for _ in range(2):
            sgl.prox_(optimizer)
        assert float(optimizer.param_groups[0]["lr"]) == 0.125
        assert w.eq(0.75).all()  # 1 - 2 * 0.25 * 0.125 / (1 - 0.75)


def test_nothing_moves_before_the_first_step():
    """No Adam state, a learning rate of 0, or a whole group frozen: not a bit changes, and no state is made."""
    for case in ("no state", "lr 0", "frozen"):
        net, sgl = model_and_penalty()
        with torch.no_grad():
            net["decoder"][2].weight[:, 0] = net["decoder"][0].weight[0] = net["decoder"][0].bias[0] = 0
        optimizer = torch.optim.AdamW(net.parameters(), lr=0 if case == "lr 0" else 1e-3)
        if case == "frozen":
            net.requires_grad_(False)
        if case == "lr 0":
            sgl.penalty().backward()
            optimizer.step()
        before = [w.detach().clone() for w in net.parameters()]
        sgl.prox_(optimizer)
        assert all(w.equal(b) for w, b in zip(net.parameters(), before)), case
        assert bool(optimizer.state) is (case == "lr 0")


def test_a_skipped_first_step_is_no_step():
    """Fused Adam makes its state, then obeys a GradScaler that met inf: step 0, and 1 - beta ** 0 divides by 0."""
    w = nn.Parameter(torch.ones(4, 2))
    optimizer, scaler = torch.optim.AdamW([w], lr=1e-3, fused=True), torch.amp.GradScaler("cpu")
    sgl = tspar.SparseGroupLasso({"encoder.w": [(w, 1)]}, 0.1, 0, 0.1, 0)
    for factor, moves in ((math.inf, False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale((factor * w).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        sgl.prox_(optimizer)
        assert optimizer.state[w]["step"] == moves and w.lt(1).all().item() is moves and w.gt(0.99).all()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_empty_matrices(kind):
    """A layer with no outputs adds no entries to its neurons' groups, and a layer with no inputs has no groups."""
    w, empty, none = (nn.Parameter(torch.ones(shape)) for shape in ((3, 4), (0, 3), (2, 0)))
    alone = nn.Parameter(torch.ones(3, 4))
    sgl = tspar.SparseGroupLasso({"encoder.w": [(w, 0), (empty, 1)], "encoder.none": [(none, 1)],
                                  "decoder.alone": [(alone, 0)]}, 0.1, 0.1, 0.1, 0.1)
    sgl.penalty().backward()
    expected = w.grad.clone()
    sgl.add_gradient_()
    torch.testing.assert_close(w.grad, 2 * expected)
    optimizer = kind([w, empty, none, alone], lr=0.1)
    optimizer.step()
    sgl.prox_(optimizer)
    assert w.equal(alone) and w.lt(1).all() and w.gt(0).all()


def test_a_group_without_gradient_goes_at_once():
    """D = eps where no gradient ever came: the step is lr / eps, and one prox empties the group."""
    w = nn.Parameter(torch.ones(4, 2))
    optimizer = torch.optim.AdamW([w], lr=1e-4)
    w.grad = torch.tensor([[0., 1.]]).repeat(4, 1)
    optimizer.step()
    tspar.SparseGroupLasso({"encoder.w": [(w, 1)]}, 1e-6, 0, 1e-3, 0).prox_(optimizer)
    assert w[:, 0].eq(0).all() and w[:, 1].gt(0.99).all()


# ---------------------------------------------------------------- any module, and bad input

def test_columns():
    """Every nn.Linear once, by the layer's name, columns along axis 1; a shared weight under its first name."""
    net = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 5), nn.Conv1d(3, 3, 1)),
                         "tied": nn.Linear(3, 5)})
    net["tied"].weight = net["encoder"][0].weight
    groups = tspar.columns(net)
    assert list(groups) == ["encoder.0"]
    (weight, axis), = groups["encoder.0"]
    assert weight is net["encoder"][0].weight and axis == 1


def test_columns_of_whisper():
    """A Whisper block has 6 Linear in the encoder, 10 in the decoder, and their names say which."""
    dims = whisper.model.ModelDimensions(80, 1500, 64, 1, 2, 51865, 448, 64, 1, 2)
    groups = tspar.columns(whisper.model.Whisper(dims))
    assert len(groups) == 2 * 6 + 2 * 10 and "encoder.blocks.0.mlp.2" in groups
    tspar.SparseGroupLasso(groups, 1, 1, 1, 1)


BAD_GROUPS = {
    "axis": [(torch.ones(2, 3), 2)], "negative axis": [(torch.ones(2, 3), -1)],
    "scalar": [(torch.tensor(1.), 0)], "unequal": [(torch.ones(2, 3), 0), (torch.ones(2, 3), 1)],
    "empty": [], "twice": 2 * [(torch.ones(2, 2), 0)]}


@pytest.mark.parametrize("group", BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_bad_groups(group):
    """Refused by every entrance, and by name where there is one."""
    for function in (tspar.penalty, tspar.gradient, tspar.prox_):
        with pytest.raises(ValueError, match="group"):
            function(group, 1, 1)
    with pytest.raises(ValueError, match="group 'encoder.x'"):
        tspar.SparseGroupLasso({"encoder.x": group}, 1, 1, 1, 1)


@pytest.mark.parametrize("strength", [-1e-9, math.nan, math.inf])
def test_bad_strengths(strength):
    """Negative or not finite, in any of the four places, and in the three functions."""
    for function in (tspar.penalty, tspar.gradient, tspar.prox_):
        for pair in ((strength, 0), (0, strength)):
            with pytest.raises(ValueError, match=r"group \[\(\(4, 2\), 1\)\]: l[12] is"):
                function([(COLUMNS.clone(), 1)], *pair)
    for name, side in zip(FOUR, 2 * ("encoder", "decoder")):
        with pytest.raises(ValueError, match=f"group '{side}.mlp': {name[:2]} is"):
            model_and_penalty(**{name: strength})


def test_bad_names():
    """A name chooses the strengths, so it must say encoder or decoder; the message offers one that does."""
    for name in ("mlp.0", "encoder", "encoders.0", "decoderx", ""):
        with pytest.raises(ValueError, match=f"group '{name}' .*'encoder.{name}'"):
            tspar.SparseGroupLasso({name: neuron()}, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="groups is empty"):
        tspar.SparseGroupLasso({}, 1, 1, 1, 1)


def test_prox_asks_nothing_of_a_side_without_strength():
    """With both decoder strengths 0, an optimizer of the encoder alone will do, and no decoder weight moves."""
    net, sgl = model_and_penalty(l1_decoder=0, l2_decoder=0)
    before = [w.detach().clone() for w in net["decoder"].parameters()]
    sgl.prox_(torch.optim.SGD(net["encoder"].parameters(), lr=10.0))
    assert net["encoder"][0].weight.eq(0).all()
    assert all(w.equal(b) for w, b in zip(net["decoder"].parameters(), before))


def test_prox_needs_the_whole_group_in_the_optimizer():
    """A parameter not in the optimizer, a group frozen in part: ValueError by name; RMSprop: TypeError."""
    net, sgl = model_and_penalty()
    with pytest.raises(ValueError, match="group 'decoder.mlp': .*not in the optimizer"):
        sgl.prox_(torch.optim.AdamW(net["encoder"].parameters()))
    net["decoder"][0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="group 'decoder.mlp': .*frozen"):
        sgl.prox_(torch.optim.AdamW(net.parameters()))
    with pytest.raises(TypeError, match="RMSprop"):
        sgl.prox_(torch.optim.RMSprop(net.parameters()))


def test_docstring_example_alone_in_an_empty_folder(tmp_path):
    """tspar.py by itself, and the ten lines of its docstring: two or three of 32 neurons are left."""
    example = textwrap.dedent(tspar.__doc__[tspar.__doc__.index("    net = "):])
    assert len(example.splitlines()) == 10
    shutil.copy(tspar.__file__, tmp_path)
    before = "import torch, tspar\ntorch.manual_seed(0)\ntorch.set_num_threads(1)\n"
    (tmp_path / "example.py").write_text(before + example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("2 of 32 neurons left\n", "3 of 32 neurons left\n")


@pytest.mark.parametrize("relative, factor", [(True, 10), (False, 1)])
def test_relative_strengths_follow_the_gradient(relative, factor):
    """Ten times the loss: what the penalty adds to .grad is ten times as much where strengths are relative, else the
    same."""
    added = []
    for times in (1, 10):
        net = nn.Linear(6, 4, dtype=torch.float64)
        nn.init.normal_(net.weight, generator=torch.Generator().manual_seed(0))
        sgl = tspar.SparseGroupLasso({"encoder.x": [(net.weight, 1)]}, 0.5, 0, 0.5, 0, relative=relative)
        (times * net.weight.square().sum()).backward()
        before = net.weight.grad.clone()
        sgl.add_gradient_()
        added.append(net.weight.grad - before)
    assert torch.allclose(added[1], factor * added[0]) and added[0].abs().min() > 0


def test_relative_penalty_is_what_its_gradient_says():
    """penalty() of relative strengths has the gradient that add_gradient_ adds: both by the gradient that is there."""
    net = nn.Linear(6, 4)
    sgl = tspar.SparseGroupLasso({"encoder.x": [(net.weight, 1)]}, 0.3, 0, 0.5, 0, relative=True)
    (1e-3 * net.weight.square().sum()).backward()
    before = net.weight.grad.clone()
    right = torch.autograd.grad(sgl.penalty(), net.weight)[0]
    sgl.add_gradient_()
    assert torch.allclose(net.weight.grad - before, right, rtol=1e-4)


def test_relative_strengths_without_a_gradient():
    """None to measure by: refused, as the strengths would be absolute. One that overflowed, in a step that a
    GradScaler skips: no penalty, no NaN. In half precision the sum of squares does not overflow. A frozen side asks
    for none."""
    net, frozen = nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(False)
    groups = {"encoder.x": [(net.weight, 1)], "decoder.x": [(frozen.weight, 1)]}
    sgl = tspar.SparseGroupLasso(groups, 1, 1, 1, 1, relative=True)
    for call in (sgl.penalty, sgl.add_gradient_, lambda: sgl.prox_(torch.optim.SGD(net.parameters(), lr=0.1))):
        with pytest.raises(ValueError, match="encoder.*backward"):
            call()
    before = net.weight.detach().clone()
    for bad in (math.inf, math.nan):
        net.weight.grad = torch.full((4, 6), bad)
        sgl.prox_(torch.optim.SGD(net.parameters(), lr=0.1))
        assert torch.equal(net.weight, before)
    half = nn.Parameter(torch.full((300, 300), 1.0, dtype=torch.float16))
    half.grad = torch.full_like(half, 300.0)                           # 300 * 300 of them have a norm of 90,000
    sgl = tspar.SparseGroupLasso({"encoder.x": [(half, 1)]}, 1, 0, 0, 0, relative=True)
    sgl.add_gradient_()
    assert torch.equal(half.grad, torch.full_like(half, 600.0))


def test_computed_members_are_refused():
    """A parametrized weight is made anew from another parameter at each use: a step on it would be lost."""
    net = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="'encoder.x'.*parametrization"):
        tspar.SparseGroupLasso({"encoder.x": [(net.weight, 1)]}, 1, 0, 1, 0)


def test_relative_strength_of_one_by_hand():
    """Strength 1 on single weights adds the root mean square of the side's gradient: (1, 7) has 5, and other sides do
    not count."""
    a, b = (nn.Parameter(torch.tensor([[3.0, -4.0]])) for _ in range(2))
    a.grad, b.grad = torch.tensor([[1.0, 7.0]]), torch.tensor([[100.0, 100.0]])
    sgl = tspar.SparseGroupLasso({"encoder.a": [(a, 1)], "decoder.b": [(b, 1)]}, 1, 0, 0, 0, relative=True)
    sgl.add_gradient_()
    assert torch.allclose(a.grad, torch.tensor([[6.0, 2.0]])) and torch.equal(b.grad, torch.tensor([[100.0, 100.0]]))
