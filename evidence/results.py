"""The tables of evidence/README.md, and its figures, from the logs in evidence/logs/.

    python evidence/results.py              # print every table under its name
    python evidence/results.py --write      # put them into README.md, each below its <!-- table: NAME -->
    python evidence/results.py --check      # exit 1 if a table there is not what this prints
    python evidence/results.py --figures    # draw the figures (matplotlib is needed here and nowhere else)

    logs/NAME-seed*.jsonl         log.jsonl of a training run, or of several, one after the other
    logs/NAME-seed*-eval.jsonl    what `python sample.py --data FILE --json` printed for it, up to commit 60cf229
    logs/NAME-seed*.txt           what training printed at its end: scores; until commit 16cafdf mistakes, noise
    logs/attention-*-seed*.jsonl  what evidence/attention.py printed
    logs/restarts-*-seed*.jsonl   what evidence/restarts.py printed
    logs/uniform-scores-*.jsonl   what evidence/uniform.py printed, with and without --data

The other logs, of evidence/speed.py, of evidence/classical.py and of runs that README.md sums up, have no table.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from statistics import correlation

HERE = Path(__file__).parent
LOGS = HERE / "logs"
PUZZLE = "...6...1..7......8.3.4.1.........6.5.41...3..85...3...2...19...7....8.........976"  # by generate(256, 123)
HARD = "100007090030020008009600500005300900010080002600004000300000010040000007007000300"  # "AI Escargot"

# ---- logs ----


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def scores(path):
    """The rows of a NAME-seed*-eval.jsonl, with `file` as we name it and `name`, that of the log."""
    how = dict(name=path.name.split("-seed")[0], checkpoint="", eps=0.0)
    return [how | row | dict(file=set_name(row["file"])) for row in lines(path)]


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
    back = min(head["grad_loops"] or forward, forward)
    reads = back if head["supervise"] == "all" else 1
    return steps * head["batch"] * (flops(head, forward, reads) + 2 * flops(head, back, reads))


def runs(name):
    """For each model of NAME, in the order of its files, a tuple of one dict a seed: its settings, its last line, and
    `head`, the settings alone; `run`, its name; `at`, {(file, T): scores}; `text`, what training printed."""
    seeds = []
    for path in sorted(LOGS.glob(f"{name}-seed?.jsonl")):
        logs, at, text = [], {}, path.with_suffix(".txt")
        for row in lines(path):
            if row["step"] == 0:
                logs.append({})
            logs[-1][row["step"]] = row  # after a resume steps come again: the last entry counts
        for log in logs:
            if "flops" not in (end := log[max(log)]):
                end["flops"] = training_flops(log[0], end["step"])
        for row in scores(path.with_name(f"{path.stem}-eval.jsonl")):
            at.setdefault(row["checkpoint"], {})[row["file"], row["steps"]] = row
        texts = text.read_text().split("\npreset ") if text.exists() else [""] * len(logs)
        models = zip(logs, texts, at.items() or [("", {})] * len(logs), strict=True)
        models = [(settings(log[0]), log[max(log)], text, *scored) for log, text, scored in models]
        seeds.append([head | last | dict(head=head, text=text, run=run, at=at) for head, last, text, run, at in models])
    return list(zip(*seeds, strict=True))


# ---- tables ----


def table(head, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def spread(values, digits=1):
    """One number a seed: their mean ± half their range, without the latter where it rounds to 0."""
    values = list(values)
    mean, half = sum(values) / len(values), round((max(values) - min(values)) / 2, digits)
    return f"{mean:,.{digits}f}" + f" ± {half:,.{digits}f}" * (half > 0)


DIGITS = {"parameters": 0, "steps": 0, "NELBO, nats": 2}


def compare(found, columns, first="K x L", label=lambda model: shape(model)):
    """A row for each model of `found`, named by label(model): {title: number(model)}."""
    rows = []
    for seeds in found:
        cells = (spread(map(number, seeds), DIGITS.get(title, 1)) for title, number in columns.items())
        rows.append((label(seeds[0]), *cells))
    return table((first, *columns), rows)


def pivot(names, head, keep):
    """Scores of the rows to keep by T, and by what `head` says: {title: a field, or a function of the row}."""

    def down(row):
        return tuple(row[key] if isinstance(key, str) else key(row) for key in head.values())

    seeds = [[row for name in names.split() for row in scores(LOGS / f"{name}-seed{i}-eval.jsonl")] for i in (0, 1)]
    seeds, rows = [list(filter(keep, seed)) for seed in seeds], []
    steps = sorted({row["steps"] for row in seeds[0]})
    for key in dict.fromkeys(map(down, seeds[0])):
        found = [{row["steps"]: row for row in seed if down(row) == key} for seed in seeds]
        done = [T for T in steps if T in found[0]]
        share = {T: spread(100 * at[T].get("exact", at[T].get("solved")) for at in found if T in at) for T in done}
        nfe = ", ".join(spread((at[T]["nfe"] for at in found if T in at), 0) for T in done)
        rows.append((*key, found[0][done[0]]["n"], *(share.get(T, "") for T in steps), nfe))
    return table((*head, "n", *(f"T={T}" for T in steps), "NFE at each T"), rows)


def last(key, factor=1):
    return lambda model: factor * model[key]


def on(file, *steps):
    """Columns: what is solved of a file at each T."""
    return {f"{file}, T={T}": lambda model, T=T: solved(model["at"][file, T]) for T in steps}


def printed(pattern):
    """The number in what training printed; {loops} and other settings stand for the run's own."""
    return lambda model: float(re.search(pattern.format_map(model), model["text"], re.M)[1])


