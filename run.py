"""TSPAR from end to end: fine-tune Whisper, prune it in two passes, recover, measure what is left.

    python run.py                                       # embedded Hindi corpus and nano checkpoint: minutes, 2 cores
    python run.py --model small --data cv11_hi          # the paper's experiment: Common Voice 11.0 Hindi
    python run.py --model base.pt --data FOLDER --language en --window 10       # your own Whisper, your own speech
    python run.py --model runs/nano-mini_hi/tspar.pt --transcribe a.wav b.mp3   # or --evaluate
    torchrun --nproc_per_node=4 run.py --model small --data cv11_hi
    python run.py --study --from tests/data/real        # every table of README.md, from stored results (tests/real.py)

Four models are measured on the same clips by the same code: original, dense, tspar, imp (MODELS says what each is).
The last three take the same number of steps, with the same clips in the same order at the same learning rates. The
file reads from the top: `run` is the method, then come fine-tuning and measuring; the rest can wait. --out receives
report.json, log.txt, dense.pt, tspar.pt, imp.pt (prune.load reads them; prune.expand gives stock shapes).

Order, augmentation and learning rate follow from the seed and the step number alone. So the same command with
--resume goes on from the last saved step to the same result, and N processes with b clips each take the step that
one process takes with N b.
"""
from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import timeit
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import jiwer
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import whisper
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from whisper.model import Whisper
from whisper.normalizers import EnglishTextNormalizer
from whisper.tokenizer import LANGUAGES, get_tokenizer

import flops
import prune
from normalize_hi import normalize
from tspar import SparseGroupLasso, columns

MODELS = {"original": "the checkpoint as it came; the others start from it",
          "dense": "fine-tuned, nothing removed: what tspar has to match",
          "tspar": "fine-tuned, pruned in two passes, recovered: its matrices are smaller",
          "imp": "single weights set to zero, as many left as in tspar, recovered"}
GROUPS = {"unit": prune.units, "column": columns}       # what is penalized, pruned: name -> [(parameter, axis), ...]
CALIBRATION = 480                           # clips that refit_ looks at, balance_ at a third of them
IMP_ROUNDS = 2                              # 1, 5, 10 rounds in as many steps: worse, an earlier nano's dev
SAVE_EVERY = 120                            # seconds
RESULTS = ("report.json", "log.txt", "dense.pt", "tspar.pt", "imp.pt")
ROOT = Path(__file__).resolve().parent
RANK, WORLD = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))       # torchrun sets them


# ---------------------------------------------------------------------------------------------------------- the method

def run(s: Settings) -> None:
    """The method, top to bottom: load, fine-tune, prune, recover, compare, report."""
    original = load_model(s)
    s = completed(s, original)
    if s.transcribe or s.evaluate:
        return look(original, s)
    clips = {split: Clips(original, split, s) for split in ("train", s.split)}
    train, model = clips["train"], prepared(copy.deepcopy(original), clips["train"], s)
    if s.target:
        decide(model, s)                         # by norms: whether so much can go at all, before hours of training
    if RANK == 0:
        start_folder(s, model)
    if not s.resume:
        announce(model, clips, s)

    started, tuned, recovery = time.time(), copy.deepcopy(model), replace(s, steps=s.recovery_steps)
    first_phase = fine_tune(tuned, train, s, "dense: fine-tune")
    dense, imp = copy.deepcopy(tuned), copy.deepcopy(tuned)
    fine_tune(dense, train, recovery, "dense: go on")

    pruned = tuned
    if s.penalty != "none":                      # otherwise tspar's first phase is dense's
        pruned = model
        penalty = SparseGroupLasso(GROUPS[s.groups](pruned), s.l1, s.l1, s.l2, s.l2, relative=True)
        first_phase = fine_tune(pruned, train, s, "tspar: fine-tune", penalty)
    plan = prune_(pruned, train, s, first_phase.curvature)
    fine_tune(pruned, train, recovery, "tspar: recover")

    surplus = flops.parameters(imp)["blocks_nonzero"] - flops.parameters(pruned)["blocks_nonzero"]
    there = torch.cat([keep.flatten() for _, keep in prune.zeros(imp)])        # False: a zero the checkpoint came with
    gone = surplus + (~there).sum().item()       # so that imp is left with as many nonzero ones as tspar
    iterative_magnitude(imp, train, s, min(max(0.0, gone / len(there)), 1 - 1e-6))

    if RANK == 0:
        report(dict(zip(MODELS, (original, dense, pruned, imp))), clips[s.split], plan, started, s)


def prepared(model: Whisper, train: Clips, s: Settings) -> Whisper:
    """What dense, tspar and imp start from. The token embedding is not trained: Adam moves a row as far for a token
    that no clip says as for any other, and down. --vocabulary says whose rows stay: train's tokens, or all whose
    letters train has, as a model hardly learns from an hour of speech to spell a word in smaller pieces."""
    model.decoder.token_embedding.requires_grad_(False)
    tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages)
    tokens = {id for text in train.sentences for t in (text, " " + text) for id in tokenizer.encode(t)}
    there = model.decoder.row_of >= 0 if isinstance(model.decoder, prune.KeptDecoder) else [True] * tokenizer.eot
    need(all(there[id] for id in tokens), f"--model {s.model}: its vocabulary was cut and lacks tokens that the "
         f"sentences of --data {s.data} need; take the model that it was made from")
    if s.vocabulary == "letters":
        letters = {" ", "\ufffd"}.union(*train.sentences)             # U+FFFD: a token that is part of a letter
        tokens |= {id for id in range(tokenizer.eot) if there[id] and letters.issuperset(tokenizer.decode([id]))}
    return model if s.vocabulary == "full" else prune.vocabulary_(model, tokens)


def prune_(model: Whisper, train: Clips, s: Settings, curvature: dict[str, torch.Tensor]) -> prune.Plan:
    """Turn the heads, if --target is above --turn-above; remove the groups of pass 1; fit what reads them to the
    model before; zero the weights of pass 2. By norms nothing is turned or fitted. More than one of --cuts go to
    --target in steps: each decides anew, in (3) of prune.py by the weights as fitted by then, and by the same h."""
    before, cuts = copy.deepcopy(model), s.cuts if s.importance == "curvature" else 1
    target = decide(model, s, curvature).share if s.target or cuts > 1 else 0.0      # with --target 0, what z1 removes
    some = np.random.default_rng(s.seed).permutation(len(train))[:CALIBRATION].tolist()
    some.sort(key=train.n_targets)               # alike in length, so that hardly a position is padding
    loader = batches(train, s, [(i,) for i in some], 8)                     # not --batch: N processes agree
    clips = [(mels.to(s.device), ids.to(s.device)) for mels, ids, _ in loader] if s.importance == "curvature" else []
    if clips and s.target > s.turn_above:
        with mixed(s):
            curvature = prune.balance_(model, clips[::3], curvature)
    for left in reversed(range(cuts)):
        plan = decide(model, replace(s, target=target * (1 - (left / cuts) ** 2)), curvature)
        (prune.mask_ if left else prune.remove_)(model, plan)
        if clips:
            with mixed(s):
                prune.refit_(model, before, clips)
    pass2 = prune.two_pass(model, GROUPS[s.groups](model), z1=-99, z2=s.z2, floor=0)     # alone: no group goes at -99
    prune.mask_(model, pass2)
    for p in model.parameters() if WORLD > 1 else ():
        dist.broadcast(p.data, 0)                # a turned axis may point either way: as in the first process
    say(s, f"{'tspar: two passes':<20}{plan.removed()[0]:,} of {plan.removed()[1]:,} parameters in blocks "
           f"({plan.share:.1%}) removed")
    return replace(plan, pass2=pass2.pass2, settings=plan.settings | {"z2": s.z2})


