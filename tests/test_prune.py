"""prune.py: the decision by hand, `remove_` against `mask_` wherever Whisper runs, files, and bad input."""
import ast
import copy
import math
import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import whisper
import whisper.timing
from torch.nn.utils import prune as torch_prune
from whisper.model import Linear, ModelDimensions, MultiHeadAttention, Whisper, disable_sdpa

import prune

SMALL = ModelDimensions(80, 40, 64, 2, 2, 300, 24, 64, 2, 3)            # head width 32
SHAPES = {"two heads of 32": SMALL,
          "four of 16": replace(SMALL, n_audio_head=4, n_text_head=4),
          "two of 20": replace(SMALL, n_audio_state=40, n_text_state=40),  # 20 is no multiple of 8
          "one head": replace(SMALL, n_audio_head=1, n_text_head=1, n_text_layer=1)}
SPEECH = ModelDimensions(80, 50, 64, 2, 1, 51865, 48, 64, 4, 2)         # a real vocabulary: whisper.decode runs


def make(dims: ModelDimensions = SMALL, seed: int = 0) -> Whisper:
    """A random Whisper in which every parameter counts, biases too."""
    torch.manual_seed(seed)
    model = Whisper(dims).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


def uniform(model: Whisper, fraction: float, per_layer: bool = False, multiple: int = 8) -> prune.Plan:
    """Baseline: the `fraction` of units with the smallest n_j, over the model or in each layer and kind, evened as
    two_pass does. ValueError if fraction is not in [0, 1)."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}; give a number from 0 up to, but not including, 1")
    plan = prune.two_pass(model, z2=None, multiple=multiple)
    pools = plan.norms if per_layer else dict.fromkeys(plan.norms, torch.cat(list(plan.norms.values())))
    cuts = {name: pool.sort().values[int(fraction * len(pool))].item() for name, pool in pools.items()}
    keep = prune._even(model, plan.norms, cuts, multiple)
    return replace(plan, settings={"fraction": fraction, "multiple": multiple}, cuts=cuts, keep=keep)


@torch.no_grad()
def weaken(model: Whisper, share, seed: int = 0, factor: float = 0.05) -> Whisper:
    """Shrinks a share of every unit's groups; `share` is a number, or a function of the unit's name."""
    g = torch.Generator().manual_seed(seed)
    for name, group in prune.units(model).items():
        part = share(name) if callable(share) else share
        scale = torch.ones(len(group[0][0]))
        scale[torch.randperm(len(scale), generator=g)[:round(part * len(scale))]] = factor
        for p, axis in group:
            p.mul_(scale if axis == p.ndim - 1 else scale[:, None])
    return model


@torch.no_grad()
def weaken_heads(model: Whisper, heads: dict[str, list[int]]) -> Whisper:
    """Shrinks all value dimensions of the heads named."""
    for name, gone in heads.items():
        width = model.get_submodule(name).value.out_features // model.get_submodule(name).n_head
        for head in gone:
            rows = slice(head * width, (head + 1) * width)
            for (p, axis) in prune.units(model)[f"{name}.vo"]:
                p[rows if axis == 0 else (slice(None), rows)] *= 0.01
    return model


def columns(model: Whisper) -> dict:
    """Every column of every Linear in the blocks, named as tspar.columns names them."""
    return {name: [(m.weight, 1)] for name, m in model.named_modules() if isinstance(m, Linear)}


def inputs(model: Whisper, seed: int = 1) -> tuple:
    g = torch.Generator().manual_seed(seed)
    dims = model.dims
    return (torch.randn(2, dims.n_mels, 2 * dims.n_audio_ctx, generator=g),
            torch.randint(dims.n_vocab, (2, min(9, dims.n_text_ctx)), generator=g))


@torch.no_grad()
def logits(model: Whisper, fused: bool = True) -> torch.Tensor:
    if fused:
        return model(*inputs(model))
    with disable_sdpa():
        return model(*inputs(model))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def both(model: Whisper, plan: prune.Plan) -> tuple[Whisper, Whisper]:
    return prune.mask_(copy.deepcopy(model), plan), prune.remove_(copy.deepcopy(model), plan)


# ------------------------------------------------------------------ the decision, by hand

@torch.no_grad()
def constant(model: Whisper, values: dict[str, list[float]]) -> Whisper:
    """Sets every entry of group j to plus or minus values[name][j] (1 if not named), so that n_j is that number. With
    one sign for all, a layer would sum up what LayerNorm has centred: zero but for rounding."""
    for name, group in prune.units(model).items():
        n = torch.tensor(values.get(name, [1.0] * len(group[0][0])))
        for p, axis in group:
            p.copy_((n if axis == p.ndim - 1 else n[:, None]) * p.sign())
    return model


def test_pass_one_by_hand():
    """64 qk + 64 vo + 256 neurons, half of the 384 at 0.4, half at 1: mean 0.7, std 0.3 (n), cut 0.7 - 0.25 * 0.3."""
    dims = replace(SMALL, n_audio_layer=1, n_text_layer=1)
    name = "encoder.blocks.0.mlp"
    model = constant(make(dims), {name: [0.4] * 192 + [1.0] * 64})
    plan = prune.two_pass(model, z1=-0.25, z2=None)
    assert plan.cuts[name] == pytest.approx(0.625, abs=1e-6)
    assert plan.keep[name].tolist() == [False] * 192 + [True] * 64
    assert plan.keep["encoder.blocks.0.attn.vo"].all()
    # the decoder's pool is its own: all 1, nothing under the cut
    assert plan.cuts["decoder.blocks.0.mlp"] == 1 and plan.keep["decoder.blocks.0.mlp"].all()
    assert plan.removed()[0] == 192 * (64 + 1 + 64)


def test_floor_by_hand():
    """With z1 = -9 the mean and std cut nothing (0.7 - 2.7); a floor of 0.6 cuts under 0.42."""
    dims = replace(SMALL, n_audio_layer=1, n_text_layer=1)
    name = "encoder.blocks.0.mlp"
    model = constant(make(dims), {name: [0.4] * 192 + [1.0] * 64})
    assert prune.two_pass(model, z1=-9, floor=0.5).keep[name].all()
    assert prune.two_pass(model, z1=-9, floor=0.6).keep[name].sum() == 64


def test_pass_two_by_hand_and_afresh():
    """Survivors of one matrix: half 1, half 3. Mean 2, std 1 (n, not n - 1), z2 = -0.5: cut 1.5, half goes. With
    the 192 weak neurons still counted the mean would be 0.5 and nothing would go."""
    model = make(replace(SMALL, n_audio_layer=1, n_text_layer=1))
    constant(model, {"encoder.blocks.0.mlp": [0.0] * 192 + [1.0] * 64})
    first = model.encoder.blocks[0].mlp[0]
    with torch.no_grad():
        first.weight[192:, ::2] = 3
    plan = prune.two_pass(model, z2=-0.5)
    assert plan.pass2["encoder.blocks.0.mlp.0"] == pytest.approx([2.0, 1.0, 1.5, 64 * 32, 64 * 64], abs=1e-9)
    bias = first.bias.clone()
    prune.mask_(model, plan)
    assert (first.weight[192:, ::2] == 3).all() and (first.weight[192:, 1::2] == 0).all()
    assert torch.equal(first.bias[192:], bias[192:]), "pass 2 leaves biases alone"


def test_matrices_of_equal_weights_stay():
    """Equal norms and equal weights are not under their own mean, whatever rounding does."""
    model = constant(make(), {name: [0.1] * len(group[0][0]) for name, group in prune.units(make()).items()})
    plan = prune.two_pass(model)
    assert all(keep.all() for keep in plan.keep.values()) and all(kept == of for *_, kept, of in plan.pass2.values())


def test_evening_by_hand():
    """Head 0 has 3 strong query/key and 2 strong value dimensions, head 1 has 9 and 5: all keep 9, rounded to 16."""
    model = make(replace(SMALL, n_audio_layer=1, n_text_layer=1))
    strong = lambda a, b: [5.0] * a + [0.1] * (32 - a) + [0.2 - j / 1000 for j in range(32 - b)] + [5.0] * b
    constant(model, {"encoder.blocks.0.attn.qk": strong(3, 9), "encoder.blocks.0.attn.vo": strong(2, 5)})
    for multiple, width in ((1, 9), (8, 16), (64, 32)):
        plan = prune.two_pass(model, multiple=multiple)
        for kind in ("qk", "vo"):
            kept = plan.keep[f"encoder.blocks.0.attn.{kind}"].view(2, 32)
            assert kept.sum(1).tolist() == [width, width]
            # in head 1 the strongest doomed come first in the row: they are the ones that stay
            own = {"qk": 9, "vo": 5}[kind]
            assert kept[1, :width - own].all() and kept[1, 32 - own:].all()


def test_head_without_values_goes_head_without_queries_stays():
    """Head 0 loses its values and goes with its strong queries; head 1 loses its queries and keeps 8 of them."""
    model = make(replace(SMALL, n_audio_layer=1, n_text_layer=1))
    constant(model, {"encoder.blocks.0.attn.qk": [1.0] * 32 + [0.01] * 32,
                     "encoder.blocks.0.attn.vo": [0.01] * 32 + [1.0] * 8 + [0.01] * 24})
    plan = prune.two_pass(model)
    assert plan.keep["encoder.blocks.0.attn.qk"].view(2, 32).sum(1).tolist() == [0, 8]
    assert plan.keep["encoder.blocks.0.attn.vo"].view(2, 32).sum(1).tolist() == [0, 8]
    masked, removed = both(model, plan)
    assert removed.encoder.blocks[0].attn.n_head == 1
    assert difference(logits(removed), logits(masked)) < 1e-5


def test_everything_weak_keeps_one_and_says_so():
    """A cut above every norm: one head of 8 and 8 neurons stay, and the plan marks the rows."""
    model = make()
    plan = prune.two_pass(model, z1=100)
    for name, keep in plan.keep.items():
        assert keep.sum() == 8
    rows = [line for line in str(plan).splitlines() if line.startswith("encoder.blocks.0.mlp ")]
    assert "8*" in rows[0] and "(*: all norms under the cut)" in str(plan)
    masked, removed = both(model, plan)
    assert {attn.n_head for attn in removed.modules() if isinstance(attn, MultiHeadAttention)} == {1}
    assert difference(logits(removed), logits(masked)) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_decision_against_plain_loops(seed):
    """Equations (1) and (2) against numpy and Python loops, one group at a time."""
    model = weaken(make(seed=seed), 0.4, seed)
    plan = prune.two_pass(model, z1=-0.3, z2=-0.8, multiple=1)
    params = dict(model.named_parameters())
    pools = {"encoder": [], "decoder": []}
    for name, group in prune.units(model).items():
        for j in range(len(group[0][0])):
            entries = np.concatenate([p.detach().numpy().astype(np.float64).take(j, axis).ravel()
                                      for p, axis in group])
            n = np.sqrt((entries ** 2).sum()) / np.sqrt(entries.size)
            assert plan.norms[name][j].item() == pytest.approx(n, rel=1e-5)
            pools[name[:7]].append(n)
    for side, pool in pools.items():
        cut = max(0.05 * np.mean(pool), np.mean(pool) - 0.3 * np.std(pool))
        assert plan.cuts[f"{side}.blocks.0.mlp"] == pytest.approx(cut, rel=1e-5)
    for name, (mean, std, cut, kept, of) in plan.pass2.items():
        w = np.abs(params[f"{name}.weight"].detach().numpy().astype(np.float64))
        for group, keep in plan.keep.items():
            for p, axis in ((p, axis) for p, axis in prune.units(model)[group] if p is params[f"{name}.weight"]):
                w = w.compress(keep.numpy(), axis)
        assert (mean, std) == pytest.approx((w.mean(), w.std()), rel=1e-5)
        assert cut == pytest.approx(w.mean() - 0.8 * w.std(), rel=1e-4) and kept == (w >= cut).sum() and of == w.size


def test_planning_changes_nothing():
    """two_pass, uniform, units, zeros only read: every byte of the state dict stays."""
    model = weaken(make(), 0.5)
    before = copy.deepcopy(model.state_dict())
    prune.two_pass(model), prune.two_pass(model, columns(model)), uniform(model, 0.5), prune.zeros(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ------------------------------------------------------------------ removal is the mask, saved

def part(name: str, seed: int) -> float:
    """A share between 0 and 7/8 that differs from unit to unit."""
    return (zlib.crc32(name.encode()) + seed) % 8 / 8


def attentions(model: Whisper) -> dict[str, MultiHeadAttention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MultiHeadAttention)}


CASES = {
    "ragged shares": lambda m, s: weaken(m, lambda name: part(name, s), s),
    "half": lambda m, s: weaken(m, 0.5, s),
    "most": lambda m, s: weaken(m, 0.9, s),
    "encoder only": lambda m, s: weaken(m, lambda name: 0.7 * name.startswith("encoder"), s),
    "decoder only": lambda m, s: weaken(m, lambda name: 0.7 * name.startswith("decoder"), s),
    "whole heads": lambda m, s: weaken_heads(weaken(m, 0.3, s), {
        name: [s % a.n_head] for name, a in attentions(m).items() if a.n_head > 1}),
    "one head left": lambda m, s: weaken_heads(m, {name: range(1, a.n_head) for name, a in attentions(m).items()}),
}
PLANS = [(False, dict(z2=-1.0)), (False, dict(z1=0.3, z2=-0.5, multiple=1)),
         (False, dict(z1=-1.0, z2=None, multiple=4)),
         (True, dict(z1=0.3, z2=-0.5))]              # True: groups are columns


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_remove_is_mask(case, shape):
    """Any plan, any shapes: the small model answers as the masked one, fused and unfused, and so does expand."""
    for seed, (by_column, options) in enumerate(PLANS):
        model = CASES[case](make(SHAPES[shape], seed), seed)
        plan = prune.two_pass(model, columns(model) if by_column else None, **options)
        masked, removed = both(model, plan)
        stock = prune.expand(removed)
        for fused in (True, False):
            expected = logits(masked, fused)
            assert difference(logits(removed, fused), expected) < 1e-5
            assert difference(logits(stock, fused), expected) < 1e-5
        gone, of = plan.removed()
        assert (of, of - gone) == (size(model), size(removed)) and size(stock) == of


def size(model: Whisper, side: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".blocks." in name and name.startswith(side))


def test_the_cases_cut_what_they_name():
    """The cases above are not empty: heads go, widths shrink to several values, readers select."""
    removed = {case: both(m := CASES[case](make(SHAPES["four of 16"]), 0), prune.two_pass(m, multiple=1))[1]
               for case in CASES}
    assert {a.n_head for a in attentions(removed["one head left"]).values()} == {1}
    assert 3 in {a.n_head for a in attentions(removed["whole heads"]).values()}
    widths = {len(a.query.weight) // a.n_head for m in removed.values() for a in attentions(m).values()}
    assert len(widths) > 4
    for side, other in (("encoder", "decoder"), ("decoder", "encoder")):
        model = CASES[f"{side} only"](make(), 0)
        small = both(model, prune.two_pass(model, z1=-9, floor=0.2, multiple=1))[1]
        assert size(small, side) < 0.5 * size(model, side) and size(small, other) == size(model, other)
    model = weaken(make(), 0.5)
    read = both(model, prune.two_pass(model, columns(model), z1=0.5))[1]
    assert any(isinstance(m, prune.SelectingLinear) and m.in_features < 64 for m in read.modules())
    assert len(read.encoder.blocks[0].mlp[0].weight) < 256, "the producer of mlp.2's columns goes along"


def test_nothing_to_prune_is_bitwise_nothing():
    """Equal groups, no pass 2: the removed model is the model, to the last bit."""
    model = make()
    plan = prune.two_pass(model, z1=-50, floor=0, z2=None)
    removed = prune.remove_(copy.deepcopy(model), plan)
    assert plan.removed()[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), removed.state_dict().values()))
    assert torch.equal(logits(removed), logits(model))


def test_mask_zeroes_all_members():
    """What goes is zero in every member: rows, biases (value's too), columns; shapes stay; the rest is untouched."""
    model = weaken(make(), 0.5)
    plan = prune.two_pass(model, z2=None)
    masked = prune.mask_(copy.deepcopy(model), plan)
    whole = prune.units(model)
    for name, group in prune.units(masked).items():
        keep = plan.keep[name]
        for (p, axis), (old, _) in zip(group, whole[name]):
            assert p.shape == old.shape
            assert (p.index_select(axis, (~keep).nonzero().flatten()) == 0).all()
    assert not masked.encoder.blocks[0].mlp[0].bias.all() and model.encoder.blocks[0].mlp[0].bias.all()
    assert torch.equal(masked.encoder.blocks[0].attn.out.bias, model.encoder.blocks[0].attn.out.bias)
    again = prune.mask_(copy.deepcopy(masked), plan)
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), again.parameters()))


