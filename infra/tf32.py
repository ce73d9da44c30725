"""Matrix products of fp32 tensors in TF32, which keeps 10 of the 23 bits of a mantissa.

A GPU computes them some 8 times faster, and adds up in fp32. Of numbers that came from bf16 (7
bits) the products are exact: those of hidden states and head with --lora or --fsdp. Weights and
last hidden states in fp32, and gradients, are rounded. torch's own switch is global: it would also
round the angles of rotary positions.
"""

import contextlib

import torch


class TF32Linear(torch.autograd.Function):
    """x (n, D) and weight (vocabulary, D), both fp32 -> x @ weight.T (n, vocabulary). Its gradients
    are TF32 too."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        with tf32():
            return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        with tf32():
            return grad @ weight if of_x else None, grad.T @ x if of_weight else None


@contextlib.contextmanager
def tf32():
    """Inside, fp32 matrix products on a GPU are TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
