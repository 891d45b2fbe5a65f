"""TSPAR on OpenAI's own Whisper-base and real speech: every arm of one data set and seed, resumable, counts only.

    python tests/real.py FOLDER so762 en 0          # FOLDER holds base.pt and so762/: an hour on 2 cores
    python tests/real.py FOLDER hi_kokoro hi 0
    python tests/real.py FOLDER latency             # encoder and greedy decoding of what the arms left, taking turns
    python tests/real.py table                      # the rows of README.md from tests/data/real/*.json

First phase and dense model are trained once; each share of ARMS is pruned from that first phase and recovers for as
many steps as dense goes on. Results go to tests/data/real/DATA-SEED.json, a file an arm at a time: settings, counts of
errors and words a clip, never texts. Checkpoints stay in runs/real/.
"""
import copy
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flops
import prune
import run

RESULTS, ARMS = ROOT / "tests/data/real", (0.5, 0.35, 0.65)
RATES = {"so762": 2.5e-5, "hi_kokoro": 5e-5}


def arms(folder: Path, data: str, language: str, seed: int, *flags: str) -> None:
    """Train, prune, recover, measure; what a file of RESULTS has already is not done again."""
    out, name = ROOT / f"runs/real/{data}-{seed}", f"{data}-{seed}"
    (out / "state").mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    s = run.settings(["--model", str(folder / "base.pt"), "--data", str(folder / data), "--language", language,
                      "--window", "8", "--vocabulary", "data", "--lr", str(RATES[data]), "--seed", str(seed),
                      "--steps", "250", "--recovery-steps", "250", "--batch", "8", "--z2", "-99", "--workers", "0",
                      "--out", str(out), "--resume", *flags])
    original = run.load_model(s)
    s = run.completed(s, original)
    clips = {split: run.load_clips(original, split, s) for split in ("train", "test")}
    path = RESULTS / f"{name}.json"
    done = json.loads(path.read_text()) if path.is_file() else {}

    def measured(arm: str, model: torch.nn.Module, **more) -> None:
        if arm in done:
            return
        started = time.time()
        texts = run.transcribe(model, clips["test"], s)
        prune.save(model, out / f"{arm}.pt")
        half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
        done[arm] = {**run.figures(model, clips["test"], texts, s), **more, "encoder_flops": flops.encoder(model),
                     "fp16_bytes": sum(value.numel() * value.element_size() for value in half.values()),
                     "measuring_seconds": time.time() - started}
        done["settings"] = {k: v for k, v in asdict(s).items() if k not in ("model", "data", "out")}
        done["machine"] = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        run.write(path, lambda file: file.write(json.dumps(done, default=float).encode()))
        print(arm, f"WER {done[arm]['wer']:.1f}  {done[arm]['block_parameters']:,} block parameters", flush=True)

    dense = run.shortened(copy.deepcopy(original), clips["train"], s)
    first = run.fine_tune(dense, clips["train"], s, "dense: fine-tune")
    for share in ARMS:
        model, started = copy.deepcopy(dense), time.time()
        if f"{share:.0%}" not in done:
            plan = run.prune_(model, clips["train"], replace(s, target=share), first.curvature)
            took = time.time() - started
            loss = run.fine_tune(model, clips["train"], run.recovery(s), f"recover {share}").loss
            measured(f"{share:.0%}", model, removed=plan.removed(), pruning_seconds=took, loss=loss)
        if share == ARMS[0]:
            loss = run.fine_tune(dense_ := copy.deepcopy(dense), clips["train"], run.recovery(s), "dense: go on").loss
            measured("dense", dense_, loss=loss)
    measured("original", original)               # last: what hallucinates takes long


if __name__ == "__main__":
    if len(sys.argv) > 3:
        arms(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
