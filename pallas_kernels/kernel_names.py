"""Names of kernels and operations in stored files: tables of tiles, results, specifications."""

# What files that were written before call them.
FORMER = {
    "short_forward": "fused_row_forward",
    "short_backward": "fused_row_backward",
    "long_forward": "flash_forward",
    "long_d_q": "flash_d_q",
    "long_d_kv": "flash_d_kv",
    "add_and_norm": "add_layer_norm",
    "add_and_norm_forward": "add_layer_norm_forward",
    "add_and_norm_backward": "add_layer_norm_backward",
    "add_and_score": "add_layer_norm_cross_entropy",
    "add_and_score_forward": "add_layer_norm_cross_entropy_forward",
    "add_and_score_backward": "add_layer_norm_cross_entropy_backward",
    "product": "matmul",
    "deep_product": "matmul_deep",
    "gelu_product": "matmul_gelu",
    "product_times": "matmul_mul",
    "weight_gradients": "weight_grads",
}


def current_name(name: str) -> str:
    """What a kernel or an operation of a stored file is called now."""
    return FORMER.get(name, name)
