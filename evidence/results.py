"""The tables of README.md and evidence/README.md, and all figures, from the logs in evidence/logs/.

    python evidence/results.py              # print every table under its name
    python evidence/results.py --write      # put them into both files, each below its <!-- table: NAME -->
    python evidence/results.py --check      # exit 1 if a table there is not what this prints
    python evidence/results.py --figures    # draw the figures (matplotlib is needed here and nowhere else)

    logs/NAME-seed*.jsonl         log.jsonl of a training run, or of several, one after the other
    logs/NAME-seed*-eval.jsonl    what `python sample.py --data FILE --json` printed
    logs/restarts-*.jsonl         what evidence/restarts.py printed
    logs/solve-commands.txt       what python sample.py sudoku took and printed, by old and new defaults
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
LOGS = HERE / "logs"
PUZZLE = "...6...1..7......8.3.4.1.........6.5.41...3..85...3...2...19...7....8.........976"  # by generate(256, 123)
HARD = "100007090030020008009600500005300900010080002600004000300000010040000007007000300"  # "AI Escargot"

# ---- logs ----


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def scores(path):
    """The rows of a NAME-seed*-eval.jsonl by present names: T; L, the loops a step; loops, those of a problem."""
    rows, usual = [], dict(checkpoint="", eps=0.0, order="confidence", threshold=None)
    for row in lines(path):
        if "T" in row:
            row |= dict(L=row["first"].pop("loops", None), checkpoint=row["checkpoint"][0]) | row["first"]
        else:  # written up to commit 60cf229
            row |= dict(T=row["steps"], L=row.get("loops"), loops=row["nfe"])
        known = [row[key] for key in ("solved", "exact", "valid") if row.get(key) is not None]
        rows.append(usual | row | dict(file=set_name(row["file"]), share=100 * known[0]))
    return rows


def both(names):
    """The rows of the logs NAME-seed*-eval.jsonl, a list for each of the two seeds."""
    return [[row for name in names.split() for row in scores(LOGS / f"{name}-seed{i}-eval.jsonl")] for i in (0, 1)]


def set_name(path):
    return Path(path).stem.split("_", 1)[-1]


OFF = dict(coord_bias=False, grad_loops=0, curriculum="none", mass_t1=0.0)  # options that came later, or went


def settings(head):
    """A run's settings by their present names: supervise=M is grad_loops=M now, but where `truncate` was off."""
    head = head | {key: x for key, x in OFF.items() if key not in head}
    if head["supervise"].isdigit() and head.get("truncate", True):
        head |= dict(supervise="all", grad_loops=int(head["supervise"]))
    head |= {key: 0 for key in ("grad_loops", "loops_min") if head[key] >= head["loops"]}  # that is, not in use
    return {key: value for key, value in head.items() if key != "truncate"}


def flops(form, loops, reads=1):
    """Floating-point operations of one example's forward pass with `reads` read-offs (matrix products)."""
    N, d = form["coords"], form["width"]
    layers = form["head_layers"] + loops * form["layers"] + reads * form["tail_layers"]
    return layers * N * (24 * d**2 + 4 * N * d) + reads * N * 2 * d * (form["vocab"] - 1)


def training_flops(head, steps):
    """Those of a training, by the first line of its log. Loops without gradient go forward only."""
    drawn = ((head["loops_min"] or head["loops"]) + head["loops"]) / 2  # in the mean
    forward = head["grad_loops"] if head["carry"] else drawn
    back = min(head["grad_loops"] or drawn, drawn)
    reads = 1 if head["supervise"] == "final" else back
    return steps * head["batch"] * (flops(head, forward, reads) + 2 * flops(head, back, reads))


def runs(name):
    """For each model of NAME, in the order of its files, a tuple of one dict a seed: its settings, its last line, and
    `head`, the settings alone; `at`, {(file, T): scores}."""
    seeds = []
    for path in sorted(LOGS.glob(f"{name}-seed?.jsonl")):
        logs, at = [], {}
        for row in lines(path):
            if row["step"] == 0:
                logs.append({})
            logs[-1][row["step"]] = row  # after a resume steps come again: the last entry counts
        for row in scores(path.with_name(f"{path.stem}-eval.jsonl")):
            at.setdefault(row["checkpoint"], {})[row["file"], row["T"]] = row
        models = []
        for log, found in zip(logs, at.values() or [{}] * len(logs), strict=True):
            head, end = settings(log[0]), dict(log[max(log)])
            if "flops" not in end:
                end["flops"] = training_flops(head, end["step"])
            models.append(head | end | dict(head=head, at=found))
        seeds.append(models)
    return list(zip(*seeds, strict=True))


