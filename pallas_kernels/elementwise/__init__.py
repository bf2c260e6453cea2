"""Backward passes around matrix products: of a norm, of convolutions, of a gated MLP. They are bound by memory."""
