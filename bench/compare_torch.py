#!/usr/bin/env python3
"""cuflash against PyTorch's attention: both checked against float64 and timed on the same tensors, in turns, in one run.

    python3 bench/compare_torch.py                              the rows of --rows targets, forward and backward
    python3 bench/compare_torch.py --rows all --json FILE
    python3 bench/compare_torch.py --rows short --dim 64 --causal yes --passes forward
    python3 bench/compare_torch.py --shape 2,16,4,4096,128      batch, heads, KV heads, tokens, head dim (",q tokens" may follow)
    python3 bench/compare_torch.py --device cpu --threads 16    PyTorch on the CPU, at its own rows
    python3 bench/compare_torch.py --library A.so --library B.so    other builds of cuflash in the same run, to tune kernels

Where the package of FlashAttention-3 is installed (flash_attn_interface, of the folder hopper of its repository), it is a peer too.

It needs torch and numpy, and libcuflash.so: $CUFLASH_LIB, or build/release of this repository. The last lines are geometric
means and the worst row. On CUDA backwards are timed in cuflash's deterministic mode too, and must then repeat every bit. TFLOP/s
count 4 B H S^2 D for a forward pass, half of that where causal, 2.5 times that backward. Exit code 1: a result was wrong.
"""
import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import random
import statistics
import sys
import time
import warnings

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip() + "\n\nPyTorch is not here; with it, --help lists all options.")
        sys.exit(0)
    sys.exit(f"compare_torch.py: PyTorch 2.5 or later is needed ({error})")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # cuflash_dtype
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH, "fa3": None}
HAVE_FA3 = importlib.util.find_spec("flash_attn_interface") is not None
ORDERED = "deterministic"  # cuflash again, in that mode
NAMES = {"o": "forward", "dq": "backward", "dk": "backward", "dv": "backward"}


# ---- Rows ---------------------------------------------------------------------------------------------

def row(dtype, dim, seq, batch, heads, causal, heads_kv=None, seq_q=None):
    return {"dtype": dtype, "dim": dim, "causal": causal, "seq_q": seq_q or seq, "seq_k": seq, "batch": batch, "heads": heads,
            "heads_kv": heads_kv or heads}


