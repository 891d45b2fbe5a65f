"""The experiment: does it work, against what, and at what price? Every figure of the README's results comes from here.

    python run.py --study --plot                 # trains what runs/study lacks, then tables and figures
    python run.py --study --from runs/study      # trains nothing: tables and figures from what is there

An arm is a first phase, a cut and a recovery: one method at one size with one seed. Arms that begin alike share the first
phase, which is trained once. All of a table take as many steps, with the same clips in the same order. One process a core,
one thread each. An arm that has its report.json is never run again: an interrupted study goes on where it was.

The second language takes part if it has been made (make_mini_hi.py --voice en, make_nano.py --language en: see there).

In --out: ARM/report.json, log.txt and model.pt of each; study.json, all reports in one; results.md and the figures. When
nothing is missing, the README's results are written anew, and study.json and the figures go to tests/data/study.
"""
import copy
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flops
import prune
import run
from tspar import SparseGroupLasso

PUBLISHED = ROOT / "tests/data/study"
SEEDS, SHARES = (0, 1, 2), (0.35, 0.5, 0.65, 0.8)        # settings were chosen on dev, with seeds 3 to 5
ENGLISH = {"model": ROOT / "runs/nano_en.pt", "data": ROOT / "runs/mini_en"}

# Flags of run.py, chosen on dev. First phases by name, then second phases.
FIRST = {
    "dense": "--lr 1e-3",
    "dense fast": "--lr 3e-3",                      # English: its nano has not learned all it can
    "distilled": "--lr 1e-3 --distil",
    "gentle": "--l1-encoder 1.5e-5 --l2-encoder 1.5e-5 --l1-decoder 3.5e-5 --l2-decoder 3.5e-5",
    "sgl": "",
    "sgl distilled": "--lr 2e-3 --distil",
    "column": "--groups column",
    "prox": "--sgl prox",
    "group": "--l1-encoder 0 --l1-decoder 0",
    "l1": "--l2-encoder 0 --l2-decoder 0",
    "squared": "",
}
WITHOUT_PENALTY = ("dense", "dense fast", "distilled")
LIGHT, HEAVY = "--recovery-lr 1e-3 --z2 -1.2", "--recovery-lr 2e-3 --z2 -1.2"
DISTIL = "--distil --recovery-steps 1200 --z2 -1.5"          # twice the steps, for everybody


@dataclass(frozen=True)
class Arm:
    """One row; `part` says in which table it stands, `flags` are those of its second phase."""
    part: str
    method: str
    first: str
    cut: str
    flags: str
    share: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-{100 * self.share:.0f}-seed{self.seed}".lower().replace(" ", "-")

    def settings(self, folder: Path) -> run.Settings:
        """Those of run.py for this arm, its files in `folder`."""
        other = [f"--{key}={value}" for key, value in ENGLISH.items()] + ["--language=en"] if self.part == "english" else []
        return run.settings([*FIRST[self.first].split(), *self.flags.split(), *other, "--seed", str(self.seed), "--out", str(folder)])