def test_prune_train_prune_again():
    """A pruned model trains, keeps its zeros if they are put back, can be copied, and is pruned and expanded again."""
    model = weaken(make(SHAPES["four of 16"]), 0.5)
    prune.remove_(model, prune.two_pass(model, z2=-0.5))
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    held, zero = prune.zeros(model), [m.weight == 0 for m in linears]
    assert sum(int(z.sum()) for z in zero) > 1000
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    mel, tokens = inputs(model)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(mel, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for weight, keep in held:
            weight.data.mul_(keep)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(m.weight == 0, z) for m, z in zip(linears, zero)), "the same zeros as before training"
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    for by_column in (False, True, True):
        weaken(model, 0.3, seed=9)
        masked, removed = both(model, prune.two_pass(model, columns(model) if by_column else None, z1=0.2, multiple=1))
        assert size(removed) < size(model)
        assert difference(logits(removed), logits(masked)) < 1e-5
        assert difference(logits(prune.expand(removed)), logits(masked)) < 1e-5
        model = removed


def test_expand_keeps_what_is_frozen():
    model = make()
    model.encoder.requires_grad_(False)
    new = prune.expand(prune.remove_(model, prune.two_pass(model)))
    assert {name for name, p in new.named_parameters() if not p.requires_grad} == {
        name for name, p in model.named_parameters() if name.startswith("encoder.")} - {"encoder.positional_embedding"}


