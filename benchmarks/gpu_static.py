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
import os
import re
import subprocess
import sys
import tempfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

BUDGET = Path(__file__).parent / "gpu_budget.json"
SPILLS = ("STL", "LDL")  # stores to and loads from local memory
SOLVERS = ("sinkhorn_kernel", "attention_kernel")
PAIRS, FEATURES = 64, 64  # of a thread and tile of two point clouds; features that are counted for
# By pk::Precision: features of a chunk, steps of the innermost loop a chunk, loops inside of each other.
CHUNKS = {"0": (16, 2, 3), "1": (32, 1, 2), "2": (64, 1, 2)}
LOOP_FMAS = 16  # loops with fewer multiply-adds are not where the time goes


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture.

    Attributes:
        registers: a thread.
        stack: bytes of local memory a thread, spills included.
        spills: instructions that move registers to or from local memory.
        instructions: of the loops over K, an element and iteration; what comes before and after them is not in it.
            0 for kernels that have no such loop.
        special: of these, on the unit for exponentials and logarithms.
        shared: bytes of static shared memory.
        blocks: blocks a multiprocessor, as registers and threads permit; at least so many. sm_90 only.
        conflicts: accesses to shared memory with bank conflicts, of those whose addresses can be followed. sm_90 only.
    """

    registers: int
    stack: int
    spills: int
    instructions: float
    special: float
    shared: int
    blocks: int | None = None
    conflicts: int | None = None


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
    found = re.search(r"(\w+(?:<[^>]*>)?)\(", re.sub(r"\w+::|\(anonymous namespace\)::", "", name))
    return found[1].replace("(int)", "") if found else name


def spans(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Loops: from the target of a branch backwards to the branch."""
    found = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) <= address:
            found.append((int(target[1], 16), address))
    return found


def innermost(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The loops that have no other one inside."""
    return [
        span
        for span in found
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in found)
    ]


def counted(code: list[tuple[int, str, str]]) -> Callable[[tuple[int, int]], Counter[str]]:
    """A function that counts the instructions of a span of addresses by name."""
    addresses, names = [address for address, _, _ in code], [name.split(".")[0] for _, name, _ in code]
    return lambda span: Counter(names[bisect_left(addresses, span[0]) : bisect_right(addresses, span[1])])


def per_element(kernel: str, code: list[tuple[int, str, str]]) -> tuple[float, float]:
    """Instructions and special ones an element of K and iteration; of the matrix product, a multiply-add.

    A solver for up to R rows has one loop over columns, whose R elements take two multiply-adds each. The others go
    over K twice, in the two loops that consist most of multiply-adds: one an element. Other kernels are not counted.
    """
    name, _, rows = kernel.rstrip(">").partition("<")
    if name == "points_kernel":
        return per_pair(kernel, code)
    hot = [loop for loop in map(counted(code), innermost(spans(code))) if loop["FFMA"] >= LOOP_FMAS]
    if name in SOLVERS and int(rows) <= 0:
        hot = sorted(hot, key=lambda loop: loop.total() / loop["FFMA"])[:2]
    elif name in (*SOLVERS, "similarity_kernel"):
        hot = [max(hot, key=lambda loop: loop["FFMA"])]
    else:
        return 0.0, 0.0
    if name in SOLVERS and int(rows) > 0:
        return hot[0].total() / int(rows), hot[0]["MUFU"] / int(rows)
    return sum(loop.total() / loop["FFMA"] for loop in hot), sum(loop["MUFU"] / loop["FFMA"] for loop in hot)


def per_pair(kernel: str, code: list[tuple[int, str, str]], dim: int = FEATURES) -> tuple[float, float]:
    """Instructions and special ones a pair of points of `dim` features, of the loop over tiles of columns.

    A thread has 64 pairs of a tile. Inside of the loop over tiles is one over chunks of the features, and with float32
    one more over the halves of a chunk; the kernel for one chunk has neither. The block that looks for maxima is jumped
    over in all but the first iterations: what lies in it is not counted.
    """
    precision, one = re.findall(r"\)(\d), (\w+)", kernel)[0]
    size, halves, depth = CHUNKS[precision]
    count = counted(code)
    nest = sorted((span for span in spans(code) if count(span)["HMMA"]), key=lambda span: span[1] - span[0])
    levels = [count(span) for span in nest[: 1 if one == "true" else depth]]
    tiles = nest[len(levels) - 1]
    total, special = levels[0].total(), levels[-1]["MUFU"]
    times = [halves, -(-dim // size)][-len(levels) + 1 :] if len(levels) > 1 else []
    for inner, outer, repeated in zip(levels, levels[1:], times, strict=False):
        total = outer.total() - inner.total() + repeated * total
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and tiles[0] <= address < int(target[1], 16) <= tiles[1]:
            skipped = count((address + 1, int(target[1], 16) - 1))
            if skipped["FMNMX"] >= PAIRS:
                total, special = total - skipped.total(), special - skipped["MUFU"]
                break
    return total / PAIRS, special / PAIRS


def machine_code(file: Path) -> dict[str, dict[str, list[tuple[int, str, str]]]]:
    """Address, name and operands of the instructions by kernel and architecture."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);"
    result: dict[str, dict[str, list[tuple[int, str, str]]]] = {}
    for section in re.split(r"\n[ \t]*code for sm_", dump("-sass", file=file))[1:]:
        arch = section.split()[0]
        for text in re.split(r"\n\s*Function : ", section)[1:]:
            code = [(int(address, 16), name, rest) for address, name, rest in re.findall(pattern, text)]
            result.setdefault(short(text.partition("\n")[0]), {})[arch] = code
    return result


def occupancy_and_conflicts(file: Path) -> dict[str, dict[str, int]]:
    """Blocks a multiprocessor and bank conflicts of the sm_90 kernels, by cuxray."""
    tools = Path(tool("cuobjdump")).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}  # else it would download its own
    with tempfile.TemporaryDirectory() as folder:
        extract = [tool("cuobjdump"), "-xelf", "sm_90", str(file.resolve())]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        report = [sys.executable, "-m", "cuxray", "report", folder, "--fast", "--no-cache", "--json"]
        done = subprocess.run(report, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"cuxray failed. Install the project's dev extra: pip install -e '.[dev]'\n{done.stderr[-2000:]}"
        )
    return {
        short(kernel["demangled"]): {
            "blocks": kernel["occupancy"]["blocks_per_sm"],
            "conflicts": kernel["access"]["conflicted_shared_accesses"],
        }
        for unit in json.loads(done.stdout)["units"]
        for kernel in unit["kernels"]
    }


