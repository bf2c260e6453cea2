"""`benchmarks/sass_lint.py` on small texts of machine code: the correct ones, and operands that are overwritten."""

import importlib

import pytest

FORM = ("HMUL2.BF16_V2 R56, R5, R16.H0_H0 ;", "HMUL2.BF16_V2 R57, R4, R16.H1_H1 ;")
FIRST, SECOND = (
    "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR12], R24",
    "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR16], R24",
)
WAIT, WAIT_FOR_ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
BACK = "@P0 BRA `(.L_x_0) ;"


@pytest.fixture(scope="module")
def lint():
    return importlib.import_module("sass_lint").lint


def text(*lines):
    """As nvdisasm prints it; a line that ends with a colon is a label."""
    head, address = ["\t.section .text.kernel", ".text.kernel:"], 0
    for line in lines:
        head.append(line if line.endswith(":") else f"        /*{address:04x}*/                   {line}")
        address += 0 if line.endswith(":") else 16
    return "\n".join([*head, f"        /*{address:04x}*/                   EXIT ;", ""])


def found(lint, *lines):
    """The findings of a kernel: the instruction's line, the register."""
    sass = text(*lines)
    return [(sass.splitlines()[line - 1].split("*/")[1].strip(), register) for line, register, _ in lint(sass)]


def test_operands_that_are_formed_behind_the_wait_are_correct(lint):
    assert found(lint, ".L_x_0:", *FORM, f"{SECOND}, gsb0 ;", WAIT, BACK) == []
    assert found(lint, ".L_x_0:", f"{FIRST}, gsb0 ;", WAIT, *FORM, f"{SECOND}, gsb0 ;", WAIT, BACK) == []


def test_operands_of_a_turn_formed_before_the_wait_for_the_turn_before(lint):
    """What ptxas 13.0 makes of a loop that leaves its last product in flight."""
    loop = (f"{FIRST}, gsb0 ;", *FORM, WAIT, f"{SECOND}, gsb0 ;")
    assert found(lint, ".L_x_0:", *loop, BACK, WAIT) == [(FORM[0], "R56"), (FORM[1], "R57")]
    assert found(lint, *loop, WAIT) == []  # there is no turn before


def test_a_wait_leaves_the_newest_groups_in_flight(lint):
    last = (f"{SECOND}, gsb0 ;", f"{FIRST}, gsb0 ;", WAIT_FOR_ALL_BUT_ONE)
    assert found(lint, *last, *FORM) == []
    assert found(lint, *last, "IADD3 R63, R1, R2, RZ ;") == [("IADD3 R63, R1, R2, RZ ;", "R63")]


def test_products_of_one_group_are_in_flight_together(lint):
    assert found(lint, f"{SECOND} ;", FORM[1], f"{FIRST}, gsb0 ;", WAIT) == [(FORM[1], "R57")]


@pytest.mark.parametrize("branch", ["@P0 BRA", "@!P1 BRA", "BRA.U UP0,", "BRA.U !UP0,", "BRA !P1,", "BRA.DIV UR4,"])
def test_a_conditional_branch_may_go_on(lint, branch):
    lines = (f"{FIRST}, gsb0 ;", f"{branch} `(.L_x_1) ;", "MOV R60, R1 ;", ".L_x_1:", WAIT)
    assert found(lint, *lines) == [("MOV R60, R1 ;", "R60")]
    assert found(lint, lines[0], "BRA `(.L_x_1) ;", *lines[2:]) == []


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("LDG.E.128 R60, desc[UR24][R2.64] ;", ["R60", "R61", "R62", "R63"]),
        ("LDSM.16.M88.4 R62, [R7+UR20] ;", ["R62", "R63"]),
        ("IMAD.WIDE.U32 R62, R81, 0x2, R12 ;", ["R62", "R63"]),
        ("SHFL.IDX PT, R61, R64, R77, 0x1f ;", ["R61"]),
        ("LOP3.LUT P1, R60, R3, 0x7, RZ, 0xc0, !PT ;", ["R60"]),
        ("HGMMA.64x64x16.F32.BF16 R32, gdesc[UR4], gdesc[UR8], R32, gsb0 ;", ["R60", "R61", "R62", "R63"]),
        ("ISETP.NE.U32.AND P0, PT, R60, RZ, PT ;", []),  # these read
        ("STS.128 [R60+UR20], R12 ;", []),
        ("LDGSTS.E.BYPASS.128 [R60], desc[UR24][R62.64] ;", []),
        ("R2UR UR4, R60 ;", []),
    ],
)
def test_registers_that_an_instruction_writes(lint, line, registers):
    assert found(lint, f"{FIRST}, gsb0 ;", line, WAIT) == [(line, register) for register in registers]


def test_a_text_without_a_function_is_refused(lint):
    with pytest.raises(ValueError, match="expected a text of nvdisasm"):
        lint("nothing")
