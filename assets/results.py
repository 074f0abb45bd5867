"""Make the README's tables and figures from the logs in this folder:  python assets/results.py

    NAME-seed*.jsonl        log.jsonl of a training run; NAME is TASK-cpu for the preset, or TASK-VARIANT
    NAME-seed*-eval.jsonl   what `python sample.py ... --data ... --json` printed for it

Prints the tables as Markdown; writes *-loss.png, countdown-curve.png and, from weights/, sudoku-recursion.png.
Needs matplotlib, which nothing else does.
"""

import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import rmdm  # noqa: E402
import train_sudoku as sudoku  # noqa: E402

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


def seeds(pattern):
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(HERE.glob(pattern))]


def table(title, rows):
    head, *body = rows
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in body:
        print(f"| {' | '.join(row)} |")


def runs(name, extra):
    rows = [("seed", "parameters", "K x L, d", "steps x batch", "training FLOPs", "minutes", "device", *extra)]
    for head, *_, last in seeds(f"{name}-seed?.jsonl"):
        size = f"{head['layers']} x {head['loops']}, {head['width']}"
        device = f"{head['device']}, {head['threads']} threads".replace(" 1 threads", " 1 thread")
        work = f"{head['steps']} x {head['batch']}", f"{last['flops']:.2g}", f"{last['seconds'] / 60:.1f}"
        ends = [f"{scale * last[key]:.{digits}f}" for key, scale, digits in extra.values()]
        rows.append((str(head["seed"]), f"{head['parameters']:,}", size, *work, device, *ends))
    table(f"Training runs, {name}", rows)


def pivot(name, score, down, columns):
    """What sample.py --json printed, by down(row) and by T: the seeds side by side."""
    both = seeds(f"{name}-seed*-eval.jsonl")
    steps = sorted({row["steps"] for row in both[0]})
    rows = [(*columns, "n", *(f"T={T}" for T in steps), "NFE at each T")]
    for key in dict.fromkeys(down(row) for row in both[0]):
        found = [[row for row in run if down(row) == key] for run in both]
        scores = (" / ".join(f"{100 * row[score]:.1f}" for row in at_T) for at_T in zip(*found))
        nfe = ", ".join(f"{row['nfe']:.0f}" for row in found[0])
        rows.append((*map(str, key), str(found[0][0]["n"]), *scores, nfe))
    table(f"{name}: {score}, %, seeds {' / '.join(str(i) for i in range(len(both)))}", rows)


def depth():
    """K layers x L loops: a row for each model, the seeds side by side; and the figure."""
    found = {}  # (K, L, steps) -> for each seed the head and the end of its log and its scores by file and T
    for log, scores in zip(seeds("sudoku-depth-seed?.jsonl"), seeds("sudoku-depth-seed?-eval.jsonl")):
        starts = [i for i, row in enumerate(log) if row["step"] == 0] + [len(log)]
        names = list(dict.fromkeys(row["checkpoint"] for row in scores))
        for i, j, name in zip(starts, starts[1:], names, strict=True):
            at = {(Path(r["file"]).stem, r["steps"]): 100 * r["exact"] for r in scores if r["checkpoint"] == name}
            found.setdefault((log[i]["layers"], log[i]["loops"], log[i]["steps"]), []).append((log[i], log[j - 1], at))
    what = [("sudoku_ye2024_test", 1), *(("sudoku_kaggle3m", T) for T in (5, 20, 81))]
    rows = [("K x L", "parameters", "steps", "training FLOPs", "NELBO", *(f"{f[7:]}, T={T}" for f, T in what))]
    for (K, L, steps), both in sorted(found.items(), key=lambda x: (x[1][0][1]["flops"], x[0])):
        head, end, _ = both[0]
        cells = [" / ".join(f"{at[key]:.1f}" for _, _, at in both) for key in what]
        bound = " / ".join(f"{end['nelbo']:.1f}" for _, end, _ in both)
        rows.append((f"{K} x {L}", f"{head['parameters']:,}", str(steps), f"{end['flops']:.1e}", bound, *cells))
    table("sudoku-depth", rows)


def countdown_curve():
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    lines = ("cpu", "tab:blue", "7,300 steps"), ("long", "tab:orange", "20,000 steps"), ("top30", "gray", "to 30")
    for name, color, label in lines:
        for head, *log in seeds(f"countdown-{name}-seed?.jsonl"):
            log = [r for r in log if "held-out operands" in r]
            style = dict(color=color, ls=("-", "--")[head["seed"]], label=f"{label}, seed {head['seed']}", lw=1)
            ax.plot([r["step"] * head["batch"] for r in log], [100 * r["held-out operands"] for r in log], **style)
    ax.set(xlabel="training examples", ylabel="solved, %, held-out operands", ylim=(0, 100))
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(HERE / "countdown-curve.png", dpi=150)


def loss_curve():
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    for head, *log in seeds("sudoku-cpu-seed?.jsonl"):
        # the objective divides by the editable cells, of which half are masked on average: times 2 is per masked cell
        ax.plot([r["step"] for r in log], [2 * r["loss"] for r in log], lw=1, label=f"seed {head['seed']}")
    ax.axhline(math.log(9), color="gray", ls=":", lw=1)
    ax.text(0.98, math.log(9), "ln 9: nothing learned", transform=ax.get_yaxis_transform(), va="bottom", ha="right")
    ax.set(xlabel="training step", ylabel="nats per masked cell", xscale="log", ylim=(0, 2.6))
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(HERE / "sudoku-loss.png", dpi=150)


def recursion():
    """One denoising step of the shipped model on one puzzle, read off after each loop."""
    model = rmdm.load(HERE.parent / "weights" / "sudoku-small.pt")
    L, x = model.config.loops, torch.from_numpy(sudoku.parse(PUZZLE)).long()[None]
    with torch.no_grad():
        sure, digit = model(x, torch.ones(1), L, range(1, L + 1))[:, 0].softmax(-1).max(-1)
    fig, axes = plt.subplots(2, (L + 1) // 2, figsize=(11, 6))
    for l, ax in enumerate(axes.flat[:L]):
        blank = x[0] == rmdm.MASK
        ax.imshow(torch.where(blank, sure[l], math.nan).view(9, 9), cmap="YlGn", vmin=0.1, vmax=1.4)
        for i in range(81):
            right = digit[l, i] == digit[-1, i]
            style = dict(color="black" if right else "crimson") if blank[i] else dict(color="gray", weight="bold")
            ax.text(i % 9, i // 9, int(digit[l, i] if blank[i] else x[0, i]), ha="center", va="center", **style)
        for k in (2.5, 5.5):
            ax.axhline(k, color="black", lw=0.8), ax.axvline(k, color="black", lw=0.8)
        certain = int((sure[l, blank] >= 0.9).sum())
        ax.set(xticks=[], yticks=[], title=f"loop {l + 1}: {certain} of {int(blank.sum())} over 90%")
    fig.tight_layout()
    fig.savefig(HERE / "sudoku-recursion.png", dpi=110)


if __name__ == "__main__":
    operands = {"solved, held-out operands, n=128": ("held-out operands", 100, 1)}
    for name in sorted({path.name.rsplit("-seed", 1)[0] for path in HERE.glob("*-seed?.jsonl")}):
        runs(name, {"NELBO, nats": ("nelbo", 1, 2)} if name.startswith("sudoku") else operands)
        if list(HERE.glob(f"{name}-seed*-eval.jsonl")):
            sets(name, "exact" if name.startswith("sudoku") else "solved")
    loss_curve()
    countdown_curve()
    recursion()
