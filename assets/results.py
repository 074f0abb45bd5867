"""Make the README's tables and figures from the logs in this folder:  python assets/results.py

    NAME-seed*.jsonl        log.jsonl of a training run, or of several, one after the other, evaluations only
    NAME-seed*-eval.jsonl   what `python sample.py ... --data ... --json` printed for it, or for them
    NAME-seed*.txt          what training printed at its end
    sudoku-classical.jsonl  what `python sample.py sudoku --classical --data ...` printed

NAME is TASK-cpu for the preset, or TASK-VARIANT. Prints the tables as Markdown; writes the figures, *.png.
Needs matplotlib, which nothing else does.
"""

import json
import math
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import rmdm  # noqa: E402
import train_sudoku as sudoku  # noqa: E402

PUZZLE = "...6...1..7......8.3.4.1.........6.5.41...3..85...3...2...19...7....8.........976"  # by generate(256, 123)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def seeds(pattern):
    return [lines(path) for path in sorted(HERE.glob(pattern))]


def table(title, head, *rows):
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def set_name(row):
    return Path(row["file"]).stem


def run(row):
    return Path(row["checkpoint"]).name[:-2]  # without the seed


def runs(name, extra):
    """One row a training run; extra: {title: (key, factor, digits)} of what its last line says."""
    rows = []
    for head, *_, last in seeds(f"{name}-seed?.jsonl"):
        size = f"{head['layers']} x {head['loops']}, {head['width']}"
        device = f"{head['device']}, {head['threads']} threads".replace(" 1 threads", " 1 thread")
        work = f"{head['steps']} x {head['batch']}", f"{last['flops']:.2g}", f"{last['seconds'] / 60:.1f}"
        ends = [f"{factor * last[key]:.{digits}f}" for key, factor, digits in extra.values()]
        rows.append((head["seed"], f"{head['parameters']:,}", size, *work, device, *ends))
    head = "seed", "parameters", "K x L, d", "steps x batch", "training FLOPs", "minutes", "device"
    table(f"Training runs, {name}", (*head, *extra), *rows)


def pivot(name, score, head, down):
    """Scores by down(row), a tuple, or false to leave the row out, and by T: the seeds side by side."""
    both, rows = seeds(f"{name}-seed*-eval.jsonl"), []
    steps = sorted({row["steps"] for row in both[0]})
    for key in dict.fromkeys(filter(None, map(down, both[0]))):
        found = [{row["steps"]: row for row in run if down(row) == key} for run in both]
        scores = (" / ".join(f"{100 * at[T][score]:.1f}" for at in found) if T in found[0] else "" for T in steps)
        nfe = ", ".join(" / ".join(dict.fromkeys(f"{at[T]['nfe']:.0f}" for at in found)) for T in found[0])
        rows.append((*key, next(iter(found[0].values()))["n"], *scores, nfe))
    title = f"{name}: {score}, %, seeds {' / '.join(str(i) for i in range(len(both)))}"
    table(title, (*head, "n", *(f"T={T}" for T in steps), "NFE at each T"), *rows)


def models(name):
    """For each model of NAME, in the order of its files, what each seed's run of it gave: the first line of its log
    and the last in one dict, and besides `head`, the first alone, `at`, {(set, T): scores}, and `text`, as printed."""
    found = []
    for path in sorted(HERE.glob(f"{name}-seed?.jsonl")):
        log, scores, texts = lines(path), [], []
        if (other := path.with_name(f"{path.stem}-eval.jsonl")).exists():
            scores = lines(other)
        if (other := path.with_suffix(".txt")).exists():
            texts = other.read_text().split("\npreset ")
        starts = [i for i, row in enumerate(log) if row["step"] == 0] + [len(log)]
        n, names = len(starts) - 1, list(dict.fromkeys(row["checkpoint"] for row in scores))
        pairs = zip(starts[:-1], starts[1:], names or [""] * n, texts or [""] * n, strict=True)  # all in one order
        at = {x: {(set_name(r).split("_", 1)[1], r["steps"]): r for r in scores if r["checkpoint"] == x} for x in names}
        ends = ((log[i], log[j - 1], dict(checkpoint=x, at=at.get(x), text=text)) for i, j, x, text in pairs)
        found.append([head | last | rest | dict(head=head) for head, last, rest in ends])
    return list(zip(*found, strict=True))


def printed(pattern):
    return lambda model: float(re.search(pattern.format_map(model), model["text"], re.M)[1])


def exact(file, T):
    return lambda model: 100 * model["at"][file, T]["exact"]


