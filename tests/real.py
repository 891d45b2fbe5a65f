"""TSPAR on OpenAI's own Whisper-base and real speech: every arm of one data set and seed, resumable, counts only.

    python run.py --study --from tests/data/real    # all tables of README.md and of RESULTS/README.md, from RESULTS
    python run.py --study --model BASE.pt --data so762 [--seed 1]              # or hi_kokoro: hours on 2 cores
    python run.py --study --model BASE.pt --data so762 65% "Taylor, 35%"       # these arms alone
    python run.py --study --model BASE.pt --data so762 -- --vocabulary data    # flags, part of the results' name

In place of arms also: latency (of what the arms left, taking turns), penalties [prox] (in the first phase, on so762's
dev clips), unseen (errors on words that no training sentence has), voices (test clips in a voice that train lacks),
norms (of groups, in the model as it came), picture (layers.png, tradeoff.png).

First phase and dense model are trained once; each percentage is pruned from that first phase and recovers for as
many steps as dense goes on, and so does what RIVALS make of that first phase. Results go to
tests/data/real/DATA-SEED.json, a row at a time: settings, counts of errors and words a clip, never texts. Checkpoints
and texts stay in runs/real/.
"""
import argparse
import copy
import importlib.util
import json
import re
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest import mock

import jiwer
import numpy as np
import torch
import whisper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flops
import prune
import run
import tspar
from tspar import SparseGroupLasso

RESULTS, ARMS = ROOT / "tests/data/real", (0.35, 0.5, 0.65)
ORIGINAL = {"original, 30 s": None, "original": 8}   # no step taken; arm -> window in seconds
STOCK = ("as OpenAI made it, 30 s", "the same, window cut to 8 s")           # their names in the tables
WIDE = ", 30 s"                                      # trained at 8 s, measured with all positions that OpenAI gave it
HALF_30 = "so762-0 50%" + WIDE
PASS_2 = "35%, with pass 2"                          # at z2 = -1, run.py's default; the other arms have pass 1 alone
NOT_TURNED, TURNED = "65%, heads as they are", "50%, heads turned"                  # without prune.balance_, with it
DATA = {"so762": ("--language", "en", "--lr", "2.5e-5", "--vocabulary", "full"),     # needs more words than train has
        "hi_kokoro": ("--language", "hi", "--lr", "5e-5", "--vocabulary", "data")}


def begin(model: Path, data: Path, seed: int, name: str, *flags: str) -> tuple:
    """Settings of all arms, and the model as OpenAI made it, with its window cut. Results go to the file `name`."""
    out = ROOT / "runs/real" / name
    (out / "state").mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    s = run.settings(["--model", str(model), "--data", str(data), *DATA[data.name], "--seed", str(seed),
                      "--window", "8", "--steps", "250", "--recovery-steps", "250", "--batch", "8",
                      "--z2", "-99", "--workers", "0", "--out", str(out), "--resume", *flags])
    original = run.load_model(s)
    return run.completed(s, original), original


def results(path: Path) -> dict:
    """What has been measured so far."""
    return json.loads(path.read_text()) if path.is_file() else {}


def machine() -> str:
    """What figures were measured on."""
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, {threads}" if torch.cuda.is_available() else threads


def measured(arm: str, model: torch.nn.Module, clips: run.Clips, s: run.Settings, **more) -> None:
    """Transcribe and count; the row goes to RESULTS, checkpoint and texts stay in s.out."""
    out, path, started = Path(s.out), RESULTS / f"{Path(s.out).name}.json", time.time()
    texts = run.transcribe(model, clips, s)
    prune.save(model, out / f"{arm}.pt")
    (out / f"{arm}.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf8")
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    row = {**run.figures(model, clips, texts, s), **more, "encoder_flops": flops.encoder(model),
           "fp16_bytes": sum(value.numel() * value.element_size() for value in half.values()),
           "measuring_seconds": time.time() - started, "machine": machine()}
    done = results(path) | {arm: row}
    done["settings"] = {k: v for k, v in asdict(s).items() if k not in ("model", "data", "out")}
    run.write(path, lambda file: file.write(json.dumps(done, default=float).encode()))
    print(arm, f"WER {row['wer']:.1f}  {row['block_parameters']:,} block parameters", flush=True)


