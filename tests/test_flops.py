"""What flops.py counts: numbers worked by hand, invariants, and PyTorch's own counter as the oracle."""
import gc
import random
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from whisper.model import Linear, ModelDimensions, MultiHeadAttention, Whisper

import flops
import prune


def dims(d, heads, encoder_layers, decoder_layers, n_mels=80, n_vocab=51865):
    return ModelDimensions(n_mels, 1500, d, heads, encoder_layers, n_vocab, 448, d, heads, decoder_layers)


# The published dimensions of openai-whisper's checkpoints.
DIMS = {"tiny": dims(384, 6, 4, 4), "base": dims(512, 8, 6, 6), "small": dims(768, 12, 12, 12),
        "medium": dims(1024, 16, 24, 24), "large-v3": dims(1280, 20, 32, 32, 128, 51866),
        "turbo": dims(1280, 20, 32, 4, 128, 51866)}
# Small enough for arithmetic by hand: S 3, M 2, d 4, f 16, V 5, one block on each side.
TOY = ModelDimensions(2, 3, 4, 1, 1, 5, 6, 4, 1, 1)


def on_meta(size: ModelDimensions) -> Whisper:
    """Shapes without memory; alignment_heads, which cannot be sparse there, stays dense and unused."""
    with torch.device("meta"), mock.patch.object(torch.Tensor, "to_sparse", lambda tensor: tensor):
        return Whisper(size)


class SomeInputs(Linear):
    """A Linear that reads only some columns of its input, as column pruning leaves it."""

    def __init__(self, n_in, n_out, bias, keep):
        super().__init__(len(keep), n_out, bias=bias)
        self.register_buffer("keep", torch.tensor(keep))

    def forward(self, x):
        return super().forward(x[..., self.keep])


def ragged(model: Whisper, seed: int, equal_widths=False) -> Whisper:
    """In place: every attention with its own heads and widths, every feed-forward its own, some columns unread."""
    draw = random.Random(seed)

    def linear(n_in, n_out, bias=True, reads_stream=False):
        if reads_stream and draw.random() < 0.5:
            return SomeInputs(n_in, n_out, bias, sorted(draw.sample(range(n_in), draw.randint(1, n_in - 1))))
        return Linear(n_in, n_out, bias=bias)

    with model.device:
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            d = len(block.mlp[2].weight)
            for attn in filter(None, (block.attn, block.cross_attn)):
                attn.n_head = draw.randint(1, attn.n_head)
                qk, v = attn.n_head * 8 * draw.randint(1, 8), attn.n_head * 8 * draw.randint(1, 8)
                v = qk if equal_widths else v
                attn.query = linear(d, qk, reads_stream=True)
                attn.key = linear(d, qk, bias=False, reads_stream=True)
                attn.value = linear(d, v, reads_stream=True)
                attn.out = linear(v, d)
            f = draw.randint(1, 4 * d)
            block.mlp[0], block.mlp[2] = linear(d, f, reads_stream=True), linear(f, d)
    return model


