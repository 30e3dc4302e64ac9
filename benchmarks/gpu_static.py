"""What the compiled CUDA kernels need, read from their machine code, against a committed budget. No GPU is needed.

    python -m benchmarks.gpu_static            # the table
    python -m benchmarks.gpu_static --check    # exit 1 where a kernel exceeds benchmarks/gpu_budget.json
    python -m benchmarks.gpu_static --update   # write what was measured as the new budget

The machine code is that of the installed extension; `cuobjdump` comes with the triton package.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

BUDGET = Path(__file__).parent / "gpu_budget.json"
SPILLS = ("STL", "LDL")  # stores to and loads from local memory
LOOP_FMAS = 16  # loops with fewer multiply-adds are not where the time goes


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture.

    Attributes:
        registers: a thread.
        stack: bytes of local memory a thread, spills included.
        spills: instructions that move registers to or from local memory.
        instructions: of the loops over K, an element and iteration; what comes before and after them is not in it.
        special: of these, on the unit for exponentials and logarithms.
    """

    registers: int
    stack: int
    spills: int
    instructions: float
    special: float


def tool(name: str) -> str:
    """Path of a CUDA binary tool in the triton package."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} was not found. Install the project's dev extra: pip install -e '.[dev]'")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def extension() -> Path:
    """The installed extension."""
    spec = importlib.util.find_spec("pisces_kernels._C")
    if spec is None or spec.origin is None:
        raise SystemExit("pisces_kernels._C is not built. Build it: pip install -e .")
    return Path(spec.origin)


def dump(*options: str, file: Path) -> str:
    """Output of cuobjdump with readable names."""
    text = subprocess.run([tool("cuobjdump"), *options, str(file)], capture_output=True, text=True, check=True).stdout
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short(name: str) -> str:
    """sinkhorn_kernel<40> of a full signature."""
    found = re.search(r"(\w+(?:<[^>]*>)?)\(", name.replace("(anonymous namespace)::", ""))
    return found[1].replace("(int)", "") if found else name


def loops(code: list[tuple[int, str, str]]) -> list[Counter[str]]:
    """Innermost loops, each as a count of its instructions by name."""
    spans = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) <= address:
            spans.append((int(target[1], 16), address))
    inner = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    return [
        Counter(name.split(".")[0] for address, name, _ in code if first <= address <= last) for first, last in inner
    ]


def per_element(kernel: str, found: list[Counter[str]]) -> tuple[float, float]:
    """Instructions and special ones an element of K and iteration.

    A kernel for up to R rows has one loop over columns, whose R elements take two multiply-adds each. The others go
    over K twice, in two loops with one multiply-add an element.
    """
    hot = [loop for loop in found if loop["FFMA"] >= LOOP_FMAS]
    rows = int(kernel.partition("<")[2].rstrip(">"))
    if rows > 0:
        hot = [max(hot, key=lambda loop: loop["FFMA"])]
        return hot[0].total() / rows, hot[0]["MUFU"] / rows
    return sum(loop.total() / loop["FFMA"] for loop in hot), sum(loop["MUFU"] / loop["FFMA"] for loop in hot)


def measure(file: Path) -> dict[str, dict[str, Usage]]:
    """Usage by kernel and architecture ("90") of all kernels in an object file or extension."""
    resources: dict[tuple[str, str], tuple[int, int]] = {}
    arch = ""
    lines = dump("-res-usage", file=file).splitlines()
    for index, line in enumerate(lines):
        arch = (re.search(r"arch = sm_(\d+)", line) or [None, arch])[1]
        name = re.match(r"\s*Function (.*):$", line)
        if name:
            numbers = dict(re.findall(r"(REG|STACK):(\d+)", lines[index + 1]))
            resources[arch, short(name[1])] = int(numbers["REG"]), int(numbers["STACK"])
    result: dict[str, dict[str, Usage]] = {}
    for section in re.split(r"\n[ \t]*code for sm_", dump("-sass", file=file))[1:]:
        arch = section.split()[0]
        for text in re.split(r"\n\s*Function : ", section)[1:]:
            kernel = short(text.partition("\n")[0])
            pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);"
            code = [(int(a, 16), name, rest) for a, name, rest in re.findall(pattern, text)]
            registers, stack = resources[arch, kernel]
            instructions, special = per_element(kernel, loops(code))
            spills = sum(name.startswith(SPILLS) for _, name, _ in code)
            usage = Usage(registers, stack, spills, round(instructions, 2), round(special, 3))
            result.setdefault(kernel, {})[arch] = usage
    return result


def violations(measured: dict[str, dict[str, Usage]], budget: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What exceeds the budget, or is missing on either side, in words."""
    found = []
    for kernel in sorted(measured.keys() | budget.keys()):
        for arch in sorted(measured.get(kernel, {}).keys() | budget.get(kernel, {}).keys()):
            where = f"{kernel} on sm_{arch}"
            if kernel not in budget or arch not in budget[kernel]:
                found.append(f"{where}: not in the budget")
            elif kernel not in measured or arch not in measured[kernel]:
                found.append(f"{where}: in the budget, but not compiled")
            else:
                for name, limit in budget[kernel][arch].items():
                    value = getattr(measured[kernel][arch], name)
                    if value > limit:
                        found.append(f"{where}: {name} {value} > {limit}")
    return found


def table(measured: dict[str, dict[str, Usage]]) -> str:
    """Markdown."""
    lines = [
        "| kernel | sm | registers | stack | spills | instructions an element | of these exp, log |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel, archs in sorted(measured.items()):
        for arch, use in archs.items():
            row = (kernel, arch, use.registers, use.stack, use.spills, use.instructions, use.special)
            lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="object file or extension to read (default: the installed extension)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="exit 1 where a kernel exceeds the budget")
    choice.add_argument("--update", action="store_true", help="write the budget")
    arguments = parser.parse_args()
    measured = measure(arguments.file or extension())
    print(table(measured))
    if arguments.update:
        plain = {kernel: {arch: asdict(use) for arch, use in archs.items()} for kernel, archs in measured.items()}
        BUDGET.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    if arguments.check:
        found = violations(measured, json.loads(BUDGET.read_text()))
        print("\n".join(found) or "within the budget")
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
