"""Whom do masked positions attend to? Shares of their attention after each loop, beside those of uniform attention.

    python evidence/attention.py sudoku weights/sudoku-short.pt RUN ..      # weights or runs, all of one seed
    python evidence/attention.py countdown weights/countdown-3.pt RUN ..

The problems are those that the training of the first held out. Prints a JSON line for each checkpoint, t and loop:
the share of attention, in the mean over masked queries, heads and layers, that goes to

    masked       other masked positions
    self         the position itself; what is left goes to those that are given
    unit         other cells of the same row, column or box (Sudoku); unit_masked: to those of them that are masked

`heads` has this for each layer and head apart; `uniform`, if all N positions, the query's own among them, got the
same. `ce`: nats a masked token when read off after the loop. `part`: "loop" for the looped layers, "head" for the
layers before them, with loop 0, and "tail" for those that read h^l off.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import rmdm
import train_countdown
import train_sudoku

SHARES = (0.3, 0.5, 0.7, 0.9, 1.0)
FORM = ("head_layers", "layers", "tail_layers", "loops", "inject")


def held_out(task, path, model):
    """The problems, with solutions, that the training of `model`, read from `path`, tested on, and its seed."""
    path = Path(path)
    seed = rmdm.read(path / "checkpoint.pt" if path.is_dir() else path)["train"]["seed"]
    with redirect_stdout(sys.stderr):  # standard output is for JSON
        _, test = task.data(model.about, seed)
    return *(test if task is train_sudoku else test["held-out operands"]), seed


def attention(layer, h):
    """The probabilities (B, heads, N, N) by which a layer called with h (B, N, d) weights its values."""
    B, N, d = h.shape
    q, k, _ = layer.qkv(layer.norm1(h)).view(B, N, 3, layer.heads, d // layer.heads).permute(2, 0, 3, 1, 4)
    a = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    return (a if layer.bias is None else a + (layer.bias * layer.same).sum(1)).softmax(-1)


def by_loop(model, x0, editable, t, loops, unit=None):
    """Mask x0 at times t (B,): a dict for each loop, and for head and tail layers if there are any. unit (N, N) bool,
    True = in the same row, column or box."""
    x_t, masked = rmdm.corrupt(x0, t, editable, torch.Generator().manual_seed(0))
    own = torch.eye(x0.shape[1], dtype=torch.bool).expand(len(x0), -1, -1)
    kinds = {"masked": masked[:, None] & ~own, "self": own}  # True = a key of this kind for the query: (B, N, N)
    if unit is not None:
        kinds |= {"unit": unit & ~own, "unit_masked": unit & kinds["masked"]}
    kinds = {name: kind[masked] for name, kind in kinds.items()}  # of masked queries alone: (queries, N)
    uniform = {name: kind.float().mean().item() for name, kind in kinds.items()}
    seen, rows = [], []  # seen: the attention of each layer called since the last row, (heads, queries, N)

    def watch(layer, args, _):
        seen.append(attention(layer, *args).transpose(0, 1)[:, masked])

    def row(part, l):
        heads = {name: (torch.stack(seen) * kind).sum(-1).mean(-1) for name, kind in kinds.items()}  # (layers, heads)
        means = {name: share.mean().item() for name, share in heads.items()}
        heads = {name: share.tolist() for name, share in heads.items()}
        rows.append(dict(part=part, loop=l) | means | dict(uniform=uniform, heads=heads))
        seen.clear()

    hooks = [layer.register_forward_hook(watch) for layer in (*model.head, *model.block, *model.tail)]
    h = h0 = model.encode(x_t, t)
    if seen:
        row("head", 0)
    for l in range(1, loops + 1):
        h = model.loop(h, h0, torch.full((len(x0),), l), t)
        row("loop", l)
        rows[-1]["ce"] = F.cross_entropy(model.decode(h)[masked], x0[masked]).item()
        if seen:
            row("tail", l)
    for hook in hooks:
        hook.remove()
    return rows


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("sudoku", "countdown"))
    parser.add_argument("checkpoints", nargs="+", metavar="FILE_OR_RUN")
    args = parser.parse_args()
    sudoku, coords = args.task == "sudoku", torch.tensor(train_sudoku.COORDS)
    task = train_sudoku if sudoku else train_countdown
    unit = (coords == coords[:, None]).any(-1) if sudoku else None
    models = {checkpoint: rmdm.load(checkpoint, task=args.task) for checkpoint in args.checkpoints}
    problems, solutions, seed = held_out(task, *next(iter(models.items())))
    x0 = torch.from_numpy(solutions if sudoku else task.encode(problems, solutions)).long()
    for checkpoint, model in models.items():
        _, editable = task.start(model, problems)
        about = dict(task=args.task, checkpoint=checkpoint, seed=seed, n=len(x0))
        about |= {key: getattr(model.config, key) for key in FORM}
        for share in SHARES:
            t = rmdm.alpha_inverse(torch.full((len(x0),), 1 - share))
            for row in by_loop(model, x0, editable, t, model.config.loops, unit):
                line = json.dumps(about | dict(t=share) | row)
                print(json.dumps(json.loads(line, parse_float=lambda x: round(float(x), 4))), flush=True)


if __name__ == "__main__":
    rmdm.run_script(main)
