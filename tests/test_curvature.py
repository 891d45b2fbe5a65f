"""prune.py's importance from curvature: Optimal Brain Damage where it is exact, what changes nothing, bad input; and
readers solved anew, against torch's own least squares."""
import copy
from dataclasses import replace

import pytest
import torch
from test_prune import SMALL, SPEECH, difference, inputs, logits, make, uniform, weaken

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

def without(model, keep: dict) -> torch.nn.Module:
    """A copy of the model that has the groups of `keep` alone."""
    plan = prune.two_pass(model, z1=-9, z2=None, floor=0)
    plan.keep |= keep
    return prune.remove_(copy.deepcopy(model), plan)


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
    plain = without(model, keep)
    fitted = prune.refit_(copy.deepcopy(plain), model, [inputs(model)], ridge=1e-7)
    assert difference(logits(plain), logits(model)) > 0.1
    assert difference(logits(fitted), logits(model)) < 1e-3
    assert not any(m._forward_pre_hooks for m in fitted.modules())


def test_against_torch_lstsq():
    """Without a ridge the new weights of a block's mlp.2 are those that torch.linalg.lstsq finds for what the reader
    reads in the pruned model and what its residual stream lacks: cross-attention's share of it too."""
    model = make(SMALL)
    pruned = without(model, {"decoder.blocks.0.cross_attn.vo": torch.arange(64) % 32 < 16,
                             "decoder.blocks.0.mlp": torch.arange(256) < 8})
    old, new = model.decoder.blocks[0], pruned.decoder.blocks[0]
    assert new.mlp[2].weight.shape == (64, 8)
    prune.refit_(fitted := copy.deepcopy(pruned), model, [inputs(model)], ridge=0)
    seen = {}
    def keep(key):
        return lambda _, inputs, *out: seen.update({key: (out or inputs)[0].detach()})
    new.cross_attn.out.load_state_dict(fitted.decoder.blocks[0].cross_attn.out.state_dict())
    hooks = [old.register_forward_hook(keep("x*")), new.mlp_ln.register_forward_pre_hook(keep("x")),
             new.mlp[2].register_forward_pre_hook(keep("u"))]
    logits(model), logits(pruned)
    for hook in hooks:
        hook.remove()
    u, lacks = seen["u"].flatten(0, 1), (seen["x*"] - seen["x"]).flatten(0, 1)
    right = torch.linalg.lstsq(torch.nn.functional.pad(u, (0, 1), value=1), lacks).solution.T
    reader = fitted.decoder.blocks[0].mlp[2]
    assert torch.allclose(reader.weight, right[:, :-1], atol=1e-3)
    assert torch.allclose(reader.bias, right[:, -1], atol=1e-3)
    stiff = prune.refit_(copy.deepcopy(pruned), model, [inputs(model)], ridge=1e9).decoder.blocks[0].mlp[2]
    assert torch.allclose(stiff.weight, new.mlp[2].weight, atol=1e-5), "the ridge holds the old weights"


def test_what_one_batch_says_two_say():
    """The sums run over all batches; with a cut window and vocabulary too, which reads the same rows as without."""
    full = prune.window_(make(SPEECH), 0.4)
    model = prune.vocabulary_(copy.deepcopy(full), range(1000, 1040))
    mels, ids = inputs(model)[0], torch.randint(1000, 1040, (2, 9))
    keep = {f"{side}.blocks.0.mlp": torch.arange(256) < 64 for side in ("encoder", "decoder")}
    pruned = without(model, keep)
    whole = prune.refit_(copy.deepcopy(pruned), model, [(mels, ids)])
    parts = prune.refit_(copy.deepcopy(pruned), model, [(mels[:1], ids[:1]), (mels[1:], ids[1:])])
    uncut = prune.refit_(without(full, keep), full, [(mels, ids)])
    for block, same in zip(whole.decoder.blocks, uncut.decoder.blocks):
        assert torch.allclose(block.mlp[2].weight, same.mlp[2].weight, atol=1e-4)
    whole, parts, plain, of = (m.decoder.kept_logits(ids, m.encoder(mels)) for m in (whole, parts, pruned, model))
    assert difference(whole, parts) < 1e-4
    assert difference(whole, of) < 0.5 * difference(plain, of)


def test_refit_of_a_masked_model():
    """mask_ and remove_ lead to the same function: what always reads zero has no part in the ridge."""
    model = make(SMALL)
    plan = replace(prune.two_pass(model, z2=None), keep={
        "encoder.blocks.0.mlp": torch.arange(256) < 24, "decoder.blocks.1.attn.vo": torch.arange(64) % 32 < 8,
        "decoder.blocks.1.attn.qk": torch.arange(64) % 32 < 8})
    fitted = [prune.refit_(cut(copy.deepcopy(model), plan), model, [inputs(model)])
              for cut in (prune.mask_, prune.remove_)]
    assert difference(*map(logits, fitted)) < 1e-4 < difference(logits(fitted[0]), logits(model))


