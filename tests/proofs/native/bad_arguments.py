"""Calls every raw op of a compiled library with one argument wrong at a time, as a caller without Python could.

    python -m tests.proofs.native.bad_arguments NAMESPACE LIBRARY SEED

A run makes one call in `parts`, by its seed. Each must raise an error that names the argument, or give the reference's
result; and the op's fake implementation must accept what the op accepts, and refuse what it refuses. A line is printed
before each call: after a crash the last one says which call it was. Ends with status 1 and the calls that were accepted
wrongly.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from internvit.numerics import relative_error
from internvit.ops import linear_int8, per_token_quant
from internvit.ops.backends.registry import BACKENDS
from internvit.ops.core.registration import OPS
from tests.proofs.cuda.host import as_backend
from tests.support.implementations import call

BATCH, TOKENS, HEADS, HEAD_DIM, OUT = 2, 5, 2, 8, 6
CHANNELS = HEADS * HEAD_DIM
ROWS = ("x_q", "x_scale", "x_zero")
UNCHECKED = ("instruction_sets", "packs_linear", "multiplies_int8")  # no argument can be wrong

Arguments = dict[str, Any]


class Made:
    """Valid arguments of `op`, by the names in its schema."""

    def __init__(self, raw: Any, op: str, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.raw, self.op, self.dtype, self.generator = raw, op, dtype, generator
        self.schema = getattr(raw, op).default._schema
        self.names = [a.name for a in self.schema.arguments]
        self.weight = self.random(OUT, CHANNELS)
        self.arguments: Arguments = {a.name: self.value(a) for a in self.schema.arguments}
        self.arguments = with_forward(self, self.arguments)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def value(self, argument: Any) -> Any:
        name = argument.name
        if "Tensor" in str(argument.type):
            return self.tensor(name)
        if name == "output_mask":
            return [True] * argument.N
        plain = {"eps": 1e-6, "scale": 0.3, "rounding": "fused", "branch_dtype": self.dtype, "dtype": self.dtype}
        if "quant" in self.op:
            plain["dtype"] = torch.int8
        plain |= {
            "kind": "layer_norm",
            "norm_type": "layer_norm",
            "gelu": False,
            "symmetric": False,
            "out_features": OUT,
            "name": "generic",
            "rounds": 1,
            "threads": 1,
        }
        return plain[name]

    def int8_operand(self, name: str) -> Tensor:
        if name in (*ROWS, "x"):  # of mlp_int8 x is int8 here
            x = torch.randn((BATCH, TOKENS, CHANNELS), generator=torch.Generator().manual_seed(0))
            return self.raw.per_token_quant(x, False, torch.int8)[0 if name == "x" else ROWS.index(name)]
        if name == "residual":
            return self.random(BATCH, TOKENS, OUT)
        if name == "group_ratio":
            return self.random(OUT, -(-CHANNELS // 128), dtype=torch.float32)
        weight = self.weight.t() if name.startswith("fc2") else self.weight
        weight_q, weight_scale, _ = self.raw.per_token_quant(weight, True, torch.int8)
        kind = name.rpartition("_")[2]
        if kind == "bias":
            return torch.ones(len(weight_q))
        if name == "weight_q":
            return weight_q
        return weight_scale if kind == "scale" else self.raw.pack_weight_int8(weight_q)

    def tensor(self, name: str) -> Tensor | None:
        if self.op == "pack_weight":
            return self.weight
        if self.op == "linear_packed":
            made = {"packed_weight": lambda: self.raw.pack_weight(self.weight), "bias": lambda: self.random(OUT)}
            made["residual"] = lambda: self.random(BATCH, TOKENS, OUT)
            if name in made:
                return made[name]()
        if "int8" in self.op and (name != "x" or self.op == "mlp_int8"):
            return self.int8_operand(name)
        if name in ("weight", "bias", "gamma", "q_weight", "k_weight"):
            return self.random(CHANNELS)
        if name.startswith("cu_seqlens"):
            return None  # tests/ops/test_packed.py and test_attention_keys.py
        if name == "row_scale":
            return self.random(BATCH, dtype=torch.float32)
        if name == "lse":
            return self.random(BATCH, HEADS, TOKENS, dtype=torch.float32) + 4
        if name in ("mean", "rstd") or "rstd_" in name:
            return self.random(BATCH, TOKENS, dtype=torch.float32).abs() + 0.5
        return (
            self.random(BATCH, TOKENS, HEADS, HEAD_DIM) if "q" in self.names else self.random(BATCH, TOKENS, CHANNELS)
        )


def wrong_tensors(t: Tensor, optional: bool, written: bool) -> Iterator[tuple[str, Any]]:
    for dim in {0, t.dim() - 1}:
        size = t.shape[dim]
        yield f"one shorter in dimension {dim}", t.narrow(dim, 0, size - 1).contiguous()
        yield f"one longer in dimension {dim}", torch.cat([t, t.narrow(dim, 0, 1)], dim)
        yield f"empty in dimension {dim}", t.narrow(dim, 0, 0).contiguous()
    yield "one dimension less", t[0].clone()
    yield "one dimension more", t.unsqueeze(0).clone()
    yield "flat", t.flatten().clone()
    yield "a scalar", t.flatten()[0].clone()
    for dtype in (
        torch.int32,
        torch.bool,
        torch.float64,
        torch.float16,
        torch.float32,
        torch.bfloat16,
        torch.complex64,
    ):
        if dtype != t.dtype:
            yield f"{dtype}", t.to(dtype)
    yield "last dimension not contiguous", t.repeat_interleave(2, -1)[..., ::2]
    yield "expanded", t.narrow(0, 0, 1).expand(t.shape) if not written or t.shape[0] > 1 else t
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    room[1:] = t.flatten()
    yield "one element past an aligned address", room[1:].view(t.shape)
    yield "on device meta", t.to("meta")
    if optional:
        yield "missing", None


def wrong_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name == "eps":
        yield from (("negative", -1e-6), ("NaN", float("nan")))
    elif name == "scale":
        yield from (("infinite", float("-inf")), ("NaN", float("nan")))
    elif isinstance(value, str):
        yield from (("another word", "centred"), ("empty text", ""))
    elif isinstance(value, list):
        yield from (("too short", value[1:]), ("too long", [*value, True]), ("empty list", []))
    elif isinstance(value, torch.dtype):
        wrong = (torch.int32, torch.float64, torch.complex64, *([] if name == "dtype" else [torch.float16]))
        yield from ((str(d), d) for d in wrong if d != value)
    elif isinstance(value, int) and not isinstance(value, bool):
        large = {"rounds": (), "threads": (2**62,)}.get(name, (value + 1, value + 40, 2**62, 2**63 - 1))
        yield from ((str(n), n) for n in (-1, *large))


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    names = ("q", "k", "v", "scale", "q_weight", "k_weight", "rstd_q", "rstd_k")
    return call("attention", "reference", *(arguments[n] for n in names))


def with_forward(made: Made, arguments: Arguments, wrong: str = "") -> Arguments:
    """attention_backward's arguments with the out and lse of its forward, where these arguments have one."""
    if made.op != "attention_backward" or wrong in ("out", "lse"):
        return arguments
    try:
        out, lse = forward(arguments)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return arguments
    same = out.device.type == "cpu" and out.dtype == made.dtype and out.shape == made.arguments["out"].shape
    return arguments | {"out": out, "lse": lse.float()} if same else arguments


