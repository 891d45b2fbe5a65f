"""run.py: the data it reads, the numbers it reports, the whole run with a handful of steps, and bad input."""
import copy
import importlib
import json
import os
import random
import re
import resource
import shlex
import signal
import socket
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import whisper
from whisper.decoding import DecodingTask

import make_nano
import prune
import run
from rehearse import common_voice, rehearse

ROOT = Path(run.__file__).resolve().parent
MINI, NANO = ROOT / "tests/data/mini_hi", ROOT / "tests/data/nano.pt"
TOKENIZER = whisper.tokenizer.get_tokenizer(True, language="hi", task="transcribe")
QUICK = ["--model", "toy", "--steps", "3", "--recovery-steps", "3", "--limit", "8", "--batch", "4", "--cuts", "2"]


def unmeasured(models, *_, **__) -> list[dict]:
    """Stands for flops.measure, which has tests of its own and takes seconds."""
    return [{"encoder_seconds": 0.1}] * len(models)


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """--model toy, a file: the first layer of nano's encoder and decoder. What it hears makes no sense; what it is
    trained, pruned and interrupted by does, in less than half of nano's time."""
    nano, path = prune.load(NANO), tmp_path_factory.mktemp("models") / "toy.pt"
    model = whisper.model.Whisper(run.replace(nano.dims, n_audio_layer=1, n_text_layer=1))
    model.load_state_dict({name: nano.state_dict()[name] for name in model.state_dict()})
    prune.save(model, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.EMBEDDED, "toy", path)
        yield path


@pytest.fixture(autouse=True)
def without_latency(monkeypatch):
    """In every test here; the run that fixture `finished` makes comes before it and is measured."""
    monkeypatch.setattr(run.flops, "measure", unmeasured)


@pytest.fixture(scope="module")
def nano():
    """nano as stock whisper loads it."""
    return whisper.load_model(str(NANO), device="cpu").eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run of a few steps, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    assert run.main([*QUICK, "--out", str(out)]) == 0
    return out


# ---- data

@pytest.mark.parametrize("rate", [32000, 44100, 48000])
def test_resampling_is_exact_below_8_khz(rate, tmp_path):
    """40 tones below 7 kHz, faded, in two unequal channels: their mean, as if it had been sampled at 16 kHz."""
    rng = np.random.default_rng(0)
    tones = [*zip(rng.uniform(60, 7000, 40), rng.uniform(0, 6, 40))]

    def sound(rate):
        t = np.arange(2 * rate) / rate
        return np.sin(np.pi * t / 2) ** 2 * sum(np.sin(2 * np.pi * f * t + phase) for f, phase in tones) / 40
    soundfile.write(tmp_path / "tones.wav", np.stack([2 * sound(rate), 0 * sound(rate)], 1), rate, subtype="FLOAT")
    assert np.abs(run.read_audio(tmp_path / "tones.wav") - sound(16000)).max() < 1e-6


def test_batch_predicts_the_text_and_its_end(nano):
    """Every text token and the final end-of-text is a target once; prompt and padding never are. The prompt is the one
    that decoding begins with."""
    s = run.completed(run.settings(["--limit", "5"]), nano)
    clips, prompt = run.Clips(nano, "dev", s), DecodingTask(nano, run.decoding(nano, s)).initial_tokens
    mels, inputs, targets = clips.collate([clips[i,] for i in range(5)])
    assert mels.shape == (5, 80, 300) and inputs.shape == targets.shape
    for row_in, row_out, text in zip(inputs.tolist(), targets.tolist(), clips.sentences):
        spoken = TOKENIZER.encode(" " + text)
        assert [t for t in row_out if t != -100] == spoken + [TOKENIZER.eot]
        assert row_in[: 4 + len(spoken)] == [*prompt] + spoken
        assert row_out[3] == spoken[0], "the last token of the prompt predicts the first of the text"


@pytest.mark.parametrize("cut", [False, True])
def test_objective_is_the_stock_softmax(cut):
    """Cross-entropy of stock logits, -inf where --vocabulary data has cut a row: 51,865 wide, summed over the
    targets."""
    model = prune.load(NANO)
    clips, s = run.Clips(model, "dev", run.Settings(limit=4)), run.Settings(vocabulary="data", device="cpu")
    mels, inputs, targets = clips.collate([clips[i,] for i in range(4)])
    with torch.no_grad():
        logits = model(mels, inputs)
        if cut:
            run.prepared(model, clips, s)
            assert len(model.decoder.token_embedding.weight) < 2000
            gone = torch.ones(51865, dtype=torch.bool).index_fill(0, model.decoder.kept_ids, False)
            logits[..., gone] = -torch.inf
        stock = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        assert torch.allclose(run.objective(model, (mels, inputs, targets), s), stock, rtol=1e-5)


@pytest.mark.parametrize("sentences, other, foreign", [
    (["cat the hat", "one"], " the coat then etch a tact", " dog The हाथ"),
    (["हम काम करते", "थे"], " हमे थके मत रहे", " cat dog")])         # a token may be two of a letter's three bytes
def test_vocabulary_of_letters(sentences, other, foreign):
    """--vocabulary letters keeps every token that train's letters write, so any word of them reads as it always did;
    data keeps those of train's sentences alone; the 256 bytes and what is special stay in both."""
    encode = whisper.tokenizer.get_tokenizer(True).encode
    words = {id for text in sentences for t in (text, " " + text) for id in encode(t)}
    kept = {}
    for name in ("data", "letters"):
        model = run.prepared(prune.load(NANO), SimpleNamespace(sentences=sentences), run.Settings(vocabulary=name))
        kept[name] = {*model.decoder.kept_ids.tolist()}
    assert kept["data"] == words | {*range(256), *range(50257, 51865)}
    assert kept["data"] < kept["letters"] and kept["letters"].issuperset(encode(other))
    assert not any(kept["letters"].issuperset(encode(f" {word}")) for word in foreign.split())
    assert not kept["data"].issuperset(encode(other))


def small_run(tmp_path: Path, *flags: str) -> tuple:
    """The toy as run prepares it, its settings with a folder for states, and a few train clips."""
    model = prune.load(run.EMBEDDED["toy"])
    (tmp_path / "state").mkdir(parents=True)
    s = run.completed(run.settings([*flags, "--out", str(tmp_path)]), model)
    clips = run.Clips(model, "train", run.Settings(limit=12))
    return run.prepared(model, clips, s), s, clips