PARAMETERS, STEPS = {"parameters": last("parameters")}, {"steps": last("steps")}
FLOPS = {"training, TFLOP": last("flops", 1e-12)}
SIZE = PARAMETERS | STEPS | FLOPS
MINUTES, NELBO = {"minutes": last("seconds", 1 / 60)}, {"NELBO, nats": last("nelbo")}
PAPER_DEPTH = PARAMETERS | FLOPS | NELBO | on("ye2024_test", 20)
CHOICES = STEPS | NELBO | on("kaggle3m", 5, 20, 81)
TESTS = {f"{key}, T=34": printed(rf"^held-out {key}.* solved (\S+)%") for key in ("operands", "targets")}
CD3 = STEPS | FLOPS | MINUTES | TESTS | on("cd3", 1, 8, 34)
FINAL = SIZE | MINUTES | NELBO
FINAL |= {f"held-out {key}": last(f"held-out {key}", 100) for key in ("operands", "targets")}
FIRST = {"operands, T=1": printed(r"^  L={loops} +(\S+)")}
WELL = {"begins well": printed(r"^held-out operands.* begins well (\S+)%")}
WELL["of those, solved"] = lambda model: 100 * TESTS["operands, T=34"](model) / WELL["begins well"](model)


def shape(model):
    """Layers x loops, with head and tail layers if there are any: 1 + 1 x 5 + 2."""
    text = "{layers} x {loops}"
    if model["head_layers"] + model["tail_layers"]:
        text = "{head_layers} + {layers} x {loops} + {tail_layers}"
    return text.format_map(model) + ", with additions" * model["coord_bias"]


def choices(name, columns, skip=None):
    """Models named by what differs from the first, but for those of a name like `skip`."""
    found, same = runs(name), ("parameters", "steps", "seed", "eval_every", "save_every")
    base = found[0][0]["head"]

    def label(model):
        change = [f"{key}={x}".lower() for key, x in model["head"].items() if x != base.get(key, x) and key not in same]
        return f"`{' '.join(change)}`" if change else "plain cell index" if "plain" in model["run"] else "none"

    found = [seeds for seeds in found if not (skip and re.search(skip, label(seeds[0])))]
    return compare(found, columns, "change", label)


def depth():
    """K layers or L loops on Sudoku, 3,000 steps each, by compute."""

    def shown(model):
        return model["steps"] == 3000 and 1 in (model["layers"], model["loops"])

    found = filter(lambda seeds: shown(seeds[0]), runs("sudoku-depth"))
    return sorted(found, key=lambda seeds: [seeds[0][key] for key in ("coord_bias", "flops")])


def carry():
    """The short preset, and the one before it, whose examples were new at every step."""
    names = {"sudoku-short": "carried", "sudoku-today": "fresh", "sudoku-cpu": "fresh, our own Muon"}
    found = {log: runs(log) for log in names}
    columns = SIZE | MINUTES | NELBO | {"held-out, T=20": last("exact_T20", 100)}
    rows = [seeds for log in names for seeds in found[log]]
    labels = iter(names.values())
    return compare(rows, columns, "examples", lambda model: next(labels))


def operands(model):
    return f"CD{model['numbers']}, {shape(model)}, d = {model['width']}, lr {model['lr']}"


def rates():
    """The NELBO of the paper's form, and of what is compared with it, after short runs at three rates of Muon."""
    found = {}
    for log in ("sudoku-paper-rates", "countdown-paper-rates", "sudoku-paper-depth"):
        for seeds in runs(log):
            model = seeds[0]
            form = f"{model['task']}, {shape(model)}, loss at {model['supervise']} loops, {model['steps']} steps"
            found.setdefault(form, {})[model["lr"]] = model["nelbo"]
    columns = (0.02, 0.007, 0.0025)
    tried = {form: at for form, at in found.items() if 0.007 in at}
    rows = [(form, *(f"{at[lr]:.1f}" if lr in at else "" for lr in columns)) for form, at in tried.items()]
    return table(("form", *(f"rate {lr}" for lr in columns)), rows)


