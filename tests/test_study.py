"""The study: what its tables say of rows made by hand, that it is made again without training, and that its arms are cut as named."""
import json

import pytest
import torch

import prune
import run
import study

NANO = study.ROOT / "tests/data/nano.pt"


def row(method: str, share: float, seed: int, errors: list[int], encoder_ms: float, part: str = "core") -> dict:
    """A report as train_arm writes it, of four clips of ten words."""
    arm = study.Arm(part, method, "dense", "two_pass" if share else "nothing", "", share, seed)
    return {**vars(arm), "name": arm.name, "errors": errors, "words": [10] * 4, "wer": 100 * sum(errors) / 40, "cer": 1.0,
            "wer_ci95": run.interval(errors, [10] * 4, 0), "parameters": 8e6, "block_parameters": 1e6 * (1 - share), "nonzero": 7e6,
            "block_nonzero": 1e6 * (1 - share), "memory_bytes": 3e7, "flops": 7e8 * (1 - share), "bytes": 3e7, "encoder_ms": encoder_ms,
            "greedy_ms": 20.0, "left": {"encoder.blocks.0.mlp": 1 - share, "decoder.blocks.0.attn.vo": 1.0}, "seconds": 1.0}


@pytest.fixture
def small():
    """Two seeds: dense, TSPAR slightly worse and twice as fast, L2 far worse, IMP as slow as dense."""
    rows = []
    for seed in (0, 1):
        rows += [row("dense", 0.0, seed, [1, 0, 1, 0], 4.0), row("TSPAR", 0.65, seed, [1, 1 - seed, 1, 0], 2.0),
                 row("IMP", 0.65, seed, [2, 1, 2, 1], 4.0), row("L2", 0.65, seed, [5, 5, 5, 5], 2.0)]
    rows[1]["histograms"] = {side: {"norms": [0, 1, 2], "cut": 0.5, "before": [1, 3], "after": [3, 1], "weights": [5] * 40}
                             for side in ("encoder", "decoder")}
    return {"machine": "2 CPU cores", "rows": rows}


def test_group_by_hand(small):
    """Seeds are added clip by clip: dense 4 of 80 words, TSPAR 5; one clip of four differs, by one error in twenty words."""
    groups = study.grouped(small["rows"])
    dense, tspar, l2 = (groups[key] for key in (("dense", 0.0), ("TSPAR", 0.65), ("L2", 0.65)))
    assert dense.wer == 5 and dense.change is None and tspar.wer == 6.25 and tspar.change == 1.25
    assert tspar.change_ci[0] == 0 and tspar.no_loss() and tspar.change_ci[1] <= 5
    assert l2.change == 45 and not l2.no_loss()
    assert tspar.faster["encoder_ms"] == 2 and groups["IMP", 0.65].faster["encoder_ms"] == 1


def test_goals_and_claims_say_what_the_rows_say(small):
    """Reached and not reached follow the figures; a faster and better rival is named."""
    groups = study.grouped(small["rows"])
    text = study.goals(groups)
    assert "without a loss that shows: reached (+1.2 points" in text and "1.5 times faster on one clip at 65%: reached (2.00 times)" in text
    assert "no other method as fast as TSPAR (within 5%) and better: reached (none is)" in text and "distil" not in text
    for r in small["rows"]:
        if r["method"] == "L2":
            r.update(errors=[0, 0, 0, 0], wer=0.0, encoder_ms=1.0)
        if r["method"] == "TSPAR":
            r.update(errors=[3, 3, 3, 3], encoder_ms=3.0)
    text = study.goals(study.grouped(small["rows"]))
    assert "**not reached** (TSPAR 65% by L2 65%)" in text and text.count("not reached") == 3


def test_made_again_without_training(small, tmp_path, capsys, monkeypatch):
    """--study --from: the same text from study.json alone as from the reports; a study with arms missing leaves the README alone."""
    monkeypatch.setattr(study, "train_arm", None)
    rows = [r for r in small["rows"] if r["name"] in {arm.name for arm in study.arms()}]
    for r in rows:
        (tmp_path / "reports" / r["name"]).mkdir(parents=True)
        (tmp_path / "reports" / r["name"] / "report.json").write_text(json.dumps(r))
    readme = (study.ROOT / "README.md").read_bytes()
    assert run.main(["--study", "--from", str(tmp_path / "reports")]) == 0
    (tmp_path / "alone").mkdir()
    (tmp_path / "reports/study.json").rename(tmp_path / "alone/study.json")
    assert run.main(["--study", "--from", str(tmp_path / "alone")]) == 0
    first, second = ((tmp_path / name / "results.md").read_text(encoding="utf8") for name in ("reports", "alone"))
    assert first == second and "| TSPAR, 65% | 0.350 M |" in first and "2.00x" in first
    assert (study.ROOT / "README.md").read_bytes() == readme and first in capsys.readouterr().out