def test_dtype_device_and_requires_grad_stay():
    """Frozen parameters stay frozen, half stays half, an index stays an integer, the tied embedding stays tied."""
    model = weaken(make(), 0.5)
    model.encoder.requires_grad_(False)
    embedding = model.decoder.token_embedding.weight
    prune.remove_(model, prune.two_pass(model))
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.requires_grad for p in model.decoder.parameters())
    assert model.decoder.token_embedding.weight is embedding
    for groups in (None, columns):
        full = weaken(make(), 0.5)
        for cast in (torch.float16, torch.bfloat16, torch.float64):
            early = copy.deepcopy(full).to(cast)
            prune.remove_(early, prune.two_pass(early, groups and groups(early), z1=0.2))
            assert {p.dtype for p in early.parameters()} == {cast}
        masked, late = both(full, prune.two_pass(full, groups and groups(full), z1=0.2))
        mel, tokens = inputs(full)
        with torch.no_grad():
            expected = masked(mel, tokens)
            assert difference(late(mel.half(), tokens), expected) < 0.02     # what fp16=True does
            late.half().apply(lambda m: m.float() if isinstance(m, torch.nn.LayerNorm) else m)
            assert difference(late(mel.half(), tokens), expected) < 0.02     # stock whisper, too, needs this


# ------------------------------------------------------------------ everything whisper does with a model

@pytest.fixture(scope="module", params=["units", "columns"])
def speech(request) -> tuple[Whisper, Whisper]:
    """A model with a real vocabulary, masked and removed; one cross-attention head of each layer is gone."""
    model = weaken(make(SPEECH, 3), 0.4, 3)
    weaken_heads(model, {"decoder.blocks.0.cross_attn": [0], "decoder.blocks.1.cross_attn": [2]})
    groups = columns(model) if request.param == "columns" else None
    model.register_buffer("alignment_heads", torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool().to_sparse(), False)
    masked, removed = both(model, prune.two_pass(model, groups))
    assert [b.cross_attn.n_head for b in removed.decoder.blocks] == [3, 3]
    return masked, removed


def test_alignment_heads_follow(speech):
    """(0, 0) and (1, 2) are gone; (0, 3) is number 2 of its layer now, (1, 1) is still number 1."""
    masked, removed = speech
    assert masked.alignment_heads.indices().T.tolist() == [[0, 3], [1, 1]]
    assert removed.alignment_heads.indices().T.tolist() == [[0, 2], [1, 1]]


def test_alignment_heads_default_when_none_is_left():
    """All listed heads gone: whisper's default, every head in the upper half of the layers."""
    model = weaken_heads(make(SHAPES["four of 16"]), {"decoder.blocks.0.cross_attn": [1]})
    model.register_buffer("alignment_heads", torch.tensor([[0, 1, 0, 0]] + [[0] * 4] * 2).bool().to_sparse(), False)
    masked, removed = both(model, prune.two_pass(model))
    assert removed.alignment_heads.indices().T.tolist() == [[layer, head] for layer in (1, 2) for head in range(4)]
    assert removed.alignment_heads.indices().tolist() == masked.alignment_heads.indices().tolist()


@pytest.mark.parametrize("options", [dict(), dict(beam_size=3), dict(beam_size=2, patience=2.0)])
def test_decode(speech, options):
    """whisper.decode gives the masked model's tokens, greedy and by beam, with timestamps and without."""
    masked, removed = speech
    mel = inputs(masked)[0][:1 if "beam_size" in options else 2]     # whisper's beam search takes one clip
    for stamps in (True, False):
        settings = whisper.DecodingOptions(language="hi", fp16=False, sample_len=20, without_timestamps=stamps,
                                           **options)
        for a, b in zip(whisper.decode(removed, mel, settings), whisper.decode(masked, mel, settings)):
            assert a.tokens == b.tokens and len(set(a.tokens)) > 2
            assert a.avg_logprob == pytest.approx(b.avg_logprob, abs=1e-4)


@torch.no_grad()
def test_key_value_cache(speech):
    """One token at a time with whisper's own cache hooks equals the whole sentence at once; the cache is smaller."""
    mel, tokens = inputs(speech[1])
    caches = []
    for model in speech:
        audio = model.encoder(mel)
        cache, hooks = model.install_kv_cache_hooks()
        steps = torch.cat([model.decoder(tokens[:, t:t + 1], audio, kv_cache=cache) for t in range(tokens.shape[1])],
                          1)
        for hook in hooks:
            hook.remove()
        assert difference(steps, model.decoder(tokens, audio)) < 1e-5
        assert difference(steps, logits(speech[0])) < 1e-5
        caches.append(sum(t.numel() for t in cache.values()))
    assert caches[1] < caches[0]