def counted(call) -> int:
    """What PyTorch's counter adds up during call()."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def windows(model: Whisper) -> torch.Tensor:
    return torch.empty(1, model.dims.n_mels, 2 * model.dims.n_audio_ctx, device=model.device)


def tokens(model: Whisper, n: int) -> torch.Tensor:
    return torch.zeros(1, n, dtype=torch.long, device=model.device)


def features(model: Whisper) -> torch.Tensor:
    return torch.empty(1, model.dims.n_audio_ctx, model.dims.n_audio_state, device=model.device)


def decode(model: Whisper, n_prompt: int, n_new: int):
    """Greedy decoding as whisper does it: the prompt at once, then one token at a time on its KV cache."""
    cache, hooks = model.install_kv_cache_hooks()
    fed, audio = tokens(model, n_prompt), features(model)
    for _ in range(n_new):
        fed = model.decoder(fed, audio, kv_cache=cache)[:, -1:].argmax(-1)
    for hook in hooks:
        hook.remove()


# ------------------------------------------------------------------------------------------- by hand

def test_encoder_of_30_seconds():
    """Tiny: 553 M + 1,327 M for the convolutions, 4 blocks of 1,769 M + 3,456 M + 3,539 M."""
    assert flops.encoder(on_meta(DIMS["tiny"])) == 36_937_728_000
    assert flops.encoder(on_meta(DIMS["small"])) == 344_162_304_000


def test_toy_by_hand():
    """S 3, M 2, d 4, f 16, V 5: each term of the formulas worked out."""
    model = on_meta(TOY)
    assert flops.encoder(model) == 12*3*2*4 + 6*3*16 + 8*3*16 + 4*9*4 + 4*3*64 == 1872
    assert flops.decoder(model, 2) == 8*2*16 + 4*4*4 + 4*2*16 + 4*3*16 + 4*2*3*4 + 4*2*64 + 2*2*20 == 1328
    # P 2, N 3: n = 4 positions; the prompt sees 2 x 2 pairs, the two steps 3 and 4
    assert flops.greedy(model, 2, 3) == 8*4*16 + 4*(4+3+4)*4 + 4*4*16 + 4*3*16 + 4*4*3*4 + 4*4*64 + 2*4*20 == 2512
    assert flops.training(model, 2) == 3 * (1872 + 1328) - 12*3*2*4 == 9312


def test_pruned_toy_by_hand():
    """One query/key dimension of 4, three value dimensions, two neurons: every matrix at its own size."""
    model = on_meta(TOY)
    block = model.encoder.blocks[0]
    with model.device:
        block.attn.query, block.attn.key = Linear(4, 1), Linear(4, 1, bias=False)
        block.attn.value, block.attn.out = Linear(4, 3), Linear(3, 4)
        block.mlp[0], block.mlp[2] = Linear(4, 2), Linear(2, 4)
    assert flops.encoder(model) == 288 + 288 + 2*3*(4+4+12+12) + 2*9*(1+3) + 2*3*(8+8)


def test_selected_columns_by_hand():
    """A query that reads 1 of 4 inputs has 4 weights, not 16: 12 fewer at 3 positions are 72 FLOPs."""
    model = on_meta(TOY)
    with model.device:
        model.encoder.blocks[0].attn.query = SomeInputs(4, 4, True, [2])
    assert flops.encoder(model) == 1872 - 2 * 3 * 12


def test_memory_by_hand():
    """Tiny in float32, 27 positions: 11 S d values at the feed-forward, or 2 n_head S^2 scores and 7 S d."""
    size = flops.memory(on_meta(DIMS["tiny"]), n_tokens=27, bytes_per_value=4)
    assert size["weights"] == 4 * 37_184_640
    assert size["kv_cache"] == 4 * 4 * (2 * 27 * 384 + 2 * 1500 * 384)
    assert size["encoder_fused"] == 4 * 11 * 1500 * 384
    assert size["encoder_unfused"] == 4 * (2 * 6 * 1500**2 + 7 * 1500 * 384)
    assert size["decoder_fused"] == 4 * 51865 and size["decoder_unfused"] == 4 * 1500 * 384
    assert size["peak_fused"] == max(size["encoder_fused"], 4 * 1500 * 384 + size["kv_cache"] + 4 * 51865)
    assert size["peak_unfused"] == size["encoder_unfused"]


def test_long_decoding_memory_by_hand():
    """At 448 positions decoding outgrows the encoder: audio features, the cache, and the old values beside it.

    Two windows unfused: the scaled keys of the audio lead, copied twice.
    """
    model = on_meta(DIMS["tiny"])
    size, two = flops.memory(model, 448, 4), flops.memory(model, 448, 4, batch=2)
    assert size["decoder_fused"] == 4 * 448 * 384
    assert size["peak_fused"] == 4 * 384 * (1500 + 4 * 2 * (448 + 1500) + 448)
    assert two["decoder_unfused"] == 2 * (2 * 4 * 1500 * 384)


def test_half_precision_memory_by_hand():
    """At 2 bytes scores and softmax stay float32 beside a half copy, 10 bytes; logits are kept in both."""
    size = flops.memory(on_meta(DIMS["tiny"]), 27, 2)
    assert size["weights"] == 2 * 37_184_640
    assert [flops.memory(on_meta(DIMS["tiny"]), 27, b)["weights"] for b in (1, 8)] == [37_184_640, 8 * 37_184_640]
    assert size["encoder_fused"] == 2 * 11 * 1500 * 384
    assert size["encoder_unfused"] == 10 * 6 * 1500**2 + 2 * 7 * 1500 * 384
    assert size["decoder_fused"] == 6 * 51865


def test_uneven_memory_by_hand():
    """Pruned to 64 everywhere but in the third block of each side: that block leads, each width in its own place."""
    model = on_meta(DIMS["tiny"])
    encoder, decoder = model.encoder.blocks, model.decoder.blocks
    widths = {block.attn: (1, 64, 64) for block in [*encoder, *decoder]}         # heads, query/key, value
    widths |= {block.cross_attn: (1, 64, 64) for block in decoder}
    widths |= {encoder[2].attn: (5, 320, 256), decoder[2].attn: (2, 128, 192), decoder[2].cross_attn: (4, 256, 320)}
    with model.device:
        for attn, (heads, qk, v) in widths.items():
            attn.n_head, attn.query, attn.key = heads, Linear(384, qk), Linear(384, qk, bias=False)
            attn.value, attn.out = Linear(384, v), Linear(v, 384)
        for block in encoder:
            block.mlp[0], block.mlp[2] = Linear(384, 64), Linear(64, 384)
    size = flops.memory(model, 448, 4)
    assert size["encoder_fused"] == 4 * 1500 * (3 * 384 + 2 * 320 + 2 * 256)
    assert size["encoder_unfused"] == 4 * (1500 * (2 * 384 + 2 * 320 + 3 * 256) + 2 * 5 * 1500**2)
    assert size["kv_cache"] == 4 * (448 * (3 * 128 + 320) + 1500 * (3 * 128 + 576))
    assert size["decoder_fused"] == 4 * 448 * 192 and size["decoder_unfused"] == 4 * 1500 * 256


def cut(model: Whisper, rows: int) -> Whisper:
    """Its vocabulary cut to so many rows; those that prune.vocabulary_ keeps by itself, 256 + 1608 of multilingual,
    count."""
    own = set(range(256)) | set(range(50257, model.dims.n_vocab))
    ids = (i for i in range(model.dims.n_vocab) if i not in own)
    return prune.vocabulary_(model, [0, *(next(ids) for _ in range(rows - len(own)))])


def test_cut_vocabulary_by_hand():
    """Tiny with 2,000 rows of 51,865: 384 parameters and 2 * 384 FLOPs a position less for each row that is gone.
    Logits: 2,000 in float32 and their spread over 51,865; in training, whose loss takes the rows left, 2,000."""
    torch.manual_seed(0)
    whole = Whisper(DIMS["tiny"])
    less = [flops.decoder(whole, 27), flops.greedy(whole, 4, 24), flops.training(whole, 27),
            flops.parameters(whole)["embedding"],
            flops.training_memory(whole, 27, 2)]
    model, gone = cut(whole, 2000), 49_865
    assert less[0] - flops.decoder(model, 27) == less[1] - flops.greedy(model, 4, 24) == 2 * 27 * 384 * gone
    assert less[2] - flops.training(model, 27) == 3 * 2 * 27 * 384 * gone
    assert less[3] - flops.parameters(model)["embedding"] == 384 * gone
    assert less[4] - flops.training_memory(model, 27, 2) == 16 * 384 * gone + 2 * 27 * gone * 4
    assert [flops.memory(model, 27, b)["decoder_fused"] for b in (4, 2)] == [4 * (2000 + 51865)] * 2
    assert flops.memory(model, 27, 4)["weights"] == 4 * (37_184_640 - 384 * gone)


def test_window_by_hand():
    """A toy with 2 of 3 audio positions: every S of the formulas is 2."""
    model = prune.window_(Whisper(TOY), 0.04)
    assert flops.encoder(model) == 12*2*2*4 + 6*2*16 + 8*2*16 + 4*4*4 + 4*2*64
    assert flops.decoder(model, 2) == 8*2*16 + 4*4*4 + 4*2*16 + 4*2*16 + 4*2*2*4 + 4*2*64 + 2*2*20


def test_half_precision_norm_by_hand():
    """With every feed-forward cut to 8 neurons LayerNorm leads: 3 halves and 2 floats, 14 bytes per value."""
    model = on_meta(DIMS["tiny"])
    with model.device:
        for block in model.encoder.blocks:
            block.attn.query, block.attn.key = Linear(384, 8), Linear(384, 8, bias=False)
            block.attn.value, block.attn.out = Linear(384, 8), Linear(8, 384)
            block.mlp[0], block.mlp[2] = Linear(384, 8), Linear(8, 384)
    assert flops.memory(model, 27, 2)["encoder_fused"] == 14 * 1500 * 384
    assert flops.memory(model, 27, 4)["encoder_fused"] == 4 * 1500 * (4 * 384 + 8)


def test_prompt_memory_by_hand():
    """A prompt of 4 holds 4 rows of logits, when 23 of 27 positions are not yet in the cache.

    A prompt of 100 leads even unfused, before the scaled keys of the audio.
    """
    model = on_meta(DIMS["tiny"])
    assert flops.memory(model, 100, 4, n_prompt=100)["decoder_unfused"] == 4 * 100 * 51865
    assert flops.memory(model, 27, 4, n_prompt=4)["decoder_fused"] == 4 * (4 * 51865 - 23 * 4 * 2 * 384)


def test_sparse_storage_by_hand():
    """3 nonzeros in a 2 x 9 float32 matrix: CSR 3*8 + 3*4, bitmask 3*4 + 3 bytes; the bias is dense in all."""
    layer = nn.Linear(9, 2)
    with torch.no_grad():
        layer.weight.zero_()[0, :3] = 1.0
    assert flops.sparse_storage(layer, 4) == {"dense": 72 + 8, "csr": 36 + 8, "bitmask": 15 + 8}


def test_sparse_storage_of_whole_bytes_by_hand():
    """2 x 8 ones: the mask is 2 bytes, not 3. A convolution is no matrix and stays dense in all."""
    layers = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Conv1d(2, 3, 5, bias=False))
    nn.init.ones_(layers[0].weight)
    nn.init.zeros_(layers[1].weight)
    assert flops.sparse_storage(layers, 2) == {"dense": 32 + 60, "csr": 16 * 6 + 3 * 4 + 60, "bitmask": 32 + 2 + 60}


# ---------------------------------------------------------------------------------------- invariants

def test_one_new_token_is_one_pass():
    """Decoding one token runs the prompt once; each later token costs less than a fresh pass over all."""
    model = on_meta(DIMS["tiny"])
    assert flops.greedy(model, 7, 1) == flops.decoder(model, 7)
    assert flops.greedy(model, 1, 448) < flops.decoder(model, 448)
    assert flops.greedy(model, 4, 24) - flops.greedy(model, 4, 23) < flops.decoder(model, 27) // 20


def test_zeros_change_neither_flops_nor_memory():
    """Half the weights zero: FLOPs and bytes stay, only the nonzero counts fall."""
    torch.manual_seed(0)
    model = Whisper(TOY)
    before = flops.training(model, 3), flops.memory(model, 3, 4), flops.parameters(model)
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.mlp[0].weight[::2] = 0
    after = flops.parameters(model)
    assert (flops.training(model, 3), flops.memory(model, 3, 4)) == before[:2]
    assert after["total"] == before[2]["total"]
    for name in ("nonzero", "encoder_nonzero", "encoder_blocks_nonzero", "blocks_nonzero"):
        assert after[name] == before[2][name] - 32
    for name in ("decoder_nonzero", "embedding_nonzero", "decoder_blocks_nonzero"):
        assert after[name] == before[2][name]


def test_parameters_equal_the_modules():
    """Every part equals a plain sum over its module, dense and ragged, and the parts add up."""
    for model in (Whisper(TOY), ragged(on_meta(DIMS["base"]), 0), on_meta(DIMS["large-v3"])):
        count = flops.parameters(model)
        size = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}
        assert count["total"] == size[""] == count["encoder"] + count["decoder"] + count["embedding"]
        assert count["encoder"] == size["encoder"] and count["embedding"] == size["decoder.token_embedding"]
        assert count["encoder_blocks"] == size["encoder.blocks"]
        assert count["decoder_blocks"] == size["decoder.blocks"]
        assert count["blocks"] == size["encoder.blocks"] + size["decoder.blocks"]
    assert count["total"] == 1_541_570_560
    assert count["nonzero"] is count["blocks_nonzero"] is count["embedding_nonzero"] is None     # on meta
    dense = Whisper(TOY)
    assert flops.parameters(dense)["nonzero"] == sum(int((p != 0).sum()) for p in dense.parameters())


def test_frozen_parameters_count():
    """Training or not, a weight is stored: the counts do not ask for gradients."""
    model = Whisper(TOY)
    assert flops.parameters(model.requires_grad_(False)) == flops.parameters(model.requires_grad_(True))


def test_parts_without_values():
    """An encoder on the meta device has no zeros to count, and so the whole has none; the decoder still has."""
    model = Whisper(TOY)
    before = flops.parameters(model)
    model.encoder.to("meta")
    after = flops.parameters(model)
    assert after["nonzero"] is after["encoder_nonzero"] is after["blocks_nonzero"] is None
    assert after["decoder_nonzero"] == before["decoder_nonzero"] and after["total"] == before["total"]


@pytest.mark.parametrize("bytes_per_value", [2, 4])
def test_zeros_needed_to_save(bytes_per_value):
    """The shares of zeros in the docstring: CSR pays past 50% (67% in half), a bitmask past 3.1% (6.3%)."""
    layer = nn.Linear(1000, 1000, bias=False)
    for form, share in (("csr", {4: 0.5, 2: 2 / 3}), ("bitmask", {4: 1 / 32, 2: 1 / 16})):
        for offset, saves in ((-0.005, False), (0.005, True)):
            with torch.no_grad():
                layer.weight.fill_(1.0).view(-1)[: round((share[bytes_per_value] + offset) * 1e6)] = 0
            size = flops.sparse_storage(layer, bytes_per_value)
            assert (size[form] < size["dense"]) == saves


def test_memory_grows_with_batch_and_tokens():
    """Fused activations and cache are proportional to the batch; more tokens cost only cache until T outgrows V."""
    model = ragged(on_meta(DIMS["base"]), 1)
    one, eight = flops.memory(model, 100, 4), flops.memory(model, 100, 4, batch=8)
    assert eight["weights"] == one["weights"]
    assert all(eight[key] == 8 * one[key] for key in ("kv_cache", "encoder_fused", "encoder_unfused", "peak_fused"))
    per_token = flops.memory(model, 101, 4)["kv_cache"] - one["kv_cache"]
    assert per_token == 4 * sum(len(b.attn.key.weight) + len(b.attn.value.weight) for b in model.decoder.blocks)


def test_table():
    """Removed and zero apart, encoder and decoder apart, totals that add up, under 80 columns."""
    torch.manual_seed(0)
    dense, pruned, zeroed = Whisper(TOY), Whisper(TOY), Whisper(TOY)
    for model in (dense, pruned, zeroed):
        for parameter in model.parameters():
            nn.init.ones_(parameter)
    block = pruned.encoder.blocks[0]
    block.mlp[0], block.mlp[2] = Linear(4, 8), Linear(8, 4)         # the encoder's 328 parameters less 72
    nn.init.zeros_(zeroed.decoder.blocks[0].mlp[0].weight)          # 64 of the decoder's 356
    text = flops.table({"dense": dense, "pruned": pruned, "zeroed": zeroed}, n_prompt=2, n_new=3)
    assert max(map(len, text.splitlines())) < 80
    rows = [line.split() for line in text.splitlines()]
    at = {name: i for i, (name, *_) in enumerate(rows) if name in ("dense", "pruned", "zeroed")}
    assert rows[at["dense"] + 1] == ["encoder", "328", "0.0%", "0.0%", "0.000", "+0.0%"]
    assert rows[at["pruned"] + 1] == ["encoder", "256", "22.0%", "0.0%", "0.000", "-20.5%"]
    assert rows[at["pruned"] + 2] == ["decoder", "356", "0.0%", "0.0%", "0.000", "+0.0%"]
    assert rows[at["zeroed"] + 1] == ["encoder", "328", "0.0%", "0.0%", "0.000", "+0.0%"]
    assert rows[at["zeroed"] + 2] == ["decoder", "356", "0.0%", "18.0%", "0.000", "+0.0%"]
    assert rows[at["zeroed"] + 4] == ["total", "704", "0.0%", "9.1%", "0.000", "+0.0%"]


def test_table_of_a_real_size():
    """The columns hold a real model's numbers: tiny's 37,184,640 parameters and 36.938 GFLOPs."""
    model = Whisper(DIMS["tiny"])
    text = flops.table({"tiny": model})
    assert max(map(len, text.splitlines())) < 80
    assert text.splitlines()[2].split()[1::3] == ["7,632,384", "36.938"]
    assert text.splitlines()[4].split()[1::3] == ["19,916,160", "1.075"]         # 2 * 27 * 51865 * 384
    left = (flops.greedy(model, 4, 24) - 2 * 27 * 51865 * 384) / 1e9
    assert text.splitlines()[3].split()[4] == f"{left:.3f}"
    size = flops.sparse_storage(model, 4)
    assert f"as CSR {size['csr'] / 1e6:.1f}, as bitmask and values {size['bitmask'] / 1e6:.1f}" in text
    # a prompt of 100: audio features 2.3, KV cache 19.7, logits 20.7
    assert "peak 42.7 (" in flops.table({"tiny": model}, 100, 1)
    assert text.splitlines()[5].split()[:2] == ["total", "37,184,640"]
    assert "weights 148.7," in text and "KV cache 18.8," in text and "peak 25.3 (124.1 unfused)" in text


# ------------------------------------------------------------------------------ oracle: torch's counter

@pytest.mark.parametrize("name", sorted(DIMS.keys() - {"medium", "large-v3"}))         # turbo is as wide, and quicker
def test_equal_to_torch(name):
    """Encoder, decoder at three lengths, greedy decoding, one training step: equal to the last FLOP."""
    model = on_meta(DIMS[name])
    with torch.no_grad():
        assert counted(lambda: model.encoder(windows(model))) == flops.encoder(model)
        for n in (1, 27, 448):
            assert counted(lambda: model.decoder(tokens(model, n), features(model))) == flops.decoder(model, n)
        assert counted(lambda: decode(model, 4, 2)) == flops.greedy(model, 4, 2)
    assert counted(lambda: model(windows(model), tokens(model, 27)).sum().backward()) == flops.training(model, 27)


@pytest.mark.parametrize("name, seed", [("tiny", 0), ("tiny", 1), ("base", 2)])
def test_equal_to_torch_when_ragged(name, seed):
    """The same for models whose every matrix has its own size, some of them reading only some inputs."""
    model = ragged(on_meta(DIMS[name]), seed)
    with torch.no_grad():
        assert counted(lambda: model.encoder(windows(model))) == flops.encoder(model)
        for n in (1, 27, 448):
            assert counted(lambda: model.decoder(tokens(model, n), features(model))) == flops.decoder(model, n)
        assert counted(lambda: decode(model, 4, 2)) == flops.greedy(model, 4, 2)
    assert counted(lambda: model(windows(model), tokens(model, 27)).sum().backward()) == flops.training(model, 27)


@pytest.mark.parametrize("pruned", [False, True])
def test_cut_vocabulary_and_window_equal_to_torch(pruned):
    """Whole blocks and ragged ones: 2,345 rows, 8 seconds, training on the logits of the rows that are left."""
    model = prune.window_(cut(Whisper(DIMS["tiny"]), 2345), 8)
    model = (ragged(model, 8) if pruned else model).to("meta")
    with torch.no_grad():
        assert counted(lambda: model.encoder(windows(model))) == flops.encoder(model)
        assert counted(lambda: model.decoder(tokens(model, 27), features(model))) == flops.decoder(model, 27)
        assert counted(lambda: decode(model, 4, 3)) == flops.greedy(model, 4, 3)
    step = lambda: model.decoder.kept_logits(tokens(model, 27), model.encoder(windows(model))).sum().backward()
    assert counted(step) == flops.training(model, 27)


def test_long_greedy_equal_to_torch():
    """A prompt of 4 and 12 new tokens, or of one and 8, or no step at all: dense and ragged."""
    for model, n_prompt, n_new in ((on_meta(DIMS["tiny"]), 4, 12), (ragged(on_meta(DIMS["tiny"]), 5), 1, 8),
                                   (on_meta(DIMS["tiny"]), 27, 1)):
        with torch.no_grad():
            assert counted(lambda: decode(model, n_prompt, n_new)) == flops.greedy(model, n_prompt, n_new)


def test_equal_to_torch_unfused(monkeypatch):
    """With whisper's own attention instead of PyTorch's fused one, the counts are the same."""
    monkeypatch.setattr(MultiHeadAttention, "use_sdpa", False)
    model = ragged(on_meta(DIMS["tiny"]), 6)
    assert counted(lambda: model(windows(model), tokens(model, 27)).sum().backward()) == flops.training(model, 27)


def test_sparse_storage_equals_torch_csr():
    """CSR: as many values, column indices and row starts as torch.Tensor.to_sparse_csr holds, 4 bytes each."""
    torch.manual_seed(0)
    layer = nn.Linear(33, 17, bias=False)
    with torch.no_grad():
        layer.weight[torch.rand(17, 33) < 0.7] = 0
    with warnings.catch_warnings(action="ignore", category=UserWarning):        # "beta state"
        csr = layer.weight.detach().to_sparse_csr()
    held = csr.values().numel() + csr.col_indices().numel() + csr.crow_indices().numel()
    assert flops.sparse_storage(layer, 4)["csr"] == 4 * held


class Elements(TorchDispatchMode):
    """Counts the elements that each operation writes."""

    def __init__(self):
        super().__init__()
        self.written = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, torch.Tensor):
            self.written[function._overloadpacket.__name__] += first.numel()
        return result


@pytest.mark.parametrize("name, shares", [("tiny", (0.73, 0.30, 0.11, 0.07, 0.40)),
                                          ("large-v3", (0.32, 0.11, 0.04, 0.03, 0.01))])
def test_shares_of_what_is_not_counted(name, shares, monkeypatch):
    """The percentages in the module's docstring, from the elements PyTorch writes on the meta device."""
    monkeypatch.setattr(MultiHeadAttention, "use_sdpa", False)
    model = on_meta(DIMS[name])
    with torch.no_grad(), Elements() as seen:
        model.encoder(windows(model))
    n = seen.written
    fft, mel_bank = 3000 * 5 * 400 * 8.64, 2 * 3000 * 201 * model.dims.n_mels      # 5 n log2(n) per frame
    done = (5 * n["_softmax"], 10 * n["gelu"], 8 * n["native_layer_norm"],
            n["add"] + n["addmm"] + n["convolution"], fft + mel_bank)
    assert tuple(round(100 * ops / flops.encoder(model), 2) for ops in done) == shares
    column = 0 if name == "tiny" else 1
    for share, label in zip(shares, ("softmax, 5 per score", "GELU, 10 per output", "LayerNorm, 8 per output",
                                     "additions of biases, residuals, positions", "mel, about 150 MFLOP at 80 mels")):
        said = flops.__doc__.split(label)[1].split()[column]
        assert float(said.rstrip(",")) == share


