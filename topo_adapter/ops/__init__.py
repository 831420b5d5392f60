"""Operations: router, plan, attention, bridge, kept mass; each in torch, and which kernels serve it."""