def test_curvature_is_the_mean_squared_gradient(tmp_path, monkeypatch):
    """Three steps: (1 - 0.98) (0.98^2 a^2 + 0.98 b^2 + c^2) / (1 - 0.98^3) of the clipped gradients that were
    recorded."""
    model, s, clips = small_run(tmp_path, "--steps", "3", "--batch", "2")
    gradients, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (
        gradients.append({name: p.grad.double().clone() for name, p in model.named_parameters() if p.requires_grad}),
        step(self, *a)))
    phase = run.fine_tune(model, clips, s, "test")
    assert phase.curvature.keys() == gradients[0].keys() and phase.step == 3
    for name, found in phase.curvature.items():
        a, b, c = (g[name].square() for g in gradients)
        mean = 0.02 * (0.98 ** 2 * a + 0.98 * b + c) / (1 - 0.98 ** 3)
        assert torch.allclose(found.double(), mean, rtol=1e-4, atol=1e-5 * mean.max().item()), name


def test_curvature_is_that_of_the_loss_alone(tmp_path):
    """A penalty in the loss has gradients of its own; what pass 1 compares are those of the cross-entropy: with a rate
    of 0, where weights stay, the same as without a penalty."""
    found = []
    for flags in ((), ("--penalty", "loss")):
        model, s, clips = small_run(tmp_path / str(len(flags)), "--steps", "3", "--batch", "2", "--lr", "0", *flags)
        penalty = run.SparseGroupLasso(prune.units(model), 30, 30, 30, 30, relative=True) if flags else None
        found.append(run.fine_tune(model, clips, s, "test", penalty).curvature)
    for name, h in found[0].items():
        assert torch.allclose(found[1][name], h, rtol=1e-4, atol=1e-5 * h.max().item()), name


