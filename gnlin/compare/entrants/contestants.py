"""The table of contestants, with the values of their tuned numbers.

Every contestant has five trials. Learning rates lie a factor 4 apart, values of λ a factor 10.
"""

from gnlin.compare.entrants import optimisers, peers, requirements
from gnlin.compare.entrants.contestant import (
    Contestant,
    Options,
    batch,
    integer,
    number,
    one_of,
    period,
    positive,
    switch,
)

_RATES = (0.001, 0.004, 0.016, 0.064, 0.256)
_SGD_RATES = (0.01, 0.04, 0.16, 0.64, 2.56)
_AROUND_ONE = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0)
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_RELATIVE_DAMPINGS = _DAMPINGS  # around the least λ of the default
_LEAST_DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def _least_damping(options: Options) -> tuple[float, ...]:
    return _RELATIVE_DAMPINGS if options["step"] == "momentum" else _LEAST_DAMPINGS


def _rates_of_inner(options: Options) -> tuple[float, ...]:
    return _SGD_RATES if options["inner"] == "sgd" else _RATES


_SOLVER = {
    "solver": one_of("auto", "cg", "dense"),
    "max_iterations": integer(10),
    "rtol": number(1e-2),
    "warm_start": number(0.0),
}

_OPTIMISTIX = {
    "solver": one_of("auto", "qr", "cg"),
    "rtol": number(1e-3),
    "max_iterations": integer(100),
    "batch": batch("full"),
}

CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            "sgd",
            "Stochastic gradient descent with momentum (Optax).",
            optimisers.sgd,
            grid=_SGD_RATES,
            options={"momentum": number(0.9), "batch": batch()},
        ),
        Contestant(
            "adam",
            "Adam (Optax): iterative linearisation with K = 1.",
            optimisers.adam,
            grid=_RATES,
            options={"batch": batch()},
        ),
        Contestant(
            "adamw",
            "Adam with decoupled weight decay (Optax).",
            optimisers.adamw,
            grid=_RATES,
            options={"weight_decay": number(1e-2), "batch": batch()},
        ),
        Contestant(
            "muon",
            "Muon: orthogonalised momentum (Optax); `ends` of a transformer have Adam.",
            optimisers.muon,
            grid=_RATES,
            options={"ends": one_of("adam", "muon"), "batch": batch()},
            reason_unfit=optimisers.muon_unfit,
        ),
        Contestant(
            "soap",
            "SOAP: Adam in the eigenbasis of Shampoo's factors, with the settings of its paper.",
            optimisers.soap,
            grid=_RATES,
            options={"batch": batch()},
        ),
        Contestant(
            "lbfgs",
            "L-BFGS with zoom line search, full batch (Optax); tuned: longest step.",
            optimisers.lbfgs,
            tuned="max_step",
            grid=(0.25, 1.0, 4.0, 16.0, 64.0),
            options={"memory": integer(10)},
        ),
        Contestant(
            "il",
            "Iterative linearisation: the anchor moves every `period` steps of the inner "
            "optimiser.",
            optimisers.iterative_linearisation,
            grid=_rates_of_inner,
            options={
                "period": period(16),
                "inner": one_of("adam", "sgd", "adamw", "muon"),
                "momentum": number(0.9),
                "loss_model": one_of("exact", "quadratic"),
                "reset": switch(False),
                "line_search": switch(False),
                "batch": batch(),
            },
            family="gnlin",
        ),
        Contestant(
            "il-gap",
            "Iterative linearisation: the anchor moves when the network is off its linearisation "
            "by a share `gap`.",
            optimisers.linearised_while_it_holds,
            grid=_rates_of_inner,
            options={
                "gap": positive(0.2),
                "patience": integer(2),
                "every": integer(1),
                "longest": period(None),
                "inner": one_of("adam", "sgd", "adamw", "muon"),
                "momentum": number(0.9),
                "batch": batch(),
            },
            family="gnlin",
        ),
        Contestant(
            "prox-linear",
            "Full Gauss-Newton, prox-linear: `steps` inner steps on one batch in each update.",
            optimisers.prox_linear,
            grid=_rates_of_inner,
            options={
                "steps": integer(16),
                "inner": one_of("adam", "sgd", "adamw", "muon"),
                "momentum": number(0.9),
                "loss_model": one_of("exact", "quadratic"),
                "line_search": switch(False),
                "batch": batch(),
            },
            family="gnlin",
        ),
        Contestant(
            "gn",
            "Gauss-Newton with Kronecker factors, momentum and adapted damping; tuned: least λ, in "
            "units of the problem, or with step=subspace in those of the curvature.",
            optimisers.gauss_newton,
            tuned="damping",
            grid=_least_damping,
            options={
                "learning_rate": number(1.0),
                "step": one_of("momentum", "subspace"),
                "refresh": integer(5),
                "solver": one_of("kronecker", "cg", "dense"),
                "max_iterations": integer(10),
                "momentum": switch(True),
                "loss_model": one_of("exact", "quadratic"),
                "batch": batch(),
            },
            family="gnlin",
        ),
        Contestant(
            "gn-eigen",
            "Gauss-Newton for small batches: Adam in the eigenbasis of the Kronecker factors.",
            optimisers.gauss_newton_eigenbasis,
            grid=(0.01875, 0.075, 0.3, 1.2, 4.8),
            options={"refresh": integer(10), "batch": batch()},
            family="gnlin",
        ),
        Contestant(
            "gn-cg",
            "Damped Gauss-Newton by conjugate gradients, full steps; tuned: λ at the end, to which "
            "λ falls from 1 as exp(−step / decay); with control=constant λ never changes.",
            optimisers.damped_gauss_newton,
            tuned="damping",
            grid=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
            options={
                "learning_rate": number(1.0),
                "control": one_of("decay", "constant"),
                "decay": number(20.0),
                **_SOLVER,
                "batch": batch(),
            },
            family="gnlin",
        ),
        Contestant(
            "lm",
            "Levenberg-Marquardt, full batch; tuned: first damping.",
            optimisers.levenberg_marquardt,
            tuned="damping",
            grid=_DAMPINGS,
            options={
                **_SOLVER,
                "max_iterations": integer(20),
                "warm_start": number(0.9),
                "scaling": one_of("identity", "marquardt"),
                "batch": batch("full"),
            },
            family="gnlin",
        ),
        Contestant(
            "lm-trust",
            "Levenberg-Marquardt with Moré's trust region, full batch; tuned: first radius.",
            optimisers.trust_region,
            tuned="radius",
            grid=(0.01, 0.1, 1.0, 10.0, 100.0),
            options={"scaling": one_of("marquardt", "identity"), "batch": batch("full")},
            reason_unfit=optimisers.too_large_to_factorise,
            family="gnlin",
        ),
        Contestant(
            "somax-sgn",
            "Damped Gauss-Newton by warm-started conjugate gradients (somax).",
            peers.somax_sgn,
            grid=_AROUND_ONE,
            options={
                "damping": number(0.01),
                "control": one_of("constant", "trust-region"),
                "max_iterations": integer(20),
                "rtol": number(1e-4),
                "batch": batch(),
            },
            reason_absent=requirements.somax_absent,
            reason_unfit=requirements.somax_unfit,
            family="peers",
        ),
        Contestant(
            "somax-egn",
            "Damped Gauss-Newton by a Cholesky factorisation over the outputs (somax).",
            peers.somax_egn,
            grid=_AROUND_ONE,
            options={
                "damping": number(1.0),
                "control": one_of("constant", "trust-region"),
                "batch": batch(),
            },
            reason_absent=requirements.somax_absent,
            reason_unfit=requirements.somax_egn_unfit,
            family="peers",
        ),
        Contestant(
            "kfac",
            "K-FAC with adaptive damping, momentum and learning rate (kfac-jax); tuned: first "
            "damping.",
            peers.kfac,
            tuned="damping",
            grid=_DAMPINGS,
            options={"batch": batch()},
            reason_absent=requirements.kfac_absent,
            reason_unfit=requirements.kfac_unfit,
            family="peers",
        ),
        Contestant(
            "optimistix-gn",
            "Gauss-Newton without damping, least squares, full batch (optimistix).",
            peers.optimistix_gn,
            grid=_AROUND_ONE,
            options=_OPTIMISTIX,
            reason_absent=requirements.optimistix_absent,
            reason_unfit=requirements.least_squares_unfit,
            family="peers",
        ),
        Contestant(
            "optimistix-lm",
            "Levenberg-Marquardt, least squares, full batch (optimistix); tuned: first damping.",
            peers.optimistix_lm,
            tuned="damping",
            grid=_DAMPINGS,
            options=_OPTIMISTIX,
            reason_absent=requirements.optimistix_absent,
            reason_unfit=requirements.least_squares_unfit,
            family="peers",
        ),
        Contestant(
            "jaxopt-gn",
            "Gauss-Newton without damping, least squares, full batch (jaxopt); there is nothing "
            "to tune.",
            peers.jaxopt_gn,
            grid=(1.0,),
            options={"batch": batch("full")},
            reason_absent=requirements.jaxopt_absent,
            reason_unfit=requirements.jaxopt_unfit,
            family="peers",
        ),
        Contestant(
            "jaxopt-lm",
            "Levenberg-Marquardt, least squares, full batch (jaxopt); tuned: first damping.",
            peers.jaxopt_lm,
            tuned="damping",
            grid=(0.01, 0.1, 1.0, 10.0, 100.0),
            options={"batch": batch("full")},
            reason_absent=requirements.jaxopt_absent,
            reason_unfit=requirements.jaxopt_unfit,
            family="peers",
        ),
    )
}

# The contestants of a comparison that names none.
DEFAULT = (
    "sgd",
    "adam",
    "il:period=16",
    "il:period=256",
    "il:period=never",
    "gn",
    "sgd:batch=full",
    "lm",
)
