"""Drop-in modules: the functions of other libraries with their signatures and conventions, on this package's solver.

Each module translates arguments and results of one library and solves with `pisces_kernels.sinkhorn` or
`sinkhorn_points`; none of them imports the library that it stands in for. Import the one you need:

    pisces_kernels.compat.pot: POT (`ot.sinkhorn`, `ot.sinkhorn2`, `ot.bregman.sinkhorn_log`,
        `ot.unbalanced.sinkhorn_unbalanced`, `ot.partial.entropic_partial_wasserstein` and their variants).
    pisces_kernels.compat.geomloss: geomloss (`SamplesLoss`, `geomloss.ot.solve`, `solve_sample`, `solve_batch`).
    pisces_kernels.compat.pisces: the transport functions of the released PISCES code, for any batch size.

The docstring of every function says where it agrees exactly and where it differs on purpose.
"""
