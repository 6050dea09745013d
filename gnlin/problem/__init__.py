"""The problem: a model and a convex loss, their linearisation and their curvature."""