def of_tokens(dtype, dims, seqs, tokens=16384):
    """Rows of the same number of tokens, and 2048 features a token."""
    return [row(dtype, dim, seq, max(1, tokens // seq), 2048 // dim, causal)
            for dim in dims for causal in (False, True) for seq in seqs]


SEQS = (512, 1024, 2048, 4096, 8192, 16384)
ROWS = {
    "targets": of_tokens("bfloat16", (64, 128), SEQS) + of_tokens("bfloat16", (256,), (1024, 4096, 16384)),
    "short": of_tokens("bfloat16", (64, 128), (128, 256, 512, 1024)),
    "f16": of_tokens("float16", (64, 128), (512, 4096)),
    "f32": of_tokens("float32", (64, 128), (4096,)),
    "gqa": [row("bfloat16", 128, seq, 1, 64, True, 8) for seq in (2048, 8192, 32768)],
    "decode": [row("bfloat16", 128, seq, batch, 32, False, 8, 1)
               for batch, seq in ((1, 8192), (1, 65536), (16, 8192), (64, 8192), (16, 32768))],
    "cpu": [row(dtype, dim, 4096, 1, 16, causal) for dtype in ("float32", "bfloat16", "float16") for dim in (64, 128)
            for causal in (False, True)],
    "cpu1": [row(dtype, dim, 2048, 1, 2, causal) for dtype in ("float32", "bfloat16", "float16") for dim in (64, 128)
             for causal in (False, True)],
}
ALL = ("targets", "f16", "f32", "gqa")


def describe(r):
    heads = f"{r['heads']}/{r['heads_kv']}" if r["heads"] != r["heads_kv"] else str(r["heads"])
    seq = f"{r['seq_q']}x{r['seq_k']}" if r["seq_q"] != r["seq_k"] else str(r["seq_q"])
    return f"{r['dtype']:8} {r['dim']:4} {'yes' if r['causal'] else 'no':6} {seq:>8} {str(r['batch']) + 'x' + heads:>8}"


def operations(r, which):
    return 4 * r["batch"] * r["heads"] * r["seq_q"] * r["seq_k"] * r["dim"] * (0.5 if r["causal"] else 1) * \
        (2.5 if which == "backward" else 1)


# ---- cuflash ------------------------------------------------------------------------------------------

class Tensor(ctypes.Structure):  # cuflash_tensor
    _fields_ = [("storage", ctypes.c_void_p), ("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("device", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("shape", ctypes.c_int64 * 8), ("stride", ctypes.c_int64 * 8)]


TENSORS = ("q", "k", "v", "o", "lse", "d_o", "dq", "dk", "dv")


class Attention(ctypes.Structure):  # cuflash_attention
    _fields_ = [("struct_size", ctypes.c_size_t)] + [(name, ctypes.POINTER(Tensor)) for name in TENSORS] + [
        ("flags", ctypes.c_uint32), ("scale", ctypes.c_float), ("stream", ctypes.c_void_p), ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t)]


CAUSAL, DETERMINISTIC = 1, 4


class Cuflash:
    def __init__(self, path):
        folder, file = os.path.split(os.path.abspath(path))
        self.name = (os.path.basename(folder) if file == "libcuflash.so" else file.removesuffix(".so"))[:8]
        if not os.path.exists(path):
            sys.exit(f"compare_torch.py: {path} is not there: build it with script/build, or name one by --library or CUFLASH_LIB")
        self.lib = lib = ctypes.CDLL(os.path.abspath(path))
        for name in ("version", "last_error", "status_name", "cpu_isa"):
            getattr(lib, "cuflash_" + name).restype = ctypes.c_char_p
        lib.cuflash_tensor_borrow.argtypes = [ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                                              ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64)]
        for name in ("forward", "backward"):
            getattr(lib, "cuflash_attention_" + name).argtypes = [ctypes.POINTER(Attention)]
        lib.cuflash_attention_plan.argtypes = [ctypes.POINTER(Attention), ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]

    def check(self, status):
        if status != 0:
            raise RuntimeError(f"{self.lib.cuflash_status_name(status).decode()}: {self.lib.cuflash_last_error().decode()}")

    def borrow(self, x):
        """A cuflash_tensor over the memory of a torch tensor, which it keeps alive."""
        t = Tensor()
        device = x.device.index if x.device.type == "cuda" else -1
        dims = [(ctypes.c_int64 * x.dim())(*numbers) for numbers in (x.shape, x.stride())]
        self.check(self.lib.cuflash_tensor_borrow(t, x.data_ptr(), CODES[x.dtype], device, x.dim(), *dims))
        t.memory = x
        return t

    def attention(self, tensors, causal, deterministic):
        """A problem on these torch tensors by name, on torch's current stream."""
        a = Attention(struct_size=ctypes.sizeof(Attention))
        a.borrowed = {name: self.borrow(x) for name, x in tensors.items()}
        for name, t in a.borrowed.items():
            setattr(a, name, ctypes.pointer(t))
        a.flags = (CAUSAL if causal else 0) | (DETERMINISTIC if deterministic else 0)
        if tensors["q"].is_cuda:
            a.stream = torch.cuda.current_stream().cuda_stream
        return a

    def run(self, which, a):
        self.check(getattr(self.lib, "cuflash_attention_" + which)(a))

    def kernel(self, which, a):
        text = ctypes.create_string_buffer(4096)
        self.check(self.lib.cuflash_attention_plan(a, ("forward", "backward").index(which), text, len(text)))
        lines = dict(line.split(": ", 1) for line in text.value.decode().splitlines() if ": " in line)
        return lines.get("kernel", "")


class Ours:
    """One problem of cuflash, with outputs that begin as NaN."""

    def __init__(self, cuflash, inputs, r, deterministic):
        self.cuflash = cuflash
        q, k, v, d_o = inputs
        nan = {"device": q.device, "dtype": q.dtype}
        self.out = {"o": torch.full_like(d_o, math.nan), "dq": torch.full_like(q, math.nan), "dk": torch.full_like(k, math.nan),
                    "dv": torch.full_like(v, math.nan)}
        self.lse = torch.full(q.shape[:3], math.nan, device=nan["device"], dtype=torch.float32)
        tensors = {"q": q, "k": k, "v": v, "o": self.out["o"], "lse": self.lse}
        self.problems = {"forward": cuflash.attention(tensors, r["causal"], deterministic)}
        gradients = {name: self.out[name] for name in ("dq", "dk", "dv")}
        self.problems["backward"] = cuflash.attention({**tensors, "d_o": d_o, **gradients}, r["causal"], deterministic)

    def run(self, which):
        self.cuflash.run(which, self.problems[which])


class Theirs:
    """The same by one of PyTorch's backends. Raises RuntimeError where it does not take the problem."""

    def __init__(self, name, inputs, r):
        self.backend = PEERS[name]
        q, k, v, self.d_o = inputs
        self.leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        self.options = {"is_causal": r["causal"]}
        if r["heads"] != r["heads_kv"]:
            self.options["enable_gqa"] = True
        if r["causal"] and r["seq_q"] != r["seq_k"]:
            raise RuntimeError("PyTorch aligns causal masks at the top left")
        self.plain = (q, k, v)
        self.o = self.gradients = self.graph = None

    def attend(self, tensors):
        with sdpa_kernel([self.backend]):
            return torch.nn.functional.scaled_dot_product_attention(*tensors, **self.options)

    def run(self, which):
        if which == "forward":
            self.o = self.attend(self.plain)
        else:
            if self.graph is None:
                self.graph = self.attend(self.leaves)
            self.gradients = torch.autograd.grad(self.graph, self.leaves, self.d_o, retain_graph=True)

    @property
    def out(self):
        out = {} if self.o is None else {"o": self.o}
        return out if self.gradients is None else {**out, **dict(zip(("dq", "dk", "dv"), self.gradients))}


class FlashAttention3(Theirs):
    """The same by FlashAttention-3's package, whose tensors are [batch, seq, heads, dim]."""

    def __init__(self, name, inputs, r):
        super().__init__(name, inputs, r)
        if r["dtype"] == "float32":
            raise RuntimeError("FlashAttention-3 takes 16 bits")
        from flash_attn_interface import flash_attn_func
        self.function = flash_attn_func

    def attend(self, tensors):
        o = self.function(*(x.transpose(1, 2) for x in tensors), causal=self.options["is_causal"])
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)


# ---- Truth --------------------------------------------------------------------------------------------

def formulas(q, k, v, d_o, scale, causal, compute, keep, backward):
    """Attention of the query heads [G, Sq, D] of one KV head [Sk, D], in chunks of queries, computed in one dtype; `keep` says
    in which dtype results of each step are kept, as a naive implementation does."""
    def kept(x):
        return x.to(keep).to(compute)

    q, k, v, d_o = (x.to(compute) for x in (q, k, v, d_o))
    seq_q, seq_k = q.shape[1], k.shape[0]
    chunk = max(1, (1 << 25) // (q.shape[0] * seq_k))
    o, lse, dq = torch.empty_like(d_o), torch.empty(q.shape[:2], dtype=compute, device=q.device), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for i in range(0, seq_q, chunk):
        part = slice(i, min(i + chunk, seq_q))
        s = kept(scale * kept(q[:, part] @ k.T))
        if causal:
            rows = torch.arange(part.start, part.stop, device=q.device)[:, None] + seq_k - seq_q
            s.masked_fill_(torch.arange(seq_k, device=q.device) > rows, -math.inf)
        lse[:, part] = torch.logsumexp(s, -1)
        p = kept(torch.softmax(s, -1)).nan_to_num_(nan=0)  # of rows that see nothing
        o[:, part] = p @ v
        if backward:
            dp = kept(d_o[:, part] @ v.T)
            ds = kept(p * (dp - (d_o[:, part] * kept(o[:, part])).sum(-1, keepdim=True)))
            dq[:, part] = scale * (ds @ k)
            dk += scale * torch.einsum("gqk,gqd->kd", ds, q[:, part])
            dv += torch.einsum("gqk,gqd->kd", p, d_o[:, part])
    out = {"o": o, "dq": dq, "dk": dk, "dv": dv} if backward else {"o": o}
    return {name: kept(x) for name, x in out.items()}, lse


BOUNDS = {"o": (2e-6, 2), "dq": (5e-6, 3), "dk": (5e-6, 3), "dv": (5e-6, 3)}  # float32: of the norm; 16 bit: times naive's error


def check(r, inputs, ours, theirs, backward):
    """Errors against float64 of every contender; complaints about ours. Looks at every KV head where there are few enough
    scores, at some of them elsewhere; for NaN everywhere."""
    q, k, v, d_o = inputs
    group, scale = r["heads"] // r["heads_kv"], 1 / math.sqrt(r["dim"])
    groups = [(b, h) for b in range(r["batch"]) for h in range(r["heads_kv"])]
    budget = (1 << 31 if q.is_cuda else 1 << 26) // (group * r["seq_q"] * r["seq_k"])
    count = min(len(groups), max(2, min(budget, 32)))
    groups = [groups[round(i * (len(groups) - 1) / max(1, count - 1))] for i in range(count)]
    complaints = []
    sums = {}  # contender, name -> squares of difference and of truth

    def heads(h):
        return slice(h * group, (h + 1) * group)

    def part(name, x, b, h):
        return x[b, heads(h)] if name in ("o", "dq") else x[b, h]

    half = q.dtype != torch.float32
    for b, h in dict.fromkeys(groups):
        mine = (q[b, heads(h)], k[b, h], v[b, h], d_o[b, heads(h)])
        exact, lse = formulas(*mine, scale, r["causal"], torch.float64, torch.float64, backward)
        naive = formulas(*mine, scale, r["causal"], torch.float32, q.dtype, backward)[0] if half else {}
        for name, truth in exact.items():
            for who, contender in {"cuflash": ours, **theirs}.items():
                if name not in contender.out:
                    continue
                difference = part(name, contender.out[name], b, h).to(torch.float64) - truth
                square, norm = sums.get((who, name), (0, 0))
                sums[who, name] = square + difference.square().sum().item(), norm + truth.square().sum().item()
                if who == "cuflash" and half:
                    bound = BOUNDS[name][1] * (naive[name].to(torch.float64) - truth).abs().max().item() + 1e-5
                    worst = difference.abs().max().item()
                    if not worst <= bound:
                        complaints.append(f"{name}[{b}, {h}]: the largest error is {worst:.2e}, more than {bound:.2e}")
        got = ours.lse[b, heads(h)].to(torch.float64)
        off = torch.where(got == lse, 0, (got - lse).abs() / lse.abs().clamp(min=1)).max().item()
        if not off <= 1e-5:
            complaints.append(f"lse[{b}, {h}]: relative error {off:.2e}, more than 1e-5")
    errors = {}
    for (who, name), (square, norm) in sums.items():
        errors.setdefault(who, {})[name] = math.sqrt(square / norm) if norm > 0 else math.sqrt(square)
    for name, error in errors["cuflash"].items():
        if not half and not error <= BOUNDS[name][0]:
            complaints.append(f"{name}: relative error {error:.2e}, more than {BOUNDS[name][0]:.0e}")
        if not torch.isfinite(ours.out[name]).all():
            complaints.append(f"{name}: not every number is finite")
    return errors, complaints


# ---- Time ---------------------------------------------------------------------------------------------

class CudaClock:
    """Device time by events. Before each run the L2 cache is flushed; a pause on the device lets the host queue it all."""

    def __init__(self):
        self.scratch = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def round(self, runs):
        events = []
        for run in runs:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(600_000)
            self.scratch.zero_()
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]


class CpuClock:
    """Wall-clock time. A pause before each run lets the threads of the other's OpenMP go to sleep."""

    def round(self, runs):
        times = []
        for run in runs:
            time.sleep(0.02)
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times


def measure(clock, runs, seconds, least, most):
    """Medians of every run, made in rounds, each in an order of its own: what a run leaves behind, heat above all, is not always
    the same contender's to bear."""
    names, shuffled = list(runs), random.Random(1)
    begin = time.perf_counter()
    clock.round(runs.values())  # to warm up
    clock.round(runs.values())
    times = {name: [] for name in names}
    repeats = 0
    while repeats < most and (repeats < least or time.perf_counter() - begin < seconds):
        order = shuffled.sample(names, len(names))
        for name, value in zip(order, clock.round([runs[name] for name in order])):
            times[name].append(value)
        repeats += 1
    return {name: statistics.median(values) for name, values in times.items()}, repeats


# ---- One row ------------------------------------------------------------------------------------------

def make_inputs(r, device, seed, bshd):
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads, seq):
        shape = (r["batch"], seq, heads, r["dim"]) if bshd else (r["batch"], heads, seq, r["dim"])
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(DTYPES[r["dtype"]])
        return x.transpose(1, 2) if bshd else x

    return [normal(r["heads"], r["seq_q"]), normal(r["heads_kv"], r["seq_k"]), normal(r["heads_kv"], r["seq_k"]),
            normal(r["heads"], r["seq_q"])]