# ---- tables ----


def table(head, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def spread(values, digits=1):
    """One number a seed: their mean ± half their range, without the latter where it rounds to 0."""
    values = list(values)
    mean, half = sum(values) / len(values), round((max(values) - min(values)) / 2, digits)
    return f"{mean:,.{digits}f}" + f" ± {half:,.{digits}f}" * (half > 0)


DIGITS = {"parameters": 0, "steps": 0, "rate": 4, "NELBO, nats": 2}


def shape(model):
    """Layers x loops, with head and tail layers if there are any: 1 + 1 x 5 + 2."""
    text = "{layers} x {loops}"
    if model["head_layers"] + model["tail_layers"]:
        text = "{head_layers} + {layers} x {loops} + {tail_layers}"
    return text.format_map(model) + ", with additions" * model["coord_bias"]


def compare(found, columns, first="K x L", label=shape):
    """A row for each model of `found`, named by label(model): {title: number(model)}."""
    rows = []
    for seeds in found:
        cells = (spread(map(number, seeds), DIGITS.get(title, 1)) for title, number in columns.items())
        rows.append((label(seeds[0]), *cells))
    return table((first, *columns), rows)


def pivot(names, head, keep=lambda row: True, loops=True):
    """Scores of the rows to keep by T, and by what `head` says: {title: a field, or a function of the row}."""

    def down(row):
        return tuple(row[key] if isinstance(key, str) else key(row) for key in head.values())

    seeds, rows = [list(filter(keep, seed)) for seed in both(names)], []
    steps = sorted({row["T"] for row in seeds[0]})
    for key in dict.fromkeys(map(down, seeds[0])):
        found = [{row["T"]: row for row in seed if down(row) == key} for seed in seeds]
        done = [T for T in steps if T in found[0]]
        share = {T: spread(at[T]["share"] for at in found if T in at) for T in done}
        cost = [", ".join(spread((at[T]["loops"] for at in found if T in at), 0) for T in done)] * loops
        rows.append((*key, found[0][done[0]]["n"], *(share.get(T, "") for T in steps), *cost))
    return table((*head, "n", *(f"T={T}" for T in steps), *["loops at each T"] * loops), rows)


def last(key, factor=1):
    return lambda model: factor * model[key]


def on(file, *steps):
    """Columns: what is solved of a file at each T."""
    return {f"{file}, T={T}": lambda model, T=T: model["at"][file, T]["share"] for T in steps}


PARAMETERS, STEPS = {"parameters": last("parameters")}, {"steps": last("steps")}
FLOPS = {"training, TFLOP": last("flops", 1e-12)}
SIZE = PARAMETERS | STEPS | FLOPS
MINUTES, NELBO = {"minutes": last("seconds", 1 / 60)}, {"NELBO, nats": last("nelbo")}
DEPTH = PARAMETERS | FLOPS | NELBO
CHOICES = STEPS | NELBO | on("kaggle3m", 5, 20, 81)
HELD_OUT = {f"held-out {key}": last(f"held-out {key}", 100) for key in ("operands", "targets")}


def choices():
    """Models with our additions, named by what differs from the first. Those without the bias and injection were
    trained at a rate that does not suit them."""
    found, same = runs("sudoku-choices"), ("parameters", "steps", "seed", "eval_every", "save_every")
    base = found[0][0]["head"]

    def label(model):
        change = [f"{key}={x}".lower() for key, x in model["head"].items() if x != base.get(key, x) and key not in same]
        return f"`{' '.join(change)}`" if change else "none" if model is found[0][0] else "plain cell index"

    skip = r"supervise=(\d|grow)|mass|embedding|time|min=[14]|inject=false coord_bias=false|curriculum"
    kept = [seeds for seeds in found if not re.search(skip, label(seeds[0]))]
    kept[1:1] = runs("sudoku-choices-time")  # earlier ones began the map of t at full size
    return compare(kept, CHOICES, "change", label)


def rates():
    """The NELBO of each form after a short run at three rates of Muon, seed 0."""
    found = {}
    for log in ("sudoku-paper-rates", "countdown-paper-rates", "sudoku-paper-depth"):
        for model, *_ in runs(log):
            drawn = ", S drawn" * (model["loops_min"] > 0)
            form = f"{model['task']}, {shape(model)}{drawn}", supervised(model), f"{model['steps']:,}"
            found.setdefault(form, {})[model["lr"]] = model["nelbo"]
    columns = (0.02, 0.007, 0.0025)
    tried = {form: at for form, at in found.items() if 0.007 in at}
    rows = [(*form, *(f"{at[lr]:.1f}" if lr in at else "" for lr in columns)) for form, at in tried.items()]
    return table(("form", "loss at", "steps", *(f"rate {lr}" for lr in columns)), rows)


def supervised(model):
    how = {"final": "the final loop", "all": "all loops", "linear": "all loops, in proportion to l"}
    return how[model["supervise"]]


def beside_paper(names, first, label):
    """The paper's form on Sudoku after 800 steps, and what differs from it in one thing."""
    found = [seeds for seeds in runs("sudoku-paper-depth") if shape(seeds[0]) == "1 x 8"]
    return compare(sum(map(runs, names.split()), found), STEPS | NELBO, first, label)


def optimizer(model):
    return "Muon, 0.02; AdamW for the rest, 0.004" if model["muon"] else f"AdamW for all, {model['lr_rest']}"


def looping_runs():
    """LoopMDM's form, with the loop at three places and S drawn or fixed, and what it is compared with."""
    return sum((runs(f"sudoku-loopmdm{part}") for part in ("", "-place", "-fixed", "-deep")), [])


def looped(model):
    """What to call a model of the table about looping a part."""
    if model["loops"] == 1:
        return f"{model['layers']} layers, not looped"
    place = "late" if not model["tail_layers"] else "middle" if model["head_layers"] else "early"
    return f"{shape(model)} ({place}), S {'drawn' if model['loops_min'] else 'fixed'}"


def countdown_runs():
    """Our Countdown models, and what they solve of the public set for their number of operands."""

    def solved(T=None):
        return lambda model: model["at"][max(key for key in model["at"] if T in (None, key[1]))]["share"]

    def name(model):
        return f"{min(model['at'])[0]}, {shape(model)}, d = {model['width']}"

    columns = SIZE | MINUTES | HELD_OUT | {"T=1": solved(1), "T=8": solved(8), "one token a step": solved()}
    found = sum((runs(f"countdown-{name}") for name in ("cpu", "3", "4", "4-wide")), [])
    return compare(found, columns, "set, model", name)


MODELS = {"fixed": "8", "trunc": "8 to 16, the last 8 with gradient"}


def trained(row):
    return MODELS[re.sub(r"-?\d$", "", Path(row["checkpoint"]).name)]


def where(**wanted):
    """For pivot: the rows whose fields have one of the values wanted."""
    return lambda row: all(row[key] in values for key, values in wanted.items())


def first_try(name, file, T):
    shares = [row["share"] for row in sum(both(name), []) if (row["file"], row["T"]) == (file, T)]
    return spread(shares) if shares else ""


def default(task):
    """{file: what the default of sample.py makes of it}."""
    return {row["file"]: row for row in scores(LOGS / f"{task}-solve-seed0-eval.jsonl")}


COMMANDS = (
    ("sudoku.py --set steps=1000", "Sudoku, a quick look", "sudoku-quick", "kaggle3m", 20, ", slow core"),
    ("sudoku.py --paper", "Sudoku, the paper's form", "sudoku-paper", "kaggle3m", 20, ", slow core"),
    ("sudoku.py", "Sudoku, with our additions", "sudoku-short", "kaggle3m", 20, ""),
    ("sudoku.py --preset long", "twice as wide, four times the training steps", "sudoku-long", "kaggle3m", 20, ""),
    ("countdown.py --paper", "Countdown, the paper's form", "countdown-paper", "cd3", 34, ", slow core"),
    ("countdown.py", "Countdown, with our additions", "countdown-cpu", "cd3", 34, ", two slow cores"),
    ("countdown.py --preset long", "three layers, five times the training steps", "countdown-3", "cd3", 34, ""),
    ("countdown.py --numbers 4", "Countdown, four numbers", "countdown-4", "cd4", 52, ""),
)


def commands():
    """What each training command trains, takes and reaches: a single try, mixed Sudokus or Countdown."""
    rows = []
    for command, what, log, file, T, core in COMMANDS:
        (seeds,) = runs(log)
        minutes = sum(model["seconds"] for model in seeds) / len(seeds) / 60
        rows.append((f"`python train_{command}`", what, f"{minutes:.0f}{core}", first_try(log, file, T)))
    return table(("command", "trains", "minutes", "solved"), rows)


def claims():
    """The claims of the papers, and what their own forms do here."""

    def bound(name, form, steps):
        found = [seeds for seeds in runs(name) if (shape(seeds[0]), seeds[0]["steps"]) == (form, steps)]
        return spread((model["nelbo"] for model in found[0]), 1)

    def after_800(form):
        return f"{bound(depth, form, 800)}, {solved[form]}"

    def share(name, T, key="share", digits=1, **wanted):
        wanted |= dict(T=T)
        found = [row for row in sum(both(name), []) if all(row[k] == x for k, x in wanted.items())]
        return spread((row[key] for row in found), digits)

    def grid(L, T, file="kaggle3m"):
        return share("sudoku-paper-grid", T, file=file, L=L)

    easy, countdown = "ye2024_test", runs("countdown-paper-depth")
    cd3, solved = (
        {shape(seeds[0]): spread(model["at"][key]["share"] for model in seeds) for seeds in found}
        for key, found in ((("cd3", 34), countdown), ((easy, 20), runs("sudoku-paper-depth")))
    )
    final = min(model["nelbo"] for (model,) in runs("sudoku-paper-rates") if model["steps"] == 2000)
    depth, looped = "sudoku-paper-depth", "sudoku-loopmdm"
    stop = {eps: [share(f"{looped}-stop", 20, key, L=8, eps=eps) for key in ("share", "loops")] for eps in (0, 0.2)}
    rows = [
        (
            "L loops of one layer do as well as L layers",
            "on Countdown yes; on Sudoku nearly in the bound, not in puzzles solved",
            f"NELBO on Sudoku after 800 training steps, and easy puzzles solved, %: 8 loops {after_800('1 x 8')}; "
            f"8 layers {after_800('8 x 1')}; one layer run once, with an eighth of the operations, "
            f"{after_800('1 x 1')}. Countdown with three numbers solved after 1,500, %: 4 loops {cd3['1 x 4']}; "
            f"4 layers {cd3['4 x 1']}; one layer run once {cd3['1 x 1']}",
        ),
        (
            "loops replace denoising steps",
            "on mixed puzzles, at 40 loops in all, up to four",
            f"a model trained with 8 loops, solved with 40 in all, %: 1 loop x 40 steps: {grid(1, 40)}; 2 x 20: "
            f"{grid(2, 20)}; 4 x 10: {grid(4, 10)}; 8 x 5: {grid(8, 5)}. On easy puzzles with 20 in all, 1 x 20: "
            f"{grid(1, 20, easy)}; 4 x 5: {grid(4, 5, easy)}",
        ),
        (
            "more loops than in training help\\*",
            "no",
            f"mixed puzzles solved, %, with 8 loops, as in training, and with 16: in 5 steps {grid(8, 5)} and "
            f"{grid(16, 5)}; in 20 steps {grid(8, 20)} and {grid(16, 20)}",
        ),
        (
            "the loss at every loop helps\\*",
            "yes, with a fixed number of loops",
            f"NELBO with the loss at all loops {bound(depth, '1 x 8', 800)}, after 800 training steps at the rate "
            f"0.02; at the final loop alone {final:.1f}, after 2,000 (one training; the better of the rates 0.007 and "
            f"0.0025, 0.02 was not run; guessing is 125)",
        ),
        (
            "to loop only some of the layers pays (LoopMDM)",
            "no",
            f"NELBO after as many operations of training, each at the best rate tried: three layers with the middle "
            f"one looped {bound(looped, '1 + 1 x 8 + 1', 1500)}; three layers run once {bound(looped, '3 x 1', 3250)}",
        ),
        (
            "an adaptive stop saves loops (LoopMDM)",
            "in one of two trainings",
            f"the looped three layers on easy puzzles in 20 steps: {stop[0][0]}% with {stop[0][1]} loops; with the "
            f"stop at eps = 0.2 {stop[0.2][0]}% with {stop[0.2][1]}",
        ),
    ]
    rows = [(f"[{claim}](evidence/README.md#{section})", *cells) for (claim, *cells), section in zip(rows, SECTIONS)]
    return table(("claim", "here?", "measured, on Sudoku unless said"), rows)


SECTIONS = (
    "do-loops-replace-layers",
    *["do-loops-replace-steps"] * 2,
    "does-supervising-every-loop-matter",
    *["does-looping-a-part-pay"] * 2,
)


NAMES = {
    "ye2024_test": "easy (ye2024_test)",
    "kaggle3m": "mixed (kaggle3m)",
    "17clue": "17 clues (17clue)",
    "magictour1465": "hard (magictour1465)",
    "forum_hardest_11plus": "hardest known (forum_hardest_11plus)",
    "cd3": "three numbers (cd3)",
    "cd4": "four numbers (cd4)",
}


def summary(task, models):
    """A single try of the models {title: logs}, and what the default of sample.py solves. A try has 20 steps on
    Sudoku, one where that was not run, and one step a token on Countdown."""
    rows = []
    for file, row in default(task).items():
        T = 20 if task == "sudoku" else row["T"]
        once = {log: first_try(log, file, 1) for log in models.values()}
        single = [first_try(log, file, T) or once[log] + " (T=1)" * (once[log] > "") for log in models.values()]
        solved = f"{100 * row['valid' if task == 'sudoku' else 'solved']:.1f}"
        rows.append((NAMES[file], row["n"], *single, solved, f"{row['tries']:.0f}", f"{row['seconds'] / row['n']:.2f}"))
    what = "puzzles" if task == "sudoku" else "problems"
    return table((what, "n", *models, "with tries", "tries", "seconds each"), rows)


def single_tries():
    """What one try of our Sudoku models solves."""
    shown = {"short": "sudoku-short", "long": "sudoku-long"}
    rows = [
        (file, row["n"], *(first_try(log, file, T) for log in shown.values() for T in (1, 20)))
        for file, row in default("sudoku").items()
    ]
    return table(("set", "n", *(f"{name}, T={T}" for name in shown for T in (1, 20))), rows)


def solving(task):
    """The default of sample.py, in full: what is solved within so many tries, and what it costs."""
    rows, limits = [], (1, 4, 16, 64, 256, *[1024] * (task == "countdown"))
    for file, row in default(task).items():
        within = [f"{100 * row[f'within_{n}']:.1f}" if f"within_{n}" in row else "" for n in limits]
        cost = (f"{row[key]:,.{digits}f}" for key, digits in (("tries", 1), ("steps", 1), ("loops", 0)))
        rows.append((file, row["n"], *within, *cost, f"{row['seconds'] / row['n']:.2f}"))
    head = "set", "n", *(f"within {n}" for n in limits), "tries", "steps", "loops", "seconds"
    return table(head, rows)


def variants(task):
    rows = lines(LOGS / f"restarts-{task}.jsonl")
    budgets = [key for key in rows[0] if key.endswith(" loops")]
    body = []
    for row in rows:
        shares = ("" if row[key] is None else f"{100 * row[key]:.1f}" for key in ("right", *budgets))
        body.append((row["variant"], next(shares), f"{row['loops']:.1f}", *shares))
    return table(("variant", "a try is right, %", "loops a try", *(f"in {key}" for key in budgets)), body)


MORE = where(checkpoint=("runs/fixed-0", "runs/fixed-1", "runs/trunc-0", "runs/trunc-1"), eps=(0, 0.1))
LOOPS = {"loops in training": trained, "L": "L", "eps": "eps"}
LOOPED = SIZE | {"rate": last("lr")} | NELBO | {"held-out, T=20": last("exact_T20", 100)}
SUDOKU_MODELS = {"paper's form": "sudoku-paper", "short": "sudoku-short", "long": "sudoku-long"}
COUNTDOWN_MODELS = {"paper's form": "countdown-paper", "short": "countdown-cpu", "long": "countdown-3 countdown-4"}
GRID = {"set": "file", "L": "L"}
TABLES = {
    "commands": commands,
    "claims": claims,
    "sudoku-summary": lambda: summary("sudoku", SUDOKU_MODELS),
    "countdown-summary": lambda: summary("countdown", COUNTDOWN_MODELS),
    "sudoku-paper": lambda: pivot("sudoku-paper", {"set": "file"}),
    "countdown-paper": lambda: pivot("countdown-paper", {"set": "file"}),
    "sudoku-paper-optimizer": lambda: beside_paper(
        "sudoku-paper-adamw sudoku-paper-adamw-rates", "optimizer, largest rate", optimizer
    ),
    "sudoku-paper-depth": lambda: compare(runs("sudoku-paper-depth"), DEPTH | on("ye2024_test", 20)),
    "countdown-paper-depth": lambda: compare(runs("countdown-paper-depth"), DEPTH | HELD_OUT | on("cd3", 34)),
    "sudoku-paper-grid": lambda: pivot("sudoku-paper-grid", GRID, loops=False),
    "countdown-paper-grid": lambda: pivot("countdown-paper-grid", GRID, loops=False),
    "sudoku-paper-supervision": lambda: beside_paper("sudoku-paper-supervision", "loss at", supervised),
    "paper-rates": rates,
    "sudoku-loopmdm": lambda: compare(looping_runs(), LOOPED, "form", looped),
    "sudoku-loopmdm-stop": lambda: pivot("sudoku-loopmdm-stop", {"L": "L", "eps": "eps"}, where(eps=(0, 0.2))),
    "sudoku-presets": lambda: compare(
        runs("sudoku-short") + runs("sudoku-long"), SIZE | MINUTES | NELBO, "d", last("width")
    ),
    "sudoku-single": single_tries,
    "sudoku-choices": choices,
    "sudoku-generated": lambda: pivot("sudoku-generated", {"model": "checkpoint", "L": "L"}),
    "sudoku-orders": lambda: pivot("sudoku-orders", {"order": "order"}, where(file=["kaggle3m"])),
    "sudoku-more-loops": lambda: pivot("sudoku-more-loops sudoku-adaptive", LOOPS, MORE),
    "sudoku-solving": lambda: solving("sudoku"),
    "countdown-solving": lambda: solving("countdown"),
    "sudoku-variants": lambda: variants("sudoku"),
    "countdown-variants": lambda: variants("countdown"),
    "countdown-runs": countdown_runs,
}


def filled(text):
    """A text with today's tables below its marks."""
    return re.sub(r"(<!-- table: (\S+) -->\n)(\|.*\n)*", lambda found: f"{found[1]}{TABLES[found[2]]()}\n", text)


# ---- figures ----


def draw_paper(plt):
    """The paper's form on Sudoku: layers or loops; and solved by loops in all steps together, for each L."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    style = dict(marker="o", ms=4, lw=1.2, capsize=2)
    depth = runs("sudoku-paper-depth")
    found = {(seeds[0]["layers"], seeds[0]["loops"]): [model["nelbo"] for model in seeds] for seeds in depth}
    for color, label, key in (
        ("tab:blue", "one layer, L loops", lambda n: (1, n)),
        ("tab:orange", "K layers, one loop", lambda n: (n, 1)),
    ):
        points = [found[key(n)] for n in (1, 2, 4, 8)]
        mean, half = [sum(p) / 2 for p in points], [abs(p[0] - p[1]) / 2 for p in points]
        left.errorbar((1, 2, 4, 8), mean, half, color=color, label=label, **style)
    left.set(xscale="log", xlabel="L or K", ylabel="NELBO, nats (lower is better)", ylim=(0, None))
    left.set_xticks((1, 2, 4, 8), (1, 2, 4, 8))
    left.minorticks_off()
    left.set_title("loops or layers, 800 training steps")
    seeds = [[row for row in rows if row["file"] == "kaggle3m"] for rows in both("sudoku-paper-grid")]
    for L in sorted({row["L"] for row in seeds[0]}):
        points = [[(row["loops"], row["share"]) for row in rows if row["L"] == L] for rows in seeds]
        shares = [[share for _, share in line] for line in points]
        mean, half = zip(*(((a + b) / 2, abs(a - b) / 2) for a, b in zip(*shares)))
        color = plt.cm.viridis(math.log2(L) / 5)
        label = f"{L} loop{'s' * (L > 1)} a step"
        right.errorbar([x for x, _ in points[0]], mean, half, color=color, label=label, **style)
    right.set(xscale="log", xlabel="loops a puzzle, all steps together", ylabel="kaggle3m solved, %")
    right.set_title("two trainings with 8 loops, T = 1, 2, 5, 10, 20, 40 steps")
    for ax in (left, right):
        ax.legend()
    fig.tight_layout()
    fig.savefig(HERE / "paper.png", dpi=120)


def draw_tries(plt):
    """Solved by seconds of one core, for the default of sample.py."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for ax, task in zip(axes, ("sudoku", "countdown")):
        for file, row in default(task).items():
            _, share, seconds = zip(*row["rounds"])
            ax.plot([s / row["n"] for s in seconds], [100 * s for s in share], marker="o", ms=3, lw=1.2, label=file)
        ax.set(xscale="log", xlabel="seconds a problem, one core", title=task.capitalize(), ylim=(0, 102))
        ax.legend(loc="lower right")
    axes[0].set_ylabel("solved, %")
    fig.tight_layout()
    fig.savefig(HERE / "tries.png", dpi=120)


def board(ax, digits, sure, colors, title):
    """A Sudoku: digits (81,), cells the greener the surer they are (81,), nan = white; a color for each digit."""
    ax.clear()
    ax.imshow(sure.view(9, 9), cmap="YlGn", vmin=0.1, vmax=1.4)
    for i, (digit, color) in enumerate(zip(digits.tolist(), colors)):
        text = "" if color == "none" else digit
        ax.text(i % 9, i // 9, text, ha="center", va="center", color=color, weight="bold" if color == "gray" else None)
    for k in (2.5, 5.5):
        ax.axhline(k, color="black", lw=0.8), ax.axvline(k, color="black", lw=0.8)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)


def draw_recursion(plt):
    """One denoising step of the short model on one puzzle, read off after every second loop."""
    import torch

    import rmdm

    model = rmdm.load(HERE.parent / "weights" / "sudoku-short.pt")
    x, L = torch.tensor([[int(c) for c in PUZZLE.replace(".", "0")]]), model.config.loops
    with torch.no_grad():
        sure, digit = model(x, torch.ones(1), supervise="all")[0][:, 0].softmax(-1).max(-1)
    blank = x[0] == rmdm.MASK
    fig, axes = plt.subplots(2, 4, figsize=(11, 6))
    for l, ax in zip(range(L // 8 - 1, L, L // 8), axes.flat):
        right = digit[l] == digit[-1]
        colors = [("black" if ok else "crimson") if free else "gray" for ok, free in zip(right, blank)]
        title = f"loop {l + 1}: {int((sure[l, blank] >= 0.9).sum())} of {int(blank.sum())} over 90%"
        board(ax, torch.where(blank, digit[l], x[0]), torch.where(blank, sure[l], math.nan), colors, title)
    fig.tight_layout()
    fig.savefig(HERE / "sudoku-recursion.png", dpi=110)


def draw_solving(plt):
    """A picture that moves: loops within steps, a try that fails, and the first that succeeds, with the options of
    sample.py, but one try after the other."""
    import torch
    from PIL import Image

    import rmdm
    import sample
    import train_sudoku

    class Watched(rmdm.RMDM):
        def loop(self, *args):
            self.seen.append(super().loop(*args))  # h^l
            return self.seen[-1]

    models, _ = sample.load("sudoku", None, 81, "cpu")
    for model in models:
        model.__class__ = Watched
    puzzle, generator, plan = train_sudoku.read(HARD)[0], torch.Generator().manual_seed(0), sample.SOLVE["sudoku"]
    x, _ = train_sudoku.start(models[0], puzzle)
    blank, frames, (fig, ax) = x[0] == rmdm.MASK, [], plt.subplots(figsize=(3.4, 3.7), dpi=80)

    def frame(x, masked, h, title, milliseconds, wrong=False):
        with torch.no_grad():
            sure, digit = model.decode(h).softmax(-1).max(-1)
        sure, digit = sure.gather(1, back[0])[0], train_sudoku.picture(digit, *back)[0]
        guess = ["white" if p > 0.75 else "0.35" for p in sure]
        colors = ["gray" if not blank[i] else guess[i] if masked[i] else "black" for i in range(81)]
        if wrong:  # in red, what stands twice in a row, column or box; what was never filled in stays white
            colors = ["none" if masked[i] else colors[i] for i in range(81)]
            for unit in torch.from_numpy(train_sudoku.UNITS):
                for i in (i for i in unit if x[i] and (x[unit] == x[i]).sum() > 1):
                    colors[i] = "crimson"
        board(ax, torch.where(masked, digit, x), torch.where(masked & (not wrong), sure, math.nan), colors, title)
        fig.canvas.draw()
        image = Image.frombytes("RGBA", fig.canvas.get_width_height(), fig.canvas.buffer_rgba().tobytes())
        frames.append((image.convert("RGB").quantize(48), milliseconds))

    for k in range(plan["tries"]):
        model, options = models[k > 0], plan["again" if k else "first"]
        model.seen, before = [], x[0]
        drawn = train_sudoku.symmetry(1, generator) if k else (torch.arange(81)[None], torch.arange(10)[None])
        back = [order.argsort(1) for order in drawn]
        how = dict(steps=81, give_up=lambda x: sample.hopeless(train_sudoku, x, 1)) | options
        out = sample.attempt(train_sudoku, model, puzzle, lambda *_: drawn, generator, True, how)
        right = train_sudoku.right(puzzle, out.x.numpy())[0]
        if k and not right:
            continue
        for n, step in enumerate(step for step in out.trace if step["loops"]):
            masked, states = before == rmdm.MASK, model.seen[: step["loops"]]
            model.seen = model.seen[len(states) :]
            for l in (1, 2, 3, 4, 6, 8, 12, 16) if n < 2 else (len(states),):
                if l <= len(states):
                    frame(before, masked, states[l - 1], f"try {k + 1}, step {n + 1}, loop {l}", 220)
            before = step["x"][0]
        title = f"try {k + 1}: {'solved' if right else 'it breaks a rule: once more'}"
        frame(before, before == rmdm.MASK, states[-1], title, 2500, not right)
        if right:
            break
    images, times = zip(*frames)
    how = dict(save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True)
    images[0].save(HERE / "sudoku-solving.gif", **how)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for what in ("write", "check", "figures"):
        parser.add_argument(f"--{what}", action="store_true")
    args, paths = parser.parse_args(), (HERE / "README.md", HERE.parent / "README.md")
    texts = {path: path.read_text() for path in paths}
    if args.write:
        for path, text in texts.items():
            path.write_text(filled(text))
    elif args.check:
        missing = [name for name in TABLES if f"<!-- table: {name} -->" not in "".join(texts.values())]
        wrong = [str(path) for path, text in texts.items() if filled(text) != text]
        return f"not what the logs say: {wrong}; tables that no text shows: {missing}" if missing or wrong else 0
    elif args.figures:
        import matplotlib.pyplot as plt

        sys.path.insert(0, str(HERE.parent))
        look = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8}
        with plt.rc_context(look):
            draw_paper(plt)
            draw_tries(plt)
        draw_recursion(plt)
        draw_solving(plt)
    else:
        for name, make in TABLES.items():
            print(f"\n{name}\n\n{make()}")


if __name__ == "__main__":
    sys.exit(main())
