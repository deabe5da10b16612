"""Every CUDA kernel compiles to PTX and assembles, without a GPU: no spills, no local memory where there must
be none.

What is checked in the PTX-grade kernels is what their speed rests on: accumulators in registers, tensor-core
instructions, 16-byte copies. Whether they compute the right thing is for tests/gpu, on a GPU.
"""

import os
import re
import types as types_of_python

import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the simulator compiles nothing", allow_module_level=True)
pytest.importorskip("numba_cuda")
cuda_core = pytest.importorskip("cuda.core")

from numba import cuda  # noqa: E402
from numba.cuda import types  # noqa: E402

from tinyvllm.kernels import (  # noqa: E402
    argmax,
    embedding,
    keep_rows,
    kv_cache,
    residual_add,
    rms_norm,
    roofs,
    rope,
    sampling,
    silu_mul,
    softmax,
    spin,
)
from tinyvllm.kernels.attention import (  # noqa: E402
    combine,
    decode,
    decode_registers,
    decode_simple,
    pool,
    prefill,
    prefill_simple,
    prefill_wgmma,
)
from tinyvllm.kernels.attention import rows as attention_rows  # noqa: E402
from tinyvllm.kernels.cuda_cache import CudaKernelCache, constants  # noqa: E402
from tinyvllm.kernels.fused import draw, greedy, key_bins, rope_write, rows, take_sampled, thresholds  # noqa: E402
from tinyvllm.kernels.gemm import cublas, few_rows, gemv, naive, skinny, tensor_core, tiled, wgmma  # noqa: E402

CAPABILITIES = [(8, 0), (9, 0)]


def arrays(text):
    """Argument types from a short text: u2 = uint16 [., .], i1 = int32 [.], b1 = uint8 [.], ...; lower-case words are
    scalars."""
    kinds = {"b": types.uint8, "u": types.uint16, "i": types.int32, "f": types.float32, "d": types.uint64,
             "l": types.int64}
    scalars = {"int": types.int64, "float": types.float32}
    return [scalars[word] if word in scalars else types.Array(kinds[word[0]], int(word[1]), "C")
            for word in text.split()]


LESSON = {"gather": (embedding._gather_kernel, "u2 u2 i1"),
          "residual_add": (residual_add._residual_add_kernel, "u2 u2"),
          "silu_mul": (silu_mul._silu_mul_kernel, "u2 u2"),
          "rms_norm_tree": (rms_norm._rms_norm_tree_kernel, "u2 u2 u1 float"),
          "rms_norm": (rms_norm._rms_norm_kernel, "u2 u2 u1 float"),
          "add_rms_norm": (rms_norm._add_rms_norm_kernel, "u2 u2 u2 u1 float"),
          "rope": (rope._rope_kernel, "u2 i1 u2 int int"),
          "write_kv": (kv_cache._write_kv_kernel, "u4 u4 u2 i1 int int int int"),
          "argmax": (argmax._argmax_kernel, "i1 u2"),
          "sample": (sampling._sample_kernel, "i1 u2 f1 i1 f1 d1 l1"),
          "softmax_naive": (softmax._softmax_naive_kernel, "f2 f2"),
          "softmax_online": (softmax._softmax_online_kernel, "f2 f2"),
          "gemm_naive": (naive._naive_kernel, "u2 u2 u2 u1"),
          "gemm_tiled": (tiled._tiled_kernel, "u2 u2 u2 u1"),
          "cublas_bias": (cublas._fill_rows_kernel, "u2 u1"),
          "prefill_simple": (prefill_simple._prefill_simple_kernel,
                             "u2 u2 u4 u4 i2 i1 i1 int float int int int int"),
          "decode_simple": (decode_simple._decode_simple_kernel,
                            "f1 u2 u4 u4 i2 i1 int float int int int int"),
          "keep_rows": (keep_rows._keep_rows_kernel, "u3 int u2 i1"),
          "attention_rows": (attention_rows._attention_rows_kernel, "f4 f4 u3 u5 i1 i1 i1 i1 float"),
          "pool_uint8": (pool._pool_uint8_kernel, "b2 f2"),
          "combine": (decode_simple.combine_kernel, "u2 f1 i1 int int int int int"),}