FORMS = "plain", "our", "LoopMDM's"


def attended():
    """What evidence/attention.py printed of the loops: {(task, form): {(t, loop): its rows, one a seed}}."""
    found = {(task, form): {} for task in ("sudoku", "countdown") for form in FORMS}
    for path in sorted(LOGS.glob("attention-*.jsonl")):
        for row in lines(path):
            if row["part"] == "loop":
                form = FORMS[2 if row["head_layers"] else row["inject"]]
                found[row["task"], form].setdefault((row["t"], row["loop"]), []).append(row)
    return found


def attention():
    """At t = 1: the share that goes to other masked positions, by loop, that within units, and the nats."""
    body = []
    for (task, form), at in attended().items():

        def show(key, *loops):
            return ", ".join(spread((row[key] for row in at[1, l]), 2) for l in loops)

        end, even = max(l for _, l in at), at[1, 1][0]["uniform"]
        shares = [show("masked", l) for l in (1, 2, 4, end)]
        unit = f"{show('unit', 1, end)}, {even['unit']:.2f}" if task == "sudoku" else ""
        body.append((task, form, *shares, f"{even['masked']:.2f}", unit, show("ce", 1, end)))
    head = "loop 1", "loop 2", "loop 4", "last", "uniform", "unit: loop 1, last, uniform", "nats: loop 1, last"
    return table(("task", "form", *head), body)


REVISED = ("mended", "spoiled")


def uniform():
    """Uniform-state diffusion, by sampler, beside masking in the same form at equal FLOPs: kaggle3m."""
    measured = [row for path in sorted(LOGS.glob("uniform-scores-seed*.jsonl")) for row in lines(path)]
    body, steps = [], (1, 5, 20, 81)
    for seeds in runs("uniform-flat") + runs("sudoku-flat") + runs("uniform") + runs("sudoku-today"):
        L, ways, bounds = seeds[0]["loops"], {}, [model["nelbo"] for model in seeds]
        if seeds[0]["task"] == "sudoku-uniform":
            rows = [row for row in measured if f"-L{L}-" in row["run"]]
            bounds = [row["nelbo"] for row in rows if not row["data"] and row["T"] == 1]  # held-out
            for row in (row for row in rows if row["data"] and set_name(row["data"]) == "kaggle3m"):
                ways.setdefault(f"uniform, {row['sampler']}", {}).setdefault(row["T"], []).append(row)
        else:
            ways["masking"] = {T: [model["at"][file, T] for model in seeds] for file, T in seeds[0]["at"]}
        costs = spread((model["flops"] / 1e12 for model in seeds)), spread(bounds, 2)
        for way, at in ways.items():
            shares = (spread(100 * row["exact"] for row in at[T]) if T in at else "" for T in steps)
            revised = (spread(100 * row[key] for row in at[20]) if key in at[20][0] else "" for key in REVISED)
            body.append((way, L, *costs, *shares, *revised))
    return table(("process", "L", "TFLOP", "NELBO, nats", *(f"T={T}" for T in steps), *REVISED), body)


def spearman(pairs):
    """The rank correlation of (x, y) pairs, ties at their mean rank."""
    x, y = ([sum(v < w for v in values) + sum(v == w for v in values) / 2 for w in values] for values in zip(*pairs))
    return correlation(x, y)


def likelihood():
    """Does a lower NELBO mean more solved? All logged models that have both, each seed one."""

    def pairs(names, solved, keep=lambda model: True):
        models = (model for name in names for seeds in runs(name) for model in seeds if keep(model))
        return [(-model["nelbo"], solved(model)) for model in models]

    def kaggle(model):
        return model["at"]["kaggle3m", 81]["exact"]

    def plain(model):
        return not (model["inject"] or model["coord_bias"])

    sudoku = "sudoku-depth", "sudoku-choices", "sudoku-cpu", "sudoku-today"
    countdown = "countdown-depth", "countdown-choices", "countdown-looping"
    groups = {
        "Sudoku, plain form": pairs(sudoku, kaggle, plain),
        "Sudoku, with injection or bias": pairs(sudoku, kaggle, lambda model: not plain(model)),
        "Sudoku, all": pairs(sudoku, kaggle),
        "Countdown, layers and loops": pairs(countdown[:1], TESTS["operands, T=34"]),
        "Countdown, looping a part": pairs(countdown[2:], TESTS["operands, T=34"]),
        "Countdown, all": pairs(countdown, TESTS["operands, T=34"]),
    }
    rows = [(name, len(found), f"{spearman(found):.2f}") for name, found in groups.items()]
    return table(("models", "n", "rank correlation"), rows)


