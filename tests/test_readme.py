"""README.md and that of the records: their tables are made from the stored results, the Python blocks run."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import prune
import real
import run

ROOT = Path(prune.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf8")
RECORDS = (real.RESULTS / "README.md").read_text(encoding="utf8")


def between(mark: str) -> str:
    return re.search(f"<!-- {mark} -->(.*)<!-- /{mark} -->", README + RECORDS, re.S)[1].strip()


def test_tables_are_those_of_the_stored_results(capsys):
    """Word for word what run.py --study prints."""
    real.main(["--from", str(ROOT / "tests/data/real")])
    assert capsys.readouterr().out.strip() == "\n\n".join(map(between, real.TABLES))


def test_study_of_what_it_does_not_know(capfd, tmp_path):
    """One sentence and exit code 2: a folder without results, and other data."""
    assert run.main(["--study", "--from", str(tmp_path)]) == 2
    empty, = capfd.readouterr().err.splitlines()
    assert "so762-0.json" in empty
    both = ["--model", "nano.pt", "--data"]
    for words, said in (([*both, str(tmp_path), "20%"], "so762 and hi_kokoro"), (["20%"], "go together"),
                        ([*both, "so762", "Taylor"], "Taylor is no arm"), (["--modle", "x"], "--study --help"),
                        ([*both, "so762", "20%, with pass 2"], "with pass 2 is no arm"), (both[:2], "go together")):
        with pytest.raises(run.Stop, match=said):
            real.main(words)


def test_study_does_nothing_twice(capsys):
    real.main(["--model", "nowhere.pt", "--data", "nowhere/so762", "20%", "Taylor, 35%"])
    assert "so762-0.json has all of these" in capsys.readouterr().out


def test_figures_in_the_text_are_stored():
    """The embedding, words that train lacks, the rivals' distance, refitting, the adaptive penalty, the seeds of
    nano."""
    text, rows = " ".join(README.split()), {path.stem: real.results(path) for path in real.RESULTS.glob("*.json")}
    for name, language in (("so762-0", "English"), ("hi_kokoro-0", "Hindi")):
        now, trained = (rows[name + more]["dense"]["wer"] for more in ("", "-embedding-trained"))
        rate = f"{now:.1f}% WER" if name[0] == "s" else f"{now:.1f}%"
        assert f"{rate} instead of {trained:.1f}% in {language}" in text

    def distance(file: str, arm: str, other: str) -> tuple[float, float, float]:
        a, b = rows[file][arm], rows[file][other]
        return a["wer"] - b["wer"], *run.interval(np.subtract(a["errors"], b["errors"]), b["words"], 0)

    more = {key: errors[0] - rows["unseen"]["so762 dense"][key][0]
            for key, errors in rows["unseen"]["so762 50%"].items() if key != "inserted"}
    inserted = rows["unseen"]["so762 50%"]["inserted"] - rows["unseen"]["so762 dense"]["inserted"]
    lacking, had = (rows["unseen"]["so762 dense"][key][1] for key in ("unseen", "seen"))
    assert f"{sum(more.values()) + inserted} errors" in text and f"{more['unseen']} are in the" in text
    assert f"the {lacking / (lacking + had):.0%} of its words" in text
    for data in ("so762", "hi_kokoro"):
        assert rows["distilled"][data]["wer"] > rows[f"{data}-0"]["50%"]["wer"]
    for rival, said in (("fewer layers", "less than fewer layers"), ("Taylor, 35%", "points less WER than Taylor"),
                        ("Torch-Pruning's Taylor, 35%", "less than Torch-Pruning's Taylor")):
        less, low, high = distance("so762-0", rival, "35%")
        assert f"{less:.1f} {said} ({low:.1f} to {high:.1f}" in text
    assert "half gone it breaks base: {:.1f}%".format(rows["so762-0"]["Torch-Pruning's Taylor, 50%"]["wer"]) in text
    hessian = distance("so762-0", "Torch-Pruning's Hessian, 50%", "50%")
    assert "its Hessian has {:.1f} more, {:.1f} to {:.1f})".format(*hessian) in text
    halved = rows["so762-0"]["fewer layers, 4 and 2"]["wer"]
    assert f"half gone, four layers and two, they break it: {halved:.1f}%" in text
    turned = [rows["so762-0"][arm]["wer"] for arm in ("65%", real.NOT_TURNED)]
    assert "65% removed has {:.1f}% WER in English, not {:.1f}%".format(*turned) in text
    assert "half gone: {:.1f}, {:.1f} to {:.1f})".format(*distance("so762-0", "Taylor, 50%", "50%")) in text
    assert "in Hindi {:.1f} less ({:.1f} to {:.1f})".format(*distance("hi_kokoro-0", "IMP, 50% zeros", "50%")) in text
    wer = [rows[f"hi_kokoro-{seed}"][arm]["wer"] for arm in ("Taylor, 35%", "35%") for seed in range(2)]
    assert "as well at 35% ({:.1f}%, seed 1: {:.1f}%; TSPAR {:.1f}%, {:.1f}%)".format(*wer) in text
    for seed in range(2):                        # as well: each interval includes zero
        _, low, high = distance(f"hi_kokoro-{seed}", "Taylor, 35%", "35%")
        assert low < 0 < high
    halves = *distance("hi_kokoro-0", "Taylor, 50%", "50%"), distance("hi_kokoro-1", "Taylor, 50%", "50%")[0]
    assert "not at half: {:.1f} more ({:.1f} to {:.1f}; seed 1: {:.1f})".format(*halves) in text
    more, low, high = distance("so762-0", "50%", "IMP, 50% zeros")
    assert f"{more:.1f} points more than half zero ({low:+.1f} to {high:+.1f})" in text
    for name, x in rows["penalties"].items():
        assert f"{x['50%, WER']:.1f}%" in text, name
    norms = rows["norms"].values()
    assert "groups have a root mean square of {:.2f} to {:.2f}".format(min(norms), max(norms)) in text
    fitted = [rows[f"{name}-0"]["35%, fitted only"]["wer"] for name in ("so762", "hi_kokoro")]
    assert "Without any recovery 35% removed has {:.1f}% WER in English, {:.1f}% in Hindi".format(*fitted) in text
    cells = [row.strip("| ").split(" | ") for row in real.vocabularies().splitlines()[3:]]
    (*_, letters, _), *_, (*_, mean), (*_, spelled) = cells
    assert f"loses nothing ({letters}, {rows['so762-0']['tuned']['wer']:.1f}% without)" in text
    mean, spelled = (cell.replace("-0.0 (", "0.0 (").strip("+").rstrip(")") for cell in (mean, spelled))
    said = f"Hindi loses {mean.replace(' (', ' points (')}; five seeds), with letters {spelled})."
    assert said in text
    nano = rows["nano-seeds"]
    dense, tspar = ([row[f"{name} test"] for row in nano] for name in ("dense", "tspar"))
    said = f"dense has {min(dense):.1f}% to {max(dense):.1f}% WER, tspar {min(tspar):.1f}% to {max(tspar):.1f}%"
    assert said in text and "In ten runs" in text
    assert {(row["seed"], row["threads"]) for row in nano} == {(s, n) for s in range(5) for n in (1, 2)}
    assert max(dense) - min(dense) <= 1 and max(tspar) - min(tspar) <= 1
    assert all(row["difference test"][1] <= 0 for row in nano) and "a loss shows in none" in text
    means = [np.mean([row[f"difference {split}"][0] for row in nano]) for split in ("test", "dev")]
    assert "(mean {:+.1f} points; on dev {:+.1f}, ".format(*means) in text
    shown = sum(row["difference dev"][1] > 0 for row in nano)
    assert f"where it shows in {('none', 'one', 'two', 'three', 'four', 'five', 'six')[shown]})" in text
    tuned = [rows[f"so762-{seed}"]["tuned"]["wer"] for seed in range(3)]
    assert "dense has {:.1f}% (seeds 1, 2: {:.1f}%, {:.1f}%)".format(*tuned) in text
    whole, small = rows["latency"]["as OpenAI made it, 30 s"], rows["latency"]["hi_kokoro-0 50%"]
    assert "encodes {:.1f} and decodes {:.1f} times as fast".format(
        *(whole[part] / small[part] for part in ("encoder", "greedy"))) in text
    assert f"encodes English in {rows['latency'][real.HALF_30]['encoder']:.0f} ms" in text
    beam = [rows["same-texts"][data]["beam 5"] for data in ("hi_kokoro", "so762")]
    assert "with beam 5 all {} in Hindi, {} in English".format(*beam) in text
    stored = {f"{row['cross_entropy']:.3f}" for name in ("refit", "recovery") for row in rows[name].values()
              if isinstance(row, dict)}
    told = text[text.index("**What read the"):text.index("**The penalty is off")]
    told = set(re.findall(r"\d\.\d{3}", told))
    assert told <= stored and len(told) > 5


def test_stored_results_hold_no_texts():
    """Counts and settings only."""
    for path in real.RESULTS.glob("*.json"):
        assert "transcripts" not in path.read_text() and "reference" not in path.read_text()


def test_length():
    """Five minutes: at most 220 lines; and the method is as long as it says."""
    assert README.count("\n") <= 220
    source = (ROOT / "run.py").read_text(encoding="utf8")
    method = source[source.index("def run("): source.index("\n\n\ndef iterative_magnitude")]
    assert f"the method in {len(method.splitlines())} lines" in README


def pruned(folder: Path) -> None:
    model = prune.load(ROOT / "tests/data/nano.pt")
    prune.vocabulary_(model, range(300))
    prune.save(prune.remove_(model, prune.two_pass(model)), folder / "tspar.pt")


def test_stock_checkpoint(tmp_path, monkeypatch):
    """The block on stock checkpoints: the model that whisper.load_model reads gives the same logits for kept
    tokens."""
    pruned(tmp_path)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(re.search(r"```python\n(import prune, whisper.*?)```", README, re.S)[1], space)
    mel, text = torch.randn(1, 80, 300), torch.tensor([[50258, 50276, 50359, 50363]])
    small, stock = prune.load("tspar.pt"), space["model"]
    with torch.no_grad():
        a, b = small(mel, text), stock(mel, text)
    kept = small.decoder.kept_ids
    assert torch.allclose(a[..., kept], b[..., kept], rtol=0, atol=1e-4 * a[..., kept].abs().max().item())
    gone = torch.ones(b.shape[-1], dtype=torch.bool).index_fill_(0, kept, False)
    assert (b[..., gone].amax(-1) < b[..., kept].amin(-1)).all()


def test_onnx(tmp_path, monkeypatch):
    """The block on ONNX: encoder and decoder give the same logits, for texts of another length too."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    pruned(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(between("onnx").removeprefix("```python\n").removesuffix("```"), space := {})
    model, mel = space["model"], torch.randn(1, 80, 300)
    run = lambda name, *given: (session := runtime.InferenceSession(name)).run(
        None, {slot.name: x for slot, x in zip(session.get_inputs(), given)})[0]
    for text in ([[50258, 50276, 50359, 50363]], [[50258, 50276, 50359, 50363, 10, 11, 12]]):
        with torch.no_grad():
            said = model(mel, torch.tensor(text))[..., model.decoder.kept_ids]
        logits = run("decoder.onnx", torch.tensor(text).numpy(), run("encoder.onnx", mel.numpy()))
        logits = torch.from_numpy(logits)[..., model.decoder.kept_ids]
        assert torch.allclose(logits, said, rtol=0, atol=1e-4 * said.abs().max().item())