def test_refit_twice_under_autocast():
    """autocast keeps bf16 copies of float weights: the second cut in one context must not read those of before it."""
    model, results = make(SMALL), []
    keep = [{f"{side}.blocks.0.mlp": torch.arange(256) < n for side in ("encoder", "decoder")} for n in (128, 32)]
    for contexts in (1, 2):
        fitted, cuts = copy.deepcopy(model), [keep] if contexts == 1 else [[k] for k in keep]
        for some in cuts:
            with torch.autocast("cpu", torch.bfloat16):
                for k in some:
                    prune.mask_(fitted, replace(prune.two_pass(model, z2=None), keep=k))
                    prune.refit_(fitted, model, [inputs(model)])
        results.append(logits(fitted))
    assert torch.equal(*results)


def test_refit_in_half_precision():
    """Weights in half precision, LayerNorms in float as whisper has them: fitted as in float32, to its precision."""
    keep = {f"{side}.blocks.0.mlp": torch.arange(256) < 128 for side in ("encoder", "decoder")}
    model, differences = make(SMALL), []
    for dtype in (torch.float32, torch.bfloat16):
        whole = copy.deepcopy(model)
        for m in whole.modules():
            if not isinstance(m, torch.nn.LayerNorm):
                for p in m.parameters(recurse=False):
                    p.data = p.data.to(dtype)
        plain = without(whole, keep)
        fitted = prune.refit_(copy.deepcopy(plain), whole, [inputs(model)])
        differences.append([difference(logits(x).float(), logits(whole).float()) for x in (plain, fitted)])
    (plain, fitted), (_, half) = differences
    assert fitted < half < (fitted + plain) / 2


@pytest.mark.parametrize("ids, ridge, match", [([[1, 2]], -1.0, "ridge is -1"), ([[1, 40000]], 0.1, "40000.*no row"),
                                               ([[1, -100]], 0.1, "-100.*no row")])
def test_refit_of_bad_input(ids, ridge, match):
    model = prune.vocabulary_(make(SPEECH), [300])
    with pytest.raises(ValueError, match=match):
        prune.refit_(copy.deepcopy(model), model, [(inputs(model)[0][:1], torch.tensor(ids))], ridge=ridge)


@pytest.mark.parametrize("other, batches", [(SMALL, 0), (replace(SMALL, n_text_layer=1), 1)])
def test_refit_of_no_pair(other, batches):
    """Nothing to fit on, or a model that was not the other's before: one sentence."""
    model = make(SMALL)
    with pytest.raises(ValueError, match="refit_ needs"):
        prune.refit_(make(other), model, [inputs(model)] * batches)


# ------------------------------------------------------------------ heads in other axes

def spoken(model) -> tuple:
    """mels, and ids that every vocabulary keeps."""
    return inputs(model)[0], torch.arange(50257, 50275).view(2, 9)


@torch.no_grad()
def said(model, name: str, some: slice = slice(None)) -> torch.Tensor:
    """(n_head, rows, columns): what these dimensions of every head say together, each query times each key less its
    clip's mean, or V u at each position; as these are sums over dimensions, without A or B."""
    (stem, kind), seen = name.rsplit(".", 1), {}
    attn = model.get_submodule(stem)
    hooks = [m.register_forward_hook(lambda m, x, y: seen.update({m: x[0] if m is attn.out else y}))
             for m in (attn.query, attn.key, attn.out)]
    model(*spoken(model))
    for hook in hooks:
        hook.remove()
    query, key, u = (seen[m].double().unflatten(-1, (attn.n_head, -1))[..., some]
                     for m in (attn.query, attn.key, attn.out))
    if kind == "qk":
        return torch.einsum("bthi,cshi->hbtcs", query, key - key.mean(1, keepdim=True)).flatten(3).flatten(1, 2)
    V = attn.out.weight.double().unflatten(-1, (attn.n_head, -1))[..., some]
    return torch.einsum("bthi,ohi->hbto", u, V).flatten(1, 2)


@pytest.mark.parametrize("prepare", [lambda m: m, lambda m: prune.window_(prune.vocabulary_(m, [300]), 0.4),
                                     lambda m: prune.remove_(m, uniform(weaken(m, 0.5), 0.5))])
def test_a_turned_head_is_the_same_function(prepare):
    """The logits stay, where vocabulary and window or widths are cut too, and so does what every head costs; what is
    no head stays to the bit."""
    model = prepare(make(SPEECH))
    h, new = curvature_of(model), copy.deepcopy(model)
    h_new = prune.balance_(new, [spoken(model)], h)
    with torch.no_grad():
        assert difference(*(m(*spoken(m)).nan_to_num(neginf=0) for m in (new, model))) < 1e-4
    old, turned = (prune.two_pass(m, z2=None, curvature=c).norms for m, c in ((model, h), (new, h_new)))
    for name, n in old.items():
        stem, kind = name.rsplit(".", 1)
        heads = 1 if kind == "mlp" else model.get_submodule(stem).n_head
        cost, there = (x.view(heads, -1).square() for x in (n, turned[name]))
        assert torch.allclose(cost.sum(1), there.sum(1), rtol=1e-5)
        assert torch.equal(n, turned[name]) if kind == "mlp" else (there.diff() <= 1e-6 * there[:, :1]).all()
    for name, p in model.named_parameters():
        head = "attn." in name and not name.endswith("out.bias")
        assert torch.equal(p, new.get_parameter(name)) != head
        assert (h_new[name] is h[name]) != head