def first_tries(name):
    """{file: {T: the rows of the two seeds}} of a log."""
    at = {}
    for i in (0, 1):
        for row in scores(LOGS / f"{name}-seed{i}-eval.jsonl"):
            at.setdefault(row["file"], {}).setdefault(row["steps"], []).append(row)
    return at


def solved(row):
    return 100 * row.get("exact", row.get("solved"))


def restarts(models, steps, limits):
    """For each model {name: its logs} and file: one try at each T of `steps`, and what is solved within 1, 4, .. tries
    of `limits`, with their mean loops."""
    rows = []
    for name, log in models.items():
        at, found = first_tries(log), first_tries(f"{log}-tries")
        for file in found:
            (within,) = found[file].values()
            cells = [spread(map(solved, at[file][T])) if T in at.get(file, {}) else "" for T in steps]
            for n in limits:
                seeds = [row for row in within if n <= row["max_tries"]]  # so many tries may be of one seed alone
                shares, loops = zip(*((100 * row[f"within_{n}"], row[f"nfe_{n}"]) for row in seeds))
                cells.append(f"{spread(shares)} ({spread(loops, 0)})")
            rows.append((name, file, within[0]["n"], *cells))
    titles = (f"within {n} (loops)" if n > 1 else "one try (loops)" for n in limits)
    head = "model", "set", "n", *(f"T={T}" for T in steps), *titles
    return table(head, rows)


def variants(task):
    """What evidence/restarts.py printed: {variant: its rows, one a seed}."""
    found = {}
    for row in (row for i in (0, 1) for row in lines(LOGS / f"restarts-{task}-seed{i}.jsonl")):
        found.setdefault(row["variant"], []).append(row)
    return found


KINDS = {  # those that are shown; the others are within a point of noise 0.3, or below it
    "sudoku": (
        "random symmetry, noise 0.2", "random symmetry, no noise", "noise 0.2", "noise 0.3", "noise 0.45", "20 steps",
        "threshold 0.97", "half the loops", "twice the loops", "remask units in conflict",
    ),
    "countdown": (
        "noise 0.2", "noise 0.3", "noise 1", "temperature 1, no noise", "random order, temperature 1, no noise",
        "threshold 0.9", "half the loops", "twice the loops",
    ),
}  # fmt: skip


def kinds(task):
    body, tries = [], (1, 2, 4, 8, 16)
    for variant in KINDS[task]:
        rows = variants(task)[variant]
        shares = (spread(100 * row[f"tries_{k}"] for row in rows) for k in tries)
        body.append((variant, *shares, spread((row["nfe_16"] for row in rows), 0)))
    return table(("kind", *(f"tries {k}" for k in tries), "loops a problem"), body)


def unjudged():
    """Of eight noisy tries without a checker, as evidence/restarts.py printed it, beside a first try without noise."""
    body = []
    for task in ("sudoku", "countdown"):
        found = variants(task)
        rows = found["without a checker"]
        shares = [spread(100 * row["tries_1"] for row in found["noise 0.3"])]
        shares += [spread(100 * row[key] for row in rows) for key in ("one", "agreed", "likeliest", "any")]
        body.append((task, rows[0]["n"], *shares))
    return table(("task", "n", "one without noise", "one noisy", "most agree on", "model finds likeliest", "any"), body)


def frontier(task):
    """All ways of sampling measured: (solved, loops a problem, milliseconds a problem, options of sample.py). A run's
    time is shared out over its tries by loops."""
    for row in scores(LOGS / f"{task}-frontier-seed0-eval.jsonl"):
        how = [f"--{key} {row[key]}" for key in ("steps", "loops", "threshold", "eps") if row[key]]
        for n in (2**k for k in range(7) if 2**k <= row["max_tries"]):
            ms = 1000 * row["seconds"] / row["n"] * row[f"nfe_{n}"] / row["nfe"]
            yield 100 * row[f"within_{n}"], row[f"nfe_{n}"], ms, " ".join(how + [f"--tries {n}"] * (n > 1))


def cheapest():
    """What solves so much in the least time."""
    rows = []
    for task in ("sudoku", "countdown"):
        for share in (60, 70, 80, 90, 95, 97, 99):
            if enough := [point for point in frontier(task) if point[0] >= share]:
                solves, loops, ms, how = min(enough, key=lambda point: point[2])
                rows.append((task, share, f"{solves:.1f}", f"{loops:.0f}", f"{ms:.1f}", f"`{how}`"))
    return table(("task", "at least", "solves", "loops", "ms", "options of sample.py"), rows)


