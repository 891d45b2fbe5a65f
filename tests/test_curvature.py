"""prune.py's importance from curvature: Optimal Brain Damage where it is exact, what changes nothing, bad input; and
readers solved anew, against torch's own least squares."""
import copy

import pytest
import torch
from test_prune import SMALL, both, difference, inputs, logits, make

import prune


def curvature_of(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """A positive number for every weight, from 0.001 to 1,000."""
    g = torch.Generator().manual_seed(seed)
    return {name: 10 ** (6 * torch.rand(p.shape, generator=g) - 3) for name, p in model.named_parameters()}


def test_by_hand():
    """Weights 3 and 4 with curvature 1 and 0.25: n = sqrt(9 + 4); all other weights of the neuron are zero."""
    model = make(SMALL)
    h = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        for p, axis in prune.units(model)["encoder.blocks.0.mlp"]:
            p.select(axis, 5).zero_()
        mlp = model.encoder.blocks[0].mlp
        mlp[0].bias[5], mlp[2].weight[7, 5] = 3, 4
    h["encoder.blocks.0.mlp.2.weight"][7, 5] = 0.25
    assert prune.two_pass(model, curvature=h).norms["encoder.blocks.0.mlp"][5] == pytest.approx(13 ** 0.5, rel=1e-6)


def test_removal_from_a_quadratic_costs_half_of_n_squared():
    """L(w) = sum h (w - w0)^2 / 2 has its minimum at w0 and no mixed terms: there the formula is exact."""
    model, h = make(SMALL), curvature_of(make(SMALL))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = prune.two_pass(model, z1=-0.2, z2=None, curvature=h)
    gone, of = plan.removed()
    assert 0.2 < gone / of < 0.8
    prune.mask_(model, plan)
    loss = sum((h[name] * (p.detach() - before[name]).double() ** 2).sum() / 2 for name, p in model.named_parameters())
    said = sum((plan.norms[name][~keep] ** 2).sum() / 2 for name, keep in plan.keep.items())
    assert loss.item() == pytest.approx(said.item(), rel=1e-5)


def test_the_same_function_written_otherwise_costs_the_same():
    """Value times a and out by a, so gradients by a and times a, squares too: n_j stays. The norm does not."""
    model, h = make(SMALL), curvature_of(make(SMALL))
    scaled, h_scaled = copy.deepcopy(model), {name: x.clone() for name, x in h.items()}
    attn, stem, a = scaled.decoder.blocks[1].cross_attn, "decoder.blocks.1.cross_attn", 10.0
    with torch.no_grad():
        for leaf, factor in (("value.weight", a), ("value.bias", a), ("out.weight", 1 / a)):
            attn.get_parameter(leaf).mul_(factor)
            h_scaled[f"{stem}.{leaf}"] /= factor ** 2
    assert difference(logits(scaled), logits(model)) < 1e-5
    of = lambda m, c: prune.two_pass(m, z2=None, curvature=c).norms[f"{stem}.vo"]
    assert torch.allclose(of(scaled, h_scaled), of(model, h), rtol=1e-5)
    assert not torch.allclose(of(scaled, None), of(model, None), rtol=0.1)


def test_one_pool_over_the_model():
    """Mean and std are those of all groups of both sides together; norms have a pool for each side."""
    model, h = make(SMALL), curvature_of(make(SMALL))
    for curvature, pools in ((h, [""]), (None, ["encoder", "decoder"])):
        plan = prune.two_pass(model, z1=0.3, z2=None, curvature=curvature)
        for side in pools:
            n = torch.cat([x for name, x in plan.norms.items() if name.startswith(side)])
            cut, = {cut for name, cut in plan.cuts.items() if name.startswith(side)}
            assert cut == pytest.approx(n.mean().item() + 0.3 * n.std(correction=0).item())


@pytest.mark.parametrize("break_, says", [
    (lambda h: h.pop("encoder.blocks.1.attn.key.weight"), "encoder.blocks.1.attn.key.weight missing"),
    (lambda h: h.update({"decoder.blocks.0.mlp.0.bias": torch.ones(3)}), r"mlp.0.bias of shape \[3\]"),
    (lambda h: h["decoder.blocks.0.mlp.0.weight"].fill_(-1), "negative or not finite"),
    (lambda h: h["encoder.blocks.0.attn.out.weight"][0].fill_(float("nan")), "negative or not finite"),
    (lambda h: h["encoder.blocks.0.attn.out.weight"][0].fill_(float("inf")), "negative or not finite")])
def test_bad_curvature(break_, says):
    """A missing name, another shape, negative or not finite: one sentence with the parameter's name."""
    model, h = make(SMALL), curvature_of(make(SMALL))
    break_(h)
    with pytest.raises(ValueError, match=says) as error:
        prune.two_pass(model, curvature=h)
    assert "\n" not in str(error.value) and "; give" in str(error.value)


def test_curvature_from_before_removal_is_refused():
    """After remove_ the old curvature has other shapes."""
    model, h = make(SMALL), curvature_of(make(SMALL))
    prune.remove_(model, prune.two_pass(model, z1=0, curvature=h))
    with pytest.raises(ValueError, match="before remove_"):
        prune.two_pass(model, curvature=h)


# ------------------------------------------------------------------ readers solved anew

def moments_of(model) -> dict[str, torch.Tensor]:
    return prune.second_moments(model, lambda: logits(model))


def test_twins_are_removed_without_a_trace():
    """Half of the neurons and of each head's value dimensions repeat the other half: solved anew, the readers take the
    twin's share and the function stays; without, it does not."""
    model, keep = make(SMALL), {}
    with torch.no_grad():
        for name, group in prune.units(model).items():
            if not name.endswith(".qk"):
                n = len(group[0][0])
                heads = 1 if name.endswith("mlp") else 2
                half = torch.arange(n).view(heads, 2, -1)
                for p, axis in group[:2]:
                    p[half[:, 1].flatten()] = p[half[:, 0].flatten()]
                keep[name] = torch.zeros(n, dtype=torch.bool).index_fill_(0, half[:, 0].flatten(), True)
    plan = prune.two_pass(model, z1=-9, z2=None, floor=0)
    plan.keep |= keep
    plain, fitted = prune.mask_(copy.deepcopy(model), plan), copy.deepcopy(model)
    prune.refit_(fitted, plan, moments_of(model), ridge=1e-7)
    prune.mask_(fitted, plan)
    assert difference(logits(plain), logits(model)) > 0.1
    assert difference(logits(fitted), logits(model)) < 1e-3


def test_against_torch_lstsq():
    """Without a ridge, the new weights of one mlp.2 are those that torch.linalg.lstsq finds from the same inputs."""
    model, name = make(SMALL), "encoder.blocks.1.mlp.2"
    linear, seen = model.get_submodule(name), []
    hook = linear.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    logits(model)
    hook.remove()
    x = torch.cat([x.flatten(0, -2) for x in seen]).double()             # 80 positions, so keep fewer than 80 inputs
    plan = prune.two_pass(model, z1=-9, z2=None, floor=0)
    plan.keep["encoder.blocks.1.mlp"] = stay = torch.arange(256) < 48
    y = x @ linear.weight.detach().double().T + linear.bias.detach().double()
    right = torch.linalg.lstsq(torch.cat([x[:, stay], torch.ones(len(x), 1)], 1), y).solution.T
    before, stiff = linear.weight.detach().clone(), copy.deepcopy(model)
    prune.refit_(stiff, plan, moments_of(model), ridge=1e9)
    assert torch.allclose(stiff.get_submodule(name).weight, before, atol=1e-5), "the ridge holds the old weights"
    prune.refit_(model, plan, moments_of(model), ridge=0)
    assert torch.allclose(linear.weight[:, stay].double(), right[:, :-1], atol=1e-3)
    assert torch.allclose(linear.bias.double(), right[:, -1], atol=1e-3)


def test_refit_is_kept_by_removal_and_leaves_no_hooks():
    """remove_ after refit_ is mask_ after refit_; the moments are sums of outer products, symmetric, the last entry the
    number of positions; a forward that fails leaves nothing behind."""
    model = make(SMALL)
    moments = moments_of(model)
    assert {name.rpartition(".")[2] for name in moments} == {"out", "2"} and len(moments) == 2 * 2 + 3 * 3
    batch, tokens = inputs(model)[1].shape
    assert moments["decoder.blocks.0.attn.out"][-1, -1] == batch * tokens
    assert moments["encoder.blocks.0.mlp.2"][-1, -1] == batch * SMALL.n_audio_ctx
    assert all(torch.equal(m, m.T) for m in moments.values())
    plan = prune.two_pass(model, z1=-0.2, z2=None, curvature=curvature_of(model))
    prune.refit_(model, plan, moments)
    masked, removed = both(model, plan)
    assert difference(logits(removed), logits(masked)) < 1e-5
    with pytest.raises(ZeroDivisionError):
        prune.second_moments(model, lambda: 1 / 0)
    assert not any(m._forward_pre_hooks for m in model.modules())