@pytest.mark.parametrize("unit", ["encoder.blocks.0.attn", "decoder.blocks.1.attn", "decoder.blocks.0.cross_attn"])
def test_the_first_dimensions_say_most(unit):
    """With k dimensions a head lacks what the best matrix of rank k lacks (Eckart, Young 1936; torch's singular values
    of what the unturned head says), and dimension j costs the share S_j^2 of what the head does."""
    model, k = make(SPEECH), 3
    h, new, attn = curvature_of(model), copy.deepcopy(model), model.get_submodule(unit)
    h_new = prune.balance_(new, [spoken(model)], h)
    for name in (f"{unit}.qk", f"{unit}.vo"):
        whole = said(model, name)
        squares = torch.linalg.svdvals(whole)[:, :64 // attn.n_head].square()
        squares /= squares.sum(1, keepdim=True)
        lacks, plain = ((whole - said(m, name, slice(k))).square().sum((1, 2)) / whole.square().sum((1, 2))
                        for m in (new, model))
        assert torch.allclose(lacks, squares[:, k:].sum(1), rtol=1e-3, atol=2e-6) and (lacks < 0.9 * plain).all()
        n = prune.two_pass(new, z2=None, curvature=h_new).norms[name].view(attn.n_head, -1).square()
        assert torch.allclose(n / n.sum(1, keepdim=True), squares, rtol=1e-2, atol=1e-3)


def test_balanced_axes():
    """(5) for random A and B: T A T' and T^-T B T^-1 are the same diagonal matrix, S falling."""
    g = torch.Generator().manual_seed(0)
    A, B = (x @ x.mT for x in torch.randn(2, 4, 6, 30, generator=g, dtype=torch.float64))
    T, inverse, squares = prune._balancing(A, B)
    S = torch.diag_embed(squares.sqrt())
    assert torch.allclose(T @ inverse, torch.eye(6, dtype=T.dtype).expand(4, 6, 6), atol=1e-9)
    assert torch.allclose(T @ A @ T.mT, S, atol=5e-3 * S.max().item())             # up to the ridge, 1e-4 of the mean
    assert torch.allclose(inverse.mT @ B @ inverse, S, atol=5e-3 * S.max().item())
    assert (squares.diff() < 0).all()


def test_what_one_batch_turns_two_turn():
    model = make(SPEECH)
    (mels, ids), h = spoken(model), curvature_of(model)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    one = prune.balance_(whole, [(mels, ids)], h)
    two = prune.balance_(parts, [(mels[:1], ids[:1]), (mels[1:], ids[1:])], h)
    n, same = (prune.two_pass(m, z2=None, curvature=c).norms for m, c in ((whole, one), (parts, two)))
    assert all(torch.allclose(n[name], same[name], rtol=1e-3, atol=1e-5 * n[name].max().item()) for name in n)
    assert not any(m._forward_hooks for m in whole.modules())


def test_a_head_that_says_nothing():
    """One without values, and one that nothing reads either: both cost what they did, and nothing breaks."""
    model, name = make(SPEECH), "decoder.blocks.1.cross_attn.vo"
    attn = model.decoder.blocks[1].cross_attn
    with torch.no_grad():
        for p in (attn.value.weight, attn.value.bias):
            p[:32].zero_()
        attn.out.weight[:, 16:32].zero_()
    new, h = copy.deepcopy(model), curvature_of(model)
    h_new = prune.balance_(new, [spoken(model)], h)
    assert difference(*(m(*spoken(m)).detach() for m in (new, model))) < 1e-4
    old, n = (prune.two_pass(m, z2=None, curvature=c).norms[name].view(4, 16) for m, c in ((model, h), (new, h_new)))
    assert torch.allclose(n.square().sum(1), old.square().sum(1), rtol=1e-5)
    assert n[[0, 2, 3]].any(1).all() and not n[1].any()


def test_balance_of_bad_input():
    """No batches, or curvature that two_pass would refuse, in its words; and no hook is left behind."""
    model = make(SPEECH)
    with pytest.raises(ValueError, match="balance_ needs batches"):
        prune.balance_(model, [], curvature_of(model))
    with pytest.raises(ValueError, match="negative or not finite"):
        prune.balance_(model, [spoken(model)], {name: -x for name, x in curvature_of(model).items()})
    with pytest.raises(RuntimeError):
        prune.balance_(model, [(spoken(model)[0][:, :3], spoken(model)[1])], curvature_of(model))
    assert not any(m._forward_hooks for m in model.modules())