# -------------------------------------------------------------------------------- against measurement

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")


def within_5_percent(model: Whisper, batch: int) -> None:
    """Encoder and greedy decoding (8 positions, 4 of them given), attention fused and not."""
    mel, audio = torch.randn(batch, 80, 3000), torch.randn(batch, 1500, model.dims.n_audio_state)
    size = flops.memory(model, 8, 4, batch, n_prompt=4)
    calls = {"encoder": (partial(model.encoder, mel), 0),
             "decoder": (partial(flops._decode, model, audio, 4, 5), size["kv_cache"])}
    for path in ("fused", "unfused"):
        for side, (call, cache) in calls.items():
            with mock.patch.object(MultiHeadAttention, "use_sdpa", path == "fused"), torch.inference_mode():
                measured = flops._peak(call, mel.device)
            assert measured == pytest.approx(cache + size[f"{side}_{path}"], rel=0.05), (side, path)


@linux_only
def test_high_water_of_a_known_size():
    """Three arrays of 48 MB, never more than two at once, are 96 MB, whatever the warm-up took before; the kernel's
    own count of resident pages may lag by some 0.2 MB."""
    megabytes = iter([96, 48])

    def call():
        size = next(megabytes) * 10**6 // 4
        first, second = torch.ones(size), torch.ones(size)
        del first
        return torch.ones(size), second

    hole = [torch.ones(25_000) for _ in range(400)]     # 40 MB too small to be mapped: the heap keeps them
    hole = hole[-1:]                                    # when freed, under the last one
    assert flops._peak(call, torch.device("cpu")) == pytest.approx(96e6, rel=0.01)