def wrong_calls(made: Made) -> Iterator[tuple[str, str, Arguments]]:
    for argument in made.schema.arguments:
        name, value = argument.name, made.arguments[argument.name]
        optional, written = "Optional" in str(argument.type), argument.alias_info is not None
        changes = wrong_tensors(value, optional, written) if isinstance(value, Tensor) else wrong_values(name, value)
        for what, changed in changes:
            if not (name in ("out", "lse") and what == "expanded"):  # no output of any attention
                yield name, what, with_forward(made, made.arguments | {name: changed}, name)


def copied(arguments: Arguments, change: Callable[[Tensor], Tensor] = lambda t: t) -> Arguments:
    """The arguments with copies of the tensors, strides kept."""

    def copy(t: Tensor) -> Tensor:
        fresh = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        if 0 in t.stride():
            return change(t)
        return change(fresh.copy_(t) if t.device.type != "meta" else fresh)

    return {n: copy(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}


def expected(made: Made, arguments: Arguments) -> list[Tensor]:
    """What the op must return, and have written, in float64; raises where no result is right."""
    if made.op == "pack_weight":
        return [made.raw.pack_weight(arguments["weight"].contiguous().clone())]
    if made.op == "pack_weight_int8":
        ratio = arguments["group_ratio"]
        ratio = None if ratio is None else ratio.contiguous().clone()
        return [made.raw.pack_weight_int8(arguments["weight_q"].contiguous().clone(), ratio)]
    if made.op == "mlp_int8":
        return [int8_mlp(made, arguments)]
    if made.op in ("linear_int8_packed", "linear_int8_dynamic"):
        return [int8_product(made, arguments)]
    wide = copied(arguments, lambda t: t.double())
    wide |= {"branch_dtype": torch.float64} if "branch_dtype" in wide else {}
    if made.op == "linear_packed":
        y = F.linear(wide["x"], made.weight.double(), wide["bias"])
        if not torch.equal(arguments["packed_weight"], made.arguments["packed_weight"]):
            raise ValueError("another weight")
        return [y if wide["residual"] is None else y + wide["residual"]]
    if made.op == "attention_backward":  # of a rounded out, delta alone moves gradients by 0.05, those that cancel
        saved = zip(("out", "lse"), forward(wide), strict=True)
        wide |= {name: t for name, t in saved if t.shape == wide[name].shape}
    outputs = call(made.op, "reference", *wide.values())
    outputs = () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *(wide[n] for n in written_names(made))]