def test_whole_study_goes_into_the_readme(small, tmp_path, monkeypatch):
    """With no arm missing, what lies between the marks of the README is replaced, and nothing else."""
    monkeypatch.setattr(study, "arms", lambda: [study.Arm("core", "dense", "dense", "nothing", "")])
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "PUBLISHED", tmp_path / "published")
    (tmp_path / "README.md").write_text("a\n<!-- summary -->\nold\n<!-- /summary -->\nb\n<!-- results -->\nold\n<!-- /results -->\nc\n")
    study.publish(small, "new", tmp_path, plot=False)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("a\n<!-- summary -->\n\n| |") and text.endswith("b\n<!-- results -->\n\nnew\n\n<!-- /results -->\nc\n")
    assert "old" not in text and "| 0.350 M (-65%) | 0.245 G (-65%) | 2.0 ms | 6.2% (" in text
    assert json.loads((tmp_path / "published/study.json").read_text()) == small


def test_figures(small, tmp_path):
    """Three PNG files; needs matplotlib, which only --plot does."""
    pytest.importorskip("matplotlib")
    study.draw(small, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"wer.png", "norms.png", "layers.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


def test_wrong_folder_is_one_sentence(tmp_path, capsys):
    assert run.main(["--study", "--from", str(tmp_path)]) == 2
    assert "neither study.json nor" in capsys.readouterr().err
    assert run.main(["--from", str(tmp_path)]) == 2 and "--from" in capsys.readouterr().err


@pytest.mark.parametrize("cut, thresholds", [("two_pass", 2), ("uniform", 1), ("uniform_per_layer", None), ("random", 1), ("per_matrix", None)])
def test_cut_takes_its_share(cut, thresholds):
    """Half of nano's block parameters, to 2%, by as many thresholds as there are pools (None: one a unit); random units differ
    from seed to seed."""
    model, s = prune.load(NANO), run.settings([])
    plans = [study.plan_of(model, study.Arm("core", "x", "dense", cut, "", 0.5, seed), s) for seed in range(1 + (cut == "random"))]
    gone, of = plans[0].removed()
    assert abs(gone / of - 0.5) < 0.02 and len(set(plans[0].cuts.values())) == (thresholds or len(plans[0].cuts))
    if cut == "random":
        assert any(not torch.equal(plans[0].keep[name], plans[1].keep[name]) for name in plans[0].keep)


def test_squared_norm_by_hand():
    """One group (3, 4), l2 = 1: the gradient of sqrt(2) * (3^2 + 4^2) is 2 sqrt(2) * (3, 4)."""
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    w.grad = torch.zeros_like(w)
    study.Squared({"encoder.w": [(w, 0)]}, 0, 0, 1, 0).add_gradient_()
    assert torch.allclose(w.grad, 2 * 2 ** 0.5 * w.detach())


def test_an_arm_from_first_phase_to_report(tmp_path, monkeypatch):
    """Two steps each: the first phase is saved once, the arm's model has its share gone, its report has what the tables need."""
    monkeypatch.setattr(study, "FIRST", dict.fromkeys(study.FIRST, "--steps 2 --recovery-steps 2 --rounds 1 --limit 6 --batch 2"))
    for method, cut in (("weights after groups", "two_pass"), ("IMP", "magnitude")):
        arm = study.Arm("core", method, "sgl" if cut == "two_pass" else "dense", cut, "", 0.5)
        study.train_first(arm, tmp_path)
        study.train_arm(arm, tmp_path)
    tspar, imp = [json.loads((tmp_path / f"{m}-50-seed0/report.json").read_text()) for m in ("weights-after-groups", "imp")]
    of = sum(p.numel() for name, p in prune.load(NANO).named_parameters() if ".blocks." in name)
    assert abs(tspar["block_parameters"] / of - 0.5) < 0.02 and imp["block_parameters"] == of and abs(imp["block_nonzero"] / of - 0.5) < 0.01
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["dense-seed0.pt", "sgl-seed0.pt"]
    assert {"errors", "words", "flops", "bytes", "left"} <= tspar.keys()
    assert sum(tspar["histograms"]["encoder"]["after"]) == 2304


def test_readme_shows_the_stored_study():
    """The README's tables and sentences are made from tests/data/study, word for word."""
    stored, readme = study.collect(study.PUBLISHED), (study.ROOT / "README.md").read_text(encoding="utf8")
    assert study.summary(stored) in readme and study.results(stored) in readme
    assert {"core", "distilled", "ablation"} <= {row["part"] for row in stored["rows"]}