def arms() -> list[Arm]:
    """All of them, in the order of the tables."""
    core, distilled = [], []
    for seed in SEEDS:
        core.append(Arm("core", "dense", "dense", "nothing", LIGHT, seed=seed))
        for share in SHARES:
            core.append(Arm("core", "TSPAR", "gentle", "two_pass", HEAVY if share > 0.5 else LIGHT, share, seed))
            core.append(Arm("core", "IMP", "dense", "magnitude", LIGHT, share, seed))
            core.append(Arm("core", "L2", "dense", "uniform", HEAVY, share, seed))
            if share > 0.5:
                core.append(Arm("core", "L2 per layer", "dense", "uniform_per_layer", HEAVY, share, seed))
        distilled.append(Arm("distilled", "dense distilled", "distilled", "nothing", f"{DISTIL} --recovery-lr 1e-3", seed=seed))
        for method, first, cut, lr, shares in (("TSPAR", "sgl distilled", "two_pass", 3e-3, (0.8, 0.88)), ("IMP", "distilled", "magnitude", 1e-3, (0.8,)),
                                               ("L2", "distilled", "uniform", 2e-3, (0.8,))):
            distilled += [Arm("distilled", f"{method} distilled", first, cut, f"{DISTIL} --recovery-lr {lr}", share, seed) for share in shares]
    ablations = [Arm("ablation", method, first, cut, flags, 0.65, seed) for method, first, cut, flags, seeds in (
        ("as it is", "sgl", "two_pass", HEAVY, 3),
        ("column groups", "column", "two_pass", HEAVY, 1),
        ("proximal step", "prox", "two_pass", HEAVY, 1),
        ("group LASSO alone", "group", "two_pass", HEAVY, 1),
        ("L1 alone", "l1", "two_pass", HEAVY, 3),
        ("squared norm", "squared", "two_pass", HEAVY, 1),
        ("weights after groups", "sgl", "two_pass", f"{HEAVY} --z2 -0.5", 1),
        ("weights before groups", "sgl", "weights_first", f"{HEAVY} --z2 -0.5", 1),
        ("thresholds per matrix", "sgl", "per_matrix", HEAVY, 1),
        ("magnitude in one shot", "dense", "magnitude", f"{LIGHT} --rounds 1", 1),
        ("random units", "dense", "random", HEAVY, 1)) for seed in range(seeds)]
    english = [Arm("english", f"English {method}", first, cut, flags, 0.65 if cut != "nothing" else 0.0) for method, first, cut, flags in (
        ("dense", "dense fast", "nothing", HEAVY), ("TSPAR", "gentle", "two_pass", HEAVY), ("IMP", "dense fast", "magnitude", LIGHT))]
    order = lambda part: sorted(part, key=lambda arm: arm.share)          # stable: seeds and methods stay as they are
    return order(core) + order(distilled) + ablations + (english if all(map(os.path.exists, ENGLISH.values())) else [])


# --------------------------------------------------------------------------------------------------------------- the cuts

def plan_of(model: run.Whisper, arm: Arm, s: run.Settings) -> prune.Plan:
    """What a structured method removes, `arm.share` of the block parameters."""
    groups = run.groups_of(model, s)
    at = {"two_pass": lambda z1: prune.two_pass(model, groups, z1, s.z2),
          "weights_first": lambda z1: prune.two_pass(model, groups, z1, None),          # the weights have been zeroed by now
          "per_matrix": lambda z1: prune.two_pass(model, groups, z1, s.z2, pool=str),
          "uniform": lambda share: uniform(model, share),
          "uniform_per_layer": lambda share: uniform(model, share, per_layer=True),
          "random": lambda share: uniform(stranger, share)}[arm.cut]
    torch.manual_seed(arm.seed)
    stranger = run.Whisper(model.dims)           # the weakest units of a model with random weights
    return prune.target(arm.share, at, *((0.0, 0.999) if "uniform" in arm.cut or arm.cut == "random" else (-10.0, 10.0)))


