"""Every op of a training step: in eager PyTorch, under torch.compile, and fused where there is a kernel.

    python -m benchmarks.bench_kernels --sizes s xl --batch 32
    python -m benchmarks.bench_kernels --ops attention --sizes xl
    pytest benchmarks/bench_kernels.py --benchmark-only --benchmark-save-data -k "adaln and compiled"

Bytes and FLOPs are spelled out in kernel_cases.py. On a GPU a sample is one replay of a CUDA graph, as a training step
is, from a cold L2 cache: an op of a step finds there what other ops left. On a CPU caches are warm, and small inputs
may exceed the roof. An implementation whose results disagree with the reference gets no number. cuDNN's and Liger's
nearest ops (rival_norms.py) have rows where they are installed.

pytest-benchmark times the same calls by its own clock, to the end of the device's work and with the launch before it;
the row of benchmarks/timing.py, of the same calls, is beside it under extra_info.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import options, timing
from benchmarks.kernel_cases import OPS, Case, check, make_case, prepared, truth
from benchmarks.rivals.norms import RIVALS
from sra_fast.config import SIZES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def defaults(device: torch.device) -> dict[str, Any]:
    """Sizes, batch, dtype, samples and warm-up that suit a device."""
    if device.type == "cuda":
        return {"sizes": ["s", "xl"], "batch": 32, "dtype": "bf16", "repeats": 100, "warmup": 5}
    return {"sizes": ["s"], "batch": 4, "dtype": "fp32", "repeats": 30, "warmup": 3}


def measure(case: Case, which: str, device: torch.device, repeats: int, warmup: int) -> dict[str, timing.Samples]:
    """Samples of every implementation that agrees with the reference, interleaved; the others' say what is off."""
    right = truth(case, which)
    refused = {}
    gpu = device.type == "cuda"
    clock = {"device": device, "cold_l2": gpu, "graph": gpu}
    for name in case.implementations:
        try:
            check(case, name, which, truth(case, which, name) if name in case.another_function else right)
            if name in RIVALS:  # alone first: what it cannot do must not end the others' turns
                timing.measure({name: prepared(case, name, which)}, repeats=1, warmup=1, **clock)
        except timing.GateFailed as failure:
            refused[name] = timing.Samples(error=f"disagrees with the reference: {failure}")
        except Exception as error:  # other people's code may raise anything; ours may not
            if name not in RIVALS:
                raise
            refused[name] = timing.Samples(error=f"failed ({(str(error) or type(error).__name__).splitlines()[0]})")
    del right
    agreeing = {name: prepared(case, name, which) for name in case.implementations if name not in refused}
    taken = timing.measure(agreeing, repeats=repeats, warmup=warmup, **clock)
    return {name: taken.get(name) or refused[name] for name in case.implementations}


def rows(case: Case, fixed: dict[str, Any], device: torch.device, roofs: dict[str, Any], chosen: Any) -> list:
    """Rows of all passes and implementations of a case; `fixed` are the params they share."""
    made = []
    for which in case.passes:
        torch._dynamo.reset()  # its limit of recompilations is per function, not per shape
        taken = measure(case, which, device, chosen.repeats, chosen.warmup)
        stamp = timing.stamp(device)
        for name, samples in taken.items():
            params = {**fixed, "pass": which, "implementation": name}
            if name in case.another_function:
                params["another_function"] = True
            flops = case.flops(which) or None
            made.append(
                timing.row(case.op, params, samples, stamp=stamp, bytes=case.bytes(which), flops=flops, roofs=roofs)
            )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 1 if an implementation disagrees with the reference."""
    device = default_device()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: s and xl on a GPU, s on a CPU")
    parser.add_argument("--batch", type=options.positive, help="images; default: 32 on a GPU, 4 on a CPU")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="only these, and the reference")
    parser.add_argument("--repeats", type=options.positive, help="samples of each; default: 100 on a GPU, 30 on a CPU")
    parser.add_argument(
        "--warmup", type=options.positive, help="calls before the first sample; default: 5 on a GPU, 3 on a CPU"
    )
    parser.add_argument("--device", type=options.device, default=device)
    chosen = parser.parse_args(arguments)
    device = chosen.device
    for name, value in defaults(device).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    roofs, stamp, made, path = timing.roofs(device), timing.stamp(device), [], None
    known: set[str] = set()
    for size in chosen.sizes:
        for op in chosen.ops:
            case = make_case(op, size, chosen.batch, device, DTYPES[chosen.dtype], chosen.implementations)
            known |= set(case.implementations)
            fixed = {"size": size, "batch": chosen.batch, "dtype": "fp32" if op == "perturb" else chosen.dtype}
            made += rows(case, fixed, device, roofs, chosen)
            path = timing.write(timing.folder(stamp), "kernels", made, stamp)  # again and again: a kill costs one op
    if unknown := set(chosen.implementations or ()) - known:
        parser.error(f"--implementations: {', '.join(sorted(unknown))} given; there were {', '.join(sorted(known))}")
    print(timing.table(made))
    print(f"raw samples in {path}")
    off = [row for row in made if row.get("error", "").startswith("disagrees")]
    for row in off:
        print(f"no number: {row['error']}")
    return 1 if any(row["params"]["implementation"] not in RIVALS for row in off) else 0


def pytest_generate_tests(metafunc: Any) -> None:
    """A test per op, size, pass and implementation that this device has. Inputs come with the test."""
    device = default_device()
    chosen = defaults(device)
    tests = []
    for size in chosen["sizes"]:
        for op in OPS:
            case = make_case(op, size, 1, device, DTYPES[chosen["dtype"]])
            tests += [(op, size, which, name) for which in case.passes for name in case.implementations]
    metafunc.parametrize(("op", "size", "which", "implementation"), tests)


def test_kernel(benchmark: Any, op: str, size: str, which: str, implementation: str) -> None:
    """One row of pytest-benchmark: every round is one call, from a cold cache to the end of the device's work."""
    device = default_device()
    chosen = defaults(device)
    torch._dynamo.reset()
    case = make_case(op, size, chosen["batch"], device, DTYPES[chosen["dtype"]], [implementation])
    check(case, implementation, which, truth(case, which, implementation))
    call = prepared(case, implementation, which)
    gpu = device.type == "cuda"
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if gpu else None

    def cold() -> None:
        if flush is not None:
            flush.zero_()
            torch.cuda.synchronize(device)

    def synchronised() -> None:
        call()
        if gpu:
            torch.cuda.synchronize(device)

    repeats, warmup = chosen["repeats"], chosen["warmup"]
    benchmark.pedantic(synchronised, setup=cold, rounds=repeats, iterations=1, warmup_rounds=warmup)
    taken = timing.measure({"it": call}, device=device, repeats=repeats, warmup=1, cold_l2=gpu, graph=gpu)["it"]
    fixed = {"size": size, "batch": chosen["batch"], "dtype": "fp32" if op == "perturb" else chosen["dtype"]}
    params = {**fixed, "pass": which, "implementation": implementation}
    flops = case.flops(which) or None
    stamp = timing.stamp(device)
    benchmark.extra_info["row"] = timing.row(op, params, taken, stamp=stamp, bytes=case.bytes(which), flops=flops)


if __name__ == "__main__":
    raise SystemExit(main())
