"""What `kernels benchmark FOLDER` times: one layer of Qwen2.5-VL-7B's shape over 32,768 tokens in bf16. Without a GPU,
512 tokens of a small shape in fp32 show that it runs.

`exact` is compared with plain PyTorch, in fp32: in 16 bits, near ties choose other blocks. `dense` is the baseline.
"""

import torch
from kernels.benchmark import Benchmark
from torch.nn.functional import scaled_dot_product_attention


class NativeSparseAttention(Benchmark):
    seed = 0

    def setup(self, tokens=32768, dtype=torch.bfloat16, **sizes):
        heads, kv_heads, dim, device = 28, 4, 128, "cuda"
        if not torch.cuda.is_available():  # `self.device` is "cuda" wherever torch was built for it
            tokens, heads, kv_heads, dim, device, dtype = 512, 4, 2, 32, "cpu", torch.float32
        options = {"device": device, "dtype": dtype}
        self.q, self.k, self.v = (torch.randn(tokens, h, dim, **options) for h in (heads, kv_heads, kv_heads))
        self.gates = torch.rand(tokens, heads, 3, **options)
        self.cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        self.sizes = sizes

    def attend(self, module, *tensors):
        return module.nsa_attention(*tensors, self.cu_seqlens, **self.sizes)

    def benchmark_forward(self):
        self.out = self.attend(self.kernel, self.q, self.k, self.v, self.gates)

    def benchmark_forward_and_backward(self):
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v, self.gates)]
        out = self.attend(self.kernel, *leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    def benchmark_dense(self):
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        self.out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def setup_exact(self):
        self.setup(2048, torch.float32, block_count=6)

    benchmark_exact = benchmark_forward

    def verify_exact(self):
        return self.attend(self.kernel.nsa_torch, self.q, self.k, self.v, self.gates)
