#!/usr/bin/env python3
"""Attention on NumPy arrays, or PyTorch tensors on a GPU, through cuflash's C functions, with ctypes alone: forward and
backward, in float32 and float16, compared with the formulas in float64.

    python3 examples/python_ctypes.py
    python3 examples/python_ctypes.py --device cuda    # needs PyTorch

The library is $CUFLASH_LIB, or build/release/libcuflash.so of this repository. Its functions run where the memory is that
they are given pointers to.
"""
import argparse
import ctypes
import os
import sys

try:
    import numpy as np
except ImportError:
    sys.exit("python_ctypes.py: NumPy is needed (pip install numpy, or apt install python3-numpy)")


def load():
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.environ.get("CUFLASH_LIB") or os.path.join(here, "..", "build", "release", "libcuflash.so")
    if not os.path.exists(path):
        sys.exit(f"python_ctypes.py: {os.path.normpath(path)} is not there: build it (cmake --preset release && "
                 "cmake --build --preset release) or set CUFLASH_LIB")
    lib = ctypes.CDLL(path)
    pointer, sizes = ctypes.c_void_p, [ctypes.c_int] * 4 + [ctypes.c_float, ctypes.c_bool, ctypes.c_void_p]
    for name, arrays in (("forward", 5), ("backward", 9)):
        for dtype in ("f32", "f16"):
            function = getattr(lib, f"cuflash_attention_{name}_{dtype}")
            function.argtypes = [pointer] * arrays + sizes
            function.restype = ctypes.c_int
    lib.cuflash_version.restype = lib.cuflash_last_error.restype = lib.cuflash_status_name.restype = ctypes.c_char_p
    return lib


lib = load()


# What both kinds of arrays are asked for.

def dtype_name(x):
    return str(x.dtype).replace("torch.", "")


def address(x):
    return x.data_ptr() if hasattr(x, "data_ptr") else x.ctypes.data


def is_row_major(x):
    return x.is_contiguous() if hasattr(x, "data_ptr") else x.flags.c_contiguous


def empty(like, shape=None):
    shape = like.shape if shape is None else shape
    return like.new_empty(shape) if hasattr(like, "data_ptr") else np.empty(shape, like.dtype)


def stream_of(x):
    """The CUDA stream that PyTorch works on, so that the call comes after what made x; None for NumPy."""
    if not hasattr(x, "data_ptr"):
        return None
    import torch
    return torch.cuda.current_stream(x.device).cuda_stream


def call(name, arrays, scale, causal):
    """One of the four functions on row-major [batch, heads, seq, dim] arrays of one dtype."""
    suffix = {"float32": "f32", "float16": "f16"}[dtype_name(arrays[0])]
    assert all(is_row_major(x) and x.dtype == arrays[0].dtype for x in arrays)
    status = getattr(lib, f"cuflash_attention_{name}_{suffix}")(
        *(address(x) for x in arrays), *arrays[0].shape, scale, causal, stream_of(arrays[0]))
    if status != 0:
        raise RuntimeError(f"{lib.cuflash_status_name(status).decode()}: {lib.cuflash_last_error().decode()}")


def attention(q, k, v, scale, causal):
    o, lse = empty(q), empty(q, q.shape[:3])
    call("forward", [q, k, v, o, lse], scale, causal)
    return o, lse


def attention_backward(q, k, v, o, lse, d_o, scale, causal):
    dq, dk, dv = empty(q), empty(k), empty(v)
    call("backward", [q, k, v, o, lse, d_o, dq, dk, dv], scale, causal)
    return dq, dk, dv


def formulas(q, k, v, d_o, scale, causal):
    """o, dq, dk and dv in float64."""
    q, k, v, d_o = (x.astype(np.float64) for x in (q, k, v, d_o))
    s = scale * q @ k.swapaxes(-1, -2)
    if causal:
        s = np.where(np.tril(np.ones(s.shape[-2:], bool)), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = p @ v
    ds = p * (d_o @ v.swapaxes(-1, -2) - (d_o * o).sum(-1, keepdims=True))
    return o, scale * ds @ k, scale * ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d_o


def mover(device):
    """Two functions: what puts a NumPy array where it is computed with, and what brings it back."""
    if device == "cpu":
        return (lambda x: x), (lambda x: x)
    try:
        import torch
    except ImportError:
        sys.exit(f"python_ctypes.py: --device {device} needs PyTorch (pip install torch)")
    if not torch.cuda.is_available():
        sys.exit(f"python_ctypes.py: --device {device}: PyTorch finds no CUDA device")
    return (lambda x: torch.from_numpy(x).to(device)), (lambda x: x.cpu().numpy())


def main():
    parser = argparse.ArgumentParser(description="Attention through cuflash's C functions, checked against float64.")
    parser.add_argument("--device", default="cpu", help="cpu (NumPy), or cuda or cuda:N (PyTorch)")
    device = parser.parse_args().device
    there, back = mover(device)
    batch, heads, seq, dim = 2, 4, 300, 64
    scale = 1 / dim ** 0.5
    print(f"cuflash {lib.cuflash_version().decode()} on {device}: batch {batch}, {heads} heads, {seq} tokens, head dim {dim}")
    print(f"{'dtype':8} {'causal':7}" + "".join(f"{name:>10}" for name in ("o", "dq", "dk", "dv")) + "   relative error")
    random, good = np.random.default_rng(42), True
    for dtype, bound in (("float32", 5e-6), ("float16", 2e-3)):
        for causal in (False, True):
            inputs = [random.standard_normal((batch, heads, seq, dim)).astype(dtype) for _ in range(4)]
            q, k, v, d_o = (there(x) for x in inputs)
            o, lse = attention(q, k, v, scale, causal)
            got = o, *attention_backward(q, k, v, o, lse, d_o, scale, causal)
            exact = formulas(*inputs, scale, causal)
            errors = [np.linalg.norm(back(x) - y) / np.linalg.norm(y) for x, y in zip(got, exact)]
            close = all(error <= bound for error in errors)
            good = good and close
            print(f"{dtype:8} {'yes' if causal else 'no':7}" + "".join(f"{error:10.1e}" for error in errors)
                  + ("   ok" if close else f"   MORE THAN {bound}"))
    try:
        attention(q[:, :, :0], k, v, scale, True)
    except (RuntimeError, AssertionError) as error:
        print(f"an empty array: {error}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