def repeats_itself(ours, times=3):
    """Complaints where gradients are not the same, bit for bit, every time."""
    first, complaints = None, []
    for _ in range(times):
        ours.run("backward")
        got = {name: ours.out[name].clone() for name in ("dq", "dk", "dv")}
        first = first or got
        complaints += [f"{name}: not the same every time, though deterministic" for name in got
                       if not torch.equal(first[name].view(torch.int8), got[name].view(torch.int8))]
    return sorted(set(complaints))


def compare(r, cuflash, builds, clock, options, device, seconds):
    """Gives a list of results, one a pass, and of complaints; `builds`: of cuflash, that are timed too."""
    inputs = make_inputs(r, device, options.seed, options.layout == "bshd")
    ours = Ours(cuflash, inputs, r, options.deterministic)
    backward = "backward" in options.passes
    ordered = Ours(cuflash, inputs, r, True) if backward and device == "cuda" and not options.deterministic else None
    theirs = {build.name: Ours(build, inputs, r, options.deterministic) for build in builds}
    for build in (ours, *theirs.values()):
        build.run("forward")
        if backward:
            build.run("backward")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in options.peers:
            kind = FlashAttention3 if name == "fa3" else Theirs
            contender = kind.__new__(kind)
            try:
                contender.__init__(name, inputs, r)
                contender.run("forward")
            except RuntimeError as error:  # it does not take the problem
                if "out of memory" in str(error):
                    print(f"  {name}: out of memory", file=sys.stderr)
                continue
            theirs[name] = contender
            if backward:
                try:
                    contender.run("backward")
                except RuntimeError:
                    contender.gradients = None
    if device == "cuda":
        torch.cuda.synchronize()
    errors, complaints = ({}, []) if options.no_check else check(r, inputs, ours, theirs, backward)
    if ordered:
        ordered.run("forward")
        complaints += repeats_itself(ordered)
    results = []
    for which in options.passes:
        contenders = {"cuflash": ours, **{name: x for name, x in theirs.items()
                                          if which == "forward" or isinstance(x, Ours) or x.gradients is not None}}
        if ordered and which == "backward":
            contenders[ORDERED] = ordered
        times, repeats = {}, 0
        if not options.check_only:
            runs = {name: (lambda x=x: x.run(which)) for name, x in contenders.items()}
            times, repeats = measure(clock, runs, seconds / len(options.passes), options.repeats, options.most)
        result = {**r, "pass": which, "kernel": cuflash.kernel(which, ours.problems[which]), "repeats": repeats,
                  "contenders": {}}
        for name in contenders:
            entry = {}
            if name in times:
                entry = {"ms": times[name] * 1e3, "tflops": operations(r, which) / times[name] * 1e-12}
            mine = [error for output, error in errors.get(name, {}).items() if NAMES[output] == which]
            if mine:
                entry["error"] = max(mine) if all(map(math.isfinite, mine)) else None  # JSON knows no NaN
            result["contenders"][name] = entry
        others = [x["ms"] for name, x in result["contenders"].items() if name in PEERS and "ms" in x]
        if times and others:
            result["ratio"] = min(others) / (times["cuflash"] * 1e3)
        results.append(result)
    return results, complaints


