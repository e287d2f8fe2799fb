"""Compile every Triton kernel that the benchmark's GPU cases launch, for compute capability 9.0, without a GPU.

Triton's interpreter says nothing of types, shapes and memory that only its compiler checks. Here the forms run on
tensors without data, and each launch compiles its kernel instead; the largest share of shared memory is reported.
Run as a program, with names of ops, in a process without TRITON_INTERPRET; it exits with 1 if a kernel fails.
"""

import importlib
import sys
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import bench, launch, op

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes of shared memory that a program of such a card may have
PROCESSORS = 132
OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid")
POINTERS = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


class GPU(bench.Bench):
    """A bench that gives the cases of a GPU."""

    gpu = True


class Compiler:
    """Stands in for `launch`: compiles each kernel once for each of its signatures."""

    def __init__(self) -> None:
        self.seen: set[tuple] = set()
        self.failed: list[str] = []

    def __call__(self, kernel, grid, *args, **meta) -> None:
        options = {name: meta.pop(name) for name in OPTIONS if name in meta}
        given = dict(zip(kernel.arg_names, args)) | meta
        signature, constants, hints = {}, {}, {}
        for i, param in enumerate(kernel.params):
            value = given[param.name]
            if param.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[param.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[param.name], hints[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif type(value) is int:
                signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    hints[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[param.name] = "i1" if type(value) is bool else "fp32"
        name = f"{kernel.__module__}.{kernel.__name__}"
        key = (name, str(signature), str(constants), str(hints), str(options))
        if key in self.seen:
            return
        self.seen.add(key)
        try:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
            shared = triton.compile(source, target=TARGET, options=options).metadata.shared
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__
            self.failed.append(f"{name}: {str(error)[-300:]}")
        else:
            print(f"{name}: {shared} bytes of shared memory", flush=True)
            if shared > SHARED:
                self.failed.append(f"{name}: {shared} bytes of shared memory, a program may have {SHARED}")


def forms(name: str, compiler: Compiler) -> None:
    """Run the Triton form of an op, forward and backward, over its GPU cases in bf16."""
    importlib.import_module(f"kernels.{name}")._op.load_triton()
    for module in list(sys.modules.values()):
        if module.__name__.startswith("kernels.") and module is not launch and hasattr(module, "launch"):
            module.launch = compiler
    calls = []

    def call(form, *args):
        outputs = form.run(*args)
        calls.append((form, args, outputs if isinstance(outputs, tuple) else (outputs,)))
        if not form.saved:
            return outputs
        outputs = outputs[: -form.saved]
        return outputs[0] if len(outputs) == 1 else outputs

    op.Form.__call__, op.FORM = call, "triton"
    with FakeTensorMode(), torch.no_grad():
        for case in importlib.import_module(f"kernels.{name}.bench").cases(GPU(torch.device("cpu"), torch.bfloat16)):
            calls.clear()
            try:
                case.run(**case.inputs())
            except ValueError as error:  # a size that goes to another form
                print(f"{name} {case.shape}: {error}")
                continue
            except torch._subclasses.fake_tensor.DynamicOutputShapeException as error:
                print(f"{name} {case.shape}: needs values of tensors ({error.func})")
                continue
            except torch._subclasses.fake_tensor.DataDependentOutputException as error:
                print(f"{name} {case.shape}: needs values of tensors ({error.func})")
                continue
            for form, args, outputs in calls if case.backward else ():
                module = sys.modules[form.run.__module__]
                own = len(outputs) - form.saved
                kept = outputs if getattr(module, "WHOLE", False) else outputs[own:]
                needs = [isinstance(x, Tensor) and x.is_floating_point() for x in args]
                module.grad(args, kept, [torch.empty_like(y) for y in outputs[:own]], needs)


if __name__ == "__main__":
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=PROCESSORS)
    compiler = Compiler()
    for op_name in sys.argv[1:] or bench.registered():
        forms(op_name, compiler)
    print(f"{len(compiler.seen)} kernels, {len(compiler.failed)} failed", *compiler.failed, sep="\n")
    sys.exit(bool(compiler.failed))
