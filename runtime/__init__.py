"""Running fused graphs: the executor, the paged KV cache, quantized weights, the scheduler."""
