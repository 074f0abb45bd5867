"""Countdown with recursive masked diffusion: rules, problems, evaluation, training.

    python train_countdown.py                             # makes problems, trains, evaluates; GPU if there is one
    python train_countdown.py --preset long               # a larger model, for longer
    python train_countdown.py --numbers 4                 # four operands; the long preset
    python train_countdown.py --resume                    # goes on where an interrupted run stopped
    python train_countdown.py --paper                     # the paper's form: of ours only the optimizer
    python train_countdown.py --data cd4_train.jsonl      # trains on a published file, not generated problems

The task, after Stream of Search (2404.03683) and Ye et al. (2410.14157): combine n operands, each from 1 to
99 and used exactly once, by + - * / into a target from 10 to 100. Intermediate results are integers from 0.
Problem and solution, one token a character:

    86,28,13,31,96   ->   86+28=114,31-13=18,114-18=96

Each number has a field of fixed width (our choice), filled from the right, with blanks in front, so that a
digit's place in the sequence says what it is worth:

    "86,28,13,31, 96" + "86+28= 114,  31-13=  18, 114-  18= 96"

The first part, the prompt, is never editable; the second is, its blanks included, which the model has to get
right like any other token.
"""

import argparse
import itertools
import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rmdm
from rmdm import MASK, BadInput

LOW, HIGH, TOP = 10, 100, 99  # targets from LOW to HIGH, operands from 1 to TOP
OPS = "+-*/"
EQUATION = re.compile("N([-+*/])N=N".replace("N", "(0|[1-9][0-9]{0,8})"))

# ---- 1. Rules ----


def parse(text):
    """"87,29,32,96" -> the operands and, last, the target: (n+1,). Raises BadInput."""
    if not re.fullmatch(r"\s*[0-9]{1,4}(\s*,\s*[0-9]{1,4}){3,5}\s*", text):
        raise BadInput(f"expected 3 to 5 operands and the target, as in 35,27,20,42, not {text[:40]!r}")
    *numbers, target = problem = [int(x) for x in text.split(",")]
    if not all(1 <= x <= TOP for x in numbers) or not LOW <= target <= HIGH:
        raise BadInput(f"operands are from 1 to {TOP}, the target from {LOW} to {HIGH}, not as in {problem}")
    return np.array(problem)


def calculate(a, op, b):
    """a op b, or None if that is negative or no integer."""
    if op in "+*":
        return a + b if op == "+" else a * b
    return (a - b if a >= b else None) if op == "-" else a // b if b and a % b == 0 else None


def check_text(problem, answer):
    """What is wrong with an answer such as "86+28=114,31-13=18,114-18=96" to a problem (n+1,), in words; None if
    nothing is. Nothing is evaluated: a regular expression reads the numbers."""
    *left, target = map(int, problem)
    for k, equation in enumerate(answer.split(","), 1):
        if not (found := EQUATION.fullmatch(equation)):
            return f"syntax of equation {k}: {equation[:40]!r}"
        a, op, b, c = int(found[1]), found[2], int(found[3]), int(found[4])
        for x in (a, b):
            if x not in left:
                return f"number not available in equation {k}: {x}"
            left.remove(x)
        if calculate(a, op, b) != c:
            return f"false equation {k}: {equation}"
        left.append(c)
    if len(left) > 1:
        return f"number left over: {', '.join(map(str, left[:-1]))}"
    return None if left == [target] else f"wrong target: {left[0]}, not {target}"


# ---- 2. Generator: all solutions of many problems at once ----
# A path is a solution's number: at each step, which pair of the values so far, and which of + - * /.


