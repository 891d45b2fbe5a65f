"""Make tests/data/nano.pt: a Whisper of 8.6 million parameters, trained from nothing on tests/data/mini_hi alone.

    python tests/make_nano.py                                                     # 50 minutes on 2 cores
    python tests/make_nano.py --data runs/mini_en --language en --out runs/nano_en.pt                 # English

It is a stock openai-whisper checkpoint ({"dims", "model_state_dict"}): whisper.load_model reads it, whisper.decode
decodes with it. Its window is 3 s instead of 30, its width 128; it has tiny's four and four layers and the full
multilingual vocabulary, so everything that works on nano works on Whisper-small by the same code. What it knows is
mini_hi: synthetic speech, 160 words.

Two things make it learn so fast. An auxiliary CTC loss on the encoder (thrown away afterwards): without it,
attention takes far longer to align audio and text. And the vocabulary is cut to what occurs (prune.vocabulary_), so
that the softmax costs 1,900 rows instead of 51,865; prune.expand brings the others back as rows that never win. Steps
and stretched clips (`warped`) make it hear voices that it never met: with three and two layers 1,800 steps on clips
as they are end at 7.6% WER on dev, 3.1% on test, 6,000 on stretched ones at 1.5%, 0.2%; with four and four, which
leave pruning more to remove, at 0.7%, 0.6%.
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prune
from run import Clips, Settings, augment, objective

DATA = Path(__file__).resolve().parent / "data"
DIMS = whisper.model.ModelDimensions(80, 150, 128, 4, 4, 51865, 128, 128, 4, 4)


def fresh(clips: Clips, seed: int) -> whisper.model.Whisper:
    """A random model that knows the tokens of the clips."""
    torch.manual_seed(seed)
    model = whisper.model.Whisper(DIMS)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.02)
    torch.nn.init.constant_(model.decoder.ln.bias, 0.01)                # at zero, expand finds no row that never wins
    return prune.vocabulary_(model, {token for row in clips.tokens for token in row})


def warped(mel: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Another voice and pace: frequencies up to 10% higher or lower (vocal tract length perturbation: Jaitly, Hinton
    2013), up to 15% faster (slower would push the end out of the window). mel and result: (n_mels, n_frames)."""
    stretch = rng.uniform((0.9, 1.0), (1.1, 1.15))
    rows, columns = ((torch.linspace(0, 2, n) * s - 1).float() for n, s in zip(mel.shape, stretch))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
    return F.grid_sample(mel[None, None], grid[None], padding_mode="border", align_corners=True)[0, 0]


def train(model: whisper.model.Whisper, clips: Clips, steps: int, seed: int, lr: float = 3e-3,
          batch: int = 16) -> None:
    """AdamW (0.9, 0.98), 100 steps of warm-up, cosine down to 2%, gradients clipped to 1."""
    rng, settings = np.random.default_rng(seed), Settings(device="cpu", precision="fp32")
    row_of, n_rows = model.decoder.row_of, len(model.decoder.kept_ids)
    head = torch.nn.Linear(DIMS.n_audio_state, n_rows + 1)              # CTC over the rows that occur, blank last
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100) * (
        0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2))
    order, bar = [], tqdm(range(steps), disable=None)
    for _ in bar:
        if len(order) < batch:
            order = rng.permutation(len(clips)).tolist()
        chosen, order = order[:batch], order[batch:]
        mels, inputs, targets = clips.collate([clips[i,] for i in chosen])
        mels = torch.stack([augment(warped(mel, rng), rng) for mel in mels])
        loss = objective(model, [mels, inputs, targets], settings) / targets.ge(0).sum()
        spoken = [torch.tensor(clips.tokens[i][clips.n_start:-1]) for i in chosen]
        said = head(model.encoder(mels)).log_softmax(-1).transpose(0, 1)
        ctc = F.ctc_loss(said, row_of[torch.cat(spoken)], torch.full((batch,), len(said)),
                         torch.tensor([*map(len, spoken)]), blank=n_rows)
        optimizer.zero_grad()
        (loss + ctc).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}  ctc {ctc.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA / "mini_hi")
    parser.add_argument("--language", default="hi")
    parser.add_argument("--out", type=Path, default=DATA / "nano.pt")
    args = parser.parse_args()
    clips = Clips(whisper.model.Whisper(DIMS), "train", Settings(data=str(args.data), language=args.language))
    started, model = time.time(), fresh(clips, args.seed)
    train(model, clips, args.steps, args.seed)
    state = {name: value.half() if value.is_floating_point() else value
             for name, value in prune.expand(model).state_dict().items()}
    torch.save({"dims": vars(DIMS), "model_state_dict": state}, f"{args.out}.tmp")
    os.replace(f"{args.out}.tmp", args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {time.time() - started:.0f} s")