TENSOR_CORE = {**{f"gemm_{tile[0]}x{tile[1]}": lambda tile=tile: tensor_core.tensor_core_kernel(*tile)
                  for tile in tensor_core.TILES},
               **{f"prefill_{d}": lambda d=d: prefill.prefill_kernel(d) for d in (32, 64, 80, 96, 128)},
               **{f"decode_{d}": lambda d=d: decode.decode_kernel(d) for d in (32, 64, 80, 96, 128)}}
GEMV = {f"gemv_{rows}": lambda rows=rows: gemv.gemv_kernel(rows) for rows in range(1, gemv.MAX_ROWS + 1)}


# (kernel, whether it takes part in programmatic dependent launch), at the sizes of Llama 3.2 1B and at odd ones
POINTWISE = {"gather_rows": lambda d: rows.gather_rows_kernel(2048, d),
             "norm": lambda d: rows.norm_rows_kernel(2048, d),
             "norm_200": lambda d: rows.norm_rows_kernel(200, d), "gate_rows": lambda d: rows.gate_rows_kernel(8192, d),
             "add_rows": lambda d: rows.add_rows_kernel(2048, d),
             "take_sampled": lambda d: take_sampled.take_sampled_kernel(d),
             "keep_rows": lambda d: rows.keep_rows_kernel(2048, d),
             "keep_rows_200": lambda d: rows.keep_rows_kernel(200, d, 75),
             **{f"rope_write_{n}": lambda d, n=n: rope_write.rope_write_kernel(n, d) for n in (32, 64, 80, 128)},
             "best_of_parts": lambda d: greedy.best_of_parts_kernel(d),
             "best_of_row": lambda d: greedy.best_of_row_kernel(d),
             "count": key_bins.count_kernel, "find": thresholds.find_kernel, "draw": draw.draw_kernel,
             "choose": draw.choose_kernel,
             **{f"decode_{n}": lambda d, n=n: decode.decode_kernel(n, d, 2, 16) for n in (32, 64, 80, 128)},
             **{f"combine_{n}": lambda d, n=n: combine.combine_parts_kernel(n, d) for n in (64, 80, 128)}}
# (head_dim, query heads a key head, warps): every number of warps that may be chosen, for both numbers of registers
DECODE = [*((64, 4, warps) for warps in (16, 8, 4, 2)), *((128, 4, warps) for warps in (8, 4, 2)),
          (64, 1, 16), (64, 7, 2), (64, 12, 8), (64, 40, 4), (128, 8, 8)]
FEW_ROWS = {f"few_rows_{n}_{depth}_{after}": lambda d, n=n, depth=depth, norm=norm, after=after, size=size:
            few_rows.few_rows_kernel(n, depth, norm, after, size, d)
            for n in (1, 8)
            for depth, norm, after, size in (
                (2048, True, "rope", 64), (2048, True, "silu", 0), (2048, True, "plain", 0), (2048, False, "add", 0),
                (8192, False, "add", 0), (200, True, "rope", 80), (4096, True, "rope", 128))}
NARROW = {f"few_rows_{n}_narrow_{after}": lambda d, n=n, after=after: few_rows.few_rows_kernel(
    n, 8192, False, after, 0, d, True) for n in (1, 2) for after in ("add", "plain")}


LAYER = {"qkv": (3072, 2048, "rope", 64), "o": (2048, 2048, "add", 0), "gate_up": (16384, 2048, "silu", 0),
         "down": (2048, 8192, "add", 0), "lm_head": (128256, 2048, "plain", 0), "head_128": (6144, 4096, "rope", 128)}
