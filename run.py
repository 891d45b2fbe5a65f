"""TSPAR from end to end: fine-tune Whisper with a Sparse Group LASSO, prune it in two passes, measure what is left.

    python run.py                                       # embedded Hindi corpus and nano checkpoint: minutes, 2 cores
    python run.py --model small --data cv11_hi          # the paper's experiment: Common Voice 11.0 Hindi, wants a GPU
    python run.py --model runs/nano-mini_hi/tspar.pt --evaluate

Four models come out, measured on the same clips by the same code:

    original   the checkpoint as it came
    dense      fine-tuned without penalty: --steps, then --recovery-steps
    tspar      fine-tuned with the penalty for --steps, pruned, then --recovery-steps on the smaller model
    imp        dense after --steps, then Iterative Magnitude Pruning (Han et al. 2015) to as many nonzero weights as
               tspar has, in --rounds of prune and retrain that share the --recovery-steps

All take the same number of steps, with the same clips in the same order at the same learning rates. `run`, at the
end, is the method top to bottom. --out receives report.json, log.txt and the checkpoints dense.pt, tspar.pt,
imp.pt; prune.load reads them all, whisper.load_model all but tspar.pt (prune.expand makes that one stock again).
"""
import argparse
import copy
import csv
import json
import math
import os
import platform
import sys
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import jiwer
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import whisper
from tqdm import tqdm
from whisper.audio import HOP_LENGTH, SAMPLE_RATE
from whisper.model import Whisper
from whisper.normalizers import EnglishTextNormalizer
from whisper.tokenizer import LANGUAGES, get_tokenizer

import flops
import prune
from normalize_hi import normalize
from tspar import SparseGroupLasso, columns

ROOT = Path(__file__).resolve().parent
EMBEDDED = {"nano": ROOT / "tests/data/nano.pt", "mini_hi": ROOT / "tests/data/mini_hi"}


class Stop(Exception):
    """Bad input, in one sentence for the user: what came, what is needed, what to do."""


def flag(default, text: str, *choices: str):
    """A field of Settings that is a command-line flag too: its default, its --help line, what it may be."""
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass(frozen=True)
class Settings:
    """One flag each; the text says what moving it does."""
    model: str = flag("nano", "nano, a name openai-whisper knows (small, medium, ...), or a .pt file")
    data: str = flag("mini_hi", "mini_hi, cv11_hi, or a folder with train.tsv, dev.tsv, test.tsv and clips/")
    data_dir: str = flag("", "where cv11_hi lies; the variable CV11_HI does the same")
    language: str = flag("hi", "language of the speech: sets the prompt and the text normalizer")
    out: str = flag("", "folder for the results; runs/MODEL-DATA if not given")
    steps: int = flag(600, "first phase: more steps let the penalty empty more groups")
    recovery_steps: int = flag(600, "second phase, after pruning: more steps win back more WER")
    batch: int = flag(8, "clips a step")
    lr: float = flag(0.0, "learning rate of the first phase; 0 means 3e-3 for nano, 1e-5 for any other model")
    recovery_lr: float = flag(0.0, "learning rate of the second phase; 0 means the same as --lr")
    sgl: str = flag("loss", "loss adds the penalty's gradient, prox takes the proximal step", "loss", "prox")
    groups: str = flag("unit", "unit: neurons and head dimensions; column: the paper's wording", "unit", "column")
    l1_encoder: float = flag(2.2e-5, "strength on single weights: higher makes them smaller")
    l1_decoder: float = flag(3.2e-5, "the same in the decoder")
    l2_encoder: float = flag(2.2e-5, "strength on groups: higher empties more of them")
    l2_decoder: float = flag(3.2e-5, "the same in the decoder")
    z1: float = flag(0.5, "pass 1, standard deviations from the mean norm: higher removes more groups")
    z2: float = flag(-0.75, "pass 2, standard deviations from the mean |w|: higher zeroes more weights")
    target: float = flag(0.0, "share of the block parameters to remove; 0 leaves the size to z1")
    rounds: int = flag(5, "rounds of Iterative Magnitude Pruning")
    split: str = flag("test", "clips to measure on: choose settings on dev, report on test", "test", "dev")
    limit: int = flag(0, "take only the first clips of each split, for a quick look; 0 takes all")
    seed: int = flag(0, "order of the clips, augmentation, bootstrap")
    device: str = flag("cpu", "cpu or cuda")
    evaluate: bool = flag(False, "only measure the model")
    bench: bool = flag(False, "only compare predicted and measured cost, dense and pruned")
    plot: bool = flag(False, "also draw OUT/plot.png (needs matplotlib)")
    overwrite: bool = flag(False, "replace what an earlier run left in OUT")