def test_augment_repeats_with_its_generator():
    """The same generator state gives the same mel; only whole bands and stretches are flattened."""
    mel = torch.randn(80, 300, generator=torch.Generator().manual_seed(0))
    first, second = (run.augment(mel, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, mel)
    assert (first == first.mode().values.mode().values).float().mean() < 0.5
    for seed in range(20):
        assert run.augment(torch.ones(80, 2), np.random.default_rng(seed)).shape == (80, 2), "narrower than a stretch"


def test_warped_stretches_both_axes():
    """Of a plane it makes the plane with other slopes, up to where the stretched one ends."""
    mel = torch.arange(80.0)[:, None] + 1000 * torch.arange(300.0)
    mels, frames = np.random.default_rng(5).uniform((0.9, 1.0), (1.1, 1.15))
    warped = make_nano.warped(mel, np.random.default_rng(5))
    assert warped[20, 100] == pytest.approx(20 * mels + 100_000 * frames, abs=0.1)
    assert warped[0, -1] == 299_000 and frames > 1


def test_test_sentences_are_not_in_train(nano):
    """No sentence of dev or test is spelled, after normalization, like one of train: a score is no memory test."""
    split = {name: {run.normalize(s) for s in run.Clips(nano, name, run.Settings()).sentences}
             for name in ("train", "dev", "test")}
    assert [len(split[name]) for name in ("train", "dev", "test")] == [1400, 240, 240]
    assert not split["train"] & (split["test"] | split["dev"]) and not split["dev"] & split["test"]


# ---- scores

def test_score_by_hand():
    """1 wrong word of 4 and 0 of 1 is 1 / 5 of the corpus, not the mean of 25% and 0%; one-word lines count."""
    scores = run.score(["एक दो तीन चार", "हाँ"], ["एक दो तीन पाँच", "हाँ"], seed=0)
    assert scores["wer"] == pytest.approx(20)
    assert scores["wer_ci95"][0] == 0 and scores["wer_ci95"][1] == 25


def test_interval_by_hand():
    """Two clips of 10 words, 1 and 3 errors: drawn anew, the rates are 10, 20 or 30%. The same error in all: no
    width."""
    assert run.interval([1, 3], [10, 10], 0) == [10, 30]
    assert run.interval([2] * 50, [10] * 50, 0) == [20, 20]


def test_diagnosis_by_hand():
    """One error more in each clip of 100 words is a loss though the single intervals overlap; the same errors
    elsewhere are none, one less is a gain."""
    errors, words = np.arange(101) % 11, [100] * 101
    rows = [{"name": "dense", "wer": 5.0, "errors": errors, "words": words},
            {"name": "tspar", "wer": 6.0, "errors": errors + 1, "words": words}]
    plan = SimpleNamespace(removed=lambda: (5, 100))
    assert max(map(len, run.diagnosis(rows, plan).split("\n"))) <= 80
    said = lambda: " ".join(run.diagnosis(rows, plan).split())
    assert "+1.0 points" in said() and "5%" in said() and "(95% interval +1.0 to +1.0)" in said()
    assert "a loss that shows" in said()
    rows[1] |= {"wer": 5.0, "errors": errors[::-1]}
    assert "no loss" in said() and "a loss" not in said()
    rows[1] |= {"wer": 4.0, "errors": errors - 1}
    assert "better" in said() and "no loss" not in said()


def test_normalizers_keep_vowel_signs():
    """Bengali and Tamil keep their signs, punctuation goes; Hindi spellings meet; English uses Whisper's."""
    assert run.normalizer("bn")("আমি, বাংলা বলি।") == "আমি বাংলা বলি"
    assert run.normalizer("ta")("தமிழ்.") == "தமிழ்"
    assert run.normalizer("hi")("हिन्दी में 2।") == run.normalizer("hi")("हिंदी में दो")
    assert run.normalizer("en")("I can't colour it") == "i can not color it"


def test_stock_whisper_reads_nano(nano):
    """whisper.load_model and whisper.decode, no code of ours in between: 40 test clips at under 10% WER."""
    clips = run.Clips(nano, "test", run.Settings(limit=40))
    mels = torch.stack([whisper.log_mel_spectrogram(whisper.pad_or_trim(run.read_audio(p), 48000))
                        for p in clips.paths])
    options = whisper.DecodingOptions(language="hi", without_timestamps=True, fp16=False)
    texts = [result.text for result in whisper.decode(nano, mels, options)]
    clean = run.normalizer("hi")
    assert run.score([*map(clean, clips.sentences)], [*map(clean, texts)], 0)["wer"] < 10


# ---- the whole run

def test_report_holds_what_the_table_shows(finished):
    """Four models in order, every figure of the table rounded from report.json, tspar smaller and imp sparser."""
    report = json.loads((finished / "report.json").read_text(encoding="utf8"))
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == ["original", "dense", "tspar", "imp"]
    assert run.table(report["models"]) in (finished / "log.txt").read_text(encoding="utf8")
    assert max(map(len, run.table(report["models"]).split("\n"))) <= 80
    dense, tspar, imp = rows["dense"], rows["tspar"], rows["imp"]
    for smaller in ("parameters", "block_parameters", "nonzero", "memory_bytes", "flops"):
        assert tspar[smaller] < dense[smaller]
    for same in ("parameters", "block_parameters", "memory_bytes", "flops"):
        assert imp[same] == dense[same], "zeros save nothing"
    assert abs(imp["block_nonzero"] - tspar["block_nonzero"]) <= 2, "compared at equal sparsity"
    assert report["seed"] == 0 and report["seconds"] > 0


def test_checkpoints_give_the_reported_transcripts(toy, finished, tmp_path):
    """tspar.pt by prune.load, dense.pt expanded by stock whisper.load_model: both say again what report.json
    quotes."""
    report = json.loads((finished / "report.json").read_text(encoding="utf8"))
    s = run.completed(run.settings(["--limit", "8"]), prune.load(toy))
    prune.save(prune.expand(prune.load(finished / "dense.pt")), tmp_path / "stock.pt")
    for name, load, path in (("tspar", prune.load, finished / "tspar.pt"),
                             ("dense", whisper.load_model, tmp_path / "stock.pt")):
        model = load(str(path), "cpu").eval()
        assert run.transcribe(model, run.Clips(model, "test", run.Settings(limit=8)), s) == report["transcripts"][name]


def test_other_ways_through(tmp_path, capsys):
    """Columns instead of units, the proximal step, a target: half of the blocks is gone, within evening."""
    out = tmp_path / "columns"
    assert run.main([*QUICK, "--groups", "column", "--penalty", "prox", "--target", "0.5", "--out", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads((out / "report.json").read_text(encoding="utf8"))["models"]}
    assert abs(rows["tspar"]["block_parameters"] / rows["dense"]["block_parameters"] - 0.5) < 0.03


def test_the_token_embedding_is_not_trained(toy, finished):
    """Its rows are the checkpoint's, bit for bit, in all three models; what is beside them has moved."""
    first = prune.load(toy)
    for name in ("dense", "tspar", "imp"):
        model = prune.load(finished / f"{name}.pt")
        rows = first.decoder.token_embedding.weight[model.decoder.kept_ids]
        assert torch.equal(model.decoder.token_embedding.weight, rows)
        assert not torch.equal(model.decoder.ln.weight, first.decoder.ln.weight)


def test_zeros_stay_zero_in_recovery(tmp_path):
    """Weights that are zero when a phase starts are zero when it ends; the others move."""
    model, s, clips = small_run(tmp_path, "--steps", "3", "--batch", "2")
    prune.magnitude_(model, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2}
    run.fine_tune(model, clips, s, "recover")
    after = dict(model.named_parameters())
    assert all((after[name][old == 0] == 0).all() and not torch.equal(after[name], old)
               for name, old in before.items())


def test_without_penalty_the_first_phase_is_shared(tmp_path):
    """nano, as `python run.py` takes it, without penalty: tspar begins with what dense is after its first phase, which
    is trained once; and nano as it came hears the clips."""
    out, began, tune = tmp_path / "out", {}, run.fine_tune
    with pytest.MonkeyPatch.context() as patch:
        def recorded(model, train, s, title, penalty=None):
            began[title] = penalty, model.encoder.conv1.weight.detach().clone()
            phase = tune(model, train, s, title, penalty)
            began[f"{title}, ended"] = penalty, model.encoder.conv1.weight.detach().clone()
            return phase
        patch.setattr(run, "fine_tune", recorded)
        assert run.main([*QUICK, "--model", "nano", "--out", str(out)]) == 0
    assert "tspar: fine-tune" not in began and not any(penalty for penalty, _ in began.values())
    assert torch.equal(began["tspar: recover"][1], began["dense: fine-tune, ended"][1])
    assert not torch.equal(began["tspar: recover"][1], began["dense: go on, ended"][1])
    lines = (out / "log.txt").read_text(encoding="utf8")
    assert lines.count("fine-tune  ") == 1
    assert json.loads((out / "report.json").read_text(encoding="utf8"))["models"][0]["wer"] < 10


def test_estimate_comes_before_training(toy, tmp_path, capsys, monkeypatch):
    """Minutes and GB are printed before the first step of the first phase, and the model has not moved by then. At a
    second a step 12 steps and 300 fits on 8 clips, of which a step has 4, take 612 s."""
    def stop(model, *_):
        assert all(p.grad is None for p in model.parameters())
        assert all(map(torch.equal, model.encoder.parameters(), prune.load(toy).encoder.parameters()))
        raise run.Stop("first step")
    monkeypatch.setattr(run, "fine_tune", stop)
    measured = lambda call, **_: [(call(), seconds)[1] for seconds in (30.0, 0.5, 1.0)]
    monkeypatch.setattr(run.timeit, "repeat", measured)
    assert run.main([*QUICK, "--cuts", "300", "--out", str(tmp_path / "out")]) == 2
    out = capsys.readouterr().out
    assert re.search(r"12 steps of 4 clips, 1\.00 s each.*about 10 min,\n[\d.]+ GB of memory", out, re.S)
    assert max(map(len, out.split("\n"))) <= 80


def test_window(tmp_path, capsys):
    """--window 2: longer clips are left out and counted; the checkpoints' dims say it, and they can be used as
    ever."""
    out = tmp_path / "out"
    arguments = ["--window", "2", "--vocabulary", "data"]
    assert run.main([*QUICK, "--limit", "16", *arguments, "--out", str(out)]) == 0
    seconds = [soundfile.info(path).duration
               for path in run.Clips(prune.load(NANO), "train", run.Settings(limit=16)).paths]
    longer = sum(x > 2 for x in seconds)
    assert 0 < longer < 16 and f"{16 - longer} clips   left out: {longer} over 2 s" in capsys.readouterr().out
    model = prune.load(out / "tspar.pt")
    assert model.dims.n_audio_ctx == 100 == len(model.encoder.positional_embedding)
    assert run.main(["--model", str(out / "tspar.pt"), "--evaluate", "--limit", "8"]) == 0
    assert re.search(r"^tspar +0\.\d+ ", capsys.readouterr().out, re.M)
    soundfile.write(tmp_path / "a.wav", run.read_audio(next((MINI / "clips").iterdir())), 16000)
    assert run.main(["--model", str(out / "tspar.pt"), "--transcribe", str(tmp_path / "a.wav")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.wav'}\t")


def test_english_only_checkpoint(tmp_path, monkeypatch):
    """A .en model knows no languages: its prompt is whisper's own, and no id of the multilingual vocabulary is fed."""
    dims = whisper.model.ModelDimensions(80, 150, 64, 2, 1, 51864, 64, 64, 2, 1)
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)
    prune.save(model, tmp_path / "tiny.en.pt")
    prompt, fed = [50257, 50362], []
    tokenizer = whisper.tokenizer.get_tokenizer(False)
    assert [*tokenizer.sot_sequence_including_notimestamps] == prompt
    forward, collate = whisper.model.TextDecoder.forward, run.Clips.collate
    monkeypatch.setattr(whisper.model.TextDecoder, "forward",
                        lambda self, x, *a, **k: (fed.append(x), forward(self, x, *a, **k))[1])
    made = []
    monkeypatch.setattr(run.Clips, "collate", lambda self, items: (made.append(collate(self, items)), made[-1])[1])
    monkeypatch.setattr(run, "CALIBRATION", 8)
    decoding = run.decoding                      # random weights would never come to an end
    monkeypatch.setattr(run, "decoding", lambda *given: run.replace(decoding(*given), sample_len=2))
    assert run.main([*QUICK, "--model", str(tmp_path / "tiny.en.pt"), "--language", "en", "--target", "0.3",
                     "--precision", "fp32",
                     "--workers", "0", "--lr", "1e-3", "--out", str(tmp_path / "out")]) == 0
    for _, inputs, targets in made:
        assert inputs[:, :2].tolist() == [prompt] * len(inputs)
        assert (targets[:, 0] == -100).all() and (targets[:, 1] >= 0).all()
        assert not ((inputs[:, 2:] > tokenizer.eot)).any(), "text and its end, no special id of any vocabulary"
    starts = {tuple(x[0, :2].tolist()) for x in fed if x.shape[1] > 1}
    assert starts == {tuple(prompt)} and max(x.max().item() for x in fed) < dims.n_vocab
    assert run.main(["--model", str(tmp_path / "tiny.en.pt"), "--out", str(tmp_path / "hi")]) == 2, "Hindi it cannot"


@pytest.mark.parametrize("n_vocab, language, start", [(51865, "hi", 4), (51864, "en", 2)])
def test_a_transcript_may_fill_the_context(n_vocab, language, start):
    """A model that never ends writes one token more than positions after the prompt, as training allows, and no
    more."""
    dims = whisper.model.ModelDimensions(80, 50, 16, 1, 1, n_vocab, 20, 16, 1, 1)
    model = whisper.model.Whisper(dims).eval()
    torch.nn.init.zeros_(model.decoder.positional_embedding)
    forward, widest = model.decoder.forward, []

    def endless(tokens, audio, kv_cache=None):
        logits = forward(tokens, audio, kv_cache=kv_cache)
        widest.append(tokens.shape[-1])
        return torch.zeros_like(logits).index_fill_(-1, torch.tensor([1000]), 9.0)
    model.decoder.forward = endless
    s = run.Settings(language=language, device="cpu")
    result = whisper.decode(model, torch.zeros(1, 80, 100), run.decoding(model, s))[0]
    assert result.tokens == [1000] * (20 - start + 1)
    assert len(widest) == 20 - start + 1 and widest[0] == start and widest[0] + len(widest) - 1 == 20


def test_common_voice_folder(tmp_path, monkeypatch, capsys):
    """48 kHz mp3 in a Common Voice folder, found by $CV11_HI, is read and scored; nano understands it."""
    monkeypatch.setenv("CV11_HI", str(common_voice(tmp_path / "cv", rows=6)))
    assert run.main(["--data", "cv11_hi", "--evaluate"]) == 0
    wer = float(capsys.readouterr().out.split("\n")[4].split()[7])
    assert wer < 30


# ---- interrupted, spread out, cut up: the same result

def in_child(arguments: list[str], before=lambda: None, save_every: float = -1) -> int:
    """run.main in a forked process, one thread, after before(); its pid. Equal bits need equal threads."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        run.SAVE_EVERY, run.CALIBRATION, run.announce = save_every, 40, lambda *_: None
        run.flops.measure = unmeasured
        before()
        code = run.main(arguments)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model_state_dict"]


def same_bits(a: Path, b: Path) -> bool:
    """All three models and all transcripts of two runs are equal."""
    texts = [json.loads((folder / "report.json").read_text(encoding="utf8"))["transcripts"] for folder in (a, b)]
    return texts[0] == texts[1] and all(
        first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        for first, second in ((weights(a / f"{name}.pt"), weights(b / f"{name}.pt"))
                              for name in ("dense", "tspar", "imp")))


def quick(penalty: str, out: Path) -> list[str]:
    """A run of a few steps that prunes by the curvature of its first phase: no bit of it may get lost."""
    return [*QUICK, "--importance", "curvature", "--penalty", penalty, "--out", str(out)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """By penalty, the folder of a run of 3 + 3 steps on one thread that was never interrupted."""
    folders = {penalty: tmp_path_factory.mktemp("runs") / penalty for penalty in ("none", "loss")}
    assert [*map(ended, [in_child(quick(*run)) for run in folders.items()])] == [0, 0]         # at the same time
    return folders


def kill_at(call: int):
    """Kill the process, without warning, in its call-th backward pass."""
    calls, backward = [], run.backward

    def counted(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(*arguments)
    run.backward = counted


def test_killed_in_every_phase_and_resumed(uninterrupted, tmp_path):
    """Each time a run has come two steps further it is killed, in every phase: the end is the same, bit for bit. Two
    runs side by side: the second has a penalty, so a phase more."""
    runs = {penalty: quick(penalty, tmp_path / penalty) for penalty in uninterrupted}
    phases = {penalty: set() for penalty in runs}
    children = [in_child(runs["none"], lambda: kill_at(2)), in_child(runs["loss"], lambda: kill_at(3))]
    assert [*map(ended, children)] == [-signal.SIGKILL] * 2
    for _ in range(20):
        for penalty in runs:
            phases[penalty] |= {path.name for path in (tmp_path / penalty / "state").glob("*.pt")}
        children = {penalty: in_child([*flags, "--resume"], lambda: kill_at(3)) for penalty, flags in runs.items()}
        codes = {penalty: ended(pid) for penalty, pid in children.items()}
        assert {*codes.values()} <= {0, -signal.SIGKILL}
        runs = {penalty: flags for penalty, flags in runs.items() if codes[penalty]}
    assert not runs and [*map(len, phases.values())] == [5, 6]
    for penalty, folder in uninterrupted.items():
        assert same_bits(folder, tmp_path / penalty) and not (tmp_path / penalty / "state").exists()


def test_no_partial_file_after_random_kills(uninterrupted, tmp_path):
    """Seven kills at random moments: every file that has its final name is whole each time, and the run ends the
    same."""
    out, rng, kills = tmp_path / "out", random.Random(0), 0
    arguments = quick("loss", out)
    while kills < 7:
        pid = in_child([*arguments, "--resume"] if (out / "settings.json").exists() else [*arguments, "--overwrite"])
        time.sleep(rng.uniform(0.15, 0.7))
        os.kill(pid, signal.SIGKILL)
        kills += ended(pid) == -signal.SIGKILL
        for path in out.rglob("*"):
            if path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf8"))
        if (out / "report.json").exists() and not (out / "state").exists():
            assert same_bits(uninterrupted["loss"], out)
            (out / "settings.json").unlink()               # begin again, until ten are reached
    resume = "--resume" if (out / "settings.json").exists() else "--overwrite"
    assert ended(in_child([*arguments, resume])) == 0 and same_bits(uninterrupted["loss"], out)


def test_stopped_and_resumed(uninterrupted, tmp_path):
    """SIGTERM, later Ctrl-C, in the middle of a step: exit code 130, what was saved last stays, and --resume ends the
    same; so it does where nothing had been saved."""
    out = tmp_path / "out"
    arguments = quick("none", out)

    def in_second_step(number: int) -> None:
        calls, backward = [], run.backward
        run.backward = lambda *a: (calls.append(1), os.kill(os.getpid(), number) if len(calls) == 2 else None,
                                   backward(*a))[2]
    for flags, number, save_every, step in (
            ([], signal.SIGTERM, 1000, None), (["--resume"], signal.SIGTERM, -1, 1),
            (["--resume"], signal.SIGINT, -1, 2)):
        assert ended(in_child([*arguments, *flags], lambda: in_second_step(number), save_every)) == 130
        path = out / "state/dense-fine-tune.pt"
        assert (torch.load(path, weights_only=True)["step"] if path.exists() else None) == step
    assert ended(in_child([*arguments, "--resume"], save_every=1000)) == 0 and same_bits(uninterrupted["none"], out)


def test_write_renames_a_whole_file(tmp_path):
    """While the new file fills, and when that fails, the old one is there whole; then the very file that was filled
    takes its name."""
    path, inodes = tmp_path / "x.json", []
    path.write_bytes(b"old")

    def fill(file):
        file.write(b"new")
        file.flush()
        inodes.append(os.fstat(file.fileno()).st_ino)
        assert path.read_bytes() == b"old"
        if len(inodes) == 1:
            raise OSError("disk full")
    with pytest.raises(OSError):
        run.write(path, fill)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    run.write(path, fill)
    assert path.read_bytes() == b"new" and path.stat().st_ino == inodes[1] and [*tmp_path.iterdir()] == [path]


def test_full_disk_leaves_the_last_state(tmp_path, capfd):
    """When a state cannot be written the run stops with one line and exit code 1; the state before it is whole."""
    out = tmp_path / "out"

    def disk_fills_up():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        write, calls = run.write, []

        def full(path, fill):
            calls.append(path)
            if len(calls) == 3:                             # settings, first step, second step
                resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))
            write(path, fill)
        run.write = full
    assert ended(in_child([*QUICK, "--out", str(out)], disk_fills_up)) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "--resume" in err and "Traceback" not in err
    assert [path.name for path in (out / "state").iterdir()] == ["dense-fine-tune.pt"]
    assert torch.load(out / "state/dense-fine-tune.pt", weights_only=True)["step"] == 1


def test_loss_that_is_not_a_number(toy, tmp_path, capsys):
    """A weight that is NaN from the start: one line, exit code 1, no state of the step that failed."""
    broken = prune.load(toy)
    broken.encoder.conv1.bias.data[0] = float("nan")
    prune.save(broken, tmp_path / "nan.pt")
    assert run.main([*QUICK, "--model", str(tmp_path / "nan.pt"), "--out", str(tmp_path / "out")]) == 1
    assert re.fullmatch(r"run.py: the loss is nan.*\n", capsys.readouterr().err)
    assert not list((tmp_path / "out/state").iterdir())


def test_a_killed_decoding_process_is_one_line(tmp_path, capfd):
    """A DataLoader process that dies takes the run down with one line and exit code 1."""
    def die():
        run.read_audio = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    assert ended(in_child([*QUICK, "--workers", "1", "--out", str(tmp_path / "out")], die)) == 1
    err = [line for line in capfd.readouterr().err.split("\n") if line.startswith("run.py: ")]
    assert len(err) == 1 and "worker" in err[0]


GENTLE = ["--cuts", "2", "--lr", "3e-5", "--steps", "3", "--recovery-steps", "3", "--limit", "12"]


def keep_curvature() -> None:
    """Let every phase write its curvature into the run's folder."""
    tune = run.fine_tune

    def kept(model, train, s, title, penalty=None):
        phase = tune(model, train, s, title, penalty)
        if run.RANK == 0:
            torch.save(phase.curvature, Path(s.out) / f"curvature of {title.replace(':', '')}.pt")
        return phase
    run.fine_tune = kept


def test_two_processes_are_one_with_the_doubled_batch(toy, tmp_path):
    """Two gloo processes of 4 clips, told by torchrun's variables who they are, end with the weights and curvature of
    one process with 8, and its report. Heads as they are: where they are turned, rounding alone may choose another
    axis of as much use."""
    flags = [*GENTLE, "--model", str(toy), "--importance", "curvature", "--penalty", "loss", "--turn-above", "1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def joined(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
        importlib.reload(run)                    # reads them
        run.CALIBRATION, run.announce = 40, lambda *_: None
        keep_curvature()
    of_two = [*flags, "--batch", "4", "--out", str(tmp_path / "two")]
    two = [in_child(of_two, partial(joined, rank)) for rank in (0, 1)]
    one = in_child([*flags, "--batch", "8", "--out", str(tmp_path / "one")], keep_curvature)
    assert [*map(ended, (*two, one))] == [0, 0, 0]
    for name, apart, flipped in (("dense", 1e-5, 0), ("tspar", 1e-4, 10)):         # refit_ solves parts of it anew
        one, two = weights(tmp_path / "one" / f"{name}.pt"), weights(tmp_path / "two" / f"{name}.pt")
        more = sum(((one[key] - two[key]).abs() > apart).sum().item() for key in one)
        assert more <= flipped, "but for a few weights at the very threshold of pass 2"
    for title in ("dense fine-tune", "tspar fine-tune"):
        one, two = (torch.load(tmp_path / which / f"curvature of {title}.pt", weights_only=True)
                    for which in ("one", "two"))
        assert one.keys() == two.keys() == dict(prune.load(toy).named_parameters()).keys() - {prune.ROWS}
        for name in one:
            assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4 * one[name].max().item()), name
    reports = [json.loads((tmp_path / which / "report.json").read_text(encoding="utf8")) for which in ("one", "two")]
    assert reports[0]["transcripts"]["dense"] == reports[1]["transcripts"]["dense"], "sharded, gathered, in order"


def test_accumulation_changes_no_gradient(tmp_path):
    """Four batches of 2 take the step of one batch of 8."""
    models = []
    for i, extra in enumerate((["--batch", "8"], ["--batch", "2", "--accumulate", "4"])):
        model, s, clips = small_run(tmp_path / str(i), *GENTLE, *extra)
        run.fine_tune(model, clips, s, "test")
        models.append(model)
    assert max((a - b).abs().max().item() for a, b in zip(*(m.parameters() for m in models))) < 1e-5


def test_activations_in_bf16_weights_in_float32(tmp_path):
    """Under autocast the model trains, stays float32, and is close to the float32 step but not equal to it."""
    models = []
    for precision in ("fp32", "bf16"):
        model, s, clips = small_run(tmp_path / precision, *GENTLE, "--batch", "8", "--precision", precision)
        run.fine_tune(model, clips, s, "test")
        models.append(model)
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models)
    assert b.dtype == torch.float32 and not torch.equal(a, b) and (a - b).abs().max() < 1e-3


def test_learning_rate_by_hand(tmp_path, monkeypatch):
    """Ten steps: two of warm-up (a fifth), then down a straight line that would reach zero with the eleventh."""
    model, s, clips = small_run(tmp_path, "--steps", "10", "--lr", "8e-4", "--batch", "1")
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a)))
    run.fine_tune(model, clips, s, "test")
    assert rates == pytest.approx([4e-4, 8e-4, 8e-4, 7e-4, 6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4])


