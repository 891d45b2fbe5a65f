"""Rehearse the real run: random weights in OpenAI's file format, a Common Voice folder of mp3, two steps of every
phase.

    python tests/rehearse.py                    # small's dimensions, minutes on a CPU
    python tests/rehearse.py medium 16 --device cuda --window 10          # size, clips a step, flags of run.py

Nothing is learned; what must hold is that everything loads, trains, stops, resumes, prunes, scores and saves. Prints
what the steps took, the peak of memory, and how fast clips are decoded, which a training step must not outrun.
"""
import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import whisper
from whisper.model import ModelDimensions, Whisper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prune
import run

MINI = Path(__file__).resolve().parent / "data/mini_hi"
DIMS = {"tiny": ModelDimensions(80, 1500, 384, 6, 4, 51865, 448, 384, 6, 4),
        "small": ModelDimensions(80, 1500, 768, 12, 12, 51865, 448, 768, 12, 12),
        "medium": ModelDimensions(80, 1500, 1024, 16, 24, 51865, 448, 1024, 16, 24)}


def checkpoint(path: Path, size: str) -> Path:
    """Random weights as OpenAI ships them: dims and a float16 state dict."""
    torch.manual_seed(0)
    model = Whisper(DIMS[size])
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    torch.save({"dims": vars(DIMS[size]), "model_state_dict": state}, path)
    return path


def common_voice(folder: Path, rows: int = 3) -> Path:
    """A folder as Common Voice unpacks it: 48 kHz mp3, tab-separated tables with all their columns, a lone quotation
    mark."""
    (folder / "clips").mkdir(parents=True)
    lines = (MINI / "test.tsv").read_text(encoding="utf8").split("\n")[: rows + 1]
    for line in lines[1:]:
        name = line.split("\t")[1]
        samples, _ = soundfile.read(MINI / "clips" / name)
        spectrum = np.zeros(3 * len(samples) // 2 + 1, complex)
        spectrum[: len(samples) // 2 + 1] = np.fft.rfft(samples)
        soundfile.write(folder / "clips" / name.replace(".ogg", ".mp3"), 3 * np.fft.irfft(spectrum, 3 * len(samples)),
                        48000)
    sentence = lines[1].split("\t")[2]
    lines[1] = lines[1].replace(sentence, '"' + sentence)
    for split in ("train", "dev", "test", "validated"):
        (folder / f"{split}.tsv").write_text("\n".join(lines).replace(".ogg", ".mp3") + "\n", encoding="utf8")
    return folder


def rehearse(size: str, folder: Path, batch: int, flags: list[str]) -> Path:
    """Two steps of every phase, interrupted in the third step of training, and resumed. Returns OUT."""
    arguments = ["--model", str(checkpoint(folder / f"{size}.pt", size)), "--data", str(common_voice(folder / "cv")),
                 "--steps", "2",
                 "--recovery-steps", "2", "--batch", str(batch), "--out", str(folder / "out"), *flags]
    backward, decoding, seconds = run.backward, run.decoding, []

    def timed(*given):
        if len(seconds) == 5:                    # three were for the estimate
            seconds.append(0)
            os.kill(os.getpid(), signal.SIGINT)
        started = time.perf_counter()
        loss = backward(*given)                  # reads the loss, so waits for a GPU
        seconds.append(time.perf_counter() - started)
        return loss
    run.backward = timed
    # random weights would never come to an end
    run.decoding = lambda *given: run.replace(decoding(*given), sample_len=2)
    try:
        assert run.main(arguments) == 130, "interrupted"
        assert run.main([*arguments, "--resume"]) == 0, "resumed to the end"
    finally:
        run.backward, run.decoding = backward, decoding
    for name in ("dense", "tspar", "imp"):
        prune.load(folder / "out" / f"{name}.pt")
    whisper.load_model(str(folder / "out/dense.pt"), device="cpu")
    print(f"{size}, {batch} clips: seconds of forward and backward {', '.join(f'{x:.2f}' for x in seconds if x)}")
    return folder / "out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="small", choices=DIMS)
    parser.add_argument("batch", nargs="?", default=2, type=int)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        rehearse(args.size, Path(folder), args.batch, flags)
        clips = run.Clips(Whisper(DIMS["tiny"]), "train", run.Settings(data=f"{folder}/cv", workers=1))
        started = time.perf_counter()
        for i in range(20):
            clips[i % len(clips), 0, i]
        print("decoding, resampling, log-mel, augmentation: "
              f"{(time.perf_counter() - started) / 20 * 1000:.0f} ms a clip of "
              f"{soundfile.info(clips.paths[0]).duration:.1f} s in one process, {torch.get_num_threads()} threads")
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak, where = resident, f"{os.cpu_count()} cores"
    if torch.cuda.is_available():
        peak, where = torch.cuda.max_memory_allocated(), "the GPU"
    print(f"peak memory {peak / 1e9:.2f} GB on {where}")


if __name__ == "__main__":
    main()
