"""Speed, beside dense attention. Run from the repository's root, one module per benchmark:

    python -m benchmarks.layer              # the kernels of one layer: prefill, decode, distillation
    python -m benchmarks.end_to_end         # a whole model, random weights
    python -m benchmarks.training_step      # a step of training
    python -m benchmarks.trained            # a trained adapter on a text
    python -m benchmarks.route_agreement    # do two paths choose the same addresses
    python -m benchmarks.plot               # pictures, and the tables of docs/results.md and README

Rows go to JSON lines as results/README.md says. harness times and records, cases says what is measured, oracles
whether it is right, dense what it is compared with, topology calls the library.
"""