@linux_only
def test_high_water_beside_many_holes():
    """400 holes of 100 KB in the parent's heap hide nothing of 400 such blocks taken in the child."""
    blocks = [torch.ones(25_000) for _ in range(800)]
    blocks = blocks[::2]
    peak = flops._peak(lambda: [torch.ones(25_000) for _ in range(400)], torch.device("cpu"))
    assert peak == pytest.approx(40e6, rel=0.05) and len(blocks) == 400


@linux_only
def test_high_water_beside_garbage():
    """A cycle of the parent's that is collected in the middle of the measured call makes no room for it."""
    ring, turn = [torch.ones(10**7)], iter(range(2))
    ring.append(ring)
    del ring

    def call():
        if next(turn):
            gc.collect()
        return torch.ones(10**7)

    assert flops._peak(call, torch.device("cpu")) == pytest.approx(40e6, rel=0.01)


@linux_only
def test_high_water_beside_what_the_warm_up_frees():
    """A kept buffer of 4 MB that the first call gives back, as kernels do that need another, is no room for the
    next."""
    torch.ones(5 * 10**6)                               # glibc takes blocks up to the largest it freed from the heap
    buffers = [torch.ones(10**6) for _ in range(2)]
    above = buffers.pop()                               # so that the other's place becomes a hole

    def call():
        buffers.clear()
        return torch.ones(300_000), above

    assert flops._peak(call, torch.device("cpu")) == pytest.approx(1.2e6, abs=0.25e6)


