"""Time one op beside PyTorch's own attention: `python examples/benchmark_one_op.py`.

`python -m qalign_kernels.bench --op qalign_attention --shape 1,8,1024,40` does this for every op and shape.
It checks the result first, and measures memory too.
"""

import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from qalign_kernels import qalign_attention

TOKENS, ROUNDS = 1024, 10


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


device = "cuda" if torch.cuda.is_available() else "cpu"
query, ref_query, ref_key, ref_value = torch.randn(4, 1, 8, TOKENS, 40, device=device).unbind(0)
calls = {
    "qalign_attention": lambda: qalign_attention(query, ref_query, ref_key, ref_value),
    "scaled_dot_product_attention": lambda: scaled_dot_product_attention(query, ref_key, ref_value),
}
for call in calls.values():
    call()  # compiles and warms up
rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(ROUNDS)]  # alternating
for name in calls:
    print(f"{name}: {1000 * statistics.median(each[name] for each in rounds):.2f} ms, median of {ROUNDS}")
