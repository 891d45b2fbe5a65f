"""FLOPs, parameters and memory of an openai-whisper model, dense or pruned, read from its module shapes.

A FLOP is one multiply or one add, so a multiply-add is 2 and a (rows, columns) matrix applied at n
positions costs 2 * rows * columns * n. Every count is for one window, and nothing is run.
S audio positions (1500 in 30 seconds), M mels, d width, V rows of the embedding, T text positions; per block,
a and c are the rows of the self- and cross-attention matrices and f those of the feed-forward. The terms:

    conv1, conv2   (d, 3M) at 2S positions, (d, 3d) at S positions                12 S M d + 6 S d^2
    attention      query (a, d) and out (d, a) at every query position            4 n_query d a
                   key and value (a, d) at every key position                     4 n_key d a
                   per (query, key) pair, a dot product and a weighted sum        4 pairs a
    feed-forward   (f, d), then (d, f)                                            4 n d f
    logits         (V, d), the tied embedding                                     2 n d V

    encoder   12 S M d + 6 S d^2 + sum(8 S d a + 4 S^2 a + 4 S d f)
    decoder   sum(8 T d a + 4 T^2 a + 4 T d c + 4 S d c + 4 T S c + 4 T d f) + 2 T d V
    greedy    the same with n = P + N - 1 for T, and P^2 + (P+1) + ... + n pairs for T^2
    training  3 * (encoder + decoder) - 12 S M d
    KV cache  bytes * sum(2 T a + 2 S c)

The code multiplies out each matrix as it finds it: query/key and value widths may differ, heads may be gone,
and a Linear that reads some of its inputs counts the columns it has. Causal attention is the full square.
The oracle, torch.utils.flop_counter.FlopCounterMode on the meta device, agrees to the last FLOP.

Not counted, with the operations per element assumed, in % of the encoder's FLOPs (tiny, large-v3):
    softmax, 5 per score     0.73, 0.32        additions of biases, residuals, positions   0.07, 0.03
    GELU, 10 per output      0.30, 0.11        mel, about 150 MFLOP at 80 mels             0.40, 0.01
    LayerNorm, 8 per output  0.11, 0.04        token look-up                               none
They move memory, so their share of the TIME is larger: latency is measured here, not predicted from FLOPs.

A weight that is zero saves nothing by itself: dense kernels multiply it, dense files store it. Only smaller
shapes save, so `table` shows "removed" and "zeros" apart, and `sparse_storage` says what zeros are worth.

    >>> import flops, whisper
    >>> dims = whisper.model.ModelDimensions(80, 1500, 384, 6, 4, 51865, 448, 384, 6, 4)
    >>> model = whisper.model.Whisper(dims)      # tiny's shapes; or whisper.load_model("tiny")
    >>> print(f"{flops.encoder(model):,}")
    36,937,728,000
    >>> print(f"{flops.parameters(model)['total']:,}")
    37,184,640
"""
import ctypes
import gc
import math
import multiprocessing
import statistics
import sys
import time
from functools import partial
from numbers import Integral
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from whisper.model import MultiHeadAttention, ResidualAttentionBlock, Whisper


def encoder(model: Whisper) -> int:
    """FLOPs of one encoder pass over one window. ValueError if model is not a Whisper."""
    S, net = _audio_positions(model), model.encoder
    convolutions = 2 * 2 * S * net.conv1.weight.numel() + 2 * S * net.conv2.weight.numel()
    return convolutions + sum(_attention(b.attn, S, S, S * S) + _feed_forward(b, S) for b in net.blocks)


def decoder(model: Whisper, n_tokens: int) -> int:
    """FLOPs of one teacher-forced decoder pass, logits at all n_tokens positions; the encoder is not included.

    ValueError if model is not a Whisper or n_tokens is not an integer in 1..n_text_ctx."""
    _check_tokens(model, n_tokens)
    return _decoder(model, n_tokens, pairs=n_tokens * n_tokens)


def greedy(model: Whisper, n_prompt: int, n_new: int) -> int:
    """FLOPs of decoding n_new tokens with the KV cache after n_prompt given ones; the encoder is not included.

    One pass over the prompt gives the first new token, n_new - 1 passes of one position the rest (the last
    token is never fed back). The pass at position t attends to t keys; cross-attention projects the S audio
    positions once; logits are computed at every position, the prompt's too, as whisper does.

    ValueError if model is not a Whisper, a count is not an integer >= 1, or n_prompt + n_new - 1 > n_text_ctx."""
    n = _check_greedy(model, n_prompt, n_new)
    return _decoder(model, n, pairs=n_prompt * n_prompt + sum(range(n_prompt + 1, n + 1)))