def arms(model: Path, data: Path, seed: int, *words: str) -> None:
    """Train, prune, recover, measure; what a file of RESULTS has already is not done again. Words are arms (without
    any: ALL of them, tuned being dense after the first phase), or flags: then tuned alone."""
    flags = [word.strip("-") for word in words] if words and words[0].startswith("--") else []
    name = "-".join([data.name, str(seed), *flags])
    todo = [arm for arm in (["tuned"] if flags else words or ALL) if arm not in results(RESULTS / f"{name}.json")]
    for arm in todo:
        run.need(arm in (*ALL, PASS_2, NOT_TURNED, TURNED) or ANY_SHARE.fullmatch(arm),
                 f"{arm} is no arm; known are {', '.join(ALL)}")
    if not todo:
        return print(f"{RESULTS / name}.json has all of these; --study without --model shows the tables")
    s, original = begin(model, data, seed, name, *(words if flags else ()))
    train, test = (run.Clips(original, split, s) for split in ("train", "test"))
    tuned = run.prepared(copy.deepcopy(original), train, s)
    first = run.fine_tune(tuned, train, s, "dense: fine-tune")
    for arm in todo:
        model, facts, objective, started = copy.deepcopy(tuned), {}, run.objective, time.time()
        if arm[0].isdigit():
            this = replace(s, target=float(arm[:2]) / 100, z2=-1 if arm == PASS_2 else s.z2,
                           turn_above={NOT_TURNED: 1, TURNED: 0}.get(arm, s.turn_above))
            plan = run.prune_(model, train, this, first.curvature)
            objective = partial(distilled, tuned) if "distilled" in arm else objective
            facts = {"removed": plan.removed(), "pruning_seconds": time.time() - started}
        elif arm in RIVALS:
            RIVALS[arm](model, train=train, s=s)
        clips = test
        if arm in ORIGINAL:
            model = run.load_model(replace(s, window=ORIGINAL[arm]))
            clips = run.Clips(model, "test", s)
        elif not (arm == "tuned" or "IMP" in arm or "fitted only" in arm):     # IMP's rounds have retrained it
            title = arm.removesuffix(WIDE).replace("dense", "dense: go on").replace("%", "")
            with mock.patch.object(run, "objective", objective):
                phase = run.fine_tune(model, train, replace(s, steps=s.recovery_steps), title)
            facts |= {"loss": float(np.mean(phase.losses))}
        if arm.endswith(WIDE) and arm not in ORIGINAL:
            model, clips = widened(model), copy.copy(test)             # the same clips
            clips.n_frames, clips.mels = 2 * model.dims.n_audio_ctx, {}
        measured(arm, model, clips, s, **facts)