def test_penalty_sets_in_over_the_first_half(tmp_path, monkeypatch):
    """Ten steps: its strength is 0.2, 0.4, ... of the full one, which the fifth step and all later ones have."""
    model, s, clips = small_run(tmp_path, "--steps", "10", "--batch", "1", "--penalty", "loss")
    penalty, scales = run.SparseGroupLasso(prune.units(model), 1, 1, 1, 1), []
    monkeypatch.setattr(penalty, "add_gradient_", lambda: scales.append(penalty.scale))
    run.fine_tune(model, clips, s, "test", penalty)
    assert scales == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 6)


def test_cuts_come_nearer_to_the_target(tmp_path, monkeypatch):
    """Three cuts ask for 1 - (2/3)^2, 1 - (1/3)^2 and all of what one would remove; each is fitted to the first
    model."""
    model, s, clips = small_run(tmp_path, "--target", "0.5", "--importance", "curvature", "--cuts", "3",
                                "--turn-above", "1")
    before, asked, two_pass, refit_ = copy.deepcopy(model), [], prune.two_pass, prune.refit_
    monkeypatch.setattr(prune, "two_pass", lambda *a, **k: (asked.append(k.get("share")), two_pass(*a, **k))[1])
    def fitted(model, other, clips):
        asked.append(all(map(torch.equal, other.parameters(), before.parameters())))
        return refit_(model, other, clips)
    monkeypatch.setattr(prune, "refit_", fitted)
    curvature = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    share = run.prune_(model, clips, s, curvature).share
    assert share == pytest.approx(0.5, abs=0.02)
    part = lambda x: pytest.approx(x * share, abs=0.01)
    assert asked == [0.5, part(5 / 9), True, part(8 / 9), True, part(1), True, None]