# ---- All of them --------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(item) for item in text.split(",")]
    words = lambda text: text.split(",")
    parser.add_argument("--rows", type=words, help=f"of {', '.join(ROWS)} and all ({', '.join(ALL)}); default: targets, or cpu")
    parser.add_argument("--shape", type=numbers, action="append", default=[], help="a row of your own: B,H,HKV,S,D[,SQ]")
    parser.add_argument("--dtype", type=words, help="of float32, float16, bfloat16: only (for --shape: all of) these")
    parser.add_argument("--dim", type=numbers, help="only these head dimensions")
    parser.add_argument("--seq", type=numbers, help="only these numbers of keys")
    parser.add_argument("--causal", choices=["yes", "no"], help="only (not) causal ones")
    parser.add_argument("--passes", type=words, default=["forward", "backward"], help="default: forward,backward")
    parser.add_argument("--peers", type=words, help=f"of {', '.join(PEERS)}; default: all there are but math")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="on the CPU; default: what PyTorch takes")
    parser.add_argument("--layout", choices=["bhsd", "bshd"], default="bhsd", help="in memory; default: bhsd")
    parser.add_argument("--deterministic", action="store_true", help="cuflash's deterministic backward")
    parser.add_argument("--budget", type=float, default=240, help="seconds for everything; rows share it (default: 240)")
    parser.add_argument("--repeats", type=int, default=5, help="the least, whatever the budget (default: 5)")
    parser.add_argument("--most", type=int, default=60, help="the most (default: 60)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the inputs; default: the time")
    parser.add_argument("--check-only", action="store_true", help="no timing")
    parser.add_argument("--no-check", action="store_true", help="timing alone")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument("--library", action="append", default=[], help="the libcuflash.so to use; further ones are timed beside it")
    options = parser.parse_args()
    for name, allowed in (("rows", [*ROWS, "all"]), ("dtype", DTYPES), ("passes", ["forward", "backward"]), ("peers", PEERS)):
        wrong = [item for item in getattr(options, name) or [] if item not in allowed]
        if wrong:
            parser.error(f"--{name}: expected some of {', '.join(allowed)}, got '{wrong[0]}'")
    if "fa3" in (options.peers or []) and not HAVE_FA3:
        parser.error("--peers: fa3 needs the package of FlashAttention-3, flash_attn_interface, which is not installed")
    if any(len(shape) not in (5, 6) for shape in options.shape):
        parser.error("--shape: expected B,H,HKV,S,D or B,H,HKV,S,D,SQ")
    cpu = options.device == "cpu"
    options.peers = options.peers or (["flash"] if cpu else ["flash", "cudnn", "efficient"] + ["fa3"] * HAVE_FA3)
    options.rows = options.rows or ([] if options.shape else ["cpu" if cpu else "targets"])
    return options, parser