def widened(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights with all 30 s of positions, which are sines and are not trained."""
    positions = whisper.model.sinusoids(1500, model.dims.n_audio_state).to(model.device)
    model.encoder.positional_embedding, model.dims = positions, replace(model.dims, n_audio_ctx=1500)
    return model


def distilled(teacher: torch.nn.Module, model: torch.nn.Module, batch: list, s: run.Settings) -> torch.Tensor:
    """Half cross-entropy, half Kullback-Leibler divergence from what the first phase's model says, in nats, summed."""
    mels, inputs, targets = (x.to(s.device) for x in batch)
    words = lambda m: getattr(m.decoder, "kept_logits", m.decoder)(inputs, m.encoder(mels)).float().log_softmax(-1)
    said, ids = targets >= 0, targets[targets >= 0]
    with run.mixed(s):
        with torch.no_grad():
            p = words(teacher)[said]
        q, ids = words(model)[said], model.decoder.rows(ids) if hasattr(model.decoder, "rows") else ids
    return ((p.exp() * (p - q)).sum() - q.gather(1, ids[:, None]).sum()) / 2


def iterative(model: torch.nn.Module, train: run.Clips, s: run.Settings, share: float = 0.5) -> None:
    """That share of the blocks' parameters as single zeros, recovery included (run.iterative_magnitude)."""
    s = replace(s, out=f"{s.out}/IMP-{share:g}")         # its rounds have the same names at every share
    (Path(s.out) / "state").mkdir(parents=True, exist_ok=True)
    weights = sum(weight.numel() for weight, _ in prune.zeros(model))
    run.iterative_magnitude(model, train, s, share * flops.parameters(model)["blocks"] / weights)


def layer_by_layer(model: torch.nn.Module, share: float = 0.35, **_) -> None:
    """What one would write first: of every matrix the same share of the smallest norms."""
    norms = prune.two_pass(model, z2=None).norms
    def plan(part: float) -> prune.Plan:
        cuts = {name: n.quantile(min(1.0, max(0.0, part))).item() for name, n in norms.items()}
        return replace(prune.two_pass(model, z2=None), cuts=cuts, keep=prune._even(model, norms, cuts, 8))
    prune.remove_(model, prune.target(share, plan, 0.0, 0.9))


def fewer_layers(model: torch.nn.Module, encoder: int = 6, decoder: int = 2, **_) -> None:
    """distil-whisper's way (Gandhi et al. 2023): so many layers stay, evenly spread, the first and the last too."""
    for side, count in ((model.encoder, encoder), (model.decoder, decoder)):
        stay = np.linspace(0, len(side.blocks) - 1, count).round().astype(int)
        side.blocks = torch.nn.ModuleList(side.blocks[i] for i in stay)
    model.dims = replace(model.dims, n_audio_layer=encoder, n_text_layer=decoder)
    prune._align(model, [(1, head) for head in range(model.dims.n_text_head)])


def taylor(model: torch.nn.Module, train: run.Clips, s: run.Settings, share: float = 0.35) -> None:
    """Molchanov et al. 2019: a group is worth the sum of its (w g)^2, g the gradient of the loss of 96 clips, in one
    pool over the model. That is n_j^2 with g^2 as the curvature."""
    loader, n_targets = run.steps_of(train, replace(s, steps=1, batch=8, accumulate=12), 0)
    run.backward(model, loader, n_targets[0], replace(s, accumulate=12))
    squares = {name: p.grad.square() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    prune.remove_(model, prune.two_pass(model, z2=None, floor=0, curvature=squares, share=share))


def torch_pruning(model: torch.nn.Module, train: run.Clips, s: run.Settings, scorer: str, share: float = 0.35) -> None:
    """Dependency graph and scorer of Torch-Pruning 1.6.1 (pip install --no-deps --target DIR torch-pruning==1.6.1,
    and PYTHONPATH=DIR) on the gradients of 96 clips, one by one; all layers ranked at once, each divided by its mean.
    Its graph takes dimension j of an attention as one group, row j of query, key, value and column j of out. By hand:
    what it does not know of heads (one width, n_head, the query's scale), and the mean of squared gradients for its
    Hessian scorer, whose accumulate_grad, keyed by names here and by tensors there, keeps the last clip's alone."""
    run.need(importlib.util.find_spec("torch_pruning"), "Torch-Pruning is not there; its arms come last")
    import torch_pruning as library
    scorer, dims = getattr(library.importance, scorer)(), model.dims
    mel = torch.zeros(1, dims.n_mels, 2 * dims.n_audio_ctx, device=s.device)
    ids = torch.zeros(1, 4, dtype=torch.long, device=s.device)
    graph = library.DependencyGraph().build_dependency(
        model, {"mel": mel, "tokens": ids}, unwrapped_parameters=[(model.decoder.positional_embedding, 1)])
    some, squares = np.random.default_rng(s.seed).permutation(len(train))[:96].tolist(), {}
    model.zero_grad()
    for i, batch in zip(some, run.batches(train, s, [(i,) for i in some], 1)):
        (run.objective(model, batch, s) / train.n_targets(i)).backward()
        if hasattr(scorer, "accumulate_grad"):
            squares = {p: p.grad.square() + squares.get(p, 0) for p in model.parameters() if p.grad is not None}
            model.zero_grad()
    for p, square in squares.items():
        p.grad = square / len(some)
    norms = {}
    for name in prune.units(model):
        layer = model.get_submodule(prune._members(name)[0][0].removesuffix(".weight"))
        group = graph.get_pruning_group(layer, library.prune_linear_out_channels, [*range(layer.out_features)])
        norms[name] = scorer(group).double().cpu()
    model.zero_grad()
    base = replace(prune.two_pass(model, z2=None), norms=norms)
    def plan(cut: float) -> prune.Plan:
        cuts = dict.fromkeys(norms, cut)
        return replace(base, cuts=cuts, keep=prune._even(model, norms, cuts, 8))
    prune.remove_(model, prune.target(share, plan, 0.0, 5.0))


def paper(model: torch.nn.Module, train: run.Clips, s: run.Settings) -> None:
    """TSPAR in the paper's words: the penalty in the loss of the first phase, columns by their norms, side by side;
    pass 2 at run.py's z2."""
    s = replace(s, penalty="loss", groups="column", importance="norm", target=0.35, z2=-1)
    model.load_state_dict(run.prepared(run.load_model(s), train, s).state_dict())
    penalty = SparseGroupLasso(run.GROUPS[s.groups](model), s.l1, s.l1, s.l2, s.l2, relative=True)
    run.fine_tune(model, train, s, "paper: fine-tune", penalty)
    run.prune_(model, train, s, {})


RIVALS = {"the paper's wording, 35%": paper, "Taylor, 35%": taylor, "Taylor, 50%": partial(taylor, share=0.5),
          "Torch-Pruning's Taylor, 35%": partial(torch_pruning, scorer="GroupTaylorImportance"),
          "Torch-Pruning's Taylor, 50%": partial(torch_pruning, scorer="GroupTaylorImportance", share=0.5),
          "Torch-Pruning's Hessian, 35%": partial(torch_pruning, scorer="GroupHessianImportance"),
          "Torch-Pruning's Hessian, 50%": partial(torch_pruning, scorer="GroupHessianImportance", share=0.5),
          "L2 layer by layer, 35%": layer_by_layer,
          "L2 layer by layer, 50%": partial(layer_by_layer, share=0.5), "fewer layers": fewer_layers,
          "fewer layers, 4 in the decoder": partial(fewer_layers, decoder=4),
          "fewer layers, 4 and 2": partial(fewer_layers, encoder=4),
          "IMP, 35% zeros": partial(iterative, share=0.35), "IMP, 50% zeros": iterative,
          "IMP, 65% zeros": partial(iterative, share=0.65)}
ALL = (*ORIGINAL, "tuned", "dense", "20%", "35%", "50%", "65%", *sorted(RIVALS, key=lambda arm: "Torch" in arm))
ANY_SHARE = re.compile(r"[1-9]\d%(, fitted only|, distilled)?(, 30 s)?|dense, 30 s")


class AdaptiveLasso(SparseGroupLasso):
    """Adaptive group LASSO (Zou 2006; Wang, Leng 2008): group j's strength is l2 * median(n) / n_j, n_j the root of
    what removing it costs now (prune, equation 3), at most 100 l2. What is doomed goes to zero, the rest is free."""

    @torch.no_grad()
    def prox_(self, optimizer: torch.optim.Optimizer) -> None:
        n, units, lr = {}, self._units(), optimizer.param_groups[0]["lr"]
        for name, (group, _, _) in self.groups.items():
            n[name] = sum(tspar._sum(w.square() * optimizer.state[w]["exp_avg_sq"], axis) for w, axis in group).sqrt()
        median = torch.cat([*n.values()]).median()
        for name, (group, _, l2) in self.groups.items():
            step = tspar._step(group, [{"lr": lr, "betas": (0.9, 0.98), "amsgrad": False, "eps": 1e-8}] * len(group),
                               optimizer.state)
            tspar._shrink_(group, 0, units[name[:8]] * l2, step * (median / n[name]).clamp(max=100))


PENALTIES = {                                    # name -> flags, strengths l1 and l2, the class
    "adaptive": (("--penalty", "prox"), 0, 1, AdaptiveLasso),
    "loss": (("--penalty", "loss"), 0.5, 0.5, SparseGroupLasso),
    "prox": (("--penalty", "prox"), 0, 2, SparseGroupLasso),
    "the paper's wording": (("--penalty", "loss", "--groups", "column", "--importance", "norm"), 0.5, 0.5,
                            SparseGroupLasso),
    "none": ((), 0, 0, None)}


def penalties(model: Path, data: Path, *names: str) -> None:
    """so762's dev clips after 250 steps with each penalty: cross-entropy of the whole model, of what is left when 50%
    or 35% of the block parameters are removed, and that with WER after recovery. Seed 0. To penalties.json."""
    path = RESULTS / "penalties.json"

    def done(name: str, **figures) -> dict:
        all_rows = results(path)
        row = all_rows.setdefault(name, {})
        if figures:
            row |= figures
            run.write(path, lambda file: file.write(json.dumps(all_rows, indent=1).encode()))
            print(name, figures, flush=True)
        return row

    for name in names or PENALTIES:
        flags, l1, l2, lasso = PENALTIES[name]
        shares = [share for share in (0.5, 0.35) if f"{share:.0%}, WER" not in done(name)]
        if not shares:
            continue
        s, original = begin(model, data, 0, f"penalty-{name.partition(' ')[0]}", *flags)
        train, dev = (run.Clips(original, split, s) for split in ("train", "dev"))
        model = run.prepared(original, train, s)
        penalty = lasso and lasso(run.GROUPS[s.groups](model), l1, l1, l2, l2, relative=True)
        first = run.fine_tune(model, train, s, "dense: fine-tune", penalty)
        if "whole" not in done(name):
            norms = torch.cat([*prune.two_pass(model, run.GROUPS[s.groups](model), z2=None).norms.values()])
            done(name, l1=l1, l2=l2, whole=cross_entropy(model, dev, s),
                 empty_groups=(norms == 0).double().mean().item())
        for share in shares:
            less = copy.deepcopy(model)
            run.prune_(less, train, replace(s, target=share), first.curvature)
            done(name, **{f"{share:.0%}": cross_entropy(less, dev, s)})
            run.fine_tune(less, train, replace(s, steps=s.recovery_steps), f"recover {share}")
            wer = run.figures(less, dev, run.transcribe(less, dev, s), s)["wer"]
            done(name, **{f"{share:.0%}, recovered": cross_entropy(less, dev, s), f"{share:.0%}, WER": wer})


@torch.no_grad()
def cross_entropy(model: torch.nn.Module, clips: run.Clips, s: run.Settings) -> float:
    """Nats a token, over the clips as they are."""
    loader = run.batches(clips, s, [(i,) for i in range(len(clips))], 8)
    nats = sum(run.objective(model.eval(), batch, s).item() for batch in loader)
    return nats / sum(map(clips.n_targets, range(len(clips))))


def latency(model: Path, data: Path) -> None:
    """Encoder, and greedy decoding of 24 tokens, of one clip: median of 30 rounds, each in a new order of models. What
    RESULTS has stays; what is new is given in its pace, that of so762-0's dense, which must be among the models."""
    stock = partial(prune.load, model)
    models = dict(zip(STOCK, (stock(), prune.window_(stock(), 8))))
    for path in sorted((ROOT / "runs/real").glob("*-0/*.pt")):
        models |= {f"{path.parent.name} {path.stem}": prune.load(path)} if path.stem not in ORIGINAL else {}
    if "so762-0 50%" in models:                          # what pruning gives without the window
        models[HALF_30] = widened(copy.deepcopy(models["so762-0 50%"]))
    seconds = {name: {"encoder": [], "greedy": []} for name in models}
    with torch.inference_mode():
        for turn in range(31):
            for name in np.random.default_rng(turn).permutation([*models]).tolist():
                model = models[name]
                mel = torch.randn(1, model.dims.n_mels, 2 * model.dims.n_audio_ctx)
                options = whisper.DecodingOptions(language="en", fp16=False, sample_len=24, suppress_tokens=[50257])
                started = time.perf_counter()
                audio = model.encoder(mel)
                half = time.perf_counter()
                whisper.decode(model, audio, options)
                if turn:                         # the first warms up
                    seconds[name]["encoder"].append(half - started)
                    seconds[name]["greedy"].append(time.perf_counter() - half)
    result = {name: {part: 1000 * float(np.median(x)) for part, x in parts.items()} | {
        "encoder_gflops": flops.encoder(models[name]) / 1e9, "parameters": flops.parameters(models[name])["total"]}
        for name, parts in seconds.items()}
    print(json.dumps(result, indent=1))
    old, dense = results(RESULTS / "latency.json"), result["so762-0 dense"]
    for row in [row for name, row in result.items() if old and name not in old]:
        row |= {part: row[part] * old["so762-0 dense"][part] / dense[part] for part in ("encoder", "greedy")}
    result = result | {"machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}"} | old
    run.write(RESULTS / "latency.json", lambda file: file.write(json.dumps(result, indent=1).encode()))


def unseen(model: Path, data: Path) -> None:
    """Errors on test's words that train has, on those that it lacks, and insertions, from the texts in runs/real."""
    s, original = begin(model, data, 0, f"{data.name}-0")
    train, test = (run.Clips(original, split, s) for split in ("train", "test"))
    clean, result = run.normalizer(s.language), results(RESULTS / "unseen.json")
    known, said = {word for text in train.sentences for word in clean(text).split()}, [*map(clean, test.sentences)]
    for path in sorted((ROOT / f"runs/real/{data.name}-0").glob("*.json")):
        row = result[f"{data.name} {path.stem}"] = {"seen": [0, 0], "unseen": [0, 0], "inserted": 0}
        for reference, text in zip(said, map(clean, json.loads(path.read_text(encoding="utf8")))):
            words = reference.split()
            for part in jiwer.process_words(reference, text).alignments[0] if words else ():
                row["inserted"] += (part.type == "insert") * (part.hyp_end_idx - part.hyp_start_idx)
                for word in words[part.ref_start_idx: part.ref_end_idx]:
                    counts = row["seen" if word in known else "unseen"]
                    counts[0], counts[1] = counts[0] + (part.type != "equal"), counts[1] + 1
    result["what"] = "seed 0, test: [errors, words] of the words that train has and that it lacks"
    run.write(RESULTS / "unseen.json", lambda file: file.write(json.dumps(result, indent=1).encode()))


def voices(model: Path, data: Path) -> None:
    """Which test clips, as places in the lists of errors, have a voice that train lacks."""
    voice = {split: dict(reversed(row.split("\t")[:2]) for row in
                         (data / f"{split}.tsv").read_text(encoding="utf8").splitlines()[1:])
             for split in ("train", "test")}                           # clip -> who speaks
    s, original = begin(model, data, 0, f"{data.name}-0")
    said = [voice["test"][path.name] for path in run.Clips(original, "test", s).paths]
    new = [i for i, who in enumerate(said) if who not in voice["train"].values()]
    result = json.dumps({f"{data.name}, in a new voice": new}).encode()
    run.write(RESULTS / "voices.json", lambda file: file.write(result))


def norms(model: Path, data: Path) -> None:
    """The mean norm of a group (prune, n_j: a root mean square) in the model as OpenAI made it, by side and kind."""
    pools = {}
    for name, n in prune.two_pass(prune.load(model), z2=None).norms.items():
        pools.setdefault(" ".join((name[:7], *name.split(".")[3:])), []).append(n)
    result = json.dumps({kind: torch.cat(some).mean().item() for kind, some in pools.items()}, indent=1).encode()
    run.write(RESULTS / "norms.json", lambda file: file.write(result))


def table() -> str:
    """The first table of README.md, from what RESULTS holds."""
    head = "| Whisper-base | parameters | float16 | encoder | 24 tokens | WER (95%) | WER - dense (95%) |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    english = results(RESULTS / "so762-0.json")
    lines += [line(f"{name} (so762)", name, english.get(arm, {}), {}) for arm, name in zip(ORIGINAL, STOCK)]
    for file, data in (("so762-0", "English (so762)"), ("hi_kokoro-0", "Hindi (hi_kokoro), its vocabulary alone")):
        rows = results(RESULTS / f"{file}.json")
        names = {"dense": f"**{data}**: dense"}
        names |= {f"{share:.0%}": f"TSPAR, {share:.0%} of block parameters removed" for share in ARMS}
        lines += [line(name, f"{file} {arm}", rows[arm], rows["dense"]) for arm, name in names.items() if arm in rows]
    return "\n".join(lines)


def line(name: str, key: str, row: dict, dense: dict) -> str:
    """One model: what it costs, its WER, and if `dense` is given the WER's difference from it, clip by clip."""
    x, rates = results(RESULTS / "latency.json").get(key), " | "
    if row:
        rates = "{:.1f}% ({:.1f} - {:.1f}) | ".format(row["wer"], *row["wer_ci95"])
    if dense and row != dense:
        low, high = run.interval(np.subtract(row["errors"], dense["errors"]), dense["words"], 0)
        rates += f"{row['wer'] - dense['wer']:+.1f} ({low:+.1f} to {high:+.1f})"
    size = (x or row)["parameters"]
    times = f"{x['encoder']:.0f} ms | {x['greedy']:.0f} ms" if x else " | "                     # of some not measured
    return f"| {name} | {size / 1e6:.1f} M | {2 * size / 1e6:.0f} MB | {times} | {rates} |"


def over_seeds(data: str, arm: str) -> tuple[dict[int, float], float, list[float]]:
    """WER less dense's (or dense's own) by seed, its mean, and the mean's 95% interval: clips drawn with all seeds."""
    rows = {seed: results(RESULTS / f"{data}-{seed}.json") for seed in range(3)}
    errors = {seed: np.subtract(row[arm]["errors"], 0 if arm == "dense" else row["dense"]["errors"])
              for seed, row in rows.items() if arm in row}
    words = np.array(rows[0]["dense"]["words"])
    each = {seed: 100 * e.sum() / words.sum() for seed, e in errors.items()}
    return each, np.mean([*each.values()]), run.interval(sum(errors.values()), len(errors) * words, 0)


def seeds() -> str:
    """What the order of the clips and the augmentation change."""
    lines = ["| | seed 0 | seed 1 | seed 2 | mean (95%) |", "|---|---:|---:|---:|---:|"]
    for data, name in (("so762", "English (so762)"), ("hi_kokoro", "Hindi (hi_kokoro)")):
        for arm in ("dense", *(["20%"] if data == "so762" else []), "35%", "50%", "65%"):
            said = ("{:.1f}" if arm == "dense" else "{:+.1f}").format
            each, mean, interval = over_seeds(data, arm)
            cells = [said(each[seed]) if seed in each else "" for seed in range(3)]
            label = f"**{name}**: dense, WER" if arm == "dense" else f"{arm} removed, WER - dense"
            lines.append(f"| {label} | {' | '.join(cells)} | {said(mean)} ({' to '.join(map(said, interval))}) |")
    return "\n".join(lines)


MORE = ("Torch-Pruning's Taylor, 50%", "Torch-Pruning's Hessian, 35%", "Torch-Pruning's Hessian, 50%",
        "L2 layer by layer, 50%", "IMP, 35% zeros", "IMP, 65% zeros", "fewer layers, 4 in the decoder",
        "fewer layers, 4 and 2")                         # README leaves them out


def rival_seeds() -> str:
    """The same differences from dense at other orders of the clips; rows of seeds 1, 2 say where they were made."""
    lines = ["| so762, WER - dense | seed 0 | seed 1 | seed 2 | mean (95%) |", "|---|---:|---:|---:|---:|"]
    rows = [arm for seed in range(3) for arm in results(RESULTS / f"so762-{seed}.json")]
    for arm in ("20%", "35%", "50%", TURNED, "65%", *RIVALS):
        if rows.count(arm) > 1:
            each, mean, interval = over_seeds("so762", arm)
            cells = [f"{each[seed]:+.1f}" if seed in each else "" for seed in range(3)]
            name = f"TSPAR, {arm}" if arm[0].isdigit() else arm
            lines.append(f"| {name} | {' | '.join(cells)} | {mean:+.1f} ({interval[0]:+.1f} to {interval[1]:+.1f}) |")
    return "\n".join(lines)


def rivals(arms: tuple = ("35%", "50%", *(arm for arm in RIVALS if arm not in MORE)), data: str = "so762") -> str:
    """What else one would do with as many steps, beside TSPAR."""
    rows = results(RESULTS / f"{data}-0.json")
    of = rows["dense"]["block_parameters"]
    lines = [f"| {data} | in blocks | FLOPs | memory | encoder | 24 tokens | WER (95%) | WER - dense (95%) |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for arm in [arm for arm in arms if arm in rows]:
        name = f"TSPAR, {arm}" if arm[0].isdigit() else arm.replace("tuned", "dense, 250 steps only")
        shape = "dense" if arm == "tuned" or "IMP" in arm else arm.removesuffix(", fitted only")       # timed as
        key = STOCK[0] if arm == "dense" + WIDE else f"{data}-0 {shape}"
        cells = line(name, key, rows[arm], rows["dense"]).split(" | ")
        share = f"{rows[arm]['block_parameters'] / 1e6:.1f} M ({rows[arm]['block_parameters'] / of - 1:.0%})"
        costs = [f"{rows[arm]['flops'] / 1e9:.1f} G", f"{rows[arm]['memory_bytes'] / 1e6:.0f} MB"]
        lines.append(" | ".join([cells[0], share, *costs, *cells[3:]]))
    return "\n".join(lines)


def own_arms() -> str:
    """The same of what README leaves out."""
    return rivals(("tuned", "dense", "dense, 30 s", "20%", "35%, fitted only", PASS_2, "50%, 30 s", TURNED, "65%",
                   NOT_TURNED, "65%, distilled", *MORE))


def hindi_arms() -> str:
    """Rivals on hi_kokoro, and the WER of clips in voices that train has and in the one that it lacks."""
    arms = ("tuned", "dense", "35%", "35%, fitted only", "50%", TURNED, "65%", "65%, distilled", *RIVALS)
    rows, new = results(RESULTS / "hi_kokoro-0.json"), results(RESULTS / "voices.json")["hi_kokoro, in a new voice"]
    head, rule, *lines = rivals(arms, "hi_kokoro").splitlines()
    lines = [f"{head} known voices | new voice |", f"{rule}---:|---:|", *lines]
    for i, row in enumerate((rows[arm] for arm in arms if arm in rows), 2):
        errors, words = np.array(row["errors"]), np.array(row["words"])
        there = np.isin(range(len(words)), new)
        lines[i] += "".join(f" {100 * errors[clips].sum() / words[clips].sum():.1f}% |" for clips in (~there, there))
    return "\n".join(lines)


def claims() -> str:
    """What the paper reports, beside what base shows."""
    english = results(RESULTS / "so762-0.json")
    both = english, results(RESULTS / "hi_kokoro-0.json")
    above = lambda rows, zeros: f"{rows['50%']['wer'] - rows[f'IMP, {zeros} zeros']['wer']:+.1f}"
    imp = {zeros: " (English), ".join(above(rows, zeros) for rows in both) for zeros in ("35%", "50%")}
    more = lambda data: f"{over_seeds(data, '35%')[1]:+.1f}"
    less = lambda key: f"{100 - 100 * english['35%'][key] / english['dense'][key]:.1f}%"
    hindi = 100 - 100 * both[1]["35%"]["parameters"] / both[1]["dense"]["parameters"]
    return f"""| the paper, Common Voice Hindi | base here |
|---|---|
| small: 35.4% of the parameters go, WER stays | not quite: 35% of those in blocks, {less("parameters")} of all \
(Hindi: {hindi:.1f}%), WER {more("so762")} (English), {more("hi_kokoro")} (Hindi), means of three seeds |
| with them 18.5% of FLOPs, 14.25% of memory | yes: {less("flops")}, {less("memory_bytes")} (English; to encode and \
decode a clip) |
| 18.7% more goes than with IMP, at a WER 12.31 points lower | no: half removed against 35% zero, WER {imp["35%"]} \
(Hindi); against half zero, {imp["50%"]} (Hindi); and IMP makes nothing smaller |
| medium: 31% | not run |"""


def penalty_table() -> str:
    """What each penalty in the first phase did to the whole model and to what is left of it."""
    head = "| penalty | empty groups | whole | 35% fitted | recovered | WER | 50% fitted | recovered | WER |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, x in results(RESULTS / "penalties.json").items():
        cells = [f"{x['empty_groups']:.1%}", f"{x['whole']:.3f}"]
        for share in ("35%", "50%"):
            cells += [f"{x[key]:.3f}" if key in x else "" for key in (share, f"{share}, recovered")]
            cells.append(f"{x[f'{share}, WER']:.1f}%" if f"{share}, WER" in x else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def vocabularies() -> str:
    """What a smaller vocabulary costs: after the first phase, so nothing is removed but embedding rows."""
    tuned = lambda name: results(RESULTS / f"{name}.json")["tuned"]
    early, full = results(RESULTS / "vocabulary.json"), "hi_kokoro-{}-vocabulary-full"
    hindi = {kind: [(tuned(name.format(seed)), tuned(full.format(seed))) for seed in range(5)] for kind, name in
             {"data": "hi_kokoro-{}", "letters": "hi_kokoro-{}-vocabulary-letters"}.items()}
    rows = [("English, data, embedding trained", 0, [(early["data"], early["full"])]),
            ("English, letters", 0, [(tuned("so762-0-vocabulary-letters"), tuned("so762-0"))]),
            *((f"Hindi, {kind}", seed, [pair]) for kind, pairs in hindi.items() for seed, pair in enumerate(pairs)),
            *((f"Hindi, {kind}", "mean", pairs) for kind, pairs in hindi.items())]
    lines = ["| | seed | parameters | WER | WER - full (95%) |", "|---|---:|---:|---:|---:|"]
    for name, seed, pairs in rows:
        cut, words = pairs[0][0], len(pairs) * np.array(pairs[0][0]["words"])
        errors = sum(np.array(a["errors"]) for a, _ in pairs)
        more = errors - sum(np.array(b["errors"]) for _, b in pairs)
        low, high = run.interval(more, words, 0)
        lines.append(f"| {name} | {seed} | {cut['parameters'] / 1e6:.1f} M | {100 * errors.sum() / words.sum():.1f}% "
                     f"| {100 * more.sum() / words.sum():+.1f} ({low:+.1f} to {high:+.1f}) |")
    return "\n".join(lines)


def fits() -> str:
    """What was tried between removal and the end of recovery."""
    lines = ["| what | nats a token | WER |", "|---|---:|---:|"]
    lines += [f"| {name} | {x['cross_entropy']:.3f} | {x['wer']:.1f}% |" if "wer" in x else
              f"| {name} | {x['cross_entropy']:.3f} |  |" for name, x in results(RESULTS / "refit.json").items()
              if name != "what"]
    return "\n".join(lines)


def pictures(checkpoint: Path, data: Path) -> None:
    """layers.png, what is left of every layer of a pruned model, as bars: the share of each kind's groups; and
    tradeoff.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    model = prune.load(checkpoint)
    stock = dict(whisper.model.Whisper(model.dims).named_parameters())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    colors = {"self-attention": "C0", "cross-attention": "C1", "feed-forward": "C2"}
    for side, axis in zip(("encoder", "decoder"), axes):
        kinds = {"self-attention": "attn.value", "cross-attention": "cross_attn.value", "feed-forward": "mlp.0"}
        kinds.pop("cross-attention") if side == "encoder" else None
        blocks = getattr(model, side).blocks
        for k, (kind, leaf) in enumerate(kinds.items()):
            share = [len(block.get_submodule(leaf).weight) / len(stock[f"{side}.blocks.{i}.{leaf}.weight"])
                     for i, block in enumerate(blocks)]
            axis.bar(np.arange(len(blocks)) + 0.8 * (k + 0.5) / len(kinds) - 0.4, [100 * x for x in share],
                     0.8 / len(kinds), label=kind, color=colors[kind])
        axis.set(title=side, xlabel="block", ylabel="% of the groups left" if side == "encoder" else "")
        axis.set_ylim(0, 130)
        axis.legend(fontsize=8, ncols=3, loc="upper center")
    figure.savefig(RESULTS / "layers.png", dpi=110)
    tradeoff()


def tradeoff() -> None:
    """tradeoff.png: WER against the time of one clip, what TSPAR leaves as a line, its rivals as points."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows, times = results(RESULTS / "so762-0.json"), results(RESULTS / "latency.json")
    at = {arm: (sum(times[f"so762-0 {arm}"][part] for part in ("encoder", "greedy")), rows[arm]["wer"],
                np.abs(np.subtract(rows[arm]["wer_ci95"], rows[arm]["wer"]))) for arm in rows
          if f"so762-0 {arm}" in times and arm not in (PASS_2, *MORE) and rows[arm]["wer"] < 50}
    far = [f"{arm} ({rows[arm]['wer']:.0f}%)" for arm in RIVALS if arm not in MORE and rows[arm]["wer"] > 50]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    tspar_arms = [arm for arm in ("dense", *(f"{share:.0%}" for share in (0.2, *ARMS))) if arm in at]
    for color, drawn in (("C0", tspar_arms), ("C1", [arm for arm in RIVALS if arm in at])):
        x, y, error = zip(*(at[arm] for arm in drawn))
        axis.errorbar(x, y, np.transpose(error), fmt="o-" if drawn is tspar_arms else "s", color=color, capsize=3)
        for arm, left, top, (_, above) in zip(drawn, x, y, error):
            ours = drawn is tspar_arms       # named to the right, a rival over its interval, but where that is crowded
            place = ("left", 7, 7) if ours else ("center", 0, 5)
            place = {"20%": ("left", 7, -15), "Torch-Pruning's Taylor, 35%": ("left", 7, -1), "65%": ("left", 7, 14),
                     "fewer layers": ("right", -7, -1)}.get(arm, place)
            axis.annotate(f"TSPAR {arm}" if arm[0].isdigit() else arm,
                          (left, top + above * (place[0] == "center")), color=color, ha=place[0],
                          textcoords="offset points", xytext=place[1:])
    axis.set(xlabel="encoding a clip of 8 s and decoding 24 tokens, ms on 2 CPU cores", ylabel="WER, %")
    axis.set_title(f"off the scale: {', '.join(far)}" if far else "", fontsize=9, loc="right")
    axis.margins(0.27, 0.15)
    figure.savefig(RESULTS / "tradeoff.png", dpi=110)


def main(words: list[str]) -> None:
    """What stands behind run.py --study."""
    global RESULTS
    parser = argparse.ArgumentParser("run.py --study", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"--from": RESULTS, "--model": None, "--data": None}.items():
        parser.add_argument(flag, type=Path, default=default, dest=flag.strip("-").replace("from", "records"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*")
    parser.error = lambda message: run.need(False, f"{message}; see python run.py --study --help")
    given = parser.parse_args(words)
    if given.model is given.data is None and not given.words:
        RESULTS = given.records
        run.need(results(RESULTS / "so762-0.json"), f"--from {RESULTS} has no so762-0.json; give tests/data/real")
        return print("\n\n".join(made() for made in TABLES.values()))
    run.need(given.model and given.data, "--model BASE.pt and --data FOLDER go together, and arms need both; "
             "with none of them the tables of --from are printed")
    run.need(given.data.name in DATA, f"--data {given.data}: the study knows {' and '.join(DATA)}, as folders' names")
    if given.words and given.words[0] in TOOLS:
        TOOLS[given.words[0]](given.model, given.data, *given.words[1:])
    else:
        arms(given.model, given.data, given.seed, *given.words)


TABLES = {"real": table, "seeds": seeds, "rivals": rivals, "claims": claims, "arms": own_arms,
          "rival-seeds": rival_seeds, "hindi": hindi_arms, "penalties": penalty_table, "vocabularies": vocabularies,
          "fits": fits}                          # by their marks in README.md and RESULTS/README.md
TOOLS = {"latency": latency, "penalties": penalties, "unseen": unseen, "voices": voices, "norms": norms,
         "picture": pictures}

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except run.Stop as stop:
        print(f"run.py --study: {stop}", file=sys.stderr)
        sys.exit(stop.code)