HOPPER = {**{f"skinny_{name}_{rows}": lambda rows=rows, n=n, k=k, after=after, size=size: skinny.skinny_kernel(
             *skinny.choose_shape(rows, n, k, size, 132), after, size)
             for name, (n, k, after, size) in LAYER.items() for rows in (16, 64, 128, 192, 256)},
          **{f"skinny_{'_'.join(map(str, shape))}_{after}": lambda shape=shape, after=after: skinny.skinny_kernel(
              *shape, after, 64 if after == "rope" else 0)
             for shape in ((64, 32, 4, 1, 4, 1), (128, 128, 3, 2, 4, 2), (192, 128, 4, 4, 2, 1), (128, 256, 4, 4, 2, 1))
             for after in ("plain", "add", "silu", "rope")},
          **{f"wgmma_{n}_{after}": lambda n=n, after=after: wgmma.wgmma_kernel(n, after)
             for n, after in ((256, "plain"), (256, "silu"), (192, "plain"), (128, "add"), (256, "add"))},
          **{f"prefill_{d}_{group}_{page}": lambda d=d, group=group, page=page: prefill_wgmma.prefill_wgmma_kernel(
             d, group, page, *prefill_wgmma.choose_shape(d, page))
             for d, group, page in ((64, 4, 16), (64, 7, 16), (64, 1, 64), (128, 4, 16), (128, 8, 32))},
          # other shapes of tile that fit, to be compared with those
          "prefill_64_two": lambda: prefill_wgmma.prefill_wgmma_kernel(64, 4, 32, 1, 96, 3, 2),
          "prefill_64_three": lambda: prefill_wgmma.prefill_wgmma_kernel(64, 4, 16, 3, 48, 6, 1),
          "prefill_128_shorter": lambda: prefill_wgmma.prefill_wgmma_kernel(128, 4, 16, 2, 64, 5, 1)}


def assemble(kernel, signature, capability, overlapped=False):
    """(PTX, registers a thread, bytes of spills, bytes of stack) of a kernel. overlapped: its wgmma products must be
    able to run beside other work, which the assembler gives up for a call (a division is one) or too few registers."""
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=capability, **kernel.options)
    options = cuda_core.LinkerOptions(arch="sm_" + "".join(map(str, capability)), ptxas_options=["-v"])
    linker = cuda_core.Linker(cuda_core.ObjectCode.from_ptx(ptx.encode()), options=options)
    linker.link("cubin")
    log = linker.get_info_log()
    numbers = [int(n)
               for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores",
                               r"(\d+) bytes spill loads", r"(\d+) bytes stack frame")
               for n in re.findall(pattern, log)[:1]]
    assert len(numbers) == 4, f"the assembler's report has changed:\n{log}"
    assert not overlapped or "serialized" not in log, log
    registers, stores, loads, stack = numbers
    return ptx, registers, stores + loads, stack


@pytest.mark.parametrize("name", LESSON)
def test_lesson_grade_kernels_compile_for_a_gpu_too(name):
    kernel, signature = LESSON[name]
    _, registers, spills, stack = assemble(kernel, types.void(*arrays(signature)), CAPABILITIES[0])
    assert spills == 0
    assert registers * kernel.options.get("launch_bounds", (256,))[0] <= 65536
    # The sampler indexes 16 counters of 8 bytes by a key's digit, which registers cannot do: for top-k, for
    # top-p.
    assert stack == (256 if name == "sample" else 0)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("name", [*TENSOR_CORE, *GEMV])
def test_ptx_grade_kernels_keep_everything_in_registers(name, capability):
    kernel = {**TENSOR_CORE, **GEMV}[name]()
    ptx, registers, spills, stack = assemble(kernel, kernel.numba_signature(), capability)
    assert spills == 0 and stack == 0 and ".local" not in ptx
    assert registers * kernel.options["launch_bounds"][0] * kernel.options["launch_bounds"][1] <= 65536
    if name in TENSOR_CORE:
        assert "mma.sync.aligned.m16n8k16" in ptx and "cp.async.cg.shared.global" in ptx
        assert kernel.shared_bytes <= 48 * 1024, "more needs a call to the driver"
    else:
        assert "ld.global.nc.L1::no_allocate.L2::128B.v4.b32" in ptx