def test_transcribe_with_word_timestamps(monkeypatch):
    """model.transcribe(word_timestamps=True): the words and times of the masked model."""
    for name in ("dtw_cpu", "backtrace"):               # plain Python is enough here; compiling takes 10 s
        monkeypatch.setattr(whisper.timing, name, getattr(whisper.timing, name).py_func)
    model = weaken(make(replace(SPEECH, n_audio_ctx=1500, n_audio_state=32, n_text_state=32, n_text_head=4), 5), 0.3,
                   5)
    weaken_heads(model, {"decoder.blocks.1.cross_attn": [0, 2], "decoder.blocks.0.cross_attn": [1]})
    audio = np.random.default_rng(0).standard_normal(16000 * 3).astype(np.float32)
    masked, removed = both(model, prune.two_pass(model, multiple=4))
    assert [b.cross_attn.n_head for b in removed.decoder.blocks] == [3, 2]
    settings = dict(language="hi", word_timestamps=True, temperature=0.0, fp16=False, sample_len=24,
                    no_speech_threshold=None, logprob_threshold=None, compression_ratio_threshold=None)
    expected, found = (m.transcribe(audio, **settings) for m in (masked, removed))
    words = [[(w["word"], w["start"], w["end"]) for s in result["segments"] for w in s["words"]]
             for result in (expected, found)]
    assert words[0] == words[1] and len({start for _, start, _ in words[0]}) > 1


# ------------------------------------------------------------------ fewer ids, shorter windows

# single bytes, specials, timestamps of the multilingual vocabulary
OWN = {*range(256), *range(50257, 51865)}


def transcripts(model: Whisper, **options) -> list[tuple]:
    """Tokens and mean log-probability of one clip: greedy, with timestamps and without, and by beam; the language
    found."""
    mel = inputs(model)[0][:1]
    results = [whisper.decode(model, mel,
                              whisper.DecodingOptions(language="hi", fp16=False, sample_len=20, **options, **more))[0]
               for more in (dict(), dict(without_timestamps=True), dict(beam_size=5))]
    return [(r.tokens, r.avg_logprob, r.no_speech_prob) for r in results] + [whisper.detect_language(model, mel)[1]]


@pytest.fixture(scope="module")
def cut() -> tuple[Whisper, Whisper, list[int]]:
    """A model, the same with the rows of what it transcribes, and these ids."""
    model = make(SPEECH, 3)
    ids = sorted({t for tokens, *_ in transcripts(model)[:3] for t in tokens if t < 50257})
    return model, prune.vocabulary_(copy.deepcopy(model), ids), ids


def test_vocabulary_by_hand():
    """A model with 300 ids, the bytes 0 to 255 among them: 270 and 260 stay besides, in rows 256 and 257, in the order
    of ids."""
    model = make()
    small = prune.vocabulary_(copy.deepcopy(model), [270, 260, 270, 7])
    old, new = model.decoder.token_embedding, small.decoder.token_embedding
    assert new.weight.shape == (258, 64) and new.num_embeddings == 258 and small.dims == model.dims
    assert small.decoder.kept_ids.tolist() == [*range(256), 260, 270]
    assert small.decoder.row_of[[3, 259, 260, 270]].tolist() == [3, -1, 256, 257]
    assert torch.equal(new.weight, old.weight[[*range(256), 260, 270]]) and new.weight.requires_grad
    old.weight.requires_grad_(False)
    assert not prune.vocabulary_(model, [260]).decoder.token_embedding.weight.requires_grad, "frozen stays frozen"


def test_vocabulary_keeps_what_whisper_needs(cut):
    """Multilingual: 256 bytes and 1,608 specials and timestamps, asked for or not; English only: one special fewer."""
    model, small, ids = cut
    assert {*small.decoder.kept_ids.tolist()} == OWN | {*ids} and len(OWN) == 1864
    for n_vocab, specials in ((51864, 51864 - 50256), (51866, 51866 - 50257)):
        english = prune.vocabulary_(make(replace(SMALL, n_vocab=n_vocab)), [220])
        assert len(english.decoder.token_embedding.weight) == 256 + specials
    encoding = whisper.tokenizer.get_tokenizer(True).encoding
    assert all(encoding.encode_single_token(bytes([b])) in OWN for b in range(256))


def test_logits_of_a_cut_vocabulary(cut):
    """Those of the ids that stay are the same, the others -inf; kept_logits has the former only, in the order of
    kept_ids."""
    model, small, _ = cut
    mel, tokens = inputs(model)
    ids = small.decoder.kept_ids
    tokens = ids[tokens % len(ids)]
    with torch.no_grad():
        expected, found = model(mel, tokens), small(mel, tokens)
        kept = small.decoder.kept_logits(tokens, small.encoder(mel))
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert difference(found[..., ids], expected[..., ids]) < 1e-5
    assert (found[..., small.decoder.row_of < 0] == -math.inf).all()
    assert found.isinf().sum() == 2 * 9 * (51865 - len(ids))
    assert torch.equal(kept, found[..., ids])


