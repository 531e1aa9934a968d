"""Model FLOPs of a training step, by formula."""





# Speed.

def train_flops_per_image(layers: int, embed: int, mlp: int, palette_size: int, tokens: int, causal: bool = True
                          ) -> float:
    """Model FLOPs of one image in training, forward and backward, with the causal half of attention.

        forward = 2 x matrix parameters x tokens + 2 x layers x tokens^2 x embed
        train   = 3 x forward

    Matrix parameters: 4 embed^2 + 2 embed x mlp per layer, and the head's palette_size x embed. The second term is
    half of the 4 x layers x tokens^2 x embed of q k^T and of the weighted sum of v: the causal mask needs only that
    half, whatever the kernel computes. The backward pass costs twice the forward. Embedding look-ups, norms and
    anything that the backward pass recomputes count as nothing (PaLM, arXiv 2204.02311, Appendix B, with causal half).
    Where attention is not causal, all of it counts.
    """
    matrices = layers * (4 * embed**2 + 2 * embed * mlp) + palette_size * embed
    forward = 2 * matrices * tokens + (2 if causal else 4) * layers * tokens**2 * embed
    return 3 * forward
