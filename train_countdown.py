"""Countdown with recursive masked diffusion: rules, problems, evaluation, training.

    python train_countdown.py                             # makes problems, trains, evaluates
    python train_countdown.py --paper                     # the paper's form
    python train_countdown.py --preset long               # a larger model, for longer
    python train_countdown.py --numbers 4                 # four operands; its preset is long
    python train_countdown.py --resume                    # goes on where an interrupted run stopped
    python train_countdown.py --data cd4_train.jsonl      # trains on the problems of a file

Every 1,000 steps (preset long: 4,000) it prints scores on held-out problems: the bound of eq. (3), in nats (`nelbo`),
and the share that is solved with one token a step. At the end it prints a table of the share that is solved, by the
number of loops and of steps, and a command that solves a problem.

The task is that of Stream of Search (2404.03683) and Ye et al. (2410.14157). n operands, each from 1 to 99 and used
exactly once, are combined by + - * / into a target from 10 to 100. Intermediate results are integers from 0.
A problem with its solution, one token a character:

    86,28,13,31,96   ->   86+28=114,31-13=18,114-18=96

Our choice: each number has a field of fixed width, with blanks in front, so that the place of a digit says what it
is worth:

    "86,31,28,13, 96" + "86+28= 114,  31-13=  18, 114-  18= 96"

The first part, the prompt, is never editable. The second part is. Its blanks are tokens like any other, which the model
has to get right.
"""

import functools
import itertools
import json
import random
import re
import shlex
from collections import Counter, namedtuple
from dataclasses import replace

import numpy as np
import torch

import rmdm
from rmdm import MASK, BadInput, require

LOW, HIGH, TOP = 10, 100, 99  # targets from LOW to HIGH, operands from 1 to TOP
OPS = "+-*/"
EQUATION = re.compile("N([-+*/])N=N".replace("N", "(0|[1-9][0-9]{0,8})"))

# ---- 1. Rules ----


def calculate(a, op, b):
    """a op b, or None if that is negative or no integer."""
    if op in "+*":
        return a + b if op == "+" else a * b
    if op == "-":
        return a - b if a >= b else None
    return a // b if b and a % b == 0 else None


def mistake(equation, left=None):
    """What is wrong with an equation such as "86+28=114", in words, or None.

    left: a list of the numbers that are still free. The two operands are taken out, and the result is put in. Without
    it only the arithmetic is judged."""
    if not (found := EQUATION.fullmatch(equation)):
        return f"not an equation, {equation[:40]!r}"
    a, op, b, c = int(found[1]), found[2], int(found[3]), int(found[4])
    if left is not None:
        for x in (a, b):
            if x not in left:
                return f"number not available, {x}"
            left.remove(x)
    if calculate(a, op, b) != c:
        return f"false, {equation}"
    if left is not None:
        left.append(c)


def check(answer, problem):
    """The first mistake in an answer to a problem (n+1,), in words, or None.

    An answer is a text such as "86+28=114,31-13=18,114-18=96", or tokens (N,). It is never run as code: a regular
    expression reads the numbers."""
    answer = answer if isinstance(answer, str) else decode(answer)
    *left, target = map(int, problem)
    for k, equation in enumerate(answer.split(","), 1):
        if found := mistake(equation, left):
            return f"equation {k}: {found}"
    if len(left) > 1:
        return f"number left over: {', '.join(map(str, left[:-1]))}"
    return None if left == [target] else f"wrong target: {left[0]}, not {target}"


def right(problems, answers):
    """Whether answers, tokens (P, N), solve problems (P, n+1): (P,) bool."""
    return np.array([check(tokens, problem) is None for problem, tokens in zip(problems, answers)], bool)


def broken(x):
    """Which sequences x (P, N), tensors, cannot come right, however their MASKs are filled: (P,) bool.

    It judges each equation that has no MASK, and the whole answer once there is none left."""
    found, prompt = [], ~editable(x.shape[1])
    for tokens in x.cpu().numpy():
        problem = whole_numbers("".join(CHARS[token] for token in tokens[prompt]))
        answer, left = decode(tokens), problem[:-1]
        if CHARS[MASK] not in answer:
            found.append(check(answer, problem) is not None)
            continue
        wrong = False
        for equation in answer.split(","):
            if CHARS[MASK] in equation:
                left = None  # its result is not known, so later ones may use any number
            elif mistake(equation, left):
                wrong = True
        found.append(wrong)
    return torch.tensor(found, device=x.device)


# ---- 2. Generator: all solutions of many problems at once ----
# A path is a number that says for each equation which pair of the values so far it joins, and by which of + - * /.