MODELS = {  # what the logs call a model, and what it is
    "fresh.pt": "fresh",
    "short": "carried",
    "fixed": "8",
    "trunc": "8 to 16, grad_loops=8",
}


def model(row):
    return MODELS[re.sub(r"-?\d$", "", Path(row["checkpoint"]).name)]


def where(**wanted):
    """For pivot: the rows whose fields have one of the values wanted."""
    return lambda row: all(row[key] in values for key, values in wanted.items())


def change(row):
    """In what a row differs from how the long 1 x 4 on Countdown is sampled as a rule."""
    usual = dict(loops=4, order="confidence", threshold=None, eps=0.0)
    return ", ".join(f"{key}={row[key]}" for key, x in usual.items() if row[key] != x) or "none"


TRIES = (1, 4, 16, 64)
SAMPLING = "countdown-loops countdown-orders countdown-threshold countdown-adaptive"
LONG = where(
    checkpoint=("runs/long-0", "runs/long-1"),
    loops=(2, 3, 4, 5, 6, 8),
    order=("confidence", "random", "ancestral"),
    threshold=(None, 0.9),
    eps=(0, 0.3, 0.4, 0.8),
)
AT_20 = where(file=["kaggle3m"], steps=[20])
MORE = where(checkpoint=("runs/fixed-0", "runs/fixed-1", "runs/trunc-0", "runs/trunc-1"), eps=(0, 0.1))
SUDOKU = {"short": "sudoku-short", "long": "sudoku-long"}
SUDOKU_ALL = SUDOKU | {"short, noise 0.3 alone": "sudoku-short-noise"}
COUNTDOWN = {"CD3": "countdown-3", "CD4": "countdown-4"}
COUNTDOWN_ALL = COUNTDOWN | {
    "CD4, d = 160": "countdown-4-wide",
    "CD4, 22,500 steps": "countdown-4-slow",
    "CD4, lr 0.02": "countdown-4-fast",
    "CD4, lr 0.02, noise": "countdown-4-fast-noise",
    "CD4, lr 0.02, always random": "countdown-4-fast-random",
    "CD3, 1 x 4": "countdown-long",
    "CD3, 1 x 4, noise": "countdown-long-noise",
    "CD3, lr 0.02, noise": "countdown-3x2-noise",
    "CD3, lr 0.02, always random": "countdown-3x2-random",
}
OPERANDS = [f"countdown-{name}" for name in "3x2 3 4-fast 4-slow 4 4-wide 5".split()]
LOOPS = {"loops in training": model, "L": "loops", "eps": "eps"}
TABLES = {
    "sudoku-paper": lambda: pivot("sudoku-paper", {"set": "file"}, lambda row: True),
    "countdown-paper": lambda: pivot("countdown-paper", {"set": "file"}, lambda row: True),
    "sudoku-paper-depth": lambda: compare(runs("sudoku-paper-depth"), PAPER_DEPTH),
    "paper-rates": rates,
    "sudoku-presets": lambda: compare(runs("sudoku-short") + runs("sudoku-long"), SIZE | MINUTES | NELBO, "K x L"),
    "sudoku-carry": carry,
    "sudoku-carry-loops": lambda: pivot("sudoku-carry sudoku-short", {"examples": model, "L": "loops"}, AT_20),
    "attention": attention,
    "likelihood": likelihood,
    "uniform": uniform,
    "sudoku-depth": lambda: compare(depth(), PARAMETERS | FLOPS | on("kaggle3m", 20, 81)),
    "sudoku-loops": lambda: pivot("sudoku-loops", {"L": "loops"}, where(loops=(2, 4, 8, 16))),
    "sudoku-orders": lambda: pivot("sudoku-orders", {"order": "order"}, where(file=["kaggle3m"])),
    "sudoku-choices": lambda: choices("sudoku-choices", CHOICES, r"supervise=(\d|grow)|mass|embedding|time|min=[14]"),
    "sudoku-more-loops": lambda: pivot("sudoku-more-loops sudoku-adaptive", LOOPS, MORE),
    "countdown-runs": lambda: compare(runs("countdown-cpu") + runs("countdown-long"), CD3),
    "countdown-operands": lambda: compare(sum(map(runs, OPERANDS), []), FINAL, "task", operands),
    "countdown-depth": lambda: compare(runs("countdown-depth"), PARAMETERS | FLOPS | FIRST | TESTS | WELL),
    "countdown-sampling": lambda: pivot(SAMPLING, {"change": change}, LONG),
    "countdown-looping": lambda: compare(runs("countdown-looping"), STEPS | FIRST | TESTS, "head + K x L + tail"),
    "countdown-choices": lambda: choices("countdown-choices", STEPS | NELBO | FIRST | TESTS),
    "sudoku-summary": lambda: restarts(SUDOKU, (1, 20), (1, 64)),
    "countdown-summary": lambda: restarts(COUNTDOWN, (1, 8), (1, 64)),
    "sudoku-restarts": lambda: restarts(SUDOKU_ALL, (), TRIES),
    "countdown-restarts": lambda: restarts(COUNTDOWN_ALL, (), TRIES),
    "sudoku-restart-kinds": lambda: kinds("sudoku"),
    "countdown-restart-kinds": lambda: kinds("countdown"),
    "restarts-unjudged": unjudged,
    "frontier": cheapest,
}


