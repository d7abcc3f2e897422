"""Formulas in NumPy, in double precision and with derivatives by hand: they compile nothing."""

import numpy as np


def attention_of(q, k, v, mask, d_out, divisor=None, cap=None, biases=0.0):
    """Vaswani et al. (2017), eq. 1, with a mask [R, T, S]: the output [R, T, H * N], and of
    sum(output * d_out) the gradients of q [R, T, H, N], k and v [R, S, K, N]."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    (R, T, H, N), (_, S, K, _) = q.shape, k.shape
    divisor = divisor or N**0.5
    k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
    d_out = d_out.reshape(q.shape)
    scores = np.einsum("rqhn,rthn->rhqt", q, k, optimize=True) / divisor
    capped = cap * np.tanh(scores / cap) if cap else scores
    seen = np.where(np.asarray(mask)[:, None], capped + biases, -1e30)
    weights = np.exp(seen - seen.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("rhqt,rthn->rqhn", weights, v, optimize=True)
    d_weights = np.einsum("rqhn,rthn->rhqt", d_out, v, optimize=True)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_scores *= (1 - (capped / cap) ** 2 if cap else 1) / divisor  # tanh' = 1 - tanh^2
    d_q = np.einsum("rhqt,rthn->rqhn", d_scores, k, optimize=True)
    d_k = np.einsum("rhqt,rqhn->rthn", d_scores, q, optimize=True)
    d_v = np.einsum("rhqt,rqhn->rthn", weights, d_out, optimize=True)
    d_k, d_v = (x.reshape(R, S, K, H // K, N).sum(3) for x in (d_k, d_v))
    return out.reshape(R, T, H * N), (d_q, d_k, d_v)