@linux_only
def test_peak_activations_against_the_process():
    """The formulas are within 5% of the process's high-water mark."""
    torch.manual_seed(0)
    within_5_percent(Whisper(DIMS["tiny"]), batch=1)


@linux_only
def test_peak_activations_of_a_pruned_model():
    """A ragged tiny (query/key and value widths equal, as fused kernels want), two windows at once."""
    torch.manual_seed(0)
    within_5_percent(ragged(Whisper(DIMS["tiny"]), 7, equal_widths=True), batch=2)


@linux_only
def test_peak_activations_of_a_cut_vocabulary():
    """Tiny with 20,000 rows, in a window of one second, after a prompt of 100: logits lead the decoder's peak."""
    torch.manual_seed(0)
    model = prune.window_(cut(Whisper(DIMS["tiny"]), 20_000), 1)
    audio, size = torch.randn(1, 50, 384), flops.memory(model, 104, 4, n_prompt=100)
    with torch.inference_mode():
        measured = flops._peak(partial(flops._decode, model, audio, 100, 5), audio.device)
    assert measured == pytest.approx(size["kv_cache"] + size["decoder_fused"], rel=0.05)


@linux_only
def test_peak_of_a_prompt_without_fused_attention(monkeypatch):
    """Tiny of 3,000 tokens after a prompt of 200: cross-attention writes 6 heads of 200 x 1,500 scores, more than
    logits."""
    monkeypatch.setattr(MultiHeadAttention, "use_sdpa", False)
    torch.manual_seed(0)
    model = Whisper(replace(DIMS["tiny"], n_vocab=3000))
    audio, size = torch.randn(1, 1500, 384), flops.memory(model, 201, 4, n_prompt=200)
    assert size["decoder_unfused"] == 200 * (6 * 1500 * 8 + 6 * 4 * 384) > size["decoder_fused"]
    with torch.inference_mode():
        measured = flops._peak(partial(flops._decode, model, audio, 200, 2), audio.device)
    assert measured == pytest.approx(size["kv_cache"] + size["decoder_unfused"], rel=0.05)