def test_training_on_kept_logits(cut):
    """The loss over the rows that are left, and every gradient, equal those of the full width with -inf."""
    small = copy.deepcopy(cut[1])
    mel, _ = inputs(small)
    tokens = torch.tensor([[50258, *cut[2][:5], 65], [50258, 66, *cut[2][-5:]]])
    losses, grads, rows = [], [], small.decoder.rows
    for full in (True, False):
        small.zero_grad()
        audio = small.encoder(mel)
        out = small.decoder(tokens[:, :-1], audio) if full else small.decoder.kept_logits(tokens[:, :-1], audio)
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1),
                                                 (tokens if full else rows(tokens))[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad.clone() for p in small.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_transcripts_of_a_cut_vocabulary(cut):
    """Greedy: the tokens of the whole model. Beam too: the whole model's with suppress_tokens=gone (what is gone is no
    rival any more, so a beam may find better). All to the same log-probability, and the languages found are equally
    likely."""
    model, small, _ = cut
    gone = (small.decoder.row_of < 0).nonzero().flatten().tolist()
    whole, found, suppressed = transcripts(model), transcripts(small), transcripts(model, suppress_tokens=[-1, *gone])
    assert [tokens for tokens, *_ in whole[:2]] == [tokens for tokens, *_ in found[:2]]
    for a, b in zip(found[:3], suppressed[:3]):
        assert a[0] == b[0] and len({*a[0]}) > 2 and a[1] == pytest.approx(b[1], abs=1e-4) and not math.isnan(a[1])
    assert found[3] == [pytest.approx(probabilities, abs=1e-6) for probabilities in whole[3]]


def test_a_prompt_whose_row_is_gone(cut):
    """An id without a row cannot be read: ValueError, which names it."""
    gone = (cut[1].decoder.row_of < 0).nonzero()[0].item()
    with pytest.raises(ValueError, match=rf"ids \[{gone}\] have no row"):
        whisper.decode(cut[1], inputs(cut[1])[0],
                       whisper.DecodingOptions(language="hi", prompt=[gone, 65], fp16=False))


def test_a_cut_model_is_a_model(cut, tmp_path):
    """Copied, saved and loaded, given another's weights, in half and double precision: the same logits, the same
    transcripts."""
    model, small, ids = cut
    prune.save(small, tmp_path / "cut.pt")
    assert (tmp_path / "cut.pt").stat().st_size < 0.2 * sum(4 * p.numel() for p in model.parameters())
    other = prune.vocabulary_(make(SPEECH, 9), [300 + i for i in range(len(set(ids) - OWN))])
    other.load_state_dict(small.state_dict())
    mel, expected = inputs(small)[0], transcripts(small)
    for again in (prune.load(tmp_path / "cut.pt"), copy.deepcopy(small), other):
        assert transcripts(again) == expected
    tokens = torch.tensor([[50258, *ids[:4]]] * 2)
    with torch.no_grad():
        reference = small.decoder.kept_logits(tokens, small.encoder(mel))
        for cast, close in ((torch.float16, 0.02), (torch.float64, 1e-5)):
            found = copy.deepcopy(small).to(cast).apply(lambda m: m.float() if isinstance(m, torch.nn.LayerNorm)
                                                        else m)
            found = found(mel.to(cast), tokens)
            assert difference(found[..., small.decoder.kept_ids].to(reference), reference) < close
            assert found.isinf().sum() == 2 * 5 * (51865 - reference.shape[-1]) and not found.isnan().any()


def test_expanded_vocabulary(cut, tmp_path):
    """whisper.load_model reads the expanded file; rows that are gone have one logit, 100 below all others, in half
    precision too: the same tokens, by beam too, as likely as before."""
    model, small, ids = cut
    prune.save(prune.expand(small), tmp_path / "stock.pt")
    stock = whisper.load_model(str(tmp_path / "stock.pt"), "cpu")
    assert {k: v.shape for k, v in stock.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    for a, b in zip(transcripts(stock)[:3], transcripts(small)[:3]):
        assert a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-5)
    gone = small.decoder.row_of < 0
    x = stock.decoder.ln(10 * torch.randn(50, 64)).detach()
    for cast, spread in ((torch.float32, 0.01), (torch.float16, 2)):
        out = x.to(cast) @ stock.decoder.token_embedding.weight.to(cast).T
        assert out[:, gone].max() - out[:, gone].min() < spread and out[:, gone].max() < out[:, ~gone].min() - 90


def test_untrained_norm_has_no_losing_row():
    """A bias of 0 in the last LayerNorm, as before training, leaves every row some chance: expand refuses."""
    model = prune.vocabulary_(make(), [260])
    torch.nn.init.zeros_(model.decoder.ln.bias)
    with pytest.raises(ValueError, match="expand the model before vocabulary_"):
        prune.expand(model)


def test_vocabulary_and_removal_in_either_order(cut):
    """Cut, then planned and removed, or the reverse, or planned before and removed after: one function; and all else
    takes it."""
    model, small, ids = cut
    model = weaken(copy.deepcopy(model), 0.5)
    plan = prune.two_pass(model)
    first = prune.vocabulary_(prune.remove_(copy.deepcopy(model), plan), ids)
    last = prune.remove_(prune.vocabulary_(copy.deepcopy(model), ids), plan)
    fresh = prune.vocabulary_(copy.deepcopy(model), ids)
    assert str(prune.two_pass(fresh)) == str(plan)
    assert prune.magnitude_(copy.deepcopy(fresh), 0.5) == prune.magnitude_(copy.deepcopy(model), 0.5)
    masked = prune.vocabulary_(prune.mask_(copy.deepcopy(model), plan), ids)
    mel, tokens = inputs(model)[0], torch.tensor([[50258, *ids[:4]]] * 2)
    with torch.no_grad():
        a, b, c, d = (m(mel, tokens)[..., first.decoder.kept_ids] for m in (first, last, masked, prune.expand(last)))
    assert torch.equal(a, b) and difference(a, c) < 1e-5 and difference(a, d) < 1e-5
    assert prune.zeros(first)[0][0] is first.encoder.blocks[0].attn.query.weight


def test_vocabulary_twice():
    """A smaller set is cut once more; an id that is gone cannot come back."""
    model = make()
    small = prune.vocabulary_(prune.vocabulary_(copy.deepcopy(model), [260, 270, 280]), [280])
    assert small.decoder.kept_ids.tolist() == [*range(256), 280]
    assert torch.equal(small.decoder.token_embedding.weight,
                       model.decoder.token_embedding.weight[small.decoder.kept_ids])
    with pytest.raises(ValueError, match=r"tokens to keep are \[270\]"):
        prune.vocabulary_(small, [280, 270])


def test_transcribe_with_a_cut_vocabulary(monkeypatch):
    """model.transcribe(word_timestamps=True): the words and times of the whole model, from the ids that it decodes
    (some of which whisper decodes, drops and decodes again in the next window)."""
    for name in ("dtw_cpu", "backtrace"):
        monkeypatch.setattr(whisper.timing, name, getattr(whisper.timing, name).py_func)
    model = make(replace(SPEECH, n_audio_ctx=1500, n_audio_state=32, n_text_state=32, n_text_head=4), 5)
    audio = np.random.default_rng(0).standard_normal(16000 * 3).astype(np.float32)
    settings = dict(word_timestamps=True, temperature=0.0, fp16=False, sample_len=24, no_speech_threshold=None,
                    logprob_threshold=None,
                    compression_ratio_threshold=None)
    small, decoded = copy.deepcopy(model), []
    model.decode = lambda mel, options: (decoded.append(whisper.decode(model, mel, options)), decoded[-1])[1]
    expected = model.transcribe(audio, **settings)
    prune.vocabulary_(small, {t for result in decoded for t in result.tokens})
    found = small.transcribe(audio, **settings)
    assert found["text"] == expected["text"] and found["language"] == expected["language"]
    times = [[(w["word"], w["start"], w["end"]) for s in result["segments"] for w in s["words"]]
             for result in (expected, found)]
    assert times[0] == times[1] and len({start for _, start, _ in times[0]}) > 1


def test_window_by_hand(tmp_path):
    """0.5 s of a model of one second are 25 positions and a mel of 50 frames; dims are its own; a file and stock
    whisper agree."""
    model = make(SPEECH, 3)
    short = prune.window_(copy.deepcopy(model), 0.5)
    assert short.dims == replace(SPEECH, n_audio_ctx=25) and model.dims == SPEECH
    assert torch.equal(short.encoder.positional_embedding, model.encoder.positional_embedding[:25])
    shared = Whisper(SPEECH)
    prune.window_(shared, 0.5)
    assert SPEECH.n_audio_ctx == 50
    for path, m in ((tmp_path / "short.pt", short), (tmp_path / "stock.pt", prune.expand(short))):
        prune.save(m, path)
        assert torch.equal(logits(prune.load(path)), logits(short))
        assert torch.equal(logits(whisper.load_model(str(path), "cpu")), logits(short))
    prune.vocabulary_(short, [300]), prune.remove_(short, prune.two_pass(weaken(short, 0.5)))
    assert transcripts(short)[0][0] and short.encoder(torch.zeros(1, 80, 50)).shape == (1, 25, 64)


def test_window_of_what_is_heard():
    """Each position is the one it was: an encoder without attention, cut to 0.4 s, gives the first 20 of 50 positions,
    but for the last, whose convolution looks one frame ahead. 0.419 s are no more than 20 positions, 0.58 s 29,
    whatever 50 * 0.58 is."""
    model = make(SPEECH, 3)
    for block in model.encoder.blocks:
        torch.nn.init.zeros_(block.attn.out.weight)
    mel = torch.randn(1, 80, 100)
    with torch.no_grad():
        whole, short = model.encoder(mel), prune.window_(copy.deepcopy(model), 0.4).encoder(mel[..., :40])
    assert torch.allclose(short[:, :19], whole[:, :19], atol=1e-5)
    for seconds, positions in ((0.419, 20), (0.58, 29), (1, 50), (0.02, 1), (np.float32(0.4), 20)):
        assert prune.window_(copy.deepcopy(model), seconds).dims.n_audio_ctx == positions


def test_word_times_in_a_window(monkeypatch):
    """find_alignment on a window of 2 of 3 seconds: times are those of positions, 50 a second, none past what was
    said."""
    for name in ("dtw_cpu", "backtrace"):
        monkeypatch.setattr(whisper.timing, name, getattr(whisper.timing, name).py_func)
    model = prune.window_(make(replace(SPEECH, n_audio_ctx=150), 5), 2)
    seen = []
    steps = lambda matrix: (seen.append(matrix.shape), np.arange(len(matrix)), 10 * np.arange(len(matrix)))[1:]
    monkeypatch.setattr(whisper.timing, "dtw", steps)
    tokenizer = whisper.tokenizer.get_tokenizer(True, language="en")
    words = whisper.timing.find_alignment(model, tokenizer, tokenizer.encode(" one two three"), torch.randn(80, 200),
                                          200)
    assert [(w.start, w.end) for w in words[:3]] == [(0.0, 0.2), (0.2, 0.4), (0.4, 0.6)] and seen[0][1] == 100


# ------------------------------------------------------------------ baselines

def test_magnitude_by_hand_and_by_torch():
    """The smallest go until the share is zero, as torch's own global_unstructured decides; zeros count."""
    for fraction in (0.0, 0.25, 0.9):
        model, other = make(), make()
        cut = prune.magnitude_(model, fraction)
        layers = [(m, "weight") for m in other.modules() if isinstance(m, Linear)]
        total = sum(m.weight.numel() for m, _ in layers)
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=round(fraction * total))
        for (a, b) in zip((m for m in model.modules() if isinstance(m, Linear)), (m for m, _ in layers)):
            assert torch.equal(a.weight, b.weight)
            assert a.weight[a.weight != 0].abs().min() > cut
    again = copy.deepcopy(model)
    prune.magnitude_(again, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters())), "90% are zero already"
    assert torch.equal(model.decoder.token_embedding.weight, make().decoder.token_embedding.weight)