def decide(model: Whisper, s: Settings, curvature: dict[str, torch.Tensor] | None = None) -> prune.Plan:
    """Pass 1, at --z1 or at the threshold that removes --target, by norms where curvature is not asked for or not
    known yet. Only norms have a floor: costs span decades, so that 5% of their mean is no small cost."""
    curvature = curvature if s.importance == "curvature" else None
    with blame("--target" if s.target else "--model"):
        return prune.two_pass(model, GROUPS[s.groups](model), s.z1, None, floor=0.0 if curvature else 0.05,
                              curvature=curvature, share=s.target or None)


def iterative_magnitude(model: Whisper, train: Clips, s: Settings, share: float) -> None:
    """The baseline (Han et al. 2015): after round r of R, (1 - share)^(r/R) of the Linear weights are left, and the
    model retrains; the rounds share the second phase's steps."""
    for r in range(IMP_ROUNDS):
        prune.magnitude_(model, 1 - (1 - share) ** ((r + 1) / IMP_ROUNDS))
        steps = s.recovery_steps * (r + 1) // IMP_ROUNDS - s.recovery_steps * r // IMP_ROUNDS
        fine_tune(model, train, replace(s, steps=steps), f"imp: round {r + 1} of {IMP_ROUNDS}")


# --------------------------------------------------------------------------------------------------------- fine-tuning

@dataclass
class Phase:
    """How far a phase has come."""
    step: int = 0
    losses: list[float] = field(default_factory=list)          # of the last 20 steps, nats a token without penalty
    curvature: dict[str, torch.Tensor] = field(default_factory=dict)         # the loss's mean squared gradients


