"""README.md: its table is made from the stored results, its Python blocks run."""
import re
from pathlib import Path

import pytest
import torch

import prune
import real

ROOT = Path(prune.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf8")


def between(mark: str) -> str:
    return re.search(f"<!-- {mark} -->(.*)<!-- /{mark} -->", README, re.S)[1].strip()


@pytest.mark.parametrize("mark, made", [("real", real.table), ("rivals", real.rivals), ("claims", real.claims)])
def test_tables_are_those_of_the_stored_results(mark, made):
    """Word for word what tests/real.py makes of tests/data/real."""
    assert between(mark) == made()


def test_figures_in_the_text_are_stored():
    """What the adaptive penalty did, recovery, the embedding, the seeds of nano."""
    for file in ("so762-0", "so762-0-embedding-trained"):
        rows = real.results(real.RESULTS / f"{file}.json")
        assert ", ".join(f"{rows[arm]['wer']:.1f}%" for arm in ("dense", "35%", "50%")) in README
    for name in ("dense", "tspar"):
        wer = [row[f"{name} test"] for row in real.results(real.RESULTS / "nano-seeds.json")]
        assert f"{name} {min(wer):.1f} to {max(wer):.1f}%" in README
    rows = real.results(real.RESULTS / "penalties.json")
    for key in ("whole", "35%", "50%"):
        assert f"{rows['adaptive'][key]:.3f} instead of {rows['none'][key]:.3f}" in README
    for row in real.results(real.RESULTS / "recovery.json").values():
        if isinstance(row, dict):
            assert f"{row['cross_entropy']:.3f}".rstrip("0") in README


def test_stored_results_hold_no_texts():
    """Counts and settings only."""
    for path in real.RESULTS.glob("*.json"):
        assert "transcripts" not in path.read_text() and "reference" not in path.read_text()


def test_length():
    """Five minutes: at most 220 lines."""
    assert README.count("\n") <= 220


def pruned(folder: Path) -> None:
    model = prune.load(ROOT / "tests/data/nano.pt")
    prune.vocabulary_(model, range(300))
    prune.save(prune.remove_(model, prune.two_pass(model)), folder / "tspar.pt")


def test_stock_checkpoint(tmp_path, monkeypatch):
    """The block on stock checkpoints: the model that whisper.load_model reads gives the same logits for kept tokens."""
    pruned(tmp_path)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(re.search(r"```python\n(import prune, whisper.*?)```", README, re.S)[1], space)
    mel, text = torch.randn(1, 80, 300), torch.tensor([[50258, 50276, 50359, 50363]])
    small, stock = prune.load("tspar.pt"), space["model"]
    with torch.no_grad():
        a, b = small(mel, text), stock(mel, text)
    kept = small.decoder.kept_ids
    assert torch.allclose(a[..., kept], b[..., kept], atol=1e-4)
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
        assert torch.allclose(torch.from_numpy(logits)[..., model.decoder.kept_ids], said, atol=1e-3)