def filled(text):
    """A text with today's tables below its marks."""
    return re.sub(r"(<!-- table: (\S+) -->\n)(\|.*\n)*", lambda found: f"{found[1]}{TABLES[found[2]]()}\n", text)


# ---- figures ----


def draw_depth(plt):
    """Accuracy on kaggle3m by layers x loops, and by loops a puzzle."""
    keys = "layers", "loops", "coord_bias"
    found = {tuple(seeds[0][key] for key in keys): seeds for seeds in depth()}

    def points(*key):
        """Loops a puzzle, mean score and half the range, at each T."""
        for T in sorted(T for file, T in found[key][0]["at"] if file == "kaggle3m"):
            rows = [model["at"]["kaggle3m", T] for model in found[key]]
            share = [100 * row["exact"] for row in rows]
            yield rows[0]["nfe"], sum(share) / len(share), (max(share) - min(share)) / 2

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    style, sizes = dict(marker="o", ms=4, lw=1.2, capsize=2), (1, 2, 4, 8)
    for color, label, key in (
        ("tab:blue", "1 layer, L loops", lambda n: (1, n)),
        ("tab:orange", "K layers, no loops", lambda n: (n, 1)),
    ):
        _, *ends = zip(*([*points(*key(n), False)][-1] for n in sizes))
        left.errorbar(sizes, *ends, color=color, label=label, **style)
        end = [*points(*key(8), True)][-1]
        star = style | dict(marker="*", ms=10, lw=0)
        left.errorbar(8, *end[1:], color=color, label=f"{label}, with additions", **star)
    for color, L in zip(plt.cm.viridis((0, 0.3, 0.6, 0.85)), sizes):
        right.errorbar(*zip(*points(1, L, False)), color=color, label=f"{L} loop{'s' * (L > 1)} a step", **style)
    right.errorbar(*zip(*points(1, 8, True)), color="tab:blue", ls="--", label="8, with additions", **style)
    left.set(xscale="log", xlabel="layers x loops", ylabel="kaggle3m, exact, %", ylim=(-2, 80))
    left.set_title("one token a step")
    left.set_xticks(sizes, sizes)
    left.minorticks_off()
    right.set(xscale="log", xlabel="loops a puzzle, all steps together", title="1 layer, more and fewer steps")
    for ax in (left, right):
        ax.legend(loc="upper left")
    fig.tight_layout()
    fig.savefig(HERE / "sudoku-depth.png", dpi=130)


def board(ax, digits, sure, colors, title):
    """A Sudoku: digits (81,), cells the greener the surer they are (81,), nan = white; a color for each digit."""
    ax.clear()
    ax.imshow(sure.view(9, 9), cmap="YlGn", vmin=0.1, vmax=1.4)
    for i, (digit, color) in enumerate(zip(digits.tolist(), colors)):
        ax.text(i % 9, i // 9, digit, ha="center", va="center", color=color, weight="bold" if color == "gray" else None)
    for k in (2.5, 5.5):
        ax.axhline(k, color="black", lw=0.8), ax.axvline(k, color="black", lw=0.8)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)


def shipped(name):
    sys.path.insert(0, str(HERE.parent))
    import rmdm

    return rmdm, rmdm.load(HERE.parent / "weights" / f"{name}.pt")


# Training operations by the settings in the public code, counted as ours: layers forward and twice back x operations
# a layer and token x tokens x examples; and what is solved of Sudoku-Extreme, %.
PUBLISHED = {
    "TRM, with attention": ((42 + 2 * 14) * 7.0e6 * 97 * 5e7, 75),
    "chenglou/sudoku-solver, 16 loops": (3 * 64 * 4.3e5 * 81 * 1.02e8, 81.8),
    "the same, 1,024 loops": (3 * 64 * 4.3e5 * 81 * 1.02e8, 98.9),
}