# ------------------------------------------------------------------------------------------------ data

def read_audio(path: Path) -> np.ndarray:
    """Mono float32 samples at 16 kHz from whatever libsndfile reads: mp3, ogg, flac, wav.

    Another rate is converted in the frequency domain: the spectrum below the lower of the two Nyquist frequencies
    goes back at the new length, which is exact for all that both rates can carry.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise Stop(f"{path} is no readable audio ({error}); replace the clip or take its row out of the .tsv") from None
    mono = samples.mean(1)
    n = round(len(mono) * SAMPLE_RATE / rate)
    if rate == SAMPLE_RATE or n == 0:
        return mono
    return (np.fft.irfft(np.fft.rfft(mono)[: n // 2 + 1], n) * (n / len(mono))).astype(np.float32)


class Clips:
    """One split of a Common Voice folder, made ready for one model."""

    def __init__(self, folder: Path, split: str, model: Whisper, tokenizer, limit: int = 0):
        table, window = folder / f"{split}.tsv", model.dims.n_audio_ctx / 50        # seconds
        try:
            with open(table, encoding="utf8", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[: limit or None]
        except (OSError, UnicodeDecodeError) as error:
            raise Stop(f"{table} cannot be read ({error}); a folder like Common Voice's is needed: train.tsv, "
                       "dev.tsv, test.tsv, clips/") from None
        if not rows or not all(row.get("path") and row.get("sentence") is not None for row in rows):
            raise Stop(f"{table} has {len(rows)} rows with the columns {list(rows[0]) if rows else []}; it needs at least one "
                       "row, and in each a path and a sentence, tab-separated, named in the first line")
        self.paths = [folder / "clips" / row["path"] for row in rows]
        self.sentences = [row["sentence"].strip() for row in rows]
        start = [*tokenizer.sot_sequence_including_notimestamps]
        self.n_start = len(start)
        self.tokens = [start + tokenizer.encode(" " + text) + [tokenizer.eot] for text in self.sentences]
        self.n_mels, self.n_frames = model.dims.n_mels, 2 * model.dims.n_audio_ctx
        self.mels: dict[int, torch.Tensor] = {}
        for path, tokens in zip(self.paths, self.tokens):
            try:
                seconds = soundfile.info(path).duration      # a broken clip shows now, not after an hour
            except (RuntimeError, OSError) as error:
                raise Stop(f"{path} is no readable audio ({error}); replace it or take its row out of {table}") from None
            if seconds > window or len(tokens) - 1 > model.dims.n_text_ctx:
                raise Stop(f"{path} has {seconds:.1f} s and {len(tokens)} tokens, the model's window is {window:g} s and "
                           f"{model.dims.n_text_ctx}; take its row out of {table}, or take another model")

    def __len__(self) -> int:
        return len(self.paths)

    def mel(self, i: int) -> torch.Tensor:
        """Log-mel spectrogram (n_mels, n_frames), silence to the end; made once, kept in half precision."""
        if i not in self.mels:
            audio = whisper.pad_or_trim(read_audio(self.paths[i]), self.n_frames * HOP_LENGTH)
            self.mels[i] = whisper.log_mel_spectrogram(audio, self.n_mels).half()
        return self.mels[i].float()

    def batch(self, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """mels (B, n_mels, n_frames), decoder inputs (B, T), targets (B, T): -100 where nothing is predicted."""
        rows = [self.tokens[i] for i in chosen]
        pad = [max(map(len, rows)) - len(row) for row in rows]
        inputs = [row[:-1] + row[-1:] * n for row, n in zip(rows, pad)]
        targets = [[-100] * (self.n_start - 1) + row[self.n_start:] + [-100] * n for row, n in zip(rows, pad)]
        return torch.stack([self.mel(i) for i in chosen]), torch.tensor(inputs), torch.tensor(targets)


def augment(mels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """SpecAugment (Park et al. 2019): after a shift of up to 20 frames, 2 bands of up to 10 mels and 2 stretches of
    up to 20 frames of each clip are set to its mean."""
    mels = torch.stack([mel.roll(int(rng.integers(20)), -1) for mel in mels])
    for mel in mels:
        for axis, widest in ((0, 10), (0, 10), (1, 20), (1, 20)):
            width = int(rng.integers(widest + 1))
            mel.narrow(axis, int(rng.integers(mel.shape[axis] - width)), width).fill_(mel.mean())
    return mels


# ----------------------------------------------------------------------------------------- fine-tuning

@contextmanager
def shared_rows(model: Whisper):
    """The exact softmax over the whole vocabulary, at the cost of its different rows. Yields the loss and token -> row.

    About 75 of nano's 51,865 tokens occur in mini_hi; the others have one embedding row in common, so one logit, and
    n equal logits count as one logit plus log n. Inside the `with`, the model's vocabulary is its different rows;
    afterwards every token has its row back. In a pretrained Whisper all rows differ and nothing changes.
    """
    decoder, embed = model.decoder, torch.nn.Embedding.from_pretrained
    weight = decoder.token_embedding.weight.detach()
    rows, row_of, counts = torch.unique(weight, dim=0, return_inverse=True, return_counts=True)
    decoder.token_embedding = embed(rows, freeze=False)

    def loss(inputs: torch.Tensor, targets: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats a token; inputs and targets (B, T) are ids of the full vocabulary."""
        logits = decoder(row_of[inputs], audio) + counts.to(weight).log()
        return F.cross_entropy(logits.flatten(0, 1), torch.where(targets < 0, -100, row_of[targets]).flatten())

    try:
        yield loss, row_of
    finally:
        decoder.token_embedding = embed(decoder.token_embedding.weight.detach()[row_of], freeze=False)


