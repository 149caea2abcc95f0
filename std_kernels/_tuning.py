"""The frozen launch table: the tile sizes each kernel runs with, and how each row is known.

A row is chosen from the op, the architecture, the precision and the head dim, and the split
length from B, Hkv and the cache's capacity as well; never from T (int4_linear, which reads no
cache, has a kernel for one row, for few and for many). verify_attention's promise, that a row's
bits do not depend on T, rests on this. Nothing is tuned at run time.

Every row can be compiled without a GPU: an op's kernels and launcher stand in the module
`std_kernels._<op>_kernels`, which has a function `aot_specs(arch, dtype, row)` that returns a
list of `_device.Spec`; dtype is one of `row.dtypes`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

HALF, FLOAT, BF16 = "half", "fp32", "bf16"
ANY = 1 << 62


class Target(NamedTuple):
    """What `triton.backends.compiler.GPUTarget` takes, and what one program may hold."""

    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int  # bytes


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_90": Target("cuda", 90, 32, 232448),
    "sm_100": Target("cuda", 100, 32, 232448),
    "sm_120": Target("cuda", 120, 32, 101376),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}


class Config(NamedTuple):
    """How one kernel is launched."""

    block_m: int  # query rows of a tile
    block_n: int  # keys, list entries or scores of a tile
    split: int  # keys, list entries or scores that one program reads
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """One launch configuration and its source."""

    op: str
    kernel: str
    arch: str  # a key of TARGETS, "default" or "interpreter"
    dtype: str  # HALF or FLOAT, the precision of query and key; BF16, of products
    head_dim: int  # the largest D the row is for; 0 for an op without one
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: tuple[tuple[int, int], ...]  # (largest capacity, split length), ascending
    source: str

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes, as Triton spells them, that the row is used with."""
        return ("fp16", "bf16") if self.dtype == HALF else (self.dtype,)

    def config(self, capacity: int = ANY) -> Config:
        split = next(split for limit, split in self.splits if capacity <= limit)
        return Config(self.block_m, self.block_n, split, self.num_warps, self.num_stages)


# By the keys of all rows and KV heads, B * Hkv * N. Short splits fill the GPU, long ones write
# fewer partials: T * G * (D + 4) * 4 bytes a split and KV head, which the merge reads again. At
# G 7, T 5 and 16 bits what is written is 36 / split of the bytes of K and V. 132 SMs take two
# programs each, and one keeps enough in flight. Estimates, as all split lengths here: none ran.
_VERIFY_SPLITS = (
    (65536, 256), (131072, 768), (262144, 1024), (1 << 20, 2048), (ANY, 4096)
)  # fmt: skip
# By B * Hkv: short lists a program where there are few heads to fill the GPU with.
_SPARSE_SPLITS = ((16, 32), (48, 64), (ANY, 128))
_ESTIMATE = "estimate from bytes, not run"
_AOT = "bf16 or fp32, compiled by Triton 3.7.1 and not run: no spills, "
_AOT_INT4 = "compiled by Triton 3.7.1 and not run: no spills, "
_SMALL = "small, so that small tests have many tiles"

