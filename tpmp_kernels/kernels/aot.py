"""Compile a kernel ahead of time, with no GPU, exactly as a launch would, and read what the compiler made of it.

`compile` takes the launch's own arguments (tensors on the meta device will do) and specialises them as Triton's
launcher does: integers equal to 1 become constants, aligned pointers and multiples of 16 say so. Without those
attributes the same kernel loses its asynchronous copies, and a check would look at another kernel than runs.
"""

import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
# The unit that multiplies matrices: wgmma, mma and tcgen05 on NVIDIA, MFMA on AMD.
_PRODUCTS = {"sm80": r"\bHMMA\b", "sm90": r"\bHGMMA\b", "sm100": r"\bUTC\w*MMA\b", "gfx942": r"\bv_mfma_f32_\w*f16"}
_COPIES = {"sm80": r"\bLDGSTS\b", "sm90": r"\bLDGSTS\b|\bUTMALDG\b", "sm100": r"\bLDGSTS\b|\bUTMALDG\b"}


@dataclass(frozen=True)
class Compiled:
    """Bytes of shared memory, registers a thread, bytes of stack (spills), and the machine code as text."""

    arch: str
    shared: int
    registers: int
    stack: int
    code: str

    def count(self, opcode: str) -> int:
        """Instructions of one opcode, say LDL or STL (spills)."""
        return len(re.findall(rf"\b{opcode}\b", self.code))

    def count_in_loops(self, opcode: str) -> int:
        """The same within the innermost loops: where a GEMM runs over K, a pass over its row. Of NVIDIA's code."""
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", self.code)
        instructions = [(int(address, 16), text) for address, text in found]
        loops = [
            (int(target[1], 16), address)
            for address, text in instructions
            if (target := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) and int(target[1], 16) <= address
        ]
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        return sum(
            any(first <= address <= last for first, last in inner)
            for address, text in instructions
            if re.search(rf"\b{opcode}\b", text)
        )

    def products(self) -> int:
        """Instructions of the matrix unit on half-precision operands."""
        return len(re.findall(_PRODUCTS[self.arch], self.code))

    def copies(self) -> int:
        """Asynchronous copies into shared memory; AMD's go through registers."""
        return len(re.findall(_COPIES[self.arch], self.code)) if self.arch in _COPIES else 0

    def register_operands(self) -> int:
        """Warp-group products that take A from registers instead of shared memory (a descriptor, gdesc)."""
        products = re.findall(r"\bHGMMA\S*\s+R\d+,\s*(\w+)", self.code)
        return sum(operand != "gdesc" for operand in products)


def compile(kernel: Any, arguments: dict[str, Any], *, arch: str, num_warps: int, num_stages: int) -> Compiled:
    """`kernel` with every argument named, for `arch`: "sm90" for compute capability 9.0, "gfx942" for AMD."""
    signature, constants, attributes = specialise(kernel, arguments)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if arch.startswith("gfx"):
        return _amd(triton.compile(source, target=GPUTarget("hip", arch, 64), options=options), arch)
    return _nvidia(triton.compile(source, target=GPUTarget("cuda", int(arch[2:]), 32), options=options), arch)


def _nvidia(binary: Any, arch: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        usage, sass = _cuobjdump("--dump-resource-usage", cubin), _cuobjdump("--dump-sass", cubin)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Compiled(arch, binary.metadata.shared, found["REG"], found["STACK"], sass)


def _amd(binary: Any, arch: str) -> Compiled:
    code = binary.asm["amdgcn"]
    found = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code)
    }
    return Compiled(arch, binary.metadata.shared, found["vgpr_count"], found["private_segment_fixed_size"], code)


def specialise(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict]:
    """(signature, constexprs, attrs) for ASTSource. Pointers are taken as aligned to 16 bytes, as torch allocates."""
    generic = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict = {}
    for position, name in enumerate(inspect.signature(kernel.fn).parameters):
        value = arguments[name]
        one = isinstance(value, int) and value == 1 and name not in generic
        if name in fixed or value is None or one:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in generic):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Tensor | TensorDescriptor | int) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _cuobjdump(option: str, cubin: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, cubin], check=True, capture_output=True, text=True).stdout
