"""prune.py's importance from curvature: Optimal Brain Damage where it is exact, what changes nothing, bad input; and
readers solved anew, against torch's own least squares."""
import copy
from dataclasses import replace

import pytest
import torch
from test_prune import SMALL, SPEECH, difference, inputs, logits, make

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