def draw_compute(plt):
    """What the Sudoku presets solve by what their training took, beside published points on other puzzles."""
    fig, ax = plt.subplots(figsize=(8, 3.8))
    presets = [runs(name)[0] for name in ("sudoku-short", "sudoku-long")]
    within = [first_tries(name) for name in ("sudoku-short-tries", "sudoku-long-tries")]
    flops = [seeds[0]["flops"] for seeds in presets]
    files = "kaggle3m", "17clue", "magictour1465", "forum_hardest_11plus"
    for color, file in zip(plt.cm.viridis((0, 0.3, 0.6, 0.85)), files):
        first = [[solved(model["at"][file, 20]) for model in seeds] for seeds in presets]
        many = [[100 * row["within_64"] for row in found[file][81] if row["max_tries"] == 64] for found in within]
        for shares, style in ((first, dict(marker="o", label=file)), (many, dict(marker="s", ls=":"))):
            ax.plot(flops, [sum(x) / len(x) for x in shares], color=color, ms=4, lw=1.2, **style)
    fresh = runs("sudoku-cpu")[0]
    x, y = fresh[0]["flops"], sum(solved(model["at"]["kaggle3m", 20]) for model in fresh) / len(fresh)
    ax.plot(x, y, "x", color="black")
    ax.annotate("kaggle3m, fresh examples", (x, y), fontsize=7, xytext=(4, -10), textcoords="offset points")
    for label, (x, y) in PUBLISHED.items():
        ax.plot(x, y, "D", color="gray", mfc="none", ms=5)
        ax.annotate(label, (x, y), fontsize=7, ha="right", xytext=(-6, -2), textcoords="offset points")
    ax.set(xscale="log", xlabel="training, operations", ylabel="solved, %", ylim=(-2, 102), xlim=(2e13, 5e18))
    ax.legend(loc="center", title="T=20, one try (dotted: within 64)", title_fontsize=8)
    fig.tight_layout()
    fig.savefig(HERE / "sudoku-compute.png", dpi=110)


