"""What it is worth to turn every head before it is pruned: an experiment on so762's dev clips, not in prune.py yet.

    python tests/balance.py FOLDER 0.35 0.5 0.65      # FOLDER as for tests/real.py; to tests/data/real/balance.json

A head multiplies queries q by keys k, and what it averaged, u, by its columns V of out. So query may be multiplied
by any invertible T if key is by T^-T, and value by T if out is by T^-1: the function stays. With A and B the sums of
q q' and of k k' (k less its mean over a clip, which softmax does not see), or of u u' and V'V, this takes the T with

    T A T' = T^-T B T^-1 = S, diagonal, falling          (balanced truncation: Moore 1981)

Of a head's dimensions, now uncorrelated, the first ones then do most of its work: the squares of all q'k, and those
of all V u, add up to sum_j S_j^2. The loss's curvature is not known in the new axes, only what a head's dimensions
cost together in the old ones (prune.py, equation 3): sum_j n_j^2. That is divided in the ratio of S_j^2.
"""
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from whisper.model import MultiHeadAttention, Whisper

sys.path.insert(0, str(Path(__file__).parent))
import real  # noqa: E402, which makes the project's files known
import prune
import run


@torch.no_grad()
def balance_(model: Whisper, batches: list[tuple[Tensor, Tensor]], curvature: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn all heads in place, after training and before two_pass. Returns the curvature in the new axes: the same
    number for all weights of a dimension, so that two_pass finds the n_j said above; that of other weights stays."""
    attentions, moments, h = prune._modules(model, MultiHeadAttention), {}, dict(curvature)
    n = prune.two_pass(model, z2=None, curvature=curvature).norms

    def summed(name: str, n_head: int):
        def hook(_, inputs: tuple, output: Tensor) -> None:
            x = (inputs[0] if name.endswith("out") else output).double()         # in float32 A may have no root
            x = (x - x.mean(1, keepdim=True) if name.endswith("key") else x).unflatten(-1, (n_head, -1))
            moments[name] = moments.get(name, 0) + torch.einsum("bthi,bthj->hij", x, x)
        return hook

    hooks = [getattr(attn, leaf).register_forward_hook(summed(f"{name}.{leaf}", attn.n_head))
             for name, attn in attentions for leaf in ("query", "key", "out")]
    for mels, ids in batches:
        model.decoder(ids, model.encoder(mels))
    for hook in hooks:
        hook.remove()
    for name, attn in attentions:
        heads = lambda p: p.double().unflatten(0, (attn.n_head, -1))                       # (n_head, width, others)
        V = heads(attn.out.weight.T)
        for unit, one, other, A, B in (
                ("qk", attn.query, attn.key.weight, moments[f"{name}.query"], moments[f"{name}.key"]),
                ("vo", attn.value, attn.out.weight.T, moments[f"{name}.out"], V @ V.mT)):
            for M in (A, B):                     # what is never used would make T infinite
                power = M.diagonal(dim1=1, dim2=2)
                power += 1e-4 * power.mean(1, keepdim=True).clamp(min=1e-8)
            L = torch.linalg.cholesky(A)
            squares, U = (x.flip(-1) for x in torch.linalg.eigh(L.mT @ B @ L))             # S^2
            squares = squares.clamp(min=1e-16)
            root = squares.pow(0.25)
            T, inverse = root[:, :, None] * (U.mT @ torch.linalg.inv(L)), L @ U / root[:, None]
            for p, M in ((one.weight, T), (one.bias[:, None], T), (other, inverse.mT)):
                p.copy_((M @ heads(p)).reshape(p.shape))
            cost = n[f"{name}.{unit}"].to(squares).view(squares.shape).square().sum(1, keepdim=True)
            cost = (cost * squares / squares.sum(1, keepdim=True)).flatten()               # n_j^2 in the new axes
            group = prune.units(model)[f"{name}.{unit}"]
            size = sum(p.double().square().reshape(len(p), -1).sum(1 - axis) for p, axis in group)
            for (p, axis), (member, _) in zip(group, prune._members(f"{name}.{unit}")):
                each = (cost / size).to(p)
                h[member] = each.expand_as(p) if axis or p.ndim == 1 else each[:, None].expand_as(p)
    return h


def main(folder: Path, *shares: str) -> None:
    s, original = real.begin(folder, "so762", "en", 0, "so762-0")
    train, dev = (run.Clips(original, split, s) for split in ("train", "dev"))
    model = run.prepared(original, train, s)
    curvature, path = run.fine_tune(model, train, s, "dense: fine-tune").curvature, real.RESULTS / "balance.json"
    some = np.random.default_rng(s.seed).permutation(len(train))[:run.CALIBRATION].tolist()
    some.sort(key=train.n_targets)
    clips = [(mels.to(s.device), ids.to(s.device)) for mels, ids, _ in run.batches(train, s, [(i,) for i in some], 8)]
    for share in map(float, shares):
        for turned in (False, True):
            less = copy.deepcopy(model)
            h = balance_(less, clips[::3], curvature) if turned else curvature
            prune.remove_(less, prune.two_pass(less, z2=None, floor=0, curvature=h, share=share))
            row = {"at once": real.cross_entropy(less, dev, s)}
            with run.mixed(s):
                prune.refit_(less, model, clips)
            row["fitted"] = real.cross_entropy(less, dev, s)
            title = f"{share:.0%}" + ", heads turned" * turned
            run.fine_tune(less, train, replace(s, steps=s.recovery_steps), f"balance {title}".replace("%", ""))
            row |= {"recovered": real.cross_entropy(less, dev, s),
                    "wer": run.figures(less, dev, run.transcribe(less, dev, s), s)["wer"]}
            print(title, row, flush=True)
            rows = real.results(path) | {title: row}
            run.write(path, lambda file: file.write(json.dumps(rows, indent=1).encode()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