def uniform(model: run.Whisper, fraction: float, per_layer: bool = False, multiple: int = 8) -> prune.Plan:
    """Baseline: the `fraction` of units with the smallest n_j, over the model or in each layer and kind, evened as two_pass
    does. ValueError if fraction is not in [0, 1)."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}; give a number from 0 up to, but not including, 1")
    plan = prune.two_pass(model, z2=None, multiple=multiple)
    pools = plan.norms if per_layer else dict.fromkeys(plan.norms, torch.cat(list(plan.norms.values())))
    cuts = {name: pool.sort().values[int(fraction * len(pool))].item() for name, pool in pools.items()}
    keep = prune._even(model, plan.norms, cuts, multiple)
    return replace(plan, settings={"fraction": fraction, "multiple": multiple}, cuts=cuts, keep=keep)


class Squared(SparseGroupLasso):
    """The misprint: l2 * sqrt(size) * sum_j ||g_j||^2, with the gradient 2 * l2 * sqrt(size) * w of weight decay."""

    @torch.no_grad()
    def add_gradient_(self) -> None:
        for group, l1, l2 in self.groups.values():
            size = sum(w.numel() // w.shape[axis] for w, axis in group)
            for w, _ in group:
                w.grad.add_(w.sign(), alpha=self.scale * l1).add_(w, alpha=self.scale * 2 * l2 * size ** 0.5)


def train_first(arm: Arm, folder: Path) -> None:
    """The first phase that `arm` shares with others, as folder/first/NAME.pt."""
    s = arm.settings(folder / "first" / first_name(arm))
    model, s, clips = begin(s)
    penalty = None
    if arm.first not in WITHOUT_PENALTY:
        kind = Squared if arm.first == "squared" else SparseGroupLasso
        penalty = kind(run.groups_of(model, s), s.l1_encoder, s.l1_decoder, s.l2_encoder, s.l2_decoder)
    run.fine_tune(model, clips, s, arm.first, penalty)
    prune.save(model, folder / "first" / f"{first_name(arm)}.pt")
    shutil.rmtree(s.out)


def first_name(arm: Arm) -> str:
    return f"{arm.first}-seed{arm.seed}".replace(" ", "-") + ("-en" if arm.part == "english" else "")


def train_arm(arm: Arm, folder: Path) -> None:
    """Cut, recover, measure: folder/ARM/report.json, whole or not at all."""
    started, s = time.time(), arm.settings(folder / arm.name)
    original, s, clips = begin(s)
    model, report = prune.load(folder / "first" / f"{first_name(arm)}.pt", s.device).eval(), {}
    if arm.cut == "weights_first":
        prune.mask_(model, prune.two_pass(model, z1=-99, z2=s.z2, floor=0))
    if arm.cut == "magnitude":
        weights = prune.zeros(model)
        total = flops.parameters(model)["blocks"]
        run.iterative_magnitude(model, clips, s, arm.share * total / sum(weight.numel() for weight, _ in weights))
    else:
        if arm.cut != "nothing":
            plan = plan_of(model, arm, s)
            report = {"left": {name: keep.double().mean().item() for name, keep in plan.keep.items()}, "z1": plan.settings.get("z1")}
            report |= {"histograms": histograms(original, model, plan)} if arm.method == "weights after groups" else {}
            prune.remove_(model, plan)
        run.fine_tune(model, clips, run.recovery(s), "recover")
    texts = run.transcribe(model, clips["test"], s)
    prune.save(model, Path(s.out) / "model.pt")
    report |= {**vars(arm), "name": arm.name, **run.figures(model, clips["test"], texts, s), "transcripts": texts,
               "bytes": (Path(s.out) / "model.pt").stat().st_size, "seconds": time.time() - started, "settings": vars(s)}
    shutil.rmtree(Path(s.out) / "state")
    run.write(Path(s.out) / "report.json", lambda file: file.write(json.dumps(report, ensure_ascii=False, default=list).encode()))


def begin(s: run.Settings) -> tuple:
    """The model as it came, complete settings, train and test clips; an empty folder for what is to come."""
    shutil.rmtree(s.out, ignore_errors=True)
    (Path(s.out) / "state").mkdir(parents=True)
    model = run.load_model(s)
    s = run.completed(s, model)
    return model, s, {split: run.load_clips(model, split, s) for split in ("train", "test")}


@torch.no_grad()
def histograms(original: run.Whisper, model: run.Whisper, plan: prune.Plan) -> dict:
    """For each side, counts of group norms before and after the first phase, of the weights of the groups that stay, in units
    of their matrix's threshold where it is above 0, and where the thresholds lie."""
    before, kept, sides = prune.two_pass(original, z2=None), copy.deepcopy(model), {}
    prune.mask_(kept, replace(plan, pass2={}))
    for side in ("encoder", "decoder"):
        (old, _), (new, cut) = before.pooled(side), plan.pooled(side)
        edges = np.linspace(0, max(old.max(), new.max()).item(), 41)
        weights = [kept.get_submodule(name).weight.abs() / row[2] for name, row in plan.pass2.items() if name.startswith(side) and row[2] > 0]
        weights = torch.cat([torch.zeros(0), *(w[w > 0] for w in weights)]).numpy()
        sides[side] = {"norms": edges.tolist(), "cut": cut, "before": np.histogram(old.numpy(), edges)[0].tolist(),
                       "after": np.histogram(new.numpy(), edges)[0].tolist(), "weights": np.histogram(weights, 40, (0, 10))[0].tolist()}
    return sides


