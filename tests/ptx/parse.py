"""PTX text as instructions."""

import re
from dataclasses import dataclass

Operand = str | tuple[str, ...]
"""A register, number, label or address (in brackets); or several of them, which were in braces."""


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;`"""

    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None
    """A predicate; with `!` before it: its opposite."""
    where: str
    """The line of the kernel's source that it is of."""

    @property
    def name(self) -> str:
        """What the opcode begins with."""
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The rest of the opcode."""
        return tuple(self.opcode.replace("::", ".").split(".")[1:])

    @property
    def stores(self) -> bool:
        """Whether its first operand is no register that it writes to."""
        return self.name in ("st", "red", "cp", "stmatrix")


@dataclass(frozen=True)
class Program:
    """One kernel."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """By name the instruction that follows."""
    registers: dict[str, tuple[str, int]]
    """By prefix the type and how many."""
    parameters: tuple[str, ...]
    threads: int


_PARAMETER = re.compile(r"\.param .*?(\w+),?$")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>;")
_LOCAL = re.compile(r"\.reg \.pred\s+(\w+);")
_LOCAL_LABEL = re.compile(r"([a-z]\w*):$")
_SOURCE = re.compile(r"\.loc.*//\s*(\S+?):(\d+):\d+")
_INSTRUCTION = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*);$")
_REGISTER = re.compile(r"%\w+")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def parse(text: str) -> Program:
    """The only kernel of a text. ValueError for what is none."""
    instructions: list[Instruction] = []
    labels, registers, parameters, threads, where, depth = {}, {}, [], 0, "", 0
    # The block in braces, which may have labels and a predicate of its own.
    block, predicate = 0, ""
    for line in (line.strip() for line in text.splitlines()):
        if match := _SOURCE.match(line):
            where = f"{match[1]}:{match[2]}"
        line = line.split("//")[0].strip()
        if match := _REGISTERS.match(line):
            registers[match[2]] = match[1], int(match[3])
        elif match := _PARAMETER.match(line):
            parameters.append(match[1])
        elif line.startswith(".reqntid"):
            threads = int(line.split()[1])
        elif line.startswith("$"):
            labels[line.rstrip(":")] = len(instructions)
        elif line in ("{", "}"):
            depth, block, predicate = depth + (1 if line == "{" else -1), block + 1, ""
            if depth == 0:
                break
        elif match := _LOCAL.match(line):
            registers["%local"], predicate = ("pred", 1), match[1]
        elif match := _LOCAL_LABEL.match(line):
            labels[f"{match[1]} of block {block}"] = len(instructions)
        elif depth and line and not line.startswith("."):
            line = re.sub(rf"\b{predicate}\b", "%local0", line) if predicate else line
            instructions.append(_instruction(line, where, block))
    return Program(tuple(instructions), labels, registers, tuple(parameters), threads)


def _instruction(line: str, where: str, block: int) -> Instruction:
    match = _INSTRUCTION.match(line)
    if match is None:
        raise ValueError(f"no instruction: {line}")
    guard, opcode, operands = match.groups()
    if opcode.startswith("bra") and not operands.startswith("$"):
        return Instruction(opcode, (f"{operands} of block {block}",), guard, where)
    return Instruction(opcode, tuple(map(_operand, _OPERAND.findall(operands))), guard, where)


def _operand(text: str) -> Operand:
    return tuple(part.strip() for part in text[1:-1].split(",")) if text.startswith("{") else text


def each_of(operand: Operand) -> tuple[str, ...]:
    """What was in braces, or the only one."""
    return operand if isinstance(operand, tuple) else (operand,)


def registers_of(operand: Operand) -> set[str]:
    """All that it names."""
    return set(_REGISTER.findall(" ".join(each_of(operand))))
