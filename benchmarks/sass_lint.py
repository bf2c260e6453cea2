"""Finds registers that machine code overwrites while an asynchronous matrix product reads them.

`compile_kernels.py` and `compile_triton.py` run it beside `ptx_lint.py`, which sees no more than virtual registers. The
ptxas of CUDA 12.8 and 13.0 takes a product's left operand for read once the product is issued, gives its registers to
the next product's, and computes these before the wait that stands between the two: results differ from run to run. That
of CUDA 13.5 does not. So what is compiled to be used with any of them must be checked with an old one.
"""

import re

from ptx_lint import COMMIT, PRODUCT, WAIT, Finding, Instruction, findings_of

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*)")
LABEL, TARGET = re.compile(r"^\s*\.(L_\w+):"), re.compile(r"`\(\.(L_\w+)\)")
RESULT = re.compile(r"(?:U?P(?:T|\d+), )*R(\d+)\b")
HGMMA = re.compile(r"R(\d+), (?:R(\d+)|gdesc\[UR\d+\])")
NO_RESULT = re.compile(r"ST|RED|LDGSTS|LDGDEPBAR|BAR|MEMBAR|FENCE|WARP|PLOP|R2P|SYNCS|UTMA|U[A-Z]|\w+SETP")
LEFT = 4  # registers of a left operand
WIDTHS = ((re.compile(r"\.128|\.M88\.4|\.MT88\.4"), 4), (re.compile(r"\.64|\.WIDE|\.M88\.2|\.MT88\.2"), 2))


def numbers(first: str, count: int) -> frozenset[str]:
    return frozenset(f"R{int(first) + i}" for i in range(count))


def accumulators_of(opcode: str) -> int:
    """Registers of a thread for the sums of a product, HGMMA.<rows>x<columns>x<depth>.<type of the sums>."""
    rows, columns, _ = map(int, re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode).groups())
    return rows * columns // 128 // (1 if ".F32" in opcode else 2)


def decode(line: int, opcode: str, operands: str, guarded: bool) -> list[Instruction]:
    """An instruction in the terms of `ptx_lint`: a product may be the last of its group."""

    def one(name, written=frozenset(), **registers):
        return Instruction(line, name, operands, guarded, written, frozenset(), **registers)

    if opcode.startswith("HGMMA"):
        sums, left = HGMMA.match(operands).groups()
        left = numbers(left, LEFT) if left else frozenset()
        product = one(PRODUCT, accumulators=numbers(sums, accumulators_of(opcode)), left=left)
        return [product, one(COMMIT)] if "gsb0" in operands else [product]
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return [one(WAIT)._replace(operands=str(int(operands.split(", ")[1], 16)))]
    if opcode.startswith(("BRA", "BRX")):
        conditional = guarded or ".DIV" in opcode or bool(re.match(r"!?U?P\d", operands))
        return [one("bra")._replace(operands=" ".join(f"${x}" for x in TARGET.findall(operands)), guarded=conditional)]
    if opcode.startswith(("EXIT", "RET")):
        return [one("exit")]
    result = None if NO_RESULT.match(opcode) else RESULT.match(operands)
    if result is None:
        return [one(opcode)]
    width = next((width for pattern, width in WIDTHS if pattern.search(opcode)), 1)
    return [one(opcode, numbers(result[1], width))]


def lint(sass: str) -> list[Finding]:
    """Every left operand that is overwritten too early, in a text of nvdisasm; nothing for correct code.

    Raises:
      ValueError: no instruction was found.
    """
    instructions, entries, labels = [], [], {}
    for number, text in enumerate(sass.splitlines(), 1):
        if label := LABEL.match(text):
            labels[f"${label[1]}"] = len(instructions)
        elif match := LINE.search(text):
            if int(match[1], 16) == 0:
                entries.append(len(instructions))
            operands = " ".join(match["operands"].split())
            instructions += decode(number, match["opcode"], operands, bool(match["guard"]))
    if not entries:
        raise ValueError(f"expected a text of nvdisasm with a function, got {sass[:40]!r}...")
    return findings_of(instructions, entries, labels)