# fmt: off
# Registers of the plain op, with scores, and with every option. The 16-row tile of float32 keeps
# its multiply-adds in registers; on gfx942 a wider tile spills lane masks.
_VERIFY = tuple(Row("verify_attention", "split", *row) for row in (
    # arch, dtype, head_dim, block_m, block_n, num_warps, num_stages, splits, source
    ("sm_80", HALF, 64, 64, 64, 4, 3, _VERIFY_SPLITS,
     _AOT + "184/215/168 registers, 41 KiB, HMMA"),
    ("sm_80", HALF, 128, 64, 32, 4, 3, _VERIFY_SPLITS,
     _AOT + "218/215/200 registers, 52 KiB, HMMA"),
    ("sm_80", HALF, 256, 64, 32, 8, 3, _VERIFY_SPLITS,
     _AOT + "201/211/177 registers, 100 KiB, HMMA"),
    ("sm_80", HALF, 512, 32, 32, 8, 2, _VERIFY_SPLITS,
     _AOT + "173/230/178 registers, 98 KiB, HMMA"),
    ("sm_90", HALF, 64, 64, 64, 4, 3, _VERIFY_SPLITS,
     _AOT + "123/201/123 registers, 57 KiB, HGMMA"),
    ("sm_90", HALF, 128, 64, 64, 4, 3, _VERIFY_SPLITS,
     _AOT + "190/235/170 registers, 113 KiB, HGMMA"),
    ("sm_90", HALF, 256, 64, 32, 8, 3, _VERIFY_SPLITS,
     _AOT + "138/196/135 registers, 129 KiB, HGMMA"),
    ("sm_90", HALF, 512, 32, 32, 8, 2, _VERIFY_SPLITS,
     _AOT + "180/230/179 registers, 98 KiB, HMMA: 64 rows spill with Triton 3.9"),
    ("sm_100", HALF, 64, 64, 64, 4, 3, _VERIFY_SPLITS,
     _AOT + "164/204/166 registers, 58 KiB, tcgen05"),
    ("sm_100", HALF, 128, 64, 64, 4, 3, _VERIFY_SPLITS,
     _AOT + "252/240/210 registers, 114 KiB, tcgen05"),
    ("sm_100", HALF, 256, 64, 64, 8, 2, _VERIFY_SPLITS,
     _AOT + "196/238/182 registers, 162 KiB, tcgen05"),
    ("sm_100", HALF, 512, 32, 32, 8, 2, _VERIFY_SPLITS,
     _AOT + "174/229/179 registers, 98 KiB, HMMA: 64 rows spill"),
    ("sm_120", HALF, 64, 64, 64, 4, 3, _VERIFY_SPLITS,
     _AOT + "176/236/151 registers, 41 KiB, HMMA"),
    ("sm_120", HALF, 128, 64, 32, 4, 2, _VERIFY_SPLITS,
     _AOT + "182/212/178 registers, 36 KiB, HMMA"),
    ("sm_120", HALF, 256, 64, 32, 8, 2, _VERIFY_SPLITS,
     _AOT + "174/218/173 registers, 68 KiB, HMMA"),
    ("sm_120", HALF, 512, 32, 16, 8, 1, _VERIFY_SPLITS,
     _AOT + "169/177/166 registers, 49 KiB, HMMA"),
    ("gfx942", HALF, 64, 64, 16, 2, 2, _VERIFY_SPLITS,
     _AOT + "135/147/138 registers, 8 KiB, MFMA"),
    ("gfx942", HALF, 128, 64, 16, 4, 2, _VERIFY_SPLITS,
     _AOT + "121/133/123 registers, 16 KiB, MFMA"),
    ("gfx942", HALF, 256, 64, 16, 8, 2, _VERIFY_SPLITS,
     _AOT + "137/147/137 registers, 32 KiB, MFMA"),
    ("gfx942", HALF, 512, 32, 16, 8, 1, _VERIFY_SPLITS,
     _AOT + "151/165/159 registers, 32 KiB, MFMA"),
    ("default", HALF, 128, 64, 32, 8, 2, _VERIFY_SPLITS, _ESTIMATE),
    ("default", HALF, 256, 64, 32, 8, 1, _VERIFY_SPLITS, _ESTIMATE),
    ("default", HALF, 512, 32, 16, 8, 1, _VERIFY_SPLITS, _ESTIMATE),
    ("sm_80", FLOAT, 256, 16, 32, 8, 2, _VERIFY_SPLITS, _AOT + "80/79/84 registers, 83 KiB, FMA"),
    ("sm_90", FLOAT, 256, 16, 32, 8, 2, _VERIFY_SPLITS, _AOT + "78/80/79 registers, 83 KiB, FMA"),
    ("sm_100", FLOAT, 256, 16, 32, 8, 2, _VERIFY_SPLITS, _AOT + "78/80/76 registers, 83 KiB, FMA"),
    ("sm_120", FLOAT, 256, 16, 32, 8, 2, _VERIFY_SPLITS,
     _AOT + "75/102/79 registers, 83 KiB, FMA"),
    ("gfx942", FLOAT, 256, 16, 32, 8, 1, _VERIFY_SPLITS,
     _AOT + "239/238/242 registers, 32 KiB, MFMA"),
    ("default", FLOAT, 256, 16, 32, 8, 1, _VERIFY_SPLITS, _ESTIMATE),
    ("default", FLOAT, 512, 16, 16, 8, 1, _VERIFY_SPLITS,
     _AOT + "190 registers, 65 KiB, FMA on sm_120; gfx942 222, 32 KiB, MFMA"),
    ("interpreter", HALF, 512, 32, 16, 1, 1, ((ANY, 48),), _SMALL),
    ("interpreter", FLOAT, 512, 32, 16, 1, 1, ((ANY, 48),), _SMALL),
))
_SCORE_SPLITS = ((16384, 512), (65536, 1024), (ANY, 2048))
_SCORE_KEYS = tuple(Row("score_keys", *row) for row in (
    # kernel, arch, dtype, head_dim, block_m, block_n, num_warps, num_stages, splits, source
    ("lse", "sm_80", HALF, 128, 64, 64, 4, 3, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "sm_80", HALF, 256, 64, 32, 4, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "sm_80", HALF, 512, 64, 32, 8, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "sm_90", HALF, 128, 128, 128, 8, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "sm_90", HALF, 256, 64, 64, 4, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "sm_90", HALF, 512, 64, 64, 8, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "sm_100", HALF, 128, 128, 128, 8, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "sm_100", HALF, 256, 64, 64, 4, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "sm_100", HALF, 512, 64, 64, 8, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "default", HALF, 128, 64, 64, 4, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "default", HALF, 256, 64, 32, 4, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "default", HALF, 512, 32, 32, 4, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "gfx942", HALF, 128, 64, 64, 4, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "gfx942", HALF, 256, 64, 32, 4, 2, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "gfx942", HALF, 512, 64, 16, 8, 1, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "default", FLOAT, 256, 16, 32, 4, 1, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "default", FLOAT, 512, 16, 16, 4, 1, _SCORE_SPLITS, _ESTIMATE),
    ("lse", "interpreter", HALF, 512, 16, 16, 1, 1, ((ANY, 48),), _SMALL),
    ("lse", "interpreter", FLOAT, 512, 16, 16, 1, 1, ((ANY, 48),), _SMALL),
    ("column", "sm_80", HALF, 64, 64, 64, 4, 3, ((ANY, 64),), _ESTIMATE),
    ("column", "sm_80", HALF, 128, 64, 64, 8, 3, ((ANY, 64),), _ESTIMATE),
    ("column", "sm_80", HALF, 256, 32, 64, 4, 2, ((ANY, 64),), _ESTIMATE),
    ("column", "sm_80", HALF, 512, 32, 64, 8, 1, ((ANY, 64),), _ESTIMATE),
    ("column", "sm_90", HALF, 128, 64, 128, 8, 2, ((ANY, 128),), _ESTIMATE),
    ("column", "sm_90", HALF, 256, 64, 64, 4, 2, ((ANY, 64),), _ESTIMATE),
    ("column", "sm_90", HALF, 512, 64, 64, 8, 1, ((ANY, 64),), _ESTIMATE),
    ("column", "sm_100", HALF, 128, 64, 128, 8, 2, ((ANY, 128),), _ESTIMATE),
    ("column", "sm_100", HALF, 256, 64, 64, 4, 2, ((ANY, 64),), _ESTIMATE),
    ("column", "sm_100", HALF, 512, 64, 32, 8, 1, ((ANY, 32),), _ESTIMATE),
    ("column", "gfx942", HALF, 256, 64, 64, 8, 1, ((ANY, 64),), _ESTIMATE),
    ("column", "gfx942", HALF, 512, 32, 32, 8, 1, ((ANY, 32),), _ESTIMATE),
    ("column", "default", HALF, 128, 64, 64, 4, 2, ((ANY, 64),), _ESTIMATE),
    ("column", "default", HALF, 256, 32, 64, 4, 2, ((ANY, 64),), _ESTIMATE),
    ("column", "default", HALF, 512, 32, 32, 4, 1, ((ANY, 32),), _ESTIMATE),
    ("column", "default", FLOAT, 256, 16, 32, 4, 1, ((ANY, 32),), _ESTIMATE),
    ("column", "default", FLOAT, 512, 16, 16, 4, 1, ((ANY, 16),), _ESTIMATE),
    ("column", "interpreter", HALF, 512, 16, 16, 1, 1, ((ANY, 16),), _SMALL),
    ("column", "interpreter", FLOAT, 512, 16, 16, 1, 1, ((ANY, 16),), _SMALL),
))
# Scores are float32 and have no head dim. "sample": keys that are sampled, by a row's length.
# "few" and "many": keys that a program holds, of a row or a list; block_n of a row that it reads.
_SAMPLES = ((1 << 16, 1024), (1 << 18, 4096), (ANY, 8192))
_SELECT_TOPK = tuple(Row("select_topk", *row) for row in (
    # kernel, arch, dtype, head_dim, block_m, block_n, num_warps, num_stages, splits, source
    ("sample", "gfx942", FLOAT, 0, 1, 1, 4, 1, _SAMPLES, _ESTIMATE),
    ("sample", "default", FLOAT, 0, 1, 1, 8, 1, _SAMPLES, _ESTIMATE),
    ("sample", "interpreter", FLOAT, 0, 1, 1, 1, 1, ((ANY, 128),), _SMALL),
    ("filter", "gfx942", FLOAT, 0, 1, 8192, 4, 1, ((ANY, 8192),), _ESTIMATE),
    ("filter", "default", FLOAT, 0, 1, 8192, 8, 1, ((ANY, 8192),), _ESTIMATE),
    ("filter", "interpreter", FLOAT, 0, 1, 64, 1, 1, ((ANY, 64),), _SMALL),
    ("few", "gfx942", FLOAT, 0, 1, 4096, 4, 1, ((ANY, 4096),), _ESTIMATE),
    ("few", "default", FLOAT, 0, 1, 4096, 8, 1, ((ANY, 4096),), _ESTIMATE),
    ("few", "interpreter", FLOAT, 0, 1, 32, 1, 1, ((ANY, 128),), _SMALL),
    ("many", "gfx942", FLOAT, 0, 1, 4096, 8, 1, ((ANY, 8192),), _ESTIMATE),
    ("many", "default", FLOAT, 0, 1, 4096, 16, 1, ((ANY, 8192),), _ESTIMATE),
    ("many", "interpreter", FLOAT, 0, 1, 64, 1, 1, ((ANY, 256),), _SMALL),
))
# Registers at D = 128 and at D = 256. With two stages a program asks for keys and values at once,
# by cp.async; with one it asks for values when it has its logits, another trip to memory later.
_SPARSE = tuple(Row("sparse_attention", *row) for row in (
    # kernel, arch, dtype, head_dim, block_m, block_n, num_warps, num_stages, splits, source
    ("few rows", "sm_80", HALF, 256, 16, 32, 4, 2, _SPARSE_SPLITS,
     _AOT + "96/128 registers, 41 KiB, HMMA"),
    ("few rows", "sm_90", HALF, 256, 16, 32, 4, 2, _SPARSE_SPLITS,
     _AOT + "96/140 registers, 41 KiB, HMMA"),
    ("few rows", "sm_100", HALF, 256, 16, 32, 4, 2, _SPARSE_SPLITS,
     _AOT + "96/140 registers, 41 KiB, HMMA"),
    ("few rows", "sm_120", HALF, 256, 16, 32, 4, 2, _SPARSE_SPLITS,
     _AOT + "96/138 registers, 41 KiB, HMMA"),
    ("few rows", "gfx942", HALF, 256, 16, 32, 4, 1, _SPARSE_SPLITS,
     _AOT + "97/159 registers, 16 KiB, MFMA"),
    ("few rows", "sm_80", FLOAT, 64, 16, 32, 4, 1, _SPARSE_SPLITS,
     _AOT + "72 registers at D = 64, 15 KiB, FMA"),
    ("few rows", "sm_80", FLOAT, 256, 16, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "64/100 registers, 51 KiB, FMA"),
    ("few rows", "sm_90", FLOAT, 256, 16, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "74/98 registers, 51 KiB, FMA"),
    ("few rows", "sm_100", FLOAT, 256, 16, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "76/108 registers, 51 KiB, FMA"),
    ("few rows", "sm_120", FLOAT, 256, 16, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "74/100 registers, 51 KiB, FMA"),
    ("few rows", "gfx942", FLOAT, 256, 16, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "145/232 registers, 32 KiB, MFMA"),
    ("many rows", "sm_80", HALF, 256, 64, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "173/238 registers, 52 KiB, HMMA"),
    ("many rows", "sm_90", HALF, 256, 64, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "140/255 registers, 64 KiB, HGMMA"),
    ("many rows", "sm_100", HALF, 256, 64, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "108/178 registers, 49 KiB, tcgen05"),
    ("many rows", "sm_120", HALF, 256, 64, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "166/236 registers, 52 KiB, HMMA"),
    ("many rows", "gfx942", HALF, 64, 64, 16, 2, 1, _SPARSE_SPLITS,
     _AOT + "110 registers at D = 64, 8 KiB, MFMA"),
    ("many rows", "gfx942", HALF, 256, 64, 16, 4, 1, _SPARSE_SPLITS,
     _AOT + "112/168 registers, 32 KiB, MFMA"),
    ("few rows", "default", HALF, 256, 16, 32, 4, 1, _SPARSE_SPLITS, _ESTIMATE),
    ("few rows", "default", HALF, 512, 16, 16, 8, 2, _SPARSE_SPLITS,
     _AOT + "125 to 128 registers at D = 512, 48 KiB, HMMA; 32 keys spill"),
    ("few rows", "gfx942", HALF, 512, 16, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "246 registers at D = 512, 32 KiB, MFMA"),
    ("few rows", "default", FLOAT, 256, 16, 32, 8, 1, _SPARSE_SPLITS, _ESTIMATE),
    ("few rows", "default", FLOAT, 512, 16, 16, 8, 1, _SPARSE_SPLITS,
     _AOT + "128 registers at D = 512, 65 KiB, FMA; gfx942 222, 32 KiB, MFMA"),
    ("many rows", "default", HALF, 256, 64, 32, 8, 1, _SPARSE_SPLITS, _ESTIMATE),
    ("many rows", "default", HALF, 512, 32, 32, 8, 1, _SPARSE_SPLITS,
     _AOT + "200 to 224 registers at D = 512, 66 KiB, HMMA"),
    ("many rows", "gfx942", HALF, 512, 32, 16, 8, 1, _SPARSE_SPLITS,
     _AOT + "164 registers at D = 512, 32 KiB, MFMA"),
    ("many rows", "default", FLOAT, 256, 16, 32, 8, 1, _SPARSE_SPLITS, "as few rows"),
    ("many rows", "default", FLOAT, 512, 16, 16, 8, 1, _SPARSE_SPLITS, "as few rows"),
    ("few rows", "interpreter", HALF, 512, 16, 16, 1, 1, ((2, 16), (ANY, 32)), _SMALL),
    ("few rows", "interpreter", FLOAT, 512, 16, 16, 1, 1, ((2, 16), (ANY, 32)), _SMALL),
    ("many rows", "interpreter", HALF, 512, 32, 16, 1, 1, ((2, 16), (ANY, 32)), _SMALL),
    ("many rows", "interpreter", FLOAT, 512, 32, 16, 1, 1, ((2, 16), (ANY, 32)), _SMALL),
))
# Block_m: rows of the input; block_n: of the weight; the split length: columns of a tile. The
# weights of two to three tiles are on their way in each program, by cp.async.
_INT4_LINEAR = tuple(Row("int4_linear", *row) for row in (
    # kernel, arch, dtype, head_dim, block_m, block_n, num_warps, num_stages, splits, source
    ("one row", "sm_80", BF16, 0, 1, 64, 4, 3, ((ANY, 512),), _AOT_INT4 + "128 registers, 36 KiB"),
    ("one row", "sm_90", BF16, 0, 1, 64, 4, 3, ((ANY, 512),), _AOT_INT4 + "128 registers, 36 KiB"),
    ("one row", "sm_100", BF16, 0, 1, 64, 4, 3, ((ANY, 512),),
     _AOT_INT4 + "128 registers, 36 KiB"),
    ("one row", "sm_120", BF16, 0, 1, 64, 2, 4, ((ANY, 256),),
     _AOT_INT4 + "128 registers, 27 KiB"),
    ("one row", "gfx942", BF16, 0, 1, 64, 4, 1, ((ANY, 512),), _AOT_INT4 + "101 registers"),
    ("one row", "default", BF16, 0, 1, 64, 4, 3, ((ANY, 512),), _ESTIMATE),
    ("one row", "interpreter", BF16, 0, 1, 32, 1, 1, ((ANY, 256),), _SMALL),
    ("few rows", "sm_80", BF16, 0, 16, 128, 8, 3, ((ANY, 256),),
     _AOT_INT4 + "117 registers, 50 KiB, HMMA"),
    ("few rows", "sm_90", BF16, 0, 16, 128, 4, 4, ((ANY, 256),),
     _AOT_INT4 + "200 registers, 83 KiB, HGMMA"),
    ("few rows", "sm_100", BF16, 0, 16, 128, 4, 3, ((ANY, 256),),
     _AOT_INT4 + "168 registers, 51 KiB, tcgen05"),
    ("few rows", "sm_120", BF16, 0, 16, 128, 8, 4, ((ANY, 256),),
     _AOT_INT4 + "117 registers, 75 KiB, HMMA"),
    ("few rows", "gfx942", BF16, 0, 16, 64, 4, 1, ((ANY, 256),),
     _AOT_INT4 + "72 registers, 8 KiB, MFMA"),
    ("few rows", "default", BF16, 0, 16, 64, 4, 2, ((ANY, 256),), _ESTIMATE),
    ("few rows", "interpreter", BF16, 0, 16, 32, 1, 1, ((ANY, 256),), _SMALL),
    ("many rows", "sm_80", BF16, 0, 32, 128, 8, 3, ((ANY, 256),),
     _AOT_INT4 + "128 registers, 66 KiB, HMMA"),
    ("many rows", "sm_90", BF16, 0, 32, 128, 8, 3, ((ANY, 256),),
     _AOT_INT4 + "127 registers, 82 KiB, HGMMA"),
    ("many rows", "sm_100", BF16, 0, 32, 128, 8, 3, ((ANY, 256),),
     _AOT_INT4 + "126 registers, 68 KiB, tcgen05"),
    ("many rows", "sm_120", BF16, 0, 32, 128, 8, 3, ((ANY, 256),),
     _AOT_INT4 + "128 registers, 66 KiB, HMMA"),
    ("many rows", "gfx942", BF16, 0, 32, 64, 4, 1, ((ANY, 256),),
     _AOT_INT4 + "112 registers, 8 KiB, MFMA"),
    ("many rows", "default", BF16, 0, 32, 64, 4, 2, ((ANY, 256),), _ESTIMATE),
    ("many rows", "interpreter", BF16, 0, 32, 32, 1, 1, ((ANY, 256),), _SMALL),
))
# The ops around a layer's products: a few rows of a few thousand features, so a launch is latency
# and little else. add_rms_norm has a row in one program, "split" its tile; rope_write a head;
# silu_mul a piece of `block_n` features.
_ROW_TILES = tuple((size, size) for size in (1024, 2048, 4096, 8192, 16384))
_LAYER = tuple(Row(*row) for row in (
    # op, kernel, arch, dtype, head_dim, block_m, block_n, num_warps, num_stages, splits, source
    ("add_rms_norm", "row", "default", HALF, 0, 1, 0, 8, 1, _ROW_TILES, _ESTIMATE),
    ("add_rms_norm", "row", "default", FLOAT, 0, 1, 0, 8, 1, _ROW_TILES, _ESTIMATE),
    ("add_rms_norm", "row", "interpreter", HALF, 0, 1, 0, 1, 1, _ROW_TILES, _SMALL),
    ("add_rms_norm", "row", "interpreter", FLOAT, 0, 1, 0, 1, 1, _ROW_TILES, _SMALL),
    ("rope_write", "head", "default", HALF, 512, 1, 1, 1, 1, ((ANY, 1),), _ESTIMATE),
    ("rope_write", "head", "default", FLOAT, 512, 1, 1, 1, 1, ((ANY, 1),), _ESTIMATE),
    ("rope_write", "head", "interpreter", HALF, 512, 1, 1, 1, 1, ((ANY, 1),), _SMALL),
    ("rope_write", "head", "interpreter", FLOAT, 512, 1, 1, 1, 1, ((ANY, 1),), _SMALL),
    ("silu_mul", "piece", "default", HALF, 0, 1, 512, 2, 1, ((ANY, 512),), _ESTIMATE),
    ("silu_mul", "piece", "default", FLOAT, 0, 1, 512, 2, 1, ((ANY, 512),), _ESTIMATE),
    ("silu_mul", "piece", "interpreter", HALF, 0, 1, 32, 1, 1, ((ANY, 32),), _SMALL),
    ("silu_mul", "piece", "interpreter", FLOAT, 0, 1, 32, 1, 1, ((ANY, 32),), _SMALL),
))
# block_n columns of a state are a program's, in registers; one row for all head dims, up to 256.
_RECURRENT = tuple(Row(*row) for row in (
    # op, kernel, arch, dtype, head_dim, block_m, block_n, num_warps, num_stages, splits, source
    ("gated_delta_rule", "state", "default", HALF, 0, 1, 8, 1, 1, ((ANY, 8),),
     _AOT + "62 to 98 registers at D = 128, 90 to 148 at 256"),
    ("gated_delta_rule", "state", "default", FLOAT, 0, 1, 8, 1, 1, ((ANY, 8),),
     _AOT + "66 to 96 registers at D = 128, 92 to 167 at 256"),
    ("gated_delta_rule", "state", "interpreter", HALF, 0, 1, 16, 1, 1, ((ANY, 16),), _SMALL),
    ("gated_delta_rule", "state", "interpreter", FLOAT, 0, 1, 16, 1, 1, ((ANY, 16),), _SMALL),
    ("causal_conv1d", "token", "default", HALF, 0, 1, 256, 2, 1, ((ANY, 256),), _ESTIMATE),
    ("causal_conv1d", "token", "default", FLOAT, 0, 1, 256, 2, 1, ((ANY, 256),), _ESTIMATE),
    ("causal_conv1d", "token", "interpreter", HALF, 0, 1, 32, 1, 1, ((ANY, 32),), _SMALL),
    ("causal_conv1d", "token", "interpreter", FLOAT, 0, 1, 32, 1, 1, ((ANY, 32),), _SMALL),
))
# fmt: on

