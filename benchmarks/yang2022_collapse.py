"""The runaway of the first adaptive rule of Yang et al. (2022): "keep m", with retraining from the start each round.

Trains an MLP 784-128-128-10 on MNIST, prunes it by m = ⌈d·S^(−q/(1−q))⌉ (q = ½, η = 0), sets the survivors back to
their initial values, trains again, and so on. With S over all weights, those removed before included, beside a d of
survivors the rule removes the more, the more it has removed; with S over the survivors it does not run away.

    ELLQ_DATA=… python benchmarks/yang2022_collapse.py [--epochs 20] [--over all] [--csv FILE]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

import ellq
from ellq.analysis import accuracy, datasets, mlp
from ellq.pruning.masks import maskable_weights, retained_entries
from ellq.theory import power_sums

LOGGED = (118016, 83363, 48302, 17712, 2477, 45)  # weights by round, in the authors' doc/log.txt
Q = 0.5


def main() -> None:
    """Run the rounds and print what survives each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of each training; the authors' 100")
    parser.add_argument("--rounds", type=int, default=9, help="the most rounds")
    parser.add_argument("--scope", choices=("unit", "layer", "global"), default="global")
    parser.add_argument("--over", choices=("all", "survivors"), default="all", help="what S is taken over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train, test = datasets.load("mnist", "train"), datasets.load("mnist", "test")
    inputs, labels = train.inputs(mean=[0.1307], std=[0.3081]), torch.from_numpy(train.labels)
    test_inputs = test.inputs(mean=[0.1307], std=[0.3081])
    start = mlp(784, 128, 128, outputs=10)
    masks = {weight.name: torch.ones_like(weight.tensor) for weight in maskable_weights(start)}
    rows = []
    for number in range(options.rounds):
        net = trained(start, masks, inputs, labels, options.epochs)
        sums = power_sums(torch.cat([weight.tensor.detach().flatten() for weight in maskable_weights(net)]), (Q, 1.0))
        left, N = int(sums.nonzeros), float(sums.effective_count(Q, 1.0))
        rows.append(
            {
                "round": number,
                "weights": left,
                "logged": LOGGED[number] if number < len(LOGGED) else None,
                "accuracy": accuracy(net, test_inputs, test.labels),
                "S": (LOGGED[0] if options.over == "all" else left) / N,  # d/N at q = ½
            }
        )
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=number == 0), flush=True)
        decided = ellq.plan(net, rule="yang2022", tol=0, q=Q, scope=options.scope, over=options.over)
        masks = {name: kept.float() for name, kept in retained_entries(maskable_weights(net), decided).items()}
        if int(decided.table["retained"].sum()) == left:
            break
    if options.csv:
        pd.DataFrame(rows).to_csv(options.csv, index=False)


def trained(start: nn.Module, masks: dict[str, Tensor], inputs: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Return the net trained from its start with masks held fixed, by the authors' optimiser."""
    net = copy.deepcopy(start).train()
    weights = {weight.name: weight.tensor for weight in maskable_weights(net)}
    optimiser = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    apply_(weights, masks)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(250):
            optimiser.zero_grad()
            functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            apply_(weights, masks)
        schedule.step()
    return net.eval()


@torch.no_grad()
def apply_(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Set what is masked to zero, in place."""
    for name, weight in weights.items():
        weight.mul_(masks[name])


if __name__ == "__main__":
    main()