def int8_mlp(made: Made, arguments: Arguments) -> Tensor:
    rows = tuple(arguments[n] for n in ("x", "x_scale", "x_zero"))
    for layer, weight in (("fc1", made.weight), ("fc2", made.weight.t())):
        if not torch.equal(arguments[f"{layer}_weight"], made.arguments[f"{layer}_weight"]):
            raise ValueError("another weight")
        weight_q, _, _ = made.raw.per_token_quant(weight, True, torch.int8)
        scale, bias = arguments[f"{layer}_scale"], arguments[f"{layer}_bias"]
        (x_q, x_scale, x_zero), gelu = rows, layer == "fc1"
        settings: Any = {"gelu": gelu, "dtype": torch.float32 if gelu else arguments["dtype"], "backend": "reference"}
        y = linear_int8(x_q, x_scale, weight_q, scale, bias, x_zero, **settings)
        rows = per_token_quant(y, symmetric=False, backend="reference")
    return y


def int8_product(made: Made, arguments: Arguments) -> Tensor:
    if not torch.equal(arguments["packed_weight"], made.arguments["packed_weight"]):
        raise ValueError("another weight")
    weight_q, _, _ = made.raw.per_token_quant(made.weight, True, torch.int8)
    given = {n: v for n, v in arguments.items() if n != "packed_weight"}
    if "x" in given:
        x = given.pop("x")
        given |= dict(zip(ROWS, per_token_quant(x, symmetric=False, backend="reference"), strict=True))
        given["dtype"] = x.dtype
    return linear_int8(weight_q=weight_q, **given, backend="reference")


def written_names(made: Made) -> list[str]:
    return [a.name for a in made.schema.arguments if a.alias_info is not None]


class Fakes:
    """The fake implementations: of what is no public op's there is none to compare with here."""

    def __init__(self, namespace: str) -> None:
        backend = namespace.removeprefix("internvit_").removesuffix("_host")
        self.of = {name: op.fakes[backend] for name, op in OPS.items() if backend in op.fakes}

    def complaint(self, made: Made, arguments: Arguments, refused: str | None) -> str | None:
        """Where the fake disagrees with the op, which raised an error of the text `refused` or none."""
        if made.op not in self.of:
            return None
        if any(isinstance(v, Tensor) and v.device.type == "meta" for v in arguments.values()) and refused is None:
            return None
        told = None
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments.values()]
            try:
                self.of[made.op](*fake)
            except (RuntimeError, ValueError) as error:
                told = str(error)
        if (told is None) == (refused is None):
            return None
        return f"the op says {refused!r}, its fake {told!r}"