TABLE: tuple[Row, ...] = (
    _VERIFY + _SPARSE + _SCORE_KEYS + _SELECT_TOPK + _INT4_LINEAR + _LAYER + _RECURRENT
)


@lru_cache(maxsize=4096)
def config(op: str, kernel: str, arch: str, dtype: str, head_dim: int, capacity: int) -> Config:
    """The configuration of a kernel: the first row that is large enough, else the default's.

    Args:
        op, kernel: whose.
        arch: from `arch_of`.
        dtype: HALF or FLOAT.
        head_dim: D, 0 for an op without one.
        capacity: N, or whatever the op's split lengths are laddered by.
    """
    for name in (arch, "default"):
        for row in TABLE:
            if row[:4] == (op, kernel, name, dtype) and head_dim <= row.head_dim:
                return row.config(capacity)
    raise LookupError(f"no row for {op}, {kernel}, {dtype}, head dim {head_dim}")


@lru_cache(maxsize=64)
def arch_of(device: torch.device) -> str:
    """The table's name for a device; "interpreter" for a CPU, where kernels run in it."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        # The compute chips of the same line; both have at least gfx942's 64 KiB of LDS.
        return "gfx942" if name in ("gfx90a", "gfx942", "gfx950") else "default"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 9)):
        return "sm_120"  # mma.sync and 99 KiB of shared memory, as there
    if (major, minor) == (8, 7):
        return "sm_80"
    name = f"sm_{major}0"
    return name if name in TARGETS else "default"


@lru_cache(maxsize=64)
def launches_early(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one that it waits for is under way.

    CUDA's programmatic dependent launch, from Hopper on.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def target_launches_early(target: str) -> bool:
    """The same of a key of TARGETS."""
    backend, arch, *_ = TARGETS[target]
    return backend == "cuda" and int(arch) >= 90


def precision(dtype: torch.dtype) -> str:
    """The table's name for a dtype."""
    return FLOAT if dtype is torch.float32 else HALF