def by_columns(model: Whisper, *whole: str) -> Whisper:
    """A twelfth of the columns of each matrix in blocks removed, as prune.py does it, but for those named."""
    groups = {name: [(linear.weight, 1)] for name, linear in model.named_modules()
              if ".blocks." in name and isinstance(linear, Linear) and name not in whole}
    for (weight, _), in groups.values():
        weight.data[:, ::12] *= 0.01
    prune.remove_(model, prune.two_pass(model, groups, z1=-2, z2=None))
    assert len(model.decoder.blocks[0].cross_attn.value.index) == model.dims.n_text_state * 11 // 12
    return model


def test_peak_where_layers_select_their_inputs():
    """Pruned by columns: while the last value matrix takes its 352 features of 1,500 positions, the cache lacks 23 of
    27 tokens, each with a key and a value of 384 in all 4 blocks."""
    torch.manual_seed(0)
    model = by_columns(Whisper(replace(DIMS["tiny"], n_vocab=3000)))
    audio, size = torch.randn(1, 1500, 384), flops.memory(model, 27, 4, n_prompt=4)
    assert size["decoder_fused"] == 4 * (1500 * 352 - 23 * 4 * (384 + 384))
    with torch.inference_mode():
        measured = flops._peak(partial(flops._decode, model, audio, 4, 24), audio.device)
    assert measured == pytest.approx(size["kv_cache"] + size["decoder_fused"], rel=0.02)