def choose(options):
    rows = []
    for name in options.rows:
        rows += sum((ROWS[each] for each in ALL), []) if name == "all" else ROWS[name]
    for batch, heads, heads_kv, seq, dim, *seq_q in options.shape:
        rows += [row(dtype, dim, seq, batch, heads, causal, heads_kv, *seq_q) for dtype in options.dtype or ["bfloat16"]
                 for causal in (False, True)]
    return [r for r in rows if (not options.dtype or r["dtype"] in options.dtype) and (not options.dim or r["dim"] in options.dim)
            and (not options.seq or r["seq_k"] in options.seq)
            and (not options.causal or r["causal"] == (options.causal == "yes"))]


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def show(result, builds, peers, unit, ordered):
    def figure(name):
        entry = result["contenders"].get(name, {})
        return f"{entry['tflops'] * unit:9.1f}" if "tflops" in entry else f"{'-':>9}"

    def error(names):
        values = [entry["error"] for entry in map(result["contenders"].get, names) if entry and entry.get("error") is not None]
        return f"{min(values):9.1e}" if values else f"{'-':>9}"

    ratio = f"{result['ratio']:7.2f}" if "ratio" in result else f"{'-':>7}"
    print(f"{describe(result)} {result['pass']:8} {figure('cuflash')}{figure(ORDERED) if ordered else ''}"
          f"{''.join(figure(build.name) for build in builds)}{''.join(figure(name) for name in peers)} {ratio} "
          f"{error(['cuflash'])}{error(peers)}", flush=True)