@pytest.mark.parametrize("above, importance, turned", [(0.5, "curvature", 0), (0.4, "curvature", 1), (0, "norm", 0)])
def test_heads_are_turned_where_more_than_that_goes(tmp_path, monkeypatch, above, importance, turned):
    """Before the first cut, on a third of the clips that refit_ looks at; pass 1 decides by the curvature there."""
    model, s, clips = small_run(tmp_path, "--target", "0.5", "--importance", importance, "--cuts", "1",
                                "--turn-above", str(above))
    given, balance_, whole = [], prune.balance_, copy.deepcopy(model)
    monkeypatch.setattr(prune, "balance_", lambda *a: given.append(a) or balance_(*a))
    h = curvature = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    decided = lambda share: prune.two_pass(whole, share=share, **({} if importance == "norm" else
                                                                  dict(floor=0, curvature=h)))
    share = decided(0.5).share                # of a single cut, in steps of 0.4%
    plan = run.prune_(model, clips, s, curvature)
    assert len(given) == turned
    for _, some, known in given:
        assert known is curvature and len(some) == -(-min(len(clips), run.CALIBRATION) // 24)         # 8 a batch
        h = balance_(whole, some, curvature)
    same = decided(share)
    assert all(torch.equal(keep, same.keep[name]) for name, keep in plan.keep.items())


def test_all_processes_go_on_from_the_first_ones_weights(tmp_path, monkeypatch):
    """Axes that come out of a decomposition could differ, between GPUs say, in sign: gradients would not add up."""
    model, s, clips = small_run(tmp_path, "--target", "0.6", "--importance", "norm")
    monkeypatch.setattr(run, "WORLD", 2)
    monkeypatch.setattr(run.dist, "broadcast", lambda x, source: x.fill_(7 + source))
    run.prune_(model, clips, s, {})
    assert all((p == 7).all() for p in model.parameters())


def test_pass_two_comes_last(tmp_path):
    """prune_ removes what pass 1 names, fits the readers to the model before, and zeroes by what the weights are
    then."""
    model, s, clips = small_run(tmp_path, "--target", "0.5", "--importance", "curvature", "--z2", "-0.5", "--cuts",
                                "1", "--turn-above", "1")
    curvature = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    cut, before = copy.deepcopy(model), copy.deepcopy(model)
    prune.remove_(cut, prune.two_pass(cut, z2=None, floor=0, curvature=curvature, share=0.5))
    plan = run.prune_(model, clips, s, curvature)
    gone, of = plan.removed()
    assert gone / of == pytest.approx(0.5, abs=0.02)
    assert plan.settings["z2"] == -0.5 and "z2 -0.5" in str(plan)
    for name, (mean, std, threshold, kept, size) in plan.pass2.items():
        w, old = model.get_parameter(f"{name}.weight"), cut.get_parameter(f"{name}.weight")
        assert threshold == pytest.approx(mean - 0.5 * std) and (w != 0).sum() == kept and size == w.numel()
        assert (w[w != 0].abs() >= threshold).all() and 0.05 < 1 - kept / size < 0.6
        assert torch.equal(w, old * (old.abs() >= threshold)) == (not name.endswith((".out", ".mlp.2")))
    mels, ids, _ = clips.collate([clips[i,] for i in range(8)])
    apart = lambda m: (m.encoder(mels) - before.encoder(mels)).square().mean()
    model_, s_ = copy.deepcopy(before), run.replace(s, z2=-99)
    run.prune_(model_, clips, s_, curvature)
    assert apart(model_) < 0.5 * apart(cut), "fitted to the model before"


def test_pruned_again(finished, tmp_path):
    """A pruned checkpoint goes through it all again: as many of imp's weights are left as of tspar's, the zeros that
    came with it counted; where fewer zeros come out than went in (refit_ fills them), imp gets none. Other words: one
    sentence."""
    again = [*QUICK, "--model", str(finished / "tspar.pt"), "--vocabulary", "full", "--out"]
    children = [in_child([*again, str(tmp_path / "a"), "--target", "0.2"]),
                in_child([*again, str(tmp_path / "b"), "--target", "0", "--z1", "-99", "--z2", "-99"])]
    assert [*map(ended, children)] == [0, 0]
    a, b = ({row["name"]: row["block_nonzero"] for row in json.loads(path.read_text(encoding="utf8"))["models"]}
            for path in (tmp_path / "a/report.json", tmp_path / "b/report.json"))
    assert a["imp"] == pytest.approx(a["tspar"], rel=0.001) and a["tspar"] < 0.9 * a["dense"]
    assert b["imp"] == b["dense"] <= b["tspar"]
    with pytest.raises(run.Stop, match="vocabulary was cut"):
        run.prepared(prune.load(finished / "tspar.pt"), SimpleNamespace(sentences=["Hello wonderful world"]),
                     run.Settings())


def test_a_sentence_may_fill_the_context(tmp_path, capsys, monkeypatch):
    """As many tokens as positions: read, announced, no traceback."""
    folder, text = common_voice(tmp_path / "cv", rows=2), " ".join(["the"] * 124)      # and 4 before, the end after
    assert len(TOKENIZER.encode(" " + text)) == 124 == prune.load(NANO).dims.n_text_ctx - 4
    for split in ("train", "test"):
        head, first, *_ = (folder / f"{split}.tsv").read_text(encoding="utf8").split("\n")
        cells = first.split("\t")
        cells[head.split("\t").index("sentence")] = text
        (folder / f"{split}.tsv").write_text(f"{head}\n" + "\t".join(cells) + "\n", encoding="utf8")
    monkeypatch.setattr(run, "fine_tune", lambda *_, **__: run.need(False, "far enough"))
    assert run.main([*QUICK, "--data", str(folder), "--vocabulary", "full", "--out", str(tmp_path / "out")]) == 2
    assert "far enough" in capsys.readouterr().err


def test_decoding_processes_change_nothing(nano):
    """Two workers deliver the clips that the main process would have made, augmentation included."""
    clips, keys = run.Clips(nano, "train", run.Settings(limit=6, workers=1)), [(0, 0, 7), (3, 0, 8), (5,)]
    for ours, theirs in zip(*(list(run.batches(clips, run.Settings(workers=n, device="cpu"), keys, 2))
                              for n in (0, 2))):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    plain, once, again, elsewhere, other_seed = (clips[key][0]
                                                 for key in ((0,), (0, 0, 7), (0, 0, 7), (0, 0, 8), (0, 1, 7)))
    assert torch.equal(once, again) and not any(torch.equal(once, mel) for mel in (plain, elsewhere, other_seed))


def test_loops_are_decoded_again(nano, monkeypatch):
    """Where a text repeats itself, that clip alone again, warmer each time, until it does not, or to the end."""
    asked, loop, text = [], "और " * 40, "यह एक वाक्य है"

    def decode(model, mels, options):
        asked.append((options.temperature, mels[:, 0, 0].tolist()))
        said = {1: loop if options.temperature < 0.4 else text, 2: loop}
        said = [said.get(int(mel[0, 0]), text) for mel in mels]
        return [whisper.DecodingResult(mel, "hi", text=x, compression_ratio=whisper.utils.compression_ratio(x))
                for mel, x in zip(mels, said)]
    monkeypatch.setattr(run.whisper, "decode", decode)
    mels = torch.arange(3.0)[:, None, None].expand(3, 80, 300)
    assert run.decode(nano, mels, run.Settings(device="cpu")) == [text, text, loop]
    assert asked == [(0, [0, 1, 2]), (0.2, [1, 2]), (0.4, [1, 2]), (0.6, [2]), (0.8, [2]), (1, [2])]


def test_transcribe_files(tmp_path, capsys):
    """A clip, and the same clip twice with a second of silence between, longer than nano's window: the text, once and
    twice."""
    clips = run.Clips(prune.load(NANO), "test", run.Settings(limit=1))
    audio = run.read_audio(clips.paths[0])
    soundfile.write(tmp_path / "once.wav", audio, 16000)
    soundfile.write(tmp_path / "twice.flac", np.concatenate([np.pad(audio, (0, 48000 - len(audio))), audio]), 16000)
    assert run.main(["--transcribe", str(tmp_path / "once.wav"), str(tmp_path / "twice.flac")]) == 0
    once, twice = [line.split("\t")[1] for line in capsys.readouterr().out.strip().split("\n")]
    assert run.normalize(once) == run.normalize(clips.sentences[0]) and twice == f"{once} {once}"


def test_rehearsal_on_tiny(tmp_path, monkeypatch):
    """Tiny's real dimensions, OpenAI's file format, 48 kHz mp3: a step of every phase, interrupted and resumed."""
    monkeypatch.setattr(run, "CALIBRATION", 8)
    torch.set_num_threads(os.cpu_count())            # alone among these tests it has matrices for that
    try:
        out = rehearse("tiny", tmp_path, 1,
                       ["--limit", "1", "--workers", "0", "--steps", "1", "--recovery-steps", "1", "--window", "3",
                        "--precision", "fp32", "--target", "0"])
    finally:
        torch.set_num_threads(1)
    rows = json.loads((out / "report.json").read_text(encoding="utf8"))["models"]
    assert [row["name"] for row in rows] == ["original", "dense", "tspar", "imp"]
    assert rows[0]["parameters"] == 37_184_640
    assert "resumed" in (out / "log.txt").read_text(encoding="utf8")


# ---- bad input

def broken(tmp_path: Path, what: str) -> list[str]:
    """A data folder or checkpoint with one thing wrong, as command-line arguments."""
    if what == "checkpoint":
        (tmp_path / "bad.pt").write_bytes(NANO.read_bytes()[:1000])
        return ["--model", str(tmp_path / "bad.pt")]
    folder = common_voice(tmp_path / "cv")
    table, clip = folder / "train.tsv", next((folder / "clips").iterdir())
    text = table.read_text(encoding="utf8")
    if what == "no table":
        table.unlink()
    elif what == "no column":
        table.write_text(text.replace("sentence", "text"), encoding="utf8")
    elif what == "empty":
        table.write_text(text.split("\n")[0] + "\n", encoding="utf8")
    elif what == "no clip":
        clip.unlink()
    elif what == "bad clip":
        clip.write_bytes(b"no audio")
    elif what == "no samples":
        soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
        return ["--transcribe", str(tmp_path / "empty.wav")]
    elif what in ("outside", "absolute"):
        table.write_text(text.replace("\tmini", "\t../../mini" if what == "outside" else "\t/mini", 1),
                         encoding="utf8")
    elif what == "nothing fits":
        table.write_text("\n".join(line.replace("।", "।" * 300) for line in text.split("\n")), encoding="utf8")
    elif what == "not utf-8":
        table.write_bytes(text.encode("utf-16"))
    return ["--data", str(folder)]


@pytest.mark.parametrize("arguments, names", [
    (["--model", "smal"], "smal"), (["--model", "missing.pt"], "missing.pt"), (["--data", "nowhere"], "nowhere"),
    (["--steps", "-1"], "-1"), (["--steps", "many"], "many"), (["--z1", "nan"], "nan"), (["--lr", "inf"], "inf"),
    (["--batch", "0"], "0"), (["--seed", str(2 ** 63)], "--seed"), (["--target", "1"], "--target"),
    (["--language", "xx"], "xx"), (["--device", "cuda:99"], "cuda:99"),
    (["--device", "toaster"], "toaster"), (["--penalty", "squared"], "squared"), (["--nonsense"], "--nonsense"),
    (["--data", "cv11_hi", "--data-dir", "nowhere"], "nowhere"),
    ("checkpoint", "bad.pt"), ("no table", "train.tsv"), ("no column", "sentence"), ("empty", "0 rows"),
    ("no clip", ".mp3"), ("bad clip", ".mp3"), ("outside", "stay inside"), ("absolute", "stay inside"),
    ("nothing fits", "no clip"),
    ("not utf-8", "train.tsv"), (["--resume"], "no interrupted run"), (["--resume", "--overwrite"], "--overwrite"),
    (["--precision", "fp16"], "fp16"), (["--transcribe", "missing.wav"], "missing.wav"),
    (["--accumulate", "0"], "--accumulate"), (["--target", "0.99"], "--target: a share of 0.99"),
    (["--window", "3.5"], "--window"), (["--window", "nan"], "--window"), (["--window", "0.001"], "--window"),
    (["--data-dir", "x"], "--data-dir"), (["--steps", "0", "--importance", "curvature"], "--steps above 0"),
    (["--step", "3"], "--step"), ("no samples", "no samples"), (["--workers", "-1"], "--workers"),
    (["--model", str(MINI / "test.tsv")], "test.tsv")])
def test_bad_input_is_one_line_and_exit_code_2(arguments, names, tmp_path, capsys):
    """What came is named, in one line on stderr, nothing on stdout, before anything is trained or written."""
    arguments = broken(tmp_path, arguments) if isinstance(arguments, str) else arguments
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and names in err and err.startswith("run.py: ")
    assert not (tmp_path / "out").exists()


def test_resume_of_another_run(toy, tmp_path, capsys):
    """--resume with other settings or another model: what differs is named, the interrupted state is untouched."""
    out = tmp_path / "out"
    assert ended(in_child([*QUICK, "--out", str(out)], lambda: kill_at(2))) == -signal.SIGKILL
    other = prune.load(toy)
    prune.mask_(other, prune.two_pass(other, z1=0))
    prune.save(other, tmp_path / "toy.pt")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for extra, named in ((["--seed", "1"], "seed 0, not 1"), (["--batch", "2"], "batch 4, not 2"),
                         (["--model", str(tmp_path / "toy.pt")], "model toy, not")):
        assert run.main([*QUICK, *extra, "--out", str(out), "--resume"]) == 2
        err = capsys.readouterr().err
        assert named in err and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    accepted = ended(in_child([*QUICK, "--z1", "-1", "--out", str(out), "--resume"],
                              lambda: kill_at(1))) == -signal.SIGKILL
    assert accepted, "nothing was pruned yet: how much may change"


def test_too_little_room_is_said_before_training(tmp_path, monkeypatch, capsys):
    """A disk that cannot hold the states: exit code 2 before the first step."""
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 ** 6))
    assert run.main([*QUICK, "--out", str(tmp_path / "out")]) == 2
    assert "0.0 GB left" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/proc/1/out", "below a file"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys, out):
    """Read-only for everyone, root too, or no folder at all: one line, exit code 2, before the first step."""
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 ** 12))      # /proc has none
    (tmp_path / "file").write_text("")
    out = out if out.startswith("/") else str(tmp_path / "file/out")
    assert run.main([*QUICK, "--out", out]) == 2
    said = capsys.readouterr()
    assert "cannot be written" in said.err and out in said.err and said.err.count("\n") == 1
    assert "steps" not in said.out


