"""Verifiable problems with worked solutions: the text zaya-nano learns and is judged by.

The solution is a function of the prompt, written in lines of fixed width: each line repeats the last one's state with
one item crossed out ("."), names the item, and updates the result so far. So every next line is a copy plus one small
fact, which a model of a few million parameters can learn, and which a draft of many bytes can get right. The last line
is "= answer". `check` computes that answer from the prompt again, by other means than the worked steps.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hardware.files import UserError, known

SPLITS = ("train", "test")
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"
NAMES = ("Ann", "Bob", "Cal", "Dan", "Eva", "Fay", "Gus", "Ida", "Joe", "Kim", "Leo", "Mia")
THINGS = ("apples", "grapes", "lemons", "melons", "olives", "shells", "stamps", "stones")
GAINS = ("buys", "gets", "wins")
LOSSES = ("pays", "uses")


@dataclass(frozen=True)
class Problem:
    """One problem. Prompt + solution is the document; the solution ends where EOS follows."""

    family: str
    prompt: str
    solution: str


@dataclass(frozen=True)
class _Family:
    """How to draw a prompt, to work it out line by line, and to know its answer without working it out."""

    prompt: Callable[[random.Random], str]
    work: Callable[[str], list[str]]
    answer: Callable[[str], str]


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(VOWELS if i % 2 else CONSONANTS) for i in range(5))


def _numbers(prompt: str, sign: str) -> tuple[str, str]:
    left, right = prompt.split()[1].split(sign)
    return left, right


def _cross_left(text: str, count: int) -> str:
    return "." * count + text[count:]


def _cross_right(text: str, count: int) -> str:
    return text[: len(text) - count] + "." * count


def _add_prompt(rng: random.Random) -> str:
    return f"add {rng.randrange(1000):03d}+{rng.randrange(1000):03d}\n"


def _add_work(prompt: str) -> list[str]:
    a, b = _numbers(prompt, "+")
    carry, result, lines = 0, "", []
    for done in range(1, 4):
        total = int(a[-done]) + int(b[-done]) + carry
        result = f"{total % 10}{result}"
        state = f"{_cross_right(a, done)}+{_cross_right(b, done)}"
        lines.append(f"{state} {a[-done]}+{b[-done]}+{carry}={total:02d} carry {total // 10} now {result:.>4}")
        carry = total // 10
    return [*lines, f"= {carry}{result}"]


def _add_answer(prompt: str) -> str:
    a, b = _numbers(prompt, "+")
    return f"{int(a) + int(b):04d}"


def _subtract_prompt(rng: random.Random) -> str:
    low, high = sorted((rng.randrange(1000), rng.randrange(1000)))
    return f"sub {high:03d}-{low:03d}\n"


def _subtract_work(prompt: str) -> list[str]:
    a, b = _numbers(prompt, "-")
    taken, result, lines = 0, "", []
    for done in range(1, 4):
        borrow = int(int(a[-done]) < int(b[-done]) + taken)
        digit = 10 * borrow + int(a[-done]) - int(b[-done]) - taken
        result = f"{digit}{result}"
        state = f"{_cross_right(a, done)}-{_cross_right(b, done)}"
        lines.append(f"{state} {borrow}{a[-done]}-{b[-done]}-{taken}={digit} borrow {borrow} now {result:.>3}")
        taken = borrow
    return [*lines, f"= {result}"]


def _subtract_answer(prompt: str) -> str:
    a, b = _numbers(prompt, "-")
    return f"{int(a) - int(b):03d}"


def _multiply_prompt(rng: random.Random) -> str:
    return f"mul {rng.randrange(1000):03d}*{rng.randrange(2, 10)}\n"


def _multiply_work(prompt: str) -> list[str]:
    a, b = _numbers(prompt, "*")
    carry, result, lines = 0, "", []
    for done in range(1, 4):
        product = int(a[-done]) * int(b)
        total = product + carry
        result = f"{total % 10}{result}"
        sums = f"{a[-done]}*{b}={product:02d} {product:02d}+{carry}={total:02d}"
        lines.append(f"{_cross_right(a, done)}*{b} {sums} carry {total // 10} now {result:.>4}")
        carry = total // 10
    return [*lines, f"= {carry}{result}"]


def _multiply_answer(prompt: str) -> str:
    a, b = _numbers(prompt, "*")
    return f"{int(a) * int(b):04d}"


def _sort_prompt(rng: random.Random) -> str:
    return f"sort {''.join(rng.sample('0123456789', 5))}\n"


def _sort_work(prompt: str) -> list[str]:
    state, result, lines = prompt.split()[1], "", []
    for _ in range(5):
        least = min(state.replace(".", ""))
        state = state.replace(least, ".")
        result += least
        lines.append(f"{state} take {least} now {result:.<5}")
    return [*lines, f"= {result}"]


def _sort_answer(prompt: str) -> str:
    return "".join(sorted(prompt.split()[1]))


def _reverse_prompt(rng: random.Random) -> str:
    return f"reverse {_word(rng)}\n"


def _reverse_work(prompt: str) -> list[str]:
    word, result, lines = prompt.split()[1], "", []
    for done in range(1, 6):
        result += word[-done]
        lines.append(f"{_cross_right(word, done)} take {word[-done]} now {result:.<5}")
    return [*lines, f"= {result}"]


def _reverse_answer(prompt: str) -> str:
    return prompt.split()[1][::-1]


def _upper_prompt(rng: random.Random) -> str:
    return f"upper {_word(rng)}\n"


def _upper_work(prompt: str) -> list[str]:
    word, result, lines = prompt.split()[1], "", []
    for done in range(1, 6):
        result += chr(ord(word[done - 1]) - 32)
        lines.append(f"{_cross_left(word, done)} take {word[done - 1]} now {result:.<5}")
    return [*lines, f"= {result}"]


def _upper_answer(prompt: str) -> str:
    return prompt.split()[1].upper()


def _count_prompt(rng: random.Random) -> str:
    wanted = rng.choice(CONSONANTS + VOWELS)
    word = "".join(wanted if rng.random() < 0.4 else rng.choice(CONSONANTS + VOWELS) for _ in range(5))
    return f"count {wanted} in {word}\n"


def _count_work(prompt: str) -> list[str]:
    _, wanted, _, word = prompt.split()
    count, lines = 0, []
    for done in range(1, 6):
        hit = word[done - 1] == wanted
        count += hit
        lines.append(f"{_cross_left(word, done)} take {word[done - 1]} {'yes' if hit else 'not'} {wanted} now {count}")
    return [*lines, f"= {count}"]


def _count_answer(prompt: str) -> str:
    _, wanted, _, word = prompt.split()
    return str(word.count(wanted))


def _binary_prompt(rng: random.Random) -> str:
    return f"binary {rng.randrange(16**4):04x}\n"


def _binary_work(prompt: str) -> list[str]:
    digits, groups, lines = prompt.split()[1], [], []
    for done in range(1, 5):
        value, bits = int(digits[done - 1], 16), ""
        for weight in (8, 4, 2, 1):
            bits += "1" if value >= weight else "0"
            value -= weight * (value >= weight)
        groups.append(bits)
        lines.append(f"{_cross_left(digits, done)} take {digits[done - 1]} bits {bits}")
    return [*lines, f"= {' '.join(groups)}"]


def _binary_answer(prompt: str) -> str:
    bits = f"{int(prompt.split()[1], 16):016b}"
    return " ".join(bits[i : i + 4] for i in range(0, 16, 4))


def _story_prompt(rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    acts = ", ".join(f"{rng.choice(rng.choice((GAINS, LOSSES)))} {rng.randrange(1, 10)}" for _ in range(3))
    return f"{name} has {rng.randrange(37, 73)} {thing}, {acts}. How many?\n"


def _story_work(prompt: str) -> list[str]:
    start, *acts = prompt.split(".")[0].split(", ")
    name, _, total, thing = start.split()
    lines = []
    for act in acts:
        verb, amount = act.split()
        sign = "+" if verb in GAINS else "-"
        left = int(total) + int(f"{sign}{amount}")
        lines.append(f"{name} {verb} {amount}: {total} {sign} {amount} = {left} {thing}")
        total = str(left)
    return [*lines, f"= {total} {thing}"]


def _story_answer(prompt: str) -> str:
    words = prompt.replace(",", "").replace(".", "").split()
    change = sum(int(words[i + 1]) * (1 if words[i] in GAINS else -1) for i in (4, 6, 8))
    return f"{int(words[2]) + change} {words[3]}"


def _json_prompt(rng: random.Random) -> str:
    keys: list[str] = []
    while len(keys) < 4:
        key = rng.choice(CONSONANTS) + rng.choice(VOWELS)
        if key not in keys:
            keys.append(key)
    *present, fresh = keys
    pairs = ",".join(f'"{key}":{rng.randrange(10, 90)}' for key in present)
    target = rng.choice(present)
    change = f"raise {target} by {rng.randrange(1, 10)}" if rng.random() < 0.5 else f"name {target} as {fresh}"
    return f"{{{pairs}}} {change}\n"


def _json_work(prompt: str) -> list[str]:
    document, verb, target, _, operand = prompt.split()
    pairs, lines = [], []
    for pair in document[1:-1].split(","):
        key, value = pair[1:3], pair[5:]
        changed = pair
        if key == target:
            changed = f'"{key}":{int(value) + int(operand)}' if verb == "raise" else f'"{operand}":{value}'
        lines.append(f"{pair} {'keep' if key != target else 'turn'} {changed}")
        pairs.append(changed)
    return [*lines, f"= {{{','.join(pairs)}}}"]


def _json_answer(prompt: str) -> str:
    document, verb, target, _, operand = prompt.split()
    data = json.loads(document)
    if verb == "raise":
        data[target] += int(operand)
    else:
        data = {operand if key == target else key: value for key, value in data.items()}
    return json.dumps(data, separators=(",", ":"))


_FAMILIES = {
    "addition": _Family(_add_prompt, _add_work, _add_answer),
    "subtraction": _Family(_subtract_prompt, _subtract_work, _subtract_answer),
    "multiplication": _Family(_multiply_prompt, _multiply_work, _multiply_answer),
    "sorting": _Family(_sort_prompt, _sort_work, _sort_answer),
    "reversing": _Family(_reverse_prompt, _reverse_work, _reverse_answer),
    "uppercase": _Family(_upper_prompt, _upper_work, _upper_answer),
    "counting": _Family(_count_prompt, _count_work, _count_answer),
    "binary": _Family(_binary_prompt, _binary_work, _binary_answer),
    "story": _Family(_story_prompt, _story_work, _story_answer),
    "json": _Family(_json_prompt, _json_work, _json_answer),
}


def _fresh(family: str, rng: random.Random) -> Problem:
    prompt = _FAMILIES[family].prompt(rng)
    return Problem(family, prompt, "\n".join(_FAMILIES[family].work(prompt)))


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {name: partial(_fresh, name) for name in _FAMILIES}


def split_of(prompt: str) -> str:
    """The split a prompt belongs to, by its hash: one in ten is held out and never trained on."""
    return "test" if zlib.crc32(prompt.encode()) % 10 == 0 else "train"


def draw(family: str, rng: random.Random, split: str = "train") -> Problem:
    """The next problem of a family and split from `rng`. Raises UserError for an unknown family or split."""
    if family not in FAMILIES:
        raise known("task family", family, FAMILIES)
    if split not in SPLITS:
        raise known("split", split, SPLITS)
    while True:
        problem = FAMILIES[family](rng)
        if split_of(problem.prompt) == split:
            return problem


def generate(family: str, seed: int, split: str = "train") -> Problem:
    """The problem of a family, split and seed: the same one on every machine."""
    return draw(family, random.Random(f"{family}/{split}/{seed}"), split)


def answer(problem: Problem) -> str:
    """The right answer, computed from the prompt alone (not from the worked solution)."""
    if problem.family not in _FAMILIES:
        raise known("task family", problem.family, _FAMILIES)
    try:
        return _FAMILIES[problem.family].answer(problem.prompt)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{problem.prompt!r} is no prompt of task family {problem.family}") from error


def check(problem: Problem, output: str) -> bool:
    """Whether `output` (the text generated after the prompt, up to EOS) ends with a line "= " and the right answer."""
    lines = output.rstrip("\n").split("\n")
    return lines[-1] == f"= {answer(problem)}"