NELBO = {"NELBO, nats": lambda model: model["nelbo"]}
SUDOKU = {"held-out, T=81": printed(r"^  L={loops} .* (\S+)$")}
SUDOKU |= {f"kaggle3m, T={T}": exact("kaggle3m", T) for T in (5, 20, 81)}
COUNTDOWN = {"operands, T=1": printed(r"^  L={loops} +(\S+)")}
for key, word in {"operands, T=34": "operands.* solved", "targets, T=34": "targets.* solved"}.items():
    COUNTDOWN[key] = printed(rf"^held-out {word} (\S+)%")
for key in "begins well", "number not available", "false equation 1", "false equation 2":  # of the operands
    COUNTDOWN[key] = printed(rf"^held-out operands.* {key} (\S+)%")


def carried_out(model):
    """The share solved of the held-out operands that begin well."""
    return 100 * COUNTDOWN["operands, T=34"](model) / COUNTDOWN["begins well"](model)


COUNTDOWN["of those that begin well, solved"] = carried_out


def compare(name, found, first, label, columns):
    """A row for each model of `found`, named by label(model), the seeds side by side: {title: number(model)}."""
    rows = []
    for both in found:
        cells = [" / ".join(f"{number(model):.1f}" for model in both) for number in columns.values()]
        head = both[0]
        rows.append((label(head), f"{head['parameters']:,}", head["steps"], f"{head['flops']:.1e}", *cells))
    table(name, (first, "parameters", "steps", "training FLOPs", *columns), *rows)


def shape(model):
    """Layers x loops, with head and tail layers if there are any: 1 + 1 x 5 + 2."""
    text = "{layers} x {loops}"
    if model["head_layers"] + model["tail_layers"]:
        text = "{head_layers} + {layers} x {loops} + {tail_layers}"
    return text.format_map(model) + ", with additions" * model["coord_bias"]


def choices(name, columns):
    """Each model is named by what differs from the first."""
    found = models(name)
    known = dict(curriculum="none", truncate=False) | found[0][0]["head"]  # options that came after the first model

    def label(model):
        facts = ("parameters", "steps", "seed", "eval_every")
        change = [f"{key}={x}".lower() for key, x in model["head"].items() if x != known[key] and key not in facts]
        return " ".join(change) or (run(model) if model["checkpoint"] else "none")

    compare(name, found, "change", label, NELBO | columns)


def depth():
    """K layers x L loops: the table, and the figure."""
    found = models("sudoku-depth")
    found.sort(key=lambda both: [both[0][fact] for fact in ("coord_bias", "steps", "flops")])
    what = [("ye2024_test", 1), ("ye2024_test", 5), *(("kaggle3m", T) for T in (5, 20, 81))]
    columns = NELBO | {f"{file}, T={T}": exact(file, T) for file, T in what}
    compare("sudoku-depth", found, "K x L", shape, columns)
    found = {tuple(x[0][fact] for fact in ("layers", "loops", "steps", "coord_bias")): x for x in found}

    def mean(both, key, what="exact"):
        return sum(model["at"][key][what] for model in both) / len(both)

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for color, one, name in ("tab:blue", 0, "1 layer, L loops"), ("tab:orange", 1, "K layers, no loops"):
        plain = [key for key in found if not key[3] and key[one] == 1]
        steps = [key for key in plain if key[2] == 3000]
        flops = [key for key in plain if math.prod(key[:3]) == 24000]
        for style, equal, chosen in ("-o", "steps", steps), ("--s", "FLOPs", flops):
            points = sorted((key[0] * key[1], 100 * mean(found[key], what[-1])) for key in chosen)
            left.plot(*zip(*points), style, color=color, ms=4, lw=1, label=f"{name}, equal {equal}")
        key = (1, 8, 3000, True) if one == 0 else (8, 1, 3000, True)
        left.plot(8, 100 * mean(found[key], what[-1]), "*", color=color, ms=9, label=f"{name}, additions, equal steps")
    for L in (1, 2, 4, 8):
        both = found[1, L, 3000, False]
        keys = [key for key in both[0]["at"] if key[0] == "kaggle3m"]
        points = [(mean(both, key, "nfe"), 100 * mean(both, key)) for key in keys]
        right.plot(*zip(*points), "-o", ms=4, lw=1, label=f"L = {L}")
    left.set(xlabel="layers x loops", ylabel="kaggle3m, T = 81, exact, %")
    right.set(xlabel="NFE: loops, summed over the T steps", xscale="log")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=7)
    fig.tight_layout()
    fig.savefig(HERE / "sudoku-depth.png", dpi=130)


