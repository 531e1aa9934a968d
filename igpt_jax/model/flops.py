"""Model FLOPs of a training step, by formula."""


def train_flops_per_image(layers: int, embed: int, mlp: int, vocabulary: int, tokens: int, causal: bool = True
                          ) -> float:
    """Model FLOPs of one image in training, forward and backward (PaLM, arXiv 2204.02311, Appendix B).

        forward = 2 x matrix parameters x tokens + attention
        train   = 3 x forward

    Matrix parameters are 4 embed^2 + 2 embed x mlp per layer, and the head's vocabulary x embed. Attention is q k^T
    and the weighted sum of v, 4 x layers x tokens^2 x embed together. Of these a causal model needs half, and half is
    counted, whatever the kernel computes. The backward pass costs twice the forward pass. Embedding look-ups, norms and
    recomputation are not counted.
    """
    matrices = layers * (4 * embed**2 + 2 * embed * mlp) + vocabulary * embed
    attention = 4 * layers * tokens**2 * embed
    return 3.0 * (2 * matrices * tokens + (attention / 2 if causal else attention))
