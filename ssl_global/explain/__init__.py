"""Seeing what a network learnt: pictures and figures of its features, its gradients and its attention."""
