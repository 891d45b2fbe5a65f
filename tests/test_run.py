"""run.py: the data it reads, the numbers it reports, the whole run with a handful of steps, and bad input."""
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import whisper

import prune
import run

ROOT = Path(run.__file__).resolve().parent
MINI, NANO = ROOT / "tests/data/mini_hi", ROOT / "tests/data/nano.pt"
TOKENIZER = whisper.tokenizer.get_tokenizer(True, language="hi", task="transcribe")
QUICK = ["--steps", "3", "--recovery-steps", "3", "--rounds", "2", "--limit", "12", "--batch", "4"]


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


def common_voice(folder: Path, rows: int = 3) -> Path:
    """A folder as Common Voice unpacks it: 48 kHz mp3, tab-separated tables with all their columns."""
    (folder / "clips").mkdir(parents=True)
    lines = (MINI / "test.tsv").read_text(encoding="utf8").split("\n")[: rows + 1]
    for line in lines[1:]:
        name = line.split("\t")[1]
        samples, _ = soundfile.read(MINI / "clips" / name)
        spectrum = np.zeros(3 * len(samples) // 2 + 1, complex)
        spectrum[: len(samples) // 2 + 1] = np.fft.rfft(samples)
        soundfile.write(folder / "clips" / name.replace(".ogg", ".mp3"), 3 * np.fft.irfft(spectrum, 3 * len(samples)), 48000)
    for split in ("train", "dev", "test"):
        (folder / f"{split}.tsv").write_text("\n".join(lines).replace(".ogg", ".mp3") + "\n", encoding="utf8")
    return folder


# ---- data

def test_resampling_keeps_a_tone(tmp_path):
    """1 kHz at 48 kHz in two unequal channels comes out as their mean, the same tone sampled at 16 kHz."""
    t = np.arange(48000) / 48000
    soundfile.write(tmp_path / "tone.wav", np.stack([0.6 * np.sin(2000 * np.pi * t), 0 * t], 1), 48000, subtype="FLOAT")
    expected = 0.3 * np.sin(2000 * np.pi * np.arange(16000) / 16000)
    assert np.abs(run.read_audio(tmp_path / "tone.wav") - expected).max() < 1e-5


def test_batch_predicts_the_text_and_its_end(nano):
    """Every text token and the final end-of-text is a target once; prompt and padding never are."""
    clips = run.Clips(MINI, "dev", nano, TOKENIZER, limit=5)
    mels, inputs, targets = clips.collate([clips[i,] for i in range(5)])
    assert mels.shape == (5, 80, 300) and inputs.shape == targets.shape
    for row_in, row_out, text in zip(inputs.tolist(), targets.tolist(), clips.sentences):
        spoken = TOKENIZER.encode(" " + text)
        assert [t for t in row_out if t != -100] == spoken + [TOKENIZER.eot]
        assert row_in[: 4 + len(spoken)] == [*TOKENIZER.sot_sequence_including_notimestamps] + spoken
        assert row_out[3] == spoken[0], "the last token of the prompt predicts the first of the text"


def test_objective_is_the_stock_softmax(nano):
    """72 rows and log-counts give the cross-entropy of the 51,865-way softmax; afterwards every token has its row."""
    before = nano.decoder.token_embedding.weight.detach().clone()
    clips = run.Clips(MINI, "dev", nano, TOKENIZER, limit=4)
    mels, inputs, targets = clips.collate([clips[i,] for i in range(4)])
    with torch.no_grad():
        stock = F.cross_entropy(nano(mels, inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        with run.Objective(nano) as objective:
            assert objective.row_of.max() < 100
            ours = objective(mels, inputs, targets)
    assert torch.allclose(stock, ours, rtol=1e-4)
    assert torch.equal(before, nano.decoder.token_embedding.weight)


def test_augment_repeats_with_its_generator():
    """The same generator state gives the same mels; only whole bands and stretches are flattened."""
    mels = torch.randn(3, 80, 300, generator=torch.Generator().manual_seed(0))
    first, second = (run.augment(mels, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, mels)
    assert (first == first[0].mode().values.mode().values).float().mean() < 0.5


def test_test_sentences_are_not_in_train(nano):
    """No sentence of dev or test is spelled, after normalization, like one of train: a score is no memory test."""
    split = {name: {run.normalize(s) for s in run.Clips(MINI, name, nano, TOKENIZER).sentences} for name in ("train", "dev", "test")}
    assert [len(split[name]) for name in ("train", "dev", "test")] == [1400, 80, 240]
    assert not split["train"] & split["test"] and not split["train"] & split["dev"] and not split["dev"] & split["test"]


# ---- scores

def test_score_by_hand():
    """1 wrong word of 4 and 0 of 1 is 1 / 5 of the corpus, not the mean of 25% and 0%; one-word lines count."""
    scores = run.score(["एक दो तीन चार", "हाँ"], ["एक दो तीन पाँच", "हाँ"], seed=0)
    assert scores["wer"] == pytest.approx(20)
    assert scores["wer_ci95"][0] == 0 and scores["wer_ci95"][1] == 25


def test_normalizers_keep_vowel_signs():
    """Bengali and Tamil keep their signs, punctuation goes; Hindi spellings meet; English uses Whisper's."""
    assert run.normalizer("bn")("আমি, বাংলা বলি।") == "আমি বাংলা বলি"
    assert run.normalizer("ta")("தமிழ்.") == "தமிழ்"
    assert run.normalizer("hi")("हिन्दी में 2।") == run.normalizer("hi")("हिंदी में दो")
    assert run.normalizer("en")("I can't colour it") == "i can not color it"


def test_stock_whisper_reads_nano(nano):
    """whisper.load_model and whisper.decode, no code of ours in between: 40 test clips at under 10% WER."""
    clips = run.Clips(MINI, "test", nano, TOKENIZER, limit=40)
    mels = torch.stack([whisper.log_mel_spectrogram(whisper.pad_or_trim(run.read_audio(p), 48000)) for p in clips.paths])
    texts = [r.text for r in whisper.decode(nano, mels, whisper.DecodingOptions(language="hi", without_timestamps=True, fp16=False))]
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
        assert imp[same] == dense[same] == rows["original"][same], "zeros save nothing"
    assert abs(imp["block_nonzero"] - tspar["block_nonzero"]) < 0.02 * dense["block_parameters"], "compared at equal sparsity"
    assert report["seed"] == 0 and set(report["seconds"]) == {"dense", "tspar", "imp", "measure"}


def test_checkpoints_give_the_reported_transcripts(finished):
    """tspar.pt by prune.load, dense.pt by stock whisper.load_model: both say again what report.json quotes."""
    report = json.loads((finished / "report.json").read_text(encoding="utf8"))
    s = run.completed(run.settings(["--limit", "12"]), prune.load(NANO))
    for name, load in (("tspar", prune.load), ("dense", whisper.load_model)):
        model = load(str(finished / f"{name}.pt"), "cpu").eval()
        assert run.transcribe(model, run.Clips(MINI, "test", model, TOKENIZER, 12), s) == report["transcripts"][name]


def test_same_seed_same_result(finished, tmp_path):
    """The same command again gives the same transcripts and error rates, to the last digit."""
    assert run.main([*QUICK, "--out", str(tmp_path / "again")]) == 0
    first, second = (json.loads((d / "report.json").read_text(encoding="utf8")) for d in (finished, tmp_path / "again"))
    assert first["transcripts"] == second["transcripts"]
    assert [row["wer"] for row in first["models"]] == [row["wer"] for row in second["models"]]


def test_other_ways_through(tmp_path, capsys):
    """Columns instead of units, the proximal step, a target: half of the blocks is gone, within evening."""
    out = tmp_path / "columns"
    assert run.main([*QUICK, "--groups", "column", "--sgl", "prox", "--target", "0.5", "--out", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads((out / "report.json").read_text(encoding="utf8"))["models"]}
    assert abs(rows["tspar"]["block_parameters"] / rows["dense"]["block_parameters"] - 0.5) < 0.03


def test_zeros_stay_zero_in_recovery(nano, tmp_path):
    """Weights that are zero when a phase starts are zero when it ends; the others move."""
    model = prune.load(NANO)
    s = run.completed(run.settings(["--steps", "3", "--batch", "2", "--out", str(tmp_path)]), model)
    (tmp_path / "state").mkdir()
    prune.magnitude_(model, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2}
    run.fine_tune(model, {"train": run.Clips(MINI, "train", model, TOKENIZER, 4)}, s, "recover")
    after = dict(model.named_parameters())
    assert all((after[name][old == 0] == 0).all() and not torch.equal(after[name], old) for name, old in before.items())


def test_common_voice_folder(tmp_path, monkeypatch, capsys):
    """48 kHz mp3 in a Common Voice folder, found by $CV11_HI, is read and scored; nano understands it."""
    monkeypatch.setenv("CV11_HI", str(common_voice(tmp_path / "cv", rows=6)))
    assert run.main(["--data", "cv11_hi", "--evaluate"]) == 0
    wer = float(capsys.readouterr().out.split("\n")[3].split()[7])
    assert wer < 30


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
    return ["--data", str(folder)]


@pytest.mark.parametrize("arguments, names", [
    (["--model", "smal"], "smal"), (["--model", "missing.pt"], "missing.pt"), (["--data", "nowhere"], "nowhere"),
    (["--steps", "-1"], "-1"), (["--steps", "many"], "many"), (["--z1", "nan"], "nan"), (["--lr", "inf"], "inf"),
    (["--batch", "0"], "0"), (["--target", "1"], "--target"), (["--language", "xx"], "xx"), (["--device", "cuda:99"], "cuda:99"),
    (["--device", "toaster"], "toaster"), (["--sgl", "none"], "none"), (["--nonsense"], "--nonsense"),
    (["--data", "cv11_hi", "--data-dir", "nowhere"], "nowhere"),
    ("checkpoint", "bad.pt"), ("no table", "train.tsv"), ("no column", "sentence"), ("empty", "0 rows"),
    ("no clip", ".mp3"), ("bad clip", ".mp3")])
def test_bad_input_is_one_line_and_exit_code_2(arguments, names, tmp_path, capsys):
    """What came is named, in one line on stderr, nothing on stdout, before anything is trained or written."""
    arguments = broken(tmp_path, arguments) if isinstance(arguments, str) else arguments
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and names in err and err.startswith("run.py: ")
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten(finished, capsys):
    """A folder with results stops the run before training and keeps every byte."""
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert run.main([*QUICK, "--out", str(finished)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}


def test_readme_commands_are_accepted():
    """Every `python run.py ...` of the README parses; every file it names exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    commands = re.findall(r"^python run\.py(.*?)(?:\s+#.*)?$", readme, re.M)
    assert len(commands) >= 3
    for command in commands:
        run.settings([word for word in shlex.split(command) if word not in ("--help",)])
    for name in re.findall(r"^python (tests/\S+\.py)", readme, re.M):
        assert (ROOT / name).is_file()