@pytest.mark.parametrize("dependent, capability", [(False, (8, 0)), (True, (9, 0))], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", [*POINTWISE, *FEW_ROWS, *NARROW])
def test_fused_kernels_keep_everything_in_registers(name, dependent, capability):
    kernel = {**POINTWISE, **FEW_ROWS, **NARROW}[name](dependent)
    ptx, registers, spills, stack = assemble(kernel, kernel.numba_signature(), capability)
    assert spills == 0 and stack == 0 and ".local" not in ptx
    threads, blocks = kernel.options["launch_bounds"]
    assert registers * threads * blocks <= 65536
    assert ("griddepcontrol.wait" in ptx) == ("griddepcontrol.launch_dependents" in ptx) == dependent
    if name.startswith("few_rows"):
        loads = ptx.index("ld.global.nc.L1::no_allocate.L2::128B.v4.b32")
        assert "mma.sync.aligned.m16n8k16" in ptx
        assert not dependent or loads < ptx.index("griddepcontrol.wait"), "weights are asked for before the wait"
        assert ptx.index("mma.sync") > loads
    if dependent:  # nothing is written before the kernels ahead have ended
        assert "st.global" not in ptx[:ptx.index("griddepcontrol.wait")]


def test_the_draw_multiplies_a_logit_s_random_words_in_one_instruction_each():
    """16 of philox's 20: two are the same for all of a row, two do not matter for the upper word. And no float64."""
    kernel = draw.draw_kernel(True)
    ptx = assemble(kernel, kernel.numba_signature(), (9, 0))[0]
    scan = ptx[ptx.index("ld.global.v4.b32"):].split("lg2.approx")
    for part in scan[:2]:
        assert part.count("mul.wide.u32 p,") == 16 and "mul.lo.s64" not in part and "f64" not in part
        assert "cvt.rn.f32.u32" in part


@pytest.mark.parametrize("head_dim, group, warps", DECODE)
def test_decode_kernels_keep_what_is_on_its_way_in_registers(head_dim, group, warps):
    kernel = decode_registers.decode_registers_kernel(head_dim, group, 16, warps)
    ptx, registers, spills, stack = assemble(kernel, kernel.numba_signature(), (9, 0))
    assert spills == 0 and stack == 0 and ".local" not in ptx
    threads, blocks = kernel.options["launch_bounds"]
    assert threads * blocks == 32 * decode_registers.warps_at_once(head_dim, group)
    assert registers * threads * blocks <= 65536
    assert blocks * (kernel.shared_bytes + 1024) <= 228 * 1024 * decode_registers.SHARED_PERCENT // 100
    assert not re.search(r"\.f64\b", ptx) and "mma.sync.aligned.m16n8k16" in ptx and "movmatrix" in ptx
    load = "ld.global.L1::no_allocate.L2::128B.v4.b32"
    assert load in ptx[:ptx.rindex("griddepcontrol.wait")], "old keys are asked for before the wait"
    assert ptx.count(load) == 4 * head_dim // 8, "two tiles, in two places"
    assert "st.global" not in ptx[:ptx.index("griddepcontrol.wait")]


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_kernels_keep_their_sums_in_registers(name):
    kernel = HOPPER[name]()
    ptx, registers, spills, stack = assemble(kernel, kernel.numba_signature(), (9, 0, "a"), overlapped=True)
    assert spills == 0 and stack == 0 and ".local" not in ptx
    threads, blocks = kernel.options["launch_bounds"]
    warps = -(-threads // 32 * blocks // 4)  # on each of a multiprocessor's four parts, which has 16,384 registers
    assert warps * 32 * registers <= 16384
    assert blocks * (kernel.shared_bytes + 1024) <= 228 * 1024, "more than a multiprocessor's shared memory"
    assert "wgmma.mma_async.sync.aligned.m64n" in ptx and "cp.async.bulk.tensor.2d.shared::cluster" in ptx
    if name.startswith("skinny"):
        assert ptx.index("cp.async.bulk.tensor") < ptx.index("griddepcontrol.wait"), "weights are asked for before it"
        shared = kernel.x_rows * 2 <= kernel.tile[1]
        assert (".multicast::cluster" in ptx) == ("mbarrier.arrive.shared::cluster" in ptx) == shared
    # Of what the assembler makes a barrier for all of the GPU's memory, there is nothing but the exchange of sums.
    barriers = re.findall(r"\S*(?:release|acq_rel|sc)\.(?:cluster|gpu|sys)\S*|fence\.proxy\.async;|membar\S*", ptx)
    assert set(barriers) == {"fence.mbarrier_init.release.cluster;"}, "which alone costs nothing"
    exchanges = int(name.startswith("skinny") and kernel.cluster * kernel.x_rows > kernel.tile[1])
    assert ptx.count("barrier.cluster.arrive.release") == exchanges


@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_computes_exponentials_while_products_are_under_way(head_dim):
    """In PTX none of them has moved behind the wait for the outputs, nor scores ahead of the one for them."""
    kernel = prefill_wgmma.prefill_wgmma_kernel(head_dim, 4, 16, *prefill_wgmma.choose_shape(head_dim))
    scores = prefill_wgmma.choose_shape(head_dim)[1] // 2
    ptx = assemble(kernel, kernel.numba_signature(), (9, 0, "a"))[0]
    loop = ptx.split("wgmma.wait_group.sync.aligned 1;")
    assert len(loop) == 2, "one place waits for one of two products"
    ahead, softmax = loop[0], loop[1].split("wgmma.wait_group.sync.aligned 0;")[0]
    assert softmax.count("ex2.approx") >= scores + 2 and softmax.count("fma.rn") >= scores
    last_two = ahead.split("wgmma.commit_group")[-3:]
    assert all("wgmma.mma_async" in part and "ex2" not in part for part in last_two[1:2])


def test_the_measuring_kernels_do_nothing_but_what_they_measure():
    """Reading in 16 bytes, multiplying in registers, watching the clock; nothing is optimised away."""
    for kernel, instruction, count in (
            (roofs.read_kernel, "ld.global.nc.L1::no_allocate.L2::128B.v4.b32", roofs.UNROLL),
            (roofs.multiply_kernel, "mma.sync.aligned.m16n8k16", roofs.TILES_A_WARP),
            (spin._spin_kernel, "%globaltimer", 2)):
        ptx, _, spills, stack = assemble(kernel, kernel.numba_signature(), CAPABILITIES[0])
        assert spills == 0 and stack == 0 and ".local" not in ptx
        assert ptx.count(instruction) >= count


def test_a_kernel_reads_shared_memory_by_ldmatrix_only_where_banks_cannot_collide():
    """The eight rows of one ldmatrix matrix start in eight different 16-byte columns of the 128-byte wide
    banks."""
    for d in (16, 32, 48, 64, 80, 96, 112, 128):
        pitch = 2 * d + 16  # prefill.py, decode.py
        assert len({row * pitch // 16 % 8 for row in range(8)}) == 8
    for first in range(0, 16, 8):  # tensor_core.py's swizzle
        for chunk in range(4):
            places = {(row * 64 + (chunk ^ (row // 2 % 4)) * 16) // 16 % 8 for row in range(first, first + 8)}
            assert len(places) == 8


def test_kernels_of_one_source_are_told_apart_on_disk():
    """Their entries in the cache have other names, also where only a part of a part was generated otherwise."""
    made = [make() for table in (HOPPER, TENSOR_CORE, GEMV) for make in table.values()]
    made += [make(dependent) for table in (POINTWISE, FEW_ROWS) for make in table.values()
             for dependent in (False, True)]
    codegen = types_of_python.SimpleNamespace(magic_tuple=lambda: ())
    names: dict = {}
    for kernel in made:
        path, _ = CudaKernelCache(kernel.py_func, kernel.options)._entry(kernel.numba_signature(), codegen)
        names.setdefault(path.name, set()).add(kernel.py_func)
    assert len(names) > 100 and all(len(functions) == 1 for functions in names.values())


def test_what_a_kernel_cannot_be_told_by_is_refused():
    unknown = object()

    def kernel():
        return unknown

    with pytest.raises(TypeError, match="has unknown, of type object"):
        constants(kernel)
