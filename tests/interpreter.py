"""Makes TRITON_INTERPRET=1 fit for testing kernels on a CPU (triton 3.6 to 3.9).

As it comes, the interpreter multiplies the raw bits of bf16 in `tl.dot`, truncates where a GPU rounds, computes bf16
sums on bits, lets out-of-bounds accesses crash the process or pass, and hides races, as it runs programs one after
another. `install` replaces these parts: bf16 goes through fp32 in dots and casts, other bf16 arithmetic is refused, and
every access is checked against the tensors of the launch and the accesses of its other programs.
"""

import dataclasses

import numpy as np


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, as a GPU does."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patch triton's interpreter; to be called once, after TRITON_INTERPRET=1 is set and before the first launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def is_bf16(x) -> bool:
        return getattr(x.dtype, "scalar", x.dtype) == tl.bfloat16

    def upcast(x):
        return handle(bf16_to_fp32(x.data), tl.float32) if is_bf16(x) else x

    def create_dot(self, a, b, d, *rest):
        return dot(self, upcast(a), upcast(b), d, *rest)

    def cast_impl(self, x, dtype):
        if is_bf16(x) and dtype.scalar != tl.bfloat16 and not dtype.scalar.is_int():
            x = upcast(x)
            return x if dtype.scalar == tl.float32 else cast(self, x, dtype)
        if dtype.scalar == tl.bfloat16 and not is_bf16(x):
            return handle(fp32_to_bf16(x.data.astype(np.float32)), tl.bfloat16)
        return cast(self, x, dtype)

    def create_fp_to_fp(self, x, dtype, rounding_mode=None):
        if is_bf16(x) or dtype.scalar == tl.bfloat16:
            return self.cast_impl(x, dtype)
        return fp_to_fp(self, x, dtype, rounding_mode)

    def refuse_bf16(operation, operands: int):
        def checked(self, *args):
            if any(is_bf16(x) for x in args[:operands]):
                raise TypeError("bf16 arithmetic in the interpreter works on raw bits: cast to fp32 first")
            return operation(self, *args)

        return checked

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp"):
        setattr(builder, name, lambda self, x, dtype, *_: self.cast_impl(x, dtype))
    builder.binary_op = refuse_bf16(builder.binary_op, 2)
    builder.unary_op = refuse_bf16(builder.unary_op, 1)

    # triton 3.6 with numpy >= 2.4: a loop bound or condition that is an array of one element.
    patch_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *args):
        result = patch_tensor(tensor, *args)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        tensor.__bool__ = lambda self: bool(np.all(self.handle.data))
        return result

    interpreter._patch_lang_tensor = _patch_lang_tensor

    # The language is patched once for a launch, not at every call of a device function.
    patch_lang, scopes = interpreter._patch_lang, {}

    def _patch_lang(fn):
        seen = frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
        if seen not in scopes:
            scopes[seen] = patch_lang(fn)
        return scopes[seen]

    interpreter._patch_lang = _patch_lang
    init_args = interpreter.GridExecutor._init_args_hst

    def _init_args_hst(self, args, kwargs):
        scopes.clear()
        return init_args(self, args, kwargs)

    interpreter.GridExecutor._init_args_hst = _init_args_hst

    # One element at a time, this reduction of `tl.sort` would take most of the tests' time.
    generic_reduce = interpreter.ReduceOps.generic_reduce

    def reduce(self, tensors):
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return generic_reduce(self, tensors)
        (x,) = tensors
        return [self.to_tensor(np.bitwise_xor.reduce(x.handle.data, self.axis, keepdims=self.keep_dims), x.dtype)]

    interpreter.ReduceOps.generic_reduce = reduce
    # It computes in vain whether integers overflow, as only debugging would tell.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    check_accesses(interpreter)


def check_accesses(interpreter) -> None:
    """Raise IndexError for an access outside of every tensor of the launch, and RuntimeError where a program writes
    what another of the launch has read or written, or reads what another has written: on a GPU their order is open."""
    starts = ends = first_slot = np.zeros(0, np.int64)
    writer = reader = np.zeros(0, np.int32)  # of every two bytes of the tensors: a program, `nobody` or `several`
    programs = {}
    nobody, several = -1, -2
    init_args = interpreter.GridExecutor._init_args_hst

    def _init_args_hst(self, args, kwargs):
        nonlocal starts, ends, first_slot, writer, reader
        args, kwargs = init_args(self, args, kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if hasattr(x, "data_ptr") and x.numel()]
        merged = []  # views of one storage overlap
        for start, end in sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        starts, ends = np.array(merged, np.int64).T
        slots = (ends - starts) // 2 + 1
        first_slot = np.cumsum(slots) - slots
        writer, reader = np.full((2, slots.sum()), nobody, np.int32)
        programs.clear()
        return args, kwargs

    def check(name, builder, pointer, mask):
        address = np.asarray(pointer.data).astype(np.int64).reshape(-1)
        active = np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(pointer.data)).reshape(-1)
        address = address[active]
        size = max(pointer.get_element_ty().primitive_bitwidth // 8, 1)
        tensor = np.searchsorted(starts, address, side="right") - 1
        outside = (tensor < 0) | (address + size > ends[np.maximum(tensor, 0)])
        if outside.any():
            raise IndexError(f"{name}: {int(outside.sum())} of {address.size} active lanes out of bounds")
        slot = first_slot[tensor] + (address - starts[tensor]) // 2
        program = programs.setdefault(tuple(builder.grid_idx), len(programs))
        for others in (writer,) if name == "load" else (writer, reader):
            taken = (others[slot] != nobody) & (others[slot] != program)
            if taken.any():
                what = "written" if others is writer else "read"
                raise RuntimeError(f"{name}: {int(taken.sum())} active lanes on what another program has {what}")
        if name == "store":
            writer[slot] = program
        else:
            before = reader[slot]
            reader[slot] = np.where((before == nobody) | (before == program), program, several)

    load, store = (getattr(interpreter.InterpreterBuilder, f"create_masked_{name}") for name in ("load", "store"))

    def create_masked_load(self, pointer, mask, *rest, **options):
        check("load", self, pointer, mask)
        return load(self, pointer, mask, *rest, **options)

    def create_masked_store(self, pointer, value, mask, *rest, **options):
        check("store", self, pointer, mask)
        return store(self, pointer, value, mask, *rest, **options)

    interpreter.GridExecutor._init_args_hst = _init_args_hst
    interpreter.InterpreterBuilder.create_masked_load = create_masked_load
    interpreter.InterpreterBuilder.create_masked_store = create_masked_store