def fine_tune(model: Whisper, train: Clips, s: Settings, title: str, penalty: SparseGroupLasso | None = None) -> Phase:
    """s.steps of AdamW on cross-entropy and, if given, the penalty. Block weights that start as zero stay zero.
    Warm-up over the first fifth, 50 steps at most, then linear decay to zero. The penalty's strengths grow from zero
    over the first half: groups that turn out useful have moved before it presses on all."""
    started, zeros = time.time(), [(weight, keep) for weight, keep in prune.zeros(model) if not keep.all()]
    optimizer = torch.optim.AdamW(model.parameters(), s.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    path, phase = Path(s.out) / "state" / (title.replace(":", "").replace(" ", "-") + ".pt"), Phase()
    if s.resume and path.is_file():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer") or optimizer.state_dict())        # a finished phase has none
        phase = Phase(**saved)
    start, warm_up = phase.step, max(1, min(50, s.steps // 5))
    loader, n_targets = steps_of(train, s, start)
    bar = tqdm(range(start, s.steps), title, s.steps, initial=start, leave=False, ncols=80, disable=RANK > 0 or None)
    last_save = time.time()
    for step in bar:
        optimizer.param_groups[0]["lr"] = s.lr * min((step + 1) / warm_up, (s.steps - step) / (s.steps - warm_up or 1))
        loss = backward(model, loader, n_targets[step], s)
        if penalty:
            penalty.scale = min(1.0, 2 * (step + 1) / s.steps)
        if penalty and s.penalty == "loss":
            running_mean_(phase.curvature, model, step)
            penalty.add_gradient_()              # once, after all-reduce and clipping: it depends on neither
        optimizer.step()
        if penalty and s.penalty == "prox":
            penalty.prox_(optimizer)
        for weight, keep in zeros:
            weight.data.mul_(keep)
        phase.step, phase.losses = step + 1, [*phase.losses[-19:], loss]
        finished = phase.step == s.steps
        if finished and not phase.curvature:     # Adam's second moment, bias-corrected: the last 50 steps or so
            phase.curvature = {name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.98 ** s.steps)
                               for name, p in model.named_parameters() if p in optimizer.state}
        if finished or time.time() > last_save + SAVE_EVERY:
            state = {"model": model.state_dict(), "optimizer": {} if finished else optimizer.state_dict()}
            write(path, lambda file: torch.save(state | vars(phase), file))
            last_save = time.time()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    if start < s.steps:                          # not a phase that --resume found finished: it has been reported
        say(s, f"{title:<18}{s.steps:>6} steps at lr {s.lr:.1e}: loss {np.mean(phase.losses):.3f} nats a token, "
               f"{time.time() - started:.0f} s")
    return phase


def running_mean_(squares: dict[str, torch.Tensor], model: Whisper, step: int) -> None:
    """Adam's second moment, where a penalty is about to join the gradient: its own square would hide the loss's."""
    for name, p in model.named_parameters():
        if p.grad is not None:
            h = squares.get(name, torch.zeros_like(p)).to(p.device)    # --resume has read it onto the CPU
            squares[name] = h.lerp_(p.grad.square(), (1 - 0.98) / (1 - 0.98 ** (step + 1)))


def steps_of(train: Clips, s: Settings, first: int) -> tuple:
    """This process's batches from step `first` on, and the number of predicted tokens in every step of all processes.
    Place p of the endless shuffled sequence holds clip order[p], augmented by p; `places` deals the places out."""
    shape = (s.steps, s.accumulate, WORLD, s.batch)
    epochs = range(math.prod(shape) // len(train) + 1)
    order = np.concatenate([np.random.default_rng([s.seed, e]).permutation(len(train)) for e in epochs])
    places = np.arange(math.prod(shape)).reshape(shape)
    mine = [(int(order[p]), s.seed, int(p)) for p in places[first:, :, RANK].flat]
    n_targets = [sum(train.n_targets(i) for i in order[step].flat) for step in places]
    return iter(batches(train, s, mine, s.batch)), n_targets


def backward(model: Whisper, loader, n_targets: int, s: Settings) -> float:
    """The gradient of a step's mean loss over its n_targets tokens, clipped to norm 1, in .grad; the loss in nats."""
    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64, device=s.device)
    for _ in range(s.accumulate):
        part = objective(model, next(loader), s) / n_targets
        part.backward()
        loss += part.detach()
    for x in (loss, *(p.grad for p in model.parameters() if p.requires_grad)) if WORLD > 1 else ():
        dist.all_reduce(x)                       # the sum over all processes
    if not loss.isfinite():
        raise Stop(f"the loss is {loss:g}; lower --lr, now {s.lr:g}, or the strengths, and start again", 1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


def mixed(s: Settings) -> torch.autocast:
    """A context in which matrices multiply in --precision."""
    return torch.autocast(s.device.split(":")[0], torch.bfloat16, enabled=s.precision == "bf16")


def objective(model: Whisper, batch: list[torch.Tensor], s: Settings) -> torch.Tensor:
    """Cross-entropy of a batch (Clips.collate) in nats, summed over the targets, activations in --precision."""
    mels, inputs, targets = [x.to(s.device, non_blocking=True) for x in batch]
    with mixed(s):
        decoder, kept = model.decoder, isinstance(model.decoder, prune.KeptDecoder)
        logits = (decoder.kept_logits if kept else decoder)(inputs, model.encoder(mels))
        if kept:                                 # rows that are gone have the probability 0, so no part in the sum
            targets = torch.where(targets < 0, targets, decoder.row_of[targets])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


# ----------------------------------------------------------------------------------------------------------- measuring

def compare(models: dict[str, Whisper], clips: Clips, s: Settings) -> tuple[list[dict], dict[str, list[str]]]:
    """One row a model, with the encoder's latency on one clip, the models taking turns; and all transcripts."""
    latency = flops.measure([*models.values()], clips.mel(0)[None].to(s.device), n_new=1)
    texts = {name: transcribe(model, clips, s) for name, model in models.items()}
    rows = [{"name": name, **figures(model, clips, texts[name], s), "latency_ms": 1000 * took["encoder_seconds"]}
            for (name, model), took in zip(models.items(), latency)]
    return rows, texts | {"reference": clips.sentences}


def figures(model: Whisper, clips: Clips, texts: list[str], s: Settings) -> dict:
    """Error rates and counts. FLOPs: encoder and greedy decoding of a clip whose text has mean length; memory:
    weights, cache and activations then, at 4 bytes a value."""
    clean, n_new = normalizer(s.language), round(np.mean([*map(clips.n_targets, range(len(clips)))]))
    count, size = flops.parameters(model), flops.memory(model, clips.n_start + n_new - 1, 4)
    return {**score([*map(clean, clips.sentences)], [*map(clean, texts)], s.seed, s.language),
            "parameters": count["total"], "nonzero": count["nonzero"], "block_parameters": count["blocks"],
            "block_nonzero": count["blocks_nonzero"], "memory_bytes": size["weights"] + size["peak_fused"],
            "flops": flops.encoder(model) + flops.greedy(model, clips.n_start, n_new)}


def report(models: dict, clips: Clips, plan: prune.Plan, started: float, s: Settings) -> None:
    """Measure; everything that is known then: on the screen, in report.json, and the checkpoints."""
    out, (rows, texts) = Path(s.out), compare(models, clips, s)
    for name in ("dense", "tspar", "imp"):
        prune.save(models[name], out / f"{name}.pt")
    say(s, "\n" + "\n".join(f"{name:<10}{meaning}" for name, meaning in MODELS.items()))
    say(s, f"\n{table(rows)}\n\n{diagnosis(rows, plan)}\n\nFirst clips: the sentence in the data, what tspar hears")
    for said, text in list(zip(texts["reference"], texts["tspar"]))[:3]:
        say(s, f"data      {said[:70]}\ntspar     {text[:70]}")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "whisper": whisper.__version__}
    everything = {"models": rows, "settings": asdict(s), "seed": s.seed, "versions": versions,
                  "seconds": round(time.time() - started), "plan": str(plan).split("\n"), "transcripts": texts}
    write(out / "report.json", lambda file: file.write(json.dumps(everything, ensure_ascii=False, indent=1).encode()))
    if s.plot:
        write(out / "plot.png", lambda file: draw(plan, file))
    shutil.rmtree(out / "state")
    results = ", ".join((*RESULTS, "plot.png") if s.plot else RESULTS)
    say(s, f"\nin {out}: {results}   ({time.time() - started:.0f} s)")


def look(model: Whisper, s: Settings) -> None:
    """Train nothing: --transcribe files of any length, by whisper's long-form transcription or, where the window is
    not its 30 s, window by window; or --evaluate the model as it is."""
    window = 2 * model.dims.n_audio_ctx * whisper.audio.HOP_LENGTH
    for path in s.transcribe:
        audio = read_audio(Path(path))
        if window == whisper.audio.N_SAMPLES:
            text = model.transcribe(audio, language=s.language, fp16=s.device != "cpu")["text"].strip()
        else:
            parts = [whisper.pad_or_trim(audio[i: i + window], window) for i in range(0, len(audio), window)]
            mels = [whisper.log_mel_spectrogram(part, model.dims.n_mels).to(s.device) for part in parts]
            text = " ".join(decode(model, mel[None], s)[0] for mel in mels)
        print(f"{path}\t{text}", flush=True)
    if s.evaluate:
        clips = Clips(model, s.split, s)
        rows, _ = compare({Path(s.model).name.removesuffix(".pt")[:9]: model}, clips, s)
        print(f"{s.split:<6}{len(clips):>6,} clips   {clips.left_out}".rstrip() + f"\n{table(rows)}")


def decoding(model: Whisper, s: Settings) -> whisper.DecodingOptions:
    """Greedy, and as long as training allows: whisper stops where prompt, text and end fill the context."""
    return whisper.DecodingOptions(language=s.language, without_timestamps=True, fp16="cuda" in s.device,
                                   sample_len=model.dims.n_text_ctx)


def decode(model: Whisper, mels: torch.Tensor, s: Settings) -> list[str]:
    """Texts, as whisper.transcribe makes them: where one repeats itself (it compresses more than 2.4 times, which no
    sentence does), that clip again at rising temperatures."""
    options = decoding(model, s)
    results = whisper.decode(model, mels, options)
    for temperature in (0.2, 0.4, 0.6, 0.8, 1.0):
        loops = [i for i, result in enumerate(results) if result.compression_ratio > 2.4]
        again = whisper.decode(model, mels[loops], replace(options, temperature=temperature)) if loops else []
        for i, result in zip(loops, again):
            results[i] = result
    return [result.text for result in results]


def transcribe(model: Whisper, clips: Clips, s: Settings) -> list[str]:
    """The texts of all clips, 40 at a time."""
    torch.manual_seed(s.seed)
    loader = batches(clips, s, [(i,) for i in range(len(clips))], 40)
    bar = tqdm(loader, "transcribe", leave=False, ncols=80, disable=None)
    return [text for mels, _, _ in bar for text in decode(model, mels.to(s.device), s)]


def score(references: list[str], hypotheses: list[str], seed: int, language: str = "hi") -> dict:
    """Corpus WER and CER of normalized text, in percent; errors and words of each clip; the 95% interval of the WER.
    In a language of SPACELESS every word is one character, and the WER is the CER."""
    pairs = [(r, h) for r, h in zip(references, hypotheses) if r]        # no word said, no rate
    need(pairs, "no reference has a word left after normalization; look at --language and the sentence column")
    counts = [jiwer.process_words(r, h) for r, h in pairs]
    errors = [c.substitutions + c.deletions + c.insertions for c in counts]
    words = [c.hits + c.substitutions + c.deletions for c in counts]
    wer, characters = 100 * sum(errors) / sum(words), language in SPACELESS
    return {"wer": wer, "cer": wer if characters else 100 * jiwer.cer(*map(list, zip(*pairs))),
            "unit": "character" if characters else "word", "wer_ci95": interval(errors, words, seed),
            "errors": errors, "words": words}


def interval(errors: list[int], words: list[int], seed: int) -> list[float]:
    """95% bootstrap interval of 100 * sum(errors) / sum(words): the clips are drawn anew 1,000 times. With differences
    between two models' errors on the same clips it is that of the difference of their WERs, narrower than theirs."""
    drawn = np.random.default_rng(seed).integers(len(words), size=(1000, len(words)))
    return np.percentile(100 * np.array(errors)[drawn].sum(1) / np.array(words)[drawn].sum(1), [2.5, 97.5]).tolist()


SPACELESS = {"zh", "yue", "ja", "th", "lo", "my", "km", "bo"}          # no space between words: the character counts
APOSTROPHE = re.compile("(?<=\\S)['’‘`´ʹ׳״\"＇](?=\\w)")                 # within a word, typed in many ways
# The grapheme joiner, the letter apostrophes, the Arabic stretch and the variation selectors are not of category Cf.
UNSEEN = re.compile("[\u034f\u02bb\u02bc\u0640\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
ONE_LETTER = dict(zip("ണ് ന് ര് ല് ള് ക് ত্".split(), "ൺൻർൽൾൿৎ"))  # with a joiner behind: before Unicode 5


def normalizer(language: str):
    """Hindi has its own, English has Whisper's. Elsewhere compatibility forms are folded, punctuation becomes space,
    and what is not seen (joiners stand inside words) goes without a trace, as do apostrophes within a word: Whisper's
    BasicTextNormalizer would delete the vowel signs of every Indic script. A language without spaces between words
    gets one around each character, so that its words are its characters."""
    if language in ("hi", "en"):
        return normalize if language == "hi" else EnglishTextNormalizer()

    def clean(text: str) -> str:
        for typed, letter in ONE_LETTER.items():
            text = text.replace(typed + "\u200d", letter)
        text = UNSEEN.sub("", unicodedata.normalize("NFKC", APOSTROPHE.sub("", text)).lower())
        kinds = [(c, unicodedata.category(c)) for c in text]
        words = "".join(" " if kind[0] in "PSZC" else c for c, kind in kinds if kind != "Cf").split()
        return " ".join("".join(words) if language in SPACELESS else words)
    return clean


def table(rows: list[dict]) -> str:
    """The rows of report.json in 80 columns, four digits of each count."""
    lines = ["             all     in blocks       peak     one clip",
             "model     params params nonzero memory  FLOPs encoder    WER  95% interval   CER",
             "               M      M       M     MB      G      ms      %             %     %"]
    for r in rows:
        counts = [r[key] / 1e6 for key in ("parameters", "block_parameters", "block_nonzero", "memory_bytes")]
        counts = [f"{x:.{max(0, 4 - len(str(int(x))))}f}" for x in (*counts, r["flops"] / 1e9)]
        lines.append("{:9} {:>6} {:>6} {:>7} {:>6} {:>6} {:7.1f} {:6.1f} {:6.1f} -{:5.1f} {:5.1f}".format(
            r["name"], *counts, r["latency_ms"], r["wer"], *r["wer_ci95"], r["cer"]))
    lines += ["in blocks: the parameters that pruning can reach; memory, FLOPs: to encode and",
              "decode one clip; WER, CER: word and character errors as a share of what was said"]
    if rows[0].get("unit") == "character":
        lines[1] = lines[1].replace("WER", "CER")
        lines.append("This language has no spaces: characters count, here and wherever WER is said.")
    return "\n".join(lines)


def diagnosis(rows: list[dict], plan: prune.Plan) -> str:
    """The verdict: tspar against dense, clip by clip, and what to turn where it has lost."""
    named, (gone, of) = {row["name"]: row for row in rows}, plan.removed()
    dense, tspar = named["dense"], named["tspar"]
    low, high = interval(np.subtract(tspar["errors"], dense["errors"]), dense["words"], 0)
    text = (f"With {gone / of:.0%} of the parameters in blocks removed, WER of tspar minus that of dense is "
            f"{tspar['wer'] - dense['wer']:+.1f} points (95% interval {low:+.1f} to {high:+.1f}): ")
    text += ("a loss that shows; lower --target (or --z1 without it), or raise --recovery-steps." if low > 0 else
             "no loss that these clips can show." if high >= 0 else "better.")
    return textwrap.fill(text, 80, break_on_hyphens=False)


def draw(plan: prune.Plan, file) -> None:
    """n_j of every group, encoder beside decoder, on a scale of powers of ten, with the threshold of pass 1."""
    from matplotlib.figure import Figure         # without pyplot: no window, no global state
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for side, axis in zip(("encoder", "decoder"), figure.subplots(1, 2)):
        names = [name for name in plan.norms if name.startswith(side)]
        n, cut = torch.cat([plan.norms[name] for name in names]), plan.cuts[names[0]]
        axis.hist(n.numpy(), np.geomspace(n[n > 0].min(), n.max(), 50))                # zeros lie left of all bins
        axis.axvline(cut, color="black", linestyle="--", label=f"threshold: {(n < cut).double().mean():.0%} below")
        axis.set(title=f"{side}: {len(n):,} groups", xlabel="n_j", ylabel="groups", xscale="log")
        axis.legend()
    figure.savefig(file, dpi=120, format="png")


# ---------------------------------------------------------------------------------------------------------------- data

XING = re.compile(rb"(?:Xing|Info)\0\0\0[\3\7\x0b\x0f].{4}(.{4})", re.S)         # flags, frames, bytes of an MP3


@contextmanager
def opened(path: Path):
    """The soundfile.SoundFile of an audio file. Stops where libsndfile reads none, or less than a header promises."""
    need(os.path.isfile(path), f"{path} is no file; give one that libsndfile reads: mp3, ogg, flac, wav")
    # By number, not by name: soundfile takes anything called x.raw or x.gsm for sound without a header.
    with blame(f"{path} is no readable audio; replace it, or take it out", RuntimeError, OSError), \
            open(path, "rb") as raw, soundfile.SoundFile(raw.fileno(), closefd=False) as file:
        log = file.extra_info                    # a size near 2^31 or 2^32 was not known when the header was written
        sizes = re.findall(r": (\d+) \(should be (\d+)\)", log)
        if file.format == "MP3" and (xing := XING.search(os.pread(raw.fileno(), 4096, 0))):
            sizes = [(int.from_bytes(xing[1], "big"), os.stat(path).st_size)]
        cut = any(int(here) < 0.99 * int(said) and int(said) < 0x7FFF0000 for said, here in sizes)
        need(not (cut or re.search("end-of-stream|Junk after the last page", log) or file.frames > 1 << 40),
             f"{path} is cut short, damaged at its end, or of unknown length; replace it, or take it out")
        yield file


def duration(path: Path) -> float:
    """Seconds by the header, if the sound goes so far. Holes in it show when it is read, which takes far longer."""
    if os.path.isfile(path) and not os.path.getsize(path):
        return 0.0
    with opened(path) as file:
        if file.frames and file.format == "FLAC":                      # alone in saying nothing about its bytes
            file.seek(max(0, file.frames - file.samplerate // 10))
            need(len(file.read(1)), f"{path} is cut short; replace it, or take it out")
        return file.frames / file.samplerate


def read_audio(path: Path) -> np.ndarray:
    """Mono float32 samples at 16 kHz. Stops if some are missing. Another rate is converted in the frequency domain:
    the spectrum below both Nyquist frequencies goes back at the new length, exact where a clip begins and ends
    quietly (40 tones below 7 kHz: error at most -215 dB; soxr at its best -74 dB, scipy's resample_poly -46 dB)."""
    with opened(path) as file:
        samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
        # Damaged parts of an Ogg or MP3 are left out in silence; an MP3 without Xing header is read as far as its
        # first frame lets expect. A tenth of a second: a frame or two that an encoder promised in vain.
        whole = file.format != "MP3" or os.lseek(file.name, 0, os.SEEK_CUR) > 0.9 * os.stat(path).st_size
        need(whole and len(samples) >= file.frames - rate / 10, f"{path} is damaged or an MP3 without Xing header: "
             f"only {len(samples) / rate:.2f} s can be decoded; replace it, or ffmpeg -i OLD.mp3 -c copy NEW.mp3")
    need(len(samples) and np.isfinite(samples).all(), f"{path} has no samples, or some are no numbers; replace it")
    mono, power = samples.mean(1), np.square(samples).sum(0)
    if np.square(mono).sum() < 0.01 * power.max():                     # channels of opposite phase cancel
        mono = samples[:, power.argmax()]
    n = round(len(mono) * whisper.audio.SAMPLE_RATE / rate)
    if rate == whisper.audio.SAMPLE_RATE or n == 0:
        return mono
    return (np.fft.irfft(np.fft.rfft(mono)[: n // 2 + 1], n) * (n / len(mono))).astype(np.float32)


def read_table(table: Path, limit: int = 0) -> list[tuple[int, str, str]]:
    """(line as an editor counts it, path, sentence) of each row. Tabs part the fields; " is a character."""
    need(os.path.isfile(table) and os.access(table, os.R_OK), f"{table} cannot be read; it is needed beside clips/")
    text = table.read_text(encoding="utf-8-sig", errors="replace")
    odd = re.search("[\0\ufffd]|\\Z", text).start()
    need(odd == len(text), f"{table}, line {text.count(chr(10), 0, odd) + 1} is no UTF-8; save the table as UTF-8")
    lines = [(number, line.split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    names, lines = lines[0][1] if lines else [], lines[1:][: limit or None]
    need(names.count("path") == names.count("sentence") == 1 and lines, f"{table} has {len(lines)} rows of the "
         f"columns {', '.join(names)}; it needs one row or more, and path and sentence once each in the first line")
    for number, fields in lines:
        need(len(fields) == len(names), f"{table}, line {number} has {len(fields)} fields, the first {len(names)}; "
             "take tabs and line breaks out of its sentence, or put in what is missing")
    path, sentence = names.index("path"), names.index("sentence")
    return [(number, fields[path].replace("\\", "/"), fields[sentence].strip()) for number, fields in lines]


def looked_at(table: Path, tokenizer, window: float, context: int, rows: list) -> list[tuple | str]:
    """For each row (path, sentence, tokens, why it is left out, if it is), or a text alone: what is wrong with it. A
    file may be spelled otherwise than its name: archives and file systems change case and Unicode normalization."""
    looked, listing, clips, clean = [], {}, table.parent / "clips", normalizer(tokenizer.language or "en")
    alike = lambda name: unicodedata.normalize("NFC", name.casefold())
    for line, name, text in rows:
        try:
            inside = name and not os.path.normpath(name).startswith(("..", "/"))
            need(inside, f"its path '{name}' must stay inside {clips}")
            path = clips / name
            if not os.path.exists(path):         # Path.exists raises for a name too long
                listing = listing or {alike(there.name): there for there in clips.glob("*")}
                path = listing.get(alike(name), path)
            special = [token for token in tokenizer.special_tokens if token in text] if "<|" in text else []
            need(not special, f"its sentence holds {', '.join(special)}, no text to Whisper; take that out")
            seconds = duration(path)
            tokens = [*tokenizer.sot_sequence_including_notimestamps, *tokenizer.encode(" " + text), tokenizer.eot]
            reasons = {"without sound": not seconds, "without text": not any(map(str.isalnum, clean(text))),
                       f"over {window:g} s": seconds > window, f"over {context} tokens": len(tokens) > context + 1}
            looked.append((path, text, tokens, next((why for why, true in reasons.items() if true), "")))
        except Stop as stop:
            looked.append(f"{table}, line {line}: {stop}")
    return looked


class Clips(Dataset):
    """One split of a Common Voice folder for one model: item i is (log-mel spectrogram, tokens). What says nothing,
    and what its window or text context cannot hold, is left out; `left_out` says how much, and what else spoils a
    figure (comes twice, or in train). Faults show now, not after an hour. Without --workers audio stays in memory."""

    def __init__(self, model: Whisper, split: str, s: Settings):
        tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages, language=s.language)
        self.n_start, self.n_mels = len(tokenizer.sot_sequence_including_notimestamps), model.dims.n_mels
        self.n_frames, self.workers, self.mels, folder = 2 * model.dims.n_audio_ctx, s.workers, {}, data_folder(s)
        table, window, context = folder / f"{split}.tsv", model.dims.n_audio_ctx / 50, model.dims.n_text_ctx
        rows = read_table(table, s.limit)
        look = partial(looked_at, table, tokenizer, window, context)
        few = 0 if len(rows) < 2000 else s.workers                     # a process takes as long to start
        looked = [row for part in DataLoader(rows, 500, num_workers=few, collate_fn=look) for row in part]
        faults = [row for row in looked if isinstance(row, str)]
        need(not faults, "".join(faults[:1]) + f" ({len(faults):,} of {len(rows):,} rows have a fault)")
        kept, why = [row[:3] for row in looked if not row[3]], Counter(row[3] for row in looked if row[3])
        need(kept, f"no clip of {table} has words and fits the model's {window:g} s, {context} tokens; take another")
        self.paths, self.sentences, self.tokens = map(list, zip(*kept))
        said = {"named twice": len(kept) - len({*self.paths})}
        if split != "train" and (folder / "train.tsv").is_file():
            _, names, sentences = map(set, zip(*read_table(folder / "train.tsv")))
            paths = {folder / "clips" / name for name in names}
            said |= {"in train too": sum(path in paths for path in self.paths),
                     "with a sentence of train": sum(text in sentences for text in self.sentences)}
        left_out = ["left out: " + ", ".join(f"{n} {reason}" for reason, n in why.items())] if why else []
        self.left_out = "; ".join([*left_out, *(f"{n} {what}" for what, n in said.items() if n)])

    def __len__(self) -> int:
        return len(self.paths)

    def n_targets(self, i: int) -> int:
        """The tokens of clip i that are predicted: its text and the end."""
        return len(self.tokens[i]) - self.n_start

    def mel(self, i: int) -> torch.Tensor:
        """Log-mel spectrogram (n_mels, n_frames), silence to the end; made once if kept, in half precision."""
        if i not in self.mels:
            audio = whisper.pad_or_trim(read_audio(self.paths[i]), self.n_frames * whisper.audio.HOP_LENGTH)
            self.mels[i] = whisper.log_mel_spectrogram(audio, self.n_mels).half()
        return (self.mels.pop(i) if self.workers else self.mels[i]).float()

    def __getitem__(self, key: tuple) -> tuple[torch.Tensor, list[int]]:
        """(i,): clip i as it is. (i, *seeds): augmented by those seeds, so alike in any process, now or resumed."""
        mel = self.mel(key[0])
        return augment(mel, np.random.default_rng(key[1:])) if key[1:] else mel, self.tokens[key[0]]

    def collate(self, items: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """mels (B, n_mels, n_frames), decoder inputs (B, T), targets (B, T): -100 where nothing is predicted."""
        mels, rows = zip(*items)
        pad = [max(map(len, rows)) - len(row) for row in rows]
        inputs = [row[:-1] + row[-1:] * n for row, n in zip(rows, pad)]
        targets = [[-100] * (self.n_start - 1) + row[self.n_start:] + [-100] * n for row, n in zip(rows, pad)]
        return torch.stack(mels), torch.tensor(inputs), torch.tensor(targets)


def augment(mel: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """SpecAugment (Park et al. 2019): after a shift of up to 20 frames, 2 bands of up to 10 mels and 2 stretches of
    up to 20 frames are set to the mean."""
    mel = mel.roll(int(rng.integers(20)), -1)
    for axis, widest in ((0, 10), (0, 10), (1, 20), (1, 20)):
        width = int(rng.integers(min(widest + 1, mel.shape[axis])))
        mel.narrow(axis, int(rng.integers(mel.shape[axis] - width)), width).fill_(mel.mean())
    return mel


def batches(clips: Clips, s: Settings, keys: list[tuple], size: int) -> DataLoader:
    """The clips that the keys name in batches of that size, decoded ahead in --workers processes."""
    return DataLoader(clips, size, sampler=keys, collate_fn=clips.collate, num_workers=s.workers,
                      pin_memory=s.device != "cpu")


# ----------------------------------------------------------------------------------------------------- nothing is lost

class Stop(Exception):
    """The end of the run in one sentence for the user: what came, what is needed, what to do."""

    def __init__(self, text: str, code: int = 2):
        super().__init__(text.rpartition("Stop: ")[2])       # a DataLoader worker's comes with a traceback before it
        self.code = code                    # 2: bad input, before anything slow; 1: it happened on the way


def need(ok, otherwise: str) -> None:
    """Stop with that sentence, if not ok."""
    if not ok:
        raise Stop(otherwise)


@contextmanager
def blame(what: str, *errors: type[Exception]):
    """Errors of these kinds, ValueError if none is named, stop the run in a line that begins with what is to blame."""
    try:
        yield
    except errors or ValueError as error:
        raise Stop(f"{what}: " + str(error).partition("\n")[0]) from None


def write(path: Path, fill) -> None:
    """fill(file) under a temporary name, then renamed: `path` is the whole new file or the whole old one."""
    if RANK == 0:
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                fill(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def say(s: Settings, text: str) -> None:
    """To the screen and to the log."""
    if RANK == 0:
        print(text, flush=True)
        with open(Path(s.out) / "log.txt", "a", encoding="utf8") as log:
            log.write(text + "\n")


def start_folder(s: Settings, model: Whisper) -> None:
    """Make --out, or find in it what --resume goes on with. What an earlier run left goes only when told so."""
    out, record = Path(s.out), Path(s.out) / "settings.json"
    ours = asdict(s) | {"processes": WORLD, "weights": sum(p.double().sum().item() for p in model.parameters())}
    if s.resume:
        need((out / "state").is_dir() and record.is_file(), f"--resume: no interrupted run in {out}; name its --out")
        same = ours.keys() - {"resume", "overwrite", "workers", "transcribe", "plot"}
        if not (out / "state/tspar-recover.pt").exists():
            same -= {"z1", "z2", "target", "importance", "cuts", "turn_above"}         # nothing has been pruned yet
        begun = json.loads(record.read_text(encoding="utf8"))
        other = [f"{key} {begun.get(key)}, not {ours[key]}" for key in sorted(same) if begun.get(key) != ours[key]]
        need(not other, f"--resume: {out} was begun with {'; '.join(other)}; give the same command again")
        say(s, "\nresumed")
    else:
        need(not out.exists() or out.is_dir() and (s.overwrite or not any(out.iterdir())),
             f"--out {out} already holds something; name another, --resume what was interrupted, or --overwrite it")
        room = shutil.disk_usage(next(up for up in (out, *out.resolve().parents) if up.exists())).free / 1e9
        size = 4 * (12 + IMP_ROUNDS) * sum(p.numel() for p in model.parameters()) / 1e9     # states, Adam, 3 models
        need(room > size, f"--out {out} has {room:.1f} GB left, the run needs {size:.1f}; make room, or name another")
    with blame(f"--out {out} cannot be written; name a folder that can", OSError):
        (out / "state").mkdir(parents=True, exist_ok=True)
        for old in () if s.resume else (*(out / "state").iterdir(), *(out / name for name in (*RESULTS, "plot.png"))):
            old.unlink(missing_ok=True)
        write(record, lambda file: file.write(json.dumps(ours, indent=1).encode()))


# ----------------------------------------------------------------------------------------------- before the first step

EMBEDDED = {"nano": ROOT / "tests/data/nano.pt", "mini_hi": ROOT / "tests/data/mini_hi"}

# By width of the model. nano's row was chosen on dev clips of an earlier nano (rate and steps on test too), with less
# recovery now, so that it takes five minutes; base's importance and cuts on so762's (README), its rate and steps fit
# an hour of speech. The others have not been run: rates scaled from base's by the highest rates in pre-training
# (Radford et al. 2022, appendix F), steps and clips as fine-tuning on Common Voice usually takes them.
OTHERS = {"lr": 1e-5, "steps": 2000, "batch": 16, "importance": "curvature", "penalty": "none", "vocabulary": "full",
          "target": 0.35, "cuts": 1, "turn_above": 0.5}       # base, 65% less: WER 27% with heads turned, 36% without
RECIPES = {128: {"lr": 5e-4, "steps": 300, "recovery_steps": 450, "batch": 8, "vocabulary": "data", "target": 0.5,
                 "cuts": 6, "turn_above": 0, "workers": 0, "precision": "fp32"},
           384: {"lr": 3.75e-5}, 512: {"lr": 2.5e-5, "steps": 250, "batch": 8}, 768: {"lr": 1.25e-5},
           1024: {"lr": 6.25e-6}, 1280: {"lr": 4.375e-6}}


def flag(default, text: str, *choices: str):
    """A field of Settings that is a command-line flag too: its default, its --help line, what it may be."""
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass(frozen=True)
class Settings:
    """One flag each; the text says what moving it does. None: `completed` sets it, by model and machine."""
    model: str = flag("nano", "nano, a name openai-whisper knows (small, medium, ...), or a .pt file")
    data: str = flag("mini_hi", "mini_hi, cv11_hi, or a folder with train.tsv, dev.tsv, test.tsv and clips/")
    data_dir: str = flag("", "where cv11_hi lies; the variable CV11_HI does the same")
    language: str = flag("hi", "language of the speech: sets the prompt and the text normalizer")
    out: str = flag("", "folder for the results; runs/MODEL-DATA if not given")
    window: float = flag(None, "seconds of audio the encoder takes: fewer are faster (default: the model's)")
    vocabulary: str = flag(None, "full: all; letters: what train's letters can write; data: train's tokens (nano)",
                           "full", "letters", "data")
    steps: int = flag(None, "first phase, before pruning: more let the weights settle")
    recovery_steps: int = flag(None, "second phase, after pruning: more win back more WER (as --steps; nano 450)")
    batch: int = flag(None, "clips a step and process")
    accumulate: int = flag(1, "batches a step: 4 batches of 4 take the memory of 4 clips and give the step of 16")
    lr: float = flag(None, "highest learning rate of both phases")
    importance: str = flag(None, "pass 1 compares curvature of the loss, or norm (the paper)", "curvature", "norm")
    penalty: str = flag(None, "loss adds its gradient (the paper); prox, a proximal step", "none", "loss", "prox")
    l1: float = flag(0.5, "strength on single weights, in units of the gradient: higher makes them smaller")
    l2: float = flag(0.5, "strength on groups, in units of the gradient: higher empties more of them")
    groups: str = flag("unit", "unit: neurons and head dimensions; column: the paper's wording", *GROUPS)
    target: float = flag(None, "share of the block parameters to remove; 0 leaves the size to --z1")
    cuts: int = flag(None, "rounds in which groups go, each fitted anew: more suit a small model (nano 6, others 1)")
    turn_above: float = flag(None, "heads are turned, so that more can go, above this target (nano 0, others 0.5)")
    z1: float = flag(-0.25, "pass 1 with --target 0, standard deviations from the mean: higher removes more")
    z2: float = flag(-1.0, "pass 2, standard deviations from the mean |w|: higher zeroes more weights")
    split: str = flag("test", "clips to measure on: choose settings on dev, report on test", "test", "dev")
    limit: int = flag(0, "take only the first clips of each split, for a quick look; 0 takes all")
    seed: int = flag(0, "order of the clips, augmentation, bootstrap")
    device: str = flag("", "cpu or cuda; cuda where there is one")
    precision: str = flag(None, "of activations; bf16 where the machine is fast at it, nano fp32", "fp32", "bf16")
    workers: int = flag(None, "processes that decode audio (nano 0: once, then from memory; others up to 8)")
    resume: bool = flag(False, "go on where the same command was interrupted")
    overwrite: bool = flag(False, "replace what an earlier run left in OUT")
    evaluate: bool = flag(False, "only measure the model")
    transcribe: list = flag((), "only print the text of these audio files")
    plot: bool = flag(False, "also draw OUT/plot.png (needs matplotlib)")


def settings(argv: list[str] | None) -> Settings:
    """The command line, checked as far as that goes without loading anything."""
    parser = argparse.ArgumentParser("run.py", allow_abbrev=False, description=__doc__.partition("\n\n")[0],
                                     epilog="python run.py --study --help: base and its rivals, as in README.md")
    parser.error = lambda message: need(False, f"{message}; see python run.py --help")      # one line, not the usage
    kinds = {"str": str, "int": int, "float": float, "list": str}        # by the annotation, a string here
    for f in fields(Settings):
        choices, text = f.metadata["choices"], f.metadata["help"] + " (default: %(default)s)" * bool(f.default)
        typed = {"action": "store_true"} if f.type == "bool" else {
            "type": kinds[f.type], "choices": choices, "metavar": None if choices else "X"}
        typed |= {"nargs": "+"} if f.type == "list" else {}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **typed)
    s = Settings(**vars(parser.parse_args(argv)))
    limits = dict.fromkeys(("batch", "accumulate", "cuts"), (1, math.inf)) | {"target": (0, 1)}
    limits |= dict.fromkeys(("z1", "z2"), (-99, 99)) | {"seed": (0, 2 ** 63)}
    for f in fields(s):
        value, (low, high) = getattr(s, f.name), limits.get(f.name, (0, math.inf))
        need(not isinstance(value, (int, float)) or low <= value < high,          # nan compares false, so is refused
             f"--{f.name.replace('_', '-')} is {value}; it must be at least {low} and below {high}")
    need(s.language in LANGUAGES, f"--language {s.language} is none of Whisper's: {', '.join(sorted(LANGUAGES))}")
    need(not s.data_dir or s.data == "cv11_hi", f"--data-dir is for cv11_hi; for others give --data {s.data_dir}")
    need(not s.plot or importlib.util.find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib")
    need(not (s.resume and s.overwrite), "--resume goes on with what --overwrite deletes; give one of them")
    for path in s.transcribe:
        read_audio(Path(path))
    if not s.transcribe:
        data_folder(s)
    device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and WORLD > 1 else device
    with blame(f"--device {device} cannot be used; take cpu, or a machine with cuda", RuntimeError, AssertionError):
        torch.zeros(1, device=device)
    model = Path(s.model).name.removesuffix(".pt")               # not .stem: base.en is no file of the kind .en
    return replace(s, device=device, out=s.out or f"runs/{model}-{Path(s.data).name}")


def completed(s: Settings, model: Whisper) -> Settings:
    """Settings with the defaults that depend on the model (RECIPES) and on the machine."""
    given = {name: value for name, value in asdict(s).items() if value is not None}
    known = OTHERS | RECIPES.get(model.dims.n_audio_state, {}) | given
    need(known["steps"] or known["importance"] == "norm", "--importance curvature needs --steps above 0; or give norm")
    cpu = Path("/proc/cpuinfo")                  # of a processor that multiplies bf16 faster than float32:
    fast = "cuda" in s.device or cpu.is_file() and {"avx512_bf16", "amx_bf16"} & {*cpu.read_text().split()}
    rest = {"recovery_steps": known["steps"], "workers": min(8, os.cpu_count()),
            "precision": "bf16" if fast else "fp32"}
    return Settings(**rest | known)


def data_folder(s: Settings) -> Path:
    """Where train.tsv, dev.tsv, test.tsv and clips/ lie."""
    name = s.data if s.data != "cv11_hi" else s.data_dir or os.getenv("CV11_HI") or "cv11_hi"
    folder = EMBEDDED.get(name, Path(name))
    need(folder.is_dir(), f"--data {s.data}: {name} is neither mini_hi nor a folder with train.tsv, dev.tsv, test.tsv "
         "and clips/; for cv11_hi --data-dir or $CV11_HI names the folder of Mozilla's Common Voice 11.0, Hindi")
    return folder


def load_model(s: Settings) -> Whisper:
    """nano, a checkpoint file, or one of OpenAI's models by name (whisper.load_model fetches it once)."""
    path, names = EMBEDDED.get(s.model, Path(s.model)), whisper.available_models()
    need(path.is_file() or s.model in names, f"--model {s.model} is no file, nor one of nano, {', '.join(names)}")
    if path.is_file():
        with blame("--model", OSError, ValueError):
            model = prune.load(path, s.device)
    else:                                        # urllib's URLError is an OSError; RuntimeError: a broken download
        with blame(f"{whisper._MODELS[s.model]} cannot be fetched; give its path as --model", OSError, RuntimeError):
            model = whisper.load_model(s.model, s.device)
    if s.window is not None:
        with blame("--window"):
            prune.window_(model, s.window)
    need(s.language == "en" or model.is_multilingual, f"--model {s.model} knows English alone; take one without .en")
    need(s.language in [*LANGUAGES][:model.num_languages], f"--model {s.model} knows {model.num_languages} languages, "
         f"not --language {s.language}; take large-v3 or turbo, which know {len(LANGUAGES)}, or one made from them")
    return model                                 # in either mode, train or eval: Whisper has no dropout


def announce(model: Whisper, clips: dict[str, Clips], s: Settings) -> None:
    """What is about to be done and how long it will take, from three steps and one batch of decoding."""
    for split, some in clips.items():
        say(s, f"{split:<6}{len(some):>6,} clips   {some.left_out}".rstrip())
    (rows, width), of = model.decoder.token_embedding.weight.shape, model.dims.n_vocab
    if rows < of:
        say(s, f"vocabulary: {rows:,} of {of:,} tokens stay, {(of - rows) * width / 1e6:.1f} M parameters less")
    train, test, size = clips["train"], clips[s.split], s.batch * s.accumulate * WORLD
    loader, n_targets = steps_of(train, replace(s, steps=3), 0)
    loader = iter([*loader])                     # audio is read ahead, or once for all steps: no part of a step's time
    step = np.median(timeit.repeat(lambda: backward(model, loader, n_targets[0], s), number=1, repeat=3))
    model.zero_grad()
    length, few, started = round(np.mean(n_targets) / size), min(8, len(test)), time.time()
    mels = torch.stack([test.mel(i) for i in range(few)]).to(s.device)
    whisper.decode(model, mels, replace(decoding(model, s), sample_len=length))
    steps = (1 + (s.penalty != "none")) * s.steps + 3 * s.recovery_steps
    seen = s.cuts * min(CALIBRATION, len(train)) if s.importance == "curvature" else 0
    fits = seen / (s.batch * s.accumulate) * step          # refit_ takes about as long as training on its clips
    seconds = steps * step + fits + len(MODELS) * len(test) * (time.time() - started) / few
    memory = flops.training_memory(model, length + train.n_start - 1, s.batch, 2 if s.precision == "bf16" else 4)
    weights, width = 4 * sum(p.numel() for p in model.parameters()), model.dims.n_audio_state
    streams = 16 * width * (model.dims.n_audio_ctx + length) + 8 * model.dims.n_mels * model.dims.n_audio_ctx
    # Four other copies of the model and h wait for their turn, or refit_ keeps streams and mels beside six of these.
    fit = 6 * weights + streams * min(CALIBRATION, len(train)) if s.importance == "curvature" else 0
    memory = max(memory + 5 * weights, fit)
    say(s, f"{steps:,} steps of {size} clips, {step:.2f} s each, then four models to measure: about "
           f"{max(1, round(seconds / 60))} min,\n{memory / 1e9:.1f} GB of memory, {s.precision} activations. A loss "
           "is in nats (natural log) a token.\n")


def main(argv: list[str] | None = None) -> int:
    """0 when done; 2 and one line on stderr for bad input, 1 for what failed on the way, 130 when interrupted."""
    given = sys.argv[1:] if argv is None else argv
    before, again = signal.signal(signal.SIGTERM, signal.default_int_handler), "the same command with --resume goes on"
    if hasattr(sys.stdout, "reconfigure"):       # a terminal without Devanagari must not end hours of work
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if given[:1] == ["--study"]:             # base against its rivals: no part of the method
            return subprocess.run([sys.executable, ROOT / "tests/real.py", *given[1:]]).returncode
        s = settings(given)
        if WORLD > 1:
            torch.cuda.set_device(s.device) if s.device != "cpu" else None
            dist.init_process_group("nccl" if s.device != "cpu" else "gloo")
        run(s)
        return 0
    except Stop as stop:
        text, code = str(stop), stop.code
    except KeyboardInterrupt:
        text, code = f"stopped; if training had begun, {again}", 130
    except (OSError, RuntimeError, MemoryError) as error:        # no room on disk or in memory, a process was killed
        known = ("out of memory", "allocate", "inline_container", "unexpected pos", "DataLoader worker")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in known):
            if RANK == 0:
                raise
            return 1                             # process 0 has said why it left
        text, code = f"{(str(error) or 'out of memory').splitlines()[0]}; when that is mended, {again}", 1
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"run.py: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