def training(model: Whisper, n_tokens: int) -> int:
    """FLOPs of one training step (forward and backward) on one window and n_tokens target positions.

    Each product Y = X W has two of the same size in its backward pass, for dX and dW, hence 3 * forward; conv1
    has no dX, as the mel wants no gradient. Fused attention would compute its scores once more, which is not
    counted. ValueError as for decoder."""
    conv1 = 2 * 2 * _audio_positions(model) * model.encoder.conv1.weight.numel()        # 12 S M d
    return 3 * (encoder(model) + decoder(model, n_tokens)) - conv1


def _decoder(model: Whisper, n: int, pairs: int) -> int:
    """n positions through the decoder; self-attention sees `pairs` (query, key) pairs in all."""
    S = _audio_positions(model)
    blocks = sum(_attention(b.attn, n, n, pairs) + _attention(b.cross_attn, n, S, n * S) + _feed_forward(b, n)
                 for b in model.decoder.blocks)
    return blocks + 2 * n * model.decoder.token_embedding.weight.numel()


def _attention(attn: MultiHeadAttention, n_query: int, n_key: int, pairs: int) -> int:
    entries = (n_query * (attn.query.weight.numel() + attn.out.weight.numel())
               + n_key * (attn.key.weight.numel() + attn.value.weight.numel()))
    return 2 * entries + 2 * pairs * _key_value_width(attn)


def _key_value_width(attn: MultiHeadAttention) -> int:
    """2a, or the sum of the two widths where they differ; a key is as wide as the query it meets."""
    return len(attn.key.weight) + len(attn.value.weight)


def _feed_forward(block: ResidualAttentionBlock, n: int) -> int:
    return 2 * n * (block.mlp[0].weight.numel() + block.mlp[2].weight.numel())


def parameters(model: Whisper) -> dict[str, int | None]:
    """How many parameters there are, and how many of them are not zero, by part.

    total = encoder + decoder + embedding; embedding is the token embedding (stored once, also the output
    matrix), decoder the rest of the decoder. blocks = encoder_blocks + decoder_blocks is what pruning can
    reach. "nonzero" belongs to total, "encoder_nonzero" to encoder, and so on; on the meta device, where there
    are no values, they are None. Buffers are not parameters. ValueError if model is not a Whisper."""
    _audio_positions(model)
    tokens = model.decoder.token_embedding.weight
    parts = {"total": list(model.parameters()), "encoder": list(model.encoder.parameters()), "embedding": [tokens],
             "decoder": [p for p in model.decoder.parameters() if p is not tokens],
             "encoder_blocks": list(model.encoder.blocks.parameters()),
             "decoder_blocks": list(model.decoder.blocks.parameters())}
    parts["blocks"] = parts["encoder_blocks"] + parts["decoder_blocks"]
    counts = {name: sum(p.numel() for p in part) for name, part in parts.items()}
    for name, part in parts.items():
        values = None if any(p.is_meta for p in part) else sum(int(p.count_nonzero()) for p in part)
        counts["nonzero" if name == "total" else f"{name}_nonzero"] = values
    return counts


def sparse_storage(module: nn.Module, bytes_per_value: int) -> dict[str, int]:
    """Bytes that a module's parameters take dense, with matrices as CSR, and with matrices as bitmask + values.

    csr      nonzeros * (value + 4-byte column index) + (rows + 1) * 4-byte row start, per matrix:
             smaller than dense only past 50% zeros at 4 bytes per value, past 67% at 2
    bitmask  nonzeros * value + 1 bit per entry: smaller past 3.1% zeros at 4 bytes, past 6.3% at 2;
             for files, as PyTorch has no kernel that multiplies it

    Biases, norms and convolutions stay dense. ValueError for an unknown byte width or a meta device's module."""
    _check_bytes(bytes_per_value)
    sizes = {"dense": 0, "csr": 0, "bitmask": 0}
    for weight in module.parameters():
        if weight.is_meta:
            raise ValueError("a module on the meta device has no zeros to count: load its weights first")
        dense, nonzero = weight.numel() * bytes_per_value, int(weight.count_nonzero())
        matrix = weight.ndim == 2
        sizes["dense"] += dense
        sizes["csr"] += nonzero * (bytes_per_value + 4) + (len(weight) + 1) * 4 if matrix else dense
        sizes["bitmask"] += nonzero * bytes_per_value + (weight.numel() + 7) // 8 if matrix else dense
    return sizes


