"""What it saves that the batches of an optimizer step share the quantized weights.

    python benchmarks/accumulation.py

An optimizer step over four batches, LSQ W4A4, against the same four batches in float32: with each batch quantizing the
weights for itself, and with `sqakd_hf.layers.shared_weights.SharedWeights`, as `SQAKDTrainer` does under
`gradient_accumulation_steps`. One process, one step each in turn, one thread; medians over the rounds.
"""

import argparse
import contextlib
import copy
import functools

from measure import Step, begin, parser_of_steps
from torch import nn
from train_step import FLOAT, NETWORKS, build, student_of

from sqakd_hf.export.timing import interleaved, ratios
from sqakd_hf.layers.shared_weights import SharedWeights


BATCHES = 4


def main() -> None:
    options = parser_of_steps(__doc__, list(NETWORKS)).parse_args()
    begin(options)
    print("\n| network | batches quantize weights for themselves | batches share them |\n|---|---|---|")
    for name in options.networks:
        measure(name, options)


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the row of one network."""
    images, labels, model = build(name, options.device)
    student = student_of(model, images, "lsq", 4)
    loss = functools.partial(nn.functional.cross_entropy, target=labels)
    steps = {
        FLOAT: AccumulatedStep(model, images, loss, options.bf16),
        "own": AccumulatedStep(copy.deepcopy(student), images, loss, options.bf16),
        "shared": AccumulatedStep(student, images, loss, options.bf16, shared=SharedWeights(student)),
    }
    seconds = interleaved(steps, options.rounds, options.device)
    cells = [ratios(seconds[row], seconds[FLOAT]) for row in ("own", "shared")]
    print(f"| {name}, batch {len(images)} | {' | '.join(f'{m:.3f} ± {s:.3f}' for m, s in cells)} |", flush=True)


class AccumulatedStep(Step):
    """An optimizer step over several batches."""

    def __init__(self, *args, shared: SharedWeights | None = None):
        super().__init__(*args)
        self.shared = shared

    def __call__(self) -> None:
        for number in range(BATCHES):
            context = contextlib.nullcontext() if self.shared is None else self.shared.batch(number == BATCHES - 1)
            with context:
                self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    main()