def fine_tune(model: Whisper, clips: Clips, s: Settings, title: str, penalty: SparseGroupLasso | None = None) -> None:
    """s.steps of AdamW on cross-entropy and, if given, the penalty. Block weights that start as zero stay zero."""
    rng, order, losses, started = np.random.default_rng(s.seed), [], [], time.time()
    zeros = [(weight, keep) for weight, keep in prune.zeros(model) if not keep.all()]
    model.train()
    with shared_rows(model) as (cross_entropy, _):
        optimizer = torch.optim.AdamW(model.parameters(), s.lr, betas=(0.9, 0.98), weight_decay=0.01)
        warm_up = max(1, min(50, s.steps // 5))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warm_up) * (
            0.02 + 0.98 * (1 + math.cos(math.pi * step / max(1, s.steps))) / 2))
        bar = tqdm(range(s.steps), title, leave=False, ncols=80, disable=None)
        for step in bar:
            while len(order) < s.batch:
                order += rng.permutation(len(clips)).tolist()
            chosen, order = order[:s.batch], order[s.batch:]
            mels, inputs, targets = (x.to(s.device) for x in clips.batch(chosen))
            loss = cross_entropy(inputs, targets, model.encoder(augment(mels, rng)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if penalty and s.sgl == "loss":
                penalty.add_gradient_()         # after clipping: the strength does not depend on the data's gradient
            optimizer.step()
            if penalty and s.sgl == "prox":
                penalty.prox_(optimizer)
            for weight, keep in zeros:
                weight.data.mul_(keep)
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
            if not math.isfinite(losses[-1]):
                raise Stop(f"the loss is {losses[-1]} at step {step + 1} of {title}; lower --lr, now {s.lr:g}, "
                           "or the strengths")
    model.eval()
    loss = f"loss {np.mean(losses[-20:]):.3f}" if losses else "untouched"
    say(s, f"{title:<22}{s.steps:>5} steps   lr {s.lr:.0e}   {loss}   {time.time() - started:5.0f} s")


def recovery(s: Settings) -> Settings:
    """The second phase as settings of its own."""
    return replace(s, steps=s.recovery_steps, lr=s.recovery_lr)


def tspar(model: Whisper, clips: Clips, s: Settings) -> prune.Plan:
    """The method: fine-tune with the penalty, decide in two passes, remove, recover. Returns what was decided."""
    groups = prune.units(model) if s.groups == "unit" else columns(model)
    penalty = SparseGroupLasso(groups, s.l1_encoder, s.l1_decoder, s.l2_encoder, s.l2_decoder)
    fine_tune(model, clips, s, "tspar: fine-tune", penalty)
    decide = lambda z1: prune.two_pass(model, groups, z1, s.z2)
    plan = prune.target(s.target, decide) if s.target else decide(s.z1)
    prune.remove_(model, plan)
    gone, of = plan.removed()
    say(s, f"{'tspar: two passes':<22}{gone:,} of {of:,} block parameters removed ({gone / of:.1%})")
    fine_tune(model, clips, recovery(s), "tspar: recover")
    return plan


def iterative_magnitude(model: Whisper, clips: Clips, s: Settings, share: float) -> None:
    """The baseline: after round r of R, (1 - share)^(r/R) of the block weights are left, and the model retrains."""
    for r in range(s.rounds):
        prune.magnitude_(model, 1 - (1 - share) ** ((r + 1) / s.rounds))
        steps = s.recovery_steps * (r + 1) // s.rounds - s.recovery_steps * r // s.rounds
        fine_tune(model, clips, replace(recovery(s), steps=steps), f"imp: round {r + 1} of {s.rounds}")


# ------------------------------------------------------------------------------------------- measuring

def normalizer(language: str):
    """Hindi has its own, English has Whisper's. Elsewhere compatibility forms are folded and punctuation becomes space:
    Whisper's BasicTextNormalizer would delete the vowel signs of every Indic script."""
    if language == "hi":
        return normalize
    if language == "en":
        return EnglishTextNormalizer()
    return lambda text: " ".join("".join(
        " " if unicodedata.category(c)[0] in "PSZC" else c for c in unicodedata.normalize("NFKC", text).lower()).split())


def transcribe(model: Whisper, clips: Clips, s: Settings) -> list[str]:
    """Greedy whisper.decode, 40 clips at a time."""
    options = whisper.DecodingOptions(language=s.language, without_timestamps=True, fp16=s.device != "cpu")
    texts = []
    for first in tqdm(range(0, len(clips), 40), "transcribe", leave=False, ncols=80, disable=None):
        mels = torch.stack([clips.mel(i) for i in range(first, min(first + 40, len(clips)))])
        texts += [result.text for result in whisper.decode(model, mels.to(s.device), options)]
    return texts


def score(references: list[str], hypotheses: list[str], seed: int) -> dict:
    """Corpus WER and CER of normalized text, in percent. The 95% interval of WER: clips drawn anew 1,000 times."""
    pairs = [(r, h) for r, h in zip(references, hypotheses) if r]        # no word said, no rate
    if not pairs:
        raise Stop("no reference has a word left after normalization; look at --language and the sentence column")
    counts = [jiwer.process_words(r, h) for r, h in pairs]
    errors = np.array([c.substitutions + c.deletions + c.insertions for c in counts])
    words = np.array([c.hits + c.substitutions + c.deletions for c in counts])
    draws = np.random.default_rng(seed).integers(len(pairs), size=(1000, len(pairs)))
    low, high = np.percentile(100 * errors[draws].sum(1) / words[draws].sum(1), [2.5, 97.5])
    return {"wer": 100 * float(errors.sum() / words.sum()), "wer_ci95": [float(low), float(high)],
            "cer": 100 * jiwer.cer(*map(list, zip(*pairs)))}


def compare(models: dict[str, Whisper], clips: Clips, s: Settings) -> tuple[list[dict], dict[str, list[str]]]:
    """One row a model, and all transcripts. FLOPs: encoder and greedy decoding of a clip whose text has mean length;
    memory: weights, cache and activations then, at 4 bytes a value; latency: encoder, one clip."""
    n_new = round(np.mean([len(tokens) - clips.n_start for tokens in clips.tokens]))
    latency = flops.measure(list(models.values()), clips.mel(0)[None].to(s.device))
    clean, rows, texts = normalizer(s.language), [], {"reference": clips.sentences}
    for (name, model), measured in zip(models.items(), latency):
        texts[name] = transcribe(model, clips, s)
        scores = score([clean(text) for text in clips.sentences], [clean(text) for text in texts[name]], s.seed)
        count, size = flops.parameters(model), flops.memory(model, clips.n_start + n_new - 1, 4)
        rows.append({"name": name, **scores, "parameters": count["total"], "nonzero": count["nonzero"],
                     "block_parameters": count["blocks"], "block_nonzero": count["blocks_nonzero"],
                     "memory_bytes": size["weights"] + size["peak_fused"],
                     "flops": flops.encoder(model) + flops.greedy(model, clips.n_start, n_new),
                     "latency_ms": 1000 * measured["encoder_seconds"]})
    return rows, texts


def table(rows: list[dict]) -> str:
    """The rows of report.json in 80 columns."""
    lines = ["             all     in blocks       peak     one clip",
             "model     params params nonzero memory  FLOPs encoder    WER  95% interval   CER",
             "               M      M       M     MB      G      ms      %             %     %"]
    for r in rows:
        low, high = r["wer_ci95"]
        lines.append(f"{r['name']:<9}{r['parameters'] / 1e6:7.2f}{r['block_parameters'] / 1e6:7.3f}"
                     f"{r['block_nonzero'] / 1e6:8.3f}{r['memory_bytes'] / 1e6:7.1f}{r['flops'] / 1e9:7.3f}"
                     f"{r['latency_ms']:8.1f}{r['wer']:7.1f}{low:7.1f} -{high:5.1f}{r['cer']:6.1f}")
    return "\n".join(lines)


def side_norms(plan: prune.Plan, side: str) -> tuple[torch.Tensor, float]:
    """All group norms of one side, and the threshold of pass 1."""
    names = [name for name in plan.norms if name.startswith(side)]
    return torch.cat([plan.norms[name] for name in names]), plan.cuts[names[0]]


def histogram(plan: prune.Plan, bins: int = 12, width: int = 40) -> str:
    """Group norms of each side as bars of text, with pass 1's threshold where it falls."""
    lines = []
    for side in ("encoder", "decoder"):
        norms, cut = side_norms(plan, side)
        counts, edges = np.histogram(norms.numpy(), bins)
        lines.append(f"{side}: norms of {len(norms):,} groups, {int((norms < cut).sum()):,} below the cut at {cut:.4f}")
        for count, low, high in zip(counts, edges, edges[1:]):
            bar = "#" * math.ceil(width * count / counts.max())
            lines.append(f"  from {low:6.4f} {count:>6,} {bar:<{width}}{'  <- cut' if low <= cut < high else ''}".rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- the run

def settings(argv: list[str] | None) -> Settings:
    """The command line, checked as far as that goes without loading anything."""
    parser = argparse.ArgumentParser("run.py", description=__doc__.partition("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def refuse(message: str):
        raise Stop(f"{message}; see python run.py --help")
    parser.error = refuse                        # one line instead of argparse's usage and message
    for f in fields(Settings):
        typed = {"action": "store_true"} if f.type is bool else {
            "type": f.type, "choices": f.metadata["choices"], "metavar": None if f.metadata["choices"] else "X"}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **typed)
    s = Settings(**vars(parser.parse_args(argv)))
    limits = {"batch": (1, math.inf), "rounds": (1, math.inf), "target": (0, 1), "z1": (-99, 99), "z2": (-99, 99)}
    for f in fields(s):
        value, (low, high) = getattr(s, f.name), limits.get(f.name, (0, math.inf))
        if f.type in (int, float) and not low <= value < high:         # nan compares false, and is refused too
            raise Stop(f"--{f.name.replace('_', '-')} is {value}; it must be at least {low} and below {high}")
    if s.language not in LANGUAGES:
        raise Stop(f"--language {s.language} is no code that Whisper knows; it is one of {', '.join(sorted(LANGUAGES))}")
    try:
        torch.zeros(1, device=s.device)
    except (RuntimeError, AssertionError) as error:
        raise Stop(f"--device {s.device} cannot be used ({str(error).splitlines()[0]}); take cpu, or a machine with cuda") from None
    lr = s.lr or (3e-3 if s.model == "nano" else 1e-5)
    out = s.out or f"runs/{Path(s.model).stem}-{Path(s.data).name}"
    return replace(s, lr=lr, recovery_lr=s.recovery_lr or lr, out=out)


def data_folder(s: Settings) -> Path:
    """Where train.tsv, dev.tsv, test.tsv and clips/ lie."""
    if s.data == "cv11_hi":
        folder = s.data_dir or os.getenv("CV11_HI")
        if not folder or not Path(folder).is_dir():
            raise Stop(f"cv11_hi is not in {folder or '--data-dir or $CV11_HI, which are empty'}; download Common Voice Corpus "
                       "11.0, Hindi, from https://commonvoice.mozilla.org/datasets, unpack it, and give the folder that "
                       "holds train.tsv as --data-dir")
        return Path(folder)
    folder = EMBEDDED.get(s.data, Path(s.data))
    if not folder.is_dir():
        raise Stop(f"--data {s.data} is neither mini_hi, nor cv11_hi, nor a folder with train.tsv, dev.tsv, test.tsv and clips/")
    return folder


def load_model(s: Settings) -> Whisper:
    """nano, a checkpoint file, or one of OpenAI's models by name (whisper.load_model fetches it once)."""
    path = EMBEDDED.get(s.model, Path(s.model))
    names = whisper.available_models()
    if not path.is_file() and s.model not in names:
        raise Stop(f"--model {s.model} is neither nano, nor a file, nor one of {', '.join(names)}")
    try:
        model = prune.load(path, s.device) if path.is_file() else whisper.load_model(s.model, s.device)
    except ValueError as error:
        raise Stop(f"{error}; give a checkpoint that run.py or OpenAI wrote") from None
    except (OSError, RuntimeError) as error:     # urllib's URLError is an OSError; RuntimeError: a broken download
        raise Stop(f"the weights of {s.model} could not be fetched ({error}); download {whisper._MODELS[s.model]} into "
                   f"{os.getenv('XDG_CACHE_HOME', '~/.cache')}/whisper/, or give its path as --model") from None
    if s.language != "en" and not model.is_multilingual:
        raise Stop(f"--model {s.model} knows English alone and --language is {s.language}; take the model without .en")
    return model.eval()


def start_folder(s: Settings) -> None:
    """Make --out. What an earlier run left there goes only when told so."""
    out = Path(s.out)
    if s.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise Stop("--plot needs matplotlib, which is not installed; pip install matplotlib, or leave --plot out") from None
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if out.is_file() or not s.overwrite:
            raise Stop(f"--out {out} already holds something; name another, or --overwrite what an earlier run left in it")
        for name in ("log.txt", "report.json", "plot.png", "dense.pt", "tspar.pt", "imp.pt"):
            (out / name).unlink(missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"--out {out} cannot be made ({error}); name a folder that can be written") from None


def say(s: Settings, text: str) -> None:
    """To the screen and to the log."""
    print(text, flush=True)
    with open(Path(s.out) / "log.txt", "a", encoding="utf8") as log:
        log.write(text + "\n")


def write(path: Path, text: str) -> None:
    """The whole file or the old one."""
    path.with_suffix(".tmp").write_text(text, encoding="utf8")
    os.replace(path.with_suffix(".tmp"), path)


def draw(plan: prune.Plan, path: Path) -> None:
    """The histogram as a picture: group norms of each side and the cut of pass 1."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for side, axis in zip(("encoder", "decoder"), axes):
        norms, cut = side_norms(plan, side)
        axis.hist(norms.numpy(), 50)
        axis.axvline(cut, color="black", linestyle="--", label=f"cut of pass 1: {(norms < cut).double().mean():.0%} below")
        axis.set(title=f"{side}: {len(norms):,} groups", xlabel="norm / square root of size", ylabel="groups")
        axis.legend()
    figure.savefig(path, dpi=120)


def bench(model: Whisper, s: Settings) -> None:
    """Predicted and measured cost of stock and pruned shapes; a model in stock shapes loses half its blocks first."""
    dense, pruned = prune.expand(model), copy.deepcopy(model)
    if flops.parameters(model)["blocks"] == flops.parameters(dense)["blocks"]:
        prune.remove_(pruned, prune.target(s.target or 0.5, lambda z1: prune.two_pass(pruned, z1=z1, z2=None)))
    print(flops.table({"dense": dense, "pruned": pruned}))
    print(f"\nMeasured on {s.device}, {torch.get_num_threads()} threads; in brackets what FLOPs and formulas predict\n"
          "batch part     dense ms  pruned ms      speed-up      dense MB        pruned MB")
    for batch in (1, 8):
        mel = torch.randn(batch, model.dims.n_mels, 2 * model.dims.n_audio_ctx, device=s.device)
        measured = flops.measure([dense, pruned], mel)
        predicted = [flops.memory(m, 27, 4, batch, n_prompt=4) for m in (dense, pruned)]
        for part, work in (("encoder", flops.encoder), ("greedy", lambda m: flops.greedy(m, 4, 24))):
            ms = [1000 * row[f"{part}_seconds"] for row in measured]
            mb = [(row[f"{part}_peak"] or 0) / 1e6 for row in measured]
            said = [(row["encoder_fused"] if part == "encoder" else row["kv_cache"] + row["decoder_fused"]) / 1e6 for row in predicted]
            print(f"{batch:5} {part:<8}{ms[0]:9.1f}{ms[1]:11.1f}{ms[0] / ms[1]:7.2f} ({work(dense) / work(pruned):.2f})"
                  f"{mb[0]:9.1f} ({said[0]:5.1f}){mb[1]:8.1f} ({said[1]:5.1f})")


def run(s: Settings) -> None:
    """The method, top to bottom: load, fine-tune, prune, recover, compare, report."""
    model = load_model(s)
    if s.bench:
        return bench(model, s)
    tokenizer = get_tokenizer(True, num_languages=model.num_languages, language=s.language, task="transcribe")
    folder = data_folder(s)
    clips = Clips(folder, s.split, model, tokenizer, s.limit)
    if s.evaluate:
        return print(table(compare({Path(s.model).stem[:8]: model}, clips, s)[0]))
    train = Clips(folder, "train", model, tokenizer, s.limit)
    start_folder(s)
    torch.manual_seed(s.seed)

    clock = [time.time()]
    dense = copy.deepcopy(model)
    fine_tune(dense, train, s, "dense: fine-tune")
    imp = copy.deepcopy(dense)
    fine_tune(dense, train, recovery(s), "dense: go on")
    clock.append(time.time())

    pruned = copy.deepcopy(model)
    plan = tspar(pruned, train, s)
    clock.append(time.time())

    left = flops.parameters(pruned)["blocks_nonzero"] / flops.parameters(model)["blocks"]
    iterative_magnitude(imp, train, s, 1 - left)
    clock.append(time.time())

    models = {"original": model, "dense": dense, "tspar": pruned, "imp": imp}
    for name in ("dense", "tspar", "imp"):
        prune.save(models[name], Path(s.out) / f"{name}.pt")
    rows, texts = compare(models, clips, s)
    clock.append(time.time())

    say(s, f"\n{histogram(plan)}\n\n{table(rows)}\n")
    for said, heard in list(zip(clips.sentences, texts["tspar"]))[:3]:
        say(s, f"said   {said}\ntspar  {heard}")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "whisper": whisper.__version__}
    seconds = dict(zip(("dense", "tspar", "imp", "measure"), np.diff(clock).round(1).tolist()))
    report = {"models": rows, "settings": asdict(s), "seed": s.seed, "versions": versions, "seconds": seconds,
              "plan": str(plan).split("\n"), "transcripts": texts}
    write(Path(s.out) / "report.json", json.dumps(report, ensure_ascii=False, indent=1))
    if s.plot:
        draw(plan, Path(s.out) / "plot.png")
    say(s, f"\nin {s.out}: report.json, log.txt, dense.pt, tspar.pt, imp.pt   ({sum(seconds.values()):.0f} s)")


def main(argv: list[str] | None = None) -> int:
    """0 when done; 2 and one line on stderr for bad input."""
    try:
        run(settings(argv))
    except Stop as stop:
        print(f"run.py: {' '.join(str(stop).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