def test_uniform_rates():
    """A quarter of every unit per layer; over the model, a quarter of all units, wherever the weak ones are."""
    model = weaken(make(), lambda name: 0.9 * ("encoder.blocks.0.mlp" in name))
    layer = uniform(model, 0.25, per_layer=True)
    for name, n in layer.norms.items():
        assert (n >= layer.cuts[name]).double().mean() == 0.75
        if name.endswith("mlp"):
            assert layer.keep[name].double().mean() == 0.75
    everywhere = uniform(model, 0.09)
    gone = torch.cat([n < everywhere.cuts[name] for name, n in everywhere.norms.items()])
    assert gone.double().mean().item() == pytest.approx(0.09, abs=0.001)
    assert everywhere.keep["encoder.blocks.0.mlp"].sum() < 0.5 * 256 and everywhere.keep["encoder.blocks.1.mlp"].all()
    for plan in (layer, everywhere):
        masked, removed = both(model, plan)
        assert difference(logits(removed), logits(masked)) < 1e-5


def test_target_share():
    """Bisection reaches the share asked for, as near as the steps of evening allow, and says what it reached."""
    model = weaken(make(), lambda name: part(name, 0))
    for share in (0.2, 0.5, 0.7):
        plan = prune.two_pass(model, z2=None, multiple=1, share=share)
        again = prune.two_pass(model, z1=plan.settings["z1"], z2=None, multiple=1)       # at the z1 that it has found
        assert str(again) == str(plan) and all(torch.equal(again.keep[name], plan.keep[name]) for name in plan.keep)
        gone, of = plan.removed()
        assert gone / of == pytest.approx(share, abs=0.02)
        assert size(prune.remove_(copy.deepcopy(model), plan)) == of - gone
        assert f"({gone / of:.1%})" in str(plan)
    plan = prune.target(0.3, lambda fraction: uniform(model, fraction, multiple=1), 0, 0.99)
    assert plan.removed()[0] / plan.removed()[1] == pytest.approx(0.3, abs=0.02)


# ------------------------------------------------------------------ plans and models in files

def test_plan_in_a_file(tmp_path):
    """A plan is names, numbers and tensors: it comes back without unpickling and prunes the same."""
    model = weaken(make(), 0.5)
    plan = prune.two_pass(model)
    torch.save(asdict(plan), tmp_path / "plan.pt")
    again = prune.Plan(**torch.load(tmp_path / "plan.pt", weights_only=True))
    assert str(again) == str(plan)
    a, b = prune.remove_(copy.deepcopy(model), plan), prune.remove_(copy.deepcopy(model), again)
    assert torch.equal(logits(a), logits(b))


def test_plan_as_a_table():
    """Under 80 columns even for large's sizes; kept adds up to the keep masks; the total is the removed share."""
    model = weaken(make(), 0.5)
    plan = prune.two_pass(model)
    lines = str(plan).splitlines()
    assert max(map(len, lines)) < 80
    row = next(line for line in lines if line.startswith("decoder.blocks.2.cross_attn.vo")).split()
    n = plan.norms["decoder.blocks.2.cross_attn.vo"]
    assert row[1:3] == [f"{n.mean():.4f}", f"{n.std(correction=0):.4f}"]
    assert row[4:] == [str(int(plan.keep["decoder.blocks.2.cross_attn.vo"].sum())), "64"]
    assert lines[-1].endswith(f"({plan.removed()[0] / plan.removed()[1]:.1%})")
    costs = prune.two_pass(model, curvature={name: torch.full_like(p, 1e-11) for name, p in model.named_parameters()})
    row = next(line for line in str(costs).splitlines() if line.startswith("decoder.blocks.2.cross_attn.vo")).split()
    assert float(row[1]) == pytest.approx(costs.norms["decoder.blocks.2.cross_attn.vo"].mean().item(), rel=0.05)
    wide = "decoder.blocks.31.cross_attn.query"
    plan.pass2 = {wide: [0.0123, 0.0123, -0.0012, 1280 * 5120, 1280 * 5120]}
    assert max(map(len, str(plan).splitlines())) < 80


@pytest.mark.parametrize("kind", ["units", "columns"])
def test_save_and_load(tmp_path, kind):
    """A pruned model comes back bit by bit: weights, head counts, selected columns, alignment heads."""
    model = weaken(weaken_heads(make(SHAPES["four of 16"]), {"decoder.blocks.2.cross_attn": [1]}), 0.4)
    model.register_buffer("alignment_heads", torch.tensor([[0] * 4] * 2 + [[0, 1, 0, 1]]).bool().to_sparse(), False)
    prune.remove_(model, prune.two_pass(model, columns(model) if kind == "columns" else None, z1=0.2))
    prune.save(model, tmp_path / "pruned.pt")
    again = prune.load(tmp_path / "pruned.pt")
    assert torch.equal(logits(again), logits(model))
    assert model.alignment_heads.indices().T.tolist() == again.alignment_heads.indices().T.tolist() == [[2, 2]]
    assert {n: a.n_head for n, a in attentions(model).items()} == {n: a.n_head for n, a in attentions(again).items()}
    assert os.listdir(tmp_path) == ["pruned.pt"]
    plan = prune.two_pass(again, z1=0.1)
    masked, removed = both(again, plan)
    assert difference(logits(removed), logits(masked)) < 1e-5


