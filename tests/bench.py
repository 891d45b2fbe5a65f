"""What the rooms cost, measured: python tests/bench.py sgl | prune | normalize | data

Times are medians of runs taken in turns (A, B, A, B, ...), so that a busy minute falls on all alike; what counts is
their ratio. Models have random weights in the shapes of Whisper-base and Whisper-small: cost does not depend on
values.
"""
import argparse
import copy
import csv
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import soundfile
import torch
from torch.nn.functional import cross_entropy
from whisper.model import ModelDimensions, Whisper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flops as counter
import prune as pruner
import tspar
from normalize_hi import normalize as normalize_hi

BASE = ModelDimensions(80, 1500, 512, 8, 6, 51865, 448, 512, 8, 6)
SMALL = ModelDimensions(80, 1500, 768, 12, 12, 51865, 448, 768, 12, 12)


def in_turns(repeats: int, *calls, device: str = "cpu") -> list[float]:
    """Median seconds of each call, after one round to warm up."""
    spent = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, seconds in zip(calls, spent):
            started = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds += [time.perf_counter() - started] if turn else []
    return [statistics.median(seconds) for seconds in spent]


# ---- sgl

def sgl() -> None:
    """Ratios, and what they should not exceed: the closed gradient to autograd's (0.5), bytes it holds to the largest
    matrix (2), prox_ to an AdamW step (1), a training step on one clip of 30 s with the penalty to one without (1.05):
    by parts, as the penalty's time beside a plain step's, and measured whole, which swings by more than that on a busy
    machine."""
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"sgl on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print("shapes groups   gradient/backward  ms  bytes  prox/AdamW  ms   step by parts: gradient prox  "
              "whole: gradient prox")
        for name, dims in {"base": BASE, "small": SMALL}.items():
            model = Whisper(dims).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
            for w in model.parameters():
                w.grad = torch.full_like(w, 1e-3)
            optimizer.step()
            for kind, groups in {"columns": tspar.columns(model), "units": pruner.units(model)}.items():
                penalty = tspar.SparseGroupLasso(groups, 1e-9, 1e-9, 1e-9, 1e-9)
                add, prox = penalty.add_gradient_, lambda: penalty.prox_(optimizer)
                a, b = in_turns(7, add, lambda: penalty.penalty().backward(), device=device)
                c, d = in_turns(7, prox, optimizer.step, device=device)
                largest = max(w.numel() * w.element_size() for group in groups.values() for w, _ in group)
                row = (f"{name:<7}{kind:<9}{a / b:6.2f}{1e3 * a:8.0f}/{1e3 * b:<6.0f}"
                       f"{held(add, device) / largest:6.2f}{c / d:8.2f}{1e3 * c:7.0f}/{1e3 * d:<5.0f}")
                if name == "small":
                    plain, with_gradient, with_prox = training_steps(model, optimizer, add, prox, device)
                    row += (f"{1 + a / plain:17.3f}{1 + c / plain:8.3f}{with_gradient / plain:14.3f}"
                            f"{with_prox / plain:8.3f}   ({plain:.2f} s)")
                print(row, flush=True)


def training_steps(model: Whisper, optimizer, add, prox, device: str) -> list[float]:
    """Seconds of a teacher-forced step on one 30 s window and 30 tokens: plain, with the gradient, with the prox."""
    mel = torch.randn(1, model.dims.n_mels, 2 * model.dims.n_audio_ctx, device=device)
    tokens = torch.randint(model.dims.n_vocab, (1, 31), device=device)

    def step(before=lambda: None, after=lambda: None) -> None:
        optimizer.zero_grad()
        cross_entropy(model(mel, tokens[:, :-1]).transpose(1, 2), tokens[:, 1:]).backward()
        before()
        optimizer.step()
        after()
    return in_turns(5, step, lambda: step(before=add), lambda: step(after=prox), device=device)