def limits(n):
    """The largest numbers worth having in a solution with n operands: (left, right, result) of each equation.

    A result made of m operands is at most TOP^m, and useless if no division by the other n - m can bring it
    down to HIGH. Equation k joins at most k+1 operands. So one of its sides is made of at most half of them, and its
    right side, the smaller number, is no larger than that one."""
    results = [max(min(TOP**m, HIGH * TOP ** (n - m)) for m in range(2, k + 2)) for k in range(1, n - 1)]
    results = [TOP, *results, HIGH]
    return [(results[k - 1], TOP ** ((k + 1) // 2), results[k]) for k in range(1, n)]


def combine(a, b, limit):
    """a + b, a - b, a * b, a / b for a >= b, as one array (4, ...). It is -1 where the result is no integer or above
    the limit, or where a or b is -1."""
    b1 = np.maximum(b, 1)
    results = np.stack([a + b, a - b, a * b, np.where((b > 0) & (a % b1 == 0), a // b1, -1)])
    return np.where((b < 0) | (results > limit), -1, results)


def search(numbers):
    """Operands (M, n) -> for every path what it ends in, -1 where it breaks a rule, and the largest number
    on the way: two arrays (M, paths). For n = 3, 4, 5 there are 48, 1152 and 46080 paths."""
    state = np.vstack([numbers.T, 0 * numbers[:, 0]])[:, :, None]  # (values, then the largest one so far; M; paths)
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
        others = np.array([[k for k in range(m) if k not in pair] for pair in pairs], int)
        two = np.take_along_axis(values, pairs[choice // 4], 1)
        a, b, op = two.max(1), two.min(1), choice % 4
        result = np.take_along_axis(combine(a, b, HIGH * TOP**n), op[None], 0)[0]
        values = np.concatenate([result[:, None], np.take_along_axis(values, others[choice // 4], 1)], 1)
        equations.append(np.stack([a, op, b, result], 1))
    return np.stack(equations, 1)


def solutions(numbers):
    """Every problem that operands (M, n) pose, with one solution each: problems (P, n+1), equations
    (P, n-1, 4). Some 200,000 a second for n = 3, 100,000 for n = 4, 30,000 for n = 5.

    Of many solutions it is the one whose largest number is smallest, and of those the first in the order of
    `search`, which joins large operands first (our choice: a rule is learned faster than a random pick)."""
    numbers = -np.sort(-numbers, 1)
    ends, largest = search(numbers)
    row, path = np.nonzero((ends >= LOW) & (ends <= HIGH))
    target, first = ends[row, path], np.argsort(largest[row, path], kind="stable")
    _, i = np.unique((row * 128 + target)[first], return_index=True)  # 128: any number above HIGH
    row, path, target = (part[first[i]] for part in (row, path, target))
    return np.column_stack([numbers[row], target]), replay(numbers[row], path)


def generate(n, count, seed):
    """At least `count` problems with their equations, see `solutions`, from i.i.d. draws of n operands, 1 to TOP."""
    rng, parts, made = np.random.default_rng(seed), [], 0
    size = {3: 4096, 4: 512, 5: 16}[n]  # draws at a time: they fit a cache
    with rmdm.progress(total=count, desc="generating problems", unit="problem") as bar:
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
    """[training, held-out operands, held-out targets], each of them (problems, equations).

    Held out are 500 multisets of operands, or a tenth if that is fewer, and nine targets. A problem with both is in
    none of the three. The two tests have at most TEST different problems, the targets about equally often."""
    rng, n = np.random.default_rng(seed), problems.shape[1] - 1
    key = np.sort(problems[:, :n], 1) @ 128 ** np.arange(n)
    multisets = np.unique(key)
    secret = np.isin(key, rng.choice(multisets, min(500, len(multisets) // 10), replace=False))
    target = np.isin(problems[:, n], held_out_targets(n))
    parts = [(problems[~secret & ~target], equations[~secret & ~target])]
    for i in (np.flatnonzero(secret & ~target), np.flatnonzero(~secret & target)):
        i = i[np.unique(problems[i], axis=0, return_index=True)[1]]
        if len(i):
            weight = 1 / np.bincount(problems[i, n])[problems[i, n]]
            i = rng.choice(i, min(TEST, len(i)), replace=False, p=weight / weight.sum())
        parts.append((problems[i], equations[i]))
    return parts


# ---- 3. Tokens ----

CHARS = "_0123456789+-*/=, "  # a character's place is its token: MASK is "_", a blank of a field " "
SYMMETRY = None  # the order of the operands would be one, but `encode` sorts them
SCORE = "solved"  # which of the scores sample.py prints first
TEST = 512  # problems in each of the two tests: a standard error of two points

# A field of the sequence. kind: "number", "operator", or the character that is always there. equation: which one it is
# in; 0 is the prompt. role: which operand of the prompt, the comma after it included; n for the target and for a comma
# between equations; n + 1 to n + 5 for the fields of an equation.
Field = namedtuple("Field", "kind width equation role")


def template(n):
    """The fields of the sequence for n operands, in order."""
    fields = []
    for i in range(n):
        fields += [Field("number", len(str(TOP)), 0, i), Field(",", 1, 0, i)]
    fields.append(Field("number", len(str(HIGH)), 0, n))
    for k, (left, right, result) in enumerate(limits(n), 1):
        if k > 1:
            fields.append(Field(",", 1, k, n))
        fields += [Field("number", len(str(left)), k, n + 1), Field("operator", 1, k, n + 2)]
        fields += [Field("number", len(str(right)), k, n + 3), Field("=", 1, k, n + 4)]
        fields.append(Field("number", len(str(result)), k, n + 5))
    return fields


COORDS = {  # for rmdm.Config, (N, 3): equation, role in it, and place of the digit from the right
    n: tuple((f.equation, f.role, place) for f in template(n) for place in reversed(range(f.width)))
    for n in (3, 4, 5)
}
LENGTHS = {len(table): n for n, table in COORDS.items()}  # the lengths of a sequence, N -> n


@functools.cache  # `decode` asks for it with every answer
def editable(N):
    """(N,) bool, True = answer, False = prompt."""
    return np.array([k > 0 for k, _, _ in COORDS[LENGTHS[N]]])


def encode(problems, equations):
    """Arrays of problems (P, n+1) and equations (P, n-1, 4) -> tokens (P, N) uint8. The operands are put in falling
    order (our choice: then the model need not learn that their order does not matter). As text,

        encode([[4, 20, 7, 87]], [[[20, 2, 4, 80], [80, 0, 7, 87]]])  ->  "20, 4, 7, 87" "20* 4=  80,  80+ 7= 87"
    """
    P, n, parts = len(problems), problems.shape[1] - 1, []
    columns = iter([*-np.sort(-problems[:, :n], 1).T, problems[:, n], *equations.reshape(P, 4 * (n - 1)).T])
    for field in template(n):
        if field.kind == "number":
            power, x = 10 ** np.arange(field.width)[::-1], next(columns)[:, None]
            blank = (x < power) & (power > 1)  # a leading zero, but 0 itself is "0"
            parts.append(np.where(blank, CHARS.index(" "), x // power % 10 + CHARS.index("0")))
        elif field.kind == "operator":
            parts.append(next(columns)[:, None] + CHARS.index("+"))
        else:
            parts.append(np.full((P, 1), CHARS.index(field.kind)))
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


def cell_name(i, N):
    """What to call a position of the answer: the number of its equation."""
    return f"eq{COORDS[LENGTHS[N]][i][0]}:"


# ---- 4. Files ----


def whole_numbers(value):
    """The whole numbers in a text, with commas or blanks between them, or in a list. ValueError for anything else."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if not re.fullmatch(r"[0-9\s,-]+", text):
        raise ValueError
    return [int(x) for x in re.findall(r"[^\s,]+", text)]


def parse(row):
    """(numbers with the target last, solution as text or "") of a row, which is a text or a JSON object."""
    if isinstance(row, str):
        return whole_numbers(row), ""
    if "nums" in row:
        numbers, answer = whole_numbers(row["nums"]) + whole_numbers(row["target"]), row.get("solution", "")
    else:
        numbers, answer = whole_numbers(row["input"]), row["output"]
    answer = ",".join(answer) if isinstance(answer, list) else str(answer)
    if "=" in answer:
        return numbers, re.sub(r"\s*([-+*/=,])\s*", r"\1", answer.strip())
    if "nums" not in row and answer.strip():  # the output is the target
        numbers += whole_numbers(answer)
    return numbers, ""


def read(text, where="", operands=None):
    """Problems (P, n+1), equations (P, n-1, 4), all 0 where there is no solution, and {reason: rows skipped for it}.

    A row is a line such as 35,27,20,42, or a JSON object, one a line or in an array: {"input": "87,29,32,96",
    "output": "87/29=3,32*3=96"} with any solution, {"input": "87,29,32", "output": "96"}, or {"nums": [87, 29, 32],
    "target": 96}. operands: n; default: that of the first row that a model can take. Rows with another number, or
    out of range, are skipped. Raises BadInput, with the number of the line, for any other row and a wrong solution."""
    at, number, skipped, problems, equations = 0, 1, Counter(), [], []
    between = re.compile(r"(?:[\s,\[\]]|^#.*)*", re.MULTILINE)  # the commas and brackets of an array; comments
    while (start := between.match(text, at).end()) < len(text):
        number += text.count("\n", at, start)
        line, at = f"{where}, line {number}: " if where else "", start
        try:
            if text[at] == "{":
                row, end = json.JSONDecoder().raw_decode(text, at)
            else:
                row = re.compile(".*").match(text, at)[0]  # the rest of the line
                end = at + len(row)
            (*numbers, target), answer = parse(row)
            if operands is None and len(numbers) in COORDS:
                operands = len(numbers)
            reason = None
            if len(numbers) != operands:
                reason = f"not {operands or '3 to 5'} operands"
            elif not all(1 <= x <= TOP for x in numbers):
                reason = f"an operand that is not from 1 to {TOP}"
            elif not LOW <= target <= HIGH:
                reason = f"a target that is not from {LOW} to {HIGH}"
            if reason:
                skipped[reason] += 1
            else:
                problems.append([*numbers, target])
                equations.append(read_answer(problems[-1], answer))
        except BadInput as e:
            raise BadInput(f"{line}{e}") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            shown = text[at : at + 40].splitlines()[0]
            what = "neither numbers such as 35,27,20,42 nor a JSON object with them"
            raise BadInput(f"{line}{what}: {shown!r}") from None
        number += text.count("\n", at, end)
        at = end
    reasons = f" ({', '.join(skipped)})" if skipped else ""
    require(problems, f"{where or 'the input'}: no problem that the model can take{reasons}")
    return np.array(problems), np.array(equations), skipped


def read_answer(problem, answer):
    """A correct answer as text -> equations (n-1, 4), the larger operand on the left; "" -> all 0."""
    equations = np.zeros((len(problem) - 2, 4), int)
    if answer and (wrong := check(answer, problem)):
        raise BadInput(f"the solution is wrong, {wrong}")
    for k, (a, op, b, c) in enumerate(EQUATION.findall(answer)):
        a, op, b = int(a), OPS.index(op), int(b)
        if a < b:  # a sum or product the other way round. 0/b=0 becomes b*0=0
            a, op, b = b, 2 if op == 3 else op, a
        equations[k] = a, op, b, int(c)
    return equations


# ---- 5. Training batches and evaluation ----


def batches(problems, equations, device):
    """The `batch` function that rmdm.train asks for: each target as often as any other, as published."""
    problems, equations = (part[problems[:, -1].argsort(kind="stable")] for part in (problems, equations))
    _, first, count = np.unique(problems[:, -1], return_index=True, return_counts=True)
    first, count = (torch.from_numpy(x).to(device) for x in (first, count))
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
    require(n == LENGTHS[N], f"the model is for {LENGTHS[N]} operands, not {n}")
    x = encode(problems, np.zeros((len(problems), n - 1, 4), int))
    answer = torch.from_numpy(editable(N)).expand(*x.shape).to(device)
    return torch.from_numpy(x).long().to(device).masked_fill(answer, MASK), answer


def score(problems, equations, answers):
    """Scores of `answers`, tokens (P, N), to problems (P, n+1): `solved`, the share in which every rule holds. Any
    solution counts, so the given equations are not used."""
    return dict(solved=right(problems, answers).mean().item())


def evaluate(model, problems, **options):
    """One try at each problem (P, n+1), in batches that fit a cache; options as in rmdm.sample. Returns `score`."""
    parts = zip(*(part.split(128) for part in start(model, problems)))
    answers = torch.cat([rmdm.sample(model, *part, **options).x for part in parts])
    return score(problems, None, answers.cpu().numpy())


# ---- 6. The command ----


def presets(n):
    """The model, the training, and the number of problems for n operands; chosen by measurement for three and four.
    Unlike on Sudoku, neither the attention bias nor carried examples won here, see evidence/."""
    V, quick = len(CHARS), rmdm.TrainConfig(steps=7300, batch=64)
    paper = rmdm.Config(V, len(COORDS[n]), width=128, heads=4, loops=4)
    ours = rmdm.Config(V, COORDS[n], width=128, heads=4, loops=4, time=False, inject=True)
    steps, problems = (38_000, 2_000_000) if n == 3 else (62_000, 5_000_000)  # each is drawn about once
    long = replace(quick, steps=steps, lr=0.005, lr_rest=0.001, eval_every=4000)  # many steps want low rates
    return {
        "paper": (paper, replace(quick, steps=3400), 500_000),
        "short": (ours, quick, 500_000),
        "long": (replace(ours, layers=3, loops=2), long, problems),  # three times the parameters
    }


def chosen(args):
    """The settings that the command line asks for: (config, training, about), the last of the task and its data."""
    n = args.numbers
    config, training, count = presets(n)[args.preset or ("short" if n == 3 else "long")]
    config, training = rmdm.override(args.set, config, replace(training, seed=args.seed))
    count = count if args.problems is None else args.problems
    require(1 <= count <= 10**9, "--problems is from 1 to a billion")
    return config, training, dict(task="countdown", numbers=n, data=args.data, problems=count)


def data(about, seed):
    """Problems and equations to train on, and {name: (problems, equations)} to test on, as `about` says."""
    n, count, path = about["numbers"], about["problems"], about["data"]
    if path is None:
        problems, equations = generate(n, count, seed)
    else:
        problems, equations, skipped = read(rmdm.data_text(about), path, n)
        known = np.flatnonzero(equations.any((1, 2)))
        skipped += Counter({"without a solution": len(problems) - len(known)})
        rmdm.tell_skipped(skipped)
        rows = np.random.default_rng(seed).permutation(known)[:count]  # files are often sorted
        require(len(rows) >= 100, f"{path}: training needs at least 100 problems with {n} operands and a solution")
        problems, equations = problems[rows], equations[rows]
    seen, *tests = split(problems, equations, seed)
    tests = {key: test for key, test in zip(("held-out operands", "held-out targets"), tests) if len(test[0])}
    secret = f"without the targets {held_out_targets(n)} and a tenth of the operands"
    require(len(seen[0]) and "held-out operands" in tests, f"too few problems are left to train and test on, {secret}")
    counts = ", ".join(f"{len(test)} with {key}" for key, (test, _) in tests.items())
    print(f"{len(seen[0]):,} problems to train on; to test {counts}")
    return seen, tests


def report(model, tests):
    """Print what the model solves of the held-out problems, by loops and steps."""
    L, N = model.config.loops, len(model.config.coords)
    for key, (test, _) in tests.items():
        print(f"solved, % of {len(test)} problems with {key}, by loops L and steps T")
        for loops in sorted({max(1, L // 2), L}):
            shares = (f"T={T} {100 * evaluate(model, test, steps=T, loops=loops)['solved']:.1f}" for T in (1, 4, 8, N))
            print(f"  L={loops:<3} {'   '.join(shares)}", flush=True)


def main():
    parser = rmdm.training_parser(__doc__, presets(3), "runs/countdown")
    parser.add_argument("--numbers", type=int, choices=(3, 4, 5), default=3, help="operands (default: %(default)s)")
    parser.add_argument("--problems", type=int, help="how many (default: 500000; long: 2000000, or 5000000 from four)")
    args = parser.parse_args()
    device = rmdm.pick_device(args.device)
    rmdm.set_threads(training=True)
    settings = rmdm.resumed_settings(parser, args, "countdown") if args.resume else chosen(args)
    config, training, about = settings
    if not args.resume:  # else `train` does it: the checkpoint is read once less
        rmdm.begin(args.out, *settings)  # before the data are made
    seen, tests = data(about, training.seed)
    N, test = len(config.coords), tests["held-out operands"]
    x0 = torch.from_numpy(encode(*test)).long().to(device)
    answer = torch.from_numpy(editable(N)).expand(*x0.shape).to(device)

    def monitor(model):  # the bound is of the one solution in the data; `evaluate` counts any
        bound = rmdm.nelbo(model, x0, answer, generator=torch.Generator(device).manual_seed(0)).mean().item()
        shares = {key: evaluate(model, test[:128], steps=N)["solved"] for key, (test, _) in tests.items()}
        return dict(nelbo=bound) | shares

    torch.manual_seed(training.seed)
    model = rmdm.RMDM(config).to(device)
    batch = batches(*seen, device)
    model = rmdm.train_in(args.out, model, training, batch, monitor, about=about, resume=args.resume)
    report(model, tests)
    checkpoint, problem = shlex.quote(args.out), ",".join(map(str, test[0][0]))
    print(f"\nsolve one that it has never seen:\n  python sample.py countdown --checkpoint {checkpoint} {problem}")


if __name__ == "__main__":
    rmdm.run_script(main)
