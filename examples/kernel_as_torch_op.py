"""Sparse attention as a torch op, in a compiled module, beside attention to all keys.

Shapes as everywhere here: query ``[B, Hq, T, D]``, key and value ``[B, Hkv, N, D]``.
"""

import torch

import std_kernels as sk

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
key, value = torch.randn(2, 1, 2, 4096, 64, device=device)  # 2 KV heads, room for 4096 tokens
query = 2 * key[:, :, 1000:1001].repeat_interleave(4, dim=1)  # 8 query heads look for one key
kv_len = torch.tensor([3000], dtype=torch.int32, device=device)
tail_start = kv_len - 100  # the last 100 tokens are always read


class SparseStep(torch.nn.Module):
    """One decoding step's attention to the k best keys and the tail."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, query, key, value, kv_len, tail_start):
        scores = sk.score_keys(query, key, kv_len)  # float32 [B, Hkv, N]
        before_tail = torch.arange(key.shape[2], device=key.device)[None] < tail_start[:, None]
        indices = sk.select_topk(scores, self.k, candidates=before_tail)  # int32 [B, Hkv, k]
        return sk.sparse_attention(query, key, value, indices, tail_start, kv_len)[0]


print(torch.ops.std_kernels.sparse_attention.default._schema)
dense, _ = sk.verify_attention(query, key, value, kv_len)
for k in (16, 64, 256):
    step = SparseStep(k)
    # "aot_eager" needs no compiler; the default backend fuses what is around the ops.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    sparse = step(query, key, value, kv_len, tail_start)
    same = torch.equal(compiled(query, key, value, kv_len, tail_start), sparse)
    error = float((sparse - dense).norm() / dense.norm())
    print(f"{k:4} of {int(tail_start)} keys: {error:.2%} from dense; compiled the same: {same}")