def refusal(made: Made, arguments: Arguments) -> str | None:
    """The text of the op's error, None without one."""
    try:
        getattr(made.raw, made.op)(*copied(arguments).values())
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def complaint(made: Made, name: str, arguments: Arguments) -> str | None:
    """What is wrong with how the op takes these arguments."""
    given = copied(arguments)
    try:
        outputs = getattr(made.raw, made.op)(*given.values())
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if isinstance(error, NotImplementedError) or name in text or repr(arguments[name]) in text:
            return None
        first = made.names[0] == name or name in ("x", "q", "branch", "residual_out", "pre_activation")
        # The others are compared with the first tensor: where that one is wrong, another may be named.
        return None if first and any(n in text for n in made.names) else f"does not name {name}: {text.splitlines()[0]}"
    outputs = () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)
    try:
        truth = expected(made, arguments)
    except Exception as error:  # whatever the reference raises, the op should have raised
        return f"is accepted; the reference raises {type(error).__name__}: {str(error).splitlines()[0]}"
    for actual, right in zip([*outputs, *(given[n] for n in written_names(made))], truth, strict=True):
        if not isinstance(actual, Tensor):
            continue
        if actual.shape != right.shape:
            return f"returns shape {list(actual.shape)}, expected {list(right.shape)}"
        # A row rounded to bfloat16 and then to int8 is off by 0.026; a wrong read by 1.
        if right.numel() and not relative_error(actual, right) < 0.05:
            return f"returns another result: off by {relative_error(actual, right)}"
    return None


def ops_of(raw: Any, namespace: str) -> list[str]:
    names = (n.split("::") for n in torch._C._dispatch_get_all_op_names())
    ops = sorted({n[1].split(".")[0] for n in names if n[0] == namespace})
    no_linear = hasattr(raw, "packs_linear") and not raw.packs_linear(torch.bfloat16)
    no_int8 = hasattr(raw, "multiplies_int8") and not raw.multiplies_int8()
    absent = [*(("pack_weight", "linear_packed") if no_linear else ()), *(op for op in ops if no_int8 and "int8" in op)]
    return [op for op in ops if op not in UNCHECKED and op not in absent]


def main() -> None:
    namespace, library, seed, parts = sys.argv[1:]
    torch.ops.load_library(library)
    raw, generator = getattr(torch.ops, namespace), torch.Generator().manual_seed(int(seed))
    calls, complaints, fakes = 0, [], Fakes(namespace)
    outcomes: list[tuple[str, Made, Arguments, str | None]] = []
    for op in ops_of(raw, namespace):
        for dtype in (torch.bfloat16,) if "pack" in op or op == "mlp_int8" else (torch.float32, torch.bfloat16):
            made = Made(raw, op, dtype, generator)
            if not any(w in op for w in ("peak", "use_", "pack")):
                told = complaint(made, "", made.arguments)  # valid as it is
                complaints += [f"{op} {dtype}, valid arguments: {told}"] if told else []
            for name, what, arguments in islice(wrong_calls(made), int(seed) % int(parts), None, int(parts)):
                label = f"{op} {dtype}, {name} {what}"
                print(label, flush=True)
                told = complaint(made, name, arguments)
                outcomes.append((label, made, arguments, refusal(made, arguments)))
                complaints += [f"{label}: {told}"] if told else []
                calls += 1
    # Last: they load the backend, whose fakes take the calls on the meta device from the library.
    if namespace.endswith("_host"):
        BACKENDS["cuda"] = as_backend(Path(library))
    for label, *outcome in outcomes:
        told = fakes.complaint(*outcome)
        complaints += [f"{label}: {told}"] if told else []
    print(f"{calls} calls", *complaints, sep="\n")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
