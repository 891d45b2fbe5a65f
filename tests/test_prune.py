"""prune.py: the decision by hand, `remove_` against `mask_` wherever Whisper runs, files, and bad input."""
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
from study import uniform

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
    """Sets every entry of group j to plus or minus values[name][j] (1 if not named), so that n_j is that number. With one sign
    for all, a layer would sum up what LayerNorm has centred: zero but for rounding."""
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


def test_pool_by_hand():
    """The same weights, each group alone: the mlp's mean is 0.55, std 0.26, and attn.vo, all alike, loses nothing."""
    name = "encoder.blocks.0.mlp"
    model = constant(make(replace(SMALL, n_audio_layer=1, n_text_layer=1)), {name: [0.4] * 192 + [1.0] * 64})
    plan = prune.two_pass(model, z1=-0.25, z2=None, pool=str)
    assert plan.cuts[name] == pytest.approx(0.55 - 0.25 * (0.75 * 0.25 * 0.36) ** 0.5, abs=1e-6)
    assert plan.cuts["encoder.blocks.0.attn.vo"] == pytest.approx(1) and plan.keep["encoder.blocks.0.attn.vo"].all()


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
            entries = np.concatenate([p.detach().numpy().astype(np.float64).take(j, axis).ravel() for p, axis in group])
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
PLANS = [(False, dict(z2=-1.0)), (False, dict(z1=0.3, z2=-0.5, multiple=1)), (False, dict(z1=-1.0, z2=None, multiple=4)),
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
        settings = whisper.DecodingOptions(language="hi", fp16=False, sample_len=20, without_timestamps=stamps, **options)
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
        steps = torch.cat([model.decoder(tokens[:, t:t + 1], audio, kv_cache=cache) for t in range(tokens.shape[1])], 1)
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
    model = weaken(make(replace(SPEECH, n_audio_ctx=1500, n_audio_state=32, n_text_state=32, n_text_head=4), 5), 0.3, 5)
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
        plan = prune.target(share, lambda z1: prune.two_pass(model, z1=z1, z2=None, multiple=1))
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
    wide = "decoder.blocks.31.cross_attn.query"
    plan.pass2 = {wide: [0.0123, 0.0123, -0.0012, 1280 * 5120, 1280 * 5120]}
    assert max(map(len, str(plan).splitlines())) < 80


def test_histogram_by_hand():
    """Norms 0, 0, 1, 2 and 4 in two bins of width 2: three below 2, two from it on; the cut at 3 stands beside the second."""
    norms = {"encoder.a.mlp": torch.tensor([0., 0., 1., 2.]), "encoder.b.mlp": torch.tensor([4.])}
    plan = prune.Plan({}, {}, {name: n.double() for name, n in norms.items()}, dict.fromkeys(norms, 3.0), {}, {})
    assert plan.histogram(bins=2, width=3).split("\n") == [
        "encoder: norms of 5 groups, 4 below the cut at 3.0000", "  from 0.0000      3 ###", "  from 2.0000      2 ##   <- cut"]


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
            prune.target(share, lambda z1: prune.two_pass(model, z1=z1, z2=None))


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
             lambda m: prune.remove_(m, plan), lambda m: prune.magnitude_(m, 0.5), lambda m: prune.save(m, tmp_path / "x")]
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
    for content in (b"", b"hello", b"not a checkpoint at all\n" * 9, np.random.default_rng(0).bytes(5000), whole[:-1000],
                    whole[:len(whole) // 2], whole[:10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt"):
            prune.load(path)
    without = lambda part: {k: v for k, v in good.items() if k != part}
    state = dict(good["model_state_dict"])
    wrong = [[1, 2], torch.zeros(3), {}, {"dims": 3, "model_state_dict": {}}, without("dims"), without("model_state_dict"),
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


# ------------------------------------------------------------------ copied alone

def test_example_in_an_empty_folder(tmp_path):
    """prune.py, alone in a folder, runs the five lines that its docstring shows."""
    shutil.copy(prune.__file__, tmp_path)
    lines = [line[4:] for line in prune.__doc__.splitlines() if line.startswith("    ")][:5]
    assert lines[0] == "import prune, whisper" and lines[4].startswith("prune.save")
    model = weaken(make(), 0.5)
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    code = "\n".join(lines).replace('"tiny"', '"tiny.pt"') + "\nprint(plan); prune.load('pruned.pt')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    assert "removed" in done.stdout and (tmp_path / "pruned.pt").stat().st_size < (tmp_path / "tiny.pt").stat().st_size