def latencies(folder: Path, rows: list[dict]) -> dict[str, dict[str, float]]:
    """Milliseconds of the encoder and of greedy decoding (24 tokens) of one clip, all models taking turns, in an order drawn
    anew a few times: who comes early in a round is not measured like who comes late."""
    models = [prune.load(folder / row["name"] / "model.pt").eval() for row in rows]
    mel, rng = torch.randn(1, models[0].dims.n_mels, 2 * models[0].dims.n_audio_ctx), np.random.default_rng(0)
    found = {row["name"]: {} for row in rows}
    for part, n_new, orders in (("encoder", 1, 6), ("greedy", 24, 2)):
        ms = np.empty((orders, len(models)))
        for row in ms:
            order = rng.permutation(len(models))
            row[order] = [1000 * m[f"{part}_seconds"] for m in flops.measure([models[i] for i in order], mel, n_new=n_new, repeats=7)]
        for name, value in zip(found, np.median(ms, 0)):
            found[name][f"{part}_ms"] = float(value)
    return found


# ------------------------------------------------------------------------------------------------------------- the tables

class Group:
    """One method at one size: its rows, one a seed, and those of its control, the dense model of the same seeds."""

    def __init__(self, rows: list[dict], control: list[dict]):
        self.rows, self.method, self.share = rows, rows[0]["method"], rows[0]["share"]
        errors, words = np.sum([row["errors"] for row in rows], 0), np.multiply(rows[0]["words"], len(rows))
        self.wer, self.ci = 100 * errors.sum() / words.sum(), run.interval(errors, words, 0)
        self.wers = [row["wer"] for row in rows]
        self.change = self.change_ci = None
        if control and rows[0]["name"] != control[0]["name"]:
            base = np.sum([row["errors"] for row in control if row["seed"] in self.seeds()], 0)
            self.change, self.change_ci = 100 * (errors - base).sum() / words.sum(), run.interval(errors - base, words, 0)
        self.faster = {part: np.mean([c[part] for c in control]) / self.mean(part) if control else 1.0
                       for part in ("encoder_ms", "greedy_ms")}

    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    def mean(self, key: str) -> float:
        return float(np.mean([row[key] for row in self.rows]))

    def no_loss(self) -> bool:
        """No loss that these clips can show: the paired interval reaches down to 0."""
        return self.change_ci is None or self.change_ci[0] <= 0


def grouped(rows: list[dict]) -> dict[tuple[str, float], Group]:
    """(method, share) -> Group. The control is the dense model of the same part; ablations have the core's."""
    controls = {"core": "dense", "ablation": "dense", "distilled": "dense distilled", "english": "English dense"}
    groups, keys = {}, dict.fromkeys((row["method"], row["share"]) for row in rows)
    for method, share in keys:
        mine = [row for row in rows if (row["method"], row["share"]) == (method, share)]
        groups[method, share] = Group(mine, [row for row in rows if row["method"] == controls[mine[0]["part"]]
                                             and row["seed"] in [r["seed"] for r in mine]])
    return groups