def limits(n):
    """The largest numbers worth having in a solution with n operands: (left, right, result) of each equation.

    A result made of m operands is at most TOP^m, and useless if no division by the other n - m can bring it
    down to HIGH. Of the k+1 operands that equation k joins at most half are on its smaller, right side."""
    results = [max(min(TOP**m, HIGH * TOP ** (n - m)) for m in range(2, k + 2)) for k in range(1, n - 1)]
    results = [TOP, *results, HIGH]
    return [(results[k - 1], TOP ** ((k + 1) // 2), results[k]) for k in range(1, n)]


def combine(a, b, limit):
    """a + b, a - b, a * b, a / b for a >= b, as one array (4, ...); -1 = not an integer, above the limit, or made
    of a -1."""
    b1 = np.maximum(b, 1)
    results = np.stack([a + b, a - b, a * b, np.where((b > 0) & (a % b1 == 0), a // b1, -1)])
    return np.where((b < 0) | (results > limit), -1, results)


def search(numbers):
    """Operands (M, n) -> for every path what it ends in, -1 where it breaks a rule, and the largest number
    on the way: two arrays (M, paths). For n = 3, 4, 5 there are 48, 1152 and 46080 paths."""
    state = np.append(numbers.T, 0 * numbers.T[:1], 0)[:, :, None]  # (values and, last, the largest; M; paths so far)
    for m, (_, _, limit) in zip(range(numbers.shape[1], 1, -1), limits(numbers.shape[1])):
        grown = []
        for i, j in itertools.combinations(range(m), 2):
            rest, largest = np.delete(state[:m], (i, j), 0), state[m:]
            for result in combine(np.maximum(state[i], state[j]), np.minimum(state[i], state[j]), limit):
                grown.append(np.concatenate([result[None], rest, np.maximum(largest, result)]))
        state = np.stack(grown, -1).reshape(m, len(numbers), -1)
    return state


def replay(numbers, path):
    """Operands (P, n) and a path each (P,) -> equations (P, n-1, 4): left, operator, right, result."""
    values, equations, n = numbers, [], numbers.shape[1]
    for m in range(n, 1, -1):
        later = np.prod([4 * k * (k - 1) // 2 for k in range(2, m)], dtype=int)  # paths from the next step on
        choice, path = path // later, path % later
        pairs = np.array(list(itertools.combinations(range(m), 2)))
        others = np.array([[k for k in range(m) if k not in pair] for pair in pairs], int).reshape(len(pairs), -1)
        two = np.take_along_axis(values, pairs[choice // 4], 1)
        a, b, op = two.max(1), two.min(1), choice % 4
        result = np.take_along_axis(combine(a, b, HIGH * TOP**n), op[None], 0)[0]
        values = np.concatenate([result[:, None], np.take_along_axis(values, others[choice // 4], 1)], 1)
        equations.append(np.stack([a, op, b, result], 1))
    return np.stack(equations, 1)


def solutions(numbers):
    """Every problem that operands (M, n) pose, with one solution each: problems (P, n+1), equations
    (P, n-1, 4). Some 200,000 a second for n = 3, 100,000 for n = 4, 30,000 for n = 5.

    Of many solutions it is the one whose largest number is smallest, and of those the first that joins the
    largest operands (our choice: a rule is learned faster than a random pick)."""
    numbers = -np.sort(-numbers, 1)
    ends, largest = search(numbers)
    row, path = np.nonzero((ends >= LOW) & (ends <= HIGH))
    target, first = ends[row, path], np.argsort(largest[row, path], kind="stable")
    _, i = np.unique((row * 128 + target)[first], return_index=True)  # 128: any number above HIGH
    row, path, target = (part[first[i]] for part in (row, path, target))
    return np.column_stack([numbers[row], target]), replay(numbers[row], path)


def generate(n, count, seed):
    """At least `count` problems with their equations, see `solutions`, from i.i.d. draws of n operands, 1 to TOP."""
    rng, parts, made, size = np.random.default_rng(seed), [], 0, {3: 4096, 4: 512, 5: 16}[n]  # draws that fit a cache
    with tqdm(total=count, desc="generating problems", unit="problem", dynamic_ncols=True) as bar:
        while made < count:
            parts.append(solutions(rng.integers(1, TOP + 1, (size, n))))
            made += len(parts[-1][0])
            bar.update(len(parts[-1][0]))
    return tuple(np.concatenate(part) for part in zip(*parts))


def held_out_targets(n):
    """The nine targets that Ye et al. hold out for n operands."""
    targets = list(range(LOW, HIGH + 1))
    random.Random(n).shuffle(targets)
    return targets[:9]


def split(problems, equations, seed):
    """Three lists of (problems, equations): for training; to test, problems whose operands, in any order, are
    held out (500 multisets, or a tenth of all) and targets are not; and problems with a held-out target alone.
    TEST different problems in a test, each target as often as any other."""
    rng, n = np.random.default_rng(seed), problems.shape[1] - 1
    key = np.sort(problems[:, :n], 1) @ 128 ** np.arange(n)
    multisets = np.unique(key)
    secret = np.isin(key, rng.choice(multisets, min(500, len(multisets) // 10), replace=False))
    target = np.isin(problems[:, n], held_out_targets(n))
    parts = [(problems[~secret & ~target], equations[~secret & ~target])]
    for i in (np.flatnonzero(secret & ~target), np.flatnonzero(~secret & target)):
        i = i[np.unique(problems[i], axis=0, return_index=True)[1]]
        share = 1 / np.bincount(problems[i, n])[problems[i, n]]
        i = rng.choice(i, min(TEST, len(i)), replace=False, p=share / share.sum()) if len(i) else i
        parts.append((problems[i], equations[i]))
    return parts


# ---- 3. Tokens ----

CHARS = "_0123456789+-*/=, "  # a character's place is its token: MASK is "_", a blank of a field " "
SCORE = "solved"  # the main one of those that `evaluate` returns
AGAIN = dict(order="random", temperature=1.0)  # in further tries: with four operands solves more than noise
LINE = 1  # every line of a file is a problem
TEST = 512  # problems in each of the two tests: a standard error of two points


def template(n):
    """What the sequence for n operands is made of: (what, width, equation, role) for each field in turn.

    what: "number", "operator", or the character that is always there. equation: 0 is the prompt."""
    parts = [(*field, 0, i) for i in range(n) for field in (("number", len(str(TOP))), (",", 1))]
    parts.append(("number", len(str(HIGH)), 0, n))
    for k, (left, right, result) in enumerate(limits(n), 1):
        parts += [(",", 1, k, n)] if k > 1 else []
        parts += [("number", len(str(left)), k, n + 1), ("operator", 1, k, n + 2)]
        parts += [("number", len(str(right)), k, n + 3), ("=", 1, k, n + 4), ("number", len(str(result)), k, n + 5)]
    return parts


COORDS = {  # for rmdm.Config, (N, 3): equation, role in it, and place of the digit from the right
    n: tuple((k, role, place) for _, width, k, role in template(n) for place in reversed(range(width)))
    for n in (3, 4, 5)
}
OPERANDS = {len(table): n for n, table in COORDS.items()}  # N -> n: the length of a sequence tells


def editable(N):
    """(N,) bool, True = answer, False = prompt."""
    return np.array([k > 0 for k, _, _ in COORDS[OPERANDS[N]]])


def encode(problems, equations):
    """Problems (P, n+1) and equations (P, n-1, 4) -> tokens (P, N) uint8. The operands are put in falling
    order (our choice: they may come in any, and a model need not learn that). As text,

        encode([[4, 20, 7, 87]], [[[20, 2, 4, 80], [80, 0, 7, 87]]])  ->  "20, 4, 7, 87" "20* 4=  80,  80+ 7= 87"
    """
    P, n, parts = len(problems), problems.shape[1] - 1, []
    columns = iter([*-np.sort(-problems[:, :n], 1).T, problems[:, n], *equations.reshape(P, 4 * (n - 1)).T])
    for what, width, _, _ in template(n):
        if what == "number":
            power, x = 10 ** np.arange(width)[::-1], next(columns)[:, None]
            parts.append(np.where((x < power) & (power > 1), CHARS.index(" "), x // power % 10 + CHARS.index("0")))
        elif what == "operator":
            parts.append(next(columns)[:, None] + CHARS.index("+"))
        else:
            parts.append(np.full((P, 1), CHARS.index(what)))
    return np.concatenate(parts, 1).astype(np.uint8)


def decode(tokens):
    """Tokens (N,) -> the answer as text, without the blanks in front of numbers; any other blank stays,
    which `check` calls a mistake of syntax."""
    text = "".join(CHARS[token] for token, answer in zip(tokens, editable(len(tokens))) if answer)
    return re.sub("(?<![0-9]) +(?=[0-9])", "", text)


def draw(cells):
    """N characters -> one line: the prompt, an arrow, the answer."""
    prompt = int((~editable(len(cells))).sum())
    return [f"{''.join(cells[:prompt])}  ->  {''.join(cells[prompt:])}"]


def name(i, N):
    """What to call a position of the answer: the number of its equation."""
    return f"eq{COORDS[OPERANDS[N]][i][0]}:"


# ---- 4. Published files ----


def read_file(path):
    """Yield (problem (n+1,), equations (n-1, 4)) for each row of a jsonl file.

    A row is {"input": "87,29,32,96", "output": "87/29=3,32*3=96"}, with any solution, or
    {"input": "87,29,32", "output": "96"}, for which the equations are all 0. Raises BadInput with the number
    of a bad line."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    operands = None
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                problem, answer = str(row["input"]), str(row["output"])
                problem, answer = (problem, answer) if "=" in answer else (f"{problem},{answer}", "")
                problem = parse(problem)
                operands = operands or len(problem)
                if operands != len(problem):
                    raise BadInput("another number of operands than in the lines before")
                found = problem, read_answer(problem, answer)
            except BadInput as e:
                raise BadInput(f"{path}, line {number}: {e}") from None
            except (ValueError, TypeError, KeyError, RecursionError):
                raise BadInput(f"{path}, line {number}: not a JSON object with input, output") from None
            yield found


def read_answer(problem, answer):
    """A correct answer as text -> equations (n-1, 4), the larger operand on the left; "" -> all 0."""
    equations = np.zeros((len(problem) - 2, 4), int)
    if answer and (wrong := check_text(problem, answer)):
        raise BadInput(f"the solution is wrong, {wrong}")
    for k, (a, op, b, c) in enumerate(EQUATION.findall(answer)):
        a, op, b = int(a), OPS.index(op), int(b)
        if a < b:  # of a sum or product, or 0/b=0, which is b*0=0
            a, op, b = b, 2 if op == 3 else op, a
        equations[k] = a, op, b, int(c)
    return equations


# ---- 5. Training batches and evaluation ----


def batches(problems, equations, device):
    """The `batch` function that rmdm.train asks for: each target as often as any other, as published."""
    problems, equations = (part[problems[:, -1].argsort(kind="stable")] for part in (problems, equations))
    _, first, count = (torch.from_numpy(x).to(device) for x in np.unique(problems[:, -1], True, return_counts=True))
    x0 = torch.from_numpy(encode(problems, equations)).to(device)  # uint8: small on the device
    answer = torch.from_numpy(editable(x0.shape[1])).to(device)

    def batch(n, generator):
        target = torch.randint(len(first), (n,), generator=generator, device=device)
        i = first[target] + (torch.rand(n, generator=generator, device=device) * count[target]).long()
        return x0[i].long(), answer.expand(n, -1)

    return batch


def start(model, problems):
    """Problems (P, n+1) -> tokens (P, N) int64 on the model's device, the answer MASKed, and `editable` (P, N).
    Raises BadInput if the model is for another number of operands."""
    n, N, device = problems.shape[1] - 1, len(model.config.coords), next(model.parameters()).device
    if n != OPERANDS[N]:
        raise BadInput(f"the model is for {OPERANDS[N]} operands, not {n}")
    x = encode(problems, np.zeros((len(problems), n - 1, 4), int))
    answer = torch.from_numpy(editable(N)).expand(*x.shape).to(device)
    return torch.from_numpy(x).long().to(device).masked_fill(answer, MASK), answer


def check(problem, tokens):
    """What is wrong with an answer, tokens (N,), in words; None if nothing is."""
    return check_text(problem, decode(tokens))


def judge(problems, x):
    """For the restarts of rmdm.sample_all: which of the answers x (n, N) solve problems (n, n+1), (n,) bool."""
    return np.array([check(problem, tokens) is None for problem, tokens in zip(problems, x.tolist())])


def evaluate(model, problems, equations=None, **how):
    """Solve problems (P, n+1) with rmdm.sample_all(**how) and check the answers. Returns a dict of means: `solved`;
    those of Filled.scores; and n and `seconds` in all. `equations` are not used: any solution counts."""
    began = time.perf_counter()
    out = rmdm.sample_all(model, *start(model, problems), lambda i, x: judge(problems[i.tolist()], x), **how)
    solved, seconds = out.right.double().mean().item(), time.perf_counter() - began
    return dict(n=len(problems), solved=solved, **out.scores(), seconds=seconds)


# ---- 6. The command ----


def presets(n):
    """The model, the training and the number of problems, for n operands; none was chosen for five. Attention bias and
    truncated backpropagation won on Sudoku; here neither did, see evidence/."""
    ours = rmdm.Config(len(CHARS), COORDS[n], width=128, heads=4, loops=4, inject=True)
    steps, problems = (38_000, 2_000_000) if n == 3 else (62_000, 5_000_000)  # about one draw a problem
    long = rmdm.TrainConfig(steps, batch=64, lr=0.005, lr_rest=0.001, eval_every=4000)  # many steps want low rates
    paper = rmdm.Config(len(CHARS), len(COORDS[n]), width=128, heads=4, loops=4, time=True)
    return {
        "short": (ours, rmdm.TrainConfig(steps=7300, batch=64), 500_000),
        "long": (replace(ours, layers=3, loops=2), long, problems),  # three times the parameters
        "paper": (paper, rmdm.TrainConfig(steps=3400, batch=64), 500_000),  # 30 minutes of a slow core
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--numbers", type=int, choices=(3, 4, 5), default=3, help="operands (default: %(default)s)")
    add("--preset", choices=presets(3), help="default: short; of four or more operands long; paper: the paper's form")
    add("--paper", action="store_const", const="paper", dest="preset", help="the same as --preset paper")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change fields of the preset")
    add("--problems", type=int, help="how many, about (500000; long: 2000000, of four operands or more 5000000)")
    add("--data", metavar="FILE", help="a published file to take them from; default: they are generated")
    add("--seed", type=int, default=0, help="of data, initialization and training (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    add("--out", metavar="RUN", default="runs/countdown", help="a new folder for the run (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in that folder; other options as before")
    args = parser.parse_args()
    device, N = rmdm.pick_device(args.device), len(COORDS[args.numbers])
    config, training, count = presets(args.numbers)[args.preset or ("short" if args.numbers == 3 else "long")]
    config, training = rmdm.override(args.set, config, replace(training, seed=args.seed))
    count = count if args.problems is None else args.problems
    if not 1 <= count <= 10**9:
        raise BadInput("--problems is from 1 to a billion")
    about = dict(task="countdown", numbers=args.numbers, seed=args.seed, data=args.data, problems=count)
    rmdm.begin(args.out, config, training, about, args.resume)
    if args.data is not None:
        rows = list(itertools.islice(read_file(args.data), count))
        if len(rows) < 100 or not all(solution.any() for _, solution in rows) or len(rows[0][0]) != args.numbers + 1:
            raise BadInput(f"{args.data}: training needs 100 problems or more, with solutions, --numbers of operands")
        problems, equations = (np.array(part) for part in zip(*rows))
    else:
        problems, equations = generate(args.numbers, count, args.seed)
    seen, *tests = split(problems, equations, args.seed)
    tests = {key: test for key, test in zip(("held-out operands", "held-out targets"), tests) if len(test[0])}
    if not len(seen[0]) or "held-out operands" not in tests:
        raise BadInput(f"nothing left to train or test on without the targets {held_out_targets(args.numbers)}")
    print(f"{len(seen[0]):,} problems; " + ", ".join(f"{len(test)} with {key}" for key, (test, _) in tests.items()))
    x0, answer = torch.from_numpy(encode(*tests["held-out operands"])).long().to(device), editable(N)
    answer = torch.from_numpy(answer).expand(*x0.shape).to(device)

    def monitor(model):  # the NELBO is of the solution that it is trained on, not of any
        bound = rmdm.nelbo(model, x0, answer, generator=torch.Generator(device).manual_seed(0)).mean().item()
        shares = {key: evaluate(model, test[:128], steps=N)["solved"] for key, (test, _) in tests.items()}
        return dict(nelbo=bound) | shares

    torch.manual_seed(args.seed)
    model = rmdm.RMDM(config).to(device)
    model = rmdm.train(model, training, batches(*seen, device), monitor, args.out, about, args.resume)
    for key, (test, _) in tests.items():
        print(f"solved, % of {len(test)} problems with {key}, by loops L and steps T")
        for L in sorted({max(1, config.loops // 2), config.loops}):
            shares = [f"T={T} {100 * evaluate(model, test, steps=T, loops=L)['solved']:.1f}" for T in (1, 4, 8, N)]
            print(f"  L={L:<3} {'   '.join(shares)}", flush=True)
    problem = ",".join(map(str, tests["held-out operands"][0][0]))
    print(f"\nsolve one that it has never seen:\n  python sample.py countdown --checkpoint {args.out} {problem}")


if __name__ == "__main__":
    rmdm.run_script(main)