@pytest.mark.parametrize("width, bytes_per_value, batch", [
    (None, 4, 1), (48, 4, 2), (None, 2, 1), ("columns", 4, 1), ("columns", 2, 2)])
def test_training_memory_against_what_autograd_keeps(width, bytes_per_value, batch):
    """Every different tensor that a forward pass of tiny, whole, with narrow layers or with layers that read a part of
    their inputs, saves for backward: within 1% in float32; under autocast within 10%, as LayerNorm keeps float32."""
    torch.manual_seed(0)
    model = Whisper(DIMS["tiny"])
    if width == "columns":
        by_columns(model, "encoder.blocks.0.attn.query", "decoder.blocks.1.cross_attn.value")
    for block in [model.encoder.blocks[1], model.decoder.blocks[2]] if width == 48 else []:
        block.mlp[0], block.mlp[2] = Linear(384, 5 * width), Linear(5 * width, 384)
        for attn in filter(None, (block.attn, block.cross_attn)):
            attn.query, attn.key, attn.value = Linear(384, width), Linear(384, width), Linear(384, width)
            attn.out = Linear(width, 384)
    torch.nn.init.zeros_(model.decoder.positional_embedding)
    own, kept = {p.untyped_storage().data_ptr()
                 for p in [*model.parameters(), model.encoder.positional_embedding, model.decoder.mask,
                           *(buffer for name, buffer in model.named_buffers() if name.endswith("index"))]}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bytes_per_value == 2):
            logits = model(torch.randn(batch, 80, 3000), torch.zeros(batch, 27, dtype=torch.long))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(batch * 27, dtype=torch.long))
    saved = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    found = flops.training_memory(model, 27, batch, bytes_per_value) - 16 * sum(p.numel() for p in model.parameters())
    assert loss.requires_grad and found == pytest.approx(saved, rel=0.01 if bytes_per_value == 4 else 0.1)
    assert flops.training_memory(model, 27, batch, checkpointing=True) < flops.training_memory(model, 27, batch)
    frozen = model.decoder.token_embedding.requires_grad_(False)
    assert found - flops.training_memory(model, 27, batch, bytes_per_value) + 16 * sum(
        p.numel() for p in model.parameters()) == 12 * frozen.weight.numel(), "neither gradient nor moments"


def test_bench_holds_what_measure_and_the_formulas_say(monkeypatch):
    """One line a batch and part, in 80 columns: ratios of what was measured beside ratios of FLOPs, peaks beside
    memory()."""
    torch.manual_seed(0)
    dense, small = Whisper(TOY), Whisper(ModelDimensions(2, 3, 4, 1, 1, 5, 6, 4, 1, 1))
    small.encoder.blocks[0].mlp[0], small.encoder.blocks[0].mlp[2] = Linear(4, 8), Linear(8, 4)
    row = {"encoder_seconds": 0.2, "greedy_seconds": 0.3, "encoder_peak": 5 * 10 ** 6, "greedy_peak": None}
    monkeypatch.setattr(flops, "measure", lambda models, mel: [row, row | {"encoder_seconds": 0.1}])
    monkeypatch.setattr(flops, "greedy", lambda model, *_: 3)
    monkeypatch.setattr(flops, "memory",
                        lambda *_, **__: {"encoder_fused": 4 * 10 ** 6, "kv_cache": 10 ** 6, "decoder_fused": 10 ** 6})
    lines = [*flops.bench(dense, small, batches=(8,))]
    ratio = f"({flops.encoder(dense) / flops.encoder(small):.2f})"
    assert lines[2].split() == f"8 encoder 200.0 100.0 2.00 {ratio} 5.0 ( 4.0) 5.0 ( 4.0)".split()
    assert lines[3].split() == "8 greedy 300.0 300.0 1.00 (1.00) nan ( 2.0) nan ( 2.0)".split()
    assert max(map(len, lines)) <= 80


def test_measure_does_the_work_that_greedy_counts(monkeypatch):
    """The decoding that is timed: n_new passes, the FLOPs of greedy for each window, no hooks left behind."""
    monkeypatch.setattr(MultiHeadAttention, "use_sdpa", False)
    torch.manual_seed(0)
    model = Whisper(TOY)
    audio = torch.randn(3, 3, 4)
    with torch.inference_mode():
        assert counted(lambda: flops._decode(model, audio, 2, 3)) == 3 * flops.greedy(model, 2, 3)
    assert not any(module._forward_hooks for module in model.modules())


