"""What other counters say about the same model: openai-whisper tiny, random weights, one 30-second window.

    python tests/peers_flops.py

Each is asked for the encoder and for the whole model with 27 target tokens, on CPU, with attention fused (as
whisper runs it) and unfused. Those that report MACs are doubled, so that every number is in FLOPs, 2 per
multiply-add. Printed is the README's table: what each counts, divided by what flops.py says, or the error that
stopped it. What is not installed is said to be missing. The project needs none of these packages:

    pip install --no-deps thop ptflops fvcore iopath yacs tabulate termcolor portalocker torch-pruning
    pip install calflops transformers
"""
import contextlib
import copy
import importlib
import importlib.metadata
import io
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from whisper.model import ModelDimensions, MultiHeadAttention, Whisper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flops

DIMS = ModelDimensions(80, 1500, 384, 6, 4, 51865, 448, 384, 6, 4)
TOKENS = 27


def by_torch(net, inputs):
    """PyTorch's own counter, fed by the operations that run."""
    with FlopCounterMode(display=False) as counter:
        net(*inputs.values())
    return counter.get_total_flops()


def by_thop(net, inputs):
    """MACs of the module classes it knows, by exact class: whisper's subclasses are not among them."""
    return 2 * importlib.import_module("thop").profile(net, inputs=tuple(inputs.values()), verbose=False)[0]


def by_ptflops(net, inputs, backend="pytorch"):
    """MACs: of modules and functionals it patches, or ("aten") of the operations that run."""
    count = importlib.import_module("ptflops").get_model_complexity_info
    return 2 * count(net, (1,), input_constructor=lambda _: inputs, as_strings=False, backend=backend,
                     print_per_layer_stat=False, verbose=False)[0]


def by_ptflops_aten(net, inputs):
    return by_ptflops(net, inputs, "aten")


def by_fvcore(net, inputs):
    """MACs (which it calls flops) of the operations in a traced graph."""
    analysis = importlib.import_module("fvcore.nn").FlopCountAnalysis(net, tuple(inputs.values()))
    return 2 * analysis.unsupported_ops_warnings(False).total()


def by_torch_pruning(net, inputs):
    """MACs of the module classes it knows."""
    return 2 * importlib.import_module("torch_pruning").utils.count_ops_and_params(net, inputs)[0]


def by_calflops(net, inputs):
    """FLOPs of the modules and functionals it patches."""
    count = importlib.import_module("calflops").calculate_flops
    return count(net, kwargs=inputs, print_results=False, output_as_string=False)[0]


PEERS = [("thop", "thop", by_thop), ("ptflops", "ptflops", by_ptflops), ("ptflops", "ptflops aten", by_ptflops_aten),
         ("fvcore", "fvcore", by_fvcore), ("torch-pruning", "torch-pruning", by_torch_pruning),
         ("calflops", "calflops", by_calflops), ("torch", "FlopCounterMode on CPU", by_torch)]


def ask(count, net, inputs, truth: int) -> str:
    """What is counted as a ratio to the truth, or how the counter stopped, which is a finding too."""
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), torch.no_grad():
            return f"{count(copy.deepcopy(net), inputs) / truth:.4f}"
    except ImportError as error:
        return f"no {error.name}"
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, AssertionError) as error:
        return type(error).__name__


def row(label: str, version: str, count, asked) -> None:
    """A line of the table: the encoder, then the whole model, each fused / unfused."""
    answers = []
    for path in ("fused", "unfused"):
        with mock.patch.object(MultiHeadAttention, "use_sdpa", path == "fused"):
            answers.append([ask(count, *question) for question in asked])
    print(f"| {label} | {version} | " + " | ".join(" / ".join(cell) for cell in zip(*answers)) + " |")


def questions(model: Whisper, device: str):
    """The encoder and the whole model, each with its named inputs and the FLOPs that flops.py gives."""
    mel, tokens = torch.zeros(1, 80, 3000, device=device), torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    encoder = flops.encoder(model)
    return ((model.encoder, {"x": mel}, encoder),
            (model, {"mel": mel, "tokens": tokens}, encoder + flops.decoder(model, TOKENS)))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = Whisper(DIMS).eval()
    with torch.device("meta"), mock.patch.object(torch.Tensor, "to_sparse", lambda tensor: tensor):
        meta = Whisper(DIMS)
    asked = questions(model, "cpu")
    print(f"encoder {asked[0][2]:,} FLOPs, whole model {asked[1][2]:,}\n\n"
          "| counter | version | encoder: fused / unfused | whole model: fused / unfused |\n|---|---|---:|---:|")
    for package, label, count in PEERS:
        try:
            row(label, importlib.metadata.version(package), count, asked)
        except importlib.metadata.PackageNotFoundError:
            print(f"| {label} | not installed | | |")
    row("the same on meta, and **flops.py**", torch.__version__, by_torch, questions(meta, "meta"))


if __name__ == "__main__":
    main()