def measure(file: Path) -> dict[str, dict[str, Usage]]:
    """Usage by kernel and architecture ("90") of all kernels in an object file or extension."""
    resources: dict[tuple[str, str], tuple[int, int, int]] = {}
    arch = ""
    lines = dump("-res-usage", file=file).splitlines()
    for index, line in enumerate(lines):
        arch = (re.search(r"arch = sm_(\d+)", line) or [None, arch])[1]
        name = re.match(r"\s*Function (.*):$", line)
        if name:
            numbers = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", lines[index + 1]))
            resources[arch, short(name[1])] = tuple(int(numbers[key]) for key in ("REG", "STACK", "SHARED"))
    accesses = occupancy_and_conflicts(file)
    result: dict[str, dict[str, Usage]] = {}
    for kernel, by_arch in machine_code(file).items():
        for arch, code in by_arch.items():
            registers, stack, shared = resources[arch, kernel]
            instructions, special = per_element(kernel, code)
            spills = sum(name.startswith(SPILLS) for _, name, _ in code)
            usage = Usage(registers, stack, spills, round(instructions, 2), round(special, 3), shared)
            if arch == "90":
                usage = replace(usage, **accesses[kernel])
            result.setdefault(kernel, {})[arch] = usage
    return result


def violations(measured: dict[str, dict[str, Usage]], budget: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What exceeds the budget, or is missing on either side, in words."""
    found = []
    for kernel in sorted(measured.keys() | budget.keys()):
        for arch in sorted(measured.get(kernel, {}).keys() | budget.get(kernel, {}).keys()):
            where = f"{kernel} on {arch if not arch.isdigit() else f'sm_{arch}'}"
            if kernel not in budget or arch not in budget[kernel]:
                found.append(f"{where}: not in the budget")
            elif kernel not in measured or arch not in measured[kernel]:
                found.append(f"{where}: in the budget, but not compiled")
            else:
                for name, limit in budget[kernel][arch].items():
                    value = getattr(measured[kernel][arch], name)
                    if limit is not None and (value < limit if name == "blocks" else value > limit):
                        found.append(f"{where}: {name} {value}, the budget is {limit}")
    return found


def table(measured: dict[str, dict[str, Usage]]) -> str:
    """Markdown."""
    lines = [
        "| kernel | sm | registers | stack, spills | shared | instructions | exp, log | blocks | bank conflicts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel, archs in sorted(measured.items()):
        for arch, use in archs.items():
            spills = f"{use.stack}, {use.spills}"
            counts = (
                use.instructions or "",
                use.special or "",
                use.blocks or "",
                "" if use.conflicts is None else use.conflicts,
            )
            row = (f"`{kernel}`", arch, use.registers, spills, use.shared, *counts)
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