def memory(model: Whisper, n_tokens: int, bytes_per_value: int, batch: int = 1,
           n_prompt: int = 1) -> dict[str, int]:
    """Bytes to transcribe `batch` windows, n_tokens positions each (n_prompt of them given), no gradients.

    bytes_per_value   4 float32; 2 float16 or bfloat16, weights too (whisper's fp16=True keeps them float32
                      and copies as it goes: not counted); 8 float64; 1 int8, for weights and cache only
    weights           every parameter once
    kv_cache          keys and values of n_tokens text and S audio positions, all decoder blocks
    encoder_fused     peak activations of the encoder beside the mel
    decoder_fused     peak activations of greedy decoding beside audio features and KV cache
    peak_fused        max(encoder, audio features + kv_cache + decoder): all but the weights
    ..._unfused       the same where attention writes out its n_head S^2 scores, always in float32; so does
                      PyTorch on CPU, at about a tenth more, where query/key and value widths differ

    Left out: buffers, the kernels' own workspace, vectors of a single position. ValueError if model is not a
    Whisper, for other widths, n_tokens outside 1..n_text_ctx, n_prompt outside 1..n_tokens, batch < 1."""
    _check_tokens(model, n_tokens)
    _check_bytes(bytes_per_value)
    _check_count("batch", batch)
    _check_count("n_prompt", n_prompt, n_tokens)
    S, b, blocks = _audio_positions(model), bytes_per_value, model.decoder.blocks
    features = b * S * len(model.encoder.conv2.weight)
    text = b * sum(_key_value_width(block.attn) for block in blocks)
    cache = n_tokens * text + b * S * sum(_key_value_width(block.cross_attn) for block in blocks)
    logits = _logits_bytes(model, b)
    step = max(n_prompt * logits - (n_tokens - n_prompt) * text,        # the prompt: before the cache has grown
               logits,                                                  # the last step
               *(b * n_tokens * len(block.attn.value.weight) for block in blocks))     # torch.cat: old and new
    later = (n_tokens - n_prompt) * text         # of the cache, when cross-attention selects its inputs (an index)
    for layer in (part for block in reversed(blocks) for part in (block.cross_attn.value, block.cross_attn.key)):
        step = max(step, b * S * len(getattr(layer, "index", ())) - later)
        later += b * S * len(layer.weight)
    # Unfused: key * scale, with a batch copied to fold batch and heads; or the prompt's scores beside six of its x.
    scaled = (1 if batch == 1 else 2) * b * S * max(len(block.cross_attn.key.weight) for block in blocks)
    prompt = n_prompt * (max(x.cross_attn.n_head for x in blocks) * S * (8 if b == 4 else 8 + b) + 6 * features // S)
    sizes = {"weights": b * sum(p.numel() for p in model.parameters()), "kv_cache": batch * cache}
    for path, decoding in (("fused", step), ("unfused", max(step, scaled, prompt))):
        # The convolutions need 4 S d values at most, less than any block.
        encoding = max(_block_peak(block, S, b, path) for block in model.encoder.blocks)
        sizes |= {f"encoder_{path}": batch * encoding, f"decoder_{path}": batch * decoding,
                  f"peak_{path}": batch * max(encoding, features + cache + decoding)}
    return sizes


def training_memory(model: Whisper, n_tokens: int, batch: int = 1, bytes_per_value: int = 4,
                    checkpointing: bool = False) -> int:
    """Bytes of a training step under Adam: 16 for each parameter (weight, gradient, two moments, all float32), or 4 if
    it requires no gradient, and what the forward pass keeps for the backward pass at bytes_per_value (2: autocast, its
    weight copies counted).

    Of a block with n positions, n (4 d + 2 query/key + 2 value + 2 f) values: input and result of both LayerNorms,
    query, key, value, their mixture (attention fused), the hidden layer before and after GELU; cross-attention
    likewise. Layers with an `index` keep what they select. checkpointing keeps every block's input, and one block in
    full. Logits are those of the rows there are (after prune.vocabulary_). ValueError as for memory."""
    _check_tokens(model, n_tokens)
    _check_bytes(bytes_per_value)
    _check_count("batch", batch)
    S, T, d = _audio_positions(model), n_tokens, len(model.encoder.conv2.weight)

    def read(n: int, width: int, *layers: nn.Linear) -> int:
        """Of an input that these layers read: all of it, unless each has an index, and what each index selects."""
        parts = [len(layer.index) for layer in layers if hasattr(layer, "index")]
        return n * (width * (len(parts) < len(layers)) + sum(parts))

    def kept(block: ResidualAttentionBlock, n: int) -> int:
        attn, cross, first = block.attn, block.cross_attn, block.mlp[0]
        total = 2 * n * (d + len(first.weight)) + read(n, d, first) + read(n, d, attn.query, attn.key, attn.value)
        if cross is not None:
            total += n * d + read(n, d, cross.query) + read(S, 0, cross.key, cross.value)
        return total + sum((n + n_key) * (len(part.query.weight) + len(part.value.weight))
                           for part, n_key in ((attn, n), (cross, S)) if part is not None)

    sizes = [(kept(block, n), n * d) for net, n in ((model.encoder, S), (model.decoder, T)) for block in net.blocks]
    values = sum(full for full, _ in sizes)
    if checkpointing:
        values = sum(entry for _, entry in sizes) + max(full for full, _ in sizes)
    values += 2 * S * model.encoder.conv1.weight.shape[1] + 5 * S * d       # mel, convolutions
    features = [layer for block in model.decoder.blocks for layer in (block.cross_attn.key, block.cross_attn.value)]
    features = S * d if checkpointing else read(S, d, *features) - read(S, 0, *features)
    values += S * d + features + 2 * T * d                                  # the last LayerNorms
    copy = bytes_per_value if bytes_per_value < 4 else 0
    weights = sum((16 if p.requires_grad else 4) * p.numel() + copy * p.numel() for p in model.parameters())
    logits = T * len(model.decoder.token_embedding.weight) * 4              # their log-softmax
    return weights + batch * (values * bytes_per_value + logits)


def _logits_bytes(model: Whisper, b: int) -> int:
    """Bytes live at the worst moment of one position's logits: the product in b bytes and, if b != 4, in float32;
    where prune.vocabulary_ has cut rows (`row_of`), both that and the full width in float32."""
    rows, row_of = len(model.decoder.token_embedding.weight), getattr(model.decoder, "row_of", None)
    return max(rows * (b if b == 4 else b + 4), 4 * (rows + len(row_of)) if row_of is not None else 0)


def _block_peak(block: ResidualAttentionBlock, S: int, b: int, path: str) -> int:
    """Bytes live at the worst moment of one encoder block's three stages, S positions, b bytes a value.

    norm          the caller's x, x, LayerNorm's result and, if b != 4, float32 copies going in and out
    attention     x, its norm, query, key, value, their mixture, out's result. Unfused: two of the mixture
                  (as heads, as rows), scores and softmax in float32 and, if b != 4, the softmax in b bytes
    feed-forward  the caller's x, x, its norm, the hidden layer, and its GELU or the second matrix's result"""
    attn, f, d = block.attn, len(block.mlp[0].weight), len(block.mlp[2].weight)
    qk, v = len(attn.query.weight), len(attn.value.weight)
    cast = 0 if b == 4 else b
    attention = b * S * (3 * d + 2 * qk + 2 * v)
    if path == "unfused":
        attention = b * S * (2 * d + 2 * qk + 3 * v) + attn.n_head * S * S * (4 + 4 + cast)
    norm = S * d * (3 * b + (4 + 4 if cast else 0))         # never the worst when b = 4
    return max(norm, attention, b * S * (3 * d + f + max(f, d)))


def measure(models: Whisper | list[Whisper], mel: Tensor, n_prompt: int = 4, n_new: int = 24,
            repeats: int = 5) -> dict | list[dict]:
    """Latency and peak memory, encoder and greedy decoding apart, of one model (a dict) or a list (a list).

    mel      (batch, n_mels, 2S), on the device of the models
    greedy   n_prompt zeros are fed and exactly n_new tokens taken, past any end of text, so that dense and
             pruned models do the same work: batch * greedy(model, n_prompt, n_new) FLOPs
    return   encoder_seconds, greedy_seconds: medians of `repeats` runs after a warm-up, the models taking
             turns (A, B, A, B, ...) so that a slow minute of the machine is shared
             encoder_peak, greedy_peak: bytes beside weights and input; memory() predicts encoder_* and
             kv_cache + decoder_*. On CUDA the allocator's counter, on CPU the high-water mark of a forked
             child with one thread (Linux only), elsewhere None
             device, threads, batch

    ValueError for a model that is not a Whisper or holds no values, a mel that does not fit, a count < 1."""
    group = list(models) if isinstance(models, (list, tuple)) else [models]
    _check_count("repeats", repeats)
    for model in group:
        _check_greedy(model, n_prompt, n_new)
        _check_mel(model, mel)
    setting = {"device": str(mel.device), "threads": torch.get_num_threads(), "batch": len(mel)}
    results = [dict(setting) for _ in group]
    with torch.inference_mode():
        for part in ("encoder", "greedy"):
            calls = [partial(model.encoder, mel) if part == "encoder" else
                     partial(_decode, model, model.encoder(mel), n_prompt, n_new) for model in group]
            for call in calls:
                call()
            rounds = [[_seconds(call, mel.device) for call in calls] for _ in range(repeats)]
            for call, result, seconds in zip(calls, results, zip(*rounds)):
                result[f"{part}_seconds"] = statistics.median(seconds)
                result[f"{part}_peak"] = _peak(call, mel.device)
    return results if isinstance(models, (list, tuple)) else results[0]


def _decode(model: Whisper, features: Tensor, n_prompt: int, n_new: int) -> None:
    cache, hooks = model.install_kv_cache_hooks()
    tokens = torch.zeros(len(features), n_prompt, dtype=torch.long, device=features.device)
    try:
        for _ in range(n_new):
            tokens = model.decoder(tokens, features, kv_cache=cache)[:, -1:].argmax(-1)
    finally:
        for hook in hooks:
            hook.remove()


def _seconds(call: Callable, device: torch.device) -> float:
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def _peak(call: Callable, device: torch.device) -> int | None:
    """Bytes that call() takes at its worst moment beyond what is held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or sys.platform != "linux":
        return None
    process = multiprocessing.get_context("fork")       # the child has the model, nothing copied or pickled
    answer, send = process.Pipe(duplex=False)
    child = process.Process(target=_high_water, args=(call, send))
    child.start()
    send.close()                                        # so that a child that dies is an EOFError here
    peak = answer.recv()
    child.join()
    return peak


def _high_water(call: Callable, send) -> None:
    """In the child: send the most memory resident during call(), less what is resident before it.

    The heap would hide allocations in holes: those the parent left, those its garbage leaves when collected, and
    those of buffers that the kernels trade for others when call() runs first. So garbage goes now, and holes are
    filled, before that first time and after, with blocks that are never touched (not resident); every later block
    of a page or more is a mapping, gone when it is freed."""
    torch.set_num_threads(1)                            # OpenMP's threads do not survive a fork
    gc.collect()
    gc.disable()
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(-3, 4096)                              # M_MMAP_THRESHOLD
    for first in (call, lambda: None):
        for size in (2**n for n in range(30, 11, -1)):
            for _ in range(10_000):                     # a block from a hole is kept
                block = libc.malloc(size)
                if not block or ctypes.c_size_t.from_address(block - 8).value & 2:      # glibc: mapped, no holes left
                    break
            libc.free(block)
        first()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                 # VmHWM starts again from VmRSS
    before = _status("VmRSS")
    call()
    send.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def table(models: dict[str, Whisper], n_prompt: int = 4, n_new: int = 24) -> str:
    """A block of lines per model, under 80 columns, changes against the first one.

    "removed" is parameters that are gone, "zeros" the share of those left that is zero. The decoder's FLOPs
    are greedy(model, n_prompt, n_new) less the logits, which are the embedding's. MB is 10^6 bytes, float32;
    peak is beside the weights. ValueError as for greedy, or if a model is on the meta device."""
    lines, first = [f"{'':12}{'parameters':>15}{'removed':>10}{'zeros':>9}{'GFLOPs':>14}{'change':>10}"], None
    for name, model in models.items():
        n = _check_greedy(model, n_prompt, n_new)
        logits = 2 * n * model.decoder.token_embedding.weight.numel()
        work = {"encoder": encoder(model), "decoder": greedy(model, n_prompt, n_new) - logits, "embedding": logits}
        work["total"] = sum(work.values())
        stored, counts = sparse_storage(model, 4), parameters(model)
        first = first or (counts, work)
        lines.append(name)
        for part in work:
            zeros = 1 - counts["nonzero" if part == "total" else f"{part}_nonzero"] / counts[part]
            removed, change = 1 - counts[part] / first[0][part], work[part] / first[1][part] - 1
            lines.append(f"  {part:10}{counts[part]:15,}{100 * removed:9.1f}%{100 * zeros:8.1f}%"
                         f"{work[part] / 1e9:14,.3f}{100 * change:+9.1f}%")
        size = stored | memory(model, n, 4, n_prompt=n_prompt)
        size = {key: f"{value / 1e6:,.1f}" for key, value in size.items()}
        lines += [f"  MB: weights {size['weights']}, as CSR {size['csr']}, as bitmask and values {size['bitmask']}",
                  f"  MB: KV cache {size['kv_cache']}, peak {size['peak_fused']} ({size['peak_unfused']} unfused)"]
    return "\n".join(lines)


def bench(dense: Whisper, pruned: Whisper, batches: tuple[int, ...] = (1, 8)) -> Iterator[str]:
    """Measured beside predicted cost of two models on one device, line by line, in 80 columns; MB is 10^6 bytes.

    A peak of a few MB is at the resolution of what a process can measure; nan where it cannot be (`measure`)."""
    yield f"Measured on {dense.device}, {torch.get_num_threads()} threads; in brackets what FLOPs and formulas predict"
    yield "batch part     dense ms pruned ms   speed-up       dense MB       pruned MB"
    for batch in batches:
        mel = torch.randn(batch, dense.dims.n_mels, 2 * _audio_positions(dense), device=dense.device)
        measured = measure([dense, pruned], mel)
        predicted = [memory(model, 27, 4, batch, n_prompt=4) for model in (dense, pruned)]
        for part, work in (("encoder", encoder), ("greedy", lambda model: greedy(model, 4, 24))):
            ms = [1000 * row[f"{part}_seconds"] for row in measured]
            mb = [math.nan if row[f"{part}_peak"] is None else row[f"{part}_peak"] / 1e6 for row in measured]
            parts = ["encoder_fused"] if part == "encoder" else ["kv_cache", "decoder_fused"]
            said = [sum(row[name] for name in parts) / 1e6 for row in predicted]
            faster = f"{ms[0] / ms[1]:6.2f} ({work(dense) / work(pruned):4.2f})"
            yield (f"{batch:5} {part:<8}{ms[0]:9.1f}{ms[1]:10.1f}{faster}"
                   f"{mb[0]:8.1f} ({said[0]:6.1f}){mb[1]:8.1f} ({said[1]:6.1f})")


def _audio_positions(model: Whisper) -> int:
    if not isinstance(model, Whisper):
        raise ValueError(f"a whisper.model.Whisper is needed, got {type(model).__name__}; "
                         "unwrap the model, or build one with whisper.load_model")
    return len(model.encoder.positional_embedding)


def _check_count(name: str, value: int, most: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= most:
        raise ValueError(f"{name} must be an integer in 1..{most}, got {value!r}")


def _check_tokens(model: Whisper, n_tokens: int, name: str = "n_tokens") -> None:
    _audio_positions(model)
    _check_count(name, n_tokens, len(model.decoder.positional_embedding))


def _check_greedy(model: Whisper, n_prompt: int, n_new: int) -> int:
    """The number of positions that go through the decoder."""
    _check_tokens(model, n_prompt, "n_prompt")
    _check_tokens(model, n_new, "n_new")
    _check_tokens(model, n_prompt + n_new - 1, "n_prompt + n_new - 1")
    return n_prompt + n_new - 1


def _check_bytes(bytes_per_value: int) -> None:
    if isinstance(bytes_per_value, bool) or bytes_per_value not in (1, 2, 4, 8):
        raise ValueError(f"bytes_per_value must be 1, 2, 4 or 8, got {bytes_per_value!r}")


def _check_mel(model: Whisper, mel: Tensor) -> None:
    shape = (model.encoder.conv1.weight.shape[1], 2 * _audio_positions(model))
    if (came := getattr(mel, "shape", ()))[1:] != shape or 0 in came or mel.device != model.device or mel.is_meta:
        raise ValueError(f"mel must be {('batch', *shape)}, with the model, not on meta; got {tuple(came)} on "
                         f"{getattr(mel, 'device', None)}, the model on {model.device}")
