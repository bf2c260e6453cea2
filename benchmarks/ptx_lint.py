"""Finds registers of asynchronous matrix products that a PTX text touches too early; `compile_kernels.py` runs it.

`wgmma.mma_async` returns at once. Until its group has been awaited, its left operand may not be overwritten where that
lies in registers, and its accumulators may be used by nothing but further products. ptxas answers some early uses with
slow code (C7514) and says nothing of the others, such as a left operand that the next turn of a rolled loop overwrites.

The groups that may be in flight are carried along the control flow until nothing changes. Where paths meet, groups are
united one by one from the newest on, which is how `wait_group n` counts (it leaves the newest n). So the second turn of
a loop is walked with what the first one left in flight.

Values are not followed: writing what a register holds already is an error too, and a wait that is always taken when the
product was, but by a branch of its own, does not count. Operands in shared memory are not looked at.
"""

import itertools
import re
from typing import NamedTuple

NOISE = re.compile(r"//.*|^[ \t]*\.(?!visible|weak|entry|func|branchtargets).*", re.MULTILINE)
STATEMENT = re.compile(
    r"""(?P<function>(?:\.\w+\s+)*\.(?:entry|func)\b[^{;]*[{;])
    | (?<![\w$%.]) (?P<label>[\w$]+):(?!:)
    | (?P<guard>@!?[\w%]+\s+)? (?<![\w$%.]) (?P<opcode>\.?[a-z][\w.:]*) (?P<operands>[^;]*);""",
    re.VERBOSE,
)
REGISTER, VECTOR, LABEL = re.compile(r"%[a-z]+\d+"), re.compile(r"\s*\{[^{}]*\}"), re.compile(r"\$\w+")
PRODUCT, COMMIT, WAIT = "wgmma.mma_async", "wgmma.commit_group", "wgmma.wait_group"


class Finding(NamedTuple):
    """A register that is touched while a product in flight needs it. line: of the PTX text, from 1."""

    line: int
    register: str
    message: str


class Instruction(NamedTuple):
    """An instruction, and the registers that it writes and uses at once. A product's accumulators are apart."""

    line: int
    opcode: str
    operands: str
    guarded: bool
    written: frozenset[str]
    used: frozenset[str]
    accumulators: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()


# The products that may be in flight, by their index: those of the group that is not committed yet, then the committed
# groups, newest first. Groups that no wait leaves in flight are one.
State = tuple[frozenset[int], ...]


def registers(text: str) -> frozenset[str]:
    return frozenset(REGISTER.findall(text))


def decode(line: int, opcode: str, operands: str, guarded: bool) -> Instruction:
    """One instruction. The first operand is taken for the result, unless it is an address."""
    if opcode.startswith(PRODUCT):
        accumulators, *left = map(registers, VECTOR.findall(operands))
        left = frozenset().union(*left)
        return Instruction(line, opcode, operands, guarded, frozenset(), left, accumulators, left)
    result = VECTOR.match(operands) or re.match(r"[^,\[]*", operands)
    return Instruction(line, opcode, operands, guarded, registers(result[0]), registers(operands))


def parse(ptx: str) -> tuple[list[Instruction], list[int], dict[str, int]]:
    """The instructions of a PTX text, where its functions begin, and where its labels stand."""
    text, line, end = NOISE.sub("", ptx), 1, 0
    instructions, entries, labels, tables, label = [], [], {}, {}, ""
    for match in STATEMENT.finditer(text):
        if match["function"]:
            entries.append(len(instructions))
        elif match["label"]:
            label = match["label"]
            labels[label] = len(instructions)
        elif match["opcode"] == ".branchtargets":
            tables[label] = match["operands"]
        else:
            line, end = line + text.count("\n", end, match.start("opcode")), match.start("opcode")
            indirect = match["opcode"].startswith("brx")
            operands = tables[match["operands"].split()[-1]] if indirect else match["operands"]
            instructions.append(decode(line, match["opcode"], operands, bool(match["guard"])))
    if not entries or not instructions:
        raise ValueError(f"expected the PTX text of a module with a function, got {ptx[:40]!r}...")
    return instructions, entries, labels


def successors(at: int, instruction: Instruction, labels: dict[str, int]) -> list[int]:
    """Where control goes next. The spin loops of inline assembly, whose labels have no $, are walked through once."""
    branches = instruction.opcode.startswith(("bra", "brx"))
    targets = [labels[name] for name in LABEL.findall(instruction.operands)] if branches else []
    ends = targets or instruction.opcode in ("ret", "exit", "trap")
    return targets if ends and not instruction.guarded else [*targets, at + 1]


def after(at: int, instruction: Instruction, state: State, depth: int) -> State:
    """What may be in flight behind an instruction, in at most `depth` groups."""
    if instruction.opcode.startswith(PRODUCT):
        return (state[0] | {at}, *state[1:])
    if instruction.opcode.startswith(COMMIT):
        groups = (frozenset(), *state)
        return (*groups[: depth - 1], frozenset().union(*groups[depth - 1 :]))
    if instruction.opcode.startswith(WAIT):
        return state[: 1 + int(instruction.operands)]
    return state


def check(instructions: list[Instruction], at: int, state: State) -> list[Finding]:
    """What an instruction touches that a product in flight needs; each register once."""
    found, instruction = {}, instructions[at]
    for product in sorted(frozenset().union(*state)):
        owner = instructions[product]
        for register in owner.left & (instruction.written | instruction.accumulators):
            found[register] = f"overwritten, a left operand of the wgmma of line {owner.line}, which may be in flight"
        for register in owner.accumulators & instruction.used:
            found[register] = f"used, an accumulator of the wgmma of line {owner.line}, which may be in flight"
    return [Finding(instruction.line, *item) for item in found.items()]


def lint(ptx: str) -> list[Finding]:
    """Every use of a register that comes too early, in the order of lines; nothing for a correct text."""
    return findings_of(*parse(ptx))


def findings_of(instructions: list[Instruction], entries: list[int], labels: dict[str, int]) -> list[Finding]:
    """The same of what `parse` gives."""
    depth = 2 + max((int(i.operands) for i in instructions if i.opcode.startswith(WAIT)), default=0)
    before: dict[int, State] = {entry: (frozenset(),) for entry in entries}
    pending = list(entries)
    while pending:
        at = pending.pop()
        state = after(at, instructions[at], before[at], depth)
        for successor in successors(at, instructions[at], labels):
            pairs = itertools.zip_longest(before.get(successor, ()), state, fillvalue=frozenset())
            merged = tuple(one | other for one, other in pairs)
            if merged != before.get(successor):
                before[successor] = merged
                pending.append(successor)
    findings = [finding for at, state in before.items() for finding in check(instructions, at, state)]
    for at, instruction in enumerate(instructions):
        if instruction.opcode.startswith(PRODUCT) and at not in before:
            findings.append(Finding(instruction.line, "", "a wgmma that no path reaches, so that it was not checked"))
    return sorted(findings)