def curves(file, groups, y, factor, **axes):
    """Training curves of `factor` times y, for groups of (name, color, label)."""
    fig, ax = plt.subplots(figsize=(6.4, 3.2))
    for name, color, label in groups:
        for head, *log in seeds(f"{name}-seed?.jsonl"):
            log = [row for row in log if y in row]
            x = [row["step"] * (head["batch"] if "examples" in axes["xlabel"] else 1) for row in log]
            style = dict(color=color, ls=("-", "--")[head["seed"]], lw=1, label=f"{label}, seed {head['seed']}")
            ax.plot(x, [factor * row[y] for row in log], **style)
    ax.set(**axes)
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(HERE / file, dpi=150)


def recursion():
    """One denoising step of the shipped model on one puzzle, read off after each loop."""
    model = rmdm.load(HERE.parent / "weights" / "sudoku-small.pt")
    L, x = model.config.loops, torch.from_numpy(sudoku.parse(PUZZLE)).long()[None]
    with torch.no_grad():
        sure, digit = model(x, torch.ones(1), L, range(1, L + 1))[:, 0].softmax(-1).max(-1)
    fig, axes = plt.subplots(2, 4, figsize=(11, 6))
    for l, ax in zip(range(L // 8 - 1, L, L // 8), axes.flat):
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
    for name in ("cpu", "fixed", "t60before", "t60now"):
        runs(f"sudoku-{name}", {"NELBO, nats": ("nelbo", 1, 2)})
    pivot("sudoku-cpu", "exact", ["file"], lambda r: r["group"] == "all" and (set_name(r),))
    pivot("sudoku-cpu", "exact", ["kaggle3m"], lambda r: r["group"] != "all" and (r["group"],))
    depth()
    choices("sudoku-choices", SUDOKU)
    pivot("sudoku-orders", "exact", ["file", "order"], lambda r: (set_name(r), r["order"]))
    pivot("sudoku-more-loops", "exact", ["model", "L"], lambda r: (run(r), r["loops"]))
    pivot("sudoku-adaptive", "exact", ["model", "at most", "eps"], lambda r: (run(r), r["loops"], r["eps"]))
    for name in ("loops", "plain-loops", "easy"):
        pivot(f"sudoku-{name}", "exact", ["L"], lambda r: (r["loops"],))
    pivot("sudoku-threshold", "exact", ["threshold"], lambda r: (r["threshold"],))
    solvers = lines(HERE / "sudoku-classical.jsonl")
    solvers = [row | {"file": set_name(row), "mean": round(row["mean"], 1)} for row in solvers]
    shares = "naked singles", "naked and hidden singles", "search"
    rows = ([f"{100 * x:.1f}%" if key in shares else x for key, x in row.items()] for row in solvers)
    table("Without a network", solvers[0], *rows)
    choices("countdown-choices", COUNTDOWN)
    compare("countdown-depth", models("countdown-depth"), "K x L", shape, NELBO | COUNTDOWN)
    columns = {f"T={T}": printed(r"^  L={loops}" + i * r" +\S+" + r" +(\S+)") for i, T in enumerate((1, 4, 8, 34))}
    compare("countdown-depth, steps", models("countdown-depth"), "K x L", shape, columns)
    compare("countdown-looping", models("countdown-looping"), "head + K x L + tail", shape, NELBO | COUNTDOWN)
    pivot("countdown-orders", "solved", ["order"], lambda r: (r["order"],))
    pivot("countdown-threshold", "solved", ["threshold"], lambda r: (r["threshold"],))
    pivot("countdown-loops", "solved", ["L"], lambda r: (r["loops"],))
    pivot("countdown-adaptive", "solved", ["model", "at most", "eps"], lambda r: (run(r), r["loops"], r["eps"]))
    for name in ("cpu", "long", "top30"):
        runs(f"countdown-{name}", {"solved, held-out operands, n=128": ("held-out operands", 100, 1)})
    for name in ("sudoku-t60before", "sudoku-t60now", "countdown-cpu", "countdown-long"):
        pivot(name, "exact" if "sudoku" in name else "solved", ["file"], lambda r: (set_name(r),))
    # the objective divides by the editable cells, of which half are masked on average: times 2 is per masked cell
    groups = [("sudoku-cpu", "tab:blue", "the preset")]
    axes = dict(ylabel=f"nats per masked cell\n(a guess: ln 9 = {math.log(9):.2f})", xscale="log", ylim=(0, 2.4))
    axes["xlabel"] = "training step"
    curves("sudoku-loss.png", groups, "loss", 2, **axes)
    groups = ("cpu", "tab:blue", "7,300 steps"), ("long", "tab:orange", "20,000 steps"), ("top30", "gray", "to 30")
    groups = [(f"countdown-{name}", *rest) for name, *rest in groups]
    axes = dict(xlabel="training examples", ylabel="solved, %, held-out operands", ylim=(0, 100))
    curves("countdown-curve.png", groups, "held-out operands", 100, **axes)
    recursion()
