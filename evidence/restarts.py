"""Restarts, eq. (8): which kind makes the most of a budget of loops, and what they are worth without a checker.

    python evidence/restarts.py sudoku CHECKPOINT [VARIANT ..]       # 128 hard generated puzzles
    python evidence/restarts.py countdown CHECKPOINT [VARIANT ..]    # 256 generated problems with held-out targets

A variant is one JSON line: the share solved within 1, 2, 4, .. tries, and the mean loops a problem at the last."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rmdm  # noqa: E402
import sample  # noqa: E402
import train_countdown  # noqa: E402
import train_sudoku  # noqa: E402

TRIES = 16


# What differs from noise 0.3 on h^0, drawn at every step, confidence order, threshold 0.99, 32 loops (Countdown: as
# trained); k: the try.
VARIANTS = {
    "noise 0.3": {},
    "noise 0.15": dict(noise=0.15), "noise 0.2": dict(noise=0.2),
    "noise 0.45": dict(noise=0.45), "noise 1": dict(noise=1.0),
    "noise 0.05 k": dict(noise=lambda k: 0.05 * k),
    "threshold 0.9": dict(threshold=0.9), "threshold 0.97": dict(threshold=0.97),
    "threshold 0.999": dict(threshold=0.999), "no threshold": dict(threshold=None),
    "first try without threshold": dict(threshold=lambda k: 0.99 if k else None),
    "20 steps": dict(steps=20), "5 steps": dict(steps=5),
    "half the loops": dict(loops=0.5), "twice the loops": dict(loops=2), "four times the loops": dict(loops=4),
    "twice the loops, eps 0.1": dict(loops=2, eps=0.1),
    "temperature 1, no noise": dict(noise=0.0, temperature=1.0),
    "random order, temperature 1, no noise": dict(noise=0.0, temperature=1.0, order="random"),
    "random order, noise 0.3": dict(order="random"),
    "random symmetry, no noise": dict(noise=0.0, symmetry=True),
    "random symmetry, noise 0.2": dict(noise=0.2, symmetry=True),
}  # fmt: skip


def problems(task):
    """Problems (n, ..) on which nothing was trained: Sudokus that take a search five guesses or more, or Countdown
    problems with held-out targets."""
    if task is train_sudoku:
        from classical import depth_first

        puzzles, _ = train_sudoku.generated(2048, seed=424_242)
        c = np.where(puzzles == rmdm.MASK, 511, 1 << puzzles.astype(int) >> 1).T.astype(np.uint16)
        return puzzles[depth_first(c)[1] >= 5][:128]
    found, _ = train_countdown.generate(3, 20_000, seed=424_242)
    return found[np.isin(found[:, 3], train_countdown.held_out_targets(3))][:256]


def restart(task, model, given, generator, symmetry=False, **options):
    """One try after the other at problems (n, ..), by options of rmdm.sample that may be functions of the try k: the
    try that solved each (n,), 0 if none did, and the loops of each try (n, TRIES).

    symmetry: each try but the first sees the problem through a random symmetry."""
    solved, loops = np.zeros(len(given), int), np.zeros((len(given), TRIES))
    for k in range(TRIES):
        now = {name: value(k) if callable(value) else value for name, value in options.items()}
        now["noise"] = now["noise"] if k else 0.0
        todo = np.flatnonzero(solved == 0)
        for i in np.array_split(todo, range(128, len(todo), 128)):
            through = task.SYMMETRY if symmetry and k else None
            out = sample.attempt(task, model, given[i], through, generator, False, now)
            loops[i, k] = out.loops.numpy()
            solved[i[task.right(given[i], out.x.numpy())]] = k + 1
    return solved, loops


def without_checker(task, model, x, editable, given, loops, tries=8, batch=64):
    """Of several noisy tries, none judged: the share solved by one of them, by the answer that most of them agree on,
    by the one that the model itself found likeliest, and by any of them."""
    answers, likely, right = [], [], []
    for k in range(tries):
        g = torch.Generator().manual_seed(k)
        for part in torch.arange(len(x)).split(batch):
            how = dict(steps=x.shape[1], threshold=0.99, noise=0.3, loops=loops, generator=g, trace=True)
            out = rmdm.sample(model, x[part], editable[part], **how)
            log_p = [torch.where(step["revealed"], step["sure"].clamp(min=1e-9).log(), 0.0) for step in out.trace]
            answers.append(out.x)
            likely.append(sum(log_p).sum(1))
            right.append(task.right(given[part.numpy()], out.x.numpy()))
    answers, likely = torch.cat(answers).view(tries, *x.shape), torch.cat(likely).view(tries, -1)
    right = np.concatenate(right).reshape(tries, -1)
    votes = (answers[:, None] == answers[None]).all(-1).sum(0)  # (tries, n): how many tries agree with this one
    pick = dict(agreed=votes.argmax(0), likeliest=likely.argmax(0))
    shares = {name: right[i.numpy(), np.arange(len(x))].mean() for name, i in pick.items()}
    return dict(one=right.mean()) | shares | dict(any=right.any(0).mean())


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ("sudoku", "countdown"):
        raise rmdm.BadInput("usage: python evidence/restarts.py sudoku|countdown CHECKPOINT [VARIANT ..]")
    name, checkpoint, *chosen = sys.argv[1:]
    task, model = {"sudoku": train_sudoku, "countdown": train_countdown}[name], rmdm.load(sys.argv[2], task=name)
    given, loops = problems(task), 32 if task is train_sudoku else model.config.loops
    x, editable = task.start(model, given)
    for variant in chosen or [*VARIANTS, "without a checker"]:
        about = dict(task=name, checkpoint=checkpoint, variant=variant, n=len(x))
        if variant == "without a checker":
            print(json.dumps(about | without_checker(task, model, x, editable, given, loops)), flush=True)
            continue
        how = dict(steps=x.shape[1], threshold=0.99, noise=0.3, loops=1) | VARIANTS[variant]
        how["loops"] = int(how["loops"] * loops)
        if "symmetry" in how and task.SYMMETRY is None:
            continue
        solved, spent = restart(task, model, given, torch.Generator().manual_seed(0), **how)
        shares = {f"tries_{k}": ((solved > 0) & (solved <= k)).mean() for k in (1, 2, 4, 8, TRIES)}
        cost = {f"nfe_{k}": spent[:, :k].sum(1).mean() for k in (1, 2, 4, 8, TRIES)}  # nfe: loops
        print(json.dumps(about | shares | cost), flush=True)


if __name__ == "__main__":
    rmdm.run_script(main)