def table(groups: list[Group]) -> str:
    """Markdown, a line a group: means over its seeds, intervals over clips."""
    lines = ["| | block parameters | nonzero | on disk | memory | FLOPs | encoder | greedy | WER (95%) | less dense (95%) |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for g in groups:
        name = g.method + (f", {g.share:.0%}" if g.share else "") + (f", {len(g.rows)} seeds" if len({len(h.rows) for h in groups}) > 1 and len(g.rows) > 1 else "")
        less = f"{g.change:+.1f} ({g.change_ci[0]:+.1f} to {g.change_ci[1]:+.1f})" if g.change_ci else ""
        lines.append(f"| {name} | {g.mean('block_parameters') / 1e6:.3f} M | {g.mean('block_nonzero') / 1e6:.3f} M | "
                     f"{g.mean('bytes') / 1e6:.1f} MB | {g.mean('memory_bytes') / 1e6:.1f} MB | {g.mean('flops') / 1e9:.3f} G | "
                     f"{g.mean('encoder_ms'):.1f} ms, {g.faster['encoder_ms']:.2f}x | {g.mean('greedy_ms'):.0f} ms, "
                     f"{g.faster['greedy_ms']:.2f}x | {g.wer:.1f}% ({g.ci[0]:.1f} - {g.ci[1]:.1f}) | {less} |")
    return "\n".join(lines)


def summary(study: dict) -> str:
    """The README's first table: dense and all methods at 65%."""
    names = {"dense": "dense: fine-tuned, no penalty", "TSPAR": "**TSPAR**: penalty, two passes, removal, recovery",
             "L2": "the weakest groups of the dense model removed, recovery", "L2 per layer": "the same, an equal share of every layer", "IMP": "Iterative Magnitude Pruning, as many zeros"}
    groups, lines = grouped(study["rows"]), ["| | block parameters | FLOPs per clip | encoder, 1 clip | WER (95% interval) | less dense |",
                                             "|---|---:|---:|---:|---:|---:|"]
    dense = groups["dense", 0.0]
    for method, name in names.items():
        g = groups.get((method, 0.65 if method != "dense" else 0.0))
        if not g:
            continue
        less = lambda key: f" ({g.mean(key) / dense.mean(key) - 1:+.0%})" if g is not dense else ""
        change = f"{g.change:+.1f} ({g.change_ci[0]:+.1f} to {g.change_ci[1]:+.1f})" if g.change_ci else ""
        lines.append(f"| {name} | {g.mean('block_parameters') / 1e6:.3f} M{less('block_parameters')} | {g.mean('flops') / 1e9:.3f} G{less('flops')} | "
                     f"{g.mean('encoder_ms'):.1f} ms | {g.wer:.1f}% ({g.ci[0]:.1f} - {g.ci[1]:.1f}) | {change} |")
    return "\n".join(lines)


def furthest(groups: dict, method: str) -> float:
    """The largest share at which it and all smaller ones show no loss."""
    shares = sorted(share for m, share in groups if m == method)
    fine = [share for i, share in enumerate(shares) if all(groups[method, s].no_loss() for s in shares[: i + 1])]
    return max(fine, default=0.0)


def goals(groups: dict) -> str:
    """What was set as the goal before the study, and whether the figures reach it."""
    def line(text: str, ok: bool, figure: str) -> str:
        return f"- {text}: {'reached' if ok else '**not reached**'} ({figure})."

    def change(g: Group) -> str:
        return f"{g.change:+.1f} points, {g.change_ci[0]:+.1f} to {g.change_ci[1]:+.1f}"
    lines = []
    for key, text in ((("TSPAR", 0.65), "65% of the block parameters removed without a loss that shows"),
                      (("TSPAR distilled", 0.8), "with `--distil` 80% likewise, against the distilled dense model")):
        if key in groups:
            g = groups[key]
            far = furthest(groups, key[0])
            lines.append(line(text, g.no_loss(), change(g) + (f"; no loss shows up to {far:.0%}" if far else "")))
    if ("TSPAR distilled", 0.88) in groups:
        g = groups["TSPAR distilled", 0.88]
        lines.append(line("with `--distil` 88% at no more than 1.5 points", g.change <= 1.5, change(g)))
    for share, factor in ((0.65, 1.5), (0.8, 2.0)):
        if ("TSPAR", share) in groups:
            g = groups["TSPAR", share]
            lines.append(line(f"the encoder {factor} times faster on one clip at {share:.0%}", g.faster["encoder_ms"] >= factor,
                              f"{g.faster['encoder_ms']:.2f} times"))
    for plan, rivals in (("TSPAR", ("IMP", "L2", "dense", "magnitude in one shot", "L2 per layer", "random units")),
                         ("TSPAR distilled", ("IMP distilled", "L2 distilled", "dense distilled"))):
        mine = [g for (method, _), g in groups.items() if method == plan]
        beaten = [f"{plan} {g.share:.0%} by {rival.method}" + (f" {rival.share:.0%}" if rival.share else "") for g in mine for rival in groups.values()
                  if rival.method in rivals and rival.mean("encoder_ms") < 1.05 * g.mean("encoder_ms") and rival.wer < g.wer]
        if mine:
            lines.append(line(f"no other method as fast as {plan} (within 5%) and better", not beaten, "; ".join(beaten) or "none is"))
    return "\n".join(lines)


def claims(groups: dict) -> str:
    """The paper's headline numbers, what nano says of each, and the command that would check it on the real thing."""
    reproduced = lambda ok: "reproduced on nano" if ok else "not reproduced on nano"
    small, target = "`python run.py --model small --data cv11_hi`", "`python run.py --model small --data cv11_hi --target 0.35`"
    rows, dense, t35 = [], groups.get(("dense", 0.0)), groups.get(("TSPAR", 0.35))
    if dense and t35:
        less = lambda key: 1 - t35.mean(key) / dense.mean(key)
        rows += [("small: 35.4% fewer parameters without loss of WER", f"{reproduced(t35.no_loss())}: 35% of the block parameters "
                  f"removed, {t35.change:+.1f} points ({t35.change_ci[0]:+.1f} to {t35.change_ci[1]:+.1f})", target),
                 ("small: 14.25% less memory, 18.5% fewer FLOPs", f"not checkable: shares depend on the model's shapes. "
                  f"nano at 35%: {less('memory_bytes'):.1%} and {less('flops'):.1%}", target),
                 ("medium: 31% fewer parameters, 15.29% less memory, 16.95% fewer FLOPs", "not checkable: OpenAI's weights cannot be had "
                  "here", "`python run.py --model medium --data cv11_hi --target 0.31`")]
    far = {m: furthest(groups, m) for m in ("TSPAR", "IMP") if any(method == m for method, _ in groups)}
    if len(far) == 2:
        rows.append(("18.7% more parameters pruned than Iterative Magnitude Pruning", f"{reproduced(far['TSPAR'] > far['IMP'])}: no loss "
                     f"shows up to {far['TSPAR']:.0%} with TSPAR, up to {far['IMP']:.0%} with IMP, whose zeros save nothing", small))
        shares = sorted({share for m, share in groups if m == "TSPAR"} & {share for m, share in groups if m == "IMP"})
        gaps = {share: groups["TSPAR", share].wer - groups["IMP", share].wer for share in shares}
        rows.append(("WER 12.31 points below that of Iterative Magnitude Pruning", f"{reproduced(max(gaps.values()) < -5)}: TSPAR less IMP "
                     "at equal share, " + ", ".join(f"{gap:+.1f} at {share:.0%}" for share, gap in gaps.items()), small))
    return "\n".join(["| the paper says | what we could check | the command for it |", "|---|---|---|",
                      *("| " + " | ".join(row) + " |" for row in rows)])


def results(study: dict) -> str:
    """The README's section: tables, figures and sentences."""
    groups = grouped(study["rows"])
    of = lambda part: [g for g in groups.values() if g.rows[0]["part"] == part]
    text = [f"Means over seeds {', '.join(map(str, sorted({r['seed'] for r in study['rows']})))}; intervals by bootstrap over the "
            f"{len(study['rows'][0]['errors'])} test clips, each with the errors of all its seeds; the last column is paired with the dense "
            f"model of the same seeds. Latency: one clip, all models taking turns. {study['machine']}. Made by `python run.py --study`.",
            table(of("core")), "![WER against FLOPs, a line a method](tests/data/study/wer.png)",
            "**The goals set beforehand:**", goals(groups)]
    if of("distilled"):
        text += ["**With `--distil`**, all learn from the model as it came (beyond the paper), and recover for twice as many steps:", table(of("distilled"))]
    if of("ablation"):
        text += ["**One thing changed**, 65% of the block parameters, the penalty twice as strong as above, as in `python run.py`; seed 0, "
                 "but for the first line and \"L1 alone\":", table(of("ablation"))]
    if of("english"):
        text += ["**Another language**: English, made by `tests/make_mini_hi.py --voice en` and `tests/make_nano.py --language en`, seed 0, "
                 "TSPAR with Hindi's settings, the others with rates chosen on English dev clips:", table(of("english"))]
    text += ["![Group norms and weights before the cut, with both thresholds](tests/data/study/norms.png)",
             "![What is left of every layer](tests/data/study/layers.png)",
             "**What the paper claims and what we could check:**", claims(groups)]
    return "\n\n".join(text)


# ------------------------------------------------------------------------------------------------------------ the figures

# Okabe and Ito: told apart by colour-blind eyes.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
LINES = {"TSPAR": (BLUE, "o-"), "IMP": (ORANGE, "s--"), "L2": (GREEN, "^-."), "L2 per layer": (PURPLE, "v-"), "dense": (GREY, "D"),
         "TSPAR distilled": (BLUE, "o:"), "dense distilled": (GREY, "d")}


def draw(study: dict, folder: Path) -> None:
    """wer.png, norms.png, layers.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    groups = grouped(study["rows"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axis, key, label, unit in ((axes[0], "flops", "FLOPs of one clip (G)", 1e9), (axes[1], "encoder_ms", "encoder, one clip (ms)", 1)):
        for method, (colour, style) in LINES.items():
            line = sorted((g for (m, _), g in groups.items() if m == method), key=lambda g: g.share)
            if line:
                wers = np.array([g.wer for g in line])
                low, high = np.array([g.ci for g in line]).T
                axis.errorbar([g.mean(key) / unit for g in line], wers, np.abs([wers - low, high - wers]), fmt=style, color=colour,
                              capsize=3, label=method)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="WER on test (%), 95% interval", ylim=(0, None))
    axes[0].legend()
    save(figure, folder / "wer.png")

    shown = next((row for row in study["rows"] if "histograms" in row), None)
    if shown:
        figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), layout="constrained")
        for (left, right), (side, h) in zip(axes, shown["histograms"].items()):
            left.stairs(h["before"], h["norms"], color=GREY, label="before fine-tuning")
            left.stairs(h["after"], h["norms"], color=BLUE, fill=True, alpha=0.5, label="after, with the penalty")
            left.axvline(h["cut"], color=ORANGE, linestyle="--", label="threshold of pass 1")
            left.set(title=f"{side}: groups", xlabel="norm / root of size", ylabel="groups", yscale="symlog", ylim=(0, 1e5))
            right.stairs(h["weights"], np.linspace(0, 10, 41), color=BLUE, fill=True, alpha=0.5, label="weights of the groups that stay")
            right.axvline(1, color=ORANGE, linestyle="--", label="threshold of pass 2")
            right.set(title=f"{side}: weights", xlabel="|w| / threshold of its matrix", ylabel="weights")
            left.legend(loc="upper right"), right.legend(loc="upper right")
        save(figure, folder / "norms.png")

    bars = [(row["method"], row["left"]) for row in study["rows"] if row.get("left") and row["part"] == "core" and row["share"] == 0.65 and not row["seed"]]
    if bars:
        names, high = [*bars[0][1]], 0.8 / len(bars)
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        for i, (method, left) in enumerate(bars):
            axis.barh(np.arange(len(names)) + i * high, [100 * left[name] for name in names], high, color=LINES[method][0], label=method)
        axis.set_yticks(np.arange(len(names)) + 0.4 - high / 2, [name.replace(".blocks", "") for name in names])
        axis.invert_yaxis()
        axis.set(xlabel="groups left (%), 65% of the block parameters removed, seed 0", xlim=(0, 100))
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(bars), frameon=False)          # above, where no bar is
        save(figure, folder / "layers.png")


def save(figure, path: Path) -> None:
    run.write(path, lambda file: figure.savefig(file, dpi=110, format="png"))


# --------------------------------------------------------------------------------------------------------------- the study

def collect(folder: Path) -> dict:
    """study.json of that folder, or made from the reports in it."""
    reports = sorted(folder.glob("*/report.json"))
    if not reports:
        run.need((folder / "study.json").is_file(), f"--from {folder} holds neither study.json nor ARM/report.json; name the folder of a study")
        return json.loads((folder / "study.json").read_text(encoding="utf8"))
    rows = {row["name"]: row for row in (json.loads(path.read_text(encoding="utf8")) for path in reports)}
    rows = [{k: v for k, v in (rows[arm.name] | vars(arm)).items() if k not in ("transcripts", "settings")} for arm in arms() if arm.name in rows]
    latency = folder / "latency.json"
    latency = json.loads(latency.read_text(encoding="utf8")) if latency.is_file() else {}
    machine = latency.pop("machine", "")
    return {"machine": machine, "rows": [{"encoder_ms": float("nan"), "greedy_ms": float("nan")} | row | latency.get(row["name"], {}) for row in rows]}


def publish(study: dict, text: str, folder: Path, plot: bool) -> None:
    """results.md, study.json, figures; into the README too, if the study is whole."""
    dump = lambda file: file.write(json.dumps(study, ensure_ascii=False, separators=(",", ":")).encode())
    run.write(folder / "study.json", dump)
    run.write(folder / "results.md", lambda file: file.write(text.encode()))
    if plot:
        draw(study, folder)
    if {arm.name for arm in arms()} <= {row["name"] for row in study["rows"]}:
        readme = (ROOT / "README.md").read_text(encoding="utf8")
        for mark, new in (("summary", summary(study)), ("results", text)):
            head, start, rest = readme.partition(f"<!-- {mark} -->\n")
            _, end, tail = rest.partition(f"<!-- /{mark} -->\n")
            readme = f"{head}{start}\n{new}\n\n{end}{tail}" if end else readme
        run.write(ROOT / "README.md", lambda file: file.write(readme.encode()))
        PUBLISHED.mkdir(exist_ok=True)
        run.write(PUBLISHED / "study.json", dump)
        for figure in folder.glob("*.png"):
            if folder.resolve() != PUBLISHED:
                shutil.copy(figure, PUBLISHED)


def main(s: run.Settings) -> int:
    """All that is missing, then what is made of it."""
    folder = Path(s.from_ or (s.out if s.out != run.settings([]).out else "runs/study"))
    if not s.from_:
        (folder / "first").mkdir(parents=True, exist_ok=True)
        todo, first = [arm for arm in arms() if not (folder / arm.name / "report.json").exists()], {}
        print(f"{len(todo)} of {len(arms())} arms to run, {os.cpu_count()} at a time")
        pool, jobs = ThreadPoolExecutor(os.cpu_count()), []
        for part in dict.fromkeys(arm.part for arm in todo):             # the core is whole before the others begin
            here = [arm for arm in todo if arm.part == part]
            for arm in here:
                if first_name(arm) not in first and not (folder / "first" / f"{first_name(arm)}.pt").exists():
                    first[first_name(arm)] = pool.submit(child, "first", folder, arm)
            jobs += [pool.submit(child, "arm", folder, arm, first.get(first_name(arm))) for arm in here]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        rows = collect(folder)["rows"]
        machine = {"machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}"}
        run.write(folder / "latency.json", lambda file: file.write(json.dumps(latencies(folder, rows) | machine).encode()))
    study = collect(folder)
    text = results(study)
    publish(study, text, folder, s.plot)
    print(f"\n{text}\n\nin {folder}: study.json, results.md" + ", wer.png, norms.png, layers.png" * s.plot)
    return 0


def child(stage: str, folder: Path, arm: Arm, after: Future | None = None) -> None:
    """One job in a process of its own, with one thread: so two cores do nearly twice the work of one."""
    if after:
        after.result()
    started = time.time()
    done = subprocess.run([sys.executable, __file__, stage, str(folder), arm.name], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          stdout=subprocess.DEVNULL)
    print(f"{time.strftime('%H:%M')}  {stage:<5} {first_name(arm) if stage == 'first' else arm.name:<32} {time.time() - started:5.0f} s", flush=True)
    if done.returncode:
        raise run.Stop(f"{stage} of {arm.name} failed, see above; the same command goes on with what is left", 1)


if __name__ == "__main__":
    stage, folder, name = sys.argv[1:]
    arm = next(arm for arm in arms() if arm.name == name)
    (train_first if stage == "first" else train_arm)(arm, Path(folder))