def test_clips_that_do_not_fit_are_counted(nano, tmp_path, capsys):
    """One clip longer than the window, one sentence longer than the text context: left out, and said."""
    folder = common_voice(tmp_path / "cv", rows=4)
    lines = (folder / "test.tsv").read_text(encoding="utf8").split("\n")
    soundfile.write(folder / "clips" / lines[2].split("\t")[1], np.zeros(4 * 48000), 48000)
    lines[3] = lines[3].replace(lines[3].split("\t")[2], "नमस्ते " * 100)
    (folder / "test.tsv").write_text("\n".join(lines), encoding="utf8")
    (folder / "train.tsv").unlink()              # it has the same clips
    clips = run.Clips(nano, "test", run.Settings(data=str(folder)))
    assert len(clips) == 2 and clips.left_out == "left out: 1 over 3 s, 1 over 128 tokens"
    assert clips.sentences[0].startswith('"'), "a lone quotation mark is a character"
    # 4 of prompt, and the end is never an input: 128
    for words, fits in ((123, True), (124, True), (125, False)):
        long = lines[1].replace(lines[1].split("\t")[2], "a " * words)
        (folder / "dev.tsv").write_text("\n".join([*lines[:2], long]), encoding="utf8")
        assert len(run.Clips(nano, "dev", run.Settings(data=str(folder)))) == 1 + fits


def test_network_only_for_a_model_named_by_name(tmp_path, monkeypatch, capsys):
    """With every connection refused the embedded data is scored as ever; `--model tiny` says in one line what to
    download."""
    def refuse(*_):
        raise OSError("no network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run.main(["--evaluate", "--limit", "2"]) == 0
    assert run.main(["--model", "tiny", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "tiny.pt" in err and not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten(finished, capsys):
    """A folder with results stops the run before training and keeps every byte."""
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert run.main([*QUICK, "--out", str(finished)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}


def test_readme_commands_are_accepted(monkeypatch):
    """Every `python run.py ...` of the README parses; every file it names exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    commands = re.findall(r"^python run\.py(.*?)(?:\s+#.*)?$", readme, re.M)
    assert len(commands) >= 3
    monkeypatch.setattr(run, "data_folder", lambda s: MINI)
    monkeypatch.setattr(run, "read_audio", lambda path: None)
    for command in commands:
        run.settings([word for word in shlex.split(command) if word != "--help"])
    for name in re.findall(r"^python (tests/\S+\.py)", readme, re.M):
        assert (ROOT / name).is_file()