def test_stock_files_both_ways(tmp_path):
    """load reads OpenAI's format, half precision too; whisper.load_model reads what save wrote of stock shapes and
    of expand, and refuses a pruned file, as the README says."""
    model = make()
    stock = {"dims": asdict(model.dims), "model_state_dict": {k: v.half() for k, v in model.state_dict().items()}}
    torch.save(stock, tmp_path / "openai.pt")
    ours, theirs = prune.load(tmp_path / "openai.pt"), whisper.load_model(str(tmp_path / "openai.pt"), "cpu")
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert torch.equal(ours.alignment_heads.to_dense(), theirs.alignment_heads.to_dense())
    prune.save(model, tmp_path / "stock.pt")
    assert torch.equal(logits(whisper.load_model(str(tmp_path / "stock.pt"), "cpu")), logits(model))
    weaken(model, 0.5)
    prune.remove_(model, prune.two_pass(model))
    prune.save(model, tmp_path / "pruned.pt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        whisper.load_model(str(tmp_path / "pruned.pt"), "cpu")
    prune.save(prune.expand(model), tmp_path / "expanded.pt")
    again = whisper.load_model(str(tmp_path / "expanded.pt"), "cpu")
    assert difference(logits(again), logits(model)) < 1e-5
    assert again.decoder.blocks[0].attn.query.weight.shape == (64, 64)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk in the middle of writing: the old file is whole, nothing else lies around, the error comes out."""
    path = tmp_path / "model.pt"
    prune.save(make(seed=1), path)
    old = path.read_bytes()

    def full_disk(obj, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        prune.save(make(seed=2), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["model.pt"]


# ------------------------------------------------------------------ bad input

def test_bad_settings():
    """Not finite, negative, fractional: one sentence that names the setting and the value."""
    model = make()
    for options in (dict(z1=math.nan), dict(z1=math.inf), dict(z2=math.nan), dict(z2=-math.inf), dict(floor=-0.1),
                    dict(floor=math.nan), dict(multiple=0), dict(multiple=2.5)):
        (key, value), = options.items()
        with pytest.raises(ValueError, match=f"{key} is {value}"):
            prune.two_pass(model, **options)
    for fraction in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="fraction is"):
            uniform(model, fraction)
        with pytest.raises(ValueError, match="fraction is"):
            prune.magnitude_(model, fraction)
    for share in (-0.1, 0.9999, math.nan):
        with pytest.raises(ValueError, match=f"share of {share} cannot be removed"):
            prune.two_pass(model, share=share)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value):
    """The parameter is named, be it a weight, a bias or a layer norm of a block."""
    for name in ("encoder.blocks.1.attn.key.weight", "decoder.blocks.2.mlp.2.bias", "decoder.blocks.0.attn_ln.weight"):
        model = make()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = value
        with pytest.raises(ValueError, match=name):
            prune.two_pass(model)


def test_plan_of_another_model():
    """Other widths, other layers, other head counts, or the plan's own model after removal: nothing is changed."""
    model = weaken(make(), 0.5)
    plan = prune.two_pass(model)
    others = [make(SHAPES[name]) for name in ("four of 16", "two of 20", "one head")]
    others += [make(replace(SMALL, n_text_layer=4)), prune.remove_(copy.deepcopy(model), plan)]
    for other in others:
        before = copy.deepcopy(other.state_dict())
        for act in (prune.mask_, prune.remove_):
            with pytest.raises(ValueError, match="the plan is for another model: (en|de)coder"):
                act(other, plan)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_groups_that_are_not_this_models():
    """Parameters of another model, an unknown combination, the same part twice, groups from before remove_."""
    model = weaken(make(), 0.5)
    key = prune.units(model)["encoder.blocks.0.attn.qk"]
    for groups in (prune.units(make()), {"x": [(model.decoder.token_embedding.weight, 1)]},
                   {"x": [(model.encoder.blocks[0].attn.out.weight, 0)]}, {"x": key, "y": key}):
        with pytest.raises(ValueError, match="group (x|y|encoder.blocks.0.attn.qk) is neither"):
            prune.two_pass(model, groups)
    old = prune.units(model)
    prune.remove_(model, prune.two_pass(model))
    with pytest.raises(ValueError, match="again after remove_"):
        prune.two_pass(model, old)


def test_not_a_model_with_values(tmp_path):
    """No Whisper, or one on the meta device: a ValueError from every entrance."""
    model = make()
    plan = prune.two_pass(model)
    meta = Whisper(SMALL)
    for block in meta.encoder.blocks:
        block.to("meta")
    calls = [prune.units, prune.two_pass, prune.expand, lambda m: uniform(m, 0.5), lambda m: prune.mask_(m, plan),
             lambda m: prune.remove_(m, plan), lambda m: prune.magnitude_(m, 0.5),
             lambda m: prune.save(m, tmp_path / "x")]
    for call in calls:
        with pytest.raises(ValueError, match="whisper.model.Whisper is needed, not a Linear"):
            call(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="meta device"):
            call(meta)
    assert os.listdir(tmp_path) == []


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_checkpoints_that_are_none(tmp_path):
    """Text, random bytes, a cut file, other contents, wrong sizes, no head counts, code that unpickling would run:
    ValueError; no file: OSError."""
    model = weaken(make(), 0.5)
    prune.remove_(model, prune.two_pass(model))
    prune.save(model, tmp_path / "good.pt")
    good, path = torch.load(tmp_path / "good.pt", weights_only=True), tmp_path / "bad.pt"
    whole = (tmp_path / "good.pt").read_bytes()
    for content in (b"", b"hello", b"not a checkpoint at all\n" * 9, np.random.default_rng(0).bytes(5000),
                    whole[:-1000],
                    whole[:len(whole) // 2], whole[:10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt"):
            prune.load(path)
    without = lambda part: {k: v for k, v in good.items() if k != part}
    state = dict(good["model_state_dict"])
    wrong = [[1, 2], torch.zeros(3), {}, {"dims": 3, "model_state_dict": {}}, without("dims"),
             without("model_state_dict"),
             without("heads"), {**good, "dims": {**good["dims"], "n_mels": 70}}, {**good, "dims": {"n_mels": 80}},
             {**good, "model_state_dict": {k: v for k, v in state.items() if "blocks.1.mlp.0" not in k}},
             {**good, "model_state_dict": {**state, "surplus": torch.zeros(1)}},
             {**good, "heads": {**good["heads"], "encoder.blocks.0.attn": 7}}]
    for content in wrong:
        torch.save(content, path)
        with pytest.raises(ValueError, match="bad.pt"):
            prune.load(path)
    torch.save({**good, "trap": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(ValueError, match="bad.pt"):
        prune.load(path)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(FileNotFoundError):
        prune.load(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError):
        prune.save(model, tmp_path / "no folder" / "x.pt")


def test_bad_vocabularies_and_windows():
    """One sentence each with what came; the model stays as it was."""
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for tokens in ([300], [-1], [1.0], ["a"], "text", [True], [None], [math.nan], torch.ones(2)):
        with pytest.raises(ValueError, match="tokens to keep are .* whole numbers from 0 to 299"):
            prune.vocabulary_(model, tokens)
    with pytest.raises(ValueError, match="tokens to keep are none"):
        prune.vocabulary_(model, [])
    for seconds in (0.81, 30, 0, -1, 0.01, math.nan, math.inf, -math.inf, "1", None, True, [1]):
        with pytest.raises(ValueError, match=r"seconds is .*; give a number from 0.02, one position, to 0.8"):
            prune.window_(model, seconds)
    with pytest.raises(ValueError, match="seconds is True"):
        prune.window_(make(SPEECH), True)                # one second, were it a number
    assert before.keys() == model.state_dict().keys() and all(torch.equal(before[k], v)
                                                              for k, v in model.state_dict().items())
    assert type(model.decoder) is whisper.model.TextDecoder and model.dims == SMALL


def wrapped(layer: torch.nn.Module, **more) -> torch.nn.Module:
    """What an adapter puts around a layer."""
    module = torch.nn.Module()
    module.base, module.lora = layer, torch.nn.Linear(2, 2)
    return module


HIDDEN = {
    "prune.remove": lambda b: torch_prune.l1_unstructured(b.attn.query, "weight", 0.5),
    "prune.remove first": lambda b: torch_prune.random_unstructured(b.mlp_ln, "bias", 0.5),
    "remove_parametrizations": lambda b: torch.nn.utils.parametrizations.weight_norm(b.mlp[2]),
    "parametrize.remove_parametrizations first":
        lambda b: torch.nn.utils.parametrizations.orthogonal(b.cross_attn.out),
    "remove_weight_norm": lambda b: torch.nn.utils.weight_norm(b.mlp[0]),
    "untie": lambda b: setattr(b.cross_attn.query, "weight", b.attn.query.weight),
    "untie weights": lambda b: setattr(b, "cross_attn", b.attn),
    "load float": lambda b: setattr(b.attn, "key", torch.ao.nn.quantized.dynamic.Linear(64, 64)),
    "load float weights": lambda b: setattr(b.mlp[0], "weight",
                                            torch.nn.Parameter(torch.zeros(256, 64, dtype=torch.int8), False)),
    "merge what wraps": lambda b: setattr(b.attn, "value", wrapped(b.attn.value)),
    "merge what wraps the layer": lambda b: b.mlp[0].register_parameter("lora_A",
                                                                        torch.nn.Parameter(torch.zeros(2, 64)))}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("remedy", HIDDEN)
def test_weights_that_something_hides(remedy, tmp_path):
    """Masks not yet removed, parametrizations, shared and quantized weights, adapters: the remedy is named, nothing is
    cut."""
    model = make()
    plan = prune.two_pass(model)
    HIDDEN[remedy](model.decoder.blocks[1])
    for call in (prune.units, prune.two_pass, prune.expand, prune.zeros, lambda m: prune.mask_(m, plan),
                 lambda m: prune.remove_(m, plan),
                 lambda m: prune.magnitude_(m, 0.5), lambda m: prune.vocabulary_(m, [1]),
                 lambda m: prune.save(m, tmp_path / "x")):
        with pytest.raises(ValueError, match=rf"^decoder.blocks.1\..*{remedy}"):
            call(model)
    assert os.listdir(tmp_path) == []


def test_the_remedies_work():
    """After prune.remove and remove_parametrizations the model is pruned as any other."""
    model = make()
    linear = model.encoder.blocks[0].mlp[0]
    torch_prune.l1_unstructured(linear, "weight", 0.5), torch_prune.remove(linear, "weight")
    torch.nn.utils.parametrizations.orthogonal(linear), torch.nn.utils.parametrize.remove_parametrizations(linear,
                                                                                                           "weight")
    masked, removed = both(model, prune.two_pass(model, z1=0.2))
    assert difference(logits(removed), logits(masked)) < 1e-5


def test_wrapped_models():
    """DataParallel, as DistributedDataParallel, and torch.compile: unwrap it."""
    for model in (torch.nn.DataParallel(make()), torch.compile(make())):
        with pytest.raises(ValueError, match="a whisper.model.Whisper is needed, not a .*unwrap it"):
            prune.vocabulary_(model, [1])


def test_old_files_and_prefixes(tmp_path):
    """torch's format before 1.6, and names behind what wrappers put before them: the same model, code still not
    run."""
    model = weaken(make(), 0.5)
    prune.remove_(model, prune.two_pass(model, columns(model)))
    prune.save(model, tmp_path / "new.pt")
    new, path = torch.load(tmp_path / "new.pt", weights_only=True), tmp_path / "old.pt"
    for prefix in ("", "module.", "model.", "_orig_mod.", "_orig_mod.module."):
        state = {prefix + name: t for name, t in new["model_state_dict"].items()}
        torch.save({**new, "model_state_dict": state}, path, _use_new_zipfile_serialization=prefix == "module.")
        assert torch.equal(logits(prune.load(path)), logits(model))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    alien = [b"not a checkpoint at all\n" * 9, rng.bytes(5000),
             *(whole[:n] for n in (0, 10, 1000, *rng.integers(0, len(whole) - 1, 20)))]
    for content in alien:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^.*old.pt is no Whisper checkpoint .*prune.save") as e:
            prune.load(path)
        assert len(str(e.value)) < len(str(path)) + 300 and "\n" not in str(e.value)
    torch.save({**new, "trap": Trap(tmp_path / "sprung")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="old.pt"):
        prune.load(path)
    assert not (tmp_path / "sprung").exists()


def test_names_that_do_not_fit(tmp_path):
    """Half of the names behind a prefix, masks, another's names, other shapes: how many, and the first three, in one
    line."""
    model, path = make(), tmp_path / "odd.pt"
    prune.save(model, path)
    good = torch.load(path, weights_only=True)
    state = good["model_state_dict"]
    for odd, says in (({("module." if "encoder" in k else "") + k: v for k, v in state.items()},
                       "encoder.blocks.0.attn"),
                      ({k.replace("mlp.0.weight", "mlp.0.weight_orig"): v for k, v in state.items()},
                       "blocks.0.mlp.0.weight"),
                      ({f"model.{k}".replace("blocks", "layers"): v for k, v in state.items()},
                       "decoder.blocks.0.attn.key.weight"),
                      ({**state, "encoder.conv1.weight": torch.zeros(2, 2)},
                       r"\(ValueError: 1 names .*encoder.conv1.weight\)"),
                      ({**state, "extra.one": torch.zeros(1), "extra.two": torch.zeros(1)},
                       r"2 names .*extra.one, extra.two")):
        torch.save({**good, "model_state_dict": odd}, path)
        with pytest.raises(ValueError, match=says) as e:
            prune.load(path)
        assert len(str(e.value)) < len(str(path)) + 350 and "\n" not in str(e.value)


# ------------------------------------------------------------------ copied alone

def test_example_in_an_empty_folder(tmp_path):
    """prune.py, alone in a folder, runs the lines that its docstring shows: by norms, then by cost and fitted."""
    shutil.copy(prune.__file__, tmp_path)
    lines = [line[4:] for line in prune.__doc__.splitlines() if line.startswith("    ")][:11]
    assert lines[4].startswith("prune.save") and lines[5].startswith("h =") and lines[10].startswith("prune.refit_")
    model = weaken(make(), 0.5)
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    given = """import torch
print(plan)
model = prune.load("tiny.pt")
beta2, adam = 0.98, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
for p in model.parameters():
    p.grad = torch.rand_like(p)
adam.step()
mels, ids = torch.randn(2, 80, 2 * model.dims.n_audio_ctx), torch.arange(16).view(2, 8)
"""
    code = "\n".join([*lines[:5], given, *lines[5:], "print(plan.removed()); prune.load('pruned.pt')"])
    code = code.replace('"tiny"', '"tiny.pt"')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    gone, of = ast.literal_eval(done.stdout.splitlines()[-1])
    assert gone / of == pytest.approx(0.5, abs=0.02)
    assert "removed" in done.stdout and (tmp_path / "pruned.pt").stat().st_size < (tmp_path / "tiny.pt").stat().st_size
