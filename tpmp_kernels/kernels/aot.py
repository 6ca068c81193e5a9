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

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """Bytes of shared memory, registers a thread, bytes of stack (spills), and the machine code as text."""

    shared: int
    registers: int
    stack: int
    sass: str

    def count(self, opcode: str) -> int:
        """Instructions of one opcode, say HGMMA (tensor core), LDL or STL (spills)."""
        return len(re.findall(rf"\b{opcode}\b", self.sass))

    def register_operands(self) -> int:
        """Warp-group products that take A from registers instead of shared memory (a descriptor, gdesc)."""
        products = re.findall(r"\bHGMMA\S*\s+R\d+,\s*(\w+)", self.sass)
        return sum(operand != "gdesc" for operand in products)


def compile(kernel: Any, arguments: dict[str, Any], *, capability: int, num_warps: int, num_stages: int) -> Compiled:
    """`kernel` with every argument named, for a CUDA device of compute capability `capability` (90 for sm_90)."""
    signature, constants, attributes = specialise(kernel, arguments)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        usage, sass = _cuobjdump("--dump-resource-usage", cubin), _cuobjdump("--dump-sass", cubin)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Compiled(binary.metadata.shared, found["REG"], found["STACK"], sass)


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
        is_tensor = isinstance(value, Tensor)
        signature[name] = _POINTERS[value.dtype] if is_tensor else "i32" if -(2**31) <= value < 2**31 else "i64"
        if is_tensor or (value % 16 == 0 and name not in generic):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _cuobjdump(option: str, cubin: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, cubin], check=True, capture_output=True, text=True).stdout