def held(call, device: str) -> int:
    """The most bytes allocated at one time while call runs, beyond what there was before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# ---- prune

@torch.no_grad()
def planted(dims: ModelDimensions) -> Whisper:
    """Random weights; half of the groups of every unit, drawn at random, are twenty times weaker."""
    generator = torch.Generator().manual_seed(0)
    model = Whisper(dims).eval()
    for group in pruner.units(model).values():
        scale = torch.where(torch.rand(len(group[0][0]), generator=generator) < 0.5, 0.05, 1.0)
        for w, axis in group:
            w.mul_(scale if axis == w.ndim - 1 else scale[:, None])
    return model


def decide_and_remove() -> None:
    """Run in a process of its own: prints seconds to decide, seconds to remove, GiB above the model (Linux)."""
    model = planted(SMALL)
    status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status")
                              if line.startswith(key)) / 2 ** 20
    torch.randn(512, 512) @ torch.randn(512, 512)
    ctypes.CDLL(None).malloc_trim(0)                     # what planting left behind is not ours
    Path("/proc/self/clear_refs").write_text("5")        # VmHWM starts again from here
    before, started = status("VmRSS"), time.perf_counter()
    plan = pruner.two_pass(model)
    decided = time.perf_counter()
    pruner.remove_(model, plan)
    print(decided - started, time.perf_counter() - decided, status("VmHWM") - before)


def prune() -> None:
    """Small's shapes: seconds and memory to prune, then the speed of what is left against what its FLOPs allow."""
    runs = [subprocess.run([sys.executable, __file__, "decide_and_remove"], capture_output=True, text=True,
                           check=True).stdout
            for _ in range(5)]
    decide, remove, memory = zip(*[map(float, run.split()) for run in runs])
    print(f"small, {torch.get_num_threads()} threads, medians of 5: decide {statistics.median(decide):.2f} s, remove "
          f"{statistics.median(remove):.2f} s, at most {max(memory):.2f} GiB above the model")
    dense = planted(SMALL)
    small = copy.deepcopy(dense)
    plan = pruner.two_pass(small, z2=None)
    pruner.remove_(small, plan)
    print("removed {:,} of {:,} block parameters ({:.1%})".format(*plan.removed(),
                                                                  plan.removed()[0] / plan.removed()[1]))
    print("batch part     dense s  pruned s  speed-up  by FLOPs  share")
    for batch in (1, 8):
        a, b = counter.measure([dense, small], torch.randn(batch, 80, 3000), repeats=5 if batch == 1 else 3)
        for part, work in (("encoder", counter.encoder), ("greedy", lambda model: counter.greedy(model, 4, 24))):
            faster, allowed = a[f"{part}_seconds"] / b[f"{part}_seconds"], work(dense) / work(small)
            print(f"{batch:5} {part:<9}{a[f'{part}_seconds']:7.2f}{b[f'{part}_seconds']:10.2f}{faster:10.2f}"
                  f"{allowed:10.2f}{faster / allowed:7.2f}", flush=True)


# ---- normalize

def normalize() -> None:
    """Megabytes of UTF-8 sentences a second on one core: the sample sentences and those of mini_hi, each once a
    pass."""
    sentences = []
    for table in sorted((ROOT / "tests/data").glob("*/*.tsv")):
        with open(table, encoding="utf8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            sentences += [row.get("sentence") or row.get("reference") for row in rows if row.get("sentence")
                          or row.get("reference")]
    size = sum(len(sentence.encode()) for sentence in sentences) / 1e6
    seconds, = in_turns(9, lambda: [normalize_hi(sentence) for sentence in sentences])
    print(f"normalize: {len(sentences):,} sentences, {size:.2f} MB, {size / seconds:.1f} MB/s")


# ---- data

ROWS = 60_000


def data() -> None:
    """Seconds, also of the processor, and memory until 60,000 clips of 4 s are ready, by format, on a warm disk: 10 s
    is the goal. Each clip is a file of its own name, a hard link to one of 100; each sentence is different."""
    kinds = {"mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS"), "vorbis": ("OGG", "VORBIS"),
             "flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16")}
    words = "वह लड़का आज लस्सी पीता है क्या नेहा गाँव में मेरा कमरा बहुत बड़ा".split()
    for kind, (container, subtype) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            clips, rows = Path(folder) / "clips", ["client_id\tpath\tsentence\tup_votes\n"]
            clips.mkdir()
            for i in range(ROWS):
                if i < 100:
                    noise = 0.1 * torch.randn(4 * 48000, generator=torch.Generator().manual_seed(i)).numpy()
                    soundfile.write(clips / f"{i}.{kind}", noise, 48000, format=container, subtype=subtype)
                else:
                    os.link(clips / f"{i % 100}.{kind}", clips / f"{i}.{kind}")
                sentence = " ".join(words[i // 14 ** k % 14] for k in range(8))
                rows.append(f"x\t{i}.{kind}\t{sentence} {i}\t2\n")
            (Path(folder) / "train.tsv").write_text("".join(rows), encoding="utf8")
            command = [sys.executable, __file__, "load", folder]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"data: {ROWS:,} clips, {kind:<7}{printed}", end="", flush=True)


def load() -> None:
    """Run in a process of its own, on the folder named last: prints seconds of two calls, and GiB of both together."""
    import run
    status = lambda key: next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key)) / 2 ** 20
    model, spent = SimpleNamespace(dims=SMALL, is_multilingual=True, num_languages=99), []
    run.get_tokenizer(True, num_languages=99, language="hi").encode("नमस्ते")
    before = status("VmRSS")
    for _ in range(2):
        started, worked = time.perf_counter(), time.process_time()
        clips = run.Clips(model, "train", run.Settings(data=sys.argv[2], workers=os.cpu_count()))
        spent += [time.perf_counter() - started, time.process_time() - worked]
    print("{:5.1f} s ({:4.1f} of processor), again {:5.1f} s ({:4.1f})".format(*spent)
          + f", {status('VmHWM') - before:.2f} GiB, {len(clips):,} kept")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sgl", "prune", "normalize", "data", "decide_and_remove", "load"])
    parser.add_argument("folder", nargs="?", help=argparse.SUPPRESS)
    globals()[parser.parse_args().what]()