def test_measure_of_one_and_of_several():
    """A dict for a model, a list for a list, each with the six figures; on Linux the peaks are there."""
    model, keys = Whisper(TOY), ["batch", "device", "encoder_peak", "encoder_seconds", "greedy_peak",
                                 "greedy_seconds", "threads"]
    one, several = (flops.measure(given, torch.zeros(1, 2, 6), 2, 3, repeats=1) for given in (model, [model]))
    assert sorted(one) == keys and isinstance(several, list) and sorted(several[0]) == keys
    assert one["encoder_seconds"] > 0 and (one["encoder_peak"] is not None) == (sys.platform == "linux")


def test_measure_takes_turns(monkeypatch):
    """Two models: A, B, A, B, A, B, each result the median of its own times, a list for a list."""
    order, clock = [], iter([1.0, 9.0, 4.0, 6.0, 2.0, 8.0] * 2)
    a, b = Whisper(TOY), Whisper(TOY)
    monkeypatch.setattr(flops, "_peak", lambda call, device: 1 if call.func is a.encoder or call.args[0] is a else 2)
    warm = []
    a.decoder.register_forward_hook(lambda *_: warm.append(1))
    monkeypatch.setattr(flops, "_seconds", lambda call, device: (order.append(call), next(clock))[1])
    found = flops.measure([a, b], torch.zeros(2, 2, 6), 2, 2, repeats=3)
    assert [call.func for call in order[:6]] == [a.encoder, b.encoder] * 3
    assert [call.args[0] for call in order[6:]] == [a, b] * 3
    assert all(call.args[2:] == (2, 2) for call in order[6:]) and len(warm) == 2
    assert [(one["encoder_peak"], one["greedy_peak"]) for one in found] == [(1, 1), (2, 2)]
    assert [(one["encoder_seconds"], one["greedy_seconds"]) for one in found] == [(2.0, 2.0), (8.0, 8.0)]
    assert found[0]["batch"] == 2 and found[0]["threads"] == torch.get_num_threads() and found[0]["device"] == "cpu"


# ------------------------------------------------------------------------------- alone, and bad input

def test_copied_alone(tmp_path):
    """In an empty folder the file imports and its docstring's example runs as printed."""
    shutil.copy(flops.__file__, tmp_path)
    run = "import doctest, flops; print(doctest.testmod(flops))"
    said = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("TestResults(failed=0, attempted=5")


@pytest.mark.parametrize("call", [
    lambda model: flops.encoder(nn.Linear(2, 2)),
    lambda model: flops.encoder(model.encoder),
    lambda model: flops.decoder("tiny", 3),
    lambda model: flops.decoder(model, 0),
    lambda model: flops.decoder(model, 7),
    lambda model: flops.decoder(model, 2.0),
    lambda model: flops.decoder(model, True),
    lambda model: flops.training(model, -1),
    lambda model: flops.training(None, 1),
    lambda model: flops.greedy(model, 0, 3),
    lambda model: flops.greedy(model, 3, 0),
    lambda model: flops.greedy(model, 4, 4),
    lambda model: flops.greedy(model, "4", 1),
    lambda model: flops.greedy(nn.Linear(2, 2), 1, 1),
    lambda model: flops.parameters(nn.Linear(2, 2)),
    lambda model: flops.memory(nn.Linear(2, 2), 3, 4),
    lambda model: flops.memory(model, 7, 4),
    lambda model: flops.memory(model, 3, 3),
    lambda model: flops.memory(model, 3, 0),
    lambda model: flops.memory(model, 3, "4"),
    lambda model: flops.memory(model, 3, True),
    lambda model: flops.memory(model, 3, 4, batch=0),
    lambda model: flops.memory(model, 3, 4, n_prompt=4),
    lambda model: flops.sparse_storage(model, 16),
    lambda model: flops.sparse_storage(on_meta(TOY), 4),
    lambda model: flops.table({"a": model, "b": nn.Linear(2, 2)}, 1, 1),
    lambda model: flops.table({"a": model}, 4, 24),
    lambda model: flops.measure(model, torch.zeros(2, 6), 1, 1),
    lambda model: flops.measure(model, torch.zeros(0, 2, 6), 1, 1),
    lambda model: flops.measure(model, torch.tensor(0.0), 1, 1),
    lambda model: flops.measure(model, None, 1, 1),
    lambda model: flops.measure(model, torch.zeros(1, 2, 5), 1, 1),
    lambda model: flops.measure(model, torch.zeros(1, 2, 6), 4, 4),
    lambda model: flops.measure(model, torch.zeros(1, 2, 6), 1, 1, repeats=0),
    lambda model: flops.measure(on_meta(TOY), torch.zeros(1, 2, 6), 1, 1),
    lambda model: flops.measure(on_meta(TOY), torch.zeros(1, 2, 6, device="meta"), 1, 1),
    lambda model: flops.measure([model, nn.Linear(2, 2)], torch.zeros(1, 2, 6), 1, 1),
])
def test_bad_input(call):
    """Not a Whisper, positions outside 1..n_text_ctx, unknown byte widths, a mel that does not fit."""
    with pytest.raises(ValueError):
        call(Whisper(TOY))


def test_bad_input_is_named():
    """The message says what came and what is needed."""
    model = Whisper(TOY)
    with pytest.raises(ValueError, match="got Linear;"):
        flops.encoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"n_tokens must be an integer in 1\.\.6, got 7"):
        flops.decoder(model, 7)
    with pytest.raises(ValueError, match=r"n_prompt \+ n_new - 1 must be an integer in 1\.\.6, got 7"):
        flops.greedy(model, 4, 4)
    with pytest.raises(ValueError, match="1, 2, 4 or 8, got 3"):
        flops.memory(model, 3, 3)