def draw_restarts(plt):
    """Three ways to spend loops on one puzzle: steps, loops a step, and further tries."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for ax, file in zip(axes, ("kaggle3m", "magictour1465")):
        rows = [row for seed in (0, 1) for row in scores(LOGS / f"sudoku-short-curves-seed{seed}-eval.jsonl")]
        (tries,) = first_tries("sudoku-short-tries")[file].values()
        for color, label, by, found in (
            ("tab:blue", "one try: 1 to 20 steps of 32 loops", "steps", [row for row in rows if row["loops"] == 32]),
            ("tab:orange", "one try: 5 steps of 4 to 128 loops", "loops", [row for row in rows if row["steps"] == 5]),
            ("tab:green", "1 to 64 tries, threshold 0.99", "n", [
                dict(file=file, n=n, nfe=row[f"nfe_{n}"], exact=row[f"within_{n}"])
                for row in tries for n in (1, 2, 4, 8, 16, 32, 64)
            ]),
        ):
            points = {}
            for row in (row for row in found if row["file"] == file):
                points.setdefault(row[by], []).append((row["nfe"], 100 * row["exact"]))
            points = [[sum(x) / len(x) for x in zip(*points[key])] for key in sorted(points)]
            ax.plot(*zip(*points), color=color, label=label, marker="o", ms=4, lw=1.2)
        ax.set(xscale="log", xlabel="loops a puzzle", title=file, xlim=(10, 10_000), ylim=(-2, 102))
    axes[0].set_ylabel("solved, %")
    axes[0].legend(loc="lower right")
    fig.tight_layout()
    fig.savefig(HERE / "sudoku-restarts.png", dpi=110)


def draw_frontier(plt):
    """Solved by loops and by milliseconds a problem; a line joins what nothing cheaper beats."""
    fig, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharey="row")
    for row, task in zip(axes, ("sudoku", "countdown")):
        found = list(frontier(task))
        one = [p for p in found if "--tries" not in p[3]]
        for ax, cost, label in zip(row, (1, 2), ("loops a problem", "milliseconds a problem, one core")):
            ax.plot([p[cost] for p in found], [p[0] for p in found], ".", color="silver", ms=4)
            for color, name, points in (("tab:blue", "one try", one), ("tab:green", "one or more tries", found)):
                best = []
                for point in sorted(points, key=lambda point: (point[cost], -point[0])):
                    if not best or point[0] > best[-1][0]:
                        best.append(point)
                ax.plot([p[cost] for p in best], [p[0] for p in best], "o-", color=color, label=name, ms=4, lw=1.4)
            ax.set(xscale="log", xlabel=label)
        row[0].set_ylabel(f"{task.title()}: solved, %")
    axes[0, 0].legend(loc="upper left")
    fig.tight_layout()
    fig.savefig(HERE / "frontier.png", dpi=110)


def draw_attention(plt):
    """By loop, the share of masked positions' attention that goes to other masked ones; dashed, if it were uniform."""
    fig, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharex="row", sharey="row")
    for ax, ((task, form), at) in zip(axes.flat, attended().items()):
        for color, t in zip(plt.cm.viridis((0, 0.45, 0.8)), (0.5, 0.9, 1.0)):
            by_loop = sorted((l, rows) for (time, l), rows in at.items() if time == t)
            means = [sum(row["masked"] for row in rows) / len(rows) for _, rows in by_loop]
            ax.plot([l for l, _ in by_loop], means, "o-", color=color, label=f"t = {t}", ms=3, lw=1.4)
            ax.axhline(by_loop[0][1][0]["uniform"]["masked"], color=color, ls="--", lw=1)
        ax.set_title(f"{task.title()}, {form} form", fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[:, 0]:
        ax.set_ylim(0)
    fig.supxlabel("loop", fontsize=10)
    fig.supylabel("attention to other masked positions", fontsize=10)
    axes[0, 0].legend()
    fig.tight_layout()
    fig.savefig(HERE / "attention.png", dpi=110)


def draw_recursion(plt):
    """One denoising step of the ten-minute model on one puzzle, read off after every second loop."""
    rmdm, model = shipped("sudoku-short")
    import torch

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
    """A picture that moves: loops within steps, a try that fails, and the first that succeeds, as sample.py does it."""
    rmdm, model = shipped("sudoku-long")
    import torch
    from PIL import Image

    import sample
    import train_sudoku

    class Watched(rmdm.RMDM):
        def loop(self, *args):
            self.seen.append(super().loop(*args))  # h^l
            return self.seen[-1]

    model.__class__, puzzle = Watched, train_sudoku.read(HARD)[0]
    (x, _), generator, L = train_sudoku.start(model, puzzle), torch.Generator().manual_seed(0), model.config.loops
    blank, frames, (fig, ax) = x[0] == rmdm.MASK, [], plt.subplots(figsize=(3.4, 3.7), dpi=80)

    def frame(x, masked, h, title, milliseconds, wrong=False):
        with torch.no_grad():
            sure, digit = model.decode(h).softmax(-1).max(-1)
        sure, digit = sure.gather(1, back[0])[0], train_sudoku.picture(digit, *back)[0]
        guess = ["white" if p > 0.75 else "0.35" for p in sure]
        colors = ["gray" if not blank[i] else guess[i] if masked[i] else "black" for i in range(81)]
        if wrong:  # in red, what stands twice in a row, column or box
            for unit in torch.from_numpy(train_sudoku.UNITS):
                for i in (i for i in unit if (x[unit] == x[i]).sum() > 1):
                    colors[i] = "crimson"
        board(ax, torch.where(masked, digit, x), torch.where(masked, sure, math.nan), colors, title)
        fig.canvas.draw()
        image = Image.frombytes("RGBA", fig.canvas.get_width_height(), fig.canvas.buffer_rgba().tobytes())
        frames.append((image.convert("RGB").quantize(48), milliseconds))

    for k in range(64):
        model.seen, before, how = [], x[0], dict(steps=81, threshold=0.99, noise=0.2 if k else 0.0)
        drawn = train_sudoku.symmetry(1, generator) if k else (torch.arange(81)[None], torch.arange(10)[None])
        back = [order.argsort(1) for order in drawn]
        out = sample.attempt(train_sudoku, model, puzzle, lambda *_: drawn, generator, True, how)
        right = train_sudoku.right(puzzle, out.x.numpy())[0]
        if k and not right:
            continue
        for n, step in enumerate(out.trace):
            masked = before == rmdm.MASK
            for l in (1, 2, 3, 4, 6, 8, 12, L) if n < 2 else (L,):
                frame(before, masked, model.seen[n * L + l - 1], f"try {k + 1}, step {n + 1}, loop {l}", 220)
            before = step["x"][0]
        title = f"try {k + 1}: {'solved' if right else 'it breaks a rule: once more'}"
        frame(before, before == rmdm.MASK, model.seen[-1], title, 2500, not right)
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

        look = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8}
        with plt.rc_context(look):
            for draw in (draw_depth, draw_restarts, draw_compute, draw_frontier, draw_attention):
                draw(plt)
        draw_recursion(plt)
        draw_solving(plt)
    else:
        for name, make in TABLES.items():
            print(f"\n{name}\n\n{make()}")


if __name__ == "__main__":
    sys.exit(main())
