"""Addition and subtraction of numbers of up to four digits, results below zero included.

Thinking writes the problem down again (a negative difference is turned round), then goes digit by digit from the right;
after `>` stands the result so far, so that the answer is the last one copied:

    478+356: 8+6=14>4 7+5+1=13>34 4+3+1=8>834
    356-478=-(478-356): 8-6=2>2 7-5=2>22 4-3=1>122

A problem's carries are the digit places that carry (or borrow, larger number minus smaller). Adaptive thinking thinks
when there is any; the examination asks for it at two or more and for none at none, and leaves one carry free.
A tenth of all problems, chosen by a hash that treats a+b and b+a alike, is never trained on.
"""

from __future__ import annotations

import random

from openm3.train.recipes.nano.case import Case, Talk, phrase

PLUS = ("What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a}+{b}=", "{a} + {b} = ?", "Add {a} and {b}.", "{a} plus {b}",
        "How much is {a} + {b}?", "Compute {a}+{b}.", "What is the sum of {a} and {b}?", "Calculate {a} + {b}.",
        "What do you get when you add {b} to {a}?", "How much is {a} plus {b}?")  # fmt: skip
MINUS = ("What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a}-{b}=", "{a} - {b} = ?", "Subtract {b} from {a}.",
         "{a} minus {b}", "How much is {a} - {b}?", "Compute {a}-{b}.", "Take {b} away from {a}.",
         "Calculate {a} - {b}.", "How much is {a} minus {b}?", "What is left of {a} after taking {b}?")  # fmt: skip


def held_out(a: int, op: str, b: int) -> bool:
    low, high = min(a, b), max(a, b)
    x = (low * 10_000 + high) * 2 + (op == "-")
    x = (x ^ (x >> 13)) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    return (x ^ (x >> 29)) % 10 == 0


def columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digit pairs from the right, as many as the longer number has."""
    n = max(len(str(a)), len(str(b)))
    return [(a // 10**i % 10, b // 10**i % 10) for i in range(n)]


def carries(a: int, op: str, b: int) -> int:
    """How many digit places carry (or borrow, the smaller number taken from the larger)."""
    if op == "-":
        a, b = max(a, b), min(a, b)
    count = carry = 0
    for x, y in columns(a, b):
        carry = int(x + y + carry > 9) if op == "+" else int(x - y - carry < 0)
        count += carry
    return count


def scratchpad(a: int, op: str, b: int) -> str:
    """The thinking of one problem, as in the module's head."""
    head = f"{a}{op}{b}"
    if op == "-" and a < b:
        a, b = b, a
        head += f"=-({a}-{b})"
    steps, so_far, carry = [], "", 0
    pairs = columns(a, b)
    for i, (x, y) in enumerate(pairs):
        if op == "+":
            value = x + y + carry
            step = f"{x}+{y}{'+1' if carry else ''}={value}"
            carry = value // 10
            so_far = (str(value) if i == len(pairs) - 1 else str(value % 10)) + so_far
        else:
            top = x + 10 if x - y - carry < 0 else x
            step = f"{top}-{y}{'-1' if carry else ''}={top - y - carry}"
            so_far = str(top - y - carry) + so_far
            carry = int(top != x)
        steps.append(f"{step}>{so_far}")
    return f"{head}: {' '.join(steps)}"


def number(rng: random.Random) -> int:
    """Half the time any number below 10,000, else one of one to four digits, each length alike."""
    if rng.random() < 0.5:
        return rng.randrange(10_000)
    digits = rng.randint(1, 4)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def problem(rng: random.Random, split: str, least: int = 0, most: int = 9, minus: float = 0.5) -> tuple[int, str, int]:
    """A problem of the split with between `least` and `most` carries; `minus`: the share of differences."""
    while True:
        op = "-" if rng.random() < minus else "+"
        if most:
            a, b = number(rng), number(rng)
        else:
            a, b = without_carries(rng, op)
        if held_out(a, op, b) == (split == "test") and least <= carries(a, op, b) <= most:
            return a, op, b


def without_carries(rng: random.Random, op: str) -> tuple[int, int]:
    """Two numbers whose places never carry, drawn place by place (they are rare among all)."""
    a, b, n = number(rng), 0, rng.randint(1, 4)
    for i in range(n):
        x = a // 10**i % 10
        b += rng.randint(0, 9 - x if op == "+" else x) * 10**i
    return (a, b) if rng.random() < 0.5 else (b, a)


def sample(rng: random.Random, split: str, thinking: str | None = None, least: int = 0, most: int = 9) -> Case:
    """One problem in the examination, one to four in training.

    Training draws a quarter of the problems without any carry. In adaptive thinking it practises the decision: a fifth
    of the problems has no carry, two fifths have one, and most of those with any are differences, whose borrows are
    missed more easily. In doubt it is to think."""
    thinking = thinking or rng.choice(("enabled", "adaptive", "adaptive", "adaptive", "disabled", "disabled"))
    talk = Talk(rng, "arithmetic", thinking)
    problems = []
    for _ in range(1 if split == "test" else rng.randint(1, 4)):
        low, high, minus = least, most, 0.5
        if split == "train" and thinking == "adaptive" and rng.random() < 0.8:
            low, high = rng.choice(((0, 0), (1, 1), (1, 1), (2, 2), (3, 9)))
            minus = 0.7 if low else 0.5
        elif split == "train" and thinking != "adaptive" and rng.random() < 0.25:
            low = high = 0
        a, op, b = problem(rng, split, low, high, minus)
        talk.ask(phrase(rng, PLUS if op == "+" else MINUS, a=a, b=b))
        result = str(a + b if op == "+" else a - b)
        talk.answer(result, thought=scratchpad(a, op, b), hard=carries(a, op, b) > 0)
        problems.append((a, op, b))
    return talk.case(problems=problems)