def summary(results):
    """Lines that end with the worst row, and the same as a table."""
    rated = [r for r in results if "ratio" in r]
    if not rated:
        return [], {}
    lines, table = [], {}
    for which in ("forward", "backward"):
        ratios = [r["ratio"] for r in rated if r["pass"] == which]
        if ratios:
            table[which] = geometric_mean(ratios)
            ahead = sum(ratio >= 1 for ratio in ratios)
            lines.append(f"{which}: geometric mean {table[which]:.3f} of the best peer's speed, ahead in {ahead} of {len(ratios)} rows")
    costs = [x["cuflash"]["ms"] / x[ORDERED]["ms"] for x in (r["contenders"] for r in rated) if ORDERED in x]
    if costs:
        table[ORDERED], table["least_" + ORDERED] = geometric_mean(costs), min(costs)
        lines.append(f"deterministic: geometric mean {table[ORDERED]:.3f} of the other mode's speed, at least {min(costs):.3f}")
    worst = min(rated, key=lambda r: r["ratio"])
    table["worst"] = worst["ratio"]
    lines.append(f"worst row: {' '.join(describe(worst).split())} {worst['pass']}: {worst['ratio']:.3f}")
    return lines, table


def main():
    options, parser = parse()
    rows = choose(options)
    if not rows:
        parser.error("no row is left by these choices")
    here = os.path.dirname(os.path.abspath(__file__))
    usual = os.environ.get("CUFLASH_LIB") or os.path.normpath(os.path.join(here, "..", "build", "release", "libcuflash.so"))
    cuflash, *builds = [Cuflash(path) for path in options.library or [usual]]
    names = ["cuflash", ORDERED, *PEERS, *(build.name for build in builds)]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"--library: two contenders would be called '{name}', the first 8 letters of a file or its folder")
    head = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "torch": torch.__version__,
            "cuflash": cuflash.lib.cuflash_version().decode(), "seed": options.seed, "layout": options.layout}
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("compare_torch.py: PyTorch sees no CUDA device here (--device cpu runs on the CPU)")
        torch.cuda.set_device(0)
        torch.backends.cuda.matmul.allow_tf32 = False
        head.update(device=torch.cuda.get_device_name(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
        clock, unit = CudaClock(), 1
    else:
        threads = options.threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        cuflash.check(cuflash.lib.cuflash_set_num_threads(threads))
        head.update(device=cpu_name(), isa=cuflash.lib.cuflash_cpu_isa().decode(), threads=threads)
        clock, unit = CpuClock(), 1000
    ordered = options.device == "cuda" and "backward" in options.passes and not options.deterministic
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    print(f"{'dtype':8} {'dim':>4} {'causal':6} {'seq':>8} {'BxH':>8} {'pass':8} {'cuflash':>9}{'ordered':>9}"[:None if ordered else -9]
          + "".join(f"{build.name:>9}" for build in builds)
          + "".join(f"{name:>9}" for name in options.peers) + f" {'ratio':>7} {'error':>9}{'of peers':>9}", flush=True)
    begin, results, wrong, left_out = time.perf_counter(), [], [], 0
    for i, r in enumerate(rows):
        left = options.budget - (time.perf_counter() - begin)
        if left < -0.25 * options.budget:
            left_out = len(rows) - i
            break
        print(f"  {i + 1} of {len(rows)}: {' '.join(describe(r).split())}", file=sys.stderr, flush=True)
        try:
            of_row, complaints = compare(r, cuflash, builds, clock, options, options.device, max(0, left) / (len(rows) - i))
        except RuntimeError as error:
            if options.device == "cuda" and "out of memory" not in str(error).lower():
                with contextlib.suppress(Exception):
                    torch.cuda.synchronize()
            of_row, complaints = [], [str(error)]
        for result in of_row:
            show(result, builds, options.peers, unit, ordered)
            results.append(result)
        for complaint in complaints:
            wrong.append({**r, "complaint": complaint})
            print(f"  WRONG: {' '.join(describe(r).split())}: {complaint}", flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    lines, table = summary(results)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**head, "left_out": left_out, "wrong": wrong, "summary": table, "rows": results}, file, indent=1)
            file.write("\n")
    print(f"\n{'GFLOP/s' if options.device == 'cpu' else 'TFLOP/s'}; {'ordered: deterministic; ' if ordered else ''}ratio: of "
          "the best peer's time to ours; error: of the norm, the largest of the pass's outputs, and the best peer's")
    if left_out:
        print(f"{left_out} of {len(rows)} rows were left out: the budget of {options.budget:.0f} seconds was spent")
    for line in lines:
        print(line)
    if not options.no_check:
        print("all results are right" if not wrong else f"{len(wrong)} results are WRONG")
    return 1 if wrong else 0


def cpu_name():
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return "unknown CPU"


if __name__ == "__main__":
    sys.exit(main())
